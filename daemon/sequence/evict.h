/*
 * evict.h - an eviction under way.
 *
 *   SELECT (executor)  scores -> which pairs stay
 *   ROOM   (reactor)   makes sure that the moves have spare blocks, or refuses; nothing has changed so far
 *   PACK   (executor)  where the policy asks for it, dropped pairs are copied to the host: retain.h. Best effort.
 *   MARK   (executor)  dropped pairs are marked in their places: from here on it only goes forward
 *   then stripe by stripe, oldest first, as many at a time as free blocks allow, and once more for holes that are
 *   left in held blocks:
 *     PLAN    (reactor)  survivors get places: holes of held blocks first, then new held blocks
 *     MOVE    (executor) the redo record, then copies of K, V and places
 *     PUBLISH (reactor)  rows take the new blocks, the stripes' runs are free
 *   then RELOCATE steps of the same form, when whole extents can be emptied
 *   END    (reactor)   fold: everything that is left is held, the nursery is empty
 *
 * A recall (recall.h) is an eviction that drops nothing: its SELECT decides what comes back, its ROOM has blocks for
 * that besides, and when all stripes are folded APPEND brings it:
 *   APPEND (reactor)   rows get places behind their held pairs
 *   UNPACK (executor)  copies from the host
 *   PUBLISH (reactor)  as above
 *
 * What runs on the executor is the kind's (compute.h); what runs on the reactor only counts, so it is the same for
 * each.
 *
 * Room: a stripe's survivors take at most 8 blocks a row, and it frees as many. ROOM secures 9, and while the eviction
 * runs nobody else of the worker may take the last ones, so PLAN cannot fail.
 *
 * Where the kind can (compute.h), several evictions of a worker run at a time, each with a redo record and a room of
 * its own: one begins while others run only where its room is there besides theirs. A step takes from its eviction's
 * room first and beyond it only what is in nobody's, and when it is published it has freed no less than it took: so
 * rooms hold whatever the order of steps.
 */
#ifndef KVG_EVICT_H
#define KVG_EVICT_H

#include "daemon/sequence/space.h"
#include "kernels/host/move.h"
#include "kernels/host/select.h"

struct recall;

#define EVICT_ROOM_BLOCKS 9u /* blocks a row */

#define EVICT_DECODE_FIRST  4u   /* policy.decode_first, where it is 0 */
#define EVICT_DECODE_WINDOW 128u /* policy.decode_window, where it is 0 */

/* What a step does in one row. Indices count the row's pairs as they were when the eviction began. */
struct evict_step {
	uint32_t count;      /* survivors of the step's stripes, which come after the `source` first ones of the row */
	uint32_t source;     /* survivors moved by earlier steps */
	uint32_t hole_count; /* of them go to holes, after the `hole` first ones */
	uint32_t hole;       /* holes filled by earlier steps */
	uint32_t tail;       /* where the others go, in the row's held blocks: its held length */
	uint32_t closed;     /* holes left then, which pairs from the end of the held blocks close */
};

struct evict {
	bool decode;
	bool marked;             /* there was room before SELECT, which marks as well where the kind can */
	uint32_t begin, end;     /* positions that may go (prefill) */
	uint32_t context_end;    /* what prune_start becomes */
	double ratio;            /* r' */
	uint64_t budget;         /* pairs that stay (decode) */
	uint32_t window;         /* ONCE: newest positions before `end` that count as the maximum */
	uint32_t candidates;     /* of each row (prefill) */
	uint32_t stripes;        /* that have committed tokens in some row */
	uint64_t total, dropped; /* pairs */
	uint64_t new_blocks;     /* held blocks that the moves will need, less those taken */
	uint32_t slot;           /* among the worker's evictions under way, and of their redo records */
	const struct meta_record *record;
	uint64_t room;    /* free blocks that it has secured */
	uint64_t reserve; /* of them, those that the step under way has not taken: counted in space->evict_reserve */
	bool publishes;   /* the step under way writes the table that the worker's kernels read, and */
	bool published;   /* an earlier one has */
	bool relocated;   /* whole blocks went elsewhere, so that held blocks changed in the middle of rows */
	uint32_t *length, *held;        /* [rows]: pairs, and those of them in held blocks */
	uint32_t *kept;                 /* [rows]: pairs that stay */
	uint32_t *holes;                /* [rows]: dropped places in held blocks that nothing fills yet */
	uint32_t *stripe_kept;          /* [rows][stripes]: survivors in each stripe */
	struct evict_step *steps;       /* [rows]: the step under way, and how far earlier ones went */
	bool compacting;                /* the step only closes holes, in rows compact_row to compact_end - 1 */
	bool appending;                 /* the step brings back what a recall has chosen */
	uint32_t step_first, step_last; /* or moves the survivors of these stripes */
	uint64_t step_blocks;           /* held blocks that it takes */
	uint32_t compact_row, compact_end;
	struct evict_host *host; /* what the host kind works with */
	struct recall *recall;   /* owned: this is a recall; NULL: an eviction */
};

struct evict *evict_free(struct evict *evict);

/* Candidates of each row of a prefill eviction, and the rows' lengths and stripes. The rest is zero. 0 or -ENOMEM. */
int evict_survey(const struct sequence *sequence, struct evict *evict);

/* Free blocks but for those that other evictions have secured. */
uint64_t evict_free_blocks(const struct space *space, const struct evict *evict);

/* The first entry of a row's held blocks that may have changed since the eviction began. */
uint32_t evict_first_changed(const struct evict *evict, uint32_t row);

/* Begins evictions that wait, as many as there is room for. */
void evict_begin_queued(struct space *space);

/* All committed tokens must have scores, or the request fails with -ENODATA: they are folded. */
bool evict_is_scored(struct request *request, const char *what);

/* Takes a request whose evict is filled in and begins it when its turn comes. */
void evict_submit(struct request *request);

/* What a request reports of its sequence: pairs held, and `moved` of them that went or came. */
void evict_report(struct request *request, uint64_t moved);

/* Blocks that a sequence may come to have with `pairs` pairs in `blocks` blocks, all committed tokens folded. */
uint64_t evict_future_need(const struct sequence *sequence, uint64_t pairs, uint64_t blocks);

/* Whether a position is kept whatever its score. */
bool evict_is_protected(const struct meta_seq *meta, uint32_t pos);

/* Decode eviction: a position's score for the decision. Protected ones count as infinite, the first and newest as 1.0.
 */
float evict_decode_score(const struct sequence *sequence, uint32_t pos, float score);

/* From kept[] and length[]: pairs in all, dropped ones, and the held blocks that the moves will need. */
void evict_count(const struct sequence *sequence, struct evict *evict);

/* ---- evict_plan.c, on the reactor ---- */

/* Chooses the next step; false when none is left. Rows have holes[] and stripe_kept[] by now. */
bool evict_choose_step(const struct sequence *sequence, struct evict *evict);

/* PLAN. ids: step_blocks of them, already taken. */
void evict_plan(struct sequence *sequence, struct evict *evict, const uint32_t *ids);

/*
 * RELOCATE: whole blocks leave sparse extents that hold nothing but this sequence's, where others have room
 * for them, so that the extents go back. Plans a step of it; false when there is nothing (more) to gain.
 */
bool evict_plan_relocation(struct sequence *sequence, const struct evict *evict);

/* PUBLISH. */
void evict_publish(struct sequence *sequence, struct evict *evict);

/* ---- evict_select.c and evict_move.c: SELECT, MARK and MOVE of the host kind, on the executor ---- */

int evict_select(const struct sequence *sequence, struct evict *evict);
void evict_mark(const struct sequence *sequence, struct evict *evict);
void evict_move(const struct sequence *sequence, struct evict *evict);
struct evict_host *evict_host_free(struct evict_host *host);

#endif
