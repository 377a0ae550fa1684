/* Which pairs stay: every level, mode and kind of scores against the naive oracle, contents included. */
#include "daemon/sequence/evict.h"

#include <errno.h>
#include <string.h>

#include "tests/support/space_model.h"

static const struct kvg_policy chunked = {.ratio = 0.3,
	.mode = KVG_MODE_CHUNKED,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE,
	.prefix_tokens = 5,
	.context_tokens = 500,
	.chunk_tokens = 200,
	.window = 37,
	.max_new_tokens = 200};

static void run_prompt(const struct kvg_policy *policy, enum score_pattern pattern)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = model_new(fixture, policy, pattern);

	model_prefill(model);
	assert_int_equal(model_append(model, 40), 0);
	model_check(model);
	model_release(model);
	fixture_free(fixture);
}

static void test_chunked_every_level_and_pattern(void **state)
{
	(void)state;
	for (unsigned level = 0; level <= KVG_LEVEL_ADAKV_LAYER; level++) {
		for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
			struct kvg_policy policy = chunked;

			policy.level = (uint8_t)level;
			run_prompt(&policy, (enum score_pattern)pattern);
		}
	}
}

static void test_once_every_level_and_pattern(void **state)
{
	(void)state;
	for (unsigned level = 0; level <= KVG_LEVEL_ADAKV_LAYER; level++) {
		for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
			struct kvg_policy policy = chunked;

			policy.level = (uint8_t)level;
			policy.mode = KVG_MODE_ONCE;
			run_prompt(&policy, (enum score_pattern)pattern);
		}
	}
}

static void test_threshold_every_pattern(void **state)
{
	(void)state;
	for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
		struct kvg_policy policy = chunked;

		policy.mode = KVG_MODE_THRESHOLD;
		policy.threshold = 0.25f;
		run_prompt(&policy, (enum score_pattern)pattern);
	}
}

static void test_ratios(void **state)
{
	static const double ratios[] = {0.0001, 0.01, 0.074, 0.1, 0.5, 0.9, 0.999, 1.0};

	(void)state;
	for (size_t i = 0; i < sizeof(ratios) / sizeof(ratios[0]); i++) {
		struct kvg_policy policy = chunked;

		policy.ratio = ratios[i];
		run_prompt(&policy, SCORES_RANDOM);
		policy.flags = 0; /* n < chunk: the window is 2% of the context */
		policy.chunk_tokens = 1000;
		run_prompt(&policy, SCORES_RANDOM);
	}
}

static void test_floor(void **state)
{
	static const uint32_t floors[] = {1, 8, 100, 4000};

	(void)state;
	for (size_t i = 0; i < sizeof(floors) / sizeof(floors[0]); i++) {
		struct kvg_policy policy = chunked;

		policy.ratio = 0.1;
		policy.floor = floors[i];
		run_prompt(&policy, SCORES_ONE_ROW);
		run_prompt(&policy, SCORES_EQUAL);
	}
}

static void test_off_keeps_everything(void **state)
{
	struct kvg_policy policy = chunked;
	struct fixture *fixture = fixture_new(NULL);
	struct model *model;

	(void)state;
	policy.mode = KVG_MODE_OFF;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	model_prefill(model);
	assert_int_equal(model_pairs(model), 505 * model->rows);
	assert_int_equal(fixture_generation(fixture, model->handle), 0);
	model_release(model);
	fixture_free(fixture);
}

static void test_protected_ranges_stay(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model;

	(void)state;
	for (unsigned level = 0; level <= KVG_LEVEL_ADAKV_LAYER; level++) {
		struct kvg_policy policy = chunked;

		policy.level = (uint8_t)level;
		policy.ratio = 0.1;
		model = model_new(fixture, &policy, SCORES_DESCENDING);
		model_protect(model, 130, 190);
		model_prefill(model);
		model_release(model);
	}
	fixture_free(fixture);
}

/* A sequence that decodes for a while: a budget event after the prompt and every 64 tokens. */
static void run_decode(struct kvg_policy policy, enum score_pattern pattern)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model;

	policy.max_new_tokens = 700;
	model = model_new(fixture, &policy, pattern);
	model_prefill(model);
	model_evict(model, KVG_EVICT_DECODE);
	for (unsigned i = 0; i < 10; i++) {
		assert_int_equal(model_append(model, 64), 0);
		model_evict(model, KVG_EVICT_DECODE);
	}
	model_release(model);
	fixture_free(fixture);
}

static void test_decode_every_pattern(void **state)
{
	(void)state;
	for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
		struct kvg_policy policy = chunked;

		policy.budget = 150;
		policy.ratio = 1.0;
		run_decode(policy, (enum score_pattern)pattern);
		policy.ratio = 0.5;
		policy.floor = 3;
		run_decode(policy, (enum score_pattern)pattern);
		policy.decode_first = 9;
		policy.decode_window = 33;
		run_decode(policy, (enum score_pattern)pattern);
	}
}

/* The budget is full exactly: nothing goes; one pair a row more: as many go. */
static void test_decode_boundary(void **state)
{
	struct kvg_policy policy = chunked;
	struct fixture *fixture = fixture_new(NULL);
	struct model *model;

	(void)state;
	policy.ratio = 1.0;
	policy.prefix_tokens = 0;
	policy.context_tokens = 256;
	policy.budget = 256;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	model_prefill(model);
	model_evict(model, KVG_EVICT_DECODE);
	assert_int_equal(fixture->cqe.value[1], 0);
	assert_int_equal(fixture_generation(fixture, model->handle), 0);
	assert_int_equal(model_append(model, 1), 0);
	model_evict(model, KVG_EVICT_DECODE);
	assert_int_equal(fixture->cqe.value[1], model->rows);
	assert_int_equal(fixture_generation(fixture, model->handle), 1);
	model_release(model);
	fixture_free(fixture);
}

static void test_unscored_tokens_are_refused(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = model_new(fixture, &chunked, SCORES_RANDOM);

	(void)state;
	assert_int_equal(model_append(model, 200), 0);
	assert_int_equal(fixture_reserve(fixture, model->handle, 10), 0);
	assert_int_equal(fixture_commit(fixture, model->handle, 210), 0);
	assert_int_equal(fixture_evict(fixture, model->handle, KVG_EVICT_PREFILL), -ENODATA);
	assert_non_null(strstr(fixture->text, "layer 0 is scored to 200, committed are 210"));
	model_release(model);
	fixture_free(fixture);
}

/* A decode eviction in the middle of a prompt would take candidates away that prefill evictions count on. */
static void test_decode_waits_for_the_prompt(void **state)
{
	struct kvg_policy policy = chunked;
	struct fixture *fixture = fixture_new(NULL);
	struct model *model;

	(void)state;
	policy.budget = 150;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	assert_int_equal(model_append(model, 504), 0);
	assert_int_equal(fixture_evict(fixture, model->handle, KVG_EVICT_DECODE), -EBUSY);
	assert_non_null(strstr(fixture->text, "decode eviction at 504 tokens, the prompt has 5 + 500"));
	assert_int_equal(model_append(model, 1), 0);
	model_evict(model, KVG_EVICT_DECODE);
	model_evict(model, KVG_EVICT_PREFILL); /* which comes too late, and does nothing */
	assert_int_equal(fixture->cqe.value[1], 0);
	model_release(model);
	fixture_free(fixture);
}

/*
 * Blocks that come from another sequence's eviction carry its marks; pairs of a prefix,
 * which nobody scores, must not be taken for dropped ones.
 */
static void test_marks_of_a_former_owner_do_not_count(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = 256 << 10});
	struct kvg_policy policy = chunked;
	struct model *first, *second, *third;

	(void)state;
	policy.chunk_tokens = 0;
	policy.ratio = 0.1;
	second = model_new(fixture, &policy, SCORES_RANDOM);
	assert_int_equal(model_append(second, 128), 0); /* keeps the shared extent from going */
	first = model_new(fixture, &policy, SCORES_RANDOM);
	model_prefill(first);
	policy.prefix_tokens = 300;
	third = model_new(fixture, &policy, SCORES_RANDOM);
	model_prefill(third);
	model_release(third);
	model_release(first);
	model_release(second);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_chunked_every_level_and_pattern),
		cmocka_unit_test(test_once_every_level_and_pattern),
		cmocka_unit_test(test_threshold_every_pattern),
		cmocka_unit_test(test_ratios),
		cmocka_unit_test(test_floor),
		cmocka_unit_test(test_off_keeps_everything),
		cmocka_unit_test(test_protected_ranges_stay),
		cmocka_unit_test(test_decode_every_pattern),
		cmocka_unit_test(test_decode_boundary),
		cmocka_unit_test(test_unscored_tokens_are_refused),
		cmocka_unit_test(test_decode_waits_for_the_prompt),
		cmocka_unit_test(test_marks_of_a_former_owner_do_not_count),
	};

	return runner_run("evict_select", tests, sizeof(tests) / sizeof(tests[0]));
}
