/*
 * stress.h - what the processes of the stress test share: the parent, which starts the daemon, kills workers and
 * watches, and its workers.
 *
 * The shared part is mapped before the first fork. A worker writes only what belongs to its own seat, and the contexts
 * of its tenant; a worker may die between any two writes.
 */
#ifndef KVG_STRESS_H
#define KVG_STRESS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "client/kvgate.h"

#define STRESS_TENANTS   3u
#define STRESS_SEATS     18u /* processes at once */
#define STRESS_TOKENS    2048u
#define STRESS_ROWS      16u /* at most, of any tenant's model */
#define STRESS_CONTEXTS  64u /* of a tenant, remembered at once */
#define STRESS_TEXT      300u
#define STRESS_PATH      256u
#define STRESS_LATENCIES 65536u

enum stress_op {
	OP_CONNECT,
	OP_REGISTER,
	OP_CREATE,
	OP_RESERVE,
	OP_STAGE,
	OP_COMMIT,
	OP_EVICT,
	OP_DECODE_EVICT,
	OP_TRUNCATE,
	OP_PROTECT,
	OP_FREE,
	OP_OFFLOAD,
	OP_RESTORE,
	OP_IDLE,
	OP_RECALL,
	OP_PUBLISH,
	OP_FIND,
	OP_ATTACH,
	OP_FORK,
	OP_CLOSE,
	OP_COUNT,
};

const char *stress_op_name(enum stress_op op);

enum stress_kind {
	KIND_GOOD,
	KIND_MUTE,   /* does not acknowledge that it was asked to unmap */
	KIND_DEAF,   /* takes what it gets and ignores pressure */
	KIND_HASTY,  /* goes at once, at some point of the beginning */
	KIND_STEADY, /* the same work all the time, measured */
	KIND_COUNT,
};

struct stress_answers {
	uint64_t done, refused /* -ENOSPC */, declined /* what the daemon may say no to */;
};

struct stress_counts {
	struct stress_answers op[OP_COUNT];
	uint64_t tokens, checks, bytes_checked, pairs_dropped, pairs_recalled, disconnected;
	uint64_t refused_ns, refused_longest_ns; /* until a refusal came */
};

/* One measured call. */
struct stress_latency {
	uint32_t op, ns;
};

/* A place for a worker process, one after the other. */
struct stress_seat {
	pid_t pid; /* 0: empty */
	uint32_t tenant, kind;
	uint64_t seed;               /* of the worker that sits there */
	uint32_t op;                 /* what it is doing: enum stress_op + 1, 0: nothing of the daemon's */
	uint32_t armed;              /* it has set its own death: enum stress_op + 1 */
	struct stress_counts counts; /* of all that sat there */
	char text[STRESS_TEXT];      /* last refusal, or what the daemon said at the end */
	/* KIND_STEADY */
	uint64_t steps, tokens, cpu_ns, wait_ns, wall_ns;
	uint32_t latency_count;
};

/*
 * What a published context holds, written before it is published. version: odd while it is written; an
 * entry is taken again when STRESS_CONTEXTS newer ones have been.
 */
struct stress_context {
	uint64_t version;
	uint64_t number;
	uint32_t tokens;
	uint32_t tag[STRESS_TOKENS];
	uint32_t held[STRESS_ROWS][STRESS_TOKENS / 32];
};

struct stress_shared {
	uint32_t ending;            /* workers come to their end */
	uint32_t unknown[OP_COUNT]; /* the daemon does not know the operation */
	uint64_t next_context[STRESS_TENANTS];
	struct stress_seat seats[STRESS_SEATS];
	struct stress_context contexts[STRESS_TENANTS][STRESS_CONTEXTS];
	struct stress_latency latencies[STRESS_LATENCIES]; /* of the one steady worker */
};

struct stress_options {
	uint64_t seed, pool, pace_us;
	uint64_t step_us; /* of the steady worker: what a token takes on its device, the calls aside */
	double seconds;
	unsigned workers; /* good ones, of each tenant */
	unsigned rounds;  /* of the comparison */
	const char *json; /* NULL: standard output */
};

/* What a worker is told. */
struct stress_task {
	const struct stress_options *options;
	struct stress_shared *shared;
	struct stress_seat *seat;
	char socket[STRESS_PATH]; /* of its tenant */
	uint64_t min;             /* of its tenant; 0: none */
	bool mortal;              /* may die by its own hand */
};

/* A worker's main program: its exit status. 0: it came to its end; 1: it found something, and said what. */
int stress_worker(struct stress_task *task);
int stress_bad(struct stress_task *task);
int stress_steady(struct stress_task *task);

/* The model of a tenant. */
void stress_layout(struct kvg_layout *layout, unsigned tenant);

/* A reproducible series, as is its use with bounds. */
uint64_t stress_random(uint64_t *state);
uint32_t stress_between(uint64_t *state, uint32_t low, uint32_t high);

uint64_t stress_now_ns(void);

/* Sleeps until a time of CLOCK_MONOTONIC. */
void stress_sleep_until(uint64_t ns);

#endif
