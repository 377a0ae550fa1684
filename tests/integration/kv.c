#include "tests/integration/kv.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/host/dtype.h"
#include "tests/integration/oracle.h"

static int report(const struct kv *kv, const char *what, int r)
{
	if (r < 0)
		(void)fprintf(stderr, "sequence %" PRIx64 " seed %u: %s: %s: %s\n", kv->id, kv->seed, what,
			strerror(-r), kvg_error(kv->client));
	return r;
}

uint64_t kv_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

/* ---- layouts and policies ---- */

static void make_layout(struct kvg_layout *layout, uint32_t layers, uint32_t dtype, uint32_t sequences, uint32_t tokens)
{
	*layout = (struct kvg_layout){.model = "itest",
		.hidden_dim = 256,
		.group_count = 1,
		.max_sequences = sequences,
		.max_tokens = tokens};
	layout->groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = layers,
		.head_count = 4,
		.head_total = 4,
		.world = 1,
		.k_dim = 32,
		.v_dim = 32,
		.k_dtype = dtype,
		.v_dtype = dtype,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 2};
}

void kv_pilot_layout(struct kvg_layout *layout, uint32_t dtype, uint32_t max_sequences, uint32_t max_tokens)
{
	make_layout(layout, 6, dtype, max_sequences, max_tokens);
}

void kv_small_layout(struct kvg_layout *layout, uint32_t max_sequences, uint32_t max_tokens)
{
	make_layout(layout, 4, KVG_BF16, max_sequences, max_tokens);
}

struct kvg_policy kv_policy(uint32_t n, double ratio, uint32_t window)
{
	return (struct kvg_policy){.ratio = ratio,
		.mode = KVG_MODE_CHUNKED,
		.level = KVG_LEVEL_PAIR,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.prefix_tokens = 1,
		.context_tokens = n,
		.window = window};
}

uint64_t kv_stripe_bytes(const struct kvg_layout *layout)
{
	const struct kvg_group *g = &layout->groups[0];
	uint64_t k = g->k_dim * kvg_dtype_size(g->k_dtype), v = g->v_dim * kvg_dtype_size(g->v_dtype);

	return 2 * (k > v ? k : v) * KVG_STRIPE_TOKENS * g->layers * g->head_count;
}

uint64_t kv_full_bytes(const struct kvg_layout *layout, uint32_t tokens)
{
	return (tokens + KVG_STRIPE_TOKENS - 1) / KVG_STRIPE_TOKENS * kv_stripe_bytes(layout);
}

/* ---- scores and content ---- */

float kv_score(const struct kv *kv, uint32_t layer, uint32_t head, uint32_t pos)
{
	const struct kvg_group *g = &kv->layout->groups[0];
	uint64_t state = ((uint64_t)kv->seed << 40) ^ ((uint64_t)(layer * g->head_count + head) << 24) ^ pos;
	float noise = (float)(kv_random(&state) >> 40) / (float)(1 << 24);

	if (kv->scores == KV_SCORES_RANDOM)
		return 0.001f + 0.998f * noise;
	return (layer + head) % 4 == 0 ? 0.6f + 0.39f * noise : 0.01f + 0.6f * noise;
}

/* Element i of K (or V, with `other` 97) of one pair; the first five name it. */
static uint8_t element(uint8_t tag, uint32_t layer, uint32_t head, uint32_t pos, uint32_t i, uint32_t other)
{
	const uint8_t name[5] = {tag, (uint8_t)layer, (uint8_t)head, (uint8_t)(pos & 255), (uint8_t)(pos >> 8)};

	return i < 5 ? name[i] : (uint8_t)(pos * 7 + i * 13 + layer * 3 + head * 5 + tag + other);
}

static void fill(float *k, float *v, uint32_t dim, uint8_t tag, uint32_t layer, uint32_t head, uint32_t pos)
{
	for (uint32_t i = 0; i < dim; i++) {
		k[i] = element(tag, layer, head, pos, i, 0);
		v[i] = element(tag, layer, head, pos, i, 97);
	}
}

/* ---- a sequence ---- */

struct kvg_client *kv_connect(const char *socket, const char *name, const struct kvg_layout *layout)
{
	struct kvg_client *client;
	char text[512] = "";
	int r = kvg_connect(socket, name, &client, text, sizeof(text));

	if (r < 0) {
		(void)fprintf(stderr, "%s: connect: %s: %s\n", socket, strerror(-r), text);
		return NULL;
	}
	r = kvg_register(client, layout, 4u << 20);
	if (r < 0) {
		(void)fprintf(stderr, "%s: register: %s: %s\n", socket, strerror(-r), kvg_error(client));
		return kvg_close(client);
	}
	return client;
}

static int allocate(struct kv *kv, struct kvg_client *client, const struct kvg_layout *layout,
	const struct kvg_policy *policy, uint32_t seed)
{
	const struct kvg_group *g = &layout->groups[0];
	uint32_t capacity = layout->max_tokens;

	*kv = (struct kv){.client = client,
		.layout = layout,
		.policy = *policy,
		.seed = seed,
		.start = policy->prefix_tokens,
		.capacity = capacity};
	kv->tag = calloc(capacity, 1);
	kv->kept = calloc(capacity, 1);
	kv->held = calloc((size_t)capacity * g->layers, g->head_count);
	if (kv->tag && kv->kept && kv->held)
		return 0;
	kv_forget(kv);
	return -ENOMEM;
}

int kv_create(struct kv *kv, struct kvg_client *client, const struct kvg_layout *layout,
	const struct kvg_policy *policy, uint32_t seed)
{
	int r = allocate(kv, client, layout, policy, seed);

	if (r == 0)
		r = kvg_create(client, policy, &kv->id);
	if (r < 0)
		kv_forget(kv);
	return r;
}

int kv_attached(
	struct kv *kv, struct kvg_client *client, const struct kv *from, const struct kvg_policy *policy, uint64_t id)
{
	const struct kvg_group *g = &from->layout->groups[0];
	int r = allocate(kv, client, from->layout, policy, from->seed);

	if (r < 0)
		return r;
	kv->id = id;
	kv->policy.prefix_tokens += from->pos;
	kv->pos = kv->fold = from->pos;
	kv->start = kv->policy.prefix_tokens;
	memcpy(kv->tag, from->tag, from->capacity);
	memcpy(kv->held, from->held, (size_t)from->capacity * g->layers * g->head_count);
	return 0;
}

void kv_forget(struct kv *kv)
{
	free(kv->tag);
	free(kv->kept);
	free(kv->held);
	*kv = (struct kv){.id = 0};
}

int kv_free(struct kv *kv)
{
	int r = report(kv, "free", kvg_free(kv->client, kv->id));

	kv_forget(kv);
	return r;
}

static uint8_t *row_of(const struct kv *kv, uint32_t layer, uint32_t head)
{
	return kv->held + ((size_t)layer * kv->layout->groups[0].head_count + head) * kv->capacity;
}

int kv_write(struct kv *kv, uint32_t tokens, uint8_t tag)
{
	const struct kvg_group *g = &kv->layout->groups[0];
	uint32_t dim = g->k_dim;
	float *k = malloc((size_t)tokens * dim * sizeof(*k)), *v = malloc((size_t)tokens * dim * sizeof(*v));
	int r = k && v ? 0 : -ENOMEM;

	for (uint32_t row = 0; r == 0 && row < g->layers * g->head_count; row++) {
		uint32_t layer = row / g->head_count, head = row % g->head_count;

		for (uint32_t t = 0; t < tokens; t++)
			fill(k + (size_t)t * dim, v + (size_t)t * dim, dim, tag, layer, head, kv->pos + t);
		r = kvg_append(kv->client, kv->id, layer, head, kv->pos, tokens, k, dim, v, dim);
	}
	free(k);
	free(v);
	if (r == 0)
		memset(kv->tag + kv->pos, tag, tokens);
	return report(kv, "append", r);
}

int kv_stage(struct kv *kv, uint32_t tokens)
{
	const struct kvg_group *g = &kv->layout->groups[0];
	float *scores = malloc((size_t)tokens * g->head_count * sizeof(*scores));
	int r = scores ? 0 : -ENOMEM;

	for (uint32_t layer = 0; r == 0 && layer < g->layers; layer++) {
		for (uint32_t t = 0; t < tokens; t++)
			for (uint32_t head = 0; head < g->head_count; head++)
				scores[(size_t)t * g->head_count + head] = kv_score(kv, layer, head, kv->pos + t);
		r = kvg_stage_scores(kv->client, kv->id, layer, kv->pos, tokens, scores);
	}
	free(scores);
	return report(kv, "stage", r);
}

int kv_commit(struct kv *kv, uint32_t tokens)
{
	const struct kvg_group *g = &kv->layout->groups[0];
	int r = kvg_commit(kv->client, kv->id, tokens);

	if (r < 0)
		return report(kv, "commit", r);
	for (uint32_t row = 0; row < g->layers * g->head_count; row++)
		memset(kv->held + (size_t)row * kv->capacity + kv->pos, 1, tokens);
	kv->pos += tokens;
	return 0;
}

int kv_feed(struct kv *kv, uint32_t tokens, uint8_t tag)
{
	int r = report(kv, "reserve", kvg_reserve(kv->client, kv->id, tokens));

	if (r == 0)
		r = kv_write(kv, tokens, tag);
	if (r == 0)
		r = kv_stage(kv, tokens);
	return r ? r : kv_commit(kv, tokens);
}

int kv_truncate(struct kv *kv, uint32_t pos)
{
	const struct kvg_group *g = &kv->layout->groups[0];
	int r = kvg_truncate(kv->client, kv->id, pos);

	if (r < 0)
		return r;
	for (uint32_t row = 0; row < g->layers * g->head_count; row++)
		memset(kv->held + (size_t)row * kv->capacity + pos, 0, kv->capacity - pos);
	kv->pos = pos;
	return 0;
}

int kv_protect(struct kv *kv, uint32_t begin, uint32_t end)
{
	int r = kvg_protect(kv->client, kv->id, begin, end);

	if (r == 0)
		memset(kv->kept + begin, 1, end - begin);
	return r;
}

int kv_evict_model(struct kv *kv, uint32_t mode)
{
	int r = mode == KVG_EVICT_PREFILL ? oracle_prefill(kv) : oracle_decode(kv);

	kv->fold = kv->pos;
	return r;
}

int kv_evict(struct kv *kv, uint32_t mode)
{
	struct kvg_evict_result result;
	uint64_t before = kv_pairs(kv);
	int r = report(kv, "evict", kvg_evict(kv->client, kv->id, mode, &result));

	if (r == 0)
		r = kv_evict_model(kv, mode);
	if (r == 0 && (result.pairs_held != kv_pairs(kv) || result.pairs_dropped != before - kv_pairs(kv))) {
		(void)fprintf(stderr,
			"sequence %" PRIx64 " seed %u: evict held %" PRIu64 " and dropped %" PRIu64
			" pairs, expected %" PRIu64 " and %" PRIu64 "\n",
			kv->id, kv->seed, result.pairs_held, result.pairs_dropped, kv_pairs(kv), before - kv_pairs(kv));
		r = -EBADMSG;
	}
	return r;
}

/* ---- reading it back ---- */

struct row_reader {
	const struct kv *kv;
	struct kvg_view view;
	uint32_t layer, head;
	float *k, *v;  /* one pair as found */
	uint8_t *seen; /* [capacity] */
};

static int complain(const struct row_reader *reader, uint32_t index, const char *what, uint32_t pos)
{
	(void)fprintf(stderr, "sequence %" PRIx64 " seed %u, layer %u, head %u, index %u: %s (position %u of %u)\n",
		reader->kv->id, reader->kv->seed, reader->layer, reader->head, index, what, pos, reader->kv->pos);
	return -EBADMSG;
}

static void load_pair(struct row_reader *reader, const uint32_t *ids, uint32_t index)
{
	const struct kvg_group *g = &reader->kv->layout->groups[0];
	size_t at = (size_t)ids[index / KVG_BLOCK_TOKENS] * reader->view.stride, place = index % KVG_BLOCK_TOKENS;
	size_t bytes = g->k_dim * kvg_dtype_size(g->k_dtype);

	kvg_dtype_load(g->k_dtype, reader->k, reader->view.k_base + at + place * bytes, g->k_dim);
	kvg_dtype_load(g->v_dtype, reader->v, reader->view.v_base + at + place * bytes, g->v_dim);
}

static int check_pair(struct row_reader *reader, uint32_t index)
{
	const struct kv *kv = reader->kv;
	uint32_t pos = (uint32_t)reader->k[3] + 256 * (uint32_t)reader->k[4];

	if (reader->k[1] != (float)reader->layer || reader->k[2] != (float)reader->head || pos >= kv->pos)
		return complain(reader, index, "a pair of another row", pos);
	if (reader->seen[pos])
		return complain(reader, index, "a pair for the second time", pos);
	reader->seen[pos] = 1;
	if (!row_of(kv, reader->layer, reader->head)[pos])
		return complain(reader, index, "a pair that should be gone", pos);
	for (uint32_t i = 0; i < kv->layout->groups[0].k_dim; i++)
		if (reader->k[i] != element(kv->tag[pos], reader->layer, reader->head, pos, i, 0) ||
			reader->v[i] != element(kv->tag[pos], reader->layer, reader->head, pos, i, 97))
			return complain(reader, index, "wrong bytes", pos);
	return 0;
}

static int check_row(struct row_reader *reader)
{
	const struct kv *kv = reader->kv;
	uint32_t slot = (uint32_t)kv->id;
	size_t row = ((size_t)reader->layer * reader->view.max_sequences + slot) * reader->view.heads + reader->head;
	uint32_t length = reader->view.base_len[row] + reader->view.appended[slot];
	const uint32_t *ids = reader->view.ids + row * reader->view.row_cap;
	int r = 0;

	if (length != kv_row_pairs(kv, reader->layer, reader->head))
		return complain(
			reader, length, "a row of another length", kv_row_pairs(kv, reader->layer, reader->head));
	memset(reader->seen, 0, kv->capacity);
	for (uint32_t index = 0; r == 0 && index < length; index++) {
		load_pair(reader, ids, index);
		r = check_pair(reader, index);
	}
	return r;
}

int kv_check(const struct kv *kv)
{
	const struct kvg_group *g = &kv->layout->groups[0];
	struct row_reader reader = {.kv = kv,
		.k = malloc(g->k_dim * sizeof(float)),
		.v = malloc(g->v_dim * sizeof(float)),
		.seen = malloc(kv->capacity)};
	int r = reader.k && reader.v && reader.seen ? kvg_view(kv->client, &reader.view) : -ENOMEM;

	for (uint32_t row = 0; r == 0 && row < g->layers * g->head_count; row++) {
		reader.layer = row / g->head_count;
		reader.head = row % g->head_count;
		r = check_row(&reader);
	}
	free(reader.k);
	free(reader.v);
	free(reader.seen);
	return r;
}

uint32_t kv_row_pairs(const struct kv *kv, uint32_t layer, uint32_t head)
{
	const uint8_t *row = row_of(kv, layer, head);
	uint32_t sum = 0;

	for (uint32_t pos = 0; pos < kv->pos; pos++)
		sum += row[pos];
	return sum;
}

uint64_t kv_pairs(const struct kv *kv)
{
	const struct kvg_group *g = &kv->layout->groups[0];
	uint64_t sum = 0;

	for (uint32_t row = 0; row < g->layers * g->head_count; row++)
		sum += kv_row_pairs(kv, row / g->head_count, row % g->head_count);
	return sum;
}

int kv_holds(const struct kv *kv, uint32_t layer, uint32_t head, uint32_t pos)
{
	return row_of(kv, layer, head)[pos];
}
