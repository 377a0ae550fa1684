/* The device of `kvgate-bench tiers`. */
#include "tools/bench/tiers.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>

#include "client/kvgate.h"
#include "tools/bench/service.h"
#include "tools/bench/synthetic.h"

#define LARGE  ((size_t)256 << 20) /* bytes of a large copy */
#define SMALL  ((size_t)16 << 20)  /* that are copied half by half */
#define PIECES ((size_t)8192)      /* of a batch, at most */
#define TURNS  5

struct tiers_gpu {
	struct synthetic *synthetic;
};

int tiers_gpu_open(int ordinal, struct tiers_gpu **ret)
{
	struct tiers_gpu *gpu = calloc(1, sizeof(*gpu));
	int r = gpu ? synthetic_open(ordinal, &gpu->synthetic) : -ENOMEM;

	if (r < 0)
		free(gpu);
	else
		*ret = gpu;
	return r;
}

struct tiers_gpu *tiers_gpu_close(struct tiers_gpu *gpu)
{
	if (gpu)
		gpu->synthetic = synthetic_close(gpu->synthetic);
	free(gpu);
	return NULL;
}

int tiers_gpu_join(const struct tiers_gpu *gpu, struct kvg_client *client)
{
	return kvg_set_stream(client, gpu->synthetic->stream);
}

struct copies {
	const struct kvg_cuda_driver *driver;
	CUstream stream;
	CUdeviceptr device;
	uint8_t *host;
	size_t bytes, piece;
	bool out;
	struct batch *batch; /* NULL: one by one */
};

/* Pieces lie apart by their own size in device memory, as halves of blocks of another generation do. */
static CUresult copy(const struct copies *copies)
{
	CUresult result = CUDA_SUCCESS;

	for (size_t at = 0; result == CUDA_SUCCESS && at < copies->bytes; at += copies->piece) {
		CUdeviceptr device = copies->device + (copies->piece == copies->bytes ? at : 2 * at);

		result = copies->out ? copies->driver->cuMemcpyDtoHAsync(
					       copies->host + at, device, copies->piece, copies->stream)
				     : copies->driver->cuMemcpyHtoDAsync(
					       device, copies->host + at, copies->piece, copies->stream);
	}
	return result == CUDA_SUCCESS ? copies->driver->cuStreamSynchronize(copies->stream) : result;
}

/* The driver's own way for many small copies. NULL: it has none (before CUDA 13). */
typedef CUresult batch_fn(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attrs,
	size_t *attr_indices, size_t attr_count, CUstream stream);

static batch_fn *find_batch(void)
{
	void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
	void *found = driver ? dlsym(driver, "cuMemcpyBatchAsync_v2") : NULL;

	if (driver)
		(void)dlclose(driver); /* it stays loaded */
	return (batch_fn *)(uintptr_t)found;
}

struct batch {
	batch_fn *fn;
	CUdeviceptr dsts[PIECES], srcs[PIECES];
	size_t sizes[PIECES], count;
};

static void fill_batch(const struct copies *copies, struct batch *batch)
{
	for (size_t i = 0; i < batch->count; i++) {
		CUdeviceptr device = copies->device + 2 * i * copies->piece;
		CUdeviceptr host = (CUdeviceptr)(uintptr_t)(copies->host + i * copies->piece);

		batch->dsts[i] = copies->out ? host : device;
		batch->srcs[i] = copies->out ? device : host;
		batch->sizes[i] = copies->piece;
	}
}

static CUresult copy_batch(const struct copies *copies)
{
	CUmemcpyAttributes attributes = {.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM};
	struct batch *batch = copies->batch;
	size_t first = 0;
	CUresult result =
		batch->fn(batch->dsts, batch->srcs, batch->sizes, batch->count, &attributes, &first, 1, copies->stream);

	return result == CUDA_SUCCESS ? copies->driver->cuStreamSynchronize(copies->stream) : result;
}

/* Bytes a second, of the fastest turn. */
static CUresult measure(const struct copies *copies, double *ret)
{
	double best = 0;

	for (int i = 0; i < TURNS; i++) {
		double start = service_seconds();
		CUresult result = copies->batch ? copy_batch(copies) : copy(copies);
		double rate = (double)copies->bytes / (service_seconds() - start);

		if (result != CUDA_SUCCESS)
			return result;
		best = rate > best ? rate : best;
	}
	*ret = best;
	return CUDA_SUCCESS;
}

static CUresult measure_batches(struct copies *copies, struct tiers_rates *ret)
{
	struct batch *batch = calloc(1, sizeof(*batch));
	CUresult result = batch ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;

	if (batch)
		batch->fn = find_batch();
	for (int i = 0; result == CUDA_SUCCESS && batch->fn && i < 2; i++) {
		copies->out = i == 0;
		batch->count = SMALL / copies->piece < PIECES ? SMALL / copies->piece : PIECES;
		copies->bytes = batch->count * copies->piece;
		copies->batch = batch;
		fill_batch(copies, batch);
		result = measure(copies, i == 0 ? &ret->batch_out : &ret->batch_in);
	}
	free(batch);
	return result;
}

int tiers_gpu_rates(const struct tiers_gpu *gpu, size_t half, struct tiers_rates *ret)
{
	struct copies copies = {.driver = gpu->synthetic->cuda->driver, .stream = gpu->synthetic->stream};
	void *host = NULL;
	CUresult result = copies.driver->cuMemAlloc(&copies.device, LARGE);

	if (result == CUDA_SUCCESS)
		result = copies.driver->cuMemHostAlloc(&host, LARGE, 0);
	copies.host = host;
	for (int i = 0; result == CUDA_SUCCESS && i < 4; i++) {
		double *const rates[] = {&ret->out, &ret->in, &ret->loop_out, &ret->loop_in};

		copies.out = i % 2 == 0;
		copies.bytes = i < 2 ? LARGE : SMALL;
		copies.piece = i < 2 ? LARGE : half;
		result = measure(&copies, rates[i]);
	}
	if (result == CUDA_SUCCESS)
		result = measure_batches(&copies, ret);
	if (host)
		(void)copies.driver->cuMemFreeHost(host);
	if (copies.device)
		(void)copies.driver->cuMemFree(copies.device);
	return synthetic_result(gpu->synthetic, result, "copies");
}
