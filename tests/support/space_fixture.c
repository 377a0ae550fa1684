#include "tests/support/space_fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "daemon/metrics/audit.h"
#include "daemon/sequence/context.h"
#include "daemon/tier/host.h"

static uint64_t either(uint64_t value, uint64_t otherwise)
{
	return value ? value : otherwise;
}

struct kvg_layout fixture_layout(const struct fixture_options *options)
{
	uint32_t heads = (uint32_t)either(options->heads, 2);
	struct kvg_layout layout = {.model = "test",
		.hidden_dim = 64,
		.group_count = 1,
		.max_sequences = (uint32_t)either(options->max_sequences, 8),
		.max_tokens = (uint32_t)either(options->max_tokens, 4096)};

	layout.groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = (uint32_t)either(options->layers, 2),
		.head_count = heads,
		.head_total = heads,
		.world = 1,
		.k_dim = (uint32_t)either(options->k_dim, 8),
		.v_dim = (uint32_t)either(options->v_dim, 8),
		.k_dtype = (uint32_t)either(options->k_dtype, KVG_BF16),
		.v_dtype = (uint32_t)either(options->v_dtype, KVG_BF16),
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 2};
	return layout;
}

/* ---- what the space reports ---- */

static void on_complete(void *user, struct request *request)
{
	struct fixture *fixture = user;
	struct call *call = list_entry(request, struct call, request);

	assert_false(call->done);
	assert_null(request->sequence);
	assert_false(atomic_load(&fixture->space->dying));
	call->done = true;
	call->order = ++fixture->completed;
	if (!fixture->no_audit)
		fixture_audit(fixture);
	if (fixture->told)
		fixture->told(fixture->told_user, fixture, request);
	if (fixture->waiting == call)
		loop_stop(fixture->loop);
}

/* As libkvgate does it. fd: -1 takes the mapping away. */
static void map_view(const struct fixture *fixture, uint32_t slot, int fd)
{
	size_t size = fixture->space->arena->extent_size;
	uint8_t *at = fixture->view ? fixture->view + slot * size : NULL;

	if (at && fd >= 0)
		assert_true(mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == at);
	else if (at)
		assert_true(mmap(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
			    at);
}

static int on_added(void *user, struct extent *const *extents, uint32_t count)
{
	struct fixture *fixture = user;

	assert_true(count > 0 && count <= 64);
	for (uint32_t i = 0; i < count; i++) {
		assert_false(fixture->mapped[extents[i]->meta->slot]);
		assert_true(extents[i]->fd >= 0);
		fixture->mapped[extents[i]->meta->slot] = true;
		map_view(fixture, extents[i]->meta->slot, extents[i]->fd);
	}
	fixture->mapped_count += count;
	fixture->events++;
	return fixture->added_status;
}

static uint32_t on_dropped(void *user, const uint32_t *slots, uint32_t count)
{
	struct fixture *fixture = user;

	assert_true(count > 0);
	for (uint32_t i = 0; i < count; i++) {
		assert_true(fixture->mapped[slots[i]]);
		fixture->mapped[slots[i]] = false;
		map_view(fixture, slots[i], -1);
	}
	fixture->mapped_count -= count;
	fixture->dropped_event = ++fixture->events;
	return fixture->events;
}

static void on_closed(void *user)
{
	struct fixture *fixture = user;

	assert_false(fixture->closed);
	fixture->closed = true;
	loop_stop(fixture->loop);
}

static void on_broken(void *user, const char *reason)
{
	(void)user;
	fail_msg("%s", reason);
}

static const struct space_ops fixture_ops = {.complete = on_complete,
	.extents_added = on_added,
	.extents_dropped = on_dropped,
	.closed = on_closed,
	.broken = on_broken};

/* ---- from beginning to end ---- */

static void open_space(struct fixture *fixture)
{
	const struct space_memory memory = {.staging = fixture->staging, .staging_size = fixture->staging_size};

	if (space_open(fixture->space, &memory, fixture->text) < 0)
		fail_msg("%s", fixture->text);
}

static size_t view_size(const struct arena *arena)
{
	return arena->slots * arena->extent_size;
}

static void reserve_view(struct fixture *fixture)
{
	fixture->view = mmap(
		NULL, view_size(fixture->space->arena), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	assert_true(fixture->view != MAP_FAILED);
}

static void open_layout(struct fixture *fixture, const struct fixture_options *options)
{
	uint32_t rows;

	list_init(&fixture->calls);
	fixture->layout = fixture_layout(options);
	rows = fixture->layout.groups[0].layers * fixture->layout.groups[0].head_count;
	if (space_new(fixture->tenant, &fixture->layout, 7, &fixture_ops, fixture, &fixture->space, fixture->text) < 0)
		fail_msg("%s", fixture->text);
	fixture->staging_size = (size_t)rows * fixture->layout.max_tokens * sizeof(float);
	fixture->staging = calloc(1, fixture->staging_size);
	fixture->mapped = calloc(fixture->space->arena->slots, sizeof(bool));
	assert_true(fixture->staging && fixture->mapped);
	if (options->view)
		reserve_view(fixture);
	open_space(fixture);
}

struct fixture *fixture_new(const struct fixture_options *options)
{
	static const struct fixture_options none;
	const struct fixture_options *o = options ? options : &none;
	struct fixture *fixture = calloc(1, sizeof(*fixture));
	uint64_t pool_size = either(o->pool_size, 64 << 20);

	assert_non_null(fixture);
	assert_int_equal(loop_new(&fixture->loop), 0);
	assert_int_equal(executor_new(fixture->loop, &fixture->executor), 0);
	if (!o->kind)
		assert_int_equal(kind_host_new(&fixture->own_kind), 0);
	fixture->kind = o->kind ? o->kind : fixture->own_kind;
	assert_int_equal(pool_new(fixture->loop, fixture->executor, fixture->kind, pool_size,
				 (size_t)either(o->extent_size, 64 << 10), &fixture->pool),
		0);
	assert_int_equal(host_tier_new(fixture->pool, o->host_size, &fixture->tier), 0);
	assert_int_equal(tenant_new(fixture->pool, "test", either(o->device_max, pool_size), &fixture->tenant), 0);
	fixture->tenant->host.account->max = fixture->pool->host.account->max;
	open_layout(fixture, o);
	return fixture;
}

struct fixture *fixture_join(struct fixture *first, struct tenant *tenant, const struct fixture_options *options)
{
	static const struct fixture_options none;
	struct fixture *fixture = calloc(1, sizeof(*fixture));

	assert_non_null(fixture);
	fixture->first = first;
	fixture->loop = first->loop;
	fixture->executor = first->executor;
	fixture->kind = first->kind;
	fixture->pool = first->pool;
	fixture->tenant = tenant ? tenant : first->tenant;
	open_layout(fixture, options ? options : &none);
	return fixture;
}

void fixture_kill(struct fixture *fixture)
{
	space_kill(fixture->space);
	if (!fixture->closed)
		assert_int_equal(loop_run(fixture->loop), 0);
	assert_true(fixture->closed);
}

void fixture_forget_contexts(struct fixture *fixture, struct tenant *tenant)
{
	context_forget_all(tenant);
	while (executor_pending(fixture->executor))
		fixture_turn(fixture);
}

static void free_shared(struct fixture *fixture)
{
	const struct quota_account *account = fixture_account(fixture);

	fixture_forget_contexts(fixture, fixture->tenant);
	assert_int_equal(account->charged, 0);
	assert_int_equal(account->promised, 0);
	assert_int_equal(account->unreturned, 0);
	assert_int_equal(fixture->tenant->host.account->charged, 0);
	assert_int_equal(fixture->pool->quota.account->charged, 0);
	assert_int_equal(fixture->pool->quota.account->promised, 0);
	assert_int_equal(fixture->pool->live, 0);
	assert_int_equal(fixture->tenant->host.account->charged, 0);
	assert_int_equal(fixture->pool->host.account->charged, 0);
	fixture_audit(fixture);
}

void fixture_free(struct fixture *fixture)
{
	struct list *node;

	if (!fixture->closed)
		fixture_kill(fixture);
	if (!fixture->first)
		free_shared(fixture);
	while ((node = list_pop(&fixture->calls))) {
		request_deinit(&list_entry(node, struct call, node)->request);
		free(list_entry(node, struct call, node));
	}
	if (fixture->view)
		(void)munmap(fixture->view, view_size(fixture->space->arena));
	(void)space_free(fixture->space);
	if (!fixture->first) {
		(void)executor_free(fixture->executor);
		(void)host_tier_free(fixture->tier);
		(void)pool_free(fixture->pool);
		(void)tenant_free(fixture->tenant);
		(void)kind_free(fixture->own_kind);
		(void)loop_free(fixture->loop);
	}
	free(fixture->staging);
	free(fixture->mapped);
	free(fixture);
}

/* ---- calls ---- */

struct call *fixture_start(struct fixture *fixture, const struct kvg_sqe *sqe)
{
	struct call *call = calloc(1, sizeof(*call));

	assert_non_null(call);
	call->request.sqe = *sqe;
	list_init(&call->request.node);
	list_add_tail(&fixture->calls, &call->node);
	space_submit(fixture->space, &call->request);
	return call;
}

void fixture_wait(struct fixture *fixture, const struct call *call)
{
	fixture->waiting = call;
	if (!call->done)
		assert_int_equal(loop_run(fixture->loop), 0);
	fixture->waiting = NULL;
	assert_true(call->done);
}

static int finish_call(struct fixture *fixture, struct call *call)
{
	int status = call->request.cqe.status;

	fixture->cqe = call->request.cqe;
	(void)snprintf(fixture->text, sizeof(fixture->text), "%s", status < 0 ? call->request.text : "");
	list_remove(&call->node);
	request_deinit(&call->request);
	free(call);
	return status;
}

void fixture_acknowledge(struct fixture *fixture)
{
	struct kvg_sqe sqe = {.op = KVG_OP_UNMAPPED, .unmapped.event = fixture->dropped_event};
	struct call *call;

	if (fixture->acknowledged == fixture->dropped_event)
		return;
	fixture->acknowledged = fixture->dropped_event;
	call = fixture_start(fixture, &sqe);
	fixture_wait(fixture, call);
	assert_int_equal(call->request.cqe.status, 0);
}

int fixture_call(struct fixture *fixture, const struct kvg_sqe *sqe)
{
	struct call *call = fixture_start(fixture, sqe);

	fixture_wait(fixture, call);
	if (!fixture->hold_unmapped)
		fixture_acknowledge(fixture);
	return finish_call(fixture, call);
}

static void stop_loop(void *user)
{
	loop_stop(user);
}

void fixture_turn(struct fixture *fixture)
{
	struct loop_timer *timer;

	assert_int_equal(loop_timer_new(fixture->loop, stop_loop, fixture->loop, &timer), 0);
	loop_timer_set(timer, 1);
	assert_int_equal(loop_run(fixture->loop), 0);
	(void)loop_timer_free(timer);
}

uint32_t fixture_generation(const struct fixture *fixture, uint64_t handle)
{
	uint32_t slot = (uint32_t)handle;
	const struct kvg_slot *state = &fixture->space->table.slots[slot];

	return slot < fixture->layout.max_sequences && state->epoch == handle >> 32 ? state->generation : 0;
}

static struct kvg_sqe entry(const struct fixture *fixture, uint8_t op, uint64_t handle)
{
	return (struct kvg_sqe){.op = op, .seq = handle, .generation = fixture_generation(fixture, handle)};
}

int fixture_create(struct fixture *fixture, const struct kvg_policy *policy, uint64_t *ret_handle)
{
	struct kvg_sqe sqe = {.op = KVG_OP_CREATE, .create = *policy};
	int r = fixture_call(fixture, &sqe);

	if (r >= 0)
		*ret_handle = fixture->cqe.seq;
	return r;
}

int fixture_reserve(struct fixture *fixture, uint64_t handle, uint32_t tokens)
{
	struct kvg_sqe sqe = entry(fixture, KVG_OP_RESERVE, handle);

	sqe.reserve.tokens = tokens;
	return fixture_call(fixture, &sqe);
}

int fixture_commit(struct fixture *fixture, uint64_t handle, uint32_t pos)
{
	struct kvg_sqe sqe = entry(fixture, KVG_OP_COMMIT, handle);

	sqe.commit.pos = pos;
	return fixture_call(fixture, &sqe);
}

int fixture_truncate(struct fixture *fixture, uint64_t handle, uint32_t pos)
{
	struct kvg_sqe sqe = entry(fixture, KVG_OP_TRUNCATE, handle);

	sqe.truncate.pos = pos;
	return fixture_call(fixture, &sqe);
}

int fixture_evict(struct fixture *fixture, uint64_t handle, uint32_t mode)
{
	struct kvg_sqe sqe = entry(fixture, KVG_OP_EVICT, handle);

	sqe.evict.mode = mode;
	return fixture_call(fixture, &sqe);
}

int fixture_release(struct fixture *fixture, uint64_t handle)
{
	struct kvg_sqe sqe = entry(fixture, KVG_OP_FREE, handle);

	return fixture_call(fixture, &sqe);
}

int fixture_query(struct fixture *fixture, uint64_t handle)
{
	struct kvg_sqe sqe = entry(fixture, KVG_OP_QUERY, handle);

	return fixture_call(fixture, &sqe);
}

struct call *fixture_start_publish(struct fixture *fixture, uint64_t handle, uint32_t key)
{
	struct kvg_sqe sqe = entry(fixture, KVG_OP_PUBLISH, handle);

	memcpy(sqe.publish.key + 7, &key, sizeof(key));
	return fixture_start(fixture, &sqe);
}

int fixture_publish(struct fixture *fixture, uint64_t handle, uint32_t key)
{
	struct kvg_sqe sqe = entry(fixture, KVG_OP_PUBLISH, handle);

	memcpy(sqe.publish.key + 7, &key, sizeof(key));
	return fixture_call(fixture, &sqe);
}

uint64_t fixture_find(struct fixture *fixture, uint32_t key)
{
	struct kvg_sqe sqe = {.op = KVG_OP_FIND};

	memcpy(sqe.find.key + 7, &key, sizeof(key));
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	return fixture->cqe.value[0];
}

int fixture_attach(struct fixture *fixture, uint64_t context, const struct kvg_policy *policy, uint64_t *ret_handle)
{
	struct kvg_sqe sqe = {.op = KVG_OP_ATTACH, .seq = context, .attach = *policy};
	int r = fixture_call(fixture, &sqe);

	if (r >= 0)
		*ret_handle = fixture->cqe.seq;
	return r;
}

int fixture_fork(struct fixture *fixture, uint64_t handle, uint64_t *ret_handle)
{
	struct kvg_sqe sqe = entry(fixture, KVG_OP_FORK, handle);
	int r = fixture_call(fixture, &sqe);

	if (r >= 0)
		*ret_handle = fixture->cqe.value[1];
	return r;
}

int fixture_stage(struct fixture *fixture, uint64_t handle, uint32_t pos, uint32_t rows, const float *scores)
{
	const struct kvg_group *group = &fixture->layout.groups[0];
	size_t size = (size_t)group->layers * group->head_count * rows * sizeof(float);
	struct kvg_sqe sqe = entry(fixture, KVG_OP_STAGE, handle);

	assert_true(size <= fixture->staging_size);
	memcpy(fixture->staging, scores, size);
	sqe.stage.kind = KVG_STAGE_SCORE;
	sqe.stage.layer_count = group->layers;
	sqe.stage.pos = pos;
	sqe.stage.rows = rows;
	return fixture_call(fixture, &sqe);
}

/* ---- accounts ---- */

uint64_t fixture_physical(void *user, uint32_t index)
{
	const struct pool *pool = user;
	const struct extent *extent = pool->extents[index];

	return pool->kind->ops->physical(pool->kind, extent->fd, extent->meta->bytes);
}

void fixture_audit(struct fixture *fixture)
{
	struct audit audit;

	assert_int_equal(audit_run(fixture->pool->meta->fd, fixture_physical, fixture->pool, &audit), 0);
	for (size_t i = 0; i < audit.difference_count && i < AUDIT_DIFFERENCES; i++)
		print_error("audit: %s\n", audit.differences[i]);
	assert_int_equal(audit.difference_count, 0);
	audit_deinit(&audit);
}

const struct quota_account *fixture_account(const struct fixture *fixture)
{
	return fixture->tenant->quota.account;
}
