#include "tools/lm/generation.h"

#include <errno.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/tools/lm/bench.h"

#define LINE "The kernel keeps a list of free pages for every zone.\n"

static const struct lm_bytes repeated = {
	.data = (uint8_t *)LINE LINE LINE LINE LINE, .size = 5 * (uint32_t)sizeof(LINE) - 5};

/* Each context has its own sequence and its own list of events, which outlives it. */
static void test_contexts_are_continued(void **state)
{
	struct bench *b = *state;
	struct lm_bytes contexts[] = {repeated, {.data = repeated.data, .size = 3 * 54}};
	struct lm_options options = {.ratio = 1.0, .chunk = 100, .generate = 120, .decode_budget = 150};
	struct lm_generations all;

	assert_int_equal(repeated.size, 270);
	bench_open(b, 400, "g");
	b->fake->drops = 9;
	if (lm_generations_run(b->worker, &options, contexts, 2, &all, b->text) < 0)
		fail_msg("%s", b->text);
	assert_int_equal(all.count, 2);
	assert_int_equal(b->fake->creates, 2);
	assert_int_equal(b->fake->sequences, 0);
	assert_int_equal(b->fake->policy.budget, 150);
	assert_int_equal(b->fake->policy.max_new_tokens, 120);
	assert_int_equal(all.list[0].prompt, 271);
	assert_int_equal(all.list[0].count, 120);
	for (size_t i = 0; i < 120; i++)
		assert_int_equal(all.list[0].tokens[i], LINE[i % 54]);
	assert_int_equal(all.list[0].event_count, 2);
	assert_int_equal(all.list[0].events[0].tokens, 271);
	assert_int_equal(all.list[0].events[1].tokens, 385);
	assert_int_equal(all.list[0].events[1].dropped, 9);
	assert_int_equal(all.list[0].usage.bytes_full, (271 + 119) * 6 * 4 * 64 * 4);
	assert_int_equal(all.list[0].usage.bytes_held, all.list[0].usage.bytes_full);
	assert_int_equal(all.list[1].event_count, 2);
	assert_int_equal(all.list[1].events[0].tokens, 163);
	assert_int_equal(all.list[1].events[1].tokens, 257);
	assert_int_equal(all.times.decode_tokens, 2 * 119);
	lm_generations_deinit(&all);
	assert_null(all.list);
}

static void test_without_a_budget_there_are_no_events(void **state)
{
	struct bench *b = *state;
	struct lm_options options = {.ratio = 1.0, .chunk = 100, .generate = 20};
	struct lm_generation generation;

	bench_open(b, 400, NULL);
	if (lm_generate(b->worker, &options, &repeated, &generation, b->text) < 0)
		fail_msg("%s", b->text);
	assert_int_equal(generation.count, 20);
	assert_int_equal(generation.event_count, 0);
	assert_null(generation.events);
	assert_int_equal(b->fake->stages, 0);
	lm_generation_deinit(&generation);
}

static void test_size(void **state)
{
	struct bench *b = *state;
	struct lm_needle list[] = {{.line = 3, .context = {.size = 100}}, {.line = 4, .context = {.size = 3000}}};
	struct lm_needles needles = {.list = list, .count = 2};
	uint32_t tokens = 77;

	assert_int_equal(
		lm_generations_size(&needles, "n.jsonl", lm_model_config(b->model), 1096, &tokens, b->text), -EINVAL);
	assert_string_equal(b->text,
		"n.jsonl:4: context of 3000 tokens with 1096 generated needs 4097 positions, the model has "
		"max_position_embeddings 4096");
	assert_int_equal(tokens, 77);
	assert_int_equal(
		lm_generations_size(&needles, "n.jsonl", lm_model_config(b->model), 1095, &tokens, b->text), 0);
	assert_int_equal(tokens, 4096);
}

static void test_a_failure_frees_what_there_is(void **state)
{
	struct bench *b = *state;
	struct lm_bytes contexts[] = {repeated, repeated};
	struct lm_options options = {.ratio = 1.0, .chunk = 100, .generate = 120, .decode_budget = 150};
	struct lm_generations all = {.count = 77};

	bench_open(b, 400, "g");
	b->fake->fail_evict = -EIO;
	assert_int_equal(lm_generations_run(b->worker, &options, contexts, 2, &all, b->text), -EIO);
	assert_string_equal(b->text, "the fake was told to fail");
	assert_int_equal(all.count, 77);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, bench_setup, bench_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_contexts_are_continued),
		TEST(test_without_a_budget_there_are_no_events),
		TEST(test_size),
		TEST(test_a_failure_frees_what_there_is),
	};

	return runner_run("tools/lm/generation", tests, sizeof(tests) / sizeof(tests[0]));
}
