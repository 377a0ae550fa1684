/*
 * config.h - config.json of a Hugging Face model folder, as far as kvgate-lm runs it:
 * Qwen3ForCausalLM with plain rotary positions. Whatever would change the result
 * and is not built (another architecture, rope scaling, attention biases, sliding
 * windows, quantised weights) is refused by name, never ignored.
 */
#ifndef KVG_LM_CONFIG_H
#define KVG_LM_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "tools/lm/text.h"

struct lm_config {
	uint32_t hidden;       /* D */
	uint32_t intermediate; /* of the MLP */
	uint32_t layers;
	uint32_t heads, kv_heads; /* heads is a multiple of kv_heads */
	uint32_t head_dim;        /* even */
	uint32_t vocab;
	uint32_t max_positions;
	double rope_theta;
	double norm_eps;
	bool tied; /* the embedding is the output matrix too */
};

/* Reads DIR/config.json. 0 or a negative errno with text (LM_TEXT bytes). */
int lm_config_read(const char *dir, struct lm_config *ret, char *text);

#endif
