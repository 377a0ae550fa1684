#include "tools/bench/bench.h"
#include "tools/bench/churn.h"
#include "tools/bench/insitu.h"
#include "tools/bench/ipc.h"
#include "tools/bench/share.h"
#include "tools/bench/tiers.h"

#include <cblas.h>
#include <stdio.h>
#include <string.h>

struct command {
	const char *name;
	const char *arguments;
	const char *help;
	int (*run)(int argc, char **argv);
};

static const struct command commands[] = {
	{"check-gate", "FILE", "scores of a gate against the true values in FILE", bench_check_gate},
	{"check-prefill", "FILE", "prefill eviction against the masks in FILE", bench_check_prefill},
	{"check-decode", "FILE", "decode eviction against the held positions in FILE", bench_check_decode},
	{"ipc", "--socket S [--json]", "round trips through the rings, with 10 and 10,000 idle sequences", bench_ipc},
	{"share", "[--processes N] ...", "one published context for many processes: bytes, and the time of an attach",
		bench_share},
	{"gpu", "[--json F] [--only P]", "the kernels of the kind cuda, next to the machine's floor and to rivals",
		bench_gpu},
	{"churn", "[--kind K] ...", "workers of three tenants at random at 95% of a pool, every byte checked",
		bench_churn},
	{"insitu", "[--sequences N] ...", "what scoring and eviction cost a worker that decodes", bench_insitu},
	{"timeline", "[--json F] [--svg F]", "that a worker's stream meets its evictions without its CPU",
		bench_timeline},
	{"tiers", "[--kind K] ...", "what moves between the tiers, and sharing contexts, cost a worker", bench_tiers},
	{"engines", "[--part P] ...", "transformers on kvgate, beside its own cache and masks (PyTorch)",
		bench_engines},
};

#define COMMANDS (sizeof(commands) / sizeof(*commands))

static void print_usage(FILE *stream)
{
	(void)fprintf(stream, "usage: kvgate-bench COMMAND ...\n");
	for (size_t i = 0; i < COMMANDS; i++)
		(void)fprintf(stream, "  %-14s %-21s %s\n", commands[i].name, commands[i].arguments, commands[i].help);
}

int main(int argc, char **argv)
{
	if (argc >= 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
		print_usage(stdout);
		return BENCH_OK;
	}
	openblas_set_num_threads(1);
	for (size_t i = 0; argc >= 2 && i < COMMANDS; i++)
		if (strcmp(argv[1], commands[i].name) == 0)
			return commands[i].run(argc - 1, argv + 1);
	if (argc >= 2)
		(void)fprintf(stderr, "kvgate-bench: no command '%s'\n", argv[1]);
	print_usage(stderr);
	return BENCH_USAGE;
}
