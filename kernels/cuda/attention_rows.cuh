/* attention_rows.cuh - lengths and ids of rows, as every kernel of attention reads them. */
#ifndef KVG_CUDA_ATTENTION_ROWS_CUH
#define KVG_CUDA_ATTENTION_ROWS_CUH

#include "kernels/cuda/attention_args.h"

#define KVG_TOKENS_LOG 4u /* 16 tokens of a block */

struct kvg_row_place {
	uint32_t length;
	uint32_t table; /* slot * heads + head: its place in one layer's tables */
	const uint32_t *ids;
};

/* Row `row` = sequence of the list * heads + head. A slot that is none is a row of length 0. */
static __device__ __forceinline__ struct kvg_row_place kvg_row_find(
	const struct kvg_attention_rows &rows, size_t layer, uint32_t row)
{
	const uint32_t sequence = row / rows.heads, head = row - sequence * rows.heads, slot = rows.slots[sequence];
	const bool none = slot >= rows.max_sequences;
	const uint32_t table = (none ? 0 : slot) * rows.heads + head;
	const size_t at = layer * rows.max_sequences * rows.heads + table;
	const uint32_t most = rows.row_cap << KVG_TOKENS_LOG;
	struct kvg_row_place place = {0, table, rows.ids + at * rows.row_cap};

	if (!none)
		place.length = min(rows.base_len[at] + rows.appended[slot] + rows.extra, most);
	return place;
}

static __device__ __forceinline__ uint32_t kvg_row_blocks(uint32_t length)
{
	return (length + 15) >> KVG_TOKENS_LOG;
}

/* The sum of `value` over this thread and the ones before it in the block of KVG_ATTENTION_SCAN; *total: over all. */
static __device__ __forceinline__ uint32_t kvg_block_scan(uint32_t value, uint32_t *total)
{
	__shared__ uint32_t sums[KVG_ATTENTION_SCAN / 32];
	const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;

	for (uint32_t step = 1; step < 32; step *= 2) {
		const uint32_t other = __shfl_up_sync(~0u, value, step);

		value += lane >= step ? other : 0;
	}
	if (lane == 31)
		sums[warp] = value;
	__syncthreads();
	uint32_t before = 0, all = 0;

	for (uint32_t i = 0; i < KVG_ATTENTION_SCAN / 32; i++) {
		before += i < warp ? sums[i] : 0;
		all += sums[i];
	}
	*total = all;
	return value + before;
}

#endif
