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
	.answers = (uint64_t[16]){0xabc},
	.logits_hash = 0x1234,
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
	assert_int_equal(json_object_size(object), 15);
	assert_true(number(object, "queries") == 16.0);
	assert_true(number(object, "correct") == 15.0);
	assert_true(number(object, "accuracy") == 0.9375);
	assert_true(number(object, "ratio") == 0.3);
	assert_string_equal(json_string_value(json_object_get(object, "level")), "pair-head");
	assert_true(number(object, "decode_budget") == 0.0);
	assert_true(number(object, "kv_bytes_full") == 1000.0);
	assert_true(number(object, "kv_bytes_held") == 301.0);
	assert_true(number(object, "physical_bytes") == 262144.0);
	assert_true(fabs(number(object, "prefill_tokens_per_s") - 3000.0) < 1e-6);
	assert_true(fabs(number(object, "decode_tokens_per_s") - 200.0) < 1e-6);
	assert_true(fabs(number(object, "evict_ms_total") - 100.0) < 1e-6);
	assert_true(fabs(number(object, "prefill_ms_total") - 2000.0) < 1e-6);
	assert_string_equal(json_string_value(json_object_get(object, "logits_hash")), "0000000000001234");
	assert_int_equal(json_array_size(json_object_get(object, "answers")), 16);
	assert_string_equal(
		json_string_value(json_array_get(json_object_get(object, "answers"), 0)), "0000000000000abc");
	json_decref(object);
	free(written);
}

static const struct lm_moves moves = {.recalls = 2,
	.recall_ns = 3000000,
	.recalled_bytes = 3001,
	.offloads = 2,
	.offload_ns = 4000000,
	.restore_ns = 5000000,
	.host_bytes = 4000,
	.device_bytes = 5000,
	.publishes = 1,
	.publish_ns = 6000000,
	.attaches = 1,
	.attach_ns = 7000000,
	.context_bytes = 6000};

static void test_moves_as_json(void **state)
{
	static const struct {
		const char *object, *key;
		double value;
	} wanted[] = {{"recall", "ratio", 0.5}, {"recall", "device_bytes", 1501}, {"recall", "ms_total", 3},
		{"offload", "host_bytes", 2000}, {"offload", "device_bytes", 2500}, {"offload", "offload_ms_total", 4},
		{"offload", "restore_ms_total", 5}, {"publish", "contexts", 1}, {"publish", "device_bytes", 6000},
		{"publish", "ms_total", 6}, {"attach", "contexts", 1}, {"attach", "device_bytes", 6000},
		{"attach", "ms_total", 7}};
	const struct lm_options o = {.ratio = 0.3, .recall = 0.5};
	struct lm_report moved = report;
	char *written = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&written, &size);
	json_t *object;

	(void)state;
	assert_non_null(out);
	moved.moves = moves;
	assert_int_equal(lm_report_json(&moved, &o, out), 0);
	assert_int_equal(fclose(out), 0);
	object = json_loads(written, 0, NULL);
	assert_int_equal(json_object_size(object), 19);
	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		if (fabs(number(json_object_get(object, wanted[i].object), wanted[i].key) - wanted[i].value) > 1e-6)
			fail_msg("%s.%s in %s", wanted[i].object, wanted[i].key, written);
	json_decref(object);
	free(written);
}

static void test_moves_as_text(void **state)
{
	const struct lm_options o = {.ratio = 0.3, .recall = 0.5};
	struct lm_report moved = report;
	char *written = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&written, &size);

	(void)state;
	assert_non_null(out);
	moved.moves = moves;
	lm_report_text(&moved, &o, out);
	assert_int_equal(fclose(out), 0);
	assert_non_null(
		strstr(written, "recall to ratio 0.5: 1501 bytes of pairs came back, mean of contexts; 3.0 ms"));
	assert_non_null(
		strstr(written, "2000 bytes on the host, 2500 of the device given back; out 4.0 ms, back 5.0 ms"));
	assert_non_null(strstr(written, "published 1 contexts of 6000 bytes, mean; 6.0 ms in all\n"));
	assert_non_null(strstr(written, "attached to 1 contexts of 6000 bytes, mean; 7.0 ms in all\n"));
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

static struct lm_event events[] = {{.tokens = 300, .pairs = 6144, .dropped = 1056, .bytes_physical = 1048576},
	{.tokens = 385, .pairs = 6145, .dropped = 2039, .bytes_physical = 786432}};

static struct lm_generation generation[] = {{.prompt = 300,
						    .tokens = (int32_t[]){97, 257},
						    .count = 2,
						    .events = events,
						    .event_count = 2,
						    .usage = {.bytes_full = 4000,
							    .bytes_held = 3000,
							    .bytes_physical = 5000,
							    .bytes_prompt_max = 7000,
							    .bytes_decode_max = 6000}},
	{.prompt = 2, .tokens = (int32_t[]){98}, .count = 1}};

static const struct lm_generations generations = {.list = generation,
	.count = 2,
	.times = {.decode_ns = 500000000, .decode_evict_ns = 10000000, .decode_tokens = 100}};

static void test_generations_as_json(void **state)
{
	struct lm_options o = {.ratio = 0.5, .decode_budget = 256};
	char *written = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&written, &size);
	const json_t *one, *event;
	json_t *object;

	(void)state;
	assert_non_null(out);
	assert_int_equal(lm_report_generations_json(&generations, &o, out), 0);
	assert_int_equal(fclose(out), 0);
	assert_ptr_equal(strchr(written, '\n'), written + size - 1);
	object = json_loads(written, 0, NULL);
	assert_int_equal(json_object_size(object), 11);
	assert_true(number(object, "contexts") == 2.0);
	assert_true(number(object, "decode_budget") == 256.0);
	assert_true(number(object, "decode_tokens") == 100.0);
	assert_true(fabs(number(object, "decode_tokens_per_s") - 200.0) < 1e-6);
	assert_true(fabs(number(object, "decode_evict_share") - 0.02) < 1e-9);
	one = json_array_get(json_object_get(object, "generations"), 0);
	assert_int_equal(json_object_size(one), 9);
	assert_true(number(one, "prompt_tokens") == 300.0);
	assert_true(number(one, "kv_bytes_full") == 4000.0);
	assert_true(number(one, "kv_bytes_held") == 3000.0);
	assert_true(number(one, "physical_bytes") == 5000.0);
	assert_true(number(one, "physical_bytes_prompt_max") == 7000.0);
	assert_true(number(one, "physical_bytes_decode_max") == 6000.0);
	assert_int_equal(json_array_size(json_object_get(one, "tokens")), 2);
	assert_int_equal(json_integer_value(json_array_get(json_object_get(one, "tokens"), 1)), 257);
	assert_int_equal(json_array_size(json_object_get(one, "events")), 2);
	event = json_array_get(json_object_get(one, "events"), 1);
	assert_true(number(event, "tokens") == 385.0);
	assert_true(number(event, "pairs") == 6145.0);
	assert_true(number(event, "dropped") == 2039.0);
	assert_true(number(event, "physical_bytes") == 786432.0);
	one = json_array_get(json_object_get(object, "generations"), 1);
	assert_int_equal(json_array_size(json_object_get(one, "events")), 0);
	/* FNV-1a of the bytes 62 00 00 00 */
	assert_string_equal(json_string_value(json_object_get(one, "hash")), "8c704f9b10f11f37");
	json_decref(object);
	free(written);
}

static void test_generations_as_text(void **state)
{
	struct lm_options o = {.ratio = 1.0, .decode_budget = 256};
	char *written = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&written, &size);

	(void)state;
	assert_non_null(out);
	lm_report_generations_text(&generations, &o, out);
	assert_int_equal(fclose(out), 0);
	assert_non_null(strstr(written, "ratio 1, level pair, decode budget 256: continuations of 2 contexts\n"));
	assert_non_null(strstr(written, "context 1: 300 tokens, 2 generated, hash "));
	assert_non_null(strstr(written, "4000 bytes full, 3000 held; physical 5000, at most 7000 with the prompt and "
					"6000 after it\n"));
	assert_non_null(strstr(written, "after 385 tokens: 6145 pairs held, 2039 dropped, 786432 bytes physical\n"));
	assert_non_null(strstr(written, "context 2: 2 tokens, 1 generated, hash 8c704f9b10f11f37\n"));
	assert_non_null(strstr(written, "decode: 0.50 s, 200 tokens/s; events 2.0%\n"));
	free(written);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_json),
		cmocka_unit_test(test_moves_as_json),
		cmocka_unit_test(test_moves_as_text),
		cmocka_unit_test(test_json_to_a_full_disk),
		cmocka_unit_test(test_text),
		cmocka_unit_test(test_generations_as_json),
		cmocka_unit_test(test_generations_as_text),
	};

	return runner_run("tools/lm/report", tests, sizeof(tests) / sizeof(tests[0]));
}
