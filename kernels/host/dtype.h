/*
 * dtype.h - conversions between fp32 and the storage types of KV.
 * Round to nearest even; NaN stays NaN. Unknown dtypes are a caller's bug (assert).
 */
#ifndef KVG_KERNELS_DTYPE_H
#define KVG_KERNELS_DTYPE_H

#include <stddef.h>
#include <stdint.h>

/* The values of enum kvg_dtype in proto/kvgate_abi.h (kernels use nothing; a test pins that they agree). */
enum kvg_kernel_dtype { KVG_KERNEL_BF16 = 1, KVG_KERNEL_F16 = 2, KVG_KERNEL_F32 = 3 };

size_t kvg_dtype_size(uint32_t dtype); /* bytes of one element, 0 for an unknown dtype */
void kvg_dtype_store(uint32_t dtype, void *dst, const float *src, size_t count);
void kvg_dtype_load(uint32_t dtype, float *dst, const void *src, size_t count);

#endif
