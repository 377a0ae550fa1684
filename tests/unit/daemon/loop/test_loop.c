#include "daemon/loop/loop.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/support/runner.h"

#define MS UINT64_C(1000000)

static int loop_setup(void **state)
{
	return loop_new((struct loop **)state);
}

static int loop_teardown(void **state)
{
	*state = loop_free(*state);
	return 0;
}

static void stop_loop(void *user)
{
	loop_stop(user);
}

/* Runs the loop for a time, without any work of its own in it but the end. */
static void run_for(struct loop *loop, uint64_t ns)
{
	struct loop_timer *timer;

	assert_int_equal(loop_timer_new(loop, stop_loop, loop, &timer), 0);
	loop_timer_set(timer, ns);
	assert_int_equal(loop_run(loop), 0);
	(void)loop_timer_free(timer);
}

/* A watched descriptor that counts its events and stops the loop at the last. */
struct reader {
	struct loop *loop;
	struct loop_watch *watch;
	int fd;
	int calls;
	int last_call;
	uint32_t revents;
	bool drain;
	bool again;
};

static void reader_ready(void *user, uint32_t revents)
{
	struct reader *reader = user;
	char buffer[64];

	reader->calls++;
	reader->revents = revents;
	while (reader->drain && read(reader->fd, buffer, sizeof(buffer)) > 0)
		;
	if (reader->again)
		loop_watch_again(reader->watch);
	if (reader->calls >= reader->last_call)
		loop_stop(reader->loop);
}

static void reader_start(struct reader *reader)
{
	assert_int_equal(
		loop_watch_new(reader->loop, reader->fd, POLLIN | POLLRDHUP, reader_ready, reader, &reader->watch), 0);
}

static void make_pair(int fds[2])
{
	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
}

static void close_pair(const int fds[2])
{
	assert_int_equal(close(fds[0]), 0);
	assert_int_equal(close(fds[1]), 0);
}

static void test_watch(void **state)
{
	struct reader reader = {.loop = *state, .last_call = 1, .drain = true};
	int fds[2];

	make_pair(fds);
	reader.fd = fds[0];
	reader_start(&reader);
	for (int i = 1; i <= 3; i++) {
		assert_int_equal(write(fds[1], "x", 1), 1);
		assert_int_equal(loop_run(*state), 0);
		assert_true(reader.calls >= i);
		assert_int_equal(reader.revents & (POLLIN | POLLHUP), POLLIN);
		reader.last_call = reader.calls + 1;
	}
	assert_int_equal(shutdown(fds[1], SHUT_RDWR), 0);
	assert_int_equal(loop_run(*state), 0);
	assert_true(reader.revents & POLLRDHUP);
	(void)loop_watch_free(reader.watch);
	close_pair(fds);
}

/* What was ready before the watch began is reported too, and what is not read is not reported twice. */
static void test_edge(void **state)
{
	struct reader reader = {.loop = *state, .last_call = 1000};
	int fds[2];

	make_pair(fds);
	assert_int_equal(write(fds[1], "x", 1), 1);
	reader.fd = fds[0];
	reader_start(&reader);
	run_for(*state, 20 * MS);
	assert_int_equal(reader.calls, 1);
	assert_int_equal(write(fds[1], "x", 1), 1);
	run_for(*state, 20 * MS);
	assert_int_equal(reader.calls, 2);
	(void)loop_watch_free(reader.watch);
	close_pair(fds);
}

static void test_again(void **state)
{
	struct reader reader = {.loop = *state, .last_call = 10, .again = true};
	int fds[2];

	make_pair(fds);
	assert_int_equal(write(fds[1], "x", 1), 1);
	reader.fd = fds[0];
	reader_start(&reader);
	assert_int_equal(loop_run(*state), 0);
	assert_int_equal(reader.calls, 10);
	assert_int_equal(reader.revents, POLLIN);
	(void)loop_watch_free(reader.watch);
	run_for(*state, MS);
	assert_int_equal(reader.calls, 10);
	close_pair(fds);
}

static void test_bad_fd(void **state)
{
	struct loop_watch *watch = NULL;

	assert_int_equal(loop_watch_new(*state, 9999, POLLIN, reader_ready, NULL, &watch), -EBADF);
	assert_null(watch);
	assert_null(loop_watch_free(NULL));
	assert_null(loop_timer_free(NULL));
	assert_null(loop_free(NULL));
}

/* An armed poll holds the file; the peer must still see the hang-up, with no further round of the loop. */
static void test_close_hangs_up(void **state)
{
	struct reader reader = {.loop = *state, .last_call = 1, .drain = true};
	struct pollfd peer;
	int fds[2];

	make_pair(fds);
	reader.fd = fds[0];
	reader_start(&reader);
	assert_int_equal(write(fds[1], "x", 1), 1);
	assert_int_equal(loop_run(*state), 0);
	(void)loop_watch_free(reader.watch);
	assert_int_equal(close(fds[0]), 0);
	peer = (struct pollfd){.fd = fds[1], .events = POLLIN};
	assert_int_equal(poll(&peer, 1, 5000), 1);
	assert_true(peer.revents & POLLHUP);
	assert_int_equal(close(fds[1]), 0);
}

struct writer {
	struct loop *loop;
	int fd;
	int count;
};

static void write_many(void *user)
{
	const struct writer *writer = user;

	for (int i = 0; i < writer->count; i++)
		assert_int_equal(eventfd_write(writer->fd, 1), 0);
}

/* More events in one round than the completion queue holds. */
static void test_overflow(void **state)
{
	struct writer writer = {.loop = *state, .fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), .count = 20000};
	struct reader reader = {.loop = *state, .fd = writer.fd, .last_call = 1000000, .drain = true};
	struct loop_timer *timer;

	reader_start(&reader);
	assert_int_equal(loop_timer_new(*state, write_many, &writer, &timer), 0);
	loop_timer_set(timer, 1);
	run_for(*state, 100 * MS);
	assert_true(reader.calls >= 1);
	reader.last_call = reader.calls + 1;
	assert_int_equal(eventfd_write(reader.fd, 1), 0);
	assert_int_equal(loop_run(*state), 0);
	(void)loop_timer_free(timer);
	(void)loop_watch_free(reader.watch);
	assert_int_equal(close(writer.fd), 0);
}

/* Stress: callbacks write, free and make watches, their own included. */
#define SLOTS 48
#define STEPS 20000

struct stress {
	struct loop *loop;
	unsigned random;
	int steps;
	struct slot {
		struct stress *stress;
		struct loop_watch *watch;
		int fd;
	} slots[SLOTS];
};

static unsigned next_random(struct stress *stress)
{
	stress->random = stress->random * 1103515245u + 12345u;
	return stress->random >> 16;
}

static void slot_ready(void *user, uint32_t revents);

static void slot_open(struct slot *slot)
{
	slot->fd = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
	assert_true(slot->fd >= 0);
	assert_int_equal(loop_watch_new(slot->stress->loop, slot->fd, POLLIN, slot_ready, slot, &slot->watch), 0);
}

static void slot_close(struct slot *slot)
{
	slot->watch = loop_watch_free(slot->watch);
	assert_int_equal(close(slot->fd), 0);
}

static void slot_ready(void *user, uint32_t revents)
{
	struct slot *slot = user;
	struct stress *stress = slot->stress;
	struct slot *other = &stress->slots[next_random(stress) % SLOTS];
	eventfd_t value;

	assert_non_null(slot->watch);
	assert_int_equal(revents & POLLERR, 0);
	(void)eventfd_read(slot->fd, &value);
	if (++stress->steps == STEPS)
		loop_stop(stress->loop);
	switch (next_random(stress) % 8) {
	case 0:
		slot_close(other);
		slot_open(other);
		break;
	case 1:
		slot_close(slot);
		slot_open(slot);
		break;
	case 2: /* armed and freed in one round, before the kernel has seen it */
		slot_close(other);
		slot_open(other);
		slot_close(other);
		slot_open(other);
		break;
	case 3:
		loop_watch_again(slot->watch);
		break;
	case 4:
		loop_watch_again(other->watch);
		slot_close(other);
		slot_open(other);
		break;
	default:
		assert_int_equal(eventfd_write(other->fd, 1), 0);
		assert_int_equal(eventfd_write(other->fd, 1), 0);
	}
	assert_int_equal(eventfd_write(stress->slots[next_random(stress) % SLOTS].fd, 1), 0);
}

static void test_stress(void **state)
{
	struct stress stress = {.loop = *state, .random = 1};

	for (size_t i = 0; i < SLOTS; i++) {
		stress.slots[i].stress = &stress;
		slot_open(&stress.slots[i]);
	}
	assert_int_equal(loop_run(*state), 0);
	assert_true(stress.steps >= STEPS);
	for (size_t i = 0; i < SLOTS; i++)
		slot_close(&stress.slots[i]);
}

/* Timers write their letter when they fire. */
struct letters {
	struct loop *loop;
	struct alarm {
		struct letters *letters;
		struct loop_timer *timer;
		uint64_t due;
		char letter;
	} alarms[4];
	char text[32];
	size_t count;
};

static void alarm_set(struct alarm *alarm, uint64_t ns)
{
	alarm->due = loop_now() + ns;
	loop_timer_set(alarm->timer, ns);
}

/* One sets the next, so that the order is the same however late the machine is. */
static void alarm_fired(void *user)
{
	struct alarm *alarm = user;
	struct letters *letters = alarm->letters;

	assert_true(loop_now() >= alarm->due);
	letters->text[letters->count++] = alarm->letter;
	if (alarm->letter == 'a') { /* the next one never fires, and this one once more */
		letters->alarms[1].timer = loop_timer_free(letters->alarms[1].timer);
		alarm_set(letters->count < 3 ? alarm : &letters->alarms[2], letters->count < 3 ? 1 : MS);
	}
	if (alarm->letter == 'c')
		alarm_set(&letters->alarms[3], MS);
	if (alarm->letter == 'd')
		loop_stop(letters->loop);
}

static void test_timers(void **state)
{
	struct letters letters = {.loop = *state};

	for (int i = 0; i < 4; i++) {
		letters.alarms[i].letters = &letters;
		letters.alarms[i].letter = (char)('a' + i);
		assert_int_equal(loop_timer_new(*state, alarm_fired, &letters.alarms[i], &letters.alarms[i].timer), 0);
	}
	alarm_set(&letters.alarms[1], 3600 * 1000 * MS);
	alarm_set(&letters.alarms[2], MS);
	alarm_set(&letters.alarms[2], 3600 * 1000 * MS); /* set again: later, and then sooner by the last 'a' */
	alarm_set(&letters.alarms[0], 5 * MS);
	assert_int_equal(loop_run(*state), 0);
	assert_string_equal(letters.text, "aaacd");
	alarm_set(&letters.alarms[2], MS);
	loop_timer_set(letters.alarms[2].timer, 0);
	run_for(*state, 5 * MS);
	assert_int_equal(letters.count, 5);
	loop_timer_set(letters.alarms[2].timer, UINT64_MAX);
	for (int i = 0; i < 4; i++)
		(void)loop_timer_free(letters.alarms[i].timer);
}

struct signals {
	struct loop *loop;
	int counts[65];
};

static void count_signal(void *user, int signal)
{
	struct signals *signals = user;

	signals->counts[signal]++;
	if (signals->counts[SIGUSR1] && signals->counts[SIGUSR2])
		loop_stop(signals->loop);
}

static void test_signals(void **state)
{
	struct signals signals = {.loop = *state};
	sigset_t set, before;

	assert_int_equal(sigemptyset(&set), 0);
	assert_int_equal(sigaddset(&set, SIGUSR1), 0);
	assert_int_equal(sigaddset(&set, SIGUSR2), 0);
	assert_int_equal(pthread_sigmask(SIG_BLOCK, &set, &before), 0);
	assert_int_equal(loop_signals(*state, &set, count_signal, &signals), 0);
	assert_int_equal(loop_signals(*state, &set, count_signal, &signals), -EEXIST);
	for (int i = 1; i <= 2; i++) {
		assert_int_equal(kill(getpid(), SIGUSR1), 0);
		assert_int_equal(kill(getpid(), SIGUSR2), 0);
		assert_int_equal(loop_run(*state), 0);
		run_for(*state, MS);
		assert_int_equal(signals.counts[SIGUSR1], i);
		assert_int_equal(signals.counts[SIGUSR2], i);
	}
	assert_int_equal(pthread_sigmask(SIG_SETMASK, &before, NULL), 0);
}

struct counter {
	struct loop *loop;
	int polls, sleeps, wakes;
	int work; /* polls that still find some */
	int late; /* sleeps that find some */
	uint64_t first_sleep;
};

static bool counter_poll(void *user)
{
	struct counter *counter = user;

	counter->polls++;
	return counter->work > 0 && counter->work--;
}

static bool counter_sleep(void *user, bool going)
{
	struct counter *counter = user;

	if (!going) {
		counter->wakes++;
		return false;
	}
	counter->sleeps++;
	if (!counter->first_sleep)
		counter->first_sleep = loop_now();
	if (counter->late == 0)
		return false;
	counter->late--;
	counter->work++;
	return true;
}

static const struct loop_poller_ops counter_ops = {.poll = counter_poll, .sleep = counter_sleep};

/* Without work the loop makes one round for each event and not a single one more. */
static void test_idle(void **state)
{
	struct counter counter = {0};
	struct rusage before, after;

	assert_int_equal(loop_poller_add(*state, &counter_ops, &counter), 0);
	assert_int_equal(getrusage(RUSAGE_THREAD, &before), 0);
	run_for(*state, 200 * MS);
	assert_int_equal(getrusage(RUSAGE_THREAD, &after), 0);
	assert_true(counter.polls <= 4);
	assert_true(counter.sleeps >= 1);
	assert_int_equal(counter.sleeps, counter.wakes);
	assert_true(after.ru_nvcsw - before.ru_nvcsw <= 4);
}

static void test_spin(void **state)
{
	struct counter counter = {.work = 10};
	uint64_t start = loop_now();

	loop_set_spin(*state, 20 * MS);
	assert_int_equal(loop_poller_add(*state, &counter_ops, &counter), 0);
	run_for(*state, 60 * MS);
	assert_int_equal(counter.work, 0);
	assert_true(counter.polls >= 11); /* one without work, at least */
	assert_true(counter.first_sleep >= start + 20 * MS);
	assert_true(counter.sleeps >= 1);
	assert_int_equal(counter.sleeps, counter.wakes);
}

/* While it spins, events and timers are served like in sleep. */
static void test_spin_events(void **state)
{
	struct reader reader = {.loop = *state, .last_call = 1, .drain = true};
	struct counter counter = {0};
	struct writer writer = {.loop = *state, .count = 1};
	struct loop_timer *timer;

	loop_set_spin(*state, 100000 * MS);
	assert_int_equal(loop_poller_add(*state, &counter_ops, &counter), 0);
	writer.fd = reader.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	reader_start(&reader);
	assert_int_equal(loop_timer_new(*state, write_many, &writer, &timer), 0);
	loop_timer_set(timer, MS);
	assert_int_equal(loop_run(*state), 0);
	assert_int_equal(reader.calls, 1);
	assert_int_equal(counter.sleeps, 0);
	(void)loop_timer_free(timer);
	(void)loop_watch_free(reader.watch);
	assert_int_equal(close(writer.fd), 0);
}

/* Another thread's event reaches a reactor that has been spinning for a while and makes no system call. */
struct nudge {
	sem_t spinning;
	int polls;
	int fd;
};

static bool nudge_poll(void *user)
{
	struct nudge *nudge = user;

	if (++nudge->polls == 10000)
		(void)sem_post(&nudge->spinning);
	return false;
}

static bool nudge_sleep(void *user, bool going)
{
	(void)user;
	(void)going;
	fail_msg("the reactor sleeps");
	return false;
}

static void *nudge_main(void *arg)
{
	struct nudge *nudge = arg;

	(void)sem_wait(&nudge->spinning);
	(void)eventfd_write(nudge->fd, 1);
	return NULL;
}

static void test_spin_other_thread(void **state)
{
	static const struct loop_poller_ops ops = {.poll = nudge_poll, .sleep = nudge_sleep};
	struct reader reader = {.loop = *state, .last_call = 1, .drain = true};
	struct nudge nudge = {0};
	pthread_t thread;

	loop_set_spin(*state, 100000 * MS);
	assert_int_equal(sem_init(&nudge.spinning, 0, 0), 0);
	assert_int_equal(loop_poller_add(*state, &ops, &nudge), 0);
	nudge.fd = reader.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	reader_start(&reader);
	assert_int_equal(pthread_create(&thread, NULL, nudge_main, &nudge), 0);
	assert_int_equal(loop_run(*state), 0);
	assert_true(nudge.polls >= 10000);
	assert_int_equal(reader.calls, 1);
	assert_int_equal(pthread_join(thread, NULL), 0);
	(void)loop_watch_free(reader.watch);
	assert_int_equal(sem_destroy(&nudge.spinning), 0);
	assert_int_equal(close(nudge.fd), 0);
}

/* The second poller finds work when it is asked to sleep: nobody sleeps, and both hear of it. */
static void test_sleep_refused(void **state)
{
	struct counter first = {0}, second = {.late = 3};

	assert_int_equal(loop_poller_add(*state, &counter_ops, &first), 0);
	assert_int_equal(loop_poller_add(*state, &counter_ops, &second), 0);
	run_for(*state, 10 * MS);
	assert_int_equal(second.late, 0);
	assert_int_equal(second.work, 0);
	assert_true(second.polls >= 7);
	assert_int_equal(first.sleeps, first.wakes);
	assert_int_equal(second.sleeps, second.wakes);
	assert_int_equal(first.sleeps, second.sleeps);
}

static bool leaver_poll(void *user);
static bool leaver_sleep(void *user, bool going);

static const struct loop_poller_ops leaver_ops = {.poll = leaver_poll, .sleep = leaver_sleep};

static bool leaver_poll(void *user)
{
	struct counter *counter = user;

	counter->polls++;
	loop_poller_remove(counter->loop, &leaver_ops, counter);
	return true;
}

static bool leaver_sleep(void *user, bool going)
{
	(void)user;
	(void)going;
	fail_msg("a removed poller was asked");
	return false;
}

static void test_poller_remove(void **state)
{
	struct counter leaver = {.loop = *state}, stayer = {.work = 3};

	assert_int_equal(loop_poller_add(*state, &leaver_ops, &leaver), 0);
	assert_int_equal(loop_poller_add(*state, &counter_ops, &stayer), 0);
	run_for(*state, 5 * MS);
	assert_int_equal(leaver.polls, 1);
	assert_true(stayer.polls >= 4);
	loop_poller_remove(*state, &counter_ops, &stayer);
	stayer.polls = 0;
	run_for(*state, 5 * MS);
	assert_int_equal(stayer.polls, 0);
}

static void test_stop_first(void **state)
{
	loop_stop(*state);
	assert_int_equal(loop_run(*state), 0);
	run_for(*state, MS);
}

#define LOOP_TEST(name) cmocka_unit_test_setup_teardown(name, loop_setup, loop_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		LOOP_TEST(test_watch),
		LOOP_TEST(test_edge),
		LOOP_TEST(test_again),
		LOOP_TEST(test_bad_fd),
		LOOP_TEST(test_close_hangs_up),
		LOOP_TEST(test_overflow),
		LOOP_TEST(test_stress),
		LOOP_TEST(test_timers),
		LOOP_TEST(test_signals),
		LOOP_TEST(test_idle),
		LOOP_TEST(test_spin),
		LOOP_TEST(test_spin_events),
		LOOP_TEST(test_spin_other_thread),
		LOOP_TEST(test_sleep_refused),
		LOOP_TEST(test_poller_remove),
		LOOP_TEST(test_stop_first),
	};

	return runner_run("loop", tests, sizeof(tests) / sizeof(tests[0]));
}
