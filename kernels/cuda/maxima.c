#include "kernels/cuda/maxima.h"

#include <stdlib.h>

#define THREADS 256u
#define EACH    16u /* scores of one thread, about */

extern const unsigned char kvg_image_maxima[];

struct kvg_cuda_maxima {
	const struct kvg_cuda *cuda;
	CUmodule module;
	CUfunction keep;
};

struct kvg_cuda_maxima *kvg_cuda_maxima_new(const struct kvg_cuda *cuda, CUresult *ret_result)
{
	static const char *const names[] = {"kvg_keep_maxima"};
	struct kvg_cuda_maxima *maxima = calloc(1, sizeof(*maxima));

	*ret_result = CUDA_ERROR_OUT_OF_MEMORY;
	if (!maxima)
		return NULL;
	maxima->cuda = cuda;
	*ret_result = kvg_cuda_module_load(cuda, kvg_image_maxima, names, 1, &maxima->module, &maxima->keep);
	if (*ret_result == CUDA_SUCCESS)
		return maxima;
	free(maxima);
	return NULL;
}

struct kvg_cuda_maxima *kvg_cuda_maxima_free(struct kvg_cuda_maxima *maxima)
{
	if (!maxima)
		return NULL;
	(void)maxima->cuda->driver->cuModuleUnload(maxima->module);
	free(maxima);
	return NULL;
}

CUresult kvg_cuda_maxima_keep(
	const struct kvg_cuda_maxima *maxima, const float *scores, uint8_t *keep, uint32_t count, CUstream stream)
{
	void *arguments[] = {&scores, &keep, &count};
	unsigned grid = (unsigned)((count + (uint64_t)THREADS * EACH - 1) / (THREADS * EACH));

	if (!count)
		return CUDA_SUCCESS;
	return kvg_cuda_launch(maxima->cuda, maxima->keep, grid, THREADS, 0, stream, arguments);
}
