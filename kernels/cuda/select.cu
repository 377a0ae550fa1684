/* select.cu - kernels of select.h; the large ones are in select_grid.cuh and select_rows.cuh. */
#include "kernels/cuda/select_grid.cuh"
#include "kernels/cuda/select_rows.cuh"

/* ---- one look at each score ---- */

/* Calls f(quad) for each quad of all rows. */
template <typename F> static __device__ __forceinline__ void each_quad(uint32_t begin, uint32_t end, F f)
{
	uint32_t stride = gridDim.x * KVG_SELECT_FLAT_THREADS, last = (end + 3) / 4;

	for (uint32_t quad = begin / 4 + blockIdx.x * KVG_SELECT_FLAT_THREADS + threadIdx.x; quad < last;
		quad += stride)
		f(quad);
}

extern "C" __global__ void __launch_bounds__(KVG_SELECT_FLAT_THREADS)
	select_mask(const __grid_constant__ struct kvg_select_mask_args args)
{
	const uint32_t begin = row_offset(args.offset, args.length, 0);
	const uint32_t end = row_offset(args.offset, args.length, args.rows);
	const float threshold = args.threshold ? __ldg(args.threshold) : args.value;
	uint32_t from = key_of(threshold);

	if (!args.equal)
		from = key_above(from);
	if (threshold != threshold)
		from = KEY_MAX;
	if (args.all)
		each_quad(begin, end, [&](uint32_t quad) { store_flags(args.keep, quad, begin, end, 0x01010101u); });
	else
		each_quad(begin, end, [&](uint32_t quad) {
			float4 v = load_quad(args.scores, NULL, quad, begin, end);

			store_flags(args.keep, quad, begin, end, flags_from(v, from));
		});
}

/* ---- steps ---- */

extern "C" __global__ void __launch_bounds__(KVG_SELECT_FLAT_THREADS)
	select_histogram(const __grid_constant__ struct kvg_select_step_args args)
{
	__shared__ uint32_t bins[KVG_SELECT_DIGITS];
	const uint32_t begin = row_offset(args.offset, args.length, 0);
	const uint32_t end = row_offset(args.offset, args.length, args.rows);
	const uint32_t shift = DIGIT_SHIFT(args.pass), mask = DIGIT_MASK(args.pass);
	const uint32_t prefix = args.pass ? args.state->prefix : 0;

	for (uint32_t i = threadIdx.x; i < KVG_SELECT_DIGITS; i += KVG_SELECT_FLAT_THREADS)
		bins[i] = 0;
	__syncthreads();
	each_quad(begin, end, [&](uint32_t quad) {
		const float4 v = load_quad(args.scores, NULL, quad, begin, end);
		const float scores[4] = {v.x, v.y, v.z, v.w};

#pragma unroll
		for (uint32_t j = 0; j < 4; j++) {
			uint32_t key = key_of(scores[j]), i = quad * 4 + j;

			if (i >= begin && i < end && (!args.pass || key >> DIGIT_SHIFT(args.pass - 1) == prefix))
				atomicAdd(bins + (key >> shift & mask), 1u);
		}
	});
	__syncthreads();
	for (uint32_t i = threadIdx.x; i < KVG_SELECT_DIGITS; i += KVG_SELECT_FLAT_THREADS)
		if (bins[i])
			atomicAdd(args.counts + i, bins[i]);
}

extern "C" __global__ void __launch_bounds__(KVG_SELECT_FLAT_THREADS)
	select_cut(const __grid_constant__ struct kvg_select_cut_args args)
{
	__shared__ uint32_t sums[KVG_SELECT_FLAT_THREADS / 32];
	__shared__ struct found found;
	const uint32_t own = KVG_SELECT_DIGITS / 4 - 1 - threadIdx.x;
	const uint4 counts = make_uint4(
		args.counts[own * 4], args.counts[own * 4 + 1], args.counts[own * 4 + 2], args.counts[own * 4 + 3]);
	const uint32_t rank = args.pass ? args.state->left : args.rank;

	(void)find_bins<KVG_SELECT_FLAT_THREADS, 1>(counts, own * 4, 0, &rank, sums, &found);
	if (threadIdx.x > 0)
		return;
	struct kvg_cuda_select_state state = {found.bin, rank - found.above, found.above, 0.0f};

	if (args.pass) {
		state.prefix |= args.state->prefix << (args.pass == 2 ? 10 : 11);
		state.greater += args.state->greater;
	}
	if (args.pass == 2)
		state.threshold = score_of(state.prefix);
	*args.state = state;
}
