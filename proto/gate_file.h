/*
 * gate_file.h - a trained gate on disk: the tensors of one layer under their
 * public names (q_proj.weight, q_proj.bias, k_proj.weight, q_norm.weight,
 * k_norm.weight, k_base, b), with "layers.{i}." before them for a whole model.
 * Shapes: q_proj.weight [H*G*d, D], q_proj.bias [H*G*d], k_proj.weight [H*d, D],
 * b [H,1,G], q_norm/k_norm [d], k_base [H,1,S,d]. (method.md section 1)
 */
#ifndef KVG_GATE_FILE_H
#define KVG_GATE_FILE_H

#include "safetensors.h"

struct kvg_gate_shape {
	uint32_t heads;  /* H: KV heads */
	uint32_t group;  /* G: query heads per KV head */
	uint32_t hidden; /* D */
	uint32_t width;  /* d */
	uint32_t sinks;  /* S */
};

/* Tensors of one layer as fp32, converted from whatever the file holds; owned. */
struct kvg_gate_tensors {
	struct kvg_gate_shape shape;
	float *wq, *bq, *wk, *b, *q_norm, *k_norm, *k_base;
};

/* The shape of one layer as its tensors' dimensions say, before any data is looked at. 0 or a negative errno with text.
 */
int kvg_gate_shape_read(const struct kvg_safetensors *file, const char *prefix, struct kvg_gate_shape *ret, char *text,
	size_t text_size);

/*
 * Reads one layer; prefix is "" or "layers.3.". The shape is derived from the
 * tensors and checked between them. 0 or a negative errno with text.
 */
int kvg_gate_tensors_read(const struct kvg_safetensors *file, const char *prefix, struct kvg_gate_tensors *ret,
	char *text, size_t text_size);
void kvg_gate_tensors_deinit(struct kvg_gate_tensors *tensors);

/* Number of layers "layers.{i}." in the file, 0 when it has none. */
uint32_t kvg_gate_file_layers(const struct kvg_safetensors *file);

#endif
