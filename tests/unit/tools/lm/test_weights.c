#include "tools/lm/weights.h"

#include <errno.h>
#include <string.h>

#include "proto/safetensors.h"
#include "tests/support/runner.h"

static float bf16_at(const struct kvg_tensor *tensor, size_t index)
{
	uint16_t bits;
	uint32_t wide;
	float value;

	memcpy(&bits, (const char *)tensor->data + index * sizeof(bits), sizeof(bits));
	wide = (uint32_t)bits << 16;
	memcpy(&value, &wide, sizeof(value));
	return value;
}

/* First and last element of `count` floats at `at` are those of the tensor. */
static void check_ends(const struct kvg_safetensors *file, const char *name, const float *at, size_t count)
{
	const struct kvg_tensor *tensor = kvg_safetensors_find(file, name);

	assert_non_null(tensor);
	assert_int_equal(tensor->count, count);
	assert_true(at[0] == bf16_at(tensor, 0));
	assert_true(at[count - 1] == bf16_at(tensor, count - 1));
}

static void test_pilot_weights_are_where_they_belong(void **state)
{
	struct kvg_safetensors *file;
	struct lm_config c;
	struct lm_weights w;
	char text[LM_TEXT];

	(void)state;
	assert_int_equal(lm_config_read("pilot-lm", &c, text), 0);
	assert_int_equal(lm_weights_read("pilot-lm", &c, &w, text), 0);
	assert_int_equal(kvg_safetensors_open("pilot-lm/model.safetensors", &file, text, sizeof(text)), 0);
	check_ends(file, "model.embed_tokens.weight", w.embedding, 272 * 256);
	check_ends(file, "model.norm.weight", w.norm, 256);
	assert_ptr_equal(w.head, w.embedding);
	check_ends(file, "model.layers.5.self_attn.q_proj.weight", w.layers[5].qkv, 256 * 256);
	check_ends(file, "model.layers.5.self_attn.k_proj.weight", w.layers[5].qkv + 256 * 256, 128 * 256);
	check_ends(file, "model.layers.5.self_attn.v_proj.weight", w.layers[5].qkv + 384 * 256, 128 * 256);
	check_ends(file, "model.layers.0.mlp.gate_proj.weight", w.layers[0].gate_up, 768 * 256);
	check_ends(file, "model.layers.0.mlp.up_proj.weight", w.layers[0].gate_up + 768 * 256, 768 * 256);
	check_ends(file, "model.layers.3.mlp.down_proj.weight", w.layers[3].down, 256 * 768);
	check_ends(file, "model.layers.3.self_attn.o_proj.weight", w.layers[3].output, 256 * 256);
	check_ends(file, "model.layers.2.self_attn.q_norm.weight", w.layers[2].q_norm, 32);
	check_ends(file, "model.layers.2.self_attn.k_norm.weight", w.layers[2].k_norm, 32);
	check_ends(file, "model.layers.2.input_layernorm.weight", w.layers[2].input_norm, 256);
	check_ends(file, "model.layers.2.post_attention_layernorm.weight", w.layers[2].post_norm, 256);
	(void)kvg_safetensors_free(file);
	lm_weights_deinit(&w);
	assert_null(w.memory);
}

static void test_a_lying_config_is_found_out(void **state)
{
	struct lm_config pilot, c;
	struct lm_weights w;
	char text[LM_TEXT];

	(void)state;
	assert_int_equal(lm_config_read("pilot-lm", &pilot, text), 0);
	c = pilot;
	c.layers = 7;
	assert_int_equal(lm_weights_read("pilot-lm", &c, &w, text), -ENOENT);
	assert_string_equal(text, "pilot-lm: tensor model.layers.6.input_layernorm.weight is missing");
	c = pilot;
	c.kv_heads = 2;
	assert_int_equal(lm_weights_read("pilot-lm", &c, &w, text), -EINVAL);
	assert_string_equal(text, "pilot-lm/model.safetensors: tensor model.layers.0.self_attn.k_proj.weight has shape "
				  "[128, 256], config.json needs [64, 256]");
	c = pilot;
	c.tied = false;
	assert_int_equal(lm_weights_read("pilot-lm", &c, &w, text), -ENOENT);
	assert_string_equal(text, "pilot-lm: tensor lm_head.weight is missing");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_pilot_weights_are_where_they_belong),
		cmocka_unit_test(test_a_lying_config_is_found_out),
	};

	return runner_run("tools/lm/weights", tests, sizeof(tests) / sizeof(tests[0]));
}
