#include "daemon/memory/cuda.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/base/list.h"
#include "daemon/base/log.h"
#include "daemon/base/pages.h"
#include "daemon/loop/loop.h"
#include "daemon/memory/nvml.h"

#define QUERY_NS    1000000u              /* between questions to the driver about scrubs that are not done */
#define ERROR_CODES 1000u                 /* CUDA_ERROR_UNKNOWN is the last */
#define LOG_NS      UINT64_C(60000000000) /* between two lines about the same error */

struct kind_cuda {
	struct kind kind;
	struct kvg_cuda *cuda;
	CUstream stream;    /* of scrub() and scrub_begin() */
	uint64_t *scrubbed; /* pinned: raised by the stream behind each scrub_begin() */
	int64_t scrubs;
	uint64_t asked_ns; /* when the driver was asked about them */
	CUmemAllocationProp prop;
	struct kind_device about;
	struct nvml *nvml;        /* or NULL */
	_Atomic(CUresult) failed; /* the first error that lost the device */
	_Atomic(const char *) failed_what;
	_Atomic uint64_t logged_ns[ERROR_CODES]; /* when others were logged */
	int failure_fd;
};

static struct kind_cuda *of_kind(struct kind *kind)
{
	return list_entry(kind, struct kind_cuda, kind);
}

/* ---- errors ---- */

/*
 * What the driver says of a worker's event or handle may be the worker's doing, and "unknown" is also what it says of a
 * descriptor that is none. A device that is lost is so for every stream, also for the kind's own.
 */
static bool is_lost(const struct kind_cuda *self, CUresult result)
{
	const struct kvg_cuda_driver *driver = self->cuda->driver;

	if (!kvg_cuda_is_sticky(result))
		return false;
	return kvg_cuda_enter(self->cuda) != CUDA_SUCCESS || kvg_cuda_is_sticky(driver->cuStreamQuery(self->stream));
}

/* Each error once in a while, whatever others come between. */
static bool is_news(struct kind_cuda *self, CUresult result)
{
	_Atomic uint64_t *logged = &self->logged_ns[(unsigned)result < ERROR_CODES ? result : ERROR_CODES - 1];
	uint64_t now = loop_now(), before = atomic_load(logged);

	return (!before || now - before >= LOG_NS) && atomic_compare_exchange_strong(logged, &before, now);
}

void kind_cuda_check(struct kind *kind, CUresult result, const char *what)
{
	struct kind_cuda *self = of_kind(kind);
	CUresult none = CUDA_SUCCESS;

	if (result == CUDA_SUCCESS || result == CUDA_ERROR_NOT_READY)
		return;
	if (!is_lost(self, result)) {
		if (is_news(self, result))
			log_warning("%s: %s: %s", self->about.name, what, kvg_cuda_error(self->cuda->driver, result));
	} else if (atomic_compare_exchange_strong(&self->failed, &none, result)) {
		atomic_store(&self->failed_what, what);
		log_error("%s: %s: %s: the device is lost", self->about.name, what,
			kvg_cuda_error(self->cuda->driver, result));
		(void)eventfd_write(self->failure_fd, 1);
	}
}

CUresult kind_cuda_failed(struct kind *kind)
{
	return atomic_load(&of_kind(kind)->failed);
}

static int cuda_failure_fd(struct kind *kind)
{
	return of_kind(kind)->failure_fd;
}

static const char *cuda_failure(struct kind *kind, char *text)
{
	struct kind_cuda *self = of_kind(kind);
	CUresult failed = atomic_load(&self->failed);
	const char *what = atomic_load(&self->failed_what);

	if (failed == CUDA_SUCCESS)
		return NULL;
	(void)snprintf(text, KIND_TEXT, "%s (%s)", kvg_cuda_error(self->cuda->driver, failed), what ? what : "?");
	return text;
}

/* ---- memory ---- */

static CUdeviceptr address(const void *at)
{
	return (CUdeviceptr)(uintptr_t)at;
}

/* The end of an operation. */
static int outcome(struct kind *kind, CUresult result, const char *what)
{
	kind_cuda_check(kind, result, what);
	return kvg_cuda_errno(result);
}

static int cuda_create(struct kind *kind, size_t size)
{
	struct kind_cuda *self = of_kind(kind);
	const struct kvg_cuda_driver *driver = self->cuda->driver;
	CUmemGenericAllocationHandle handle;
	CUresult result = kvg_cuda_enter(self->cuda);
	int fd = -1;

	if (result == CUDA_SUCCESS)
		result = driver->cuMemCreate(&handle, size, &self->prop, 0);
	if (result != CUDA_SUCCESS)
		return outcome(kind, result, "cuMemCreate");
	result = driver->cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
	(void)driver->cuMemRelease(handle);
	if (result != CUDA_SUCCESS)
		return outcome(kind, result, "cuMemExportToShareableHandle");
	(void)fcntl(fd, F_SETFD, FD_CLOEXEC);
	return fd;
}

static void *cuda_reserve(struct kind *kind, size_t size)
{
	struct kind_cuda *self = of_kind(kind);
	CUdeviceptr base = 0;
	CUresult result = kvg_cuda_enter(self->cuda);

	if (result == CUDA_SUCCESS)
		result = self->cuda->driver->cuMemAddressReserve(&base, size, 0, 0, 0);
	kind_cuda_check(kind, result, "cuMemAddressReserve");
	return result == CUDA_SUCCESS ? (void *)(uintptr_t)base : NULL;
}

static void cuda_unreserve(struct kind *kind, void *base, size_t size)
{
	struct kind_cuda *self = of_kind(kind);
	CUresult result;

	if (!base)
		return;
	result = kvg_cuda_enter(self->cuda);
	if (result == CUDA_SUCCESS)
		result = self->cuda->driver->cuMemAddressFree(address(base), size);
	kind_cuda_check(kind, result, "cuMemAddressFree");
}

static CUresult map_handle(struct kind_cuda *self, CUmemGenericAllocationHandle handle, void *at, size_t size)
{
	const struct kvg_cuda_driver *driver = self->cuda->driver;
	const CUmemAccessDesc access = {.location = self->prop.location, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
	CUresult result = driver->cuMemMap(address(at), size, 0, handle, 0);

	if (result != CUDA_SUCCESS)
		return result;
	result = driver->cuMemSetAccess(address(at), size, &access, 1);
	if (result != CUDA_SUCCESS)
		(void)driver->cuMemUnmap(address(at), size);
	return result;
}

static int cuda_map(struct kind *kind, int fd, void *at, size_t size)
{
	struct kind_cuda *self = of_kind(kind);
	const struct kvg_cuda_driver *driver = self->cuda->driver;
	CUmemGenericAllocationHandle handle;
	CUresult result = kvg_cuda_enter(self->cuda);

	if (fd < 0)
		return -EBADF;
	if (result == CUDA_SUCCESS)
		result = driver->cuMemImportFromShareableHandle(
			&handle, (void *)(uintptr_t)(unsigned)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
	if (result != CUDA_SUCCESS)
		return outcome(kind, result, "cuMemImportFromShareableHandle");
	result = map_handle(self, handle, at, size);
	(void)driver->cuMemRelease(handle);
	return outcome(kind, result, "cuMemMap");
}

static int cuda_unmap(struct kind *kind, void *at, size_t size)
{
	struct kind_cuda *self = of_kind(kind);
	CUresult result = kvg_cuda_enter(self->cuda);

	if (result == CUDA_SUCCESS)
		result = self->cuda->driver->cuMemUnmap(address(at), size);
	return outcome(kind, result, "cuMemUnmap");
}

/* The driver promises nothing of new memory's content, and it may have been another tenant's. */
static int cuda_scrub(struct kind *kind, void *at, size_t size)
{
	struct kind_cuda *self = of_kind(kind);
	const struct kvg_cuda_driver *driver = self->cuda->driver;
	CUresult result = kvg_cuda_enter(self->cuda);

	if (result == CUDA_SUCCESS)
		result = driver->cuMemsetD8Async(address(at), 0, size, self->stream);
	if (result == CUDA_SUCCESS)
		result = driver->cuStreamSynchronize(self->stream);
	return outcome(kind, result, "cuMemsetD8Async");
}

static int64_t cuda_scrub_begin(struct kind *kind, void *at, size_t size)
{
	struct kind_cuda *self = of_kind(kind);
	const struct kvg_cuda_driver *driver = self->cuda->driver;
	CUresult result = kvg_cuda_enter(self->cuda);

	if (result == CUDA_SUCCESS)
		result = driver->cuMemsetD8Async(address(at), 0, size, self->stream);
	if (result == CUDA_SUCCESS)
		result = driver->cuStreamWriteValue64(
			self->stream, address(self->scrubbed), (cuuint64_t)self->scrubs + 1, 0);
	if (result != CUDA_SUCCESS)
		return outcome(kind, result, "cuMemsetD8Async");
	self->asked_ns = loop_now();
	return ++self->scrubs;
}

static int cuda_scrub_poll(struct kind *kind, int64_t number)
{
	struct kind_cuda *self = of_kind(kind);
	uint64_t now;
	CUresult result;

	if (__atomic_load_n(self->scrubbed, __ATOMIC_ACQUIRE) >= (uint64_t)number)
		return 0;
	now = loop_now();
	if (now - self->asked_ns < QUERY_NS)
		return -EAGAIN;
	self->asked_ns = now;
	result = kvg_cuda_enter(self->cuda);
	if (result == CUDA_SUCCESS)
		result = self->cuda->driver->cuStreamQuery(self->stream);
	if (result == CUDA_SUCCESS || result == CUDA_ERROR_NOT_READY)
		return -EAGAIN;
	return outcome(kind, result, "cuMemsetD8Async");
}

static int cuda_destroy(struct kind *kind, int fd, size_t size)
{
	(void)kind;
	(void)size;
	(void)close(fd);
	return 0;
}

static uint64_t cuda_physical(struct kind *kind, int fd, size_t size)
{
	(void)kind;
	return fcntl(fd, F_GETFD) < 0 ? UINT64_MAX : size;
}

/* ---- memory of this process that the device reaches ---- */

static int cuda_pin(struct kind *kind, void *at, size_t size)
{
	const struct kind_cuda *self = of_kind(kind);
	CUresult result = kvg_cuda_enter(self->cuda);

	if (result == CUDA_SUCCESS)
		result = self->cuda->driver->cuMemHostRegister(
			at, size, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
	return outcome(kind, result, "cuMemHostRegister");
}

static void cuda_unpin(struct kind *kind, void *at, size_t size)
{
	const struct kind_cuda *self = of_kind(kind);

	(void)size;
	if (kvg_cuda_enter(self->cuda) == CUDA_SUCCESS)
		(void)self->cuda->driver->cuMemHostUnregister(at);
}

/* ---- the device ---- */

static struct kvg_cuda *cuda_device(struct kind *kind)
{
	return of_kind(kind)->cuda;
}

static const struct kind_device *cuda_about(struct kind *kind)
{
	return &of_kind(kind)->about;
}

static int cuda_usage(struct kind *kind, uint64_t *ret_bytes)
{
	struct kind_cuda *self = of_kind(kind);
	size_t available = 0, total = 0;
	CUresult result;

	result = kvg_cuda_enter(self->cuda);
	if (result == CUDA_SUCCESS)
		result = self->cuda->driver->cuStreamQuery(self->stream); /* says whether the context lives */
	if (result == CUDA_SUCCESS && self->nvml && nvml_used(self->nvml, ret_bytes) == 0)
		return 0;
	if (result == CUDA_SUCCESS)
		result = self->cuda->driver->cuMemGetInfo(&available, &total);
	if (result == CUDA_SUCCESS)
		*ret_bytes = total - available;
	return outcome(kind, result, "asking for the memory in use");
}

/* Whether somebody reads the pipe on which clients ask for the MPS server: for drivers that cannot be asked. */
static bool mps_pipe_lives(void)
{
	const char *directory = getenv("CUDA_MPS_PIPE_DIRECTORY");
	char path[512];
	struct stat st;
	int fd;

	(void)snprintf(path, sizeof(path), "%s/control", directory && *directory ? directory : "/tmp/nvidia-mps");
	if (stat(path, &st) < 0)
		return false;
	if (!S_ISFIFO(st.st_mode))
		return S_ISSOCK(st.st_mode);
	fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC); /* fails without a reader */
	if (fd >= 0)
		(void)close(fd);
	return fd >= 0;
}

static bool is_mps_client(const struct kvg_cuda *cuda)
{
	int mps = 0;

	if (cuda->driver->cuDeviceGetAttribute(&mps, CU_DEVICE_ATTRIBUTE_MPS_ENABLED, cuda->device) == CUDA_SUCCESS)
		return mps != 0;
	return mps_pipe_lives();
}

static void describe(struct kind_cuda *self)
{
	const struct kvg_cuda *cuda = self->cuda;
	struct kind_device *about = &self->about;
	char version[32] = "";

	if (self->nvml)
		nvml_driver_version(self->nvml, version, sizeof(version));
	(void)snprintf(about->name, sizeof(about->name), "%s (%s)", cuda->name, cuda->bus_id);
	(void)snprintf(about->driver, sizeof(about->driver), "%s%sCUDA %d.%d", version, version[0] ? ", " : "",
		cuda->driver->version / 1000, cuda->driver->version % 1000 / 10);
	about->mps = is_mps_client(cuda);
	about->total = cuda->total_memory;
}

/* ---- life ---- */

static struct kind *cuda_free(struct kind *kind)
{
	struct kind_cuda *self = of_kind(kind);

	if (self->stream && kvg_cuda_enter(self->cuda) == CUDA_SUCCESS)
		(void)self->cuda->driver->cuStreamDestroy(self->stream);
	if (self->scrubbed)
		(void)self->cuda->driver->cuMemFreeHost(self->scrubbed);
	self->nvml = nvml_close(self->nvml);
	self->cuda = kvg_cuda_close(self->cuda);
	if (self->failure_fd >= 0)
		(void)close(self->failure_fd);
	free(self);
	return NULL;
}

static const struct kind_ops cuda_ops = {
	.name = "cuda",
	.create = cuda_create,
	.reserve = cuda_reserve,
	.unreserve = cuda_unreserve,
	.map = cuda_map,
	.unmap = cuda_unmap,
	.scrub = cuda_scrub,
	.scrub_begin = cuda_scrub_begin,
	.scrub_poll = cuda_scrub_poll,
	.destroy = cuda_destroy,
	.physical = cuda_physical,
	.pin = cuda_pin,
	.unpin = cuda_unpin,
	.device = cuda_device,
	.about = cuda_about,
	.usage = cuda_usage,
	.failure_fd = cuda_failure_fd,
	.failure = cuda_failure,
	.free = cuda_free,
};

/* 0 or a negative errno with text. */
static int fill(struct kind_cuda *self, int ordinal, char *text, size_t text_size)
{
	char why[KIND_TEXT] = "";
	void *scrubbed = NULL;
	CUresult result;
	int r = kvg_cuda_open(ordinal, &self->cuda, why, sizeof(why));

	if (r < 0) {
		(void)snprintf(text, text_size, "kind cuda: %s", why);
		return r;
	}
	self->kind.granularity = self->cuda->granularity;
	self->prop = (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_TYPE_PINNED,
		.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
		.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = self->cuda->device}};
	self->nvml = nvml_open(self->cuda->bus_id);
	describe(self);
	result = self->cuda->driver->cuStreamCreate(&self->stream, CU_STREAM_NON_BLOCKING);
	if (result != CUDA_SUCCESS)
		self->stream = NULL;
	else
		result = self->cuda->driver->cuMemHostAlloc(&scrubbed, sizeof(uint64_t), 0);
	if (result != CUDA_SUCCESS) {
		(void)snprintf(text, text_size, "kind cuda: GPU %d: a stream and its flag: %s", ordinal,
			kvg_cuda_error(self->cuda->driver, result));
		return kvg_cuda_errno(result);
	}
	self->scrubbed = scrubbed;
	*self->scrubbed = 0;
	return 0;
}

int kind_cuda_new(int ordinal, struct kind **ret, char *text, size_t text_size)
{
	struct kind_cuda *self = calloc(1, sizeof(*self));
	int r = -ENOMEM;

	if (self) {
		self->kind.ops = &cuda_ops;
		self->kind.large_pages = pages_are_large(); /* the host tier's */
		self->failure_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		r = self->failure_fd < 0 ? -errno : 0;
	}
	if (r < 0)
		(void)snprintf(text, text_size, "kind cuda: no memory or no descriptor for it");
	else
		r = fill(self, ordinal, text, text_size);
	if (r < 0) {
		if (self)
			(void)cuda_free(&self->kind);
		return r;
	}
	*ret = &self->kind;
	return 0;
}
