/*
 * select.h - which pairs stay, on the GPU: the twin of kernels/host/select.h, with masks equal bit for bit.
 *
 * The rules are method.md sections 2 and 3, and kernels/host/select.h says them in full. Scores of layers * heads
 * rows come as CSR in device memory and may be any number, infinities included, but not NaN. Nothing is read
 * back: ranks are computed on the device, in doubles rounded as on the host, from the offsets there.
 *
 * Thresholds come from one cooperative kernel that keeps the scores in shared memory: a sample bounds the
 * threshold while they arrive, then rounds of counting narrow the range of keys to one. It starts when each of its
 * blocks, at most one for each multiprocessor, finds room at the same time. Calls enqueue only and can be captured in a
 * graph. Calls that share scratch must run one after the other.
 */
#ifndef KVG_CUDA_SELECT_H
#define KVG_CUDA_SELECT_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/device.h"
#include "kernels/cuda/select_args.h"
#include "kernels/host/select.h"

struct kvg_cuda_select;

/*
 * All pointers are device pointers. Fewer than 2^32 - 64 scores. With offset, count and longest only size the launch,
 * and results do not depend on them; without it each row has `longest` scores and the first begins at 0, which saves a
 * trip to memory before the scores.
 */
struct kvg_cuda_select_input {
	const float *scores;    /* 16-byte aligned */
	const uint32_t *offset; /* [layers * heads + 1], in scores; or NULL */
	uint32_t layers, heads;
	uint32_t count;   /* of all scores */
	uint32_t longest; /* row */
};

/* Loads the kernels into the current context, which cuda must outlive. CUDA_SUCCESS or why not. */
CUresult kvg_cuda_select_new(const struct kvg_cuda *cuda, struct kvg_cuda_select **ret);

/* Unloads them. NULL is fine; returns NULL. */
struct kvg_cuda_select *kvg_cuda_select_free(struct kvg_cuda_select *select);

/* Bytes of scratch in device memory (16-byte aligned) for any call below with at most that many layers. */
size_t kvg_cuda_select_scratch(const struct kvg_cuda_select *select, uint32_t layers);

/* Zeroes new scratch. Calls leave it ready for the next one. */
CUresult kvg_cuda_select_scratch_clear(
	const struct kvg_cuda_select *select, void *scratch, uint32_t layers, CUstream stream);

/*
 * Keeps the share `ratio` by the level's rule (enum kvg_select_level). keep: uint8_t like scores, 4-byte aligned. For
 * the levels pair and pair-layer keep may be NULL and threshold (or NULL) gets one float for all or for each
 * layer: scores above it stay. It is not written for a layer without scores, for ratio >= 1 and by other levels.
 * CUDA_ERROR_INVALID_VALUE: an unknown level, a pointer that is not aligned or missing.
 */
CUresult kvg_cuda_select_ratio(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	uint32_t level, double ratio, uint8_t *keep, float *threshold, void *scratch, CUstream stream);

/*
 * Decode eviction: when there are more than `budget` pairs in all, keeps the scores that reach the budget-th best, else
 * all. threshold as above: written only when something goes and the budget is not 0.
 */
CUresult kvg_cuda_select_budget(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	uint64_t budget, uint8_t *keep, float *threshold, void *scratch, CUstream stream);

/* Raises every row to at least `floor` kept pairs, best first, lowest index among equals. */
CUresult kvg_cuda_select_floor(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	uint32_t floor, uint8_t *keep, CUstream stream);

/* Keeps score > value. */
CUresult kvg_cuda_select_threshold(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	float value, uint8_t *keep, CUstream stream);

/* Keeps score > *threshold, or with equal score >= *threshold; threshold is in device memory. */
CUresult kvg_cuda_select_mask(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	const float *threshold, int equal, uint8_t *keep, CUstream stream);

/*
 * A threshold over scores that several GPUs hold: for pass 0, 1 and 2 each calls kvg_cuda_select_histogram(), the
 * counts are added up over the GPUs, and each calls kvg_cuda_select_cut() on the sum. Then state->threshold is the
 * score with `rank` greater ones or equals before it in descending order (0 is the largest; rank is less than the
 * scores of all).
 *
 * The first overwrites counts [2048] with how many of the scores that have the digits found so far have each next
 * digit; the second finds the digit that holds the rank and writes it down. state: 4-byte aligned; pass 0 starts anew.
 */
CUresult kvg_cuda_select_histogram(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	uint32_t pass, const struct kvg_cuda_select_state *state, uint32_t *counts, CUstream stream);
CUresult kvg_cuda_select_cut(const struct kvg_cuda_select *select, uint32_t pass, uint32_t rank, const uint32_t *counts,
	struct kvg_cuda_select_state *state, CUstream stream);

#endif
