#include "daemon/memory/pool.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/memory/reserve.h"

#define GAP_NS   100000u    /* after which a pass of the executor is another one */
#define PART     8u         /* extents, at least, that are handed over together while a batch goes on, when it has */
#define PART_NS  1000000u   /* worked on them that long */
#define RETRY_NS 100000000u /* between attempts to destroy an extent that a stale mapping keeps alive */

static void retry_busy(void *user);

static int pool_fill(struct pool *pool, struct loop *loop, uint64_t size)
{
	int r;

	pool->free_indices = malloc(pool->extent_count * sizeof(uint32_t));
	pool->extents = calloc(pool->extent_count, sizeof(struct extent *));
	if (!pool->free_indices || !pool->extents)
		return -ENOMEM;
	for (uint32_t i = 0; i < pool->extent_count; i++)
		pool->free_indices[i] = pool->extent_count - 1 - i;
	pool->free_count = pool->extent_count;
	r = loop_timer_new(loop, retry_busy, pool, &pool->timer);
	if (r >= 0)
		r = loop_timer_new(loop, reserve_retry, pool, &pool->reserve_timer);
	if (r >= 0)
		r = meta_new(size, pool->extent_size, (uint32_t)pool->kind->granularity, &pool->meta);
	if (r < 0)
		return r;
	pool->quota = (struct quota){.name = "pool", .tier = "device", .account = &pool->meta->header->pool};
	pool->quota.account->max = size;
	pool->host = (struct quota){.name = "pool", .tier = "host", .account = &pool->meta->header->host};
	return 0;
}

int pool_new(struct loop *loop, struct executor *executor, struct kind *kind, uint64_t size, size_t extent_size,
	struct pool **ret)
{
	struct pool *pool = calloc(1, sizeof(*pool));
	int r;

	if (!pool)
		return -ENOMEM;
	size = size / extent_size * extent_size;
	pool->kind = kind;
	pool->executor = executor;
	pool->extent_size = extent_size;
	pool->extent_count = (uint32_t)(size / extent_size);
	list_init(&pool->busy);
	list_init(&pool->doomed);
	r = pool_fill(pool, loop, size);
	if (r < 0) {
		(void)pool_free(pool);
		return r;
	}
	*ret = pool;
	return 0;
}

static struct extent *extent_free(struct extent *extent)
{
	list_remove(&extent->node);
	list_remove(&extent->open);
	(void)arena_unref(extent->arena);
	free(extent);
	return NULL;
}

struct pool *pool_free(struct pool *pool)
{
	struct list *node;

	if (!pool)
		return NULL;
	pool->executor = NULL; /* arenas that go with the last busy extent are closed here and now */
	while ((node = list_pop(&pool->busy))) {
		struct extent *extent = list_entry(node, struct extent, node);

		extent_release(pool, extent, 0);
	}
	for (uint32_t i = 0; i < META_MAX_TENANTS; i++)
		if (pool->reserves[i])
			reserve_deinit(pool->reserves[i]);
	pool->timer = loop_timer_free(pool->timer);
	pool->reserve_timer = loop_timer_free(pool->reserve_timer);
	(void)meta_free(pool->meta);
	free(pool->free_indices);
	free(pool->extents);
	free(pool);
	return NULL;
}

struct extent_batch *extent_batch_new(struct pool *pool, void (*done)(struct extent_batch *batch), void *user)
{
	struct extent_batch *batch = calloc(1, sizeof(*batch));

	if (!batch)
		return NULL;
	batch->pool = pool;
	batch->done = done;
	batch->user = user;
	list_init(&batch->node);
	list_init(&batch->extents);
	return batch;
}

struct extent_batch *extent_batch_free(struct extent_batch *batch)
{
	free(batch);
	return NULL;
}

static struct extent *extent_unborn(struct pool *pool)
{
	struct extent *extent = calloc(1, sizeof(*extent));

	if (!extent)
		return NULL;
	list_init(&extent->node);
	list_init(&extent->open);
	extent->index = pool->free_indices[--pool->free_count];
	extent->fd = -1;
	return extent;
}

/* raw: what it is made of, or NULL. */
static struct extent *extent_new(struct pool *pool, struct extent *raw, struct arena *arena, struct quota *quota,
	uint32_t tenant, uint32_t worker)
{
	struct extent *extent = raw ? raw : extent_unborn(pool);

	if (!extent)
		return NULL;
	extent->arena = arena_ref(arena);
	extent->quota = quota;
	extent->meta = &pool->meta->extents[extent->index];
	extent->bitmap = meta_bitmap(pool->meta, extent->index);
	extent->places = meta_places(pool->meta, extent->index);
	extent->free_runs = arena->blocks_per_extent / KVG_RUN_BLOCKS;
	memset(extent->bitmap, 0, pool->meta->header->bitmap_size);
	*extent->meta = (struct meta_extent){.state = META_BORN,
		.tenant = tenant,
		.worker = worker,
		.slot = arena->free_slots[--arena->free_count],
		.blocks = arena->blocks_per_extent};
	arena->extent_of_slot[extent->meta->slot] = extent->index;
	extent->meta->bytes = arena->extent_size;
	pool->extents[extent->index] = extent;
	pool->live++;
	return extent;
}

void extent_release(struct pool *pool, struct extent *extent, uint64_t to_promise)
{
	struct arena *arena = extent->arena;
	struct reserve *reserve = reserve_of(pool, extent->meta->tenant);

	if (extent->fd >= 0)
		(void)close(extent->fd); /* it was never mapped, or nothing can be waited for any more */
	if (extent->meta->state == META_DROPPED)
		quota_unreturned_sub(extent->quota, arena->extent_size);
	quota_refund_to_promise(extent->quota, arena->extent_size, to_promise);
	pool->extents[extent->index] = NULL;
	arena->extent_of_slot[extent->meta->slot] = SLOT_NONE;
	arena->free_slots[arena->free_count++] = extent->meta->slot;
	pool->free_indices[pool->free_count++] = extent->index;
	pool->live--;
	*extent->meta = (struct meta_extent){0};
	(void)extent_free(extent);
	if (reserve)
		reserve_settle(reserve);
}

int extent_batch_add_new(struct extent_batch *batch, struct arena *arena, struct quota *quota, uint32_t tenant,
	uint32_t worker, uint32_t count)
{
	struct pool *pool = batch->pool;
	struct reserve *reserve = reserve_of(pool, tenant);
	uint32_t raw = 0;

	batch->reserve = reserve;
	if (reserve) {
		reserve_make_room(reserve, arena->extent_size);
		raw = arena->extent_size == pool->extent_size ? reserve->count : 0;
	}
	if ((uint64_t)pool->free_count + raw < count || arena->free_count < count)
		return -ENOSPC;
	for (uint32_t i = 0; i < count; i++) {
		struct extent *extent =
			extent_new(pool, i < raw ? reserve_take(reserve) : NULL, arena, quota, tenant, worker);

		if (!extent)
			return -ENOMEM;
		list_add_tail(&batch->extents, &extent->node);
		batch->count++;
	}
	return 0;
}

static uint8_t *extent_address(const struct extent *extent)
{
	return extent->arena->base + (size_t)extent->meta->slot * extent->arena->extent_size;
}

/* Zeroes it, or begins to. */
static int scrub_new(struct extent_batch *batch, const struct extent *extent)
{
	struct kind *kind = batch->pool->kind;
	size_t size = extent->arena->extent_size;
	int64_t number;

	if (!kind->ops->scrub_begin)
		return kind->ops->scrub(kind, extent_address(extent), size);
	number = kind->ops->scrub_begin(kind, extent_address(extent), size);
	if (number < 0)
		return (int)number;
	batch->scrub = number;
	return 0;
}

static int map_new(struct extent_batch *batch, const struct extent *extent)
{
	struct kind *kind = batch->pool->kind;
	size_t size = extent->arena->extent_size;
	int r = kind->ops->map(kind, extent->fd, extent_address(extent), size);

	if (r < 0)
		return r;
	r = scrub_new(batch, extent);
	if (r < 0)
		(void)kind->ops->unmap(kind, extent_address(extent), size);
	return r;
}

static int create_one(struct extent_batch *batch, struct extent *extent)
{
	struct pool *pool = batch->pool;
	struct arena *arena = extent->arena;
	int r = arena_open(arena);

	if (r >= 0)
		r = arena_back_pairs(arena, extent->meta->slot);
	if (r >= 0 && extent->fd < 0) {
		reserve_destroy_doomed(pool, arena->extent_size);
		extent->fd = pool->kind->ops->create(pool->kind, arena->extent_size);
		r = extent->fd < 0 ? extent->fd : 0;
	}
	if (r >= 0)
		r = map_new(batch, extent);
	if (r >= 0 && !pool->kind->ops->device(pool->kind))
		meta_populate_places(pool->meta, extent->index, arena->blocks_per_extent);
	if (r < 0 && extent->fd >= 0) {
		(void)close(extent->fd);
		extent->fd = -1;
	}
	return r;
}

static void destroy_one(struct extent_batch *batch, struct extent *extent)
{
	struct pool *pool = batch->pool;
	struct kind *kind = pool->kind;

	if (extent->fd < 0)
		return;
	/* What is still mapped keeps its slot, and is tried again like a busy one. */
	if (kind->ops->unmap(kind, extent_address(extent), extent->arena->extent_size) < 0)
		return;
	if (batch->forget) {
		batch->forget--;
		meta_forget_places(pool->meta, extent->index);
	}
	if (kind->ops->destroy(kind, extent->fd, extent->arena->extent_size) == 0)
		extent->fd = -1;
}

static void batch_run(struct job *job)
{
	struct extent_batch *batch = list_entry(job, struct extent_batch, job);

	batch->next = batch->extents.next;
	batch->created = 0;
	batch->part_ns = 0;
	batch->scrub = 0;
}

/* Whether the batch, or a part of it, has been worked through. */
static bool is_through(const struct extent_batch *batch)
{
	return batch->next == &batch->extents || (batch->part && batch->created >= PART && batch->part_ns >= PART_NS);
}

/* The next extent of the batch that a poll takes on, within its slice of time; NULL when the slice or the batch is
 * over.
 */
static struct extent *batch_next(struct extent_batch *batch, uint64_t begun)
{
	struct list *node = batch->next;

	if (is_through(batch) || loop_now() - begun > executor_slice(batch->pool->executor))
		return NULL;
	batch->next = node->next;
	return list_entry(node, struct extent, node);
}

/*
 * However many batches there are, one slice of time is all that they have together in a pass of the executor over its
 * polled jobs: when it is used up, those that come later queue up, and the one whose last turn is longest ago is
 * next. A pass is new when the batch that had the last turn is asked again, or after a while.
 */
static bool has_turn(struct extent_batch *batch, uint64_t now)
{
	struct pool *pool = batch->pool;

	if (pool->sliced == batch || now - pool->slice_end_ns >= GAP_NS)
		pool->slice_used_ns = 0;
	if (pool->slice_used_ns >= executor_slice(pool->executor) || (pool->waiting && pool->waiting != batch)) {
		if (!pool->waiting || batch->slice_ns < pool->waiting->slice_ns)
			pool->waiting = batch;
		return false;
	}
	pool->waiting = NULL;
	batch->slice_ns = now;
	return true;
}

/* The end of a turn: whether the batch is through. */
static bool end_slice(struct extent_batch *batch)
{
	struct pool *pool = batch->pool;
	bool over = is_through(batch);

	pool->sliced = over ? NULL : batch;
	pool->slice_end_ns = loop_now();
	pool->slice_used_ns += pool->slice_end_ns - batch->slice_ns;
	batch->part_ns += pool->slice_end_ns - batch->slice_ns;
	return over;
}

/* Nobody gets memory that is not zeroed. */
static bool is_scrubbed(struct extent_batch *batch)
{
	struct kind *kind = batch->pool->kind;
	int r = batch->scrub ? kind->ops->scrub_poll(kind, batch->scrub) : 0;

	if (r == -EAGAIN)
		return false;
	if (r < 0 && !batch->status)
		batch->status = r;
	return true;
}

static bool create_poll(struct job *job)
{
	struct extent_batch *batch = list_entry(job, struct extent_batch, job);
	const uint64_t begun = loop_now();
	struct extent *extent;

	if (is_through(batch))
		return is_scrubbed(batch);
	if (!has_turn(batch, begun))
		return false;
	while ((extent = batch_next(batch, begun))) {
		int r = create_one(batch, extent);

		if (r < 0 && !batch->status)
			batch->status = r;
		batch->created++;
	}
	return end_slice(batch) && is_scrubbed(batch);
}

static bool destroy_poll(struct job *job)
{
	struct extent_batch *batch = list_entry(job, struct extent_batch, job);
	const uint64_t begun = loop_now();
	struct extent *extent;

	if (!has_turn(batch, begun))
		return false;
	while ((extent = batch_next(batch, begun)))
		destroy_one(batch, extent);
	return end_slice(batch);
}

/* The extents before `next` are there; it goes on with the others. */
static void hand_over(struct extent_batch *batch)
{
	struct list part;

	list_init(&part);
	while (batch->extents.next != batch->next)
		list_add_tail(&part, list_pop(&batch->extents));
	batch->part(batch, &part);
	executor_submit(batch->pool->executor, &batch->job);
}

static void create_done(struct job *job)
{
	struct extent_batch *batch = list_entry(job, struct extent_batch, job);

	if (!batch->status && batch->next != &batch->extents) {
		hand_over(batch);
		return;
	}
	if (!batch->status) {
		batch->pool->batches--;
		batch->done(batch);
		return;
	}
	/* What could be created is destroyed again before the batch is reported. */
	batch->pool->batches--;
	extent_batch_destroy(batch);
}

static void destroy_done(struct job *job)
{
	struct extent_batch *batch = list_entry(job, struct extent_batch, job);
	struct pool *pool = batch->pool;
	struct list *node = batch->extents.next;

	while (node != &batch->extents) {
		struct extent *extent = list_entry(node, struct extent, node);

		node = node->next;
		if (extent->fd < 0)
			continue;
		if (extent->meta->state != META_DROPPED) {
			extent->meta->state = META_DROPPED;
			quota_unreturned_add(extent->quota, extent->arena->extent_size);
		}
		list_remove(&extent->node);
		list_add_tail(&pool->busy, &extent->node);
		loop_timer_set(pool->timer, RETRY_NS);
	}
	pool->batches--;
	pool->destroying--;
	batch->done(batch);
}

void extent_batch_start(struct extent_batch *batch)
{
	batch->job = (struct job){.run = batch_run, .poll = create_poll, .done = create_done};
	executor_submit(batch->pool->executor, &batch->job);
}

void extent_batch_create(struct extent_batch *batch)
{
	batch->pool->batches++;
	if (!batch->reserve || !reserve_delays(batch->reserve, batch))
		extent_batch_start(batch);
}

/*
 * The last extents are those whose indices the tenant's reserve takes next: their places stay as its memory does, 128
 * bytes a block. To create them anew would take as long as all else about an extent of a min.
 */
static uint32_t places_to_forget(const struct extent_batch *batch)
{
	const struct reserve *reserve = NULL;
	uint32_t count = 0, wanted;
	uint64_t bytes = 0;

	for (const struct list *node = batch->extents.next; node != &batch->extents; node = node->next) {
		const struct meta_extent *meta = list_entry(node, struct extent, node)->meta;

		reserve = reserve_of(batch->pool, meta->tenant);
		bytes += meta->bytes;
		count++;
	}
	wanted = reserve ? reserve_wants(reserve, bytes) : 0;
	return count > wanted ? count - wanted : 0;
}

void extent_batch_destroy(struct extent_batch *batch)
{
	batch->forget = places_to_forget(batch);
	batch->job = (struct job){.run = batch_run, .poll = destroy_poll, .done = destroy_done};
	batch->pool->batches++;
	batch->pool->destroying++;
	executor_submit(batch->pool->executor, &batch->job);
}

static void retried(struct extent_batch *batch)
{
	struct list *node = batch->extents.next;

	while (node != &batch->extents) {
		struct extent *extent = list_entry(node, struct extent, node);

		node = node->next;
		extent_release(batch->pool, extent, 0);
	}
	batch->pool->reapers--;
	(void)extent_batch_free(batch);
}

static void retry_busy(void *user)
{
	struct pool *pool = user;
	struct extent_batch *batch = extent_batch_new(pool, retried, NULL);
	struct list *node;

	if (!batch) {
		loop_timer_set(pool->timer, RETRY_NS);
		return;
	}
	while ((node = list_pop(&pool->busy)))
		list_add_tail(&batch->extents, node);
	pool->reapers++;
	extent_batch_destroy(batch);
}
