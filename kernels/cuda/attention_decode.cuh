/*
 * attention_decode.cuh - decode attention of one KV head's query group over a row of blocks, streamed by warps.
 *
 * Bound by the bytes of K and V, which go from global memory straight into the registers that the tensor cores
 * read: no staging, no barrier, and a warp's next K (or V) is in flight while it works on V (or the next K).
 *
 * Both products are taken transposed, so that 16 pairs fill the 16 rows of m16n8k16 and the group, padded to 8,
 * its columns:   S^T = K Q^T,   O^T = V^T P^T.
 * A lane is (r, j) = (lane / 4, lane % 4). The order of the summed index is free, and is chosen so that each lane
 * loads 16 bytes at a time:
 *   K: lane (r, j) loads elements 32 s + 8 j .. + 7 of pairs r and r + 8, which are its A fragments of two steps;
 *      Q's B fragments are the same elements of query r.
 *   V: lane (r, j) loads elements 64 c + 8 r .. + 7 of pairs 2j, 2j + 1, 2j + 8, 2j + 9. Interleaving pairs gives the
 *      fragments of four products whose rows r and r + 8 are elements 8 r + 2 t and 8 r + 2 t + 1 (t = 0 .. 3).
 *      A last half chunk of 32 elements goes 8 bytes at a time with 4 r + 2 t.
 * The accumulators of S^T hold queries 2j and 2j + 1 of pairs r and r + 8; movmatrix turns the weights into
 * B fragments. The accumulators of O^T hold queries 2j and 2j + 1, too: rescaling stays in the lane.
 * fp32 is laid out alike byte for byte: half as many elements wherever bytes are counted, m16n8k8 of tf32.
 *
 * The layer's blocks are divided evenly among warps (workers), wherever rows end. A warp that has all of a row writes
 * its output; other parts meet in shared memory, and rows that go on in other thread blocks in global memory, where the
 * thread block that comes last merges them. The division depends on lengths alone and parts are merged in their order,
 * so results do not depend on who was when.
 *
 * The running maximum is raised only when a logit passes it by more than 2^8 (as in FlashAttention-4): weights then
 * stay under 256 and no precision is lost, and most blocks need no reduction across lanes.
 */
#ifndef KVG_CUDA_ATTENTION_DECODE_CUH
#define KVG_CUDA_ATTENTION_DECODE_CUH

#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_types.cuh"

#define KVG_SLACK 8.0f /* log2 of how far weights may pass 1 */

/* ---- what a warp holds ---- */

/* UNITS blocks at a time: small dimensions take several, so that as many bytes are in flight. */
template <class Type_, int D, int UNITS_> struct kvg_warp_state {
	typedef Type_ Type;
	static constexpr int DIM = D, UNITS = UNITS_;
	static constexpr int ROW = D * Type::SIZE;  /* bytes of a pair's K or V */
	static constexpr int STEPS = ROW / 64;      /* 16-byte loads of one pair's K, for each lane */
	static constexpr int CHUNKS = ROW / 128;    /* of V, 128 bytes wide */
	static constexpr int HALF = ROW % 128 / 64; /* and one of 64 */
	static constexpr int TILES = D / 16;
	static constexpr int TILES_CHUNK = 8 / Type::SIZE;

	uint4 k[UNITS][STEPS][2];         /* pairs r and r + 8 */
	uint4 v[UNITS][CHUNKS + 1][4];    /* pairs 2j, 2j + 1, 2j + 8, 2j + 9; [CHUNKS]: unused */
	uint2 v_half[UNITS][HALF + 1][4]; /* [HALF]: unused */
	float out[TILES][4];
	float most[2], sum[2]; /* of queries 2j and 2j + 1, in log2; sums of this lane's pairs alone */

	__device__ __forceinline__ void clear()
	{
#pragma unroll
		for (int t = 0; t < TILES; t++)
			out[t][0] = out[t][1] = out[t][2] = out[t][3] = 0;
		most[0] = most[1] = -INFINITY;
		sum[0] = sum[1] = 0;
	}
	/* at: the lane's first 16 bytes of K in the block */
	__device__ __forceinline__ void load_k(int u, const uint8_t *at, uint64_t policy)
	{
#pragma unroll
		for (int s = 0; s < STEPS; s++) {
			k[u][s][0] = kvg_load16(at + 64 * s, policy);
			k[u][s][1] = kvg_load16(at + 64 * s + 8 * ROW, policy);
		}
	}
	/* block: its V; the lane's place is added here, since it differs between whole and half chunks */
	__device__ __forceinline__ void load_v(int u, const uint8_t *block, uint64_t policy)
	{
		const uint32_t r = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
		const uint8_t *at = block + 2 * j * ROW + 16 * r;
		const uint8_t *at_half = block + 2 * j * ROW + 8 * r + 128 * CHUNKS;

#pragma unroll
		for (int c = 0; c < CHUNKS; c++)
#pragma unroll
			for (int i = 0; i < 4; i++)
				v[u][c][i] = kvg_load16(at + 128 * c + ((i & 1) + (i >> 1) * 8) * ROW, policy);
		if (HALF)
#pragma unroll
			for (int i = 0; i < 4; i++)
				v_half[u][0][i] = kvg_load8(at_half + ((i & 1) + (i >> 1) * 8) * ROW, policy);
	}
	/* Pairs from `valid` on count nothing. Their V may be anything, and 0 times NaN is NaN. */
	__device__ __forceinline__ void mask(int u, uint32_t valid, float s[4])
	{
		const uint32_t r = threadIdx.x % 32 / 4, j = threadIdx.x % 4;

		s[0] = r < valid ? s[0] : -INFINITY;
		s[1] = r < valid ? s[1] : -INFINITY;
		s[2] = r + 8 < valid ? s[2] : -INFINITY;
		s[3] = r + 8 < valid ? s[3] : -INFINITY;
#pragma unroll
		for (int i = 0; i < 4; i++)
			if (2 * j + (i & 1) + (i >> 1) * 8 >= valid) {
#pragma unroll
				for (int c = 0; c < CHUNKS; c++)
					v[u][c][i] = make_uint4(0, 0, 0, 0);
				v_half[u][0][i] = make_uint2(0, 0);
			}
	}
	/* logits of pairs r, r + 8 (s[0..1], s[2..3]) and queries 2j, 2j + 1; q: this lane's, every 32nd */
	__device__ __forceinline__ void logits(int u, const uint4 *q, float s[4])
	{
		float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};

#pragma unroll
		for (int i = 0; i < STEPS; i++)
			Type::keys(even, odd, k[u][i][0], k[u][i][1], q[32 * i]);
#pragma unroll
		for (int i = 0; i < 4; i++)
			s[i] = even[i] + odd[i];
	}
	__device__ __forceinline__ void raise(float a, float b)
	{
#pragma unroll
		for (int step = 4; step < 32; step *= 2) {
			a = fmaxf(a, __shfl_xor_sync(KVG_ALL_LANES, a, step));
			b = fmaxf(b, __shfl_xor_sync(KVG_ALL_LANES, b, step));
		}
		a = fmaxf(a, most[0]);
		b = fmaxf(b, most[1]);
		const float shrink_a = kvg_exp2(most[0] - a), shrink_b = kvg_exp2(most[1] - b);

		most[0] = a;
		most[1] = b;
		sum[0] *= shrink_a;
		sum[1] *= shrink_b;
#pragma unroll
		for (int t = 0; t < TILES; t++) {
			out[t][0] *= shrink_a;
			out[t][1] *= shrink_b;
			out[t][2] *= shrink_a;
			out[t][3] *= shrink_b;
		}
	}
	/* Logits become weights. */
	__device__ __forceinline__ void weigh(float s[UNITS][4], float scale, typename Type::weights p[UNITS])
	{
		float a = -INFINITY, b = -INFINITY;

#pragma unroll
		for (int u = 0; u < UNITS; u++) {
#pragma unroll
			for (int i = 0; i < 4; i++)
				s[u][i] *= scale;
			a = fmaxf(a, fmaxf(s[u][0], s[u][2]));
			b = fmaxf(b, fmaxf(s[u][1], s[u][3]));
		}
		if (__any_sync(KVG_ALL_LANES, a > most[0] + KVG_SLACK || b > most[1] + KVG_SLACK))
			raise(a, b);
#pragma unroll
		for (int u = 0; u < UNITS; u++) {
#pragma unroll
			for (int i = 0; i < 4; i++)
				s[u][i] = kvg_exp2(s[u][i] - most[i & 1]);
			sum[0] += s[u][0] + s[u][2];
			sum[1] += s[u][1] + s[u][3];
			p[u] = Type::pack(s[u]);
		}
	}
	__device__ __forceinline__ void values(int u, const typename Type::weights &p)
	{
#pragma unroll
		for (int c = 0; c < CHUNKS; c++)
			Type::values(out + TILES_CHUNK * c, v[u][c], p);
		if (HALF)
			Type::values_half(out + TILES_CHUNK * CHUNKS, v_half[u][0], p);
	}
	__device__ __forceinline__ void sum_lanes()
	{
#pragma unroll
		for (int step = 4; step < 32; step *= 2) {
			sum[0] += __shfl_xor_sync(KVG_ALL_LANES, sum[0], step);
			sum[1] += __shfl_xor_sync(KVG_ALL_LANES, sum[1], step);
		}
	}
	/* The lane's first element of tile t; the tile's other one follows. */
	static __device__ __forceinline__ uint32_t element(int t)
	{
		const int r = threadIdx.x % 32 / 4, chunk = t / TILES_CHUNK, within = t % TILES_CHUNK;

		return 16 * TILES_CHUNK * chunk + 2 * within + (chunk < CHUNKS ? 2 * TILES_CHUNK : TILES_CHUNK) * r;
	}
};

/* ---- the blocks that a warp walks ---- */

/* A row, or a worker's part of it. */
struct kvg_segment {
	uint32_t row, begin, blocks; /* first block of the part; blocks of the whole row */
	uint32_t length, first;      /* pairs of the row; number of its first block in the layer */
};

/* Some blocks of a segment that are loaded together; of an empty row, none. */
struct kvg_group {
	uint32_t count, block; /* blocks, and the first one's place in the row */
};

/*
 * The loading side of a worker: one group ahead of the computing side. Ids come 32 at a time, the next 32 on their
 * way; the first id of a row is in the plan, and its first group is that one block.
 */
template <int UNITS> struct kvg_walk {
	const struct kvg_attention_attend &args;
	struct kvg_segment segment;
	struct kvg_group group;
	uint32_t left; /* blocks of the worker beyond this group */
	uint32_t id[UNITS];
	const uint32_t *ids;
	uint32_t base, held, coming; /* the lanes hold ids from `base` on */
	struct kvg_attention_row next;

	__device__ __forceinline__ uint32_t peek(uint32_t first) const
	{
		const uint32_t i = first + threadIdx.x % 32;

		return i * 16 < segment.length ? __ldg(ids + i) : 0;
	}
	/* Comes to block `block` of a row; at: that row, with the block's id. */
	__device__ __forceinline__ void enter(const struct kvg_attention_row &at, uint32_t block)
	{
		ids = args.ids + (size_t)at.table * args.row_cap;
		segment.length = at.length;
		segment.first = at.first;
		segment.begin = block;
		segment.blocks = max((at.length + 15) / 16, 1u);
		group.block = block;
		group.count = at.length ? 1 : 0;
		id[0] = at.id;
		base = block + 1;
		held = peek(base);
		coming = peek(base + 32);
		if (left > segment.blocks - block)
			next = ((const struct kvg_attention_row *)(args.plan.memory +
								   args.plan.rows_at))[segment.row + 1];
		left--;
	}
	__device__ __forceinline__ void start(const struct kvg_attention_start &start)
	{
		left = start.count;
		segment.row = start.row;
		enter(start.at, start.block);
	}
	/* To the next group, if there is one. */
	__device__ __forceinline__ bool advance()
	{
		const uint32_t block = group.block + max(group.count, 1u);

		if (left == 0)
			return false;
		if (block == segment.blocks) {
			segment.row++;
			enter(next, 0);
			return true;
		}
		if (block - base == 32) {
			base = block;
			held = coming;
			coming = peek(base + 32);
		}
		group.block = block;
		group.count = min(min((uint32_t)UNITS, left), segment.blocks - block);
		left -= group.count;
#pragma unroll
		for (int u = 0; u < UNITS; u++)
			id[u] = __shfl_sync(KVG_ALL_LANES, held, block - base + u);
		return true;
	}
	/* Pairs of the group. */
	__device__ __forceinline__ uint32_t valid() const
	{
		return min(segment.length - group.block * 16, group.count * 16);
	}
};

/* ---- what the warps of a thread block bring together ---- */

/* A worker's part of a row that others share: [0] of a row that began before, [1] of one that goes on after. */
struct kvg_slot {
	uint32_t row, first, blocks; /* row ~0: none */
	uint32_t ends;               /* whether the part reaches the row's end */
	float most[KVG_ATTENTION_QUERIES], sum[KVG_ATTENTION_QUERIES];
};

/* The thread blocks that share a row, both included. */
struct kvg_sharers {
	uint32_t begin, end;
};

/* A row that this thread block shares with others. */
struct kvg_shared_row {
	uint32_t row, last; /* whether all other parts are there */
	struct kvg_sharers sharers;
};

/*
 * Shared memory: slots[warps][2], two shared rows, queries of each warp as B fragments, then sums[warps][2][group][D +
 * 4], or at least 32 bytes for each thread. shared_size() in attention_decode.c counts the same.
 */
template <class State> struct kvg_shared {
	static constexpr uint32_t STRIDE = State::DIM + 4;     /* avoids equal banks */
	static constexpr uint32_t QUERIES = State::STEPS * 32; /* uint4 of one warp */

	struct kvg_slot *slots;
	struct kvg_shared_row *rows;
	uint4 *queries;
	float *sums;
	uint32_t group, warps;

	__device__ __forceinline__ kvg_shared(uint8_t *memory, uint32_t group_) : group(group_), warps(blockDim.x / 32)
	{
		slots = (struct kvg_slot *)memory;
		rows = (struct kvg_shared_row *)(slots + 2 * warps);
		queries = (uint4 *)(rows + 2);
		sums = (float *)(queries + warps * QUERIES);
	}
	__device__ __forceinline__ float *sum(uint32_t slot, uint32_t query) const
	{
		return sums + (slot * group + query) * STRIDE;
	}
};

/* Byte offset of the first query head of a row, within q (or out) with that many bytes of a sequence. */
template <class State>
static __device__ __forceinline__ size_t kvg_row_offset(
	const struct kvg_attention_attend &args, uint32_t row, uint64_t sequence_bytes)
{
	const uint32_t sequence = row / args.heads, head = row - sequence * args.heads;

	return sequence * sequence_bytes + (size_t)head * args.group * State::ROW;
}

/* Queries of the row's group; lanes beyond the group hold zeros. */
template <class State>
static __device__ __forceinline__ void kvg_load_queries(
	const struct kvg_attention_attend &args, uint32_t row, uint4 *queries)
{
	const uint32_t lane = threadIdx.x % 32, r = lane / 4, j = lane % 4;
	const uint8_t *from = args.q + kvg_row_offset<State>(args, row, args.q_stride) + r * State::ROW + 16 * j;

#pragma unroll
	for (int s = 0; s < State::STEPS; s++)
		queries[32 * s + lane] =
			r < args.group ? __ldg((const uint4 *)(from + 64 * s)) : make_uint4(0, 0, 0, 0);
	__syncwarp();
}

/* A row that one worker has all of. */
template <class State>
static __device__ __forceinline__ void kvg_put_row(const State &state, uint8_t *out, uint32_t group)
{
#pragma unroll
	for (int i = 0; i < 2; i++) {
		const uint32_t query = 2 * (threadIdx.x % 4) + i;
		const float share = kvg_share_of(state.sum[i]);

		if (query < group)
#pragma unroll
			for (int t = 0; t < State::TILES; t++)
				State::Type::store2(out + query * State::ROW + State::element(t) * State::Type::SIZE,
					state.out[t][i] * share, state.out[t][i + 2] * share);
	}
}

/* A part of a row, for the thread block to merge. */
template <class State>
static __device__ __forceinline__ void kvg_put_part(
	const State &state, const struct kvg_shared<State> &shared, const struct kvg_segment &segment, bool ends)
{
	const uint32_t lane = threadIdx.x % 32, at = 2 * (threadIdx.x / 32) + (segment.begin == 0);
	struct kvg_slot &slot = shared.slots[at];

	if (lane == 0) {
		slot.row = segment.row;
		slot.first = segment.first;
		slot.blocks = segment.blocks;
		slot.ends = ends;
	}
#pragma unroll
	for (int i = 0; i < 2; i++) {
		const uint32_t query = 2 * (lane % 4) + i;

		if (lane < 4) {
			slot.most[query] = state.most[i];
			slot.sum[query] = state.sum[i];
		}
		if (query < shared.group)
#pragma unroll
			for (int t = 0; t < State::TILES; t++)
				*(float2 *)(shared.sum(at, query) + State::element(t)) =
					make_float2(state.out[t][i], state.out[t][i + 2]);
	}
}

/* All of a worker's blocks. */
template <class State>
static __device__ __forceinline__ void kvg_work(const struct kvg_attention_attend &args,
	const struct kvg_attention_start &start, const struct kvg_shared<State> &shared)
{
	constexpr int UNITS = State::UNITS;
	const uint32_t lane = threadIdx.x % 32;
	const uint8_t *k_lane = args.k_base + lane / 4 * State::ROW + lane % 4 * 16;
	const uint64_t policy = kvg_stream_policy();
	uint4 *queries = shared.queries + threadIdx.x / 32 * shared.QUERIES;
	State state = {};
	struct kvg_walk<UNITS> walk = {
		args
	};
	bool more = true;

	walk.start(start);
	if (walk.group.count) {
		state.load_k(0, k_lane + walk.id[0] * args.stride, policy);
		state.load_v(0, args.v_base + walk.id[0] * args.stride, policy);
	}
	kvg_load_queries<State>(args, walk.segment.row, queries);
	state.clear();
	while (more) {
		const struct kvg_segment segment = walk.segment;
		const uint32_t valid = walk.valid(), count = walk.group.count, end = walk.group.block + max(count, 1u);
		float s[UNITS][4];
		typename State::Type::weights p[UNITS];

#pragma unroll
		for (int u = 0; u < UNITS; u++)
			state.logits(u, queries + lane, s[u]);
		more = walk.advance();
#pragma unroll
		for (int u = 0; u < UNITS; u++)
			if (more && u < walk.group.count)
				state.load_k(u, k_lane + walk.id[u] * args.stride, policy);
		if (count) {
			if (valid < 16 * UNITS)
#pragma unroll
				for (int u = 0; u < UNITS; u++)
					state.mask(u, valid > 16u * u ? valid - 16 * u : 0, s[u]);
			state.weigh(s, args.scale, p);
#pragma unroll
			for (int u = 0; u < UNITS; u++)
				state.values(u, p[u]);
		}
#pragma unroll
		for (int u = 0; u < UNITS; u++)
			if (more && u < walk.group.count)
				state.load_v(u, args.v_base + walk.id[u] * args.stride, policy);
		if (more && walk.segment.row == segment.row)
			continue;
		state.sum_lanes();
		if (segment.begin == 0 && end == segment.blocks)
			kvg_put_row(state, args.out + kvg_row_offset<State>(args, segment.row, args.out_stride),
				args.group);
		else
			kvg_put_part(state, shared, segment, end == segment.blocks);
		if (more) {
			__syncwarp();
			kvg_load_queries<State>(args, walk.segment.row, queries);
			state.clear();
		}
	}
}

/* ---- merging ---- */

/* A softmax-weighted sum of some pairs, for four elements of the output. */
struct kvg_part {
	float most, sum;
	float4 out;
};

static __device__ __forceinline__ struct kvg_part kvg_part_none()
{
	const struct kvg_part none = {-INFINITY, 0, {0, 0, 0, 0}};

	return none;
}

/* Merges parts in their order. Some part must have pairs. */
template <int COUNT>
static __device__ __forceinline__ struct kvg_part kvg_parts_merge(const struct kvg_part (&parts)[COUNT])
{
	struct kvg_part all = kvg_part_none();

#pragma unroll
	for (int i = 0; i < COUNT; i++)
		all.most = fmaxf(all.most, parts[i].most);
#pragma unroll
	for (int i = 0; i < COUNT; i++) {
		const float weight = kvg_exp2(parts[i].most - all.most);

		all.sum += parts[i].sum * weight;
		all.out.x += parts[i].out.x * weight;
		all.out.y += parts[i].out.y * weight;
		all.out.z += parts[i].out.z * weight;
		all.out.w += parts[i].out.w * weight;
	}
	return all;
}

/* Four elements of the output, from element `at` of a query on. */
template <class State>
static __device__ __forceinline__ void kvg_part_finish(
	const struct kvg_part &all, uint8_t *out, uint32_t query, uint32_t at)
{
	const float share = kvg_share_of(all.sum);

	State::Type::store4(out + query * State::ROW + at * State::Type::SIZE,
		make_float4(all.out.x * share, all.out.y * share, all.out.z * share, all.out.w * share));
}

/* Partial result `which` of a thread block: out[group][DIM], most[8], sum[8], up to a multiple of 128 bytes. */
template <class State>
static __device__ __forceinline__ float *kvg_partial(
	const struct kvg_attention_attend &args, uint32_t block, uint32_t which)
{
	return args.scratch + (size_t)(2 * block + which) * (args.group * State::DIM + 32);
}

/* The row parts of consecutive warps: slot `head`, then [0] of the warps after it up to `last`. */
struct kvg_chain {
	uint32_t head, last;
	bool ends; /* with the row's end */
};

/* Which warps have a part [0], one that reaches its row's end, and a part [1]. */
struct kvg_masks {
	uint32_t before, ending, after;
};

template <class State>
static __device__ __forceinline__ struct kvg_masks kvg_masks_of(const struct kvg_shared<State> &shared)
{
	const uint32_t lane = threadIdx.x % 32;
	const struct kvg_slot *slot = shared.slots + 2 * min(lane, shared.warps - 1);
	const bool some = lane < shared.warps, before = some && slot[0].row != ~0u;
	const struct kvg_masks masks = {__ballot_sync(KVG_ALL_LANES, before),
		__ballot_sync(KVG_ALL_LANES, before && slot[0].ends),
		__ballot_sync(KVG_ALL_LANES, some && slot[1].row != ~0u)};

	return masks;
}

/* A part is followed by those of the next warps, until one ends the row: workers' blocks are consecutive. */
static __device__ __forceinline__ struct kvg_chain kvg_chain_from(const struct kvg_masks &masks, uint32_t head)
{
	const uint32_t from = (head + 1) / 2, ending = masks.ending >> from << from,
		       others = masks.before >> from << from;
	struct kvg_chain chain = {head, head / 2, false};

	if (ending) {
		chain.last = __ffs(ending) - 1;
		chain.ends = true;
	} else if (others) {
		chain.last = 31 - __clz(others);
	}
	return chain;
}

/* Four elements of the part of a chain's warp; beyond the last one there is none. */
template <class State>
static __device__ __forceinline__ struct kvg_part kvg_chain_part(const struct kvg_shared<State> &shared,
	const struct kvg_chain &chain, uint32_t warp, uint32_t query, uint32_t at)
{
	const uint32_t slot = warp == chain.head / 2 ? chain.head : 2 * warp;
	struct kvg_part part = kvg_part_none();

	if (warp <= chain.last) {
		part.most = shared.slots[slot].most[query];
		part.sum = shared.slots[slot].sum[query];
		part.out = *(const float4 *)(shared.sum(slot, query) + at);
	}
	return part;
}

/* Merges a chain in the order of its warps: to the output if that is the whole row, else to the partial results. */
template <class State>
static __device__ __forceinline__ void kvg_chain_merge(
	const struct kvg_attention_attend &args, const struct kvg_shared<State> &shared, const struct kvg_chain &chain)
{
	constexpr int AHEAD = 6;
	float *partial = kvg_partial<State>(args, blockIdx.x, chain.head % 2);
	uint8_t *out = args.out + kvg_row_offset<State>(args, shared.slots[chain.head].row, args.out_stride);

	for (uint32_t i = threadIdx.x; i < args.group * (State::DIM / 4); i += blockDim.x) {
		const uint32_t query = i / (State::DIM / 4), at = i % (State::DIM / 4) * 4;
		struct kvg_part parts[AHEAD + 1];

		parts[AHEAD] = kvg_part_none();
		for (uint32_t warp = chain.head / 2; warp <= chain.last; warp += AHEAD) {
#pragma unroll
			for (int a = 0; a < AHEAD; a++)
				parts[a] = kvg_chain_part(shared, chain, warp + a, query, at);
			parts[AHEAD] = kvg_parts_merge(parts);
		}
		if (chain.head % 2 && chain.ends) {
			kvg_part_finish<State>(parts[AHEAD], out, query, at);
			continue;
		}
		*(float4 *)(partial + query * State::DIM + at) = parts[AHEAD].out;
		if (at == 0) {
			partial[args.group * State::DIM + query] = parts[AHEAD].most;
			partial[args.group * State::DIM + 8 + query] = parts[AHEAD].sum;
		}
	}
}

/* ---- rows that several thread blocks share ---- */

/* The thread block whose worker has this block: workers begin at worker * total / workers, rounded down. */
static __device__ __forceinline__ uint32_t kvg_sharer_of(const struct kvg_attention_head &plan, uint32_t block)
{
	return (uint32_t)__umul64hi((uint64_t)(block + 1) * plan.workers - 1, plan.inverse) / (blockDim.x / 32);
}

static __device__ __forceinline__ struct kvg_sharers kvg_sharers_of(
	const struct kvg_attention_head &plan, const struct kvg_slot &slot)
{
	const struct kvg_sharers sharers = {
		kvg_sharer_of(plan, slot.first), kvg_sharer_of(plan, slot.first + slot.blocks - 1)};

	return sharers;
}

/* Four elements of a sharer's part; beyond the last one there is none. */
template <class State>
static __device__ __forceinline__ struct kvg_part kvg_sharer_part(const struct kvg_attention_attend &args,
	const struct kvg_sharers &sharers, uint32_t block, uint32_t query, uint32_t at)
{
	const float *from = kvg_partial<State>(args, block, block == sharers.begin);
	struct kvg_part part = kvg_part_none();

	if (block <= sharers.end) {
		part.out = __ldcg((const float4 *)(from + query * State::DIM + at));
		part.most = __ldcg(from + args.group * State::DIM + query);
		part.sum = __ldcg(from + args.group * State::DIM + 8 + query);
	}
	return part;
}

/* What a line of threads merges: every lines'th part, from part `line` on. */
template <class State>
static __device__ __forceinline__ struct kvg_part kvg_line_merge(const struct kvg_attention_attend &args,
	const struct kvg_sharers &sharers, uint32_t line, uint32_t lines, uint32_t query, uint32_t at)
{
	constexpr int AHEAD = 8;
	struct kvg_part parts[AHEAD + 1];

	parts[AHEAD] = kvg_part_none();
	for (uint32_t block = sharers.begin + line; block <= sharers.end; block += AHEAD * lines) {
#pragma unroll
		for (int a = 0; a < AHEAD; a++)
			parts[a] = kvg_sharer_part<State>(args, sharers, block + a * lines, query, at);
		parts[AHEAD] = kvg_parts_merge(parts);
	}
	return parts[AHEAD];
}

/*
 * Merges the parts of a row. Threads form lines, each as wide as the group's numbers; the first line merges what
 * the lines have merged, through shared memory.
 */
template <class State>
static __device__ __forceinline__ void kvg_share_merge(const struct kvg_attention_attend &args,
	const struct kvg_sharers &sharers, struct kvg_part *between, uint8_t *out)
{
	constexpr int MOST = 8;
	const uint32_t width = args.group * (State::DIM / 4), line = threadIdx.x / width,
		       lines = min(min(max(blockDim.x / width, 1u), (uint32_t)MOST), sharers.end - sharers.begin + 1);

	for (uint32_t i = threadIdx.x - line * width; line < lines && i < width; i += blockDim.x) {
		const uint32_t query = i / (State::DIM / 4), at = i % (State::DIM / 4) * 4;
		const struct kvg_part part = kvg_line_merge<State>(args, sharers, line, lines, query, at);

		if (lines == 1)
			kvg_part_finish<State>(part, out, query, at);
		else
			between[line * width + i] = part;
	}
	__syncthreads();
	if (lines > 1 && threadIdx.x < width) {
		struct kvg_part parts[MOST];

#pragma unroll
		for (int i = 0; i < MOST; i++)
			parts[i] = i < (int)lines ? between[i * width + threadIdx.x] : kvg_part_none();
		kvg_part_finish<State>(kvg_parts_merge(parts), out, threadIdx.x / (State::DIM / 4),
			threadIdx.x % (State::DIM / 4) * 4);
	}
	__syncthreads();
}

/*
 * Counts this thread block's part of a row; whether it is the last one. Stores of the whole block that a barrier
 * put before this are visible to whoever counts later, and theirs to this thread.
 */
static __device__ __forceinline__ bool kvg_is_last(
	const struct kvg_attention_attend &args, uint32_t row, const struct kvg_sharers &sharers)
{
	uint32_t *counter = (uint32_t *)(args.plan.memory + args.plan.counters_at) + row;
	uint32_t earlier;

	asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(earlier) : "l"(counter) : "memory");
	if (earlier != sharers.end - sharers.begin)
		return false;
	*counter = 0;
	return true;
}

/*
 * Rows at slots `before` (it began in an earlier thread block) and `after` (it goes on in a later one), or ~0:
 * whichever thread block comes last merges all parts.
 */
template <class State>
static __device__ __forceinline__ void kvg_share(const struct kvg_attention_attend &args,
	const struct kvg_shared<State> &shared, const struct kvg_attention_head &plan, uint32_t before, uint32_t after)
{
	const uint32_t own = threadIdx.x ? after : before;
	struct kvg_shared_row *row = shared.rows + threadIdx.x;

	if (threadIdx.x < 2) {
		row->last = false;
		if (own != ~0u) {
			row->row = shared.slots[own].row;
			row->sharers = kvg_sharers_of(plan, shared.slots[own]);
		}
	}
	__syncthreads();
	if (threadIdx.x < 2 && own != ~0u)
		row->last = kvg_is_last(args, row->row, row->sharers);
	__syncthreads();
#pragma unroll 1
	for (row = shared.rows; row < shared.rows + 2; row++)
		if (row->last)
			kvg_share_merge<State>(args, row->sharers, (struct kvg_part *)shared.sums,
				args.out + kvg_row_offset<State>(args, row->row, args.out_stride));
}

template <class State>
static __device__ __forceinline__ void kvg_merge(const struct kvg_attention_attend &args,
	const struct kvg_shared<State> &shared, const struct kvg_attention_head &plan)
{
	uint32_t before = ~0u, after = ~0u;

	__syncthreads();
	const struct kvg_masks masks = kvg_masks_of(shared);

	/* Chains begin at slot 0 or at a slot [1]: bit n is that of warp n - 1. */
#pragma unroll 1
	for (uint32_t heads = masks.after << 1 | (masks.before & 1); heads; heads &= heads - 1) {
		const uint32_t bit = __ffs(heads) - 1;
		const struct kvg_chain chain = kvg_chain_from(masks, bit ? 2 * bit - 1 : 0);

		kvg_chain_merge(args, shared, chain);
		before = bit ? before : 0;
		after = bit && !chain.ends ? chain.head : after;
	}
	if (before != ~0u || after != ~0u)
		kvg_share(args, shared, plan, before, after);
}

template <class State> static __device__ __forceinline__ void kvg_attend(const struct kvg_attention_attend &args)
{
	extern __shared__ uint4 memory[];
	const struct kvg_shared<State> shared((uint8_t *)memory, args.group);
	const struct kvg_attention_head plan = *(const struct kvg_attention_head *)args.plan.memory;
	const uint32_t warp = threadIdx.x / 32, worker = blockIdx.x * shared.warps + warp;
	const struct kvg_attention_start start =
		((const struct kvg_attention_start *)(args.plan.memory + sizeof(plan)))[worker];

	if (blockIdx.x * shared.warps >= plan.workers)
		return;
	if (threadIdx.x % 32 < 2)
		shared.slots[2 * warp + threadIdx.x % 32].row = ~0u;
	__syncwarp();
	if (worker < plan.workers)
		kvg_work<State>(args, start, shared);
	kvg_merge<State>(args, shared, plan);
}

#endif
