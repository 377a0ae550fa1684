#include "daemon/loop/loop.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "daemon/base/list.h"
#include "daemon/base/relax.h"

#define YIELD_AFTER_NS 2000u
#define SQ_ENTRIES     256
#define CQ_ENTRIES     4096
#define NS_PER_S       UINT64_C(1000000000)

/* Lives until the kernel's last completion for it, which may come after loop_watch_free(). */
struct loop_watch {
	struct loop *loop;
	struct list node; /* in again, or in dying */
	int fd;
	uint32_t events;
	uint32_t revents; /* of the last event */
	bool armed;       /* the kernel still owes a last completion */
	bool dead;
	loop_watch_cb cb;
	void *user;
};

struct loop_timer {
	struct loop *loop;
	struct list node; /* in timers while it is set */
	uint64_t deadline;
	loop_timer_cb cb;
	void *user;
};

struct poller {
	const struct loop_poller_ops *ops; /* NULL: removed */
	void *user;
};

struct loop {
	struct io_uring ring;
	struct list again;  /* watches to call in the next round */
	struct list dying;  /* freed watches that are still armed */
	struct list timers; /* by deadline */
	struct poller *pollers;
	size_t poller_count;
	uint64_t spin_ns;
	int error; /* of the ring; ends loop_run() */
	bool stop;
	int signal_fd;
	struct loop_watch *signal_watch;
	loop_signal_cb signal_cb;
	void *signal_user;
};

uint64_t loop_now(void)
{
	struct timespec ts;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

int loop_new(struct loop **ret)
{
	/* Without interrupts for events: the ring's flag tells a spinning reactor that an enter is due. */
	struct io_uring_params params = {
		.flags = IORING_SETUP_CQSIZE | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		.cq_entries = CQ_ENTRIES};
	struct loop *loop = calloc(1, sizeof(*loop));
	int r;

	if (!loop)
		return -ENOMEM;
	r = io_uring_queue_init_params(SQ_ENTRIES, &loop->ring, &params);
	if (r < 0) {
		free(loop);
		return r;
	}
	list_init(&loop->again);
	list_init(&loop->dying);
	list_init(&loop->timers);
	loop->signal_fd = -1;
	*ret = loop;
	return 0;
}

struct loop *loop_free(struct loop *loop)
{
	struct list *node, *next;

	if (!loop)
		return NULL;
	(void)loop_watch_free(loop->signal_watch);
	if (loop->signal_fd >= 0)
		(void)close(loop->signal_fd);
	io_uring_queue_exit(&loop->ring);
	for (node = loop->dying.next; node != &loop->dying; node = next) {
		next = node->next;
		free(list_entry(node, struct loop_watch, node));
	}
	free(loop->pollers);
	free(loop);
	return NULL;
}

/* Memory pressure and a full completion queue pass: what was not taken stays queued for the next round. */
static int ring_result(int r)
{
	return r >= 0 || r == -EAGAIN || r == -EBUSY || r == -EINTR || r == -ETIME ? 0 : r;
}

static void loop_submit(struct loop *loop)
{
	int r = io_uring_sq_ready(&loop->ring) ? ring_result(io_uring_submit(&loop->ring)) : 0;

	if (r < 0)
		loop->error = r;
}

/* NULL only when the ring is out of order. */
static struct io_uring_sqe *loop_sqe(struct loop *loop)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&loop->ring);

	if (!sqe) {
		loop_submit(loop);
		sqe = io_uring_get_sqe(&loop->ring);
	}
	if (!sqe && !loop->error)
		loop->error = -EBUSY;
	return sqe;
}

void loop_close_fd(struct loop *loop, int fd)
{
	struct io_uring_sqe *sqe = loop_sqe(loop);

	if (!sqe)
		return; /* the loop is about to end, and the process with it */
	io_uring_prep_close(sqe, fd);
	io_uring_sqe_set_data(sqe, NULL);
	loop_submit(loop);
}

static int watch_arm(struct loop_watch *watch)
{
	struct io_uring_sqe *sqe = loop_sqe(watch->loop);

	if (!sqe)
		return watch->loop->error;
	io_uring_prep_poll_multishot(sqe, watch->fd, watch->events);
	io_uring_sqe_set_data(sqe, watch);
	watch->armed = true;
	return 0;
}

int loop_watch_new(struct loop *loop, int fd, uint32_t events, loop_watch_cb cb, void *user, struct loop_watch **ret)
{
	struct loop_watch *watch;
	int r;

	if (fcntl(fd, F_GETFD) < 0)
		return -errno;
	watch = calloc(1, sizeof(*watch));
	if (!watch)
		return -ENOMEM;
	*watch = (struct loop_watch){.loop = loop, .fd = fd, .events = events, .cb = cb, .user = user};
	list_init(&watch->node);
	r = watch_arm(watch);
	if (r < 0) {
		free(watch);
		return r;
	}
	*ret = watch;
	return 0;
}

void loop_watch_again(struct loop_watch *watch)
{
	if (list_empty(&watch->node))
		list_add_tail(&watch->loop->again, &watch->node);
}

struct loop_watch *loop_watch_free(struct loop_watch *watch)
{
	struct io_uring_sqe *sqe;

	if (!watch)
		return NULL;
	list_remove(&watch->node);
	if (!watch->armed) {
		free(watch);
		return NULL;
	}
	watch->dead = true;
	list_add_tail(&watch->loop->dying, &watch->node);
	sqe = loop_sqe(watch->loop);
	if (!sqe)
		return NULL;
	/* A poll removal can miss an event in flight (-EALREADY) and leave the poll armed; a cancellation cannot. */
	io_uring_prep_cancel64(sqe, (uintptr_t)watch, 0);
	io_uring_sqe_set_data(sqe, NULL);
	/* At once, because an armed poll holds the file: closing would not hang up. */
	loop_submit(watch->loop);
	return NULL;
}

static void watch_complete(struct loop_watch *watch, int res, bool more)
{
	watch->armed = more;
	if (watch->dead) {
		if (!more) {
			list_remove(&watch->node);
			free(watch);
		}
		return;
	}
	watch->revents = res < 0 ? POLLERR : (uint32_t)res;
	if (!more && res >= 0)
		(void)watch_arm(watch);
	watch->cb(watch->user, watch->revents);
}

/* One queue's worth at most, so that a flood of events does not starve timers and pollers. */
static bool reap(struct loop *loop)
{
	struct io_uring_cqe *cqe;
	unsigned count;

	for (count = 0; count < CQ_ENTRIES && io_uring_peek_cqe(&loop->ring, &cqe) == 0; count++) {
		struct loop_watch *watch = io_uring_cqe_get_data(cqe);
		int res = cqe->res;
		bool more = cqe->flags & IORING_CQE_F_MORE;

		io_uring_cqe_seen(&loop->ring, cqe);
		if (watch)
			watch_complete(watch, res, more);
	}
	return count > 0;
}

static bool call_again(struct loop *loop)
{
	struct list now, *node;
	bool any = false;

	list_init(&now);
	while ((node = list_pop(&loop->again)))
		list_add_tail(&now, node);
	while ((node = list_pop(&now))) {
		struct loop_watch *watch = list_entry(node, struct loop_watch, node);

		watch->cb(watch->user, watch->revents ? watch->revents : watch->events);
		any = true;
	}
	return any;
}

int loop_timer_new(struct loop *loop, loop_timer_cb cb, void *user, struct loop_timer **ret)
{
	struct loop_timer *timer = calloc(1, sizeof(*timer));

	if (!timer)
		return -ENOMEM;
	*timer = (struct loop_timer){.loop = loop, .cb = cb, .user = user};
	list_init(&timer->node);
	*ret = timer;
	return 0;
}

void loop_timer_set(struct loop_timer *timer, uint64_t ns)
{
	struct list *at, *timers = &timer->loop->timers;
	uint64_t now;

	list_remove(&timer->node);
	if (ns == 0)
		return;
	now = loop_now();
	timer->deadline = ns < UINT64_MAX - now ? now + ns : UINT64_MAX;
	for (at = timers->prev; at != timers; at = at->prev)
		if (list_entry(at, struct loop_timer, node)->deadline <= timer->deadline)
			break;
	list_add_head(at, &timer->node);
}

struct loop_timer *loop_timer_free(struct loop_timer *timer)
{
	if (timer)
		list_remove(&timer->node);
	free(timer);
	return NULL;
}

static struct loop_timer *first_timer(struct loop *loop)
{
	return list_empty(&loop->timers) ? NULL : list_entry(loop->timers.next, struct loop_timer, node);
}

static bool fire_timers(struct loop *loop, uint64_t now)
{
	struct loop_timer *timer;
	bool any = false;

	while ((timer = first_timer(loop)) && timer->deadline <= now) {
		list_remove(&timer->node);
		timer->cb(timer->user);
		any = true;
	}
	return any;
}

static void signal_ready(void *user, uint32_t revents)
{
	struct loop *loop = user;
	struct signalfd_siginfo info;

	(void)revents;
	while (read(loop->signal_fd, &info, sizeof(info)) == sizeof(info))
		loop->signal_cb(loop->signal_user, (int)info.ssi_signo);
}

int loop_signals(struct loop *loop, const sigset_t *set, loop_signal_cb cb, void *user)
{
	int fd, r;

	if (loop->signal_fd >= 0)
		return -EEXIST;
	fd = signalfd(-1, set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (fd < 0)
		return -errno;
	r = loop_watch_new(loop, fd, POLLIN, signal_ready, loop, &loop->signal_watch);
	if (r < 0) {
		(void)close(fd);
		return r;
	}
	loop->signal_fd = fd;
	loop->signal_cb = cb;
	loop->signal_user = user;
	return 0;
}

int loop_poller_add(struct loop *loop, const struct loop_poller_ops *ops, void *user)
{
	struct poller *pollers = reallocarray(loop->pollers, loop->poller_count + 1, sizeof(*pollers));

	if (!pollers)
		return -ENOMEM;
	pollers[loop->poller_count++] = (struct poller){.ops = ops, .user = user};
	loop->pollers = pollers;
	return 0;
}

void loop_poller_remove(struct loop *loop, const struct loop_poller_ops *ops, const void *user)
{
	for (size_t i = 0; i < loop->poller_count; i++)
		if (loop->pollers[i].ops == ops && loop->pollers[i].user == user)
			loop->pollers[i].ops = NULL;
}

/* Between rounds, when no one walks the array. */
static void drop_removed_pollers(struct loop *loop)
{
	size_t kept = 0;

	for (size_t i = 0; i < loop->poller_count; i++)
		if (loop->pollers[i].ops)
			loop->pollers[kept++] = loop->pollers[i];
	loop->poller_count = kept;
}

static bool ask_pollers(struct loop *loop)
{
	bool any = false;

	/* A poller may add or remove some: neither the array nor its size is the same afterwards. */
	for (size_t i = 0; i < loop->poller_count; i++)
		if (loop->pollers[i].ops)
			any |= loop->pollers[i].ops->poll(loop->pollers[i].user);
	return any;
}

void loop_set_spin(struct loop *loop, uint64_t spin_ns)
{
	loop->spin_ns = spin_ns;
}

static int wait_for_event(struct loop *loop)
{
	const struct loop_timer *timer = first_timer(loop);
	struct __kernel_timespec ts = {0};
	struct io_uring_cqe *cqe;

	if (timer) {
		uint64_t now = loop_now();
		uint64_t left = timer->deadline > now ? timer->deadline - now : 0;

		if (left == 0)
			return 0;
		ts = (struct __kernel_timespec){
			.tv_sec = (long long)(left / NS_PER_S), .tv_nsec = (long long)(left % NS_PER_S)};
	}
	return ring_result(io_uring_submit_and_wait_timeout(&loop->ring, &cqe, 1, timer ? &ts : NULL, NULL));
}

static int loop_sleep(struct loop *loop)
{
	bool stay = false;
	size_t asked = 0;
	int r = 0;

	while (asked < loop->poller_count && !stay) {
		const struct poller *poller = &loop->pollers[asked++];

		if (poller->ops)
			stay = poller->ops->sleep(poller->user, true);
	}
	if (!stay && !loop->stop && !loop->error && list_empty(&loop->again))
		r = wait_for_event(loop);
	while (asked > 0) {
		const struct poller *poller = &loop->pollers[--asked];

		if (poller->ops)
			(void)poller->ops->sleep(poller->user, false);
	}
	return r;
}

static bool loop_round(struct loop *loop, uint64_t now)
{
	bool any;

	drop_removed_pollers(loop);
	loop_submit(loop);
	any = reap(loop);
	any |= call_again(loop);
	any |= fire_timers(loop, now);
	any |= ask_pollers(loop);
	return any || !list_empty(&loop->again);
}

/* A peer that spins for our answer may share this core: after the first moments others go first. */
static void relax(uint64_t spun_ns)
{
	if (spun_ns < YIELD_AFTER_NS)
		cpu_relax();
	else
		(void)sched_yield();
}

int loop_run(struct loop *loop)
{
	uint64_t now = loop_now(), worked = now;
	int r = 0;

	while (!loop->stop && !loop->error && r == 0) {
		if (loop_round(loop, now))
			worked = loop_now();
		else if (now - worked < loop->spin_ns)
			relax(now - worked);
		else
			r = loop_sleep(loop);
		now = loop_now();
	}
	loop->stop = false;
	return loop->error ? loop->error : r;
}

void loop_stop(struct loop *loop)
{
	loop->stop = true;
}
