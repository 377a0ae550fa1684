/*
 * reserve.h - device memory of a tenant's min that it does not use: raw extents, which exist and are not yet
 * mapped anywhere. So a min is physically there from the start, and creating an extent inside it takes no new memory.
 *
 * A raw extent was never exported; it becomes an extent of its tenant (extent_batch_add_new() takes it) or is
 * destroyed. Its state in the metadata is RAW. What is raw and what is charged together never pass
 * max(min, charged): in whole extents of the pool's size as many are raw as charged leaves of min. An
 * arena whose extents have another size cannot use them, so as many bytes of them are destroyed before such an
 * extent is created.
 *
 * The reactor owns all of it, but for what the job has made and not handed over. While the job is under way, batches
 * of the tenant wait for its end, which they hasten: what it made goes to them first.
 */
#ifndef KVG_RESERVE_H
#define KVG_RESERVE_H

#include "daemon/memory/pool.h"

struct reserve {
	struct pool *pool; /* borrowed; NULL after reserve_deinit() */
	const struct quota *quota;
	uint32_t tenant;
	struct list ready;
	uint32_t count;      /* of them */
	struct list waiting; /* batches that are created when the job has ended */
	struct job job;      /* on the executor while `busy`, with: */
	struct list made;
	struct list *next;
	uint64_t rest_ns; /* until when it makes way for other jobs */
	atomic_bool stop;
	bool busy;
	int status;    /* of the last job: 0, or why memory could not be created */
	bool reported; /* that it could not, and it has not been since */
};

/* For the tenant of that index in the metadata, once; its account has no min yet. */
void reserve_init(struct reserve *reserve, struct pool *pool, const struct quota *quota, uint32_t tenant);

/* Gives the memory back. The executor has nothing of it. May be called again. */
void reserve_deinit(struct reserve *reserve);

/*
 * Makes what is raw agree with the account, in the background: to be called when min was set. What cannot be created
 * is logged once and tried again every second.
 */
void reserve_update(struct reserve *reserve);

/* The same where a failure is under way: the next attempt is left to the timer. */
void reserve_settle(struct reserve *reserve);

/* Whether nothing is under way and what should be raw is. */
bool reserve_is_settled(const struct reserve *reserve);

/* Bytes that are raw. */
uint64_t reserve_bytes(const struct reserve *reserve);

/* Nothing more is created, for any tenant of the pool: the daemon ends. */
void reserve_stop_all(struct pool *pool);

/* ---- for the pool ---- */

/* The tenant's, or NULL. */
struct reserve *reserve_of(const struct pool *pool, uint32_t tenant);

/* Before extents of a size are added to a batch, charged already: what they leave no room for is destroyed. */
void reserve_make_room(struct reserve *reserve, size_t extent_size);

/* Extents that should be raw once `bytes` of what is charged have gone. */
uint32_t reserve_wants(const struct reserve *reserve, uint64_t bytes);

/* One raw extent, with its index and its memory, or NULL. */
struct extent *reserve_take(struct reserve *reserve);

/* Whether the batch has to wait; then extent_batch_start() is called for it later. */
bool reserve_delays(struct reserve *reserve, struct extent_batch *batch);

/* Executor: destroys that many bytes of what is to be destroyed, or all there is. */
void reserve_destroy_doomed(struct pool *pool, size_t bytes);

/* The pool's timer. */
void reserve_retry(void *user);

#endif
