/* The worker's GPU from hello to the end: what is opened, mapped and registered, and the library's thread. */
#include "client/cuda.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "kernels/cuda/attention.h"

#define LOOK_NS     20000  /* between two looks for the completion that opens a gate: the first and */
#define LOOK_NS_MAX 200000 /* the longest pause */
#define RELEASE_MS  100    /* between two releases of all waits, when the daemon is gone */

/* ---- the context ---- */

struct cuda_scope cuda_scope_enter(const struct kvg_cuda *cuda)
{
	struct cuda_scope scope = {0};
	CUcontext current = NULL;

	scope.result = cuda->driver->cuCtxGetCurrent(&current);
	if (scope.result != CUDA_SUCCESS || current == cuda->context)
		return scope;
	scope.result = cuda->driver->cuCtxPushCurrent(cuda->context);
	if (scope.result == CUDA_SUCCESS)
		scope.cuda = cuda;
	return scope;
}

void cuda_scope_leave(struct cuda_scope *scope)
{
	CUcontext popped;

	if (scope->cuda)
		(void)scope->cuda->driver->cuCtxPopCurrent(&popped);
}

int cuda_status(struct kvg_client *client, CUresult result, const char *what)
{
	const char *name;

	if (result == CUDA_SUCCESS)
		return 0;
	name = kvg_cuda_error(client->gpu->cuda->driver, result);
	if (kvg_cuda_is_sticky(result))
		return client_break(client, -EIO, "%s: %s: the GPU's context is lost", what, name);
	if (client->background)
		return kvg_cuda_errno(result);
	return client_fail(client, kvg_cuda_errno(result), "%s: %s", what, name);
}

/* ---- the library's thread ---- */

void gpu_release_waits(struct gpu *gpu)
{
	for (uint32_t i = 0; i < gpu->slot_count; i++) {
		if (gpu->sync)
			__atomic_store_n(&gpu->sync->slots[i], GPU_RELEASED, __ATOMIC_RELEASE);
		if (gpu->gates)
			__atomic_store_n(&gpu->gates[i].opened, GPU_RELEASED, __ATOMIC_RELEASE);
	}
}

static void take_turn(struct kvg_client *client)
{
	CLIENT_QUIET_TURN(client);
	client->background = true;
	(void)client_advance(client);
	client->background = false;
	if (client->broken)
		atomic_store(&client->gpu->gates_closed, 0);
}

/* Looks for completions, less and less often. */
static void look(struct kvg_client *client, long *pause_ns)
{
	const struct timespec pause = {.tv_nsec = *pause_ns};

	take_turn(client);
	(void)nanosleep(&pause, NULL);
	*pause_ns += *pause_ns < LOOK_NS_MAX ? *pause_ns / 8 : 0;
}

/* Whether the daemon hung up. Waits for that and for a kick, but for a while only when a gate is closed. */
static bool watch(struct kvg_client *client, bool gone, long *pause_ns)
{
	struct gpu *gpu = client->gpu;
	struct pollfd fds[2] = {
		{.fd = gpu->kick, .events = POLLIN}, {.fd = gone ? -1 : client->socket, .events = POLLRDHUP}};
	eventfd_t count;

	if (!gone && atomic_load(&gpu->gates_closed)) {
		look(client, pause_ns);
		(void)poll(&fds[1], 1, 0);
	} else {
		*pause_ns = LOOK_NS;
		(void)poll(fds, 2, gone ? RELEASE_MS : -1);
	}
	if (fds[0].revents)
		(void)eventfd_read(gpu->kick, &count);
	return gone || (fds[1].revents & (POLLRDHUP | POLLHUP | POLLERR));
}

/* The caller may be waiting for its stream, which waits for us or for a daemon that is gone. */
static void *run(void *user)
{
	struct kvg_client *client = user;
	long pause_ns = LOOK_NS;
	bool gone = false;

	while (!atomic_load(&client->gpu->stop)) {
		gone = watch(client, gone, &pause_ns);
		/* Again and again: what the daemon had enqueued before may still set a counter back. */
		if (gone)
			gpu_release_waits(client->gpu);
	}
	return NULL;
}

/* Signals are the caller's threads'. */
static int spawn(struct gpu *gpu, void *(*body)(void *), void *user)
{
	sigset_t all, before;
	int r;

	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	r = pthread_create(&gpu->thread, NULL, body, user);
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	gpu->started = r == 0;
	return -r;
}

static int start_thread(struct kvg_client *client)
{
	struct gpu *gpu = client->gpu;

	gpu->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return gpu->kick < 0 ? -errno : spawn(gpu, run, client);
}

void gpu_stop(struct kvg_client *client)
{
	struct gpu *gpu = client->gpu;

	if (!gpu->started)
		return;
	atomic_store(&gpu->stop, true);
	(void)eventfd_write(gpu->kick, 1);
	(void)pthread_join(gpu->thread, NULL);
	gpu->started = false;
}

/* ---- the beginning ---- */

/* Opening makes the context current: the caller's comes back. */
static int open_device(struct kvg_client *client, const uint8_t *uuid, struct kvg_cuda **ret)
{
	struct kvg_cuda_driver *driver = NULL;
	CUcontext before = NULL;
	char text[CLIENT_TEXT];
	int r = kvg_cuda_driver_load(&driver, text, sizeof(text));

	if (r == 0) {
		(void)driver->cuCtxGetCurrent(&before);
		r = kvg_cuda_open_uuid(uuid, ret, text, sizeof(text));
		(void)driver->cuCtxSetCurrent(before);
		free(driver);
	}
	return r < 0 ? client_fail(client, r, "the daemon's memory is on a GPU: %s", text) : 0;
}

static int init_lock(pthread_mutex_t *lock)
{
	pthread_mutexattr_t attributes;
	int r = pthread_mutexattr_init(&attributes);

	if (r)
		return -r;
	/* Calls are made of calls. */
	(void)pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
	r = pthread_mutex_init(lock, &attributes);
	(void)pthread_mutexattr_destroy(&attributes);
	return -r;
}

int gpu_new(struct kvg_client *client, struct kvg_cuda *cuda)
{
	struct gpu *gpu = calloc(1, sizeof(*gpu));
	int r = gpu ? init_lock(&gpu->lock) : -ENOMEM;

	if (r < 0) {
		free(gpu);
		return client_fail(client, r, "no memory for a GPU");
	}
	gpu->cuda = cuda;
	gpu->kick = -1;
	client->gpu = gpu;
	return 0;
}

int gpu_open(struct kvg_client *client, const uint8_t *uuid, size_t uuid_size)
{
	struct kvg_cuda *cuda = NULL;
	int r;

	if (uuid_size != sizeof(cuda->uuid))
		return client_break(client, -EPROTO, "daemon: its GPU's UUID has %zu bytes, not 16", uuid_size);
	r = open_device(client, uuid, &cuda);
	if (r < 0)
		return r;
	r = gpu_new(client, cuda);
	if (r < 0)
		(void)kvg_cuda_close(cuda);
	return r;
}

/* ---- register ---- */

unsigned gpu_fd_count(const Kvg__Registered *reply)
{
	return reply->device_staging_size ? 4 : 3;
}

/* NULL when the sizes make sense together. */
static const char *check_registered(
	const struct kvg_client *client, const struct model *model, const Kvg__Registered *reply)
{
	uint64_t slots = model->max_sequences, rows = (uint64_t)model->layers * model->heads, ids;
	uint64_t rows_offset = client->staging_map.rows_offset, sync = reply->sync_offset, granularity;

	granularity = client->gpu->cuda->granularity;
	if (__builtin_mul_overflow(rows, slots, &rows) || __builtin_mul_overflow(rows, sizeof(uint32_t), &rows) ||
		__builtin_mul_overflow(rows, reply->row_cap, &ids))
		return "table's shape";
	if (reply->device_ids_offset % sizeof(uint32_t) || reply->device_ids_offset < rows ||
		reply->device_ids_offset > reply->device_table_size ||
		ids > reply->device_table_size - reply->device_ids_offset)
		return "table's offsets";
	if (reply->device_table_size % granularity || reply->device_table_size > INT64_MAX)
		return "table's size";
	if (reply->device_staging_size % granularity || reply->device_staging_size > INT64_MAX)
		return "staging area's size";
	if (sync % 64 || sync < slots * sizeof(uint32_t) || rows_offset % (uint64_t)sysconf(_SC_PAGESIZE) ||
		sync > rows_offset || sizeof(struct kvg_sync) + slots * sizeof(uint64_t) > rows_offset - sync)
		return "semaphores' offset";
	return reply->extent_size % granularity ? "extents' size" : NULL;
}

/* The semaphores in the head of the staging memfd, for streams. */
static CUresult register_head(struct kvg_client *client, uint64_t sync_offset)
{
	struct gpu *gpu = client->gpu;
	const struct kvg_cuda_driver *driver = gpu->cuda->driver;
	CUdeviceptr address = 0;
	CUresult result = driver->cuMemHostRegister(client->staging_map.base, client->staging_map.rows_offset,
		CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);

	if (result != CUDA_SUCCESS)
		return result;
	gpu->head = client->staging_map.base;
	gpu->sync = (struct kvg_sync *)(void *)(client->staging_map.base + sync_offset);
	result = driver->cuMemHostGetDevicePointer(&address, gpu->sync, 0);
	gpu->sync_address = address;
	return result;
}

/* Words of the library's own: gates in pinned memory, counters on the device. */
static CUresult make_words(struct gpu *gpu)
{
	const struct kvg_cuda_driver *driver = gpu->cuda->driver;
	CUdeviceptr address = 0, appended = 0;
	void *gates = NULL;
	CUresult result = driver->cuMemHostAlloc(
		&gates, gpu->slot_count * sizeof(*gpu->gates), CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);

	if (result != CUDA_SUCCESS)
		return result;
	memset(gates, 0, gpu->slot_count * sizeof(*gpu->gates));
	gpu->gates = gates;
	result = driver->cuMemHostGetDevicePointer(&address, gates, 0);
	gpu->gates_address = address;
	if (result == CUDA_SUCCESS)
		result = driver->cuMemAlloc(&appended, gpu->slot_count * sizeof(uint32_t));
	if (result != CUDA_SUCCESS)
		return result;
	gpu->appended = appended;
	return driver->cuMemsetD32Async(appended, 0, gpu->slot_count, gpu->stream);
}

static CUresult map_device(const struct gpu *gpu, struct gpu_map *map, uint64_t size, int fd, bool writable)
{
	const struct kvg_cuda_driver *driver = gpu->cuda->driver;
	CUdeviceptr address = 0;
	CUresult result;

	if (!size)
		return CUDA_SUCCESS;
	result = driver->cuMemAddressReserve(&address, size, 0, 0, 0);
	if (result != CUDA_SUCCESS)
		return result;
	*map = (struct gpu_map){.address = address, .size = size};
	result = cuda_map(gpu->cuda, address, size, fd, writable);
	map->mapped = result == CUDA_SUCCESS;
	return result;
}

/* Broken at any step: what is there already goes with kvg_close(). */
static int step(struct kvg_client *client, CUresult result, const char *what)
{
	if (result == CUDA_SUCCESS)
		return 0;
	return client_break(
		client, kvg_cuda_errno(result), "%s: %s", what, kvg_cuda_error(client->gpu->cuda->driver, result));
}

static int map_all(struct kvg_client *client, const Kvg__Registered *reply, const int *fds)
{
	struct gpu *gpu = client->gpu;
	int r;

	CUDA_SCOPE(gpu->cuda);
	r = step(client, scope.result, "the GPU's context");
	if (r == 0)
		r = step(client, register_head(client, reply->sync_offset), "the semaphores");
	if (r == 0)
		r = step(client, make_words(gpu), "the counters of appended tokens");
	if (r == 0)
		r = step(client, map_device(gpu, &gpu->table, reply->device_table_size, fds[2], false),
			"the device's table");
	if (r == 0 && reply->device_staging_size)
		r = step(client, map_device(gpu, &gpu->rows, reply->device_staging_size, fds[3], true),
			"the device's staging area");
	if (r == 0)
		gpu->attention_status = kvg_cuda_attention_new(gpu->cuda, &gpu->attention);
	return r;
}

int gpu_register(struct kvg_client *client, const struct model *model, const Kvg__Registered *reply, const int *fds)
{
	const char *what = check_registered(client, model, reply);
	struct gpu *gpu = client->gpu;
	int r;

	if (what)
		return client_break(client, -EPROTO, "daemon: the device's memory: the %s cannot be right", what);
	gpu->slots = calloc(model->max_sequences, sizeof(*gpu->slots));
	if (!gpu->slots)
		return client_break(client, -ENOMEM, "no memory for %u sequences", model->max_sequences);
	gpu->slot_count = model->max_sequences;
	gpu->ids_offset = reply->device_ids_offset;
	r = map_all(client, reply, fds);
	if (r == 0 && staging_init(&gpu->staging, gpu->rows.size, client->ring.capacity) < 0)
		r = client_break(client, -ENOMEM, "no memory for %u pieces", client->ring.capacity);
	if (r == 0) {
		r = start_thread(client);
		if (r < 0)
			r = client_break(client, r, "the library's thread: %s", strerror(-r));
	}
	return r;
}

int gpu_reserve_arena(struct kvg_client *client, uint32_t slots, uint64_t extent_size)
{
	return arena_init(&client->arena, &arena_cuda, client->gpu->cuda, slots, extent_size);
}

/* ---- the end ---- */

/* The client is closed: nothing but this is left to do. */
static void *release_again(void *user)
{
	const struct timespec pause = {.tv_nsec = LOOK_NS_MAX};
	struct gpu *gpu = user;

	while (!atomic_load(&gpu->stop)) {
		gpu_release_waits(gpu);
		(void)nanosleep(&pause, NULL);
	}
	return NULL;
}

/*
 * Waits for what still runs, in whatever stream it is. Waits are released again and again meanwhile: the daemon's
 * stream may set a counter back, and a wait may be looked at for the first time after that.
 */
static void synchronize(struct kvg_client *client)
{
	struct gpu *gpu = client->gpu;

	gpu_release_waits(gpu);
	atomic_store(&gpu->stop, false);
	(void)spawn(gpu, release_again, gpu);
	(void)gpu->cuda->driver->cuCtxSynchronize();
	gpu_stop(client);
}

static void unmap_device(const struct gpu *gpu, const struct gpu_map *map)
{
	if (map->mapped)
		(void)gpu->cuda->driver->cuMemUnmap(map->address, map->size);
	if (map->address)
		(void)gpu->cuda->driver->cuMemAddressFree(map->address, map->size);
}

static void free_scratch(const struct gpu *gpu, const struct gpu_scratch *scratch)
{
	struct gpu_old *old = scratch->old;

	while (old) {
		struct gpu_old *next = old->next;

		(void)gpu->cuda->driver->cuMemFree(old->address);
		free(old);
		old = next;
	}
	if (scratch->address)
		(void)gpu->cuda->driver->cuMemFree(scratch->address);
}

static void free_all(struct kvg_client *client)
{
	struct gpu *gpu = client->gpu;
	const struct kvg_cuda_driver *driver = gpu->cuda->driver;

	CUDA_SCOPE(gpu->cuda);
	synchronize(client); /* what still runs may use it all */
	arena_deinit(&client->arena);
	unmap_device(gpu, &gpu->table);
	unmap_device(gpu, &gpu->rows);
	free_scratch(gpu, &gpu->plan);
	free_scratch(gpu, &gpu->scratch);
	if (gpu->appended)
		(void)driver->cuMemFree(gpu->appended);
	if (gpu->gates)
		(void)driver->cuMemFreeHost(gpu->gates);
	if (gpu->head)
		(void)driver->cuMemHostUnregister(gpu->head);
	(void)kvg_cuda_attention_free(gpu->attention);
}

void gpu_close(struct kvg_client *client)
{
	struct gpu *gpu = client->gpu;

	free_all(client);
	staging_deinit(&gpu->staging);
	if (gpu->kick >= 0)
		(void)close(gpu->kick);
	(void)pthread_mutex_destroy(&gpu->lock);
	(void)kvg_cuda_close(gpu->cuda);
	free(gpu->slots);
	free(gpu);
	client->gpu = NULL;
}

static void forget_scratch(struct gpu_scratch *scratch)
{
	while (scratch->old) {
		struct gpu_old *old = scratch->old;

		scratch->old = old->next;
		free(old);
	}
}

/* What the driver has made is of no use here, and freeing it would call the driver: it goes when the process ends. */
void gpu_abandon(struct kvg_client *client)
{
	struct gpu *gpu = client->gpu;

	if (!gpu)
		return;
	forget_scratch(&gpu->plan);
	forget_scratch(&gpu->scratch);
	staging_deinit(&gpu->staging);
	if (gpu->kick >= 0)
		(void)close(gpu->kick);
	free(gpu->slots);
	free(gpu);
	client->gpu = NULL;
}
