/* The stream and the lanes of one worker on the device: opening, closing, buffers, and how its jobs end. */
#include "daemon/sequence/cuda.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/sequence/cuda_transfer.h"
#include "daemon/sequence/evict.h"
#include "daemon/sequence/gates.h"
#include "daemon/sequence/layout.h"

#define QUERY_NS   1000000u /* between questions to the driver about work that is not done */
#define BUFFER_MIN 65536u

/* ---- kernels, shared by the device's workers ---- */

static void kernels_free(void *user)
{
	struct cuda_kernels *kernels = user;

	(void)kvg_cuda_enter(kernels->cuda);
	(void)cuda_link_free(kernels->link);
	(void)kvg_cuda_tier_free(kernels->tier);
	(void)kvg_cuda_copy_free(kernels->copy);
	(void)kvg_cuda_evict_free(kernels->evict);
	(void)kvg_cuda_select_free(kernels->select);
	(void)kvg_cuda_maxima_free(kernels->maxima);
	(void)kvg_cuda_gate_kernels_free(kernels->gate);
	free(kernels);
}

static CUresult kernels_load(const struct kvg_cuda *cuda, struct cuda_kernels *kernels)
{
	CUresult result = CUDA_SUCCESS;

	kernels->evict = kvg_cuda_evict_new(cuda, &result);
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_select_new(cuda, &kernels->select);
	if (result == CUDA_SUCCESS)
		kernels->maxima = kvg_cuda_maxima_new(cuda, &result);
	if (result == CUDA_SUCCESS)
		kernels->gate = kvg_cuda_gate_kernels_new(cuda, &result);
	if (result == CUDA_SUCCESS)
		kernels->copy = kvg_cuda_copy_new(cuda, &result);
	if (result == CUDA_SUCCESS)
		kernels->tier = kvg_cuda_tier_new(cuda, &result);
	return result;
}

const struct cuda_kernels *cuda_kernels(struct kind *kind)
{
	struct cuda_kernels *kernels = kind->attached;
	CUresult result;

	if (kernels)
		return kernels;
	kernels = calloc(1, sizeof(*kernels));
	if (!kernels)
		return NULL;
	kernels->cuda = kind->ops->device(kind);
	result = kernels_load(kind->ops->device(kind), kernels);
	if (result != CUDA_SUCCESS) {
		kind_cuda_check(kind, result, "loading kernels");
		kernels_free(kernels);
		return NULL;
	}
	kind->attached = kernels;
	kind->detach = kernels_free;
	return kernels;
}

/* ---- small parts ---- */

int cuda_status(const struct compute_device *device, CUresult result, const char *what)
{
	if (result == CUDA_SUCCESS)
		return 0;
	kind_cuda_check(device->kind, result, what);
	return kvg_cuda_errno(result);
}

static void buffer_free(const struct compute_device *device, struct cuda_buffer *buffer)
{
	const struct kvg_cuda_driver *driver = device->cuda->driver;

	if (buffer->at && buffer->pinned)
		(void)driver->cuMemFreeHost(buffer->at);
	else if (buffer->at)
		(void)driver->cuMemFree((CUdeviceptr)(uintptr_t)buffer->at);
	atomic_fetch_sub_explicit(&device->space->scratch, buffer->size, memory_order_relaxed);
	*buffer = (struct cuda_buffer){0};
}

struct cuda_buffer *cuda_buffer_at(struct compute_device *device, enum cuda_buffers which)
{
	return which < CUDA_LANE_BUFFERS ? &device->lane->buffers[which] : &device->buffers[which];
}

uint8_t *cuda_buffer(struct compute_device *device, enum cuda_buffers which, size_t size)
{
	const struct kvg_cuda_driver *driver = device->cuda->driver;
	struct cuda_buffer *buffer = cuda_buffer_at(device, which);
	size_t room = BUFFER_MIN;
	void *host = NULL;
	CUdeviceptr at = 0;
	CUresult result;

	if (buffer->size >= size)
		return buffer->at;
	buffer->pinned = which == CUDA_UPLOAD || which == CUDA_READBACK;
	while (room < size)
		room += buffer->pinned ? room : room / 2; /* pinned memory takes over a millisecond to replace */
	/* Launches of other requests may be using what is shared. */
	if (buffer->at && which >= CUDA_LANE_BUFFERS)
		(void)driver->cuStreamSynchronize(device->stream);
	buffer_free(device, buffer);
	buffer->pinned = which == CUDA_UPLOAD || which == CUDA_READBACK;
	if (buffer->pinned)
		result = driver->cuMemHostAlloc(&host, room, 0);
	else
		result = driver->cuMemAlloc(&at, room);
	if (cuda_status(device, result, "scratch memory") < 0)
		return NULL;
	buffer->at = buffer->pinned ? host : (uint8_t *)(uintptr_t)at;
	buffer->size = room;
	atomic_fetch_add_explicit(&device->space->scratch, room, memory_order_relaxed);
	return buffer->at;
}

CUresult cuda_upload(const struct compute_device *device, void *to, size_t size)
{
	return device->cuda->driver->cuMemcpyHtoDAsync(
		(CUdeviceptr)(uintptr_t)to, device->lane->buffers[CUDA_UPLOAD].at, size, device->stream);
}

struct kvg_cuda_area cuda_area(const struct space *space)
{
	const struct arena *arena = space->arena;
	const struct kvg_group *group = &arena->layout.groups[0];

	return (struct kvg_cuda_area){.k_base = arena->base,
		.v_base = arena->base + arena->extent_size / 2,
		.stride = arena->stride,
		.k_bytes = group->k_dim * (group->k_dtype == KVG_F32 ? 4u : 2u),
		.v_bytes = group->v_dim * (group->v_dtype == KVG_F32 ? 4u : 2u),
		.pairs = (struct kvg_cuda_pair *)(void *)arena->pairs,
		.ids_per_extent = arena->ids_per_extent,
		.blocks_per_extent = arena->blocks_per_extent};
}

CUresult cuda_signal(const struct request *request)
{
	const struct compute_device *device = request->space->device.compute;
	uint32_t slot = request->sequence ? request->sequence->slot : 0;
	CUdeviceptr at = device->sync + offsetof(struct kvg_sync, slots) + slot * sizeof(uint64_t);

	if (!request->sqe.signal_value || !request->sequence)
		return CUDA_SUCCESS;
	return device->cuda->driver->cuStreamWriteValue64(device->stream, at, request->sqe.signal_value, 0);
}

/* ---- open ---- */

/* Memory that the worker maps too: created, mapped, zeroed. */
static int shared_new(struct kind *kind, size_t size, int *ret_fd, uint8_t **ret_at)
{
	uint8_t *at = kind->ops->reserve(kind, size);
	int fd = at ? kind->ops->create(kind, size) : -ENOMEM, r = fd;

	if (r >= 0)
		r = kind->ops->map(kind, fd, at, size);
	if (r >= 0)
		r = kind->ops->scrub(kind, at, size);
	if (r >= 0) {
		*ret_fd = fd;
		*ret_at = at;
		return 0;
	}
	if (fd >= 0) {
		(void)kind->ops->unmap(kind, at, size);
		(void)kind->ops->destroy(kind, fd, size);
	}
	if (at)
		kind->ops->unreserve(kind, at, size);
	return r;
}

static void shared_free(struct kind *kind, int *fd, uint8_t *at, size_t size)
{
	if (*fd < 0)
		return;
	(void)kind->ops->unmap(kind, at, size);
	(void)kind->ops->destroy(kind, *fd, size);
	kind->ops->unreserve(kind, at, size);
	*fd = -1;
}

static uint64_t round_up(uint64_t size, uint64_t unit)
{
	return (size + unit - 1) / unit * unit;
}

static int open_table(struct space *space, struct compute_device *device)
{
	uint64_t rows = (uint64_t)space->rows * space->part.worker->max_sequences;

	space->device.ids_offset = round_up(rows * sizeof(uint32_t), 256);
	space->device.table_size =
		round_up(layout_device_table(&space->part.worker->layout), device->kind->granularity);
	return shared_new(device->kind, space->device.table_size, &space->device.table_fd, &device->table);
}

static int open_staging(struct space *space, struct compute_device *device, uint64_t bytes)
{
	if (!bytes)
		return 0;
	space->device.staging_size = round_up(bytes, device->kind->granularity);
	return shared_new(device->kind, space->device.staging_size, &space->device.staging_fd, &device->staging);
}

/* The staging memfd: its rows can be read, and its semaphores written, by the stream. */
static CUresult register_memory(struct space *space, struct compute_device *device, const struct space_memory *memory)
{
	const struct kvg_cuda_driver *driver = device->cuda->driver;
	CUdeviceptr base = 0;
	CUresult result = driver->cuMemHostRegister(
		memory->staging, memory->staging_size, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);

	if (result != CUDA_SUCCESS)
		return result;
	device->registered = true;
	device->staging_base = memory->staging;
	result = driver->cuMemHostGetDevicePointer(&base, memory->staging, 0);
	device->staging_rows = base + memory->rows_offset;
	device->sync = base + memory->sync_offset;
	space->sync = (struct kvg_sync *)(void *)(memory->staging + memory->sync_offset);
	return result;
}

static CUresult open_stream(struct compute_device *device, uint32_t layers)
{
	const struct kvg_cuda_driver *driver = device->cuda->driver;
	size_t scratch = kvg_cuda_select_scratch(device->kernels->select, layers);
	int least = 0, greatest = 0;
	void *flag = NULL;
	CUdeviceptr at = 0;
	CUresult result = driver->cuCtxGetStreamPriorityRange(&least, &greatest);

	if (result == CUDA_SUCCESS)
		result = driver->cuStreamCreateWithPriority(&device->stream, CU_STREAM_NON_BLOCKING, greatest);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemHostAlloc(&flag, sizeof(uint64_t), 0);
	if (result != CUDA_SUCCESS)
		return result;
	device->flag = flag;
	*device->flag = 0;
	result = driver->cuMemAlloc(&at, scratch);
	if (result != CUDA_SUCCESS)
		return result;
	device->select_scratch = (void *)(uintptr_t)at;
	return kvg_cuda_select_scratch_clear(device->kernels->select, device->select_scratch, layers, device->stream);
}

static void lane_free(const struct compute_device *device, struct cuda_lane *lane)
{
	for (unsigned i = 0; i < CUDA_LANE_BUFFERS; i++)
		buffer_free(device, &lane->buffers[i]);
}

static void cuda_close(struct space *space)
{
	struct compute_device *device = space->device.compute;
	const struct kvg_cuda_driver *driver;

	if (!device)
		return;
	driver = device->cuda->driver;
	(void)kvg_cuda_enter(device->cuda);
	space->sync = NULL;
	gate_set_close(space->gates);
	if (device->stream)
		(void)driver->cuStreamDestroy(device->stream);
	for (unsigned i = 0; i < CUDA_LANES; i++)
		lane_free(device, &device->lanes[i]);
	for (unsigned i = 0; i < META_RECORDS; i++)
		lane_free(device, &device->evictions[i]);
	for (unsigned i = CUDA_LANE_BUFFERS; i < CUDA_BUFFERS; i++)
		buffer_free(device, &device->buffers[i]);
	if (device->select_scratch)
		(void)driver->cuMemFree((CUdeviceptr)(uintptr_t)device->select_scratch);
	if (device->flag)
		(void)driver->cuMemFreeHost(device->flag);
	if (device->registered)
		(void)driver->cuMemHostUnregister(device->staging_base);
	shared_free(device->kind, &space->device.table_fd, device->table, space->device.table_size);
	shared_free(device->kind, &space->device.staging_fd, device->staging, space->device.staging_size);
	free(device);
	space->device.compute = NULL;
}

static int cuda_open(struct space *space, const struct space_memory *memory, char *text)
{
	struct compute_device *device = calloc(1, sizeof(*device));
	int r;

	if (!device)
		return -ENOMEM;
	space->device.compute = device;
	device->space = &space->device;
	device->kind = space->pool->kind;
	device->cuda = device->kind->ops->device(device->kind);
	r = cuda_status(device, kvg_cuda_enter(device->cuda), "entering the context");
	device->kernels = r < 0 ? NULL : cuda_kernels(device->kind);
	if (!device->kernels)
		r = -EIO;
	if (r >= 0)
		r = cuda_status(device, open_stream(device, space->part.worker->layers), "a worker's stream");
	if (r >= 0)
		r = open_table(space, device);
	if (r >= 0)
		r = cuda_status(device, register_memory(space, device, memory), "registering a staging area");
	if (r >= 0)
		r = open_staging(space, device, memory->device_staging_bytes);
	if (r < 0) {
		if (!text[0])
			(void)snprintf(text, KVG_TEXT_SIZE, "layout %s: on the device: %s",
				space->part.worker->layout.model, strerror(-r));
		cuda_close(space);
	}
	return r;
}

/* A device that has no stream, for transfers alone. */
static int cuda_carry(struct space *space)
{
	struct compute_device *device = calloc(1, sizeof(*device));

	if (!device)
		return -ENOMEM;
	device->space = &space->device;
	device->kind = space->pool->kind;
	device->cuda = device->kind->ops->device(device->kind);
	device->kernels = cuda_kernels(device->kind);
	space->device.compute = device;
	return 0;
}

/* ---- the end of a job ---- */

static bool over(struct request *request, int status)
{
	request->lane->owner = NULL;
	if (status < 0)
		request->job_status = status;
	return true;
}

/* An eviction's lane is its own; its jobs come one after the other. */
static struct cuda_lane *free_lane(struct compute_device *device, const struct request *request)
{
	if (request->evict)
		return &device->evictions[request->evict->slot];
	for (unsigned i = 0; i < CUDA_LANES; i++)
		if (!device->lanes[i].owner)
			return &device->lanes[i];
	return NULL;
}

static bool start(struct request *request, struct cuda_lane *lane)
{
	struct compute_device *device = request->space->device.compute;
	CUdeviceptr flag = (CUdeviceptr)(uintptr_t)device->flag;
	int r = cuda_status(device, kvg_cuda_enter(device->cuda), "entering the context");

	assert(!lane->owner);
	lane->owner = request;
	request->lane = device->lane = lane;
	request->launched = true;
	if (r >= 0)
		r = request->launch(request);
	if (r >= 0 && request->transfer) { /* nothing of it is on the stream */
		lane->owner = NULL;
		return false;
	}
	if (r >= 0) {
		lane->value = ++device->flag_value;
		r = cuda_status(device,
			device->cuda->driver->cuStreamWriteValue64(device->stream, flag, lane->value, 0),
			"the end of a job");
	}
	device->asked_ns = loop_now();
	if (r >= 0)
		return false;
	/* What was launched of it may still read the lane's memory. */
	if (r != -EAGAIN)
		(void)device->cuda->driver->cuStreamSynchronize(device->stream);
	return over(request, r);
}

static int end(struct request *request)
{
	request->space->device.compute->lane = request->lane;
	return request->finish ? request->finish(request) : 0;
}

/* The driver is asked only about work that takes long: whether it has failed. */
static int check_stream(struct compute_device *device)
{
	uint64_t now = loop_now();
	CUresult result;

	if (now - device->asked_ns < QUERY_NS)
		return 0;
	device->asked_ns = now;
	result = device->cuda->driver->cuStreamQuery(device->stream);
	return result == CUDA_ERROR_NOT_READY ? 0 : cuda_status(device, result, "a worker's stream");
}

static bool cuda_poll(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	struct compute_device *device = request->space->device.compute;
	struct cuda_lane *lane;
	int r;

	if (!request->launched) {
		if (atomic_load_explicit(&request->space->dying, memory_order_relaxed))
			return true;
		lane = free_lane(device, request);
		return lane ? start(request, lane) : false;
	}
	if (request->transfer)
		return cuda_transfer_poll(request);
	if (__atomic_load_n(device->flag, __ATOMIC_ACQUIRE) < request->lane->value) {
		r = check_stream(device);
		return r < 0 ? over(request, r) : false;
	}
	return over(request, end(request));
}

static int cuda_event(const struct space *space, void *event)
{
	const struct compute_device *device = space->device.compute;
	CUresult result = kvg_cuda_enter(device->cuda);

	if (result == CUDA_SUCCESS)
		result = device->cuda->driver->cuEventQuery(event);
	return result == CUDA_ERROR_NOT_READY ? -EAGAIN : cuda_status(device, result, "a worker's event");
}

const struct compute_ops compute_cuda = {
	.open = cuda_open,
	.close = cuda_close,
	.select = cuda_select,
	.mark = cuda_mark,
	.move = cuda_move,
	.pack = cuda_pack,
	.recall = cuda_recall,
	.unpack = cuda_unpack,
	.closes_holes = true,
	.select_marks = true,
	.move_publishes = true,
	.evictions = META_RECORDS,
	.creates_ahead = true,
	.score = cuda_score,
	.copy = cuda_copy,
	.unload = cuda_copy_image,
	.load = cuda_copy_image,
	.carry = cuda_carry,
	.publish = cuda_publish,
	.event = cuda_event,
	.poll = cuda_poll,
};
