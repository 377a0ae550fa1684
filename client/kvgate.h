/*
 * kvgate.h - libkvgate, the worker's side of kvgate: KV memory that a daemon owns, scores and evicts.
 *
 * A worker connects to its tenant's socket, registers the layout of its model's KV,
 * loads the model's gate, and then, for each sequence:
 *
 *     create -> { reserve -> append K/V -> stage hidden states -> commit -> evict } ... -> free
 *
 * K and V are written into and read from memory that the daemon owns, in place: in host memory (the kind
 * host), or on a GPU (the kind cuda), whose own calls are at the end of this file. Which one it is is the daemon's.
 *
 * Rules that hold for every call:
 * - 0 (or a count) is success, a negative errno is failure; kvg_error() then says in one
 *   line what failed, with the object, the value and the limit. A ret_ argument is not
 *   touched on failure. -EPIPE: the connection to the daemon is gone, and so is the KV.
 * - A client is used by one thread at a time, except kvg_append(), kvg_attend() and
 *   kvg_view(), which any number of threads may call at once between other calls; these
 *   three only return their errno (-ENOENT: no such sequence; -ERANGE: positions that are not
 *   reserved, or folded, or to be written and shared; -EBUSY: the sequence is on the host or idle; -EINVAL: no
 *   layout, layer or head; -EPROTO: the daemon's tables make no sense) and leave kvg_error() alone.
 * - No reader or writer of a sequence may run while its eviction, recall, publication, fork, offload or free does. On
 * the cuda kind that holds for kernels by itself, when they are in the client's stream (kvg_set_stream()).
 * - When the daemon is short of memory it asks for what a worker can give (kvg_pressure()). The next call, of any kind
 *   but kvg_append(), kvg_attend(), kvg_view() and kvg_cuda_*(), and every call that waits, unmaps what was asked back
 *   and answers. A worker that makes no call at all for too long may lose its connection: kvg_process() will do, when
 *   kvg_fd() is readable.
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
 * -EPROTO: no common version. When the daemon's memory is of the kind cuda, its GPU is opened with the device's primary
 * context (the one of the CUDA runtime and PyTorch); -ENODEV: this process does not see that GPU; -EOPNOTSUPP: the
 * library was built without the kind. On failure *ret is not touched and text (of text_size
 * bytes; may be NULL) holds the reason.
 */
int kvg_connect(const char *socket_path, const char *name, struct kvg_client **ret, char *text, size_t text_size);

/* Frees all sequences, unmaps everything, closes. NULL is fine; returns NULL. */
struct kvg_client *kvg_close(struct kvg_client *client);

/*
 * For a child that fork() made while the client was connected: closes its copies of the client's descriptors and frees
 * its copy of the client, without a word to the daemon or to a GPU's driver; the parent goes on with its own. Any other
 * call in the child is undefined: the memory shared with the daemon is not mapped there. Not for the process that
 * connected. NULL is fine; returns NULL.
 */
struct kvg_client *kvg_abandon(struct kvg_client *client);

/* What the last failed call of this client says; "" before the first. Valid until the next call. */
const char *kvg_error(const struct kvg_client *client);

/* Name of the tenant that this connection belongs to. */
const char *kvg_tenant(const struct kvg_client *client);

/* Where the daemon's memory lies: enum kvg_kind. */
enum kvg_kind { KVG_KIND_HOST = 1, KVG_KIND_CUDA = 2 };
int kvg_kind(const struct kvg_client *client);

/* The control socket: readable when kvg_process() has something to do. For poll loops. */
int kvg_fd(const struct kvg_client *client);

/* Microseconds that waiting calls spin before they sleep; 0: sleep at once; default 50. */
void kvg_set_spin(struct kvg_client *client, uint32_t microseconds);

/* ---- model ---- */

/*
 * Registers the layout of this worker's KV and maps its tables and staging area (staging_bytes
 * of rows; at least one layer of one chunk of hidden states). One layout for each connection. On the cuda kind
 * staging_bytes are in device memory, and up to 32 MiB of them once more in host memory for the calls that
 * take host pointers.
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

/*
 * kvg_evict() in two halves. The first submits; until the second has taken the result, other calls on this sequence,
 * but kvg_reserve_async(), are refused with -EBUSY. On the cuda kind it returns at once and the client's stream
 * waits for the eviction: kernels enqueued behind it find the new tables. The CPU may go on enqueuing, also
 * when a kernel is loaded for the first time or the queue is full: a thread of the library ends the wait. Errors of
 * rows staged before are kvg_stage_wait()'s to report. -ENOENT: there is no first half. The second half does not wait
 * until the freed extents, which are unmapped here, are back in the pool: kvg_return_memory() does.
 */
int kvg_evict_async(struct kvg_client *client, uint64_t seq, uint32_t mode);
int kvg_evict_finish(struct kvg_client *client, uint64_t seq, struct kvg_evict_result *ret);

/*
 * kvg_reserve() in two halves, also right behind kvg_evict_async(); finished in the same order. The room may be used
 * when the second half has returned 0: kernels that append must be launched after that.
 */
int kvg_reserve_async(struct kvg_client *client, uint64_t seq, uint32_t tokens);
int kvg_reserve_finish(struct kvg_client *client, uint64_t seq);

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

/* ---- the host's memory (of a tenant with a host budget; -ENOSPC names it, its use and the need) ---- */

/*
 * Sends the sequence's blocks to the host; *ret_bytes (may be NULL) is what they take there. Its device memory, the
 * rest of its admission and what was reserved and not committed are back in the pool when this returns. Nobody may
 * read or write the sequence until kvg_restore() or kvg_reserve() has returned 0: kvg_append() and kvg_attend() then
 * say -EBUSY, as calls that need the blocks do. It comes back bit for bit, with its lengths and its generation.
 */
int kvg_offload(struct kvg_client *client, uint64_t seq, uint64_t *ret_bytes);

/* Brings it back, or ends its idleness, under its old admission; nothing when it is in use. -ENOSPC says how many bytes
 * of device memory are missing; it stays where it is then. kvg_reserve() does the same, and reserves. */
int kvg_restore(struct kvg_client *client, uint64_t seq);

/*
 * Releases the sequence: until kvg_restore() or kvg_reserve() nobody reads or writes it, so that the daemon may send it
 * to the host when memory is short. Costs nothing while it is not.
 */
int kvg_idle(struct kvg_client *client, uint64_t seq);

struct kvg_recall_result {
	uint64_t pairs_held, pairs_recalled;
	uint64_t bytes; /* of the sequence's blocks */
	uint32_t generation;
	uint32_t reserved;
};

/*
 * Brings pairs back that evictions dropped and the host kept (KVG_POLICY_RETAIN_HOST), best first, until the sequence
 * holds what evictions at that ratio, above 0 to 1, would have left it; nothing held goes. What the host had no room
 * for does not come back. Everything committed is folded, as by an eviction. ret may be NULL.
 */
int kvg_recall(struct kvg_client *client, uint64_t seq, double ratio, struct kvg_recall_result *ret);

/* The same up to `budget` tokens per head on average. */
int kvg_recall_budget(struct kvg_client *client, uint64_t seq, uint32_t budget, struct kvg_recall_result *ret);

/* ---- contexts: what several sequences of a tenant share ---- */

struct kvg_context_info {
	uint64_t id;       /* of this tenant's contexts */
	uint64_t bytes;    /* of its blocks, which are charged once */
	uint32_t tokens;   /* positions 0 .. tokens - 1 are its */
	uint32_t attached; /* sequences */
	uint32_t existed;  /* kvg_publish(): another sequence had published that key */
	uint32_t reserved;
};

/*
 * Seals what the sequence holds, with all committed tokens, as a context that others of the tenant find by `key`. The
 * sequence goes on as one that is attached to it: its full blocks are the context's, and only what comes after is
 * evicted. When the key is taken by an equal context, the sequence is attached to that one; -EEXIST: by one of other
 * tokens or lengths. The context outlives the sequence, until the daemon needs its memory. ret may be NULL.
 */
int kvg_publish(struct kvg_client *client, uint64_t seq, const uint8_t key[KVG_KEY_SIZE], struct kvg_context_info *ret);

/* The context of that key. -ENOENT: this tenant has none, whoever else may. */
int kvg_find(struct kvg_client *client, const uint8_t key[KVG_KEY_SIZE], struct kvg_context_info *ret);

/* The last of `count` keys, [count][KVG_KEY_SIZE], that there is a context of, with its index. -ENOENT: none. */
int kvg_find_longest(struct kvg_client *client, const uint8_t *keys, uint32_t count, uint32_t *ret_index,
	struct kvg_context_info *ret);

/*
 * A new sequence that begins with the context of that key: its tokens are committed, and the next one is at position
 * ret->tokens. policy is for what comes after it: the context's tokens count as prefix, besides prefix_tokens. -ENOENT:
 * there is no such context (any more). ret may be NULL.
 */
int kvg_attach(struct kvg_client *client, const uint8_t key[KVG_KEY_SIZE], const struct kvg_policy *policy,
	uint64_t *ret_seq, struct kvg_context_info *ret);

/*
 * `count` copies of a sequence, all or none, at its committed position and under its policy. They and the sequence
 * share their full blocks; each has a copy of the last, partly filled one. What they share is evicted by none of them.
 */
int kvg_fork(struct kvg_client *client, uint64_t seq, uint32_t count, uint64_t *ret_seqs);

/*
 * Keys by which workers find each other's contexts: key i, of [ceil(count / chunk)][KVG_KEY_SIZE], names the context of
 * exactly the first min((i + 1) * chunk, count) tokens under this layout, gate and policy (chunk 0: one key, of all).
 * Workers that are to find each other use the same chunk; the policy's is a good one, for contexts can be published
 * between chunks.
 *
 * Each is the SHA-256 of the link before it and of the chunk's tokens as 32-bit numbers. The first link is the SHA-256
 * of "kvgate context 1", the layout (model padded with NUL to 128 bytes, hidden_dim, group_count, and all fields of
 * each group but reserved ones), the SHA-256 of the gate's file (zeros without one), and of the policy ratio (64 bits),
 * mode, level, flags without KVG_POLICY_RETAIN_HOST, prefix_tokens, chunk_tokens, window, floor and threshold; all
 * little endian and of 32 bits where nothing else is said.
 */
int kvg_context_keys(struct kvg_client *client, const struct kvg_policy *policy, const uint32_t *tokens, uint32_t count,
	uint32_t chunk, uint8_t *ret_keys);

/* ---- the connection's rings ---- */

/* Not 0: the daemon is short of memory and has asked for what is idle: a new number each time, which this very call
 * answers for what the library can give. Idle sequences (kvg_idle()) and freed ones are the caller's to give. */
uint32_t kvg_pressure(struct kvg_client *client);

/* A round trip through the rings that does nothing. */
int kvg_nop(struct kvg_client *client);

/* ---- the same, many at once ---- */

/*
 * Submits an entry (its user_data is the caller's, below 2^63); -EAGAIN when the ring is full. wait_value and
 * signal_value are the library's to fill.
 * After an EVICT or FREE completes, kvg_process() unmaps and acknowledges what it dropped.
 */
int kvg_submit(struct kvg_client *client, const struct kvg_sqe *entry);

/*
 * Takes up to max completions of submitted entries; waits for at least min. texts: NULL or
 * max pointers, each set to the entry's message or "" (valid until the next call).
 * Returns the number taken.
 */
int kvg_reap(struct kvg_client *client, struct kvg_cqe *ret, const char **texts, uint32_t max, uint32_t min);

/* Handles control events (extents that come and go, goodbye) and answers pressure, without waiting. */
int kvg_process(struct kvg_client *client);

/* Bytes of extents that are mapped now: granted and not asked back. What is charged for this worker when nothing is
 * unreturned. */
uint64_t kvg_mapped_bytes(const struct kvg_client *client);

/* Waits until every extent asked back so far is unmapped here and back in the pool. */
int kvg_return_memory(struct kvg_client *client);

/* ---- KV in place ---- */

/*
 * Where things are, for engines with kernels of their own. Addresses stay until kvg_close(). On the cuda kind
 * all but slots are addresses of the device, and appended is there kvg_cuda_advance()'s.
 */
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

/* Bytes of addresses from k_base on in which extents come and go: ids are below kvg_arena_bytes() / stride. 0 before a
 * layout is registered. */
uint64_t kvg_arena_bytes(const struct kvg_client *client);

/* ---- KV in place (host kind; -EOPNOTSUPP on cuda) ---- */

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

/* ---- the cuda kind: the stream (all of the following is -EOPNOTSUPP on the host kind) ---- */

/*
 * The stream (a CUstream or cudaStream_t) whose kernels use the KV. Default: the legacy default stream. Calls
 * enqueue on it where the daemon's work has to be ordered with the caller's: stage, evict, truncate, free, commit, and
 * all that follow here. The daemon's work for them begins when the stream has got there, and what is behind
 * kvg_stream_wait() begins when the daemon's is done. The stream before must still exist. While the stream is being
 * captured into a graph only kvg_cuda_*() may be called; others that enqueue return -EBUSY.
 *
 * No stream waits for ever: when the connection ends, every wait of this worker's is released. What kernels then
 * read is undefined, and calls say -EPIPE.
 */
int kvg_set_stream(struct kvg_client *client, void *stream);

/* The stream waits for everything submitted for the sequence so far: rows staged are read, evictions are done. */
int kvg_stream_wait(struct kvg_client *client, uint64_t seq);

/* ---- the cuda kind: staging ---- */

/*
 * Scores positions pos .. pos + rows - 1 of layers layer_begin .. + layer_count - 1 from rows in device memory, in
 * place: kind is enum kvg_stage_kind, the forms are those of kvg_sqe.stage (bf16 hidden states or products of the
 * gate's matrices, fp32 scores), layers are layer_stride bytes apart (0: they follow each other). Returns at once; the
 * rows are read when the stream has got here, and may be overwritten after kvg_stage_wait(), or in the stream behind
 * kvg_stream_wait(). device_rows lies in the device staging area or an imported buffer, otherwise -EINVAL names it.
 */
int kvg_stage_device(struct kvg_client *client, uint64_t seq, uint32_t kind, uint32_t layer_begin, uint32_t layer_count,
	uint32_t pos, uint32_t rows, const void *device_rows, uint64_t layer_stride);

/*
 * The device staging area's next free place for `bytes`, or NULL with an error; the next kvg_stage_device() with that
 * pointer takes it, and it is free again when its rows are read. Callers that want fixed addresses (CUDA graphs) use
 * places of a buffer of their own, imported, and mind themselves when they may be overwritten.
 */
void *kvg_stage_device_buffer(struct kvg_client *client, uint64_t bytes);

/*
 * Lets the daemon read `size` bytes at a device pointer into memory of cudaMalloc or cuMemAlloc (with PyTorch: without
 * expandable segments), so that rows are staged there in place. Only for tenants that are allowed to (-EACCES). Not
 * to be freed before kvg_release() or kvg_close(). At most 16 imports.
 */
int kvg_import_buffer(struct kvg_client *client, const void *device, uint64_t size, uint32_t *ret_id);

/* The same for an interprocess CUevent (cudaEvent_t), for wait_event of kvg_submit()'s entries. */
int kvg_import_event(struct kvg_client *client, void *event, uint32_t *ret_id);

/* Gives an import back; -EBUSY while an entry that names it is under way, -ENOENT. */
int kvg_release(struct kvg_client *client, uint32_t id);

/* ---- the cuda kind: KV in place ---- */

/*
 * These enqueue kernels on the client's stream; all may be captured. Pointers are to device memory, of the layout's
 * dtype where no type is named, strides are in elements, and both keep 16-byte alignment. A slot is the low half of a
 * sequence's handle; UINT32_MAX stands for no sequence. -EINVAL: an argument is out of range; -EOPNOTSUPP: not for
 * this layout. A decode step:
 *
 *     kvg_cuda_plan(c, 0, layers, n, slots, 1);
 *     for each layer: kvg_cuda_append(c, layer, n, slots, NULL, k, ks, v, vs), kvg_cuda_attend(c, layer, ...)
 *     kvg_cuda_advance(c, slots, n, 1);
 *     and, when the CPU gets to it, for each sequence kvg_commit(c, seq, 1)
 *
 * The counter of appended tokens on the device is the stream's: kvg_create(), evictions and kvg_truncate() set it in
 * the stream's order, and kvg_commit() does until the first kvg_cuda_advance() of this client; from then on only
 * kvg_cuda_advance() counts, after prefill too (by = the chunk's tokens), so that steps may run ahead of their commits.
 */

/*
 * Writes K and V of `count` tokens of one layer, all heads, of any mix of sequences: token t, KV head h from
 * k + t * k_stride + h * k_dim, v likewise. Token t goes to sequence slots[t], index[t] tokens after the last eviction;
 * index NULL: to the place after the counter, which is right for one token of each sequence. Reserved before.
 */
int kvg_cuda_append(struct kvg_client *client, uint32_t layer, uint32_t count, const uint32_t *slots,
	const uint32_t *index, const void *k, uint64_t k_stride, const void *v, uint64_t v_stride);

/* The counters of `count` sequences, each named once, grow by `by`. */
int kvg_cuda_advance(struct kvg_client *client, const uint32_t *slots, uint32_t count, uint32_t by);

/*
 * Divides the pairs of layers layer_begin .. + layer_count - 1 of `sequences` sequences among the GPU's processors, by
 * their lengths of the moment, for kvg_cuda_attend(). extra: pairs beyond the counter, 1 where the step's own token
 * is appended and not counted yet. slots must live as long as the plan. The library's memory for it grows outside of
 * captures only: before capturing a graph call it once with the graph's sizes (-EBUSY otherwise).
 */
int kvg_cuda_plan(struct kvg_client *client, uint32_t layer_begin, uint32_t layer_count, uint32_t sequences,
	const uint32_t *slots, uint32_t extra);

/*
 * Attention of one token of each of the last plan's sequences over all pairs of its rows: sequence i, query head h
 * at q + i * q_stride + h * k_dim; out + i * out_stride + h * v_dim. scale: of the logits, 1 / sqrt(k_dim).
 */
int kvg_cuda_attend(struct kvg_client *client, uint32_t layer, float scale, const void *q, uint64_t q_stride, void *out,
	uint64_t out_stride);

/*
 * The tables of one layer for other paged kernels, a row for each (sequence, KV head): ids int32
 * [sequences][heads][cap] and lengths int32 [sequences][heads] in tokens; longer rows are cut.
 */
int kvg_cuda_export_table(struct kvg_client *client, uint32_t layer, uint32_t sequences, const uint32_t *slots,
	uint32_t extra, int32_t *table, uint32_t cap, int32_t *lengths);

/*
 * The same as CSR (page size 16, one KV head a request): indptr int32 [sequences * heads + 1], indices int32 with
 * room for sequences * heads * row_cap, last_page_len int32 [sequences * heads].
 */
int kvg_cuda_export_csr(struct kvg_client *client, uint32_t layer, uint32_t sequences, const uint32_t *slots,
	uint32_t extra, int32_t *indptr, int32_t *indices, int32_t *last_page_len);

#ifdef __cplusplus
}
#endif

#endif
