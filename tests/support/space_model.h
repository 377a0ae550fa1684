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
	uint32_t sealed;  /* tokens that are a context's, of which nothing goes any more */
	uint32_t *shared; /* [rows]: pairs of them in full blocks */
	float *scores;    /* [rows][max_tokens], as the daemon must take them */
	bool *held;       /* [rows][max_tokens] */
	uint32_t protect_begin, protect_end;
	struct random random;
	enum score_pattern pattern;
};

/* Creates a sequence, which is admitted. */
struct model *model_new(struct fixture *fixture, const struct kvg_policy *policy, enum score_pattern pattern);
void model_free(struct model *model);    /* does not touch the sequence */
void model_release(struct model *model); /* frees the sequence as well */

/* The sequence was published or forked. */
void model_seal(struct model *model);

/* What a sequence holds that was attached to what `from` holds, or forked from it: policy says what it says now. */
struct model *model_attached(
	struct fixture *fixture, const struct model *from, const struct kvg_policy *policy, uint64_t handle);

/* The policy of a sequence all of whose tokens were sealed, or that begins with as many of a context. */
struct kvg_policy model_frozen(const struct kvg_policy *policy, uint32_t tokens);

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
