/*
 * safetensors.h - reader of safetensors files: header length (8 bytes), JSON
 * header, raw tensors. Every offset, dtype and shape is checked before a tensor
 * is handed out, so that a truncated or lying file is one error line and never
 * a wild pointer. Memory of the tensors belongs to the file object.
 */
#ifndef KVG_SAFETENSORS_H
#define KVG_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#define KVG_TENSOR_DIMS 8

enum kvg_tensor_dtype {
	KVG_TENSOR_BF16 = 1,
	KVG_TENSOR_F16,
	KVG_TENSOR_F32,
	KVG_TENSOR_F64,
	KVG_TENSOR_I32,
	KVG_TENSOR_I64,
	KVG_TENSOR_U8,
	KVG_TENSOR_OTHER
};

struct kvg_tensor {
	const char *name;
	enum kvg_tensor_dtype dtype;
	unsigned rank;
	uint64_t shape[KVG_TENSOR_DIMS];
	uint64_t count;   /* elements */
	const void *data; /* aligned as the file aligns it: read through memcpy or after a check */
	uint64_t size;    /* bytes */
};

struct kvg_safetensors;

/* Opens and checks a file on disk. 0 or a negative errno; text (of text_size bytes) then says what is wrong with which
 * file. */
int kvg_safetensors_open(const char *path, struct kvg_safetensors **ret, char *text, size_t text_size);

/* The same over a descriptor (not closed): it must be a regular file or memfd. name is for messages. */
int kvg_safetensors_open_fd(int fd, const char *name, struct kvg_safetensors **ret, char *text, size_t text_size);

/* Frees all; NULL is fine. Returns NULL. */
struct kvg_safetensors *kvg_safetensors_free(struct kvg_safetensors *file);

/* The tensor of that name, or NULL. */
const struct kvg_tensor *kvg_safetensors_find(const struct kvg_safetensors *file, const char *name);

size_t kvg_safetensors_count(const struct kvg_safetensors *file);
const struct kvg_tensor *kvg_safetensors_at(const struct kvg_safetensors *file, size_t index);

/* Value of a key of __metadata__, or NULL. */
const char *kvg_safetensors_metadata(const struct kvg_safetensors *file, const char *key);

#endif
