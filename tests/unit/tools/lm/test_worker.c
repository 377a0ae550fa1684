#include "tools/lm/worker.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/tools/lm/bench.h"
#include "tools/lm/prompt.h"

#define PROMPT_BYTES 299u

static const struct kvg_policy chunked = {.ratio = 0.3,
	.mode = KVG_MODE_CHUNKED,
	.prefix_tokens = 1,
	.context_tokens = PROMPT_BYTES,
	.chunk_tokens = 128,
	.max_new_tokens = 40};

/* BOS and PROMPT_BYTES bytes of plain text. */
static int32_t *make_prompt(void)
{
	uint8_t bytes[PROMPT_BYTES];
	int32_t *tokens;

	for (uint32_t i = 0; i < PROMPT_BYTES; i++)
		bytes[i] = (uint8_t) "the kernel maps memory "[i % 23];
	tokens = lm_prompt_context(bytes, PROMPT_BYTES);
	assert_non_null(tokens);
	return tokens;
}

static void prefill(struct bench *b, const struct kvg_policy *policy)
{
	int32_t *prompt = make_prompt();

	assert_int_equal(lm_worker_begin(b->worker, policy, b->text), 0);
	if (lm_worker_prefill(b->worker, prompt, PROMPT_BYTES + 1, NULL, NULL, b->text) < 0)
		fail_msg("%s", b->text);
	free(prompt);
}

static void test_layout(void **state)
{
	struct bench *b = *state;
	const struct kvg_group *g = &b->fake->layout.groups[0];

	bench_open(b, 500, "g");
	assert_string_equal(b->fake->layout.model, "pilot-lm");
	assert_int_equal(b->fake->layout.hidden_dim, 256);
	assert_int_equal(b->fake->layout.max_tokens, 500);
	assert_int_equal(b->fake->layout.group_count, 1);
	assert_int_equal(g->kind, KVG_GROUP_GLOBAL);
	assert_int_equal(g->layers, 6);
	assert_int_equal(g->head_count, 4);
	assert_int_equal(g->head_total, 4);
	assert_int_equal(g->k_dim, 32);
	assert_int_equal(g->v_dim, 32);
	assert_int_equal(g->k_dtype, KVG_F32);
	assert_int_equal(g->query_heads, 2);
	assert_int_equal(b->fake->gates, 1);
}

static void test_prefill_evicts_after_each_chunk(void **state)
{
	struct bench *b = *state;

	bench_open(b, 400, "g");
	prefill(b, &chunked);
	assert_int_equal(b->fake->evictions, 3);
	assert_int_equal(b->fake->evicted_at[0], 128);
	assert_int_equal(b->fake->evicted_at[1], 256);
	assert_int_equal(b->fake->evicted_at[2], 300);
	assert_int_equal(b->fake->staged_rows, 6 * 300);
	assert_int_equal(lm_worker_times(b->worker)->prefill_tokens, 300);
	assert_true(lm_worker_times(b->worker)->prefill_ns > 0);
	assert_int_equal(lm_worker_end(b->worker, b->text), 0);
	assert_int_equal(b->fake->sequences, 0);
}

static void test_without_eviction_nothing_is_staged(void **state)
{
	struct bench *b = *state;
	struct kvg_policy off = chunked;

	off.mode = KVG_MODE_OFF;
	bench_open(b, 400, NULL);
	prefill(b, &off);
	assert_int_equal(b->fake->gates, 0);
	assert_int_equal(b->fake->evictions, 0);
	assert_int_equal(b->fake->stages, 0);
}

/* The same answer twice: rewinding leaves the KV as it was. */
static void test_generate_and_rewind(void **state)
{
	struct bench *b = *state;
	int32_t query[] = {LM_TOKEN_QUERY, 'k', LM_TOKEN_REPLY}, first[8], again[8];
	uint32_t count = 0, again_count = 0;

	bench_open(b, 400, "g");
	prefill(b, &chunked);
	assert_int_equal(lm_worker_reserve(b->worker, 11, b->text), 0);
	assert_int_equal(lm_worker_feed(b->worker, query, 3, b->text), 0);
	assert_int_equal(lm_worker_generate(b->worker, first, 8, &count, b->text), 0);
	assert_in_range(count, 1, 8);
	assert_true(count == 8 || first[count - 1] == LM_TOKEN_END);
	assert_int_equal(lm_worker_times(b->worker)->decode_tokens, count - 1);
	assert_int_equal(lm_worker_rewind(b->worker, b->text), 0);
	assert_int_equal(b->fake->truncates, 1);
	assert_int_equal(b->fake->committed_pos, 300);
	assert_int_equal(lm_worker_feed(b->worker, query, 3, b->text), 0);
	assert_int_equal(lm_worker_generate(b->worker, again, 8, &again_count, b->text), 0);
	assert_int_equal(again_count, count);
	assert_memory_equal(first, again, count * sizeof(*first));
}

static struct kvg_policy budgeted(void)
{
	struct kvg_policy policy = chunked;

	policy.mode = KVG_MODE_OFF;
	policy.budget = 200;
	policy.max_new_tokens = 300;
	return policy;
}

/* Right after the prompt, and after each position that is a multiple of 128, whether tokens are fed or generated. */
static void test_a_decode_budget_has_its_events(void **state)
{
	static const uint32_t at[] = {300, 385, 513};
	struct bench *b = *state;
	struct kvg_policy policy = budgeted();
	const struct lm_event *events;
	int32_t query[100] = {0}, tokens[114];
	uint32_t count = 0;

	bench_open(b, 600, "g");
	b->fake->drops = 7;
	prefill(b, &policy);
	assert_int_equal(b->fake->decode_evictions, 1);
	assert_int_equal(lm_worker_reserve(b->worker, 300, b->text), 0);
	assert_int_equal(b->fake->reserved_pos, 385);
	assert_int_equal(lm_worker_feed(b->worker, query, 84, b->text), 0);
	assert_int_equal(b->fake->decode_evictions, 1);
	assert_int_equal(lm_worker_feed(b->worker, query, 100, b->text), 0);
	assert_int_equal(b->fake->decode_evictions, 2);
	assert_int_equal(b->fake->reserved_pos, 513);
	assert_int_equal(lm_worker_generate(b->worker, tokens, 30, &count, b->text), 0);
	assert_int_equal(count, 30);
	assert_int_equal(b->fake->decode_evictions, 3);
	assert_true(lm_worker_times(b->worker)->decode_evict_ns > 0);
	assert_true(lm_worker_times(b->worker)->decode_evict_ns < lm_worker_times(b->worker)->decode_ns);
	events = lm_worker_events(b->worker, &count);
	assert_int_equal(count, 3);
	for (uint32_t i = 0; i < 3; i++) {
		assert_int_equal(b->fake->evicted_at[i], at[i]);
		assert_int_equal(events[i].tokens, at[i]);
		assert_int_equal(events[i].pairs, at[i] * 24);
		assert_int_equal(events[i].dropped, 7);
		assert_int_equal(events[i].bytes_physical, 12345);
	}
	assert_int_equal(lm_worker_end(b->worker, b->text), 0);
	prefill(b, &policy);
	(void)lm_worker_events(b->worker, &count);
	assert_int_equal(count, 1);
}

static float bf16(uint16_t bits)
{
	uint32_t wide = (uint32_t)bits << 16;
	float value;

	memcpy(&value, &wide, sizeof(value));
	return value;
}

/* What is gathered token by token is what a prefill of the same tokens stages, at the same places. */
static void test_gathered_hidden_states_are_those_of_their_tokens(void **state)
{
	struct bench *b = *state;
	struct kvg_policy policy = budgeted();
	size_t row = 256, layer = 600 * row, size = 6 * layer;
	uint16_t *gathered = malloc(size * sizeof(*gathered));
	int32_t *tokens = calloc(600, sizeof(*tokens)), *prompt = make_prompt();
	uint32_t count = 0;

	assert_true(gathered && tokens);
	memcpy(tokens, prompt, (PROMPT_BYTES + 1) * sizeof(*tokens));
	bench_open(b, 600, "g");
	prefill(b, &policy);
	assert_int_equal(lm_worker_reserve(b->worker, 214, b->text), 0);
	assert_int_equal(lm_worker_generate(b->worker, tokens + 300, 214, &count, b->text), 0);
	assert_int_equal(count, 214);
	assert_int_equal(b->fake->staged_rows, 6 * 513);
	memcpy(gathered, b->fake->kv.hidden, size * sizeof(*gathered));
	assert_int_equal(lm_worker_end(b->worker, b->text), 0);
	memset(b->fake->kv.hidden, 0, size * sizeof(*gathered));
	policy.context_tokens = 512;
	policy.max_new_tokens = 0;
	assert_int_equal(lm_worker_begin(b->worker, &policy, b->text), 0);
	assert_int_equal(lm_worker_prefill(b->worker, tokens, 513, NULL, NULL, b->text), 0);
	for (size_t i = 0; i < size; i++) {
		float is = bf16(gathered[i]), should = bf16(b->fake->kv.hidden[i]);

		if (!(fabsf(is - should) <= 0.02f * fabsf(should) + 0.01f))
			fail_msg("layer %zu token %zu element %zu: %g, not %g", i / layer, i % layer / row, i % row,
				(double)is, (double)should);
	}
	free(gathered);
	free(tokens);
	free(prompt);
}

/* There is a way back as long as no event after the prompt has dropped anything. */
static void test_rewinding_under_a_budget(void **state)
{
	struct bench *b = *state;
	struct kvg_policy policy = budgeted();
	int32_t query[90] = {0};

	bench_open(b, 600, "g");
	prefill(b, &policy);
	for (unsigned round = 0; round < 2; round++) {
		assert_int_equal(lm_worker_reserve(b->worker, 90, b->text), 0);
		assert_int_equal(lm_worker_feed(b->worker, query, 90, b->text), 0);
		assert_int_equal(b->fake->decode_evictions, 2 + round);
		assert_true(lm_worker_can_rewind(b->worker));
		assert_int_equal(lm_worker_rewind(b->worker, b->text), 0);
		assert_int_equal(b->fake->committed_pos, 300);
	}
	b->fake->drops = 1;
	assert_int_equal(lm_worker_feed(b->worker, query, 84, b->text), 0);
	assert_true(lm_worker_can_rewind(b->worker));
	assert_int_equal(lm_worker_feed(b->worker, query, 1, b->text), 0);
	assert_false(lm_worker_can_rewind(b->worker));
	assert_int_equal(lm_worker_rewind(b->worker, b->text), -EINVAL);
	assert_string_equal(b->text, "no way back to 300 tokens: the decode budget has evicted at 385");
}

static void test_usage(void **state)
{
	struct bench *b = *state;
	struct lm_usage usage;

	bench_open(b, 400, "g");
	prefill(b, &chunked);
	assert_int_equal(lm_worker_usage(b->worker, &usage, b->text), 0);
	assert_int_equal(usage.bytes_full, 300 * 6 * 4 * (32 + 32) * 4);
	assert_int_equal(usage.bytes_held, usage.bytes_full);
	assert_int_equal(usage.bytes_physical, 12345);
	assert_int_equal(usage.bytes_prompt_max, 12345);
	assert_int_equal(usage.bytes_decode_max, 12345);
}

/* Tokens beyond the room that was reserved are refused by the library, on the pool's threads. */
static void test_no_room(void **state)
{
	struct bench *b = *state;
	int32_t query[] = {LM_TOKEN_QUERY};

	bench_open(b, 400, "g");
	prefill(b, &chunked);
	assert_int_equal(lm_worker_feed(b->worker, query, 1, b->text), -EINVAL);
	assert_string_equal(b->text, "layer 0: KV of positions 300 to 300: Invalid argument");
}

static void test_failures_carry_the_library_s_words(void **state)
{
	struct bench *b = *state;
	int32_t *prompt = make_prompt();

	bench_open(b, 400, "g");
	b->fake->fail_create = -ENOSPC;
	assert_int_equal(lm_worker_begin(b->worker, &chunked, b->text), -ENOSPC);
	assert_string_equal(b->text, "the fake was told to fail");
	b->fake->fail_create = 0;
	assert_int_equal(lm_worker_begin(b->worker, &chunked, b->text), 0);
	b->fake->fail_stage = -EPIPE;
	assert_int_equal(lm_worker_prefill(b->worker, prompt, PROMPT_BYTES + 1, NULL, NULL, b->text), -EPIPE);
	assert_string_equal(b->text, "the fake was told to fail");
	assert_int_equal(lm_worker_end(b->worker, b->text), 0);
	b->fake->fail_stage = 0;
	b->fake->fail_evict = -EIO;
	assert_int_equal(lm_worker_begin(b->worker, &chunked, b->text), 0);
	assert_int_equal(lm_worker_prefill(b->worker, prompt, PROMPT_BYTES + 1, NULL, NULL, b->text), -EIO);
	assert_string_equal(b->text, "the fake was told to fail");
	free(prompt);
}

static void test_no_daemon(void **state)
{
	struct bench *b = *state;
	struct lm_worker *worker = NULL;
	struct lm_worker_setup setup = {.socket = "gone",
		.model_name = "pilot-lm",
		.model = b->model,
		.kv_dtype = KVG_BF16,
		.max_tokens = 100,
		.chunk_tokens = 100};

	assert_int_equal(lm_worker_open(&setup, &worker, b->text), -ENOENT);
	assert_string_equal(b->text, "gone: no daemon there");
	assert_null(worker);
	assert_null(lm_worker_close(NULL));
}

static void test_refused_gate_is_named(void **state)
{
	struct bench *b = *state;
	struct lm_worker *worker = NULL;
	struct lm_worker_setup setup = {.socket = "fake",
		.gate = "other-gate",
		.model_name = "pilot-lm",
		.model = b->model,
		.kv_dtype = KVG_BF16,
		.max_tokens = 100,
		.chunk_tokens = 100};

	b->fake->fail_gate = -EINVAL;
	assert_int_equal(lm_worker_open(&setup, &worker, b->text), -EINVAL);
	assert_string_equal(b->text, "other-gate: the fake was told to fail");
	assert_null(worker);
	assert_int_equal(b->fake->connected, 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, bench_setup, bench_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_layout),
		TEST(test_prefill_evicts_after_each_chunk),
		TEST(test_without_eviction_nothing_is_staged),
		TEST(test_generate_and_rewind),
		TEST(test_a_decode_budget_has_its_events),
		TEST(test_gathered_hidden_states_are_those_of_their_tokens),
		TEST(test_rewinding_under_a_budget),
		TEST(test_usage),
		TEST(test_no_room),
		TEST(test_failures_carry_the_library_s_words),
		TEST(test_no_daemon),
		TEST(test_refused_gate_is_named),
	};

	return runner_run("tools/lm/worker", tests, sizeof(tests) / sizeof(tests[0]));
}
