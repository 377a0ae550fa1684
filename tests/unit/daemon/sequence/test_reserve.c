/* create, reserve, commit, truncate, protect, query, free: boundaries, accounts, refusals that change nothing. */
#include "daemon/sequence/admission.h"

#include <errno.h>
#include <string.h>

#include "tests/support/space_model.h"

#define EXTENT (64u << 10) /* 128 blocks: 4 stripes of 4 rows */

static const struct kvg_policy plain = {.context_tokens = 512};

static uint64_t create(struct fixture *fixture, uint32_t context)
{
	struct kvg_policy policy = {.context_tokens = context};
	uint64_t handle = 0;

	if (fixture_create(fixture, &policy, &handle) < 0)
		fail_msg("%s", fixture->text);
	return handle;
}

static void test_create_promises(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.device_max = 4 * EXTENT});
	const struct quota_account *account = fixture_account(fixture);
	struct kvg_policy policy = {.context_tokens = 513};
	uint64_t a, b, c, none = 77;

	(void)state;
	a = create(fixture, 512);
	assert_int_equal(fixture->cqe.value[0], (uint32_t)a);
	assert_int_equal(fixture->cqe.value[1], EXTENT);
	assert_int_equal(account->promised, EXTENT);
	b = create(fixture, 1024);
	assert_int_equal(account->promised, 3 * EXTENT);
	assert_int_equal(fixture_create(fixture, &policy, &none), -ENOSPC);
	assert_string_equal(fixture->text, "tenant test: device budget 256.0 KiB, in use 0 B, promised 192.0 KiB, "
					   "the sequence needs 128.0 KiB: 65536 bytes short");
	assert_int_equal(none, 77);
	assert_int_equal(account->promised, 3 * EXTENT);
	assert_int_equal(fixture->space->sequence_count, 2);
	c = create(fixture, 512);
	assert_int_equal(account->promised, 4 * EXTENT);
	assert_int_equal(fixture_release(fixture, a), 0);
	assert_int_equal(fixture_release(fixture, b), 0);
	assert_int_equal(account->promised, EXTENT);
	assert_int_equal(fixture_release(fixture, c), 0);
	fixture_free(fixture);
}

/* The tenant has sequences elsewhere, too. */
static void test_sequences_of_the_tenant(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	const struct kvg_policy policy = {.context_tokens = 1};
	uint64_t handle, none;

	(void)state;
	fixture->tenant->limits.sequences = 2;
	fixture->tenant->sequences++;
	assert_int_equal(fixture_create(fixture, &policy, &handle), 0);
	assert_int_equal(fixture_create(fixture, &policy, &none), -EUSERS);
	assert_int_equal(fixture_account(fixture)->refusals, 0);
	fixture->tenant->sequences--;
	assert_int_equal(fixture_create(fixture, &policy, &none), 0);
	fixture_free(fixture);
}

static void test_all_slots(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.max_sequences = 3});
	uint64_t handles[3], again, stale;

	(void)state;
	for (unsigned i = 0; i < 3; i++)
		handles[i] = create(fixture, 1);
	assert_int_equal(fixture_create(fixture, &plain, &again), -EUSERS);
	assert_string_equal(fixture->text, "create: all 3 sequences of the layout are in use");
	stale = handles[1];
	assert_int_equal(fixture_release(fixture, stale), 0);
	again = create(fixture, 1);
	assert_int_equal((uint32_t)again, (uint32_t)stale); /* the slot, not the handle */
	assert_true(again >> 32 != stale >> 32);
	assert_int_equal(fixture_query(fixture, stale), -ENOENT);
	assert_int_equal(fixture_release(fixture, stale), -ENOENT);
	assert_int_equal(fixture_query(fixture, again), 0);
	assert_int_equal(fixture_query(fixture, (uint64_t)1 << 32 | 3), -ENOENT);
	assert_int_equal(fixture_query(fixture, UINT64_MAX), -ENOENT);
	fixture_free(fixture);
}

static void no_pressure(void *user, struct tenant *tenant, bool on)
{
	(void)user, (void)tenant, (void)on;
}

/* A refusal that was waited out leaves nothing in the answer. */
static void test_reserve_waits_for_memory_on_its_way(void **state)
{
	static const struct reclaim_ops ops = {.pressure = no_pressure};
	struct fixture *fixture = fixture_new(&(struct fixture_options){.device_max = 4 * EXTENT});
	struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .reserve.tokens = 1024};
	const struct quota_account *account = fixture_account(fixture);
	struct tenant *tenants[] = {fixture->tenant};
	const size_t tenant_count = 1;
	struct reclaim reclaim;
	const struct call *call;
	uint64_t gone = create(fixture, 1536);

	(void)state;
	assert_int_equal(
		reclaim_init(&reclaim, fixture->loop, fixture->pool, tenants, &tenant_count, UINT32_MAX, &ops, NULL),
		0);
	fixture->tenant->reclaim = &reclaim;
	assert_int_equal(fixture_reserve(fixture, gone, 1536), 0);
	sqe.seq = create(fixture, 512);
	assert_int_equal(fixture_reserve(fixture, sqe.seq, 512), 0);
	fixture->hold_unmapped = true;
	assert_int_equal(fixture_release(fixture, gone), 0);
	assert_int_equal(account->unreturned, 3 * EXTENT);
	call = fixture_start(fixture, &sqe);
	fixture_turn(fixture);
	assert_false(call->done);
	fixture->hold_unmapped = false;
	fixture_acknowledge(fixture);
	fixture_wait(fixture, call);
	assert_int_equal(call->request.cqe.status, 0);
	assert_string_equal(call->request.text, "");
	assert_int_equal(call->request.cqe.value[0], 1024);
	assert_int_equal(account->unreturned, 0);
	fixture->tenant->reclaim = NULL;
	reclaim_deinit(&reclaim);
	fixture_free(fixture);
}

static void test_reserve_in_stripes(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = create(fixture, 1024);
	const struct quota_account *account = fixture_account(fixture);

	(void)state;
	assert_int_equal(fixture_reserve(fixture, handle, 0), 0);
	assert_int_equal(fixture->cqe.value[0], 0);
	assert_int_equal(account->charged, 0);
	assert_int_equal(fixture_reserve(fixture, handle, 1), 0);
	assert_int_equal(fixture->cqe.value[0], 128);
	assert_int_equal(account->charged, EXTENT);
	assert_int_equal(account->promised, EXTENT);
	assert_int_equal(fixture_reserve(fixture, handle, 128), 0);
	assert_int_equal(fixture->cqe.value[0], 128);
	assert_int_equal(fixture_commit(fixture, handle, 128), 0);
	assert_int_equal(fixture_reserve(fixture, handle, 1), 0);
	assert_int_equal(fixture->cqe.value[0], 256);
	assert_int_equal(fixture_reserve(fixture, handle, 1024 - 128), 0);
	assert_int_equal(fixture->cqe.value[0], 1024);
	assert_int_equal(account->charged, 2 * EXTENT);
	assert_int_equal(account->promised, 0);
	assert_int_equal(fixture_query(fixture, handle), 0);
	assert_int_equal(fixture->cqe.value[0], 128 * 4);
	assert_int_equal(fixture->cqe.value[1], 256);
	assert_int_equal(fixture->cqe.value[2], 128);
	assert_int_equal(fixture->cqe.value[3], 1024);
	assert_int_equal(fixture_release(fixture, handle), 0);
	assert_int_equal(account->charged, 0);
	fixture_free(fixture);
}

/* The last extent is granted, the next refused with who, budget, use, need; nothing of it has changed. */
static void test_reserve_to_the_budget(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.device_max = 2 * EXTENT});
	uint64_t handle = create(fixture, 0);

	(void)state;
	assert_int_equal(fixture_reserve(fixture, handle, 1024), 0);
	assert_int_equal(fixture_account(fixture)->charged, 2 * EXTENT);
	assert_int_equal(fixture_reserve(fixture, handle, 1025), -ENOSPC);
	assert_string_equal(fixture->text, "tenant test: device budget 128.0 KiB, in use 128.0 KiB, promised 0 B, "
					   "reserve needs 64.0 KiB: 65536 bytes short");
	assert_int_equal(fixture_query(fixture, handle), 0);
	assert_int_equal(fixture->cqe.value[3], 1024);
	assert_int_equal(fixture_commit(fixture, handle, 1024), 0);
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

static void test_max_tokens(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.max_tokens = 1000});
	uint64_t handle = create(fixture, 1000);

	(void)state;
	assert_int_equal(fixture_reserve(fixture, handle, 1001), -E2BIG);
	assert_non_null(strstr(fixture->text, "reserve to 1001 tokens, the layout's max_tokens is 1000"));
	assert_int_equal(fixture_reserve(fixture, handle, UINT32_MAX), -E2BIG);
	assert_int_equal(fixture_reserve(fixture, handle, 1000), 0);
	assert_int_equal(fixture->cqe.value[0], 1000); /* not 1024 */
	assert_int_equal(fixture_commit(fixture, handle, 1001), -EINVAL);
	assert_int_equal(fixture_commit(fixture, handle, 1000), 0);
	assert_int_equal(fixture_reserve(fixture, handle, 1), -E2BIG);
	assert_int_equal(fixture_reserve(fixture, handle, UINT32_MAX), -E2BIG); /* must not wrap */
	assert_int_equal(fixture_reserve(fixture, handle, 0), 0);
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

static void test_commit_and_truncate(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = create(fixture, 512);

	(void)state;
	assert_int_equal(fixture_commit(fixture, handle, 1), -EINVAL);
	assert_non_null(strstr(fixture->text, "commit to 1, committed are 0, reserved 0"));
	assert_int_equal(fixture_reserve(fixture, handle, 10), 0);
	assert_int_equal(fixture_commit(fixture, handle, 128), 0);
	assert_int_equal(fixture_commit(fixture, handle, 127), -EINVAL);
	assert_int_equal(fixture_commit(fixture, handle, 129), -EINVAL);
	assert_int_equal(fixture_truncate(fixture, handle, 129), -EINVAL);
	assert_int_equal(fixture_truncate(fixture, handle, 128), 0);
	assert_int_equal(fixture_truncate(fixture, handle, 5), 0);
	assert_int_equal(fixture_truncate(fixture, handle, 6), -EINVAL);
	assert_non_null(strstr(fixture->text, "truncate to 6, possible are 0 to 5"));
	assert_int_equal(fixture->space->table.slots[(uint32_t)handle].committed_pos, 5);
	assert_int_equal(fixture->space->table.slots[(uint32_t)handle].reserved_pos, 128);
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

/* After an eviction: no truncation behind it, entries of the old generation are stale. */
static void test_after_an_eviction(void **state)
{
	static const uint8_t versioned[] = {KVG_OP_COMMIT, KVG_OP_STAGE, KVG_OP_EVICT, KVG_OP_TRUNCATE};
	struct kvg_policy policy = {
		.mode = KVG_MODE_CHUNKED, .ratio = 0.5, .context_tokens = 300, .max_new_tokens = 99};
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = model_new(fixture, &policy, SCORES_RANDOM);

	(void)state;
	model_prefill(model);
	assert_int_equal(fixture_generation(fixture, model->handle), 1);
	assert_int_equal(fixture_truncate(fixture, model->handle, 299), -EINVAL);
	assert_int_equal(model_append(model, 20), 0);
	model_truncate(model, 300);
	model_check(model);
	for (unsigned i = 0; i < 4; i++) {
		struct kvg_sqe sqe = {.op = versioned[i], .seq = model->handle, .generation = 0};

		assert_int_equal(fixture_call(fixture, &sqe), -ESTALE);
		assert_non_null(strstr(fixture->text, "generation 0, it is at 1"));
		assert_int_equal(fixture->cqe.generation, 1);
	}
	model_release(model);
	fixture_free(fixture);
}

/* Room that the last held block has is used before new stripes are taken. */
static void test_slack_is_room(void **state)
{
	struct kvg_policy policy = {.mode = KVG_MODE_CHUNKED,
		.level = KVG_LEVEL_PAIR_HEAD,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.ratio = 0.5,
		.context_tokens = 132, /* 66 stay of each row: 14 places of the fifth block are free */
		.max_new_tokens = 200};
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = model_new(fixture, &policy, SCORES_RANDOM);
	uint64_t blocks;

	(void)state;
	model_prefill(model);
	assert_int_equal(model_pairs(model), 4 * 66);
	blocks = fixture->cqe.value[2] / (2 * fixture->space->arena->stride);
	assert_int_equal(blocks, 4 * 5);
	assert_int_equal(model_append(model, 14), 0);
	assert_int_equal(fixture_query(fixture, model->handle), 0);
	assert_int_equal(fixture->cqe.value[1], blocks);
	assert_int_equal(model_append(model, 1), 0);
	assert_int_equal(fixture_query(fixture, model->handle), 0);
	assert_int_equal(fixture->cqe.value[1], blocks + 32);
	model_check(model);
	model_release(model);
	fixture_free(fixture);
}

static void test_protect(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = create(fixture, 100);
	struct kvg_sqe sqe = {.op = KVG_OP_PROTECT, .seq = handle, .protect = {.begin = 5, .end = 5}};

	(void)state;
	assert_int_equal(fixture_call(fixture, &sqe), -EINVAL);
	sqe.protect.end = 4;
	assert_int_equal(fixture_call(fixture, &sqe), -EINVAL);
	sqe.protect.end = UINT32_MAX;
	for (unsigned i = 0; i < KVG_MAX_PROTECTED; i++)
		assert_int_equal(fixture_call(fixture, &sqe), 0);
	assert_int_equal(fixture_call(fixture, &sqe), -EINVAL);
	assert_non_null(strstr(fixture->text, "ranges in use 8 of 8"));
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

static void test_bad_policy(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct kvg_policy policy = {.mode = KVG_MODE_CHUNKED, .ratio = 2.0, .context_tokens = 100};
	uint64_t handle;

	(void)state;
	assert_int_equal(fixture_create(fixture, &policy, &handle), -EINVAL);
	assert_string_equal(fixture->text, "policy: ratio 2, must be above 0 and at most 1");
	assert_int_equal(fixture->space->sequence_count, 0);
	assert_int_equal(fixture_account(fixture)->promised, 0);
	fixture_free(fixture);
}

/* A sequence that is freed leaves nothing for the next one in its slot. */
static void test_slot_starts_clean(void **state)
{
	struct kvg_policy policy = {
		.mode = KVG_MODE_CHUNKED, .ratio = 0.3, .context_tokens = 700, .max_new_tokens = 50};
	struct fixture *fixture = fixture_new(&(struct fixture_options){.max_sequences = 1});

	(void)state;
	for (unsigned i = 0; i < 3; i++) {
		struct model *model = model_new(fixture, &policy, SCORES_RANDOM);

		model_prefill(model);
		assert_int_equal(model_append(model, 50), 0);
		model_check(model);
		model_release(model);
		assert_int_equal(fixture_account(fixture)->charged, 0);
		assert_int_equal(fixture_account(fixture)->promised, 0);
	}
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_create_promises),
		cmocka_unit_test(test_all_slots),
		cmocka_unit_test(test_sequences_of_the_tenant),
		cmocka_unit_test(test_reserve_waits_for_memory_on_its_way),
		cmocka_unit_test(test_reserve_in_stripes),
		cmocka_unit_test(test_reserve_to_the_budget),
		cmocka_unit_test(test_max_tokens),
		cmocka_unit_test(test_commit_and_truncate),
		cmocka_unit_test(test_after_an_eviction),
		cmocka_unit_test(test_slack_is_room),
		cmocka_unit_test(test_protect),
		cmocka_unit_test(test_bad_policy),
		cmocka_unit_test(test_slot_starts_clean),
	};

	return runner_run("reserve", tests, sizeof(tests) / sizeof(tests[0]));
}
