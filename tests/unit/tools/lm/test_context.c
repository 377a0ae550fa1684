#include "tools/lm/context.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/tools/lm/bench.h"
#include "tools/lm/prompt.h"

#define SIZE 299u
#define NEW  40u

static int32_t *make_prompt(void)
{
	uint8_t bytes[SIZE];
	int32_t *tokens;

	for (uint32_t i = 0; i < SIZE; i++)
		bytes[i] = (uint8_t) "the kernel maps memory "[i % 23];
	tokens = lm_prompt_context(bytes, SIZE);
	assert_non_null(tokens);
	return tokens;
}

/* Begins with the prompt, continues it, and ends. */
static int continue_prompt(struct bench *b, const struct lm_options *options, int32_t tokens[NEW], uint32_t *ret_count)
{
	int32_t *prompt = make_prompt();
	int e = lm_context_begin(b->worker, options, prompt, SIZE + 1, NEW + 3, b->text);

	if (e == 0) {
		static const int32_t query[] = {LM_TOKEN_QUERY, 'k', LM_TOKEN_REPLY};

		assert_int_equal(lm_worker_reserve(b->worker, NEW + 3, b->text), 0);
		assert_int_equal(lm_worker_feed(b->worker, query, 3, b->text), 0);
		assert_int_equal(lm_worker_generate(b->worker, tokens, NEW, ret_count, b->text), 0);
		/* And once more from where the context ends. */
		assert_int_equal(lm_worker_rewind(b->worker, b->text), 0);
		assert_int_equal(b->fake->committed_pos, SIZE + 1);
		assert_int_equal(lm_worker_end(b->worker, b->text), 0);
	}
	free(prompt);
	return e;
}

static void test_is_only_read(void **state)
{
	struct bench *b = *state;
	const struct lm_options options = {.ratio = 0.5, .chunk = 128};
	int32_t tokens[NEW];
	uint32_t count;

	bench_open(b, 400, "g");
	assert_int_equal(continue_prompt(b, &options, tokens, &count), 0);
	assert_int_equal(b->fake->creates, 1);
	assert_int_equal(b->fake->evictions, 3);
	assert_int_equal(b->fake->policy.max_new_tokens, NEW + 3);
	assert_int_equal(b->fake->recalls + b->fake->offloads + b->fake->publishes + b->fake->attaches, 0);
}

static void test_is_recalled_and_moved(void **state)
{
	struct bench *b = *state;
	const struct lm_options options = {.ratio = 0.1, .chunk = 1000, .recall = 0.3, .offload_between = true};
	const struct lm_moves *moves;
	int32_t tokens[NEW];
	uint32_t count;

	bench_open(b, 400, "g");
	assert_int_equal(continue_prompt(b, &options, tokens, &count), 0);
	assert_int_equal(b->fake->recalls, 1);
	assert_true(b->fake->recalled == 0.3);
	assert_int_equal(b->fake->offloads, 1);
	assert_int_equal(b->fake->restores, 1);
	moves = lm_worker_moves(b->worker);
	assert_int_equal(moves->recalls, 1);
	assert_int_equal(moves->recalled_bytes, 10 * 2 * 32 * 4);
	assert_int_equal(moves->offloads, 1);
	assert_int_equal(moves->host_bytes, 777);
	assert_true(moves->offload_ns > 0 && moves->restore_ns > 0 && moves->recall_ns > 0);
}

/* Who attaches reads nothing, and says the same. */
static void test_is_published_and_found(void **state)
{
	struct bench *b = *state;
	struct lm_options options = {.ratio = 0.5, .chunk = 128, .publish = true};
	int32_t first[NEW], second[NEW];
	uint32_t first_count = 0, second_count = 0;
	uint64_t prefill_ns;

	bench_open(b, 400, "g");
	assert_int_equal(continue_prompt(b, &options, first, &first_count), 0);
	assert_int_equal(b->fake->publishes, 1);
	prefill_ns = lm_worker_times(b->worker)->prefill_ns;
	options.publish = false;
	options.attach = true;
	assert_int_equal(continue_prompt(b, &options, second, &second_count), 0);
	assert_int_equal(b->fake->attaches, 1);
	assert_int_equal(b->fake->creates, 1);
	assert_int_equal(lm_worker_times(b->worker)->prefill_ns, prefill_ns);
	assert_int_equal(lm_worker_times(b->worker)->prefill_tokens, SIZE + 1);
	assert_int_equal(lm_worker_moves(b->worker)->publishes, 1);
	assert_int_equal(lm_worker_moves(b->worker)->attaches, 1);
	assert_int_equal(lm_worker_moves(b->worker)->context_bytes, 2 * 4096);
	assert_int_equal(first_count, second_count);
	assert_memory_equal(first, second, first_count * sizeof(*first));
	/* Another ratio is another context. */
	options.ratio = 0.4;
	assert_int_equal(continue_prompt(b, &options, second, &second_count), -ENOENT);
	assert_string_equal(b->text, "the fake was told to fail");
}

static void test_logits_have_a_hash(void **state)
{
	struct bench *b = *state;
	const struct lm_options options = {.ratio = 0.5, .chunk = 128};
	int32_t tokens[NEW];
	uint64_t before, once;
	uint32_t count;

	bench_open(b, 400, "g");
	before = lm_worker_logits_hash(b->worker);
	assert_int_equal(continue_prompt(b, &options, tokens, &count), 0);
	once = lm_worker_logits_hash(b->worker);
	assert_true(once != before);
	assert_int_equal(continue_prompt(b, &options, tokens, &count), 0);
	assert_true(lm_worker_logits_hash(b->worker) != once);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, bench_setup, bench_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_is_only_read),
		TEST(test_is_recalled_and_moved),
		TEST(test_is_published_and_found),
		TEST(test_logits_have_a_hash),
	};

	return runner_run("tools/lm/context", tests, sizeof(tests) / sizeof(tests[0]));
}
