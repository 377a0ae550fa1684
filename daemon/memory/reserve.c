#include "daemon/memory/reserve.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/base/log.h"
#include "proto/size.h"

#define PART     64u         /* extents of one job */
#define REST     19u         /* beside other jobs: how many times as long as a piece took it then rests */
#define RETRY_NS 1000000000u /* between attempts to create what could not be created */

/* Extents on their way to their end: the executor's from run() on. */
struct doom {
	struct job job;
	struct pool *pool;
	struct list extents;
};

void reserve_init(struct reserve *reserve, struct pool *pool, const struct quota *quota, uint32_t tenant)
{
	*reserve = (struct reserve){.pool = pool, .quota = quota, .tenant = tenant};
	list_init(&reserve->ready);
	list_init(&reserve->waiting);
	list_init(&reserve->made);
	pool->reserves[tenant] = reserve;
}

struct reserve *reserve_of(const struct pool *pool, uint32_t tenant)
{
	return tenant < META_MAX_TENANTS ? pool->reserves[tenant] : NULL;
}

uint64_t reserve_bytes(const struct reserve *reserve)
{
	return reserve->pool ? (uint64_t)reserve->count * reserve->pool->extent_size : 0;
}

/* Extents that should be raw when so much is charged. */
static uint32_t target_at(const struct reserve *reserve, uint64_t charged)
{
	uint64_t min = reserve->quota->account->min;

	return min > charged ? (uint32_t)((min - charged) / reserve->pool->extent_size) : 0;
}

static uint32_t target(const struct reserve *reserve)
{
	return target_at(reserve, reserve->quota->account->charged);
}

uint32_t reserve_wants(const struct reserve *reserve, uint64_t bytes)
{
	uint64_t charged = reserve->quota->account->charged;

	return target_at(reserve, charged > bytes ? charged - bytes : 0);
}

bool reserve_is_settled(const struct reserve *reserve)
{
	return !reserve->busy && reserve->count == target(reserve);
}

/* ---- the end of raw extents ---- */

static void close_raw(struct extent *raw)
{
	if (raw->fd >= 0)
		(void)close(raw->fd);
	free(raw);
}

/* Nobody else has ever had it, so that closing is all it takes. */
void reserve_destroy_doomed(struct pool *pool, size_t bytes)
{
	struct list *node;

	for (size_t gone = 0; gone < bytes && (node = list_pop(&pool->doomed)); gone += pool->extent_size)
		close_raw(list_entry(node, struct extent, node));
}

static void doom_run(struct job *job)
{
	struct doom *doom = list_entry(job, struct doom, job);
	struct list *node;

	while ((node = list_pop(&doom->extents)))
		list_add_tail(&doom->pool->doomed, node);
}

static bool doom_poll(struct job *job)
{
	struct pool *pool = list_entry(job, struct doom, job)->pool;
	const uint64_t begun = loop_now();

	while (!list_empty(&pool->doomed) && loop_now() - begun < executor_slice(pool->executor))
		reserve_destroy_doomed(pool, 1);
	return list_empty(&pool->doomed);
}

static void doom_done(struct job *job)
{
	free(list_entry(job, struct doom, job));
}

/* Batches that are submitted later find it among the doomed. */
static void doom_extents(struct pool *pool, struct list *extents)
{
	struct doom *doom = list_empty(extents) ? NULL : calloc(1, sizeof(*doom));
	struct list *node;

	if (!doom) {
		while ((node = list_pop(extents)))
			close_raw(list_entry(node, struct extent, node));
		return;
	}
	*doom = (struct doom){.job = {.run = doom_run, .poll = doom_poll, .done = doom_done}, .pool = pool};
	list_init(&doom->extents);
	while ((node = list_pop(extents)))
		list_add_tail(&doom->extents, node);
	executor_submit(pool->executor, &doom->job);
}

/* Takes a raw extent out of the metadata. */
static struct extent *forget(struct reserve *reserve)
{
	struct pool *pool = reserve->pool;
	struct extent *raw = list_entry(list_pop(&reserve->ready), struct extent, node);

	reserve->count--;
	pool->extents[raw->index] = NULL;
	pool->free_indices[pool->free_count++] = raw->index;
	*raw->meta = (struct meta_extent){0};
	return raw;
}

static void shrink(struct reserve *reserve, uint32_t to)
{
	struct list extents;

	list_init(&extents);
	while (reserve->count > to)
		list_add_tail(&extents, &forget(reserve)->node);
	doom_extents(reserve->pool, &extents);
}

void reserve_deinit(struct reserve *reserve)
{
	if (!reserve->pool)
		return;
	assert(!reserve->busy && list_empty(&reserve->waiting));
	while (reserve->count > 0)
		close_raw(forget(reserve));
	reserve->pool->reserves[reserve->tenant] = NULL;
	reserve->pool = NULL;
}

/* ---- creating ---- */

static void make_run(struct job *job)
{
	struct reserve *reserve = list_entry(job, struct reserve, job);

	reserve->next = reserve->made.next;
}

static bool make_poll(struct job *job)
{
	struct reserve *reserve = list_entry(job, struct reserve, job);
	struct kind *kind = reserve->pool->kind;
	const uint64_t begun = loop_now();

	if (atomic_load_explicit(&reserve->stop, memory_order_relaxed))
		return true;
	if (begun < reserve->rest_ns && executor_is_busy(reserve->pool->executor))
		return false;
	while (reserve->next != &reserve->made && !reserve->status &&
		loop_now() - begun < executor_slice(reserve->pool->executor)) {
		struct extent *raw = list_entry(reserve->next, struct extent, node);

		if (atomic_load_explicit(&reserve->stop, memory_order_relaxed))
			return true;
		raw->fd = kind->ops->create(kind, reserve->pool->extent_size);
		if (raw->fd < 0)
			reserve->status = raw->fd;
		reserve->next = reserve->next->next;
	}
	reserve->rest_ns = loop_now() + REST * (loop_now() - begun);
	return reserve->next == &reserve->made || reserve->status;
}

/* A raw extent gets its place in the metadata. */
static void add_ready(struct reserve *reserve, struct extent *raw)
{
	struct pool *pool = reserve->pool;

	raw->index = pool->free_indices[--pool->free_count];
	raw->meta = &pool->meta->extents[raw->index];
	raw->bitmap = meta_bitmap(pool->meta, raw->index);
	raw->places = meta_places(pool->meta, raw->index);
	*raw->meta = (struct meta_extent){.state = META_RAW,
		.tenant = reserve->tenant,
		.worker = UINT32_MAX,
		.slot = SLOT_NONE,
		.bytes = pool->extent_size};
	pool->extents[raw->index] = raw;
	list_add_tail(&reserve->ready, &raw->node);
	reserve->count++;
}

/* The memory of raw extents becomes that of a waiting batch's, as far as it fits. */
static void give_to(struct reserve *reserve, struct extent_batch *batch)
{
	for (struct list *node = batch->extents.next; node != &batch->extents; node = node->next) {
		struct extent *extent = list_entry(node, struct extent, node), *raw;

		if (extent->fd >= 0 || extent->arena->extent_size != reserve->pool->extent_size ||
			list_empty(&reserve->made))
			continue;
		raw = list_entry(list_pop(&reserve->made), struct extent, node);
		extent->fd = raw->fd;
		raw->fd = -1;
		close_raw(raw);
	}
}

/* What was made and is still wanted; the rest has its end. */
static void keep_made(struct reserve *reserve)
{
	struct list *node;

	shrink(reserve, target(reserve));
	while (reserve->count < target(reserve) && (node = list_pop(&reserve->made)))
		add_ready(reserve, list_entry(node, struct extent, node));
	doom_extents(reserve->pool, &reserve->made);
}

/* What the job did not come to is not there. */
static void drop_unmade(struct reserve *reserve)
{
	struct list *node = reserve->made.next;

	while (node != &reserve->made) {
		struct extent *raw = list_entry(node, struct extent, node);

		node = node->next;
		if (raw->fd >= 0)
			continue;
		list_remove(&raw->node);
		close_raw(raw);
	}
}

/* Once until it is all there: a second later the same may be so. */
static void report(struct reserve *reserve)
{
	char min[KVG_SIZE_TEXT], missing[KVG_SIZE_TEXT];

	if (reserve->reported)
		return;
	reserve->reported = true;
	log_error("%s: device.min %s: %s of it cannot be created: %s", reserve->quota->name,
		kvg_size_format(reserve->quota->account->min, min),
		kvg_size_format((target(reserve) - reserve->count) * (uint64_t)reserve->pool->extent_size, missing),
		strerror(-reserve->status));
}

static void make_done(struct job *job)
{
	struct reserve *reserve = list_entry(job, struct reserve, job);
	struct pool *pool = reserve->pool;
	struct list starting, *node;

	reserve->busy = false;
	drop_unmade(reserve);
	for (node = reserve->waiting.next; node != &reserve->waiting; node = node->next)
		give_to(reserve, list_entry(node, struct extent_batch, node));
	keep_made(reserve);
	list_init(&starting);
	while ((node = list_pop(&reserve->waiting)))
		list_add_tail(&starting, node);
	while ((node = list_pop(&starting)))
		extent_batch_start(list_entry(node, struct extent_batch, node));
	if (reserve->status < 0 && !pool->reserves_end && reserve->count < target(reserve)) {
		report(reserve);
		loop_timer_set(pool->reserve_timer, RETRY_NS);
	} else {
		reserve->status = 0;
		reserve->reported &= !reserve_is_settled(reserve);
		reserve_settle(reserve);
	}
	if (pool->reserve_ended)
		pool->reserve_ended(pool->reserve_user);
}

static void make(struct reserve *reserve, uint32_t count)
{
	for (uint32_t i = 0; i < count && i < PART; i++) {
		struct extent *raw = calloc(1, sizeof(*raw));

		if (!raw)
			break; /* the next job has them */
		raw->fd = -1;
		list_init(&raw->open);
		list_add_tail(&reserve->made, &raw->node);
	}
	reserve->status = list_empty(&reserve->made) ? -ENOMEM : 0;
	if (reserve->status < 0) {
		loop_timer_set(reserve->pool->reserve_timer, RETRY_NS);
		return;
	}
	atomic_store(&reserve->stop, false);
	reserve->busy = true;
	reserve->job = (struct job){.run = make_run, .poll = make_poll, .done = make_done, .background = true};
	executor_submit(reserve->pool->executor, &reserve->job);
}

void reserve_update(struct reserve *reserve)
{
	if (!reserve->pool || !reserve->pool->executor || reserve->pool->reserves_end)
		return;
	shrink(reserve, target(reserve)); /* also while a job is under way, which does not touch these */
	if (!reserve->busy && reserve->count < target(reserve))
		make(reserve, target(reserve) - reserve->count);
}

void reserve_settle(struct reserve *reserve)
{
	if (!reserve->busy && reserve->status == 0)
		reserve_update(reserve);
}

void reserve_retry(void *user)
{
	struct pool *pool = user;

	for (uint32_t i = 0; i < META_MAX_TENANTS; i++)
		if (pool->reserves[i] && !pool->reserves[i]->busy && pool->reserves[i]->status < 0)
			reserve_update(pool->reserves[i]);
}

void reserve_stop_all(struct pool *pool)
{
	pool->reserves_end = true;
	for (uint32_t i = 0; i < META_MAX_TENANTS; i++)
		if (pool->reserves[i])
			atomic_store(&pool->reserves[i]->stop, true);
}

/* ---- for the pool ---- */

void reserve_make_room(struct reserve *reserve, size_t extent_size)
{
	if (extent_size != reserve->pool->extent_size)
		shrink(reserve, target(reserve));
}

struct extent *reserve_take(struct reserve *reserve)
{
	if (list_empty(&reserve->ready))
		return NULL;
	reserve->count--;
	return list_entry(list_pop(&reserve->ready), struct extent, node);
}

bool reserve_delays(struct reserve *reserve, struct extent_batch *batch)
{
	if (!reserve->busy)
		return false;
	atomic_store(&reserve->stop, true);
	list_add_tail(&reserve->waiting, &batch->node);
	return true;
}
