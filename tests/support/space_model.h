/*
 * space_model.h - what a sequence must hold, worked out the naive way, and the
 * comparison with what it does hold.
 *
 * K and V of a pair are a function of its row and position, so the memory itself tells which pair lies where.
 * The oracle sorts; it shares nothing with the kernels.
 */
#ifndef KVG_TEST_SPACE_MODEL_H
#define KVG_TEST_SPACE_MODEL_H

#include "tests/support/space_fixture.h"
#include "tests/unit/kernels/random.h"

enum score_pattern {
	SCORES_RANDOM,
	SCORES_TIES,       /* 16 values */
	SCORES_EQUAL,      /* one value */
	SCORES_ASCENDING,  /* the newest are best */
	SCORES_DESCENDING, /* the oldest are best */
	SCORES_ONE_ROW,    /* one row beats all others */
	SCORES_WILD,       /* NaN, infinities, negative ones */
	SCORES_PATTERNS
};

struct model {
	struct fixture *fixture;
	struct kvg_policy policy;
	uint64_t handle;
	uint32_t rows, max_tokens;
	uint32_t committed, fold, prune_start;
	float *scores; /* [rows][max_tokens], as the daemon must take them */
	bool *held;    /* [rows][max_tokens] */
	uint32_t protect_begin, protect_end;
	struct random random;
	enum score_pattern pattern;
};

/* Creates a sequence, which is admitted. */
struct model *model_new(struct fixture *fixture, const struct kvg_policy *policy, enum score_pattern pattern);
void model_free(struct model *model);    /* does not touch the sequence */
void model_release(struct model *model); /* frees the sequence as well */

/* Reserves, writes, scores and commits `tokens` more. The status of the reserve, or 0. */
int model_append(struct model *model, uint32_t tokens);

/* The same in steps. */
void model_write(const struct model *model, uint32_t begin, uint32_t end);
int model_stage(struct model *model, uint32_t begin, uint32_t end);

/* Evicts, which succeeds; compares counts and contents with the oracle. */
void model_evict(struct model *model, uint32_t mode);

/* What an eviction leaves, without any: changes the model only. Returns how many pairs go. */
uint64_t model_predict(struct model *model, uint32_t mode);
void model_truncate(struct model *model, uint32_t pos);
void model_protect(struct model *model, uint32_t begin, uint32_t end);

/* Every pair that must be there is there once, bytes, position and score; no other is. */
void model_check(const struct model *model);
uint64_t model_pairs(const struct model *model);

/* Reads the prompt in chunks, evicting after each (prefix included in the first). */
void model_prefill(struct model *model);

#endif
