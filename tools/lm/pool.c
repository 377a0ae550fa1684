#include "tools/lm/pool.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#define SPIN_ROUNDS 2000u

/*
 * ticket = round << 32 | tasks not yet taken. A task is taken by a compare-and-swap
 * that lowers it, so fn and user, read before it, belong to that round: they only
 * change while nothing is left to take and all that was taken is done.
 */
struct lm_pool {
	_Alignas(64) _Atomic uint64_t ticket;
	_Alignas(64) atomic_size_t left; /* tasks not yet done */
	void (*_Atomic fn)(void *user, size_t task);
	void *_Atomic user;
	_Alignas(64) atomic_uint sleepers;
	atomic_bool stop;
	pthread_mutex_t lock;
	pthread_cond_t wake, done;
	unsigned threads, started;
	pthread_t ids[];
};

static void relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

static bool nothing_to_take(struct lm_pool *pool)
{
	return (uint32_t)atomic_load(&pool->ticket) == 0;
}

/* Takes and runs one task. False when none was left. */
static bool run_one(struct lm_pool *pool)
{
	uint64_t ticket = atomic_load(&pool->ticket);

	while ((uint32_t)ticket > 0) {
		void (*fn)(void *user, size_t task) = atomic_load_explicit(&pool->fn, memory_order_relaxed);
		void *user = atomic_load_explicit(&pool->user, memory_order_relaxed);

		if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket - 1))
			continue;
		fn(user, (uint32_t)ticket - 1);
		if (atomic_fetch_sub(&pool->left, 1) == 1) {
			(void)pthread_mutex_lock(&pool->lock);
			(void)pthread_cond_signal(&pool->done);
			(void)pthread_mutex_unlock(&pool->lock);
		}
		return true;
	}
	return false;
}

static void sleep_until_work(struct lm_pool *pool)
{
	(void)pthread_mutex_lock(&pool->lock);
	atomic_fetch_add(&pool->sleepers, 1);
	while (nothing_to_take(pool) && !atomic_load(&pool->stop))
		(void)pthread_cond_wait(&pool->wake, &pool->lock);
	atomic_fetch_sub(&pool->sleepers, 1);
	(void)pthread_mutex_unlock(&pool->lock);
}

static void *thread_main(void *user)
{
	struct lm_pool *pool = user;

	while (!atomic_load(&pool->stop)) {
		unsigned spins = 0;

		while (run_one(pool))
			;
		while (spins < SPIN_ROUNDS && nothing_to_take(pool)) {
			relax();
			spins++;
		}
		if (spins == SPIN_ROUNDS)
			sleep_until_work(pool);
	}
	return NULL;
}

static int start_threads(struct lm_pool *pool)
{
	sigset_t all, before;
	int r = 0;

	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	while (pool->started < pool->threads - 1 && r == 0) {
		r = pthread_create(&pool->ids[pool->started], NULL, thread_main, pool);
		if (r == 0)
			pool->started++;
	}
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -r;
}

int lm_pool_new(unsigned threads, struct lm_pool **ret)
{
	struct lm_pool *pool;
	size_t size;
	int r;

	if (threads < 1 || threads > LM_POOL_MAX_THREADS)
		return -EINVAL;
	size = (sizeof(*pool) + threads * sizeof(pthread_t) + 63) & ~(size_t)63;
	pool = aligned_alloc(64, size);
	if (!pool)
		return -ENOMEM;
	*pool = (struct lm_pool){.threads = threads};
	(void)pthread_mutex_init(&pool->lock, NULL);
	(void)pthread_cond_init(&pool->wake, NULL);
	(void)pthread_cond_init(&pool->done, NULL);
	r = start_threads(pool);
	if (r < 0) {
		(void)lm_pool_free(pool);
		return r;
	}
	*ret = pool;
	return 0;
}

struct lm_pool *lm_pool_free(struct lm_pool *pool)
{
	if (!pool)
		return NULL;
	(void)pthread_mutex_lock(&pool->lock);
	atomic_store(&pool->stop, true);
	(void)pthread_cond_broadcast(&pool->wake);
	(void)pthread_mutex_unlock(&pool->lock);
	for (unsigned i = 0; i < pool->started; i++)
		(void)pthread_join(pool->ids[i], NULL);
	(void)pthread_cond_destroy(&pool->done);
	(void)pthread_cond_destroy(&pool->wake);
	(void)pthread_mutex_destroy(&pool->lock);
	free(pool);
	return NULL;
}

unsigned lm_pool_threads(const struct lm_pool *pool)
{
	return pool->threads;
}

static void wait_done(struct lm_pool *pool)
{
	for (unsigned spins = 0; spins < SPIN_ROUNDS; spins++) {
		if (atomic_load(&pool->left) == 0)
			return;
		relax();
	}
	(void)pthread_mutex_lock(&pool->lock);
	while (atomic_load(&pool->left) > 0)
		(void)pthread_cond_wait(&pool->done, &pool->lock);
	(void)pthread_mutex_unlock(&pool->lock);
}

void lm_pool_run(struct lm_pool *pool, size_t count, void (*fn)(void *user, size_t task), void *user)
{
	uint64_t round = (atomic_load(&pool->ticket) >> 32) + 1;

	if (count < 2 || pool->threads == 1) {
		for (size_t i = 0; i < count; i++)
			fn(user, i);
		return;
	}
	atomic_store_explicit(&pool->fn, fn, memory_order_relaxed);
	atomic_store_explicit(&pool->user, user, memory_order_relaxed);
	atomic_store(&pool->left, count);
	atomic_store(&pool->ticket, round << 32 | count);
	if (atomic_load(&pool->sleepers) > 0) {
		(void)pthread_mutex_lock(&pool->lock);
		(void)pthread_cond_broadcast(&pool->wake);
		(void)pthread_mutex_unlock(&pool->lock);
	}
	while (run_one(pool))
		;
	wait_done(pool);
}
