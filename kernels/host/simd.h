/*
 * simd.h - the inner loops of the kernels, built once for each instruction set.
 *
 * simd_isa.c is compiled for baseline x86-64, AVX2 and AVX-512; each build fills
 * one constant table. kvg_simd() picks the best one that this CPU runs, from the
 * CPU's feature bits that libgcc read at start, so that nothing here is mutable.
 * Arithmetic is fp32. Matrices are row-major; a leading dimension ("ld") is in elements.
 * All of it is private to kernels/host.
 */
#ifndef KVG_KERNELS_SIMD_H
#define KVG_KERNELS_SIMD_H

#include <stddef.h>
#include <stdint.h>

#define KVG_SIMD_PAD       16  /* floats: rows that say "padded" have a multiple of this */
#define KVG_SIMD_WIDTH_MAX 256 /* largest gate width d */
#define KVG_SIMD_TURN      256 /* bytes of each of several copies in turn */

/* The part of a gate that runs after the projections. */
struct kvg_simd_gate {
	uint32_t heads, group, width; /* H, G, d */
	uint32_t sinks;               /* sinks in base: 1 when they were equal and are folded */
	float sink_weight;            /* sinks that each one in base stands for */
	const float *bq;              /* [H * G * d] */
	const float *b;               /* [H * G] */
	const float *qk;              /* [d]: q_norm * k_norm / sqrt(d) */
	const float *base;            /* [H][sinks][d]: k_base * q_norm / sqrt(d) */
};

/* Where an online softmax stands: the largest logit so far and the sum of exp(logit - max). */
struct kvg_simd_softmax {
	float max, sum;
};

struct kvg_simd {
	const char *name;

	/* Conversions of count elements; round to nearest even, NaN stays NaN. */
	void (*bf16_load)(float *dst, const void *src, size_t count);
	void (*bf16_store)(void *dst, const float *src, size_t count);
	void (*f16_load)(float *dst, const void *src, size_t count);
	void (*f16_store)(void *dst, const float *src, size_t count);

	/*
	 * Scores of `rows` rows (padded to KVG_SIMD_PAD in the columns) of one tile: columns [H*G*d + H*d][ld], a
	 * row of the tile in each column of the matrix; scores [rows][H]. NaN becomes 0.
	 */
	void (*gate)(const struct kvg_simd_gate *gate, const float *columns, size_t ld, size_t rows, float *scores);

	/*
	 * Turns the first `valid` logits of a row into exp(logit - new max) and the rest, up to `width` (padded), into
	 * 0; updates the state. valid > 0. Returns what older sums have to be multiplied by.
	 */
	float (*softmax)(float *row, size_t valid, size_t width, struct kvg_simd_softmax *state);

	/* row[0 .. count) *= by; count padded. */
	void (*scale)(float *row, size_t count, float by);

	/* out[r][k] = a[r] . b[k] over dim elements (padded); for few rows. */
	void (*dots)(const float *a, size_t rows, const float *b, size_t keys, size_t dim, float *out, size_t ld);

	/* out[r] += sum over k of p[r][k] * v[k], dim elements (padded); for few rows. */
	void (*mix)(const float *p, size_t rows, size_t ld, const float *v, size_t keys, size_t dim, float *out);

	/*
	 * `count` copies of `size` bytes each around the caches, side by side: KVG_SIMD_TURN bytes of each in turn. All
	 * dst at multiples of 64, size too. A fence is the caller's.
	 */
	void (*streams)(uint8_t *const *dst, const uint8_t *const *src, unsigned count, size_t size);
};

/* The best table for this CPU. */
const struct kvg_simd *kvg_simd(void);

/* Table i of all that this CPU runs, the baseline first; NULL past the last. For tests. */
const struct kvg_simd *kvg_simd_at(unsigned i);

#endif
