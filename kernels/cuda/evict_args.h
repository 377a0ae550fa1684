/*
 * evict_args.h - what launchers of evict and copy pass to their kernels: plain C. Private to both families.
 */
#ifndef KVG_CUDA_EVICT_ARGS_H
#define KVG_CUDA_EVICT_ARGS_H

#include "kernels/cuda/evict_types.h"

/* An area with the constants of a division by ids_per_extent, by which evict.cuh finds a block's pairs. */
struct kvg_evict_area {
	struct kvg_cuda_area area;
	uint32_t multiplier, shift;
};

#define KVG_EVICT_THREADS 256u /* of a block of every kernel here, where nothing else is said */
#define KVG_EVICT_WARPS   (KVG_EVICT_THREADS / 32u)

/* Of a block of the count kernel, which has a row. */
#define KVG_EVICT_COUNT_THREADS 512u

/* Chunks of a warp of the gather kernel. */
#define KVG_EVICT_GATHER_CHUNKS 2u

/* Warps of a block of the move and compact kernels, and each one's shared memory: room for two pairs at least. */
#define KVG_EVICT_MOVE_WARPS 2u
#define KVG_EVICT_MOVE_ROOM  16384u

/* Tokens and heads of a block of the store kernel. */
#define KVG_EVICT_STORE_TOKENS 128u
#define KVG_EVICT_STORE_HEADS  8u

struct kvg_evict_store_args {
	struct kvg_evict_area at;
	struct kvg_cuda_rows rows;
	const float *scores;
	uint64_t layer_stride, head_stride, token_stride;
	uint32_t layer_begin, pos, tokens;
};

struct kvg_evict_gather_args {
	struct kvg_evict_area at;
	struct kvg_cuda_rows rows;
	struct kvg_cuda_scope scope;
	const uint32_t *offset;
	float *scores;
	uint32_t *found;
};

/* count and mark; count leaves lists alone. */
struct kvg_evict_mark_args {
	struct kvg_evict_area at;
	struct kvg_cuda_rows rows;
	struct kvg_cuda_scope scope;
	struct kvg_cuda_kept kept;
	struct kvg_cuda_counts counts;
	struct kvg_cuda_lists lists;
};

struct kvg_evict_move_args {
	struct kvg_evict_area at;
	uint32_t rows, tiles;
	const struct kvg_cuda_move_row *move_rows;
	const uint32_t *src_ids, *dst_ids;
	uint32_t src_cap, dst_cap;
	struct kvg_cuda_lists lists;
};

struct kvg_evict_compact_args {
	struct kvg_evict_area at;
	uint32_t rows, tiles;
	const struct kvg_cuda_compact_row *compact_rows;
	const uint32_t *ids;
	uint32_t ids_cap;
	struct kvg_cuda_lists lists;
};

struct kvg_evict_relocate_args {
	struct kvg_evict_area at;
	const struct kvg_cuda_relocation *relocations;
	uint32_t count;
};

struct kvg_evict_publish_args {
	struct kvg_cuda_table table;
	const struct kvg_cuda_table_row *rows;
	const uint32_t *packed;
	uint32_t slot, set_base_len;
};

/* Blocks and packed memory, either way. */
struct kvg_copy_args {
	struct kvg_evict_area at;
	const uint32_t *ids;
	uint32_t count;
	uint8_t *packed;
};

#endif
