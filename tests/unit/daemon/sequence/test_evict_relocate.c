/* Whole extents are emptied where others have room, and the pairs in them come along. */
#include "daemon/sequence/evict.h"

#include <string.h>

#include "tests/support/space_model.h"

#define EXTENT (16u << 10) /* 32 blocks: one stripe of 4 rows */

static struct kvg_policy policy_of(uint32_t context, uint32_t chunk)
{
	return (struct kvg_policy){.ratio = 0.5,
		.mode = KVG_MODE_CHUNKED,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.context_tokens = context,
		.chunk_tokens = chunk,
		.window = 20,
		.budget = 130,
		.max_new_tokens = 600};
}

static uint32_t extents_needed(const struct fixture *fixture)
{
	uint32_t each = fixture->space->arena->blocks_per_extent;

	return (uint32_t)((fixture->space->blocks.used_blocks + each - 1) / each);
}

/* A tight budget after a generous ratio leaves holes everywhere: after each event few extents are more than needed. */
static void test_sparse_extents_go_back(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = EXTENT});
	struct kvg_policy policy = policy_of(2000, 500);
	struct model *model = model_new(fixture, &policy, SCORES_RANDOM);

	(void)state;
	model_prefill(model);
	assert_true(fixture->space->blocks.extent_count <= extents_needed(fixture) + 1);
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(model_append(model, 100), 0);
		model_evict(model, KVG_EVICT_DECODE);
		assert_true(fixture->space->blocks.extent_count <= extents_needed(fixture) + 1);
		assert_int_equal(fixture->space->blocks.closed.extents, 0);
	}
	model_release(model);
	fixture_free(fixture);
}

/* Extents in which another sequence has blocks stay: its pairs are not ours to move. */
static void test_extents_of_others_stay(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = 4 * EXTENT});
	struct kvg_policy policy = policy_of(600, 200);
	struct model *models[3];

	(void)state;
	for (unsigned i = 0; i < 3; i++)
		models[i] = model_new(fixture, &policy, (enum score_pattern)i);
	for (unsigned turn = 0; turn < 3; turn++) {
		for (unsigned i = 0; i < 3; i++) {
			assert_int_equal(model_append(models[i], 200), 0);
			model_evict(models[i], KVG_EVICT_PREFILL);
			for (unsigned j = 0; j < 3; j++)
				model_check(models[j]);
		}
	}
	for (unsigned i = 0; i < 3; i++) {
		model_evict(models[i], KVG_EVICT_DECODE);
		for (unsigned j = 0; j < 3; j++)
			model_check(models[j]);
	}
	for (unsigned i = 0; i < 3; i++)
		model_release(models[i]);
	assert_int_equal(fixture->space->blocks.used_blocks, 0);
	assert_int_equal(fixture->space->blocks.extent_count, 0);
	fixture_free(fixture);
}

/* Sequences of all lengths that come, evict and go; whatever stays is packed. */
static void test_churn(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = EXTENT});
	struct random random = {.state = 31};
	struct model *models[6] = {NULL};

	(void)state;
	for (unsigned i = 0; i < 120; i++) {
		unsigned at = random_below(&random, 6);
		struct kvg_policy policy =
			policy_of(200 + random_below(&random, 1000), 100 + random_below(&random, 300));

		if (!models[at]) {
			models[at] = model_new(fixture, &policy, (enum score_pattern)random_below(&random, 7));
			model_prefill(models[at]);
		} else if (models[at]->committed + 60 > models[at]->policy.context_tokens + 600) {
			model_release(models[at]);
			models[at] = NULL;
		} else {
			assert_int_equal(model_append(models[at], 60), 0);
			model_evict(models[at], KVG_EVICT_DECODE);
		}
	}
	for (unsigned i = 0; i < 6; i++) {
		if (!models[i])
			continue;
		model_check(models[i]);
		model_release(models[i]);
	}
	assert_int_equal(fixture_account(fixture)->charged, 0);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_sparse_extents_go_back),
		cmocka_unit_test(test_extents_of_others_stay),
		cmocka_unit_test(test_churn),
	};

	return runner_run("evict_relocate", tests, sizeof(tests) / sizeof(tests[0]));
}
