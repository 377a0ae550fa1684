/*
 * evict_area.h - the constants by which device code divides a block id by the ids of an extent. For launchers.
 */
#ifndef KVG_CUDA_EVICT_AREA_H
#define KVG_CUDA_EVICT_AREA_H

#include "kernels/cuda/evict_args.h"

/* Granlund and Montgomery (1994), figure 4.1; ids_per_extent is at least 2. */
static inline struct kvg_evict_area kvg_evict_area_of(const struct kvg_cuda_area *area)
{
	uint64_t by = area->ids_per_extent;
	uint32_t shift = 1;

	while (by > (uint64_t)1 << shift)
		shift++;
	return (struct kvg_evict_area){.area = *area,
		.multiplier = (uint32_t)(((((uint64_t)1 << shift) - by) << 32) / by + 1),
		.shift = shift - 1};
}

#endif
