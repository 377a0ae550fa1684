/* A worker that does at random whatever a worker may do, and looks at every byte that it wrote. */
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "tests/stress/body.h"
#include "tests/stress/refusal.h"

#define BODIES         6u
#define PREFIX_MAX     8u
#define CONTEXT_MIN    100u
#define CONTEXT_MAX    1500u
#define DECODE_TOKENS  300u
#define DECODE_EVENT   100u
#define FEED_MAX       500u
#define STAGING        (1u << 20)
#define DEATH_US       3000u
#define SHADOW_LOOKS   20u /* of a child that outlives its parent */
#define SHADOW_LOOK_NS 50000000u
#define DECLINED       1 /* the daemon does not do it, and need not */

struct worker {
	struct stress_task *task;
	struct stress_seat *seat;
	struct stress_counts *counts;
	struct kvg_client *client;
	struct kvg_layout layout;
	struct body_kv kv;
	struct body body[BODIES];
	float *scores;
	uint64_t random, due_ns, asked_ns;
	uint32_t longest;               /* context that a new sequence may have: less while there is no room */
	uint32_t death_op, death_after; /* enum stress_op + 1: dies in that many of them */
	uint32_t operations_left;
	timer_t death;
};

static uint32_t between(struct worker *w, uint32_t low, uint32_t high)
{
	return stress_between(&w->random, low, high);
}

static bool chance(struct worker *w, uint32_t percent)
{
	return between(w, 0, 99) < percent;
}

/* ---- asking, and what is answered ---- */

static int found(struct worker *w, int r, const char *what, const char *why)
{
	(void)fprintf(stderr, "worker %d, tenant %u, seed %" PRIu64 ": %s: %s: %s\n", (int)getpid(), w->seat->tenant,
		w->seat->seed, what, strerror(-r), why);
	return r == -ENOSPC ? -EBADMSG : r;
}

/* Sets the time of this worker's death when its hour has come: soon, in the middle of what it asks for now. */
static void perhaps_die(struct worker *w, enum stress_op op)
{
	struct itimerspec when = {.it_value.tv_nsec = 1};

	if (w->death_op != (uint32_t)op + 1 || --w->death_after)
		return;
	w->death_op = 0;
	when.it_value.tv_nsec = 1 + 1000 * (long)(between(w, 0, DEATH_US) * (uint64_t)between(w, 1, 100) / 100);
	__atomic_store_n(&w->seat->armed, (uint32_t)op + 1, __ATOMIC_RELEASE);
	(void)timer_settime(w->death, 0, &when, NULL);
}

static void ask(struct worker *w, enum stress_op op)
{
	w->asked_ns = stress_now_ns();
	__atomic_store_n(&w->seat->op, (uint32_t)op + 1, __ATOMIC_RELEASE);
	perhaps_die(w, op);
}

static int refused(struct worker *w, enum stress_op op)
{
	const char *text = kvg_error(w->client), *wrong = refusal_wrong(text, w->task->min);
	uint64_t ns = stress_now_ns() - w->asked_ns;

	w->counts->refused_ns += ns;
	if (ns > w->counts->refused_longest_ns)
		w->counts->refused_longest_ns = ns;
	w->counts->op[op].refused++;
	(void)snprintf(w->seat->text, sizeof(w->seat->text), "%s", text);
	if (!wrong)
		return -ENOSPC;
	(void)fprintf(stderr, "the refusal %s\n", wrong);
	return found(w, -ENOSPC, stress_op_name(op), text);
}

static bool may_be_declined(enum stress_op op, int r)
{
	if (op == OP_FIND || op == OP_ATTACH)
		return r == -ENOENT;
	return (op == OP_PUBLISH || op == OP_FORK) && (r == -EBUSY || r == -EOPNOTSUPP || r == -EINVAL);
}

/* 0, -ENOSPC for a refusal, DECLINED, or a negative errno for what must not be. */
static int answer(struct worker *w, enum stress_op op, int r)
{
	__atomic_store_n(&w->seat->op, 0, __ATOMIC_RELEASE);
	if (r >= 0) {
		w->counts->op[op].done++;
		return 0;
	}
	if (r == -ENOSPC)
		return refused(w, op);
	if (r == -EINVAL && op >= OP_OFFLOAD && strstr(kvg_error(w->client), "not known here"))
		w->task->shared->unknown[op] = 1;
	else if (!may_be_declined(op, r))
		return found(w, r, stress_op_name(op), w->client ? kvg_error(w->client) : "");
	w->counts->op[op].declined++;
	(void)snprintf(w->seat->text, sizeof(w->seat->text), "%s", kvg_error(w->client));
	return DECLINED;
}

static bool known(const struct worker *w, enum stress_op op)
{
	return !w->task->shared->unknown[op];
}

/* ---- looking ---- */

static int check(struct worker *w, struct body *body, enum body_change change, const uint64_t *pairs)
{
	uint64_t before = w->kv.bytes;
	int r = body_check(&w->kv, body, change, pairs);

	w->counts->checks++;
	w->counts->bytes_checked += w->kv.bytes - before;
	return r < 0 ? found(w, r, "check", "") : 0;
}

/* ---- coming ---- */

static struct kvg_policy make_policy(struct worker *w, uint32_t longest)
{
	static const double ratios[] = {0.1, 0.3, 0.5, 1.0};
	static const uint32_t chunks[] = {0, 256, 500, 1024};
	uint32_t dice = between(w, 0, 9);
	struct kvg_policy policy = {.ratio = ratios[between(w, 0, 3)],
		.mode = KVG_MODE_CHUNKED,
		.level = (uint8_t)between(w, 0, 3),
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.prefix_tokens = between(w, 0, PREFIX_MAX),
		.context_tokens = between(w, CONTEXT_MIN, longest),
		.chunk_tokens = chunks[between(w, 0, 3)],
		.max_new_tokens = DECODE_TOKENS,
		.window = between(w, 16, 128),
		.threshold = 0.5f};

	if (dice < 3)
		policy.mode = (uint8_t)(dice == 0 ? KVG_MODE_OFF : dice == 1 ? KVG_MODE_ONCE : KVG_MODE_THRESHOLD);
	if (policy.mode == KVG_MODE_OFF || policy.mode == KVG_MODE_ONCE)
		policy.chunk_tokens = 0;
	if (chance(w, 30))
		policy.budget = 64 + policy.context_tokens / between(w, 3, 8);
	if (chance(w, 15))
		policy.floor = between(w, 1, 20);
	if (chance(w, 50))
		policy.flags |= KVG_POLICY_RETAIN_HOST;
	return policy;
}

static uint32_t last_end(const struct body *body)
{
	return body->end + DECODE_TOKENS;
}

static uint32_t next_boundary(const struct body *body)
{
	uint32_t end = body->end, chunk = body->policy.chunk_tokens ? body->policy.chunk_tokens : end, next;

	if (body->pos >= end)
		return body->pos + DECODE_EVENT < last_end(body) ? body->pos + DECODE_EVENT : last_end(body);
	next = (body->pos / chunk + 1) * chunk;
	return next < end ? next : end;
}

/* The next new sequence is shorter after a refusal, and may be longer after none. */
static uint32_t adapt(uint32_t longest, int r)
{
	longest = r == -ENOSPC ? longest / 2 : longest * 2;
	return longest < CONTEXT_MIN ? CONTEXT_MIN : longest > CONTEXT_MAX ? CONTEXT_MAX : longest;
}

static void begin_body(struct body *body, uint64_t seq, const struct kvg_policy *policy)
{
	memset(body, 0, sizeof(*body));
	body->live = true;
	body->seq = seq;
	body->policy = *policy;
	body->fixed = policy->prefix_tokens;
	body->end = policy->prefix_tokens + policy->context_tokens;
	body->boundary = next_boundary(body);
}

static int protect(struct worker *w, struct body *body)
{
	uint32_t begin = between(w, 0, 50), end = begin + between(w, 1, 50);
	int r;

	ask(w, OP_PROTECT);
	r = answer(w, OP_PROTECT, kvg_protect(w->client, body->seq, begin, end));
	if (r == 0) {
		body->protect_begin = begin;
		body->protect_end = end;
	}
	return r;
}

/* Some say that they need much less than they will ask for, so that memory is short when they are half fed. */
static int create(struct worker *w, struct body *body)
{
	struct kvg_policy policy = make_policy(w, w->longest);
	uint32_t context = policy.context_tokens;
	uint64_t seq = 0;
	int r;

	if (chance(w, 40)) {
		policy.context_tokens /= 8;
		policy.max_new_tokens = 0;
	}
	ask(w, OP_CREATE);
	r = answer(w, OP_CREATE, kvg_create(w->client, &policy, &seq));
	w->longest = adapt(w->longest, r);
	if (r)
		return r;
	begin_body(body, seq, &policy);
	body->end = policy.prefix_tokens + context;
	body->boundary = next_boundary(body);
	return chance(w, 10) ? protect(w, body) : 0;
}

/* ---- contexts ---- */

static void make_key(uint64_t number, uint8_t ret[KVG_KEY_SIZE])
{
	uint64_t state = number, *words = (uint64_t *)(void *)ret;

	for (unsigned i = 0; i < KVG_KEY_SIZE / sizeof(*words); i++)
		words[i] = stress_random(&state);
}

/* A context that may be there, and its place; NULL when there has been none. */
static struct stress_context *some_context(struct worker *w, uint64_t *ret_version)
{
	struct stress_shared *shared = w->task->shared;
	uint64_t next = __atomic_load_n(&shared->next_context[w->seat->tenant], __ATOMIC_ACQUIRE);
	uint64_t known_ones = next < STRESS_CONTEXTS ? next : STRESS_CONTEXTS;
	struct stress_context *context;

	if (!known_ones)
		return NULL;
	context = &shared->contexts[w->seat->tenant]
				   [(next - 1 - between(w, 0, (uint32_t)known_ones - 1)) % STRESS_CONTEXTS];
	*ret_version = __atomic_load_n(&context->version, __ATOMIC_ACQUIRE);
	return *ret_version == 0 || *ret_version % 2 ? NULL : context;
}

/* What was read before is not read again after it. ThreadSanitizer knows no fences; it sees one process of all. */
#if defined(__SANITIZE_THREAD__)
#define KVG_READ_FENCE() __asm__ volatile("" ::: "memory")
#else
#define KVG_READ_FENCE() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#endif

static int forget(struct worker *w, struct body *body);

static int attached(
	struct worker *w, struct body *body, const struct stress_context *context, uint64_t version, uint32_t tokens)
{
	body->shared = body->pos = body->fold_pos = context->tokens;
	body->fixed += context->tokens;
	body->end += context->tokens;
	memcpy(body->tag, context->tag, sizeof(body->tag));
	memcpy(body->held, context->held, sizeof(body->held));
	body->boundary = next_boundary(body);
	KVG_READ_FENCE();
	if (__atomic_load_n(&context->version, __ATOMIC_ACQUIRE) != version) {
		/* Written anew meanwhile: what it held nobody knows. */
		memset(body->held, 0, sizeof(body->held));
		body->live = false;
		return answer(w, OP_FREE, kvg_free(w->client, body->seq));
	}
	if (tokens != context->tokens)
		return found(w, -EBADMSG, "attach", "another number of tokens than was published");
	return check(w, body, BODY_SAME, NULL);
}

static int attach(struct worker *w, struct body *body)
{
	struct kvg_policy policy = make_policy(w, 200);
	struct kvg_context_info info = {0};
	uint8_t key[KVG_KEY_SIZE];
	uint64_t seq, version = 0;
	const struct stress_context *context = some_context(w, &version);
	int r;

	if (!context || context->tokens + PREFIX_MAX + 200 + DECODE_TOKENS > STRESS_TOKENS)
		return DECLINED;
	make_key(context->number, key);
	ask(w, OP_ATTACH);
	r = answer(w, OP_ATTACH, kvg_attach(w->client, key, &policy, &seq, &info));
	if (r)
		return r;
	begin_body(body, seq, &policy);
	body_note(body, OP_ATTACH);
	return attached(w, body, context, version, info.tokens);
}

static int find(struct worker *w)
{
	struct kvg_context_info info;
	uint8_t key[KVG_KEY_SIZE];
	uint64_t next = __atomic_load_n(&w->task->shared->next_context[w->seat->tenant], __ATOMIC_ACQUIRE);

	make_key(between(w, 0, (uint32_t)next + 1), key);
	ask(w, OP_FIND);
	return answer(w, OP_FIND, kvg_find(w->client, key, &info));
}

static int publish(struct worker *w, struct body *body)
{
	struct stress_shared *shared = w->task->shared;
	uint64_t number = __atomic_fetch_add(&shared->next_context[w->seat->tenant], 1, __ATOMIC_ACQ_REL);
	struct stress_context *context = &shared->contexts[w->seat->tenant][number % STRESS_CONTEXTS];
	struct kvg_context_info info = {0};
	uint64_t version = 2 * number + 1;
	uint8_t key[KVG_KEY_SIZE];
	int r;

	__atomic_store_n(&context->version, version, __ATOMIC_SEQ_CST);
	context->number = number;
	context->tokens = body->pos;
	memcpy(context->tag, body->tag, sizeof(context->tag));
	memcpy(context->held, body->held, sizeof(context->held));
	make_key(number, key);
	body_note(body, OP_PUBLISH);
	ask(w, OP_PUBLISH);
	r = answer(w, OP_PUBLISH, kvg_publish(w->client, body->seq, key, &info));
	if (r)
		return r;
	/* Unless it took so long that a newer one has the entry. */
	(void)__atomic_compare_exchange_n(
		&context->version, &version, version + 1, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
	body->shared = body->fixed = body->fold_pos = body->pos;
	if (info.tokens != body->pos || info.existed)
		return found(w, -EBADMSG, "publish", "another number of tokens, or there already");
	return check(w, body, BODY_SAME, NULL);
}

static struct body *free_body(struct worker *w)
{
	for (unsigned i = 0; i < BODIES; i++)
		if (!w->body[i].live)
			return &w->body[i];
	return NULL;
}

static int fork_body(struct worker *w, struct body *body)
{
	struct body *child = free_body(w);
	uint64_t seq = 0;
	int r;

	if (!child)
		return DECLINED;
	body_note(body, OP_FORK);
	ask(w, OP_FORK);
	r = answer(w, OP_FORK, kvg_fork(w->client, body->seq, 1, &seq));
	if (r)
		return r;
	*child = *body;
	child->seq = seq;
	child->shared = child->fixed = child->fold_pos = child->pos;
	/* A sequence that has no full block of its own shares no more than before. */
	if (w->kv.view.slots[(uint32_t)body->seq].shared_pos == body->pos)
		body->shared = body->fixed = body->fold_pos = body->pos;
	r = check(w, body, BODY_SAME, NULL);
	return r ? r : check(w, child, BODY_SAME, NULL);
}

/* ---- going on ---- */

static int stage(struct worker *w, const struct body *body, uint32_t count)
{
	const struct kvg_group *group = &w->layout.groups[0];
	uint32_t favoured = between(w, 0, group->head_count * 2);
	int r = 0;

	for (uint32_t layer = 0; r == 0 && layer < group->layers; layer++) {
		for (uint32_t i = 0; i < count * group->head_count; i++)
			w->scores[i] = (float)between(w, 0, 1u << 20) / (float)(1u << 20) +
				       (i % group->head_count == favoured ? 0.5f : 0.0f);
		ask(w, OP_STAGE);
		r = answer(w, OP_STAGE,
			kvg_stage_scores(w->client, body->seq, layer, body->pos - count, count, w->scores));
	}
	return r;
}

static int write_tokens(struct worker *w, struct body *body, uint32_t count)
{
	int r = body_write(&w->kv, body, count, (uint32_t)stress_random(&w->random));

	if (r < 0)
		return found(w, r, "write", "");
	r = stage(w, body, count);
	if (r)
		return r;
	body_note(body, OP_COMMIT);
	ask(w, OP_COMMIT);
	r = answer(w, OP_COMMIT, kvg_commit(w->client, body->seq, count));
	w->counts->tokens += r == 0 ? count : 0;
	return r;
}

/* Some begin with less than a block of tokens: all that they are is a tail, whoever forks or publishes them. */
static uint32_t feed_count(struct worker *w, const struct body *body)
{
	uint32_t left = body->boundary - body->pos, most = left < FEED_MAX ? left : FEED_MAX;

	if (!body->pos && chance(w, 15) && most >= KVG_BLOCK_TOKENS)
		most = KVG_BLOCK_TOKENS - 1;
	return between(w, 1, most);
}

static int feed(struct worker *w, struct body *body)
{
	uint32_t count = feed_count(w, body);
	int r;

	body_note(body, OP_RESERVE);
	ask(w, OP_RESERVE);
	r = answer(w, OP_RESERVE, kvg_reserve(w->client, body->seq, count));
	if (r == -ENOSPC && w->kv.view.slots[(uint32_t)body->seq].reserved_pos >= body->pos + count)
		return found(w, -EBADMSG, "reserve", "refused, and there is the room");
	return r ? r : write_tokens(w, body, count);
}

/* Another sequence does something meanwhile, and this one has asked for its next room behind the eviction. */
static int evict_in_halves(struct worker *w, struct body *body, uint32_t mode, struct kvg_evict_result *ret)
{
	uint32_t ahead = chance(w, 50) && body->pos + 32 <= last_end(body) ? 32 : 0;
	int r = kvg_stage_wait(w->client), reserved = 0;

	if (r == 0)
		r = kvg_evict_async(w->client, body->seq, mode);
	if (r == 0 && ahead)
		reserved = kvg_reserve_async(w->client, body->seq, ahead);
	if (r < 0 || reserved < 0)
		return r < 0 ? r : reserved;
	(void)kvg_nop(w->client);
	r = kvg_evict_finish(w->client, body->seq, ret);
	reserved = ahead ? kvg_reserve_finish(w->client, body->seq) : 0;
	if (reserved < 0)
		reserved = answer(w, OP_RESERVE, reserved);
	return r < 0 || reserved == -ENOSPC ? r : reserved;
}

static int evict(struct worker *w, struct body *body)
{
	bool decode = body->pos > body->end && body->policy.budget;
	enum stress_op op = decode ? OP_DECODE_EVICT : OP_EVICT;
	uint32_t mode = decode ? KVG_EVICT_DECODE : KVG_EVICT_PREFILL;
	struct kvg_evict_result result = {0};
	int r;

	body_note(body, op);
	ask(w, op);
	r = answer(w, op,
		chance(w, 30) ? evict_in_halves(w, body, mode, &result)
			      : kvg_evict(w->client, body->seq, mode, &result));
	if (r)
		return r;
	body->evicted = true;
	body->fold_pos = body->pos;
	body->boundary = next_boundary(body);
	w->counts->pairs_dropped += result.pairs_dropped;
	return check(w, body, BODY_LESS, body->shared ? NULL : &result.pairs_held);
}

static int truncate_body(struct worker *w, struct body *body)
{
	uint32_t pos = between(w, body->fold_pos > body->pos / 2 ? body->fold_pos : body->pos / 2, body->pos);
	int r;

	ask(w, OP_TRUNCATE);
	body_note(body, OP_TRUNCATE);
	r = answer(w, OP_TRUNCATE, kvg_truncate(w->client, body->seq, pos));
	if (r == 0)
		body_cut(&w->kv, body, pos);
	return r;
}

static int recall(struct worker *w, struct body *body)
{
	struct kvg_recall_result result = {0};
	bool by_budget = chance(w, 30);
	int r = kvg_stage_wait(w->client);

	ask(w, OP_RECALL);
	if (r == 0 && by_budget)
		r = kvg_recall_budget(w->client, body->seq, body->pos / between(w, 1, 4), &result);
	else if (r == 0)
		r = kvg_recall(w->client, body->seq, 0.2 * between(w, 1, 5), &result);
	body_note(body, OP_RECALL);
	r = answer(w, OP_RECALL, r);
	if (r)
		return r;
	body->fold_pos = body->pos;
	w->counts->pairs_recalled += result.pairs_recalled;
	return check(w, body, BODY_MORE, body->shared ? NULL : &result.pairs_held);
}

static int send_away(struct worker *w, struct body *body)
{
	enum stress_op op = chance(w, 50) ? OP_OFFLOAD : OP_IDLE;
	int r;

	if (chance(w, 30)) {
		r = check(w, body, BODY_SAME, NULL);
		if (r)
			return r;
	}
	ask(w, op);
	r = answer(w, op, op == OP_OFFLOAD ? kvg_offload(w->client, body->seq, NULL) : kvg_idle(w->client, body->seq));
	body->away = body->away || r == 0;
	return r;
}

/* A reserve brings it back as well. */
static int bring_back(struct worker *w, struct body *body)
{
	bool reserve = chance(w, 40) && body->pos + 1 <= last_end(body);
	int r;

	body_note(body, OP_RESTORE);
	ask(w, OP_RESTORE);
	r = answer(w, OP_RESTORE, reserve ? kvg_reserve(w->client, body->seq, 1) : kvg_restore(w->client, body->seq));
	if (r)
		return r;
	body->away = false;
	return check(w, body, BODY_SAME, NULL);
}

/* An idle or offloaded sequence is freed unseen. */
static int forget(struct worker *w, struct body *body)
{
	int r = body->away ? 0 : check(w, body, BODY_SAME, NULL);

	if (r)
		return r;
	ask(w, OP_FREE);
	r = answer(w, OP_FREE, kvg_free(w->client, body->seq));
	body->live = false;
	return r;
}

static int come(struct worker *w, struct body *body)
{
	if (known(w, OP_ATTACH) && chance(w, 40)) {
		int r = attach(w, body);

		if (r != DECLINED)
			return r;
	}
	return create(w, body);
}

/* What a sequence may do at any time. */
static int step_aside(struct worker *w, struct body *body)
{
	switch (between(w, 0, 9)) {
	case 0:
		return forget(w, body);
	case 1:
	case 2:
		return truncate_body(w, body);
	case 3:
	case 4:
		return check(w, body, BODY_SAME, NULL);
	case 5:
		return body->evicted && body->policy.flags & KVG_POLICY_RETAIN_HOST ? recall(w, body) : DECLINED;
	case 6:
		return known(w, OP_PUBLISH) && body->pos ? publish(w, body) : DECLINED;
	case 7:
		return known(w, OP_FORK) && body->pos ? fork_body(w, body) : DECLINED;
	case 8:
		return known(w, OP_FIND) ? find(w) : DECLINED;
	default:
		return send_away(w, body);
	}
}

static int step(struct worker *w, struct body *body)
{
	bool due = body->live && body->pos == body->boundary;
	bool done = body->live && body->pos == last_end(body);

	if (!body->live)
		return come(w, body);
	if (body->away)
		return chance(w, 5) ? forget(w, body) : chance(w, 40) ? bring_back(w, body) : 0;
	if (body->pos && body->pos < KVG_BLOCK_TOKENS && chance(w, 30))
		return known(w, OP_FORK) && free_body(w) ? fork_body(w, body) : forget(w, body);
	if (chance(w, 15))
		return step_aside(w, body);
	if (due && (!done || body->fold_pos < body->pos))
		return evict(w, body);
	return done ? forget(w, body) : feed(w, body);
}

/* Refused: somebody must give something back, and it may be this worker. */
static int relieve(struct worker *w)
{
	struct body *body = &w->body[between(w, 0, BODIES - 1)];
	int r;

	if (!body->live || chance(w, 50))
		return 0;
	r = body->away || chance(w, 50) ? forget(w, body) : send_away(w, body);
	return r == -ENOSPC ? 0 : r;
}

/* ---- the worker ---- */

/* A child that has all descriptors of its parent's, and outlives it. */
static void leave_child(struct worker *w)
{
	pid_t pid = fork();

	for (unsigned i = 0; pid == 0 && i < SHADOW_LOOKS; i++) {
		if (__atomic_load_n(&w->task->shared->ending, __ATOMIC_ACQUIRE))
			break;
		stress_sleep_until(stress_now_ns() + SHADOW_LOOK_NS);
	}
	if (pid == 0)
		_exit(0);
}

static int connect_worker(struct worker *w)
{
	char text[STRESS_TEXT] = "";
	int r;

	ask(w, OP_CONNECT);
	r = kvg_connect(w->task->socket, "stress", &w->client, text, sizeof(text));
	if (r < 0)
		return found(w, r, "connect", text);
	r = answer(w, OP_CONNECT, r);
	kvg_set_spin(w->client, chance(w, 50) ? 0 : 20);
	stress_layout(&w->layout, w->seat->tenant);
	ask(w, OP_REGISTER);
	if (r == 0)
		r = answer(w, OP_REGISTER, kvg_register(w->client, &w->layout, STAGING));
	if (r == 0 && w->task->mortal && chance(w, 10))
		leave_child(w);
	return r ? r : body_open(&w->kv, w->client, &w->layout);
}

/* Thinks until its next operation is due; what comes too late is not made up for. */
static int think(struct worker *w)
{
	uint64_t now = stress_now_ns();

	w->due_ns += 1000 * (uint64_t)between(w, 0, (uint32_t)(2 * w->task->options->pace_us));
	if (w->due_ns < now)
		w->due_ns = now;
	stress_sleep_until(w->due_ns);
	return kvg_process(w->client) < 0 ? found(w, -EPIPE, "events", kvg_error(w->client)) : 0;
}

static bool goes_on(struct worker *w)
{
	return !__atomic_load_n(&w->task->shared->ending, __ATOMIC_ACQUIRE) && w->operations_left-- > 0;
}

static int work(struct worker *w)
{
	int r = 0;

	w->due_ns = stress_now_ns();
	while (r == 0 && goes_on(w)) {
		r = step(w, &w->body[between(w, 0, BODIES - 1)]);
		if (r == -ENOSPC)
			r = relieve(w);
		if (r == DECLINED)
			r = 0;
		if (r == 0)
			r = think(w);
	}
	return r;
}

/* Some free what they have, others leave that to the end of the connection. */
static int leave(struct worker *w)
{
	bool tidy = chance(w, 50);
	int r = 0;

	for (unsigned i = 0; r == 0 && i < BODIES; i++)
		if (w->body[i].live && !w->body[i].away)
			r = tidy ? forget(w, &w->body[i]) : check(w, &w->body[i], BODY_SAME, NULL);
	ask(w, OP_CLOSE);
	w->client = kvg_close(w->client);
	return r < 0 ? r : answer(w, OP_CLOSE, 0);
}

/* A third of the mortal ones die in the middle of something, the others when somebody else wants it. */
static int choose_death(struct worker *w)
{
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
	enum stress_op op;

	w->operations_left = between(w, 0, 3) ? UINT32_MAX : between(w, 20, 2000);
	if (!w->task->mortal || chance(w, 65))
		return 0;
	do
		op = between(w, 0, OP_COUNT - 1);
	while (w->task->shared->unknown[op]);
	w->death_op = (uint32_t)op + 1;
	w->death_after = op <= OP_REGISTER || op == OP_CLOSE ? 1 : between(w, 1, 40);
	return timer_create(CLOCK_MONOTONIC, &event, &w->death) < 0 ? found(w, -errno, "timer", "") : 0;
}

int stress_worker(struct stress_task *task)
{
	struct worker *w = calloc(1, sizeof(*w));
	int r;

	if (!w)
		return 1;
	w->task = task;
	w->seat = task->seat;
	w->counts = &task->seat->counts;
	w->random = task->seat->seed;
	w->longest = CONTEXT_MAX;
	stress_layout(&w->layout, w->seat->tenant);
	w->scores = calloc((size_t)FEED_MAX * w->layout.groups[0].head_count, sizeof(*w->scores));
	r = w->scores ? choose_death(w) : -ENOMEM;
	if (r == 0)
		r = connect_worker(w);
	if (r == 0)
		r = work(w);
	if (r == 0)
		r = leave(w);
	free(w->scores);
	free(w);
	return r < 0 ? 1 : 0;
}
