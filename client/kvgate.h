/*
 * kvgate.h - libkvgate, the worker's side of kvgate: KV memory that a daemon owns, scores and evicts.
 *
 * A worker connects to its tenant's socket, registers the layout of its model's KV,
 * loads the model's gate, and then, for each sequence:
 *
 *     create -> { reserve -> append K/V -> stage hidden states -> commit -> evict } ... -> free
 *
 * K and V are written into and read from memory that the daemon owns, in place.
 *
 * Rules that hold for every call:
 * - 0 (or a count) is success, a negative errno is failure; kvg_error() then says in one
 *   line what failed, with the object, the value and the limit. A ret_ argument is not
 *   touched on failure. -EPIPE: the connection to the daemon is gone, and so is the KV.
 * - A client is used by one thread at a time, except kvg_append(), kvg_attend() and
 *   kvg_view(), which any number of threads may call at once between other calls; these
 *   three only return their errno (-ENOENT: no such sequence; -ERANGE: positions that are not
 *   reserved, or folded; -EINVAL: no layout, layer or head; -EPROTO: the daemon's tables make no
 *   sense) and leave kvg_error() alone.
 * - No reader or writer of a sequence may run while its eviction or free does.
 * - Nothing here is a macro or an inline function that a caller needs: every type has
 *   plain fields and fixed sizes, so that any language's FFI can use the library.
 *
 * A worked example, one sequence from prompt to answer:
 *
 *     struct kvg_client *c;
 *     char why[256];
 *     if (kvg_connect("/run/kvgate/search.sock", "example", &c, why, sizeof(why)) < 0)
 *             return 1;
 *     struct kvg_layout l = {.model = "pilot", .hidden_dim = 256, .group_count = 1,
 *                            .max_sequences = 4, .max_tokens = 8192};
 *     l.groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL, .layers = 6, .head_count = 4,
 *             .head_total = 4, .world = 1, .k_dim = 32, .v_dim = 32, .k_dtype = KVG_BF16,
 *             .v_dtype = KVG_BF16, .block_tokens = 16, .query_heads = 2};
 *     kvg_register(c, &l, 4 << 20);
 *     kvg_load_gate(c, "gate.safetensors");
 *     struct kvg_policy p = {.ratio = 0.3, .mode = KVG_MODE_CHUNKED, .level = KVG_LEVEL_PAIR,
 *             .prefix_tokens = 1, .context_tokens = 3000, .window = 4096, .max_new_tokens = 64};
 *     uint64_t seq;
 *     if (kvg_create(c, &p, &seq) < 0)
 *             fprintf(stderr, "%s\n", kvg_error(c));
 *     kvg_reserve(c, seq, 3001);
 *     for (uint32_t layer = 0; layer < 6; layer++) {
 *             (compute h, q, k, v of this layer for the 3001 tokens)
 *             kvg_stage_hidden(c, seq, layer, 0, 3001, h_bf16);
 *             for (uint32_t head = 0; head < 4; head++) {
 *                     kvg_append(c, seq, layer, head, 0, 3001, k + head * 32, 128, v + head * 32, 128);
 *                     kvg_attend(c, seq, layer, head, 0, 3001, scale, q + head * 64, 256, o + head * 64, 256);
 *             }
 *     }
 *     kvg_commit(c, seq, 3001);
 *     kvg_evict(c, seq, KVG_EVICT_PREFILL, NULL);    30% of the pairs are left, the rest is back in the pool
 *     ... kvg_reserve, kvg_append, kvg_attend, kvg_commit for each generated token ...
 *     kvg_free(c, seq);
 *     kvg_close(c);
 */
#ifndef KVGATE_H
#define KVGATE_H

#include <stddef.h>
#include <stdint.h>

#include "kvgate_abi.h"

#ifdef __cplusplus
extern "C" {
#endif

struct kvg_client;

/* KVG_ABI_VERSION of the library. */
uint32_t kvg_abi_version(void);

/* ---- connection ---- */

/*
 * Connects to a tenant's socket and says hello. name appears in the daemon's reports.
 * -ENOENT, -ECONNREFUSED: no daemon there; -EACCES: not allowed (uid or mode);
 * -EPROTO: no common version. On failure *ret is not touched and text (of text_size
 * bytes; may be NULL) holds the reason.
 */
int kvg_connect(const char *socket_path, const char *name, struct kvg_client **ret, char *text, size_t text_size);

/* Frees all sequences, unmaps everything, closes. NULL is fine; returns NULL. */
struct kvg_client *kvg_close(struct kvg_client *client);

/* What the last failed call of this client says; "" before the first. Valid until the next call. */
const char *kvg_error(const struct kvg_client *client);

/* Name of the tenant that this connection belongs to. */
const char *kvg_tenant(const struct kvg_client *client);

/* The control socket: readable when kvg_process() has something to do. For poll loops. */
int kvg_fd(const struct kvg_client *client);

/* Microseconds that waiting calls spin before they sleep; 0: sleep at once; default 50. */
void kvg_set_spin(struct kvg_client *client, uint32_t microseconds);

/* ---- model ---- */

/*
 * Registers the layout of this worker's KV and maps its tables and staging area (staging_bytes
 * of rows; at least one layer of one chunk of hidden states). One layout for each connection.
 * -EOPNOTSUPP names a kind, dtype or size that this daemon does not take.
 */
int kvg_register(struct kvg_client *client, const struct kvg_layout *layout, uint64_t staging_bytes);

/* Gives the daemon the gate's weights (a safetensors file). -EINVAL names what does not fit the layout. */
int kvg_load_gate(struct kvg_client *client, const char *path);

/* ---- sequences: each call submits one entry and waits for it ---- */

/* Admits a sequence with its whole need, or refuses with -ENOSPC and says how many bytes short. */
int kvg_create(struct kvg_client *client, const struct kvg_policy *policy, uint64_t *ret_seq);

/* Room for `tokens` tokens beyond the committed ones (nothing when there is room). -ENOSPC names tenant, budget, use,
 * need. */
int kvg_reserve(struct kvg_client *client, uint64_t seq, uint32_t tokens);

/* The next `tokens` tokens are written in every row. */
int kvg_commit(struct kvg_client *client, uint64_t seq, uint32_t tokens);

/*
 * Scores positions pos .. pos + rows - 1 of one layer from hidden states after the input RMSNorm,
 * bf16 [rows][hidden_dim]; copied into the staging area, scored in the background: returns as soon
 * as the rows are staged, waiting only for staging space. kvg_stage_wait() or any evict waits for the scores,
 * and reports their first error.
 */
int kvg_stage_hidden(
	struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t pos, uint32_t rows, const uint16_t *hidden);

/* The same with the scores themselves: fp32 [rows][heads]. */
int kvg_stage_scores(
	struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t pos, uint32_t rows, const float *scores);

/* The staging area's next free place for `bytes` (so that hidden states can be produced in place), or NULL with an
 * error. */
void *kvg_stage_buffer(struct kvg_client *client, uint64_t bytes);

/* Waits until everything staged is scored. */
int kvg_stage_wait(struct kvg_client *client);

struct kvg_evict_result {
	uint64_t pairs_held, pairs_dropped;
	uint64_t bytes; /* of the sequence's blocks */
	uint32_t generation;
	uint32_t reserved;
};

/*
 * Evicts by the sequence's policy; mode is enum kvg_evict_mode. When it returns, the freed
 * extents are unmapped here and back in the pool. What was reserved and not committed goes
 * back too. ret may be NULL.
 */
int kvg_evict(struct kvg_client *client, uint64_t seq, uint32_t mode, struct kvg_evict_result *ret);

/* Forgets tokens from position pos on; not before the last eviction's (-EINVAL). Their room stays reserved. */
int kvg_truncate(struct kvg_client *client, uint64_t seq, uint32_t pos);

/* Positions [begin, end) are never evicted. At most KVG_MAX_PROTECTED ranges. */
int kvg_protect(struct kvg_client *client, uint64_t seq, uint32_t begin, uint32_t end);

/* Frees the sequence; its memory is back in the pool when this returns. */
int kvg_free(struct kvg_client *client, uint64_t seq);

struct kvg_sequence_info {
	uint32_t generation, fold_pos, committed_pos, reserved_pos;
	uint64_t pairs, blocks, bytes;
};
int kvg_query(struct kvg_client *client, uint64_t seq, struct kvg_sequence_info *ret);

/* A round trip through the rings that does nothing. */
int kvg_nop(struct kvg_client *client);

/* ---- the same, many at once ---- */

/*
 * Submits an entry (its user_data is the caller's, below 2^63); -EAGAIN when the ring is full.
 * After an EVICT or FREE completes, kvg_process() unmaps and acknowledges what it dropped.
 */
int kvg_submit(struct kvg_client *client, const struct kvg_sqe *entry);

/*
 * Takes up to max completions of submitted entries; waits for at least min. texts: NULL or
 * max pointers, each set to the entry's message or "" (valid until the next call).
 * Returns the number taken.
 */
int kvg_reap(struct kvg_client *client, struct kvg_cqe *ret, const char **texts, uint32_t max, uint32_t min);

/* Handles control events (extents that come and go, pressure, goodbye) without waiting. */
int kvg_process(struct kvg_client *client);

/* Bytes of extents that are mapped now: granted and not asked back. What is charged for this worker when nothing is
 * unreturned. */
uint64_t kvg_mapped_bytes(const struct kvg_client *client);

/* Waits until every extent asked back so far is unmapped here and back in the pool. */
int kvg_return_memory(struct kvg_client *client);

/* ---- KV in place (host kind) ---- */

/* Where things are, for engines with kernels of their own. Addresses stay until kvg_close(). */
struct kvg_view {
	uint8_t *k_base, *v_base; /* K(id) = k_base + id * stride */
	uint64_t stride, extent_size;
	const struct kvg_slot *slots; /* [max_sequences] */
	const uint32_t *base_len;     /* [layers][max_sequences][heads] */
	const uint32_t *ids;          /* [layers][max_sequences][heads][row_cap] */
	uint32_t *appended;           /* [max_sequences]: tokens committed or written since the last eviction */
	uint32_t layers, heads, max_sequences, row_cap;
};
int kvg_view(const struct kvg_client *client, struct kvg_view *ret);

/*
 * Writes K and V of `count` tokens of one KV head: those at positions pos .. pos + count - 1,
 * which must be reserved and not yet folded by an eviction. fp32 in, converted to the layout's dtype; token t at
 * k + t * k_stride (elements), v likewise.
 */
int kvg_append(const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos,
	uint32_t count, const float *k, size_t k_stride, const float *v, size_t v_stride);

/*
 * Attention of the tokens at positions pos .. pos + count - 1 (already appended) for one KV head and
 * its group of query heads, over all pairs that the row holds up to each token. q: token t,
 * query head g of the group at q + t * q_stride + g * k_dim; out: out + t * o_stride + g * v_dim.
 */
int kvg_attend(const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos,
	uint32_t count, float scale, const float *q, size_t q_stride, float *out, size_t o_stride);

#ifdef __cplusplus
}
#endif

#endif
