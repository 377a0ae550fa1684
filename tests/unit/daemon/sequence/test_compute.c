/* Waits for a worker's stream: how many the executor looks at, how often it asks, and when they end. */
#include "daemon/sequence/compute.h"

#include <errno.h>
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
		cmocka_unit_test(test_start_without_a_device),
	};

	return runner_run("compute", tests, sizeof(tests) / sizeof(tests[0]));
}
