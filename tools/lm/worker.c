#include "tools/lm/worker.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/host/dtype.h"
#include "tools/lm/numerics.h"

#define STAGING_MAX (64u << 20)

struct lm_worker {
	struct kvg_client *client;
	struct lm_model *model;
	uint64_t pair_bytes; /* K and V of one pair */
	struct lm_times times;
	/* of the sequence */
	uint64_t seq;
	bool begun, evicts;
	uint32_t chunk;
	uint32_t pos, committed; /* tokens run; tokens committed */
	uint32_t prompt;         /* tokens of the prefill */
	uint32_t last_row;       /* of the model's last forward */
	bool stage_failed;       /* the client's error is about staging */
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

/* Runs tokens through the model; with hidden states staged when they will be scored. */
static int forward(struct lm_worker *w, const int32_t *tokens, uint32_t count, bool staged, char *text)
{
	struct lm_kv kv = {.user = w, .append = append, .attend = attend, .stage = staged ? stage : NULL};
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
	free(worker);
	return NULL;
}

/* ---- the sequence ---- */

int lm_worker_begin(struct lm_worker *w, const struct kvg_policy *policy, char *text)
{
	int e = kvg_create(w->client, policy, &w->seq);

	if (e < 0)
		return client_error(w, e, text);
	w->begun = true;
	w->evicts = policy->mode != KVG_MODE_OFF;
	w->chunk = policy->chunk_tokens;
	w->pos = w->committed = w->prompt = 0;
	w->stage_failed = false;
	return 0;
}

int lm_worker_end(struct lm_worker *w, char *text)
{
	int e = w->begun ? kvg_free(w->client, w->seq) : 0;

	w->begun = false;
	return e < 0 ? client_error(w, e, text) : 0;
}

int lm_worker_reserve(struct lm_worker *w, uint32_t tokens, char *text)
{
	int e = kvg_reserve(w->client, w->seq, tokens);

	return e < 0 ? client_error(w, e, text) : 0;
}

static int commit(struct lm_worker *w, char *text)
{
	int e = w->pos == w->committed ? 0 : kvg_commit(w->client, w->seq, w->pos - w->committed);

	if (e < 0)
		return client_error(w, e, text);
	w->committed = w->pos;
	return 0;
}

static int evict(struct lm_worker *w, char *text)
{
	uint64_t begin = now_ns(), scored;
	int e = kvg_stage_wait(w->client);

	scored = now_ns();
	if (e == 0)
		e = kvg_evict(w->client, w->seq, KVG_EVICT_PREFILL, NULL);
	w->times.wait_ns += scored - begin;
	w->times.evict_ns += now_ns() - scored;
	return e < 0 ? client_error(w, e, text) : 0;
}

int lm_worker_prefill(
	struct lm_worker *w, const int32_t *tokens, uint32_t count, lm_worker_chunk_cb cb, void *user, char *text)
{
	uint64_t begin = now_ns();
	int e = 0;

	for (uint32_t n, done = 0; done < count && e == 0; done += n) {
		n = count - done < w->chunk ? count - done : w->chunk;
		e = lm_worker_reserve(w, n, text);
		if (e == 0)
			e = forward(w, tokens + done, n, w->evicts, text);
		if (e == 0)
			e = commit(w, text);
		if (e == 0 && cb)
			e = cb(user, done, n);
		if (e == 0 && w->evicts)
			e = evict(w, text);
	}
	w->prompt = w->pos;
	w->times.prefill_ns += now_ns() - begin;
	w->times.prefill_tokens += w->pos;
	return e;
}

int lm_worker_feed(struct lm_worker *w, const int32_t *tokens, uint32_t count, char *text)
{
	return forward(w, tokens, count, false, text);
}

int lm_worker_generate(struct lm_worker *w, int32_t *tokens, uint32_t limit, uint32_t *ret_count, char *text)
{
	size_t vocab = lm_model_config(w->model)->vocab;
	uint32_t count = 0;

	for (;;) {
		int32_t token = (int32_t)lm_argmax(lm_model_logits(w->model, w->last_row), vocab);
		uint64_t begin = now_ns();
		int e;

		tokens[count++] = token;
		if (token == LM_TOKEN_END || count == limit)
			break;
		e = forward(w, &token, 1, false, text);
		if (e < 0)
			return e;
		w->times.decode_ns += now_ns() - begin;
		w->times.decode_tokens++;
	}
	*ret_count = count;
	return 0;
}

int lm_worker_rewind(struct lm_worker *w, char *text)
{
	int e = commit(w, text);

	if (e < 0)
		return e;
	e = kvg_truncate(w->client, w->seq, w->prompt);
	if (e < 0)
		return client_error(w, e, text);
	w->pos = w->committed = w->prompt;
	return 0;
}

int lm_worker_usage(struct lm_worker *w, struct lm_usage *ret, char *text)
{
	const struct lm_config *c = lm_model_config(w->model);
	struct kvg_sequence_info info;
	int e = kvg_query(w->client, w->seq, &info);

	if (e < 0)
		return client_error(w, e, text);
	*ret = (struct lm_usage){.bytes_full = (uint64_t)w->pos * c->layers * c->kv_heads * w->pair_bytes,
		.bytes_held = info.pairs * w->pair_bytes,
		.bytes_physical = kvg_mapped_bytes(w->client)};
	return 0;
}

const struct lm_times *lm_worker_times(const struct lm_worker *w)
{
	return &w->times;
}
