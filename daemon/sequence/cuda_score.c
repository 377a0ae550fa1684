/* STAGE of the cuda kind: staged rows become scores in the pairs' metadata. */
#include "daemon/sequence/cuda.h"

#include <errno.h>
#include <string.h>

#include "daemon/sequence/gates.h"

/* Where the entry's rows lie for the device. */
static CUdeviceptr staged(const struct request *request)
{
	const struct compute_device *device = request->space->device.compute;
	uint64_t offset = request->sqe.stage.offset;

	if (request->buffer)
		return request->buffer->address + offset;
	if (request->sqe.stage.buffer == KVG_BUFFER_DEVICE)
		return (CUdeviceptr)(uintptr_t)device->staging + offset;
	return device->staging_rows + offset;
}

/* Bytes from the first to the last staged row's end. */
static uint64_t staged_bytes(const struct request *request, uint64_t row_bytes)
{
	uint64_t layer = request->sqe.stage.rows * row_bytes, stride = request->sqe.stage.layer_stride;

	return (stride ? stride : layer) * (request->sqe.stage.layer_count - 1) + layer;
}

/* Rows on the host are read more than once: they are copied first. */
static CUresult fetch_rows(const struct request *request, uint64_t bytes, CUdeviceptr *at)
{
	struct compute_device *device = request->space->device.compute;
	uint8_t *to;

	*at = staged(request);
	if (request->sqe.stage.buffer != KVG_BUFFER_STAGING)
		return CUDA_SUCCESS;
	to = cuda_buffer(device, CUDA_ROWS, bytes);
	if (!to)
		return CUDA_ERROR_OUT_OF_MEMORY;
	*at = (CUdeviceptr)(uintptr_t)to;
	return device->cuda->driver->cuMemcpyAsync(*at, staged(request), bytes, device->stream);
}

static CUresult run_gate(const struct request *request, struct kvg_cuda_scores *scores)
{
	const struct space *space = request->space;
	struct compute_device *device = space->device.compute;
	const struct kvg_cuda_gate *gate = space->gates->device;
	bool hidden = request->sqe.stage.kind == KVG_STAGE_HIDDEN;
	uint32_t heads = space->part.worker->heads, rows = request->sqe.stage.rows;
	uint64_t row_bytes = hidden ? space->part.worker->layout.hidden_dim * sizeof(uint16_t)
				    : (uint64_t)heads * (space->part.worker->layout.groups[0].query_heads + 1) *
					      space->gates->width * sizeof(uint16_t);
	struct kvg_cuda_gate_rows input = {.kind = hidden ? KVG_CUDA_GATE_HIDDEN : KVG_CUDA_GATE_PREACT,
		.layer_stride_bytes = request->sqe.stage.layer_stride,
		.layer_begin = request->sqe.stage.layer_begin,
		.layer_count = request->sqe.stage.layer_count,
		.rows = rows,
		.score_stride = rows};
	uint8_t *out =
		cuda_buffer(device, CUDA_SCORES, (size_t)request->sqe.stage.layer_count * heads * rows * sizeof(float));
	struct cuda_buffer *before = cuda_buffer_at(device, CUDA_GATE);
	uint8_t *scratch = before->at;
	uint64_t scratch_size = kvg_cuda_gate_scratch(gate);
	CUresult result = fetch_rows(request, staged_bytes(request, row_bytes), &input.data);

	if (result == CUDA_SUCCESS && (!scratch || before->size < scratch_size)) {
		scratch = cuda_buffer(device, CUDA_GATE, scratch_size);
		result = scratch ? device->cuda->driver->cuMemsetD8Async(
					   (CUdeviceptr)(uintptr_t)scratch, 0, KVG_CUDA_GATE_COUNTERS, device->stream)
				 : CUDA_ERROR_OUT_OF_MEMORY;
	}
	if (!out || result != CUDA_SUCCESS)
		return out ? result : CUDA_ERROR_OUT_OF_MEMORY;
	input.scores = (CUdeviceptr)(uintptr_t)out;
	input.scratch = (CUdeviceptr)(uintptr_t)scratch;
	scores->scores = (const float *)(void *)out;
	scores->head_stride = rows;
	scores->token_stride = 1;
	scores->layer_stride = (uint64_t)heads * rows;
	return kvg_cuda_gate_score(gate, &input, device->stream);
}

static CUresult take_scores(const struct request *request, struct kvg_cuda_scores *scores)
{
	uint32_t heads = request->space->part.worker->heads;
	uint64_t stride = request->sqe.stage.layer_stride;
	CUdeviceptr at = 0;
	CUresult result = fetch_rows(request, staged_bytes(request, heads * sizeof(float)), &at);

	scores->scores = (const float *)(uintptr_t)at;
	scores->head_stride = 1;
	scores->token_stride = heads;
	scores->layer_stride = stride ? stride / sizeof(float) : (uint64_t)heads * request->sqe.stage.rows;
	return result;
}

/*
 * Only the blocks that the entry's tokens lie in go to the device: each row's count from the first of them, and so do
 * the indices. Returns a negative errno.
 */
static int send_blocks(const struct request *request, struct kvg_cuda_rows *rows)
{
	const struct sequence *sequence = request->sequence;
	struct compute_device *device = request->space->device.compute;
	const struct meta_row *meta = meta_rows(&request->space->part, sequence->slot);
	uint32_t heads = request->space->part.worker->heads, first = request->sqe.stage.layer_begin * heads;
	uint32_t end = first + request->sqe.stage.layer_count * heads, all = request->space->rows;
	uint32_t cap = request->sqe.stage.rows / KVG_BLOCK_TOKENS + 2;
	size_t size = ((size_t)all * cap + all) * sizeof(uint32_t);
	uint32_t *host = (uint32_t *)(void *)cuda_buffer(device, CUDA_UPLOAD, size);
	uint32_t *there = (uint32_t *)(void *)cuda_buffer(device, CUDA_INPUT, size), *base_len;

	if (!host || !there)
		return -ENOMEM;
	base_len = host + (size_t)all * cap;
	memset(base_len, 0, all * sizeof(uint32_t));
	for (uint32_t row = first; row < end; row++) {
		uint32_t index = meta[row].base_len + request->sqe.stage.pos - sequence->meta->fold_pos;
		uint32_t block = index / KVG_BLOCK_TOKENS;
		uint32_t last = (index + request->sqe.stage.rows - 1) / KVG_BLOCK_TOKENS;

		cuda_row_blocks(sequence, row, block, last - block + 1, host + (size_t)row * cap);
		base_len[row] = index % KVG_BLOCK_TOKENS;
	}
	*rows = (struct kvg_cuda_rows){.layers = request->space->part.worker->layers,
		.heads = heads,
		.ids = there,
		.ids_cap = cap,
		.fold_pos = request->sqe.stage.pos,
		.base_len = there + (size_t)all * cap};
	return cuda_status(device, cuda_upload(device, there, size), "an upload");
}

int cuda_score(struct request *request)
{
	struct compute_device *device = request->space->device.compute;
	const struct kvg_cuda_area area = cuda_area(request->space);
	struct kvg_cuda_scores scores = {.layer_begin = request->sqe.stage.layer_begin,
		.layer_count = request->sqe.stage.layer_count,
		.pos = request->sqe.stage.pos,
		.tokens = request->sqe.stage.rows};
	struct kvg_cuda_rows rows;
	CUresult result;
	int r = send_blocks(request, &rows);

	if (r < 0)
		return r;
	result =
		request->sqe.stage.kind == KVG_STAGE_SCORE ? take_scores(request, &scores) : run_gate(request, &scores);
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_evict_store(device->kernels->evict, &area, &rows, &scores, device->stream);
	if (result == CUDA_SUCCESS)
		result = cuda_signal(request);
	request->layer = request->sqe.stage.layer_begin + request->sqe.stage.layer_count;
	return cuda_status(device, result, "scores");
}
