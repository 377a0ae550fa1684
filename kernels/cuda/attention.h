/*
 * attention.h - what an engine runs on kvgate's memory: KV append and decode attention through the per-head
 * block tables, and the tables in the forms that other paged kernels read.
 *
 * The row of KV head h of a layer of the sequence in slot s has
 *     base_len[layer][s][h] + appended[s]
 * pairs; pair i lies in block ids[layer][s][h][i / 16], place i % 16 (proto/kvgate_abi.h, whose host twin
 * is kernels/host/attention.h). Order within a row means nothing. Rows of one layer differ in length.
 *
 * A decode step of a model, all of it capturable in a CUDA graph whose replays follow the tables, the lengths
 * and the slots (nothing is read back, grids depend on the counts given here and on the device alone):
 *     plan (once, for all layers, extra = 1)
 *     for each layer: append, attend
 *     advance (by 1)
 *
 * A slot number of KVG_CUDA_NO_SLOT (any that is not under max_sequences) stands for no sequence: nothing is
 * appended, attention gives zeros, an exported row is empty. A graph made for 16 sequences so serves fewer.
 *
 * Launchers only enqueue, and return CUDA_ERROR_INVALID_VALUE where an argument is outside what is
 * documented here. Every launcher may be called from any thread whose context is current.
 */
#ifndef KVG_CUDA_ATTENTION_H
#define KVG_CUDA_ATTENTION_H

#include <stdint.h>

#include "kernels/cuda/device.h"

#define KVG_CUDA_BLOCK_TOKENS 16u
#define KVG_CUDA_NO_SLOT      UINT32_MAX
#define KVG_CUDA_MAX_GROUP    8u

/* Where the KV of one layout lies. Only attend() demands k_dim == v_dim. */
struct kvg_cuda_kv {
	CUdeviceptr k_base,
		v_base;       /* K(id) = k_base + id * stride, token-major [16][k_dim]; V likewise; 16-byte aligned */
	uint64_t stride;      /* bytes between blocks, a multiple of 16 */
	CUdeviceptr ids;      /* device uint32 [layers][max_sequences][heads][row_cap] */
	CUdeviceptr base_len; /* device uint32 [layers][max_sequences][heads] */
	CUdeviceptr appended; /* device uint32 [max_sequences]; written by advance() alone */
	uint32_t layers, heads, max_sequences, row_cap;
	uint32_t group; /* query heads per KV head, 1 .. KVG_CUDA_MAX_GROUP */
	uint32_t k_dim, v_dim;
	uint32_t dtype; /* enum kvg_kernel_dtype, of K and V both */
};

struct kvg_cuda_attention;

/* Loads the kernels. Immutable afterwards; cuda must outlive it. */
CUresult kvg_cuda_attention_new(const struct kvg_cuda *cuda, struct kvg_cuda_attention **ret);

/* NULL is fine; returns NULL. */
struct kvg_cuda_attention *kvg_cuda_attention_free(struct kvg_cuda_attention *attention);

/* ---- append ---- */

/* New tokens of one layer, of any mix of sequences. */
struct kvg_cuda_append {
	uint32_t layer, tokens;
	CUdeviceptr slots; /* device uint32 [tokens] */
	/*
	 * device uint32 [tokens]: token t goes to pair base_len + index[t] of each row of its slot. 0: to
	 * base_len + appended[slot], which is right for one token of each sequence (decoding).
	 */
	CUdeviceptr index;
	CUdeviceptr k, v; /* token t, head h at k + (t * k_stride + h * k_dim) elements of the cache's dtype */
	uint64_t k_stride, v_stride; /* elements between tokens; strides and addresses keep 16-byte alignment */
};

/*
 * Writes the tokens' K and V for every head: one launch. k_dim and v_dim are any whose rows are a multiple of 16
 * bytes. A pair beyond the row's row_cap blocks is not written.
 */
CUresult kvg_cuda_attention_append(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	const struct kvg_cuda_append *append, CUstream stream);

/* appended[slots[i]] += by, for each of `count` device slots; a slot may be named once. */
CUresult kvg_cuda_attention_advance(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	CUdeviceptr slots, uint32_t count, uint32_t by, CUstream stream);

/* ---- decode attention ---- */

/*
 * How the pairs of some layers are divided among thread blocks: made on the device from the lengths of the
 * moment, read by attend(). One plan serves a whole step, and any number of steps in which lengths stay.
 */
struct kvg_cuda_plan {
	uint32_t layer_begin, layer_count;
	uint32_t sequences; /* one query token of each */
	uint32_t extra;     /* pairs of each row beyond base_len + appended: 1 where the step's own token is appended
			       before attend() and advance() comes last */
	CUdeviceptr slots;  /* device uint32 [sequences]; one slot may appear more than once */
	CUdeviceptr memory; /* kvg_cuda_attention_plan_size() bytes, 256-byte aligned; contents need no care */
};

/* Bytes of plan->memory, from layer_count and sequences (the kv's heads, group and dimensions count too). */
size_t kvg_cuda_attention_plan_size(
	const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv, const struct kvg_cuda_plan *plan);

/* Fills plan->memory: one launch. */
CUresult kvg_cuda_attention_plan(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	const struct kvg_cuda_plan *plan, CUstream stream);

/* One layer's queries: one token of each of the plan's sequences, which sees every pair of its rows. */
struct kvg_cuda_attend {
	uint32_t layer;  /* within the plan's range */
	float scale;     /* of the logits: 1 / sqrt(k_dim) */
	CUdeviceptr q;   /* sequence i, query head h at q + (i * q_stride + h * k_dim) elements of the cache's dtype;
			    query   head h reads KV head h / group */
	CUdeviceptr out; /* sequence i, query head h at out + (i * out_stride + h * v_dim); same dtype */
	uint64_t q_stride, out_stride; /* elements; strides and addresses keep 16-byte alignment */
	CUdeviceptr scratch;           /* kvg_cuda_attention_scratch_size() bytes, 256-byte aligned */
};

/* Bytes of attend->scratch: does not grow with lengths. Calls in one stream may share it. */
size_t kvg_cuda_attention_scratch_size(
	const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv, const struct kvg_cuda_plan *plan);

/*
 * out = softmax(scale q K^T) V for each query head, in one launch. A row without pairs gives zeros. Softmax and
 * sums are fp32; of bf16 and f16 the weights are rounded to the dtype before they meet V; fp32 is multiplied as pairs
 * of tf32, which keeps about 21 bits. The same lengths give the same bits on the same device. k_dim == v_dim in
 * {32, 64, 96, 128, 192, 256} of bf16 or f16, or in {32, 64, 96, 128} of fp32; anything else is
 * CUDA_ERROR_NOT_SUPPORTED.
 */
CUresult kvg_cuda_attention_attend(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	const struct kvg_cuda_plan *plan, const struct kvg_cuda_attend *attend, CUstream stream);

/* ---- the tables for other kernels ---- */

/* Rows of one layer, in order (sequence of the list, head): each KV head of each sequence is a row of its own. */
struct kvg_cuda_export {
	uint32_t layer, sequences;
	uint32_t extra;    /* as in struct kvg_cuda_plan */
	CUdeviceptr slots; /* device uint32 [sequences] */
};

/*
 * A padded table, as vLLM and FlashAttention read it: table int32 [sequences][heads][cap] of block ids, 0 after a row's
 * last block; lengths int32 [sequences][heads] in tokens. Longer rows than cap blocks are cut to cap * 16 tokens.
 */
CUresult kvg_cuda_attention_export_table(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	const struct kvg_cuda_export *rows, CUdeviceptr table, uint32_t cap, CUdeviceptr lengths, CUstream stream);

/*
 * CSR, as FlashInfer's paged kernels read it with page_size 16, num_kv_heads 1, num_qo_heads = group and one
 * request per row (q reshaped [sequences * heads][group][dim]; the caches are [blocks][16][1][dim] over k_base and
 * v_base with a page stride of `stride` bytes): indptr int32 [sequences * heads + 1]; indices int32, block ids of
 * all rows one after another, with room for sequences * heads * row_cap at worst; last_page_len int32
 * [sequences * heads], 1 .. 16 tokens in a row's last block, 0 for an empty row. Two launches.
 */
CUresult kvg_cuda_attention_export_csr(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	const struct kvg_cuda_export *rows, CUdeviceptr indptr, CUdeviceptr indices, CUdeviceptr last_page_len,
	CUstream stream);

#endif
