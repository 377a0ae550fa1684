/*
 * evict_types.h - what the C side and the device code of evict and copy share: plain C, pointers are device pointers.
 *
 * Addressing is proto/kvgate_abi.h's. A block has 16 places. Block ids number the extents with a gap:
 *     K(id) = k_base + id * stride, V(id) = v_base + id * stride
 *     pairs of a block = pairs + (id / ids_per_extent * blocks_per_extent + id % ids_per_extent) * 16
 * Place t of a block lies at t * k_bytes of K(id) and t * v_bytes of V(id). k_bytes and v_bytes are multiples of
 * 16 up to 4096 (0: there is no such half), the bases and stride are aligned to 16, pairs to 128.
 */
#ifndef KVG_CUDA_EVICT_TYPES_H
#define KVG_CUDA_EVICT_TYPES_H

#include <stdint.h>

#define KVG_CUDA_PLACES     16u  /* of one block */
#define KVG_CUDA_CHUNK      128u /* indices that are counted together; a nursery stripe of one row */
#define KVG_CUDA_MOVE_TILE  32u  /* moves that are one unit of work */
#define KVG_CUDA_MAX_RANGES 9u   /* protected ranges and the prefix */

/* What is known of one KV pair. score = -inf: an eviction under way has dropped it. */
struct kvg_cuda_pair {
	int32_t pos;
	float score;
};

/* Where blocks and the metadata of their pairs lie. */
struct kvg_cuda_area {
	uint8_t *k_base, *v_base;
	uint64_t stride;
	uint32_t k_bytes, v_bytes; /* of one pair */
	struct kvg_cuda_pair *pairs;
	uint32_t ids_per_extent, blocks_per_extent;
};

/*
 * One sequence's rows, row = layer * heads + head. Index i of a row is place i % 16 of block ids[row][i / 16];
 * blocks of held extents come first, then those of nursery runs. Position of index i: i < base_len[row] ?
 * pair.pos : fold_pos + (i - base_len[row]).
 */
struct kvg_cuda_rows {
	uint32_t layers, heads;
	const uint32_t *ids; /* [rows][ids_cap] */
	uint32_t ids_cap;
	uint32_t fold_pos;
	const uint32_t *base_len; /* [rows]: pairs whose position is written in their metadata */
	const uint32_t *length;   /* [rows]: pairs in all, base_len <= length <= 16 * ids_cap */
	const uint32_t
		*held; /* [rows]: pairs at lower indices lie in held blocks; length, or less and a multiple of 16 */
	uint32_t max_length; /* bounds every length */
};

/* Which pairs may go, and what their scores count as. Made by kvg_cuda_scope_prefill() or _decode(). */
struct kvg_cuda_scope {
	uint32_t decode;
	uint32_t begin, end;        /* prefill: positions that may go */
	uint32_t window;            /* prefill: newest positions before `end` that count as +INF */
	uint32_t candidates;        /* prefill: of each row */
	uint32_t first, fresh_from; /* decode: positions below / at least: count as 1.0 */
	uint32_t range_count;       /* protected: sorted, disjoint */
	uint32_t range_begin[KVG_CUDA_MAX_RANGES], range_end[KVG_CUDA_MAX_RANGES];
};

/* Where the decisions of a selection are: keep[offset[row] + rank], 1 stays, 0 goes. */
struct kvg_cuda_kept {
	const uint8_t *keep;
	const uint32_t *offset; /* [rows] */
};

/* What counting finds; device memory, aligned to 4. chunk = 128 indices. */
struct kvg_cuda_counts {
	uint32_t *kept;       /* [rows]: pairs that stay */
	uint32_t *holes;      /* [rows]: dropped at an index < held */
	uint8_t *stripe_kept; /* [rows][chunk_cap]: stay at indices held + 128 s .. held + 128 s + 127; 0 beyond */
	uint8_t *chunk_holes; /* [rows][chunk_cap]: dropped at indices 128 c .. 128 c + 127, below held; 0 beyond */
	uint32_t chunk_cap;   /* at least max_length / 128, rounded up; a multiple of 4 */
};

/* Compact lists, each row's in ascending order. */
struct kvg_cuda_lists {
	uint32_t *survivors; /* [rows][survivor_cap]: indices >= held that stay */
	uint32_t *holes;     /* [rows][hole_cap]: indices < held that were dropped */
	uint32_t survivor_cap, hole_cap;
};

/*
 * A row's part of a step of moves. Move k takes the pair at index survivors[src_first + k] to index
 * holes[hole_first + k] for k < hole_count, else tail_first + (k - hole_count). tile_first counts the tiles of 32
 * moves in the rows before: (count + 31) / 32 for each.
 */
struct kvg_cuda_move_row {
	uint32_t tile_first, count;
	uint32_t src_first, hole_first, hole_count, tail_first;
	uint32_t reserved[2];
};

/*
 * A row whose held blocks still have holes: those at hole_first .. hole_first + hole_count - 1 of its list. Pairs
 * at indices >= held_len - hole_count go to the holes below that. tile_first as above, with (hole_count + 31) / 32
 * tiles for each row.
 */
struct kvg_cuda_compact_row {
	uint32_t tile_first, held_len;
	uint32_t hole_first, hole_count;
};

/* A whole block to copy to another one. */
struct kvg_cuda_relocation {
	uint32_t src, dst;
};

/* A worker's table in device memory, as in kvgate_abi.h: ids [layers][max_sequences][heads][row_cap]. */
struct kvg_cuda_table {
	uint32_t *ids, *base_len;
	uint32_t layers, heads, max_sequences, row_cap;
};

/* ids[first .. first + count) of a row become packed[offset ..]; its base_len is set too, where asked for. */
struct kvg_cuda_table_row {
	uint32_t first, count, offset, base_len;
};

#endif
