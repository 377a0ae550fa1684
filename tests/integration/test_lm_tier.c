/*
 * The reference worker on the pilot model with a host tier and published contexts: what comes back from the host, or
 * from another worker, answers as if it had never been elsewhere. In a sanitizer build only the first contexts.
 */
#include <jansson.h>
#include <string.h>

#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define LIMIT_MS 600000
#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 128M\nextent_size = 256K\nhost.size = 64M\n"                                            \
	"[tenant a]\nsocket = a.sock\n[tenant b]\nsocket = b.sock\n"

#define LIMIT (KVG_SANITIZED ? "2" : "8") /* contexts that are read */
#define FEW   "2"                         /* contexts that are published */

static const char model[] = KVG_DATA "/pilot-lm";
static const char gate[] = KVG_DATA "/pilot-lm/gate.safetensors";
static const char needles[] = KVG_DATA "/pilot-lm/needles.jsonl";

/* Runs kvgate-lm on the needles with these further options (NULL at the end, at most 12). */
static void run_lm(const struct fixture *f, const char *socket, const char *const options[], struct process_output *ret)
{
	char path[FIXTURE_PATH];
	const char *argv[24] = {KVG_BIN_LM, "--socket", fixture_path(f, socket, path), "--model", model, "--gate", gate,
		"--needles", needles, "--json"};
	size_t n = 10;

	for (size_t i = 0; options[i]; i++) {
		assert_true(n < 22);
		argv[n++] = options[i];
	}
	process_run(argv, LIMIT_MS, ret);
}

/* The JSON object that a run prints; to be given back with json_decref(). */
static json_t *run_json(const struct fixture *f, const char *const options[])
{
	struct process_output output;
	json_error_t error;
	json_t *object;

	run_lm(f, "state/a.sock", options, &output);
	object = json_loads(output.out, 0, &error);
	if (!object || output.status != 0)
		fail_msg("status %d (%s): %s%s", output.status, error.text, output.out, output.err);
	return object;
}

/* A number of the object, or of its member `part`. */
static double number(const json_t *object, const char *part, const char *key)
{
	const json_t *value = json_object_get(part ? json_object_get(object, part) : object, key);

	if (!json_is_number(value))
		fail_msg("%s%s%s is not a number", part ? part : "", part ? "." : "", key);
	return json_number_value(value);
}

static const char *text(const json_t *object, const char *key)
{
	const char *value = json_string_value(json_object_get(object, key));

	assert_non_null(value);
	return value;
}

/* Query by query. */
static void assert_same_answers(const json_t *a, const json_t *b)
{
	const json_t *first = json_object_get(a, "answers"), *second = json_object_get(b, "answers");

	assert_true(json_array_size(first) > 0);
	assert_int_equal(json_array_size(first), json_array_size(second));
	for (size_t i = 0; i < json_array_size(first); i++)
		if (!json_equal(json_array_get(first, i), json_array_get(second, i)))
			fail_msg("query %zu is answered in another way", i);
	assert_true(number(a, NULL, "correct") == number(b, NULL, "correct"));
}

static void start(struct fixture *f)
{
	fixture_start(f, CONFIG);
}

static void stop(struct fixture *f)
{
	assert_true(fixture_wait_charged(f, 0, FIXTURE_WAIT_MS));
	fixture_audit(f);
	fixture_stop(f);
}

static void test_recall_answers_as_the_higher_ratio_does(void **state)
{
	const char *high[] = {"--chunk", "100000", "--limit", LIMIT, "--ratio", "0.3", NULL};
	const char *recalled[] = {"--chunk", "100000", "--limit", LIMIT, "--ratio", "0.1", "--recall", "0.3", NULL};
	json_t *a, *b;
	struct fixture f;

	(void)state;
	start(&f);
	a = run_json(&f, high);
	b = run_json(&f, recalled);
	print_message("%.0f of %.0f queries right; recalled %.0f bytes a context in %.1f ms in all\n",
		number(b, NULL, "correct"), number(b, NULL, "queries"), number(b, "recall", "device_bytes"),
		number(b, "recall", "ms_total"));
	assert_same_answers(a, b);
	assert_true(number(a, NULL, "kv_bytes_held") == number(b, NULL, "kv_bytes_held"));
	assert_true(number(b, "recall", "device_bytes") > 0.6 * number(b, NULL, "kv_bytes_held"));
	assert_true(number(b, "recall", "ratio") == 0.3);
	json_decref(a);
	json_decref(b);
	stop(&f);
}

static void test_offload_between_leaves_the_logits(void **state)
{
	const char *plain[] = {"--limit", LIMIT, "--ratio", "0.3", NULL};
	const char *moved[] = {"--limit", LIMIT, "--ratio", "0.3", "--offload-between", NULL};
	json_t *a, *b;
	struct fixture f;

	(void)state;
	start(&f);
	a = run_json(&f, plain);
	b = run_json(&f, moved);
	print_message("offload: %.0f bytes on the host, %.0f of the device; out %.1f ms, back %.1f ms in all\n",
		number(b, "offload", "host_bytes"), number(b, "offload", "device_bytes"),
		number(b, "offload", "offload_ms_total"), number(b, "offload", "restore_ms_total"));
	assert_same_answers(a, b);
	assert_string_equal(text(a, "logits_hash"), text(b, "logits_hash"));
	assert_true(number(b, "offload", "host_bytes") >= number(b, NULL, "kv_bytes_held"));
	assert_true(number(b, "offload", "device_bytes") >= number(b, NULL, "kv_bytes_held"));
	assert_null(json_object_get(a, "offload"));
	json_decref(a);
	json_decref(b);
	stop(&f);
}

/* The publisher has ended when the other comes; and no other tenant learns of it. */
static void test_another_process_attaches(void **state)
{
	const char *publish[] = {"--limit", FEW, "--ratio", "0.3", "--publish", NULL};
	const char *attach[] = {"--limit", FEW, "--ratio", "0.3", "--attach", NULL};
	const char *plain[] = {"--limit", FEW, "--ratio", "0.3", NULL};
	struct fixture_usage usage;
	struct process_output output;
	json_t *a, *b, *c;
	struct fixture f;

	(void)state;
	start(&f);
	a = run_json(&f, publish);
	assert_true(fixture_wait_gone(&f, 0, UINT64_MAX, FIXTURE_WAIT_MS));
	fixture_tenant(&f, "a", &usage);
	print_message("published %.0f bytes a context in %.1f ms; %llu charged\n", number(a, "publish", "device_bytes"),
		number(a, "publish", "ms_total"), (unsigned long long)usage.charged);
	assert_true((double)usage.charged >= 2 * number(a, "publish", "device_bytes"));
	fixture_audit(&f);
	b = run_json(&f, attach);
	c = run_json(&f, plain);
	print_message("attached in %.2f ms, prefill %.2f ms\n", number(b, "attach", "ms_total"),
		number(b, NULL, "prefill_ms_total"));
	assert_same_answers(a, b);
	assert_same_answers(c, b);
	assert_string_equal(text(a, "logits_hash"), text(b, "logits_hash"));
	assert_string_equal(text(c, "logits_hash"), text(b, "logits_hash"));
	assert_true(number(b, NULL, "prefill_ms_total") == 0.0);
	assert_true(number(a, NULL, "prefill_ms_total") > 0.0);
	assert_true(number(b, "attach", "contexts") == 2.0);
	assert_true(number(b, NULL, "kv_bytes_held") == number(c, NULL, "kv_bytes_held"));
	json_decref(a);
	json_decref(b);
	json_decref(c);
	run_lm(&f, "state/b.sock", attach, &output);
	assert_int_equal(output.status, 1);
	assert_non_null(strstr(output.err, "tenant b has none"));
	fixture_audit(&f);
	fixture_stop(&f);
}

static void test_a_context_that_is_not_there_is_named(void **state)
{
	const char *attach[] = {"--limit", "1", "--ratio", "0.2", "--attach", NULL};
	struct process_output output;
	const char *key;
	struct fixture f;

	(void)state;
	start(&f);
	run_lm(&f, "state/a.sock", attach, &output);
	assert_int_equal(output.status, 1);
	key = strstr(output.err, "context ");
	assert_non_null(key);
	assert_int_equal(strspn(key + 8, "0123456789abcdef"), 64);
	assert_non_null(strstr(key, ": tenant a has none"));
	stop(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_recall_answers_as_the_higher_ratio_does),
		cmocka_unit_test(test_offload_between_leaves_the_logits),
		cmocka_unit_test(test_another_process_attaches),
		cmocka_unit_test(test_a_context_that_is_not_there_is_named),
	};

	return runner_run("integration/lm_tier", tests, sizeof(tests) / sizeof(tests[0]));
}
