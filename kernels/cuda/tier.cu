/* Kernels of kernels/cuda/tier.h. Each warp takes units of work in turns, so that grids of any size do all of it. */
#include "kernels/cuda/evict_rows.cuh"
#include "kernels/cuda/tier_args.h"

__device__ static uint32_t first_unit()
{
	return blockIdx.x * KVG_EVICT_WARPS + threadIdx.x / 32;
}

__device__ static uint32_t unit_step()
{
	return gridDim.x * KVG_EVICT_WARPS;
}

/* ---- whole blocks ---- */

__device__ static uint2 pair_after_copy(uint32_t pairs, const kvg_cuda_pair *src)
{
	if (pairs == KVG_CUDA_PAIRS_FRESH)
		return make_uint2(0, __float_as_uint(1.0f));
	return *reinterpret_cast<const uint2 *>(src);
}

extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_tier_blocks(const __grid_constant__ kvg_tier_blocks_args args)
{
	const kvg_cuda_area &area = args.at.area;
	uint32_t lane = threadIdx.x % 32;

	for (uint32_t i = first_unit(); i < args.count; i += unit_step()) {
		kvg_cuda_relocation at = args.blocks[i];

		if (args.pairs != KVG_CUDA_PAIRS_LEFT && lane < KVG_CUDA_PLACES)
			reinterpret_cast<uint2 *>(evict_pairs(args.at, at.dst))[lane] =
				pair_after_copy(args.pairs, evict_pairs(args.at, at.src) + lane);
		if (at.src != at.dst)
			evict_copy_warp(
				lane, area.k_bytes + area.v_bytes,
				[&](uint32_t n) { return evict_block_vector(area, at.src, n); },
				[&](uint32_t n) { return evict_block_vector(area, at.dst, n); });
	}
}

/*
 * ---- what is known of the pairs of whole blocks: a warp has two blocks in each of several loads, all of which are
 * under way before the first store ----
 */

constexpr uint32_t PAIRS_DEEP = 8, PAIRS_UNIT = 2 * PAIRS_DEEP;

template <bool GATHER> __device__ static void copy_pairs(const kvg_tier_pairs_args &args)
{
	uint32_t block = threadIdx.x / KVG_CUDA_PLACES % 2, place = threadIdx.x % KVG_CUDA_PLACES;

	for (uint32_t unit = first_unit(); unit <= args.count / PAIRS_UNIT; unit += unit_step()) {
		uint2 pairs[PAIRS_DEEP], *to[PAIRS_DEEP];

#pragma unroll
		for (uint32_t j = 0; j < PAIRS_DEEP; j++) {
			uint32_t i = unit * PAIRS_UNIT + 2 * j + block;
			uint2 *packed = reinterpret_cast<uint2 *>(args.packed + (size_t)i * KVG_CUDA_PLACES + place),
			      *pair;

			to[j] = NULL;
			if (i >= args.count)
				continue;
			pair = reinterpret_cast<uint2 *>(evict_pairs(args.at, args.ids[i]) + place);
			pairs[j] = GATHER ? *pair : *packed;
			to[j] = GATHER ? packed : pair;
		}
#pragma unroll
		for (uint32_t j = 0; j < PAIRS_DEEP; j++)
			if (to[j])
				*to[j] = pairs[j];
	}
}

extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_tier_pairs_gather(const __grid_constant__ kvg_tier_pairs_args args)
{
	copy_pairs<true>(args);
}

extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_tier_pairs_scatter(const __grid_constant__ kvg_tier_pairs_args args)
{
	copy_pairs<false>(args);
}

/* ---- packed pairs ---- */

__device__ static uint32_t *packed_field(const kvg_cuda_packed &packed, kvg_cuda_spot at, uint32_t field)
{
	return reinterpret_cast<uint32_t *>(
		packed.at + at.frame * packed.frame_bytes + field + (uint64_t)at.pair * packed.entry_bytes);
}

/* Vector w of the K and then the V of a pair in its block. */
__device__ static uint8_t *pair_vector(const kvg_cuda_area &area, uint32_t id, uint32_t place, uint32_t w)
{
	uint32_t k = area.k_bytes / 16;
	uint8_t *base =
		w < k ? area.k_base + place * area.k_bytes + w * 16 : area.v_base + place * area.v_bytes + (w - k) * 16;

	return base + id * area.stride;
}

/* The same of a pair in packed form. */
__device__ static uint8_t *packed_vector(
	const kvg_cuda_packed &packed, const kvg_cuda_area &area, kvg_cuda_spot at, uint32_t w)
{
	uint32_t k = area.k_bytes / 16;
	uint64_t inside = w < k ? packed.k + (uint64_t)at.pair * area.k_bytes + w * 16
				: packed.v + (uint64_t)at.pair * area.v_bytes + (w - k) * 16;

	return packed.at + at.frame * packed.frame_bytes + inside;
}

/* ---- collect ---- */

/* Pairs of the chunk that the warp looks at, and where they go. */
struct listed {
	uint32_t ids[KVG_CUDA_CHUNK];
	kvg_cuda_spot spots[KVG_CUDA_CHUNK];
	uint8_t places[KVG_CUDA_CHUNK];
};

/* A row's number, its decisions, and the number of the first pair that the chunk drops. */
struct chunk_view {
	uint32_t row, first;
	const uint8_t *keep;
	chunk at;
};

/* Where the dropped pair of that number goes. */
__device__ static kvg_cuda_spot spot_of(const kvg_tier_collect_args &args, uint32_t number)
{
	uint32_t i = number - args.what.begin;

	if (number < args.what.begin || number >= args.what.end)
		return {UINT32_MAX, 0};
	if (args.what.spots)
		return args.what.spots[i];
	return {i / args.to.pairs, i % args.to.pairs};
}

/* What is known of a pair; the score -inf is a former owner's mark. */
__device__ static void write_entry(const kvg_cuda_packed &to, kvg_cuda_spot at, uint32_t row, uint2 pair)
{
	if (to.row != KVG_CUDA_NO_FIELD)
		*packed_field(to, at, to.row) = row;
	if (to.pos != KVG_CUDA_NO_FIELD)
		*packed_field(to, at, to.pos) = pair.x;
	*packed_field(to, at, to.score) = pair.y == 0xff800000u ? 0 : pair.y;
}

/* Lists the dropped pairs that go anywhere, and writes what is known of them. Returns how many they are. */
__device__ static uint32_t list_chunk(
	const kvg_tier_collect_args &args, const row_view &row, const chunk_view &view, listed &list)
{
	uint32_t below = (1u << (threadIdx.x % 32)) - 1, first, kept, number = view.first, count = 0;
	chunk at = view.at;
	bool direct = follow(args.scope, args.rows, row, at, &first);
	lane_pairs lane;

	read_chunk(args.at, row, at, lane);
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++)
		lane.pair[j].x = position(args.rows, row, lane_index(at, j), lane.pair[j]);
	kept = direct ? kept_in_order<LANE_PAIRS>(view.keep + first, at)
		      : kept_by_rank(args.scope, view.keep, at, lane);
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++) {
		uint32_t index = lane_index(at, j);
		bool goes = index < at.end && !(kept >> j & 1);
		uint32_t lanes = __ballot_sync(EVICT_ALL_LANES, goes);
		kvg_cuda_spot spot = {UINT32_MAX, 0};

		if (goes)
			spot = spot_of(args, number + __popc(lanes & below));
		number += __popc(lanes);
		lanes = __ballot_sync(EVICT_ALL_LANES, spot.frame != UINT32_MAX);
		if (spot.frame != UINT32_MAX) {
			uint32_t entry = count + __popc(lanes & below);

			list.ids[entry] = row.ids[index / KVG_CUDA_PLACES];
			list.places[entry] = index % KVG_CUDA_PLACES;
			list.spots[entry] = spot;
			write_entry(args.to, spot, view.row, lane.pair[j]);
		}
		count += __popc(lanes);
	}
	return count;
}

/* Chunks without a dropped pair that goes anywhere are not looked at. dropped: pairs of the chunk. */
__device__ static void collect_chunk(
	const kvg_tier_collect_args &args, const row_view &row, const chunk_view &view, uint32_t dropped, listed &list)
{
	const kvg_cuda_area &area = args.at.area;
	uint32_t each = (area.k_bytes + area.v_bytes) / 16, count;

	if (dropped == 0 || view.first >= args.what.end || view.first + dropped <= args.what.begin)
		return;
	count = list_chunk(args, row, view, list);
	__syncwarp();
	if (args.to.k != KVG_CUDA_NO_FIELD)
		evict_copy_warp(
			threadIdx.x % 32, count * each,
			[&](uint32_t n) {
				return pair_vector(area, list.ids[n / each], list.places[n / each], n % each);
			},
			[&](uint32_t n) { return packed_vector(args.to, area, list.spots[n / each], n % each); });
	__syncwarp();
}

/* A unit: the c-th chunk of a row's held indices and of its fresh ones. */
__device__ static void collect_unit(const kvg_tier_collect_args &args, uint32_t index, uint32_t c, listed &list)
{
	const kvg_cuda_counts &counts = args.counts;
	row_view row = view_row(args.rows, index);
	const uint8_t *holes = counts.chunk_holes + (size_t)index * counts.chunk_cap;
	const uint8_t *kept = counts.stripe_kept + (size_t)index * counts.chunk_cap;
	chunk_view view = {index, args.what.first[index], args.kept.keep + args.kept.offset[index], held_chunk(row, c)};
	uint32_t first = view.first;

	if (view.at.begin < view.at.end) {
		view.first = first + sum_bytes(holes, c);
		collect_chunk(args, row, view, holes[c], list);
	}
	view.at = fresh_chunk(row, c);
	if (view.at.begin < view.at.end) {
		view.first = first + counts.holes[index] + c * KVG_CUDA_CHUNK - sum_bytes(kept, c);
		collect_chunk(args, row, view, view.at.end - view.at.begin - kept[c], list);
	}
}

extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_tier_collect(const __grid_constant__ kvg_tier_collect_args args)
{
	__shared__ listed lists[KVG_EVICT_WARPS];
	uint32_t units = (args.what.row_end - args.what.row_begin) * args.chunks;

	for (uint32_t unit = first_unit(); unit < units; unit += unit_step())
		collect_unit(
			args, args.what.row_begin + unit / args.chunks, unit % args.chunks, lists[threadIdx.x / 32]);
}

/* ---- return: a warp has 32 pairs at a time ---- */

extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_tier_return(const __grid_constant__ kvg_tier_return_args args)
{
	const kvg_cuda_area &area = args.at.area;
	uint32_t each = (area.k_bytes + area.v_bytes) / 16, lane = threadIdx.x % 32;

	for (uint32_t unit = first_unit(); unit < (args.count + 31) / 32; unit += unit_step()) {
		const kvg_cuda_return *pairs = args.pairs + (size_t)unit * 32;
		uint32_t count = min(args.count - unit * 32, 32u);

		if (lane < count) {
			kvg_cuda_return at = pairs[lane];

			*reinterpret_cast<uint2 *>(evict_pairs(args.at, at.id) + at.place) =
				make_uint2(*packed_field(args.from, at.from, args.from.pos),
					*packed_field(args.from, at.from, args.from.score));
		}
		evict_copy_warp(
			lane, count * each,
			[&](uint32_t n) { return packed_vector(args.from, area, pairs[n / each].from, n % each); },
			[&](uint32_t n) {
				kvg_cuda_return at = pairs[n / each];

				return pair_vector(area, at.id, at.place, n % each);
			});
	}
}
