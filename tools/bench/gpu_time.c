#include "tools/bench/gpu.h"

#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define WARM_UP      3u
#define BATCH        16u
#define PAUSE_BYTES  ((size_t)1 << 30)
#define SAMPLES_MIN  30u
#define SAMPLES_FEW  5u /* of work that is slow */
#define SAMPLES_MAX  1000u
#define DEVICE_US    100e3
#define WALL_SECONDS 0.5

struct timing {
	struct gpu_bench *bench;
	gpu_work work;
	void *user;
	unsigned turn;
	CUgraphExec graphs[GPU_GRAPHS]; /* unused: NULL */
	CUevent events[2 * BATCH];
	double samples[SAMPLES_MAX];
	unsigned count;
	double total_us;
	double start; /* seconds */
};

static double now(void)
{
	struct timespec time;

	(void)clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static CUresult capture(struct timing *timing, unsigned turn)
{
	const struct kvg_cuda_driver *driver = timing->bench->cuda->driver;
	CUstream stream = timing->bench->stream;
	CUgraph graph = NULL;
	CUresult ended, result = driver->cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_RELAXED);

	if (result != CUDA_SUCCESS)
		return result;
	result = timing->work(timing->user, stream, turn);
	ended = driver->cuStreamEndCapture(stream, &graph);
	if (result == CUDA_SUCCESS)
		result = ended;
	if (result == CUDA_SUCCESS)
		result = driver->cuGraphInstantiate(&timing->graphs[turn], graph, 0);
	if (graph)
		(void)driver->cuGraphDestroy(graph);
	return result;
}

static CUresult prepare(struct timing *timing, bool graph)
{
	const struct kvg_cuda_driver *driver = timing->bench->cuda->driver;
	CUresult result = CUDA_SUCCESS;

	for (unsigned i = 0; result == CUDA_SUCCESS && i < 2 * BATCH; i++)
		result = driver->cuEventCreate(&timing->events[i], CU_EVENT_DEFAULT);
	for (unsigned i = 0; result == CUDA_SUCCESS && graph && i < GPU_GRAPHS; i++)
		result = capture(timing, i);
	return result;
}

static void release(struct timing *timing)
{
	const struct kvg_cuda_driver *driver = timing->bench->cuda->driver;

	for (unsigned i = 0; i < 2 * BATCH; i++)
		if (timing->events[i])
			(void)driver->cuEventDestroy(timing->events[i]);
	for (unsigned i = 0; i < GPU_GRAPHS; i++)
		if (timing->graphs[i])
			(void)driver->cuGraphExecDestroy(timing->graphs[i]);
	free(timing);
}

static CUresult enqueue(struct timing *timing)
{
	unsigned turn = timing->turn++;
	CUgraphExec graph = timing->graphs[turn % GPU_GRAPHS];
	CUstream stream = timing->bench->stream;

	if (graph)
		return timing->bench->cuda->driver->cuGraphLaunch(graph, stream);
	return timing->work(timing->user, stream, turn);
}

static CUresult warm_up(struct timing *timing)
{
	CUresult result = CUDA_SUCCESS;

	for (unsigned i = 0; result == CUDA_SUCCESS && i < WARM_UP; i++)
		result = enqueue(timing);
	if (result == CUDA_SUCCESS)
		result = timing->bench->cuda->driver->cuStreamSynchronize(timing->bench->stream);
	return result;
}

static CUresult read_samples(struct timing *timing, unsigned count)
{
	CUresult result = CUDA_SUCCESS;

	for (unsigned i = 0; result == CUDA_SUCCESS && i < count && timing->count < SAMPLES_MAX; i++) {
		float ms = 0;

		result = timing->bench->cuda->driver->cuEventElapsedTime(
			&ms, timing->events[2 * i], timing->events[2 * i + 1]);
		timing->samples[timing->count++] = (double)ms * 1e3;
		timing->total_us += (double)ms * 1e3;
	}
	return result;
}

/* Several repetitions without waiting: the device is kept busy first, so that they follow each other there. */
static CUresult measure_batch(struct timing *timing, unsigned count)
{
	const struct kvg_cuda_driver *driver = timing->bench->cuda->driver;
	CUstream stream = timing->bench->stream;
	CUresult result = driver->cuMemsetD8Async(timing->bench->pause, 0x5a, PAUSE_BYTES, stream);

	for (unsigned i = 0; result == CUDA_SUCCESS && i < count; i++) {
		result = driver->cuEventRecord(timing->events[2 * i], stream);
		if (result == CUDA_SUCCESS)
			result = enqueue(timing);
		if (result == CUDA_SUCCESS)
			result = driver->cuEventRecord(timing->events[2 * i + 1], stream);
	}
	if (result == CUDA_SUCCESS)
		result = driver->cuStreamSynchronize(stream);
	if (result == CUDA_SUCCESS)
		result = read_samples(timing, count);
	return result;
}

static bool is_enough(const struct timing *timing)
{
	if (timing->count >= SAMPLES_MAX)
		return true;
	if (timing->count >= SAMPLES_FEW && now() - timing->start >= WALL_SECONDS)
		return true;
	return timing->count >= SAMPLES_MIN && timing->total_us >= DEVICE_US;
}

static CUresult measure(struct timing *timing)
{
	CUresult result = warm_up(timing);

	timing->start = now();
	while (result == CUDA_SUCCESS && !is_enough(timing)) {
		unsigned batch = 1;

		if (timing->count && timing->samples[timing->count - 1] < DEVICE_US / BATCH)
			batch = BATCH;
		result = measure_batch(timing, batch);
	}
	return result;
}

static int compare(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return a < b ? -1 : a > b;
}

static double median(struct timing *timing)
{
	unsigned half = timing->count / 2;

	qsort(timing->samples, timing->count, sizeof(*timing->samples), compare);
	if (timing->count % 2)
		return timing->samples[half];
	return (timing->samples[half - 1] + timing->samples[half]) / 2;
}

double gpu_time(struct gpu_bench *bench, gpu_work work, void *user, bool graph)
{
	struct timing *timing = calloc(1, sizeof(*timing));
	CUresult result = CUDA_SUCCESS;
	double us = -1;

	if (!timing) {
		(void)gpu_check(bench, CUDA_ERROR_OUT_OF_MEMORY, "timing");
		return us;
	}
	*timing = (struct timing){.bench = bench, .work = work, .user = user};
	if (!bench->pause)
		result = bench->cuda->driver->cuMemAlloc(&bench->pause, PAUSE_BYTES);
	if (result == CUDA_SUCCESS)
		result = prepare(timing, graph);
	if (result == CUDA_SUCCESS)
		result = measure(timing);
	if (!gpu_check(bench, result, "timing"))
		us = median(timing);
	release(timing);
	return us;
}
