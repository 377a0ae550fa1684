#include "kernels/host/gate.h"

#include "kernels/host/simd.h"

#include <cblas.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TILE_ROWS 256 /* rows projected by one matrix product */

/* Beyond these a dimension is a mistake. */
#define MAX_HEADS  4096
#define MAX_GROUP  256
#define MAX_HIDDEN (1u << 20)
#define MAX_SINKS  4096

struct kvg_gate {
	struct kvg_simd_gate inner; /* points into data */
	uint32_t hidden;
	size_t columns; /* projected values of one row: (H*G + H) * d */
	int folded;
	float *projection; /* [columns][hidden]: wq, then wk */
	float data[];
};

static size_t align(size_t bytes)
{
	return (bytes + 63) & ~(size_t)63;
}

static size_t pad(size_t rows)
{
	return (rows + KVG_SIMD_PAD - 1) / KVG_SIMD_PAD * KVG_SIMD_PAD;
}

static int in_range(uint32_t value, uint32_t max)
{
	return value >= 1 && value <= max;
}

static int weights_valid(const struct kvg_gate_weights *w)
{
	return in_range(w->heads, MAX_HEADS) && in_range(w->group, MAX_GROUP) && in_range(w->hidden, MAX_HIDDEN) &&
	       in_range(w->width, KVG_SIMD_WIDTH_MAX) && in_range(w->sinks, MAX_SINKS) && w->wq && w->bq && w->wk &&
	       w->b && w->q_norm && w->k_norm && w->k_base;
}

static int sinks_equal(const struct kvg_gate_weights *w)
{
	for (uint32_t head = 0; head < w->heads; head++) {
		const float *base = w->k_base + (size_t)head * w->sinks * w->width;

		for (size_t i = w->width; i < (size_t)w->sinks * w->width; i++)
			if (base[i] != base[i % w->width])
				return 0;
	}
	return 1;
}

/* The norms' weights and 1/sqrt(d) go into the vectors that the projected queries meet. */
static void pack_norms(const struct kvg_gate_weights *w, uint32_t sinks, float *qk, float *base)
{
	float scale = 1.0f / sqrtf((float)w->width);

	for (uint32_t i = 0; i < w->width; i++)
		qk[i] = w->q_norm[i] * w->k_norm[i] * scale;
	for (uint32_t head = 0; head < w->heads; head++)
		for (uint32_t s = 0; s < sinks; s++)
			for (uint32_t i = 0; i < w->width; i++)
				*base++ =
					w->k_base[((size_t)head * w->sinks + s) * w->width + i] * w->q_norm[i] * scale;
}

int kvg_gate_new(const struct kvg_gate_weights *weights, struct kvg_gate **ret)
{
	if (!weights_valid(weights))
		return -EINVAL;

	int folded = sinks_equal(weights);
	uint32_t sinks = folded ? 1 : weights->sinks;
	size_t biases = (size_t)weights->heads * weights->group, queries = biases * weights->width;
	size_t columns = queries + (size_t)weights->heads * weights->width;
	size_t bases = (size_t)weights->heads * sinks * weights->width;
	size_t floats = columns * weights->hidden + queries + biases + weights->width + bases;
	struct kvg_gate *gate = malloc(sizeof(*gate) + floats * sizeof(float));

	if (!gate)
		return -ENOMEM;
	float *projection = gate->data, *bq = projection + columns * weights->hidden, *b = bq + queries;
	float *qk = b + biases, *base = qk + weights->width;

	*gate = (struct kvg_gate){
		.inner = {weights->heads, weights->group, weights->width, sinks, folded ? (float)weights->sinks : 1.0f,
			bq, b, qk, base},
		.hidden = weights->hidden,
		.columns = columns,
		.folded = folded,
		.projection = projection,
	};
	memcpy(projection, weights->wq, queries * weights->hidden * sizeof(float));
	memcpy(projection + queries * weights->hidden, weights->wk,
		(columns - queries) * weights->hidden * sizeof(float));
	memcpy(bq, weights->bq, queries * sizeof(float));
	memcpy(b, weights->b, biases * sizeof(float));
	pack_norms(weights, sinks, qk, base);
	*ret = gate;
	return 0;
}

struct kvg_gate *kvg_gate_free(struct kvg_gate *gate)
{
	free(gate);
	return NULL;
}

int kvg_gate_folded(const struct kvg_gate *gate)
{
	return gate->folded;
}

size_t kvg_gate_scratch(const struct kvg_gate *gate, size_t rows)
{
	size_t tile = rows < TILE_ROWS ? pad(rows) : TILE_ROWS;

	return align(tile * gate->hidden * sizeof(float)) + align(tile * gate->columns * sizeof(float));
}

/* Projects a tile into columns [columns][padded rows]: a row in each lane is how the scores are computed. */
static void score_tile(const struct kvg_gate *gate, const struct kvg_simd *simd, const uint16_t *hidden, size_t rows,
	float *scores, void *scratch)
{
	size_t padded = pad(rows), values = rows * gate->hidden;
	float *tile = scratch;
	float *columns = (float *)((uint8_t *)scratch + align(padded * gate->hidden * sizeof(float)));

	simd->bf16_load(tile, hidden, values);
	memset(tile + values, 0, (padded - rows) * gate->hidden * sizeof(float));
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)gate->columns, (blasint)padded,
		(blasint)gate->hidden, 1.0f, gate->projection, (blasint)gate->hidden, tile, (blasint)gate->hidden, 0.0f,
		columns, (blasint)padded);
	simd->gate(&gate->inner, columns, padded, rows, scores);
}

void kvg_gate_score(const struct kvg_gate *gate, const uint16_t *hidden, size_t rows, float *scores, void *scratch)
{
	const struct kvg_simd *simd = kvg_simd();

	for (size_t row = 0; row < rows; row += TILE_ROWS) {
		size_t n = rows - row < TILE_ROWS ? rows - row : TILE_ROWS;

		score_tile(gate, simd, hidden + row * gate->hidden, n, scores + row * gate->inner.heads, scratch);
	}
}
