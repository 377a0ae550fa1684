/*
 * tier_types.h - what the C side and the device code of the tier's kernels share: plain C, pointers are device
 * pointers.
 */
#ifndef KVG_CUDA_TIER_TYPES_H
#define KVG_CUDA_TIER_TYPES_H

#include "kernels/cuda/evict_types.h"

/*
 * Pairs in packed form: frames of `pairs` pairs each, frame_bytes apart. In a frame, which begins at a multiple of 16:
 *     K of pair i at k + i * k_bytes, V at v + i * v_bytes, its position at pos + i * pos_stride and its score at
 *     score + i * score_stride
 * k and v are multiples of 16, pos, score and their strides of 4.
 */
struct kvg_cuda_packed {
	uint8_t *at;
	uint64_t frame_bytes;
	uint32_t pairs;
	uint32_t k, v, pos, score;
	uint32_t pos_stride, score_stride;
};

/*
 * What is collected: the dropped pairs of rows [row_begin, row_end), of which those of a row are numbered first[row],
 * first[row] + 1, ... by index; of them the pairs numbered begin .. end - 1, which become pairs 0, 1, ... of the
 * packed form.
 */
struct kvg_cuda_collection {
	const uint32_t *first; /* device, [rows] */
	uint32_t row_begin, row_end;
	uint32_t begin, end;
};

/* A packed pair and the place that it goes to: `place` of block `id`. */
struct kvg_cuda_return {
	uint32_t frame, pair;
	uint32_t id, place;
};

/* What becomes of the destinations' pairs when blocks are copied. */
enum kvg_cuda_block_pairs {
	KVG_CUDA_PAIRS_LEFT,   /* they stay as they are */
	KVG_CUDA_PAIRS_COPIED, /* the sources' */
	KVG_CUDA_PAIRS_FRESH,  /* position 0, score 1 */
};

#endif
