/* A daemon with nothing to do does nothing. */
#include <poll.h>
#include <stdio.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "tests/integration/kv.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define SECONDS 5
#define WORKERS 3

static double cpu_seconds(clockid_t clock)
{
	struct timespec used;

	assert_int_equal(clock_gettime(clock, &used), 0);
	return (double)used.tv_sec + (double)used.tv_nsec * 1e-9;
}

/* The measurement itself takes SECONDS. */
static double cpu_while_waiting(pid_t pid)
{
	struct itimerspec time = {.it_value.tv_sec = SECONDS};
	struct pollfd timer = {.fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC), .events = POLLIN};
	clockid_t clock;
	double before;

	assert_true(timer.fd >= 0);
	assert_int_equal(clock_getcpuclockid(pid, &clock), 0);
	before = cpu_seconds(clock);
	assert_int_equal(timerfd_settime(timer.fd, 0, &time, NULL), 0);
	assert_int_equal(poll(&timer, 1, -1), 1);
	(void)close(timer.fd);
	return cpu_seconds(clock) - before;
}

static void test_an_idle_daemon_with_workers_uses_no_cpu(void **state)
{
	struct kvg_policy policy = kv_policy(300, 0.3, 20);
	struct kvg_layout layout;
	struct kvg_client *clients[WORKERS];
	struct kv kv[WORKERS];
	struct fixture f;
	char path[FIXTURE_PATH];
	double used;

	(void)state;
	fixture_start(&f, "[pool]\ndevice.size = 32M\nextent_size = 256K\n[tenant a]\nsocket = a.sock\n");
	kv_small_layout(&layout, 4, 2048);
	for (uint32_t i = 0; i < WORKERS; i++) {
		clients[i] = kv_connect(fixture_path(&f, "state/a.sock", path), "idle", &layout);
		assert_non_null(clients[i]);
		assert_int_equal(kv_create(&kv[i], clients[i], &layout, &policy, i), 0);
		assert_int_equal(kv_feed(&kv[i], 301, 1), 0);
		assert_int_equal(kv_evict(&kv[i], KVG_EVICT_PREFILL), 0);
	}
	used = cpu_while_waiting(f.pid);
	print_message("%.1f ms of CPU in %d s: %.3f%%\n", used * 1e3, SECONDS, 100 * used / SECONDS);
	assert_true(used / SECONDS < 0.002);
	for (uint32_t i = 0; i < WORKERS; i++) {
		assert_int_equal(kv_free(&kv[i]), 0);
		(void)kvg_close(clients[i]);
	}
	fixture_audit(&f);
	fixture_stop(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_an_idle_daemon_with_workers_uses_no_cpu),
	};

	return runner_run("idle", tests, sizeof(tests) / sizeof(*tests));
}
