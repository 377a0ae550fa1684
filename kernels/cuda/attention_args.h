/*
 * attention_args.h - what the launchers of attention.h hand to their kernels. Pointers are device addresses.
 */
#ifndef KVG_CUDA_ATTENTION_ARGS_H
#define KVG_CUDA_ATTENTION_ARGS_H

#include <stdint.h>

#define KVG_ATTENTION_THREADS 256u  /* of a block of the copying kernels */
#define KVG_ATTENTION_SCAN    1024u /* of the block that scans rows */
#define KVG_ATTENTION_QUERIES 8u    /* query heads that one matrix product takes: a group, padded */
#define KVG_ATTENTION_WARPS   4u    /* of a thread block of attend() */

/*
 * The decode kernels: type, its enum kvg_kernel_dtype, dimension, blocks that a warp loads together (small dimensions
 * take several, so that as many bytes are in flight), and warps of a thread block (as many as registers leave room
 * for).
 */
#define KVG_ATTENTION_KERNELS(X)                                                                                       \
	X(bf16, BF16, 32, 4, 12)                                                                                       \
	X(bf16, BF16, 64, 2, 12)                                                                                       \
	X(bf16, BF16, 96, 1, 12)                                                                                       \
	X(bf16, BF16, 128, 1, 12)                                                                                      \
	X(bf16, BF16, 192, 1, 8)                                                                                       \
	X(bf16, BF16, 256, 1, 8)                                                                                       \
	X(f16, F16, 32, 4, 12)                                                                                         \
	X(f16, F16, 64, 2, 12)                                                                                         \
	X(f16, F16, 96, 1, 12)                                                                                         \
	X(f16, F16, 128, 1, 12)                                                                                        \
	X(f16, F16, 192, 1, 8)                                                                                         \
	X(f16, F16, 256, 1, 8)                                                                                         \
	X(f32, F32, 32, 2, 12)                                                                                         \
	X(f32, F32, 64, 1, 12)                                                                                         \
	X(f32, F32, 96, 1, 8)                                                                                          \
	X(f32, F32, 128, 1, 8)

/* Loaded 16 bytes at a time. */
#define KVG_ATTENTION_ALIGNED __attribute__((aligned(16)))

/* The tables of one layer: its base_len and ids are already advanced to it. */
struct kvg_attention_rows {
	const uint32_t *ids, *base_len; /* [max_sequences][heads][row_cap], [max_sequences][heads] */
	const uint32_t *appended, *slots;
	uint32_t sequences, heads, max_sequences, row_cap, extra;
};

struct kvg_attention_append {
	struct kvg_attention_rows rows; /* sequences: tokens */
	uint8_t *k_base, *v_base;
	uint64_t stride;
	const uint32_t *index; /* NULL: appended[slot] */
	const uint8_t *k, *v;
	uint64_t k_stride, v_stride; /* bytes between tokens */
	uint32_t k_pieces, v_pieces; /* 16-byte pieces of one head's row */
};

struct kvg_attention_advance {
	uint32_t *appended;
	const uint32_t *slots;
	uint32_t count, max_sequences, by;
};

/*
 * One layer of a plan, at memory + i * layer_bytes. The layer's blocks of 16 pairs, row after row, are numbered
 * 0 .. total - 1 (a row without pairs counts as one block), and worker w (a warp) takes those from w * total / workers
 * to (w + 1) * total / workers, rounded down: at least one.
 */
struct KVG_ATTENTION_ALIGNED kvg_attention_head {
	uint32_t total, workers;
	uint64_t inverse; /* 2^64 / total, rounded up: what divides by total (0 for 1) */
};

/* A row of the tables. */
struct KVG_ATTENTION_ALIGNED kvg_attention_row {
	uint32_t first, length; /* number of its first block in the layer; pairs */
	uint32_t table, id;     /* slot * heads + head; its first block's id */
};

/* Where a worker begins: `count` blocks from block `block` of row `row` on. */
struct KVG_ATTENTION_ALIGNED kvg_attention_start {
	struct kvg_attention_row at; /* id: of block `block` */
	uint32_t row, block, count, reserved;
};

/* The head is followed by starts[workers], rows[rows] at rows_at, and a counter for each row at counters_at. */
struct kvg_attention_plan {
	uint8_t *memory;
	uint64_t layer_bytes, rows_at, counters_at;
	uint32_t workers; /* warps of attend() */
	uint32_t least;   /* blocks that a worker takes at least, if the layer has them */
};

struct kvg_attention_plan_make {
	struct kvg_attention_rows rows; /* of the first layer */
	struct kvg_attention_plan plan;
};

struct kvg_attention_attend {
	struct kvg_attention_plan plan; /* memory: of this layer */
	const uint8_t *k_base, *v_base;
	uint64_t stride;
	const uint32_t *ids; /* of this layer */
	const uint8_t *q;
	uint8_t *out;
	uint64_t q_stride, out_stride; /* bytes */
	float *scratch;                /* [workers][2] partial results */
	float scale;                   /* times log2(e) */
	uint32_t heads, row_cap, max_sequences, group;
};

struct kvg_attention_export {
	struct kvg_attention_rows rows;
	int32_t *indptr, *indices, *lengths; /* lengths: of rows, or of their last pages */
	uint32_t cap;
};

#endif
