#include "kernels/host/simd.h"

extern const struct kvg_simd kvg_simd_baseline, kvg_simd_avx2, kvg_simd_avx512;

static int has_avx2(void)
{
	return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void)
{
	return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const struct kvg_simd *kvg_simd(void)
{
	if (has_avx512())
		return &kvg_simd_avx512;
	return has_avx2() ? &kvg_simd_avx2 : &kvg_simd_baseline;
}

const struct kvg_simd *kvg_simd_at(unsigned i)
{
	if (i == 0)
		return &kvg_simd_baseline;
	if (i == 1 && has_avx2())
		return &kvg_simd_avx2;
	return i == 2 && has_avx512() ? &kvg_simd_avx512 : NULL;
}
