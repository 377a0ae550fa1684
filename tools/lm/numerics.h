/*
 * numerics.h - the parts of a Qwen3 forward pass that are not matrix products.
 * Pure functions over fp32 rows; row t of a matrix starts at base + t * stride (elements).
 */
#ifndef KVG_LM_NUMERICS_H
#define KVG_LM_NUMERICS_H

#include <stddef.h>
#include <stdint.h>

/* out[i] = x[i] * weight[i] / sqrt(mean(x^2) + eps) over n elements; out may be x. */
void lm_rmsnorm(float *out, const float *x, const float *weight, size_t n, float eps);

/*
 * Rotary tables of positions pos .. pos + count - 1: cosines and sines [count][dim / 2] of
 * position * theta^(-2i/dim), computed in doubles. dim is even.
 */
void lm_rope_table(float *cosines, float *sines, uint32_t pos, size_t count, size_t dim, double theta);

/* Rotates one head in place: pairs are (i, i + dim / 2). cosines and sines: dim / 2 of its position. */
void lm_rope(float *x, size_t dim, const float *cosines, const float *sines);

/* gate[i] = silu(gate[i]) * up[i]. */
void lm_silu_mul(float *gate, const float *up, size_t n);

/* Index of the largest value, the lowest among equals; NaN is never the largest. n > 0. */
size_t lm_argmax(const float *x, size_t n);

/* Largest |a[i] - b[i]|; infinity when a value is not a number. */
float lm_max_difference(const float *a, const float *b, size_t n);

#endif
