#include "daemon/loop/executor.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "daemon/base/relax.h"

#define EXECUTOR_SPIN_NS 50000u /* at most */

/* While jobs are polled: spinning since the last event, and naps after that, each longer than the last. */
#define POLL_SPIN_NS 100000
#define NAP_MIN_NS   5000
#define NAP_MAX_NS   50000
#define NAP_SLACK_NS 1000  /* how late the kernel may end a nap */
#define POLL_GAP_NS  20000 /* between polls while other jobs run */

/* Of work in pieces, when nobody waits and when somebody does. */
#define SLICE_NS        500000u
#define SLICE_WANTED_NS 50000u

#define BUSY_NS 2000000u /* after a job, more may come: those of one request do */

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
	_Atomic uint64_t spin_ns;
	_Atomic uint64_t looks, sleeps; /* for executor_idle(); the thread alone writes them */
	/* The thread's: */
	bool more;        /* it has taken jobs that it has not begun */
	unsigned polling; /* jobs that it asks again and again and that are not background work */
	uint64_t busy_ns; /* when the last job that is not ended */
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

static void count(_Atomic uint64_t *counter)
{
	atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1, memory_order_release);
}

static struct job *look_for_jobs(struct executor *executor)
{
	struct job *jobs = stack_take(&executor->inbox);

	if (!jobs)
		count(&executor->looks);
	return jobs;
}

static struct job *spin_for_jobs(struct executor *executor)
{
	const uint64_t spin_ns = atomic_load_explicit(&executor->spin_ns, memory_order_relaxed);
	const uint64_t until = spin_ns ? loop_now() + spin_ns : 0;
	struct job *jobs;

	while (!(jobs = look_for_jobs(executor)) && until && loop_now() < until)
		cpu_relax();
	return jobs;
}

static struct timespec timespec_of(uint64_t ns)
{
	return (struct timespec){.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
}

/* Sleeps until a job is submitted, the thread is to end, or `until` has come (UINT64_MAX: never). */
static void sleep_until(struct executor *executor, uint64_t until)
{
	const struct timespec time = timespec_of(until);
	int r = 0;

	pthread_mutex_lock(&executor->lock);
	atomic_store(&executor->inbox.sleeping, true);
	while (r == 0 && !executor->stop && !atomic_load(&executor->inbox.top))
		r = until == UINT64_MAX ? pthread_cond_wait(&executor->wake, &executor->lock)
					: pthread_cond_timedwait(&executor->wake, &executor->lock, &time);
	atomic_store(&executor->inbox.sleeping, false);
	pthread_mutex_unlock(&executor->lock);
}

/* NULL when the thread is to end. */
static struct job *wait_for_jobs(struct executor *executor)
{
	struct job *jobs = spin_for_jobs(executor);

	if (jobs)
		return jobs;
	count(&executor->sleeps);
	sleep_until(executor, UINT64_MAX);
	return stack_take(&executor->inbox);
}

/* ---- the thread ---- */

/* Jobs whose run() is over and whose work is not, in the order in which they ran. */
struct polled {
	struct job *first, **end;
	uint64_t last_ns;  /* when they were polled */
	uint64_t event_ns; /* when one was submitted or ended */
	uint64_t nap_ns;
};

static void finish(struct executor *executor, struct job *job)
{
	stack_push(&executor->done, job);
	if (atomic_exchange(&executor->done.sleeping, false))
		(void)eventfd_write(executor->event_fd, 1);
}

static void job_ended(struct executor *executor, const struct job *job)
{
	if (!job->background)
		executor->busy_ns = loop_now();
}

static void poll_jobs(struct executor *executor, struct polled *polled)
{
	struct job **at = &polled->first, *job;
	const uint64_t begun = loop_now();
	bool any = false;

	while ((job = *at)) {
		if (!job->poll(job)) {
			at = &job->next;
			continue;
		}
		*at = job->next;
		executor->polling -= !job->background;
		job_ended(executor, job);
		finish(executor, job);
		any = true;
	}
	polled->end = at;
	polled->last_ns = loop_now();
	if (any || polled->last_ns - begun > POLL_SPIN_NS) { /* work is done in polls as well */
		polled->event_ns = polled->last_ns;
		polled->nap_ns = NAP_MIN_NS;
	}
}

static void run_job(struct executor *executor, struct polled *polled, struct job *job)
{
	job->run(job);
	if (!job->poll) {
		job_ended(executor, job);
		finish(executor, job);
		return;
	}
	job->next = NULL;
	executor->polling += !job->background;
	*polled->end = job;
	polled->end = &job->next;
	polled->event_ns = loop_now();
	polled->nap_ns = NAP_MIN_NS;
}

/* Nothing was submitted: polled jobs are asked again after a moment. */
static void pause_between_polls(struct executor *executor, struct polled *polled)
{
	uint64_t now = loop_now();

	if (now - polled->event_ns < POLL_SPIN_NS) {
		cpu_relax();
		return;
	}
	sleep_until(executor, now + polled->nap_ns);
	polled->nap_ns = polled->nap_ns * 2 < NAP_MAX_NS ? polled->nap_ns * 2 : NAP_MAX_NS;
}

static void *executor_main(void *arg)
{
	struct executor *executor = arg;
	struct polled polled = {.end = &polled.first, .nap_ns = NAP_MIN_NS};
	struct job *job, *next;

	(void)prctl(PR_SET_TIMERSLACK, NAP_SLACK_NS, 0, 0, 0);
	while ((job = polled.first ? stack_take(&executor->inbox) : wait_for_jobs(executor)) || polled.first) {
		if (!job)
			pause_between_polls(executor, &polled);
		for (; job; job = next) {
			next = job->next;
			executor->more = next;
			run_job(executor, &polled, job);
			if (polled.first && loop_now() - polled.last_ns > POLL_GAP_NS)
				poll_jobs(executor, &polled);
		}
		poll_jobs(executor, &polled);
	}
	return NULL;
}

/* ---- the reactor ---- */

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

static void init_lock(struct executor *executor)
{
	pthread_condattr_t attributes;

	(void)pthread_mutex_init(&executor->lock, NULL);
	(void)pthread_condattr_init(&attributes);
	(void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC); /* that of loop_now() */
	(void)pthread_cond_init(&executor->wake, &attributes);
	(void)pthread_condattr_destroy(&attributes);
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
	init_lock(executor);
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

void executor_set_spin(struct executor *executor, uint64_t spin_ns)
{
	atomic_store_explicit(
		&executor->spin_ns, spin_ns < EXECUTOR_SPIN_NS ? spin_ns : EXECUTOR_SPIN_NS, memory_order_relaxed);
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

static bool has_waiting(const struct executor *executor)
{
	return executor->more || atomic_load_explicit(&executor->inbox.top, memory_order_relaxed);
}

uint64_t executor_slice(const struct executor *executor)
{
	return has_waiting(executor) ? SLICE_WANTED_NS : SLICE_NS;
}

bool executor_is_busy(const struct executor *executor)
{
	return executor->polling || has_waiting(executor) || loop_now() - executor->busy_ns < BUSY_NS;
}

struct executor_idle executor_idle(const struct executor *executor)
{
	/* In this order: a sleep that is seen comes with its looks, or with more. */
	uint64_t sleeps = atomic_load_explicit(&executor->sleeps, memory_order_acquire);

	return (struct executor_idle){
		.looks = atomic_load_explicit(&executor->looks, memory_order_relaxed), .sleeps = sleeps};
}

unsigned executor_pending(const struct executor *executor)
{
	return executor->pending;
}
