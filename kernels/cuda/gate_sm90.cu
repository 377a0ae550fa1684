/*
 * gate_sm90.cu - the gate from hidden states on compute capability 9.0.
 *
 * Two blocks form a cluster, and one warp of each brings tiles of 64 columns through the tensor copy engine into
 * a ring of stages; two warpgroups multiply 64 rows each with whole heads and turn the sums into scores
 * in their registers. What both blocks of a cluster need is brought half by each and sent to both:
 * wide: the weights (the blocks have different rows), deep: the rows (they have different heads).
 * The grid is as large as the device. Either each cluster takes whole tiles in turn, or (deep) the chunks of all tiles
 * are dealt evenly ("split"); then a tile that several clusters share is summed up, always in the same order, by the
 * warpgroup that happens to finish last, and nobody waits.
 */
#include "kernels/cuda/gate_head.cuh"
#include "kernels/cuda/gate_sm90.cuh"

constexpr int BLOCK_ROWS = 128;
constexpr int PRODUCER = 256; /* the thread that brings */
constexpr int ROW_BYTES = KVG_GATE_CHUNK * 2;
constexpr int SHARED_BYTES = 232448 - 2048; /* for stages: what a block may have, less barriers and alignment */

/* How a block's tile is laid out: PARTS products of HEADS heads for each of the two warpgroups. */
template <int GROUP, int HEADS, int PARTS_, bool DEEP_> struct gate_shape {
	static constexpr int G = GROUP, PARTS = PARTS_, PART_HEADS = HEADS;
	static constexpr bool DEEP = DEEP_;
	static constexpr int SUMS = PARTS * HEADS * (GROUP + 1) * KVG_GATE_WIDTH / 2; /* of a thread */
	static constexpr int HEAD_SUMS = (G + 1) * KVG_GATE_WIDTH / 2;
	static constexpr int N = HEADS * (G + 1) * KVG_GATE_WIDTH;
	static constexpr int ROWS_BYTES = BLOCK_ROWS * ROW_BYTES, WEIGHTS_BYTES = PARTS * N * ROW_BYTES;
	static constexpr int STAGE_BYTES = ROWS_BYTES + WEIGHTS_BYTES;
	static constexpr int STAGES = SHARED_BYTES / STAGE_BYTES < 8 ? SHARED_BYTES / STAGE_BYTES : 8;
	static constexpr int CLUSTER_HEADS = HEADS * PARTS * (DEEP ? 2 : 1);
	static constexpr int CLUSTER_ROWS = BLOCK_ROWS * (DEEP ? 1 : 2);
};

/* ---- who does what ---- */

struct gate_work {
	unsigned tile, from, to; /* chunks of the tile */
};

/* The first chunk, of all tiles' counted through, that a cluster has when tiles are split; 32 bits are enough then. */
__device__ __forceinline__ unsigned first_chunk(const kvg_gate_args &args, unsigned cluster)
{
	return cluster * (args.tiles * args.chunks) / (gridDim.x / 2);
}

/* The cluster that has this chunk then. */
__device__ __forceinline__ unsigned cluster_of(const kvg_gate_args &args, unsigned chunk)
{
	return ((chunk + 1) * (gridDim.x / 2) - 1) / (args.tiles * args.chunks);
}

/* The work of one cluster, in order. */
struct gate_schedule {
	unsigned tile, from, left; /* the next tile, its first chunk, and chunks left when tiles are split */

	__device__ __forceinline__ gate_schedule(const kvg_gate_args &args)
	{
		const unsigned cluster = blockIdx.x / 2;

		tile = cluster;
		from = left = 0;
		if (args.split) {
			left = first_chunk(args, cluster);
			tile = left / args.chunks;
			from = left % args.chunks;
			left = first_chunk(args, cluster + 1) - left;
		}
	}

	__device__ __forceinline__ bool next(const kvg_gate_args &args, gate_work &work)
	{
		if (args.split ? left == 0 : tile >= args.tiles)
			return false;
		work = {tile, from, args.split ? min(args.chunks, from + left) : args.chunks};
		left -= work.to - work.from;
		from = 0;
		tile += args.split ? 1 : gridDim.x / 2;
		return true;
	}
};

struct gate_place {
	unsigned layer, row, head; /* of the block's first row and head */
};

template <class S> __device__ __forceinline__ gate_place place_of(const kvg_gate_args &args, unsigned tile)
{
	const unsigned rank = cluster_rank(), row_tile = tile / args.head_tiles;
	const unsigned row = row_tile % args.row_tiles * S::CLUSTER_ROWS,
		       head = tile % args.head_tiles * S::CLUSTER_HEADS;

	return {row_tile / args.row_tiles, row + (S::DEEP ? 0 : rank * BLOCK_ROWS),
		head + (S::DEEP ? rank * (S::CLUSTER_HEADS / 2) : 0)};
}

/* The ring of stages: `full` when a stage's bytes have come, `empty` when all its readers in both blocks have read it.
 */
template <class S> struct gate_ring {
	unsigned char *stages;
	uint64_t *full, *empty;
	unsigned stage = 0, phase = 0;

	__device__ __forceinline__ void advance()
	{
		if (++stage == S::STAGES) {
			stage = 0;
			phase ^= 1;
		}
	}
};

/* ---- bringing ---- */

template <class S>
__device__ __forceinline__ void bring_chunk(const kvg_gate_args &args, const CUtensorMap *rows,
	const CUtensorMap *weights, unsigned char *stage, uint64_t *full, const gate_place &place, unsigned chunk)
{
	const unsigned half = cluster_rank(), line = place.head * (S::G + 1) * KVG_GATE_WIDTH;
	const unsigned piece = (args.first_layer + place.layer) * args.chunks + chunk;
	unsigned char *weights_at = stage + S::ROWS_BYTES;

	if (S::DEEP) {
		bring_both(stage + half * (S::ROWS_BYTES / 2), rows, full, chunk * KVG_GATE_CHUNK,
			place.row + half * (BLOCK_ROWS / 2), place.layer);
		/* Weights that are read once must not drive out the rows and the sums that are read again. */
		if (args.row_tiles == 1)
			bring_once(weights_at, weights, full, 0, line, piece);
		else
			bring(weights_at, weights, full, 0, line, piece);
	} else {
		bring(stage, rows, full, chunk * KVG_GATE_CHUNK, place.row, place.layer);
		bring_both(weights_at + half * (S::WEIGHTS_BYTES / 2), weights, full, 0,
			line + half * (S::PARTS * S::N / 2), piece);
	}
}

template <class S>
__device__ __forceinline__ void bring_all(
	const kvg_gate_args &args, const CUtensorMap *rows, const CUtensorMap *weights, gate_ring<S> ring)
{
	gate_schedule schedule(args);
	gate_work work;

	while (schedule.next(args, work)) {
		const gate_place place = place_of<S>(args, work.tile);

		for (unsigned chunk = work.from; chunk < work.to; chunk++) {
			barrier_wait(&ring.empty[ring.stage], ring.phase ^ 1);
			barrier_expect(&ring.full[ring.stage], S::STAGE_BYTES);
			bring_chunk<S>(args, rows, weights, ring.stages + ring.stage * S::STAGE_BYTES,
				&ring.full[ring.stage], place, chunk);
			ring.advance();
		}
	}
}

/* ---- multiplying ---- */

__device__ __forceinline__ void release(uint64_t *empty)
{
	if (threadIdx.x % 128 == 0) {
		barrier_arrive(empty, 0);
		barrier_arrive(empty, 1);
	}
}

/* The sums of the warpgroup's 64 rows over some chunks. A chunk's stage is free
 * when the next one's products wait. */
template <class S>
__device__ __forceinline__ void multiply(
	float (&sums)[S::PARTS][S::N / 2], gate_ring<S> &ring, unsigned warpgroup, unsigned chunks)
{
	uint64_t *before = nullptr;

	for (unsigned chunk = 0; chunk < chunks; chunk++) {
		const unsigned char *stage = ring.stages + ring.stage * S::STAGE_BYTES;
		const uint64_t rows = tile_descriptor(stage + warpgroup * (S::ROWS_BYTES / 2));
		const uint64_t weights = tile_descriptor(stage + S::ROWS_BYTES);

		barrier_wait(&ring.full[ring.stage], ring.phase);
		product_begin();
#pragma unroll
		for (int k = 0; k < KVG_GATE_CHUNK / 16; k++)
#pragma unroll
			for (int part = 0; part < S::PARTS; part++)
				product<S::N>(sums[part], rows + k * 2,
					weights + k * 2 + part * (S::N * ROW_BYTES / 16), chunk != 0 || k != 0);
		product_commit();
		product_wait<1>();
		if (before)
			release(before);
		before = &ring.empty[ring.stage];
		ring.advance();
	}
	product_wait<0>();
	if (before)
		release(before);
}

__device__ __forceinline__ void warpgroup_sync(unsigned warpgroup)
{
	asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

/* Where a warpgroup puts its part of a shared tile: a cluster has at most two, in its first and its last tile. */
template <class S>
__device__ __forceinline__ float4 *partial_at(
	const kvg_gate_args &args, unsigned cluster, unsigned warpgroup, unsigned tile)
{
	const unsigned last = first_chunk(args, cluster) / args.chunks != tile;
	const size_t slot = ((cluster * 2 + cluster_rank()) * 2 + warpgroup) * 2 + last;

	return reinterpret_cast<float4 *>(args.partials) + slot * (S::PARTS * S::N / 8 * 128) + threadIdx.x % 128;
}

/* What the warpgroup's first thread says; orders the others' reads of memory behind its own. */
__device__ __forceinline__ unsigned broadcast(unsigned *shared, unsigned value, unsigned warpgroup)
{
	if (threadIdx.x % 128 == 0)
		shared[warpgroup] = value;
	warpgroup_sync(warpgroup);
	value = shared[warpgroup];
	warpgroup_sync(warpgroup);
	return value;
}

/* How many parts of a tile have been handed in. */
__device__ __forceinline__ unsigned count_parts(const unsigned *counter)
{
	unsigned parts;

	asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(parts) : "l"(counter) : "memory");
	return parts;
}

/* Counts the warpgroup's own part, which its threads have written before they met. */
__device__ __forceinline__ unsigned add_to_parts(unsigned *counter)
{
	unsigned parts;

	asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(parts) : "l"(counter) : "memory");
	return parts + 1;
}

template <class S> __device__ __forceinline__ void add_part(float (&sums)[S::PARTS][S::N / 2], const float4 *at)
{
	float *flat = &sums[0][0];

#pragma unroll
	for (int i = 0; i < S::SUMS / 4; i++) {
		const float4 part = __ldcg(at + i * 128);

		flat[4 * i] += part.x;
		flat[4 * i + 1] += part.y;
		flat[4 * i + 2] += part.z;
		flat[4 * i + 3] += part.w;
	}
}

/* What a warpgroup knows of a tile that it shares. */
struct gate_share {
	unsigned tile, first, last; /* the clusters that have a part */
	unsigned *counter;          /* NULL: the tile is not shared */
	bool second;                /* of two parts, and the other was there before this one was begun */
};

__device__ __forceinline__ gate_share share_of(
	const kvg_gate_args &args, const gate_work &work, unsigned warpgroup, unsigned *shared)
{
	const unsigned chunk = work.tile * args.chunks;
	gate_share share = {work.tile, 0, 0, nullptr, false};

	if (work.to - work.from == args.chunks)
		return share;
	share.first = cluster_of(args, chunk);
	share.last = cluster_of(args, chunk + args.chunks - 1);
	share.counter = reinterpret_cast<unsigned *>(args.counters) + (work.tile * 2 + cluster_rank()) * 2 + warpgroup;
	if (share.last - share.first == 1) {
		const unsigned parts = threadIdx.x % 128 == 0 ? count_parts(share.counter) : 0;

		share.second = broadcast(shared, parts, warpgroup) == 1;
	}
	return share;
}

/* Adds the other part of a tile of which this warpgroup has the second one. */
template <class S>
__device__ __forceinline__ void add_first(
	const kvg_gate_args &args, const gate_share &share, float (&sums)[S::PARTS][S::N / 2], unsigned warpgroup)
{
	add_part<S>(sums, partial_at<S>(args, share.first + share.last - blockIdx.x / 2, warpgroup, share.tile));
	if (threadIdx.x % 128 == 0)
		*share.counter = 0;
}

/*
 * Hands in the warpgroup's part of a tile. False when parts are still missing; otherwise the sums are those of all
 * parts, added in the order of the clusters.
 */
template <class S>
__device__ __forceinline__ bool combine(const kvg_gate_args &args, const gate_share &share,
	float (&sums)[S::PARTS][S::N / 2], unsigned warpgroup, unsigned *shared)
{
	float *flat = &sums[0][0];
	float4 *at = partial_at<S>(args, blockIdx.x / 2, warpgroup, share.tile);

#pragma unroll
	for (int i = 0; i < S::SUMS / 4; i++)
		__stcg(at + i * 128, make_float4(flat[4 * i], flat[4 * i + 1], flat[4 * i + 2], flat[4 * i + 3]));
	warpgroup_sync(warpgroup);
	const unsigned parts = threadIdx.x % 128 == 0 ? add_to_parts(share.counter) : 0;

	if (broadcast(shared, parts, warpgroup) != share.last - share.first + 1)
		return false;
	if (threadIdx.x % 128 == 0)
		*share.counter = 0;
#pragma unroll
	for (int i = 0; i < S::SUMS; i++)
		flat[i] = 0;
	for (unsigned cluster = share.first; cluster <= share.last; cluster++)
		add_part<S>(sums, partial_at<S>(args, cluster, warpgroup, share.tile));
	return true;
}

/*
 * The sums of a tile; false when other warpgroups have parts of them still. The second of two parts adds the first to
 * its own, in which the order does not matter.
 */
template <class S>
__device__ __forceinline__ bool sum_tile(const kvg_gate_args &args, const gate_work &work, gate_ring<S> &ring,
	float (&sums)[S::PARTS][S::N / 2], unsigned warpgroup, unsigned *shared)
{
	if (!S::DEEP) {
		multiply<S>(sums, ring, warpgroup, args.chunks);
		return true;
	}
	const gate_share share = share_of(args, work, warpgroup, shared);

	multiply<S>(sums, ring, warpgroup, work.to - work.from);
	if (!share.counter)
		return true;
	if (!share.second)
		return combine<S>(args, share, sums, warpgroup, shared);
	add_first<S>(args, share, sums, warpgroup);
	return true;
}

template <class S, bool ONE_SINK>
__device__ __forceinline__ void score_heads(const kvg_gate_args &args, const gate_constants &constants,
	float (&sums)[S::PARTS][S::N / 2], const gate_place &place, unsigned row)
{
#pragma unroll
	for (int i = 0; i < S::PARTS * S::PART_HEADS; i++) {
		const unsigned head = place.head + i, known = min(head, args.heads - 1);
		float scores[2];

		gate_head<S::G, ONE_SINK>(&sums[i / S::PART_HEADS][i % S::PART_HEADS * S::HEAD_SUMS], constants, known,
			args.bases_stride, scores);
		if (head < args.heads)
			gate_store(args, place.layer, head, row, scores);
	}
}

template <class S>
__device__ __forceinline__ void score_tile(const kvg_gate_args &args, const gate_constants &constants,
	float (&sums)[S::PARTS][S::N / 2], const gate_place &place, unsigned warpgroup)
{
	const unsigned row = place.row + warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;

	if (constants.sinks == 1)
		score_heads<S, true>(args, constants, sums, place, row);
	else
		score_heads<S, false>(args, constants, sums, place, row);
}

template <class S>
__device__ __forceinline__ void score_all(
	const kvg_gate_args &args, gate_ring<S> ring, unsigned warpgroup, unsigned *shared)
{
	gate_schedule schedule(args);
	gate_work work;
	float sums[S::PARTS][S::N / 2];

	while (schedule.next(args, work)) {
		const gate_place place = place_of<S>(args, work.tile);
		const gate_constants constants = gate_constants_of(args, place.layer);

		if (sum_tile<S>(args, work, ring, sums, warpgroup, shared))
			score_tile<S>(args, constants, sums, place, warpgroup);
	}
}

template <class S>
__device__ __forceinline__ void gate(const kvg_gate_args &args, const CUtensorMap *rows, const CUtensorMap *weights)
{
	extern __shared__ unsigned char shared[];
	__shared__ __align__(8) uint64_t full[S::STAGES], empty[S::STAGES];
	__shared__ unsigned parts[2];
	gate_ring<S> ring = {shared + (1024 - shared_address(shared) % 1024) % 1024, full, empty};
	const unsigned warpgroup = threadIdx.x / 128;

	if (threadIdx.x == 0) {
		for (int i = 0; i < S::STAGES; i++) {
			barrier_init(&full[i], 1);
			barrier_init(&empty[i], 4); /* two warpgroups in each of two blocks */
		}
		barrier_publish();
	}
	if (threadIdx.x == PRODUCER) {
		prefetch_map(rows);
		prefetch_map(weights);
	}
	cluster_sync();
	if (warpgroup == 2) {
		registers_lower<24>();
		if (threadIdx.x == PRODUCER)
			bring_all<S>(args, rows, weights, ring);
	} else {
		registers_raise<240>();
		score_all<S>(args, ring, warpgroup, parts);
	}
	__syncwarp();
	cluster_sync(); /* the other block may still send here */
}

#define KERNEL(NAME, G, HEADS, PARTS, DEEP)                                                                            \
	extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)                                 \
		kvg_gate_##NAME##_##G(const __grid_constant__ kvg_gate_args args,                                      \
			const __grid_constant__ CUtensorMap rows, const __grid_constant__ CUtensorMap weights)         \
	{                                                                                                              \
		gate<gate_shape<G, HEADS, PARTS, DEEP>>(args, &rows, &weights);                                        \
	}

/* The heads and parts of each group are known to kernels/cuda/gate_model.c as well. */
KERNEL(wide, 1, 4, 2, false)
KERNEL(wide, 2, 4, 1, false)
KERNEL(wide, 4, 2, 2, false)
KERNEL(wide, 5, 2, 1, false)
KERNEL(wide, 7, 2, 1, false)
KERNEL(deep, 1, 4, 1, true)
KERNEL(deep, 2, 4, 1, true)
KERNEL(deep, 4, 2, 1, true)
KERNEL(deep, 5, 2, 1, true)
KERNEL(deep, 7, 2, 1, true)
