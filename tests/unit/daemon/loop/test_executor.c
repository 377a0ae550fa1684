#include "daemon/loop/executor.h"

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/support/runner.h"

#define JOBS  1000
#define TURNS 300

struct fixture {
	struct loop *loop;
	struct executor *executor;
	pthread_t reactor;
	int next_run;  /* the executor's */
	int next_done; /* the reactor's */
	int count;
};

struct work {
	struct job job;
	struct fixture *fixture;
	int number;
	bool ran;
	bool sigterm_blocked;
};

static int fixture_setup(void **state)
{
	struct fixture *fixture = calloc(1, sizeof(*fixture));

	if (!fixture || loop_new(&fixture->loop) < 0 || executor_new(fixture->loop, &fixture->executor) < 0)
		return -1;
	fixture->reactor = pthread_self();
	*state = fixture;
	return 0;
}

static int fixture_teardown(void **state)
{
	struct fixture *fixture = *state;

	fixture->executor = executor_free(fixture->executor);
	fixture->loop = loop_free(fixture->loop);
	free(fixture);
	return 0;
}

/* Assertions are the reactor's: the executor only notes what it saw. */
static void work_run(struct job *job)
{
	struct work *work = (struct work *)job;
	struct fixture *fixture = work->fixture;
	sigset_t blocked;

	work->ran = !pthread_equal(pthread_self(), fixture->reactor) && fixture->next_run == work->number;
	fixture->next_run++;
	work->sigterm_blocked =
		pthread_sigmask(SIG_SETMASK, NULL, &blocked) == 0 && sigismember(&blocked, SIGTERM) == 1;
}

static void work_done(struct job *job)
{
	struct work *work = (struct work *)job;
	struct fixture *fixture = work->fixture;

	assert_true(pthread_equal(pthread_self(), fixture->reactor));
	assert_true(work->ran);
	assert_true(work->sigterm_blocked);
	assert_int_equal(work->number, fixture->next_done++);
	if (fixture->next_done == fixture->count)
		loop_stop(fixture->loop);
}

static struct work *submit_all(struct fixture *fixture, int count)
{
	struct work *works = calloc((size_t)count, sizeof(*works));

	assert_non_null(works);
	fixture->count = count;
	for (int i = 0; i < count; i++) {
		works[i] = (struct work){.job = {.run = work_run, .done = work_done}, .fixture = fixture, .number = i};
		executor_submit(fixture->executor, &works[i].job);
	}
	return works;
}

static void test_order(void **state)
{
	struct fixture *fixture = *state;
	struct work *works = submit_all(fixture, JOBS);

	assert_int_equal(executor_pending(fixture->executor), JOBS);
	assert_int_equal(loop_run(fixture->loop), 0);
	assert_int_equal(fixture->next_done, JOBS);
	assert_int_equal(executor_pending(fixture->executor), 0);
	free(works);
}

static void test_free_drains(void **state)
{
	struct fixture *fixture = *state;
	struct work *works = submit_all(fixture, JOBS);

	fixture->executor = executor_free(fixture->executor);
	assert_int_equal(fixture->next_done, JOBS);
	assert_null(executor_free(NULL));
	free(works);
}

/* One job that goes round: each done() submits it again, at once or when a timer says so. */
struct ball {
	struct job job;
	struct fixture *fixture;
	struct loop_timer *timer;
	int turns;
	int runs;
};

static void ball_run(struct job *job)
{
	((struct ball *)job)->runs++;
}

static void ball_throw(void *user)
{
	struct ball *ball = user;

	executor_submit(ball->fixture->executor, &ball->job);
}

static void ball_done(struct job *job)
{
	struct ball *ball = (struct ball *)job;

	if (--ball->turns == 0)
		loop_stop(ball->fixture->loop);
	else if (ball->timer && ball->turns % 2)
		loop_timer_set(ball->timer, 200000); /* the executor sleeps meanwhile */
	else
		ball_throw(ball);
}

static void run_ball(struct fixture *fixture)
{
	struct ball ball = {.job = {.run = ball_run, .done = ball_done}, .fixture = fixture, .turns = TURNS};

	assert_int_equal(loop_timer_new(fixture->loop, ball_throw, &ball, &ball.timer), 0);
	ball_throw(&ball);
	assert_int_equal(loop_run(fixture->loop), 0);
	assert_int_equal(ball.runs, TURNS);
	(void)loop_timer_free(ball.timer);
}

static void test_turns(void **state)
{
	run_ball(*state);
}

static void test_turns_spinning(void **state)
{
	struct fixture *fixture = *state;

	loop_set_spin(fixture->loop, 1000000);
	run_ball(fixture);
}

static void test_free_drains_chains(void **state)
{
	struct fixture *fixture = *state;
	struct ball ball = {.job = {.run = ball_run, .done = ball_done}, .fixture = fixture, .turns = TURNS};

	ball_throw(&ball);
	fixture->executor = executor_free(fixture->executor);
	assert_int_equal(ball.runs, TURNS);
}

/* The job ends only after the reactor has said that it sleeps. */
struct sleeper {
	struct job job;
	struct loop *loop;
	sem_t asleep;
	bool done;
};

static bool sleeper_poll(void *user)
{
	(void)user;
	return false;
}

static bool sleeper_sleep(void *user, bool going)
{
	if (going)
		(void)sem_post(&((struct sleeper *)user)->asleep);
	return false;
}

static void sleeper_run(struct job *job)
{
	(void)sem_wait(&((struct sleeper *)job)->asleep);
}

static void sleeper_done(struct job *job)
{
	struct sleeper *sleeper = (struct sleeper *)job;

	sleeper->done = true;
	loop_stop(sleeper->loop);
}

static void test_wakes_the_reactor(void **state)
{
	static const struct loop_poller_ops ops = {.poll = sleeper_poll, .sleep = sleeper_sleep};
	struct fixture *fixture = *state;
	struct sleeper sleeper = {.job = {.run = sleeper_run, .done = sleeper_done}, .loop = fixture->loop};

	assert_int_equal(sem_init(&sleeper.asleep, 0, 0), 0);
	assert_int_equal(loop_poller_add(fixture->loop, &ops, &sleeper), 0);
	for (int i = 0; i < TURNS; i++) {
		sleeper.done = false;
		while (sem_trywait(&sleeper.asleep) == 0)
			;
		executor_submit(fixture->executor, &sleeper.job);
		assert_int_equal(loop_run(fixture->loop), 0);
		assert_true(sleeper.done);
	}
	loop_poller_remove(fixture->loop, &ops, &sleeper);
	assert_int_equal(sem_destroy(&sleeper.asleep), 0);
}

/* ---- jobs that are polled ---- */

/* Ends when its gate is open. */
struct polled {
	struct job job;
	struct fixture *fixture;
	atomic_bool gate;
	atomic_uint polls;
	atomic_bool ran; /* before the first poll */
	int order;
	uint64_t done_ns;
};

static void polled_run(struct job *job)
{
	((struct polled *)job)->ran = true;
}

static bool polled_poll(struct job *job)
{
	struct polled *polled = (struct polled *)job;

	polled->polls++;
	return polled->ran && polled->gate;
}

static void polled_done(struct job *job)
{
	struct polled *polled = (struct polled *)job;
	struct fixture *fixture = polled->fixture;

	polled->done_ns = loop_now();
	polled->order = ++fixture->next_done;
	if (fixture->next_done == fixture->count)
		loop_stop(fixture->loop);
}

static void polled_submit(struct polled *polled, struct fixture *fixture)
{
	*polled = (struct polled){
		.job = {.run = polled_run, .poll = polled_poll, .done = polled_done}, .fixture = fixture};
	executor_submit(fixture->executor, &polled->job);
}

/* An ordinary job that opens gates. */
struct opener {
	struct job job;
	struct fixture *fixture;
	struct polled *first, *second;
	bool overtook; /* the polled jobs ran before it and had not ended */
};

static void opener_run(struct job *job)
{
	struct opener *opener = (struct opener *)job;

	opener->overtook = opener->first->ran && opener->second->ran;
	opener->second->gate = true;
}

static void opener_done(struct job *job)
{
	struct opener *opener = (struct opener *)job;

	opener->fixture->next_done++;
}

static void test_polled_out_of_order(void **state)
{
	struct fixture *fixture = *state;
	struct polled first, second;
	struct opener opener = {.job = {.run = opener_run, .done = opener_done},
		.fixture = fixture,
		.first = &first,
		.second = &second};

	fixture->count = 2;
	polled_submit(&first, fixture);
	polled_submit(&second, fixture);
	executor_submit(fixture->executor, &opener.job);
	assert_int_equal(loop_run(fixture->loop), 0);
	assert_true(opener.overtook);
	assert_int_equal(first.order, 0);
	assert_int_not_equal(second.order, 0);
	assert_int_equal(executor_pending(fixture->executor), 1);
	fixture->count = 3;
	first.gate = true;
	assert_int_equal(loop_run(fixture->loop), 0);
	assert_int_equal(first.order, 3);
	assert_int_equal(executor_pending(fixture->executor), 0);
}

static void on_timer(void *user)
{
	loop_stop(((struct fixture *)user)->loop);
}

static void run_for(struct fixture *fixture, uint64_t ns)
{
	struct loop_timer *timer;

	assert_int_equal(loop_timer_new(fixture->loop, on_timer, fixture, &timer), 0);
	loop_timer_set(timer, ns);
	assert_int_equal(loop_run(fixture->loop), 0);
	(void)loop_timer_free(timer);
}

/* A job that naps between polls is no reason for another one to wait; and it does nap. */
static void test_submit_while_polling(void **state)
{
	struct fixture *fixture = *state;
	struct ball ball = {.job = {.run = ball_run, .done = ball_done}, .fixture = fixture};
	struct timespec before, after;
	struct polled polled;
	uint64_t begun;

	fixture->count = 1;
	polled_submit(&polled, fixture);
	while (!polled.ran)
		run_for(fixture, 5000000);
	assert_int_equal(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before), 0);
	polled.polls = 0;
	begun = loop_now();
	run_for(fixture, 100000000);
	assert_int_equal(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after), 0);
	assert_in_range(polled.polls, 1, (loop_now() - begun) / 45000); /* 50 us apart: that is what a nap comes to */
	assert_true((after.tv_sec - before.tv_sec) * 1000000000 + after.tv_nsec - before.tv_nsec < 80000000);
	ball.turns = TURNS;
	ball_throw(&ball);
	assert_int_equal(loop_run(fixture->loop), 0);
	assert_int_equal(ball.runs, TURNS);
	assert_int_equal(polled.order, 0);
	polled.gate = true;
	assert_int_equal(loop_run(fixture->loop), 0);
	assert_int_equal(polled.order, 1);
}

static void polled_open(void *user)
{
	((struct polled *)user)->gate = true;
}

/* The thread sleeps without a limit once no job is polled any more, and wakes for the next. */
static void test_polled_one_after_another(void **state)
{
	struct fixture *fixture = *state;
	struct loop_timer *timer;
	struct polled polled;

	for (int i = 0; i < 20; i++) {
		fixture->next_done = 0;
		fixture->count = 1;
		polled_submit(&polled, fixture);
		assert_int_equal(loop_timer_new(fixture->loop, polled_open, &polled, &timer), 0);
		loop_timer_set(timer, (uint64_t)i * 50000 + 1);
		assert_int_equal(loop_run(fixture->loop), 0);
		assert_int_equal(polled.order, 1);
		(void)loop_timer_free(timer);
	}
}

/* Ends after some polls, whoever runs the loop. */
static bool counting_poll(struct job *job)
{
	return ++((struct polled *)job)->polls >= 100;
}

static void test_free_drains_polled(void **state)
{
	struct fixture *fixture = *state;
	struct polled polled[10];

	fixture->count = 11;
	for (int i = 0; i < 10; i++) {
		polled[i] = (struct polled){
			.job = {.run = polled_run, .poll = counting_poll, .done = polled_done}, .fixture = fixture};
		executor_submit(fixture->executor, &polled[i].job);
	}
	fixture->executor = executor_free(fixture->executor);
	for (int i = 0; i < 10; i++) {
		assert_int_not_equal(polled[i].order, 0);
		assert_int_equal(polled[i].polls, 100);
	}
}

/* Work in pieces sees how long a piece may be. */
struct slicer {
	struct job job;
	struct executor *executor;
	struct loop *loop;
	sem_t waits; /* another job does */
	uint64_t alone, beside;
};

static void slicer_run(struct job *job)
{
	struct slicer *slicer = (struct slicer *)job;

	(void)sem_wait(&slicer->waits);
	slicer->beside = executor_slice(slicer->executor);
}

static void slicer_done(struct job *job)
{
	(void)job;
}

static void last_run(struct job *job)
{
	struct slicer *slicer = (struct slicer *)job;

	slicer->alone = executor_slice(slicer->executor);
}

static void last_done(struct job *job)
{
	loop_stop(((struct slicer *)job)->loop);
}

static void test_slice_while_others_wait(void **state)
{
	struct fixture *fixture = *state;
	struct slicer first = {.job = {.run = slicer_run, .done = slicer_done}, .executor = fixture->executor};
	struct slicer last = {
		.job = {.run = last_run, .done = last_done}, .executor = fixture->executor, .loop = fixture->loop};

	assert_int_equal(sem_init(&first.waits, 0, 0), 0);
	executor_submit(fixture->executor, &first.job);
	executor_submit(fixture->executor, &last.job);
	executor_set_spin(fixture->executor, 1000000);
	(void)sem_post(&first.waits);
	assert_int_equal(loop_run(fixture->loop), 0);
	assert_int_equal(last.alone, 500000);
	assert_int_equal(first.beside, 50000);
	(void)sem_destroy(&first.waits);
}

/* Background work sees that others are at work, and after a while that they are not. */
struct worker {
	struct job job;
	struct executor *executor;
	struct loop *loop;
	unsigned polls;
	bool saw_busy;
};

static void nothing_run(struct job *job)
{
	(void)job;
}

static bool background_poll(struct job *job)
{
	struct worker *worker = (struct worker *)job;
	bool busy = executor_is_busy(worker->executor);

	worker->saw_busy |= busy;
	return worker->saw_busy && !busy;
}

static bool foreground_poll(struct job *job)
{
	return ++((struct worker *)job)->polls == 100;
}

static void background_done(struct job *job)
{
	loop_stop(((struct worker *)job)->loop);
}

static void test_background_work(void **state)
{
	struct fixture *fixture = *state;
	struct worker background = {
		.job = {.run = nothing_run, .poll = background_poll, .done = background_done, .background = true},
		.executor = fixture->executor,
		.loop = fixture->loop};
	struct worker foreground = {.job = {.run = nothing_run, .poll = foreground_poll, .done = slicer_done}};

	executor_submit(fixture->executor, &background.job);
	executor_submit(fixture->executor, &foreground.job);
	assert_int_equal(loop_run(fixture->loop), 0); /* ends with the background work */
	assert_true(background.saw_busy);
	assert_int_equal(foreground.polls, 100);
}

/* ---- between jobs ---- */

enum { IDLE_JOBS = 20 };

static struct executor_idle wait_asleep(const struct executor *executor, uint64_t sleeps)
{
	struct executor_idle idle;

	while (idle = executor_idle(executor), idle.sleeps < sleeps)
		(void)sched_yield();
	return idle;
}

/* So many jobs, each when the thread sleeps. Ends when it sleeps again: once for each of them, and before. */
static struct executor_idle run_apart(struct fixture *fixture, uint64_t sleeps)
{
	struct executor_idle idle = wait_asleep(fixture->executor, sleeps);

	for (unsigned i = 1; i <= IDLE_JOBS; i++) {
		struct worker worker = {.job = {.run = nothing_run, .done = background_done}, .loop = fixture->loop};

		executor_submit(fixture->executor, &worker.job);
		assert_int_equal(loop_run(fixture->loop), 0);
		idle = wait_asleep(fixture->executor, sleeps + i);
		assert_int_equal(idle.sleeps, sleeps + i);
	}
	return idle;
}

static void test_sleeps_at_once(void **state)
{
	struct fixture *fixture = *state;
	struct executor_idle idle = run_apart(fixture, 1);

	assert_int_equal(idle.looks, idle.sleeps);
}

/* How often depends on the machine; never to have had the time for a second look would be strange indeed. */
static void test_looks_again_before_it_sleeps(void **state)
{
	struct fixture *fixture = *state;
	struct executor_idle before = run_apart(fixture, 1), idle;

	executor_set_spin(fixture->executor, 1000000000);
	idle = run_apart(fixture, before.sleeps);
	assert_true(idle.looks - before.looks > idle.sleeps - before.sleeps);
	executor_set_spin(fixture->executor, 0);
	before = run_apart(fixture, idle.sleeps); /* its first job still ends a spin */
	idle = run_apart(fixture, before.sleeps);
	assert_int_equal(idle.looks - before.looks, IDLE_JOBS);
}

#define EXECUTOR_TEST(name) cmocka_unit_test_setup_teardown(name, fixture_setup, fixture_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		EXECUTOR_TEST(test_order),
		EXECUTOR_TEST(test_free_drains),
		EXECUTOR_TEST(test_turns),
		EXECUTOR_TEST(test_turns_spinning),
		EXECUTOR_TEST(test_free_drains_chains),
		EXECUTOR_TEST(test_wakes_the_reactor),
		EXECUTOR_TEST(test_polled_out_of_order),
		EXECUTOR_TEST(test_submit_while_polling),
		EXECUTOR_TEST(test_polled_one_after_another),
		EXECUTOR_TEST(test_free_drains_polled),
		EXECUTOR_TEST(test_slice_while_others_wait),
		EXECUTOR_TEST(test_background_work),
		EXECUTOR_TEST(test_sleeps_at_once),
		EXECUTOR_TEST(test_looks_again_before_it_sleeps),
	};

	return runner_run("executor", tests, sizeof(tests) / sizeof(tests[0]));
}
