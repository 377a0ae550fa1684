#include "tools/bench/insitu_model.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/bench/gpu_cublas.h"

#define HIDDEN_ROWS 512u /* of the pool that rows are taken from, at least */
#define GATE_WIDTH  16u
#define GATE_SINKS  16u

struct model {
	struct gpu_bench bench;
	uint32_t layers, rows, columns, hidden_rows;
	bool wide;
	CUdeviceptr hidden, attention, residual, mlp, qkv;
	struct layer {
		CUdeviceptr weights[4]; /* qkv, o, gate and up, down */
		struct gpu_cublas *products[4];
	} layer[MODEL_LAYERS];
};

/* ---- the model ---- */

/* Rows of weights and inputs of the four products. */
static uint64_t outputs(const struct model *model, unsigned product)
{
	const uint64_t counts[4] = {model->columns, MODEL_HIDDEN, 2 * MODEL_MLP, MODEL_HIDDEN};

	return counts[product];
}

static uint64_t inputs(unsigned product)
{
	static const uint64_t counts[4] = {MODEL_HIDDEN, MODEL_Q, MODEL_HIDDEN, MODEL_MLP};

	return counts[product];
}

/* One buffer of QKV rows serves all layers, unless the gate's columns of all layers are wanted at the end of a step. */
static uint64_t qkv_size(const struct model *model)
{
	return (uint64_t)model->rows * model->columns * 2;
}

static bool allocate(struct model *model)
{
	struct gpu_bench *bench = &model->bench;
	uint64_t rows = model->rows, qkv = qkv_size(model) * (model->wide ? model->layers : 1);

	model->hidden = gpu_random(bench, (uint64_t)model->layers * model->hidden_rows * MODEL_HIDDEN * 2, 1);
	model->attention = gpu_random(bench, rows * MODEL_Q * 2, 1);
	model->residual = gpu_random(bench, rows * MODEL_HIDDEN * 2, 1);
	model->mlp = gpu_random(bench, rows * 2 * MODEL_MLP * 2, 1);
	model->qkv = gpu_random(bench, qkv, 1);
	return !bench->failed;
}

static bool make_product(struct model *model, uint32_t layer, unsigned product)
{
	const CUdeviceptr from[4] = {model_hidden(model, layer), model->attention, model->residual, model->mlp};
	const CUdeviceptr to[4] = {model_qkv(model, layer), model->residual, model->mlp, model->residual};
	struct layer *l = &model->layer[layer];
	uint64_t m = model->rows, n = outputs(model, product), k = inputs(product);

	l->weights[product] = gpu_random(&model->bench, n * k * 2, 0.015f);
	if (l->weights[product])
		l->products[product] =
			gpu_cublas_new(&model->bench, m, n, k, from[product], l->weights[product], to[product]);
	return l->products[product] != NULL;
}

int model_new(const struct synthetic *synthetic, uint32_t layers, uint32_t rows, bool wide, struct model **ret)
{
	struct model *model = calloc(1, sizeof(*model));
	bool made;

	if (!model)
		return -ENOMEM;
	*model = (struct model){.bench = {.cuda = synthetic->cuda, .stream = synthetic->stream},
		.layers = layers,
		.rows = rows,
		.columns = MODEL_QKV + (wide ? MODEL_GATE : 0),
		.hidden_rows = rows > HIDDEN_ROWS ? rows : HIDDEN_ROWS,
		.wide = wide};
	made = allocate(model);
	for (uint32_t layer = 0; made && layer < layers; layer++)
		for (unsigned product = 0; made && product < 4; product++)
			made = make_product(model, layer, product);
	if (made) {
		*ret = model;
		return 0;
	}
	(void)model_free(model);
	return -ENOENT;
}

struct model *model_free(struct model *model)
{
	if (!model)
		return NULL;
	for (uint32_t layer = 0; layer < model->layers; layer++)
		for (unsigned product = 0; product < 4; product++) {
			(void)gpu_cublas_free(model->layer[layer].products[product]);
			gpu_free(&model->bench, model->layer[layer].weights[product]);
		}
	gpu_free(&model->bench, model->hidden);
	gpu_free(&model->bench, model->attention);
	gpu_free(&model->bench, model->residual);
	gpu_free(&model->bench, model->mlp);
	gpu_free(&model->bench, model->qkv);
	gpu_release_memory(&model->bench);
	free(model);
	return NULL;
}

static CUresult enqueue(struct model *model, uint32_t layer, unsigned product)
{
	return gpu_cublas_enqueue(model->layer[layer].products[product], model->bench.stream, 0);
}

CUresult model_before(struct model *model, uint32_t layer)
{
	return enqueue(model, layer, 0);
}

CUresult model_after(struct model *model, uint32_t layer)
{
	CUresult result = enqueue(model, layer, 1);

	if (result == CUDA_SUCCESS)
		result = enqueue(model, layer, 2);
	return result == CUDA_SUCCESS ? enqueue(model, layer, 3) : result;
}

CUdeviceptr model_qkv(const struct model *model, uint32_t layer)
{
	return model->qkv + (model->wide ? layer * qkv_size(model) : 0);
}

uint32_t model_columns(const struct model *model)
{
	return model->columns;
}

CUdeviceptr model_attention(const struct model *model)
{
	return model->attention;
}

CUdeviceptr model_hidden(const struct model *model, uint32_t layer)
{
	return model->hidden + (uint64_t)layer * model->hidden_rows * MODEL_HIDDEN * 2;
}

uint32_t model_hidden_rows(const struct model *model)
{
	return model->hidden_rows;
}

CUdeviceptr model_random_kv(struct model *model, uint32_t rows)
{
	return gpu_random(&model->bench, (uint64_t)rows * MODEL_KV * 2, 1);
}

/* ---- its gate ---- */

struct tensor {
	const char *name;
	const char *dtype;
	unsigned dims[4]; /* up to the first 0 */
	float around;     /* values lie in around +- 0.02 */
};

static const struct tensor tensors[] = {
	{"q_proj.weight", "BF16", {MODEL_HEADS * MODEL_GROUP * GATE_WIDTH, MODEL_HIDDEN}, 0},
	{"q_proj.bias", "BF16", {MODEL_HEADS * MODEL_GROUP * GATE_WIDTH}, 0},
	{"k_proj.weight", "BF16", {MODEL_HEADS * GATE_WIDTH, MODEL_HIDDEN}, 0},
	{"b", "BF16", {MODEL_HEADS, 1, MODEL_GROUP}, 0},
	{"q_norm.weight", "F32", {GATE_WIDTH}, 1},
	{"k_norm.weight", "F32", {GATE_WIDTH}, 1},
	{"k_base", "F32", {MODEL_HEADS, 1, GATE_SINKS, GATE_WIDTH}, 0},
};

#define TENSORS (sizeof(tensors) / sizeof(*tensors))

static size_t tensor_count(const struct tensor *tensor)
{
	size_t count = 1;

	for (unsigned i = 0; i < 4 && tensor->dims[i]; i++)
		count *= tensor->dims[i];
	return count;
}

static size_t tensor_size(const struct tensor *tensor)
{
	return tensor_count(tensor) * (tensor->dtype[0] == 'B' ? 2 : 4);
}

static void write_entry(FILE *file, uint32_t layer, const struct tensor *tensor, size_t *offset)
{
	(void)fprintf(file, "%s\"layers.%u.%s\":{\"dtype\":\"%s\",\"shape\":[", *offset ? "," : "", layer, tensor->name,
		tensor->dtype);
	for (unsigned i = 0; i < 4 && tensor->dims[i]; i++)
		(void)fprintf(file, "%s%u", i ? "," : "", tensor->dims[i]);
	(void)fprintf(file, "],\"data_offsets\":[%zu,%zu]}", *offset, *offset + tensor_size(tensor));
	*offset += tensor_size(tensor);
}

static void write_values(FILE *file, const struct tensor *tensor, uint64_t *random)
{
	size_t count = tensor_count(tensor);

	for (size_t i = 0; i < count; i++) {
		float value;
		uint16_t half;

		*random = *random * 6364136223846793005u + 1442695040888963407u;
		value = tensor->around + 0.04f * ((float)(*random >> 40) / (float)(1 << 24) - 0.5f);
		memcpy(&half, (const uint8_t *)&value + 2, sizeof(half));
		if (tensor->dtype[0] == 'B')
			(void)fwrite(&half, sizeof(half), 1, file);
		else
			(void)fwrite(&value, sizeof(value), 1, file);
	}
}

int model_write_gate(const char *path, uint32_t layers)
{
	FILE *file = fopen(path, "w+e");
	uint64_t random = 1, header;
	size_t offset = 0;
	bool failed;

	if (!file) {
		(void)fprintf(stderr, "kvgate-bench: %s: %s\n", path, strerror(errno));
		return -errno;
	}
	(void)fwrite("\0\0\0\0\0\0\0\0{", 9, 1, file);
	for (uint32_t layer = 0; layer < layers; layer++)
		for (size_t i = 0; i < TENSORS; i++)
			write_entry(file, layer, &tensors[i], &offset);
	(void)fputc('}', file);
	header = (uint64_t)ftell(file) - 8;
	for (uint32_t layer = 0; layer < layers; layer++)
		for (size_t i = 0; i < TENSORS; i++)
			write_values(file, &tensors[i], &random);
	rewind(file);
	(void)fwrite(&header, sizeof(header), 1, file);
	failed = ferror(file) != 0;
	if (fclose(file) == 0 && !failed)
		return 0;
	(void)fprintf(stderr, "kvgate-bench: %s: not written\n", path);
	return -EIO;
}
