#include "kernels/cuda/gate_model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

extern const unsigned char kvg_image_gate[], kvg_image_gate_sm90[];

/* ---- code ---- */

#define GROUPS(X)    X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(16)
#define NAMES_OF(g)  "kvg_gate_hidden_" #g, "kvg_gate_preact_" #g,
#define NUMBER_OF(g) g,

static const char *const portable_names[] = {GROUPS(NAMES_OF)};
static const uint8_t portable_groups[] = {GROUPS(NUMBER_OF)};

/* The shapes of gate_sm90.cu: a block's tile has `parts` products of `heads` heads when wide, one when deep. */
static const struct tiled_shape {
	uint8_t group, heads, parts;
} tiled_shapes[] = {{1, 4, 2}, {2, 4, 1}, {4, 2, 2}, {5, 2, 1}, {7, 2, 1}};

static const char *const tiled_names[] = {"kvg_gate_wide_1", "kvg_gate_deep_1", "kvg_gate_wide_2", "kvg_gate_deep_2",
	"kvg_gate_wide_4", "kvg_gate_deep_4", "kvg_gate_wide_5", "kvg_gate_deep_5", "kvg_gate_wide_7",
	"kvg_gate_deep_7"};

#define COUNT(array) (sizeof(array) / sizeof(*(array)))

static CUresult allow_shared(const struct kvg_cuda *cuda, CUfunction function, uint32_t bytes)
{
	return cuda->driver->cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)bytes);
}

static CUresult load_portable(struct kvg_cuda_gate_kernels *kernels)
{
	CUfunction functions[COUNT(portable_names)];
	CUresult result = kvg_cuda_module_load(
		kernels->cuda, kvg_image_gate, portable_names, COUNT(portable_names), &kernels->portable, functions);

	for (size_t i = 0; i < COUNT(portable_groups) && result == CUDA_SUCCESS; i++) {
		uint32_t group = portable_groups[i];
		struct kvg_gate_code *code = &kernels->groups[group];

		code->hidden = functions[2 * i];
		code->preact = functions[2 * i + 1];
		code->hidden_shared = 3 * (64 + (group + 1) * KVG_GATE_WIDTH) * (32 + 8) * 2; /* gate.cu */
		result = allow_shared(kernels->cuda, code->hidden, code->hidden_shared);
	}
	return result;
}

static CUresult count_clusters(const struct kvg_cuda *cuda, struct kvg_gate_tiled *tiled)
{
	CUlaunchAttribute attribute = {.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, .value.clusterDim = {2, 1, 1}};
	const CUlaunchConfig config = {.gridDimX = (unsigned)cuda->sm_count / 2 * 2,
		.gridDimY = 1,
		.gridDimZ = 1,
		.blockDimX = 384,
		.blockDimY = 1,
		.blockDimZ = 1,
		.sharedMemBytes = tiled->shared,
		.attrs = &attribute,
		.numAttrs = 1};
	int clusters = 0;
	CUresult result = cuda->driver->cuOccupancyMaxActiveClusters(&clusters, tiled->function, &config);

	tiled->clusters = clusters > 0 ? (uint32_t)clusters : 1;
	return result;
}

static CUresult prepare_tiled(const struct kvg_cuda *cuda, const struct tiled_shape *shape, bool deep,
	CUfunction function, struct kvg_gate_tiled *tiled)
{
	uint32_t lines = shape->heads * (shape->group + 1u) * KVG_GATE_WIDTH; /* of one product */
	uint32_t block_lines = lines * (deep ? 1 : shape->parts);
	uint32_t stage = (128 + block_lines) * KVG_GATE_CHUNK * 2, stages = (232448 - 2048) / stage;
	CUresult result;

	*tiled = (struct kvg_gate_tiled){.function = function,
		.rows = deep ? 128 : 256,
		.heads = shape->heads * (deep ? 2u : shape->parts),
		.box_rows = deep ? 64 : 128,
		.box_weights = deep ? lines : block_lines / 2,
		.shared = (stages < 8 ? stages : 8) * stage + 1024,
		.sums = 64 * block_lines * (uint32_t)sizeof(float)};
	result = allow_shared(cuda, function, tiled->shared);
	return result == CUDA_SUCCESS ? count_clusters(cuda, tiled) : result;
}

static CUresult load_tiled(struct kvg_cuda_gate_kernels *kernels)
{
	CUfunction functions[COUNT(tiled_names)];
	CUresult result = kvg_cuda_module_load(
		kernels->cuda, kvg_image_gate_sm90, tiled_names, COUNT(tiled_names), &kernels->tiled, functions);

	for (size_t i = 0; i < COUNT(tiled_shapes) && result == CUDA_SUCCESS; i++) {
		const struct tiled_shape *shape = &tiled_shapes[i];
		struct kvg_gate_code *code = &kernels->groups[shape->group];

		result = prepare_tiled(kernels->cuda, shape, false, functions[2 * i], &code->wide);
		if (result == CUDA_SUCCESS)
			result = prepare_tiled(kernels->cuda, shape, true, functions[2 * i + 1], &code->deep);
	}
	return result;
}

struct kvg_cuda_gate_kernels *kvg_cuda_gate_kernels_new(const struct kvg_cuda *cuda, CUresult *ret)
{
	struct kvg_cuda_gate_kernels *kernels = calloc(1, sizeof(*kernels));

	if (!kernels) {
		*ret = CUDA_ERROR_OUT_OF_MEMORY;
		return NULL;
	}
	kernels->cuda = cuda;
	*ret = load_portable(kernels);
	if (*ret == CUDA_SUCCESS && cuda->capability == 90)
		*ret = load_tiled(kernels);
	return *ret == CUDA_SUCCESS ? kernels : kvg_cuda_gate_kernels_free(kernels);
}

struct kvg_cuda_gate_kernels *kvg_cuda_gate_kernels_free(struct kvg_cuda_gate_kernels *kernels)
{
	if (!kernels)
		return NULL;
	if (kernels->portable)
		(void)kernels->cuda->driver->cuModuleUnload(kernels->portable);
	if (kernels->tiled)
		(void)kernels->cuda->driver->cuModuleUnload(kernels->tiled);
	free(kernels);
	return NULL;
}

/* ---- weights ---- */

/* Rounds to nearest even; NaN stays NaN. */
static uint16_t to_bf16(float value)
{
	uint32_t bits;

	memcpy(&bits, &value, sizeof(bits));
	if (value != value)
		return (uint16_t)(bits >> 16 | 0x40);
	return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* One line of D values: 64 of them in each chunk. */
static void pack_line(const struct kvg_cuda_gate *gate, uint16_t *to, uint32_t line, const float *from)
{
	size_t chunk_values = (size_t)kvg_gate_lines(gate) * KVG_GATE_CHUNK;

	to += (size_t)line * KVG_GATE_CHUNK;
	for (uint32_t i = 0; i < gate->hidden; i++)
		to[i / KVG_GATE_CHUNK * chunk_values + i % KVG_GATE_CHUNK] = to_bf16(from[i]);
}

/* Each head's lines of Wq, then its lines of Wk. */
static void pack_weights(const struct kvg_cuda_gate *gate, uint16_t *to, const struct kvg_gate_weights *w)
{
	uint32_t queries = w->group * KVG_GATE_WIDTH, lines = queries + KVG_GATE_WIDTH;

	for (uint32_t head = 0; head < w->heads; head++) {
		for (uint32_t i = 0; i < queries; i++)
			pack_line(gate, to, head * lines + i, w->wq + ((size_t)head * queries + i) * w->hidden);
		for (uint32_t i = 0; i < KVG_GATE_WIDTH; i++)
			pack_line(gate, to, head * lines + queries + i,
				w->wk + ((size_t)head * KVG_GATE_WIDTH + i) * w->hidden);
	}
}

static bool sinks_equal(const struct kvg_gate_weights *w)
{
	for (uint32_t head = 0; head < w->heads; head++) {
		const float *base = w->k_base + (size_t)head * w->sinks * w->width;

		for (size_t i = w->width; i < (size_t)w->sinks * w->width; i++)
			if (base[i] != base[i % w->width])
				return false;
	}
	return true;
}

/* The norms' weights, 1/sqrt(d) and 1/ln 2 go into what the projected queries meet. */
static void pack_constants(const struct kvg_cuda_gate *gate, float *to, const struct kvg_gate_weights *w, bool folded)
{
	const float per_ln2 = 1.44269504f, scale = per_ln2 / sqrtf((float)KVG_GATE_WIDTH);

	to[KVG_GATE_AT_WEIGHT] = folded ? (float)w->sinks : 1.0f;
	to[KVG_GATE_AT_SINKS] = folded ? 1.0f : (float)w->sinks;
	for (uint32_t i = 0; i < KVG_GATE_WIDTH; i++)
		to[KVG_GATE_AT_QK + i] = w->q_norm[i] * w->k_norm[i] * scale;
	memcpy(to + KVG_GATE_AT_BQ, w->bq, (size_t)w->heads * w->group * KVG_GATE_WIDTH * sizeof(*to));
	for (uint32_t i = 0; i < w->heads * w->group; i++)
		to[gate->at_b + i] = w->b[i] * per_ln2;
	for (size_t i = 0; i < (size_t)w->heads * w->sinks * KVG_GATE_WIDTH; i++)
		to[gate->at_bases + i] = w->k_base[i] * w->q_norm[i % KVG_GATE_WIDTH] * scale;
}

static CUresult check_layers(
	const struct kvg_cuda_gate_kernels *kernels, const struct kvg_gate_weights *layers, uint32_t count)
{
	if (count == 0)
		return CUDA_ERROR_INVALID_VALUE;
	for (uint32_t i = 0; i < count; i++) {
		const struct kvg_gate_weights *w = &layers[i];

		if (!w->wq || !w->bq || !w->wk || !w->b || !w->q_norm || !w->k_norm || !w->k_base)
			return CUDA_ERROR_INVALID_VALUE;
		if (w->heads != layers->heads || w->group != layers->group || w->hidden != layers->hidden ||
			w->width != layers->width || w->sinks != layers->sinks)
			return CUDA_ERROR_INVALID_VALUE;
	}
	if (layers->heads == 0 || layers->hidden == 0 || layers->sinks == 0)
		return CUDA_ERROR_INVALID_VALUE;
	if (layers->width != KVG_GATE_WIDTH || layers->group > KVG_GATE_GROUP_MAX || layers->heads > 4096 ||
		!kernels->groups[layers->group].hidden || layers->hidden % 8 != 0 || layers->hidden > 1u << 20 ||
		layers->sinks > 4096)
		return CUDA_ERROR_NOT_SUPPORTED;
	return CUDA_SUCCESS;
}

CUresult kvg_gate_map(const struct kvg_cuda *cuda, CUtensorMap *map, CUdeviceptr at, const uint64_t sizes[3],
	const uint64_t strides[2], uint32_t box_lines)
{
	const cuuint32_t box[] = {KVG_GATE_CHUNK, box_lines, 1}, steps[] = {1, 1, 1};

	return cuda->driver->cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)(uintptr_t)at,
		sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
		CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

static CUresult upload_layer(struct kvg_cuda_gate *gate, uint32_t layer, const struct kvg_gate_weights *w,
	uint16_t *weights, float *constants)
{
	const struct kvg_cuda_driver *driver = gate->kernels->cuda->driver;
	size_t bytes = gate->layer_floats * sizeof(float);
	CUresult result;

	gate->folded[layer] = sinks_equal(w);
	memset(weights, 0, gate->layer_bytes);
	pack_weights(gate, weights, w);
	memset(constants, 0, bytes);
	pack_constants(gate, constants, w, gate->folded[layer]);
	result = driver->cuMemcpyHtoD(gate->weights + layer * gate->layer_bytes, weights, gate->layer_bytes);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemcpyHtoD(gate->constants + layer * bytes, constants, bytes);
	return result;
}

static CUresult upload(struct kvg_cuda_gate *gate, const struct kvg_gate_weights *layers)
{
	uint16_t *weights = malloc(gate->layer_bytes);
	float *constants = malloc(gate->layer_floats * sizeof(float));
	CUresult result = weights && constants ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;

	for (uint32_t i = 0; i < gate->layers && result == CUDA_SUCCESS; i++)
		result = upload_layer(gate, i, &layers[i], weights, constants);
	free(weights);
	free(constants);
	return result;
}

static CUresult allocate(struct kvg_cuda_gate *gate)
{
	const struct kvg_cuda_driver *driver = gate->kernels->cuda->driver;
	CUresult result;

	gate->folded = calloc(gate->layers, sizeof(*gate->folded));
	if (!gate->folded)
		return CUDA_ERROR_OUT_OF_MEMORY;
	result = driver->cuMemAlloc(&gate->weights, gate->layers * gate->layer_bytes);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemAlloc(&gate->constants, gate->layers * gate->layer_floats * sizeof(float));
	return result;
}

static CUresult make_maps(struct kvg_cuda_gate *gate)
{
	const struct kvg_gate_code *code = gate->code;
	const struct kvg_cuda *cuda = gate->kernels->cuda;
	const uint64_t line = KVG_GATE_CHUNK * 2, lines = kvg_gate_lines(gate);
	const uint64_t sizes[] = {KVG_GATE_CHUNK, lines, (uint64_t)gate->chunks * gate->layers};
	const uint64_t strides[] = {line, lines * line};
	CUresult result;

	if (!code->wide.function)
		return CUDA_SUCCESS;
	result = kvg_gate_map(cuda, &gate->wide_map, gate->weights, sizes, strides, code->wide.box_weights);
	if (result == CUDA_SUCCESS)
		result = kvg_gate_map(cuda, &gate->deep_map, gate->weights, sizes, strides, code->deep.box_weights);
	return result;
}

/* The sizes of everything; floats are counted in fours, so that vectors are aligned. */
static void lay_out(struct kvg_cuda_gate *gate, const struct kvg_gate_weights *w)
{
	gate->heads = w->heads;
	gate->group = w->group;
	gate->hidden = w->hidden;
	gate->sinks = w->sinks;
	gate->chunks = (w->hidden + KVG_GATE_CHUNK - 1) / KVG_GATE_CHUNK;
	gate->layer_bytes = (uint64_t)kvg_gate_lines(gate) * gate->chunks * KVG_GATE_CHUNK * 2;
	gate->at_b = KVG_GATE_AT_BQ + w->heads * w->group * KVG_GATE_WIDTH;
	gate->at_bases = gate->at_b + (w->heads * w->group + 3) / 4 * 4;
	gate->layer_floats = gate->at_bases + w->heads * w->sinks * KVG_GATE_WIDTH;
}

struct kvg_cuda_gate *kvg_cuda_gate_new(const struct kvg_cuda_gate_kernels *kernels,
	const struct kvg_gate_weights *layers, uint32_t count, CUresult *ret)
{
	struct kvg_cuda_gate *gate;

	*ret = check_layers(kernels, layers, count);
	if (*ret != CUDA_SUCCESS)
		return NULL;
	gate = aligned_alloc(64, (sizeof(*gate) + 63) / 64 * 64);
	if (!gate) {
		*ret = CUDA_ERROR_OUT_OF_MEMORY;
		return NULL;
	}
	memset(gate, 0, sizeof(*gate));
	gate->kernels = kernels;
	gate->code = &kernels->groups[layers->group];
	gate->layers = count;
	lay_out(gate, layers);
	*ret = allocate(gate);
	if (*ret == CUDA_SUCCESS)
		*ret = upload(gate, layers);
	if (*ret == CUDA_SUCCESS)
		*ret = make_maps(gate);
	return *ret == CUDA_SUCCESS ? gate : kvg_cuda_gate_free(gate);
}

struct kvg_cuda_gate *kvg_cuda_gate_free(struct kvg_cuda_gate *gate)
{
	if (!gate)
		return NULL;
	if (gate->weights)
		(void)gate->kernels->cuda->driver->cuMemFree(gate->weights);
	if (gate->constants)
		(void)gate->kernels->cuda->driver->cuMemFree(gate->constants);
	free(gate->folded);
	free(gate);
	return NULL;
}

uint64_t kvg_cuda_gate_bytes(const struct kvg_cuda_gate *gate)
{
	return gate->layers * (gate->layer_bytes + gate->layer_floats * sizeof(float));
}

bool kvg_cuda_gate_folded(const struct kvg_cuda_gate *gate, uint32_t layer)
{
	return layer < gate->layers && gate->folded[layer];
}
