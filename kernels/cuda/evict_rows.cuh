/*
 * evict_rows.cuh - device code that evict.cu and tier.cu share: a sequence's rows, the ranks of candidates, and chunks
 * of a row that a warp looks at together.
 */
#ifndef KVG_CUDA_EVICT_ROWS_CUH
#define KVG_CUDA_EVICT_ROWS_CUH

#include "kernels/cuda/evict.cuh"

#define NO_RANK 0xffffffffu

/* ---- rows and ranks ---- */

struct row_view {
	const uint32_t *ids;
	uint32_t base_len, length, held;
};

__device__ inline row_view view_row(const kvg_cuda_rows &rows, uint32_t row)
{
	return {rows.ids + (size_t)row * rows.ids_cap, rows.base_len[row], rows.length[row], rows.held[row]};
}

/* Position of an index: from the index itself where it is not written yet. */
__device__ inline uint32_t position(const kvg_cuda_rows &rows, const row_view &row, uint32_t index, uint2 pair)
{
	return index < row.base_len ? pair.x : rows.fold_pos + (index - row.base_len);
}

/* Number of the candidate with that position among its row's, or NO_RANK. */
__device__ inline uint32_t rank_of(const kvg_cuda_scope &scope, uint32_t pos)
{
	uint32_t skip = 0;

	if (pos < scope.begin || pos >= scope.end)
		return NO_RANK;
	for (uint32_t i = 0; i < scope.range_count; i++) {
		if (pos < scope.range_begin[i])
			break;
		if (pos < scope.range_end[i])
			return NO_RANK;
		skip += scope.range_end[i] - scope.range_begin[i];
	}
	return pos - scope.begin - skip;
}

/* ---- chunks: up to 128 indices of a row, from a multiple of 16 on; a warp's lane has every 32nd ---- */

#define LANE_PAIRS (KVG_CUDA_CHUNK / 32u)

/* Indices [begin, end). */
struct chunk {
	uint32_t begin, end;
};

struct lane_pairs {
	uint2 *address[LANE_PAIRS]; /* within the row's blocks, even where there is no pair */
	uint2 pair[LANE_PAIRS];
};

__device__ inline uint32_t lane_index(chunk at, uint32_t j)
{
	return at.begin + j * 32 + threadIdx.x % 32;
}

/* Pairs of the chunk that are this lane's. */
__device__ inline uint32_t lane_count(chunk at)
{
	uint32_t pairs = at.end - at.begin, lane = threadIdx.x % 32;

	return pairs > lane ? (pairs - lane + 31) / 32 : 0;
}

/* Each lane finds one of the chunk's eight blocks; the others ask it. */
__device__ inline void read_chunk(const kvg_evict_area &area, const row_view &row, chunk at, lane_pairs &lane)
{
	uint32_t block = min(at.begin / KVG_CUDA_PLACES + threadIdx.x % 8, (at.end - 1) / KVG_CUDA_PLACES);
	uint64_t pairs = reinterpret_cast<uint64_t>(evict_pairs(area, row.ids[block]));

#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++) {
		uint64_t found = __shfl_sync(EVICT_ALL_LANES, pairs, 2 * j + threadIdx.x / 16 % 2);

		lane.address[j] = reinterpret_cast<uint2 *>(found) + threadIdx.x % KVG_CUDA_PLACES;
	}
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++)
		lane.pair[j] = *lane.address[j];
}

/*
 * Whether the ranks of the chunk's pairs follow one another and are known from the indices alone: index i has rank
 * *ret_first + (i - begin). The whole warp asks the same.
 */
__device__ inline bool follow(
	const kvg_cuda_scope &scope, const kvg_cuda_rows &rows, const row_view &row, chunk at, uint32_t *ret_first)
{
	uint32_t pos = rows.fold_pos + (at.begin - row.base_len), last = at.end - 1 - at.begin;

	*ret_first = at.begin;
	if (scope.decode)
		return true;
	if (at.begin < row.base_len)
		return false;
	*ret_first = rank_of(scope, pos);
	return *ret_first != NO_RANK && rank_of(scope, pos + last) == *ret_first + last;
}

__device__ inline chunk held_chunk(const row_view &row, uint32_t c)
{
	return {min(c * KVG_CUDA_CHUNK, row.held), min((c + 1) * KVG_CUDA_CHUNK, row.held)};
}

__device__ inline chunk fresh_chunk(const row_view &row, uint32_t c)
{
	return {min(row.held + c * KVG_CUDA_CHUNK, row.length), min(row.held + (c + 1) * KVG_CUDA_CHUNK, row.length)};
}

/* Which of the lane's pairs stay, one bit for each; none where there is no pair. keep: the first one's, ranks follow.
 */
template <uint32_t PAIRS> __device__ inline uint32_t kept_in_order(const uint8_t *keep, chunk at)
{
	uint8_t stays[PAIRS];
	uint32_t kept = 0;

	keep += threadIdx.x % 32;
#pragma unroll
	for (uint32_t j = 0; j < PAIRS; j++)
		stays[j] = lane_index(at, j) < at.end ? keep[32 * j] : 0;
#pragma unroll
	for (uint32_t j = 0; j < PAIRS; j++)
		kept |= (stays[j] != 0 ? 1u : 0u) << j;
	return kept;
}

/* The same by the pairs' positions. */
__device__ inline uint32_t kept_by_rank(
	const kvg_cuda_scope &scope, const uint8_t *keep, chunk at, const lane_pairs &lane)
{
	uint32_t kept = 0;

#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++) {
		uint32_t rank = rank_of(scope, lane.pair[j].x);

		if (lane_index(at, j) < at.end && (rank == NO_RANK || keep[rank] != 0))
			kept |= 1u << j;
	}
	return kept;
}

/* Sum of the first n bytes, over the warp. The address is a multiple of 4, and the last word is all there. */
__device__ inline uint32_t sum_bytes(const uint8_t *bytes, uint32_t n)
{
	const uint32_t *words = reinterpret_cast<const uint32_t *>(bytes);
	uint32_t sum = 0;

	for (uint32_t i = threadIdx.x % 32; 4 * i < n; i += 32) {
		uint32_t word = words[i];

		if (n - 4 * i < 4)
			word &= (1u << (8 * (n - 4 * i))) - 1;
		sum = __dp4a(word, 0x01010101u, sum);
	}
	return __reduce_add_sync(EVICT_ALL_LANES, sum);
}

#endif
