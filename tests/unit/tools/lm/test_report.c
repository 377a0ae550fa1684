#include "tools/lm/report.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"

static const struct lm_report report = {
	.contexts = 2,
	.queries = 16,
	.correct = 15,
	.usage = {.bytes_full = 2000, .bytes_held = 601, .bytes_physical = 524288},
	.times = {.prefill_ns = 2000000000,
		.stage_ns = 10000000,
		.wait_ns = 20000000,
		.evict_ns = 70000000,
		.decode_ns = 500000000,
		.prefill_tokens = 6000,
		.decode_tokens = 100},
};

static const struct lm_options options = {.ratio = 0.3, .level = KVG_LEVEL_PAIR_HEAD};

static double number(const json_t *object, const char *key)
{
	const json_t *value = json_object_get(object, key);

	if (!json_is_number(value))
		fail_msg("%s is not a number", key);
	return json_number_value(value);
}

static void test_json(void **state)
{
	char *written = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&written, &size);
	json_t *object;

	(void)state;
	assert_non_null(out);
	assert_int_equal(lm_report_json(&report, &options, out), 0);
	assert_int_equal(fclose(out), 0);
	assert_ptr_equal(strchr(written, '\n'), written + size - 1);
	object = json_loads(written, 0, NULL);
	assert_int_equal(json_object_size(object), 11);
	assert_true(number(object, "queries") == 16.0);
	assert_true(number(object, "correct") == 15.0);
	assert_true(number(object, "accuracy") == 0.9375);
	assert_true(number(object, "ratio") == 0.3);
	assert_string_equal(json_string_value(json_object_get(object, "level")), "pair-head");
	assert_true(number(object, "kv_bytes_full") == 1000.0);
	assert_true(number(object, "kv_bytes_held") == 301.0);
	assert_true(number(object, "physical_bytes") == 262144.0);
	assert_true(fabs(number(object, "prefill_tokens_per_s") - 3000.0) < 1e-6);
	assert_true(fabs(number(object, "decode_tokens_per_s") - 200.0) < 1e-6);
	assert_true(fabs(number(object, "evict_ms_total") - 100.0) < 1e-6);
	json_decref(object);
	free(written);
}

static void test_json_to_a_full_disk(void **state)
{
	FILE *out = fopen("/dev/full", "we");

	(void)state;
	assert_non_null(out);
	(void)setvbuf(out, NULL, _IONBF, 0);
	assert_true(lm_report_json(&report, &options, out) < 0);
	(void)fclose(out);
}

static void test_text(void **state)
{
	char *written = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&written, &size);

	(void)state;
	assert_non_null(out);
	lm_report_text(&report, &options, out);
	assert_int_equal(fclose(out), 0);
	assert_non_null(
		strstr(written, "ratio 0.3, level pair-head: 15 of 16 queries correct (0.938) in 2 contexts\n"));
	assert_non_null(strstr(written, "1000 bytes full, 301 held (30.1%), 262144 physical"));
	assert_non_null(strstr(written, "compute 95.0%, staging 0.5%, waiting for scores 1.0%, evict 3.5%\n"));
	assert_non_null(strstr(written, "decode: 0.50 s, 200 tokens/s\n"));
	free(written);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_json),
		cmocka_unit_test(test_json_to_a_full_disk),
		cmocka_unit_test(test_text),
	};

	return runner_run("tools/lm/report", tests, sizeof(tests) / sizeof(tests[0]));
}
