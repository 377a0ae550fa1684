/*
 * weights.h - weights of a Qwen3 model as fp32 matrices, ready for the forward pass.
 *
 * Read from DIR/model.safetensors, or from the shards that DIR/model.safetensors.index.json
 * names, in bf16, f16 or f32. Every tensor's dtype and shape is checked against the
 * configuration. Matrices are row-major [outputs][inputs]; those that take
 * the same input are stacked into one.
 */
#ifndef KVG_LM_WEIGHTS_H
#define KVG_LM_WEIGHTS_H

#include "tools/lm/config.h"

struct lm_layer_weights {
	float *input_norm;      /* [D] */
	float *qkv;             /* [(heads + 2 * kv_heads) * head_dim][D]: queries, keys, values */
	float *q_norm, *k_norm; /* [head_dim] */
	float *output;          /* [D][heads * head_dim] */
	float *post_norm;       /* [D] */
	float *gate_up;         /* [2 * intermediate][D]: gate, up */
	float *down;            /* [D][intermediate] */
};

struct lm_weights {
	float *embedding;  /* [vocab][D] */
	float *norm;       /* [D] */
	const float *head; /* [vocab][D]; the embedding when tied */
	struct lm_layer_weights *layers;
	float *memory; /* what all of the above point into */
};

/* 0 or a negative errno with text (LM_TEXT bytes). */
int lm_weights_read(const char *dir, const struct lm_config *config, struct lm_weights *ret, char *text);
void lm_weights_deinit(struct lm_weights *weights);

#endif
