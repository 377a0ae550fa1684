/*
 * worker.h - one model at work on one connection to kvgated: prefill in chunks with an
 * eviction after each, greedy decoding, and back again.
 *
 * One sequence at a time: begin -> prefill -> { feed, generate, rewind } ... -> end.
 * KV is only ever in the daemon's memory. Every call returns 0 or a negative errno
 * with text (LM_TEXT bytes), which after -EPIPE says that the daemon is gone.
 *
 * With a decode budget (policy.budget) the sequence has events: one right after the prefill, and one after each token
 * at a position that is a multiple of LM_EVENT_TOKENS, fed or generated. An event stages the hidden states gathered
 * since the last one in one batch for each layer, and evicts down to the budget.
 */
#ifndef KVG_LM_WORKER_H
#define KVG_LM_WORKER_H

#include <stdbool.h>

#include "client/kvgate.h"
#include "tools/lm/model.h"

#define LM_TOKEN_BOS   256
#define LM_TOKEN_END   257
#define LM_TOKEN_QUERY 258
#define LM_TOKEN_REPLY 259
#define LM_TOKENS      261 /* least vocabulary: bytes and the pilot's special tokens */

#define LM_EVENT_TOKENS 128u /* tokens from one event to the next */

struct lm_worker_setup {
	const char *socket;
	const char *gate;       /* safetensors file; NULL: none */
	const char *model_name; /* for the daemon's reports */
	struct lm_model *model; /* borrowed */
	uint32_t kv_dtype;      /* enum kvg_dtype */
	uint32_t max_tokens;    /* of one sequence */
	uint32_t chunk_tokens;  /* most tokens of a prefill chunk */
};

/* Sums over all sequences. */
struct lm_times {
	uint64_t prefill_ns;                    /* all of prefill, with the next three */
	uint64_t stage_ns, wait_ns, evict_ns;   /* handing over hidden states; waiting for scores; evicting */
	uint64_t decode_ns;                     /* all steps of generating, with the next */
	uint64_t decode_evict_ns;               /* their events: staging, waiting for scores, evicting */
	uint64_t prefill_tokens, decode_tokens; /* a decode token is one step of one token */
};

/* What was done to contexts besides reading them. Sums over all sequences; bytes of pairs are those of their K and V.
 */
struct lm_moves {
	uint64_t recalls, recall_ns, recalled_bytes;
	uint64_t offloads, offload_ns, restore_ns;
	uint64_t host_bytes, device_bytes; /* what they took on the host; device memory that they gave back meanwhile */
	uint64_t publishes, publish_ns;
	uint64_t attaches, attach_ns; /* finding included */
	uint64_t context_bytes;       /* of the blocks of what was published or attached */
};

/* What an event of the decode budget left. */
struct lm_event {
	uint32_t tokens; /* run so far */
	uint64_t pairs, dropped;
	uint64_t bytes_physical;
};

struct lm_usage {
	uint64_t bytes_full;     /* KV of all tokens so far */
	uint64_t bytes_held;     /* KV of the pairs that are held */
	uint64_t bytes_physical; /* of the extents that the tenant is charged for this worker */
	/* The most of that, as seen after each call that makes room or evicts: until the prefill's end, and since. */
	uint64_t bytes_prompt_max, bytes_decode_max;
};

struct lm_worker;

int lm_worker_open(const struct lm_worker_setup *setup, struct lm_worker **ret, char *text);
struct lm_worker *lm_worker_close(struct lm_worker *worker); /* NULL is fine; returns NULL */

/* Creates the sequence; its whole need is admitted here or refused. */
int lm_worker_begin(struct lm_worker *worker, const struct kvg_policy *policy, char *text);
int lm_worker_end(struct lm_worker *worker, char *text);

/*
 * Called after each chunk of a prefill, before its eviction: tokens pos .. pos + count - 1 have
 * run, row t of the model's logits is token pos + t.
 */
typedef int (*lm_worker_chunk_cb)(void *user, uint32_t pos, uint32_t count);

/* Runs the prompt's tokens chunk by chunk, evicting after each by the policy. cb may be NULL. */
int lm_worker_prefill(
	struct lm_worker *worker, const int32_t *tokens, uint32_t count, lm_worker_chunk_cb cb, void *user, char *text);

/*
 * Right after a prefill, in this order: pairs come back that its evictions have dropped, up to `ratio` (the policy has
 * KVG_POLICY_RETAIN_HOST); it is published under the key of the prompt's tokens and the policy; it goes to the host and
 * comes back.
 */
int lm_worker_recall(struct lm_worker *worker, double ratio, char *text);
int lm_worker_publish(
	struct lm_worker *worker, const struct kvg_policy *policy, const int32_t *tokens, uint32_t count, char *text);
int lm_worker_offload(struct lm_worker *worker, char *text);

/* Instead of begin and prefill: a sequence that begins with the context that was published under that key. -ENOENT
 * names the key. */
int lm_worker_attach(
	struct lm_worker *worker, const struct kvg_policy *policy, const int32_t *tokens, uint32_t count, char *text);

/* Makes room for `tokens` tokens to come; with a decode budget, for those before the next event, and there for the
 * rest. */
int lm_worker_reserve(struct lm_worker *worker, uint32_t tokens, char *text);

/* Runs tokens after those so far, within the room reserved; nothing is evicted but by the decode budget's events. */
int lm_worker_feed(struct lm_worker *worker, const int32_t *tokens, uint32_t count, char *text);

/*
 * Greedy tokens after the last one run, up to and with LM_TOKEN_END or `limit` (> 0). The last is
 * not run itself. *ret_count is their number.
 */
int lm_worker_generate(struct lm_worker *worker, int32_t *tokens, uint32_t limit, uint32_t *ret_count, char *text);

/* Forgets all tokens since the prefill. Not possible (-EINVAL) once an event after the prefill has dropped pairs. */
bool lm_worker_can_rewind(const struct lm_worker *worker);
int lm_worker_rewind(struct lm_worker *worker, char *text);

int lm_worker_usage(struct lm_worker *worker, struct lm_usage *ret, char *text);
const struct lm_times *lm_worker_times(const struct lm_worker *worker);
const struct lm_moves *lm_worker_moves(const struct lm_worker *worker);

/* Hash (hash.h) of all logits that lm_worker_generate() has chosen tokens by. */
uint64_t lm_worker_logits_hash(const struct lm_worker *worker);

/* Events of the sequence since its begin; valid until the next call. */
const struct lm_event *lm_worker_events(const struct lm_worker *worker, uint32_t *ret_count);

#endif
