/* The device of `kvgate-bench tiers`. */
#include "tools/bench/tiers.h"

#include <errno.h>
#include <stdlib.h>

#include "client/kvgate.h"
#include "tools/bench/service.h"
#include "tools/bench/synthetic.h"

#define LARGE ((size_t)256 << 20) /* bytes of a large copy */
#define SMALL ((size_t)16 << 20)  /* that are copied half by half */
#define TURNS 5

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

/* Bytes a second, of the fastest turn. */
static CUresult measure(const struct copies *copies, double *ret)
{
	double best = 0;

	for (int i = 0; i < TURNS; i++) {
		double start = service_seconds();
		CUresult result = copy(copies);
		double rate = (double)copies->bytes / (service_seconds() - start);

		if (result != CUDA_SUCCESS)
			return result;
		best = rate > best ? rate : best;
	}
	*ret = best;
	return CUDA_SUCCESS;
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
	if (host)
		(void)copies.driver->cuMemFreeHost(host);
	if (copies.device)
		(void)copies.driver->cuMemFree(copies.device);
	return synthetic_result(gpu->synthetic, result, "copies");
}
