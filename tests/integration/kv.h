/*
 * kv.h - a sequence whose KV says what it is, and a plain model of what an
 * eviction must leave of it.
 *
 * Every element of K and V is a whole number below 256 (exact in bf16, f16 and
 * f32) made from the sequence's tag, layer, head and position, so that a pair
 * found in a row names itself. The model keeps a mask of the positions that
 * each row must hold and applies the rules of the method with a full sort.
 *
 * No assertions: results are 0, or a negative errno after one line on standard
 * error, so that forked workers can use it too.
 */
#ifndef KVG_TEST_KV_H
#define KVG_TEST_KV_H

#include <stdint.h>

#include "client/kvgate.h"

enum kv_scores {
	KV_SCORES_RANDOM, /* all rows alike */
	KV_SCORES_SKEWED, /* one head in four outscores the rest in nearly all of its pairs */
};

struct kv {
	struct kvg_client *client;
	const struct kvg_layout *layout;
	uint64_t id;
	struct kvg_policy policy;
	uint32_t seed;
	enum kv_scores scores;
	uint32_t pos;      /* committed tokens */
	uint32_t start;    /* first position that no prefill eviction has looked at */
	uint32_t fold;     /* position up to which the last eviction folded */
	uint32_t capacity; /* tokens that the arrays hold */
	uint8_t *tag;      /* [capacity]: of the token at each position */
	uint8_t *held;     /* [layers][heads][capacity] */
	uint8_t *kept;     /* [capacity]: protected by kv_protect() */
};

/* The geometry of the pilot model (6 layers, 4 heads of 32, bf16) with another storage type. */
void kv_pilot_layout(struct kvg_layout *layout, uint32_t dtype, uint32_t max_sequences, uint32_t max_tokens);

/* Four layers of four heads of 32 in bf16: a stripe is exactly one extent of 256 KiB. */
void kv_small_layout(struct kvg_layout *layout, uint32_t max_sequences, uint32_t max_tokens);

/* A prefill policy of a context of n tokens after one token of system prompt, evicted once with a window of w. */
struct kvg_policy kv_policy(uint32_t n, double ratio, uint32_t window);

/* Connects and registers; NULL after a line on failure. */
struct kvg_client *kv_connect(const char *socket, const char *name, const struct kvg_layout *layout);

/* Creates a sequence. On failure nothing is left to free, and kvg_error() of the client says why. */
int kv_create(struct kv *kv, struct kvg_client *client, const struct kvg_layout *layout,
	const struct kvg_policy *policy, uint32_t seed);

/*
 * The sequence `id` was attached to what `from` holds: it holds the same, and policy is its own behind those tokens. 0
 * or -ENOMEM.
 */
int kv_attached(
	struct kv *kv, struct kvg_client *client, const struct kv *from, const struct kvg_policy *policy, uint64_t id);

/* Frees it in the daemon and here. */
int kv_free(struct kv *kv);

/* Frees what is kept here only, for a connection that is gone. */
void kv_forget(struct kv *kv);

/* The score that the model gives a pair; in (0, 1). */
float kv_score(const struct kv *kv, uint32_t layer, uint32_t head, uint32_t pos);

/* Reserves, writes, stages the scores of and commits the next tokens, with the given tag. */
int kv_feed(struct kv *kv, uint32_t tokens, uint8_t tag);

/* The parts of kv_feed(). */
int kv_write(struct kv *kv, uint32_t tokens, uint8_t tag);
int kv_stage(struct kv *kv, uint32_t tokens);
int kv_commit(struct kv *kv, uint32_t tokens);

/* Evicts in the daemon (enum kvg_evict_mode) and in the model; their pair counts must agree. */
int kv_evict(struct kv *kv, uint32_t mode);

/* What kv_evict() does in the model alone. */
int kv_evict_model(struct kv *kv, uint32_t mode);

int kv_truncate(struct kv *kv, uint32_t pos);
int kv_protect(struct kv *kv, uint32_t begin, uint32_t end);

/* Reads every row: each pair must be one that the model holds, once, with all bytes right, and none may lack. */
int kv_check(const struct kv *kv);

/* Pairs that the model holds; in one row. */
uint64_t kv_pairs(const struct kv *kv);
uint32_t kv_row_pairs(const struct kv *kv, uint32_t layer, uint32_t head);
int kv_holds(const struct kv *kv, uint32_t layer, uint32_t head, uint32_t pos);

/* Bytes of the blocks of one stripe, and of all stripes of so many tokens. */
uint64_t kv_stripe_bytes(const struct kvg_layout *layout);
uint64_t kv_full_bytes(const struct kvg_layout *layout, uint32_t tokens);

/* The next number of a reproducible series. */
uint64_t kv_random(uint64_t *state);

#endif
