#include "daemon/sequence/gates.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/memory/kind.h"
#include "proto/gate_file.h"

#ifdef KVG_HAS_CUDA
#include "daemon/sequence/cuda.h"
#endif

#define HEADER_PER_LAYER 16384u
#define HEADER_BASE      65536u
#define WIDTH_MAX        256u
#define SINKS_MAX        1024u
#define WEIGHTS_MAX      ((uint64_t)4 << 30) /* bytes of all layers' weights as bf16 */

struct gate_set *gate_set_free(struct gate_set *set)
{
	if (!set)
		return NULL;
	for (uint32_t i = 0; i < set->layers; i++)
		(void)kvg_gate_free(set->gates[i]);
	free(set);
	return NULL;
}

/* What is sealed can neither shrink under a mapping nor change between check and use. */
static int check_seals(int fd, char *text, size_t size)
{
	int need = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE, seals = fcntl(fd, F_GET_SEALS);

	if (seals >= 0 && (seals & need) == need)
		return 0;
	(void)snprintf(text, size, "gate: the descriptor is not a memfd sealed against writing, growing and shrinking");
	return -EINVAL;
}

/* A JSON header is parsed into many times its size: a gate's own is a few hundred bytes a layer. */
static int check_header(int fd, uint32_t layers, char *text, size_t size)
{
	uint64_t length, limit = (uint64_t)layers * HEADER_PER_LAYER + HEADER_BASE;

	if (pread(fd, &length, sizeof(length), 0) != sizeof(length)) {
		(void)snprintf(text, size, "gate: the file is shorter than its 8-byte header length");
		return -EINVAL;
	}
	if (length <= limit)
		return 0;
	(void)snprintf(text, size, "gate: a header of %" PRIu64 " bytes, at most %" PRIu64 " for %u layers", length,
		limit, layers);
	return -EINVAL;
}

/* What the layers would take if all were as large as this one: a sparse file claims any size for nothing. */
static int check_weights(uint32_t layer, const struct kvg_gate_shape *shape, uint32_t layers, char *text, size_t size)
{
	uint64_t columns = (uint64_t)shape->heads * (shape->group + 1) * shape->width;
	uint64_t sinks = (uint64_t)shape->heads * shape->sinks * shape->width;
	uint64_t bytes = layers * (columns * shape->hidden + sinks) * sizeof(uint16_t);

	if (bytes <= WEIGHTS_MAX)
		return 0;
	(void)snprintf(text, size,
		"gate: layer %u has width %u and %u sinks: %u such layers have %" PRIu64
		" bytes of weights, at most %" PRIu64,
		layer, shape->width, shape->sinks, layers, bytes, WEIGHTS_MAX);
	return -EFBIG;
}

static int check_shape(
	uint32_t layer, const struct kvg_gate_shape *shape, const struct kvg_layout *layout, char *text, size_t size)
{
	const struct kvg_group *group = &layout->groups[0];

	if (shape->width > WIDTH_MAX || shape->sinks > SINKS_MAX) {
		(void)snprintf(text, size, "gate: layer %u has width %u and %u sinks, at most %u and %u", layer,
			shape->width, shape->sinks, WIDTH_MAX, SINKS_MAX);
		return -EINVAL;
	}
	if (shape->heads == group->head_count && shape->group == group->query_heads &&
		shape->hidden == layout->hidden_dim)
		return check_weights(layer, shape, group->layers, text, size);
	(void)snprintf(text, size, "gate: layer %u has %u KV heads, group %u, hidden %u; the layout has %u, %u, %u",
		layer, shape->heads, shape->group, shape->hidden, group->head_count, group->query_heads,
		layout->hidden_dim);
	return -EINVAL;
}

static struct kvg_gate_weights weights_of(const struct kvg_gate_tensors *t)
{
	return (struct kvg_gate_weights){.heads = t->shape.heads,
		.group = t->shape.group,
		.hidden = t->shape.hidden,
		.width = t->shape.width,
		.sinks = t->shape.sinks,
		.wq = t->wq,
		.bq = t->bq,
		.wk = t->wk,
		.b = t->b,
		.q_norm = t->q_norm,
		.k_norm = t->k_norm,
		.k_base = t->k_base};
}

static int read_layer(const struct kvg_safetensors *file, uint32_t layer, const struct kvg_layout *layout,
	struct kvg_gate_tensors *ret, char *text, size_t size)
{
	struct kvg_gate_shape shape;
	char prefix[32];
	int r;

	(void)snprintf(prefix, sizeof(prefix), "layers.%u.", layer);
	r = kvg_gate_shape_read(file, prefix, &shape, text, size);
	if (r >= 0)
		r = check_shape(layer, &shape, layout, text, size);
	return r < 0 ? r : kvg_gate_tensors_read(file, prefix, ret, text, size);
}

static int load_on_host(const struct kvg_safetensors *file, const struct kvg_layout *layout, struct gate_set *set,
	char *text, size_t size)
{
	int r = 0;

	for (uint32_t i = 0; r >= 0 && i < set->layers; i++) {
		struct kvg_gate_weights weights;
		struct kvg_gate_tensors t;

		r = read_layer(file, i, layout, &t, text, size);
		if (r < 0)
			return r;
		weights = weights_of(&t);
		set->width = weights.width;
		r = kvg_gate_new(&weights, &set->gates[i]);
		if (r < 0)
			(void)snprintf(text, size, "gate: layer %u: %s", i, strerror(-r));
		else
			set->folded += kvg_gate_folded(set->gates[i]) != 0;
		kvg_gate_tensors_deinit(&t);
	}
	return r;
}

#ifdef KVG_HAS_CUDA

static int make_on_device(
	struct kind *kind, const struct kvg_gate_weights *weights, struct gate_set *set, char *text, size_t size)
{
	const struct cuda_kernels *kernels = cuda_kernels(kind);
	CUresult result = kernels ? kvg_cuda_enter(kernels->cuda) : CUDA_ERROR_NOT_INITIALIZED;

	if (result == CUDA_SUCCESS)
		set->device = kvg_cuda_gate_new(kernels->gate, weights, set->layers, &result);
	if (result == CUDA_SUCCESS) {
		set->device_bytes = kvg_cuda_gate_bytes(set->device);
		for (uint32_t i = 0; i < set->layers; i++)
			set->folded += kvg_cuda_gate_folded(set->device, i);
		return 0;
	}
	if (result == CUDA_ERROR_NOT_SUPPORTED) {
		(void)snprintf(text, size, "gate: width %u, group %u, hidden %u: the kind cuda has no kernel for these",
			weights->width, weights->group, weights->hidden);
		return -EOPNOTSUPP;
	}
	kind_cuda_check(kind, result, "loading a gate");
	(void)snprintf(text, size, "gate: its weights cannot be put on the device: error %d", (int)result);
	return kvg_cuda_errno(result);
}

/* The device's gate is made of all layers at once. */
static int load_on_device(const struct kvg_safetensors *file, const struct kvg_layout *layout, struct kind *kind,
	struct gate_set *set, char *text, size_t size)
{
	struct kvg_gate_tensors *t = calloc(set->layers, sizeof(*t));
	struct kvg_gate_weights *weights = calloc(set->layers, sizeof(*weights));
	uint32_t count = 0;
	int r = t && weights ? 0 : -ENOMEM;

	if (r < 0)
		(void)snprintf(text, size, "gate: out of memory");
	for (; r >= 0 && count < set->layers; count++) {
		r = read_layer(file, count, layout, &t[count], text, size);
		if (r < 0)
			break;
		weights[count] = weights_of(&t[count]);
		set->width = weights[count].width;
	}
	if (r >= 0)
		r = make_on_device(kind, weights, set, text, size);
	for (uint32_t i = 0; i < count; i++)
		kvg_gate_tensors_deinit(&t[i]);
	free(t);
	free(weights);
	return r;
}

void gate_set_close(struct gate_set *set)
{
	if (set)
		set->device = kvg_cuda_gate_free(set->device);
}

#else

static int load_on_device(const struct kvg_safetensors *file, const struct kvg_layout *layout, struct kind *kind,
	struct gate_set *set, char *text, size_t size)
{
	(void)file;
	(void)layout;
	(void)kind;
	(void)set;
	(void)snprintf(text, size, "gate: this daemon was built without the kind cuda");
	return -EOPNOTSUPP;
}

void gate_set_close(struct gate_set *set)
{
	(void)set;
}

#endif

static int load_layers(const struct kvg_safetensors *file, const struct kvg_layout *layout, struct kind *kind,
	struct gate_set *set, char *text, size_t size)
{
	if (kind->ops->device(kind))
		return load_on_device(file, layout, kind, set, text, size);
	return load_on_host(file, layout, set, text, size);
}

int gate_set_load(
	int fd, const struct kvg_layout *layout, struct kind *kind, struct gate_set **ret, char *text, size_t size)
{
	struct kvg_safetensors *file;
	struct gate_set *set;
	uint32_t layers = layout->groups[0].layers, found;
	int r = check_seals(fd, text, size);

	if (r >= 0)
		r = check_header(fd, layers, text, size);
	if (r >= 0)
		r = kvg_safetensors_open_fd(fd, "gate", &file, text, size);
	if (r < 0)
		return r;
	found = kvg_gate_file_layers(file);
	set = calloc(1, sizeof(*set) + layers * sizeof(struct kvg_gate *));
	if (found != layers) {
		(void)snprintf(text, size, "gate: %u layers, the layout has %u", found, layers);
		r = -EINVAL;
	} else if (!set) {
		(void)snprintf(text, size, "gate: out of memory");
		r = -ENOMEM;
	} else {
		set->layers = layers;
		r = load_layers(file, layout, kind, set, text, size);
	}
	(void)kvg_safetensors_free(file);
	if (r < 0) {
		gate_set_close(set);
		(void)gate_set_free(set);
	} else {
		*ret = set;
	}
	return r;
}
