/*
 * gpu.h - what the rows of `kvgate-bench gpu` share: the device, timing by events, and the table of results.
 *
 * A row is one piece of work with our time, the floor that this machine allows (from bytes or operations
 * and the rates measured in the same run) and a rival's time measured in the same run, where there is one.
 * One thread, one stream; the device's context is current.
 */
#ifndef KVG_BENCH_GPU_H
#define KVG_BENCH_GPU_H

#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>

#include "kernels/cuda/device.h"

struct gpu_noise;

struct gpu_bench {
	struct kvg_cuda *cuda;
	CUstream stream;
	json_t *rows;       /* array of what gpu_row() was given */
	double copy_rate;   /* bytes read plus written a second, of a large copy in device memory: measured first */
	double matrix_rate; /* bf16 operations a second, of a large matrix product: measured first; 0: no cuBLASLt */
	double to_host_rate, from_host_rate; /* bytes a second of large copies to and from pinned memory */
	double idle_us;                      /* between two events with nothing in between: part of every time below */
	bool failed;
	bool lost;         /* the context is: nothing more can be measured */
	const char *only;  /* the beginning of the ids that are wanted, or NULL */
	FILE *table;       /* where rows are printed, or NULL */
	CUdeviceptr pause; /* gives the device something to do while work is enqueued */
	struct gpu_noise *noise;
};

/*
 * Enqueues the work once on the stream. turn counts repetitions, so that inputs can rotate past the cache: with
 * `turn % n` as the input of n equal ones that together are larger than the cache.
 */
typedef CUresult (*gpu_work)(void *user, CUstream stream, unsigned turn);

#define GPU_GRAPHS 4u

/*
 * Median microseconds of the work over at least 30 repetitions and 100 ms (at most 1000, or half a second), each
 * between two events, after a warm-up and behind a pause of the device in which the work is enqueued. graph: the work
 * is captured GPU_GRAPHS times (turns 0 to GPU_GRAPHS - 1) and the graphs are replayed in turn, so that the gaps
 * between launches do not count. Negative and bench->failed when a call fails (said on stderr).
 */
double gpu_time(struct gpu_bench *bench, gpu_work work, void *user, bool graph);

struct gpu_row {
	const char *id;           /* "gate-hidden-16000": stable, for charts and for merging with rivals' results */
	const char *work;         /* what is done, with its sizes */
	double us;                /* our median; negative: it failed, and there is no row */
	double floor_us;          /* 0: none */
	const char *floor;        /* what the floor counts */
	double rival_us;          /* 0: measured by tools/rivals, merged by id */
	const char *rival;        /* its name, or NULL */
	double first_us, then_us; /* absolute bars, at most; 0: none */
	double first_ratio, then_ratio; /* bars of ours / rival, at most, or with ratio_of_floor of floor / ours, at
					   least; 0: none */
	bool ratio_of_floor;
	double rate; /* bytes a second where that is the figure; 0: none */
};

/* Whether that row is wanted: a family may skip what it takes to measure one that is not. */
bool gpu_wants(const struct gpu_bench *bench, const char *id);

/* Prints a row and keeps it for the JSON. The strings are copied. Rows that are not wanted are dropped. */
void gpu_row(struct gpu_bench *bench, const struct gpu_row *row);

/* Device memory filled with pseudo-random bf16 numbers of that deviation (0: raw random bytes), other ones in each
 * call. 0 and bench->failed on failure. */
CUdeviceptr gpu_random(struct gpu_bench *bench, size_t bytes, float deviation);
CUdeviceptr gpu_alloc(struct gpu_bench *bench, size_t bytes);
void gpu_free(struct gpu_bench *bench, CUdeviceptr at);

/* Says what failed and sets bench->failed. True when result is an error. */
bool gpu_check(struct gpu_bench *bench, CUresult result, const char *what);

/* The families; each measures its rows. */
void gpu_bench_gate(struct gpu_bench *bench);
void gpu_bench_select(struct gpu_bench *bench);
void gpu_bench_evict(struct gpu_bench *bench);
void gpu_bench_copy(struct gpu_bench *bench);
void gpu_bench_attention(struct gpu_bench *bench);

/* For gpu.c: the rates of the machine, the report, and what the helpers above keep. */
void gpu_measure_rates(struct gpu_bench *bench);
void gpu_print_head(const struct gpu_bench *bench);
int gpu_write_json(const struct gpu_bench *bench, const char *path, bool failed);
void gpu_release_memory(struct gpu_bench *bench); /* the pause and the noise */

#endif
