#include "daemon/memory/blocks.h"

#include <assert.h>

void block_owner_init(struct block_owner *owner, uint32_t slot_plus_one)
{
	*owner = (struct block_owner){.slot_plus_one = slot_plus_one};
	list_init(&owner->open[META_NURSERY]);
	list_init(&owner->open[META_HELD]);
}

void block_space_init(struct block_space *space, struct pool *pool, struct arena *arena)
{
	*space = (struct block_space){.arena = arena, .pool = pool};
	block_owner_init(&space->shared, 0);
	block_owner_init(&space->closed, 0);
	list_init(&space->extents);
	list_init(&space->spare);
}

struct extent *blocks_extent(const struct block_space *space, uint32_t id)
{
	return space->pool->extents[space->arena->extent_of_slot[id / space->arena->ids_per_extent]];
}

static uint32_t extent_free_units(const struct extent *extent)
{
	return extent->meta->generation == META_NURSERY ? extent->free_runs : extent->meta->blocks - extent->meta->used;
}

/* Puts the extent in its owner's open list or takes it out, as its free units have changed. */
static void update_open(struct extent *extent, uint32_t before)
{
	struct block_owner *owner = extent->owner;
	unsigned generation = extent->meta->generation;
	uint32_t after = extent_free_units(extent);

	owner->free_units[generation] += after - before;
	if (after == 0 && !list_empty(&extent->open))
		list_remove(&extent->open);
	else if (after > 0 && list_empty(&extent->open))
		list_add_tail(&owner->open[generation], &extent->open);
}

static void set_owner(struct extent *extent, struct block_owner *owner, unsigned generation)
{
	extent->owner = owner;
	extent->meta->owner = owner->slot_plus_one;
	extent->meta->generation = generation;
	owner->extents++;
	update_open(extent, 0);
}

static void clear_owner(struct extent *extent)
{
	extent->owner->free_units[extent->meta->generation] -= extent_free_units(extent);
	extent->owner->extents--;
	list_remove(&extent->open);
	extent->owner = NULL;
	extent->meta->owner = 0;
}

void block_owner_deinit(struct block_space *space, struct block_owner *owner)
{
	if (owner->extents == 0)
		return;
	for (struct list *node = space->extents.next; node != &space->extents; node = node->next) {
		struct extent *extent = list_entry(node, struct extent, node);
		unsigned generation = extent->meta->generation;

		if (extent->owner != owner)
			continue;
		clear_owner(extent);
		set_owner(extent, &space->shared, generation);
	}
	assert(owner->extents == 0);
}

void blocks_add_extent(struct block_space *space, struct extent *extent)
{
	extent->meta->state = META_LIVE;
	list_add_tail(&space->spare, &extent->node);
	space->spare_count++;
	space->extent_count++;
}

static uint32_t units_per_extent(const struct block_space *space, unsigned generation)
{
	uint32_t blocks = space->arena->blocks_per_extent;

	return generation == META_NURSERY ? blocks / KVG_RUN_BLOCKS : blocks;
}

/* Extents that the owner gets for itself, when `rest` units lack and `ahead` more will be taken. */
static uint64_t own_extents(uint64_t rest, uint64_t ahead, uint32_t each)
{
	uint64_t touched = (rest + each - 1) / each, filled = (rest + ahead) / each;

	return touched < filled ? touched : filled;
}

uint32_t blocks_missing(const struct block_space *space, const struct block_owner *owner, unsigned generation,
	uint64_t units, uint64_t ahead, uint32_t withheld)
{
	uint32_t each = units_per_extent(space, generation), spare = space->spare_count;
	uint64_t rest = units > owner->free_units[generation] ? units - owner->free_units[generation] : 0;
	uint64_t extents = own_extents(rest, ahead, each);

	rest = rest > extents * each ? rest - extents * each : 0;
	if (rest > (owner == &space->shared ? 0 : space->shared.free_units[generation]))
		extents++;
	spare = spare > withheld ? spare - withheld : 0;
	return extents > spare ? (uint32_t)(extents - spare) : 0;
}

static uint32_t block_id(const struct extent *extent, uint32_t block)
{
	return extent->meta->slot * extent->arena->ids_per_extent + block;
}

static uint64_t take_runs(struct extent *extent, uint64_t units, uint32_t *ids)
{
	uint32_t bytes = extent->meta->blocks / KVG_RUN_BLOCKS;
	uint64_t taken = 0;

	for (uint32_t i = extent->hint; taken < units && extent->free_runs; i = i + 1 == bytes ? 0 : i + 1) {
		extent->hint = i;
		if (extent->bitmap[i])
			continue;
		extent->bitmap[i] = 0xff;
		extent->free_runs--;
		extent->meta->used += KVG_RUN_BLOCKS;
		ids[taken++] = block_id(extent, i * KVG_RUN_BLOCKS);
	}
	return taken;
}

static uint64_t take_blocks(struct extent *extent, uint64_t units, uint32_t *ids)
{
	uint32_t bytes = extent->meta->blocks / KVG_RUN_BLOCKS;
	uint64_t taken = 0;

	for (uint32_t i = extent->hint; taken < units && extent->meta->used < extent->meta->blocks;
		i = i + 1 == bytes ? 0 : i + 1) {
		extent->hint = i;
		extent->free_runs -= extent->bitmap[i] == 0;
		if (extent->bitmap[i] == 0 && units - taken >= KVG_RUN_BLOCKS) {
			for (uint32_t k = 0; k < KVG_RUN_BLOCKS; k++)
				ids[taken++] = block_id(extent, i * KVG_RUN_BLOCKS + k);
			extent->bitmap[i] = 0xff;
			extent->meta->used += KVG_RUN_BLOCKS;
		}
		while (extent->bitmap[i] != 0xff && taken < units) {
			unsigned bit = (unsigned)__builtin_ctz(~(unsigned)extent->bitmap[i]);

			extent->bitmap[i] |= (uint8_t)(1u << bit);
			extent->meta->used++;
			ids[taken++] = block_id(extent, i * KVG_RUN_BLOCKS + bit);
		}
	}
	return taken;
}

static uint64_t take_from(struct block_space *space, struct extent *extent, bool runs, uint64_t units, uint32_t *ids)
{
	uint32_t before = extent_free_units(extent), used = extent->meta->used;
	uint64_t taken = runs ? take_runs(extent, units, ids) : take_blocks(extent, units, ids);

	space->used_blocks += extent->meta->used - used;
	update_open(extent, before);
	return taken;
}

/* From the owner's open extents, until there are no more. */
static uint64_t take_open(
	struct block_space *space, struct block_owner *owner, unsigned generation, uint64_t units, uint32_t *ids)
{
	uint64_t taken = 0;

	while (taken < units && !list_empty(&owner->open[generation])) {
		struct extent *extent = list_entry(owner->open[generation].next, struct extent, open);

		taken += take_from(space, extent, generation == META_NURSERY, units - taken, ids + taken);
	}
	return taken;
}

static void open_spare(struct block_space *space, struct block_owner *owner, unsigned generation)
{
	struct extent *extent = list_entry(list_pop(&space->spare), struct extent, node);

	assert(space->spare_count > 0);
	space->spare_count--;
	list_add_tail(&space->extents, &extent->node);
	extent->hint = 0;
	set_owner(extent, owner, generation);
}

void blocks_take(struct block_space *space, struct block_owner *owner, unsigned generation, uint64_t units,
	uint64_t ahead, uint32_t *ids)
{
	uint32_t each = units_per_extent(space, generation);
	uint64_t taken = take_open(space, owner, generation, units, ids);
	uint64_t own = own_extents(units - taken, ahead, each);

	for (; own > 0; own--) {
		open_spare(space, owner, generation);
		taken += take_open(space, owner, generation, units - taken, ids + taken);
	}
	if (units - taken > space->shared.free_units[generation])
		open_spare(space, &space->shared, generation);
	taken += take_open(space, &space->shared, generation, units - taken, ids + taken);
	assert(taken == units);
}

uint64_t blocks_free_anywhere(const struct block_space *space)
{
	return (uint64_t)space->extent_count * space->arena->blocks_per_extent - space->used_blocks;
}

static void take_anywhere(
	struct block_space *space, struct block_owner *owner, unsigned generation, uint64_t count, uint32_t *ids)
{
	uint64_t taken = 0;

	while (taken < count && !list_empty(&space->spare)) {
		open_spare(space, owner, generation);
		taken += take_open(space, owner, generation, count - taken, ids + taken);
	}
	for (struct list *node = space->extents.next; node != &space->extents && taken < count; node = node->next)
		taken += take_from(space, list_entry(node, struct extent, node), generation == META_NURSERY,
			count - taken, ids + taken);
	assert(taken == count);
}

void blocks_take_anywhere(struct block_space *space, struct block_owner *owner, uint64_t count, uint32_t *ids)
{
	take_anywhere(space, owner, META_HELD, count, ids);
}

uint64_t blocks_free_runs_anywhere(const struct block_space *space)
{
	uint64_t runs = (uint64_t)space->spare_count * units_per_extent(space, META_NURSERY);

	for (const struct list *node = space->extents.next; node != &space->extents; node = node->next)
		runs += list_entry(node, struct extent, node)->free_runs;
	return runs;
}

void blocks_take_runs_anywhere(struct block_space *space, struct block_owner *owner, uint64_t count, uint32_t *ids)
{
	take_anywhere(space, owner, META_NURSERY, count, ids);
}

void blocks_take_open(struct block_space *space, struct block_owner *owner, uint64_t count, uint32_t *ids)
{
	uint64_t taken = take_open(space, owner, META_HELD, count, ids);

	taken += take_open(space, &space->shared, META_HELD, count - taken, ids + taken);
	assert(taken == count);
}

void blocks_close_extent(struct block_space *space, struct extent *extent)
{
	unsigned generation = extent->meta->generation;

	clear_owner(extent);
	set_owner(extent, &space->closed, generation);
}

static void clear(struct extent *extent, uint32_t block, uint8_t mask)
{
	uint8_t *byte = &extent->bitmap[block / KVG_RUN_BLOCKS];

	assert((*byte & mask) == mask);
	*byte = (uint8_t)(*byte & ~mask);
	extent->free_runs += *byte == 0;
}

/* `count` blocks were given back; before: the extent's free units until then. */
static void given(struct block_space *space, struct extent *extent, uint32_t count, uint32_t before)
{
	extent->meta->used -= count;
	space->used_blocks -= count;
	update_open(extent, before);
	if (extent->meta->used == 0) {
		clear_owner(extent);
		list_remove(&extent->node);
		list_add_tail(&space->spare, &extent->node);
		space->spare_count++;
	}
}

void blocks_give(struct block_space *space, uint32_t id)
{
	struct extent *extent = blocks_extent(space, id);
	uint32_t block = id % space->arena->ids_per_extent, before = extent_free_units(extent);

	clear(extent, block, (uint8_t)(1u << block % KVG_RUN_BLOCKS));
	given(space, extent, 1, before);
}

void blocks_give_run(struct block_space *space, uint32_t id)
{
	blocks_give_runs(space, &id, 1);
}

void blocks_give_runs(struct block_space *space, const uint32_t *ids, uint64_t count)
{
	uint32_t each = space->arena->ids_per_extent;

	for (uint64_t i = 0, first; i < count;) {
		struct extent *extent = blocks_extent(space, ids[i]);
		uint32_t begin = ids[i] / each * each, before = extent_free_units(extent);

		for (first = i; i < count && ids[i] - begin < each; i++)
			clear(extent, ids[i] - begin, 0xff);
		given(space, extent, (uint32_t)(i - first) * KVG_RUN_BLOCKS, before);
	}
}
