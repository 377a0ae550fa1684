/*
 * check.h - what the check commands share: opening a file in the golden format,
 * and reading its tensors and metadata with every shape and number checked.
 *
 * All functions that can fail print one line on standard error that names the
 * file and what is wrong, and return false or NULL.
 */
#ifndef KVG_BENCH_CHECK_H
#define KVG_BENCH_CHECK_H

#include "proto/safetensors.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

struct check_file {
	const char *path;
	struct kvg_safetensors *tensors; /* owned */
};

/* Prints "kvgate-bench: PATH: ..."; check_fail() is false in addition, for a caller to return. */
void check_print(const struct check_file *file, const char *format, ...) __attribute__((format(printf, 2, 3)));
#define check_fail(file, ...) (check_print((file), __VA_ARGS__), false)

/* Opens the command's only argument. Returns an exit status, BENCH_OK when *ret is open (close it with deinit). */
int check_open(int argc, char **argv, struct check_file *ret);
void check_deinit(struct check_file *file);

/* The tensor of that name with that type and rank. */
const struct kvg_tensor *check_tensor(
	const struct check_file *file, const char *name, enum kvg_tensor_dtype dtype, unsigned rank);

/* The same, and its shape must be this one. */
const struct kvg_tensor *check_tensor_shaped(const struct check_file *file, const char *name,
	enum kvg_tensor_dtype dtype, unsigned rank, const uint64_t *shape);

/* An aligned copy of a tensor's data, to be freed. */
void *check_copy(const struct check_file *file, const struct kvg_tensor *tensor);

/* Memory aligned to 64 bytes, to be freed; never for 0 bytes. */
void *check_alloc(const struct check_file *file, size_t size);

/* Scores: a copy of an F32 tensor [L, H, n] without NaN, to be freed. ret_shape: L, H, n. */
float *check_scores(const struct check_file *file, const char *name, uint64_t ret_shape[3]);

/* A whole number in the metadata. */
bool check_number(const struct check_file *file, const char *key, uint64_t *ret);

static inline void cleanup_free(void *pointer)
{
	free(*(void **)pointer);
}

#define _cleanup_free_ __attribute__((cleanup(cleanup_free)))
#define _cleanup_file_ __attribute__((cleanup(check_deinit)))

#endif
