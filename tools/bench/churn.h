/*
 * churn.h - kvgate-bench churn: eight worker processes of three tenants reserve, write, evict and free at random, at
 * 95% of the pool, and look at every byte.
 *
 * The parent (churn.c) runs the daemon, says through shared memory how full the pool is and how full it
 * should be, and audits; the workers (churn_worker.c) do the rest. No process but the workers touches the device.
 */
#ifndef KVG_BENCH_CHURN_H
#define KVG_BENCH_CHURN_H

#include <stdbool.h>
#include <stdint.h>

#include "tools/bench/service.h"

#define CHURN_WORKERS 8u
#define CHURN_TENANTS 3u

/* What all workers do; the parent says when the next one begins. */
enum churn_phase {
	CHURN_CONNECT, /* and register */
	CHURN_BEFORE,  /* look how much memory the device has */
	CHURN_LOAD,    /* at random, towards `target`, until the phase changes */
	CHURN_DRAIN,   /* check and free everything */
	CHURN_AFTER,   /* look again */
	CHURN_END,     /* close the connection */
};

struct churn_counts {
	uint64_t operations, sequences, tokens, evictions, decode_evictions, truncates, checks, bytes_checked, refusals;
	uint64_t pairs_dropped;
	uint64_t wrong; /* words, pairs and rows that were not as they must be */
	/* Free bytes of the device, on cuda: before the first sequence and after the last. */
	uint64_t free_before, free_after;
};

/* Between the parent and the workers. Each word has one writer. */
struct churn_shared {
	uint64_t charged, target;     /* bytes of the pool; the parent's */
	uint32_t phase;               /* the parent's */
	uint32_t done[CHURN_WORKERS]; /* each worker's: the phases that it has done */
	struct churn_counts counts[CHURN_WORKERS];
};

struct churn_options {
	bool cuda;
	int device;
	double seconds;
	uint64_t pool, seed;
};

/* One worker, in a process of its own; returns its exit status. */
int churn_worker(const struct service *service, const struct churn_options *options, struct churn_shared *shared,
	unsigned number);

/* The command. */
int bench_churn(int argc, char **argv);

#endif
