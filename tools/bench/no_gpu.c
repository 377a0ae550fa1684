/* kvgate-bench gpu of a build without the kind cuda. */
#include "tools/bench/bench.h"

#include <stdio.h>

int bench_gpu(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	(void)fprintf(stderr,
		"kvgate-bench: gpu: built without the kind cuda: there was no CUDA toolkit, or KVG_CUDA was OFF\n");
	return BENCH_SKIP;
}
