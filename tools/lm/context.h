/*
 * context.h - how a context gets into the daemon's memory: read by the model and evicted, then what the options do to
 * it (recalled, published, sent to the host and back); or found where another worker has published it.
 */
#ifndef KVG_LM_CONTEXT_H
#define KVG_LM_CONTEXT_H

#include "tools/lm/options.h"
#include "tools/lm/worker.h"

/* Begins a sequence with the prompt's `count` tokens, BOS first, and room for max_new more. 0 or a negative errno with
 * text (LM_TEXT bytes). */
int lm_context_begin(struct lm_worker *worker, const struct lm_options *options, const int32_t *prompt, uint32_t count,
	uint32_t max_new, char *text);

#endif
