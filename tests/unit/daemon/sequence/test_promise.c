/* What admitted sequences may still draw: rights of each, one promise for all. */
#include "daemon/sequence/promise.h"

#include <errno.h>
#include <stdlib.h>

#include "tests/support/space_fixture.h"

#define EXTENT (64u << 10) /* 4 stripes of the fixture's geometry, 512 tokens */

static struct fixture *fixture_of(unsigned extents)
{
	return fixture_new(&(struct fixture_options){.device_max = (uint64_t)extents * EXTENT});
}

static uint64_t admit(struct fixture *fixture, uint32_t tokens)
{
	struct kvg_policy policy = {.context_tokens = tokens};
	uint64_t handle = 0;

	if (fixture_create(fixture, &policy, &handle) < 0)
		fail_msg("%s", fixture->text);
	return handle;
}

static void expect(const struct fixture *fixture, unsigned charged, unsigned promised)
{
	assert_int_equal(fixture_account(fixture)->charged, (uint64_t)charged * EXTENT);
	assert_int_equal(fixture_account(fixture)->promised, (uint64_t)promised * EXTENT);
	assert_int_equal(fixture->space->part.worker->promised, (uint64_t)promised * EXTENT);
}

static void test_drawing(void **state)
{
	struct fixture *fixture = fixture_of(2);
	uint64_t handle = admit(fixture, 1024);

	(void)state;
	expect(fixture, 0, 2);
	assert_int_equal(fixture_reserve(fixture, handle, 1), 0);
	expect(fixture, 1, 1);
	assert_int_equal(fixture_reserve(fixture, handle, 512), 0);
	expect(fixture, 1, 1);
	assert_int_equal(fixture_reserve(fixture, handle, 1024), 0);
	expect(fixture, 2, 0);
	assert_int_equal(fixture_release(fixture, handle), 0);
	expect(fixture, 0, 0);
	fixture_free(fixture);
}

/* A sequence that wants more than it was admitted with does not get what another was promised. */
static void test_nobody_takes_anothers(void **state)
{
	struct fixture *fixture = fixture_of(3);
	uint64_t modest = admit(fixture, 512), large = admit(fixture, 1024);

	(void)state;
	expect(fixture, 0, 3);
	assert_int_equal(fixture_reserve(fixture, modest, 1024), -ENOSPC);
	expect(fixture, 0, 3);
	assert_int_equal(fixture_reserve(fixture, large, 1024), 0);
	assert_int_equal(fixture_reserve(fixture, modest, 512), 0);
	expect(fixture, 3, 0);
	assert_int_equal(fixture_reserve(fixture, modest, 513), -ENOSPC);
	fixture_free(fixture);
}

/* Beyond its need a sequence gets what nobody was promised. */
static void test_the_unpromised_is_everybodys(void **state)
{
	struct fixture *fixture = fixture_of(4);
	uint64_t modest = admit(fixture, 512), large = admit(fixture, 1024);

	(void)state;
	assert_int_equal(fixture_reserve(fixture, modest, 1024), 0);
	expect(fixture, 2, 2);
	assert_int_equal(fixture_reserve(fixture, modest, 1025), -ENOSPC);
	assert_int_equal(fixture_reserve(fixture, large, 1024), 0);
	expect(fixture, 4, 0);
	fixture_free(fixture);
}

/* Sequences that share extents, in turns, in a budget of exactly their promises: each gets its need. */
static void test_turns(void **state)
{
	struct fixture *fixture = fixture_of(6);
	uint64_t handles[3];

	(void)state;
	for (unsigned i = 0; i < 3; i++)
		handles[i] = admit(fixture, 640); /* 1.25 extents, 2 promised */
	expect(fixture, 0, 6);
	for (uint32_t tokens = 128; tokens <= 640; tokens += 128)
		for (unsigned i = 0; i < 3; i++)
			assert_int_equal(fixture_reserve(fixture, handles[i], tokens), 0);
	assert_int_equal(fixture_account(fixture)->promised, 0);
	assert_true(fixture_account(fixture)->charged <= (uint64_t)6 * EXTENT);
	fixture_free(fixture);
}

static void feed(struct fixture *fixture, uint64_t handle, uint32_t pos, uint32_t tokens)
{
	float *scores = calloc((size_t)tokens * 4, sizeof(float));

	for (uint32_t i = 0; i < tokens * 4; i++)
		scores[i] = (float)(i % 97) / 97.0f;
	assert_int_equal(fixture_reserve(fixture, handle, tokens), 0);
	assert_int_equal(fixture_stage(fixture, handle, pos, tokens, scores), 0);
	assert_int_equal(fixture_commit(fixture, handle, pos + tokens), 0);
	free(scores);
}

/* What an eviction frees and the next chunk does not fill is promised again before anybody else can have it. */
static void test_refunds_become_promise(void **state)
{
	struct kvg_policy policy = {.mode = KVG_MODE_CHUNKED,
		.ratio = 0.25,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.context_tokens = 1536,
		.chunk_tokens = 1024,
		.window = 16};
	struct fixture *fixture = fixture_of(3);
	uint64_t handle, none;

	(void)state;
	assert_int_equal(fixture_create(fixture, &policy, &handle), 0);
	expect(fixture, 0, 3); /* 1024 fresh tokens and two spare stripes */
	feed(fixture, handle, 0, 1024);
	fixture->hold_unmapped = true;
	assert_int_equal(fixture_evict(fixture, handle, KVG_EVICT_PREFILL), 0);
	assert_true(fixture_account(fixture)->unreturned > 0);
	assert_int_equal(fixture_create(fixture, &(struct kvg_policy){.context_tokens = 512}, &none), -ENOSPC);
	fixture->hold_unmapped = false;
	fixture_acknowledge(fixture);
	assert_int_equal(fixture_account(fixture)->unreturned, 0);
	assert_int_equal(fixture_create(fixture, &(struct kvg_policy){.context_tokens = 512}, &none), -ENOSPC);
	feed(fixture, handle, 1024, 512);
	assert_int_equal(fixture_evict(fixture, handle, KVG_EVICT_PREFILL), 0);
	assert_int_equal(fixture_account(fixture)->promised, 0); /* nothing is to come */
	assert_int_equal(fixture_create(fixture, &(struct kvg_policy){.context_tokens = 512}, &none), 0);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_drawing),
		cmocka_unit_test(test_nobody_takes_anothers),
		cmocka_unit_test(test_the_unpromised_is_everybodys),
		cmocka_unit_test(test_turns),
		cmocka_unit_test(test_refunds_become_promise),
	};

	return runner_run("promise", tests, sizeof(tests) / sizeof(tests[0]));
}
