/*
 * evaluate.h - the main job: answer every query of a needle file from KV that the daemon
 * has evicted, and report how many were right and what the KV weighed.
 *
 * Queries are independent: each finds what the context alone left. Where an eviction of the decode budget fell into
 * a query or its answer, there is no way back, and the context is read anew for the next one.
 */
#ifndef KVG_LM_EVALUATE_H
#define KVG_LM_EVALUATE_H

#include "tools/lm/needles.h"
#include "tools/lm/report.h"

/*
 * Most tokens that a context with its longest query and answer takes. -EINVAL with text (LM_TEXT bytes)
 * when one is longer than the model's positions; path is for messages.
 */
int lm_evaluate_size(const struct lm_needles *needles, const char *path, const struct lm_config *config,
	uint32_t *ret_tokens, char *text);

/* 0, and the report is the caller's to deinit, or a negative errno with text. */
int lm_evaluate(struct lm_worker *worker, const struct lm_options *options, const struct lm_needles *needles,
	struct lm_report *ret, char *text);

#endif
