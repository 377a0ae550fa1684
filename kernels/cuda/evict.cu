/* Kernels of kernels/cuda/evict.h. A row is layer * heads + head; an index counts a row's pairs. */
#include <float.h>
#include <math_constants.h>

#include "kernels/cuda/evict.cuh"

#define NO_RANK 0xffffffffu

#ifndef MOVE_DEPTH
#define MOVE_DEPTH 8u
#endif
#ifndef MOVE_BLOCKS
#define MOVE_BLOCKS 3
#endif

/* ---- rows and ranks ---- */

struct row_view {
	const uint32_t *ids;
	uint32_t base_len, length, held;
};

__device__ static row_view view_row(const kvg_cuda_rows &rows, uint32_t row)
{
	return {rows.ids + (size_t)row * rows.ids_cap, rows.base_len[row], rows.length[row], rows.held[row]};
}

/* A pair as it lies in memory. */
__device__ static uint2 *address_of(const kvg_evict_area &at, const row_view &row, uint32_t index)
{
	kvg_cuda_pair *pairs = evict_pairs(at, row.ids[index / KVG_CUDA_PLACES]) + index % KVG_CUDA_PLACES;

	return reinterpret_cast<uint2 *>(pairs);
}

/* Position of an index: from the index itself where it is not written yet. */
__device__ static uint32_t position(const kvg_cuda_rows &rows, const row_view &row, uint32_t index, uint2 pair)
{
	return index < row.base_len ? pair.x : rows.fold_pos + (index - row.base_len);
}

/* Number of the candidate with that position among its row's, or NO_RANK. */
__device__ static uint32_t rank_of(const kvg_cuda_scope &scope, uint32_t pos)
{
	uint32_t skip = 0;

	if (pos < scope.begin || pos >= scope.end)
		return NO_RANK;
	for (uint32_t i = 0; i < scope.range_count; i++) {
		if (pos < scope.range_begin[i])
			break;
		if (pos < scope.range_end[i])
			return NO_RANK;
		skip += scope.range_end[i] - scope.range_begin[i];
	}
	return pos - scope.begin - skip;
}

__device__ static uint32_t rank_at(const kvg_cuda_scope &scope, uint32_t index, uint32_t pos)
{
	return scope.decode ? index : rank_of(scope, pos);
}

__device__ static float score_in_scope(const kvg_cuda_scope &scope, uint32_t pos, float score)
{
	if (!scope.decode)
		return scope.end - pos <= scope.window ? CUDART_INF_F : score;
	for (uint32_t i = 0; i < scope.range_count; i++)
		if (pos >= scope.range_begin[i] && pos < scope.range_end[i])
			return CUDART_INF_F;
	return pos < scope.first || pos >= scope.fresh_from ? 1.0f : score;
}

/* ---- store: scores to their pairs ---- */

__device__ static float clean_score(float score)
{
	return isnan(score) ? 0.0f : fminf(fmaxf(score, -FLT_MAX), FLT_MAX);
}

extern "C" __global__ void __launch_bounds__(KVG_EVICT_STORE_TOKENS)
	kvg_evict_store(const __grid_constant__ kvg_evict_store_args args)
{
	uint32_t groups = (args.rows.heads + KVG_EVICT_STORE_HEADS - 1) / KVG_EVICT_STORE_HEADS;
	uint32_t layer = blockIdx.y / groups, head = blockIdx.y % groups * KVG_EVICT_STORE_HEADS;
	uint32_t heads = min(args.rows.heads - head, KVG_EVICT_STORE_HEADS);
	uint32_t token = blockIdx.x * KVG_EVICT_STORE_TOKENS + threadIdx.x;
	uint32_t row = (args.layer_begin + layer) * args.rows.heads + head,
		 fresh = args.pos + token - args.rows.fold_pos;
	const float *from =
		args.scores + layer * args.layer_stride + token * args.token_stride + head * args.head_stride;
	uint2 *pairs[KVG_EVICT_STORE_HEADS];
	float scores[KVG_EVICT_STORE_HEADS];

	if (token >= args.tokens)
		return;
#pragma unroll
	for (uint32_t i = 0; i < KVG_EVICT_STORE_HEADS; i++) {
		if (i >= heads)
			break;
		row_view view = {args.rows.ids + (size_t)(row + i) * args.rows.ids_cap, 0, 0, 0};

		pairs[i] = address_of(args.at, view, args.rows.base_len[row + i] + fresh);
		scores[i] = from[i * args.head_stride];
	}
#pragma unroll
	for (uint32_t i = 0; i < KVG_EVICT_STORE_HEADS; i++)
		if (i < heads)
			*pairs[i] = make_uint2(args.pos + token, __float_as_uint(clean_score(scores[i])));
}

/* ---- gather: candidates' scores in order ---- */

/* Grid: x tiles of indices, y rows. */
extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_evict_gather(const __grid_constant__ kvg_evict_gather_args args)
{
	__shared__ uint32_t found;
	row_view row = view_row(args.rows, blockIdx.y);
	float *out = args.scores + args.offset[blockIdx.y];
	uint32_t first = blockIdx.x * KVG_EVICT_GATHER_TILE + threadIdx.x, count = 0;
	uint2 pairs[KVG_EVICT_GATHER_DEPTH];

	if (blockIdx.x * KVG_EVICT_GATHER_TILE >= row.length)
		return;
	if (threadIdx.x == 0)
		found = 0;
#pragma unroll
	for (uint32_t j = 0; j < KVG_EVICT_GATHER_DEPTH; j++)
		pairs[j] = *address_of(args.at, row, min(first + j * KVG_EVICT_THREADS, row.length - 1));
#pragma unroll
	for (uint32_t j = 0; j < KVG_EVICT_GATHER_DEPTH; j++) {
		uint32_t index = first + j * KVG_EVICT_THREADS;

		if (index >= row.length)
			break;
		uint32_t pos = position(args.rows, row, index, pairs[j]), rank = rank_at(args.scope, index, pos);

		if (rank == NO_RANK)
			continue;
		out[rank] = score_in_scope(args.scope, pos, __uint_as_float(pairs[j].y));
		count++;
	}
	__syncthreads();
	count = __reduce_add_sync(EVICT_ALL_LANES, count);
	if (threadIdx.x % 32 == 0)
		atomicAdd(&found, count);
	__syncthreads();
	if (threadIdx.x == 0)
		atomicAdd(&args.found[blockIdx.y], found);
}

/* ---- count and mark, in chunks: c-th of the held indices, c-th stripe of the fresh ones ---- */

/* Indices [begin, end) of a row, at most 128. */
struct chunk {
	uint32_t begin, end;
};

__device__ static chunk held_chunk(const row_view &row, uint32_t c)
{
	return {min(c * KVG_CUDA_CHUNK, row.held), min((c + 1) * KVG_CUDA_CHUNK, row.held)};
}

__device__ static chunk fresh_chunk(const row_view &row, uint32_t c)
{
	return {min(row.held + c * KVG_CUDA_CHUNK, row.length), min(row.held + (c + 1) * KVG_CUDA_CHUNK, row.length)};
}

/* A lane has every 32nd pair of a chunk. */
#define LANE_PAIRS (KVG_CUDA_CHUNK / 32u)

struct lane_pairs {
	uint2 *address[LANE_PAIRS];
	uint2 pair[LANE_PAIRS];
	bool kept[LANE_PAIRS]; /* false too where there is no pair */
};

__device__ static uint32_t lane_index(chunk at, uint32_t j)
{
	return at.begin + j * 32 + threadIdx.x % 32;
}

/* Decides about the pairs that are there. */
__device__ static void decide_chunk(
	const kvg_evict_mark_args &args, const row_view &row, const uint8_t *keep, chunk at, lane_pairs &lane)
{
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++) {
		uint32_t index = lane_index(at, j), pos = position(args.rows, row, index, lane.pair[j]);
		uint32_t rank = rank_at(args.scope, index, pos);

		lane.pair[j].x = pos;
		lane.kept[j] = index < at.end && (rank == NO_RANK || keep[rank] != 0);
	}
}

/* Pairs that stay of a chunk, which is not empty. Reads metadata only where positions are needed. */
__device__ static uint32_t count_chunk(
	const kvg_evict_mark_args &args, const row_view &row, const uint8_t *keep, chunk at)
{
	lane_pairs lane = {};
	uint32_t kept = 0;

	if (!args.scope.decode && at.begin < row.base_len)
#pragma unroll
		for (uint32_t j = 0; j < LANE_PAIRS; j++)
			lane.pair[j] = *address_of(args.at, row, min(lane_index(at, j), at.end - 1));
	decide_chunk(args, row, keep, at, lane);
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++)
		kept += __popc(__ballot_sync(EVICT_ALL_LANES, lane.kept[j]));
	return kept;
}

/* Pairs that stay of four chunks, a byte for each; the sum goes to *total. The whole warp gets both. */
template <typename Chunk>
__device__ static uint32_t count_four(
	const kvg_evict_mark_args &args, const row_view &row, const uint8_t *keep, Chunk chunk_at, uint32_t *total)
{
	uint32_t bytes = 0;

#pragma unroll
	for (uint32_t i = 0; i < 4; i++) {
		chunk at = chunk_at(i);
		uint32_t kept = at.begin < at.end ? count_chunk(args, row, keep, at) : 0;

		bytes |= kept << (8 * i);
		*total += kept;
	}
	return bytes;
}

/* A byte for each of four chunks: how many pairs it has. */
template <typename Chunk> __device__ static uint32_t sizes_of_four(Chunk chunk_at)
{
	uint32_t bytes = 0;

	for (uint32_t i = 0; i < 4; i++)
		bytes |= (chunk_at(i).end - chunk_at(i).begin) << (8 * i);
	return bytes;
}

/* Sum of a number over the block, in thread 0. */
__device__ static uint32_t sum_block(uint32_t number, uint32_t *shared)
{
	__syncthreads();
	if (threadIdx.x % 32 == 0)
		shared[threadIdx.x / 32] = number;
	__syncthreads();
	number = 0;
	for (uint32_t i = 0; threadIdx.x == 0 && i < KVG_EVICT_COUNT_THREADS / 32; i++)
		number += shared[i];
	return number;
}

/* Grid: rows. A warp takes four chunks at a time. */
extern "C" __global__ void __launch_bounds__(KVG_EVICT_COUNT_THREADS)
	kvg_evict_count(const __grid_constant__ kvg_evict_mark_args args)
{
	__shared__ uint32_t shared[KVG_EVICT_COUNT_THREADS / 32];
	row_view row = view_row(args.rows, blockIdx.x);
	const uint8_t *keep = args.kept.keep + args.kept.offset[blockIdx.x];
	size_t at = (size_t)blockIdx.x * args.counts.chunk_cap;
	uint32_t *stripe_kept = reinterpret_cast<uint32_t *>(args.counts.stripe_kept + at);
	uint32_t *chunk_holes = reinterpret_cast<uint32_t *>(args.counts.chunk_holes + at);
	uint32_t held_kept = 0, fresh_kept = 0;

	for (uint32_t four = threadIdx.x / 32; four < args.counts.chunk_cap / 4; four += KVG_EVICT_COUNT_THREADS / 32) {
		auto held = [&](uint32_t i) { return held_chunk(row, 4 * four + i); };
		auto fresh = [&](uint32_t i) { return fresh_chunk(row, 4 * four + i); };
		uint32_t holes = sizes_of_four(held) - count_four(args, row, keep, held, &held_kept);
		uint32_t kept = count_four(args, row, keep, fresh, &fresh_kept);

		if (threadIdx.x % 32 == 0) {
			stripe_kept[four] = kept;
			chunk_holes[four] = holes;
		}
	}
	held_kept = sum_block(held_kept, shared);
	fresh_kept = sum_block(fresh_kept, shared);
	if (threadIdx.x == 0) {
		args.counts.kept[blockIdx.x] = held_kept + fresh_kept;
		args.counts.holes[blockIdx.x] = row.held - held_kept;
	}
}

/* Sum of the first n bytes, over the warp. The address is a multiple of 4, and the last word is all there. */
__device__ static uint32_t sum_bytes(const uint8_t *bytes, uint32_t n)
{
	const uint32_t *words = reinterpret_cast<const uint32_t *>(bytes);
	uint32_t sum = 0;

	for (uint32_t i = threadIdx.x % 32; 4 * i < n; i += 32) {
		uint32_t word = words[i];

		if (n - 4 * i < 4)
			word &= (1u << (8 * (n - 4 * i))) - 1;
		sum = __dp4a(word, 0x01010101u, sum);
	}
	return __reduce_add_sync(EVICT_ALL_LANES, sum);
}

/* A row's list, and the counts of its entries from each chunk. */
struct row_list {
	uint32_t *entries; /* NULL: none is made */
	uint32_t cap;
	const uint8_t *counts;
};

/* A kept pair with the mark of a former owner was never scored. */
__device__ static uint32_t marked_score(bool kept, uint32_t score)
{
	const uint32_t mark = 0xff800000u; /* -inf */

	if (!kept)
		return mark;
	return score == mark ? 0 : score;
}

/* Marks the pairs of chunk c and lists those that stay, or those that go. */
__device__ static void mark_chunk(const kvg_evict_mark_args &args, const row_view &row, const uint8_t *keep, chunk at,
	uint32_t c, bool list_kept, row_list list)
{
	uint32_t below = (1u << (threadIdx.x % 32)) - 1, end;
	lane_pairs lane;

	if (at.begin == at.end)
		return;
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++) {
		lane.address[j] = address_of(args.at, row, min(lane_index(at, j), at.end - 1));
		lane.pair[j] = *lane.address[j];
	}
	decide_chunk(args, row, keep, at, lane);
	end = list.entries ? sum_bytes(list.counts, c) : 0;
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++) {
		uint32_t index = lane_index(at, j);
		bool listed = index < at.end && lane.kept[j] == list_kept;
		uint32_t lanes = __ballot_sync(EVICT_ALL_LANES, listed), entry = end + __popc(lanes & below);

		if (index < at.end)
			*lane.address[j] = make_uint2(lane.pair[j].x, marked_score(lane.kept[j], lane.pair[j].y));
		if (listed && list.entries && entry < list.cap)
			list.entries[entry] = index;
		end += __popc(lanes);
	}
}

__device__ static row_list list_of(uint32_t *entries, uint32_t cap, const uint8_t *counts, uint32_t chunk_cap)
{
	return {entries ? entries + (size_t)blockIdx.y * cap : nullptr, cap, counts + (size_t)blockIdx.y * chunk_cap};
}

/* Grid: x chunks, a warp for each, y rows. */
extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_evict_mark(const __grid_constant__ kvg_evict_mark_args args)
{
	const kvg_cuda_lists &lists = args.lists;
	const kvg_cuda_counts &counts = args.counts;
	uint32_t c = blockIdx.x * KVG_EVICT_WARPS + threadIdx.x / 32;
	row_view row = view_row(args.rows, blockIdx.y);
	const uint8_t *keep = args.kept.keep + args.kept.offset[blockIdx.y];

	mark_chunk(args, row, keep, held_chunk(row, c), c, false,
		list_of(lists.holes, lists.hole_cap, counts.chunk_holes, counts.chunk_cap));
	mark_chunk(args, row, keep, fresh_chunk(row, c), c, true,
		list_of(lists.survivors, lists.survivor_cap, counts.stripe_kept, counts.chunk_cap));
}

/* ---- moves ---- */

/* Places of this lane's move. */
struct move {
	uint32_t src, dst; /* blocks */
	uint32_t places;   /* source's, and destination's shifted by 4 */
};

__device__ static move move_between(const uint32_t *src_ids, uint32_t src, const uint32_t *dst_ids, uint32_t dst)
{
	return {src_ids[src / KVG_CUDA_PLACES], dst_ids[dst / KVG_CUDA_PLACES],
		src % KVG_CUDA_PLACES | dst % KVG_CUDA_PLACES << 4};
}

/* The same move of another lane. */
__device__ static move move_of(const move &own, uint32_t lane)
{
	return {__shfl_sync(EVICT_ALL_LANES, own.src, lane), __shfl_sync(EVICT_ALL_LANES, own.dst, lane),
		__shfl_sync(EVICT_ALL_LANES, own.places, lane)};
}

/* Offset of vector w of a pair (K first) from the base of its half. */
__device__ static uint64_t vector_offset(
	const kvg_cuda_area &area, uint32_t id, uint32_t place, uint32_t w, uint32_t k_vectors)
{
	uint32_t inside = w < k_vectors ? place * area.k_bytes + w * 16 : place * area.v_bytes + (w - k_vectors) * 16;

	return id * area.stride + inside;
}

/*
 * The warp copies K and V of its lanes' first `count` moves. A pair has k + v vectors of 16 bytes; the warp's
 * vectors are numbered through, so that every lane has work whatever the sizes. KV: k = v = KV, 0: any.
 */
template <uint32_t KV> __device__ static void copy_moves(const kvg_cuda_area &area, const move &own, uint32_t count)
{
	uint32_t k = KV ? KV : area.k_bytes / 16, each = KV ? 2 * KV : k + area.v_bytes / 16;
	uint32_t total = count * each;

	for (uint32_t begin = 0; begin < total; begin += 32 * MOVE_DEPTH) {
		uint4 vectors[MOVE_DEPTH];
		uint8_t *to[MOVE_DEPTH];

#pragma unroll
		for (uint32_t j = 0; j < MOVE_DEPTH; j++) {
			uint32_t i = begin + j * 32 + threadIdx.x % 32, w = i % each;
			move at = move_of(own, i / each % 32);
			uint8_t *base = w < k ? area.k_base : area.v_base;

			to[j] = base + vector_offset(area, at.dst, at.places >> 4, w, k);
			if (i < total)
				vectors[j] = evict_load(base + vector_offset(area, at.src, at.places & 15, w, k));
		}
#pragma unroll
		for (uint32_t j = 0; j < MOVE_DEPTH; j++)
			if (begin + j * 32 + threadIdx.x % 32 < total)
				evict_store_vector(to[j], vectors[j]);
	}
}

/* The warp's moves: this lane's own one is meant when the lane is below count. */
template <uint32_t KV> __device__ static void run_moves(const kvg_evict_area &at, const move &own, uint32_t count)
{
	if (threadIdx.x % 32 < count)
		*reinterpret_cast<uint2 *>(evict_pairs(at, own.dst) + (own.places >> 4)) =
			*reinterpret_cast<const uint2 *>(evict_pairs(at, own.src) + (own.places & 15));
	copy_moves<KV>(at.area, own, count);
}

/*
 * The last i in [0, n) for which at(i) <= value, where at(0) <= value and at() never falls: the warp looks at 32 of
 * them at a time.
 */
template <typename At> __device__ static uint32_t search_warp(uint32_t n, uint32_t value, At at)
{
	uint32_t low = 0, lane = threadIdx.x % 32;

	while (n > 1) {
		uint32_t step = (n + 31) / 32, reach = lane * step;
		uint32_t found = __ballot_sync(EVICT_ALL_LANES, reach < n && at(low + reach) <= value);
		uint32_t skip = (__popc(found) - 1) * step;

		low += skip;
		n = min(step, n - skip);
	}
	return low;
}

/* The lane's move k of a row's. */
__device__ static move find_move(const kvg_evict_move_args &args, uint32_t row, const kvg_cuda_move_row &at, uint32_t k)
{
	if (k >= at.count)
		return {0, 0, 0};
	uint32_t src = args.lists.survivors[(size_t)row * args.lists.survivor_cap + at.src_first + k];
	uint32_t dst = k < at.hole_count ? args.lists.holes[(size_t)row * args.lists.hole_cap + at.hole_first + k]
					 : at.tail_first + (k - at.hole_count);

	return move_between(
		args.src_ids + (size_t)row * args.src_cap, src, args.dst_ids + (size_t)row * args.dst_cap, dst);
}

template <uint32_t KV> __device__ static void move_tile(const kvg_evict_move_args &args)
{
	uint32_t tile = blockIdx.x * KVG_EVICT_WARPS + threadIdx.x / 32;

	if (tile >= args.tiles)
		return;
	uint32_t row = search_warp(args.rows, tile, [&](uint32_t i) { return args.move_rows[i].tile_first; });
	kvg_cuda_move_row at = args.move_rows[row];
	uint32_t first = (tile - at.tile_first) * KVG_CUDA_MOVE_TILE;

	run_moves<KV>(
		args.at, find_move(args, row, at, first + threadIdx.x % 32), min(at.count - first, KVG_CUDA_MOVE_TILE));
}

#define MOVE_KERNEL(suffix, vectors)                                                                                   \
	extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS, MOVE_BLOCKS)                                   \
		kvg_evict_move##suffix(const __grid_constant__ kvg_evict_move_args args)                               \
	{                                                                                                              \
		move_tile<vectors>(args);                                                                              \
	}
MOVE_KERNEL(_8, 8u)
MOVE_KERNEL(_16, 16u)
MOVE_KERNEL(_any, 0u)

/* ---- compact ---- */

/* Entries of an ascending list that are below the limit; the whole warp asks the same. */
__device__ static uint32_t count_below(const uint32_t *list, uint32_t n, uint32_t limit)
{
	if (n == 0 || limit == 0 || list[0] >= limit)
		return 0;
	return search_warp(n, limit - 1, [&](uint32_t i) { return list[i]; }) + 1;
}

/* The k-th index at or above `from` that the ascending list (of such indices) does not hold. */
__device__ static uint32_t absent(const uint32_t *list, uint32_t n, uint32_t from, uint32_t k)
{
	uint32_t low = 0, high = n; /* entries before `low` precede the k-th, those from `high` on do not */

	while (low < high) {
		uint32_t middle = (low + high) / 2;

		if (list[middle] - from - middle <= k)
			low = middle + 1;
		else
			high = middle;
	}
	return from + k + low;
}

extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_evict_compact(const __grid_constant__ kvg_evict_compact_args args)
{
	uint32_t tile = blockIdx.x * KVG_EVICT_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;

	if (tile >= args.tiles)
		return;
	uint32_t row = search_warp(args.rows, tile, [&](uint32_t i) { return args.compact_rows[i].tile_first; });
	kvg_cuda_compact_row at = args.compact_rows[row];
	const uint32_t *holes = args.lists.holes + (size_t)row * args.lists.hole_cap + at.hole_first;
	const uint32_t *ids = args.ids + (size_t)row * args.ids_cap;
	uint32_t left = at.held_len - at.hole_count, moves = count_below(holes, at.hole_count, left);
	uint32_t first = (tile - at.tile_first) * KVG_CUDA_MOVE_TILE, k = first + lane;
	move own = {0, 0, 0};

	if (first >= moves)
		return;
	if (k < moves)
		own = move_between(ids, absent(holes + moves, at.hole_count - moves, left, k), ids, holes[k]);
	run_moves<0>(args.at, own, min(moves - first, KVG_CUDA_MOVE_TILE));
}

/* ---- whole blocks, tables ---- */

extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_evict_relocate(const __grid_constant__ kvg_evict_relocate_args args)
{
	uint32_t i = blockIdx.x * KVG_EVICT_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;

	if (i >= args.count)
		return;
	const kvg_cuda_area &area = args.at.area;
	kvg_cuda_relocation at = args.relocations[i];

	if (lane < KVG_CUDA_PLACES)
		reinterpret_cast<uint2 *>(evict_pairs(args.at, at.dst))[lane] =
			reinterpret_cast<const uint2 *>(evict_pairs(args.at, at.src))[lane];
	evict_copy_warp(
		lane, area.k_bytes + area.v_bytes, [&](uint32_t n) { return evict_block_vector(area, at.src, n); },
		[&](uint32_t n) { return evict_block_vector(area, at.dst, n); });
}

/* Grid: rows. */
extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_evict_publish(const __grid_constant__ kvg_evict_publish_args args)
{
	const kvg_cuda_table &table = args.table;
	uint32_t layer = blockIdx.x / table.heads, head = blockIdx.x % table.heads;
	size_t row = ((size_t)layer * table.max_sequences + args.slot) * table.heads + head;
	kvg_cuda_table_row at = args.rows[blockIdx.x];

	for (uint32_t i = threadIdx.x; i < at.count && at.first + i < table.row_cap; i += KVG_EVICT_THREADS)
		table.ids[row * table.row_cap + at.first + i] = args.packed[at.offset + i];
	if (threadIdx.x == 0 && args.set_base_len)
		table.base_len[row] = at.base_len;
}
