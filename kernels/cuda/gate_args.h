/*
 * gate_args.h - what the gate's kernels are launched with, and where the constants of a layer lie; for C and
 * device code alike.
 *
 * Packed weights of a layer: for each 64 columns of D (the last ones filled up with zeros), the lines of all heads, and
 * for each head its G blocks of 16 rows of Wq, then its 16 rows of Wk; bf16. So a tile of whole heads holds all that
 * its scores need, and lies in memory as one piece. Constants of a layer: floats at the offsets below. Logits are in
 * units of ln 2, so that exponentials are powers of 2.
 */
#ifndef KVG_CUDA_GATE_ARGS_H
#define KVG_CUDA_GATE_ARGS_H

#include <stdint.h>

#define KVG_GATE_WIDTH 16 /* d */
#define KVG_GATE_CHUNK 64 /* columns of D that lie together: 128 bytes */

/* Offsets of a layer's constants, in floats; each array starts at a multiple of 4. */
#define KVG_GATE_AT_WEIGHT 0 /* sinks that each of the bases stands for */
#define KVG_GATE_AT_SINKS  1 /* bases of a head */
#define KVG_GATE_AT_QK     4 /* [d]: q_norm * k_norm / sqrt(d) / ln 2 */
#define KVG_GATE_AT_BQ                                                                                                 \
	20 /* [H][G][d], then b [H][G] / ln 2 padded to 4, then bases [H][sinks][d] of k_base * q_norm / sqrt(d) / ln  \
	      2 */

struct kvg_gate_args {
	uint64_t input;        /* bf16 rows of the first layer */
	uint64_t weights;      /* packed weights of the first layer */
	uint64_t constants;    /* floats of the first layer */
	uint64_t scores;       /* float [layers][heads][score_stride] */
	uint64_t partials;     /* sums of tiles that several clusters share: see kernels */
	uint64_t counters;     /* uint32_t: how many parts of such a tile are there */
	uint64_t layer_stride; /* bytes between layers of the input */
	uint64_t score_stride;
	uint32_t constants_stride; /* floats between layers */
	uint32_t at_b, at_bases;   /* offsets in floats */
	uint32_t bases_stride;     /* floats between heads in the bases */
	uint32_t rows, heads, hidden;
	uint32_t first_layer;                  /* of the packed weights, where a tensor map names them */
	uint32_t row_tiles, head_tiles, tiles; /* tiles = layers * row_tiles * head_tiles, heads innermost */
	uint32_t warp_tiles;                   /* of projections: tiles of 16 rows that a warp scores */
	uint32_t chunks;                       /* of 64 columns of the hidden states */
	uint32_t split; /* 1: the chunks of all tiles are dealt evenly to the clusters (the product of the three counts
			   is below 2^32); 0: whole tiles are */
};

#endif
