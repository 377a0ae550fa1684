/* kvgate-bench insitu and timeline of a build without the kind cuda. */
#include "tools/bench/bench.h"
#include "tools/bench/insitu.h"

#include <stdio.h>

static int skip(const char *command)
{
	(void)fprintf(stderr,
		"kvgate-bench: %s: built without the kind cuda: there was no CUDA toolkit, or KVG_CUDA was OFF\n",
		command);
	return BENCH_SKIP;
}

int bench_insitu(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	return skip("insitu");
}

int bench_timeline(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	return skip("timeline");
}
