#include <errno.h>
#include <stdlib.h>
#include <string.h>

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

static int arena_fill(struct arena *arena)
{
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
	arena->base = arena->kind->reserve(arena->slots * arena->extent_size);
	return arena->base ? 0 : -ENOMEM;
}

size_t arena_extent_size(size_t pool_extent_size, size_t stride)
{
	size_t unit = 2 * stride * KVG_RUN_BLOCKS, page = 4096, a = unit, b = page;

	while (b) {
		size_t rest = a % b;

		a = b;
		b = rest;
	}
	unit = unit / a * page; /* least common multiple */
	return (pool_extent_size + unit - 1) / unit * unit;
}

int arena_new(const struct kind_ops *kind, const struct kvg_layout *layout, size_t pool_extent_size, uint32_t slots,
	struct arena **ret)
{
	struct arena *arena = calloc(1, sizeof(*arena));
	int r;

	if (!arena)
		return -ENOMEM;
	list_init(&arena->node);
	arena->refs = 1;
	arena->kind = kind;
	arena->layout = *layout;
	arena->slots = slots;
	arena->stride = arena_stride(&layout->groups[0]);
	arena->extent_size = arena_extent_size(pool_extent_size, arena->stride);
	arena->ids_per_extent = (uint32_t)(arena->extent_size / arena->stride);
	arena->blocks_per_extent = arena->ids_per_extent / 2;
	r = arena_fill(arena);
	if (r < 0) {
		(void)arena_unref(arena);
		return r;
	}
	*ret = arena;
	return 0;
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
	arena->kind->unreserve(arena->base, arena->slots * arena->extent_size);
	free(arena->extent_of_slot);
	free(arena->free_slots);
	free(arena);
	return NULL;
}
