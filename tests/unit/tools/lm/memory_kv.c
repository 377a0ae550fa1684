#include "tests/unit/tools/lm/memory_kv.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static size_t row_at(const struct memory_kv *kv, uint32_t layer, uint32_t head, uint32_t pos)
{
	return (((size_t)layer * kv->config.kv_heads + head) * kv->capacity + pos) * kv->config.head_dim;
}

static int append(void *user, uint32_t layer, uint32_t head, uint32_t pos, uint32_t count, const float *k,
	const float *v, size_t stride)
{
	struct memory_kv *kv = user;
	size_t bytes = kv->config.head_dim * sizeof(float);

	if (kv->fail)
		return kv->fail;
	for (uint32_t t = 0; t < count; t++) {
		memcpy(kv->k + row_at(kv, layer, head, pos + t), k + t * stride, bytes);
		memcpy(kv->v + row_at(kv, layer, head, pos + t), v + t * stride, bytes);
	}
	return 0;
}

static float dot(const float *a, const float *b, uint32_t n)
{
	float sum = 0.0f;

	for (uint32_t i = 0; i < n; i++)
		sum += a[i] * b[i];
	return sum;
}

/* Softmax attention of one query over the first `length` tokens. */
static void attend_one(const struct memory_kv *kv, uint32_t layer, uint32_t head, uint32_t length, float scale,
	const float *q, float *out)
{
	uint32_t dim = kv->config.head_dim;
	const float *k = kv->k + row_at(kv, layer, head, 0), *v = kv->v + row_at(kv, layer, head, 0);
	float *p = malloc(length * sizeof(*p)), max = -INFINITY, sum = 0.0f;

	assert_non_null(p);
	for (uint32_t i = 0; i < length; i++) {
		p[i] = scale * dot(q, k + (size_t)i * dim, dim);
		max = fmaxf(max, p[i]);
	}
	memset(out, 0, dim * sizeof(*out));
	for (uint32_t i = 0; i < length; i++) {
		float weight = expf(p[i] - max);

		sum += weight;
		for (uint32_t j = 0; j < dim; j++)
			out[j] += weight * v[(size_t)i * dim + j];
	}
	for (uint32_t j = 0; j < dim; j++)
		out[j] /= sum;
	free(p);
}

static int attend(void *user, uint32_t layer, uint32_t head, uint32_t pos, uint32_t count, float scale, const float *q,
	size_t q_stride, float *out, size_t out_stride)
{
	const struct memory_kv *kv = user;
	uint32_t group = kv->config.heads / kv->config.kv_heads, dim = kv->config.head_dim;

	if (kv->fail)
		return kv->fail;
	for (uint32_t t = 0; t < count; t++)
		for (uint32_t g = 0; g < group; g++)
			attend_one(kv, layer, head, pos + t + 1, scale, q + t * q_stride + g * dim,
				out + t * out_stride + g * dim);
	return 0;
}

static int stage(void *user, uint32_t layer, uint32_t pos, uint32_t count, const uint16_t *hidden)
{
	struct memory_kv *kv = user;
	size_t d = kv->config.hidden;

	if (kv->fail)
		return kv->fail;
	assert_in_range(count, 1, LM_SLAB_TOKENS);
	memcpy(kv->hidden + ((size_t)layer * kv->capacity + pos) * d, hidden, count * d * sizeof(*hidden));
	return 0;
}

void memory_kv_init(struct memory_kv *kv, const struct lm_config *config, uint32_t capacity)
{
	size_t pairs = (size_t)config->layers * config->kv_heads * capacity * config->head_dim;

	*kv = (struct memory_kv){.config = *config, .capacity = capacity};
	kv->k = calloc(pairs, sizeof(*kv->k));
	kv->v = calloc(pairs, sizeof(*kv->v));
	kv->hidden = calloc((size_t)config->layers * capacity * config->hidden, sizeof(*kv->hidden));
	assert_true(kv->k && kv->v && kv->hidden);
}

void memory_kv_deinit(struct memory_kv *kv)
{
	free(kv->k);
	free(kv->v);
	free(kv->hidden);
}

struct lm_kv memory_kv_calls(struct memory_kv *kv)
{
	return (struct lm_kv){.user = kv, .append = append, .attend = attend, .stage = stage};
}
