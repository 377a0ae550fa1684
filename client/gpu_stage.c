/* Rows that lie in device memory, and memory and events of the worker's own that the daemon may use. */
#include "client/cuda.h"

#include <errno.h>
#include <inttypes.h>

/* ---- where rows lie ---- */

struct span {
	uint64_t address, bytes; /* bytes: as many as are known to be read, from the first */
};

/* The gate's width, and so the size of a PREACT row, is the daemon's to know and to check. */
static uint64_t row_bytes(const struct kvg_client *client, uint32_t kind)
{
	if (kind == KVG_STAGE_HIDDEN)
		return client->model.hidden_dim * sizeof(uint16_t);
	return kind == KVG_STAGE_SCORE ? client->model.heads * sizeof(float) : 0;
}

/* false: nothing is that large. */
static bool span_of(const struct kvg_client *client, const struct kvg_sqe *sqe, const void *rows, struct span *ret)
{
	uint64_t layer = row_bytes(client, sqe->stage.kind) * sqe->stage.rows;
	uint64_t stride = sqe->stage.layer_stride ? sqe->stage.layer_stride : layer, before;

	ret->address = (uintptr_t)rows;
	return !__builtin_mul_overflow(stride, sqe->stage.layer_count - 1, &before) &&
	       !__builtin_add_overflow(before, layer, &ret->bytes);
}

static bool inside(const struct span *span, uint64_t address, uint64_t size)
{
	return size && span->address >= address && span->address - address < size &&
	       span->bytes <= size - (span->address - address);
}

/* Fills the entry's buffer and offset. */
static int find_buffer(struct kvg_client *client, const struct span *span, struct kvg_sqe *sqe)
{
	const struct gpu *gpu = client->gpu;

	if (inside(span, gpu->rows.address, gpu->rows.size)) {
		sqe->stage.buffer = KVG_BUFFER_DEVICE;
		sqe->stage.offset = span->address - gpu->rows.address;
		return 0;
	}
	for (uint32_t i = 0; i < GPU_IMPORTS; i++) {
		const struct gpu_import *import = &gpu->imports[i];

		if (!import->id || !inside(span, import->address, import->size))
			continue;
		sqe->stage.buffer = import->id;
		sqe->stage.offset = span->address - import->address;
		return 0;
	}
	return client_fail(client, -EINVAL,
		"stage: %" PRIu64 " bytes at %#" PRIx64 " are neither in the device staging area (%" PRIu64
		" bytes at %#" PRIx64 ") nor in an imported buffer",
		span->bytes, span->address, gpu->rows.size, gpu->rows.address);
}

/* ---- calls ---- */

static int check_stage(struct kvg_client *client, const struct kvg_sqe *sqe)
{
	uint32_t layers = client->model.layers;

	if (sqe->stage.layer_count && sqe->stage.rows && sqe->stage.layer_begin < layers &&
		sqe->stage.layer_count <= layers - sqe->stage.layer_begin)
		return 0;
	return client_fail(client, -EINVAL, "stage: %u rows of %u layers from %u, the layout has %u layers",
		sqe->stage.rows, sqe->stage.layer_count, sqe->stage.layer_begin, layers);
}

int kvg_stage_device(struct kvg_client *client, uint64_t seq, uint32_t kind, uint32_t layer_begin, uint32_t layer_count,
	uint32_t pos, uint32_t rows, const void *device_rows, uint64_t layer_stride)
{
	struct gpu *gpu = client->gpu;
	struct kvg_sqe sqe = {.op = KVG_OP_STAGE, .seq = seq};
	const struct sequence *sequence;
	struct span span = {0};
	uint32_t piece;
	int r = client_check_cuda(client, "kvg_stage_device");

	if (r < 0)
		return r;
	CLIENT_TURN(client);
	sequence = client_sequence(client, seq, &r);
	if (!sequence)
		return r;
	sqe.generation = sequence->generation;
	sqe.stage.kind = kind;
	sqe.stage.layer_begin = layer_begin;
	sqe.stage.layer_count = layer_count;
	sqe.stage.pos = pos;
	sqe.stage.rows = rows;
	sqe.stage.layer_stride = layer_stride;
	r = check_stage(client, &sqe);
	if (r == 0 && !span_of(client, &sqe, device_rows, &span))
		r = client_fail(client, -EINVAL, "stage: layers %" PRIu64 " bytes apart", layer_stride);
	if (r == 0)
		r = find_buffer(client, &span, &sqe);
	if (r < 0)
		return r;
	if (sqe.stage.buffer != KVG_BUFFER_DEVICE || !gpu->place_size || sqe.stage.offset != gpu->place ||
		span.bytes > gpu->place_size)
		return client_stage(client, &sqe, AREA_NONE, 0);
	piece = staging_take(&gpu->staging, gpu->place_size, gpu->place);
	gpu->place_size = 0;
	return client_stage(client, &sqe, AREA_DEVICE, piece);
}

void *kvg_stage_device_buffer(struct kvg_client *client, uint64_t bytes)
{
	struct gpu *gpu = client->gpu;
	uint64_t offset = 0;

	if (client_check_cuda(client, "kvg_stage_device_buffer") < 0)
		return NULL;
	CLIENT_TURN(client);
	if (client_check_registered(client) < 0)
		return NULL;
	if (!bytes) {
		(void)client_fail(client, -EINVAL, "kvg_stage_device_buffer: 0 bytes");
		return NULL;
	}
	if (client_stage_place(client, &gpu->staging, bytes, &offset) < 0)
		return NULL;
	gpu->place = offset;
	gpu->place_size = bytes;
	return (void *)(uintptr_t)(gpu->rows.address + offset);
}

/* ---- memory and events of the worker's own ---- */

static int request_import(struct kvg_client *client, Kvg__WorkerRequest *request, uint32_t *ret_id)
{
	int r = client_request(client, request, NULL, 0);

	if (r < 0)
		return r;
	if (client->reply->body_case == KVG__WORKER_REPLY__BODY_IMPORTED && client->reply->imported->id)
		*ret_id = client->reply->imported->id;
	else
		r = client_break(
			client, -EPROTO, "daemon: reply of type %d to an import", (int)client->reply->body_case);
	client_reply_free(client);
	return r;
}

static struct gpu_import *find_import(struct gpu *gpu, uint32_t id)
{
	for (uint32_t i = 0; i < GPU_IMPORTS; i++)
		if (gpu->imports[i].id == id)
			return &gpu->imports[i];
	return NULL;
}

/* A handle stands for the whole allocation that the pointer lies in. */
static int buffer_handle(
	struct kvg_client *client, CUdeviceptr address, uint64_t size, CUipcMemHandle *ret_handle, uint64_t *ret_offset)
{
	const struct kvg_cuda_driver *driver = client->gpu->cuda->driver;
	CUdeviceptr base = 0;
	size_t length = 0;
	int r;

	CUDA_SCOPE(client->gpu->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result = driver->cuMemGetAddressRange(&base, &length, address);
	r = cuda_status(client, scope.result, "import: the pointer's allocation");
	if (r < 0)
		return r;
	if (!size || address - base > length || size > length - (address - base))
		return client_fail(client, -EINVAL, "import: %" PRIu64 " bytes at %" PRIu64 " of an allocation of %zu",
			size, (uint64_t)(address - base), length);
	*ret_offset = address - base;
	return cuda_status(client, driver->cuIpcGetMemHandle(ret_handle, base),
		"import: the allocation has no interprocess handle (memory of cuMemCreate has none)");
}

int kvg_import_buffer(struct kvg_client *client, const void *device, uint64_t size, uint32_t *ret_id)
{
	Kvg__ImportBuffer body = KVG__IMPORT_BUFFER__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	struct gpu *gpu = client->gpu;
	struct gpu_import *place;
	CUipcMemHandle handle;
	int r = client_check_cuda(client, "kvg_import_buffer");

	if (r < 0)
		return r;
	CLIENT_TURN(client);
	r = client_check_registered(client);
	if (r < 0)
		return r;
	place = find_import(gpu, 0);
	if (!place)
		return client_fail(
			client, -ENOSPC, "import: %u buffers are imported, no more are possible", GPU_IMPORTS);
	r = buffer_handle(client, (uintptr_t)device, size, &handle, &body.offset);
	if (r < 0)
		return r;
	body.handle = (ProtobufCBinaryData){.len = sizeof(handle), .data = (uint8_t *)&handle};
	body.size = size;
	request.body_case = KVG__WORKER_REQUEST__BODY_IMPORT_BUFFER;
	request.import_buffer = &body;
	r = request_import(client, &request, ret_id);
	if (r == 0)
		*place = (struct gpu_import){.id = *ret_id, .address = (uintptr_t)device, .size = size};
	return r;
}

int kvg_import_event(struct kvg_client *client, void *event, uint32_t *ret_id)
{
	Kvg__ImportEvent body = KVG__IMPORT_EVENT__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	CUipcEventHandle handle;
	int r = client_check_cuda(client, "kvg_import_event");

	if (r < 0)
		return r;
	CLIENT_TURN(client);
	r = client_check_registered(client);
	if (r < 0)
		return r;
	CUDA_SCOPE(client->gpu->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result = client->gpu->cuda->driver->cuIpcGetEventHandle(&handle, event);
	r = cuda_status(client, scope.result, "import: the event's handle (CU_EVENT_INTERPROCESS makes it have one)");
	if (r < 0)
		return r;
	body.handle = (ProtobufCBinaryData){.len = sizeof(handle), .data = (uint8_t *)&handle};
	request.body_case = KVG__WORKER_REQUEST__BODY_IMPORT_EVENT;
	request.import_event = &body;
	return request_import(client, &request, ret_id);
}

int kvg_release(struct kvg_client *client, uint32_t id)
{
	Kvg__Release body = KVG__RELEASE__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	struct gpu_import *import;
	int r = client_check_cuda(client, "kvg_release");

	if (r < 0)
		return r;
	CLIENT_TURN(client);
	body.id = id;
	request.body_case = KVG__WORKER_REQUEST__BODY_RELEASE;
	request.release = &body;
	r = client_request(client, &request, NULL, 0);
	if (r < 0)
		return r;
	if (client->reply->body_case != KVG__WORKER_REPLY__BODY_RELEASED)
		r = client_break(
			client, -EPROTO, "daemon: reply of type %d to a release", (int)client->reply->body_case);
	client_reply_free(client);
	import = id ? find_import(client->gpu, id) : NULL;
	if (r == 0 && import)
		*import = (struct gpu_import){0};
	return r;
}
