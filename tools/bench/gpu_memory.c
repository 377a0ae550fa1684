#include "tools/bench/gpu.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NOISE_BYTES ((size_t)16 << 20)
#define STEP        ((size_t)1000003 * 16) /* between the places where repetitions begin: aligned, and soon everywhere */

/* One piece of noise on the device; larger buffers repeat it from other places on. */
struct gpu_noise {
	float deviation;
	uint64_t state;
	size_t start; /* where the next repetition begins */
	CUdeviceptr at;
	uint64_t words[NOISE_BYTES / sizeof(uint64_t)];
};

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state * 0x2545f4914f6cdd1du;
}

static uint16_t to_bf16(float value)
{
	uint32_t bits;

	memcpy(&bits, &value, sizeof(bits));
	return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* A sum of four uniform numbers, which is near enough to a normal one, of deviation 1. */
static float next_normal(uint64_t *state)
{
	uint64_t bits = next_random(state);
	uint32_t sum = 0;

	for (unsigned i = 0; i < 4; i++)
		sum += (uint32_t)(bits >> (16 * i)) & 0xffff;
	return ((float)sum / 65536.0f - 2.0f) * sqrtf(3.0f);
}

static void fill_noise(struct gpu_noise *noise, float deviation)
{
	noise->deviation = deviation;
	for (size_t i = 0; i < NOISE_BYTES / sizeof(uint64_t); i++) {
		uint64_t word = 0;

		for (unsigned part = 0; deviation > 0 && part < 4; part++)
			word = word << 16 | to_bf16(deviation * next_normal(&noise->state));
		noise->words[i] = deviation > 0 ? word : next_random(&noise->state);
	}
}

static CUresult make_noise(struct gpu_bench *bench, float deviation)
{
	const struct kvg_cuda_driver *driver = bench->cuda->driver;
	struct gpu_noise *noise = bench->noise;
	CUresult result = CUDA_SUCCESS;

	if (noise && fabsf(noise->deviation - deviation) <= 0)
		return CUDA_SUCCESS;
	if (!noise) {
		noise = calloc(1, sizeof(*noise));
		if (!noise)
			return CUDA_ERROR_OUT_OF_MEMORY;
		noise->state = 0x9e3779b97f4a7c15u;
		bench->noise = noise;
	}
	if (!noise->at)
		result = driver->cuMemAlloc(&noise->at, NOISE_BYTES);
	fill_noise(noise, deviation);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemcpyHtoD(noise->at, noise->words, NOISE_BYTES);
	return result;
}

void gpu_release_memory(struct gpu_bench *bench)
{
	const struct kvg_cuda_driver *driver = bench->cuda->driver;

	if (bench->pause)
		(void)driver->cuMemFree(bench->pause);
	if (bench->noise && bench->noise->at)
		(void)driver->cuMemFree(bench->noise->at);
	free(bench->noise);
	bench->pause = 0;
	bench->noise = NULL;
}

static CUresult repeat_noise(struct gpu_bench *bench, CUdeviceptr at, size_t bytes)
{
	struct gpu_noise *noise = bench->noise;
	CUresult result = CUDA_SUCCESS;

	while (result == CUDA_SUCCESS && bytes) {
		size_t part = NOISE_BYTES - noise->start;

		if (part > bytes)
			part = bytes;
		result = bench->cuda->driver->cuMemcpyDtoDAsync(at, noise->at + noise->start, part, bench->stream);
		noise->start = (noise->start + STEP) % NOISE_BYTES;
		at += part;
		bytes -= part;
	}
	if (result == CUDA_SUCCESS)
		result = bench->cuda->driver->cuStreamSynchronize(bench->stream);
	return result;
}

CUdeviceptr gpu_alloc(struct gpu_bench *bench, size_t bytes)
{
	CUdeviceptr at = 0;

	if (gpu_check(bench, bench->cuda->driver->cuMemAlloc(&at, bytes), "device memory"))
		return 0;
	return at;
}

CUdeviceptr gpu_random(struct gpu_bench *bench, size_t bytes, float deviation)
{
	CUdeviceptr at = gpu_alloc(bench, bytes);
	CUresult result;

	if (!at)
		return 0;
	result = make_noise(bench, deviation);
	if (result == CUDA_SUCCESS)
		result = repeat_noise(bench, at, bytes);
	if (!gpu_check(bench, result, "random numbers"))
		return at;
	gpu_free(bench, at);
	return 0;
}

void gpu_free(struct gpu_bench *bench, CUdeviceptr at)
{
	if (at)
		(void)gpu_check(bench, bench->cuda->driver->cuMemFree(at), "cuMemFree");
}
