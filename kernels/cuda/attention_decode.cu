/* Decode attention, for each dtype and head dimension. See attention_decode.cuh and attention.h. */
#include "kernels/cuda/attention_decode.cuh"

#define KERNEL(type, dtype, dim, units, warps)                                                                         \
	extern "C" __global__ void __launch_bounds__((warps)*32, 1)                                                    \
		kvg_attend_##type##_##dim(const __grid_constant__ struct kvg_attention_attend args)                    \
	{                                                                                                              \
		kvg_attend<kvg_warp_state<kvg_##type, dim, units>>(args);                                              \
	}
KVG_ATTENTION_KERNELS(KERNEL)
