/*
 * blocks.h - blocks of a worker's extents: who may take which, and when an
 * extent is empty.
 *
 * Nursery extents give runs of 8 consecutive blocks (a head's part of a
 * stripe), held extents single blocks; both are called units here. A
 * sequence that needs a whole extent gets it for itself, so that it drains
 * whole when the sequence is evicted or goes; only what is left of a need comes
 * from extents that the worker's sequences share. An extent whose last block is
 * given back joins the spare list, from which it is taken again for either
 * generation or returned to the pool by the caller.
 */
#ifndef KVG_BLOCKS_H
#define KVG_BLOCKS_H

#include "daemon/memory/pool.h"

/* Extents from which one sequence, or all of a worker's (the shared ones), may take units. */
struct block_owner {
	struct list open[2];    /* by generation: extents with free units */
	uint32_t free_units[2]; /* in them */
	uint32_t extents;       /* that name this owner */
	uint32_t slot_plus_one; /* what meta_extent.owner says */
};

struct block_space {
	struct arena *arena; /* borrowed */
	struct pool *pool;   /* borrowed */
	struct block_owner shared;
	struct block_owner closed; /* extents that are being emptied: nothing is taken from them */
	struct list extents;       /* with blocks in use */
	struct list spare;         /* without */
	uint32_t extent_count, spare_count;
	uint64_t used_blocks;
};

void block_owner_init(struct block_owner *owner, uint32_t slot_plus_one);

/* All blocks of the owner's sequence are given back; extents in which others have blocks become shared. */
void block_owner_deinit(struct block_space *space, struct block_owner *owner);

void block_space_init(struct block_space *space, struct pool *pool, struct arena *arena);

/* Adds a new extent to the spare list. */
void blocks_add_extent(struct block_space *space, struct extent *extent);

/*
 * Extents that must be added before `units` can be taken; the spare ones are counted in, but for those `withheld`.
 * ahead: units that the same owner will take soon, which decide with these whether it gets an extent for itself.
 */
uint32_t blocks_missing(const struct block_space *space, const struct block_owner *owner, unsigned generation,
	uint64_t units, uint64_t ahead, uint32_t withheld);

/* Takes units: ids[i] is a block, or the first of a run. blocks_missing() was 0. O(units). */
void blocks_take(struct block_space *space, struct block_owner *owner, unsigned generation, uint64_t units,
	uint64_t ahead, uint32_t *ids);

/* Free blocks in all of the worker's extents, whatever their generation. */
uint64_t blocks_free_anywhere(const struct block_space *space);

/* Takes single blocks from any extent: the way out when no extent can be had. blocks_free_anywhere() >= count. */
void blocks_take_anywhere(struct block_space *space, struct block_owner *owner, uint64_t count, uint32_t *ids);

/* The same for runs: free ones in all of the worker's extents, and taking `count` of them, of which there are that
 * many. */
uint64_t blocks_free_runs_anywhere(const struct block_space *space);
void blocks_take_runs_anywhere(struct block_space *space, struct block_owner *owner, uint64_t count, uint32_t *ids);

/* Takes blocks that already open held extents have free, the owner's first. There are that many. */
void blocks_take_open(struct block_space *space, struct block_owner *owner, uint64_t count, uint32_t *ids);

/* Nothing is taken from the extent any more; it joins the spare list with its last block. */
void blocks_close_extent(struct block_space *space, struct extent *extent);

void blocks_give(struct block_space *space, uint32_t id);
void blocks_give_run(struct block_space *space, uint32_t id);

/* The same for many: fastest where runs of one extent follow each other, as blocks_take() hands them out. */
void blocks_give_runs(struct block_space *space, const uint32_t *ids, uint64_t count);

/* The extent and the place metadata of a block. */
struct extent *blocks_extent(const struct block_space *space, uint32_t id);
static inline struct meta_place *blocks_places(const struct arena *arena, const struct meta *meta, uint32_t id)
{
	uint32_t slot = id / arena->ids_per_extent;

	return meta_places(meta, arena->extent_of_slot[slot]) +
	       (size_t)(id - slot * arena->ids_per_extent) * KVG_BLOCK_TOKENS;
}

#endif
