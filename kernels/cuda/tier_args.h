/* tier_args.h - what the launchers of tier.h pass to their kernels: plain C. */
#ifndef KVG_CUDA_TIER_ARGS_H
#define KVG_CUDA_TIER_ARGS_H

#include "kernels/cuda/evict_args.h"
#include "kernels/cuda/tier_types.h"

struct kvg_tier_blocks_args {
	struct kvg_evict_area at;
	const struct kvg_cuda_relocation *blocks;
	uint32_t count, pairs; /* enum kvg_cuda_block_pairs */
};

struct kvg_tier_pairs_args {
	struct kvg_evict_area at;
	const uint32_t *ids;
	uint32_t count;
	struct kvg_cuda_pair *packed;
};

struct kvg_tier_collect_args {
	struct kvg_evict_area at;
	struct kvg_cuda_rows rows;
	struct kvg_cuda_scope scope;
	struct kvg_cuda_kept kept;
	struct kvg_cuda_counts counts;
	struct kvg_cuda_collection what;
	struct kvg_cuda_packed to;
	uint32_t chunks; /* of a row, at most */
};

struct kvg_tier_return_args {
	struct kvg_evict_area at;
	struct kvg_cuda_packed from;
	const struct kvg_cuda_return *pairs;
	uint32_t count;
};

#endif
