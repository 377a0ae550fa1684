/*
 * select_rows.cuh - select_rows: the best of each row, lowest index among equals; one block for a row.
 *
 * Three passes count 11, 11 and 10 bits of the row's keys, which stay in shared memory as far as they fit.
 */
#ifndef KVG_CUDA_SELECT_ROWS_CUH
#define KVG_CUDA_SELECT_ROWS_CUH

#include "kernels/cuda/select_keys.cuh"

#define ROW_WARPS (KVG_SELECT_ROW_THREADS / 32)
#define ROW_BATCH 4 /* quads that a thread loads before it counts */

/* Keys of a row. 0, which no number has, marks what takes no part: outside the row, or kept already. */
struct row {
	const struct kvg_select_row_args *args;
	uint4 *staged;
	uint32_t begin, end, first, quads;
};

struct row_shared {
	alignas(16) uint32_t bins[KVG_SELECT_DIGITS];
	uint32_t sums[ROW_WARPS];
	struct found found;
	uint32_t candidates;
};

static __device__ __forceinline__ uint4 row_load(const struct row &row, uint32_t i)
{
	uint32_t quad = row.first + i;
	float4 v = load_quad(row.args->scores, NULL, quad, row.begin, row.end);
	uint4 keys = keys_of(v);
	bool inside = quad_inside(quad, row.begin, row.end);

	if (inside && row.args->rule != KVG_SELECT_ROW_FLOOR)
		return keys;
	uint32_t flags = 0, at = quad * 4;

	if (row.args->rule == KVG_SELECT_ROW_FLOOR)
		flags = load_flags(row.args->keep, quad, row.begin, row.end);
	keys.x = flags & 0xffu || at < row.begin ? 0 : keys.x;
	keys.y = flags & 0xff00u || at + 1 < row.begin || at + 1 >= row.end ? 0 : keys.y;
	keys.z = flags & 0xff0000u || at + 2 < row.begin || at + 2 >= row.end ? 0 : keys.z;
	keys.w = flags & 0xff000000u || at + 3 >= row.end ? 0 : keys.w;
	return keys;
}

static __device__ __forceinline__ uint4 row_keys(const struct row &row, uint32_t i)
{
	return i < row.args->staged ? row.staged[i] : row_load(row, i);
}

static __device__ __forceinline__ void count_first(uint32_t key, uint32_t *bins, uint32_t *candidates)
{
	if (!key)
		return;
	atomicAdd(bins + (key >> 21), 1u);
	++*candidates;
}

/* Reads the row, stages its keys and counts their first digits. */
static __device__ void row_begin(const struct row &row, struct row_shared *shared)
{
	uint32_t candidates = 0;

	for (uint32_t base = threadIdx.x; base < row.quads; base += ROW_BATCH * KVG_SELECT_ROW_THREADS) {
		uint4 keys[ROW_BATCH];

#pragma unroll
		for (uint32_t j = 0; j < ROW_BATCH; j++) {
			uint32_t i = base + j * KVG_SELECT_ROW_THREADS;

			keys[j] = i < row.quads ? row_load(row, i) : make_uint4(0, 0, 0, 0);
		}
#pragma unroll
		for (uint32_t j = 0; j < ROW_BATCH; j++) {
			uint32_t i = base + j * KVG_SELECT_ROW_THREADS;

			if (i < row.quads && i < row.args->staged)
				row.staged[i] = keys[j];
			count_first(keys[j].x, shared->bins, &candidates);
			count_first(keys[j].y, shared->bins, &candidates);
			count_first(keys[j].z, shared->bins, &candidates);
			count_first(keys[j].w, shared->bins, &candidates);
		}
	}
	add_to_block(candidates, &shared->candidates);
	__syncthreads();
}

/* Counts a later digit of the keys whose earlier ones are `prefix`. */
static __device__ void row_count(const struct row &row, uint32_t pass, uint32_t prefix, uint32_t *bins)
{
	const uint32_t shift = DIGIT_SHIFT(pass), mask = DIGIT_MASK(pass), above = DIGIT_SHIFT(pass - 1);

#pragma unroll 2
	for (uint32_t i = threadIdx.x; i < row.quads; i += KVG_SELECT_ROW_THREADS) {
		const uint4 k = row_keys(row, i);
		const uint32_t keys[4] = {k.x, k.y, k.z, k.w};

#pragma unroll
		for (uint32_t j = 0; j < 4; j++)
			if (keys[j] >> above == prefix)
				atomicAdd(bins + (keys[j] >> shift & mask), 1u);
	}
	__syncthreads();
}

/* The key with that rank; how many are greater and how many equal. */
static __device__ struct found row_find(const struct row &row, uint32_t rank, struct row_shared *shared)
{
	const uint32_t own = KVG_SELECT_DIGITS / 4 - 1 - threadIdx.x;
	struct found found = {0, 0, 0};

#pragma unroll 1
	for (uint32_t pass = 0; pass < 3; pass++) {
		if (pass)
			row_count(row, pass, found.bin, shared->bins);
		uint4 counts = ((uint4 *)shared->bins)[own];

		((uint4 *)shared->bins)[own] = make_uint4(0, 0, 0, 0);
		(void)find_bins<KVG_SELECT_ROW_THREADS, 1>(
			counts, own * 4, found.above, &rank, shared->sums, &shared->found);
		found.bin = found.bin << (pass == 2 ? 10 : 11) | shared->found.bin;
		found.above = shared->found.above;
		found.count = shared->found.count;
		__syncthreads();
	}
	return found;
}

static __device__ __forceinline__ bool row_keeps(const struct row &row, uint32_t key, uint32_t from)
{
	return key >= from || (!key && row.args->rule == KVG_SELECT_ROW_FLOOR);
}

static __device__ void row_mask(const struct row &row, uint32_t from)
{
	for (uint32_t i = threadIdx.x; i < row.quads; i += KVG_SELECT_ROW_THREADS) {
		const uint4 k = row_keys(row, i);
		uint32_t flags = (uint32_t)row_keeps(row, k.x, from) | (uint32_t)row_keeps(row, k.y, from) << 8 |
				 (uint32_t)row_keeps(row, k.z, from) << 16 | (uint32_t)row_keeps(row, k.w, from) << 24;

		store_flags(row.args->keep, row.first + i, row.begin, row.end, flags);
	}
}

static __device__ __forceinline__ uint32_t count_equal(uint4 k, uint32_t key)
{
	return (k.x == key) + (k.y == key) + (k.z == key) + (k.w == key);
}

/* Keeps what is greater than key and the first `ties` that are equal: each warp has a run of quads. */
static __device__ void row_mask_ties(const struct row &row, uint32_t key, uint32_t ties, uint32_t *sums)
{
	const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (row.quads + ROW_WARPS - 1) / ROW_WARPS;
	const uint32_t begin = min(warp * each, row.quads), end = min(begin + each, row.quads);
	uint32_t before = 0, equal = 0;

	for (uint32_t i = begin + lane; i < end; i += 32)
		equal += count_equal(row_keys(row, i), key);
	equal = __reduce_add_sync(WARP, equal);
	if (lane == 0)
		sums[warp] = equal;
	__syncthreads();
	for (uint32_t i = 0; i < warp; i++)
		before += sums[i];
	for (uint32_t base = begin; base < end; base += 32) {
		uint32_t i = base + lane, flags = 0;
		uint4 k = i < end ? row_keys(row, i) : make_uint4(0, 0, 0, 0);
		const uint32_t keys[4] = {k.x, k.y, k.z, k.w};
		uint32_t own = count_equal(k, key), at = own;

#pragma unroll
		for (uint32_t step = 1; step < 32; step *= 2) {
			uint32_t other = __shfl_up_sync(WARP, at, step);

			at += lane >= step ? other : 0;
		}
		uint32_t next = before + __shfl_sync(WARP, at, 31);

		at += before - own;
#pragma unroll
		for (uint32_t j = 0; j < 4; j++) {
			bool equals = keys[j] == key;

			flags |= (uint32_t)(equals ? at < ties : row_keeps(row, keys[j], key)) << (8 * j);
			at += equals;
		}
		if (i < end)
			store_flags(row.args->keep, row.first + i, row.begin, row.end, flags);
		before = next;
	}
}

/* How many of the row's candidates stay. */
static __device__ uint32_t row_wanted(const struct kvg_select_row_args &args, uint32_t n, uint32_t candidates)
{
	uint32_t kept = n - candidates;

	if (args.rule == KVG_SELECT_ROW_FLOOR)
		return args.floor > kept ? args.floor - kept : 0;
	uint32_t share = share_of(n, args.ratio);

	return args.rule == KVG_SELECT_ROW_SAFE ? (uint32_t)__dmul_rn(0.2, (double)share) : share;
}

extern "C" __global__ void __launch_bounds__(KVG_SELECT_ROW_THREADS, 3)
	select_rows(const __grid_constant__ struct kvg_select_row_args args)
{
	extern __shared__ uint4 staged_keys[];
	__shared__ struct row_shared shared;
	struct row row = {&args, staged_keys, row_offset(args.offset, args.length, blockIdx.x),
		row_offset(args.offset, args.length, blockIdx.x + 1), 0, 0};

	if (row.begin == row.end)
		return;
	row.first = row.begin / 4;
	row.quads = (row.end - 1) / 4 + 1 - row.first;
	((uint4 *)shared.bins)[threadIdx.x] = make_uint4(0, 0, 0, 0);
	if (threadIdx.x == 0)
		shared.candidates = 0;
	__syncthreads();
	row_begin(row, &shared);
	uint32_t candidates = shared.candidates, wanted = row_wanted(args, row.end - row.begin, candidates);

	if (!wanted || wanted >= candidates) {
		if (wanted || args.rule != KVG_SELECT_ROW_FLOOR)
			row_mask(row, wanted ? 1 : KEY_MAX);
		return;
	}
	struct found found = row_find(row, wanted - 1, &shared);

	if (wanted - found.above == found.count)
		row_mask(row, found.bin);
	else
		row_mask_ties(row, found.bin, wanted - found.above, shared.sums);
}

#endif
