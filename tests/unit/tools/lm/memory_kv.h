/*
 * memory_kv.h - KV of one sequence in plain fp32 memory with textbook attention: what a
 * test runs the model on when no daemon is there. Keeps the hidden states it is given.
 */
#ifndef KVG_TEST_MEMORY_KV_H
#define KVG_TEST_MEMORY_KV_H

#include <stdint.h>

#include "tools/lm/config.h"
#include "tools/lm/model.h"

struct memory_kv {
	struct lm_config config;
	uint32_t capacity; /* tokens */
	float *k, *v;      /* [layers][kv_heads][capacity][head_dim] */
	uint16_t *hidden;  /* [layers][capacity][hidden] */
	int fail;          /* what every call returns instead, when not 0 */
};

void memory_kv_init(struct memory_kv *kv, const struct lm_config *config, uint32_t capacity);
void memory_kv_deinit(struct memory_kv *kv);

/* The calls for lm_model_forward(); borrowed from kv. */
struct lm_kv memory_kv_calls(struct memory_kv *kv);

#endif
