#include "kernels/host/attention.h"

#include "kernels/host/dtype.h"
#include "kernels/host/simd.h"

#include <assert.h>
#include <cblas.h>
#include <math.h>
#include <string.h>

/*
 * Queries are flattened to lines (query, group), and worked on in tiles of
 * lines x keys. Few lines (decoding) are multiplied by loops of our own over
 * tiles that fit the first-level cache; many go through sgemm.
 */
#define FEW_LINES  16
#define FEW_KEYS   64
#define TILE_LINES 256
#define TILE_KEYS  512

/* One tile's memory, carved from the caller's scratch. Dimensions are padded for SIMD and the padding is zero. */
struct tile {
	size_t lines, keys;  /* capacity */
	size_t k_dim, v_dim; /* padded */
	float *q, *k, *v, *logits, *out;
	struct kvg_simd_softmax *state;
};

struct attend {
	const struct kvg_row_view *row;
	const struct kvg_simd *simd;
	struct tile tile;
	uint32_t length, queries, group;
	size_t line, lines; /* the tile's lines: first and number */
};

static size_t min_size(size_t a, size_t b)
{
	return a < b ? a : b;
}

static size_t pad(size_t n)
{
	return (n + KVG_SIMD_PAD - 1) / KVG_SIMD_PAD * KVG_SIMD_PAD;
}

static float *carve(uint8_t *scratch, size_t *offset, size_t floats)
{
	float *start = scratch ? (float *)(void *)(scratch + *offset) : NULL;

	*offset += (floats * sizeof(float) + 63) & ~(size_t)63;
	return start;
}

/* Lays the tile out in scratch (NULL: only counts) and returns its bytes. */
static size_t tile_init(struct tile *tile, size_t lines, size_t length, size_t k_dim, size_t v_dim, void *scratch)
{
	size_t bytes = 0;

	tile->lines = min_size(lines, TILE_LINES);
	tile->keys = pad(min_size(length, lines <= FEW_LINES ? FEW_KEYS : TILE_KEYS));
	tile->k_dim = pad(k_dim);
	tile->v_dim = pad(v_dim);
	tile->q = carve(scratch, &bytes, tile->lines * tile->k_dim);
	tile->k = carve(scratch, &bytes, tile->keys * tile->k_dim);
	tile->v = carve(scratch, &bytes, tile->keys * tile->v_dim);
	tile->logits = carve(scratch, &bytes, tile->lines * tile->keys);
	tile->out = carve(scratch, &bytes, tile->lines * tile->v_dim);
	tile->state = (struct kvg_simd_softmax *)carve(scratch, &bytes, tile->lines * 2);
	return bytes;
}

/* ---- tokens of a row ---- */

/* One side (K or V) of a row. */
struct side {
	uint8_t *base;
	size_t dim, bytes; /* elements and bytes of a token */
	uint32_t dtype;
};

static struct side side_k(const struct kvg_row_view *row)
{
	return (struct side){row->k_base, row->k_dim, row->k_dim * kvg_dtype_size(row->k_dtype), row->k_dtype};
}

static struct side side_v(const struct kvg_row_view *row)
{
	return (struct side){row->v_base, row->v_dim, row->v_dim * kvg_dtype_size(row->v_dtype), row->v_dtype};
}

static uint8_t *token_at(const struct kvg_row_view *row, const struct side *side, size_t index)
{
	return side->base + row->ids[index / row->block_tokens] * row->stride + index % row->block_tokens * side->bytes;
}

/* Tokens from index to the end of its block, at most `most`. */
static size_t run_at(const struct kvg_row_view *row, size_t index, size_t most)
{
	return min_size(row->block_tokens - index % row->block_tokens, most);
}

static void append(
	const struct kvg_row_view *row, struct side side, size_t first, size_t count, const float *src, size_t stride)
{
	for (size_t done = 0, n; done < count; done += n) {
		uint8_t *dst = token_at(row, &side, first + done);

		n = run_at(row, first + done, count - done);
		if (stride == side.dim)
			kvg_dtype_store(side.dtype, dst, src + done * stride, n * side.dim);
		else
			for (size_t t = 0; t < n; t++)
				kvg_dtype_store(side.dtype, dst + t * side.bytes, src + (done + t) * stride, side.dim);
	}
}

/* Tokens as fp32, ld elements apart; dst's padding beyond dim is left alone. */
static void gather(const struct kvg_row_view *row, struct side side, size_t first, size_t count, float *dst, size_t ld)
{
	for (size_t done = 0, n; done < count; done += n) {
		const uint8_t *src = token_at(row, &side, first + done);

		n = run_at(row, first + done, count - done);
		if (ld == side.dim)
			kvg_dtype_load(side.dtype, dst + done * ld, src, n * side.dim);
		else
			for (size_t t = 0; t < n; t++)
				kvg_dtype_load(side.dtype, dst + (done + t) * ld, src + t * side.bytes, side.dim);
	}
}

void kvg_row_append(const struct kvg_row_view *row, uint32_t first, uint32_t count, const float *k, size_t k_stride,
	const float *v, size_t v_stride)
{
	append(row, side_k(row), first, count, k, k_stride);
	append(row, side_v(row), first, count, v, v_stride);
}

/* ---- attention ---- */

size_t kvg_row_attend_scratch(uint32_t queries, uint32_t group, uint32_t length, uint32_t k_dim, uint32_t v_dim)
{
	struct tile tile;

	return tile_init(&tile, (size_t)queries * group, length, k_dim, v_dim, NULL);
}

/* Keys that a line sees. */
static size_t keys_of(const struct attend *a, size_t line)
{
	return a->length - a->queries + line / a->group + 1;
}

static void load_queries(const struct attend *a, const float *q, size_t q_stride, float scale)
{
	const struct tile *tile = &a->tile;
	size_t dim = a->row->k_dim;

	for (size_t i = 0; i < a->lines; i++) {
		const float *src = q + (a->line + i) / a->group * q_stride + (a->line + i) % a->group * dim;
		float *dst = tile->q + i * tile->k_dim;

		for (size_t j = 0; j < dim; j++)
			dst[j] = src[j] * scale;
		memset(dst + dim, 0, (tile->k_dim - dim) * sizeof(*dst));
		tile->state[i] = (struct kvg_simd_softmax){-INFINITY, 0.0f};
	}
	memset(tile->out, 0, a->lines * tile->v_dim * sizeof(float));
}

/* logits = Q K^T over n gathered keys. */
static void multiply_keys(const struct attend *a, size_t n)
{
	const struct tile *t = &a->tile;

	if (a->lines <= FEW_LINES)
		a->simd->dots(t->q, a->lines, t->k, n, t->k_dim, t->logits, t->keys);
	else
		cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)a->lines, (blasint)n, (blasint)t->k_dim,
			1.0f, t->q, (blasint)t->k_dim, t->k, (blasint)t->k_dim, 0.0f, t->logits, (blasint)t->keys);
}

/* out += P V over n gathered values. */
static void multiply_values(const struct attend *a, size_t n)
{
	const struct tile *t = &a->tile;

	if (a->lines <= FEW_LINES)
		a->simd->mix(t->logits, a->lines, t->keys, t->v, n, t->v_dim, t->out);
	else
		cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (blasint)a->lines, (blasint)t->v_dim, (blasint)n,
			1.0f, t->logits, (blasint)t->keys, t->v, (blasint)t->v_dim, 1.0f, t->out, (blasint)t->v_dim);
}

/* Logits of keys first .. first + n - 1 become weights; what a line may not see weighs 0. */
static void weigh(const struct attend *a, size_t first, size_t n)
{
	const struct tile *tile = &a->tile;

	for (size_t i = 0; i < a->lines; i++) {
		float *logits = tile->logits + i * tile->keys;
		size_t seen = keys_of(a, a->line + i);

		if (seen <= first) {
			memset(logits, 0, n * sizeof(*logits));
			continue;
		}
		float correction = a->simd->softmax(logits, min_size(seen - first, n), pad(n), &tile->state[i]);

		if (correction != 1.0f)
			a->simd->scale(tile->out + i * tile->v_dim, tile->v_dim, correction);
	}
}

static void store_lines(const struct attend *a, float *out, size_t o_stride)
{
	const struct tile *tile = &a->tile;
	size_t dim = a->row->v_dim;

	for (size_t i = 0; i < a->lines; i++) {
		float *dst = out + (a->line + i) / a->group * o_stride + (a->line + i) % a->group * dim;
		const float *src = tile->out + i * tile->v_dim;
		float inverse = 1.0f / tile->state[i].sum;

		for (size_t j = 0; j < dim; j++)
			dst[j] = src[j] * inverse;
	}
}

void kvg_row_attend(const struct kvg_row_view *row, uint32_t length, uint32_t queries, uint32_t group, float scale,
	const float *q, size_t q_stride, float *out, size_t o_stride, void *scratch)
{
	size_t lines = (size_t)queries * group;
	struct attend a = {
		.row = row, .simd = kvg_simd(), .length = length, .queries = queries, .group = group, .line = 0};

	assert(length >= queries);
	tile_init(&a.tile, lines, length, row->k_dim, row->v_dim, scratch);
	memset(a.tile.k, 0, a.tile.keys * a.tile.k_dim * sizeof(float));
	memset(a.tile.v, 0, a.tile.keys * a.tile.v_dim * sizeof(float));
	for (; a.line < lines; a.line += a.lines) {
		a.lines = min_size(a.tile.lines, lines - a.line);
		size_t keys = keys_of(&a, a.line + a.lines - 1);

		load_queries(&a, q, q_stride, scale);
		for (size_t first = 0, n; first < keys; first += n) {
			n = min_size(a.tile.keys, keys - first);
			gather(row, side_k(row), first, n, a.tile.k, a.tile.k_dim);
			multiply_keys(&a, n);
			weigh(&a, first, n);
			gather(row, side_v(row), first, n, a.tile.v, a.tile.v_dim);
			multiply_values(&a, n);
		}
		store_lines(&a, out, o_stride);
	}
}
