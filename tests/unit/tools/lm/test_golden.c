#include "tools/lm/golden.h"

#include <errno.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/tools/lm/bench.h"
#include "tests/unit/tools/lm/scratch.h"

#define GOLDEN "golden/model_golden.safetensors"

/* The largest difference that a run in such chunks finds, after `change` was added to the very last logit. */
static float run(struct bench *b, uint32_t chunk, float change)
{
	struct lm_options options = {.ratio = 1.0, .chunk = chunk, .kv_dtype = KVG_F32};
	struct lm_golden golden;
	float difference = -1.0f;

	if (lm_golden_read(GOLDEN, lm_model_config(b->model), &golden, b->text) < 0)
		fail_msg("%s", b->text);
	assert_int_equal(golden.count, 1200);
	assert_int_equal(golden.rows, 64);
	golden.logits[golden.rows * 272 - 1] += change;
	bench_open(b, 1200, NULL);
	if (lm_golden_run(b->worker, b->model, &options, &golden, &difference, b->text) < 0)
		fail_msg("%s", b->text);
	lm_golden_deinit(&golden);
	return difference;
}

static void test_golden_file(void **state)
{
	float difference = run(*state, 16000, 0.0f);

	assert_true(difference > 0.0f && difference <= lm_golden_tolerance(KVG_F32));
}

/* The compared rows span two chunks, and the last of them is compared too. */
static void test_a_wrong_logit_is_found_in_chunks(void **state)
{
	float difference = run(*state, 1170, 1.0f);

	assert_true(difference > 0.9f && difference < 1.1f);
}

static void test_tolerance(void **state)
{
	(void)state;
	assert_true(lm_golden_tolerance(KVG_BF16) == 0.25f);
	assert_true(lm_golden_tolerance(KVG_F16) == 0.05f);
	assert_true(lm_golden_tolerance(KVG_F32) == 0.05f);
}

#define TOKENS "\"tokens\":{\"dtype\":\"I32\",\"shape\":[2],\"data_offsets\":[0,8]}"

static void test_bad_files(void **state)
{
	static const struct {
		const char *header, *says;
	} cases[] = {
		{"\"x\":{\"dtype\":\"I32\",\"shape\":[18],\"data_offsets\":[0,72]}", "has no tensor tokens of I32 [T]"},
		{TOKENS ",\"x\":{\"dtype\":\"F32\",\"shape\":[4,4],\"data_offsets\":[8,72]}",
			"has no tensor logits_last64 of F32 [N, 4]"},
		{TOKENS ",\"logits_last64\":{\"dtype\":\"F32\",\"shape\":[2,8],\"data_offsets\":[8,72]}",
			"has no tensor logits_last64 of F32 [N, 4]"},
		{TOKENS ",\"logits_last64\":{\"dtype\":\"F32\",\"shape\":[4,4],\"data_offsets\":[8,72]}",
			"logits_last64 has 4 rows, not 1 to 2"},
		{"\"tokens\":{\"dtype\":\"I32\",\"shape\":[18],\"data_offsets\":[0,72]}",
			"tokens has 18, the model has max_position_embeddings 4"},
	};
	struct lm_config config = {.vocab = 4, .max_positions = 4};
	struct scratch scratch;
	char data[72] = {0};

	(void)state;
	scratch_init(&scratch);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		const char *path = scratch_tensors(&scratch, "g", cases[i].header, data, sizeof(data));
		struct lm_golden golden = {.count = 77};
		char text[LM_TEXT] = "";

		assert_int_equal(lm_golden_read(path, &config, &golden, text), -EINVAL);
		if (!strstr(text, cases[i].says))
			fail_msg("'%s' lacks '%s'", text, cases[i].says);
		assert_int_equal(golden.count, 77);
	}
	scratch_deinit(&scratch);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, bench_setup, bench_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_golden_file),
		TEST(test_a_wrong_logit_is_found_in_chunks),
		cmocka_unit_test(test_tolerance),
		cmocka_unit_test(test_bad_files),
	};

	return runner_run("tools/lm/golden", tests, sizeof(tests) / sizeof(tests[0]));
}
