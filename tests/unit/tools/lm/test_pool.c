#include "tools/lm/pool.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"

#define TASKS 1000u

struct count {
	atomic_uint runs[TASKS];
	unsigned plain[TASKS]; /* not atomic: the loop itself must order it */
};

static void count_task(void *user, size_t task)
{
	struct count *count = user;

	atomic_fetch_add(&count->runs[task], 1);
	count->plain[task]++;
}

static void check_runs(unsigned threads)
{
	struct count *count = calloc(1, sizeof(*count));
	struct lm_pool *pool;

	assert_non_null(count);
	assert_int_equal(lm_pool_new(threads, &pool), 0);
	assert_int_equal(lm_pool_threads(pool), threads);
	for (unsigned round = 0; round < 20; round++)
		lm_pool_run(pool, TASKS, count_task, count);
	for (unsigned i = 0; i < TASKS; i++) {
		assert_int_equal(count->runs[i], 20);
		assert_int_equal(count->plain[i], 20);
	}
	(void)lm_pool_free(pool);
	free(count);
}

static void test_each_task_runs_once(void **state)
{
	(void)state;
	check_runs(1);
	check_runs(2);
	check_runs(5);
}

/* Loops of changing size right after each other: a thread that is late must not take a task twice. */
static void test_short_loops_in_a_row(void **state)
{
	struct count *count = calloc(1, sizeof(*count));
	struct lm_pool *pool;
	unsigned expected[8] = {0};

	(void)state;
	assert_non_null(count);
	assert_int_equal(lm_pool_new(4, &pool), 0);
	for (unsigned round = 0; round < 20000; round++) {
		unsigned size = round % 8;

		lm_pool_run(pool, size, count_task, count);
		for (unsigned i = 0; i < size; i++)
			expected[i]++;
	}
	for (unsigned i = 0; i < 8; i++)
		assert_int_equal(count->plain[i], expected[i]);
	(void)lm_pool_free(pool);
	free(count);
}

static atomic_uint meeting;

static void meet_task(void *user, size_t task)
{
	(void)user;
	(void)task;
	atomic_fetch_add(&meeting, 1);
	while (atomic_load(&meeting) < 3)
		;
}

/* Three tasks that wait for each other end only when three threads run them at once, sleeping ones woken. */
static void test_tasks_run_at_the_same_time(void **state)
{
	struct lm_pool *pool;

	(void)state;
	assert_int_equal(lm_pool_new(3, &pool), 0);
	for (unsigned round = 0; round < 100; round++) {
		atomic_store(&meeting, 0);
		lm_pool_run(pool, 3, meet_task, NULL);
		assert_int_equal(meeting, 3);
	}
	(void)lm_pool_free(pool);
}

static void test_bounds(void **state)
{
	struct lm_pool *pool = NULL;

	(void)state;
	assert_int_equal(lm_pool_new(0, &pool), -EINVAL);
	assert_int_equal(lm_pool_new(LM_POOL_MAX_THREADS + 1, &pool), -EINVAL);
	assert_null(pool);
	assert_null(lm_pool_free(NULL));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_each_task_runs_once),
		cmocka_unit_test(test_short_loops_in_a_row),
		cmocka_unit_test(test_tasks_run_at_the_same_time),
		cmocka_unit_test(test_bounds),
	};

	return runner_run("tools/lm/pool", tests, sizeof(tests) / sizeof(tests[0]));
}
