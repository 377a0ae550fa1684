/*
 * vector.h - one register of floats, as wide as the instruction set that this
 * translation unit is compiled for, and the few operations that C's vector
 * types lack. Included by simd_isa.c only.
 */
#ifndef KVG_KERNELS_VECTOR_H
#define KVG_KERNELS_VECTOR_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));

static inline vfloat v_load(const float *p)
{
	vfloat v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static inline void v_store(float *p, vfloat v)
{
	memcpy(p, &v, sizeof(v));
}

static inline vfloat v_set(float x)
{
	return x - (vfloat){0};
}

/* Lanes of a where the mask (all ones or all zeros in each lane) is set, of b elsewhere. */
static inline vuint v_pick(vint mask, vuint a, vuint b)
{
	return ((vuint)mask & a) | (~(vuint)mask & b);
}

/* All ones in the lanes that are not NaN. */
static inline vint v_is_number(vfloat v)
{
	return (vint)((vuint)v & 0x7fffffff) <= 0x7f800000;
}

/* v_max and v_min return b where either is NaN. */
#if LANES == 16
static inline vfloat v_max(vfloat a, vfloat b)
{
	return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
}

static inline vfloat v_min(vfloat a, vfloat b)
{
	return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
}

static inline vfloat v_sqrt(vfloat a)
{
	return (vfloat)_mm512_sqrt_ps((__m512)a);
}

static inline __m128 v_fold_add(vfloat v)
{
	__m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));

	return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

static inline __m128 v_fold_max(vfloat v)
{
	__m256 half = _mm256_max_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));

	return _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#elif LANES == 8
static inline vfloat v_max(vfloat a, vfloat b)
{
	return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
}

static inline vfloat v_min(vfloat a, vfloat b)
{
	return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
}

static inline vfloat v_sqrt(vfloat a)
{
	return (vfloat)_mm256_sqrt_ps((__m256)a);
}

static inline __m128 v_fold_add(vfloat v)
{
	return _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
}

static inline __m128 v_fold_max(vfloat v)
{
	return _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
}
#else
static inline vfloat v_max(vfloat a, vfloat b)
{
	return (vfloat)_mm_max_ps((__m128)a, (__m128)b);
}

static inline vfloat v_min(vfloat a, vfloat b)
{
	return (vfloat)_mm_min_ps((__m128)a, (__m128)b);
}

static inline vfloat v_sqrt(vfloat a)
{
	return (vfloat)_mm_sqrt_ps((__m128)a);
}

static inline __m128 v_fold_add(vfloat v)
{
	return (__m128)v;
}

static inline __m128 v_fold_max(vfloat v)
{
	return (__m128)v;
}
#endif

static inline float v_reduce_add(vfloat v)
{
	__m128 x = v_fold_add(v);

	x = _mm_add_ps(x, _mm_movehl_ps(x, x));
	return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

static inline float v_reduce_max(vfloat v)
{
	__m128 x = v_fold_max(v);

	x = _mm_max_ps(x, _mm_movehl_ps(x, x));
	return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

/* Sums of four registers, one in each lane of the result. */
static inline __m128 v_reduce_add4(vfloat a, vfloat b, vfloat c, vfloat d)
{
	__m128 x = v_fold_add(a), y = v_fold_add(b), z = v_fold_add(c), w = v_fold_add(d);

	_MM_TRANSPOSE4_PS(x, y, z, w);
	return _mm_add_ps(_mm_add_ps(x, y), _mm_add_ps(z, w));
}

/*
 * exp(x) = 2^n * e^r, |r| <= ln(2) / 2, e^r by its Taylor polynomial of degree 7 (error 2^-28). n * LN2_HIGH is exact.
 * 2^n is applied in two factors, so that results down to the smallest denormal come out right.
 */
static inline vfloat v_exp(vfloat x)
{
	const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves the integer in the low bits */
	const float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;

	x = v_max(v_set(-110.0f), v_min(v_set(90.0f), x));
	vfloat shifted = x * 1.44269504f + round;
	vfloat n = shifted - round;
	vfloat r = (x - n * ln2_high) - n * ln2_low;
	vfloat p = r * (1.0f / 5040) + (1.0f / 720);
	vint exponent = (vint)shifted - 0x4b400000;
	vint half = exponent >> 1;

	p = p * r + (1.0f / 120);
	p = p * r + (1.0f / 24);
	p = p * r + (1.0f / 6);
	p = p * r + 0.5f;
	p = p * (r * r) + r + 1.0f;
	return p * (vfloat)(((vuint)half + 127) << 23) * (vfloat)(((vuint)(exponent - half) + 127) << 23);
}

#endif
