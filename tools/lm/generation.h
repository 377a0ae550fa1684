/*
 * generation.h - one long greedy continuation of a context, with what the decode budget did meanwhile:
 * of a text file, or of each context of a needle file.
 */
#ifndef KVG_LM_GENERATION_H
#define KVG_LM_GENERATION_H

#include "tools/lm/needles.h"
#include "tools/lm/options.h"
#include "tools/lm/worker.h"

struct lm_generation {
	uint32_t prompt; /* tokens of the context, BOS counted */
	int32_t *tokens; /* [count], owned: up to and with LM_TOKEN_END, or as many as were asked for */
	uint32_t count;
	struct lm_event *events; /* [event_count], owned; none without a decode budget */
	uint32_t event_count;
	struct lm_usage usage; /* at the end */
};

struct lm_generations {
	struct lm_generation *list; /* owned */
	size_t count;
	struct lm_times times;
	struct lm_moves moves;
	uint64_t logits_hash;
};

/* Continues the bytes after BOS by options->generate tokens. 0 or a negative errno with text (LM_TEXT bytes). */
int lm_generate(struct lm_worker *worker, const struct lm_options *options, const struct lm_bytes *context,
	struct lm_generation *ret, char *text);
void lm_generation_deinit(struct lm_generation *generation);

/*
 * Most tokens that a context with its continuation takes. -EINVAL with text when one is longer than the
 * model's positions; path is for messages.
 */
int lm_generations_size(const struct lm_needles *needles, const char *path, const struct lm_config *config,
	uint32_t generate, uint32_t *ret_tokens, char *text);

/* Continues each of the `count` contexts. */
int lm_generations_run(struct lm_worker *worker, const struct lm_options *options, const struct lm_bytes *contexts,
	size_t count, struct lm_generations *ret, char *text);
void lm_generations_deinit(struct lm_generations *generations);

#endif
