/*
 * pool.h - persistent threads that share the tasks of one parallel loop at a time.
 *
 * The calling thread works too, so a pool of one has no threads at all. Threads
 * spin for a moment after a loop, because a decoding step is dozens of short
 * loops in a row, and then sleep. A loop never waits for a thread that took no task.
 */
#ifndef KVG_LM_POOL_H
#define KVG_LM_POOL_H

#include <stddef.h>

#define LM_POOL_MAX_THREADS 256u

struct lm_pool;

/* Starts threads - 1 threads, all signals blocked in them. -EINVAL outside 1 .. LM_POOL_MAX_THREADS. */
int lm_pool_new(unsigned threads, struct lm_pool **ret);
struct lm_pool *lm_pool_free(struct lm_pool *pool); /* NULL is fine; returns NULL */
unsigned lm_pool_threads(const struct lm_pool *pool);

/*
 * Calls fn(user, task) once for each task below count (< 2^32), in any order, on any thread;
 * returns when all have returned. One caller at a time; fn does not call lm_pool_run().
 */
void lm_pool_run(struct lm_pool *pool, size_t count, void (*fn)(void *user, size_t task), void *user);

#endif
