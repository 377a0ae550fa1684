/*
 * Waits for a worker's stream: how many the executor looks at, how often it asks, and when they end. Copies of blocks:
 * slice by slice, to the last block or to the end of the space.
 */
#include "daemon/sequence/compute.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "tests/support/space_fixture.h"

enum { SEQUENCES = 600, WAITS = 256 };

static unsigned asked; /* for the event */
static int answer;

static int some_event(const struct space *space, void *event)
{
	(void)space;
	(void)event;
	asked++;
	return answer;
}

/* The host's work, with a worker whose stream can be waited for. */
static struct compute_ops ops;

static struct fixture *begin(uint64_t handles[SEQUENCES])
{
	const struct fixture_options options = {.max_sequences = SEQUENCES, .max_tokens = 128};
	const struct kvg_policy policy = {.context_tokens = 1};
	struct fixture *fixture = fixture_new(&options);

	ops = compute_host;
	ops.event = some_event;
	asked = 0;
	fixture->no_audit = true;
	fixture->space->compute = &ops;
	fixture->space->sync = calloc(1, sizeof(struct kvg_sync) + SEQUENCES * sizeof(uint64_t));
	assert_non_null(fixture->space->sync);
	for (unsigned i = 0; handles && i < SEQUENCES; i++)
		if (fixture_create(fixture, &policy, &handles[i]) < 0)
			fail_msg("%s", fixture->text);
	return fixture;
}

static void end(struct fixture *fixture)
{
	struct kvg_sync *sync = fixture->space->sync;

	if (!fixture->closed)
		fixture_kill(fixture);
	fixture_free(fixture);
	free(sync);
}

static struct call *wait_for(struct fixture *fixture, uint64_t handle, uint64_t value, uint32_t event)
{
	const struct kvg_sqe sqe = {.op = KVG_OP_QUERY, .seq = handle, .wait_value = value, .wait_event = event};

	return fixture_start(fixture, &sqe);
}

static void raise_worker(const struct fixture *fixture, uint64_t value)
{
	__atomic_store_n(&fixture->space->sync->worker, value, __ATOMIC_RELEASE);
}

/* More waits than the executor looks at come to their end all the same. */
static void test_many_waits(void **state)
{
	static uint64_t handles[SEQUENCES];
	static struct call *calls[SEQUENCES];
	struct fixture *fixture = begin(handles);

	(void)state;
	for (unsigned i = 0; i < SEQUENCES; i++)
		calls[i] = wait_for(fixture, handles[i], 5, 0);
	assert_int_equal(fixture->space->waits, WAITS);
	assert_int_equal(executor_pending(fixture->executor), WAITS);
	fixture_turn(fixture);
	assert_int_equal(fixture->space->waits, WAITS);
	raise_worker(fixture, 5);
	for (unsigned i = 0; i < SEQUENCES; i++) {
		fixture_wait(fixture, calls[i]);
		assert_int_equal(calls[i]->request.cqe.status, 0);
	}
	assert_int_equal(fixture->space->waits, 0);
	assert_true(list_empty(&fixture->space->wait_queue));
	end(fixture);
}

/* Deadlines run in the queue too. */
static void test_deadline_of_queued_waits(void **state)
{
	static uint64_t handles[SEQUENCES];
	static struct call *calls[SEQUENCES];
	struct fixture *fixture = begin(handles);
	uint64_t begun = loop_now();

	(void)state;
	fixture->space->wait_ns = 200000000;
	for (unsigned i = 0; i < SEQUENCES; i++)
		calls[i] = wait_for(fixture, handles[i], UINT64_C(1) << 63, 0);
	for (unsigned i = 0; i < SEQUENCES; i++) {
		fixture_wait(fixture, calls[i]);
		assert_int_equal(calls[i]->request.cqe.status, -ETIME);
	}
	assert_true(loop_now() - begun >= 200000000);
	assert_true(loop_now() - begun < 2 * UINT64_C(200000000)); /* not one round after the other */
	end(fixture);
}

static void test_end_with_queued_waits(void **state)
{
	static uint64_t handles[SEQUENCES];
	struct fixture *fixture = begin(handles);

	(void)state;
	for (unsigned i = 0; i < SEQUENCES; i++)
		(void)wait_for(fixture, handles[i], 1, 0);
	end(fixture);
}

/* The driver is asked once a millisecond, and not again when the event has happened. */
static void test_events_are_asked_for_now_and_then(void **state)
{
	const struct import event = {.kind = IMPORT_EVENT};
	const struct kvg_policy policy = {.context_tokens = 1};
	struct fixture *fixture = begin(NULL);
	struct import taken;
	struct call *call;
	uint64_t handle = 0, begun;
	uint32_t id = imports_add(&fixture->space->imports, &event);

	(void)state;
	assert_int_equal(fixture_create(fixture, &policy, &handle), 0);
	answer = -EAGAIN;
	fixture->space->wait_ns = 20000000;
	begun = loop_now();
	call = wait_for(fixture, handle, 0, id);
	fixture_wait(fixture, call);
	assert_int_equal(call->request.cqe.status, -ETIME);
	assert_in_range(asked, 2, (loop_now() - begun) / 1000000 + 1);
	answer = 0;
	asked = 0;
	call = wait_for(fixture, handle, 1, id);
	fixture_wait(fixture, call);
	assert_int_equal(call->request.cqe.status, -ETIME);
	assert_int_equal(asked, 1);
	answer = -EIO;
	call = wait_for(fixture, handle, 0, id);
	fixture_wait(fixture, call);
	assert_int_equal(call->request.cqe.status, -EIO);
	assert_int_equal(imports_take(&fixture->space->imports, id, &taken), 0);
	end(fixture);
}

/* ---- copies of blocks ---- */

enum { SLICE = 3 };

/* A request whose blocks are copied, and what has come of it. */
struct copying {
	struct request request;
	atomic_uint slices;
	unsigned ends;
	unsigned fails_at; /* this slice; 0: none does */
	bool lost;         /* the space was dying at its end */
};

static int some_blocks(struct request *request)
{
	struct copying *copying = list_entry(request, struct copying, request);
	struct block_copy *copy = &request->copy;
	uint32_t left = copy->count - copy->done;

	if (++copying->slices == copying->fails_at)
		return -EIO;
	copy->done += left < SLICE ? left : SLICE;
	return 0;
}

static void copy_ended(struct request *request)
{
	struct copying *copying = list_entry(request, struct copying, request);

	copying->ends++;
	copying->lost = space_job_ended(request->space);
}

static void copy_blocks(struct fixture *fixture, struct copying *copying, uint32_t count)
{
	ops.copy = some_blocks;
	copying->request.space = fixture->space;
	copying->request.copy.count = count;
	compute_copy_blocks(&copying->request, copy_ended);
	assert_int_equal(copying->ends, 0);
	assert_int_equal(fixture->space->jobs, 1);
}

static void test_blocks_in_slices(void **state)
{
	static const uint32_t counts[] = {0, 1, SLICE, SLICE + 1, 4 * SLICE - 1};
	struct fixture *fixture = begin(NULL);

	(void)state;
	for (unsigned i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
		struct copying copying = {0};

		copy_blocks(fixture, &copying, counts[i]);
		while (executor_pending(fixture->executor))
			fixture_turn(fixture);
		assert_int_equal(copying.ends, 1);
		assert_false(copying.lost);
		assert_int_equal(copying.request.job_status, 0);
		assert_int_equal(copying.request.copy.done, counts[i]);
		assert_int_equal(copying.slices, counts[i] ? (counts[i] + SLICE - 1) / SLICE : 1);
		assert_int_equal(fixture->space->jobs, 0);
	}
	end(fixture);
}

static void test_a_slice_fails(void **state)
{
	struct fixture *fixture = begin(NULL);
	struct copying copying = {.fails_at = 2};

	(void)state;
	copy_blocks(fixture, &copying, 5 * SLICE);
	while (executor_pending(fixture->executor))
		fixture_turn(fixture);
	assert_int_equal(copying.ends, 1);
	assert_false(copying.lost);
	assert_int_equal(copying.request.job_status, -EIO);
	assert_int_equal(copying.slices, 2);
	assert_int_equal(copying.request.copy.done, SLICE);
	assert_int_equal(fixture->space->jobs, 0);
	end(fixture);
}

/* The space closes when the slice under way has ended, and no other begins. */
static void test_end_between_slices(void **state)
{
	struct fixture *fixture = begin(NULL);
	struct copying copying = {0};

	(void)state;
	copy_blocks(fixture, &copying, 200000 * SLICE);
	while (copying.slices < 3 && !copying.ends)
		fixture_turn(fixture);
	assert_int_equal(copying.ends, 0);
	fixture_kill(fixture);
	assert_int_equal(copying.ends, 1);
	assert_true(copying.lost);
	assert_in_range(copying.request.copy.done, 3 * SLICE, copying.request.copy.count - SLICE);
	assert_int_equal(executor_pending(fixture->executor), 0);
	end(fixture);
}

static void test_start_without_a_device(void **state)
{
	struct kind *kind = NULL;
	char text[64] = "";

	(void)state;
	assert_int_equal(kind_host_new(&kind), 0);
	assert_int_equal(compute_start(kind, text, sizeof(text)), 0);
	assert_null(kind->attached);
	assert_string_equal(text, "");
	assert_null(kind_free(kind));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_many_waits),
		cmocka_unit_test(test_deadline_of_queued_waits),
		cmocka_unit_test(test_end_with_queued_waits),
		cmocka_unit_test(test_events_are_asked_for_now_and_then),
		cmocka_unit_test(test_blocks_in_slices),
		cmocka_unit_test(test_a_slice_fails),
		cmocka_unit_test(test_end_between_slices),
		cmocka_unit_test(test_start_without_a_device),
	};

	return runner_run("compute", tests, sizeof(tests) / sizeof(tests[0]));
}
