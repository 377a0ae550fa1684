/*
 * gate_head.cuh - from the projections of one head to its scores, in the registers of the matrix units.
 *
 * A quad of four lanes holds 16 columns of two rows: of each block of 16 columns, lane j of the quad has
 * columns 2j, 2j+1, 2j+8 and 2j+9, of the rows r and r+8 (PTX ISA, accumulators of mma.m16n8 and wgmma).
 */
#ifndef KVG_CUDA_GATE_HEAD_CUH
#define KVG_CUDA_GATE_HEAD_CUH

#include "kernels/cuda/gate_args.h"

/* Constants of one layer, as a lane sees them. */
struct gate_constants {
	const float *qk, *bq, *b, *bases;
	float weight;
	int sinks;
};

__device__ __forceinline__ gate_constants gate_constants_of(const kvg_gate_args &args, unsigned layer)
{
	const float *at = reinterpret_cast<const float *>(args.constants) + (size_t)layer * args.constants_stride;

	return {at + KVG_GATE_AT_QK, at + KVG_GATE_AT_BQ, at + args.at_b, at + args.at_bases,
		__ldg(at + KVG_GATE_AT_WEIGHT), (int)__ldg(at + KVG_GATE_AT_SINKS)};
}

__device__ __forceinline__ float gate_quad_sum(float x)
{
	x += __shfl_xor_sync(0xffffffff, x, 1);
	return x + __shfl_xor_sync(0xffffffff, x, 2);
}

/* The lane's four columns of a vector of 16. */
__device__ __forceinline__ void gate_load(float (&value)[4], const float *vector)
{
	const float2 *at = reinterpret_cast<const float2 *>(vector) + (threadIdx.x & 3);
	const float2 low = __ldg(at), high = __ldg(at + 4);

	value[0] = low.x;
	value[1] = low.y;
	value[2] = high.x;
	value[3] = high.y;
}

/* One instruction each, right to 2 units in the last place; the arguments are normal numbers, 0, infinite or NaN. */
__device__ __forceinline__ float gate_inverse_rms(float squares)
{
	float result;

	asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(squares * (1.0f / KVG_GATE_WIDTH) + 1e-6f));
	return result;
}

__device__ __forceinline__ float gate_exp2(float x)
{
	float result;

	asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
	return result;
}

__device__ __forceinline__ float gate_inverse(float x)
{
	float result;

	asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
	return result;
}

/* The lane's value i (0 to 3) of row r (0 or 1) in block `block` of a head's accumulators. */
#define GATE_AT(block, r, i) (((block)*2 + ((i) >> 1)) * 4 + (r)*2 + ((i)&1))

/* Four sums over the quad at once: lane j gets that of value[j]. */
__device__ __forceinline__ float gate_quad_deal(const float (&value)[4])
{
	const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
	const float even_sum =
		(upper ? value[2] : value[0]) + __shfl_xor_sync(0xffffffff, upper ? value[0] : value[2], 2);
	const float odd_sum =
		(upper ? value[3] : value[1]) + __shfl_xor_sync(0xffffffff, upper ? value[1] : value[3], 2);

	return (odd ? odd_sum : even_sum) + __shfl_xor_sync(0xffffffff, odd ? even_sum : odd_sum, 1);
}

/*
 * The scores of the lane's two rows in one head, the same in all lanes of a quad. sums: the head's (G + 1) * 8
 * accumulators, the queries' blocks first; the queries get their bias there. Lane j of the quad finishes the queries j,
 * j + 4,
 * ... of the group ("sets" of four). ONE_SINK: without a loop, so that the compiler may interleave heads.
 */
template <int G, bool ONE_SINK>
__device__ __forceinline__ void gate_head(
	float *sums, const gate_constants &constants, unsigned head, unsigned bases_stride, float (&scores)[2])
{
	constexpr int SETS = (G + 3) / 4;
	const float *base = constants.bases + head * bases_stride;
	const int lane = (int)threadIdx.x & 3;
	float qk[4], sink[4], keys[2][4], inverse_key[2], inverse[2][SETS], z[2][SETS], total[2][SETS] = {};

	gate_load(qk, constants.qk);
	gate_load(sink, base);
#pragma unroll
	for (int r = 0; r < 2; r++) {
		float squares = 0;
#pragma unroll
		for (int i = 0; i < 4; i++) {
			const float k = sums[GATE_AT(G, r, i)];

			squares += k * k;
			keys[r][i] = k * qk[i];
		}
		inverse_key[r] = gate_inverse_rms(gate_quad_sum(squares));
	}
#pragma unroll
	for (int set = 0; set < SETS; set++) {
		const float b = set * 4 + lane < G ? __ldg(constants.b + head * G + set * 4 + lane) : 0;
		float squares[2][4] = {}, dots[2][4] = {};
#pragma unroll
		for (int j = 0; j < 4; j++) {
			const int g = set * 4 + j;
			float bias[4];

			if (g >= G)
				continue;
			gate_load(bias, constants.bq + (head * G + g) * KVG_GATE_WIDTH);
#pragma unroll
			for (int r = 0; r < 2; r++)
#pragma unroll
				for (int i = 0; i < 4; i++) {
					const float q = sums[GATE_AT(g, r, i)] + bias[i];

					sums[GATE_AT(g, r, i)] = q;
					squares[r][j] += q * q;
					dots[r][j] += q * keys[r][i];
				}
		}
#pragma unroll
		for (int r = 0; r < 2; r++) {
			inverse[r][set] = gate_inverse_rms(gate_quad_deal(squares[r]));
			z[r][set] = gate_quad_deal(dots[r]) * inverse[r][set] * inverse_key[r] + b;
		}
	}
#pragma unroll 1
	for (int s = 0; s < (ONE_SINK ? 1 : constants.sinks); s++) {
		if (s > 0)
			gate_load(sink, base + s * KVG_GATE_WIDTH);
#pragma unroll
		for (int set = 0; set < SETS; set++)
#pragma unroll
			for (int r = 0; r < 2; r++) {
				float dots[4] = {};
#pragma unroll
				for (int i = 0; i < 16; i++)
					if (set * 4 + i / 4 < G)
						dots[i / 4] += sums[GATE_AT(set * 4 + i / 4, r, i % 4)] * sink[i % 4];
				total[r][set] += gate_exp2(gate_quad_deal(dots) * inverse[r][set] - z[r][set]);
			}
	}
#pragma unroll
	for (int r = 0; r < 2; r++) {
		float mean = 0;
#pragma unroll
		for (int set = 0; set < SETS; set++)
			mean += set * 4 + lane < G ? gate_inverse(1.0f + constants.weight * total[r][set]) : 0;
		mean = gate_quad_sum(mean) * (1.0f / G);
		scores[r] = mean == mean ? mean : 0.0f;
	}
}

/* Writes the scores of one head for the rows `row` and `row + 8`, from one lane of each quad. */
__device__ __forceinline__ void gate_store(
	const kvg_gate_args &args, unsigned layer, unsigned head, unsigned row, const float (&scores)[2])
{
	float *at = reinterpret_cast<float *>(args.scores) + ((size_t)layer * args.heads + head) * args.score_stride;

	if ((threadIdx.x & 3) != 0)
		return;
	if (row < args.rows)
		at[row] = scores[0];
	if (row + 8 < args.rows)
		at[row + 8] = scores[1];
}

#endif
