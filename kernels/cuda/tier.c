#include "kernels/cuda/tier.h"

#include <stdlib.h>

#include "kernels/cuda/evict_area.h"
#include "kernels/cuda/tier_args.h"

enum { BLOCKS, PAIRS_GATHER, PAIRS_SCATTER, COLLECT, RETURN, KERNELS };

static const char *const names[KERNELS] = {
	[BLOCKS] = "kvg_tier_blocks",
	[PAIRS_GATHER] = "kvg_tier_pairs_gather",
	[PAIRS_SCATTER] = "kvg_tier_pairs_scatter",
	[COLLECT] = "kvg_tier_collect",
	[RETURN] = "kvg_tier_return",
};

extern const unsigned char kvg_image_tier[];

struct kvg_cuda_tier {
	const struct kvg_cuda *cuda;
	CUmodule module;
	CUfunction kernels[KERNELS];
};

struct kvg_cuda_tier *kvg_cuda_tier_new(const struct kvg_cuda *cuda, CUresult *ret_result)
{
	struct kvg_cuda_tier *tier = calloc(1, sizeof(*tier));

	*ret_result = CUDA_ERROR_OUT_OF_MEMORY;
	if (!tier)
		return NULL;
	tier->cuda = cuda;
	*ret_result = kvg_cuda_module_load(cuda, kvg_image_tier, names, KERNELS, &tier->module, tier->kernels);
	if (*ret_result == CUDA_SUCCESS)
		return tier;
	free(tier);
	return NULL;
}

struct kvg_cuda_tier *kvg_cuda_tier_free(struct kvg_cuda_tier *tier)
{
	if (!tier)
		return NULL;
	(void)tier->cuda->driver->cuModuleUnload(tier->module);
	free(tier);
	return NULL;
}

/* A warp for each of `units`, or as many as fit in `grid` blocks. */
static CUresult launch(
	const struct kvg_cuda_tier *tier, int kernel, uint64_t units, uint32_t grid, CUstream stream, void *args)
{
	uint64_t blocks = (units + KVG_EVICT_WARPS - 1) / KVG_EVICT_WARPS;
	void *arguments[] = {args};

	if (units == 0)
		return CUDA_SUCCESS;
	if (units > INT32_MAX)
		return CUDA_ERROR_INVALID_VALUE;
	if (grid && blocks > grid)
		blocks = grid;
	return kvg_cuda_launch(
		tier->cuda, tier->kernels[kernel], (unsigned)blocks, KVG_EVICT_THREADS, 0, stream, arguments);
}

CUresult kvg_cuda_tier_blocks(const struct kvg_cuda_tier *tier, const struct kvg_cuda_area *area,
	const struct kvg_cuda_relocation *blocks, uint32_t count, enum kvg_cuda_block_pairs pairs, uint32_t grid,
	CUstream stream)
{
	struct kvg_tier_blocks_args args = {
		.at = kvg_evict_area_of(area), .blocks = blocks, .count = count, .pairs = pairs};

	return launch(tier, BLOCKS, count, grid, stream, &args);
}

/* Of 16 blocks each: copy_pairs() of tier.cu. */
static uint64_t pair_units(uint32_t count)
{
	return ((uint64_t)count + 15) / 16;
}

CUresult kvg_cuda_tier_pairs_gather(const struct kvg_cuda_tier *tier, const struct kvg_cuda_area *area,
	const uint32_t *ids, uint32_t count, struct kvg_cuda_pair *packed, uint32_t grid, CUstream stream)
{
	struct kvg_tier_pairs_args args = {.at = kvg_evict_area_of(area), .ids = ids, .count = count, .packed = packed};

	return launch(tier, PAIRS_GATHER, pair_units(count), grid, stream, &args);
}

CUresult kvg_cuda_tier_pairs_scatter(const struct kvg_cuda_tier *tier, const struct kvg_cuda_area *area,
	const uint32_t *ids, uint32_t count, const struct kvg_cuda_pair *packed, uint32_t grid, CUstream stream)
{
	struct kvg_tier_pairs_args args = {.at = kvg_evict_area_of(area),
		.ids = ids,
		.count = count,
		.packed = (struct kvg_cuda_pair *)(uintptr_t)packed};

	return launch(tier, PAIRS_SCATTER, pair_units(count), grid, stream, &args);
}

CUresult kvg_cuda_tier_collect(const struct kvg_cuda_tier *tier, const struct kvg_cuda_area *area,
	const struct kvg_cuda_rows *rows, const struct kvg_cuda_scope *scope, const struct kvg_cuda_kept *kept,
	const struct kvg_cuda_counts *counts, const struct kvg_cuda_collection *what, const struct kvg_cuda_packed *to,
	uint32_t grid, CUstream stream)
{
	struct kvg_tier_collect_args args = {.at = kvg_evict_area_of(area),
		.rows = *rows,
		.scope = *scope,
		.kept = *kept,
		.counts = *counts,
		.what = *what,
		.to = *to,
		.chunks = rows->max_length / KVG_CUDA_CHUNK + (rows->max_length % KVG_CUDA_CHUNK != 0)};

	if (what->row_begin >= what->row_end || what->begin >= what->end)
		return CUDA_SUCCESS;
	return launch(tier, COLLECT, (uint64_t)(what->row_end - what->row_begin) * args.chunks, grid, stream, &args);
}

CUresult kvg_cuda_tier_return(const struct kvg_cuda_tier *tier, const struct kvg_cuda_area *area,
	const struct kvg_cuda_packed *from, const struct kvg_cuda_return *pairs, uint32_t count, uint32_t grid,
	CUstream stream)
{
	struct kvg_tier_return_args args = {
		.at = kvg_evict_area_of(area), .from = *from, .pairs = pairs, .count = count};

	return launch(tier, RETURN, ((uint64_t)count + 31) / 32, grid, stream, &args);
}
