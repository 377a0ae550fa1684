/*
 * kvgate-bench tiers: what each move between the tiers and each sharing of a context costs a worker, on a kvgated of
 * its own of either kind: offload and restore of a long and of a short sequence, an eviction that keeps what it drops
 * on the host beside one that does not, the recall of all of it, and publishing, attaching to and forking a context.
 * Rates stand beside what this machine copies in one piece and in halves of blocks, measured in the same run. The first
 * round, in which the daemon gets and pins memory for its host tier, is apart.
 */
#include "tools/bench/tiers.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client/kvgate.h"
#include "proto/size.h"
#include "tools/bench/bench.h"
#include "tools/bench/service.h"

#define HEADS       8u
#define DIM         128u
#define DIM_MAX     1024u
#define STAGING     (16u << 20)
#define ROUNDS_MAX  100u
#define COPY_BYTES  ((size_t)256 << 20)
#define SEQUENCES   8u
#define MIN_SECONDS 60.0

enum move {
	OFFLOAD,
	OFFLOAD_BACK,
	OFFLOAD_COPY,
	RESTORE,
	RESTORE_BACK,
	RESTORE_COPY,
	OFFLOAD_SHORT,
	OFFLOAD_SHORT_BACK,
	OFFLOAD_SHORT_COPY,
	RESTORE_SHORT,
	RESTORE_SHORT_BACK,
	RESTORE_SHORT_COPY,
	EVICT,
	EVICT_RETAIN,
	RECALL,
	PUBLISH,
	ATTACH_OTHER,
	ATTACH,
	FORK,
	MOVES
};

static const struct {
	const char *key, *name;
	bool in; /* to the worker's memory */
} about[MOVES] = {
	[OFFLOAD] = {"offload", "offload", false},
	[OFFLOAD_BACK] = {"offload_back", "  and its memory is back", false},
	[OFFLOAD_COPY] = {"offload_copy", "  its copies alone", false},
	[RESTORE] = {"restore", "restore", true},
	[RESTORE_BACK] = {"restore_back", "  and the worker has mapped it", true},
	[RESTORE_COPY] = {"restore_copy", "  its copies alone", true},
	[OFFLOAD_SHORT] = {"offload_short", "offload of 128 tokens", false},
	[OFFLOAD_SHORT_BACK] = {"offload_short_back", "  and its memory is back", false},
	[OFFLOAD_SHORT_COPY] = {"offload_short_copy", "  its copies alone", false},
	[RESTORE_SHORT] = {"restore_short", "restore of 128 tokens", true},
	[RESTORE_SHORT_BACK] = {"restore_short_back", "  and the worker has mapped it", true},
	[RESTORE_SHORT_COPY] = {"restore_short_copy", "  its copies alone", true},
	[EVICT] = {"evict", "eviction to 30%", false},
	[EVICT_RETAIN] = {"evict_retain", "the same, the host keeps the rest", false},
	[RECALL] = {"recall", "recall of the rest", true},
	[PUBLISH] = {"publish", "publish", false},
	[ATTACH_OTHER] = {"attach_other", "attach, another worker's first", true},
	[ATTACH] = {"attach", "attach", true},
	[FORK] = {"fork", "fork", true},
};

struct samples {
	double seconds[ROUNDS_MAX + 1]; /* [0]: the first round's */
	uint32_t count;
	double bytes;  /* that one moves */
	uint64_t said; /* by the daemon: bytes of the image, moved, or of the context; 0: of none */
};

struct tiers {
	bool cuda;
	int device;
	const char *kvgated, *json;
	uint32_t tokens, layers, rounds, dim;
	uint64_t extent; /* bytes; 0: the daemon's choice */
	bool min;        /* of the tenant's budget: all that it uses */
	struct service service;
	struct service_status status;
	struct tiers_gpu *gpu;
	struct kvg_client *client, *other;
	struct kvg_layout layout;
	struct tiers_rates rates;
	uint8_t *copied; /* on the host: 2 * COPY_BYTES, and how fast, round by round */
	double large[ROUNDS_MAX + 1], halves[ROUNDS_MAX + 1];
	uint32_t copies;
	float *scores;
	bool no_contexts;
	struct samples samples[MOVES];
};

/* Of one pair: K and V in bf16. */
static uint64_t pair_bytes(const struct tiers *tiers)
{
	return 2 * tiers->dim * 2;
}

static size_t half_block(const struct tiers *tiers)
{
	return KVG_BLOCK_TOKENS * tiers->dim * 2;
}

static uint64_t bytes_of(const struct tiers *tiers, uint32_t tokens)
{
	return (uint64_t)tokens * tiers->layers * HEADS * pair_bytes(tiers);
}

static int report(struct kvg_client *client, int r, const char *what)
{
	if (r < 0)
		(void)fprintf(stderr, "kvgate-bench: tiers: %s: %s\n", what, kvg_error(client));
	return r;
}

static void note_seconds(struct tiers *tiers, enum move move, double seconds, double bytes)
{
	struct samples *samples = &tiers->samples[move];

	samples->seconds[samples->count++] = seconds;
	samples->bytes = bytes;
}

static void note(struct tiers *tiers, enum move move, double start, double bytes)
{
	note_seconds(tiers, move, service_seconds() - start, bytes);
}

/* ---- what the machine copies ---- */

#ifndef KVG_HAS_CUDA
int tiers_gpu_open(int ordinal, struct tiers_gpu **ret)
{
	(void)ordinal, (void)ret;
	(void)fprintf(stderr, "kvgate-bench: tiers: built without the kind cuda\n");
	return -EOPNOTSUPP;
}

struct tiers_gpu *tiers_gpu_close(struct tiers_gpu *gpu)
{
	(void)gpu;
	return NULL;
}

int tiers_gpu_join(const struct tiers_gpu *gpu, struct kvg_client *client)
{
	(void)gpu, (void)client;
	return -EOPNOTSUPP;
}

int tiers_gpu_rates(const struct tiers_gpu *gpu, size_t half, struct tiers_rates *ret)
{
	(void)gpu, (void)half, (void)ret;
	return -EOPNOTSUPP;
}
#endif

static double copy_rate(uint8_t *to, const uint8_t *from, size_t piece)
{
	double start = service_seconds();

	/* Every other piece first, as blocks of a sequence seldom follow each other. */
	for (size_t half = 0; half < 2; half++)
		for (size_t at = half * piece; at < COPY_BYTES; at += 2 * piece)
			memcpy(to + at, from + at, piece);
	return (double)COPY_BYTES / (service_seconds() - start);
}

/* In each round, since a machine's rate drifts. */
static void note_host_rates(struct tiers *tiers)
{
	uint8_t *at = tiers->copied;
	uint32_t n = tiers->copies++;

	tiers->large[n] = copy_rate(at, at + COPY_BYTES, COPY_BYTES / 2);
	tiers->halves[n] = copy_rate(at, at + COPY_BYTES, half_block(tiers));
}

static int host_rates_open(struct tiers *tiers)
{
	uint8_t *at = mmap(NULL, 2 * COPY_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		return -errno;
	memset(at, 1, 2 * COPY_BYTES);
	tiers->copied = at;
	return 0;
}

/* ---- a daemon and two workers ---- */

static int start_service(struct tiers *tiers)
{
	char config[512], device[64] = "", extent[64] = "";
	uint64_t size = bytes_of(tiers, tiers->tokens), spare = (uint64_t)256 << 20;
	int r;

	if (tiers->cuda)
		(void)snprintf(device, sizeof(device), "device.index = %d\n", tiers->device);
	if (tiers->extent)
		(void)snprintf(extent, sizeof(extent), "extent_size = %" PRIu64 "\n", tiers->extent);
	(void)snprintf(config, sizeof(config),
		"[pool]\nkind = %s\n%s%sdevice.size = %" PRIu64 "\nhost.size = %" PRIu64
		"\n[tenant a]\nsocket = a.sock\ndevice.min = %" PRIu64 "\n",
		tiers->cuda ? "cuda" : "host", device, extent, 3 * size + spare, 2 * size + spare,
		tiers->min ? 3 * size : 0);
	r = service_start(&tiers->service, tiers->kvgated, config);
	return r < 0 ? r : service_status(&tiers->service, &tiers->status);
}

static int open_client(struct tiers *tiers, struct kvg_client **ret)
{
	char path[SERVICE_PATH], text[SERVICE_TEXT] = "";
	int r = kvg_connect(service_path(&tiers->service, "a.sock", path), "kvgate-bench", ret, text, sizeof(text));

	if (r < 0) {
		(void)fprintf(stderr, "kvgate-bench: tiers: %s\n", text);
		return r;
	}
	if (tiers->gpu)
		r = tiers_gpu_join(tiers->gpu, *ret);
	if (r == 0)
		r = kvg_register(*ret, &tiers->layout, STAGING);
	return report(*ret, r, "register");
}

static int open_all(struct tiers *tiers)
{
	int r = 0;

	tiers->layout = (struct kvg_layout){.model = "kvgate-bench",
		.hidden_dim = 64,
		.group_count = 1,
		.max_sequences = SEQUENCES,
		.max_tokens = tiers->tokens + KVG_STRIPE_TOKENS};
	tiers->layout.groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = tiers->layers,
		.head_count = HEADS,
		.head_total = HEADS,
		.world = 1,
		.k_dim = tiers->dim,
		.v_dim = tiers->dim,
		.k_dtype = KVG_BF16,
		.v_dtype = KVG_BF16,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 4};
	tiers->scores = malloc((size_t)tiers->tokens * HEADS * sizeof(float));
	if (!tiers->scores)
		return -ENOMEM;
	for (size_t i = 0; i < (size_t)tiers->tokens * HEADS; i++)
		tiers->scores[i] = (float)((uint32_t)i * 2654435761u >> 8) / (float)(1 << 24);
	if (tiers->cuda)
		r = tiers_gpu_open(tiers->device, &tiers->gpu);
	if (r == 0)
		r = tiers->cuda ? tiers_gpu_rates(tiers->gpu, half_block(tiers), &tiers->rates)
				: host_rates_open(tiers);
	if (r == 0)
		r = start_service(tiers);
	return r == 0 ? open_client(tiers, &tiers->client) : r;
}

static int close_all(struct tiers *tiers)
{
	tiers->client = kvg_close(tiers->client);
	tiers->other = kvg_close(tiers->other);
	tiers->gpu = tiers_gpu_close(tiers->gpu);
	free(tiers->scores);
	if (tiers->copied)
		(void)munmap(tiers->copied, 2 * COPY_BYTES);
	return service_stop(&tiers->service);
}

/* ---- moves ---- */

/* A sequence with that many committed tokens, whatever they are. */
static int make(struct tiers *tiers, const struct kvg_policy *policy, uint32_t tokens, uint64_t *ret)
{
	int r = kvg_create(tiers->client, policy, ret);

	if (r == 0)
		r = kvg_reserve(tiers->client, *ret, tokens);
	if (r == 0)
		r = kvg_commit(tiers->client, *ret, tokens);
	return report(tiers->client, r, "a sequence");
}

static struct kvg_policy policy_of(const struct tiers *tiers, double ratio, uint16_t flags)
{
	return (struct kvg_policy){.ratio = ratio,
		.mode = ratio < 1 ? KVG_MODE_CHUNKED : KVG_MODE_OFF,
		.level = KVG_LEVEL_PAIR,
		.flags = (uint16_t)(flags | KVG_POLICY_WINDOW_ABSOLUTE),
		.context_tokens = tiers->tokens,
		.window = 16};
}

/* What the tenant's min has a right to is created again in the background; a restore seldom follows at once. */
static int wait_for_min(struct tiers *tiers)
{
	double end = service_seconds() + MIN_SECONDS;
	int r = 0;

	while (r == 0 && tiers->min) {
		r = service_status(&tiers->service, &tiers->status);
		if (r == 0 && tiers->status.reserved + tiers->status.charged >= 3 * bytes_of(tiers, tiers->tokens))
			break;
		if (r == 0 && service_seconds() > end)
			r = -ETIMEDOUT;
		(void)usleep(1000);
	}
	if (r < 0)
		(void)fprintf(stderr, "kvgate-bench: tiers: the tenant's min is not there: %s\n", strerror(-r));
	return r;
}

/*
 * One entry until its completion; after it in `about`: until the worker has mapped what came and all memory that went
 * is back in the pool; and what the copies took. ns: the completion's value that says so.
 */
static int move_blocks(struct tiers *tiers, const struct kvg_sqe *sqe, unsigned ns, enum move move, double bytes)
{
	double start = service_seconds();
	struct kvg_cqe cqe = {0};
	int r = kvg_submit(tiers->client, sqe);

	if (r == 0)
		r = kvg_reap(tiers->client, &cqe, NULL, 1, 1);
	if (r == 0)
		r = cqe.status;
	if (r < 0)
		return r;
	note(tiers, move, start, bytes);
	tiers->samples[move].said = cqe.value[0];
	note_seconds(tiers, move + 2, (double)cqe.value[ns] / 1e9, bytes);
	r = kvg_return_memory(tiers->client);
	note(tiers, move + 1, start, bytes);
	return r;
}

static void forget(struct tiers *tiers, enum move out, enum move in)
{
	for (unsigned i = 0; i < 3; i++) {
		tiers->samples[out + i].count--;
		tiers->samples[in + i].count--;
	}
}

/* Twice, and the second time counts: then the KV has been written, and is in memory rather than in caches. */
static int away_and_back(struct tiers *tiers, uint32_t tokens, enum move out, enum move in)
{
	const struct kvg_policy policy = policy_of(tiers, 1, 0);
	double bytes = (double)bytes_of(tiers, tokens);
	uint64_t seq;
	int r = make(tiers, &policy, tokens, &seq);

	for (unsigned turn = 0; r >= 0 && turn < 2; turn++) {
		r = move_blocks(tiers, &(struct kvg_sqe){.op = KVG_OP_OFFLOAD, .seq = seq}, 2, out, bytes);
		if (report(tiers->client, r, "offload") >= 0)
			r = wait_for_min(tiers);
		if (r >= 0)
			r = move_blocks(tiers, &(struct kvg_sqe){.op = KVG_OP_RESTORE, .seq = seq}, 1, in, bytes);
		if (report(tiers->client, r, "restore") >= 0)
			r = wait_for_min(tiers);
		if (turn == 0)
			forget(tiers, out, in);
	}
	if (r < 0)
		return r;
	return report(tiers->client, kvg_free(tiers->client, seq), "free");
}

static int evict(struct tiers *tiers, bool retain)
{
	const struct kvg_policy policy = policy_of(tiers, 0.3, retain ? KVG_POLICY_RETAIN_HOST : 0);
	struct kvg_recall_result recalled = {0};
	struct kvg_evict_result result = {0};
	double start;
	uint64_t seq;
	int r = make(tiers, &policy, tiers->tokens, &seq);

	for (uint32_t layer = 0; r == 0 && layer < tiers->layers; layer++)
		r = report(tiers->client, kvg_stage_scores(tiers->client, seq, layer, 0, tiers->tokens, tiers->scores),
			"scores");
	if (r == 0)
		r = report(tiers->client, kvg_stage_wait(tiers->client), "scores");
	start = service_seconds();
	if (r == 0)
		r = report(tiers->client, kvg_evict(tiers->client, seq, KVG_EVICT_PREFILL, &result), "eviction");
	if (r < 0)
		return r;
	note(tiers, retain ? EVICT_RETAIN : EVICT, start, (double)result.pairs_dropped * (double)pair_bytes(tiers));
	start = service_seconds();
	if (retain) {
		r = report(tiers->client, kvg_recall(tiers->client, seq, 1, &recalled), "recall");
		if (r < 0)
			return r;
		note(tiers, RECALL, start, (double)recalled.pairs_recalled * (double)pair_bytes(tiers));
	}
	return report(tiers->client, kvg_free(tiers->client, seq), "free");
}

static int attach(struct tiers *tiers, struct kvg_client *client, const uint8_t *key, enum move move)
{
	const struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = KVG_STRIPE_TOKENS};
	struct kvg_context_info info;
	double start = service_seconds();
	uint64_t seq;
	int r = report(client, kvg_attach(client, key, &policy, &seq, &info), "attach");

	if (r < 0)
		return r;
	note(tiers, move, start, 0);
	return report(client, kvg_free(client, seq), "free");
}

static int share(struct tiers *tiers, uint8_t number)
{
	const uint8_t key[KVG_KEY_SIZE] = {number, 1};
	const struct kvg_policy policy = policy_of(tiers, 1, 0);
	struct kvg_context_info info;
	uint64_t seq = 0, child = 0;
	double start;
	int r = make(tiers, &policy, tiers->tokens - 7, &seq); /* with tails */

	if (r < 0)
		return r;
	start = service_seconds();
	if (report(tiers->client, kvg_publish(tiers->client, seq, key, &info), "publish") < 0) {
		tiers->no_contexts = true;
		return report(tiers->client, kvg_free(tiers->client, seq), "free");
	}
	note(tiers, PUBLISH, start, (double)bytes_of(tiers, tiers->tokens - 7));
	tiers->samples[PUBLISH].said = info.bytes;
	/* It does not stay: whoever is not in a call of the library does not unmap what the daemon wants back. */
	r = open_client(tiers, &tiers->other);
	if (r == 0)
		r = attach(tiers, tiers->other, key, ATTACH_OTHER);
	tiers->other = kvg_close(tiers->other);
	if (r == 0)
		r = attach(tiers, tiers->client, key, ATTACH);
	start = service_seconds();
	if (r == 0)
		r = report(tiers->client, kvg_fork(tiers->client, seq, 1, &child), "fork");
	if (r < 0)
		return r;
	note(tiers, FORK, start, 0);
	r = report(tiers->client, kvg_free(tiers->client, child), "free");
	return r == 0 ? report(tiers->client, kvg_free(tiers->client, seq), "free") : r;
}

static int run(struct tiers *tiers)
{
	int r = open_all(tiers);

	for (uint32_t i = 0; r == 0 && i <= tiers->rounds; i++) {
		if (!tiers->cuda)
			note_host_rates(tiers);
		r = away_and_back(tiers, tiers->tokens, OFFLOAD, RESTORE);
		if (r == 0)
			r = away_and_back(tiers, KVG_STRIPE_TOKENS, OFFLOAD_SHORT, RESTORE_SHORT);
		if (r == 0)
			r = evict(tiers, false);
		if (r == 0)
			r = evict(tiers, true);
		if (r == 0 && !tiers->no_contexts)
			r = share(tiers, (uint8_t)i);
	}
	return r;
}

/* ---- the report ---- */

static int compare(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return a < b ? -1 : a > b;
}

static double median_rate(double *rates, uint32_t count)
{
	qsort(rates, count, sizeof(*rates), compare);
	return rates[count / 2];
}

/* Seconds of the median round, the first one left out. */
static double median(struct samples *samples)
{
	qsort(samples->seconds + 1, samples->count - 1, sizeof(double), compare);
	return samples->seconds[1 + (samples->count - 1) / 2];
}

/* A move that copies nothing to speak of has no rate. What retaining adds to an eviction is what counts. */
static double rate_of(const struct tiers *tiers, enum move move, double seconds, double evict_seconds)
{
	const struct samples *samples = &tiers->samples[move];

	if (move == EVICT || !samples->bytes)
		return 0;
	if (move == EVICT_RETAIN)
		seconds = seconds > evict_seconds ? seconds - evict_seconds : 0;
	return seconds > 0 ? samples->bytes / seconds : 0;
}

static json_t *print_move(struct tiers *tiers, enum move move, double evict_seconds)
{
	struct samples *samples = &tiers->samples[move];
	double seconds = median(samples), rate = rate_of(tiers, move, seconds, evict_seconds);
	double floor = about[move].in ? tiers->rates.in : tiers->rates.out;
	char text[2][32] = {"", ""};

	if (rate > 0) {
		(void)snprintf(text[0], sizeof(text[0]), "%.2f GB/s", rate / 1e9);
		(void)snprintf(text[1], sizeof(text[1]), "%.0f%%", 100 * rate / floor);
	}
	(void)printf("%-34s %10.3f %10.3f %10.3f  %12s %6s\n", about[move].name, 1e3 * seconds,
		1e3 * samples->seconds[1], 1e3 * samples->seconds[0], text[0], text[1]);
	return json_pack("{s:s, s:I, s:I, s:f, s:f, s:f, s:f, s:f}", "move", about[move].key, "bytes",
		(json_int_t)samples->bytes, "daemon_bytes", (json_int_t)samples->said, "median_ms", 1e3 * seconds,
		"best_ms", 1e3 * samples->seconds[1], "first_ms", 1e3 * samples->seconds[0], "bytes_per_second", rate,
		"of_large_copy", rate > 0 ? rate / floor : 0.0);
}

static int print(struct tiers *tiers)
{
	const struct tiers_rates *rates = &tiers->rates;
	double evict_seconds = median(&tiers->samples[EVICT]);
	json_t *moves = json_array(), *json;
	int r = 0;

	if (!tiers->cuda) {
		tiers->rates.out = tiers->rates.in = median_rate(tiers->large, tiers->copies);
		tiers->rates.loop_out = tiers->rates.loop_in = median_rate(tiers->halves, tiers->copies);
	}

	(void)printf("%s%s%s, %.1f MiB in blocks of %zu KiB, extents of %" PRIu64 " KiB%s, %u rounds\n"
		     "one large copy: out %.2f, in %.2f GB/s; half block by half block: out %.2f, in %.2f GB/s\n",
		tiers->cuda ? "cuda" : "host", tiers->cuda ? ", " : "", tiers->status.device,
		(double)bytes_of(tiers, tiers->tokens) / (1 << 20), 2 * half_block(tiers) >> 10,
		tiers->status.extent_size >> 10, tiers->min ? ", within the tenant's min" : "", tiers->rounds,
		rates->out / 1e9, rates->in / 1e9, rates->loop_out / 1e9, rates->loop_in / 1e9);
	if (rates->batch_out > 0)
		(void)printf("in batches of the driver's (cuMemcpyBatchAsync): out %.2f, in %.2f GB/s\n",
			rates->batch_out / 1e9, rates->batch_in / 1e9);
	(void)printf("%-34s %10s %10s %10s  %12s %6s\n", "move", "median ms", "best ms", "first ms", "rate", "of it");
	for (enum move move = 0; move < MOVES; move++)
		if (tiers->samples[move].count > 1)
			(void)json_array_append_new(moves, print_move(tiers, move, evict_seconds));
	json = json_pack("{s:s, s:s, s:b, s:I, s:I, s:I, s:b, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:o}", "kind",
		tiers->cuda ? "cuda" : "host", "device", tiers->status.device, "mps", tiers->status.mps, "bytes",
		(json_int_t)bytes_of(tiers, tiers->tokens), "block", 2 * (json_int_t)half_block(tiers), "extent",
		(json_int_t)tiers->status.extent_size, "min", tiers->min, "rounds", (int)tiers->rounds,
		"large_copy_out", rates->out, "large_copy_in", rates->in, "halves_out", rates->loop_out, "halves_in",
		rates->loop_in, "batch_out", rates->batch_out, "batch_in", rates->batch_in, "moves", moves);
	if (tiers->json && json_dump_file(json, tiers->json, JSON_INDENT(1) | JSON_REAL_PRECISION(6)) < 0) {
		(void)fprintf(stderr, "kvgate-bench: tiers: %s: %s\n", tiers->json, strerror(errno));
		r = -EIO;
	}
	json_decref(json);
	return r;
}

/* ---- the command ---- */

static int parse(int argc, char **argv, struct tiers *tiers)
{
	static const struct option options[] = {{"kind", required_argument, NULL, 'k'},
		{"device", required_argument, NULL, 'd'}, {"kvgated", required_argument, NULL, 'g'},
		{"tokens", required_argument, NULL, 't'}, {"layers", required_argument, NULL, 'l'},
		{"dim", required_argument, NULL, 'h'}, {"extent", required_argument, NULL, 'e'},
		{"min", no_argument, NULL, 'm'}, {"rounds", required_argument, NULL, 'r'},
		{"json", required_argument, NULL, 'j'}, {NULL, 0, NULL, 0}};
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (option == 'k' && (strcmp(optarg, "cuda") == 0 || strcmp(optarg, "host") == 0))
			tiers->cuda = optarg[0] == 'c';
		else if (option == 'd')
			tiers->device = (int)strtol(optarg, NULL, 10);
		else if (option == 'g')
			tiers->kvgated = optarg;
		else if (option == 't')
			tiers->tokens = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'l')
			tiers->layers = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'r')
			tiers->rounds = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'h')
			tiers->dim = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'e' && kvg_size_parse(optarg, &tiers->extent) == 0)
			continue;
		else if (option == 'm')
			tiers->min = true;
		else if (option == 'j')
			tiers->json = optarg;
		else
			return BENCH_USAGE;
	}
	if (optind == argc && tiers->tokens >= 2 * KVG_STRIPE_TOKENS && tiers->tokens <= 1u << 20 &&
		tiers->layers >= 1 && tiers->layers <= 128 && tiers->dim >= 8 && tiers->dim <= DIM_MAX &&
		tiers->rounds >= 1 && tiers->rounds <= ROUNDS_MAX)
		return BENCH_OK;
	return BENCH_USAGE;
}

int bench_tiers(int argc, char **argv)
{
	struct tiers *tiers = calloc(1, sizeof(*tiers));
	int r;

	if (!tiers)
		return BENCH_FAIL;
	*tiers = (struct tiers){.tokens = 4096, .layers = 16, .rounds = 7, .dim = DIM};
	if (parse(argc, argv, tiers) != BENCH_OK) {
		(void)fprintf(stderr,
			"usage: kvgate-bench tiers [--kind host|cuda] [--tokens N] [--layers N] [--dim N] [--extent "
			"SIZE] [--min]\n                          [--rounds N] [--json FILE] [--device N] [--kvgated "
			"PROGRAM]\n");
		free(tiers);
		return BENCH_USAGE;
	}
	r = run(tiers);
	if (r == 0)
		r = print(tiers);
	if (close_all(tiers) < 0)
		r = -EIO;
	free(tiers);
	if (r == -ENODEV || r == -EOPNOTSUPP)
		return BENCH_SKIP;
	return r < 0 ? BENCH_FAIL : BENCH_OK;
}
