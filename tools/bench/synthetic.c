#include "tools/bench/synthetic.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define THREADS  256u
#define PIECES   64u /* blocks of a row's check */
#define SPIN_MAX 10000000000u

/* The device code of synthetic.cu, at SYNTHETIC_IMAGE in the build folder. */
extern const unsigned char synthetic_image[];
__asm__(".pushsection .rodata\n"
	".balign 64\n"
	".globl synthetic_image\n"
	".hidden synthetic_image\n"
	"synthetic_image:\n"
	".incbin \"" SYNTHETIC_IMAGE "\"\n"
	".popsection\n");

int synthetic_result(const struct synthetic *synthetic, CUresult result, const char *what)
{
	if (result == CUDA_SUCCESS)
		return 0;
	(void)fprintf(stderr, "kvgate-bench: %s: %s\n", what, kvg_cuda_error(synthetic->cuda->driver, result));
	return kvg_cuda_errno(result);
}

static int load(struct synthetic *synthetic)
{
	static const char *const names[] = {"synthetic_fill", "synthetic_check", "synthetic_gather", "synthetic_clock",
		"synthetic_spin", "synthetic_poke"};
	CUfunction functions[6];
	CUresult result =
		kvg_cuda_module_load(synthetic->cuda, synthetic_image, names, 6, &synthetic->module, functions);

	if (result == CUDA_SUCCESS)
		result = synthetic->cuda->driver->cuStreamCreate(&synthetic->stream, CU_STREAM_NON_BLOCKING);
	if (result != CUDA_SUCCESS)
		return synthetic_result(synthetic, result, "device code");
	synthetic->fill = functions[0];
	synthetic->check = functions[1];
	synthetic->gather = functions[2];
	synthetic->clock = functions[3];
	synthetic->spin = functions[4];
	synthetic->poke = functions[5];
	return 0;
}

int synthetic_open(int ordinal, struct synthetic **ret)
{
	struct synthetic *synthetic = calloc(1, sizeof(*synthetic));
	char text[256] = "out of memory";
	int r = synthetic ? kvg_cuda_open(ordinal, &synthetic->cuda, text, sizeof(text)) : -ENOMEM;

	if (r < 0) {
		(void)fprintf(stderr, "kvgate-bench: %s\n", text);
		free(synthetic);
		return r;
	}
	r = load(synthetic);
	if (r < 0)
		(void)synthetic_close(synthetic);
	else
		*ret = synthetic;
	return r;
}

struct synthetic *synthetic_close(struct synthetic *synthetic)
{
	if (!synthetic)
		return NULL;
	if (synthetic->stream)
		(void)synthetic->cuda->driver->cuStreamDestroy(synthetic->stream);
	if (synthetic->module)
		(void)synthetic->cuda->driver->cuModuleUnload(synthetic->module);
	(void)kvg_cuda_close(synthetic->cuda);
	free(synthetic);
	return NULL;
}

static unsigned pieces(uint32_t pairs)
{
	uint32_t most = (pairs + THREADS / 32 - 1) / (THREADS / 32);

	if (most > PIECES)
		most = PIECES;
	return most ? most : 1;
}

CUresult synthetic_fill(const struct synthetic *synthetic, const struct content_kv *kv, uint64_t tag, uint32_t slot,
	uint32_t fold_pos, uint32_t first, uint32_t count)
{
	struct content_kv copy = *kv;
	void *arguments[] = {&copy, &tag, &slot, &fold_pos, &first, &count};

	return synthetic->cuda->driver->cuLaunchKernel(synthetic->fill, pieces(count), kv->layers * kv->heads, 1,
		THREADS, 1, 1, 0, synthetic->stream, arguments, NULL);
}

CUresult synthetic_check(const struct synthetic *synthetic, const struct content_kv *kv, uint64_t tag, uint32_t slot,
	uint32_t appended, uint32_t end, CUdeviceptr bits, uint32_t words, CUdeviceptr counts)
{
	struct content_kv copy = *kv;
	void *arguments[] = {&copy, &tag, &slot, &appended, &end, &bits, &words, &counts};

	return synthetic->cuda->driver->cuLaunchKernel(synthetic->check, pieces(end), kv->layers * kv->heads, 1,
		THREADS, 1, 1, 0, synthetic->stream, arguments, NULL);
}

CUresult synthetic_gather(const struct synthetic *synthetic, const struct synthetic_gather_args *args,
	uint32_t sequences, uint32_t layers)
{
	struct synthetic_gather_args copy = *args;
	void *arguments[] = {&copy};

	return synthetic->cuda->driver->cuLaunchKernel(
		synthetic->gather, sequences, layers, 1, 128, 1, 1, 0, synthetic->stream, arguments, NULL);
}

CUresult synthetic_clock(const struct synthetic *synthetic, CUdeviceptr at, CUstream stream)
{
	void *arguments[] = {&at};

	return kvg_cuda_launch(synthetic->cuda, synthetic->clock, 1, 1, 0, stream, arguments);
}

CUresult synthetic_spin(const struct synthetic *synthetic, unsigned blocks, uint64_t ns, CUstream stream)
{
	void *arguments[] = {&ns};

	if (ns > SPIN_MAX)
		ns = SPIN_MAX;
	return kvg_cuda_launch(synthetic->cuda, synthetic->spin, blocks, 32, 0, stream, arguments);
}

CUresult synthetic_poke(const struct synthetic *synthetic, CUdeviceptr at, CUstream stream)
{
	void *arguments[] = {&at};

	return kvg_cuda_launch(synthetic->cuda, synthetic->poke, 1, 1, 0, stream, arguments);
}
