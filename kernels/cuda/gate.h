/*
 * gate.h - Fast KVzip's gate (arXiv 2601.17668) on a GPU: scores of KV pairs from hidden states, or from the
 * gate's own projections where an engine computed those.
 *
 *   q = h Wq^T + bq, k = h Wk^T, RMSNorm over d (eps 1e-6, plain weight),
 *   z = q.k/sqrt(d) + b, zs = q.kbase/sqrt(d), p = 1/(1 + sum_s exp(zs - z)),
 *   score = mean of p over the group.
 *
 * The projections multiply bf16 by bf16 into fp32, and everything after them is fp32: nothing is rounded in
 * between, and no projection is written to memory. Equal sinks are folded, each layer by itself. A NaN from bad input
 * scores 0.
 *
 * Compute capability 9.0 has kernels of its own for the groups 1, 2, 4, 5 and 7; every other device and group
 * takes the portable ones. Both agree within the rounding of fp32 sums. Supported are d = 16, groups 1 to 8 and 16,
 * and hidden sizes that are multiples of 8.
 */
#ifndef KVG_CUDA_GATE_H
#define KVG_CUDA_GATE_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/cuda/device.h"
#include "kernels/host/gate.h"

struct kvg_cuda_gate_kernels; /* the code on one device; immutable */
struct kvg_cuda_gate;         /* the weights of one model's gates on the device; immutable */

enum kvg_cuda_gate_kind {
	KVG_CUDA_GATE_HIDDEN, /* bf16 [rows][D] */
	KVG_CUDA_GATE_PREACT, /* bf16 [rows][H*G*d + H*d]: h Wq^T (head, group, d; without bq), then h Wk^T */
};

/* Which kernel computes; all but AUTO are for tests and measurements. */
enum kvg_cuda_gate_path {
	KVG_CUDA_GATE_AUTO,
	KVG_CUDA_GATE_PORTABLE,
	KVG_CUDA_GATE_WIDE, /* 9.0: two tiles of rows share the weights that they load; for many rows */
	KVG_CUDA_GATE_DEEP, /* 9.0: two tiles of heads share the rows that they load; for many layers of few rows */
	KVG_CUDA_GATE_DEEP_SPLIT, /* the same with tiles split between clusters, where there is scratch */
};

/* What to score: the same count of rows in each of layer_count layers. */
struct kvg_cuda_gate_rows {
	enum kvg_cuda_gate_kind kind;
	enum kvg_cuda_gate_path path;
	CUdeviceptr data;            /* readable by the device, 16-byte aligned; rows follow each other closely */
	uint64_t layer_stride_bytes; /* from one layer's first row to the next one's, a multiple of 16; 0: packed */
	uint32_t layer_begin, layer_count;
	uint32_t rows;
	CUdeviceptr scores;    /* fp32 [layer_count][H][score_stride]; entries from rows on are left alone */
	uint64_t score_stride; /* at least rows */
	CUdeviceptr scratch;   /* kvg_cuda_gate_scratch() bytes, 256-byte aligned; 0: no sum is split */
};

/* Loads the code. NULL and *ret on failure; the context must be current. */
struct kvg_cuda_gate_kernels *kvg_cuda_gate_kernels_new(const struct kvg_cuda *cuda, CUresult *ret);
struct kvg_cuda_gate_kernels *kvg_cuda_gate_kernels_free(struct kvg_cuda_gate_kernels *kernels); /* returns NULL */

/*
 * Packs the weights of `count` layers as bf16 and uploads them (synchronous, some milliseconds a layer). All layers
 * have the shape of the first. NULL and *ret on failure: CUDA_ERROR_INVALID_VALUE for no layers, a missing array
 * or layers of different shapes, CUDA_ERROR_NOT_SUPPORTED for a shape outside of what is said above,
 * CUDA_ERROR_OUT_OF_MEMORY. The kernels and the device must outlive the gate.
 */
struct kvg_cuda_gate *kvg_cuda_gate_new(const struct kvg_cuda_gate_kernels *kernels,
	const struct kvg_gate_weights *layers, uint32_t count, CUresult *ret);
struct kvg_cuda_gate *kvg_cuda_gate_free(struct kvg_cuda_gate *gate); /* NULL is fine; returns NULL */

/* Device memory that the gate holds. */
uint64_t kvg_cuda_gate_bytes(const struct kvg_cuda_gate *gate);

/* Whether that layer's sinks were equal. */
bool kvg_cuda_gate_folded(const struct kvg_cuda_gate *gate, uint32_t layer);

/*
 * Bytes of scratch that any call on this gate can use. The first KVG_CUDA_GATE_COUNTERS of them must be zero before
 * the first call and are zero again after each; one scratch serves one call at a time (one stream).
 */
uint64_t kvg_cuda_gate_scratch(const struct kvg_cuda_gate *gate);
#define KVG_CUDA_GATE_COUNTERS (1u << 16)

/*
 * Enqueues the scoring. CUDA_ERROR_INVALID_VALUE for layers that the gate lacks, misaligned rows or a
 * score_stride below rows, CUDA_ERROR_NOT_SUPPORTED for a path that this device or group has not. No rows or no
 * layers: nothing is done.
 */
CUresult kvg_cuda_gate_score(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows, CUstream stream);

#endif
