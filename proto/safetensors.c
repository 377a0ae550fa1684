#include "proto/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEADER_MAX (100u * 1000u * 1000u)
#define PREFIX     8u /* bytes of the header length */

struct kvg_safetensors {
	uint8_t *bytes; /* the whole file: a mapping or a copy */
	uint64_t size;
	bool mapped;
	json_t *header;             /* owns the names and the metadata */
	struct kvg_tensor *tensors; /* sorted by name */
	size_t count;
};

/* Where messages go and which file they are about. */
struct context {
	const char *name;
	char *text;
	size_t text_size;
};

static int fail(const struct context *ctx, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

static int fail(const struct context *ctx, int status, const char *format, ...)
{
	va_list args;
	int n = snprintf(ctx->text, ctx->text_size, "%s: ", ctx->name);

	if (n < 0 || (size_t)n >= ctx->text_size)
		return status;
	va_start(args, format);
	(void)vsnprintf(ctx->text + n, ctx->text_size - (size_t)n, format, args);
	va_end(args);
	return status;
}

struct dtype_row {
	const char *name;
	enum kvg_tensor_dtype dtype;
	uint32_t bytes;
};

static const struct dtype_row dtypes[] = {
	{"BF16", KVG_TENSOR_BF16, 2},
	{"F16", KVG_TENSOR_F16, 2},
	{"F32", KVG_TENSOR_F32, 4},
	{"F64", KVG_TENSOR_F64, 8},
	{"I32", KVG_TENSOR_I32, 4},
	{"I64", KVG_TENSOR_I64, 8},
	{"U8", KVG_TENSOR_U8, 1},
	{"BOOL", KVG_TENSOR_OTHER, 1},
	{"I8", KVG_TENSOR_OTHER, 1},
	{"F8_E4M3", KVG_TENSOR_OTHER, 1},
	{"F8_E5M2", KVG_TENSOR_OTHER, 1},
	{"I16", KVG_TENSOR_OTHER, 2},
	{"U16", KVG_TENSOR_OTHER, 2},
	{"U32", KVG_TENSOR_OTHER, 4},
	{"U64", KVG_TENSOR_OTHER, 8},
};

/* The element's bytes, or 0 for a type that this reader does not know. */
static uint32_t dtype_find(const char *name, enum kvg_tensor_dtype *ret)
{
	for (size_t i = 0; i < sizeof(dtypes) / sizeof(*dtypes); i++)
		if (strcmp(dtypes[i].name, name) == 0) {
			*ret = dtypes[i].dtype;
			return dtypes[i].bytes;
		}
	*ret = KVG_TENSOR_OTHER;
	return 0;
}

static int parse_shape(const struct context *ctx, const json_t *shape, struct kvg_tensor *tensor)
{
	uint64_t count = 1;

	if (!json_is_array(shape))
		return fail(ctx, -EINVAL, "tensor %s has no shape array", tensor->name);
	if (json_array_size(shape) > KVG_TENSOR_DIMS)
		return fail(ctx, -EINVAL, "tensor %s has %zu dimensions, more than %d", tensor->name,
			json_array_size(shape), KVG_TENSOR_DIMS);
	tensor->rank = (unsigned)json_array_size(shape);
	for (unsigned i = 0; i < tensor->rank; i++) {
		const json_t *dim = json_array_get(shape, i);
		json_int_t value = json_integer_value(dim);

		if (!json_is_integer(dim) || value < 0)
			return fail(ctx, -EINVAL, "tensor %s: dimension %u is not a size", tensor->name, i);
		tensor->shape[i] = (uint64_t)value;
		if (__builtin_mul_overflow(count, (uint64_t)value, &count))
			return fail(ctx, -EINVAL, "tensor %s: its shape overflows 64 bits", tensor->name);
	}
	tensor->count = count;
	return 0;
}

/* [begin, end) counts from data; data_size bytes are there. */
static int parse_offsets(const struct context *ctx, const json_t *offsets, const uint8_t *data, uint64_t data_size,
	struct kvg_tensor *tensor)
{
	const json_t *first = json_array_get(offsets, 0), *last = json_array_get(offsets, 1);
	json_int_t begin = json_integer_value(first), end = json_integer_value(last);

	if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(last))
		return fail(ctx, -EINVAL, "tensor %s: data_offsets are not two integers", tensor->name);
	if (begin < 0 || end < begin || (uint64_t)end > data_size)
		return fail(ctx, -EINVAL,
			"tensor %s: data_offsets [%lld, %lld] lie outside the file's %llu bytes of data", tensor->name,
			(long long)begin, (long long)end, (unsigned long long)data_size);
	tensor->data = data + begin;
	tensor->size = (uint64_t)(end - begin);
	return 0;
}

static int parse_tensor(const struct context *ctx, const char *name, const json_t *entry, const uint8_t *data,
	uint64_t data_size, struct kvg_tensor *ret)
{
	const char *dtype = json_string_value(json_object_get(entry, "dtype"));
	struct kvg_tensor tensor = {.name = name};
	uint64_t bytes;
	uint32_t element;
	int r;

	if (!dtype)
		return fail(ctx, -EINVAL, "tensor %s has no dtype", name);
	element = dtype_find(dtype, &tensor.dtype);
	r = parse_shape(ctx, json_object_get(entry, "shape"), &tensor);
	if (r < 0)
		return r;
	r = parse_offsets(ctx, json_object_get(entry, "data_offsets"), data, data_size, &tensor);
	if (r < 0)
		return r;
	if (element && (__builtin_mul_overflow(tensor.count, element, &bytes) || bytes != tensor.size))
		return fail(ctx, -EINVAL,
			"tensor %s: %llu elements of %s do not take the %llu bytes of its data_offsets", name,
			(unsigned long long)tensor.count, dtype, (unsigned long long)tensor.size);
	*ret = tensor;
	return 0;
}

static int compare_place(const void *left, const void *right)
{
	const struct kvg_tensor *a = left, *b = right;
	uintptr_t x = (uintptr_t)a->data, y = (uintptr_t)b->data;

	if (x != y)
		return x < y ? -1 : 1;
	return a->size < b->size ? -1 : a->size > b->size;
}

static int compare_name(const void *left, const void *right)
{
	const struct kvg_tensor *a = left, *b = right;

	return strcmp(a->name, b->name);
}

/* The format wants tensors back to back from the first byte of the data to the last. */
static int check_cover(const struct context *ctx, const struct kvg_safetensors *file, const uint8_t *data)
{
	const uint8_t *at = data;

	qsort(file->tensors, file->count, sizeof(*file->tensors), compare_place);
	for (size_t i = 0; i < file->count; i++) {
		const struct kvg_tensor *tensor = &file->tensors[i];

		if ((const uint8_t *)tensor->data != at)
			return fail(ctx, -EINVAL,
				"tensor %s: its data begins at %lld, where the one before ends at %lld", tensor->name,
				(long long)((const uint8_t *)tensor->data - data), (long long)(at - data));
		at += tensor->size;
	}
	if (at != file->bytes + file->size)
		return fail(ctx, -EINVAL, "%lld bytes after the last tensor's data belong to none",
			(long long)(file->bytes + file->size - at));
	return 0;
}

static int check_metadata(const struct context *ctx, json_t *metadata)
{
	const char *key;
	json_t *value;

	if (!metadata)
		return 0;
	if (!json_is_object(metadata))
		return fail(ctx, -EINVAL, "__metadata__ is not an object");
	json_object_foreach(metadata, key, value)
	{
		if (!json_is_string(value))
			return fail(ctx, -EINVAL, "__metadata__ key %s is not a string", key);
	}
	return 0;
}

static int parse_header(const struct context *ctx, struct kvg_safetensors *file, uint64_t header_size)
{
	const uint8_t *data = file->bytes + PREFIX + header_size;
	uint64_t data_size = file->size - PREFIX - header_size;
	json_error_t error;
	const char *name;
	json_t *entry;
	int r;

	file->header = json_loadb((const char *)file->bytes + PREFIX, header_size, JSON_REJECT_DUPLICATES, &error);
	if (!file->header)
		return fail(ctx, -EINVAL, "header is not JSON: %s at byte %d", error.text, error.position);
	if (!json_is_object(file->header))
		return fail(ctx, -EINVAL, "header is not a JSON object");
	r = check_metadata(ctx, json_object_get(file->header, "__metadata__"));
	if (r < 0)
		return r;
	file->tensors = calloc(json_object_size(file->header) + 1, sizeof(*file->tensors));
	if (!file->tensors)
		return fail(ctx, -ENOMEM, "no memory for %zu tensors", json_object_size(file->header));
	json_object_foreach(file->header, name, entry)
	{
		if (strcmp(name, "__metadata__") == 0)
			continue;
		r = parse_tensor(ctx, name, entry, data, data_size, &file->tensors[file->count]);
		if (r < 0)
			return r;
		file->count++;
	}
	r = check_cover(ctx, file, data);
	if (r < 0)
		return r;
	qsort(file->tensors, file->count, sizeof(*file->tensors), compare_name);
	return 0;
}

static int read_all(const struct context *ctx, int fd, uint8_t *bytes, uint64_t size)
{
	for (uint64_t done = 0; done < size;) {
		ssize_t n = pread(fd, bytes + done, size - done, (off_t)done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return fail(ctx, -errno, "cannot be read: %s", strerror(errno));
		if (n == 0)
			return fail(ctx, -EINVAL, "ends at byte %llu of %llu while being read",
				(unsigned long long)done, (unsigned long long)size);
		done += (uint64_t)n;
	}
	return 0;
}

/* Maps what nobody can shrink; anything else is copied, so that nobody's truncation can fault us. */
static int load_bytes(const struct context *ctx, int fd, struct kvg_safetensors *file)
{
	const int sealed = F_SEAL_SHRINK | F_SEAL_WRITE;
	int seals = fcntl(fd, F_GET_SEALS);

	if (seals >= 0 && (seals & sealed) == sealed) {
		void *map = mmap(NULL, file->size, PROT_READ, MAP_PRIVATE, fd, 0);

		if (map == MAP_FAILED)
			return fail(ctx, -errno, "cannot be mapped: %s", strerror(errno));
		file->bytes = map;
		file->mapped = true;
		return 0;
	}
	file->bytes = malloc(file->size);
	if (!file->bytes)
		return fail(ctx, -ENOMEM, "no memory for its %llu bytes", (unsigned long long)file->size);
	return read_all(ctx, fd, file->bytes, file->size);
}

/* Checks the file's size and its header's before anything is allocated for it. The size, never 0, or a negative errno.
 */
static int64_t check_sizes(const struct context *ctx, int fd, uint64_t *ret_header)
{
	uint8_t prefix[PREFIX];
	uint64_t header = 0;
	struct stat st;
	int r;

	if (fstat(fd, &st) < 0)
		return fail(ctx, -errno, "%s", strerror(errno));
	if (!S_ISREG(st.st_mode))
		return fail(ctx, -EINVAL, "is not a regular file");
	if (st.st_size < (off_t)PREFIX)
		return fail(ctx, -EINVAL, "has %lld bytes, less than the %u of a safetensors header length",
			(long long)st.st_size, PREFIX);
	r = read_all(ctx, fd, prefix, sizeof(prefix));
	if (r < 0)
		return r;
	for (unsigned i = PREFIX; i-- > 0;)
		header = header << 8 | prefix[i];
	if (header > HEADER_MAX)
		return fail(ctx, -EINVAL, "header length %llu is above the limit of %u bytes",
			(unsigned long long)header, HEADER_MAX);
	if (header > (uint64_t)st.st_size - PREFIX)
		return fail(ctx, -EINVAL, "header length %llu goes beyond the file's %lld bytes",
			(unsigned long long)header, (long long)st.st_size);
	*ret_header = header;
	return st.st_size;
}

int kvg_safetensors_open_fd(int fd, const char *name, struct kvg_safetensors **ret, char *text, size_t text_size)
{
	const struct context ctx = {.name = name, .text = text, .text_size = text_size};
	struct kvg_safetensors *file;
	uint64_t header = 0;
	int64_t size = check_sizes(&ctx, fd, &header);
	int r;

	if (size <= 0)
		return (int)size;
	file = calloc(1, sizeof(*file));
	if (!file)
		return fail(&ctx, -ENOMEM, "no memory");
	file->size = (uint64_t)size;
	r = load_bytes(&ctx, fd, file);
	if (r == 0)
		r = parse_header(&ctx, file, header);
	if (r < 0) {
		(void)kvg_safetensors_free(file);
		return r;
	}
	*ret = file;
	return 0;
}

int kvg_safetensors_open(const char *path, struct kvg_safetensors **ret, char *text, size_t text_size)
{
	const struct context ctx = {.name = path, .text = text, .text_size = text_size};
	/* O_NONBLOCK: opening a FIFO must not hang; it is refused as no regular file. */
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	int r;

	if (fd < 0)
		return fail(&ctx, -errno, "cannot be opened: %s", strerror(errno));
	r = kvg_safetensors_open_fd(fd, path, ret, text, text_size);
	(void)close(fd);
	return r;
}

struct kvg_safetensors *kvg_safetensors_free(struct kvg_safetensors *file)
{
	if (!file)
		return NULL;
	if (file->mapped)
		(void)munmap(file->bytes, file->size);
	else
		free(file->bytes);
	json_decref(file->header);
	free(file->tensors);
	free(file);
	return NULL;
}

const struct kvg_tensor *kvg_safetensors_find(const struct kvg_safetensors *file, const char *name)
{
	const struct kvg_tensor key = {.name = name};

	return bsearch(&key, file->tensors, file->count, sizeof(key), compare_name);
}

size_t kvg_safetensors_count(const struct kvg_safetensors *file)
{
	return file->count;
}

const struct kvg_tensor *kvg_safetensors_at(const struct kvg_safetensors *file, size_t index)
{
	return index < file->count ? &file->tensors[index] : NULL;
}

const char *kvg_safetensors_metadata(const struct kvg_safetensors *file, const char *key)
{
	return json_string_value(json_object_get(json_object_get(file->header, "__metadata__"), key));
}
