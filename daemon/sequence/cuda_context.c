/* Blocks that are copied for contexts: launches on the worker's stream, all at once. */
#include <errno.h>
#include <string.h>

#include "daemon/sequence/context.h"
#include "daemon/sequence/cuda.h"

uint32_t cuda_context_blocks(const struct sequence *sequence, uint32_t row, uint32_t *ids)
{
	for (const struct context *at = sequence->context; at; at = at->parent) {
		const struct meta_context_row *from = &at->part.rows[row];

		memcpy(ids + at->shared[row] - from->blocks, at->part.ids + from->first,
			from->blocks * sizeof(uint32_t));
	}
	return sequence_shared(sequence, row);
}

static int finish_copies(struct request *request)
{
	request->copy.done = request->copy.count;
	return 0;
}

/* The first ones' pairs count as prefix from now on; the others' are read by nobody. */
static CUresult enqueue_copies(const struct request *request, const struct kvg_cuda_relocation *there)
{
	const struct compute_device *device = request->space->device.compute;
	const struct kvg_cuda_tier *tier = device->kernels->tier;
	const struct kvg_cuda_area area = cuda_area(request->space);
	uint32_t places = request->copy.places;
	CUresult result = kvg_cuda_tier_blocks(tier, &area, there, places, KVG_CUDA_PAIRS_FRESH, 0, device->stream);

	return result == CUDA_SUCCESS ? kvg_cuda_tier_blocks(tier, &area, there + places, request->copy.count - places,
						KVG_CUDA_PAIRS_LEFT, 0, device->stream)
				      : result;
}

int cuda_copy(struct request *request)
{
	struct compute_device *device = request->space->device.compute;
	const struct block_copy *copy = &request->copy;
	size_t size = copy->count * sizeof(struct kvg_cuda_relocation);
	struct kvg_cuda_relocation *blocks = (void *)cuda_buffer(device, CUDA_UPLOAD, size),
				   *there = (void *)cuda_buffer(device, CUDA_INPUT, size);
	CUresult result;

	if (!blocks || !there)
		return -ENOMEM;
	for (uint32_t i = 0; i < copy->count; i++)
		blocks[i] = (struct kvg_cuda_relocation){copy->src[i], copy->dst[i]};
	request->finish = finish_copies;
	if (!copy->count)
		return 0;
	result = cuda_upload(device, there, size);
	if (result == CUDA_SUCCESS)
		result = enqueue_copies(request, there);
	return cuda_status(device, result, "a context's blocks");
}
