/*
 * select.h - which pairs stay: thresholds by radix select, never a full sort.
 * Rules and their arithmetic (doubles, in the order written) are method.md
 * sections 2 and 3.
 *
 * Scores of R = layers * heads rows come as CSR: row r is scores[offset[r] ..
 * offset[r + 1]), rows of a layer adjacent (row = layer * heads + head). keep
 * has the same shape: 1 stays, 0 goes. Scores are not NaN.
 */
#ifndef KVG_KERNELS_SELECT_H
#define KVG_KERNELS_SELECT_H

#include <stddef.h>
#include <stdint.h>

/* The values of enum kvg_level in proto/kvgate_abi.h. */
enum kvg_select_level {
	KVG_SELECT_PAIR = 0,
	KVG_SELECT_PAIR_HEAD = 1,
	KVG_SELECT_PAIR_LAYER = 2,
	KVG_SELECT_ADAKV_LAYER = 3
};

struct kvg_select_input {
	const float *scores;
	const size_t *offset; /* [layers * heads + 1] */
	uint32_t layers, heads;
};

/*
 * Method.md section 2: ratio and window of a context of n tokens read in chunks of
 * `chunk` (0: whole). window_absolute: no 0.02 n rule. Results: *ret_ratio = r' for the
 * evicted range, *ret_window = tokens that stay at the end.
 */
void kvg_select_prefill_params(uint64_t n, uint64_t chunk, double ratio, uint64_t window, int window_absolute,
	double *ret_ratio, uint64_t *ret_window);

/* Bytes of scratch for any call below on that many scores and rows. */
size_t kvg_select_scratch(size_t scores, size_t rows);

/* Keeps the share `ratio` by the level's rule (uniform rows for the per-head and adakv levels' counts: a row's own
 * length is N). */
void kvg_select_ratio(const struct kvg_select_input *in, uint32_t level, double ratio, uint8_t *keep, void *scratch);

/* Keeps score > threshold. */
void kvg_select_threshold(const struct kvg_select_input *in, float threshold, uint8_t *keep);

/*
 * Decode eviction (section 3): when there are more than `budget` pairs in all, keeps
 * score >= sorted_ascending[N - budget] over all rows together; else keeps all. budget
 * is in pairs (B * L * H).
 */
void kvg_select_budget(const struct kvg_select_input *in, uint64_t budget, uint8_t *keep, void *scratch);

/* Raises every row to at least `floor` kept pairs (or all of a shorter row): best scores first, lowest index among
 * equals. */
void kvg_select_floor(const struct kvg_select_input *in, uint32_t floor, uint8_t *keep, void *scratch);

#endif
