/*
 * insitu_model.h - the matrix products of a model of 8B shape (36 layers, hidden 4096, 8 KV heads of 128 with 4 query
 * heads each, MLP 12288) over random weights: the load that a worker has of its own.
 *
 * Nothing of it depends on kvgate. Products read random inputs rather than each other's outputs, so that
 * numbers stay in range, and are enqueued in the order of a model. One stream, the worker's.
 */
#ifndef KVG_BENCH_INSITU_MODEL_H
#define KVG_BENCH_INSITU_MODEL_H

#include "tools/bench/gpu.h"
#include "tools/bench/synthetic.h"

#define MODEL_LAYERS 36u
#define MODEL_HIDDEN 4096u
#define MODEL_HEADS  8u
#define MODEL_GROUP  4u
#define MODEL_DIM    128u
#define MODEL_MLP    12288u
#define MODEL_Q      (MODEL_HEADS * MODEL_GROUP * MODEL_DIM) /* columns of Q in a QKV row; K and V follow */
#define MODEL_KV     (MODEL_HEADS * MODEL_DIM)
#define MODEL_QKV    (MODEL_Q + 2 * MODEL_KV)
#define MODEL_GATE   640u /* columns of the gate's products, (group + 1) * heads * 16 */

struct model;

/*
 * A model of `layers` (at most MODEL_LAYERS) for batches of `rows` tokens. wide: QKV rows have MODEL_GATE columns more,
 * for the gate. synthetic is borrowed. A negative errno with a line on standard error; -ENOENT without cuBLASLt.
 */
int model_new(const struct synthetic *synthetic, uint32_t layers, uint32_t rows, bool wide, struct model **ret);
struct model *model_free(struct model *model);

/* The products before and after one layer's attention. */
CUresult model_before(struct model *model, uint32_t layer);
CUresult model_after(struct model *model, uint32_t layer);

/* Rows of Q, K and V of one layer, bf16 [rows][model_columns()]: what model_before() writes. */
CUdeviceptr model_qkv(const struct model *model, uint32_t layer);
uint32_t model_columns(const struct model *model);

/* Where attention goes: bf16 [rows][MODEL_Q]. */
CUdeviceptr model_attention(const struct model *model);

/* Hidden states of one layer: bf16 [model_hidden_rows()][MODEL_HIDDEN], layers one after the other. */
CUdeviceptr model_hidden(const struct model *model, uint32_t layer);
uint32_t model_hidden_rows(const struct model *model);

/* Random bf16 rows [rows][MODEL_KV], to be freed by the caller with gpu_free()'s driver call; 0 on failure. */
CUdeviceptr model_random_kv(struct model *model, uint32_t rows);

/* Writes a gate of MODEL_LAYERS layers of random weights to a file. A negative errno with a line on standard error. */
int model_write_gate(const char *path, uint32_t layers);

#endif
