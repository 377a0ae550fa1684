/*
 * attention.h - KV append and attention through per-head block tables on the host.
 *
 * One call works on one KV head of one layer of one sequence, so that a caller
 * spreads heads over its threads. Reads and writes KV in place, in its storage
 * dtype; all arithmetic is fp32 with an fp32 online softmax.
 */
#ifndef KVG_KERNELS_ATTENTION_H
#define KVG_KERNELS_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

/* Where one row's pairs lie. */
struct kvg_row_view {
	uint8_t *k_base, *v_base; /* K(id) = k_base + id * stride; V likewise */
	size_t stride;
	const uint32_t *ids; /* block ids of the row */
	uint32_t block_tokens;
	uint32_t k_dim, v_dim;
	uint32_t k_dtype, v_dtype; /* enum kvg_kernel_dtype */
};

/*
 * Writes `count` tokens at indices first .. first + count - 1 of the row.
 * k: fp32, token t at k + t * k_stride (elements); v likewise.
 */
void kvg_row_append(const struct kvg_row_view *row, uint32_t first, uint32_t count, const float *k, size_t k_stride,
	const float *v, size_t v_stride);

/* Bytes of scratch for kvg_row_attend(). */
size_t kvg_row_attend_scratch(uint32_t queries, uint32_t group, uint32_t length, uint32_t k_dim, uint32_t v_dim);

/*
 * Attention of `queries` tokens x `group` query heads over the row. Query i sees indices
 * 0 .. length - queries + i (causal; length counts the queries' own pairs, already appended).
 * q: fp32, query i, group g at q + i * q_stride + g * k_dim; out: o + i * o_stride + g * v_dim.
 * scale multiplies the logits (1/sqrt(head_dim)). scratch 64-byte aligned.
 */
void kvg_row_attend(const struct kvg_row_view *row, uint32_t length, uint32_t queries, uint32_t group, float scale,
	const float *q, size_t q_stride, float *out, size_t o_stride, void *scratch);

#endif
