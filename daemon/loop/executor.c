#include "daemon/loop/executor.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "daemon/base/relax.h"

/* Longer than the reactor needs between the short phases of one request. */
#define EXECUTOR_SPIN_NS 50000

/*
 * Two stacks carry jobs between the threads, each pushed by one side and emptied
 * by the other. A side that wants to sleep sets its flag and then looks once more;
 * the other pushes and then looks at the flag: in the one order of all these
 * operations at least one of the two sees the other.
 */
struct job_stack {
	_Atomic(struct job *) top;
	atomic_bool sleeping; /* the side that empties it */
};

struct executor {
	struct loop *loop;
	struct loop_watch *watch;
	int event_fd;
	unsigned pending; /* the reactor's */
	struct job_stack inbox;
	struct job_stack done;
	pthread_t thread;
	pthread_mutex_t lock; /* of stop, and of the executor's sleep */
	pthread_cond_t wake;
	bool stop;
};

static void stack_push(struct job_stack *stack, struct job *job)
{
	job->next = atomic_load_explicit(&stack->top, memory_order_relaxed);
	while (!atomic_compare_exchange_weak(&stack->top, &job->next, job))
		;
}

/* Everything on the stack, in the order of pushing; NULL when there is nothing. */
static struct job *stack_take(struct job_stack *stack)
{
	struct job *job, *first = NULL;

	if (!atomic_load_explicit(&stack->top, memory_order_relaxed))
		return NULL;
	job = atomic_exchange(&stack->top, NULL);
	while (job) {
		struct job *next = job->next;

		job->next = first;
		first = job;
		job = next;
	}
	return first;
}

static struct job *spin_for_jobs(struct executor *executor)
{
	const uint64_t until = loop_now() + EXECUTOR_SPIN_NS;
	struct job *jobs;

	while (!(jobs = stack_take(&executor->inbox)) && loop_now() < until)
		cpu_relax();
	return jobs;
}

/* NULL when the thread is to end. */
static struct job *wait_for_jobs(struct executor *executor)
{
	struct job *jobs = spin_for_jobs(executor);

	if (jobs)
		return jobs;
	pthread_mutex_lock(&executor->lock);
	atomic_store(&executor->inbox.sleeping, true);
	while (!executor->stop && !atomic_load(&executor->inbox.top))
		pthread_cond_wait(&executor->wake, &executor->lock);
	atomic_store(&executor->inbox.sleeping, false);
	pthread_mutex_unlock(&executor->lock);
	return stack_take(&executor->inbox);
}

static void *executor_main(void *arg)
{
	struct executor *executor = arg;
	struct job *job, *next;

	while ((job = wait_for_jobs(executor))) {
		for (; job; job = next) {
			next = job->next;
			job->run(job);
			stack_push(&executor->done, job);
			if (atomic_exchange(&executor->done.sleeping, false))
				(void)eventfd_write(executor->event_fd, 1);
		}
	}
	return NULL;
}

static bool executor_poll(void *user)
{
	struct executor *executor = user;
	struct job *job = stack_take(&executor->done), *next;
	bool any = job;

	for (; job; job = next) {
		next = job->next;
		executor->pending--;
		job->done(job);
	}
	return any;
}

static bool executor_sleep(void *user, bool going)
{
	struct executor *executor = user;

	atomic_store(&executor->done.sleeping, going);
	return going && atomic_load(&executor->done.top);
}

static const struct loop_poller_ops executor_poller = {.poll = executor_poll, .sleep = executor_sleep};

/* The poller, which the loop asks later in the same round, does the work. */
static void executor_woken(void *user, uint32_t revents)
{
	const struct executor *executor = user;
	eventfd_t value;

	(void)revents;
	(void)eventfd_read(executor->event_fd, &value);
}

static int start_thread(struct executor *executor)
{
	sigset_t all, before;
	int r;

	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	r = pthread_create(&executor->thread, NULL, executor_main, executor);
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (r == 0)
		(void)pthread_setname_np(executor->thread, "kvg-executor");
	return -r;
}

int executor_new(struct loop *loop, struct executor **ret)
{
	struct executor *executor = calloc(1, sizeof(*executor));
	int r;

	if (!executor)
		return -ENOMEM;
	executor->loop = loop;
	executor->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (executor->event_fd < 0) {
		r = -errno;
		goto fail;
	}
	r = loop_watch_new(loop, executor->event_fd, POLLIN, executor_woken, executor, &executor->watch);
	if (r < 0)
		goto fail_fd;
	r = loop_poller_add(loop, &executor_poller, executor);
	if (r < 0)
		goto fail_watch;
	(void)pthread_mutex_init(&executor->lock, NULL);
	(void)pthread_cond_init(&executor->wake, NULL);
	r = start_thread(executor);
	if (r < 0)
		goto fail_poller;
	*ret = executor;
	return 0;
fail_poller:
	(void)pthread_cond_destroy(&executor->wake);
	(void)pthread_mutex_destroy(&executor->lock);
	loop_poller_remove(loop, &executor_poller, executor);
fail_watch:
	(void)loop_watch_free(executor->watch);
fail_fd:
	(void)close(executor->event_fd);
fail:
	free(executor);
	return r;
}

/* The loop does not run meanwhile: this is its poller and its sleep in small. */
static void drain(struct executor *executor)
{
	struct pollfd event = {.fd = executor->event_fd, .events = POLLIN};

	while (executor->pending > 0) {
		if (executor_poll(executor))
			continue;
		if (!executor_sleep(executor, true))
			(void)poll(&event, 1, -1);
		(void)executor_sleep(executor, false);
		executor_woken(executor, 0);
	}
}

struct executor *executor_free(struct executor *executor)
{
	if (!executor)
		return NULL;
	drain(executor);
	pthread_mutex_lock(&executor->lock);
	executor->stop = true;
	pthread_cond_signal(&executor->wake);
	pthread_mutex_unlock(&executor->lock);
	(void)pthread_join(executor->thread, NULL);
	loop_poller_remove(executor->loop, &executor_poller, executor);
	(void)loop_watch_free(executor->watch);
	(void)close(executor->event_fd);
	(void)pthread_cond_destroy(&executor->wake);
	(void)pthread_mutex_destroy(&executor->lock);
	free(executor);
	return NULL;
}

void executor_submit(struct executor *executor, struct job *job)
{
	executor->pending++;
	stack_push(&executor->inbox, job);
	if (atomic_load(&executor->inbox.sleeping)) {
		pthread_mutex_lock(&executor->lock);
		pthread_cond_signal(&executor->wake);
		pthread_mutex_unlock(&executor->lock);
	}
}

unsigned executor_pending(const struct executor *executor)
{
	return executor->pending;
}
