/*
 * executor.h - one thread that does a device's long work (scores, moves,
 * creating and destroying extents), so that the reactor never waits for any.
 *
 * A job is embedded in its owner, which must outlive it. run() runs on the
 * executor, then done() on the reactor; jobs run one at a time in the order of
 * submission. Between submit and done() everything the job touches belongs to it.
 *
 * A job that only starts work, on a GPU for example, has a poll() too: after run() the executor calls it again and
 * again, between other jobs, until it returns true; then the job is done. Jobs with a poll() may overtake
 * each other and be overtaken. poll() does not wait. While jobs are polled the thread spins for a while after
 * each event and then naps; without any it sleeps until the next is submitted.
 */
#ifndef KVG_EXECUTOR_H
#define KVG_EXECUTOR_H

#include "daemon/loop/loop.h"

struct job {
	void (*run)(struct job *job);
	bool (*poll)(struct job *job); /* NULL: the work ends with run() */
	void (*done)(struct job *job);
	bool background;  /* has a poll(), which makes way for others: see executor_is_busy() */
	struct job *next; /* the executor's */
};

struct executor;

/* Starts the thread (all signals blocked in it) and adds its completions to the loop (a poller and an eventfd). */
int executor_new(struct loop *loop, struct executor **ret);

/* Waits for the queue to drain, polled jobs too, runs every done(), ends the thread. NULL is fine; returns NULL. */
struct executor *executor_free(struct executor *executor);

/*
 * How long (ns) the thread looks for jobs before it sleeps, 50 us at most: longer than the reactor needs between the
 * short phases of one request. 0, as at its start: not at all.
 */
void executor_set_spin(struct executor *executor, uint64_t spin_ns);

void executor_submit(struct executor *executor, struct job *job);

/*
 * How long (ns) work that is done in pieces, one a poll, may go on before it returns: half a millisecond, and a tenth
 * of that when other jobs wait. Pieces of the same sort share one slice in a pass over the polled jobs. On the
 * executor.
 */
uint64_t executor_slice(const struct executor *executor);

/* Whether there are jobs that are not background work, or were 2 ms ago. On the executor. */
bool executor_is_busy(const struct executor *executor);

/* What the thread does between jobs while it polls none: it looks for one, in vain, and then sleeps or looks again. */
struct executor_idle {
	uint64_t looks, sleeps;
};
struct executor_idle executor_idle(const struct executor *executor);

/* Jobs submitted and not yet done. */
unsigned executor_pending(const struct executor *executor);

#endif
