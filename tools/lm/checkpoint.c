#include "tools/lm/checkpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/host/dtype.h"

#define PATH_SIZE 4096

struct shard {
	char *name;
	struct kvg_safetensors *file;
};

struct lm_checkpoint {
	char *dir;
	size_t shard_count;
	struct shard *shards;
};

struct lm_checkpoint *lm_checkpoint_free(struct lm_checkpoint *checkpoint)
{
	if (!checkpoint)
		return NULL;
	for (size_t i = 0; i < checkpoint->shard_count; i++) {
		(void)kvg_safetensors_free(checkpoint->shards[i].file);
		free(checkpoint->shards[i].name);
	}
	free(checkpoint->shards);
	free(checkpoint->dir);
	free(checkpoint);
	return NULL;
}

static int join_path(const char *dir, const char *name, char *path, char *text)
{
	if (snprintf(path, PATH_SIZE, "%s/%s", dir, name) >= PATH_SIZE)
		return lm_fail(text, -ENAMETOOLONG, "%.64s...: the path is longer than %d bytes", dir, PATH_SIZE);
	return 0;
}

static bool has_shard(const struct lm_checkpoint *checkpoint, const char *name)
{
	for (size_t i = 0; i < checkpoint->shard_count; i++)
		if (strcmp(checkpoint->shards[i].name, name) == 0)
			return true;
	return false;
}

static int add_shard(struct lm_checkpoint *checkpoint, const char *name, char *text)
{
	struct shard *grown = reallocarray(checkpoint->shards, checkpoint->shard_count + 1, sizeof(*grown));
	struct shard *shard;
	char path[PATH_SIZE];
	int e = join_path(checkpoint->dir, name, path, text);

	if (grown)
		checkpoint->shards = grown;
	if (e < 0)
		return e;
	if (!grown)
		return lm_fail(text, -ENOMEM, "%s: out of memory", path);
	shard = &checkpoint->shards[checkpoint->shard_count];
	*shard = (struct shard){.name = strdup(name)};
	if (!shard->name)
		return lm_fail(text, -ENOMEM, "%s: out of memory", path);
	checkpoint->shard_count++;
	return kvg_safetensors_open(path, &shard->file, text, LM_TEXT);
}

static int add_indexed(struct lm_checkpoint *checkpoint, const char *path, const json_t *index, char *text)
{
	json_t *map = json_object_get(index, "weight_map"), *value;
	const char *tensor;

	if (json_object_size(map) == 0)
		return lm_fail(text, -EINVAL, "%s: weight_map is missing or empty", path);
	json_object_foreach(map, tensor, value)
	{
		const char *name = json_string_value(value);

		if (!name || name[0] == '.' || strchr(name, '/'))
			return lm_fail(text, -EINVAL, "%s: the file of %.128s is not a file name: %.128s", path, tensor,
				name ? name : "(not a string)");
		if (!has_shard(checkpoint, name)) {
			int e = add_shard(checkpoint, name, text);

			if (e < 0)
				return e;
		}
	}
	return 0;
}

static int open_index(struct lm_checkpoint *checkpoint, char *text)
{
	char path[PATH_SIZE];
	json_error_t error;
	json_t *index = NULL;
	int fd, e = join_path(checkpoint->dir, "model.safetensors.index.json", path, text);

	if (e < 0)
		return e;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 && errno == ENOENT)
		return lm_fail(text, -ENOENT, "%s: no model.safetensors and no model.safetensors.index.json there",
			checkpoint->dir);
	if (fd < 0)
		return lm_fail(text, -errno, "%s: %s", path, strerror(errno));
	index = json_loadfd(fd, JSON_REJECT_DUPLICATES, &error);
	(void)close(fd);
	if (!index)
		return lm_fail(text, -EINVAL, "%s:%d: %s", path, error.line, error.text);
	e = add_indexed(checkpoint, path, index, text);
	json_decref(index);
	return e;
}

int lm_checkpoint_open(const char *dir, struct lm_checkpoint **ret, char *text)
{
	struct lm_checkpoint *checkpoint = calloc(1, sizeof(*checkpoint));
	char path[PATH_SIZE];
	int e;

	if (checkpoint)
		checkpoint->dir = strdup(dir);
	if (!checkpoint || !checkpoint->dir) {
		(void)lm_checkpoint_free(checkpoint);
		return lm_fail(text, -ENOMEM, "%s: out of memory", dir);
	}
	e = join_path(dir, "model.safetensors", path, text);
	if (e == 0 && access(path, F_OK) == 0)
		e = add_shard(checkpoint, "model.safetensors", text);
	else if (e == 0)
		e = open_index(checkpoint, text);
	if (e < 0) {
		(void)lm_checkpoint_free(checkpoint);
		return e;
	}
	*ret = checkpoint;
	return 0;
}

static uint32_t storage_dtype(enum kvg_tensor_dtype dtype)
{
	switch (dtype) {
	case KVG_TENSOR_BF16:
		return KVG_KERNEL_BF16;
	case KVG_TENSOR_F16:
		return KVG_KERNEL_F16;
	case KVG_TENSOR_F32:
		return KVG_KERNEL_F32;
	default:
		return 0;
	}
}

/* Through an aligned buffer, since a file may place a tensor at any byte. */
static void convert(uint32_t dtype, float *dst, const void *src, size_t count)
{
	_Alignas(64) unsigned char buffer[16384];
	size_t width = kvg_dtype_size(dtype), piece = sizeof(buffer) / width;

	for (size_t done = 0; done < count; done += piece) {
		size_t n = count - done < piece ? count - done : piece;

		memcpy(buffer, (const unsigned char *)src + done * width, n * width);
		kvg_dtype_load(dtype, dst + done, buffer, n);
	}
}

static const struct kvg_tensor *find(const struct lm_checkpoint *checkpoint, const char *name, const char **ret_file)
{
	for (size_t i = 0; i < checkpoint->shard_count; i++) {
		const struct kvg_tensor *tensor = kvg_safetensors_find(checkpoint->shards[i].file, name);

		*ret_file = checkpoint->shards[i].name;
		if (tensor)
			return tensor;
	}
	return NULL;
}

static char *shape_text(unsigned rank, const uint64_t *shape, char text[160])
{
	size_t used = (size_t)snprintf(text, 160, "[");

	for (unsigned i = 0; i < rank && used < 120; i++)
		used += (size_t)snprintf(
			text + used, 160 - used, "%s%llu", i ? ", " : "", (unsigned long long)shape[i]);
	(void)snprintf(text + used, 160 - used, "]");
	return text;
}

int lm_checkpoint_read(const struct lm_checkpoint *checkpoint, const char *name, uint64_t rows, uint64_t columns,
	float *dst, char *text)
{
	const char *file = "";
	const struct kvg_tensor *tensor = find(checkpoint, name, &file);
	const uint64_t shape[2] = {rows, columns};
	unsigned rank = columns ? 2 : 1;
	char has[160], needs[160];
	uint32_t dtype;

	if (!tensor)
		return lm_fail(text, -ENOENT, "%s: tensor %s is missing", checkpoint->dir, name);
	dtype = storage_dtype(tensor->dtype);
	if (dtype == 0)
		return lm_fail(
			text, -EINVAL, "%s/%s: tensor %s is not of bf16, f16 or f32", checkpoint->dir, file, name);
	if (tensor->rank != rank || memcmp(tensor->shape, shape, rank * sizeof(shape[0])) != 0)
		return lm_fail(text, -EINVAL, "%s/%s: tensor %s has shape %s, config.json needs %s", checkpoint->dir,
			file, name, shape_text(tensor->rank, tensor->shape, has), shape_text(rank, shape, needs));
	convert(dtype, dst, tensor->data, tensor->count);
	return 0;
}
