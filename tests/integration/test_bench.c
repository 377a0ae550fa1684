/*
 * What `kvgate-bench tiers` and `share` report, on the real daemon: the rows that are there and what each has moved,
 * not how fast. BYTES that a row names are what was asked for; share's are what the daemon says it has charged.
 */
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define LIMIT_MS 100000

/* Of tiers: rows of a layer are its heads. */
#define TOKENS        512
#define SHORT         128
#define LAYERS        2
#define HEADS         8
#define DIM           64
#define PAIR          (2 * DIM * 2) /* bytes: K and V in bf16 */
#define BYTES(tokens) ((double)(tokens)*LAYERS * HEADS * PAIR)

static json_t *parse(const char *text)
{
	json_error_t error;
	json_t *json = json_loads(text, 0, &error);

	if (!json)
		fail_msg("line %d: %s: \"%.200s\"", error.line, error.text, text);
	return json;
}

static double number(const json_t *json, const char *key)
{
	const json_t *value = json_object_get(json, key);

	if (!json_is_number(value))
		fail_msg("\"%s\" is no number", key);
	return json_number_value(value);
}

static void run(const char *const argv[], struct process_output *ret)
{
	process_run(argv, LIMIT_MS, ret);
	if (ret->status)
		fail_msg("status %d: %s", ret->status, ret->err);
}

/* ---- tiers ---- */

/* Blocks of 16 tokens in all rows. What the host has of them: with 8 bytes for each pair's place, in whole frames. */
#define BLOCKS(tokens) (((tokens) + 15) / 16 * 16 * LAYERS * HEADS * PAIR)
#define FRAME          65536
#define IMAGE(tokens)  (((tokens)*LAYERS * HEADS * (PAIR + 8) + FRAME - 1) / FRAME * FRAME)

/* Bytes: of all tokens, of the short sequence, of what was published, none, or of what an eviction drops. */
enum moved { ALL, SHORT_ONE, PUBLISHED, NOTHING, DROPPED };

static const struct {
	const char *name;
	enum moved moved;
	bool has_rate;
	uint32_t said; /* by the daemon: bytes on the host, that came back, or of the context */
} moves[] = {
	{"offload", ALL, true, IMAGE(TOKENS)},
	{"offload_back", ALL, true, 0},
	{"offload_copy", ALL, true, 0},
	{"restore", ALL, true, BLOCKS(TOKENS)},
	{"restore_back", ALL, true, 0},
	{"restore_copy", ALL, true, 0},
	{"offload_short", SHORT_ONE, true, IMAGE(SHORT)},
	{"offload_short_back", SHORT_ONE, true, 0},
	{"offload_short_copy", SHORT_ONE, true, 0},
	{"restore_short", SHORT_ONE, true, BLOCKS(SHORT)},
	{"restore_short_back", SHORT_ONE, true, 0},
	{"restore_short_copy", SHORT_ONE, true, 0},
	{"evict", DROPPED, false, 0},
	{"evict_retain", DROPPED, false, 0}, /* what it adds to an eviction may be nothing */
	{"recall", DROPPED, true, 0},
	{"publish", PUBLISHED, true, BLOCKS(TOKENS - 7)},
	{"attach_other", NOTHING, false, 0},
	{"attach", NOTHING, false, 0},
	{"fork", NOTHING, false, 0},
};

static void check_move(const json_t *json, size_t i, double dropped)
{
	const double bytes[] = {[ALL] = BYTES(TOKENS),
		[SHORT_ONE] = BYTES(SHORT),
		[PUBLISHED] = BYTES(TOKENS - 7),
		[DROPPED] = dropped};
	const char *name = json_string_value(json_object_get(json, "move"));
	double median = number(json, "median_ms"), best = number(json, "best_ms"),
	       rate = number(json, "bytes_per_second");

	if (!name || strcmp(name, moves[i].name) != 0)
		fail_msg("row %zu is \"%s\", not \"%s\"", i, name ? name : "", moves[i].name);
	if (number(json, "bytes") != bytes[moves[i].moved])
		fail_msg("%s: %.0f bytes, not %.0f", name, number(json, "bytes"), bytes[moves[i].moved]);
	if (number(json, "daemon_bytes") != (double)moves[i].said)
		fail_msg(
			"%s: %.0f bytes as the daemon says, not %u", name, number(json, "daemon_bytes"), moves[i].said);
	if (best <= 0 || median < best || number(json, "first_ms") <= 0)
		fail_msg("%s: median %f ms, best %f ms, first %f ms", name, median, best, number(json, "first_ms"));
	if (moves[i].has_rate ? rate <= 0 || number(json, "of_large_copy") <= 0 : rate < 0)
		fail_msg("%s: %f bytes a second, %f of a large copy", name, rate, number(json, "of_large_copy"));
}

static void check_tiers(const json_t *json)
{
	static const char *const rates[] = {"large_copy_out", "large_copy_in", "halves_out", "halves_in"};
	const json_t *rows = json_object_get(json, "moves");
	double dropped;

	assert_string_equal(json_string_value(json_object_get(json, "kind")), "host");
	assert_true(json_is_true(json_object_get(json, "min")));
	assert_true(number(json, "bytes") == BYTES(TOKENS));
	assert_true(number(json, "block") == 16.0 * PAIR);
	assert_true(number(json, "extent") > 0);
	assert_true(number(json, "rounds") == 1);
	for (size_t i = 0; i < sizeof(rates) / sizeof(*rates); i++)
		assert_true(number(json, rates[i]) > 0);
	assert_int_equal(json_array_size(rows), sizeof(moves) / sizeof(*moves));
	/* 30% of the context stay, to a pair in each row; all that went comes back. */
	dropped = number(json_array_get(rows, 12), "bytes");
	assert_true(dropped >= 0.7 * BYTES(TOKENS) - BYTES(1) && dropped <= 0.7 * BYTES(TOKENS) + BYTES(1));
	assert_true(fmod(dropped, PAIR) == 0);
	for (size_t i = 0; i < sizeof(moves) / sizeof(*moves); i++)
		check_move(json_array_get(rows, i), i, dropped);
}

static void test_tiers(void **state)
{
	char path[] = "/tmp/kvg-bench.XXXXXX";
	const char *argv[] = {KVG_BIN_BENCH, "tiers", "--kind", "host", "--tokens", "512", "--layers", "2", "--dim",
		"64", "--min", "--rounds", "1", "--json", path, "--kvgated", fixture_program(), NULL};
	struct process_output output;
	json_t *json;
	int fd = mkstemp(path);

	(void)state;
	assert_true(fd >= 0);
	assert_int_equal(close(fd), 0);
	run(argv, &output);
	json = json_load_file(path, 0, NULL);
	assert_non_null(json);
	assert_int_equal(unlink(path), 0);
	check_tiers(json);
	json_decref(json);
}

/* ---- share ---- */

#define EXTENT      (256 * 1024)
#define PILOT_ROWS  (6 * 4)
#define PILOT_BLOCK (16 * 32 * 2 * 2)

static void test_share(void **state)
{
	const char *argv[] = {KVG_BIN_BENCH, "share", "--json", "--tokens", "2048", "--processes", "3", "--kvgated",
		fixture_program(), NULL};
	struct process_output output;
	double context, one, all, tails = PILOT_ROWS * PILOT_BLOCK;
	json_t *json;

	(void)state;
	run(argv, &output);
	json = parse(output.out);
	context = number(json, "context_bytes");
	one = number(json, "one_bytes");
	all = number(json, "all_bytes");
	assert_true(number(json, "tokens") == 2048);
	assert_true(number(json, "processes") == 3);
	assert_true(number(json, "tail_bytes") == tails);
	/* Whatever was kept at 30%, in blocks of 16 pairs a row; all of it is there once, however many are attached. */
	assert_true(context >= 0.3 * 2048 / 16 * PILOT_ROWS * PILOT_BLOCK);
	assert_true(context <= (0.3 * 2048 / 16 + 2) * PILOT_ROWS * PILOT_BLOCK + EXTENT);
	assert_true(fmod(context, EXTENT) == 0);
	assert_true(tails <= EXTENT);
	assert_true(one == context + EXTENT); /* each has an extent for its own blocks, which are tails */
	assert_true(all == context + 3 * EXTENT);
	assert_true(fabs(number(json, "ratio") - all / one) < 1e-4);
	assert_true(fabs(number(json, "ratio_less_tails") - (all - 2 * tails) / one) < 1e-4);
	assert_true(number(json, "attach_us") > 0);
	assert_true(number(json, "first_attach_us") >= number(json, "attach_us"));
	json_decref(json);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_tiers),
		cmocka_unit_test(test_share),
	};

	return runner_run("integration/bench", tests, sizeof(tests) / sizeof(*tests));
}
