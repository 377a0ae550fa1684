#include "kernels/cuda/copy.h"

#include <stdlib.h>

#include "kernels/cuda/evict_args.h"
#include "kernels/cuda/evict_area.h"

#define STAGING_SIZE ((size_t)8 << 20)

enum { GATHER, SCATTER, KERNELS };

static const char *const names[KERNELS] = {[GATHER] = "kvg_copy_gather", [SCATTER] = "kvg_copy_scatter"};

extern const unsigned char kvg_image_copy[];

struct kvg_cuda_copy {
	const struct kvg_cuda *cuda;
	CUmodule module;
	CUfunction kernels[KERNELS];
};

/* One staging: `done` says that the copy engine has passed, `used` that the kernel has. */
struct staging {
	CUdeviceptr at;
	CUevent done, used;
};

struct kvg_cuda_copy_pipe {
	const struct kvg_cuda_copy *copy;
	CUstream engine; /* of the copies between staging and host */
	CUevent begin;
	struct staging stagings[2];
	size_t staging_size;
};

struct kvg_cuda_copy *kvg_cuda_copy_new(const struct kvg_cuda *cuda, CUresult *ret_result)
{
	struct kvg_cuda_copy *copy = calloc(1, sizeof(*copy));

	*ret_result = CUDA_ERROR_OUT_OF_MEMORY;
	if (!copy)
		return NULL;
	copy->cuda = cuda;
	*ret_result = kvg_cuda_module_load(cuda, kvg_image_copy, names, KERNELS, &copy->module, copy->kernels);
	if (*ret_result == CUDA_SUCCESS)
		return copy;
	free(copy);
	return NULL;
}

struct kvg_cuda_copy *kvg_cuda_copy_free(struct kvg_cuda_copy *copy)
{
	if (!copy)
		return NULL;
	(void)copy->cuda->driver->cuModuleUnload(copy->module);
	free(copy);
	return NULL;
}

static CUresult launch(const struct kvg_cuda_copy *copy, int kernel, const struct kvg_cuda_area *area,
	const uint32_t *ids, uint32_t count, uint8_t *packed, uint32_t grid, CUstream stream)
{
	uint32_t blocks = count / KVG_EVICT_WARPS + (count % KVG_EVICT_WARPS != 0);
	struct kvg_copy_args args = {.at = kvg_evict_area_of(area), .ids = ids, .count = count, .packed = packed};
	void *arguments[] = {&args};

	if (count == 0)
		return CUDA_SUCCESS;
	if (grid && blocks > grid)
		blocks = grid;
	return kvg_cuda_launch(copy->cuda, copy->kernels[kernel], blocks, KVG_EVICT_THREADS, 0, stream, arguments);
}

CUresult kvg_cuda_copy_gather(const struct kvg_cuda_copy *copy, const struct kvg_cuda_area *area, const uint32_t *ids,
	uint32_t count, uint8_t *packed, uint32_t grid, CUstream stream)
{
	return launch(copy, GATHER, area, ids, count, packed, grid, stream);
}

CUresult kvg_cuda_copy_scatter(const struct kvg_cuda_copy *copy, const struct kvg_cuda_area *area, const uint32_t *ids,
	uint32_t count, const uint8_t *packed, uint32_t grid, CUstream stream)
{
	return launch(copy, SCATTER, area, ids, count, (uint8_t *)(uintptr_t)packed, grid, stream);
}

CUresult kvg_cuda_copy_scrub(const struct kvg_cuda_copy *copy, CUdeviceptr at, size_t size, CUstream stream)
{
	return size ? copy->cuda->driver->cuMemsetD8Async(at, 0, size, stream) : CUDA_SUCCESS;
}

/* ---- pipe ---- */

static CUresult pipe_init(struct kvg_cuda_copy_pipe *pipe)
{
	const struct kvg_cuda_driver *driver = pipe->copy->cuda->driver;
	CUresult result = driver->cuStreamCreate(&pipe->engine, CU_STREAM_NON_BLOCKING);

	if (result == CUDA_SUCCESS)
		result = driver->cuEventCreate(&pipe->begin, CU_EVENT_DISABLE_TIMING);
	for (int i = 0; i < 2; i++) {
		struct staging *staging = &pipe->stagings[i];

		if (result == CUDA_SUCCESS)
			result = driver->cuMemAlloc(&staging->at, pipe->staging_size);
		if (result == CUDA_SUCCESS)
			result = driver->cuEventCreate(&staging->done, CU_EVENT_DISABLE_TIMING);
		if (result == CUDA_SUCCESS)
			result = driver->cuEventCreate(&staging->used, CU_EVENT_DISABLE_TIMING);
	}
	return result;
}

struct kvg_cuda_copy_pipe *kvg_cuda_copy_pipe_new(
	const struct kvg_cuda_copy *copy, size_t staging_size, CUresult *ret_result)
{
	struct kvg_cuda_copy_pipe *pipe = calloc(1, sizeof(*pipe));

	*ret_result = CUDA_ERROR_OUT_OF_MEMORY;
	if (!pipe)
		return NULL;
	pipe->copy = copy;
	pipe->staging_size = staging_size ? staging_size : STAGING_SIZE;
	*ret_result = pipe_init(pipe);
	return *ret_result == CUDA_SUCCESS ? pipe : kvg_cuda_copy_pipe_free(pipe);
}

struct kvg_cuda_copy_pipe *kvg_cuda_copy_pipe_free(struct kvg_cuda_copy_pipe *pipe)
{
	const struct kvg_cuda_driver *driver;

	if (!pipe)
		return NULL;
	driver = pipe->copy->cuda->driver;
	for (int i = 0; i < 2; i++) {
		if (pipe->stagings[i].at)
			(void)driver->cuMemFree(pipe->stagings[i].at);
		if (pipe->stagings[i].done)
			(void)driver->cuEventDestroy(pipe->stagings[i].done);
		if (pipe->stagings[i].used)
			(void)driver->cuEventDestroy(pipe->stagings[i].used);
	}
	if (pipe->begin)
		(void)driver->cuEventDestroy(pipe->begin);
	if (pipe->engine)
		(void)driver->cuStreamDestroy(pipe->engine);
	free(pipe);
	return NULL;
}

/* What is enqueued on `before` so far comes before what is enqueued on `after` from now on. */
static CUresult order(const struct kvg_cuda_copy_pipe *pipe, CUevent event, CUstream before, CUstream after)
{
	const struct kvg_cuda_driver *driver = pipe->copy->cuda->driver;
	CUresult result = driver->cuEventRecord(event, before);

	return result == CUDA_SUCCESS ? driver->cuStreamWaitEvent(after, event, 0) : result;
}

/* Part `turn` of a transfer: blocks ids[0 .. count), `bytes` in packed form at host. */
struct part {
	const struct kvg_cuda_area *area;
	const uint32_t *ids;
	uint32_t count, turn;
	size_t bytes;
};

static CUresult part_to_host(struct kvg_cuda_copy_pipe *pipe, const struct part *part, void *host, CUstream stream)
{
	const struct kvg_cuda_driver *driver = pipe->copy->cuda->driver;
	struct staging *staging = &pipe->stagings[part->turn % 2];
	CUresult result = CUDA_SUCCESS;

	if (part->turn >= 2)
		result = driver->cuStreamWaitEvent(stream, staging->done, 0);
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_copy_gather(
			pipe->copy, part->area, part->ids, part->count, (uint8_t *)staging->at, 0, stream);
	if (result == CUDA_SUCCESS)
		result = order(pipe, staging->used, stream, pipe->engine);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemcpyDtoHAsync(host, staging->at, part->bytes, pipe->engine);
	return result == CUDA_SUCCESS ? driver->cuEventRecord(staging->done, pipe->engine) : result;
}

static CUresult part_from_host(
	struct kvg_cuda_copy_pipe *pipe, const struct part *part, const void *host, CUstream stream)
{
	const struct kvg_cuda_driver *driver = pipe->copy->cuda->driver;
	struct staging *staging = &pipe->stagings[part->turn % 2];
	CUresult result = CUDA_SUCCESS;

	if (part->turn >= 2)
		result = driver->cuStreamWaitEvent(pipe->engine, staging->used, 0);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemcpyHtoDAsync(staging->at, host, part->bytes, pipe->engine);
	if (result == CUDA_SUCCESS)
		result = order(pipe, staging->done, pipe->engine, stream);
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_copy_scatter(
			pipe->copy, part->area, part->ids, part->count, (const uint8_t *)staging->at, 0, stream);
	return result == CUDA_SUCCESS ? driver->cuEventRecord(staging->used, stream) : result;
}

/* Part `turn` of the transfer; false when there is none. */
static bool part_at(const struct kvg_cuda_copy_pipe *pipe, const struct kvg_cuda_area *area, const uint32_t *ids,
	uint32_t count, uint32_t turn, struct part *ret)
{
	size_t block = (size_t)KVG_CUDA_PLACES * (area->k_bytes + area->v_bytes);
	size_t each = pipe->staging_size / block, first = turn * each;

	if (each == 0 || first >= count)
		return false;
	*ret = (struct part){.area = area,
		.ids = ids + first,
		.count = (uint32_t)(count - first < each ? count - first : each),
		.turn = turn};
	ret->bytes = ret->count * block;
	return true;
}

static CUresult check_pipe(const struct kvg_cuda_copy_pipe *pipe, const struct kvg_cuda_area *area, CUstream stream)
{
	size_t block = (size_t)KVG_CUDA_PLACES * (area->k_bytes + area->v_bytes);

	if (block == 0 || block > pipe->staging_size)
		return CUDA_ERROR_INVALID_VALUE;
	return order(pipe, pipe->begin, stream, pipe->engine);
}

CUresult kvg_cuda_copy_to_host(struct kvg_cuda_copy_pipe *pipe, const struct kvg_cuda_area *area, const uint32_t *ids,
	uint32_t count, void *host, CUstream stream)
{
	CUresult result = check_pipe(pipe, area, stream);
	uint8_t *to = host;
	struct part part;

	for (uint32_t turn = 0; result == CUDA_SUCCESS && part_at(pipe, area, ids, count, turn, &part); turn++) {
		result = part_to_host(pipe, &part, to, stream);
		to += part.bytes;
	}
	return result == CUDA_SUCCESS ? order(pipe, pipe->begin, pipe->engine, stream) : result;
}

CUresult kvg_cuda_copy_from_host(struct kvg_cuda_copy_pipe *pipe, const struct kvg_cuda_area *area, const uint32_t *ids,
	uint32_t count, const void *host, CUstream stream)
{
	CUresult result = check_pipe(pipe, area, stream);
	const uint8_t *from = host;
	struct part part;

	for (uint32_t turn = 0; result == CUDA_SUCCESS && part_at(pipe, area, ids, count, turn, &part); turn++) {
		result = part_from_host(pipe, &part, from, stream);
		from += part.bytes;
	}
	return result;
}
