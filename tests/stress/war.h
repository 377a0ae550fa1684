/*
 * war.h - the parent's side: a daemon with three tenants, seats in which workers sit, die and are replaced, and a
 * clock by which it looks at the daemon.
 */
#ifndef KVG_STRESS_WAR_H
#define KVG_STRESS_WAR_H

#include "tests/stress/observe.h"
#include "tests/stress/stress.h"
#include "tests/support/daemon.h"

#define WAR_SAMPLE_NS 10000000ull

struct war {
	const struct stress_options *options;
	struct fixture fixture;
	struct observer observer;
	struct stress_shared *shared;
	uint64_t random, spawned_number;
	uint64_t next_sample_ns, next_audit_ns, next_kill_ns;
	bool kills;
	uint64_t spawned[KIND_COUNT];
	uint64_t killed, killed_themselves; /* by the parent, and by their own timers */
	uint64_t died_in[OP_COUNT + 1];     /* what they were doing: enum stress_op + 1 */
	double seconds;                     /* that the war took */
};

/* Starts the daemon: max 40% and min 30% of the pool for each tenant. */
void war_open(struct war *war, const struct stress_options *options);
void war_close(struct war *war);

/* Puts the workers of a tenant in their seats, one that behaves badly among them. */
void war_enlist(struct war *war, unsigned tenant);

/* Puts one worker in a seat. */
void war_seat(struct war *war, unsigned seat, unsigned tenant, enum stress_kind kind);

/* Samples, audits, kills and replaces until a time of CLOCK_MONOTONIC. */
void war_wage(struct war *war, uint64_t end_ns);

/* Tells all workers to end, waits for them, and looks at what is left. */
void war_end(struct war *war);

/* The whole of it, and its report. */
void war_run(const struct stress_options *options);

/* Steps of a steady worker of the first tenant, alone and beside the war of the others, and their report. */
void share_run(const struct stress_options *options);

#endif
