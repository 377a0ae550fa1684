/*
 * insitu_run.h - the state of one run of `kvgate-bench insitu`, and its rounds (insitu_rounds.c): decoding without and
 * with scoring and eviction.
 */
#ifndef KVG_BENCH_INSITU_RUN_H
#define KVG_BENCH_INSITU_RUN_H

#include "tools/bench/insitu_neighbour.h"
#include "tools/bench/insitu_worker.h"

#define INSITU_EVENT      128u  /* tokens between a sequence's evictions */
#define INSITU_BUDGET     2048u /* pairs of a head, on average, where nothing is said */
#define INSITU_BUDGET_MAX 65536u
#define INSITU_SEQUENCES  256u /* at most */
#define INSITU_ROUNDS_MAX 64u

struct insitu_sequence {
	uint64_t seq;
	uint32_t pos;   /* committed tokens */
	uint32_t since; /* tokens since: on the device only */
	bool away;      /* it is evicted, and sits out */
	double left;    /* when that began */
};

struct insitu {
	struct rig rig;
	struct rig_options options;
	uint32_t rounds, events; /* a round has events * INSITU_EVENT steps */
	bool mps;
	uint32_t budget;
	bool transfers; /* rounds "with" have a neighbour that offloads and restores, and no scoring and eviction */
	struct neighbour neighbour;
	bool together; /* all sequences are evicted at the same step, which waits for them */
	struct insitu_sequence sequences[INSITU_SEQUENCES];
	CUdeviceptr slots; /* uint32 [sequences]; KVG_CUDA_NO_SLOT: sits out */
	CUdeviceptr rows;  /* for the gate: [sequences][layers][INSITU_EVENT][row_bytes] */
	uint32_t row_bytes;
	CUgraphExec graphs[2]; /* a step without and with gathering rows */
	CUevent step;          /* the end of the last step */

	double tokens[2][INSITU_ROUNDS_MAX];        /* a second */
	uint64_t pairs_dropped, evictions, sat_out; /* sat_out: steps of one sequence */
	double away_seconds;
};

/* Warms up and runs all rounds. 0, or a negative errno with a line on standard error. */
int insitu_rounds(struct insitu *s);

/* Sets the device's counter of one sequence's appended tokens. */
int insitu_set_counter(struct insitu *s, uint32_t sequence, uint32_t value);

static inline const struct kvg_cuda_driver *insitu_driver(const struct insitu *s)
{
	return s->rig.synthetic->cuda->driver;
}

#endif
