/* Moves: every surviving pair arrives with its K, V, position and score, in whatever geometry. */
#include "daemon/sequence/evict.h"

#include <string.h>

#include "tests/support/space_model.h"

static const struct kvg_policy policy_base = {.ratio = 0.4,
	.mode = KVG_MODE_CHUNKED,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE,
	.prefix_tokens = 3,
	.context_tokens = 600,
	.chunk_tokens = 250,
	.window = 50,
	.budget = 130,
	.max_new_tokens = 400};

static void run_geometry(const struct fixture_options *options)
{
	struct kvg_policy policy = policy_base;
	struct fixture *fixture = fixture_new(options);
	struct model *model;

	if (options->max_tokens && options->max_tokens < 1003) {
		policy.context_tokens = options->max_tokens / 2;
		policy.chunk_tokens = policy.context_tokens / 3;
		policy.max_new_tokens = options->max_tokens - policy.context_tokens - policy.prefix_tokens;
		policy.window = policy.budget = policy.chunk_tokens / 4 + 1;
		policy.decode_window = 16;
	}
	model = model_new(fixture, &policy, SCORES_RANDOM);
	model_prefill(model);
	for (uint32_t left = policy.max_new_tokens; left; left -= left < 100 ? left : 100) {
		assert_int_equal(model_append(model, left < 100 ? left : 100), 0);
		model_evict(model, KVG_EVICT_DECODE);
	}
	assert_int_equal(model->committed, policy.prefix_tokens + policy.context_tokens + policy.max_new_tokens);
	model_release(model);
	fixture_free(fixture);
}

static void test_geometries(void **state)
{
	static const struct fixture_options geometries[] = {
		{.k_dim = 80, .v_dim = 80},
		{.layers = 1, .heads = 1},
		{.layers = 1, .heads = 1, .max_tokens = 1},
		{.layers = 1, .heads = 1, .max_tokens = 17},
		{.k_dtype = KVG_F32, .v_dtype = KVG_F32},
		{.k_dtype = KVG_F32, .v_dtype = KVG_BF16},
		{.k_dim = 16, .v_dim = 4},
		{.k_dim = 4, .v_dim = 96, .v_dtype = KVG_F16},
		{.layers = 3, .heads = 1, .max_tokens = 1003},
		{.layers = 1, .heads = 5, .k_dim = 5, .v_dim = 7, .max_tokens = 257},
		{.layers = 7, .heads = 2, .max_tokens = 127},
		{.max_tokens = 129, .k_dim = 128, .v_dim = 128, .k_dtype = KVG_F32, .v_dtype = KVG_F32},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(geometries) / sizeof(geometries[0]); i++)
		if (geometries[i].max_tokens != 1)
			run_geometry(&geometries[i]);
}

/* max_tokens 1: one token fits, and its eviction is none. */
static void test_one_token(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.layers = 1, .heads = 1, .max_tokens = 1});
	struct kvg_policy policy = {.ratio = 0.5, .mode = KVG_MODE_CHUNKED, .context_tokens = 1};
	struct model *model = model_new(fixture, &policy, SCORES_RANDOM);

	(void)state;
	assert_int_equal(model_append(model, 1), 0);
	model_evict(model, KVG_EVICT_PREFILL);
	model_release(model);
	fixture_free(fixture);
}

/* Everything that may go goes: rows become empty, and grow again. */
static void test_rows_that_become_empty(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct kvg_policy policy = policy_base;
	struct model *model;

	(void)state;
	policy.prefix_tokens = 0;
	policy.window = 0;
	policy.mode = KVG_MODE_THRESHOLD;
	policy.threshold = 2.0f;
	policy.chunk_tokens = 130;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	model_prefill(model);
	assert_int_equal(model_pairs(model), 0);
	assert_int_equal(fixture->cqe.value[2], 0);
	assert_int_equal(fixture->space->blocks.used_blocks, 0);
	assert_int_equal(model_append(model, 33), 0);
	model_check(model);
	model_release(model);
	fixture_free(fixture);
}

/* Heads drop different numbers, so their phases within a block differ; tokens appended later find their places. */
static void test_phases_differ_between_heads(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.heads = 5});
	struct kvg_policy policy = policy_base;
	struct model *model;

	(void)state;
	policy.ratio = 0.37;
	policy.budget = 90;
	policy.max_new_tokens = 1000;
	model = model_new(fixture, &policy, SCORES_ONE_ROW);
	model_prefill(model);
	for (uint32_t i = 1; i < 40; i++) {
		assert_int_equal(model_append(model, i), 0);
		model_check(model);
		if (i % 3 == 0)
			model_evict(model, KVG_EVICT_DECODE);
	}
	model_release(model);
	fixture_free(fixture);
}

/* A truncation before the eviction: the dropped tail leaves nothing behind. */
static void test_truncated_tail(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct kvg_policy policy = policy_base;
	struct model *model;

	(void)state;
	policy.max_new_tokens = 600;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	model_prefill(model);
	for (uint32_t i = 0; i < 8; i++) {
		assert_int_equal(model_append(model, 70), 0);
		model_truncate(model, model->committed - (i * 9 + 1));
		if (i % 2)
			model_evict(model, KVG_EVICT_DECODE);
		model_check(model);
	}
	model_release(model);
	fixture_free(fixture);
}

/* The redo record is at rest after each eviction, and a move is the kernel's. */
static void test_redo_record(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = model_new(fixture, &policy_base, SCORES_RANDOM);

	(void)state;
	model_prefill(model);
	assert_int_equal(fixture->space->part.records[0].redo->state, META_REDO_NONE);
	assert_true(fixture->space->part.records[0].redo->move_count <= fixture->space->part.worker->move_cap);
	assert_int_equal(sizeof(struct meta_move), sizeof(struct kvg_move));
	assert_int_equal(offsetof(struct meta_move, src_place), offsetof(struct kvg_move, src_place));
	assert_int_equal(offsetof(struct meta_move, dst_place), offsetof(struct kvg_move, dst_place));
	assert_int_equal(offsetof(struct meta_move, count), offsetof(struct kvg_move, count));
	model_release(model);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_geometries),
		cmocka_unit_test(test_one_token),
		cmocka_unit_test(test_rows_that_become_empty),
		cmocka_unit_test(test_phases_differ_between_heads),
		cmocka_unit_test(test_truncated_tail),
		cmocka_unit_test(test_redo_record),
	};

	return runner_run("evict_move", tests, sizeof(tests) / sizeof(tests[0]));
}
