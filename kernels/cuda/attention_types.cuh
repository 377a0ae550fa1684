/*
 * attention_types.cuh - the storage types of decode attention: their products on the tensor cores, and the instructions
 * that streaming needs.
 *
 * A type multiplies 64 bytes of K of 16 pairs by the queries, and 128 (or 64) bytes of V of 16 pairs by the weights;
 * which lane holds what is in attention_decode.cuh.
 */
#ifndef KVG_CUDA_ATTENTION_TYPES_CUH
#define KVG_CUDA_ATTENTION_TYPES_CUH

#include <stdint.h>

#define KVG_ALL_LANES 0xffffffffu

/* KV is read once: it is to leave the second-level cache before what is read again. */
static __device__ __forceinline__ uint64_t kvg_stream_policy()
{
	uint64_t policy;

	asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
	return policy;
}

static __device__ __forceinline__ uint4 kvg_load16(const uint8_t *at, uint64_t policy)
{
	uint4 x;

	asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
		     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
		     : "l"(at), "l"(policy));
	return x;
}

static __device__ __forceinline__ uint2 kvg_load8(const uint8_t *at, uint64_t policy)
{
	uint2 x;

	asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v2.u32 {%0, %1}, [%2], %3;"
		     : "=r"(x.x), "=r"(x.y)
		     : "l"(at), "l"(policy));
	return x;
}

static __device__ __forceinline__ float kvg_exp2(float x)
{
	float y;

	asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

/* 1 / sum, or 0 of 0: rows without pairs give zeros. */
static __device__ __forceinline__ float kvg_share_of(float sum)
{
	float y;

	asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(sum));
	return sum == 0 ? 0 : y;
}

static __device__ __forceinline__ uint32_t kvg_transpose(uint32_t x)
{
	uint32_t y;

	asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
	return y;
}

/* ---- 16-bit types ---- */

struct kvg_mma_bf16 {
	static __device__ __forceinline__ uint32_t pack(float low, float high)
	{
		uint32_t x;

		asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
		return x;
	}
	static __device__ __forceinline__ void multiply(
		float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
	{
		asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
		    "{%0, %1, %2, %3};"
			: "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
			: "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
	}
};

struct kvg_mma_f16 {
	static __device__ __forceinline__ uint32_t pack(float low, float high)
	{
		uint32_t x;

		asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
		return x;
	}
	static __device__ __forceinline__ void multiply(
		float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
	{
		asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
		    "{%0, %1, %2, %3};"
			: "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
			: "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
	}
};

template <class Mma> struct kvg_half {
	static constexpr int SIZE = 2;

	struct weights {
		uint32_t low, high; /* B fragments of pairs 0 .. 15 */
	};

	/* 64 bytes of K: c += K q, in two independent sums. k0: of pair r, k1: of pair r + 8, q: of query r. */
	static __device__ __forceinline__ void keys(float even[4], float odd[4], uint4 k0, uint4 k1, uint4 q)
	{
		Mma::multiply(even, k0.x, k1.x, k0.y, k1.y, q.x, q.y);
		Mma::multiply(odd, k0.z, k1.z, k0.w, k1.w, q.z, q.w);
	}
	/* p: of pairs r (0, 1) and r + 8 (2, 3), queries 2j and 2j + 1 */
	static __device__ __forceinline__ struct weights pack(const float p[4])
	{
		const struct weights packed = {
			kvg_transpose(Mma::pack(p[0], p[1])), kvg_transpose(Mma::pack(p[2], p[3]))};

		return packed;
	}
	static __device__ __forceinline__ void tile(
		float out[4], uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3, struct weights p)
	{
		Mma::multiply(out, __byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632),
			__byte_perm(x2, x3, 0x5410), __byte_perm(x2, x3, 0x7632), p.low, p.high);
	}
	/* 128 bytes of V, and 64. x: of pairs 2j, 2j + 1, 2j + 8, 2j + 9 */
	static __device__ __forceinline__ void values(float out[][4], const uint4 x[4], struct weights p)
	{
		tile(out[0], x[0].x, x[1].x, x[2].x, x[3].x, p);
		tile(out[1], x[0].y, x[1].y, x[2].y, x[3].y, p);
		tile(out[2], x[0].z, x[1].z, x[2].z, x[3].z, p);
		tile(out[3], x[0].w, x[1].w, x[2].w, x[3].w, p);
	}
	static __device__ __forceinline__ void values_half(float out[][4], const uint2 x[4], struct weights p)
	{
		tile(out[0], x[0].x, x[1].x, x[2].x, x[3].x, p);
		tile(out[1], x[0].y, x[1].y, x[2].y, x[3].y, p);
	}
	static __device__ __forceinline__ void store2(uint8_t *to, float a, float b)
	{
		*(uint32_t *)to = Mma::pack(a, b);
	}
	static __device__ __forceinline__ void store4(uint8_t *to, float4 x)
	{
		*(uint2 *)to = make_uint2(Mma::pack(x.x, x.y), Mma::pack(x.z, x.w));
	}
};

typedef kvg_half<struct kvg_mma_bf16> kvg_bf16;
typedef kvg_half<struct kvg_mma_f16> kvg_f16;

/* ---- fp32: each number as the sum of two of tf32, and three of the four products ---- */

struct kvg_f32 {
	static constexpr int SIZE = 4;

	struct weights {
		float p[4]; /* of query r, pairs 2j, 2j + 1, 2j + 8, 2j + 9 */
	};
	struct split {
		uint32_t high, low;
	};

	static __device__ __forceinline__ struct split cut(uint32_t x)
	{
		const uint32_t high = x & 0xffffe000u;
		const struct split parts = {high, __float_as_uint(__uint_as_float(x) - __uint_as_float(high))};

		return parts;
	}
	static __device__ __forceinline__ void multiply(
		float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
	{
		asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
		    "{%0, %1, %2, %3};"
			: "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
			: "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
	}
	/* Rows r and r + 8 of A: (x0, y0) and (x1, y1) in columns j and j + 4; B: (p, q) in its rows j and j + 4. */
	static __device__ __forceinline__ void product(
		float c[4], uint32_t x0, uint32_t x1, uint32_t y0, uint32_t y1, uint32_t p, uint32_t q)
	{
		const struct split a0 = cut(x0), a1 = cut(x1), a2 = cut(y0), a3 = cut(y1), b0 = cut(p), b1 = cut(q);

		multiply(c, a0.low, a1.low, a2.low, a3.low, b0.high, b1.high);
		multiply(c, a0.high, a1.high, a2.high, a3.high, b0.low, b1.low);
		multiply(c, a0.high, a1.high, a2.high, a3.high, b0.high, b1.high);
	}
	static __device__ __forceinline__ void keys(float even[4], float odd[4], uint4 k0, uint4 k1, uint4 q)
	{
		product(even, k0.x, k1.x, k0.y, k1.y, q.x, q.y);
		product(odd, k0.z, k1.z, k0.w, k1.w, q.z, q.w);
	}
	/* The weight of query r and a pair that lane (pair, r / 2) holds as a (r even) or b. */
	static __device__ __forceinline__ float fetch(float a, float b, uint32_t pair, uint32_t r)
	{
		const float even = __shfl_sync(KVG_ALL_LANES, a, 4 * pair + r / 2),
			    odd = __shfl_sync(KVG_ALL_LANES, b, 4 * pair + r / 2);

		return r % 2 ? odd : even;
	}
	static __device__ __forceinline__ struct weights pack(const float p[4])
	{
		const uint32_t r = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
		const struct weights packed = {{fetch(p[0], p[1], 2 * j, r), fetch(p[0], p[1], 2 * j + 1, r),
			fetch(p[2], p[3], 2 * j, r), fetch(p[2], p[3], 2 * j + 1, r)}};

		return packed;
	}
	static __device__ __forceinline__ void tile(
		float out[4], const uint32_t low[4], const uint32_t high[4], struct weights p)
	{
		product(out, low[0], high[0], low[1], high[1], __float_as_uint(p.p[0]), __float_as_uint(p.p[1]));
		product(out, low[2], high[2], low[3], high[3], __float_as_uint(p.p[2]), __float_as_uint(p.p[3]));
	}
	static __device__ __forceinline__ void values(float out[][4], const uint4 x[4], struct weights p)
	{
		const uint32_t a[4] = {x[0].x, x[1].x, x[2].x, x[3].x}, b[4] = {x[0].y, x[1].y, x[2].y, x[3].y},
			       c[4] = {x[0].z, x[1].z, x[2].z, x[3].z}, d[4] = {x[0].w, x[1].w, x[2].w, x[3].w};

		tile(out[0], a, b, p);
		tile(out[1], c, d, p);
	}
	/* Rows of fp32 are multiples of 128 bytes. */
	static __device__ __forceinline__ void values_half(float[][4], const uint2[4], struct weights)
	{
	}
	static __device__ __forceinline__ void store2(uint8_t *to, float a, float b)
	{
		*(float2 *)to = make_float2(a, b);
	}
	static __device__ __forceinline__ void store4(uint8_t *to, float4 x)
	{
		*(float4 *)to = x;
	}
};

#endif
