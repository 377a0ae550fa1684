/*
 * model.h - forward pass of a Qwen3 model in fp32: grouped-query attention with QK norms,
 * rotary positions, RMSNorm, SwiGLU.
 *
 * The model keeps no KV. Keys and values of a slab of tokens live in an activation
 * buffer until the caller's KV (struct lm_kv) has taken them, and attention is the KV's own.
 * Work is spread over the pool; OpenBLAS itself is held to one thread.
 */
#ifndef KVG_LM_MODEL_H
#define KVG_LM_MODEL_H

#include <stddef.h>

#include "tools/lm/config.h"
#include "tools/lm/pool.h"

#define LM_SLAB_TOKENS 1024u /* most tokens that one kv->stage() call brings */

/*
 * Where KV goes. append and attend run on any thread of the pool, several at once for different heads
 * (attend also for one head); stage runs on the caller's. Each returns 0 or a negative errno.
 */
struct lm_kv {
	void *user;
	/* Keeps K and V of `count` tokens of one KV head: token t at k + t * stride and v + t * stride (elements). */
	int (*append)(void *user, uint32_t layer, uint32_t head, uint32_t pos, uint32_t count, const float *k,
		const float *v, size_t stride);
	/* Causal attention of tokens that have been appended; query head g of the group at q + t * q_stride + g *
	 * head_dim, its result at the same place of out. scale multiplies the logits. */
	int (*attend)(void *user, uint32_t layer, uint32_t head, uint32_t pos, uint32_t count, float scale,
		const float *q, size_t q_stride, float *out, size_t out_stride);
	/* Takes the layer's hidden states after the input RMSNorm, bf16 [count][hidden]; NULL: they are not wanted. */
	int (*stage)(void *user, uint32_t layer, uint32_t pos, uint32_t count, const uint16_t *hidden);
};

struct lm_model;

/* Loads a model folder. The pool is borrowed and outlives the model. 0 or a negative errno with text (LM_TEXT bytes).
 */
int lm_model_load(const char *dir, struct lm_pool *pool, struct lm_model **ret, char *text);
struct lm_model *lm_model_free(struct lm_model *model); /* NULL is fine; returns NULL */
const struct lm_config *lm_model_config(const struct lm_model *model);

/*
 * Runs `count` > 0 tokens at positions pos .. pos + count - 1 through all layers, after those already in kv.
 * 0 or a negative errno with text.
 */
int lm_model_forward(struct lm_model *model, const struct lm_kv *kv, const int32_t *tokens, uint32_t pos,
	uint32_t count, char *text);

/* Logits [vocab] of row `row` of the last forward: token tokens[row]. Valid until the next call. */
const float *lm_model_logits(struct lm_model *model, uint32_t row);

#endif
