/*
 * tier.h - the device's part of the host tier and of shared contexts: whole blocks go to other blocks, dropped pairs
 * are packed and come back, and what is known of the pairs of whole blocks is packed as well (copy.h has their K and
 * V).
 *
 * Launchers only enqueue, as those of evict.h do. `grid` bounds the blocks of the launch, so that a transfer that the
 * link bounds anyway leaves most multiprocessors to others; 0: as many as there is work for.
 */
#ifndef KVG_CUDA_TIER_H
#define KVG_CUDA_TIER_H

#include "kernels/cuda/device.h"
#include "kernels/cuda/tier_types.h"

struct kvg_cuda_tier;

/* The kernels on this device; cuda is borrowed. Immutable afterwards. NULL with *ret_result set on failure. */
struct kvg_cuda_tier *kvg_cuda_tier_new(const struct kvg_cuda *cuda, CUresult *ret_result);

/* Unloads them (the context must be current). NULL is fine; returns NULL. */
struct kvg_cuda_tier *kvg_cuda_tier_free(struct kvg_cuda_tier *tier);

/*
 * Copies K and V of whole blocks. blocks: device, [count]; none is a destination twice, and one that is a destination
 * is a source only of itself, which leaves K and V alone, and of others then.
 */
CUresult kvg_cuda_tier_blocks(const struct kvg_cuda_tier *tier, const struct kvg_cuda_area *area,
	const struct kvg_cuda_relocation *blocks, uint32_t count, enum kvg_cuda_block_pairs pairs, uint32_t grid,
	CUstream stream);

/* What is known of the 16 pairs of each of blocks ids[0 .. count) (device) goes to packed[count][16] (device). */
CUresult kvg_cuda_tier_pairs_gather(const struct kvg_cuda_tier *tier, const struct kvg_cuda_area *area,
	const uint32_t *ids, uint32_t count, struct kvg_cuda_pair *packed, uint32_t grid, CUstream stream);

/* The way back. No id twice. */
CUresult kvg_cuda_tier_pairs_scatter(const struct kvg_cuda_tier *tier, const struct kvg_cuda_area *area,
	const uint32_t *ids, uint32_t count, const struct kvg_cuda_pair *packed, uint32_t grid, CUstream stream);

/*
 * Packs pairs that an eviction drops, between kvg_cuda_evict_count(), whose input and counts these are, and
 * kvg_cuda_evict_mark(): with their true scores (-INF, a former owner's mark, becomes 0). Nothing of the arena changes.
 */
CUresult kvg_cuda_tier_collect(const struct kvg_cuda_tier *tier, const struct kvg_cuda_area *area,
	const struct kvg_cuda_rows *rows, const struct kvg_cuda_scope *scope, const struct kvg_cuda_kept *kept,
	const struct kvg_cuda_counts *counts, const struct kvg_cuda_collection *what, const struct kvg_cuda_packed *to,
	uint32_t grid, CUstream stream);

/*
 * Packed pairs (on the device, or in host memory mapped for it) go to their places: K, V, position and score. pairs:
 * device, [count]; no place twice.
 */
CUresult kvg_cuda_tier_return(const struct kvg_cuda_tier *tier, const struct kvg_cuda_area *area,
	const struct kvg_cuda_packed *from, const struct kvg_cuda_return *pairs, uint32_t count, uint32_t grid,
	CUstream stream);

#endif
