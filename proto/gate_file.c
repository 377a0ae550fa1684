#include "proto/gate_file.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME_MAX_BYTES 128
#define DIM_MAX        (1u << 20) /* of any dimension: keeps every product below 2^63 */

/* What is being read and where messages go. */
struct reader {
	const struct kvg_safetensors *file;
	const char *prefix;
	char *text;
	size_t text_size;
};

static int fail(const struct reader *reader, const char *name, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

static int fail(const struct reader *reader, const char *name, const char *format, ...)
{
	va_list args;
	int n = snprintf(reader->text, reader->text_size, "gate tensor %s%s ", reader->prefix, name);

	if (n < 0 || (size_t)n >= reader->text_size)
		return -EINVAL;
	va_start(args, format);
	(void)vsnprintf(reader->text + n, reader->text_size - (size_t)n, format, args);
	va_end(args);
	return -EINVAL;
}

/* The tensor with every dimension in range, or NULL with a message. */
static const struct kvg_tensor *find(const struct reader *reader, const char *name, unsigned rank)
{
	char full[NAME_MAX_BYTES];
	const struct kvg_tensor *tensor;
	int n = snprintf(full, sizeof(full), "%s%s", reader->prefix, name);

	if (n < 0 || (size_t)n >= sizeof(full)) {
		(void)fail(reader, name, "has a name of more than %d bytes", NAME_MAX_BYTES - 1);
		return NULL;
	}
	tensor = kvg_safetensors_find(reader->file, full);
	if (!tensor) {
		(void)fail(reader, name, "is missing");
		return NULL;
	}
	if (tensor->rank != rank) {
		(void)fail(reader, name, "has %u dimensions, not %u", tensor->rank, rank);
		return NULL;
	}
	for (unsigned i = 0; i < rank; i++)
		if (!tensor->shape[i] || tensor->shape[i] > DIM_MAX) {
			(void)fail(reader, name, "has dimension %u of %llu, outside 1 to %u", i,
				(unsigned long long)tensor->shape[i], DIM_MAX);
			return NULL;
		}
	return tensor;
}

static float from_bits(uint32_t bits)
{
	float value;

	memcpy(&value, &bits, sizeof(value));
	return value;
}

static float from_f16(uint16_t half)
{
	uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
	uint32_t exponent = half >> 10 & 0x1fu, mantissa = half & 0x3ffu;
	float value;

	if (exponent == 0x1f)
		return from_bits(sign | 0x7f800000u | mantissa << 13);
	if (exponent)
		return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
	value = (float)mantissa * 0x1p-24f;
	return sign ? -value : value;
}

/* Elements of a tensor as fp32; its data may lie at any address. */
static int convert(const struct kvg_tensor *tensor, float *out)
{
	const uint8_t *data = tensor->data;

	for (uint64_t i = 0; i < tensor->count; i++) {
		uint16_t half;
		double wide;

		switch (tensor->dtype) {
		case KVG_TENSOR_BF16:
			memcpy(&half, data + i * sizeof(half), sizeof(half));
			out[i] = from_bits((uint32_t)half << 16);
			break;
		case KVG_TENSOR_F16:
			memcpy(&half, data + i * sizeof(half), sizeof(half));
			out[i] = from_f16(half);
			break;
		case KVG_TENSOR_F32:
			memcpy(&out[i], data + i * sizeof(float), sizeof(float));
			break;
		case KVG_TENSOR_F64:
			memcpy(&wide, data + i * sizeof(wide), sizeof(wide));
			out[i] = (float)wide;
			break;
		default:
			return -EINVAL;
		}
	}
	return 0;
}

/* Reads one tensor whose shape must be exactly dims[rank]. */
static int read_tensor(const struct reader *reader, const char *name, unsigned rank, const uint64_t *dims, float **ret)
{
	const struct kvg_tensor *tensor = find(reader, name, rank);
	float *values;

	if (!tensor)
		return -EINVAL;
	for (unsigned i = 0; i < rank; i++)
		if (tensor->shape[i] != dims[i])
			return fail(reader, name, "has dimension %u of %llu, where the other tensors want %llu", i,
				(unsigned long long)tensor->shape[i], (unsigned long long)dims[i]);
	values = malloc(tensor->count * sizeof(*values));
	if (!values) {
		(void)fail(reader, name, "has %llu elements: no memory", (unsigned long long)tensor->count);
		return -ENOMEM;
	}
	if (convert(tensor, values) < 0) {
		free(values);
		return fail(reader, name, "is neither BF16, F16, F32 nor F64");
	}
	*ret = values;
	return 0;
}

/* H, S and d from k_base, G from b, D from k_proj; every other dimension must then agree. */
static int read_shape(const struct reader *reader, struct kvg_gate_shape *ret)
{
	const struct kvg_tensor *k_base, *b, *wk;

	if (!(k_base = find(reader, "k_base", 4)) || !(b = find(reader, "b", 3)) ||
		!(wk = find(reader, "k_proj.weight", 2)))
		return -EINVAL;
	*ret = (struct kvg_gate_shape){
		.heads = (uint32_t)k_base->shape[0],
		.group = (uint32_t)b->shape[2],
		.hidden = (uint32_t)wk->shape[1],
		.width = (uint32_t)k_base->shape[3],
		.sinks = (uint32_t)k_base->shape[2],
	};
	return 0;
}

int kvg_gate_shape_read(const struct kvg_safetensors *file, const char *prefix, struct kvg_gate_shape *ret, char *text,
	size_t text_size)
{
	const struct reader reader = {.file = file, .prefix = prefix, .text = text, .text_size = text_size};

	return read_shape(&reader, ret);
}

int kvg_gate_tensors_read(const struct kvg_safetensors *file, const char *prefix, struct kvg_gate_tensors *ret,
	char *text, size_t text_size)
{
	const struct reader reader = {.file = file, .prefix = prefix, .text = text, .text_size = text_size};
	struct kvg_gate_tensors gate = {0};
	int r = read_shape(&reader, &gate.shape);

	if (r < 0)
		return r;
	uint64_t heads = gate.shape.heads, group = gate.shape.group, width = gate.shape.width;
	uint64_t hidden = gate.shape.hidden, sinks = gate.shape.sinks;
	const struct {
		const char *name;
		float **values;
		unsigned rank;
		uint64_t dims[4];
	} rows[] = {
		{"k_base", &gate.k_base, 4, {heads, 1, sinks, width}},
		{"b", &gate.b, 3, {heads, 1, group}},
		{"q_proj.weight", &gate.wq, 2, {heads * group * width, hidden}},
		{"q_proj.bias", &gate.bq, 1, {heads * group * width}},
		{"k_proj.weight", &gate.wk, 2, {heads * width, hidden}},
		{"q_norm.weight", &gate.q_norm, 1, {width}},
		{"k_norm.weight", &gate.k_norm, 1, {width}},
	};

	for (size_t i = 0; r == 0 && i < sizeof(rows) / sizeof(*rows); i++)
		r = read_tensor(&reader, rows[i].name, rows[i].rank, rows[i].dims, rows[i].values);
	if (r < 0) {
		kvg_gate_tensors_deinit(&gate);
		return r;
	}
	*ret = gate;
	return 0;
}

void kvg_gate_tensors_deinit(struct kvg_gate_tensors *tensors)
{
	free(tensors->wq);
	free(tensors->bq);
	free(tensors->wk);
	free(tensors->b);
	free(tensors->q_norm);
	free(tensors->k_norm);
	free(tensors->k_base);
	*tensors = (struct kvg_gate_tensors){0};
}

uint32_t kvg_gate_file_layers(const struct kvg_safetensors *file)
{
	char name[64];
	uint32_t layers = 0;

	while (layers < DIM_MAX) {
		(void)snprintf(name, sizeof(name), "layers.%u.q_proj.weight", layers);
		if (!kvg_safetensors_find(file, name))
			break;
		layers++;
	}
	return layers;
}
