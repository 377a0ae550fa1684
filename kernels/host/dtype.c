#include "kernels/host/dtype.h"

#include "kernels/host/simd.h"

#include <assert.h>
#include <string.h>

size_t kvg_dtype_size(uint32_t dtype)
{
	switch (dtype) {
	case KVG_KERNEL_BF16:
	case KVG_KERNEL_F16:
		return 2;
	case KVG_KERNEL_F32:
		return 4;
	default:
		return 0;
	}
}

void kvg_dtype_store(uint32_t dtype, void *dst, const float *src, size_t count)
{
	switch (dtype) {
	case KVG_KERNEL_BF16:
		kvg_simd()->bf16_store(dst, src, count);
		return;
	case KVG_KERNEL_F16:
		kvg_simd()->f16_store(dst, src, count);
		return;
	default:
		assert(dtype == KVG_KERNEL_F32);
		if (count)
			memcpy(dst, src, count * sizeof(*src));
	}
}

void kvg_dtype_load(uint32_t dtype, float *dst, const void *src, size_t count)
{
	switch (dtype) {
	case KVG_KERNEL_BF16:
		kvg_simd()->bf16_load(dst, src, count);
		return;
	case KVG_KERNEL_F16:
		kvg_simd()->f16_load(dst, src, count);
		return;
	default:
		assert(dtype == KVG_KERNEL_F32);
		if (count)
			memcpy(dst, src, count * sizeof(*dst));
	}
}
