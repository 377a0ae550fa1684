#include "tools/lm/checkpoint.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/tools/lm/scratch.h"

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

/* a: bf16 [2, 2] = 1, -2, 0.5, 0; b: f16 [2] = 1, -2; c: f32 [1] = 7; d: i32 [1]. */
static void write_all(struct scratch *scratch, const char *name)
{
	const uint16_t a[] = {0x3f80, 0xc000, 0x3f00, 0}, b[] = {0x3c00, 0xc000};
	const float c = 7.0f;
	const int32_t d = 1;
	char data[20];

	memcpy(data, a, 8);
	memcpy(data + 8, b, 4);
	memcpy(data + 12, &c, 4);
	memcpy(data + 16, &d, 4);
	(void)scratch_tensors(scratch, name,
		"\"a\":{\"dtype\":\"BF16\",\"shape\":[2,2],\"data_offsets\":[0,8]},"
		"\"b\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[8,12]},"
		"\"c\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[12,16]},"
		"\"d\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[16,20]}",
		data, sizeof(data));
}

static void check_a(const struct lm_checkpoint *checkpoint)
{
	const float want[] = {1.0f, -2.0f, 0.5f, 0.0f};
	float got[4];
	char text[LM_TEXT];

	assert_int_equal(lm_checkpoint_read(checkpoint, "a", 2, 2, got, text), 0);
	assert_memory_equal(got, want, sizeof(want));
}

static void test_one_file(void **state)
{
	struct scratch *scratch = *state;
	struct lm_checkpoint *checkpoint;
	char text[LM_TEXT];
	float value[2];

	write_all(scratch, "model.safetensors");
	assert_int_equal(lm_checkpoint_open(scratch->dir, &checkpoint, text), 0);
	check_a(checkpoint);
	assert_int_equal(lm_checkpoint_read(checkpoint, "b", 2, 0, value, text), 0);
	assert_true(value[0] == 1.0f && value[1] == -2.0f);
	assert_int_equal(lm_checkpoint_read(checkpoint, "c", 1, 0, value, text), 0);
	assert_true(value[0] == 7.0f);
	(void)lm_checkpoint_free(checkpoint);
}

static void test_wrong_tensors(void **state)
{
	static const struct {
		const char *name;
		uint64_t rows, columns;
		int error;
		const char *says;
	} cases[] = {
		{"x", 2, 2, -ENOENT, "tensor x is missing"},
		{"a", 2, 3, -EINVAL, "model.safetensors: tensor a has shape [2, 2], config.json needs [2, 3]"},
		{"a", 4, 0, -EINVAL, "tensor a has shape [2, 2], config.json needs [4]"},
		{"b", 2, 1, -EINVAL, "tensor b has shape [2], config.json needs [2, 1]"},
		{"d", 1, 0, -EINVAL, "tensor d is not of bf16, f16 or f32"},
	};
	struct scratch *scratch = *state;
	struct lm_checkpoint *checkpoint;
	char text[LM_TEXT];
	float got[6] = {42.0f};

	write_all(scratch, "model.safetensors");
	assert_int_equal(lm_checkpoint_open(scratch->dir, &checkpoint, text), 0);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		assert_int_equal(
			lm_checkpoint_read(checkpoint, cases[i].name, cases[i].rows, cases[i].columns, got, text),
			cases[i].error);
		if (!strstr(text, cases[i].says))
			fail_msg("'%s' lacks '%s'", text, cases[i].says);
	}
	assert_true(got[0] == 42.0f);
	(void)lm_checkpoint_free(checkpoint);
}

static void test_shards(void **state)
{
	struct scratch *scratch = *state;
	struct lm_checkpoint *checkpoint;
	const float e = 3.0f;
	char text[LM_TEXT];
	float value;

	write_all(scratch, "one.safetensors");
	(void)scratch_tensors(scratch, "two.safetensors",
		"\"e\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}", &e, sizeof(e));
	(void)scratch_text(scratch, "model.safetensors.index.json",
		"{\"weight_map\": {\"a\": \"one.safetensors\", \"b\": \"one.safetensors\", \"e\": "
		"\"two.safetensors\"}}");
	assert_int_equal(lm_checkpoint_open(scratch->dir, &checkpoint, text), 0);
	check_a(checkpoint);
	assert_int_equal(lm_checkpoint_read(checkpoint, "e", 1, 0, &value, text), 0);
	assert_true(value == 3.0f);
	(void)lm_checkpoint_free(checkpoint);
}

static void test_bad_folders(void **state)
{
	static const struct {
		const char *index;
		int error;
		const char *says;
	} cases[] = {
		{"{\"weight_map\": {\"a\": \"../one.safetensors\"}}", -EINVAL, "the file of a is not a file name"},
		{"{\"weight_map\": {\"a\": 3}}", -EINVAL, "the file of a is not a file name: (not a string)"},
		{"{\"weight_map\": {\"a\": \"gone.safetensors\"}}", -ENOENT, "gone.safetensors"},
		{"{\"weight_map\": {}}", -EINVAL, "weight_map is missing or empty"},
		{"{\"weight_map\": ", -EINVAL, "index.json:1: "},
		{"3", -EINVAL, "index.json:1: "},
	};
	struct scratch *scratch = *state;
	struct lm_checkpoint *checkpoint = NULL;
	char text[LM_TEXT];

	assert_int_equal(lm_checkpoint_open(scratch->dir, &checkpoint, text), -ENOENT);
	assert_non_null(strstr(text, "no model.safetensors and no model.safetensors.index.json there"));
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		(void)scratch_text(scratch, "model.safetensors.index.json", cases[i].index);
		assert_int_equal(lm_checkpoint_open(scratch->dir, &checkpoint, text), cases[i].error);
		if (!strstr(text, cases[i].says))
			fail_msg("%s: '%s' lacks '%s'", cases[i].index, text, cases[i].says);
	}
	(void)scratch_text(scratch, "model.safetensors", "short");
	assert_int_equal(lm_checkpoint_open(scratch->dir, &checkpoint, text), -EINVAL);
	assert_non_null(strstr(text, "model.safetensors"));
	assert_null(checkpoint);
	assert_null(lm_checkpoint_free(NULL));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_one_file, setup, teardown),
		cmocka_unit_test_setup_teardown(test_wrong_tensors, setup, teardown),
		cmocka_unit_test_setup_teardown(test_shards, setup, teardown),
		cmocka_unit_test_setup_teardown(test_bad_folders, setup, teardown),
	};

	return runner_run("tools/lm/checkpoint", tests, sizeof(tests) / sizeof(tests[0]));
}
