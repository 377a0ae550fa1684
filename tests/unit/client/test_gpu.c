/*
 * The library's side of the kind cuda over a driver of our own, whose device is host memory: addresses are the
 * process's, copies and writes of a stream happen at once, and waits are noted. What real streams do is for
 * tests/gpu.
 */
#include "tests/support/runner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client/client.h"
#include "kernels/cuda/device.h"
#include "tests/unit/client/peer.h"

static const struct kvg_policy policy = {.ratio = 0.5, .mode = KVG_MODE_CHUNKED};

/* ---- the driver ---- */

enum { WAITS = 16 };

static struct {
	CUcontext current;
	unsigned mapped, allocated, registered, pushed;
	bool capturing, fail_map;
	uint64_t *lowered;     /* while the context is waited for */
	CUresult synchronized; /* then */
	struct {
		CUstream stream;
		const uint64_t *word;
		uint64_t value;
	} waits[WAITS];
	unsigned wait_count;
	uint8_t buffer[4096]; /* an allocation of the worker's */
} fake;

static CUresult fake_error_name(CUresult result, const char **ret)
{
	*ret = result == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
	return CUDA_SUCCESS;
}

static CUresult fake_get_current(CUcontext *ret)
{
	*ret = NULL;
	return CUDA_SUCCESS;
}

static CUresult fake_push(CUcontext context)
{
	(void)context;
	__atomic_fetch_add(&fake.pushed, 1, __ATOMIC_RELAXED);
	return CUDA_SUCCESS;
}

static CUresult fake_pop(CUcontext *ret)
{
	*ret = NULL;
	__atomic_fetch_sub(&fake.pushed, 1, __ATOMIC_RELAXED);
	return CUDA_SUCCESS;
}

static CUresult fake_synchronize(void)
{
	uint64_t *word = fake.lowered;

	if (!word)
		return CUDA_SUCCESS;
	__atomic_store_n(word, 7, __ATOMIC_RELEASE);
	for (unsigned i = 0; i < 5000 && __atomic_load_n(word, __ATOMIC_ACQUIRE) == 7; i++)
		(void)usleep(1000);
	fake.synchronized = __atomic_load_n(word, __ATOMIC_ACQUIRE) == 7 ? CUDA_ERROR_LAUNCH_TIMEOUT : CUDA_SUCCESS;
	return fake.synchronized;
}

static CUresult fake_release_context(CUdevice device)
{
	(void)device;
	return CUDA_SUCCESS;
}

static CUresult fake_load(CUmodule *module, const void *image)
{
	(void)module;
	(void)image;
	return CUDA_ERROR_NO_BINARY_FOR_GPU;
}

static CUresult fake_register(void *at, size_t size, unsigned flags)
{
	(void)at;
	assert_int_equal(size, PEER_CUDA_OFFSET);
	assert_int_equal(flags, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
	fake.registered++;
	return CUDA_SUCCESS;
}

static CUresult fake_unregister(void *at)
{
	(void)at;
	fake.registered--;
	return CUDA_SUCCESS;
}

static CUresult fake_device_pointer(CUdeviceptr *ret, void *at, unsigned flags)
{
	(void)flags;
	*ret = (uintptr_t)at;
	return CUDA_SUCCESS;
}

static CUresult fake_host_alloc(void **ret, size_t size, unsigned flags)
{
	(void)flags;
	*ret = malloc(size);
	fake.allocated++;
	return *ret ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

static CUresult fake_host_free(void *at)
{
	free(at);
	fake.allocated--;
	return CUDA_SUCCESS;
}

static CUresult fake_alloc(CUdeviceptr *ret, size_t size)
{
	void *at = NULL;
	CUresult result = fake_host_alloc(&at, size, 0);

	*ret = (uintptr_t)at;
	return result;
}

static CUresult fake_free(CUdeviceptr at)
{
	return fake_host_free((void *)(uintptr_t)at);
}

static CUresult fake_set(CUdeviceptr at, unsigned value, size_t count, CUstream stream)
{
	(void)stream;
	for (size_t i = 0; i < count; i++)
		((uint32_t *)(uintptr_t)at)[i] = value;
	return CUDA_SUCCESS;
}

static CUresult fake_copy(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream)
{
	(void)stream;
	memcpy((void *)(uintptr_t)to, (const void *)(uintptr_t)from, size);
	return CUDA_SUCCESS;
}

static CUresult fake_reserve(
	CUdeviceptr *ret, size_t size, size_t alignment, CUdeviceptr hint, unsigned long long flags)
{
	void *at = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	(void)alignment;
	(void)hint;
	(void)flags;
	*ret = (uintptr_t)at;
	return at == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

static CUresult fake_unreserve(CUdeviceptr at, size_t size)
{
	return munmap((void *)(uintptr_t)at, size) < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult fake_import(CUmemGenericAllocationHandle *ret, void *handle, CUmemAllocationHandleType type)
{
	(void)type;
	*ret = (CUmemGenericAllocationHandle)dup((int)(intptr_t)handle);
	return CUDA_SUCCESS;
}

static CUresult fake_release(CUmemGenericAllocationHandle handle)
{
	assert_int_equal(close((int)handle), 0);
	return CUDA_SUCCESS;
}

static CUresult fake_map(
	CUdeviceptr at, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags)
{
	(void)flags;
	if (fake.fail_map)
		return CUDA_ERROR_OUT_OF_MEMORY;
	if (mmap((void *)(uintptr_t)at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, (int)handle,
		    (off_t)offset) == MAP_FAILED)
		return CUDA_ERROR_INVALID_VALUE;
	__atomic_fetch_add(&fake.mapped, 1, __ATOMIC_RELAXED);
	return CUDA_SUCCESS;
}

static CUresult fake_unmap(CUdeviceptr at, size_t size)
{
	void *place = mmap(
		(void *)(uintptr_t)at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);

	__atomic_fetch_sub(&fake.mapped, 1, __ATOMIC_RELAXED);
	return place == MAP_FAILED ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult fake_access(CUdeviceptr at, size_t size, const CUmemAccessDesc *access, size_t count)
{
	(void)at;
	(void)size;
	(void)count;
	/* As drivers that know no memory that can only be read. */
	return access->flags == CU_MEM_ACCESS_FLAGS_PROT_READ ? CUDA_ERROR_NOT_SUPPORTED : CUDA_SUCCESS;
}

static CUresult fake_capturing(CUstream stream, CUstreamCaptureStatus *ret)
{
	(void)stream;
	*ret = fake.capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
	return CUDA_SUCCESS;
}

static CUresult fake_write(CUstream stream, CUdeviceptr at, cuuint64_t value, unsigned flags)
{
	(void)stream;
	(void)flags;
	__atomic_store_n((uint64_t *)(uintptr_t)at, value, __ATOMIC_RELEASE);
	return CUDA_SUCCESS;
}

static CUresult fake_wait(CUstream stream, CUdeviceptr at, cuuint64_t value, unsigned flags)
{
	unsigned i = fake.wait_count++ % WAITS;

	assert_int_equal(flags, CU_STREAM_WAIT_VALUE_GEQ);
	fake.waits[i].stream = stream;
	fake.waits[i].word = (const uint64_t *)(uintptr_t)at;
	fake.waits[i].value = value;
	return CUDA_SUCCESS;
}

static CUresult fake_range(CUdeviceptr *ret_base, size_t *ret_size, CUdeviceptr at)
{
	if (at - (uintptr_t)fake.buffer >= sizeof(fake.buffer))
		return CUDA_ERROR_INVALID_VALUE;
	*ret_base = (uintptr_t)fake.buffer;
	*ret_size = sizeof(fake.buffer);
	return CUDA_SUCCESS;
}

static CUresult fake_ipc(CUipcMemHandle *ret, CUdeviceptr at)
{
	(void)at;
	memset(ret, 7, sizeof(*ret));
	return CUDA_SUCCESS;
}

static CUresult fake_ipc_event(CUipcEventHandle *ret, CUevent event)
{
	(void)event;
	memset(ret, 8, sizeof(*ret));
	return CUDA_SUCCESS;
}

static struct kvg_cuda *fake_device(void)
{
	static const struct kvg_cuda_driver driver = {.cuGetErrorName = fake_error_name,
		.cuCtxGetCurrent = fake_get_current,
		.cuCtxPushCurrent = fake_push,
		.cuCtxPopCurrent = fake_pop,
		.cuCtxSynchronize = fake_synchronize,
		.cuDevicePrimaryCtxRelease = fake_release_context,
		.cuModuleLoadData = fake_load,
		.cuMemHostRegister = fake_register,
		.cuMemHostUnregister = fake_unregister,
		.cuMemHostGetDevicePointer = fake_device_pointer,
		.cuMemHostAlloc = fake_host_alloc,
		.cuMemFreeHost = fake_host_free,
		.cuMemAlloc = fake_alloc,
		.cuMemFree = fake_free,
		.cuMemsetD32Async = fake_set,
		.cuMemcpyAsync = fake_copy,
		.cuMemAddressReserve = fake_reserve,
		.cuMemAddressFree = fake_unreserve,
		.cuMemImportFromShareableHandle = fake_import,
		.cuMemRelease = fake_release,
		.cuMemMap = fake_map,
		.cuMemUnmap = fake_unmap,
		.cuMemSetAccess = fake_access,
		.cuMemGetAddressRange = fake_range,
		.cuIpcGetMemHandle = fake_ipc,
		.cuIpcGetEventHandle = fake_ipc_event,
		.cuStreamIsCapturing = fake_capturing,
		.cuStreamWriteValue64 = fake_write,
		.cuStreamWaitValue64 = fake_wait};
	struct kvg_cuda *cuda = calloc(1, sizeof(*cuda));

	assert_non_null(cuda);
	cuda->driver = malloc(sizeof(driver));
	assert_non_null(cuda->driver);
	memcpy(cuda->driver, &driver, sizeof(driver));
	cuda->context = (CUcontext)(uintptr_t)1;
	cuda->granularity = 4096;
	cuda->capability = 90;
	return cuda;
}

/* ---- a client of that kind ---- */

static struct kvg_client *hello(struct peer *peer)
{
	struct kvg_client *client;

	memset(&fake, 0, sizeof(fake));
	peer->cuda = true;
	client = peer_hello(peer, 50);
	assert_int_equal(gpu_new(client, fake_device()), 0);
	return client;
}

static struct kvg_client *connect_cuda(struct peer *peer)
{
	struct kvg_layout layout = peer_layout();
	struct kvg_client *client;

	peer->device_rows = PEER_CUDA_ROWS;
	client = hello(peer);
	assert_int_equal(kvg_register(client, &layout, PEER_STAGING_ROWS), 0);
	return client;
}

/* Nothing is left of what was opened. */
static void end(struct peer *peer, struct kvg_client *client)
{
	(void)kvg_close(client);
	assert_int_equal(fake.mapped, 0);
	assert_int_equal(fake.allocated, 0);
	assert_int_equal(fake.registered, 0);
	assert_int_equal(fake.pushed, 0);
	peer_stop(peer);
	peer_free(peer);
}

/* ---- tests ---- */

static void maps_what_the_daemon_gives(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = connect_cuda(peer);
	struct kvg_view view;
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_kind(client), KVG_KIND_CUDA);
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal((uintptr_t)view.ids - (uintptr_t)view.base_len, PEER_CUDA_IDS);
	assert_ptr_equal(view.slots, client->table.slots);
	assert_int_equal(view.appended[3], 0);
	assert_int_equal(fake.mapped, 2);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(fake.mapped, 7);
	view.k_base[0] = 1; /* it is there */
	assert_int_equal(kvg_commit(client, seq, 40), 0);
	assert_int_equal(view.appended[0], 40);
	assert_int_equal(kvg_truncate(client, seq, 30), 0);
	assert_int_equal(view.appended[0], 30);
	assert_int_equal(kvg_evict(client, seq, KVG_EVICT_PREFILL, NULL), 0);
	assert_int_equal(view.appended[0], 0);
	assert_int_equal(fake.mapped, 6);
	assert_int_equal(kvg_append(client, seq, 0, 0, 30, 1, NULL, 8, NULL, 8), -EOPNOTSUPP);
	assert_int_equal(kvg_attend(client, seq, 0, 0, 0, 1, 1.0f, NULL, 8, NULL, 8), -EOPNOTSUPP);
	/* This device has none of the kernels. */
	assert_int_equal(kvg_cuda_advance(client, NULL, 1, 1), -EOPNOTSUPP);
	assert_non_null(strstr(kvg_error(client), "kvg_cuda_advance: its kernels do not run on this GPU"));
	end(peer, client);
}

static void asks_for_staging_on_the_device(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = hello(peer);
	struct kvg_layout layout = peer_layout();

	(void)state;
	/* And lives without, when the daemon has none. */
	assert_int_equal(kvg_register(client, &layout, 64ull << 20), 0);
	assert_null(kvg_stage_device_buffer(client, 64));
	assert_non_null(strstr(kvg_error(client), "staging area of 0 bytes cannot take 64"));
	(void)kvg_close(client);
	peer_stop(peer);
	assert_int_equal(peer->asked_staging, 32ull << 20);
	assert_int_equal(peer->asked_device_staging, 64ull << 20);
	peer_free(peer);
}

/* ---- wrong registrations ---- */

static int wrong;

static bool tamper_registered(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	(void)peer;
	if (reply->body_case != KVG__WORKER_REPLY__BODY_REGISTERED)
		return true;
	switch (wrong) {
	case 0:
		*fd_count = 3;
		break;
	case 1:
		*fd_count = 2;
		break;
	case 2:
		reply->registered->device_staging_size = 0;
		break;
	case 3:
		reply->registered->sync_offset = 8;
		break;
	case 4:
		reply->registered->sync_offset = 4096 - 64;
		break;
	case 5:
		reply->registered->sync_offset = UINT64_MAX - 63;
		break;
	case 6:
		reply->registered->device_ids_offset = PEER_CUDA_TABLE - 64;
		break;
	case 7:
		reply->registered->device_ids_offset = 16;
		break;
	case 8:
		reply->registered->device_table_size = 4000;
		break;
	case 9:
		reply->registered->device_staging_size += 64;
		break;
	default:
		reply->registered->staging_rows_offset = 1024;
		break;
	}
	return true;
}

static void refuses_a_wrong_registration(void **state)
{
	static const char *const says[] = {"with 3 descriptors, not", "with 2 descriptors, not",
		"with 4 descriptors, not", "the semaphores' offset cannot be right",
		"the semaphores' offset cannot be right", "the semaphores' offset cannot be right",
		"the table's offsets cannot be right", "the table's offsets cannot be right",
		"the table's size cannot be right", "the staging area's size cannot be right",
		"the semaphores' offset cannot be right"};

	(void)state;
	for (wrong = 0; wrong < (int)(sizeof(says) / sizeof(*says)); wrong++) {
		struct peer *peer = peer_new();
		struct kvg_layout layout = peer_layout();
		struct kvg_client *client;

		peer->tamper_reply = tamper_registered;
		peer->device_rows = PEER_CUDA_ROWS;
		client = hello(peer);
		assert_int_equal(kvg_register(client, &layout, 1024), -EPROTO);
		if (!strstr(kvg_error(client), says[wrong]))
			fail_msg("%d: '%s' does not say '%s'", wrong, kvg_error(client), says[wrong]);
		end(peer, client);
	}
}

static void says_what_the_driver_says(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_layout layout = peer_layout();
	uint64_t seq;

	(void)state;
	peer->device_rows = PEER_CUDA_ROWS;
	client = hello(peer);
	fake.fail_map = true;
	assert_int_equal(kvg_register(client, &layout, 1024), -ENOMEM);
	assert_string_equal(kvg_error(client), "the device's table: CUDA_ERROR_OUT_OF_MEMORY");
	end(peer, client);
	peer = peer_new();
	client = connect_cuda(peer);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	fake.fail_map = true;
	assert_int_equal(kvg_reserve(client, seq, 8), -ENOMEM);
	assert_string_equal(kvg_error(client), "extent for slot 0 of 20 cannot be mapped: CUDA_ERROR_OUT_OF_MEMORY");
	/* No stream waits for a daemon that will not answer. */
	assert_int_equal(client->gpu->sync->slots[0], INT64_MAX);
	end(peer, client);
}

/* The worker's timeline goes with entries that read what its stream wrote; the slot's value with those that end in
 * the daemon's. */
static void orders_entries(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = connect_cuda(peer);
	const struct kvg_sync *sync = client->gpu->sync;
	uint8_t *rows;
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_stream_wait(client, seq), 0);
	assert_int_equal(fake.wait_count, 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_commit(client, seq, 40), 0);
	rows = kvg_stage_device_buffer(client, PEER_HIDDEN * 2 * 40);
	assert_non_null(rows);
	memset(rows, 1, PEER_HIDDEN * 2 * 40);
	assert_int_equal(kvg_stage_device(client, seq, KVG_STAGE_HIDDEN, 1, 1, 0, 40, rows, 0), 0);
	assert_int_equal(sync->worker, 1);
	assert_int_equal(kvg_stage_wait(client), 0);
	assert_int_equal(client->gpu->staging.count, 0);
	assert_int_equal(kvg_stream_wait(client, seq), 0);
	assert_int_equal(fake.wait_count, 1);
	assert_ptr_equal(fake.waits[0].word, &sync->slots[0]);
	assert_int_equal(fake.waits[0].value, 2);
	assert_int_equal(sync->slots[0], 2);
	assert_int_equal(kvg_evict(client, seq, KVG_EVICT_PREFILL, NULL), 0);
	assert_int_equal(kvg_free(client, seq), 0);
	assert_int_equal(sync->worker, 3);
	end(peer, client);
}

static void gives_values_by_operation(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = connect_cuda(peer);
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_commit(client, seq, 40), 0);
	assert_int_equal(kvg_truncate(client, seq, 32), 0);
	assert_int_equal(kvg_evict(client, seq, KVG_EVICT_PREFILL, NULL), 0);
	assert_int_equal(kvg_free(client, seq), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	assert_int_equal(peer_last(peer, KVG_OP_RESERVE).wait_value, 0);
	assert_int_equal(peer_last(peer, KVG_OP_RESERVE).signal_value, 1);
	assert_int_equal(peer_last(peer, KVG_OP_TRUNCATE).wait_value, 1);
	assert_int_equal(peer_last(peer, KVG_OP_TRUNCATE).signal_value, 0);
	assert_int_equal(peer_last(peer, KVG_OP_EVICT).wait_value, 2);
	assert_int_equal(peer_last(peer, KVG_OP_EVICT).signal_value, 2);
	assert_int_equal(peer_last(peer, KVG_OP_FREE).wait_value, 3);
	assert_int_equal(peer_last(peer, KVG_OP_COMMIT).wait_value, 0);
	peer_free(peer);
}

static void takes_rows_where_the_daemon_can_read(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = connect_cuda(peer);
	uint32_t buffer = 0, event = 0;
	uint8_t *area, stray[64];
	uint64_t seq;

	(void)state;
	area = (uint8_t *)(uintptr_t)client->gpu->rows.address;
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_stage_device(client, seq, KVG_STAGE_HIDDEN, 0, 1, 0, 1, stray, 0), -EINVAL);
	assert_non_null(strstr(kvg_error(client), "stage: 64 bytes at 0x"));
	/* The last row that fits, and the first that does not; layers count too. */
	assert_int_equal(kvg_stage_device(client, seq, KVG_STAGE_HIDDEN, 0, 1, 0, 1, area + PEER_CUDA_ROWS - 64, 0), 0);
	assert_int_equal(
		kvg_stage_device(client, seq, KVG_STAGE_HIDDEN, 0, 1, 0, 1, area + PEER_CUDA_ROWS - 63, 0), -EINVAL);
	assert_int_equal(kvg_stage_device(client, seq, KVG_STAGE_HIDDEN, 0, 2, 0, 1, area, PEER_CUDA_ROWS), -EINVAL);
	assert_int_equal(kvg_stage_device(client, seq, KVG_STAGE_HIDDEN, 0, 2, 0, 1, area, PEER_CUDA_ROWS - 64), 0);
	assert_int_equal(kvg_stage_device(client, seq, KVG_STAGE_HIDDEN, 0, 2, 0, 1, area, UINT64_MAX), -EINVAL);
	assert_int_equal(kvg_stage_device(client, seq, KVG_STAGE_HIDDEN, 1, 2, 0, 1, area, 0), -EINVAL);
	assert_int_equal(kvg_stage_device(client, seq, KVG_STAGE_HIDDEN, 0, 1, 0, 0, area, 0), -EINVAL);
	assert_int_equal(kvg_import_buffer(client, fake.buffer + 64, sizeof(fake.buffer), &buffer), -EINVAL);
	assert_int_equal(kvg_import_buffer(client, stray, 1, &buffer), -EINVAL);
	assert_int_equal(buffer, 0);
	assert_int_equal(kvg_import_buffer(client, fake.buffer + 64, 256, &buffer), 0);
	assert_int_equal(buffer, 2);
	assert_int_equal(kvg_import_event(client, NULL, &event), 0);
	assert_int_equal(event, 3);
	assert_int_equal(kvg_stage_device(client, seq, KVG_STAGE_PREACT, 0, 1, 5, 3, fake.buffer + 64 + 16, 0), 0);
	assert_int_equal(kvg_stage_wait(client), 0);
	assert_int_equal(kvg_release(client, buffer), 0);
	assert_int_equal(kvg_stage_device(client, seq, KVG_STAGE_PREACT, 0, 1, 5, 3, fake.buffer + 80, 0), -EINVAL);
	(void)kvg_close(client);
	peer_stop(peer);
	assert_int_equal(peer->import_offset, 64);
	assert_int_equal(peer->import_size, 256);
	assert_int_equal(peer->released, 2);
	assert_int_equal(peer_last(peer, KVG_OP_STAGE).stage.buffer, 2);
	assert_int_equal(peer_last(peer, KVG_OP_STAGE).stage.offset, 16);
	assert_int_equal(peer_last(peer, KVG_OP_STAGE).stage.kind, KVG_STAGE_PREACT);
	peer_free(peer);
}

static bool hold_evictions(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	(void)cqe;
	return sqe->op != KVG_OP_EVICT;
}

/* The gate of an eviction opens without a call of the caller's: the library's thread takes the completion. */
static void opens_gates_by_itself(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_evict_result result;
	const uint64_t *gate;
	uint32_t *appended;
	uint64_t seq;

	(void)state;
	peer->tamper = hold_evictions;
	client = connect_cuda(peer);
	appended = (uint32_t *)(uintptr_t)client->gpu->appended;
	gate = &client->gpu->gates[0].opened;
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_commit(client, seq, 40), 0);
	appended[0] = 43; /* as kernels count ahead */
	assert_int_equal(kvg_evict_async(client, seq, KVG_EVICT_PREFILL), 0);
	assert_int_equal(fake.wait_count, 1);
	assert_ptr_equal(fake.waits[0].word, gate);
	assert_int_equal(fake.waits[0].value, 1);
	/* Kept for the case that nothing is evicted. */
	assert_int_equal(client->gpu->gates[0].appended, 43);
	assert_int_equal(__atomic_load_n(gate, __ATOMIC_ACQUIRE), 0);
	assert_int_equal(kvg_commit(client, seq, 0), -EBUSY);
	peer_release(peer);
	for (unsigned i = 0; i < 5000 && !__atomic_load_n(gate, __ATOMIC_ACQUIRE); i++)
		(void)usleep(1000);
	assert_int_equal(__atomic_load_n(gate, __ATOMIC_ACQUIRE), 1);
	assert_int_equal(client->gpu->gates[0].appended, 0);
	assert_int_equal(kvg_stream_wait(client, seq), 0);
	assert_int_equal(fake.wait_count, 3);
	assert_ptr_equal(fake.waits[2].word, gate);
	assert_int_equal(kvg_evict_finish(client, seq, &result), 0);
	assert_int_equal(result.pairs_held, 20 * 4);
	assert_int_equal(atomic_load(&client->gpu->gates_closed), 0);
	end(peer, client);
}

/* The caller may be in the middle of waiting for its stream. */
static void releases_streams_when_the_daemon_goes(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = connect_cuda(peer);
	const uint64_t *word = &client->gpu->sync->slots[PEER_SEQUENCES - 1];
	const uint64_t *gate = &client->gpu->gates[0].opened;

	(void)state;
	peer_stop(peer);
	for (unsigned i = 0; i < 5000 && __atomic_load_n(word, __ATOMIC_ACQUIRE) != INT64_MAX; i++)
		(void)usleep(1000);
	assert_int_equal(__atomic_load_n(word, __ATOMIC_ACQUIRE), INT64_MAX);
	assert_int_equal(__atomic_load_n(gate, __ATOMIC_ACQUIRE), INT64_MAX);
	assert_int_equal(kvg_nop(client), -EPIPE);
	(void)kvg_close(client);
	peer_free(peer);
}

static void follows_the_stream(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = connect_cuda(peer);
	CUstream stream = (CUstream)(uintptr_t)64;
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_set_stream(client, stream), 0);
	assert_int_equal(fake.wait_count, 1);
	assert_ptr_equal(fake.waits[0].stream, stream);
	assert_ptr_equal(fake.waits[0].word, &client->gpu->sync->worker);
	assert_int_equal(fake.waits[0].value, 1);
	assert_int_equal(kvg_set_stream(client, stream), 0);
	assert_int_equal(fake.wait_count, 1);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	/* A graph must not remember values. */
	fake.capturing = true;
	assert_int_equal(kvg_set_stream(client, NULL), -EBUSY);
	assert_int_equal(kvg_stream_wait(client, seq), -EBUSY);
	assert_int_equal(kvg_evict_async(client, seq, KVG_EVICT_PREFILL), -EBUSY);
	assert_int_equal(kvg_free(client, seq), -EBUSY);
	assert_string_equal(kvg_error(client), "entry: the client's stream is being captured into a graph");
	fake.capturing = false;
	assert_int_equal(kvg_free(client, seq), 0);
	end(peer, client);
}

/* The daemon's last write may come when everything has been released already. */
static void releases_streams_until_they_end(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = connect_cuda(peer);

	(void)state;
	fake.lowered = &client->gpu->sync->slots[PEER_SEQUENCES - 1];
	fake.synchronized = CUDA_ERROR_UNKNOWN;
	end(peer, client);
	assert_int_equal(fake.synchronized, CUDA_SUCCESS);
}

static void is_abandoned_without_the_driver(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = connect_cuda(peer);
	uint64_t seq;
	pid_t child;

	(void)state;
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 20), 0);
	child = fork();
	if (child == 0) {
		/* Any call would be a fault. */
		memset(client->gpu->cuda->driver, 0, sizeof(*client->gpu->cuda->driver));
		peer_child(client, 3);
	}
	assert_true(peer_child_ended(child));
	assert_int_equal(kvg_free(client, seq), 0);
	end(peer, client);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(maps_what_the_daemon_gives),
		cmocka_unit_test(asks_for_staging_on_the_device),
		cmocka_unit_test(refuses_a_wrong_registration),
		cmocka_unit_test(says_what_the_driver_says),
		cmocka_unit_test(orders_entries),
		cmocka_unit_test(gives_values_by_operation),
		cmocka_unit_test(takes_rows_where_the_daemon_can_read),
		cmocka_unit_test(opens_gates_by_itself),
		cmocka_unit_test(releases_streams_when_the_daemon_goes),
		cmocka_unit_test(follows_the_stream),
		cmocka_unit_test(releases_streams_until_they_end),
		cmocka_unit_test(is_abandoned_without_the_driver),
	};

	return runner_run("gpu", tests, sizeof(tests) / sizeof(*tests));
}
