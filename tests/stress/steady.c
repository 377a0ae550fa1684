/* A worker that does the same work all the time, well within its tenant's min, and measures itself. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "tests/stress/body.h"

#define STAGING       (1u << 20)
#define CHUNK         128u
#define CHUNKS        4u
#define DECODE_TOKENS 64u
#define DECODE_AHEAD  16u
#define PREFILL_STEPS 4u

struct steady {
	struct stress_task *task;
	struct stress_seat *seat;
	struct kvg_client *client;
	struct kvg_layout layout;
	struct body_kv kv;
	struct body body;
	float *scores;
	uint64_t random, called_ns;
};

static uint64_t cpu_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Time that this process could have run and had no CPU. */
static uint64_t wait_ns(void)
{
	uint64_t ran = 0, waited = 0;
	FILE *file = fopen("/proc/self/schedstat", "re");

	if (file && fscanf(file, "%" SCNu64 " %" SCNu64, &ran, &waited) != 2)
		waited = 0;
	if (file)
		(void)fclose(file);
	return waited;
}

static void call(struct steady *s)
{
	s->called_ns = stress_now_ns();
}

static int answered(struct steady *s, enum stress_op op, int r)
{
	uint64_t ns = stress_now_ns() - s->called_ns;
	uint32_t at = s->seat->latency_count++ % STRESS_LATENCIES;

	s->task->shared->latencies[at] =
		(struct stress_latency){.op = op, .ns = ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns};
	if (r < 0)
		(void)fprintf(
			stderr, "steady worker: %s: %s: %s\n", stress_op_name(op), strerror(-r), kvg_error(s->client));
	return r;
}

static int stage(struct steady *s, uint32_t count)
{
	const struct kvg_group *group = &s->layout.groups[0];
	int r = 0;

	for (uint32_t layer = 0; r == 0 && layer < group->layers; layer++) {
		for (uint32_t i = 0; i < count * group->head_count; i++)
			s->scores[i] = (float)stress_between(&s->random, 0, 1u << 20) / (float)(1u << 20);
		call(s);
		r = answered(s, OP_STAGE,
			kvg_stage_scores(s->client, s->body.seq, layer, s->body.pos - count, count, s->scores));
	}
	return r;
}

/* The model's work is its device's: no CPU is used meanwhile. A chunk takes as long as PREFILL_STEPS tokens. */
static void compute(const struct steady *s, uint32_t count)
{
	uint64_t ns = s->task->options->step_us * 1000 * (count > 1 ? PREFILL_STEPS : 1);

	if (ns)
		stress_sleep_until(stress_now_ns() + ns);
}

static int feed(struct steady *s, uint32_t count, uint32_t reserve)
{
	int r;

	compute(s, count);
	call(s);
	r = answered(s, OP_RESERVE, kvg_reserve(s->client, s->body.seq, reserve));
	if (r == 0)
		r = body_write(&s->kv, &s->body, count, (uint32_t)stress_random(&s->random));
	if (r == 0)
		r = stage(s, count);
	call(s);
	if (r == 0)
		r = answered(s, OP_COMMIT, kvg_commit(s->client, s->body.seq, count));
	if (r == 0)
		s->seat->tokens += count;
	return r;
}

static int evict(struct steady *s)
{
	struct kvg_evict_result result;
	int r;

	call(s);
	r = answered(s, OP_EVICT, kvg_evict(s->client, s->body.seq, KVG_EVICT_PREFILL, &result));
	return r < 0 ? r : body_check(&s->kv, &s->body, BODY_LESS, &result.pairs_held);
}

/* One sequence from its creation to its end. */
static int step(struct steady *s)
{
	struct kvg_policy policy = {.ratio = 0.3,
		.mode = KVG_MODE_CHUNKED,
		.level = KVG_LEVEL_PAIR,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.context_tokens = CHUNK * CHUNKS,
		.chunk_tokens = CHUNK,
		.max_new_tokens = DECODE_TOKENS,
		.window = 32};
	int r;

	memset(&s->body, 0, sizeof(s->body));
	call(s);
	r = answered(s, OP_CREATE, kvg_create(s->client, &policy, &s->body.seq));
	for (unsigned i = 0; r == 0 && i < CHUNKS; i++) {
		r = feed(s, CHUNK, CHUNK);
		if (r == 0)
			r = evict(s);
	}
	for (unsigned i = 0; r == 0 && i < DECODE_TOKENS; i++)
		r = feed(s, 1, i % DECODE_AHEAD ? 1 : DECODE_AHEAD);
	if (r == 0)
		r = body_check(&s->kv, &s->body, BODY_SAME, NULL);
	call(s);
	if (r == 0)
		r = answered(s, OP_FREE, kvg_free(s->client, s->body.seq));
	s->seat->steps += r == 0;
	return r;
}

static int measure(struct steady *s)
{
	uint64_t wall = stress_now_ns(), cpu = cpu_ns(), waited = wait_ns();
	int r = 0;

	s->seat->steps = s->seat->tokens = s->seat->latency_count = 0;
	while (r == 0 && !__atomic_load_n(&s->task->shared->ending, __ATOMIC_ACQUIRE))
		r = step(s);
	s->seat->wall_ns = stress_now_ns() - wall;
	s->seat->cpu_ns = cpu_ns() - cpu;
	s->seat->wait_ns = wait_ns() - waited;
	return r;
}

int stress_steady(struct stress_task *task)
{
	struct steady *s = calloc(1, sizeof(*s));
	char text[STRESS_TEXT] = "";
	int r;

	if (!s)
		return 1;
	s->task = task;
	s->seat = task->seat;
	s->random = task->seat->seed;
	stress_layout(&s->layout, task->seat->tenant);
	s->scores = calloc((size_t)CHUNK * s->layout.groups[0].head_count, sizeof(*s->scores));
	r = s->scores ? kvg_connect(task->socket, "steady", &s->client, text, sizeof(text)) : -ENOMEM;
	(void)prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
	if (r == 0)
		kvg_set_spin(s->client, 0); /* CPU time is work, and on few CPUs nobody takes one for looking */
	if (r == 0)
		r = kvg_register(s->client, &s->layout, STAGING);
	if (r == 0)
		r = body_open(&s->kv, s->client, &s->layout);
	if (r == 0)
		r = step(s); /* warm */
	if (r == 0)
		r = measure(s);
	if (r < 0)
		(void)fprintf(stderr, "steady worker: %s: %s\n", strerror(-r), text);
	(void)kvg_close(s->client);
	free(s->scores);
	free(s);
	return r < 0 ? 1 : 0;
}
