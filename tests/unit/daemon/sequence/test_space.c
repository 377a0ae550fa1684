/* Requests in order, extents that come and go, failures of the host's memory, and the end in every phase. */
#include "daemon/sequence/space.h"

#include <errno.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/space_model.h"
#include "tests/support/test_kind.h"

#define EXTENT (64u << 10)

static const struct kvg_policy evicted = {.ratio = 0.3,
	.mode = KVG_MODE_CHUNKED,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE,
	.context_tokens = 600,
	.chunk_tokens = 600,
	.window = 30,
	.max_new_tokens = 300};

static uint64_t create(struct fixture *fixture, uint32_t context)
{
	struct kvg_policy policy = {.context_tokens = context};
	uint64_t handle = 0;

	if (fixture_create(fixture, &policy, &handle) < 0)
		fail_msg("%s", fixture->text);
	return handle;
}

/* Holds the executor until it is let go, so that what is submitted meanwhile stays in flight. */
struct gate_keeper {
	struct job job;
	sem_t go;
	bool done;
};

static void keep(struct job *job)
{
	(void)sem_wait(&list_entry(job, struct gate_keeper, job)->go);
}

static void kept(struct job *job)
{
	list_entry(job, struct gate_keeper, job)->done = true;
}

static void hold_executor(struct fixture *fixture, struct gate_keeper *keeper)
{
	*keeper = (struct gate_keeper){.job = {.run = keep, .done = kept}};
	assert_int_equal(sem_init(&keeper->go, 0, 0), 0);
	executor_submit(fixture->executor, &keeper->job);
}

static void let_go(struct gate_keeper *keeper)
{
	assert_int_equal(sem_post(&keeper->go), 0);
}

/* ---- entries ---- */

static void test_unknown_entries(void **state)
{
	static const struct kvg_sqe bad[] = {{.op = KVG_OP_RELIEF}, {.op = 255}, {.op = KVG_OP_NOP, .flags = 1},
		{.op = KVG_OP_NOP, .reserved0 = 1}, {.op = KVG_OP_NOP, .wait_event = 1},
		{.op = KVG_OP_NOP, .layout = 1}};
	struct fixture *fixture = fixture_new(NULL);
	struct kvg_sqe nop = {.op = KVG_OP_NOP};

	(void)state;
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		assert_int_equal(fixture_call(fixture, &bad[i]), -EINVAL);
		assert_memory_equal(fixture->text, "entry: operation ", 17);
	}
	assert_int_equal(fixture_call(fixture, &nop), 0);
	fixture_free(fixture);
}

static void test_refused_layout(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct kvg_layout layout = fixture->layout;
	struct space *space = NULL;
	char text[KVG_TEXT_SIZE];

	(void)state;
	layout.groups[0].kind = KVG_GROUP_STATE;
	assert_int_equal(space_new(fixture->tenant, &layout, 8, NULL, NULL, &space, text), -EOPNOTSUPP);
	assert_string_equal(text, "layout test: group kind STATE (4), this daemon takes GLOBAL");
	assert_null(space);
	assert_null(space_free(NULL));
	fixture_free(fixture);
}

/* Two workers of a tenant share the arena's addresses, not extents, sequences or tables. */
static void test_two_spaces_of_a_tenant(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct space *other = NULL;
	char text[KVG_TEXT_SIZE];

	(void)state;
	assert_int_equal(
		space_new(fixture->tenant, &fixture->layout, 8, fixture->space->ops, fixture, &other, text), 0);
	assert_ptr_equal(other->arena, fixture->space->arena);
	assert_int_not_equal(other->index, fixture->space->index);
	assert_int_equal(other->part.worker->id, 8);
	assert_true(space_overhead(other) > 0);
	assert_ptr_not_equal(other->table.header, fixture->space->table.header);
	(void)space_free(other);
	fixture_free(fixture);
}

/* ---- order ---- */

/* Entries of a busy sequence wait and run in order; those of another overtake them. */
static void test_busy_sequence_queues(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t a = create(fixture, 512), b = create(fixture, 512);
	struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .seq = a, .reserve.tokens = 100};
	struct gate_keeper keeper;
	struct call *calls[6];

	(void)state;
	hold_executor(fixture, &keeper);
	calls[0] = fixture_start(fixture, &sqe);
	sqe = (struct kvg_sqe){.op = KVG_OP_COMMIT, .seq = a, .commit.pos = 100};
	calls[1] = fixture_start(fixture, &sqe);
	sqe = (struct kvg_sqe){.op = KVG_OP_TRUNCATE, .seq = a, .truncate.pos = 60};
	calls[2] = fixture_start(fixture, &sqe);
	sqe = (struct kvg_sqe){.op = KVG_OP_QUERY, .seq = a};
	calls[3] = fixture_start(fixture, &sqe);
	sqe.seq = b;
	calls[4] = fixture_start(fixture, &sqe);
	assert_true(calls[4]->done);
	for (unsigned i = 0; i < 4; i++)
		assert_false(calls[i]->done);
	let_go(&keeper);
	fixture_wait(fixture, calls[3]);
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(calls[i]->request.cqe.status, 0);
		assert_int_equal(calls[i]->order, calls[4]->order + 1 + i);
	}
	assert_int_equal(calls[3]->request.cqe.value[2], 60);
	sqe = (struct kvg_sqe){.op = KVG_OP_FREE, .seq = a};
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	fixture_free(fixture);
}

/* A worker chooses how many entries wait: their end takes no stack. */
static void test_many_entries_wait(void **state)
{
	enum { MANY = 50000 };
	struct fixture *fixture = fixture_new(NULL);
	uint64_t a = create(fixture, 512);
	struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .seq = a, .reserve.tokens = 100};
	struct gate_keeper keeper;
	struct call *call, *last = NULL;

	(void)state;
	fixture->no_audit = true;
	hold_executor(fixture, &keeper);
	call = fixture_start(fixture, &sqe);
	sqe = (struct kvg_sqe){.op = KVG_OP_QUERY, .seq = a};
	for (unsigned i = 0; i < MANY; i++)
		last = fixture_start(fixture, &sqe);
	assert_false(call->done);
	let_go(&keeper);
	fixture_wait(fixture, last);
	assert_int_equal(last->order, call->order + MANY);
	assert_int_equal(last->request.cqe.status, 0);
	assert_int_equal(fixture_release(fixture, a), 0);
	fixture->no_audit = false;
	fixture_audit(fixture);
	fixture_free(fixture);
}

/* What waits behind a FREE is told that the sequence is gone. */
static void test_entries_behind_a_free(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = create(fixture, 512);
	struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .seq = handle, .reserve.tokens = 100};
	struct gate_keeper keeper;
	struct call *reserve, *release, *query[2];

	(void)state;
	hold_executor(fixture, &keeper);
	reserve = fixture_start(fixture, &sqe);
	sqe = (struct kvg_sqe){.op = KVG_OP_FREE, .seq = handle};
	release = fixture_start(fixture, &sqe);
	sqe.op = KVG_OP_QUERY;
	query[0] = fixture_start(fixture, &sqe);
	query[1] = fixture_start(fixture, &sqe);
	let_go(&keeper);
	fixture_wait(fixture, query[1]);
	assert_int_equal(reserve->request.cqe.status, 0);
	assert_int_equal(release->request.cqe.status, 0);
	assert_int_equal(release->request.cqe.seq, handle);
	assert_int_equal(query[0]->request.cqe.status, -ENOENT);
	assert_int_equal(query[1]->request.cqe.status, -ENOENT);
	assert_true(query[0]->order < query[1]->order);
	fixture_acknowledge(fixture);
	fixture_free(fixture);
}

/* ---- extents ---- */

static void test_unmapped_gives_bytes_back(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	const struct quota_account *account = fixture_account(fixture);
	uint64_t handle = create(fixture, 1024);
	struct kvg_sqe sqe = {.op = KVG_OP_UNMAPPED};

	(void)state;
	fixture->hold_unmapped = true;
	assert_int_equal(fixture_reserve(fixture, handle, 1024), 0);
	assert_int_equal(fixture->mapped_count, 2);
	assert_int_equal(fixture_release(fixture, handle), 0);
	assert_int_equal(fixture->mapped_count, 0);
	assert_int_equal(account->charged, 2 * EXTENT);
	assert_int_equal(account->unreturned, 2 * EXTENT);
	sqe.unmapped.event = fixture->dropped_event + 1; /* of an event that never was */
	assert_int_equal(fixture_call(fixture, &sqe), -EINVAL);
	assert_int_equal(account->charged, 2 * EXTENT);
	sqe.unmapped.event = fixture->dropped_event - 1; /* too old: nothing yet */
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	assert_int_equal(account->charged, 2 * EXTENT);
	sqe.unmapped.event = fixture->dropped_event;
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	assert_int_equal(account->charged, 0);
	assert_int_equal(account->unreturned, 0);
	assert_int_equal(fixture_call(fixture, &sqe), 0); /* again: there is nothing left */
	fixture_free(fixture);
}

/* A worker that does not unmap cannot have more: its old bytes count. */
static void test_unreturned_bytes_stay_charged(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.device_max = 2 * EXTENT});
	struct kvg_policy policy = {.context_tokens = 1024};
	uint64_t handle = create(fixture, 1024), again;

	(void)state;
	fixture->hold_unmapped = true;
	assert_int_equal(fixture_reserve(fixture, handle, 1024), 0);
	assert_int_equal(fixture_release(fixture, handle), 0);
	assert_int_equal(fixture_create(fixture, &policy, &again), -ENOSPC);
	assert_non_null(strstr(fixture->text, "(some not yet unmapped)"));
	fixture_acknowledge(fixture);
	assert_int_equal(fixture_create(fixture, &policy, &again), 0);
	assert_int_equal(fixture_reserve(fixture, again, 1024), 0);
	fixture_free(fixture);
}

/* ---- the host has no memory ---- */

static int creations_left;
static uint64_t creation_ns; /* that each takes at least */

static int (*real_create)(struct kind *kind, size_t size);
static struct kind_ops failing_ops;

static int failing_create(struct kind *kind, size_t size)
{
	const uint64_t until = loop_now() + creation_ns;

	while (loop_now() < until)
		;
	return creations_left-- > 0 ? real_create(kind, size) : -ENOMEM;
}

static struct kind *failing_kind(void)
{
	struct kind *kind;

	assert_int_equal(kind_host_new(&kind), 0);
	failing_ops = *kind->ops;
	real_create = failing_ops.create;
	failing_ops.create = failing_create;
	kind->ops = &failing_ops;
	creations_left = 1 << 20;
	creation_ns = 0;
	return kind;
}

static void test_failed_creation_keeps_the_promise(void **state)
{
	struct kind *kind = failing_kind();
	struct fixture *fixture = fixture_new(&(struct fixture_options){.kind = kind});
	const struct quota_account *account = fixture_account(fixture);
	uint64_t handle = create(fixture, 1024);

	(void)state;
	assert_int_equal(account->promised, 2 * EXTENT);
	creations_left = 1;
	assert_int_equal(fixture_reserve(fixture, handle, 1024), -ENOMEM);
	assert_string_equal(fixture->text, "tenant test: memory of the host: Cannot allocate memory");
	assert_int_equal(account->charged, 0);
	assert_int_equal(account->promised, 2 * EXTENT);
	assert_int_equal(fixture->mapped_count, 0);
	creations_left = 2;
	assert_int_equal(fixture_reserve(fixture, handle, 1024), 0);
	fixture_free(fixture);
	(void)kind_free(kind);
}

/* The worker gets many extents that take long in parts; when a later part fails, those that it has got go back. */
static void test_extents_come_in_parts(void **state)
{
	struct kind *kind = failing_kind();
	struct fixture *fixture = fixture_new(&(struct fixture_options){.kind = kind, .extent_size = 16 << 10});
	const struct quota_account *account = fixture_account(fixture);
	const uint32_t extent = 16 << 10, tokens = 20 * 128; /* a stripe each */
	uint64_t handle = create(fixture, tokens);

	(void)state;
	assert_int_equal(account->promised, 20 * extent);
	creation_ns = 600000; /* more than one turn of the executor */
	creations_left = 10;
	assert_int_equal(fixture_reserve(fixture, handle, tokens), -ENOMEM);
	assert_int_equal(fixture->events, 2); /* eight came and went */
	assert_int_equal(account->charged, 0);
	assert_int_equal(account->promised, 20 * extent);
	assert_int_equal(fixture->mapped_count, 0);
	creations_left = 20;
	assert_int_equal(fixture_reserve(fixture, handle, tokens), 0);
	assert_int_equal(fixture->events, 2 + 3);
	assert_int_equal(fixture->mapped_count, 20);
	assert_int_equal(account->charged, 20 * extent);
	fixture_free(fixture);
	(void)kind_free(kind);
}

/* The extent table is full: charge and promise are as before. */
static void test_full_table_keeps_the_promise(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	const struct quota_account *account = fixture_account(fixture);
	uint64_t handle = create(fixture, 1024);
	uint32_t free_count = fixture->pool->free_count;

	(void)state;
	fixture->pool->free_count = 1;
	assert_int_equal(fixture_reserve(fixture, handle, 1024), -ENOSPC);
	assert_true(fixture->text[0]);
	assert_int_equal(account->charged, 0);
	assert_int_equal(account->promised, 2 * EXTENT);
	fixture->pool->free_count = free_count;
	assert_int_equal(fixture_reserve(fixture, handle, 1024), 0);
	fixture_free(fixture);
}

/* An eviction whose room cannot be created is refused whole, and the space evicts again later. */
static void test_eviction_survives_a_failed_creation(void **state)
{
	struct kind *kind = failing_kind();
	struct fixture *fixture = fixture_new(&(struct fixture_options){.kind = kind});
	struct kvg_policy policy = evicted;
	struct model *model;

	(void)state;
	policy.context_tokens = policy.chunk_tokens = 1024; /* two extents, full */
	model = model_new(fixture, &policy, SCORES_RANDOM);
	assert_int_equal(model_append(model, 1024), 0);
	creations_left = 0;
	assert_int_equal(fixture_evict(fixture, model->handle, KVG_EVICT_PREFILL), -ENOMEM);
	assert_int_equal(fixture->space->evicting, 0);
	model_check(model);
	creations_left = 1 << 20;
	model_evict(model, KVG_EVICT_PREFILL);
	model_release(model);
	fixture_free(fixture);
	(void)kind_free(kind);
}

/* ---- the end, in every phase ---- */

static void test_kill_idle(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = model_new(fixture, &evicted, SCORES_RANDOM);

	(void)state;
	model_prefill(model);
	fixture->hold_unmapped = true;
	assert_int_equal(fixture_reserve(fixture, create(fixture, 2000), 2000), 0);
	fixture_kill(fixture);
	assert_int_equal(fixture_account(fixture)->charged, 0);
	model_free(model);
	fixture_free(fixture);
}

static void test_kill_with_unreturned_extents(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = create(fixture, 2000);

	(void)state;
	fixture->hold_unmapped = true;
	assert_int_equal(fixture_reserve(fixture, handle, 2000), 0);
	assert_int_equal(fixture_release(fixture, handle), 0);
	assert_true(fixture_account(fixture)->unreturned > 0);
	fixture_kill(fixture);
	assert_int_equal(fixture_account(fixture)->charged, 0);
	fixture_free(fixture);
}

/* Killed while extents are being created, with more entries waiting behind. */
static void test_kill_amid_a_reserve(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .seq = create(fixture, 2000), .reserve.tokens = 2000};
	struct gate_keeper keeper;
	struct call *calls[2];

	(void)state;
	hold_executor(fixture, &keeper);
	calls[0] = fixture_start(fixture, &sqe);
	sqe.op = KVG_OP_FREE;
	calls[1] = fixture_start(fixture, &sqe);
	space_kill(fixture->space);
	space_kill(fixture->space); /* once more does nothing */
	assert_false(fixture->closed);
	let_go(&keeper);
	fixture_kill(fixture);
	assert_false(calls[0]->done);
	assert_false(calls[1]->done);
	fixture_free(fixture);
}

/* Killed while a failed creation is being undone. */
static void test_kill_amid_a_failing_reserve(void **state)
{
	struct kind *kind = failing_kind();
	struct fixture *fixture = fixture_new(&(struct fixture_options){.kind = kind});
	struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .seq = create(fixture, 2000), .reserve.tokens = 2000};
	struct gate_keeper keeper;

	(void)state;
	hold_executor(fixture, &keeper);
	(void)fixture_start(fixture, &sqe);
	creations_left = 2;
	space_kill(fixture->space);
	let_go(&keeper);
	fixture_kill(fixture);
	fixture_free(fixture);
	(void)kind_free(kind);
}

static void test_kill_amid_an_unmapped(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = create(fixture, 2000);
	struct kvg_sqe sqe = {.op = KVG_OP_UNMAPPED};
	struct gate_keeper keeper;

	(void)state;
	fixture->hold_unmapped = true;
	assert_int_equal(fixture_reserve(fixture, handle, 2000), 0);
	assert_int_equal(fixture_release(fixture, handle), 0);
	hold_executor(fixture, &keeper);
	sqe.unmapped.event = fixture->dropped_event;
	(void)fixture_start(fixture, &sqe);
	space_kill(fixture->space);
	let_go(&keeper);
	fixture_kill(fixture);
	fixture_free(fixture);
}

/* Calls the space's end after so many jobs have come back. */
struct killer {
	struct fixture *fixture;
	unsigned jobs_left;
	unsigned pending;
};

static bool kill_later(void *user)
{
	struct killer *killer = user;
	unsigned pending = executor_pending(killer->fixture->executor);

	if (pending == 0 || killer->jobs_left == 0)
		return false;
	if (--killer->jobs_left == 0)
		space_kill(killer->fixture->space);
	return false;
}

static bool never_sleeps(void *user, bool going)
{
	(void)user;
	(void)going;
	return true;
}

/* Two evictions, one waiting for the other, a stage and a reserve; killed after `turns` rounds with work in flight. */
static bool kill_amid_evictions(unsigned turns)
{
	static const struct loop_poller_ops ops = {.poll = kill_later, .sleep = never_sleeps};
	struct fixture *fixture = fixture_new(NULL);
	struct killer killer = {.fixture = fixture, .jobs_left = turns};
	struct model *a = model_new(fixture, &evicted, SCORES_RANDOM), *b = model_new(fixture, &evicted, SCORES_TIES);
	struct kvg_sqe evict = {.op = KVG_OP_EVICT}, reserve = {.op = KVG_OP_RESERVE, .reserve.tokens = 500};
	struct call *calls[3];
	bool finished;

	assert_int_equal(model_append(a, 600), 0);
	assert_int_equal(model_append(b, 600), 0);
	reserve.seq = create(fixture, 500);
	fixture->no_audit = true; /* until the end: completions are looked at elsewhere */
	evict.seq = a->handle;
	calls[0] = fixture_start(fixture, &evict);
	evict.seq = b->handle;
	calls[1] = fixture_start(fixture, &evict);
	calls[2] = fixture_start(fixture, &reserve);
	assert_int_equal(loop_poller_add(fixture->loop, &ops, &killer), 0);
	fixture->waiting = calls[1];
	assert_int_equal(loop_run(fixture->loop), 0);
	finished = calls[1]->done;
	loop_poller_remove(fixture->loop, &ops, &killer);
	fixture_kill(fixture);
	model_free(a);
	model_free(b);
	fixture_free(fixture);
	return finished;
}

static void test_kill_amid_evictions(void **state)
{
	unsigned turns = 1, step = 1;

	(void)state;
	/* Rounds pass faster than jobs, so the steps grow; ends when both evictions were faster than the kill. */
	while (!kill_amid_evictions(turns) && turns < 1u << 24)
		turns += step += 1 + turns / 8;
	assert_true(turns > 1);
}

static void test_kill_amid_a_stage(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct kvg_sqe sqe = {.op = KVG_OP_STAGE, .seq = create(fixture, 500)};
	struct gate_keeper keeper;

	(void)state;
	assert_int_equal(fixture_reserve(fixture, sqe.seq, 500), 0);
	hold_executor(fixture, &keeper);
	sqe.stage.kind = KVG_STAGE_SCORE;
	sqe.stage.layer_count = 2;
	sqe.stage.rows = 500;
	(void)fixture_start(fixture, &sqe);
	space_kill(fixture->space);
	let_go(&keeper);
	fixture_kill(fixture);
	fixture_free(fixture);
}

static void test_kill_empty(void **state)
{
	struct fixture *fixture = fixture_new(NULL);

	(void)state;
	fixture_kill(fixture);
	fixture_free(fixture);
}

static bool pretends; /* to have a device */

static struct kvg_cuda *pretended_device(struct kind *kind)
{
	return pretends ? (struct kvg_cuda *)(void *)kind : NULL; /* nobody looks into it */
}

/* Device memory outside of the budget is counted before any is created, and given back with the space. */
static void test_claim(void **state)
{
	struct test_kind kind;
	struct fixture_options options = {.kind = &kind.kind, .device_max = 1 << 20};
	struct fixture *fixture;
	struct space *other = NULL;
	char text[KVG_TEXT_SIZE] = "";
	uint64_t table;

	(void)state;
	pretends = false;
	test_kind_init(&kind);
	kind.ops.device = pretended_device;
	fixture = fixture_new(&options);
	assert_int_equal(
		space_new(fixture->tenant, &fixture->layout, 8, fixture->space->ops, fixture, &other, text), 0);
	assert_int_equal(space_claim(other, UINT64_C(1) << 40, text), 0); /* not of a device */
	pretends = true;
	assert_int_equal(space_claim(other, 1 << 20, text), -ENOSPC);
	assert_memory_equal(text, "tenant test: tables and staging areas on the device: in use 0 B, ", 65);
	assert_int_equal(fixture->tenant->claimed, 0);
	assert_int_equal(space_claim(other, 5000, text), 0);
	table = fixture->tenant->claimed - 8192;
	assert_true(table >= 32 * 4 * (34 * 8 + 1)); /* 32 rows of 4096 tokens */
	assert_int_equal(table % 4096, 0);
	pretends = false;
	(void)space_free(other);
	assert_int_equal(fixture->tenant->claimed, 0);
	fixture_free(fixture);
	test_kind_deinit(&kind);
}

static void test_layout_of_a_device(void **state)
{
	struct test_kind kind;
	struct fixture_options options = {.kind = &kind.kind};
	struct fixture *fixture;
	struct kvg_layout layout;
	struct space *space = NULL;
	char text[KVG_TEXT_SIZE] = "";

	(void)state;
	pretends = false;
	test_kind_init(&kind);
	kind.ops.device = pretended_device;
	fixture = fixture_new(&options);
	layout = fixture->layout;
	layout.groups[0].k_dim = 4;
	pretends = true;
	assert_int_equal(space_new(fixture->tenant, &layout, 8, NULL, NULL, &space, text), -EOPNOTSUPP);
	assert_string_equal(text, "layout test: k_dim is 4, 8 bytes; the kind cuda takes multiples of 16 bytes");
	assert_null(space);
	pretends = false;
	fixture_free(fixture);
	test_kind_deinit(&kind);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_unknown_entries),
		cmocka_unit_test(test_refused_layout),
		cmocka_unit_test(test_two_spaces_of_a_tenant),
		cmocka_unit_test(test_busy_sequence_queues),
		cmocka_unit_test(test_many_entries_wait),
		cmocka_unit_test(test_entries_behind_a_free),
		cmocka_unit_test(test_unmapped_gives_bytes_back),
		cmocka_unit_test(test_unreturned_bytes_stay_charged),
		cmocka_unit_test(test_failed_creation_keeps_the_promise),
		cmocka_unit_test(test_extents_come_in_parts),
		cmocka_unit_test(test_full_table_keeps_the_promise),
		cmocka_unit_test(test_eviction_survives_a_failed_creation),
		cmocka_unit_test(test_kill_idle),
		cmocka_unit_test(test_kill_with_unreturned_extents),
		cmocka_unit_test(test_kill_amid_a_reserve),
		cmocka_unit_test(test_kill_amid_a_failing_reserve),
		cmocka_unit_test(test_kill_amid_an_unmapped),
		cmocka_unit_test(test_kill_amid_evictions),
		cmocka_unit_test(test_kill_amid_a_stage),
		cmocka_unit_test(test_kill_empty),
		cmocka_unit_test(test_claim),
		cmocka_unit_test(test_layout_of_a_device),
	};

	return runner_run("space", tests, sizeof(tests) / sizeof(tests[0]));
}
