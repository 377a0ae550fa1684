/* One promise for a worker, rights of its sequences. */
#include "daemon/sequence/promise.h"

#include <errno.h>
#include <string.h>

#include "tests/support/space_fixture.h"

#define EXTENT (64u << 10) /* 128 blocks: 4 stripes of 4 rows */

static uint64_t create(struct fixture *fixture, uint32_t context)
{
	struct kvg_policy policy = {.context_tokens = context};
	uint64_t handle = 0;

	if (fixture_create(fixture, &policy, &handle) < 0)
		fail_msg("%s", fixture->text);
	return handle;
}

static void check(const struct fixture *fixture, uint64_t extents_promised, uint64_t rights)
{
	const struct space *space = fixture->space;
	uint64_t sum = 0;

	for (uint32_t i = 0; i < fixture->layout.max_sequences; i++)
		sum += space->sequences[i] ? space->sequences[i]->right : 0;
	assert_int_equal(space->rights, sum);
	assert_int_equal(space->rights, rights);
	assert_int_equal(space->part.worker->promised, extents_promised * EXTENT);
	assert_int_equal(fixture_account(fixture)->promised, extents_promised * EXTENT);
}

static void test_rights_shrink_as_blocks_come(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = create(fixture, 1024);

	(void)state;
	check(fixture, 2, 2);
	assert_int_equal(fixture_reserve(fixture, handle, 128), 0);
	check(fixture, 1, 2); /* three quarters of the extent are anybody's */
	assert_int_equal(fixture_reserve(fixture, handle, 512), 0);
	check(fixture, 1, 1);
	assert_int_equal(fixture_reserve(fixture, handle, 1024), 0);
	check(fixture, 0, 0);
	assert_int_equal(fixture_release(fixture, handle), 0);
	check(fixture, 0, 0);
	fixture_free(fixture);
}

/* The first of two fills half an extent, the second the other half: the first must still get its own. */
static void test_shared_extents(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.device_max = 2 * EXTENT});
	uint64_t a = create(fixture, 512), b = create(fixture, 256);

	(void)state;
	check(fixture, 2, 2);
	assert_int_equal(fixture_reserve(fixture, a, 256), 0);
	assert_int_equal(fixture_reserve(fixture, b, 256), 0);
	assert_int_equal(fixture_account(fixture)->charged, EXTENT);
	if (fixture_reserve(fixture, a, 512) < 0)
		fail_msg("%s", fixture->text);
	assert_int_equal(fixture_account(fixture)->charged, 2 * EXTENT);
	check(fixture, 0, 0);
	fixture_free(fixture);
}

/* A sequence that takes more than it was admitted with has no right to what others were promised. */
static void test_no_right_beyond_the_admission(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.device_max = 3 * EXTENT});
	uint64_t greedy = create(fixture, 512), honest = create(fixture, 1024);

	(void)state;
	assert_int_equal(fixture_reserve(fixture, greedy, 512), 0);
	assert_int_equal(fixture_reserve(fixture, greedy, 513), -ENOSPC);
	assert_non_null(strstr(fixture->text, "promised 128.0 KiB, reserve needs 64.0 KiB: 65536 bytes short"));
	assert_int_equal(fixture_reserve(fixture, honest, 1024), 0);
	fixture_free(fixture);
}

/* A sequence that goes takes its right along, and what nobody has a right to is free for others. */
static void test_rights_go_with_their_sequence(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.device_max = 4 * EXTENT});
	uint64_t a = create(fixture, 1024), b = create(fixture, 512);

	(void)state;
	check(fixture, 3, 3);
	assert_int_equal(fixture_release(fixture, a), 0);
	check(fixture, 1, 1);
	a = create(fixture, 1536);
	check(fixture, 4, 4);
	assert_int_equal(fixture_release(fixture, b), 0);
	assert_int_equal(fixture_release(fixture, a), 0);
	check(fixture, 0, 0);
	fixture_free(fixture);
}

static void test_arithmetic(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.device_max = 2 * EXTENT});
	struct space *space = fixture->space;
	char text[QUOTA_TEXT];

	(void)state;
	assert_int_equal(promise_admit(space, 0, "x", text), 0);
	assert_int_equal(space->part.worker->promised, 0);
	assert_int_equal(promise_admit(space, 257, "x", text), -ENOSPC);
	assert_int_equal(promise_admit(space, 256, "x", text), 0);
	assert_int_equal(space->part.worker->promised, 2 * EXTENT);
	promise_settle(space); /* nobody has a right to it */
	check(fixture, 0, 0);
	fixture_free(fixture);
}

/* What a shared extent took out of the promise comes back out of the worker's own refunds. */
static void test_refund_restores_rights(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = create(fixture, 1024);

	(void)state;
	assert_int_equal(promise_available(fixture->space->sequences[(uint32_t)handle], 5 * EXTENT), 2 * EXTENT);
	assert_int_equal(promise_available(fixture->space->sequences[(uint32_t)handle], EXTENT / 2), EXTENT / 2);
	promise_drawn(fixture->space, EXTENT); /* as if for an extent that is shared */
	assert_int_equal(promise_available(fixture->space->sequences[(uint32_t)handle], 5 * EXTENT), EXTENT);
	assert_int_equal(promise_refund(fixture->space, 5 * EXTENT), EXTENT);
	assert_int_equal(promise_refund(fixture->space, 5 * EXTENT), 0);
	check(fixture, 2, 2);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_rights_shrink_as_blocks_come),
		cmocka_unit_test(test_shared_extents),
		cmocka_unit_test(test_no_right_beyond_the_admission),
		cmocka_unit_test(test_rights_go_with_their_sequence),
		cmocka_unit_test(test_arithmetic),
		cmocka_unit_test(test_refund_restores_rights),
	};

	return runner_run("promise", tests, sizeof(tests) / sizeof(tests[0]));
}
