/* maxima.h - scores of +INF (the protected and the newest pairs) are kept even where the whole share is made of them.
 */
#ifndef KVG_CUDA_MAXIMA_H
#define KVG_CUDA_MAXIMA_H

#include "kernels/cuda/device.h"

struct kvg_cuda_maxima;

/* Loads the kernel; cuda is borrowed. NULL with *ret_result set on failure. */
struct kvg_cuda_maxima *kvg_cuda_maxima_new(const struct kvg_cuda *cuda, CUresult *ret_result);
struct kvg_cuda_maxima *kvg_cuda_maxima_free(struct kvg_cuda_maxima *maxima); /* returns NULL */

/* keep[i] = 1 where scores[i] is +INF, for i < count; device pointers. */
CUresult kvg_cuda_maxima_keep(
	const struct kvg_cuda_maxima *maxima, const float *scores, uint8_t *keep, uint32_t count, CUstream stream);

#endif
