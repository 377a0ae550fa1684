/* Kernels of kernels/cuda/copy.h: a warp for each block, or for several in turns. */
#include "kernels/cuda/evict.cuh"

extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_copy_gather(const __grid_constant__ kvg_copy_args args)
{
	const kvg_cuda_area &area = args.at.area;
	uint32_t first = blockIdx.x * KVG_EVICT_WARPS + threadIdx.x / 32, count = area.k_bytes + area.v_bytes;

	for (uint32_t i = first; i < args.count; i += gridDim.x * KVG_EVICT_WARPS) {
		uint32_t id = args.ids[i];
		uint8_t *packed = args.packed + (uint64_t)i * count * 16;

		evict_copy_warp(
			threadIdx.x % 32, count, [&](uint32_t n) { return evict_block_vector(area, id, n); },
			[&](uint32_t n) { return packed + n * 16; });
	}
}

extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_copy_scatter(const __grid_constant__ kvg_copy_args args)
{
	const kvg_cuda_area &area = args.at.area;
	uint32_t first = blockIdx.x * KVG_EVICT_WARPS + threadIdx.x / 32, count = area.k_bytes + area.v_bytes;

	for (uint32_t i = first; i < args.count; i += gridDim.x * KVG_EVICT_WARPS) {
		uint32_t id = args.ids[i];
		const uint8_t *packed = args.packed + (uint64_t)i * count * 16;

		evict_copy_warp(
			threadIdx.x % 32, count, [&](uint32_t n) { return packed + n * 16; },
			[&](uint32_t n) { return evict_block_vector(area, id, n); });
	}
}
