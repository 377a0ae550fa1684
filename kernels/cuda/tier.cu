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
		evict_copy_warp(
			lane, area.k_bytes + area.v_bytes,
			[&](uint32_t n) { return evict_block_vector(area, at.src, n); },
			[&](uint32_t n) { return evict_block_vector(area, at.dst, n); });
	}
}

/* ---- what is known of the pairs of whole blocks: a warp has two blocks at a time ---- */

template <bool GATHER> __device__ static void copy_pairs(const kvg_tier_pairs_args &args)
{
	uint32_t place = threadIdx.x % KVG_CUDA_PLACES;

	for (uint32_t unit = first_unit(); unit < (args.count + 1) / 2; unit += unit_step()) {
		uint32_t i = 2 * unit + threadIdx.x / KVG_CUDA_PLACES % 2;

		if (i >= args.count)
			continue;
		uint2 *packed = reinterpret_cast<uint2 *>(args.packed + (size_t)i * KVG_CUDA_PLACES + place);
		uint2 *pair = reinterpret_cast<uint2 *>(evict_pairs(args.at, args.ids[i]) + place);

		if (GATHER)
			*packed = *pair;
		else
			*pair = *packed;
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

/* Addresses of pair `i` of the frame at `base`. */
struct packed_pair {
	uint8_t *k, *v;
	uint32_t *pos, *score;
};

__device__ static packed_pair packed_at(
	const kvg_cuda_packed &packed, const kvg_cuda_area &area, uint32_t frame, uint32_t i)
{
	uint8_t *base = packed.at + frame * packed.frame_bytes;

	return {base + packed.k + (uint64_t)i * area.k_bytes, base + packed.v + (uint64_t)i * area.v_bytes,
		reinterpret_cast<uint32_t *>(base + packed.pos + (uint64_t)i * packed.pos_stride),
		reinterpret_cast<uint32_t *>(base + packed.score + (uint64_t)i * packed.score_stride)};
}

/* Vector w of the K and then the V of a pair in its block. */
__device__ static uint8_t *pair_vector(const kvg_cuda_area &area, uint32_t id, uint32_t place, uint32_t w)
{
	uint32_t k = area.k_bytes / 16;
	uint8_t *base =
		w < k ? area.k_base + place * area.k_bytes + w * 16 : area.v_base + place * area.v_bytes + (w - k) * 16;

	return base + id * area.stride;
}

__device__ static uint8_t *packed_vector(const kvg_cuda_area &area, const packed_pair &pair, uint32_t w)
{
	uint32_t k = area.k_bytes / 16;

	return w < k ? pair.k + w * 16 : pair.v + (w - k) * 16;
}

/* ---- collect ---- */

/* Dropped pairs of the chunk that the warp looks at. */
struct dropped {
	uint32_t ids[KVG_CUDA_CHUNK];
	uint8_t places[KVG_CUDA_CHUNK];
};

/* Pairs numbered begin .. end - 1, of which the chunk's first one has number `first`. */
struct numbers {
	uint32_t first, begin, end;
};

/* Lists the chunk's dropped pairs, and writes the positions and scores of those that are wanted. Returns how many. */
__device__ static uint32_t list_chunk(const kvg_tier_collect_args &args, const row_view &row, const uint8_t *keep,
	chunk at, numbers wanted, dropped &list)
{
	uint32_t below = (1u << (threadIdx.x % 32)) - 1, first, kept, count = 0;
	bool direct = follow(args.scope, args.rows, row, at, &first);
	lane_pairs lane;

	read_chunk(args.at, row, at, lane);
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++)
		lane.pair[j].x = position(args.rows, row, lane_index(at, j), lane.pair[j]);
	kept = direct ? kept_in_order<LANE_PAIRS>(keep + first, at) : kept_by_rank(args.scope, keep, at, lane);
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++) {
		uint32_t index = lane_index(at, j);
		bool goes = index < at.end && !(kept >> j & 1);
		uint32_t lanes = __ballot_sync(EVICT_ALL_LANES, goes), entry = count + __popc(lanes & below);
		uint32_t number = wanted.first + entry;

		count += __popc(lanes);
		if (!goes)
			continue;
		list.ids[entry] = row.ids[index / KVG_CUDA_PLACES];
		list.places[entry] = index % KVG_CUDA_PLACES;
		if (number >= wanted.begin && number < wanted.end) {
			uint32_t i = number - wanted.begin;
			packed_pair to = packed_at(args.to, args.at.area, i / args.to.pairs, i % args.to.pairs);

			*to.pos = lane.pair[j].x;
			*to.score = lane.pair[j].y == 0xff800000u ? 0 : lane.pair[j].y; /* -inf */
		}
	}
	return count;
}

/* K and V of the listed pairs that are wanted. */
__device__ static void copy_listed(
	const kvg_tier_collect_args &args, const dropped &list, uint32_t count, numbers wanted)
{
	const kvg_cuda_area &area = args.at.area;
	uint32_t each = (area.k_bytes + area.v_bytes) / 16;
	uint32_t low = max(wanted.begin, wanted.first) - wanted.first;
	uint32_t high = min(count, wanted.end - wanted.first); /* wanted.end > wanted.first */

	if (low >= high)
		return;
	evict_copy_warp(
		threadIdx.x % 32, (high - low) * each,
		[&](uint32_t n) {
			uint32_t entry = low + n / each;

			return pair_vector(area, list.ids[entry], list.places[entry], n % each);
		},
		[&](uint32_t n) {
			uint32_t i = wanted.first + low + n / each - wanted.begin;

			return packed_vector(
				area, packed_at(args.to, area, i / args.to.pairs, i % args.to.pairs), n % each);
		});
}

__device__ static void collect_chunk(const kvg_tier_collect_args &args, const row_view &row, const uint8_t *keep,
	chunk at, numbers wanted, uint32_t count, dropped &list)
{
	if (count == 0 || wanted.first >= wanted.end || wanted.first + count <= wanted.begin)
		return;
	count = list_chunk(args, row, keep, at, wanted, list);
	__syncwarp();
	copy_listed(args, list, count, wanted);
	__syncwarp();
}

/* A unit: the c-th chunk of a row's held indices and of its fresh ones. */
__device__ static void collect_unit(const kvg_tier_collect_args &args, uint32_t index, uint32_t c, dropped &list)
{
	const kvg_cuda_counts &counts = args.counts;
	row_view row = view_row(args.rows, index);
	chunk held = held_chunk(row, c), fresh = fresh_chunk(row, c);
	const uint8_t *keep = args.kept.keep + args.kept.offset[index];
	const uint8_t *holes = counts.chunk_holes + (size_t)index * counts.chunk_cap;
	const uint8_t *kept = counts.stripe_kept + (size_t)index * counts.chunk_cap;
	numbers wanted = {args.what.first[index], args.what.begin, args.what.end};

	if (held.begin < held.end) {
		wanted.first = args.what.first[index] + sum_bytes(holes, c);
		collect_chunk(args, row, keep, held, wanted, holes[c], list);
	}
	if (fresh.begin < fresh.end) {
		wanted.first = args.what.first[index] + counts.holes[index] + c * KVG_CUDA_CHUNK - sum_bytes(kept, c);
		collect_chunk(args, row, keep, fresh, wanted, fresh.end - fresh.begin - kept[c], list);
	}
}

extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_tier_collect(const __grid_constant__ kvg_tier_collect_args args)
{
	__shared__ dropped lists[KVG_EVICT_WARPS];
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
			packed_pair from = packed_at(args.from, area, pairs[lane].frame, pairs[lane].pair);

			*reinterpret_cast<uint2 *>(evict_pairs(args.at, pairs[lane].id) + pairs[lane].place) =
				make_uint2(*from.pos, *from.score);
		}
		evict_copy_warp(
			lane, count * each,
			[&](uint32_t n) {
				kvg_cuda_return at = pairs[n / each];

				return packed_vector(area, packed_at(args.from, area, at.frame, at.pair), n % each);
			},
			[&](uint32_t n) {
				kvg_cuda_return at = pairs[n / each];

				return pair_vector(area, at.id, at.place, n % each);
			});
	}
}
