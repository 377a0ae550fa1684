/*
 * tier_types.h - what the C side and the device code of the tier's kernels share: plain C, pointers are device
 * pointers.
 */
#ifndef KVG_CUDA_TIER_TYPES_H
#define KVG_CUDA_TIER_TYPES_H

#include "kernels/cuda/evict_types.h"

#define KVG_CUDA_NO_FIELD UINT32_MAX

/*
 * Pairs in packed form: frames of `pairs` pairs each, frame_bytes apart. In a frame, which begins at a multiple of 16:
 *     K of pair i at k + i * k_bytes, V at v + i * v_bytes, and at i * entry_bytes behind row, pos and score those
 * k and v are multiples of 16, the others of 4. k KVG_CUDA_NO_FIELD: there are no K and V; row and
 * pos: no rows, no positions.
 */
struct kvg_cuda_packed {
	uint8_t *at;
	uint64_t frame_bytes;
	uint32_t pairs;
	uint32_t k, v;
	uint32_t entry_bytes, row, pos, score;
};

/* A pair of the packed form. frame UINT32_MAX: nowhere. */
struct kvg_cuda_spot {
	uint32_t frame, pair;
};

/*
 * What is collected: the dropped pairs of rows [row_begin, row_end), of which those of a row are numbered first[row],
 * first[row] + 1, ... by index; of them the pairs numbered begin .. end - 1. They go to spots[0], spots[1], ..., or to
 * pairs 0, 1, ... of the packed form, frame after frame, where spots is NULL.
 */
struct kvg_cuda_collection {
	const uint32_t *first; /* device, [rows] */
	uint32_t row_begin, row_end;
	uint32_t begin, end;
	const struct kvg_cuda_spot *spots; /* device */
};

/* A packed pair and the place that it goes to: `place` of block `id`. */
struct kvg_cuda_return {
	struct kvg_cuda_spot from;
	uint32_t id, place;
};

/* What becomes of the destinations' pairs when blocks are copied. */
enum kvg_cuda_block_pairs {
	KVG_CUDA_PAIRS_LEFT,   /* they stay as they are */
	KVG_CUDA_PAIRS_COPIED, /* the sources' */
	KVG_CUDA_PAIRS_FRESH,  /* position 0, score 1 */
};

#endif
