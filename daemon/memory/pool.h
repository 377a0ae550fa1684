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

#include <stdatomic.h>

#include "daemon/base/list.h"
#include "daemon/loop/executor.h"
#include "daemon/memory/kind.h"
#include "daemon/memory/meta.h"
#include "daemon/quota/quota.h"

#define SLOT_NONE UINT32_MAX

struct pool;
struct reserve;

/*
 * One address range for each (tenant, layout). Extent slots come and go, addresses stay. On kinds with a device a
 * second range has what the device's kernels know of each pair: it is backed with the kind's granularity as slots
 * come into use for the first time, and stays until the arena goes.
 */
struct arena {
	struct list node; /* in its tenant's list */
	unsigned refs;
	struct pool *pool; /* borrowed */
	struct kind *kind; /* the pool's */
	struct kvg_layout layout;
	uint8_t *base;      /* NULL until arena_open() */
	size_t extent_size; /* a multiple of the pool's, see arena_extent_size() */
	size_t stride;
	uint32_t slots;
	uint32_t ids_per_extent; /* twice the blocks: K and V share the numbering */
	uint32_t blocks_per_extent;
	uint32_t *extent_of_slot; /* extent index or SLOT_NONE */
	uint32_t *free_slots, free_count;
	struct meta_place *pairs;      /* device: [slots][blocks_per_extent][KVG_BLOCK_TOKENS]; NULL without one */
	size_t pairs_size;             /* of the range */
	int *pairs_fds;                /* by chunk of the kind's granularity; -1: not backed */
	_Atomic(uint64_t) pairs_bytes; /* that are backed: overhead, outside of budgets */
	struct job close_job;
};

/* Places of K and V of one token: see kvgate_abi.h. */
size_t arena_stride(const struct kvg_group *group);

/*
 * The least size from the pool's extent size on that holds whole runs of blocks and whole pieces of the kind's
 * granularity.
 */
size_t arena_extent_size(size_t pool_extent_size, size_t stride, size_t granularity);

/*
 * An arena with a slot for each extent of its size that the pool can pay for, without addresses yet. 0, -ENOMEM, or
 * -EOVERFLOW (block ids have 32 bits).
 */
int arena_new(struct pool *pool, const struct kvg_layout *layout, struct arena **ret);
struct arena *arena_ref(struct arena *arena);

/*
 * Unlinks with the last reference, gives the addresses back on the executor and then frees. NULL is fine; returns
 * NULL.
 */
struct arena *arena_unref(struct arena *arena);

/* Executor: reserves the arena's addresses, once; creating an extent does it too. 0 or -ENOMEM. */
int arena_open(struct arena *arena);

/* Executor: backs the pairs of a slot of an open arena. 0 or a negative errno; nothing to do on the host kind. */
int arena_back_pairs(struct arena *arena, uint32_t slot);

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

struct host_tier;

struct pool {
	struct quota quota;
	struct quota host;      /* of the host tier; max is 0 where there is none */
	struct host_tier *tier; /* borrowed, set by its owner before there are workers; NULL: none. See daemon/tier */
	struct meta *meta;
	struct kind *kind; /* borrowed */
	struct executor *executor;
	struct loop_timer *timer; /* retries the destruction of busy extents */
	struct list busy;
	size_t extent_size;
	uint32_t extent_count;   /* capacity */
	uint32_t live;           /* extents that exist */
	struct extent **extents; /* by index */
	uint32_t *free_indices, free_count;
	unsigned batches;    /* under way */
	unsigned destroying; /* of them, those that destroy */
	unsigned reapers;    /* of them, retries of busy extents */
	/* Memory of tenants' min that is in nobody's use, see reserve.h: by tenant, NULL where there is none. */
	struct reserve *reserves[META_MAX_TENANTS];
	struct loop_timer *reserve_timer;
	void (*reserve_ended)(void *user); /* NULL, or called when memory of a reserve was created, or could not be */
	void *reserve_user;
	bool reserves_end;  /* nothing more is created for them */
	struct list doomed; /* the executor's: raw extents to be destroyed */
	/* The executor's: who had the last turn and when, how long the turns of its pass took, and who is next. */
	const struct extent_batch *sliced, *waiting;
	uint64_t slice_end_ns, slice_used_ns;
};

/* extent_size is a multiple of the kind's granularity; kind and executor are borrowed. */
int pool_new(struct loop *loop, struct executor *executor, struct kind *kind, uint64_t size, size_t extent_size,
	struct pool **ret);

/* No batch is under way, and no arena is referred to but by busy extents. The executor may be gone already. */
struct pool *pool_free(struct pool *pool);

/*
 * Extents that are created or destroyed together. done() runs on the reactor, empties the list
 * and frees the batch. status: 0, or the first error of a creation; then, and after a destruction, the extents in the
 * list have no memory any more and done() gives each to extent_release().
 */
struct extent_batch {
	struct list node; /* of those that wait for a reserve */
	struct job job;
	struct pool *pool;
	struct reserve *reserve; /* NULL, or the tenant's, whose raw extents it may have */
	struct list extents;
	struct list *next; /* the executor's: where it goes on, and */
	uint64_t slice_ns; /* when it had its last turn */
	uint32_t created;  /* of the part under way, and */
	uint64_t part_ns;  /* the time that it took */
	uint32_t forget;   /* extents to destroy, the first ones, whose places go as well */
	int64_t scrub;     /* number of the last scrub that was begun for it, or 0 */
	uint32_t count;
	int status;
	/*
	 * NULL, or called on the reactor with some new extents, in the list, while others are still being created: the
	 * callee empties the list. Those are no longer the batch's, whatever becomes of the rest.
	 */
	void (*part)(struct extent_batch *batch, struct list *extents);
	void (*done)(struct extent_batch *batch);
	void *user;
};

struct extent_batch *extent_batch_new(struct pool *pool, void (*done)(struct extent_batch *batch), void *user);
struct extent_batch *extent_batch_free(struct extent_batch *batch);

/*
 * Adds `count` extents that are charged already; those that the tenant's reserve has the memory for take it from there.
 * -ENOMEM, -ENOSPC (the arena or the table is full).
 */
int extent_batch_add_new(struct extent_batch *batch, struct arena *arena, struct quota *quota, uint32_t tenant,
	uint32_t worker, uint32_t count);
void extent_batch_create(struct extent_batch *batch);

/* The reserve's: what extent_batch_create() comes to when the batch does not have to wait, or no longer. */
void extent_batch_start(struct extent_batch *batch);

/* Destroys the batch's extents, which the caller has moved into its list. */
void extent_batch_destroy(struct extent_batch *batch);

/* Refunds an extent without memory, `to_promise` bytes of it as a promise, and forgets it. */
void extent_release(struct pool *pool, struct extent *extent, uint64_t to_promise);

#endif
