#include "daemon/sequence/cuda_transfer.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#define WINDOWS  (sizeof(((struct cuda_link *)NULL)->windows) / sizeof(struct cuda_window))
#define STREAMS  (2u * TRANSFER_LANES + 1)
#define QUERY_NS 1000000u /* between questions to the driver about windows that are not over */

/* ---- the link ---- */

int cuda_link_status(const struct cuda_link *link, CUresult result, const char *what)
{
	if (result == CUDA_SUCCESS)
		return 0;
	kind_cuda_check(link->kind, result, what);
	return kvg_cuda_errno(result);
}

static CUresult window_init(const struct kvg_cuda_driver *driver, struct cuda_window *window)
{
	void *at = NULL;
	CUresult result = driver->cuMemAlloc(&window->staging, TRANSFER_BYTES);

	if (result == CUDA_SUCCESS)
		result = driver->cuMemAlloc(&window->there, TRANSFER_UPLOAD);
	if (result == CUDA_SUCCESS)
		result = driver->cuEventCreate(&window->ready, CU_EVENT_DISABLE_TIMING);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemHostAlloc(&at, TRANSFER_UPLOAD + sizeof(uint64_t), 0);
	if (result != CUDA_SUCCESS)
		return result;
	window->upload = at;
	window->flag = (uint64_t *)(void *)(window->upload + TRANSFER_UPLOAD);
	*window->flag = 0;
	return CUDA_SUCCESS;
}

static void window_deinit(const struct kvg_cuda_driver *driver, struct cuda_window *window)
{
	if (window->staging)
		(void)driver->cuMemFree(window->staging);
	if (window->there)
		(void)driver->cuMemFree(window->there);
	if (window->ready)
		(void)driver->cuEventDestroy(window->ready);
	if (window->upload)
		(void)driver->cuMemFreeHost(window->upload);
}

/* Kernels use the addresses of registered host memory as they are. */
static CUresult check_pointers(const struct kvg_cuda *cuda)
{
	int same = 0;
	CUresult result = cuda->driver->cuDeviceGetAttribute(
		&same, CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, cuda->device);

	return result == CUDA_SUCCESS && !same ? CUDA_ERROR_NOT_SUPPORTED : result;
}

/* Those of the link, in the order in which work goes through: what comes in, kernels, what goes out. */
static CUstream *stream_of(struct cuda_link *link, size_t i)
{
	if (i < TRANSFER_LANES)
		return &link->in[i];
	return i == TRANSFER_LANES ? &link->kernels : &link->out[i - TRANSFER_LANES - 1];
}

static CUresult link_init(struct cuda_link *link)
{
	const struct kvg_cuda_driver *driver = link->cuda->driver;
	int least = 0, greatest = 0;
	CUresult result = driver->cuCtxGetStreamPriorityRange(&least, &greatest);

	if (result == CUDA_SUCCESS)
		result = check_pointers(link->cuda);
	for (size_t i = 0; result == CUDA_SUCCESS && i < STREAMS; i++)
		result = driver->cuStreamCreateWithPriority(stream_of(link, i), CU_STREAM_NON_BLOCKING, least);
	for (size_t i = 0; result == CUDA_SUCCESS && i < WINDOWS; i++)
		result = window_init(driver, &link->windows[i]);
	return result;
}

struct cuda_link *cuda_link(const struct compute_device *device)
{
	struct cuda_kernels *kernels = device->kind->attached;
	struct cuda_link *link = kernels->link;

	if (link)
		return link;
	link = calloc(1, sizeof(*link));
	if (!link)
		return NULL;
	link->kind = device->kind;
	link->cuda = device->cuda;
	link->copy = kernels->copy;
	link->tier = kernels->tier;
	list_init(&link->transfers);
	if (cuda_link_status(link, link_init(link), "the link's memory") < 0)
		return cuda_link_free(link);
	kernels->link = link;
	return link;
}

struct cuda_link *cuda_link_free(struct cuda_link *link)
{
	const struct kvg_cuda_driver *driver;

	if (!link)
		return NULL;
	driver = link->cuda->driver;
	for (size_t i = 0; i < STREAMS; i++)
		if (*stream_of(link, i))
			(void)driver->cuStreamDestroy(*stream_of(link, i));
	for (size_t i = 0; i < WINDOWS; i++)
		window_deinit(driver, &link->windows[i]);
	free(link);
	return NULL;
}

CUstream cuda_window_lane(const struct cuda_link *link, const struct cuda_window *window, bool in)
{
	size_t lane = (size_t)(window - link->windows) % TRANSFER_LANES;

	return in ? link->in[lane] : link->out[lane];
}

CUresult cuda_window_send(const struct cuda_link *link, const struct cuda_window *window, size_t size, CUstream stream)
{
	assert(size <= TRANSFER_UPLOAD);
	return link->cuda->driver->cuMemcpyHtoDAsync(window->there, window->upload, size, stream);
}

CUresult cuda_window_end(const struct cuda_link *link, struct cuda_window *window, CUstream stream)
{
	CUdeviceptr flag = (CUdeviceptr)(uintptr_t)window->flag;

	return link->cuda->driver->cuStreamWriteValue64(stream, flag, ++window->value, 0);
}

/* ---- turns ---- */

/* Whether another transfer that waits for a window comes first. */
static bool comes_later(const struct cuda_transfer *transfer, const struct cuda_transfer *other)
{
	const struct cuda_link *link = transfer->link;
	uint64_t mine = link->tenants[transfer->tenant], others = link->tenants[other->tenant];

	if (other == transfer || other->ended)
		return false;
	return others < mine || (others == mine && other->turn < transfer->turn);
}

static bool has_turn(const struct cuda_transfer *transfer)
{
	const struct list *all = &transfer->link->transfers;

	for (const struct list *node = all->next; node != all; node = node->next)
		if (comes_later(transfer, list_entry(node, struct cuda_transfer, node)))
			return false;
	return true;
}

static struct cuda_window *free_window(struct cuda_link *link)
{
	for (size_t i = 0; i < WINDOWS; i++)
		if (!link->windows[i].owner)
			return &link->windows[i];
	return NULL;
}

/* What was enqueued of a window that failed may still use its memory. */
static void wait_for_all(struct cuda_link *link)
{
	for (size_t i = 0; i < STREAMS; i++)
		(void)link->cuda->driver->cuStreamSynchronize(*stream_of(link, i));
}

/* ---- transfers ---- */

int cuda_transfer_start(struct request *request,
	int (*next)(struct cuda_transfer *transfer, struct cuda_window *window), struct cuda_transfer **ret)
{
	struct cuda_link *link = cuda_link(request->space->device.compute);
	struct cuda_transfer *transfer = link ? calloc(1, sizeof(*transfer)) : NULL;

	if (!transfer)
		return -ENOMEM;
	*transfer = (struct cuda_transfer){
		.request = request, .link = link, .tenant = request->space->tenant->index, .next = next};
	list_add_tail(&link->transfers, &transfer->node);
	request->transfer = transfer;
	*ret = transfer;
	return 0;
}

static void take_back_windows(struct cuda_transfer *transfer)
{
	for (size_t i = 0; i < WINDOWS; i++) {
		struct cuda_window *window = &transfer->link->windows[i];

		if (window->owner != transfer || __atomic_load_n(window->flag, __ATOMIC_ACQUIRE) < window->value)
			continue;
		window->owner = NULL;
		transfer->in_flight--;
	}
}

/* Starts windows as long as it is the transfer's turn and there are any. */
static void go_on(struct cuda_transfer *transfer)
{
	struct cuda_link *link = transfer->link;
	struct cuda_window *window;
	int r;

	while (!transfer->ended && has_turn(transfer) && (window = free_window(link))) {
		r = transfer->next(transfer, window);
		if (r == -EAGAIN && transfer->in_flight)
			return;
		if (r <= 0) {
			transfer->ended = true;
			transfer->status = r;
			if (r < 0)
				wait_for_all(link);
			return;
		}
		window->owner = transfer;
		transfer->in_flight++;
		transfer->turn = link->tenants[transfer->tenant] = ++link->turn;
	}
}

/* The driver is asked now and then whether it has failed. */
static int check_link(struct cuda_link *link)
{
	uint64_t now = loop_now();
	int r = 0;

	if (now - link->asked_ns < QUERY_NS)
		return 0;
	link->asked_ns = now;
	for (size_t i = 0; r == 0 && i < STREAMS; i++) {
		CUresult result = link->cuda->driver->cuStreamQuery(*stream_of(link, i));

		if (result != CUDA_ERROR_NOT_READY)
			r = cuda_link_status(link, result, "the link's streams");
	}
	return r;
}

static bool over(struct cuda_transfer *transfer)
{
	struct request *request = transfer->request;
	int r = transfer->status;

	if (r >= 0 && transfer->finish)
		r = transfer->finish(transfer);
	if (r < 0)
		request->job_status = r;
	list_remove(&transfer->node);
	request->transfer = NULL;
	if (transfer->release)
		transfer->release(transfer->data);
	free(transfer);
	return true;
}

bool cuda_transfer_poll(struct request *request)
{
	struct cuda_transfer *transfer = request->transfer;
	struct cuda_link *link = transfer->link;
	int r = cuda_link_status(link, kvg_cuda_enter(link->cuda), "entering the context");

	take_back_windows(transfer);
	if (atomic_load_explicit(&request->space->dying, memory_order_relaxed) && !transfer->ended) {
		transfer->ended = true;
		transfer->status = -ECANCELED;
	}
	if (r >= 0)
		go_on(transfer);
	if (transfer->ended && !transfer->in_flight)
		return over(transfer);
	if (r >= 0)
		r = check_link(link);
	if (r >= 0)
		return false;
	/* The device is lost: nothing of it comes to an end any more. */
	for (size_t i = 0; i < WINDOWS; i++)
		if (link->windows[i].owner == transfer)
			link->windows[i].owner = NULL;
	transfer->status = r;
	return over(transfer);
}
