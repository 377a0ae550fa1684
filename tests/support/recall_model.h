/*
 * recall_model.h - recalls of a sequence and its model (space_model.h): what must be held and retained afterwards.
 */
#ifndef KVG_TEST_RECALL_MODEL_H
#define KVG_TEST_RECALL_MODEL_H

#include "daemon/sequence/retain.h"
#include "tests/support/space_model.h"

#define RECALL_HOST (16u << 20) /* host memory that is enough for a few prompts */

/* 505 tokens in chunks of 200, evicted at 0.1, with RETAIN_HOST. */
extern const struct kvg_policy recall_policy;

/* A prompt read with this policy at another ratio; protect: positions 130 to 189. */
struct model *recall_read_prompt(struct fixture *fixture, const struct kvg_policy *policy, double ratio,
	enum score_pattern pattern, bool protect);

/* The operation; the status. */
int recall_submit(const struct model *model, struct kvg_sqe *sqe);
int recall_ratio(const struct model *model, double ratio);
int recall_budget(const struct model *model, uint32_t budget);

/* The sequence's store, or NULL; pairs in it. */
const struct retain *recall_store(const struct model *model);
uint64_t recall_retained(const struct model *model);

/* The accounts and the metadata of the store are right, and each pair in it is one that the sequence does not hold. */
void recall_check_store(const struct model *model);

/* The model holds what others hold as well. Returns how many pairs that brings. */
uint64_t recall_take_over(struct model *model, const struct model *other);

/* The same for what evictions at another ratio leave of the chunks that have been read, with the same scores. */
uint64_t recall_predict(struct model *model, double ratio);

/* After a recall that brought `came` pairs: its results, all that is held, and the store. */
void recall_check(struct model *model, uint64_t came);

#endif
