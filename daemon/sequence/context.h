/*
 * context.h - rows of sealed blocks that several sequences begin with.
 *
 * A published context (PUBLISH) lives in extents of its own, which belong to the tenant and to no worker, and is found
 * by its key by all workers of the tenant that have the same layout. An anonymous one (FORK) is the full blocks of a
 * sequence where they are, in its worker's extents, and ends with its last reference. Contexts form chains: a context
 * goes on where its parent ends, and a published one only ever goes on from a published one.
 *
 * Only full blocks are shared. Pairs behind them, fewer than a block in each row, are the tails: every sequence has a
 * copy in its own first block. Nothing of a context is ever evicted, for its tokens count as the sequence's prefix.
 *
 * References are sequences and contexts that go on from it. A published context without any is on offer to whoever
 * needs device memory (tenant/reclaim.h). Then its image goes to the host tier where the tenant's budget there has room
 * for it, and it has no extents until somebody attaches to it; one that goes on from another or holds nothing, and one
 * that there is no room for, is forgotten. Those on the host are forgotten when images of others, or pairs that
 * evictions drop, need the room. A context that is forgotten ends with its last reference. A worker maps extents with
 * its first sequence that is attached, and then until it is asked to unmap them, because the context ends or goes to
 * the host, or is gone; they are destroyed when no worker maps them any more.
 *
 * All of it is the reactor's, but for copies (compute.h).
 */
#ifndef KVG_CONTEXT_H
#define KVG_CONTEXT_H

#include <uthash.h>

#include "daemon/sequence/space.h"

/* What a published context is found by: blocks of another layout are no use. */
struct context_key {
	uint8_t key[KVG_KEY_SIZE];
	const struct arena *arena;
};

struct context_move;

struct context {
	UT_hash_handle by_key, by_id; /* in the tenant's tables, when published */
	struct context_key key;
	struct tenant *tenant;
	struct arena *arena;    /* a reference */
	struct context *parent; /* a reference, or NULL */
	struct meta_context_part part;
	uint32_t rows;
	uint32_t *shared;          /* [rows]: blocks of the whole chain, see struct sequence */
	uint64_t shared_pairs;     /* in them */
	uint32_t tails;            /* rows that have pairs behind them */
	uint64_t chain_blocks;     /* of the whole chain, the last tails with them */
	struct space *space;       /* anonymous: in whose extents its blocks lie */
	struct block_space blocks; /* published: its own extents */
	uint32_t holds;            /* requests that work on it */
	uint32_t attached;         /* published: sequences, those behind anonymous contexts with them */
	uint32_t mapped;           /* workers that have mapped its extents or have not said that they unmapped them */
	bool forgotten;            /* nobody finds it any more */
	struct list mappings;      /* in use */
	struct list waiting;       /* COPYING, or on its way to the host or back: requests that wait for it */
	struct context_move *move; /* to the host or back, under way; NULL: none. It has a hold */
	struct list host_node;     /* in the tenant's host_contexts */
	struct request *ender;     /* UNMAPPED that waits for its end */
	struct reclaimable offer;  /* published, and in nobody's use */
	bool reclaimed;            /* forgotten for the sake of its memory */
};

/* One worker's mapping of a published context's extents. */
struct mapping {
	UT_hash_handle hh; /* in the space's table, by context */
	struct context *context;
	struct space *space;
	struct list node; /* in the context's list; then in space->unmapping */
	uint32_t event;   /* that asked for the end */
};

static inline bool context_is_published(const struct context *context)
{
	return context->part.context->worker == META_NO_WORKER;
}

/* ---- context.c: life ---- */

/*
 * A context with room for `ids` full blocks behind those of `parent`, in the state COPYING. key: NULL makes it
 * anonymous, in the space's extents; else it is in the tenant's table from now on, but nobody finds it. 0, -ENOMEM,
 * or -EUSERS: the tenant has as many entries of the metadata's table as are free, so that some are left for others.
 */
int context_new(struct space *space, struct context *parent, const uint8_t *key, uint32_t tokens, uint64_t ids,
	struct context **ret);

/* The rows are filled: counts what they hold, and lets it be found. */
void context_seal(struct context *context);

/* COPYING has failed: nothing is left of it, and those that wait for it try again. */
void context_abort(struct context *context);

/* By key in the layout of an arena, whatever its state; NULL when the tenant has none. By id: sealed ones only. */
struct context *context_find(const struct tenant *tenant, const struct arena *arena, const uint8_t *key);
struct context *context_find_id(const struct tenant *tenant, uint64_t id);

struct context *context_ref(struct context *context);

/* The same for as long as a request needs it: no reference of the metadata's. */
struct context *context_hold(struct context *context);
void context_let_go(struct context *context);

/* The request is freed, and was never completed: what it made or held goes. */
void context_request_ended(struct request *request);

/* The last one ends an anonymous context, and a published one that is forgotten. NULL is fine. */
void context_unref(struct context *context);

/* Nobody finds a published context any more. It ends with its last reference. */
void context_forget(struct context *context);

/*
 * What takes the extents and mappings of a context that has an image, and ends when they are gone: with
 * reclaim_progress(), or with that as soon as they are unreturned. NULL: no memory, or too many contexts.
 */
struct context *context_shell_new(struct context *context);
struct context *context_shell_free(struct context *shell); /* nothing was given to it */
void context_shed(struct context *context, struct context *shell);

/* Destroys its extents, which no worker has mapped. */
void context_discard_extents(struct context *context);

/* Forgets all of a tenant's. They are gone when its workers are and the executor has nothing left to do. */
void context_forget_all(struct tenant *tenant);

/* The nearest published context, itself with it; or NULL. */
struct context *context_published(struct context *context);

/* Bytes of the extents of a published context; 0 while it is on the host. */
uint64_t context_bytes(const struct context *context);

/* Pairs of the whole chain, the last tails with them. */
uint64_t context_pairs(const struct context *context);

/* The tenant's contexts that can be found, in the order of their making. */
const struct context *context_first(const struct tenant *tenant);
const struct context *context_next(const struct context *context);

/* The request waits for what is under way with the context: COPYING, or a move. Requests are PUBLISH and ATTACH. */
void context_wait(struct request *request, struct context *context);

/* Begins such a request from its beginning. */
void context_begin_anew(struct request *request);

/* Calls then() with each request that waits for it, in order; those of workers that are gone do so no longer. */
void context_end_waits(struct context *context, void (*then)(struct request *request, void *user), void *user);

/* Those that wait for it go on, from their beginning: it is sealed, on the device, on the host, or gone. */
void context_wake(struct context *context);

/*
 * Charges and creates extents for a published context; created() takes them from the batch, whose user is `user`. 0, or
 * a negative errno with text.
 */
int context_create_extents(
	struct context *context, uint32_t extents, void (*created)(struct extent_batch *batch), void *user, char *text);

/* created()'s part of it: the extents are the context's, or gone, and so is the batch. Returns its status. */
int context_add_extents(struct context *context, struct extent_batch *batch);

/* ---- context_host.c: to the host and back ---- */

/*
 * Starts to send a context that nobody uses to the host; reclaim_progress() comes when its device memory is back, or
 * unreturned. A negative errno: it cannot go there.
 */
int context_offload(struct context *context);

/*
 * Whether the context's blocks are on the device. If not, they are brought back first: the request, PUBLISH or ATTACH,
 * is begun anew later, or fails, and request->context is NULL or a hold.
 */
bool context_is_here(struct request *request, struct context *context);

/*
 * The tenant needs `bytes` more of the host: contexts that are there and that nobody uses are forgotten, oldest first,
 * as long as that lacks. partly: fewer bytes are of use, too; otherwise nothing is done when even all of them have too
 * few.
 */
void context_make_host_room(struct tenant *tenant, uint64_t bytes, bool partly);

/* Forgets contexts that are there and that nobody uses, oldest first, while the tenant has more than `most` there. */
void context_forget_host(struct tenant *tenant, uint64_t most);

/* ---- attach.c: sequences and mappings ---- */

/*
 * The sequence begins with the context from now on (a reference of its own); the worker is asked to map what it has
 * not. Rows and table are the caller's to write. 0 or -ENOMEM.
 */
int context_join(struct sequence *sequence, struct context *context);

/* It ends or joins another one. */
void context_leave(struct sequence *sequence);

/* Writes all of a sequence's rows to the worker's table: the chain's blocks, its own, and lengths. */
void context_write_rows(struct sequence *sequence);

/* What is left of a policy when the first `tokens` tokens are sealed: they count as prefix. */
void context_freeze_policy(struct kvg_policy *policy, uint32_t tokens);

/* The worker's mappings of a context: asks it to unmap. */
void context_unmap(struct context *context);

/* The worker has unmapped what events up to `event` asked for: contexts whose end waits for it do end. */
void context_unmapped(struct request *request, uint32_t event);

/* The worker is gone, and with it its mappings and whatever waits. */
void context_space_ended(struct space *space);

/* A mapping is over: the context ends when it was the last. */
void context_mapping_ended(struct context *context, struct request *ender);

/* ---- fork.c: what a sequence has of its own becomes a context's ---- */

/* Full blocks and pairs behind them of a row, fresh ones with them; all its own. */
struct row_extent {
	uint32_t blocks, tail;
};
struct row_extent context_row_extent(const struct sequence *sequence, uint32_t row);

/*
 * The sequence goes on behind a context that has all its committed pairs but the tails: of its own blocks it keeps
 * those with the tails. give: the full ones are given back, else they are the context's. Everything is folded, as by
 * an eviction; what is reserved and not committed goes back. 0 or -ENOMEM, and then nothing has changed.
 */
int context_adopt(struct sequence *sequence, struct context *context, bool give);

void block_copy_deinit(struct block_copy *copy);

/* Room for `count` blocks. 0 or -ENOMEM. */
int block_copy_init(struct block_copy *copy, uint64_t count, uint64_t places);

/*
 * Takes `tails` blocks of its own for request->child, creating extents where that is needed; then calls
 * request->tails_taken(request) with copy.dst filled, or fails the request and drops the child.
 */
void context_take_tails(struct request *request);

#endif
