/*
 * kvgate-lm --decode-budget and --generate on the pilot model: what is held after each event, what it weighs, and what
 * is written. Which pairs stay is test_lm_events.c's matter. Shorter in a sanitizer build.
 */
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define LIMIT_MS 300000
#define EXTENT   (256u * 1024)
#define CONFIG   "[pool]\ndevice.size = 64M\nextent_size = 256K\n[tenant a]\nsocket = a.sock\n"

#define ROWS       24u   /* layers * heads of the pilot model */
#define PAIR_BYTES 128u  /* K and V of 32 elements in bf16 */
#define CONTEXT    3000u /* tokens of each context of the needle file */
#define LONG       (KVG_SANITIZED ? 250u : 700u)
#define TEXT_SIZE  900u

static const char model[] = KVG_DATA "/pilot-lm";
static const char gate[] = KVG_DATA "/pilot-lm/gate.safetensors";
static const char needles[] = KVG_DATA "/pilot-lm/needles.jsonl";

/* Runs kvgate-lm with the pilot's files and these further options (NULL at the end, at most 14). */
static void run_lm(const struct fixture *f, const char *const options[], struct process_output *ret)
{
	char path[FIXTURE_PATH];
	const char *argv[24] = {
		KVG_BIN_LM, "--socket", fixture_path(f, "state/a.sock", path), "--model", model, "--gate", gate};
	size_t n = 7;

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

	run_lm(f, options, &output);
	object = json_loads(output.out, 0, &error);
	if (!object || output.status != 0)
		fail_msg("status %d (%s): %s%s", output.status, error.text, output.out, output.err);
	return object;
}

static uint64_t number(const json_t *object, const char *key)
{
	const json_t *value = json_object_get(object, key);

	if (!json_is_integer(value) || json_integer_value(value) < 0)
		fail_msg("%s is not a count", key);
	return (uint64_t)json_integer_value(value);
}

static const json_t *generation(const json_t *object, size_t index)
{
	const json_t *one = json_array_get(json_object_get(object, "generations"), index);

	assert_non_null(one);
	return one;
}

static void stop(struct fixture *f)
{
	assert_true(fixture_wait_charged(f, 0, FIXTURE_WAIT_MS));
	fixture_audit(f);
	fixture_stop(f);
}

/* ---- what is held ---- */

/* The event after `seen` tokens: right after the prompt, then wherever position 128 n has been seen. */
static uint32_t next_event(uint32_t seen)
{
	return (seen + 127) / 128 * 128 + 1;
}

/*
 * Each event falls where it must and leaves the budget, and a little more only where scores tie at the threshold. What
 * was there before it is what the last one left and the tokens since.
 */
static void check_events(const json_t *one, uint32_t budget, uint64_t prompt_pairs)
{
	const json_t *events = json_object_get(one, "events");
	uint32_t last = CONTEXT + (uint32_t)json_array_size(json_object_get(one, "tokens")) - 1, seen = CONTEXT;
	uint64_t pairs = prompt_pairs, most = (uint64_t)budget * ROWS;

	for (size_t i = 0; i < json_array_size(events); i++) {
		const json_t *event = json_array_get(events, i);
		uint32_t tokens = i ? next_event(seen) : CONTEXT;

		assert_int_equal(number(event, "tokens"), tokens);
		pairs += (uint64_t)(tokens - seen) * ROWS;
		if (prompt_pairs || i)
			assert_int_equal(number(event, "pairs") + number(event, "dropped"), pairs);
		pairs = number(event, "pairs");
		assert_in_range(pairs, most, most + most / 100);
		seen = tokens;
	}
	assert_true(seen <= last && next_event(seen) > last);
	assert_int_equal(number(one, "kv_bytes_held"), (pairs + (uint64_t)(last - seen) * ROWS) * PAIR_BYTES);
	assert_int_equal(number(one, "kv_bytes_full"), (uint64_t)last * ROWS * PAIR_BYTES);
}

/* The budget, packed in blocks, with the tokens of two stripes of 128 beside it and the extents that are not full. */
static void check_physical(const json_t *one, uint32_t budget)
{
	uint64_t held = (uint64_t)budget * ROWS * PAIR_BYTES, partial = ROWS * 16ull * PAIR_BYTES;
	uint64_t bound = held + held / 100 + partial + 2 * 128ull * ROWS * PAIR_BYTES + 4ull * EXTENT;
	uint64_t most = number(one, "physical_bytes_decode_max");

	print_message("budget %u: at most %llu bytes in decoding, bound %llu, the whole KV is %llu\n", budget,
		(unsigned long long)most, (unsigned long long)bound, (unsigned long long)number(one, "kv_bytes_full"));
	assert_true(number(one, "physical_bytes") <= most);
	assert_in_range(most, held, bound);
	assert_true(bound < number(one, "kv_bytes_full") / 2);
}

static void check_budget(const struct fixture *f, const char *ratio, uint64_t prompt_pairs)
{
	char generate[16];
	const char *options[] = {"--needles", needles, "--limit", "2", "--generate", generate, "--decode-budget", "300",
		"--ratio", ratio, "--json", NULL};
	json_t *object;

	(void)snprintf(generate, sizeof(generate), "%u", LONG);
	object = run_json(f, options);
	assert_int_equal(number(object, "contexts"), 2);
	assert_int_equal(number(object, "decode_budget"), 300);
	assert_true(json_number_value(json_object_get(object, "decode_tokens_per_s")) > 0);
	assert_true(json_number_value(json_object_get(object, "decode_evict_share")) > 0);
	assert_true(json_number_value(json_object_get(object, "decode_evict_share")) < 1);
	for (size_t i = 0; i < 2; i++) {
		const json_t *one = generation(object, i);

		assert_int_equal(number(one, "prompt_tokens"), CONTEXT);
		assert_int_equal(json_array_size(json_object_get(one, "tokens")), LONG);
		check_events(one, 300, prompt_pairs);
		check_physical(one, 300);
	}
	json_decref(object);
}

static void test_the_budget_holds_from_event_to_event(void **state)
{
	struct fixture f;

	(void)state;
	fixture_start(&f, CONFIG);
	check_budget(&f, "1.0", (uint64_t)CONTEXT * ROWS);
	assert_true(fixture_wait_charged(&f, 0, FIXTURE_WAIT_MS));
	check_budget(&f, "0.3", 0);
	stop(&f);
}

/* ---- what is written ---- */

/* The start of the needle file as plain text: it repeats little. */
static void write_text(const struct fixture *f, char path[FIXTURE_PATH])
{
	char bytes[TEXT_SIZE];
	FILE *from = fopen(needles, "re"), *to = fopen(fixture_path(f, "text", path), "we");

	assert_true(from && to);
	assert_int_equal(fread(bytes, 1, sizeof(bytes), from), sizeof(bytes));
	assert_int_equal(fwrite(bytes, 1, sizeof(bytes), to), sizeof(bytes));
	assert_int_equal(fclose(to), 0);
	(void)fclose(from);
}

static json_t *continue_text(const struct fixture *f, const char *path, const char *ratio, const char *budget)
{
	const char *options[] = {"--text", path, "--generate", "300", "--json", "--ratio", ratio,
		budget ? "--decode-budget" : NULL, budget, NULL};
	json_t *object = run_json(f, options);

	assert_int_equal(number(object, "contexts"), 1);
	assert_int_equal(number(generation(object, 0), "prompt_tokens"), TEXT_SIZE + 1);
	return object;
}

static int tokens_equal(const json_t *a, const json_t *b)
{
	int equal =
		json_equal(json_object_get(generation(a, 0), "tokens"), json_object_get(generation(b, 0), "tokens"));
	const char *hash_a = json_string_value(json_object_get(generation(a, 0), "hash"));
	const char *hash_b = json_string_value(json_object_get(generation(b, 0), "hash"));

	assert_true(hash_a && hash_b);
	assert_int_equal(strcmp(hash_a, hash_b) == 0, equal);
	return equal;
}

/* A budget of all tokens changes nothing; a small one does, and the model writes on. */
static void test_only_a_budget_below_all_tokens_changes_the_text(void **state)
{
	static const char *const ratios[] = {"1.0", "0.5"};
	char path[FIXTURE_PATH];
	struct fixture f;

	(void)state;
	fixture_start(&f, CONFIG);
	write_text(&f, path);
	for (size_t i = 0; i < 2; i++) {
		json_t *without = continue_text(&f, path, ratios[i], NULL);
		json_t *ample = continue_text(&f, path, ratios[i], "1201");
		json_t *small = continue_text(&f, path, ratios[i], "132");

		assert_int_equal(json_array_size(json_object_get(generation(without, 0), "events")), 0);
		assert_int_equal(json_array_size(json_object_get(generation(ample, 0), "events")), 3);
		assert_true(tokens_equal(without, ample));
		assert_int_equal(json_array_size(json_object_get(generation(small, 0), "tokens")), 300);
		assert_false(tokens_equal(without, small));
		json_decref(without);
		json_decref(ample);
		json_decref(small);
	}
	stop(&f);
}

/* Without --json the bytes themselves, and they are the tokens of the report. */
static void test_text_and_json_say_the_same(void **state)
{
	char path[FIXTURE_PATH];
	struct process_output output;
	struct fixture f;
	size_t n = 0;

	(void)state;
	fixture_start(&f, CONFIG);
	write_text(&f, path);
	json_t *object = continue_text(&f, path, "1.0", "200");
	const json_t *tokens = json_object_get(generation(object, 0), "tokens");

	run_lm(&f, (const char *const[]){"--text", path, "--generate", "300", "--decode-budget", "200", NULL}, &output);
	assert_int_equal(output.status, 0);
	for (size_t i = 0; i < json_array_size(tokens); i++) {
		json_int_t token = json_integer_value(json_array_get(tokens, i));

		if (token < 256)
			assert_int_equal((uint8_t)output.out[n++], token);
	}
	assert_string_equal(output.out + n, "\n");
	json_decref(object);
	stop(&f);
}

/* ---- queries ---- */

static void test_queries_are_answered_within_a_budget(void **state)
{
	static const char *const options[] = {
		"--needles", needles, "--limit", "2", "--decode-budget", "512", "--json", NULL};
	struct fixture f;
	json_t *object;

	(void)state;
	fixture_start(&f, CONFIG);
	object = run_json(&f, options);
	assert_int_equal(number(object, "decode_budget"), 512);
	assert_int_equal(number(object, "queries"), 16);
	assert_true(number(object, "correct") >= 15);
	assert_in_range(number(object, "kv_bytes_held"), 512 * ROWS * PAIR_BYTES, 512 * ROWS * PAIR_BYTES / 100 * 101);
	json_decref(object);
	stop(&f);
}

/* A context of 253 tokens: the event at 257 drops pairs in the middle of each query. The same query has the same
 * answer every time, because the context is read anew. */
static void test_an_eviction_in_a_query_leaves_no_trace_in_the_next(void **state)
{
	static const char tail[] = "The code for BAKUMI is 48213.\\nPages are freed in batches.\\n";
	static const char query[] = "{\"name\":\"BAKUMI\",\"code\":\"48213\"}";
	char path[FIXTURE_PATH], dots[253] = "";
	struct fixture f;
	json_t *object;
	FILE *file;

	(void)state;
	fixture_start(&f, CONFIG);
	memset(dots, '.', 252 - (sizeof(tail) - 1 - 2)); /* two escapes are one byte each */
	file = fopen(fixture_path(&f, "needles", path), "we");
	assert_non_null(file);
	(void)fprintf(
		file, "{\"context\":\"%s%s\",\"queries\":[%s,%s,%s,%s]}\n", dots, tail, query, query, query, query);
	assert_int_equal(fclose(file), 0);
	object = run_json(&f, (const char *const[]){"--needles", path, "--decode-budget", "132", "--json", NULL});
	assert_int_equal(number(object, "queries"), 4);
	assert_int_equal(number(object, "kv_bytes_full"), 253 * ROWS * PAIR_BYTES);
	assert_int_equal(number(object, "correct"), 4);
	json_decref(object);
	stop(&f);
}

/* ---- wrong usage ---- */

static void test_wrong_options_are_refused_by_name(void **state)
{
	static const struct {
		const char *options[8], *says;
	} cases[] = {
		{{"--needles", needles, "--decode-budget", "131"},
			"--decode-budget is '131', not a whole number from 132"},
		{{"--needles", needles, "--decode-budget", "0"}, "--decode-budget is '0'"},
		{{"--needles", needles, "--decode-budget", "half"}, "--decode-budget is 'half'"},
		{{"--needles", needles, "--decode-budget"}, "--decode-budget needs a value"},
		{{"--golden", needles, "--decode-budget", "200"}, "--decode-budget goes with --needles or --text"},
		{{"--golden", needles, "--generate", "9"}, "--generate goes with --needles or --text"},
		{{"--needles", needles, "--generate", "0"}, "--generate is '0'"},
	};
	struct process_output output;
	struct fixture f;

	(void)state;
	fixture_start(&f, CONFIG);
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		run_lm(&f, cases[i].options, &output);
		assert_int_equal(output.status, 2);
		assert_string_equal(output.out, "");
		if (!strstr(output.err, cases[i].says) || strchr(output.err, '\n') != strrchr(output.err, '\n'))
			fail_msg("not one line with \"%s\": %s", cases[i].says, output.err);
	}
	run_lm(&f, (const char *const[]){"--needles", needles, "--generate", "1097", NULL}, &output);
	assert_int_equal(output.status, 1);
	assert_non_null(strstr(output.err, "max_position_embeddings 4096"));
	stop(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_the_budget_holds_from_event_to_event),
		cmocka_unit_test(test_only_a_budget_below_all_tokens_changes_the_text),
		cmocka_unit_test(test_text_and_json_say_the_same),
		cmocka_unit_test(test_queries_are_answered_within_a_budget),
		cmocka_unit_test(test_an_eviction_in_a_query_leaves_no_trace_in_the_next),
		cmocka_unit_test(test_wrong_options_are_refused_by_name),
	};

	return runner_run("lm_decode", tests, sizeof(tests) / sizeof(*tests));
}
