/*
 * select_keys.cuh - scores as keys, quads of scores, and ranks in bins: what the kernels of select.cu share.
 *
 * A score's key is its bits mapped to a uint32 of the same order, so thresholds are found by counting
 * keys in ranges. Bins are always looked at from the greatest down, as ranks count from the best score.
 */
#ifndef KVG_CUDA_SELECT_KEYS_CUH
#define KVG_CUDA_SELECT_KEYS_CUH

#include "kernels/cuda/select_args.h"

#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#define POSITIVE_INFINITY __int_as_float(0x7f800000)
#define KEY_MAX           0xffffffffu
#define WARP              0xffffffffu
#define POLL_LIMIT        (1u << 27) /* minutes: only scratch that was never cleared gets there */

/* Passes over 11, 11 and 10 bits of the keys. */
#define DIGIT_SHIFT(pass) ((pass) == 0 ? 21u : (pass) == 1 ? 10u : 0u)
#define DIGIT_MASK(pass)  ((pass) == 2 ? 1023u : 2047u)

/* A bin that holds a rank: how many are above it and in it. */
struct found {
	uint32_t bin, above, count;
};

static __device__ __forceinline__ uint32_t shared_address(const void *at)
{
	return (uint32_t)__cvta_generic_to_shared(at);
}

/* ---- keys ---- */

static __device__ __forceinline__ uint32_t key_of(float score)
{
	uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f)); /* -0 equals 0 */

	return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

static __device__ __forceinline__ float score_of(uint32_t key)
{
	return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

/* The least key that "greater than this key" keeps. */
static __device__ __forceinline__ uint32_t key_above(uint32_t key)
{
	return key == KEY_MAX ? KEY_MAX : key + 1;
}

/* int(n * ratio) in doubles, as on the host. */
static __device__ __forceinline__ uint32_t share_of(uint32_t n, double ratio)
{
	return (uint32_t)__double2ull_rz(__dmul_rn((double)n, ratio));
}

/* Where a row begins; without offsets every row has `length` scores. */
static __device__ __forceinline__ uint32_t row_offset(const uint32_t *offset, uint32_t length, uint32_t row)
{
	return offset ? __ldg(offset + row) : row * length;
}

/* ---- scores by quads ---- */

static __device__ __forceinline__ bool quad_inside(uint32_t quad, uint32_t begin, uint32_t end)
{
	return quad * 4 >= begin && quad * 4 + 4 <= end;
}

/* One quad; what is outside [begin, end) reads as -infinity, and what is safe as infinity. */
static __device__ __forceinline__ float4 load_quad(
	const float *scores, const uint8_t *safe, uint32_t quad, uint32_t begin, uint32_t end)
{
	float v[4];

	if (quad_inside(quad, begin, end)) {
		float4 all = __ldcg((const float4 *)scores + quad);

		v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
	} else {
#pragma unroll
		for (uint32_t j = 0; j < 4; j++) {
			uint32_t i = quad * 4 + j;

			v[j] = i >= begin && i < end ? __ldcg(scores + i) : NEGATIVE_INFINITY;
		}
	}
	if (safe) {
#pragma unroll
		for (uint32_t j = 0; j < 4; j++) {
			uint32_t i = quad * 4 + j;

			if (i >= begin && i < end && safe[i])
				v[j] = POSITIVE_INFINITY;
		}
	}
	return make_float4(v[0], v[1], v[2], v[3]);
}

/* Four flags of 0 or 1, the first in the lowest byte, to where they belong in [begin, end). */
static __device__ __forceinline__ void store_flags(
	uint8_t *keep, uint32_t quad, uint32_t begin, uint32_t end, uint32_t flags)
{
	if (quad_inside(quad, begin, end)) {
		((uint32_t *)keep)[quad] = flags;
	} else {
		for (uint32_t j = 0; j < 4; j++) {
			uint32_t i = quad * 4 + j;

			if (i >= begin && i < end)
				keep[i] = (uint8_t)(flags >> (8 * j));
		}
	}
}

static __device__ __forceinline__ uint32_t flags_from(float4 v, uint32_t from)
{
	return (uint32_t)(key_of(v.x) >= from) | (uint32_t)(key_of(v.y) >= from) << 8 |
	       (uint32_t)(key_of(v.z) >= from) << 16 | (uint32_t)(key_of(v.w) >= from) << 24;
}

/* The flags of a quad as they are; what is outside [begin, end) is 0. */
static __device__ __forceinline__ uint32_t load_flags(const uint8_t *keep, uint32_t quad, uint32_t begin, uint32_t end)
{
	uint32_t flags = 0;

	if (quad_inside(quad, begin, end))
		return ((const uint32_t *)keep)[quad];
	for (uint32_t j = 0; j < 4; j++) {
		uint32_t i = quad * 4 + j;

		if (i >= begin && i < end)
			flags |= (uint32_t)keep[i] << (8 * j);
	}
	return flags;
}

static __device__ __forceinline__ uint4 keys_of(float4 v)
{
	return make_uint4(key_of(v.x), key_of(v.y), key_of(v.z), key_of(v.w));
}

/* Starts to copy a whole quad to shared memory; the thread waits for its own with copies_wait(). */
static __device__ __forceinline__ void copy_quad(float4 *to, const float4 *from)
{
	asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

static __device__ __forceinline__ void copies_wait(void)
{
	asm volatile("cp.async.wait_all;" ::: "memory");
}

/* ---- counting ---- */

/* Adds 1 to a bin of shared memory when distance <= span, without a branch. */
static __device__ __forceinline__ void count_if(uint32_t distance, uint32_t span, uint32_t shift, uint32_t bins)
{
	asm volatile("{ .reg .pred p; .reg .u32 r; setp.le.u32 p, %0, %1; @p atom.shared.add.u32 r, [%2], 1; }" ::"r"(
			     distance),
		     "r"(span), "r"(bins + (distance >> shift) * 4)
		     : "memory");
}

/* The distances of a quad's keys from low; true when one is in the range. */
static __device__ __forceinline__ bool quad_distances(uint4 keys, uint32_t low, uint32_t span, uint32_t distances[4])
{
	distances[0] = keys.x - low;
	distances[1] = keys.y - low;
	distances[2] = keys.z - low;
	distances[3] = keys.w - low;
	return min(min(distances[0], distances[1]), min(distances[2], distances[3])) <= span;
}

/* ---- ranks in bins, by one block ---- */

/*
 * Finds the bin of each of N ranks. This thread holds bins `lowest` to lowest + 3 in counts.x to .w; the threads'
 * bins descend. `above` are greater than all bins. Returns above and all bins together; found[i].count is 0 where
 * no bin holds the rank. sums [THREADS / 32] and found [N] are shared memory that no thread still reads.
 */
template <uint32_t THREADS, uint32_t N>
static __device__ uint32_t find_bins(
	uint4 counts, uint32_t lowest, uint32_t above, const uint32_t *ranks, uint32_t *sums, struct found *found)
{
	const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = THREADS / 32;
	uint32_t own = counts.x + counts.y + counts.z + counts.w, before = own, total;

#pragma unroll
	for (uint32_t step = 1; step < 32; step *= 2) {
		uint32_t other = __shfl_up_sync(WARP, before, step);

		before += lane >= step ? other : 0;
	}
	if (lane == 31)
		sums[warp] = before;
	if (threadIdx.x < N)
		found[threadIdx.x].count = 0;
	__syncthreads();
	total = lane < warps ? sums[lane] : 0;
#pragma unroll
	for (uint32_t step = 1; step < 32; step *= 2) {
		uint32_t other = __shfl_up_sync(WARP, total, step);

		total += lane >= step ? other : 0;
	}
	before += above - own + (warp ? __shfl_sync(WARP, total, warp - 1) : 0);
	total = above + __shfl_sync(WARP, total, 31);
#pragma unroll
	for (uint32_t i = 0; i < N; i++) {
		uint32_t rank = ranks[i], at = before;

		if (rank < before || rank - before >= own)
			continue;
		if (rank - at < counts.w) {
			found[i] = {lowest + 3, at, counts.w};
			continue;
		}
		at += counts.w;
		if (rank - at < counts.z) {
			found[i] = {lowest + 2, at, counts.z};
			continue;
		}
		at += counts.z;
		if (rank - at < counts.y)
			found[i] = {lowest + 1, at, counts.y};
		else
			found[i] = {lowest, at + counts.y, counts.x};
	}
	__syncthreads();
	return total;
}

static __device__ __forceinline__ void add_to_block(uint32_t value, uint32_t *sum)
{
	value = __reduce_add_sync(WARP, value);
	if (threadIdx.x % 32 == 0 && value)
		atomicAdd(sum, value);
}

#endif
