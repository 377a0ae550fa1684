/* report.h - what an evaluation or a generation found, as text for people or as one JSON object for programs. */
#ifndef KVG_LM_REPORT_H
#define KVG_LM_REPORT_H

#include "tools/lm/generation.h"
#include "tools/lm/options.h"
#include "tools/lm/worker.h"

struct lm_report {
	uint64_t contexts, queries, correct;
	struct lm_usage usage; /* sums over contexts, taken right after prefill and its evictions */
	struct lm_times times;
	struct lm_moves moves;
	uint64_t *answers;    /* [queries], owned: the hash of each answer's tokens */
	uint64_t logits_hash; /* of the logits that they were chosen by */
};

void lm_report_deinit(struct lm_report *report);

/* One JSON object, one line. 0 or -ENOMEM, -EIO. */
int lm_report_json(const struct lm_report *report, const struct lm_options *options, FILE *out);
void lm_report_text(const struct lm_report *report, const struct lm_options *options, FILE *out);

/* The same of continuations, each with its tokens, their hash (equal tokens, equal hash) and the budget's events. */
int lm_report_generations_json(const struct lm_generations *generations, const struct lm_options *options, FILE *out);
void lm_report_generations_text(const struct lm_generations *generations, const struct lm_options *options, FILE *out);

#endif
