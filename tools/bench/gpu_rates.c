#include "tools/bench/gpu.h"
#include "tools/bench/gpu_cublas.h"

#define DEVICE_COPY ((size_t)2 << 30)
#define HOST_COPY   ((size_t)256 << 20)
#define MATRIX      8192u

struct copy {
	const struct kvg_cuda_driver *driver;
	CUdeviceptr device, other; /* other: 0 when the host is on the other side */
	void *host;
	bool to_host;
};

static CUresult copy_on_device(void *user, CUstream stream, unsigned turn)
{
	const struct copy *copy = user;

	(void)turn;
	return copy->driver->cuMemcpyDtoDAsync(copy->other, copy->device, DEVICE_COPY, stream);
}

static CUresult copy_host(void *user, CUstream stream, unsigned turn)
{
	const struct copy *copy = user;

	(void)turn;
	if (copy->to_host)
		return copy->driver->cuMemcpyDtoHAsync(copy->host, copy->device, HOST_COPY, stream);
	return copy->driver->cuMemcpyHtoDAsync(copy->device, copy->host, HOST_COPY, stream);
}

static CUresult nothing(void *user, CUstream stream, unsigned turn)
{
	(void)user;
	(void)stream;
	(void)turn;
	return CUDA_SUCCESS;
}

static double rate(double amount, double us)
{
	return us > 0 ? amount / us * 1e6 : 0;
}

static void measure_device_copy(struct gpu_bench *bench)
{
	struct copy copy = {.driver = bench->cuda->driver,
		.device = gpu_random(bench, DEVICE_COPY, 1),
		.other = gpu_alloc(bench, DEVICE_COPY)};

	if (copy.device && copy.other)
		bench->copy_rate = rate(2.0 * (double)DEVICE_COPY, gpu_time(bench, copy_on_device, &copy, false));
	gpu_free(bench, copy.device);
	gpu_free(bench, copy.other);
}

static void measure_host_copies(struct gpu_bench *bench)
{
	struct copy copy = {.driver = bench->cuda->driver, .device = gpu_random(bench, HOST_COPY, 1), .to_host = true};

	if (copy.device &&
		!gpu_check(bench, copy.driver->cuMemHostAlloc(&copy.host, HOST_COPY, 0), "pinned host memory")) {
		bench->to_host_rate = rate((double)HOST_COPY, gpu_time(bench, copy_host, &copy, false));
		copy.to_host = false;
		bench->from_host_rate = rate((double)HOST_COPY, gpu_time(bench, copy_host, &copy, false));
		(void)copy.driver->cuMemFreeHost(copy.host);
	}
	gpu_free(bench, copy.device);
}

/* Keeps the best: under a long load the clock falls by a tenth and more, and a floor is what the device can do. */
static void measure_matrix(struct gpu_bench *bench)
{
	const double operations = 2.0 * MATRIX * MATRIX * MATRIX;
	double found = rate(operations, gpu_cublas_us(bench, MATRIX, MATRIX, MATRIX));

	if (found > bench->matrix_rate)
		bench->matrix_rate = found;
}

void gpu_measure_rates(struct gpu_bench *bench)
{
	measure_device_copy(bench);
	if (bench->failed)
		return;
	measure_matrix(bench);
	measure_host_copies(bench);
	measure_matrix(bench); /* after a rest */
	bench->idle_us = gpu_time(bench, nothing, NULL, false);
}
