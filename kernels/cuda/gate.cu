/*
 * gate.cu - the gate on any device from compute capability 8.0 on: hidden states through mma.sync with rows brought
 * by cp.async, and projections that an engine computed.
 */
#include <cuda_bf16.h>

#include "kernels/cuda/gate_head.cuh"

/* ---- hidden states ---- */

constexpr int TILE_ROWS = 64, TILE_K = 32, STAGES = 3;
constexpr int PITCH = TILE_K + 8; /* elements between rows in shared memory: 8 rows of 16 bytes meet all banks once */
constexpr int THREADS = 128;

__device__ __forceinline__ unsigned shared_address(const void *at)
{
	return (unsigned)__cvta_generic_to_shared(at);
}

/* 16 bytes, or zeros. */
__device__ __forceinline__ void copy_async(void *to, const void *from, bool there)
{
	asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
		     "r"(there ? 16 : 0)
		     : "memory");
}

__device__ __forceinline__ void load_matrices(unsigned (&value)[4], const __nv_bfloat16 *at)
{
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
		     : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
		     : "r"(shared_address(at))
		     : "memory");
}

__device__ __forceinline__ void multiply(float *sums, const unsigned (&a)[4], unsigned b0, unsigned b1)
{
	asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
		     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
		     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
		     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Brings `count` lines of TILE_K values, `pitch` apart in memory; where `there` says no, they are 0. */
template <class There>
__device__ __forceinline__ void bring(
	__nv_bfloat16 *to, const __nv_bfloat16 *from, int count, unsigned pitch, There there)
{
	for (int i = (int)threadIdx.x; i < count * (TILE_K / 8); i += THREADS) {
		const int line = i / (TILE_K / 8), column = i % (TILE_K / 8) * 8;
		const bool is_there = there(line, column);

		copy_async(
			to + line * PITCH + column, is_there ? from + (size_t)line * pitch + column : from, is_there);
	}
}

/* The accumulators of 16 rows (of the warp) times all columns of a head, over TILE_K. */
template <int COLUMNS>
__device__ __forceinline__ void multiply_tile(float *sums, const __nv_bfloat16 *rows, const __nv_bfloat16 *weights)
{
	const int lane = (int)threadIdx.x & 31, matrix = lane >> 3, line = lane & 7;

	rows += ((int)threadIdx.x / 32 * 16 + (matrix & 1) * 8 + line) * PITCH + (matrix >> 1) * 8;
	weights += ((matrix >> 1) * 8 + line) * PITCH + (matrix & 1) * 8;
#pragma unroll
	for (int k = 0; k < TILE_K; k += 16) {
		unsigned a[4];

		load_matrices(a, rows + k);
#pragma unroll
		for (int n = 0; n < COLUMNS; n += 16) {
			unsigned b[4];

			load_matrices(b, weights + n * PITCH + k);
			multiply(sums + n / 8 * 4, a, b[0], b[1]);
			multiply(sums + n / 8 * 4 + 4, a, b[2], b[3]);
		}
	}
}

/* One block: 64 rows of one head in one layer; heads innermost in the grid. */
template <int G> __device__ __forceinline__ void score_hidden(const kvg_gate_args &args)
{
	constexpr int COLUMNS = (G + 1) * KVG_GATE_WIDTH, STAGE = (TILE_ROWS + COLUMNS) * PITCH;
	extern __shared__ __align__(16) unsigned char shared[];
	__nv_bfloat16 *stages = reinterpret_cast<__nv_bfloat16 *>(shared);
	const unsigned head = blockIdx.x % args.heads, tile = blockIdx.x / args.heads;
	const unsigned row = tile % args.row_tiles * TILE_ROWS, layer = tile / args.row_tiles;
	const int valid = (int)min((unsigned)TILE_ROWS, args.rows - row);
	const __nv_bfloat16 *rows = reinterpret_cast<const __nv_bfloat16 *>(args.input + layer * args.layer_stride) +
				    (size_t)row * args.hidden;
	const size_t chunk_values = (size_t)args.heads * COLUMNS * KVG_GATE_CHUNK;
	const __nv_bfloat16 *weights = reinterpret_cast<const __nv_bfloat16 *>(args.weights) +
				       layer * args.chunks * chunk_values + head * COLUMNS * KVG_GATE_CHUNK;
	const unsigned steps = (args.hidden + TILE_K - 1) / TILE_K;
	float sums[COLUMNS / 8 * 4] = {};

	for (unsigned step = 0; step < steps + STAGES - 1; step++) {
		if (step < steps) {
			__nv_bfloat16 *stage = stages + step % STAGES * STAGE;

			const unsigned k = step * TILE_K;

			bring(stage, rows + k, TILE_ROWS, args.hidden,
				[&](int row, int column) { return row < valid && k + column < args.hidden; });
			bring(stage + TILE_ROWS * PITCH,
				weights + k / KVG_GATE_CHUNK * chunk_values + k % KVG_GATE_CHUNK, COLUMNS,
				KVG_GATE_CHUNK, [](int, int) { return true; });
		}
		asm volatile("cp.async.commit_group;" ::: "memory");
		if (step < STAGES - 1)
			continue;
		asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
		__syncthreads();
		const __nv_bfloat16 *stage = stages + (step - (STAGES - 1)) % STAGES * STAGE;

		multiply_tile<COLUMNS>(sums, stage, stage + TILE_ROWS * PITCH);
		__syncthreads();
	}
	float scores[2];

	const gate_constants constants = gate_constants_of(args, layer);

	if (constants.sinks == 1)
		gate_head<G, true>(sums, constants, head, args.bases_stride, scores);
	else
		gate_head<G, false>(sums, constants, head, args.bases_stride, scores);
	gate_store(args, layer, head, row + threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4, scores);
}

/* ---- projections ---- */

/* Half of each block of one row of one head, as they come: the queries', then the key's. */
template <int G> struct gate_halves {
	uint4 block[G + 1];
};

__device__ __forceinline__ void unpack(float (&value)[8], const uint4 &bits)
{
	const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};

#pragma unroll
	for (int i = 0; i < 4; i++) {
		value[2 * i] = __uint_as_float(words[i] << 16);
		value[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
	}
}

__device__ __forceinline__ void load_half(float (&value)[8], const float *at)
{
	const float4 low = __ldg(reinterpret_cast<const float4 *>(at));
	const float4 high = __ldg(reinterpret_cast<const float4 *>(at) + 1);

	value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
	value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
}

__device__ __forceinline__ float dot_half(const float (&a)[8], const float (&b)[8])
{
	float sum = 0;

#pragma unroll
	for (int i = 0; i < 8; i++)
		sum += a[i] * b[i];
	return sum;
}

__device__ __forceinline__ float pair_sum(float x)
{
	return x + __shfl_xor_sync(0xffffffff, x, 1);
}

/* queries, keys: of the row and the head, at the lane's half. */
template <int G> __device__ __forceinline__ gate_halves<G> bring_halves(const uint4 *queries, const uint4 *keys)
{
	gate_halves<G> halves;

#pragma unroll
	for (int g = 0; g < G; g++)
		halves.block[g] = __ldcs(queries + g * (KVG_GATE_WIDTH / 8));
	halves.block[G] = __ldcs(keys);
	return halves;
}

/* Two sums over the pair at once: lane j gets that of a (0) or b (1). */
__device__ __forceinline__ float pair_deal(float a, float b)
{
	const bool odd = threadIdx.x & 1;

	return (odd ? b : a) + __shfl_xor_sync(0xffffffff, odd ? a : b, 1);
}

/* The score of the pair's row. Each lane of the pair finishes every other query of the group. */
template <int G>
__device__ __forceinline__ float score_halves(
	const gate_halves<G> &halves, const gate_constants &constants, unsigned head, unsigned bases_stride)
{
	constexpr int PAIRS = (G + 1) / 2;
	const int odd = (int)threadIdx.x & 1, half = odd * 8;
	const float *base = constants.bases + head * bases_stride + half;
	float k[8], q[PAIRS * 2][8], vector[8], inverse[PAIRS], z[PAIRS], total[PAIRS] = {}, mean = 0;

	unpack(k, halves.block[G]);
	load_half(vector, constants.qk + half);
	const float inverse_key = gate_inverse_rms(pair_sum(dot_half(k, k)));
#pragma unroll
	for (int i = 0; i < 8; i++)
		k[i] *= vector[i] * inverse_key;
#pragma unroll
	for (int g = 0; g < PAIRS * 2; g++) {
		if (g < G) {
			unpack(q[g], halves.block[g]);
			load_half(vector, constants.bq + (head * G + g) * KVG_GATE_WIDTH + half);
		}
#pragma unroll
		for (int i = 0; i < 8; i++)
			q[g][i] = g < G ? q[g][i] + vector[i] : 0;
	}
#pragma unroll
	for (int p = 0; p < PAIRS; p++) {
		const float b = p * 2 + odd < G ? __ldg(constants.b + head * G + p * 2 + odd) : 0;
		const float(&even_q)[8] = q[p * 2], (&odd_q)[8] = q[p * 2 + 1];

		inverse[p] = gate_inverse_rms(pair_deal(dot_half(even_q, even_q), dot_half(odd_q, odd_q)));
		z[p] = pair_deal(dot_half(even_q, k), dot_half(odd_q, k)) * inverse[p] + b;
	}
#pragma unroll 1
	for (int s = 0; s < constants.sinks; s++, base += KVG_GATE_WIDTH) {
		load_half(vector, base);
#pragma unroll
		for (int p = 0; p < PAIRS; p++)
			total[p] += gate_exp2(
				pair_deal(dot_half(q[p * 2], vector), dot_half(q[p * 2 + 1], vector)) * inverse[p] -
				z[p]);
	}
#pragma unroll
	for (int p = 0; p < PAIRS; p++)
		mean += p * 2 + odd < G ? gate_inverse(1.0f + constants.weight * total[p]) : 0;
	mean = pair_sum(mean) * (1.0f / G);
	return mean == mean ? mean : 0.0f;
}

/*
 * A pair of lanes has one row of one head, a warp a run of tiles of 16 rows of a head, of which it brings the next one
 * while it computes. Warps run over the heads first, so that neighbours read what lies beside it.
 */
template <int G> __device__ __forceinline__ void score_preact(const kvg_gate_args &args)
{
	const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, head = warp % args.heads,
		       run = warp / args.heads;
	const unsigned runs = (args.row_tiles + args.warp_tiles - 1) / args.warp_tiles, layer = run / runs;
	const unsigned begin = run % runs * args.warp_tiles * 16, end = min(begin + args.warp_tiles * 16, args.rows);
	const unsigned queries = args.heads * G * (KVG_GATE_WIDTH / 8),
		       pitch = queries + args.heads * (KVG_GATE_WIDTH / 8);
	const unsigned lane = threadIdx.x & 31, last = args.rows - 1;

	if (run >= args.tiles)
		return;
	const gate_constants constants = gate_constants_of(args, layer);
	const uint4 *at = reinterpret_cast<const uint4 *>(args.input + layer * args.layer_stride) + (lane & 1);
	const uint4 *queries_at = at + head * G * (KVG_GATE_WIDTH / 8);
	const uint4 *keys_at = at + queries + head * (KVG_GATE_WIDTH / 8);
	float *scores =
		reinterpret_cast<float *>(args.scores) + ((size_t)layer * args.heads + head) * args.score_stride;
	size_t from = (size_t)min(begin + lane / 2, last) * pitch;
	gate_halves<G> next = bring_halves<G>(queries_at + from, keys_at + from);

	for (unsigned row = begin + lane / 2; row < end + lane / 2; row += 16) {
		const gate_halves<G> halves = next;

		if (row + 16 < end + lane / 2) {
			from = (size_t)min(row + 16, last) * pitch;
			next = bring_halves<G>(queries_at + from, keys_at + from);
		}
		const float score = score_halves<G>(halves, constants, head, args.bases_stride);

		if ((lane & 1) == 0 && row < args.rows)
			scores[row] = score;
	}
}

#define GROUP(G)                                                                                                       \
	extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
		kvg_gate_hidden_##G(const __grid_constant__ kvg_gate_args args)                                        \
	{                                                                                                              \
		score_hidden<G>(args);                                                                                 \
	}                                                                                                              \
	extern "C" __global__ void __launch_bounds__(256)                                                              \
		kvg_gate_preact_##G(const __grid_constant__ kvg_gate_args args)                                        \
	{                                                                                                              \
		score_preact<G>(args);                                                                                 \
	}

GROUP(1)
GROUP(2)
GROUP(3)
GROUP(4)
GROUP(5)
GROUP(6)
GROUP(7)
GROUP(8)
GROUP(16)
