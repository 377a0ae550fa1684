#include "tools/bench/churn.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/kvgate.h"
#include "tools/bench/content.h"
#ifdef KVG_HAS_CUDA
#include "tools/bench/synthetic.h"
#endif

#define SEQUENCES     12u
#define PREFIX_MAX    8u
#define DECODE_TOKENS 256u /* after a prompt, at most */
#define DECODE_EVENT  128u
#define CONTEXT_MIN   200u
#define STAGING       (1u << 20)

struct one {
	bool live;
	uint64_t seq, tag;
	struct kvg_policy policy;
	uint32_t pos;      /* committed tokens */
	uint32_t fold_pos; /* folded ones: of the last eviction */
	uint32_t boundary; /* where the next eviction is due: the end of a chunk, or of so many decoded tokens */
	uint32_t *bits;    /* positions that each row holds */
};

struct worker {
	struct churn_shared *shared;
	struct churn_counts *counts;
	struct kvg_client *client;
	struct kvg_layout layout;
	struct content *content;
	struct synthetic *synthetic;
	struct one one[SEQUENCES];
	uint32_t *bits; /* as found */
	float *scores;
	uint64_t random;
	uint32_t longest; /* context that a new sequence may have: less while the pool has no room */
	unsigned number;
};

static uint32_t between(struct worker *w, uint32_t low, uint32_t high)
{
	uint64_t z = w->random += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return low + (uint32_t)((z ^ (z >> 31)) % ((uint64_t)high - low + 1));
}

static int fail(struct worker *w, int r, const char *what)
{
	(void)fprintf(stderr, "kvgate-bench: churn worker %u: %s: %s: %s\n", w->number, what, strerror(-r),
		w->client ? kvg_error(w->client) : "");
	return r;
}

static int wrong(struct worker *w, const struct one *one, const char *what, uint64_t count)
{
	w->counts->wrong += count;
	(void)fprintf(stderr,
		"kvgate-bench: churn worker %u: sequence %" PRIx64 " of %u tokens, %u folded: %" PRIu64 " %s\n",
		w->number, one->seq, one->pos, one->fold_pos, count, what);
	return -EBADMSG;
}

/* ---- looking ---- */

static size_t bits_words(const struct worker *w)
{
	return (size_t)content_rows(w->content) * content_words(w->content);
}

/* Sets or clears positions [begin, end) of all rows. */
static void set_bits(const struct worker *w, struct one *one, uint32_t begin, uint32_t end, bool value)
{
	uint32_t words = content_words(w->content);

	for (uint32_t row = 0; row < content_rows(w->content); row++)
		for (uint32_t pos = begin; pos < end; pos++) {
			uint32_t *word = &one->bits[(size_t)row * words + pos / 32], bit = 1u << (pos % 32);

			*word = value ? *word | bit : *word & ~bit;
		}
}

/* Positions that are in one set and not in the other; after an eviction only ones that came count. */
static uint64_t count_difference(const struct worker *w, const struct one *one, bool evicted)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < bits_words(w); i++) {
		uint32_t differ = evicted ? w->bits[i] & ~one->bits[i] : w->bits[i] ^ one->bits[i];

		sum += (uint64_t)__builtin_popcount(differ);
	}
	return sum;
}

static uint64_t count_lost_prefix(const struct worker *w, const struct one *one)
{
	uint32_t words = content_words(w->content);
	uint64_t sum = 0;

	for (uint32_t row = 0; row < content_rows(w->content); row++)
		for (uint32_t pos = 0; pos < one->policy.prefix_tokens && pos < one->pos; pos++)
			sum += !(w->bits[(size_t)row * words] >> pos & 1);
	return sum;
}

/* Reads every byte of the sequence; after an eviction (held: pairs that the daemon says are left) some may be gone. */
static int check(struct worker *w, struct one *one, const uint64_t *held)
{
	struct content_counts found;
	uint64_t differ;
	int r = content_check(w->content, one->seq, one->tag, one->pos, w->bits, &found);

	if (r < 0)
		return r;
	w->counts->checks++;
	w->counts->bytes_checked += found.pairs * content_pair_bytes(w->content);
	if (found.wrong || found.repeated || found.strange)
		return wrong(
			w, one, "wrong words, repeated or unknown pairs", found.wrong + found.repeated + found.strange);
	if (held && found.pairs != *held)
		return wrong(w, one, "pairs, which is not what the eviction said", found.pairs);
	differ = count_difference(w, one, held != NULL);
	if (differ)
		return wrong(w, one, "pairs are there or gone that should not be", differ);
	differ = count_lost_prefix(w, one);
	if (differ)
		return wrong(w, one, "pairs of the prefix are gone", differ);
	memcpy(one->bits, w->bits, bits_words(w) * sizeof(*w->bits));
	return 0;
}

/* ---- doing ---- */

static uint32_t prompt_end(const struct one *one)
{
	return one->policy.prefix_tokens + one->policy.context_tokens;
}

/* A refusal for want of memory is part of the game. */
static int refused(struct worker *w, int r, const char *what)
{
	if (r != -ENOSPC)
		return fail(w, r, what);
	w->counts->refusals++;
	return -ENOSPC;
}

static int forget(struct worker *w, struct one *one)
{
	int r = check(w, one, NULL);

	if (r == 0) {
		r = kvg_free(w->client, one->seq);
		if (r < 0)
			return fail(w, r, "free");
	}
	one->live = false;
	return r;
}

static struct kvg_policy make_policy(struct worker *w)
{
	static const double ratios[] = {0.1, 0.3, 0.5, 1.0};
	static const uint32_t chunks[] = {0, 512, 1000, 2048};
	struct kvg_policy policy = {.ratio = ratios[between(w, 0, 3)],
		.mode = between(w, 0, 3) ? KVG_MODE_CHUNKED : KVG_MODE_ONCE,
		.level = (uint8_t)between(w, 0, 3),
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.prefix_tokens = between(w, 0, PREFIX_MAX),
		.context_tokens = between(w, CONTEXT_MIN, w->longest),
		.chunk_tokens = chunks[between(w, 0, 3)],
		.max_new_tokens = DECODE_TOKENS,
		.window = between(w, 16, 128)};

	if (between(w, 0, 2) == 0)
		policy.budget = 64 + policy.context_tokens / between(w, 3, 8);
	if (between(w, 0, 2) == 0)
		policy.mode = KVG_MODE_OFF;
	if (policy.mode != KVG_MODE_CHUNKED)
		policy.chunk_tokens = 0;
	return policy;
}

static uint32_t next_boundary(const struct one *one)
{
	uint32_t end = prompt_end(one), chunk = one->policy.chunk_tokens ? one->policy.chunk_tokens : end, next;

	if (one->pos >= end)
		return one->pos + DECODE_EVENT < end + DECODE_TOKENS ? one->pos + DECODE_EVENT : end + DECODE_TOKENS;
	next = (one->pos / chunk + 1) * chunk;
	return next < end ? next : end;
}

static int come(struct worker *w, struct one *one)
{
	uint32_t *bits = one->bits;
	uint64_t seq;
	struct kvg_policy policy = make_policy(w);
	int r = kvg_create(w->client, &policy, &seq);

	w->longest = r < 0 ? w->longest / 2 : w->longest * 2;
	if (w->longest < CONTEXT_MIN)
		w->longest = CONTEXT_MIN;
	if (w->longest > w->layout.max_tokens - PREFIX_MAX - DECODE_TOKENS)
		w->longest = w->layout.max_tokens - PREFIX_MAX - DECODE_TOKENS;
	if (r < 0)
		return refused(w, r, "create");
	*one = (struct one){.live = true,
		.seq = seq,
		.tag = (uint64_t)between(w, 0, UINT32_MAX) << 32 | between(w, 0, UINT32_MAX),
		.policy = policy,
		.bits = bits};
	one->boundary = next_boundary(one);
	memset(bits, 0, bits_words(w) * sizeof(*bits));
	w->counts->sequences++;
	return 0;
}

static int stage(struct worker *w, const struct one *one, uint32_t count)
{
	const struct kvg_group *group = &w->layout.groups[0];
	uint32_t favoured = between(w, 0, group->head_count * 2);
	int r = 0;

	for (uint32_t layer = 0; r == 0 && layer < group->layers; layer++) {
		for (uint32_t i = 0; i < count * group->head_count; i++)
			w->scores[i] = (float)between(w, 0, 1u << 20) / (float)(1u << 20) +
				       (i % group->head_count == favoured ? 0.5f : 0.0f);
		r = kvg_stage_scores(w->client, one->seq, layer, one->pos, count, w->scores);
	}
	return r;
}

static int feed(struct worker *w, struct one *one)
{
	uint32_t left = one->boundary - one->pos, count = between(w, 1, left < 1200 ? left : 1200);
	int r = kvg_reserve(w->client, one->seq, count);

	if (r < 0)
		return refused(w, r, "reserve");
	r = content_fill(w->content, one->seq, one->tag, one->pos, count);
	if (r == 0)
		r = stage(w, one, count);
	if (r == 0)
		r = kvg_commit(w->client, one->seq, count);
	if (r < 0)
		return fail(w, r, "write");
	set_bits(w, one, one->pos, one->pos + count, true);
	one->pos += count;
	w->counts->tokens += count;
	return 0;
}

static int evict(struct worker *w, struct one *one)
{
	bool decode = one->pos > prompt_end(one) && one->policy.budget;
	struct kvg_evict_result result;
	int r = kvg_evict(w->client, one->seq, decode ? KVG_EVICT_DECODE : KVG_EVICT_PREFILL, &result);

	if (r < 0)
		return refused(w, r, "evict");
	one->fold_pos = one->pos;
	one->boundary = next_boundary(one);
	w->counts->evictions++;
	w->counts->decode_evictions += decode;
	w->counts->pairs_dropped += result.pairs_dropped;
	return check(w, one, &result.pairs_held);
}

static int truncate(struct worker *w, struct one *one)
{
	uint32_t pos = between(w, one->fold_pos > one->pos / 2 ? one->fold_pos : one->pos / 2, one->pos);
	int r = kvg_truncate(w->client, one->seq, pos);

	if (r < 0)
		return fail(w, r, "truncate");
	set_bits(w, one, pos, one->pos, false);
	one->pos = pos;
	w->counts->truncates++;
	return 0;
}

/* Grows while the pool has room, and gives back when it has not. */
static int step(struct worker *w, struct one *one)
{
	bool low = __atomic_load_n(&w->shared->charged, __ATOMIC_RELAXED) <
		   __atomic_load_n(&w->shared->target, __ATOMIC_RELAXED);
	bool due = one->live && one->pos == one->boundary;
	bool done = one->live && one->pos == prompt_end(one) + DECODE_TOKENS;
	uint32_t dice = between(w, 0, 99);

	w->counts->operations++;
	if (!one->live)
		return low ? come(w, one) : 0;
	if ((!low && dice < 10) || (dice == 0 && between(w, 0, 3) == 0))
		return forget(w, one);
	if (due && (!done || one->fold_pos < one->pos))
		return evict(w, one);
	if (dice < 2 && !done)
		return truncate(w, one);
	if (dice < 4)
		return check(w, one, NULL);
	return low && !done ? feed(w, one) : 0;
}

/* Refused: somebody must give something back, and it may be this worker. */
static int relieve(struct worker *w)
{
	struct one *one = &w->one[between(w, 0, SEQUENCES - 1)];

	if (!one->live || between(w, 0, 3))
		return 0;
	return forget(w, one);
}

/* ---- the worker ---- */

/* The models of the tenants. */
static void make_layout(struct kvg_layout *layout, unsigned tenant, bool large)
{
	static const struct {
		uint32_t layers, heads, dim, dtype;
	} models[CHURN_TENANTS] = {{6, 4, 32, KVG_BF16}, {4, 2, 128, KVG_F16}, {3, 5, 64, KVG_F32}};
	static const struct {
		uint32_t layers, heads, dim, dtype;
	} large_models[CHURN_TENANTS] = {{36, 8, 128, KVG_BF16}, {28, 4, 128, KVG_F16}, {12, 2, 256, KVG_F32}};
	uint32_t dim = large ? large_models[tenant].dim : models[tenant].dim;
	uint32_t dtype = large ? large_models[tenant].dtype : models[tenant].dtype;

	*layout = (struct kvg_layout){.model = "churn",
		.hidden_dim = 64,
		.group_count = 1,
		.max_sequences = SEQUENCES,
		.max_tokens = large ? 16384 : 8192};
	layout->groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = large ? large_models[tenant].layers : models[tenant].layers,
		.head_count = large ? large_models[tenant].heads : models[tenant].heads,
		.head_total = large ? large_models[tenant].heads : models[tenant].heads,
		.world = 1,
		.k_dim = dim,
		.v_dim = dim,
		.k_dtype = dtype,
		.v_dtype = dtype,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 4};
}

static int connect_worker(struct worker *w, const struct service *service, const struct churn_options *options)
{
	char path[SERVICE_PATH], text[SERVICE_TEXT] = "", name[] = "a.sock";
	int r = 0;

	name[0] = (char)('a' + w->number % CHURN_TENANTS);
	make_layout(&w->layout, w->number % CHURN_TENANTS, options->cuda);
	r = kvg_connect(service_path(service, name, path), "churn", &w->client, text, sizeof(text));
	if (r < 0) {
		(void)fprintf(stderr, "kvgate-bench: churn worker %u: %s\n", w->number, text);
		return r;
	}
	kvg_set_spin(w->client, 0);
#ifdef KVG_HAS_CUDA
	if (options->cuda)
		r = synthetic_open(options->device, &w->synthetic);
	if (r == 0 && w->synthetic)
		r = kvg_set_stream(w->client, w->synthetic->stream);
#endif
	if (r == 0)
		r = kvg_register(w->client, &w->layout, STAGING);
	if (r < 0)
		return fail(w, r, "register");
	return content_new(w->client, &w->layout, w->synthetic, &w->content);
}

static int allocate(struct worker *w)
{
	w->longest = w->layout.max_tokens - PREFIX_MAX - DECODE_TOKENS;
	w->bits = malloc(bits_words(w) * sizeof(*w->bits));
	w->scores = malloc((size_t)1200 * w->layout.groups[0].head_count * sizeof(*w->scores));
	if (!w->bits || !w->scores)
		return fail(w, -ENOMEM, "memory");
	for (unsigned i = 0; i < SEQUENCES; i++) {
		w->one[i].bits = malloc(bits_words(w) * sizeof(*w->bits));
		if (!w->one[i].bits)
			return fail(w, -ENOMEM, "memory");
	}
	return 0;
}

static void release(struct worker *w)
{
	for (unsigned i = 0; i < SEQUENCES; i++)
		free(w->one[i].bits);
	free(w->bits);
	free(w->scores);
	(void)content_free(w->content);
	(void)kvg_close(w->client);
#ifdef KVG_HAS_CUDA
	(void)synthetic_close(w->synthetic);
#endif
	free(w);
}

static uint64_t free_memory(const struct worker *w)
{
	size_t available = 0;
#ifdef KVG_HAS_CUDA
	size_t total = 0;

	if (w->synthetic && w->synthetic->cuda->driver->cuMemGetInfo(&available, &total) != CUDA_SUCCESS)
		available = 0;
#else
	(void)w;
#endif
	return available;
}

static uint32_t phase(const struct worker *w)
{
	return __atomic_load_n(&w->shared->phase, __ATOMIC_ACQUIRE);
}

static int load(struct worker *w)
{
	int r = 0;

	while (r == 0 && phase(w) == CHURN_LOAD) {
		struct one *one = &w->one[between(w, 0, SEQUENCES - 1)];

		r = step(w, one);
		if (r == -ENOSPC)
			r = one->live ? relieve(w) : 0;
		if (r == 0 && kvg_process(w->client) < 0)
			r = fail(w, -EPIPE, "events");
	}
	return r;
}

static int drain(struct worker *w)
{
	int r = 0;

	for (unsigned i = 0; r == 0 && i < SEQUENCES; i++)
		if (w->one[i].live)
			r = forget(w, &w->one[i]);
	return r;
}

/* Says that a phase is done, and waits for the next one. */
static void finish(struct worker *w, enum churn_phase done)
{
	const struct timespec nap = {.tv_nsec = 1000000};

	__atomic_store_n(&w->shared->done[w->number], (uint32_t)done + 1, __ATOMIC_RELEASE);
	while (phase(w) <= (uint32_t)done)
		(void)nanosleep(&nap, NULL);
}

static int run(struct worker *w, const struct service *service, const struct churn_options *options)
{
	int r = connect_worker(w, service, options);

	if (r == 0)
		r = allocate(w);
	if (r < 0)
		return r;
	finish(w, CHURN_CONNECT);
	w->counts->free_before = free_memory(w);
	finish(w, CHURN_BEFORE);
	r = load(w);
	if (r == 0)
		r = drain(w);
	if (r < 0)
		return r;
	finish(w, CHURN_DRAIN);
	w->counts->free_after = free_memory(w);
	finish(w, CHURN_AFTER);
	return 0;
}

int churn_worker(const struct service *service, const struct churn_options *options, struct churn_shared *shared,
	unsigned number)
{
	struct worker *w = calloc(1, sizeof(*w));
	int r;

	if (!w)
		return 1;
	*w = (struct worker){.shared = shared,
		.counts = &shared->counts[number],
		.random = options->seed * 1000003 + number,
		.number = number};
	r = run(w, service, options);
	release(w);
	return r < 0 ? 1 : 0;
}
