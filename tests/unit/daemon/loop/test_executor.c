#include "daemon/loop/executor.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>

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
	};

	return runner_run("executor", tests, sizeof(tests) / sizeof(tests[0]));
}
