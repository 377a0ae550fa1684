/*
 * evict.cuh - device code that evict.cu and copy.cu share: where blocks and pairs lie, and copies of 16-byte vectors.
 */
#ifndef KVG_CUDA_EVICT_CUH
#define KVG_CUDA_EVICT_CUH

#include "kernels/cuda/evict_args.h"

#define EVICT_ALL_LANES 0xffffffffu

/* id / ids_per_extent for every 32-bit id: multiplication by a 33-bit reciprocal (Granlund and Montgomery, 1994). */
__device__ inline uint32_t evict_extent(const kvg_evict_area &at, uint32_t id)
{
	uint32_t high = __umulhi(at.multiplier, id);

	return (high + ((id - high) >> 1)) >> at.shift;
}

__device__ inline kvg_cuda_pair *evict_pairs(const kvg_evict_area &at, uint32_t id)
{
	uint32_t extent = evict_extent(at, id);
	uint32_t in_extent = id - extent * at.area.ids_per_extent;

	return at.area.pairs + ((uint64_t)extent * at.area.blocks_per_extent + in_extent) * KVG_CUDA_PLACES;
}

__device__ inline uint4 evict_load(const uint8_t *at)
{
	return *reinterpret_cast<const uint4 *>(at);
}

__device__ inline void evict_store_vector(uint8_t *at, uint4 vector)
{
	*reinterpret_cast<uint4 *>(at) = vector;
}

/* Address of 16-byte vector `i` of a block, K half first. */
__device__ inline uint8_t *evict_block_vector(const kvg_cuda_area &area, uint32_t id, uint32_t i)
{
	uint32_t of_k = area.k_bytes; /* 16 places, 16 bytes a vector */
	uint8_t *base = i < of_k ? area.k_base : area.v_base;

	return base + id * area.stride + (uint64_t)(i < of_k ? i : i - of_k) * 16;
}

/*
 * The warp copies `count` vectors from source(i) to destination(i), each lane eight loads before its first store.
 */
template <typename Source, typename Destination>
__device__ inline void evict_copy_warp(uint32_t lane, uint32_t count, Source source, Destination destination)
{
	const uint32_t deep = 8;
	uint32_t i = lane;

	for (; i + (deep - 1) * 32 < count; i += deep * 32) {
		uint4 vectors[deep];

#pragma unroll
		for (uint32_t j = 0; j < deep; j++)
			vectors[j] = evict_load(source(i + j * 32));
#pragma unroll
		for (uint32_t j = 0; j < deep; j++)
			evict_store_vector(destination(i + j * 32), vectors[j]);
	}
	for (; i < count; i += 32)
		evict_store_vector(destination(i), evict_load(source(i)));
}

#endif
