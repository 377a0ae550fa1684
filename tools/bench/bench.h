/*
 * bench.h - the commands of kvgate-bench. Each gets its own name in argv[0] and
 * returns the exit status: 0 when it worked and everything holds, 1 when
 * something does not hold or a file is malformed, 2 for a usage error, 77 when the machine or the build
 * lacks what it measures.
 */
#ifndef KVG_BENCH_H
#define KVG_BENCH_H

#define BENCH_OK    0
#define BENCH_FAIL  1
#define BENCH_USAGE 2
#define BENCH_SKIP  77

int bench_check_gate(int argc, char **argv);
int bench_check_prefill(int argc, char **argv);
int bench_check_decode(int argc, char **argv);
int bench_gpu(int argc, char **argv);
int bench_engines(int argc, char **argv);

#endif
