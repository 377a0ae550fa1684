/* An eviction as a whole: its room, its queue, what it reports and what it gives back. */
#include "daemon/sequence/evict.h"

#include <errno.h>
#include <string.h>

#include "daemon/sequence/admission.h"
#include "daemon/sequence/compute.h"
#include "tests/support/space_model.h"

static const struct kvg_policy base = {.ratio = 0.3,
	.mode = KVG_MODE_CHUNKED,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE,
	.prefix_tokens = 1,
	.context_tokens = 1535,
	.window = 59,
	.max_new_tokens = 200};

static uint64_t round_up(uint64_t blocks, const struct arena *arena)
{
	return (blocks + arena->blocks_per_extent - 1) / arena->blocks_per_extent * arena->extent_size;
}

/*
 * Full + two stripes, to the byte of an extent, from extents of half a stripe to extents of 32 of them. Large ones
 * have no room for a held extent beside the nursery ones, so blocks come from extents that are draining.
 */
static void evict_in_two_stripes(size_t extent_size, unsigned level, enum score_pattern pattern)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = extent_size});
	struct kvg_policy policy = base;
	uint32_t stripe = 8 * fixture->space->rows;
	uint64_t full = round_up(12 * stripe, fixture->space->arena);
	struct model *model;

	policy.level = (uint8_t)level;
	policy.max_new_tokens = 0;
	fixture->tenant->quota.account->max = round_up((12 + 2) * stripe, fixture->space->arena);
	model = model_new(fixture, &policy, pattern);
	assert_int_equal(model_append(model, 1536), 0);
	assert_int_equal(fixture_account(fixture)->charged, full);
	model_evict(model, KVG_EVICT_PREFILL);
	assert_true(fixture_account(fixture)->high_water <= fixture_account(fixture)->max);
	model_release(model);
	fixture_free(fixture);
}

static void test_in_two_spare_stripes(void **state)
{
	static const size_t sizes[] = {8 << 10, 16 << 10, 64 << 10, 256 << 10, 512 << 10};

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		for (unsigned level = 0; level <= KVG_LEVEL_ADAKV_LAYER; level++)
			for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++)
				evict_in_two_stripes(sizes[i], level, (enum score_pattern)pattern);
}

/* One extent larger than everything: full and spare lie in it, and there is never another. */
static void test_everything_in_one_extent(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = 1 << 20, .device_max = 1 << 20});
	struct model *model = model_new(fixture, &base, SCORES_RANDOM);

	(void)state;
	model_prefill(model);
	assert_int_equal(fixture_account(fixture)->charged, 1 << 20);
	assert_int_equal(model_append(model, 150), 0);
	model_check(model);
	model_release(model);
	fixture_free(fixture);
}

/* No room at all: the eviction is refused with the account's words, and nothing has changed. */
static void test_refused_without_room(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = 16 << 10});
	struct kvg_policy policy = base;
	struct model *model;

	(void)state;
	policy.prefix_tokens = 0;
	policy.context_tokens = 1536;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	assert_int_equal(model_append(model, 1536), 0);
	fixture->tenant->quota.account->max = fixture_account(fixture)->charged;
	assert_int_equal(fixture_evict(fixture, model->handle, KVG_EVICT_PREFILL), -ENOSPC);
	assert_non_null(strstr(fixture->text, "the eviction needs"));
	model_check(model);
	assert_int_equal(fixture_generation(fixture, model->handle), 0);
	assert_int_equal(model_pairs(model), 1536 * 4);
	fixture->tenant->quota.account->max = 1 << 30;
	model_evict(model, KVG_EVICT_PREFILL);
	model_release(model);
	fixture_free(fixture);
}

/* Memory really comes back: at most 1.25 x R x full + 4 extents. */
static void check_physical(double ratio, enum score_pattern pattern)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.max_tokens = 8192, .extent_size = 16 << 10});
	struct kvg_policy policy = base;
	uint64_t full;
	struct model *model;

	policy.prefix_tokens = 0;
	policy.context_tokens = 8192;
	policy.max_new_tokens = 0;
	policy.ratio = ratio;
	model = model_new(fixture, &policy, pattern);
	assert_int_equal(model_append(model, 8192), 0);
	full = fixture_account(fixture)->charged;
	model_evict(model, KVG_EVICT_PREFILL);
	assert_true((double)fixture_account(fixture)->charged <= 1.25 * ratio * (double)full + 4 * (16 << 10));
	assert_int_equal(fixture_account(fixture)->unreturned, 0);
	model_release(model);
	fixture_free(fixture);
}

static void test_memory_comes_back(void **state)
{
	(void)state;
	check_physical(0.3, SCORES_RANDOM);
	check_physical(0.1, SCORES_RANDOM);
	check_physical(0.3, SCORES_ONE_ROW);
	check_physical(0.1, SCORES_ASCENDING);
	check_physical(0.1, SCORES_DESCENDING);
}

/* Extents that decoding empties are those that it fills next: they neither go nor come, and the account holds still. */
static void test_decoding_keeps_its_extents(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = 16 << 10});
	const struct quota_account *account = fixture_account(fixture);
	struct kvg_policy policy = base;
	struct model *model;
	uint64_t committed, kept;
	uint32_t events;

	(void)state;
	policy.budget = 400;
	policy.max_new_tokens = 2000;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	model_prefill(model);
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(model_append(model, 128), 0);
		model_evict(model, KVG_EVICT_DECODE);
	}
	events = fixture->events;
	kept = fixture->space->blocks.spare_count;
	committed = account->charged + account->promised;
	assert_true(kept > 0);
	for (unsigned i = 0; i < 5; i++) {
		assert_int_equal(model_append(model, 128), 0);
		model_evict(model, KVG_EVICT_DECODE);
		assert_true(account->charged + account->promised <= committed);
	}
	assert_int_equal(fixture->events, events);
	model_release(model);
	assert_int_equal(account->charged, 0);
	assert_int_equal(fixture->mapped_count, 0);
	fixture_free(fixture);
}

/* After the eviction the promise is what is still needed, and the rest is others' to take. */
static void test_promise_shrinks(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = 16 << 10});
	const struct quota_account *account = fixture_account(fixture);
	struct model *model = model_new(fixture, &base, SCORES_RANDOM);
	const struct meta_seq *meta = &fixture->space->part.seqs[(uint32_t)model->handle];
	uint64_t first = account->promised;

	(void)state;
	assert_int_equal(first, round_up(admission_blocks(&base, 4, 0, 0), fixture->space->arena));
	model_prefill(model);
	assert_int_equal(meta->admitted, admission_blocks(&base, 4, 1536, meta->pairs));
	assert_true(account->charged + account->promised < first);
	assert_true(account->promised <= round_up(meta->admitted - meta->blocks, fixture->space->arena));
	assert_int_equal(model_append(model, 200), 0);
	model_release(model);
	assert_int_equal(account->promised, 0);
	fixture_free(fixture);
}

/* Evictions of a space run one at a time, in order; other operations of other sequences go on. */
static void test_evictions_queue(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *models[4];
	struct call *calls[4], *query;
	struct kvg_sqe sqe = {.op = KVG_OP_EVICT};

	(void)state;
	fixture->hold_unmapped = true;
	for (unsigned i = 0; i < 4; i++) {
		models[i] = model_new(fixture, &base, (enum score_pattern)i);
		assert_int_equal(model_append(models[i], 1536), 0);
	}
	for (unsigned i = 0; i < 4; i++) {
		sqe.seq = models[i]->handle;
		calls[i] = fixture_start(fixture, &sqe);
	}
	sqe = (struct kvg_sqe){.op = KVG_OP_QUERY, .seq = models[0]->handle}; /* waits for its own eviction only */
	query = fixture_start(fixture, &sqe);
	fixture_wait(fixture, calls[3]);
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(calls[i]->request.cqe.status, 0);
		assert_true(i == 0 || calls[i]->order > calls[i - 1]->order);
		assert_int_equal(calls[i]->request.cqe.value[1], model_predict(models[i], KVG_EVICT_PREFILL));
		model_check(models[i]);
	}
	assert_true(query->done && query->order < calls[1]->order);
	fixture_acknowledge(fixture);
	for (unsigned i = 0; i < 4; i++)
		model_release(models[i]);
	fixture_free(fixture);
}

#define TOGETHER 6u

/* Evictions of all models, submitted at once, each with a reserve behind it. Returns how many ran at a time. */
static unsigned evict_together(struct fixture *fixture, struct model **models, uint32_t mode, uint32_t tokens)
{
	struct call *evicts[TOGETHER], *reserves[TOGETHER];
	unsigned most = 0;

	for (unsigned i = 0; i < TOGETHER; i++) {
		struct kvg_sqe sqe = {.op = KVG_OP_EVICT, .seq = models[i]->handle, .evict.mode = (uint8_t)mode};

		sqe.generation = fixture_generation(fixture, sqe.seq);
		evicts[i] = fixture_start(fixture, &sqe);
		sqe = (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = models[i]->handle, .reserve.tokens = tokens};
		reserves[i] = fixture_start(fixture, &sqe);
		most = fixture->space->evicting > most ? fixture->space->evicting : most;
	}
	for (unsigned i = 0; i < TOGETHER; i++) {
		fixture_wait(fixture, reserves[i]);
		assert_int_equal(evicts[i]->request.cqe.status, 0);
		assert_int_equal(reserves[i]->request.cqe.status, 0);
		assert_int_equal(evicts[i]->request.cqe.value[1], model_predict(models[i], mode));
	}
	assert_int_equal(fixture->space->evicting, 0);
	assert_int_equal(fixture->space->evict_reserve, 0);
	assert_int_equal(fixture->space->evict_slots, 0);
	for (unsigned i = 0; i < TOGETHER; i++)
		model_check(models[i]);
	fixture_acknowledge(fixture);
	return most;
}

/* Prompts, then decoding, of several sequences whose evictions run at a time; in a budget of what they were admitted.
 */
static unsigned run_together(size_t extent_size, unsigned evictions, bool tight)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = extent_size});
	struct compute_ops ops = *fixture->space->compute;
	struct kvg_policy policy = base;
	struct model *models[TOGETHER];
	unsigned most = 0;

	ops.evictions = evictions;
	fixture->space->compute = &ops;
	policy.budget = 300;
	policy.max_new_tokens = 1000;
	for (unsigned i = 0; i < TOGETHER; i++) {
		models[i] = model_new(fixture, &policy, (enum score_pattern)(i % SCORES_PATTERNS));
		assert_int_equal(model_append(models[i], 1536), 0);
	}
	if (tight)
		fixture->tenant->quota.account->max =
			fixture_account(fixture)->charged + fixture_account(fixture)->promised;
	(void)evict_together(fixture, models, KVG_EVICT_PREFILL, 128);
	for (unsigned round = 0; round < 4; round++) {
		unsigned count;

		for (unsigned i = 0; i < TOGETHER; i++)
			assert_int_equal(model_append(models[i], 100 + 7 * i), 0);
		count = evict_together(fixture, models, KVG_EVICT_DECODE, 128);
		most = count > most ? count : most;
		assert_true(count <= evictions);
		if (tight)
			assert_true(fixture_account(fixture)->charged + fixture_account(fixture)->promised <=
				    fixture_account(fixture)->max);
	}
	for (unsigned i = 0; i < TOGETHER; i++)
		model_release(models[i]);
	fixture_free(fixture);
	return most;
}

static void test_evictions_at_a_time(void **state)
{
	static const size_t sizes[] = {16 << 10, 64 << 10, 256 << 10};

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		assert_int_equal(run_together(sizes[i], 1, true), 1);
		(void)run_together(sizes[i], META_RECORDS, true);
		assert_true(run_together(sizes[i], META_RECORDS, false) > 1);
	}
}

static void no_pressure(void *user, struct tenant *tenant, bool on)
{
	(void)user;
	(void)tenant;
	(void)on;
}

/*
 * A reserve of another sequence in the midst of an eviction leaves the eviction its room, and the eviction leaves it
 * what it was promised: it does not wait for what the eviction empties.
 */
static void reserve_amid_eviction(size_t extent_size, uint32_t tokens)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = extent_size});
	struct kvg_policy other = {.context_tokens = tokens};
	struct model *model = model_new(fixture, &base, SCORES_RANDOM);
	struct kvg_sqe sqe = {.op = KVG_OP_EVICT, .seq = model->handle};
	static const struct reclaim_ops ops = {.pressure = no_pressure};
	struct tenant *tenants[] = {fixture->tenant};
	size_t tenant_count = 1;
	struct reclaim reclaim;
	struct call *evict, *reserve;
	uint64_t handle;

	assert_int_equal(
		reclaim_init(&reclaim, fixture->loop, fixture->pool, tenants, &tenant_count, UINT32_MAX, &ops, NULL),
		0);
	fixture->tenant->reclaim = &reclaim;
	assert_int_equal(model_append(model, 1536), 0);
	assert_int_equal(fixture_create(fixture, &other, &handle), 0);
	fixture->tenant->quota.account->max = fixture_account(fixture)->charged + fixture_account(fixture)->promised;
	evict = fixture_start(fixture, &sqe);
	sqe = (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = handle, .reserve.tokens = tokens};
	reserve = fixture_start(fixture, &sqe);
	fixture_wait(fixture, evict);
	fixture_acknowledge(fixture); /* as the library does while it waits */
	fixture_wait(fixture, reserve);
	assert_int_equal(evict->request.cqe.status, 0);
	if (reserve->request.cqe.status < 0)
		fail_msg("%zu, %u: %s", extent_size, tokens, reserve->request.text);
	if (reserve->request.wait.since_ns)
		fail_msg("%zu, %u: waited for what it was promised", extent_size, tokens);
	(void)model_predict(model, KVG_EVICT_PREFILL);
	model_check(model);
	fixture_acknowledge(fixture);
	assert_int_equal(fixture_release(fixture, handle), 0);
	model_release(model);
	fixture->tenant->reclaim = NULL;
	reclaim_deinit(&reclaim);
	fixture_free(fixture);
}

static void test_reserve_amid_an_eviction(void **state)
{
	static const size_t sizes[] = {16 << 10, 64 << 10, 256 << 10, 1 << 20};

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		for (uint32_t tokens = 128; tokens <= 2048; tokens *= 4)
			reserve_amid_eviction(sizes[i], tokens);
	/* What the reserve creates may come before the eviction chooses its steps. */
	for (unsigned i = 0; i < 8; i++)
		reserve_amid_eviction(sizes[0], 2048);
}

static void test_bad_modes(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = model_new(fixture, &base, SCORES_RANDOM);

	(void)state;
	assert_int_equal(fixture_evict(fixture, model->handle, 2), -EINVAL);
	assert_int_equal(fixture_evict(fixture, model->handle, KVG_EVICT_DECODE), -EINVAL);
	assert_non_null(strstr(fixture->text, "eviction mode 1, decode budget 0 tokens"));
	assert_int_equal(fixture_evict(fixture, model->handle, KVG_EVICT_PREFILL), 0); /* nothing to do */
	assert_int_equal(fixture->cqe.value[0], 0);
	model_release(model);
	fixture_free(fixture);
}

/* value: pairs held, pairs dropped, bytes, committed and reserved position. */
static void test_report(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = model_new(fixture, &base, SCORES_RANDOM);

	(void)state;
	model_prefill(model);
	assert_int_equal(fixture->cqe.value[0] + fixture->cqe.value[1], 1536 * 4);
	assert_int_equal(fixture->cqe.value[2], fixture->space->blocks.used_blocks * 2 * fixture->space->arena->stride);
	assert_int_equal(fixture->cqe.value[3] >> 32, 1536);
	assert_in_range((uint32_t)fixture->cqe.value[3], 1536, 1536 + 15);
	assert_int_equal(fixture->cqe.generation, 1);
	model_evict(model, KVG_EVICT_PREFILL); /* again: nothing goes */
	assert_int_equal(fixture->cqe.value[1], 0);
	assert_int_equal(fixture->cqe.generation, 1);
	model_release(model);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_in_two_spare_stripes),
		cmocka_unit_test(test_everything_in_one_extent),
		cmocka_unit_test(test_refused_without_room),
		cmocka_unit_test(test_memory_comes_back),
		cmocka_unit_test(test_decoding_keeps_its_extents),
		cmocka_unit_test(test_promise_shrinks),
		cmocka_unit_test(test_evictions_queue),
		cmocka_unit_test(test_evictions_at_a_time),
		cmocka_unit_test(test_reserve_amid_an_eviction),
		cmocka_unit_test(test_bad_modes),
		cmocka_unit_test(test_report),
	};

	return runner_run("evict", tests, sizeof(tests) / sizeof(tests[0]));
}
