#include "tools/lm/golden.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/safetensors.h"
#include "tools/lm/numerics.h"

static void *copy_data(const struct kvg_tensor *tensor)
{
	void *copy = malloc(tensor->size);

	if (copy)
		memcpy(copy, tensor->data, tensor->size);
	return copy;
}

static int read_tensors(const struct kvg_safetensors *file, const char *path, const struct lm_config *config,
	struct lm_golden *golden, char *text)
{
	const struct kvg_tensor *tokens = kvg_safetensors_find(file, "tokens");
	const struct kvg_tensor *logits = kvg_safetensors_find(file, "logits_last64");

	if (!tokens || tokens->dtype != KVG_TENSOR_I32 || tokens->rank != 1 || tokens->count < 1)
		return lm_fail(text, -EINVAL, "%s: has no tensor tokens of I32 [T]", path);
	if (tokens->count > config->max_positions)
		return lm_fail(text, -EINVAL, "%s: tokens has %llu, the model has max_position_embeddings %u", path,
			(unsigned long long)tokens->count, config->max_positions);
	if (!logits || logits->dtype != KVG_TENSOR_F32 || logits->rank != 2 || logits->shape[1] != config->vocab)
		return lm_fail(text, -EINVAL, "%s: has no tensor logits_last64 of F32 [N, %u]", path, config->vocab);
	if (logits->shape[0] < 1 || logits->shape[0] > tokens->count)
		return lm_fail(text, -EINVAL, "%s: logits_last64 has %llu rows, not 1 to %llu", path,
			(unsigned long long)logits->shape[0], (unsigned long long)tokens->count);
	golden->tokens = copy_data(tokens);
	golden->logits = copy_data(logits);
	if (!golden->tokens || !golden->logits)
		return lm_fail(text, -ENOMEM, "%s: out of memory", path);
	golden->count = (uint32_t)tokens->count;
	golden->rows = (uint32_t)logits->shape[0];
	return 0;
}

int lm_golden_read(const char *path, const struct lm_config *config, struct lm_golden *ret, char *text)
{
	struct lm_golden golden = {0};
	struct kvg_safetensors *file;
	int e = kvg_safetensors_open(path, &file, text, LM_TEXT);

	if (e < 0)
		return e;
	e = read_tensors(file, path, config, &golden, text);
	(void)kvg_safetensors_free(file);
	if (e < 0)
		lm_golden_deinit(&golden);
	else
		*ret = golden;
	return e;
}

void lm_golden_deinit(struct lm_golden *golden)
{
	free(golden->tokens);
	free(golden->logits);
	*golden = (struct lm_golden){0};
}

float lm_golden_tolerance(uint32_t kv_dtype)
{
	return kv_dtype == KVG_BF16 ? 0.25f : 0.05f;
}

struct comparison {
	struct lm_model *model;
	const struct lm_golden *golden;
	float difference;
};

static int compare_chunk(void *user, uint32_t pos, uint32_t count)
{
	struct comparison *c = user;
	size_t vocab = lm_model_config(c->model)->vocab;
	uint32_t first = c->golden->count - c->golden->rows;

	for (uint32_t t = pos < first ? first - pos : 0; t < count; t++)
		c->difference = fmaxf(c->difference, lm_max_difference(lm_model_logits(c->model, t),
							     c->golden->logits + (pos + t - first) * vocab, vocab));
	return 0;
}

int lm_golden_run(struct lm_worker *worker, struct lm_model *model, const struct lm_options *options,
	const struct lm_golden *golden, float *ret_difference, char *text)
{
	struct kvg_policy policy = lm_options_policy(options, golden->count - 1, 0);
	struct comparison c = {.model = model, .golden = golden};
	int e = lm_worker_begin(worker, &policy, text);

	if (e == 0)
		e = lm_worker_prefill(worker, golden->tokens, golden->count, compare_chunk, &c, text);
	if (e == 0)
		e = lm_worker_end(worker, text);
	if (e == 0)
		*ret_difference = c.difference;
	return e;
}
