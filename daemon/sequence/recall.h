/*
 * recall.h - pairs that evictions dropped and the host keeps come back (KVG_OP_RECALL).
 *
 * Which ones: what an eviction with another ratio, or another budget, would have kept of all that is held and retained.
 * Nothing that is held goes.
 *
 * ratio R: of the context that has had its prefill evictions, [prefix, prefix + prune_start). The ranges are those that
 * the policy's evictions have at ratio R: one for each chunk of chunk_tokens (ONCE: one for all), each with the r' and
 * the window of R, by the policy's level and with its floor. A range is decided by itself. Positions that are in the
 * wider window of R, and protected ones, all come back. So, with nothing lost for lack of host memory,
 *     recall(evict(x, r), R) holds exactly the pairs of evict(x, R)    for r <= R
 * where evictions came at the policy's chunk boundaries and evict(x, r) is a part of evict(x, R); where it is not, the
 * recall holds the pairs of both. It is a part for each level, with ties, but for three cases:
 *   - `adakv-layer` rounds a head's safe share down to a fifth of its share in whole pairs. With one pair more in each
 *     head the safe ones can take more places than there are new ones, and the other pairs of the layer have fewer.
 *     With N tokens in the range and H heads that takes N (R' - r') < 1.25 (1 + 1 / H).
 *   - With a floor and several ranges, where r n is less than the window: then r' is 0, the window of r is smaller than
 *     that of R, and the ranges have other borders. What a floor has kept in one need not be the best of the other's.
 *   - ONCE where r n is less than the window: the window counts in the share, and the rest of it, by rounding less than
 *     a pair for each row, goes to other pairs. With R n a little more, but whole, there is no rest.
 * A threshold policy's evictions are as at ratio 1; a recall brings what CHUNKED keeps at R besides what is held.
 * Where pairs were lost, they count as the lowest of their row: all pairs of evict(x, R) that are left come back.
 *
 * PUBLISH and FORK seal what is held: all positions so far belong to the prefix, and what was retained of them is given
 * up. What is dropped from then on is retained again.
 *
 * budget B: kvg_select_budget() with B pairs for each row on average over all pairs, held and retained, of any position
 * from the prefix on, with the policy's decode_first, decode_window and floor.
 */
#ifndef KVG_RECALL_H
#define KVG_RECALL_H

#include "daemon/sequence/evict.h"

/* Positions of one eviction's range. */
struct recall_range {
	uint32_t begin, end;
	uint32_t candidates; /* of each row: without protected ones */
	size_t base;         /* of row 0's scores; rows follow each other */
};

struct recall {
	/* Given by the operation. */
	bool by_budget;
	uint64_t budget;             /* pairs in all */
	double ratio;                /* of each range: r' */
	uint32_t window;             /* ONCE: newest positions that count as the maximum */
	uint32_t pruned_end;         /* positions below it have had their eviction */
	struct recall_range *ranges; /* ascending, without gaps, from the prefix on */
	uint32_t range_count;
	/* The decision. */
	uint32_t *skip; /* protected positions before each one from the prefix on; NULL without any */
	size_t *offset; /* [rows + 1]: CSR over all (budget), or of the range under decision */
	uint32_t *seen; /* [rows]: retained pairs that were asked about (budget), then unpacked */
	size_t score_count;
	float *scores;
	uint8_t *keep;
	/* Its result. */
	uint64_t *chosen, chosen_count; /* places in the store that come back, ascending */
	uint32_t *count;                /* [rows]: of them */
	uint64_t extra;                 /* held blocks for them, after the fold */
	uint64_t more;                  /* blocks that the sequence was promised for them */
	bool appended;
	uint64_t unpacked; /* of chosen[], so far */
};

struct recall *recall_free(struct recall *recall);

/* ---- recall_select.c, on the executor: the same for each kind ---- */

#define RECALL_NONE SIZE_MAX

/* Ranges and r' for a ratio. 0 or -ENOMEM. On the reactor. */
int recall_set_ratio(const struct sequence *sequence, struct recall *recall, double ratio);

/* Room for the decision; lengths: pairs of each row. 0 or -ENOMEM. Everything counts as lost until it has a score. */
int recall_open(const struct sequence *sequence, const uint32_t *lengths, struct recall *recall);

/* Enters pair `index` of a row, which is held or fresh. */
void recall_put(const struct sequence *sequence, struct recall *recall, uint32_t row, uint32_t index, uint32_t pos,
	float score);

/* Enters what is retained, decides, and lists what comes back in chosen[] and count[]. 0 or -ENOMEM. */
int recall_decide(const struct sequence *sequence, struct recall *recall);

/* After evict_count(): blocks for what comes back are counted in. */
void recall_count(const struct sequence *sequence, struct evict *evict);

/* ---- recall.c, on the reactor ---- */

/* What comes back is promised its blocks. 0, or -ENOSPC with text. recall_unpromise() where the recall does not go on.
 */
int recall_promise(struct request *request);
void recall_unpromise(struct request *request);

/* APPEND: ids: recall->extra of them, already taken. */
void recall_append(struct sequence *sequence, struct evict *evict, const uint32_t *ids);

#endif
