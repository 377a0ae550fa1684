/* What a sequence is promised, and that the promise is enough. */
#include "daemon/sequence/admission.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <string.h>

#include "tests/support/space_model.h"

#define ROWS   6u
#define STRIPE (8u * ROWS) /* blocks of one stripe */

static const struct kvg_policy off = {.context_tokens = 1000, .max_new_tokens = 24};

static void test_without_eviction(void **state)
{
	struct kvg_policy policy = off;

	(void)state;
	assert_int_equal(admission_blocks(&policy, ROWS, 0, 0), 8 * STRIPE); /* 1024 tokens, no spare */
	policy.max_new_tokens = 25;
	assert_int_equal(admission_blocks(&policy, ROWS, 0, 0), 9 * STRIPE);
	policy.prefix_tokens = 128;
	assert_int_equal(admission_blocks(&policy, ROWS, 0, 0), 10 * STRIPE);
	policy.mode = KVG_MODE_CHUNKED; /* a ratio of 1 is no eviction either */
	policy.ratio = 1.0;
	assert_int_equal(admission_blocks(&policy, ROWS, 0, 0), 10 * STRIPE);
	assert_int_equal(admission_blocks(&(struct kvg_policy){0}, ROWS, 0, 0), 0);
}

/* One chunk: all of it in stripes, and two spare ones. Then what stays, packed, and the new tokens. */
static void test_one_chunk(void **state)
{
	struct kvg_policy policy = {.mode = KVG_MODE_CHUNKED, .ratio = 0.5, .context_tokens = 1280};

	(void)state;
	assert_int_equal(admission_blocks(&policy, ROWS, 0, 0), 12 * STRIPE);
	policy.max_new_tokens = 128 * 20;
	assert_int_equal(admission_blocks(&policy, ROWS, 0, 0), 1280 * ROWS / 2 / 16 + ROWS + 22 * STRIPE);
	assert_int_equal(admission_blocks(&policy, ROWS, 1280, 100), 100 / 16 + ROWS + 20 * STRIPE); /* no more spare */
	policy.mode = KVG_MODE_ONCE; /* counts the window of 25 on top */
	assert_int_equal(
		admission_blocks(&policy, ROWS, 0, 0), (25 * ROWS + 1255 * ROWS / 2) / 16 + ROWS + 22 * STRIPE);
}

static void test_promise_shrinks_with_progress(void **state)
{
	struct kvg_policy policy = {.mode = KVG_MODE_CHUNKED,
		.ratio = 0.25,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.context_tokens = 8192,
		.chunk_tokens = 1024,
		.window = 64};
	uint64_t full = admission_blocks(&policy, ROWS, 0, 0);

	(void)state;
	assert_true(full < 8192 / 16 * ROWS);
	assert_true(admission_blocks(&policy, ROWS, 4096, 1100 * ROWS) <= full);
	assert_true(admission_blocks(&policy, ROWS, 8192, 2048 * ROWS) < full);
}

static void test_decode_budget_bounds_the_need(void **state)
{
	struct kvg_policy policy = {
		.mode = KVG_MODE_OFF, .context_tokens = 256, .budget = 256, .max_new_tokens = 100000};
	uint64_t budgeted = admission_blocks(&policy, ROWS, 0, 0);

	(void)state;
	assert_int_equal(budgeted, 256 * ROWS / 16 + ROWS + 2 * STRIPE + 2 * STRIPE);
	policy.budget = UINT32_MAX; /* more than there will ever be: no more than without */
	policy.max_new_tokens = 256;
	assert_true(admission_blocks(&policy, ROWS, 0, 0) <= 512 * ROWS / 16 + ROWS + 4 * STRIPE);
}

/* Absurd values of a worker's must not wrap around to a small need. */
static void test_absurd_policies(void **state)
{
	struct kvg_policy policy = {.mode = KVG_MODE_CHUNKED,
		.ratio = 0.5,
		.context_tokens = 1u << 24,
		.chunk_tokens = 1,
		.floor = UINT32_MAX};
	uint64_t full = (uint64_t)(1u << 24) / 16 * (1u << 20);

	(void)state;
	assert_in_range(admission_blocks(&policy, 1u << 20, 0, 0), full, 2 * full);
	policy.floor = 0;
	policy.window = UINT32_MAX;
	policy.flags = KVG_POLICY_WINDOW_ABSOLUTE;
	assert_in_range(admission_blocks(&policy, 1u << 20, 0, 0), full / 2, 2 * full);
	policy.mode = KVG_MODE_THRESHOLD;
	policy.ratio = -1e300;
	assert_in_range(admission_blocks(&policy, 1u << 20, 0, 0), full, 2 * full);
	policy.ratio = (double)NAN;
	assert_in_range(admission_blocks(&policy, 1u << 20, 0, 0), full, 2 * full);
}

static void expect_refusal(const struct kvg_policy *policy, const char *expected)
{
	char text[KVG_TEXT_SIZE] = "";

	assert_int_equal(admission_check(policy, 1024, text, sizeof(text)), -EINVAL);
	assert_string_equal(text, expected);
}

static void test_check(void **state)
{
	struct kvg_policy policy = off;
	char text[KVG_TEXT_SIZE] = "untouched";

	(void)state;
	assert_int_equal(admission_check(&policy, 1024, text, sizeof(text)), 0);
	assert_string_equal(text, "untouched");
	policy.max_new_tokens = 25;
	expect_refusal(&policy, "policy: prefix 0 + context 1000 + new 25 tokens, the layout's max_tokens is 1024");
	policy.context_tokens = policy.prefix_tokens = policy.max_new_tokens = UINT32_MAX;
	assert_int_equal(admission_check(&policy, 1024, text, sizeof(text)), -EINVAL);
	policy = off;
	policy.mode = 4;
	expect_refusal(&policy, "policy: mode 4, known are 0 to 3");
	policy.mode = KVG_MODE_CHUNKED;
	expect_refusal(&policy, "policy: ratio 0, must be above 0 and at most 1");
	policy.ratio = 1.0 + DBL_EPSILON;
	expect_refusal(&policy, "policy: ratio 1, must be above 0 and at most 1");
	policy.ratio = (double)NAN;
	assert_int_equal(admission_check(&policy, 1024, text, sizeof(text)), -EINVAL);
	policy.ratio = DBL_MIN;
	assert_int_equal(admission_check(&policy, 1024, text, sizeof(text)), 0);
	policy.level = 4;
	expect_refusal(&policy, "policy: level 4, known are 0 to 3");
	policy.level = 0;
	policy.threshold = INFINITY;
	expect_refusal(&policy, "policy: threshold inf is not a number");
}

/* ---- the promise is enough ---- */

static struct kvg_policy random_policy(struct random *random, uint32_t max_tokens)
{
	struct kvg_policy policy = {.ratio = 0.05 + random_below(random, 90) / 100.0,
		.mode = (uint8_t)random_below(random, 4),
		.level = (uint8_t)random_below(random, 4),
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.prefix_tokens = random_below(random, 3) * 20,
		.window = random_below(random, 150),
		.floor = random_below(random, 3) ? 0 : 1 + random_below(random, 30),
		.threshold = 0.5f,
		.budget = random_below(random, 2) ? 0 : 100 + random_below(random, 200)};

	if (policy.budget)
		policy.floor = 0; /* which of equal scores it keeps depends on their order in the row */
	policy.max_new_tokens = random_below(random, max_tokens / 3);
	policy.context_tokens = 1 + random_below(random, max_tokens - policy.max_new_tokens - 50);
	policy.chunk_tokens = random_below(random, 3) ? 100 + random_below(random, 300) : 0;
	return policy;
}

/* A decode budget keeps all of equal scores, however many, so that no promise could hold. */
static enum score_pattern random_pattern(struct random *random, const struct kvg_policy *policy)
{
	static const enum score_pattern distinct[] = {
		SCORES_RANDOM, SCORES_ASCENDING, SCORES_DESCENDING, SCORES_ONE_ROW};

	return policy->budget ? distinct[random_below(random, 4)]
			      : (enum score_pattern)random_below(random, SCORES_PATTERNS);
}

/* One step of a sequence's life as kvgate-lm leads it; false at its end. */
static bool live_a_step(struct model *model)
{
	const struct kvg_policy *policy = &model->policy;
	uint32_t prompt = policy->prefix_tokens + policy->context_tokens, all = prompt + policy->max_new_tokens, end;
	uint32_t chunk = policy->chunk_tokens ? policy->chunk_tokens : prompt;

	if (model->committed >= all)
		return false;
	end = model->committed < prompt ? (model->committed / chunk + 1) * chunk : model->committed + 128;
	if (model->committed < prompt && end > prompt)
		end = prompt;
	if (end > all)
		end = all;
	if (model_append(model, end - model->committed) < 0)
		fail_msg("at %u of %u: %s", model->committed, all, model->fixture->text);
	if (model->committed <= prompt)
		model_evict(model, KVG_EVICT_PREFILL);
	if (policy->budget && model->committed >= prompt)
		model_evict(model, KVG_EVICT_DECODE);
	return true;
}

/* The account's max becomes exactly what has been promised and charged. */
static void close_budget(const struct fixture *fixture)
{
	struct quota_account *account = fixture->tenant->quota.account;

	account->max = account->charged + account->promised;
}

static void live_alone(struct random *random, size_t extent_size)
{
	struct fixture *fixture = fixture_new(
		&(struct fixture_options){.max_tokens = 2000, .extent_size = extent_size, .layers = 2, .heads = 3});
	struct kvg_policy policy = random_policy(random, 2000);
	struct model *model = model_new(fixture, &policy, random_pattern(random, &policy));

	close_budget(fixture);
	while (live_a_step(model))
		;
	model_release(model);
	fixture_free(fixture);
}

static void test_alone_in_its_promise(void **state)
{
	static const size_t sizes[] = {16 << 10, 64 << 10, 256 << 10, 1 << 20};
	struct random random = {.state = 4711};

	(void)state;
	for (unsigned i = 0; i < 60; i++)
		live_alone(&random, sizes[i % 4]);
}

/* Several sequences of one worker in a budget of exactly their promises, each some steps at a time. */
static void live_together(struct random *random, size_t extent_size)
{
	struct fixture *fixture = fixture_new(
		&(struct fixture_options){.max_tokens = 1200, .extent_size = extent_size, .layers = 2, .heads = 2});
	struct model *models[5];
	unsigned alive = 5;

	for (unsigned i = 0; i < 5; i++) {
		struct kvg_policy policy = random_policy(random, 1200);

		models[i] = model_new(fixture, &policy, random_pattern(random, &policy));
	}
	close_budget(fixture);
	while (alive) {
		unsigned i = random_below(random, 5);

		if (models[i] && !live_a_step(models[i])) {
			model_release(models[i]);
			models[i] = NULL;
			alive--;
		}
	}
	fixture_free(fixture);
}

static void test_together_in_their_promises(void **state)
{
	static const size_t sizes[] = {16 << 10, 64 << 10, 256 << 10, 1 << 20};
	struct random random = {.state = 815};

	(void)state;
	for (unsigned i = 0; i < 24; i++)
		live_together(&random, sizes[i % 4]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_without_eviction),
		cmocka_unit_test(test_one_chunk),
		cmocka_unit_test(test_promise_shrinks_with_progress),
		cmocka_unit_test(test_decode_budget_bounds_the_need),
		cmocka_unit_test(test_absurd_policies),
		cmocka_unit_test(test_check),
		cmocka_unit_test(test_alone_in_its_promise),
		cmocka_unit_test(test_together_in_their_promises),
	};

	return runner_run("admission", tests, sizeof(tests) / sizeof(tests[0]));
}
