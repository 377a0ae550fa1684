/*
 * turns.h - how long copies share the executor: however many jobs there are, one slice of time is all that they have
 * together in a pass over its polled jobs. When it is used up, those that come later queue up; next is the tenant whose
 * last turn is longest ago, and of its jobs the one whose last turn is.
 *
 * All of it is the executor's.
 */
#ifndef KVG_TURNS_H
#define KVG_TURNS_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/memory/meta.h"

/* One job's. */
struct turn {
	uint32_t tenant; /* index */
	uint64_t begun_ns;
};

struct turns {
	const struct turn *last, *waiting;  /* who had the last turn; who is next */
	uint64_t end_ns, used_ns;           /* when it ended, and how long those of its pass took */
	uint64_t tenants[META_MAX_TENANTS]; /* when each had its last */
};

/* Whether the job has a turn now. If so, turns_end() comes after it. slice_ns: see executor_slice(). */
bool turns_begin(struct turns *turns, struct turn *turn, uint64_t now, uint64_t slice_ns);

/* Whether the turn that was begun has lasted as long as it may. */
bool turns_over(const struct turn *turn, uint64_t now, uint64_t slice_ns);

void turns_end(struct turns *turns, struct turn *turn, uint64_t now);

/* The job goes: nobody waits for it. Before the turn's memory goes, whatever became of it. */
void turns_leave(struct turns *turns, const struct turn *turn);

#endif
