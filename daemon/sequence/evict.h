/*
 * evict.h - an eviction under way.
 *
 *   SELECT (executor)  scores -> which pairs stay
 *   ROOM   (reactor)   makes sure that the moves have spare blocks, or refuses; nothing has changed so far
 *   MARK   (executor)  dropped pairs are marked in their places: from here on it only goes forward
 *   then stripe by stripe, oldest first, and once more for holes that are left in held blocks:
 *     PLAN    (reactor)  survivors get places: holes of held blocks first, then new held blocks; the redo record
 *     MOVE    (executor) copies K, V and places
 *     PUBLISH (reactor) rows take the new blocks, the stripe's runs are free
 *   then RELOCATE steps of the same form, when whole extents can be emptied
 *   END    (reactor)   fold: everything that is left is held, the nursery is empty
 *
 * Room: moving stripe by stripe needs at most 9 blocks a row beyond what earlier stripes freed
 * (8 for the stripe, 1 for the row's partial block). ROOM secures them, and while the eviction runs
 * no other sequence of the worker may take the last ones, so PLAN cannot fail.
 */
#ifndef KVG_EVICT_H
#define KVG_EVICT_H

#include "daemon/sequence/space.h"
#include "kernels/host/move.h"
#include "kernels/host/select.h"

#define EVICT_ROOM_BLOCKS 9u /* blocks a row */

struct evict {
	bool decode;
	uint32_t begin, end;     /* positions that may go (prefill) */
	uint32_t context_end;    /* what prune_start becomes */
	double ratio;            /* r' */
	uint32_t window;         /* ONCE: newest positions before `end` that count as the maximum */
	uint32_t candidates;     /* of each row (prefill) */
	uint32_t stripes;        /* that have committed tokens in some row */
	uint64_t total, dropped; /* pairs */
	uint64_t new_blocks;     /* held blocks that the moves will need, less those taken */
	float *scores;           /* of the candidates */
	uint8_t *keep;
	size_t *offset;              /* CSR, [rows + 1] */
	uint32_t *rank_skip;         /* [end - begin]: protected positions before each, NULL without any */
	uint32_t *kept;              /* [rows]: pairs that stay */
	uint32_t *holes, *cursor;    /* [rows]: dropped places in held blocks, where to look for the next */
	uint32_t *fresh;             /* [rows]: pairs in nursery runs */
	struct kvg_place *src, *dst; /* room for one row's moves */
	uint32_t compact_row;        /* next row of the last step */
};

struct evict *evict_free(struct evict *evict);

/* SELECT and MARK, on the executor. */
int evict_select(const struct sequence *sequence, struct evict *evict);
void evict_mark(const struct sequence *sequence, struct evict *evict);

/* Whether there is a step left to plan. */
bool evict_has_step(const struct sequence *sequence, const struct evict *evict);

/* Held blocks that the next step takes. */
uint64_t evict_step_blocks(const struct sequence *sequence, const struct evict *evict);

/* PLAN: fills the redo record. ids: the blocks that evict_step_blocks() asked for, already taken. */
void evict_plan(struct sequence *sequence, struct evict *evict, const uint32_t *ids);

/*
 * RELOCATE: whole blocks leave sparse extents that hold nothing but this sequence's, where others have room
 * for them, so that the extents go back. Plans a step of it; false when there is nothing (more) to gain.
 */
bool evict_plan_relocation(struct sequence *sequence);

/* MOVE, on the executor, and PUBLISH. */
void evict_move(const struct sequence *sequence);
void evict_publish(struct sequence *sequence);

#endif
