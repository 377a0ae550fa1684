/* What counts as the maximum stays, whatever the share. */
#include <math_constants.h>
#include <stdint.h>

extern "C" __global__ void kvg_keep_maxima(const float *scores, uint8_t *keep, uint32_t count)
{
	uint32_t stride = gridDim.x * blockDim.x;

	for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
		if (scores[i] == CUDART_INF_F)
			keep[i] = 1;
}
