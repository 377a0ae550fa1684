/*
 * golden.h - logits against a golden file: `tokens` (I32 [T]) go through the daemon
 * without eviction, and the logits of the last N are compared with
 * `logits_last64` (F32 [N][vocab]).
 */
#ifndef KVG_LM_GOLDEN_H
#define KVG_LM_GOLDEN_H

#include "tools/lm/options.h"
#include "tools/lm/worker.h"

struct lm_golden {
	int32_t *tokens; /* owned */
	uint32_t count;
	uint32_t rows; /* N, at most count */
	float *logits; /* [rows][vocab], owned */
};

/* Opens and checks the file. 0 or a negative errno with text (LM_TEXT bytes). */
int lm_golden_read(const char *path, const struct lm_config *config, struct lm_golden *ret, char *text);
void lm_golden_deinit(struct lm_golden *golden);

/* Largest difference that a KV dtype is allowed. */
float lm_golden_tolerance(uint32_t kv_dtype);

/* *ret_difference: the largest of any logit, infinity when one is not a number. */
int lm_golden_run(struct lm_worker *worker, struct lm_model *model, const struct lm_options *options,
	const struct lm_golden *golden, float *ret_difference, char *text);

#endif
