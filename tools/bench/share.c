/*
 * kvgate-bench share: one process reads a context, evicts it to 30% and publishes it; others attach to it, one after
 * the other, and stay. What the daemon charges for all of them, next to one, and how long an attach takes. Host kind,
 * the geometry of the pilot model (6 layers, 4 heads, head_dim 32, bf16).
 */
#include "tools/bench/share.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/kvgate.h"
#include "tools/bench/bench.h"
#include "tools/bench/service.h"

#define LAYERS        6u
#define HEADS         4u
#define DIM           32u
#define TAIL          (LAYERS * HEADS * KVG_BLOCK_TOKENS * DIM * 2u * 2u) /* bytes of an attacher's own blocks */
#define STAGING       (8u << 20)
#define PROCESSES_MAX 64u
#define ATTACHES      201u /* of each process */

struct attacher {
	pid_t pid;
	int hold; /* it ends when this is closed */
};

/* Microseconds: the first attach, which maps the context, and the median of the others. */
struct times {
	double first, median;
};

struct share {
	const char *program;
	bool json;
	uint32_t tokens, processes;
	struct service service;
	uint8_t key[KVG_KEY_SIZE];
	struct attacher attachers[PROCESSES_MAX];
	struct times times[PROCESSES_MAX];
	uint64_t pairs, context, one, all; /* bytes charged: for the context alone, with one attached, with all */
};

static int report(const struct kvg_client *client, int r, const char *what)
{
	if (r < 0)
		(void)fprintf(stderr, "kvgate-bench: share: %s: %s\n", what, client ? kvg_error(client) : strerror(-r));
	return r;
}

static int open_client(const struct share *share, const char *name, struct kvg_client **ret)
{
	struct kvg_layout layout = {.model = "pilot",
		.hidden_dim = 256,
		.group_count = 1,
		.max_sequences = 2,
		.max_tokens = share->tokens + 4096};
	char path[SERVICE_PATH], text[SERVICE_TEXT];
	int r = kvg_connect(service_path(&share->service, "a.sock", path), name, ret, text, sizeof(text));

	layout.groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = LAYERS,
		.head_count = HEADS,
		.head_total = HEADS,
		.world = 1,
		.k_dim = DIM,
		.v_dim = DIM,
		.k_dtype = KVG_BF16,
		.v_dtype = KVG_BF16,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 2};
	if (r < 0) {
		(void)fprintf(stderr, "kvgate-bench: share: %s\n", text);
		return r;
	}
	return report(*ret, kvg_register(*ret, &layout, STAGING), "register");
}

/* ---- the publisher ---- */

static int stage(const struct share *share, struct kvg_client *client, uint64_t seq)
{
	float *scores = malloc((size_t)share->tokens * HEADS * sizeof(float));
	uint32_t random = 1;
	int r = scores ? 0 : -ENOMEM;

	for (uint32_t layer = 0; r == 0 && layer < LAYERS; layer++) {
		for (size_t i = 0; i < (size_t)share->tokens * HEADS; i++) {
			random = random * 1664525u + 1013904223u;
			scores[i] = (float)(random >> 8) / (float)(1 << 24);
		}
		r = kvg_stage_scores(client, seq, layer, 0, share->tokens, scores);
	}
	if (r == 0)
		r = kvg_stage_wait(client);
	free(scores);
	return r;
}

static int publish(struct share *share, struct kvg_client *client)
{
	const struct kvg_policy policy = {.ratio = 0.3,
		.mode = KVG_MODE_CHUNKED,
		.level = KVG_LEVEL_PAIR,
		.context_tokens = share->tokens,
		.window = 4096};
	uint32_t *tokens = calloc(share->tokens, sizeof(uint32_t));
	struct kvg_context_info info;
	uint64_t seq;
	int r = tokens ? kvg_create(client, &policy, &seq) : -ENOMEM;

	if (r == 0)
		r = kvg_context_keys(client, &policy, tokens, share->tokens, share->tokens, share->key);
	if (r == 0)
		r = kvg_reserve(client, seq, share->tokens);
	if (r == 0)
		r = kvg_commit(client, seq, share->tokens);
	if (r == 0)
		r = stage(share, client, seq);
	if (r == 0)
		r = kvg_evict(client, seq, KVG_EVICT_PREFILL, NULL);
	if (r == 0)
		r = kvg_publish(client, seq, share->key, &info);
	free(tokens);
	return report(client, r, "a context");
}

static int charged(const struct share *share, uint64_t *ret)
{
	struct service_status status;
	int r = service_status(&share->service, &status);

	*ret = status.charged;
	return r;
}

/* The context outlives who has read it. */
static int make_context(struct share *share)
{
	struct kvg_client *client = NULL;
	struct service_status status = {0};
	int r = open_client(share, "publisher", &client);

	if (r == 0)
		r = publish(share, client);
	(void)kvg_close(client);
	do
		r = r < 0 ? r : service_status(&share->service, &status);
	while (r == 0 && status.workers > 0);
	share->context = status.charged;
	return r;
}

/* ---- those that attach ---- */

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static int attach_often(const struct share *share, struct kvg_client *client, struct times *ret)
{
	const struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .max_new_tokens = 64};
	struct kvg_context_info info;
	double us[ATTACHES];
	uint64_t seq = 0;

	for (unsigned i = 0; i < ATTACHES; i++) {
		int r = i ? kvg_free(client, seq) : 0;
		double start = service_seconds();

		if (r == 0)
			r = kvg_attach(client, share->key, &policy, &seq, &info);
		if (r < 0)
			return report(client, r, "attach");
		us[i] = (service_seconds() - start) * 1e6;
	}
	qsort(us + 1, ATTACHES - 1, sizeof(double), by_value);
	*ret = (struct times){.first = us[0], .median = us[ATTACHES / 2]};
	return 0;
}

/* In the child: attaches, says how long it took, and stays until the parent lets go. */
static int run_attacher(const struct share *share, int out, int hold)
{
	struct kvg_client *client = NULL;
	struct times times;
	char byte;
	int r = open_client(share, "attacher", &client);

	if (r == 0)
		r = attach_often(share, client, &times);
	if (r == 0 && write(out, &times, sizeof(times)) != sizeof(times))
		r = -EIO;
	while (r == 0 && read(hold, &byte, 1) < 0 && errno == EINTR)
		;
	(void)kvg_close(client);
	return r < 0 ? BENCH_FAIL : BENCH_OK;
}

static int start_attacher(struct share *share, uint32_t i)
{
	int out[2], hold[2];
	ssize_t n;

	if (pipe(out) < 0 || pipe(hold) < 0)
		return report(NULL, -errno, "a pipe");
	share->attachers[i].pid = fork();
	if (share->attachers[i].pid == 0) {
		for (uint32_t k = 0; k < i; k++) /* the others' */
			(void)close(share->attachers[k].hold);
		(void)close(out[0]);
		(void)close(hold[1]);
		_exit(run_attacher(share, out[1], hold[0]));
	}
	(void)close(out[1]);
	(void)close(hold[0]);
	share->attachers[i].hold = hold[1];
	n = read(out[0], &share->times[i], sizeof(share->times[i]));
	(void)close(out[0]);
	return n == sizeof(share->times[i]) ? 0 : -EPIPE;
}

static int end_attachers(const struct share *share)
{
	int r = 0, status;

	for (uint32_t i = 0; i < share->processes && share->attachers[i].pid > 0; i++) {
		(void)close(share->attachers[i].hold);
		if (waitpid(share->attachers[i].pid, &status, 0) < 0 || status != 0)
			r = -ECHILD;
	}
	return r;
}

static int attach_all(struct share *share)
{
	int r = 0;

	for (uint32_t i = 0; r == 0 && i < share->processes; i++) {
		r = start_attacher(share, i);
		if (r == 0 && i == 0)
			r = charged(share, &share->one);
	}
	return r == 0 ? charged(share, &share->all) : r;
}

/* ---- the report ---- */

static int by_median(const void *a, const void *b)
{
	return by_value(&((const struct times *)a)->median, &((const struct times *)b)->median);
}

static void print(struct share *share)
{
	uint64_t tails = (uint64_t)(share->processes - 1) * TAIL;
	double most = 0;

	for (uint32_t i = 0; i < share->processes; i++)
		most = share->times[i].first > most ? share->times[i].first : most;
	qsort(share->times, share->processes, sizeof(struct times), by_median);
	(void)printf(share->json ? "{\"tokens\": %u, \"processes\": %u, \"context_bytes\": %" PRIu64
				   ", \"one_bytes\": %" PRIu64 ", \"all_bytes\": %" PRIu64 ", \"tail_bytes\": %u"
				   ", \"ratio\": %.4f, \"ratio_less_tails\": %.4f, \"attach_us\": %.1f"
				   ", \"first_attach_us\": %.1f}\n"
				 : "context of %u tokens at 30%%, %u processes\n"
				   "charged: context %" PRIu64 ", with one attached %" PRIu64 ", with all %" PRIu64
				   " bytes; tails of one %u bytes\n"
				   "all to one: %.4f, less the others' tails: %.4f\n"
				   "kvg_attach: %.1f us (median of the processes' medians), a process's first at most "
				   "%.1f us\n",
		share->tokens, share->processes, share->context, share->one, share->all, TAIL,
		(double)share->all / (double)share->one, (double)(share->all - tails) / (double)share->one,
		share->times[share->processes / 2].median, most);
}

static int run(struct share *share)
{
	struct service_audit audit = {0};
	int r = service_start(&share->service, share->program,
		"[pool]\ndevice.size = 1G\nextent_size = 256K\n[tenant a]\nsocket = a.sock\n");
	int ended;

	if (r < 0)
		return BENCH_FAIL;
	r = make_context(share);
	if (r == 0)
		r = attach_all(share);
	if (r == 0)
		r = service_audit(&share->service, &audit);
	if (r == 0 && !audit.clean)
		(void)fprintf(stderr, "kvgate-bench: share: audit: %s\n", audit.difference);
	ended = end_attachers(share);
	if (r == 0)
		print(share);
	if (service_stop(&share->service) < 0 || ended < 0 || r < 0)
		return BENCH_FAIL;
	return audit.clean ? BENCH_OK : BENCH_FAIL;
}

static bool parse(const char *text, uint32_t most, uint32_t *ret)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	*ret = (uint32_t)value;
	return *text && !*end && value >= 1 && value <= most;
}

int bench_share(int argc, char **argv)
{
	static const struct option options[] = {{"tokens", required_argument, NULL, 't'},
		{"processes", required_argument, NULL, 'p'}, {"kvgated", required_argument, NULL, 'k'},
		{"json", no_argument, NULL, 'j'}, {0}};
	struct share share = {.tokens = 32768, .processes = 8};
	bool good = true;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 't')
			good &= parse(optarg, 1u << 20, &share.tokens);
		else if (option == 'p')
			good &= parse(optarg, PROCESSES_MAX, &share.processes);
		else if (option == 'k')
			share.program = optarg;
		else if (option == 'j')
			share.json = true;
		else
			good = false;
	}
	if (!good || optind != argc) {
		(void)fprintf(stderr,
			"usage: kvgate-bench share [--tokens N] [--processes 1..%u] [--json] [--kvgated "
			"PROGRAM]\n",
			PROCESSES_MAX);
		return BENCH_USAGE;
	}
	return run(&share);
}
