#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "daemon/memory/pool.h"

static size_t dtype_size(uint32_t dtype)
{
	return dtype == KVG_F32 ? 4 : 2;
}

size_t arena_stride(const struct kvg_group *group)
{
	size_t k = KVG_BLOCK_TOKENS * group->k_dim * dtype_size(group->k_dtype);
	size_t v = KVG_BLOCK_TOKENS * group->v_dim * dtype_size(group->v_dtype);

	return k > v ? k : v;
}

static size_t gcd(size_t a, size_t b)
{
	while (b) {
		size_t rest = a % b;

		a = b;
		b = rest;
	}
	return a;
}

size_t arena_extent_size(size_t pool_extent_size, size_t stride, size_t granularity)
{
	size_t run = 2 * stride * KVG_RUN_BLOCKS, unit;

	assert(run > 0 && granularity > 0);
	unit = run / gcd(run, granularity) * granularity; /* least common multiple */

	return (pool_extent_size + unit - 1) / unit * unit;
}

static struct arena *arena_free(struct arena *arena)
{
	free(arena->extent_of_slot);
	free(arena->free_slots);
	free(arena->pairs_fds);
	free(arena);
	return NULL;
}

static size_t chunk_count(const struct arena *arena)
{
	return arena->pairs_size / arena->kind->granularity;
}

/* Tables of slots, and on a kind with a device of the chunks that will back their pairs. */
static int arena_fill(struct arena *arena)
{
	size_t granularity = arena->kind->granularity;
	size_t pairs = (size_t)arena->slots * arena->blocks_per_extent * KVG_BLOCK_TOKENS * sizeof(struct meta_place);

	if ((uint64_t)arena->slots * arena->ids_per_extent > UINT32_MAX)
		return -EOVERFLOW; /* block ids have 32 bits */
	arena->extent_of_slot = malloc(arena->slots * sizeof(uint32_t));
	arena->free_slots = malloc(arena->slots * sizeof(uint32_t));
	if (!arena->extent_of_slot || !arena->free_slots)
		return -ENOMEM;
	for (uint32_t i = 0; i < arena->slots; i++) {
		arena->extent_of_slot[i] = SLOT_NONE;
		arena->free_slots[i] = arena->slots - 1 - i;
	}
	arena->free_count = arena->slots;
	if (!arena->kind->ops->device(arena->kind))
		return 0;
	arena->pairs_size = (pairs + granularity - 1) / granularity * granularity;
	arena->pairs_fds = malloc(chunk_count(arena) * sizeof(int));
	if (!arena->pairs_fds)
		return -ENOMEM;
	for (size_t i = 0; i < chunk_count(arena); i++)
		arena->pairs_fds[i] = -1;
	return 0;
}

/* As many extents as the pool can pay for. */
static uint32_t slots_of(const struct pool *pool, size_t extent_size)
{
	uint64_t slots = (uint64_t)pool->extent_count * pool->extent_size / extent_size;

	return slots ? (uint32_t)slots : 1;
}

int arena_new(struct pool *pool, const struct kvg_layout *layout, struct arena **ret)
{
	struct arena *arena = calloc(1, sizeof(*arena));
	int r;

	if (!arena)
		return -ENOMEM;
	list_init(&arena->node);
	arena->refs = 1;
	arena->pool = pool;
	arena->kind = pool->kind;
	arena->layout = *layout;
	arena->stride = arena_stride(&layout->groups[0]);
	arena->extent_size = arena_extent_size(pool->extent_size, arena->stride, arena->kind->granularity);
	arena->slots = slots_of(pool, arena->extent_size);
	arena->ids_per_extent = (uint32_t)(arena->extent_size / arena->stride);
	arena->blocks_per_extent = arena->ids_per_extent / 2;
	r = arena_fill(arena);
	if (r < 0) {
		(void)arena_free(arena);
		return r;
	}
	*ret = arena;
	return 0;
}

/* ---- on the executor ---- */

int arena_open(struct arena *arena)
{
	struct kind *kind = arena->kind;

	if (!arena->base)
		arena->base = kind->ops->reserve(kind, arena->slots * arena->extent_size);
	if (arena->base && arena->pairs_size && !arena->pairs)
		arena->pairs = kind->ops->reserve(kind, arena->pairs_size);
	return arena->base && (arena->pairs || !arena->pairs_size) ? 0 : -ENOMEM;
}

static void *chunk_address(const struct arena *arena, size_t chunk)
{
	return (uint8_t *)arena->pairs + chunk * arena->kind->granularity;
}

static int back_chunk(struct arena *arena, size_t chunk)
{
	struct kind *kind = arena->kind;
	size_t size = kind->granularity;
	int fd = kind->ops->create(kind, size), r;

	if (fd < 0)
		return fd;
	r = kind->ops->map(kind, fd, chunk_address(arena, chunk), size);
	if (r >= 0) {
		r = kind->ops->scrub(kind, chunk_address(arena, chunk), size);
		if (r < 0)
			(void)kind->ops->unmap(kind, chunk_address(arena, chunk), size);
	}
	if (r < 0) {
		(void)close(fd);
		return r;
	}
	arena->pairs_fds[chunk] = fd;
	arena->pairs_bytes += size;
	return 0;
}

int arena_back_pairs(struct arena *arena, uint32_t slot)
{
	size_t granularity = arena->kind->granularity;
	size_t each = arena->blocks_per_extent * KVG_BLOCK_TOKENS * sizeof(struct meta_place);
	int r = 0;

	if (!arena->pairs)
		return 0;
	for (size_t i = slot * each / granularity; r >= 0 && i * granularity < (slot + 1) * each; i++)
		if (arena->pairs_fds[i] < 0)
			r = back_chunk(arena, i);
	return r;
}

static void arena_close(struct arena *arena)
{
	struct kind *kind = arena->kind;

	for (size_t i = 0; i < chunk_count(arena); i++) {
		if (arena->pairs_fds[i] < 0)
			continue;
		(void)kind->ops->unmap(kind, chunk_address(arena, i), kind->granularity);
		(void)kind->ops->destroy(kind, arena->pairs_fds[i], kind->granularity);
	}
	kind->ops->unreserve(kind, arena->pairs, arena->pairs_size);
	kind->ops->unreserve(kind, arena->base, arena->slots * arena->extent_size);
}

static void close_run(struct job *job)
{
	arena_close(list_entry(job, struct arena, close_job));
}

/* ---- references ---- */

static void close_done(struct job *job)
{
	(void)arena_free(list_entry(job, struct arena, close_job));
}

struct arena *arena_ref(struct arena *arena)
{
	arena->refs++;
	return arena;
}

struct arena *arena_unref(struct arena *arena)
{
	if (!arena || --arena->refs)
		return NULL;
	list_remove(&arena->node);
	if (!arena->base)
		return arena_free(arena);
	if (!arena->pool->executor) {
		arena_close(arena);
		return arena_free(arena);
	}
	arena->close_job = (struct job){.run = close_run, .done = close_done};
	executor_submit(arena->pool->executor, &arena->close_job);
	return NULL;
}
