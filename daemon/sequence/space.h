/*
 * space.h - the KV of one worker: its sequences, their blocks and tables, and
 * the requests that work on them.
 *
 * Requests of one sequence run in order; a request that needs the executor
 * keeps its sequence busy and later ones wait in the sequence's queue. Requests
 * of different sequences overtake each other, except evictions, which begin in
 * order and of which a space runs as many at a time as its kind can. Each request
 * submitted is completed exactly once, unless the space is killed first.
 *
 * A space that is killed waits for its jobs, then gives every extent back, and
 * reports closed() when the last byte is in the pool again.
 */
#ifndef KVG_SPACE_H
#define KVG_SPACE_H

#include <stdatomic.h>

#include "daemon/memory/blocks.h"
#include "daemon/sequence/imports.h"
#include "daemon/sequence/table.h"
#include "daemon/tenant/reclaim.h"

struct gate_set;
struct space;
struct evict;
struct image;
struct compute_ops;
struct compute_device;
struct cuda_lane;
struct context;
struct mapping;
struct cuda_transfer;
struct retain;

struct sequence {
	struct space *space;
	uint32_t slot;
	struct meta_seq *meta;
	struct block_owner owner;
	uint32_t min_slack;    /* free places in the last held block of the row that has fewest */
	uint64_t right;        /* extents that it may draw from the worker's promise */
	uint64_t wanted;       /* extents without blocks that it will fill soon, see keep.h */
	bool decodes;          /* its last eviction was one of decoding */
	struct retain *retain; /* owned; NULL: nothing was retained yet */
	/*
	 * The context that its rows begin with, a reference; or NULL. meta_row and all that works on rows know the
	 * sequence's own blocks only: those behind `shared` [rows] blocks of the context, NULL without one.
	 */
	struct context *context;
	const uint32_t *shared;
	uint32_t tails; /* blocks of its own that it was attached with */
	bool busy;
	struct list queue;              /* requests that wait */
	struct reclaimable reclaimable; /* while it is idle and has blocks, see offload.h */
	bool stays;                     /* the host's memory failed: not on offer until the worker says idle again */
};

/* Which entries of a sequence's rows have changed in the table since the worker's kernels last read them. */
struct publish {
	bool held, lengths;                /* ids of all held blocks; base_len */
	bool shared;                       /* ids of the context's blocks, before those */
	uint32_t stripe_begin, stripe_end; /* ids of the nursery's runs */
};

/* Blocks that are copied; the first `places` of them take pairs of their own later. */
struct block_copy {
	uint32_t *src, *dst; /* owned: one array */
	uint32_t count, places, done;
};

struct request {
	struct list node;         /* in a queue, or its owner's */
	struct list context_wait; /* in the space's context_waits, while node is in the context's */
	struct kvg_sqe sqe;
	struct kvg_cqe cqe;
	char text[KVG_TEXT_SIZE]; /* why status is negative */
	/* NULL: a worker's request, which space_ops.complete() ends. Otherwise the daemon's own, see offload.h. */
	void (*completed)(struct request *);
	void (*act)(struct request *); /* of the daemon's own: does something else than sqe.op (QUERY) */
	struct list own_node;          /* of the daemon's own: in the space's list */
	double share; /* EVICT, DECODE, of the daemon's own: of its own tokens' pairs what stays; 0: the policy's */
	struct space *space;
	struct sequence *sequence; /* whose busy flag this request holds, or NULL */
	struct job job;
	/* Work on the executor, see compute.h. */
	int (*launch)(struct request *);
	int (*finish)(struct request *); /* set by launch(): what is left when its work is done */
	void (*after)(struct request *);
	bool launched;
	struct cuda_lane *lane;         /* see cuda.h */
	struct cuda_transfer *transfer; /* see cuda_transfer.h */
	int job_status;
	uint64_t deadline_ns, asked_ns; /* of a wait: when it ends, and when its event was asked for */
	bool happened;                  /* its event */
	struct publish publish;
	uint32_t layer, row;           /* STAGE: the next to score */
	struct import *buffer, *event; /* imports that the entry uses */
	struct evict *evict;
	struct context *context; /* PUBLISH: that is being made or joined; ATTACH: a hold while it waits */
	struct sequence *child;  /* ATTACH, FORK: that is being made */
	struct block_copy copy;
	void (*tails_taken)(struct request *); /* ATTACH, FORK: what comes after the child's blocks are there */
	unsigned parts;                        /* UNMAPPED: destructions under way */
	int grow_status;                       /* of the last space_try_grow() that went on the executor */
	uint64_t lack;                         /* bytes that it would have had to charge beyond its promise */
	struct memory_wait wait;               /* for memory that others give back */
	uint32_t withheld;                     /* RESERVE: extents without blocks that others count on */
	uint64_t staged_rows;                  /* STAGE: what the session counts against the tenant's limit */
	int refused;         /* by the session, with text: fails with this when its turn comes; 0: it is not */
	struct image *image; /* to or from the host tier */
	void (*restored)(struct request *); /* RESTORE, RESERVE: what comes after the sequence's blocks are back */
};

/* What a space tells its session; given at creation, called on the reactor. */
struct space_ops {
	void (*complete)(void *user, struct request *request);
	/* New extents to map; the session passes their descriptors on. 0 or a negative errno. */
	int (*extents_added)(void *user, struct extent *const *extents, uint32_t count);
	/* Extents to unmap. Returns the number of the event that asks for it. */
	uint32_t (*extents_dropped)(void *user, const uint32_t *slots, uint32_t count);
	void (*closed)(void *user);
	/* The worker's KV cannot be trusted any more (work that must not fail has failed): it has to end. */
	void (*broken)(void *user, const char *reason);
};

/* What a session hands over for its space: the staging memfd, mapped as long as the space lives. */
struct space_memory {
	uint8_t *staging;
	size_t staging_size, rows_offset;
	size_t sync_offset;            /* of struct kvg_sync; cuda only */
	uint64_t device_staging_bytes; /* cuda only */
	uint64_t wait_ns;              /* deadline of waits for the worker's streams; 0: 10 s */
};

/* What a worker gets on cuda besides its extents; -1 and 0 on the host, or when there is none. */
struct space_device {
	int table_fd, staging_fd;
	uint64_t table_size, ids_offset, staging_size;
	_Atomic uint64_t scratch;       /* bytes of buffers */
	struct compute_device *compute; /* the kind's own */
};

struct space {
	struct tenant *tenant;
	struct pool *pool;
	struct arena *arena;
	struct meta_part part;
	struct table table;
	uint32_t index; /* of the worker in the metadata's table */
	uint32_t rows;  /* layers * heads */
	const struct compute_ops *compute;
	struct space_device device;
	struct imports imports;
	struct kvg_sync *sync; /* timeline semaphores, shared with the worker; NULL on the host */
	uint64_t wait_ns;
	uint8_t *staging; /* rows: borrowed from the session, mapped as long as the space lives */
	uint64_t staging_size;
	struct gate_set *gates; /* owned; NULL until loaded */
	struct block_space blocks;
	struct list dropped;    /* extents that the worker was asked to unmap */
	uint32_t dropped_event; /* the last of them */
	struct sequence **sequences;
	uint32_t *free_slots, free_count, sequence_count;
	uint64_t claimed; /* of the tenant, see space_claim() */
	uint64_t rights;  /* extents: the sum over its sequences, see promise.h */
	uint64_t wanted;  /* the same, see keep.h */
	bool growing;     /* extents are created ahead */
	uint32_t arrived; /* extents of batches whose rest is still being created, for the requests that wait */
	uint32_t epoch;
	uint32_t warm_slot_plus_one; /* a free slot whose rows' memory is there still, see sequence_drop() */
	uint32_t most_tails;         /* of a context that it maps */
	struct mapping *mappings;    /* of published contexts, see context.h */
	struct list unmapping;       /* those that the worker was asked to unmap */
	struct list context_waits;   /* requests that wait for a context of another worker's */
	unsigned waits;              /* requests that the executor asks about, see compute_wait() */
	struct list wait_queue;      /* those that come after them */
	struct list ready;           /* the next entry of each sequence whose last one ended */
	bool running;                /* them */
	struct list evict_queue;
	struct list own;        /* requests of the daemon's own that are not completed */
	unsigned evicting;      /* evictions under way */
	uint32_t evict_slots;   /* of them, by bit */
	uint64_t evict_reserve; /* free blocks that only evictions under way may take */
	unsigned jobs;          /* requests and batches on the executor */
	atomic_bool dying;
	bool closing; /* everything is on its way back */
	struct job close_job;
	const struct space_ops *ops;
	void *user;
};

/*
 * 0, or a negative errno with text (KVG_TEXT_SIZE bytes) that names what is refused: -EOPNOTSUPP (kind, dtype, groups),
 * -EINVAL (sizes), -ENOMEM, -EUSERS.
 */
int space_new(struct tenant *tenant, const struct kvg_layout *layout, uint64_t worker_id, const struct space_ops *ops,
	void *user, struct space **ret, char *text);

/*
 * Counts the device memory that space_open() will create, table and staging, against the tenant's limit; space_free()
 * gives it back. Once, before space_open(). 0, also on kinds without a device, or -ENOSPC with text.
 */
int space_claim(struct space *space, uint64_t device_staging_bytes, char *text);

/*
 * The part of its beginning that belongs on the executor: addresses, and on cuda the stream and the tables for the
 * worker's kernels. Once, before the first request. 0 or a negative errno with text; then space_free() or
 * space_kill() is all that may follow.
 */
int space_open(struct space *space, const struct space_memory *memory, char *text);

/* Ends the space; closed() comes later (or at once), after which space_free() may be called. No complete() any more. */
void space_kill(struct space *space);
struct space *space_free(struct space *space);

/* Takes a request; complete() may be called before this returns. */
void space_submit(struct space *space, struct request *request);

/* The gate for HIDDEN rows; the space owns it from now on. */
void space_set_gates(struct space *space, struct gate_set *gates);

/* Bytes of tables, gates and buffers, but for what space->device says. */
uint64_t space_overhead(const struct space *space);

/* ---- for the operations (reserve.c, score.c, evict.c) ---- */

/* poll: NULL or as in executor.h. */
void space_submit_job(
	struct request *request, void (*run)(struct job *), bool (*poll)(struct job *), void (*done)(struct job *));

/* The end of a job or batch: true when the space is dying, and then the caller touches nothing more. */
bool space_job_ended(struct space *space);

/* Whether work that must not fail has failed; then the worker ends, and the caller leaves the request as it is. */
bool space_job_lost(const struct request *request);

/* Frees what a request holds that was never completed. */
void request_deinit(struct request *request);

void request_finish(struct request *request);
void request_fail(struct request *request, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/*
 * Charges and creates extents for a sequence, then calls again(request). 0 when creation is under way, a negative
 * errno with request->text otherwise. again() finds the creation's own failure in request->grow_status.
 */
int space_try_grow(struct request *request, uint32_t extents, const char *what, void (*again)(struct request *));

/*
 * After -ENOSPC: whether memory is on its way (reclaim.h). Then again(request) is called once there may be more, and
 * the request counts as a job until then. Otherwise the text says what would free memory, and the request is to fail.
 */
bool space_wait_memory(struct request *request, uint64_t bytes, void (*again)(struct request *));

/* Creates extents out of the worker's promise, with nobody waiting for them; nothing when it is refused. */
void space_grow_ahead(struct space *space, uint32_t extents);

/* A new sequence in a free slot, of which there is one; the admitted blocks have been promised. NULL: no memory. */
struct sequence *sequence_new(struct space *space, const struct kvg_policy *policy, uint64_t admitted);

/* Gives everything of a sequence back and frees it. Nothing waits for it. */
void sequence_drop(struct sequence *sequence);

/* The same with spare extents, finishes the request, and then fails those that wait for the sequence. */
void sequence_end(struct request *request, struct sequence *sequence);

/* The place in the worker's table of the row's own blocks, and the row's length there, set from the metadata. */
uint32_t *sequence_table_row(const struct sequence *sequence, uint32_t row);
void sequence_table_length(const struct sequence *sequence, uint32_t row);

/* Pairs of all rows, the context's and fresh ones with them. */
uint64_t sequence_pairs(const struct sequence *sequence);

static inline uint32_t sequence_shared(const struct sequence *sequence, uint32_t row)
{
	return sequence->shared ? sequence->shared[row] : 0;
}

/*
 * Asks the worker to unmap the extents that hold nothing any more, but for those that its sequences take again soon
 * (not while an eviction may want them). Under pressure nothing is kept.
 */
void space_return_spare(struct space *space);

/* Bytes that the worker was asked to unmap and has not, contexts' with them; and the oldest event that asks for some.
 */
uint64_t space_unmapping(const struct space *space, uint32_t *ret_event);

/* The block of the pair of index `index` of a row; indices count the row's own pairs. */
uint32_t sequence_block(const struct sequence *sequence, uint32_t row, uint32_t index);

/* One of the destructions that an UNMAPPED waits for is over; each counted as a job of the space. */
void space_unmapped_part(struct request *request);
/* The sequence of a handle, or NULL. */
struct sequence *space_sequence(const struct space *space, uint64_t handle);

/* Writes ids of runs of stripes [begin, end) to the worker's table, behind the held ones. */
void sequence_publish_stripes(struct sequence *sequence, uint32_t begin, uint32_t end);

/* Gives all of its blocks back; the rows still count them. */
void sequence_give_blocks(struct sequence *sequence);

/* Writes the state of a sequence to the worker's table. */
void sequence_publish(const struct sequence *sequence);

static inline uint64_t sequence_handle(const struct sequence *sequence)
{
	return (uint64_t)sequence->meta->epoch << 32 | sequence->slot;
}

void op_create(struct request *request);
void op_reserve(struct request *request);
void op_commit(struct request *request);
void op_truncate(struct request *request);
void op_protect(struct request *request);
void op_query(struct request *request);
void op_free(struct request *request);
void op_stage(struct request *request);
void op_evict(struct request *request);
void op_publish(struct request *request);
void op_find(struct request *request);
void op_attach(struct request *request);
void op_fork(struct request *request);
void op_offload(struct request *request);
void op_restore(struct request *request);
void op_idle(struct request *request);
void op_recall(struct request *request);

#endif
