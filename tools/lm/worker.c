#include "tools/lm/worker.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/host/dtype.h"
#include "tools/lm/hash.h"
#include "tools/lm/numerics.h"

#define STAGING_MAX (64u << 20)

struct lm_worker {
	struct kvg_client *client;
	struct lm_model *model;
	uint64_t pair_bytes; /* K and V of one pair */
	struct lm_times times;
	struct lm_moves moves;
	uint64_t logits_hash;
	/* of the sequence */
	uint64_t seq;
	bool begun, evicts;
	uint32_t chunk;
	uint32_t pos, committed; /* tokens run; tokens committed */
	uint32_t prompt;         /* tokens of the prefill */
	uint32_t last_row;       /* of the model's last forward */
	bool stage_failed;       /* the client's error is about staging */
	uint64_t prompt_max, decode_max;
	/* of its decode budget */
	bool budget;
	uint32_t wanted;    /* position up to which room was asked for */
	uint32_t staged;    /* tokens whose hidden states are with the daemon */
	uint32_t evicted;   /* position of the last event that dropped pairs */
	uint16_t *gathered; /* [layers][LM_EVENT_TOKENS][hidden] from position `staged` on; NULL before the first budget
			     */
	struct lm_event *events;
	uint32_t event_count, event_room;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	(void)clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int client_error(const struct lm_worker *worker, int error, char *text)
{
	const char *why = kvg_error(worker->client);

	return lm_fail(text, error, "%s", why[0] ? why : strerror(-error));
}

/* ---- KV of the model ---- */

static int append(void *user, uint32_t layer, uint32_t head, uint32_t pos, uint32_t count, const float *k,
	const float *v, size_t stride)
{
	const struct lm_worker *w = user;

	return kvg_append(w->client, w->seq, layer, head, pos, count, k, stride, v, stride);
}

static int attend(void *user, uint32_t layer, uint32_t head, uint32_t pos, uint32_t count, float scale, const float *q,
	size_t q_stride, float *out, size_t out_stride)
{
	const struct lm_worker *w = user;

	return kvg_attend(w->client, w->seq, layer, head, pos, count, scale, q, q_stride, out, out_stride);
}

static int stage(void *user, uint32_t layer, uint32_t pos, uint32_t count, const uint16_t *hidden)
{
	struct lm_worker *w = user;
	uint64_t begin = now_ns();
	int e = kvg_stage_hidden(w->client, w->seq, layer, pos, count, hidden);

	w->times.stage_ns += now_ns() - begin;
	w->stage_failed = e < 0;
	return e;
}

/* Keeps hidden states for the next event. */
static int gather(void *user, uint32_t layer, uint32_t pos, uint32_t count, const uint16_t *hidden)
{
	struct lm_worker *w = user;
	size_t d = lm_model_config(w->model)->hidden;
	size_t at = (size_t)layer * LM_EVENT_TOKENS + (pos - w->staged);

	memcpy(w->gathered + at * d, hidden, count * d * sizeof(*hidden));
	return 0;
}

typedef int (*stage_fn)(void *user, uint32_t layer, uint32_t pos, uint32_t count, const uint16_t *hidden);

/* Runs tokens through the model; where hidden states go, if they will be scored. */
static int forward(struct lm_worker *w, const int32_t *tokens, uint32_t count, stage_fn staged, char *text)
{
	struct lm_kv kv = {.user = w, .append = append, .attend = attend, .stage = staged};
	int e = lm_model_forward(w->model, &kv, tokens, w->pos, count, text);

	if (e < 0)
		return w->stage_failed ? client_error(w, e, text) : e;
	w->pos += count;
	w->last_row = count - 1;
	return 0;
}

/* ---- connection ---- */

static void describe_layout(const struct lm_worker_setup *setup, struct kvg_layout *layout)
{
	const struct lm_config *c = lm_model_config(setup->model);

	*layout = (struct kvg_layout){
		.hidden_dim = c->hidden, .group_count = 1, .max_sequences = 1, .max_tokens = setup->max_tokens};
	(void)snprintf(layout->model, sizeof(layout->model), "%s", setup->model_name);
	layout->groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = c->layers,
		.head_count = c->kv_heads,
		.head_total = c->kv_heads,
		.world = 1,
		.k_dim = c->head_dim,
		.v_dim = c->head_dim,
		.k_dtype = setup->kv_dtype,
		.v_dtype = setup->kv_dtype,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = c->heads / c->kv_heads};
}

/* Hidden states of a whole chunk, so that the model seldom waits for the scores; of four slabs at least. */
static uint64_t staging_bytes(const struct lm_worker_setup *setup)
{
	const struct lm_config *c = lm_model_config(setup->model);
	uint64_t rows = setup->chunk_tokens < setup->max_tokens ? setup->chunk_tokens : setup->max_tokens;
	uint64_t row = c->hidden * sizeof(uint16_t), want = rows * row * c->layers, least = 4 * LM_SLAB_TOKENS * row;

	if (want > STAGING_MAX)
		want = STAGING_MAX;
	return want > least ? want : least;
}

/* The daemon sees the gate's bytes, not its name. */
static int load_gate(const struct lm_worker *w, const char *path, char *text)
{
	int e = kvg_load_gate(w->client, path);
	const char *why = kvg_error(w->client);

	if (e < 0 && !strstr(why, path))
		return lm_fail(text, e, "%s: %s", path, why);
	return e < 0 ? client_error(w, e, text) : 0;
}

static int introduce(struct lm_worker *w, const struct lm_worker_setup *setup, char *text)
{
	struct kvg_layout layout;
	int e;

	describe_layout(setup, &layout);
	e = kvg_register(w->client, &layout, staging_bytes(setup));
	if (e < 0)
		return client_error(w, e, text);
	return setup->gate ? load_gate(w, setup->gate, text) : 0;
}

int lm_worker_open(const struct lm_worker_setup *setup, struct lm_worker **ret, char *text)
{
	struct lm_worker *w = calloc(1, sizeof(*w));
	int e;

	if (!w)
		return lm_fail(text, -ENOMEM, "out of memory");
	w->model = setup->model;
	w->logits_hash = LM_HASH_BASIS;
	w->pair_bytes = 2 * (uint64_t)lm_model_config(setup->model)->head_dim * kvg_dtype_size(setup->kv_dtype);
	e = kvg_connect(setup->socket, "kvgate-lm", &w->client, text, LM_TEXT);
	if (e == 0)
		e = introduce(w, setup, text);
	if (e < 0) {
		(void)lm_worker_close(w);
		return e;
	}
	*ret = w;
	return 0;
}

struct lm_worker *lm_worker_close(struct lm_worker *worker)
{
	if (!worker)
		return NULL;
	(void)kvg_close(worker->client);
	free(worker->gathered);
	free(worker->events);
	free(worker);
	return NULL;
}

/* ---- the sequence ---- */

/* Room for what the worker of a decode budget gathers; it stays for later sequences. */
static int prepare_budget(struct lm_worker *w, char *text)
{
	const struct lm_config *c = lm_model_config(w->model);

	if (!w->gathered)
		w->gathered = calloc((size_t)c->layers * LM_EVENT_TOKENS, c->hidden * sizeof(*w->gathered));
	return w->gathered ? 0
			   : lm_fail(text, -ENOMEM, "no memory for the hidden states of %u tokens", LM_EVENT_TOKENS);
}

/* The sequence is there, with that many tokens of a prompt. */
static void begun(struct lm_worker *w, const struct kvg_policy *policy, uint32_t tokens)
{
	w->begun = true;
	w->evicts = policy->mode != KVG_MODE_OFF;
	w->budget = policy->budget != 0;
	w->chunk = policy->chunk_tokens;
	w->pos = w->committed = w->prompt = w->staged = tokens;
	w->wanted = w->evicted = 0;
	w->prompt_max = w->decode_max = 0;
	w->event_count = 0;
	w->stage_failed = false;
}

int lm_worker_begin(struct lm_worker *w, const struct kvg_policy *policy, char *text)
{
	int e = policy->budget ? prepare_budget(w, text) : 0;

	if (e < 0)
		return e;
	e = kvg_create(w->client, policy, &w->seq);
	if (e < 0)
		return client_error(w, e, text);
	begun(w, policy, 0);
	return 0;
}

int lm_worker_end(struct lm_worker *w, char *text)
{
	int e = w->begun ? kvg_free(w->client, w->seq) : 0;

	w->begun = false;
	return e < 0 ? client_error(w, e, text) : 0;
}

/* Looks at what the worker is charged for. */
static void note_physical(struct lm_worker *w, uint64_t *max)
{
	uint64_t bytes = kvg_mapped_bytes(w->client);

	if (bytes > *max)
		*max = bytes;
}

/* Tokens until the next event of the decode budget; at least 1. */
static uint32_t tokens_to_event(const struct lm_worker *w)
{
	return LM_EVENT_TOKENS - (w->pos + LM_EVENT_TOKENS - 1) % LM_EVENT_TOKENS;
}

/* Room up to the position wanted, with a decode budget at most up to the next event. */
static int reserve_wanted(struct lm_worker *w, char *text)
{
	uint32_t tokens = w->wanted > w->pos ? w->wanted - w->pos : 0;
	int e;

	if (w->budget && tokens > tokens_to_event(w))
		tokens = tokens_to_event(w);
	e = kvg_reserve(w->client, w->seq, w->pos - w->committed + tokens);
	if (e < 0)
		return client_error(w, e, text);
	note_physical(w, &w->decode_max);
	return 0;
}

int lm_worker_reserve(struct lm_worker *w, uint32_t tokens, char *text)
{
	w->wanted = w->pos + tokens;
	return reserve_wanted(w, text);
}

static int commit(struct lm_worker *w, char *text)
{
	int e = w->pos == w->committed ? 0 : kvg_commit(w->client, w->seq, w->pos - w->committed);

	if (e < 0)
		return client_error(w, e, text);
	w->committed = w->pos;
	return 0;
}

/* Adds an event to the sequence's list. */
static int note_event(struct lm_worker *w, const struct kvg_evict_result *result, char *text)
{
	if (w->event_count == w->event_room) {
		uint32_t room = w->event_room ? 2 * w->event_room : 64;
		struct lm_event *events = realloc(w->events, room * sizeof(*events));

		if (!events)
			return lm_fail(text, -ENOMEM, "no memory for %u events", room);
		w->events = events;
		w->event_room = room;
	}
	if (result->pairs_dropped)
		w->evicted = w->pos;
	w->events[w->event_count++] = (struct lm_event){.tokens = w->pos,
		.pairs = result->pairs_held,
		.dropped = result->pairs_dropped,
		.bytes_physical = kvg_mapped_bytes(w->client)};
	return 0;
}

/* Waits for the scores and evicts; adds up the time of both. */
static int evict(struct lm_worker *w, uint32_t mode, uint64_t *wait_ns, uint64_t *evict_ns, char *text)
{
	uint64_t begin = now_ns(), scored;
	struct kvg_evict_result result = {0};
	int e = kvg_stage_wait(w->client);

	scored = now_ns();
	if (e == 0)
		e = kvg_evict(w->client, w->seq, mode, &result);
	*wait_ns += scored - begin;
	*evict_ns += now_ns() - scored;
	if (e < 0)
		return client_error(w, e, text);
	return mode == KVG_EVICT_DECODE ? note_event(w, &result, text) : 0;
}

static int prefill_chunk(
	struct lm_worker *w, const int32_t *tokens, uint32_t count, lm_worker_chunk_cb cb, void *user, char *text)
{
	uint32_t pos = w->pos;
	int e = kvg_reserve(w->client, w->seq, count);

	if (e < 0)
		return client_error(w, e, text);
	note_physical(w, &w->prompt_max);
	e = forward(w, tokens, count, w->evicts || w->budget ? stage : NULL, text);
	if (e == 0)
		e = commit(w, text);
	if (e == 0 && cb)
		e = cb(user, pos, count);
	if (e == 0 && w->evicts)
		e = evict(w, KVG_EVICT_PREFILL, &w->times.wait_ns, &w->times.evict_ns, text);
	return e;
}

int lm_worker_prefill(
	struct lm_worker *w, const int32_t *tokens, uint32_t count, lm_worker_chunk_cb cb, void *user, char *text)
{
	uint64_t begin = now_ns();
	int e = 0;

	for (uint32_t n, done = 0; done < count && e == 0; done += n) {
		n = count - done < w->chunk ? count - done : w->chunk;
		e = prefill_chunk(w, tokens + done, n, cb, user, text);
	}
	w->prompt = w->staged = w->pos;
	if (e == 0 && w->budget)
		e = evict(w, KVG_EVICT_DECODE, &w->times.wait_ns, &w->times.evict_ns, text);
	if (e == 0)
		note_physical(w, &w->decode_max);
	w->times.prefill_ns += now_ns() - begin;
	w->times.prefill_tokens += w->pos;
	return e;
}

/* ---- the context's moves ---- */

int lm_worker_recall(struct lm_worker *w, double ratio, char *text)
{
	uint64_t begin = now_ns();
	struct kvg_recall_result result;
	int e = kvg_recall(w->client, w->seq, ratio, &result);

	if (e < 0)
		return client_error(w, e, text);
	w->moves.recalls++;
	w->moves.recall_ns += now_ns() - begin;
	w->moves.recalled_bytes += result.pairs_recalled * w->pair_bytes;
	note_physical(w, &w->decode_max);
	return 0;
}

int lm_worker_offload(struct lm_worker *w, char *text)
{
	uint64_t before = kvg_mapped_bytes(w->client), begin = now_ns(), offloaded, bytes = 0;
	int e = kvg_offload(w->client, w->seq, &bytes);

	if (e < 0)
		return client_error(w, e, text);
	offloaded = now_ns();
	w->moves.offloads++;
	w->moves.offload_ns += offloaded - begin;
	w->moves.host_bytes += bytes;
	w->moves.device_bytes += before - kvg_mapped_bytes(w->client);
	e = kvg_restore(w->client, w->seq);
	w->moves.restore_ns += now_ns() - offloaded;
	return e < 0 ? client_error(w, e, text) : 0;
}

/* The last key of a prompt: that of all its tokens. */
static int find_key(const struct lm_worker *w, const struct kvg_policy *policy, const int32_t *tokens, uint32_t count,
	uint8_t key[KVG_KEY_SIZE], char *text)
{
	uint32_t keys = policy->chunk_tokens ? (count - 1) / policy->chunk_tokens + 1 : 1;
	uint8_t *all = calloc(keys, KVG_KEY_SIZE);
	int e;

	if (!all)
		return lm_fail(text, -ENOMEM, "no memory for %u keys", keys);
	e = kvg_context_keys(w->client, policy, (const uint32_t *)tokens, count, policy->chunk_tokens, all);
	if (e == 0)
		memcpy(key, all + (size_t)(keys - 1) * KVG_KEY_SIZE, KVG_KEY_SIZE);
	free(all);
	return e < 0 ? client_error(w, e, text) : 0;
}

int lm_worker_publish(
	struct lm_worker *w, const struct kvg_policy *policy, const int32_t *tokens, uint32_t count, char *text)
{
	uint64_t begin = now_ns();
	uint8_t key[KVG_KEY_SIZE];
	struct kvg_context_info info;
	int e = find_key(w, policy, tokens, count, key, text);

	if (e < 0)
		return e;
	e = kvg_publish(w->client, w->seq, key, &info);
	if (e < 0)
		return client_error(w, e, text);
	w->moves.publishes++;
	w->moves.publish_ns += now_ns() - begin;
	w->moves.context_bytes += info.bytes;
	note_physical(w, &w->decode_max);
	return 0;
}

int lm_worker_attach(
	struct lm_worker *w, const struct kvg_policy *policy, const int32_t *tokens, uint32_t count, char *text)
{
	struct kvg_policy own = *policy;
	uint64_t begin = now_ns();
	uint8_t key[KVG_KEY_SIZE];
	struct kvg_context_info info;
	int e = find_key(w, policy, tokens, count, key, text);

	if (e < 0)
		return e;
	/* What comes after the context is not evicted. */
	own.mode = KVG_MODE_OFF;
	own.prefix_tokens = own.context_tokens = 0;
	e = kvg_attach(w->client, key, &own, &w->seq, &info);
	if (e < 0)
		return client_error(w, e, text);
	begun(w, &own, count);
	if (info.tokens != count)
		return lm_fail(text, -EPROTO, "context %llu has %u tokens, the prompt %u", (unsigned long long)info.id,
			info.tokens, count);
	w->moves.attaches++;
	w->moves.attach_ns += now_ns() - begin;
	w->moves.context_bytes += info.bytes;
	note_physical(w, &w->prompt_max);
	note_physical(w, &w->decode_max);
	return 0;
}

/* ---- decoding ---- */

/* Hands over what was gathered since the last event, which is committed. */
static int stage_gathered(struct lm_worker *w, char *text)
{
	const struct lm_config *c = lm_model_config(w->model);

	for (uint32_t layer = 0; layer < c->layers; layer++) {
		int e = kvg_stage_hidden(w->client, w->seq, layer, w->staged, w->pos - w->staged,
			w->gathered + (size_t)layer * LM_EVENT_TOKENS * c->hidden);

		if (e < 0)
			return client_error(w, e, text);
	}
	w->staged = w->pos;
	return 0;
}

/* An event of the decode budget, and room for what comes after it; adds its time to *ns. */
static int decode_event(struct lm_worker *w, uint64_t *ns, char *text)
{
	uint64_t begin = now_ns(), unused = 0;
	int e = commit(w, text);

	if (e == 0)
		e = stage_gathered(w, text);
	if (e == 0)
		e = evict(w, KVG_EVICT_DECODE, &unused, &unused, text);
	if (e == 0)
		e = reserve_wanted(w, text);
	*ns += now_ns() - begin;
	return e;
}

/* Runs tokens after the prompt, with the events that fall among them; adds the events' time to *event_ns. */
static int advance(struct lm_worker *w, const int32_t *tokens, uint32_t count, uint64_t *event_ns, char *text)
{
	int e = 0;

	for (uint32_t n, done = 0; done < count && e == 0; done += n) {
		uint32_t most = w->budget ? tokens_to_event(w) : count;

		n = count - done < most ? count - done : most;
		e = forward(w, tokens + done, n, w->budget ? gather : NULL, text);
		if (e == 0 && w->budget && n == most)
			e = decode_event(w, event_ns, text);
	}
	return e;
}

int lm_worker_feed(struct lm_worker *w, const int32_t *tokens, uint32_t count, char *text)
{
	uint64_t unused = 0;

	return advance(w, tokens, count, &unused, text);
}

int lm_worker_generate(struct lm_worker *w, int32_t *tokens, uint32_t limit, uint32_t *ret_count, char *text)
{
	size_t vocab = lm_model_config(w->model)->vocab;
	uint32_t count = 0;

	for (;;) {
		const float *logits = lm_model_logits(w->model, w->last_row);
		int32_t token = (int32_t)lm_argmax(logits, vocab);
		uint64_t begin = now_ns();
		int e;

		w->logits_hash = lm_hash(w->logits_hash, logits, vocab * sizeof(*logits));
		tokens[count++] = token;
		if (token == LM_TOKEN_END || count == limit)
			break;
		e = advance(w, &token, 1, &w->times.decode_evict_ns, text);
		if (e < 0)
			return e;
		w->times.decode_ns += now_ns() - begin;
		w->times.decode_tokens++;
	}
	*ret_count = count;
	return 0;
}

bool lm_worker_can_rewind(const struct lm_worker *w)
{
	return w->evicted <= w->prompt;
}

int lm_worker_rewind(struct lm_worker *w, char *text)
{
	int e;

	if (!lm_worker_can_rewind(w))
		return lm_fail(text, -EINVAL, "no way back to %u tokens: the decode budget has evicted at %u",
			w->prompt, w->evicted);
	e = commit(w, text);
	if (e < 0)
		return e;
	e = kvg_truncate(w->client, w->seq, w->prompt);
	if (e < 0)
		return client_error(w, e, text);
	w->pos = w->committed = w->staged = w->prompt;
	return 0;
}

int lm_worker_usage(struct lm_worker *w, struct lm_usage *ret, char *text)
{
	const struct lm_config *c = lm_model_config(w->model);
	struct kvg_sequence_info info;
	int e = commit(w, text);

	if (e < 0)
		return e;
	e = kvg_query(w->client, w->seq, &info);
	if (e < 0)
		return client_error(w, e, text);
	*ret = (struct lm_usage){.bytes_full = (uint64_t)w->pos * c->layers * c->kv_heads * w->pair_bytes,
		.bytes_held = info.pairs * w->pair_bytes,
		.bytes_physical = kvg_mapped_bytes(w->client),
		.bytes_prompt_max = w->prompt_max,
		.bytes_decode_max = w->decode_max};
	return 0;
}

const struct lm_times *lm_worker_times(const struct lm_worker *w)
{
	return &w->times;
}

const struct lm_moves *lm_worker_moves(const struct lm_worker *w)
{
	return &w->moves;
}

uint64_t lm_worker_logits_hash(const struct lm_worker *w)
{
	return w->logits_hash;
}

const struct lm_event *lm_worker_events(const struct lm_worker *w, uint32_t *ret_count)
{
	*ret_count = w->event_count;
	return w->events;
}
