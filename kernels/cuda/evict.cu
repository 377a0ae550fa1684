/* Kernels of kernels/cuda/evict.h. A row is layer * heads + head; an index counts a row's pairs. */
#include <float.h>
#include <math_constants.h>

#include "kernels/cuda/evict_rows.cuh"

/* What a pair's score counts as; x is its position. */
__device__ static float score_in_scope(const kvg_cuda_scope &scope, uint2 pair)
{
	uint32_t pos = pair.x;
	float score = __uint_as_float(pair.y);

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

/* Grid: x tiles of tokens, y groups of heads of each layer. */
extern "C" __global__ void __launch_bounds__(KVG_EVICT_STORE_TOKENS)
	kvg_evict_store(const __grid_constant__ kvg_evict_store_args args)
{
	uint32_t groups = (args.rows.heads + KVG_EVICT_STORE_HEADS - 1) / KVG_EVICT_STORE_HEADS;
	uint32_t layer = blockIdx.y / groups, head = blockIdx.y % groups * KVG_EVICT_STORE_HEADS;
	uint32_t heads = min(args.rows.heads - head, KVG_EVICT_STORE_HEADS);
	uint32_t token = blockIdx.x * KVG_EVICT_STORE_TOKENS + threadIdx.x;
	uint32_t row = (args.layer_begin + layer) * args.rows.heads + head;
	uint32_t fresh = args.pos + token - args.rows.fold_pos;
	const float *from =
		args.scores + layer * args.layer_stride + token * args.token_stride + head * args.head_stride;
	uint32_t index[KVG_EVICT_STORE_HEADS], ids[KVG_EVICT_STORE_HEADS];
	float scores[KVG_EVICT_STORE_HEADS];

	if (token >= args.tokens)
		return;
#pragma unroll
	for (uint32_t i = 0; i < KVG_EVICT_STORE_HEADS; i++) {
		index[i] = args.rows.base_len[row + min(i, heads - 1)] + fresh;
		scores[i] = from[min(i, heads - 1) * args.head_stride];
	}
#pragma unroll
	for (uint32_t i = 0; i < KVG_EVICT_STORE_HEADS; i++)
		ids[i] = args.rows.ids[(size_t)(row + min(i, heads - 1)) * args.rows.ids_cap +
				       index[i] / KVG_CUDA_PLACES];
#pragma unroll
	for (uint32_t i = 0; i < KVG_EVICT_STORE_HEADS; i++) {
		kvg_cuda_pair *pair = evict_pairs(args.at, ids[i]) + index[i] % KVG_CUDA_PLACES;
		uint32_t score = __float_as_uint(clean_score(scores[i]));

		if (i < heads)
			*reinterpret_cast<uint2 *>(pair) = make_uint2(args.pos + token, score);
	}
}

/* ---- gather: candidates' scores in order ---- */

/* Candidates of a chunk, which is not empty, in this lane. */
__device__ static uint32_t gather_chunk(const kvg_evict_gather_args &args, const row_view &row, float *out, chunk at)
{
	uint32_t first, count = 0;
	bool direct = follow(args.scope, args.rows, row, at, &first);
	lane_pairs lane;

	read_chunk(args.at, row, at, lane);
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++)
		lane.pair[j].x = position(args.rows, row, lane_index(at, j), lane.pair[j]);
	if (direct) {
		out += first + threadIdx.x % 32;
#pragma unroll
		for (uint32_t j = 0; j < LANE_PAIRS; j++)
			if (lane_index(at, j) < at.end)
				out[32 * j] = score_in_scope(args.scope, lane.pair[j]);
		return lane_count(at);
	}
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++) {
		uint32_t rank = rank_of(args.scope, lane.pair[j].x);

		if (lane_index(at, j) >= at.end || rank == NO_RANK)
			continue;
		out[rank] = score_in_scope(args.scope, lane.pair[j]);
		count++;
	}
	return count;
}

/* Grid: x units of KVG_EVICT_GATHER_CHUNKS chunks for each warp, y rows. */
extern "C" __global__ void __launch_bounds__(KVG_EVICT_THREADS)
	kvg_evict_gather(const __grid_constant__ kvg_evict_gather_args args)
{
	__shared__ uint32_t found;
	row_view row = view_row(args.rows, blockIdx.y);
	float *out = args.scores + args.offset[blockIdx.y];
	uint32_t first = blockIdx.x * KVG_EVICT_WARPS * KVG_EVICT_GATHER_CHUNKS, count = 0;

	if (first * KVG_CUDA_CHUNK >= row.length)
		return;
	if (threadIdx.x == 0)
		found = 0;
#pragma unroll
	for (uint32_t i = 0; i < KVG_EVICT_GATHER_CHUNKS; i++) {
		uint32_t begin = (first + i * KVG_EVICT_WARPS + threadIdx.x / 32) * KVG_CUDA_CHUNK;

		if (begin < row.length)
			count += gather_chunk(args, row, out, {begin, min(begin + KVG_CUDA_CHUNK, row.length)});
	}
	__syncthreads();
	count = __reduce_add_sync(EVICT_ALL_LANES, count);
	if (threadIdx.x % 32 == 0)
		atomicAdd(&found, count);
	__syncthreads();
	if (threadIdx.x == 0)
		atomicAdd(&args.found[blockIdx.y], found);
}

/* ---- count and mark: c-th chunk of the held indices, c-th stripe of the fresh ones ---- */

/* Pairs that stay of a chunk, over the warp, by their positions. */
__device__ static uint32_t count_chunk(
	const kvg_evict_mark_args &args, const row_view &row, const uint8_t *keep, chunk at)
{
	lane_pairs lane;

	if (at.begin == at.end)
		return 0;
	read_chunk(args.at, row, at, lane);
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++)
		lane.pair[j].x = position(args.rows, row, lane_index(at, j), lane.pair[j]);
	return __reduce_add_sync(EVICT_ALL_LANES, __popc(kept_by_rank(args.scope, keep, at, lane)));
}

__device__ static chunk quarter(chunk four, uint32_t i)
{
	return {min(four.begin + i * KVG_CUDA_CHUNK, four.end), min(four.begin + (i + 1) * KVG_CUDA_CHUNK, four.end)};
}

/* Pairs that stay of four chunks, a byte for each, over the warp. */
__device__ static uint32_t count_four(
	const kvg_evict_mark_args &args, const row_view &row, const uint8_t *keep, chunk four)
{
	uint32_t first, bytes = 0;

	if (four.begin == four.end)
		return 0;
	if (follow(args.scope, args.rows, row, four, &first)) {
		uint32_t kept = kept_in_order<4 * LANE_PAIRS>(keep + first, four);

#pragma unroll
		for (uint32_t i = 0; i < 4; i++)
			bytes |= __popc(kept >> (i * LANE_PAIRS) & ((1u << LANE_PAIRS) - 1)) << (8 * i);
		return __reduce_add_sync(EVICT_ALL_LANES, bytes);
	}
#pragma unroll 1
	for (uint32_t i = 0; i < 4; i++)
		bytes |= count_chunk(args, row, keep, quarter(four, i)) << (8 * i);
	return bytes;
}

/* A byte for each of four chunks: how many pairs it has. */
__device__ static uint32_t sizes_of_four(chunk four)
{
	uint32_t bytes = 0;

	for (uint32_t i = 0; i < 4; i++)
		bytes |= (quarter(four, i).end - quarter(four, i).begin) << (8 * i);
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
	uint32_t fours = args.counts.chunk_cap / 4, all_holes = 0, all_kept = 0;

	for (uint32_t i = threadIdx.x / 32; i < fours; i += KVG_EVICT_COUNT_THREADS / 32) {
		chunk held = {held_chunk(row, 4 * i).begin, held_chunk(row, 4 * i + 3).end};
		chunk fresh = {fresh_chunk(row, 4 * i).begin, fresh_chunk(row, 4 * i + 3).end};
		uint32_t kept = count_four(args, row, keep, fresh);
		uint32_t holes = sizes_of_four(held) - count_four(args, row, keep, held);

		all_kept = __dp4a(kept, 0x01010101u, all_kept);
		all_holes = __dp4a(holes, 0x01010101u, all_holes);
		if (threadIdx.x % 32 == 0) {
			stripe_kept[i] = kept;
			chunk_holes[i] = holes;
		}
	}
	all_kept = sum_block(all_kept, shared);
	all_holes = sum_block(all_holes, shared);
	if (threadIdx.x == 0) {
		args.counts.kept[blockIdx.x] = all_kept + row.held - all_holes;
		args.counts.holes[blockIdx.x] = all_holes;
	}
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
	uint32_t below = (1u << (threadIdx.x % 32)) - 1, first, kept, end;
	bool direct;
	lane_pairs lane;

	if (at.begin == at.end)
		return;
	direct = follow(args.scope, args.rows, row, at, &first);
	read_chunk(args.at, row, at, lane);
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++)
		lane.pair[j].x = position(args.rows, row, lane_index(at, j), lane.pair[j]);
	kept = direct ? kept_in_order<LANE_PAIRS>(keep + first, at) : kept_by_rank(args.scope, keep, at, lane);
	end = list.entries ? sum_bytes(list.counts, c) : 0;
#pragma unroll
	for (uint32_t j = 0; j < LANE_PAIRS; j++) {
		uint32_t index = lane_index(at, j);
		bool stays = kept >> j & 1, listed = index < at.end && stays == list_kept;
		uint32_t lanes = __ballot_sync(EVICT_ALL_LANES, listed), entry = end + __popc(lanes & below);

		if (index < at.end)
			*lane.address[j] = make_uint2(lane.pair[j].x, marked_score(stays, lane.pair[j].y));
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

#if __CUDA_ARCH__ >= 900

/* ---- by the bulk copy engine: each lane has its move's pair taken to shared memory and on from there ---- */

__device__ static void bulk_load(uint32_t to, const uint8_t *from, uint32_t bytes, uint32_t barrier)
{
	asm volatile(
		"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
		"l"(from), "r"(bytes), "r"(barrier)
		: "memory");
}

__device__ static void bulk_store(uint8_t *to, uint32_t from, uint32_t bytes)
{
	asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
		     : "memory");
}

/* The lane's stores so far have read what they store. */
__device__ static void bulk_stores_read()
{
	asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ static void barrier_init(uint32_t barrier)
{
	asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(barrier)
		     : "memory");
}

__device__ static void barrier_expect(uint32_t barrier, uint32_t bytes)
{
	asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ static void barrier_wait(uint32_t barrier, uint32_t parity)
{
	uint32_t done = 0;

	while (!done)
		asm volatile("{\n"
			     "\t.reg .pred p;\n"
			     "\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
			     "\tselp.u32 %0, 1, 0, p;\n"
			     "}\n"
			     : "=r"(done)
			     : "r"(barrier), "r"(parity)
			     : "memory");
}

/* The warp copies K and V of its lanes' first `count` moves, as many at a time as its shared memory holds. */
__device__ static void copy_moves(const kvg_cuda_area &area, const move &own, uint32_t count)
{
	__shared__ __align__(128) uint8_t rooms[KVG_EVICT_MOVE_WARPS][KVG_EVICT_MOVE_ROOM];
	__shared__ uint64_t barriers[KVG_EVICT_MOVE_WARPS];
	uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
	uint32_t pair = area.k_bytes + area.v_bytes, batch = min(KVG_EVICT_MOVE_ROOM / pair, 32u);
	uint32_t barrier = (uint32_t)__cvta_generic_to_shared(&barriers[warp]);
	uint32_t room = (uint32_t)__cvta_generic_to_shared(rooms[warp]) + lane % batch * pair;
	uint64_t src = own.src * area.stride, dst = own.dst * area.stride;
	uint32_t src_place = own.places & 15, dst_place = own.places >> 4;

	if (lane == 0)
		barrier_init(barrier);
	__syncwarp();
	for (uint32_t begin = 0, parity = 0; begin < count; begin += batch, parity ^= 1) {
		bool mine = lane >= begin && lane < min(begin + batch, count);

		if (lane == 0)
			barrier_expect(barrier, min(batch, count - begin) * pair);
		__syncwarp();
		if (mine && area.k_bytes)
			bulk_load(room, area.k_base + src + src_place * area.k_bytes, area.k_bytes, barrier);
		if (mine && area.v_bytes)
			bulk_load(room + area.k_bytes, area.v_base + src + src_place * area.v_bytes, area.v_bytes,
				barrier);
		barrier_wait(barrier, parity);
		if (mine && area.k_bytes)
			bulk_store(area.k_base + dst + dst_place * area.k_bytes, room, area.k_bytes);
		if (mine && area.v_bytes)
			bulk_store(area.v_base + dst + dst_place * area.v_bytes, room + area.k_bytes, area.v_bytes);
		bulk_stores_read();
		__syncwarp();
	}
}

#else

/* ---- by loads and stores of 16 bytes ---- */

#define MOVE_DEPTH 4u

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
 * The warp copies K and V of its lanes' first `count` moves. A pair has k + v vectors; the warp's are numbered through,
 * so that every lane has work whatever the sizes. KV: k = v = KV, 0: any.
 */
template <uint32_t KV> __device__ static void copy_vectors(const kvg_cuda_area &area, const move &own, uint32_t count)
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

__device__ static void copy_moves(const kvg_cuda_area &area, const move &own, uint32_t count)
{
	if (area.k_bytes == 256 && area.v_bytes == 256)
		copy_vectors<16>(area, own, count);
	else
		copy_vectors<0>(area, own, count);
}

#endif

/* The warp's moves with their metadata: this lane's own one is meant when the lane is below count. */
__device__ static void run_moves(const kvg_evict_area &at, const move &own, uint32_t count)
{
	if (threadIdx.x % 32 < count)
		*reinterpret_cast<uint2 *>(evict_pairs(at, own.dst) + (own.places >> 4)) =
			*reinterpret_cast<const uint2 *>(evict_pairs(at, own.src) + (own.places & 15));
	copy_moves(at.area, own, count);
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

/* A warp for each tile of moves. */
extern "C" __global__ void __launch_bounds__(KVG_EVICT_MOVE_WARPS * 32)
	kvg_evict_move(const __grid_constant__ kvg_evict_move_args args)
{
	uint32_t tile = blockIdx.x * KVG_EVICT_MOVE_WARPS + threadIdx.x / 32;

	if (tile >= args.tiles)
		return;
	uint32_t row = search_warp(args.rows, tile, [&](uint32_t i) { return args.move_rows[i].tile_first; });
	kvg_cuda_move_row at = args.move_rows[row];
	uint32_t first = (tile - at.tile_first) * KVG_CUDA_MOVE_TILE;

	run_moves(
		args.at, find_move(args, row, at, first + threadIdx.x % 32), min(at.count - first, KVG_CUDA_MOVE_TILE));
}

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

extern "C" __global__ void __launch_bounds__(KVG_EVICT_MOVE_WARPS * 32)
	kvg_evict_compact(const __grid_constant__ kvg_evict_compact_args args)
{
	uint32_t tile = blockIdx.x * KVG_EVICT_MOVE_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;

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
	run_moves(args.at, own, min(moves - first, KVG_CUDA_MOVE_TILE));
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
