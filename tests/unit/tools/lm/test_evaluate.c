#include "tools/lm/evaluate.h"

#include <errno.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/tools/lm/bench.h"

#define CONTEXT                                                                                                        \
	"The map describes every range of memory that the kernel may hand out.\nThe code for BAKUMI is 48213.\n"       \
	"Pages are freed in batches.\nThe code for DAKO is 0612.\nA process that ends gives all of it back at once.\n"

static struct lm_bytes bytes(const char *text)
{
	return (struct lm_bytes){.data = (uint8_t *)text, .size = (uint32_t)strlen(text)};
}

/* Two right codes and a wrong one: the model really answers, and a wrong answer really counts as wrong. */
static void test_counts_right_and_wrong(void **state)
{
	struct bench *b = *state;
	struct lm_query queries[] = {{.name = bytes("BAKUMI"), .code = bytes("48213")},
		{.name = bytes("DAKO"), .code = bytes("0612")}, {.name = bytes("BAKUMI"), .code = bytes("48214")}};
	struct lm_needle list[] = {{.line = 1, .context = bytes(CONTEXT), .queries = queries, .query_count = 3},
		{.line = 2, .context = bytes(CONTEXT), .queries = queries, .query_count = 1}};
	struct lm_needles needles = {.list = list, .count = 2};
	struct lm_options options = {.ratio = 0.5, .chunk = 100, .window = 4};
	struct lm_report report;
	uint32_t tokens = 0;

	assert_int_equal(lm_evaluate_size(&needles, "f", lm_model_config(b->model), &tokens, b->text), 0);
	assert_int_equal(tokens, 1 + strlen(CONTEXT) + 6 + 2 + 16);
	bench_open(b, tokens, "g");
	if (lm_evaluate(b->worker, &options, &needles, &report, b->text) < 0)
		fail_msg("%s", b->text);
	assert_int_equal(report.contexts, 2);
	assert_int_equal(report.queries, 4);
	assert_int_equal(report.correct, 3);
	/* The same query of the same context, three times. */
	assert_true(report.answers[0] == report.answers[2] && report.answers[0] == report.answers[3]);
	assert_true(report.answers[0] != report.answers[1]);
	assert_int_equal(report.usage.bytes_full, 2 * (1 + strlen(CONTEXT)) * 6 * 4 * 64 * 4);
	assert_int_equal(report.usage.bytes_held, report.usage.bytes_full);
	assert_int_equal(report.usage.bytes_physical, 2 * 12345);
	assert_int_equal(b->fake->creates, 2);
	assert_int_equal(b->fake->truncates, 2);
	assert_int_equal(b->fake->evictions, 2 * ((1 + strlen(CONTEXT) + 99) / 100));
	assert_int_equal(b->fake->sequences, 0);
	lm_report_deinit(&report);
}

/* The event at 257 tokens falls into each query: when it drops pairs, the context is read once for each. */
static void test_queries_stay_independent_under_a_decode_budget(void **state)
{
	struct bench *b = *state;
	struct lm_query queries[] = {{.name = bytes("BAKUMI"), .code = bytes("48213")},
		{.name = bytes("DAKO"), .code = bytes("0612")}, {.name = bytes("BAKUMI"), .code = bytes("48213")}};
	struct lm_needle needle = {.line = 1, .queries = queries, .query_count = 3};
	struct lm_needles needles = {.list = &needle, .count = 1};
	struct lm_options options = {.ratio = 1.0, .chunk = 1000, .decode_budget = 132};
	struct lm_bytes text = bytes(CONTEXT);
	struct lm_report report;
	uint8_t context[252];

	memset(context, '.', sizeof(context));
	memcpy(context + sizeof(context) - text.size, text.data, text.size);
	needle.context = (struct lm_bytes){.data = context, .size = sizeof(context)};
	bench_open(b, 400, "g");
	for (unsigned drops = 0; drops < 2; drops++) {
		b->fake->drops = drops;
		b->fake->creates = b->fake->truncates = b->fake->evictions = 0;
		if (lm_evaluate(b->worker, &options, &needles, &report, b->text) < 0)
			fail_msg("%s", b->text);
		assert_int_equal(report.contexts, 1);
		assert_int_equal(report.queries, 3);
		assert_int_equal(report.correct, 3);
		assert_int_equal(b->fake->creates, drops ? 3 : 1);
		assert_int_equal(b->fake->truncates, drops ? 0 : 2);
		assert_int_equal(b->fake->evictions, drops ? 6 : 4);
		assert_int_equal(b->fake->sequences, 0);
		lm_report_deinit(&report);
	}
	assert_int_equal(b->fake->evicted_at[0], 253);
	assert_int_equal(b->fake->evicted_at[1], 257);
}

static void test_context_longer_than_the_model(void **state)
{
	struct bench *b = *state;
	struct lm_query query = {.name = bytes("BAKUMI"), .code = bytes("48213")};
	struct lm_needle needle = {
		.line = 7, .context = {.data = NULL, .size = 4096 - 24}, .queries = &query, .query_count = 1};
	struct lm_needles needles = {.list = &needle, .count = 1};
	uint32_t tokens = 77;

	assert_int_equal(lm_evaluate_size(&needles, "n.jsonl", lm_model_config(b->model), &tokens, b->text), -EINVAL);
	assert_string_equal(b->text,
		"n.jsonl:7: context of 4072 tokens with query and answer needs 4097 positions, the "
		"model has max_position_embeddings 4096");
	assert_int_equal(tokens, 77);
	needle.context.size--;
	assert_int_equal(lm_evaluate_size(&needles, "n.jsonl", lm_model_config(b->model), &tokens, b->text), 0);
	assert_int_equal(tokens, 4096);
}

static void test_refused_context(void **state)
{
	struct bench *b = *state;
	struct lm_query query = {.name = bytes("BAKUMI"), .code = bytes("48213")};
	struct lm_needle needle = {.line = 1, .context = bytes(CONTEXT), .queries = &query, .query_count = 1};
	struct lm_needles needles = {.list = &needle, .count = 1};
	struct lm_options options = {.ratio = 0.5, .chunk = 100};
	struct lm_report report = {.queries = 77};

	bench_open(b, 400, "g");
	b->fake->fail_create = -ENOSPC;
	assert_int_equal(lm_evaluate(b->worker, &options, &needles, &report, b->text), -ENOSPC);
	assert_string_equal(b->text, "the fake was told to fail");
	assert_int_equal(report.queries, 77);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, bench_setup, bench_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_counts_right_and_wrong),
		TEST(test_queries_stay_independent_under_a_decode_budget),
		TEST(test_context_longer_than_the_model),
		TEST(test_refused_context),
	};

	return runner_run("tools/lm/evaluate", tests, sizeof(tests) / sizeof(tests[0]));
}
