/*
 * evict.h - the device's part of an eviction: scores go to their pairs, candidates are gathered for the selection,
 * the outcome is counted, marked and listed, pairs move, whole blocks move, tables are updated.
 *
 * Every launcher only enqueues on `stream` (graph-capturable, nothing allocated), with the device's context
 * current, and returns the driver's verdict; what pointers in the structures refer to must stay until the stream has
 * passed. The structures themselves are read before the call returns.
 *
 * Order of an eviction: gather -> kernels/cuda/select.h -> count -> (caller reads the counts, makes room) -> mark ->
 * move steps -> compact -> relocate, with table updates where the caller publishes. Sources and destinations
 * of one launch are disjoint, so each can be repeated after a crash. Mark can be repeated as well as long as
 * nothing has moved.
 */
#ifndef KVG_CUDA_EVICT_H
#define KVG_CUDA_EVICT_H

#include <stdbool.h>

#include "kernels/cuda/device.h"
#include "kernels/cuda/evict_types.h"

struct kvg_cuda_evict;

/* The kernels on this device; cuda is borrowed. Immutable afterwards. NULL with *ret_result set on failure. */
struct kvg_cuda_evict *kvg_cuda_evict_new(const struct kvg_cuda *cuda, CUresult *ret_result);

/* Unloads them (the context must be current). NULL is fine; returns NULL. */
struct kvg_cuda_evict *kvg_cuda_evict_free(struct kvg_cuda_evict *evict);

/* A protected range of positions. */
struct kvg_cuda_range {
	uint32_t begin, end;
};

/*
 * Prefill eviction: positions [begin, end) may go, except those below prefix_tokens and those of `protect` (up to
 * KVG_CUDA_MAX_RANGES - 1 ranges, in any order, overlapping or empty); the `window` newest before `end` count as +INF.
 * scope->candidates says how many each row has.
 */
void kvg_cuda_scope_prefill(struct kvg_cuda_scope *scope, uint32_t begin, uint32_t end, uint32_t window,
	uint32_t prefix_tokens, const struct kvg_cuda_range *protect, uint32_t protect_count);

/*
 * Decode eviction: every pair is a candidate; protected ones and those of the prefix count as +INF; else
 * positions below `first` and the newest `window` before committed_pos count as 1.0 (method.md section 3).
 */
void kvg_cuda_scope_decode(struct kvg_cuda_scope *scope, uint32_t first, uint32_t window, uint32_t committed_pos,
	uint32_t prefix_tokens, const struct kvg_cuda_range *protect, uint32_t protect_count);

/* Where staged scores lie: strides in floats. */
struct kvg_cuda_scores {
	const float *scores; /* device */
	uint64_t layer_stride, head_stride, token_stride;
	uint32_t layer_begin, layer_count;
	uint32_t pos, tokens;
};

/*
 * Scores of positions pos .. pos + tokens - 1 (pos >= fold_pos; the blocks are there: base_len + pos - fold_pos +
 * tokens <= 16 * ids_cap) go to their pairs; NaN becomes 0 and infinities the largest finite value, because -inf is the
 * mark. Only ids, ids_cap, base_len, fold_pos, layers and heads of rows are used. The pairs' positions are written too.
 *     gate's output [layers][heads][score_stride]: head_stride = score_stride, token_stride = 1
 *     KVG_STAGE_SCORE [layers][tokens][heads]: head_stride = 1, token_stride = heads
 */
CUresult kvg_cuda_evict_store(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_rows *rows, const struct kvg_cuda_scores *scores, CUstream stream);

/*
 * Candidates' scores go to scores[offset[row] + rank] (device). rank: prefill, the candidate's number among its
 * row's by position; decode, the index. found[row] (device, zeroed here) becomes the candidates found: each must equal
 * scope->candidates (decode: length[row]), or the metadata are broken.
 */
CUresult kvg_cuda_evict_gather(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_rows *rows, const struct kvg_cuda_scope *scope, const uint32_t *offset, float *scores,
	uint32_t *found, CUstream stream);

/* Counts what the decisions mean. All of *counts is written, nothing else is. */
CUresult kvg_cuda_evict_count(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_rows *rows, const struct kvg_cuda_scope *scope, const struct kvg_cuda_kept *kept,
	const struct kvg_cuda_counts *counts, CUstream stream);

/*
 * Writes the positions of all pairs and score -INF for the dropped ones (-INF of one that stays is a former owner's
 * mark and becomes 0), and makes the lists. counts: what count() left for the same input. Entries that do not fit in a
 * list are left out; the caller sizes lists by the counts or by max_length. A list may be NULL.
 */
CUresult kvg_cuda_evict_mark(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_rows *rows, const struct kvg_cuda_scope *scope, const struct kvg_cuda_kept *kept,
	const struct kvg_cuda_counts *counts, const struct kvg_cuda_lists *lists, CUstream stream);

/* One step of moves: K, V and metadata of each pair. */
struct kvg_cuda_moves {
	uint32_t rows;
	uint32_t tiles;                            /* of all rows */
	const struct kvg_cuda_move_row *move_rows; /* device, [rows] */
	const uint32_t *src_ids, *dst_ids;         /* device, [rows][cap]: blocks of source and destination indices */
	uint32_t src_cap, dst_cap;
	struct kvg_cuda_lists lists;
};

/* No tiles: nothing is enqueued. */
CUresult kvg_cuda_evict_move(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_moves *moves, CUstream stream);

/* Pairs at the end of held blocks move into the holes that are left before them. */
struct kvg_cuda_compaction {
	uint32_t rows;
	uint32_t tiles;                                  /* of all rows */
	const struct kvg_cuda_compact_row *compact_rows; /* device, [rows] */
	const uint32_t *ids;                             /* device, [rows][ids_cap]: the held blocks */
	uint32_t ids_cap;
	struct kvg_cuda_lists lists; /* the holes */
};

CUresult kvg_cuda_evict_compact(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_compaction *compaction, CUstream stream);

/* Copies whole blocks with their pairs' metadata. relocations: device, [count]; no block is source and destination. */
CUresult kvg_cuda_evict_relocate(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_relocation *relocations, uint32_t count, CUstream stream);

/*
 * Writes ids of one sequence slot's rows into a worker's table, and its base_len too when set_base_len. rows: device,
 * [layers * heads]; packed: device ids. What would lie beyond row_cap is left out.
 */
CUresult kvg_cuda_evict_publish(const struct kvg_cuda_evict *evict, const struct kvg_cuda_table *table, uint32_t slot,
	const struct kvg_cuda_table_row *rows, const uint32_t *packed, bool set_base_len, CUstream stream);

#endif
