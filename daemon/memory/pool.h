/*
 * pool.h - the device's memory: extents, the arenas in which they are mapped,
 * and their creation and destruction on the executor.
 *
 * Ownership: an extent belongs to one tenant for its whole life and holds
 * blocks of one worker. It is charged to its tenant before it is created and
 * refunded when its bytes are gone. The reactor owns all structures; a batch owns
 * its extents while it is on the executor.
 */
#ifndef KVG_POOL_H
#define KVG_POOL_H

#include "daemon/base/list.h"
#include "daemon/loop/executor.h"
#include "daemon/memory/kind.h"
#include "daemon/memory/meta.h"
#include "daemon/quota/quota.h"

#define SLOT_NONE UINT32_MAX

/* One address range for each (tenant, layout). Extent slots come and go, addresses stay. */
struct arena {
	struct list node; /* in its tenant's list */
	unsigned refs;
	const struct kind_ops *kind;
	struct kvg_layout layout;
	uint8_t *base;
	size_t extent_size; /* a multiple of the pool's, see arena_extent_size() */
	size_t stride;
	uint32_t slots;
	uint32_t ids_per_extent; /* twice the blocks: K and V share the numbering */
	uint32_t blocks_per_extent;
	uint32_t *extent_of_slot; /* extent index or SLOT_NONE */
	uint32_t *free_slots, free_count;
};

/* Places of K and V of one token: see kvgate_abi.h. */
size_t arena_stride(const struct kvg_group *group);

/* The least size from the pool's extent size on that holds whole runs of blocks in whole pages. */
size_t arena_extent_size(size_t pool_extent_size, size_t stride);
int arena_new(const struct kind_ops *kind, const struct kvg_layout *layout, size_t pool_extent_size, uint32_t slots,
	struct arena **ret);
struct arena *arena_ref(struct arena *arena);
struct arena *arena_unref(struct arena *arena); /* unlinks and frees with the last reference; returns NULL */

struct block_owner;

struct extent {
	struct list node; /* in the list that its state and owner say */
	struct list open; /* in its owner's open list while it has room */
	struct meta_extent *meta;
	struct arena *arena; /* a reference */
	struct quota *quota;
	struct block_owner *owner; /* whose blocks may be taken from it, see blocks.h */
	uint8_t *bitmap;
	struct meta_place *places;
	uint32_t index;
	uint32_t free_runs;
	uint32_t hint;    /* byte of the bitmap to look at first */
	uint32_t counted; /* blocks of the sequence that an eviction looks at; 0 outside of that */
	int fd;
};

struct pool {
	struct quota quota;
	struct meta *meta;
	const struct kind_ops *kind;
	struct executor *executor;
	struct loop_timer *timer; /* retries the destruction of busy extents */
	struct list busy;
	size_t extent_size;
	uint32_t extent_count;   /* capacity */
	uint32_t live;           /* extents that exist */
	struct extent **extents; /* by index */
	uint32_t *free_indices, free_count;
	unsigned batches; /* under way */
	unsigned reapers; /* of them, retries of busy extents */
};

int pool_new(struct loop *loop, struct executor *executor, const struct kind_ops *kind, uint64_t size,
	size_t extent_size, struct pool **ret);
struct pool *pool_free(struct pool *pool); /* no batch is under way */

/*
 * Extents that are created or destroyed together. done() runs on the reactor, empties the list
 * and frees the batch. status: 0, or the first error of a creation; then, and after a destruction, the extents in the
 * list have no memory any more and done() gives each to extent_release().
 */
struct extent_batch {
	struct job job;
	struct pool *pool;
	struct list extents;
	uint32_t count;
	int status;
	void (*done)(struct extent_batch *batch);
	void *user;
};

struct extent_batch *extent_batch_new(struct pool *pool, void (*done)(struct extent_batch *batch), void *user);
struct extent_batch *extent_batch_free(struct extent_batch *batch);

/* Adds `count` extents that are charged already. -ENOMEM, -ENOSPC (the arena or the table is full). */
int extent_batch_add_new(struct extent_batch *batch, struct arena *arena, struct quota *quota, uint32_t tenant,
	uint32_t worker, uint32_t count);
void extent_batch_create(struct extent_batch *batch);

/* Destroys the batch's extents, which the caller has moved into its list. */
void extent_batch_destroy(struct extent_batch *batch);

/* Refunds an extent without memory, `to_promise` bytes of it as a promise, and forgets it. */
void extent_release(struct pool *pool, struct extent *extent, uint64_t to_promise);

#endif
