/*
 * Several workers of one daemon on one GPU: two processes of one tenant at a time; one that is killed with kernels in
 * flight; one whose stream never comes to where the daemon waits for it.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/gpu/live.h"
#include "tests/integration/process.h"
#include "tests/support/runner.h"

#define BACK_MS 1000u
#define WAIT_MS 800u /* the daemon's deadline for streams */
#define SPIN_NS 4000000000u
#define TENANTS "[daemon]\nwait_ms = 800\n[tenant victim]\nsocket = victim.sock\n[tenant other]\nsocket = other.sock\n"

static struct kvg_policy policy_of(uint32_t tokens)
{
	return (struct kvg_policy){.ratio = 0.3,
		.mode = KVG_MODE_CHUNKED,
		.level = KVG_LEVEL_PAIR,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.prefix_tokens = 1,
		.context_tokens = tokens - 1,
		.window = 40};
}

static void open_worker(struct live *live, const char *socket)
{
	struct kvg_layout layout;

	live_layout(&layout, 4, 8192);
	live_open(live, socket, true, &layout);
}

/* ---- two of one tenant ---- */

#define TURNS 12u

/* Sequences come, evict and go without a pause; 'r' when it is ready, then on a byte it begins. */
static int busy(int fd, void *socket)
{
	struct live_sequence sequences[3];
	struct live live;

	open_worker(&live, socket);
	process_say(fd, 'r');
	must(process_listen(fd) == 'g', "go");
	for (uint32_t turn = 0; turn < TURNS; turn++) {
		struct live_sequence *sequence = &sequences[turn % 3];
		struct kvg_policy policy = policy_of(2000 + 100 * turn);

		if (turn >= 3) {
			(void)live_check(&live, sequence, NULL);
			live_free(&live, sequence);
		}
		live_create(&live, &policy, ((uint64_t)getpid() << 32) + turn, sequence);
		live_feed(&live, sequence, 2000 + 100 * turn);
		live_evict(&live, sequence, KVG_EVICT_PREFILL, NULL);
	}
	for (uint32_t i = 0; i < 3; i++) {
		(void)live_check(&live, &sequences[i], NULL);
		live_free(&live, &sequences[i]);
	}
	live_close(&live);
	return 0;
}

static void start(struct fixture *fixture)
{
	char config[1024];

	live_config(config, sizeof(config), true, "256M", TENANTS);
	fixture_start(fixture, config);
}

static void test_two_workers_of_one_tenant(void **state)
{
	struct process workers[2];
	struct fixture fixture;
	char path[FIXTURE_PATH];

	(void)state;
	start(&fixture);
	(void)fixture_path(&fixture, "state/other.sock", path);
	for (int i = 0; i < 2; i++)
		process_fork(&workers[i], busy, path);
	for (int i = 0; i < 2; i++)
		assert_int_equal(process_hear(&workers[i]), 'r');
	for (int i = 0; i < 2; i++)
		process_tell(&workers[i], 'g');
	for (int i = 0; i < 2; i++)
		process_finish(&workers[i]);
	assert_true(fixture_wait_gone(&fixture, 0, 0, BACK_MS));
	live_audit(&fixture);
	fixture_stop(&fixture);
}

/* ---- a bystander ---- */

/* Holds a sequence of another tenant; on each byte it looks at it, works with another one, and says how long that took:
 * 'k', then a byte of tenths of a second. */
static int bystander(int fd, void *socket)
{
	struct kvg_policy policy = policy_of(2000);
	struct live_sequence held, sequence;
	struct live live;

	open_worker(&live, socket);
	live_create(&live, &policy, 77, &held);
	live_feed(&live, &held, 2000);
	live_evict(&live, &held, KVG_EVICT_PREFILL, NULL);
	process_say(fd, 'k');
	process_say(fd, 1);
	while (process_listen(fd) > 0) {
		double begin = service_seconds(), took;

		(void)live_check(&live, &held, NULL);
		live_create(&live, &policy, 78, &sequence);
		live_feed(&live, &sequence, 2000);
		live_evict(&live, &sequence, KVG_EVICT_PREFILL, NULL);
		live_free(&live, &sequence);
		took = service_seconds() - begin;
		process_say(fd, 'k');
		process_say(fd, (char)(took < 10 ? 1 + (int)(10 * took) : 101));
	}
	live_free(&live, &held);
	live_close(&live);
	return 0;
}

struct scene {
	struct fixture fixture;
	struct process other;
	uint64_t rest; /* bytes that the bystander holds */
	char victim[FIXTURE_PATH];
};

static unsigned hear_bystander(struct scene *scene)
{
	assert_int_equal(process_hear(&scene->other), 'k');
	return (unsigned)process_hear(&scene->other);
}

static void scene_open(struct scene *scene)
{
	struct fixture_usage usage;
	char path[FIXTURE_PATH];

	start(&scene->fixture);
	(void)fixture_path(&scene->fixture, "state/victim.sock", scene->victim);
	(void)fixture_path(&scene->fixture, "state/other.sock", path);
	process_fork(&scene->other, bystander, path);
	(void)hear_bystander(scene);
	fixture_tenant(&scene->fixture, "other", &usage);
	scene->rest = usage.charged;
	assert_true(scene->rest > 0);
}

static void scene_close(struct scene *scene)
{
	process_tell(&scene->other, 'a');
	(void)hear_bystander(scene);
	process_finish(&scene->other);
	assert_true(fixture_wait_gone(&scene->fixture, 0, 0, BACK_MS));
	live_audit(&scene->fixture);
	fixture_stop(&scene->fixture);
}

/* ---- killed ---- */

/* Its stream is busy for seconds, and entries wait for it. */
static int spinning(int fd, void *socket)
{
	struct kvg_policy policy = policy_of(3000);
	struct live_sequence sequences[2];
	struct live live;

	open_worker(&live, socket);
	for (uint32_t i = 0; i < 2; i++) {
		live_create(&live, &policy, i, &sequences[i]);
		live_feed(&live, &sequences[i], 3000);
	}
	must(kvg_stage_wait(live.client) == 0, kvg_error(live.client));
	must(synthetic_spin(live.synthetic, 132, SPIN_NS, live.synthetic->stream) == CUDA_SUCCESS, "spin");
	must(kvg_evict_async(live.client, sequences[0].seq, KVG_EVICT_PREFILL) == 0, kvg_error(live.client));
	process_say(fd, 'r');
	(void)process_listen(fd);
	return 4;
}

static _Noreturn void evict_for_ever(struct live *live, int fd)
{
	struct kvg_policy policy = policy_of(3000);
	struct live_sequence sequence;

	for (uint64_t turn = 0;; turn++) {
		live_create(live, &policy, turn, &sequence);
		live_feed(live, &sequence, 3000);
		process_say(fd, 's');
		must(kvg_evict(live->client, sequence.seq, KVG_EVICT_PREFILL, NULL) == 0, kvg_error(live->client));
		live_free(live, &sequence);
	}
}

/* A byte is said for each eviction. */
static int evicting(int fd, void *socket)
{
	struct live live;

	open_worker(&live, socket);
	process_say(fd, 'r');
	evict_for_ever(&live, fd);
}

static uint64_t device_used(const struct scene *scene)
{
	struct service service;
	struct service_status status;
	char path[FIXTURE_PATH];

	assert_int_equal(service_attach(&service, fixture_path(&scene->fixture, "state", path)), 0);
	assert_int_equal(service_status(&service, &status), 0);
	return status.device_used;
}

/* The device's own figure may lag behind: the driver takes a dead process's context down by itself. */
static double wait_device(const struct scene *scene, uint64_t most, double limit)
{
	double begin = service_seconds(), took;

	do {
		took = service_seconds() - begin;
		if (device_used(scene) <= most)
			return took;
		(void)usleep(10000);
	} while (took < limit);
	return -1;
}

static void kill_after(struct scene *scene, int (*victim)(int fd, void *socket), unsigned said)
{
	uint64_t before = device_used(scene);
	struct fixture_usage usage;
	struct process process;
	double took;

	process_fork(&process, victim, scene->victim);
	assert_int_equal(process_hear(&process), 'r');
	for (unsigned i = 0; i < said; i++)
		assert_int_equal(process_hear(&process), 's');
	assert_int_equal(kill(process.pid, SIGKILL), 0);
	took = service_seconds();
	if (!fixture_wait_gone(&scene->fixture, 1, scene->rest, BACK_MS))
		fail_msg("the dead worker's memory is not back");
	took = service_seconds() - took;
	assert_int_equal(waitpid(process.pid, NULL, 0), process.pid);
	(void)close(process.fd);
	fixture_tenant(&scene->fixture, "victim", &usage);
	assert_int_equal(usage.charged, 0);
	assert_int_equal(usage.promised, 0);
	assert_int_equal(usage.workers, 0);
	live_audit(&scene->fixture);
	print_message("killed: charged bytes back after %.0f ms, the device's memory after %.0f ms\n", 1e3 * took,
		1e3 * wait_device(scene, before + (64u << 20), 10));
	process_tell(&scene->other, 'a');
	(void)hear_bystander(scene);
}

static void test_a_worker_killed_with_kernels_in_flight(void **state)
{
	struct scene scene;

	(void)state;
	scene_open(&scene);
	kill_after(&scene, spinning, 0);
	kill_after(&scene, spinning, 0);
	scene_close(&scene);
}

static void test_a_worker_killed_amid_evictions(void **state)
{
	struct scene scene;

	(void)state;
	scene_open(&scene);
	for (unsigned i = 1; i <= 4; i++)
		kill_after(&scene, evicting, 2 * i);
	scene_close(&scene);
}

/* ---- late ---- */

/* Says how the eviction ended that waited for a stream that does not move, then evicts again when it does. */
static int late(int fd, void *socket)
{
	struct kvg_policy policy = policy_of(3000);
	struct live_sequence sequence;
	struct live live;
	int r;

	open_worker(&live, socket);
	live_create(&live, &policy, 5, &sequence);
	live_feed(&live, &sequence, 3000);
	must(kvg_stage_wait(live.client) == 0, kvg_error(live.client));
	must(synthetic_spin(live.synthetic, 1, SPIN_NS, live.synthetic->stream) == CUDA_SUCCESS, "spin");
	must(kvg_evict_async(live.client, sequence.seq, KVG_EVICT_PREFILL) == 0, kvg_error(live.client));
	process_say(fd, 'r');
	r = kvg_evict_finish(live.client, sequence.seq, NULL);
	must(r < 0 && kvg_error(live.client)[0], "an error with a text");
	(void)fprintf(stderr, "late: %s: %s\n", strerror(-r), kvg_error(live.client));
	process_say(fd, 'e');
	must(live.synthetic->cuda->driver->cuStreamSynchronize(live.synthetic->stream) == CUDA_SUCCESS, "stream");
	must(live_check(&live, &sequence, NULL) == 3000u * content_rows(live.content), "all pairs are there");
	live_evict(&live, &sequence, KVG_EVICT_PREFILL, NULL);
	live_free(&live, &sequence);
	live_close(&live);
	return 0;
}

static void test_a_stream_that_comes_too_late(void **state)
{
	struct process process;
	struct scene scene;
	unsigned tenths;
	uint64_t begin, took;

	(void)state;
	scene_open(&scene);
	process_fork(&process, late, scene.victim);
	assert_int_equal(process_hear(&process), 'r');
	begin = fixture_now_ms();
	process_tell(&scene.other, 'a');
	tenths = hear_bystander(&scene);
	assert_int_equal(process_hear(&process), 'e');
	took = fixture_now_ms() - begin;
	print_message("late: an error after %u ms; another worker's turn meanwhile took under %u ms\n", (unsigned)took,
		100 * tenths);
	assert_in_range(took, WAIT_MS / 2, WAIT_MS + 1500);
	assert_true(100 * tenths <= WAIT_MS);
	process_finish(&process);
	scene_close(&scene);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_two_workers_of_one_tenant),
		cmocka_unit_test(test_a_worker_killed_with_kernels_in_flight),
		cmocka_unit_test(test_a_worker_killed_amid_evictions),
		cmocka_unit_test(test_a_stream_that_comes_too_late),
	};

	if (!live_gpu())
		return 77;
	return runner_run("workers", tests, sizeof(tests) / sizeof(*tests));
}
