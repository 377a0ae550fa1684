/*
 * gate.h - Fast KVzip's gate (arXiv 2601.17668; method.md section 1): a score in
 * [0, 1] for each KV pair from the hidden state alone.
 *
 *   q = h Wq^T + bq, k = h Wk^T, RMSNorm over d (eps 1e-6, plain weight),
 *   z = q.k/sqrt(d) + b, zs = q.kbase/sqrt(d), p = 1/(1 + sum_s exp(zs - z)),
 *   score = mean of p over the group.
 *
 * Equal sinks are folded when a gate is made: p = sigmoid(z - zs - ln S).
 * A NaN from bad input scores 0. All arithmetic is fp32; products by OpenBLAS.
 */
#ifndef KVG_KERNELS_GATE_H
#define KVG_KERNELS_GATE_H

#include <stddef.h>
#include <stdint.h>

/* Weights of one layer, row-major fp32; borrowed only while kvg_gate_new() runs. */
struct kvg_gate_weights {
	uint32_t heads, group, hidden, width, sinks; /* H, G, D, d, S */
	const float *wq;                             /* [H*G*d, D], rows: head, group, d */
	const float *bq;                             /* [H*G*d] */
	const float *wk;                             /* [H*d, D] */
	const float *b;                              /* [H, G] */
	const float *q_norm, *k_norm;                /* [d] */
	const float *k_base;                         /* [H, S, d] */
};

struct kvg_gate; /* packed weights of one layer; immutable, so any number of threads may score with one */

/* 0 or -ENOMEM, -EINVAL (a zero or absurd dimension). */
int kvg_gate_new(const struct kvg_gate_weights *weights, struct kvg_gate **ret);
struct kvg_gate *kvg_gate_free(struct kvg_gate *gate); /* NULL is fine; returns NULL */
int kvg_gate_folded(const struct kvg_gate *gate);      /* 1 when the sinks were equal */

/* Bytes of scratch that kvg_gate_score() needs for that many rows. */
size_t kvg_gate_scratch(const struct kvg_gate *gate, size_t rows);

/*
 * Scores rows of hidden states (bf16 [rows][D], any alignment of 2) into
 * scores [rows][H] fp32. scratch: kvg_gate_scratch(gate, rows) bytes, 64-byte aligned.
 */
void kvg_gate_score(const struct kvg_gate *gate, const uint16_t *hidden, size_t rows, float *scores, void *scratch);

#endif
