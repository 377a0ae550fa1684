#include "tools/lm/config.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/tools/lm/scratch.h"

static const char good[] = "{\"architectures\": [\"Qwen3ForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 96,"
			   "\"num_hidden_layers\": 2, \"num_attention_heads\": 6, \"num_key_value_heads\": 3,"
			   "\"head_dim\": 16, \"vocab_size\": 300, \"max_position_embeddings\": 512}";

static int setup(void **state)
{
	struct scratch *scratch = calloc(1, sizeof(*scratch));

	assert_non_null(scratch);
	scratch_init(scratch);
	*state = scratch;
	return 0;
}

static int teardown(void **state)
{
	scratch_deinit(*state);
	free(*state);
	return 0;
}

static void test_pilot(void **state)
{
	struct lm_config c;
	char text[LM_TEXT];

	(void)state;
	assert_int_equal(lm_config_read("pilot-lm", &c, text), 0);
	assert_int_equal(c.hidden, 256);
	assert_int_equal(c.intermediate, 768);
	assert_int_equal(c.layers, 6);
	assert_int_equal(c.heads, 8);
	assert_int_equal(c.kv_heads, 4);
	assert_int_equal(c.head_dim, 32);
	assert_int_equal(c.vocab, 272);
	assert_int_equal(c.max_positions, 4096);
	assert_true(c.rope_theta == 100000.0);
	assert_true(c.norm_eps == 1e-6);
	assert_true(c.tied);
}

/* The good configuration with keys replaced by those of `change` (JSON; a null removes the key). */
static int read_changed(struct scratch *scratch, const char *change, struct lm_config *config, char *text)
{
	json_t *root = json_loads(good, 0, NULL), *changes = json_loads(change, 0, NULL), *value;
	const char *key;
	char *dump;

	assert_true(root && changes);
	json_object_foreach(changes, key, value)
	{
		if (json_is_null(value))
			(void)json_object_del(root, key);
		else
			assert_int_equal(json_object_set(root, key, value), 0);
	}
	dump = json_dumps(root, 0);
	assert_non_null(dump);
	(void)scratch_text(scratch, "config.json", dump);
	free(dump);
	json_decref(changes);
	json_decref(root);
	return lm_config_read(scratch->dir, config, text);
}

static void test_defaults(void **state)
{
	struct lm_config c;
	char text[LM_TEXT];

	assert_int_equal(read_changed(*state, "{\"head_dim\": null, \"hidden_size\": 96}", &c, text), 0);
	assert_int_equal(c.head_dim, 16);
	assert_true(c.rope_theta == 10000.0);
	assert_true(c.norm_eps == 1e-6);
	assert_false(c.tied);
	assert_int_equal(read_changed(*state,
				 "{\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 5e6}}", &c, text),
		0);
	assert_true(c.rope_theta == 5e6);
}

static void test_refusals_name_what_is_refused(void **state)
{
	static const struct {
		const char *change;
		int error;
		const char *says;
	} cases[] = {
		{"{\"architectures\": [\"LlamaForCausalLM\"]}", -EOPNOTSUPP,
			"config.json: kvgate-lm runs Qwen3ForCausalLM"},
		{"{\"architectures\": [\"LlamaForCausalLM\"]}", -EOPNOTSUPP, "architecture LlamaForCausalLM in /tmp/"},
		{"{\"architectures\": null}", -EINVAL, "architectures is missing"},
		{"{\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4}}", -EOPNOTSUPP,
			"rope_scaling of type yarn"},
		{"{\"rope_scaling\": {\"type\": \"linear\"}}", -EOPNOTSUPP, "rope_scaling of type linear"},
		{"{\"rope_parameters\": {\"rope_theta\": 1e6, \"rope_type\": \"llama3\"}}", -EOPNOTSUPP,
			"rope_parameters of type llama3"},
		{"{\"attention_bias\": true}", -EOPNOTSUPP, "attention_bias is true"},
		{"{\"use_sliding_window\": true}", -EOPNOTSUPP, "use_sliding_window is true"},
		{"{\"hidden_act\": \"gelu\"}", -EOPNOTSUPP, "hidden_act gelu"},
		{"{\"quantization_config\": {\"quant_method\": \"fp8\"}}", -EOPNOTSUPP, "quantization_config"},
		{"{\"hidden_size\": null}", -EINVAL, "hidden_size is missing"},
		{"{\"hidden_size\": \"64\"}", -EINVAL, "hidden_size is not an integer"},
		{"{\"hidden_size\": 0}", -EINVAL, "hidden_size is 0, not within 1 and 65536"},
		{"{\"vocab_size\": 99999999999}", -EINVAL, "vocab_size is 99999999999, not within 1 and 1048576"},
		{"{\"num_key_value_heads\": 4}", -EINVAL,
			"num_attention_heads is 6, not a multiple of num_key_value_heads 4"},
		{"{\"head_dim\": 15}", -EINVAL, "head_dim is 15, not even"},
		{"{\"rope_theta\": -1}", -EINVAL, "rope_theta is not a positive number"},
		{"{\"rms_norm_eps\": \"x\"}", -EINVAL, "rms_norm_eps is not a positive number"},
		{"{\"tie_word_embeddings\": 1}", -EINVAL, "tie_word_embeddings is neither true nor false"},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct lm_config c = {.hidden = 77};
		char text[LM_TEXT] = "";

		assert_int_equal(read_changed(*state, cases[i].change, &c, text), cases[i].error);
		if (!strstr(text, cases[i].says))
			fail_msg("%s: '%s' lacks '%s'", cases[i].change, text, cases[i].says);
		assert_int_equal(c.hidden, 77);
	}
}

static void test_broken_files(void **state)
{
	struct scratch *scratch = *state;
	struct lm_config c;
	char text[LM_TEXT];

	assert_int_equal(lm_config_read(scratch->dir, &c, text), -ENOENT);
	assert_non_null(strstr(text, "config.json: No such file or directory"));
	(void)scratch_text(scratch, "config.json", "{\n\"a\": 1,\n}");
	assert_int_equal(lm_config_read(scratch->dir, &c, text), -EINVAL);
	assert_non_null(strstr(text, "config.json:3: "));
	(void)scratch_text(scratch, "config.json", "[]");
	assert_int_equal(lm_config_read(scratch->dir, &c, text), -EINVAL);
	assert_non_null(strstr(text, "not a JSON object"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_pilot),
		cmocka_unit_test_setup_teardown(test_defaults, setup, teardown),
		cmocka_unit_test_setup_teardown(test_refusals_name_what_is_refused, setup, teardown),
		cmocka_unit_test_setup_teardown(test_broken_files, setup, teardown),
	};

	return runner_run("tools/lm/config", tests, sizeof(tests) / sizeof(tests[0]));
}
