/*
 * kvgate-bench tier: a sequence of blocks of 4 KiB (K and V of 2 KiB each) goes to the host tier of a daemon of its own
 * and comes back, again and again, next to copies of as many bytes in this process: one memcpy of all, memcpy block by
 * block, and the kernel that the daemon copies with, block by block. Rates are those of the fastest round and of the
 * median; the first offload, for which the daemon gets memory for the tier, is apart.
 */
#include "tools/bench/tier.h"

#include <errno.h>
#include <getopt.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "client/kvgate.h"
#include "kernels/host/copy.h"
#include "proto/size.h"
#include "tools/bench/bench.h"
#include "tools/bench/service.h"

#define HALF       2048u /* bytes of K, and of V, of a block */
#define LAYERS     16u
#define HEADS      8u
#define ROUNDS_MAX 1000u
#define TOKEN      (LAYERS * HEADS * 2u * HALF / KVG_BLOCK_TOKENS) /* bytes */

enum row { ROW_OFFLOAD, ROW_RESTORE, ROW_LARGE, ROW_BLOCKS, ROW_KERNEL, ROW_COUNT };

static const char *const row_names[ROW_COUNT] = {
	"offload", "restore", "memcpy of all", "memcpy of each block", "kvg_stream_copy of each block"};
static const char *const row_keys[ROW_COUNT] = {"offload", "restore", "memcpy", "memcpy_blocks", "stream_blocks"};

struct tier {
	uint64_t size;
	uint32_t rounds;
	const char *program;
	bool json;
	struct service service;
	struct kvg_client *client;
	uint64_t seq;
	uint8_t *from, *to; /* size bytes each, in place */
	double first;       /* seconds of the first offload */
	double seconds[ROW_COUNT][ROUNDS_MAX];
};

static int report(const struct tier *tier, int r)
{
	if (r < 0)
		(void)fprintf(stderr, "kvgate-bench: tier: %s\n", kvg_error(tier->client));
	return r;
}

/* ---- the daemon ---- */

static int start(struct tier *tier)
{
	char config[512], size[KVG_SIZE_TEXT];

	(void)kvg_size_format(tier->size, size);
	(void)snprintf(config, sizeof(config),
		"[pool]\ndevice.size = %lluK\nextent_size = 2M\nhost.size = %lluK\n[tenant bench]\nsocket = "
		"bench.sock\n",
		(unsigned long long)(tier->size * 2 >> 10), (unsigned long long)(tier->size * 2 >> 10));
	return service_start(&tier->service, tier->program, config);
}

static int connect_worker(struct tier *tier)
{
	struct kvg_layout layout = {.model = "bench", .hidden_dim = 64, .group_count = 1, .max_sequences = 1};
	char path[SERVICE_PATH], text[SERVICE_TEXT];
	int r;

	layout.max_tokens = (uint32_t)(tier->size / TOKEN);
	layout.groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = LAYERS,
		.head_count = HEADS,
		.head_total = HEADS,
		.world = 1,
		.k_dim = HALF / KVG_BLOCK_TOKENS / 2,
		.v_dim = HALF / KVG_BLOCK_TOKENS / 2,
		.k_dtype = KVG_BF16,
		.v_dtype = KVG_BF16,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 1};
	r = kvg_connect(
		service_path(&tier->service, "bench.sock", path), "kvgate-bench", &tier->client, text, sizeof(text));
	if (r < 0) {
		(void)fprintf(stderr, "kvgate-bench: tier: %s\n", text);
		return r;
	}
	return report(tier, kvg_register(tier->client, &layout, 64 << 10));
}

/* As long as there is room for; what the KV is makes no difference. */
static int fill(struct tier *tier)
{
	uint32_t tokens = (uint32_t)(tier->size / TOKEN);
	const struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = tokens};
	int r = report(tier, kvg_create(tier->client, &policy, &tier->seq));

	if (r >= 0)
		r = report(tier, kvg_reserve(tier->client, tier->seq, tokens));
	if (r >= 0)
		r = report(tier, kvg_commit(tier->client, tier->seq, tokens));
	return r;
}

/* One round; the worker's own work (mapping) is not the daemon's and not counted. */
static int there_and_back(struct tier *tier, double *ret_offload, double *ret_restore)
{
	struct kvg_sqe sqe = {.op = KVG_OP_OFFLOAD, .seq = tier->seq};
	double *ret[] = {ret_offload, ret_restore};
	int r = 0;

	for (unsigned i = 0; r >= 0 && i < 2; i++) {
		double begun = service_seconds();
		struct kvg_cqe cqe;
		const char *text;

		sqe.op = i ? KVG_OP_RESTORE : KVG_OP_OFFLOAD;
		r = report(tier, kvg_submit(tier->client, &sqe));
		if (r >= 0)
			r = report(tier, kvg_reap(tier->client, &cqe, &text, 1, 1));
		*ret[i] = service_seconds() - begun;
		if (r >= 0 && cqe.status < 0) {
			(void)fprintf(stderr, "kvgate-bench: tier: %s\n", text);
			r = cqe.status;
		}
		if (r >= 0)
			r = report(tier, kvg_return_memory(tier->client));
	}
	return r;
}

/* ---- copies here ---- */

static uint8_t *memory(uint64_t size)
{
	uint8_t *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	return at == MAP_FAILED ? NULL : at;
}

static void copy_large(const struct tier *tier)
{
	memcpy(tier->to, tier->from, tier->size);
}

/* K halves lie in one half of the memory and V halves in the other, as in an extent; together, block by block. */
static void copy_blocks(const struct tier *tier)
{
	for (uint64_t i = 0; i < tier->size / (2 * HALF); i++) {
		memcpy(tier->to + 2 * i * HALF, tier->from + i * HALF, HALF);
		memcpy(tier->to + (2 * i + 1) * HALF, tier->from + tier->size / 2 + i * HALF, HALF);
	}
}

static void copy_kernel(const struct tier *tier)
{
	for (uint64_t i = 0; i < tier->size / (2 * HALF); i++) {
		kvg_stream_copy(tier->to + 2 * i * HALF, tier->from + i * HALF, HALF);
		kvg_stream_copy(tier->to + (2 * i + 1) * HALF, tier->from + tier->size / 2 + i * HALF, HALF);
	}
	kvg_stream_fence();
}

static int measure(struct tier *tier)
{
	static void (*const copies[])(const struct tier *) = {copy_large, copy_blocks, copy_kernel};
	double unused;
	int r = there_and_back(tier, &tier->first, &unused);

	for (uint32_t i = 0; r >= 0 && i < tier->rounds; i++) {
		r = there_and_back(tier, &tier->seconds[ROW_OFFLOAD][i], &tier->seconds[ROW_RESTORE][i]);
		for (unsigned k = 0; k < 3; k++) {
			double begun = service_seconds();

			copies[k](tier);
			tier->seconds[ROW_LARGE + k][i] = service_seconds() - begun;
		}
	}
	return r;
}

/* ---- the report ---- */

static int compare(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return a < b ? -1 : a > b;
}

static double rate(const struct tier *tier, double seconds)
{
	return (double)tier->size / seconds / 1e9;
}

static void print(struct tier *tier)
{
	char size[KVG_SIZE_TEXT];

	if (tier->json)
		(void)printf("{\"bytes\": %llu, \"rounds\": %u, \"first_offload_gb_s\": %.3f",
			(unsigned long long)tier->size, tier->rounds, rate(tier, tier->first));
	else
		(void)printf("%s in blocks of 4 KiB, %u rounds; GB/s\n%-31s %8s %8s\n%-31s %8.2f\n",
			kvg_size_format(tier->size, size), tier->rounds, "", "best", "median", "first offload",
			rate(tier, tier->first));
	for (unsigned i = 0; i < ROW_COUNT; i++) {
		double *seconds = tier->seconds[i];

		qsort(seconds, tier->rounds, sizeof(*seconds), compare);
		(void)printf(tier->json ? ", \"%s_gb_s\": [%.3f, %.3f]" : "%-31s %8.2f %8.2f\n",
			tier->json ? row_keys[i] : row_names[i], rate(tier, seconds[0]),
			rate(tier, seconds[tier->rounds / 2]));
	}
	if (tier->json)
		(void)printf("}\n");
}

static int run(struct tier *tier)
{
	int r = start(tier), stopped;

	if (r < 0)
		return r;
	tier->from = memory(tier->size);
	tier->to = memory(tier->size);
	r = tier->from && tier->to ? connect_worker(tier) : -ENOMEM;
	if (r >= 0)
		r = fill(tier);
	if (r >= 0)
		r = measure(tier);
	tier->client = kvg_close(tier->client);
	stopped = service_stop(&tier->service);
	if (r >= 0 && stopped >= 0)
		print(tier);
	return r < 0 ? r : stopped;
}

static int usage(void)
{
	(void)fprintf(stderr, "usage: kvgate-bench tier [--size S] [--rounds N] [--kvgated PROGRAM] [--json]\n");
	return BENCH_USAGE;
}

static int parse(int argc, char **argv, struct tier *tier)
{
	static const struct option options[] = {{"size", required_argument, NULL, 's'},
		{"rounds", required_argument, NULL, 'r'}, {"kvgated", required_argument, NULL, 'k'},
		{"json", no_argument, NULL, 'j'}, {0}};
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 's' && kvg_size_parse(optarg, &tier->size) < 0)
			return usage();
		if (option == 'r')
			tier->rounds = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'k')
			tier->program = optarg;
		else if (option == 'j')
			tier->json = true;
		else if (option != 's')
			return usage();
	}
	tier->size = tier->size / (4 << 20) * (4 << 20); /* whole stripes */
	if (optind != argc || !tier->size || !tier->rounds || tier->rounds > ROUNDS_MAX)
		return usage();
	return BENCH_OK;
}

int bench_tier(int argc, char **argv)
{
	struct tier *tier = calloc(1, sizeof(*tier));
	int r;

	if (!tier) {
		(void)fprintf(stderr, "kvgate-bench: tier: no memory\n");
		return BENCH_FAIL;
	}
	tier->size = 512 << 20;
	tier->rounds = 10;
	r = parse(argc, argv, tier);
	if (r == BENCH_OK)
		r = run(tier) < 0 ? BENCH_FAIL : BENCH_OK;
	free(tier);
	return r;
}
