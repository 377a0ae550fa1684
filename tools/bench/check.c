#include "tools/bench/check.h"

#include "tools/bench/bench.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define TEXT_SIZE 512
#define ALIGNMENT 64

void check_print(const struct check_file *file, const char *format, ...)
{
	char text[TEXT_SIZE];
	va_list args;

	va_start(args, format);
	(void)vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	(void)fprintf(stderr, "kvgate-bench: %s: %s\n", file->path, text);
}

int check_open(int argc, char **argv, struct check_file *ret)
{
	char text[TEXT_SIZE] = "";

	if (argc != 2) {
		(void)fprintf(stderr, "usage: kvgate-bench %s FILE\n", argv[0]);
		return BENCH_USAGE;
	}
	ret->path = argv[1];
	if (kvg_safetensors_open(argv[1], &ret->tensors, text, sizeof(text)) == 0)
		return BENCH_OK;
	(void)fprintf(stderr, "kvgate-bench: %s\n", text);
	return BENCH_FAIL;
}

void check_deinit(struct check_file *file)
{
	file->tensors = kvg_safetensors_free(file->tensors);
}

static const char *dtype_name(enum kvg_tensor_dtype dtype)
{
	static const char *const names[] = {
		[KVG_TENSOR_BF16] = "BF16",
		[KVG_TENSOR_F16] = "F16",
		[KVG_TENSOR_F32] = "F32",
		[KVG_TENSOR_F64] = "F64",
		[KVG_TENSOR_I32] = "I32",
		[KVG_TENSOR_I64] = "I64",
		[KVG_TENSOR_U8] = "U8",
		[KVG_TENSOR_OTHER] = "another type",
	};

	return names[dtype];
}

const struct kvg_tensor *check_tensor(
	const struct check_file *file, const char *name, enum kvg_tensor_dtype dtype, unsigned rank)
{
	const struct kvg_tensor *tensor = kvg_safetensors_find(file->tensors, name);

	if (!tensor) {
		check_print(file, "tensor %s is missing", name);
		return NULL;
	}
	if (tensor->dtype != dtype || tensor->rank != rank) {
		check_print(file, "tensor %s is %s of rank %u, expected %s of rank %u", name, dtype_name(tensor->dtype),
			tensor->rank, dtype_name(dtype), rank);
		return NULL;
	}
	return tensor;
}

const struct kvg_tensor *check_tensor_shaped(const struct check_file *file, const char *name,
	enum kvg_tensor_dtype dtype, unsigned rank, const uint64_t *shape)
{
	const struct kvg_tensor *tensor = check_tensor(file, name, dtype, rank);

	for (unsigned i = 0; tensor && i < rank; i++)
		if (tensor->shape[i] != shape[i]) {
			check_print(file, "tensor %s has %llu in dimension %u, expected %llu", name,
				(unsigned long long)tensor->shape[i], i, (unsigned long long)shape[i]);
			return NULL;
		}
	return tensor;
}

void *check_alloc(const struct check_file *file, size_t size)
{
	void *data =
		size > SIZE_MAX - ALIGNMENT ? NULL : aligned_alloc(ALIGNMENT, size / ALIGNMENT * ALIGNMENT + ALIGNMENT);

	if (!data)
		check_print(file, "no memory for %zu bytes", size);
	return data;
}

void *check_copy(const struct check_file *file, const struct kvg_tensor *tensor)
{
	void *data = check_alloc(file, tensor->size);

	if (data && tensor->size)
		memcpy(data, tensor->data, tensor->size);
	return data;
}

float *check_scores(const struct check_file *file, const char *name, uint64_t ret_shape[3])
{
	const struct kvg_tensor *tensor = check_tensor(file, name, KVG_TENSOR_F32, 3);
	float *scores;

	if (!tensor)
		return NULL;
	if (!tensor->count || tensor->shape[0] > UINT32_MAX || tensor->shape[1] > UINT32_MAX) {
		check_print(file, "tensor %s has a dimension of 0 or beyond 2^32", name);
		return NULL;
	}
	scores = check_copy(file, tensor);
	for (uint64_t i = 0; scores && i < tensor->count; i++)
		if (isnan(scores[i])) {
			check_print(file, "tensor %s: element %llu is not a number", name, (unsigned long long)i);
			free(scores);
			return NULL;
		}
	if (scores)
		memcpy(ret_shape, tensor->shape, 3 * sizeof(*ret_shape));
	return scores;
}

bool check_number(const struct check_file *file, const char *key, uint64_t *ret)
{
	const char *text = kvg_safetensors_metadata(file->tensors, key);
	unsigned long long value;
	char *end;

	if (!text)
		return check_fail(file, "metadata: %s is missing", key);
	errno = 0;
	value = strtoull(text, &end, 10);
	if (errno || end == text || *end || text[0] < '0' || text[0] > '9')
		return check_fail(file, "metadata: %s is '%.40s', not a whole number", key, text);
	*ret = value;
	return true;
}
