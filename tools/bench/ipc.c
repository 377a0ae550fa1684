/*
 * kvgate-bench ipc: round trips through the rings to a running daemon, as a
 * worker sees them. A no-op, a reserve of one stripe whose room comes from an
 * extent that the worker holds, and one that needs new extents; with the client
 * spinning and sleeping; with 10 and with 10,000 idle sequences that hold no
 * blocks. The tenant needs 1 MiB of free budget or four extents, if they are larger.
 */
#include "tools/bench/ipc.h"

#include <errno.h>
#include <getopt.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/kvgate.h"
#include "tools/bench/bench.h"

#define SPIN_LONG_US 1000000000u
#define STRIPES      16u   /* that one sequence reserves, one by one */
#define SAMPLES      4000u /* of each kind */
#define WARM_UP      200u
#define ROUNDS_MAX   4000u /* sequences, to get the samples */
#define IDLE_MAX     10000u

enum operation { OP_NOP, OP_RESERVE_HELD, OP_RESERVE_NEW, OP_COUNT };

static const char *const operation_names[OP_COUNT] = {"no-op", "reserve, extent held", "reserve, new extents"};
static const char *const operation_keys[OP_COUNT] = {"nop", "reserve_held", "reserve_new"};

struct samples {
	uint64_t ns[SAMPLES];
	uint32_t count;
};

struct bench {
	struct kvg_client *client;
	uint32_t idle;
	bool spinning;
	bool json;
	uint32_t rows; /* printed */
	struct samples samples[OP_COUNT];
};

static uint64_t now_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void add_sample(struct samples *samples, uint64_t ns)
{
	if (samples->count < SAMPLES)
		samples->ns[samples->count++] = ns;
}

static int compare_ns(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return a < b ? -1 : a > b;
}

/* Microseconds below which that many percent of the sorted samples lie. */
static double percentile(const struct samples *samples, uint32_t percent)
{
	uint32_t rank = (samples->count - 1) * percent / 100;

	return (double)samples->ns[rank] / 1e3;
}

static int fail(const struct bench *bench, int status)
{
	(void)fprintf(stderr, "kvgate-bench: ipc: %s\n", kvg_error(bench->client));
	return status;
}

static int measure_nop(struct bench *bench)
{
	for (uint32_t i = 0; i < SAMPLES + WARM_UP; i++) {
		uint64_t start = now_ns();
		int r = kvg_nop(bench->client);

		if (r < 0)
			return fail(bench, r);
		if (i >= WARM_UP)
			add_sample(&bench->samples[OP_NOP], now_ns() - start);
	}
	return 0;
}

/* One sequence that reserves stripe after stripe; whether extents came with one decides where its time counts. */
static int measure_sequence(struct bench *bench, bool warm)
{
	const struct kvg_policy policy = {
		.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = STRIPES * KVG_STRIPE_TOKENS};
	uint64_t seq;
	int r = kvg_create(bench->client, &policy, &seq);

	if (r < 0)
		return fail(bench, r);
	for (uint32_t stripe = 1; stripe <= STRIPES; stripe++) {
		uint64_t held = kvg_mapped_bytes(bench->client), start = now_ns(), end;

		r = kvg_reserve(bench->client, seq, stripe * KVG_STRIPE_TOKENS);
		end = now_ns();
		if (r < 0)
			return fail(bench, r);
		held = kvg_mapped_bytes(bench->client) - held;
		if (warm)
			add_sample(&bench->samples[held ? OP_RESERVE_NEW : OP_RESERVE_HELD], end - start);
	}
	r = kvg_free(bench->client, seq);
	return r < 0 ? fail(bench, r) : 0;
}

static int measure_reserve(struct bench *bench)
{
	const struct samples *held = &bench->samples[OP_RESERVE_HELD], *new = &bench->samples[OP_RESERVE_NEW];
	int r = measure_sequence(bench, false);

	for (uint32_t i = 0; r == 0 && i < ROUNDS_MAX && (held->count < SAMPLES || new->count < SAMPLES); i++)
		r = measure_sequence(bench, true);
	return r;
}

static void print_row(struct bench *bench, enum operation operation)
{
	struct samples *samples = &bench->samples[operation];
	const char *client = bench->spinning ? "spinning" : "sleeping";

	if (!samples->count)
		return;
	qsort(samples->ns, samples->count, sizeof(*samples->ns), compare_ns);
	if (bench->json)
		(void)printf(
			"%s\n  {\"operation\": \"%s\", \"client\": \"%s\", \"idle_sequences\": %u, \"samples\": %u, "
			"\"p50_us\": %.2f, \"p99_us\": %.2f}",
			bench->rows ? "," : "", operation_keys[operation], client, bench->idle, samples->count,
			percentile(samples, 50), percentile(samples, 99));
	else
		(void)printf("%-22s %-9s %14u %8u %9.2f %9.2f\n", operation_names[operation], client, bench->idle,
			samples->count, percentile(samples, 50), percentile(samples, 99));
	bench->rows++;
}

static int measure(struct bench *bench, bool spinning)
{
	int r;

	bench->spinning = spinning;
	memset(bench->samples, 0, sizeof(bench->samples));
	kvg_set_spin(bench->client, spinning ? SPIN_LONG_US : 0);
	r = measure_nop(bench);
	if (r == 0)
		r = measure_reserve(bench);
	for (int operation = 0; r == 0 && operation < OP_COUNT; operation++)
		print_row(bench, (enum operation)operation);
	return r;
}

static int add_idle(struct bench *bench, uint32_t idle)
{
	const struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF};
	uint64_t seq;

	for (; bench->idle < idle; bench->idle++) {
		int r = kvg_create(bench->client, &policy, &seq);

		if (r < 0)
			return fail(bench, r);
	}
	return 0;
}

/* 64 KiB of KV in a stripe: a few of them fit the smallest usual extent. */
static int register_layout(struct bench *bench)
{
	struct kvg_layout layout = {.model = "kvgate-bench",
		.hidden_dim = 64,
		.group_count = 1,
		.max_sequences = IDLE_MAX + 1,
		.max_tokens = STRIPES * KVG_STRIPE_TOKENS};
	int r;

	layout.groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = 2,
		.head_count = 2,
		.head_total = 2,
		.world = 1,
		.k_dim = 32,
		.v_dim = 32,
		.k_dtype = KVG_BF16,
		.v_dtype = KVG_BF16,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 2};
	r = kvg_register(bench->client, &layout, 64 * 1024);
	return r < 0 ? fail(bench, r) : 0;
}

static int run(struct bench *bench)
{
	static const uint32_t idle[] = {10, IDLE_MAX};
	int r = register_layout(bench);

	if (r == 0 && bench->json)
		(void)printf("[");
	if (r == 0 && !bench->json)
		(void)printf("%-22s %-9s %14s %8s %9s %9s\n", "round trip", "client", "idle sequences", "samples",
			"p50 us", "p99 us");
	for (size_t i = 0; r == 0 && i < sizeof(idle) / sizeof(*idle); i++) {
		r = add_idle(bench, idle[i]);
		if (r == 0)
			r = measure(bench, true);
		if (r == 0)
			r = measure(bench, false);
	}
	if (r == 0 && bench->json)
		(void)printf("\n]\n");
	return r;
}

/* The options; BENCH_OK or BENCH_USAGE. */
static int parse(int argc, char **argv, const char **ret_socket, bool *ret_json)
{
	static const struct option options[] = {
		{"socket", required_argument, NULL, 's'}, {"json", no_argument, NULL, 'j'}, {NULL, 0, NULL, 0}};
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (option == 's')
			*ret_socket = optarg;
		else if (option == 'j')
			*ret_json = true;
		else
			return BENCH_USAGE;
	}
	if (*ret_socket && optind == argc)
		return BENCH_OK;
	(void)fprintf(stderr, "usage: kvgate-bench ipc --socket SOCKET [--json]\n");
	return BENCH_USAGE;
}

int bench_ipc(int argc, char **argv)
{
	struct bench *bench;
	const char *path = NULL;
	bool json = false;
	char text[512];
	int r = parse(argc, argv, &path, &json);

	if (r != BENCH_OK)
		return r;
	bench = calloc(1, sizeof(*bench));
	if (!bench) {
		(void)fprintf(stderr, "kvgate-bench: ipc: no memory\n");
		return BENCH_FAIL;
	}
	bench->json = json;
	r = kvg_connect(path, "kvgate-bench", &bench->client, text, sizeof(text));
	if (r < 0)
		(void)fprintf(stderr, "kvgate-bench: ipc: %s\n", text);
	else
		r = run(bench);
	(void)kvg_close(bench->client);
	free(bench);
	return r < 0 ? BENCH_FAIL : BENCH_OK;
}
