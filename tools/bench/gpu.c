/* kvgate-bench gpu: how fast the kernels of the kind cuda are, next to what the machine allows and to rivals. */
#include "tools/bench/gpu.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/bench/bench.h"

struct family {
	const char *ids[3]; /* beginnings of the ids of its rows */
	void (*measure)(struct gpu_bench *bench);
};

static const struct family families[] = {
	{{"gate-"}, gpu_bench_gate},
	{{"select-"}, gpu_bench_select},
	{{"evict-"}, gpu_bench_evict},
	{{"copy-"}, gpu_bench_copy},
	{{"attend-", "append-", "export-"}, gpu_bench_attention},
};

struct options {
	const char *json, *only;
	int device;
};

bool gpu_check(struct gpu_bench *bench, CUresult result, const char *what)
{
	if (result == CUDA_SUCCESS)
		return false;
	(void)fprintf(stderr, "kvgate-bench: gpu: %s: %s\n", what, kvg_cuda_error(bench->cuda->driver, result));
	bench->failed = true;
	if (kvg_cuda_is_sticky(result))
		bench->lost = true;
	return true;
}

/* Whether an id with that beginning may begin with what is wanted. */
static bool fits(const char *only, const char *beginning)
{
	size_t wanted = strlen(only), given = strlen(beginning);

	return strncmp(only, beginning, wanted < given ? wanted : given) == 0;
}

static bool wants_family(const struct gpu_bench *bench, const struct family *family)
{
	for (size_t i = 0; i < sizeof(family->ids) / sizeof(*family->ids); i++)
		if (family->ids[i] && (!bench->only || fits(bench->only, family->ids[i])))
			return true;
	return false;
}

/* One family that fails does not keep the others from being measured. Whether any failed. */
static bool measure_families(struct gpu_bench *bench)
{
	bool failed = false;

	for (size_t i = 0; i < sizeof(families) / sizeof(*families) && !bench->lost; i++) {
		if (!wants_family(bench, &families[i]))
			continue;
		bench->failed = false;
		families[i].measure(bench);
		failed |= bench->failed;
	}
	if (bench->lost)
		(void)fprintf(
			stderr, "kvgate-bench: gpu: the device's context is lost, so that the rest is not measured\n");
	return failed;
}

static int run(struct gpu_bench *bench, const char *json)
{
	bool failed;

	bench->table = json && strcmp(json, "-") == 0 ? NULL : stdout;
	gpu_measure_rates(bench);
	if (bench->failed)
		return BENCH_FAIL;
	gpu_print_head(bench);
	failed = measure_families(bench);
	if (!failed && !json_array_size(bench->rows)) {
		(void)fprintf(stderr, "kvgate-bench: gpu: no row begins with '%s'\n", bench->only ? bench->only : "");
		return BENCH_USAGE;
	}
	if (json && gpu_write_json(bench, json, failed) < 0) {
		(void)fprintf(stderr, "kvgate-bench: gpu: %s cannot be written\n", json);
		failed = true;
	}
	return failed ? BENCH_FAIL : BENCH_OK;
}

static int open_device(struct gpu_bench *bench, int ordinal)
{
	char text[256] = "";

	if (kvg_cuda_open(ordinal, &bench->cuda, text, sizeof(text)) < 0) {
		(void)fprintf(stderr, "kvgate-bench: gpu: %s\n", text);
		return BENCH_SKIP;
	}
	if (gpu_check(bench, bench->cuda->driver->cuStreamCreate(&bench->stream, CU_STREAM_NON_BLOCKING), "stream"))
		return BENCH_FAIL;
	bench->rows = json_array();
	return bench->rows ? BENCH_OK : BENCH_FAIL;
}

static void close_device(struct gpu_bench *bench)
{
	if (!bench->cuda)
		return;
	json_decref(bench->rows);
	gpu_release_memory(bench);
	if (bench->stream)
		(void)bench->cuda->driver->cuStreamDestroy(bench->stream);
	(void)kvg_cuda_close(bench->cuda);
}

/* Whether the option is one of ours and its value makes sense. */
static bool set_option(struct options *options, int option, const char *value)
{
	char *end;
	long number;

	switch (option) {
	case 'j':
		options->json = value;
		return true;
	case 'o':
		options->only = value;
		return true;
	case 'd':
		number = strtol(value, &end, 10);
		options->device = (int)number;
		return end != value && !*end && number >= 0 && number < 1024;
	default:
		return false;
	}
}

static int parse(int argc, char **argv, struct options *ret)
{
	static const struct option options[] = {{"json", required_argument, NULL, 'j'},
		{"only", required_argument, NULL, 'o'}, {"device", required_argument, NULL, 'd'}, {NULL, 0, NULL, 0}};
	bool good = true;
	int option;

	while (good && (option = getopt_long(argc, argv, "", options, NULL)) >= 0)
		good = set_option(ret, option, optarg);
	if (good && optind == argc)
		return BENCH_OK;
	(void)fprintf(stderr, "usage: kvgate-bench gpu [--json FILE|-] [--only PREFIX] [--device N]\n");
	return BENCH_USAGE;
}

int bench_gpu(int argc, char **argv)
{
	struct gpu_bench bench = {0};
	struct options options = {0};
	int r = parse(argc, argv, &options);

	if (r != BENCH_OK)
		return r;
	bench.only = options.only;
	r = open_device(&bench, options.device);
	if (r == BENCH_OK)
		r = run(&bench, options.json);
	close_device(&bench);
	return r;
}
