/* A worker killed at any moment: its bytes are back in the pool within a second, and nobody else notices. */
#include <dirent.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define BACK_MS 1000
#define ROUNDS  6
#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 64M\nextent_size = 256K\n"                                                              \
	"[tenant victim]\nsocket = victim.sock\n[tenant other]\nsocket = other.sock\n"

static struct kvg_client *victim_connect(const char *socket, struct kvg_layout *layout)
{
	struct kvg_client *client;

	kv_pilot_layout(layout, KVG_BF16, 4, 4096);
	client = kv_connect(socket, "victim", layout);
	must(client, "connect");
	return client;
}

/* Says that it is ready, and waits to be killed. */
static _Noreturn void fall_asleep(int fd)
{
	process_say(fd, 'r');
	(void)process_listen(fd);
	_exit(4);
}

static int registered(int fd, void *socket)
{
	struct kvg_layout layout;

	(void)victim_connect(socket, &layout);
	fall_asleep(fd);
}

static int idle_with_sequences(int fd, void *socket)
{
	struct kvg_policy policy = kv_policy(1000, 0.3, 30);
	struct kvg_layout layout;
	struct kvg_client *client = victim_connect(socket, &layout);
	struct kv kv[3];

	for (uint32_t i = 0; i < 3; i++) {
		must(kv_create(&kv[i], client, &layout, &policy, i) == 0, kvg_error(client));
		must(kv_feed(&kv[i], 1001, 1) == 0, "feed");
	}
	must(kv_evict(&kv[1], KVG_EVICT_PREFILL) == 0, "evict");
	fall_asleep(fd);
}

/* Submits entries without end, one byte said after each was handed over. */
static _Noreturn void submit_for_ever(int fd, struct kvg_client *client, struct kvg_sqe *sqe, uint32_t count)
{
	struct kvg_cqe cqe[64];

	process_say(fd, 'r');
	for (uint32_t i = 0;; i = (i + 1) % count) {
		sqe[i].user_data = i;
		must(kvg_submit(client, &sqe[i]) == 0, kvg_error(client));
		process_say(fd, 's');
		must(kvg_reap(client, cqe, NULL, 64, i == count - 1 ? 1 : 0) >= 0, kvg_error(client));
	}
}

static _Noreturn void reserve_for_ever(int fd, struct kvg_client *client)
{
	struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = 3000};
	uint64_t seq;

	for (;;) {
		must(kvg_create(client, &policy, &seq) == 0, kvg_error(client));
		for (uint32_t tokens = 500; tokens <= 3000; tokens += 500) {
			struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .seq = seq, .reserve.tokens = tokens};
			struct kvg_cqe cqe;

			must(kvg_submit(client, &sqe) == 0, kvg_error(client));
			process_say(fd, 's');
			must(kvg_reap(client, &cqe, NULL, 1, 1) == 1 && cqe.status == 0, kvg_error(client));
		}
		must(kvg_free(client, seq) == 0, kvg_error(client));
	}
}

static int reserving(int fd, void *socket)
{
	struct kvg_layout layout;
	struct kvg_client *client = victim_connect(socket, &layout);

	process_say(fd, 'r');
	reserve_for_ever(fd, client);
}

static _Noreturn void stage_for_ever(int fd, struct kvg_client *client, uint64_t seq, const uint16_t *hidden)
{
	for (uint32_t i = 0;; i++) {
		must(kvg_stage_hidden(client, seq, i % 6, 1000 * (i / 6 % 3), 1000, hidden) == 0, kvg_error(client));
		process_say(fd, 's');
	}
}

static int staging(int fd, void *socket)
{
	struct kvg_policy policy = kv_policy(3000, 0.3, 30);
	struct kvg_layout layout;
	struct kvg_client *client = victim_connect(socket, &layout);
	uint16_t *hidden = calloc((size_t)1000 * layout.hidden_dim, sizeof(*hidden));
	uint64_t seq;

	must(hidden && kvg_load_gate(client, KVG_DATA "/pilot-lm/gate.safetensors") == 0, kvg_error(client));
	must(kvg_create(client, &policy, &seq) == 0, kvg_error(client));
	must(kvg_reserve(client, seq, 3001) == 0, kvg_error(client));
	process_say(fd, 'r');
	stage_for_ever(fd, client, seq, hidden);
}

static int evicting(int fd, void *socket)
{
	struct kvg_policy policy = kv_policy(3000, 0.3, 30);
	struct kvg_layout layout;
	struct kvg_client *client = victim_connect(socket, &layout);
	struct kvg_sqe sqe[2] = {{.op = KVG_OP_EVICT}, {.op = KVG_OP_EVICT}};
	struct kv kv[2];

	for (uint32_t i = 0; i < 2; i++) {
		struct kvg_sequence_info info;

		must(kv_create(&kv[i], client, &layout, &policy, i) == 0, kvg_error(client));
		must(kv_feed(&kv[i], 3001, 1) == 0, "feed");
		must(kvg_query(client, kv[i].id, &info) == 0, kvg_error(client));
		sqe[i].seq = kv[i].id;
		sqe[i].generation = info.generation;
	}
	must(kvg_stage_wait(client) == 0, kvg_error(client));
	submit_for_ever(fd, client, sqe, 2);
}

static int with_a_child(int fd, void *socket)
{
	struct kvg_policy policy = kv_policy(1000, 0.3, 30);
	struct kvg_layout layout;
	struct kvg_client *client = victim_connect(socket, &layout);
	struct kv kv;

	must(kv_create(&kv, client, &layout, &policy, 1) == 0, kvg_error(client));
	must(kv_feed(&kv, 1001, 1) == 0, "feed");
	if (fork() == 0) {
		process_say(fd, 'c');
		(void)process_listen(fd);
		_exit(0);
	}
	fall_asleep(fd);
}

static int count_descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int count = 0;

	must(dir, "/proc/self/fd");
	while (readdir(dir))
		count++;
	(void)closedir(dir);
	return count;
}

/* Lets go of the client, and lives until its parent closes the pipe. */
static _Noreturn void abandoning_child(int fd, struct kvg_client *client, const int pipe_fds[2], int descriptors)
{
	char byte;

	(void)close(pipe_fds[1]);
	must(kvg_abandon(client) == NULL, "abandon");
	must(count_descriptors() == descriptors - 1, "a descriptor of the client's is left");
	process_say(fd, 'c');
	(void)read(pipe_fds[0], &byte, 1);
	_exit(0);
}

/* Goes on when told, while its child lives. */
static int with_a_child_that_abandons(int fd, void *socket)
{
	struct kvg_policy policy = kv_policy(1000, 0.3, 30);
	struct kvg_layout layout;
	struct kvg_sequence_info info;
	struct kvg_client *client;
	struct kv kv;
	int pipe_fds[2], descriptors, status;
	pid_t child;

	must(pipe(pipe_fds) == 0, "pipe");
	descriptors = count_descriptors();
	client = victim_connect(socket, &layout);
	must(kv_create(&kv, client, &layout, &policy, 1) == 0, kvg_error(client));
	must(kv_feed(&kv, 1001, 1) == 0, "feed");
	must(kvg_reserve_async(client, kv.id, 100) == 0, kvg_error(client));
	must(kvg_query(client, kv.id, &info) == 0, kvg_error(client));
	process_say(fd, 'r');
	(void)process_listen(fd);
	child = fork();
	if (child == 0)
		abandoning_child(fd, client, pipe_fds, descriptors);
	(void)process_listen(fd);
	must(kvg_reserve_finish(client, kv.id) == 0, kvg_error(client));
	must(kv_evict(&kv, KVG_EVICT_PREFILL) == 0, "evict");
	must(kv_check(&kv) == 0, "content");
	must(kv_feed(&kv, 20, 2) == 0, "feed");
	must(kv_check(&kv) == 0, "content");
	must(kv_free(&kv) == 0, "free");
	(void)kvg_close(client);
	process_say(fd, 'd');
	(void)process_listen(fd);
	(void)close(pipe_fds[1]);
	must(waitpid(child, &status, 0) == child && status == 0, "the child");
	return 0;
}

/* Another tenant's worker that must not notice anything: works when told, and says so. */
static int bystander(int fd, void *socket)
{
	struct kvg_policy policy = kv_policy(500, 0.3, 20);
	struct kvg_layout layout;
	struct kvg_client *client;
	struct kv kv;

	kv_pilot_layout(&layout, KVG_BF16, 2, 2048);
	client = kv_connect(socket, "bystander", &layout);
	must(client, "connect");
	do {
		must(kv_create(&kv, client, &layout, &policy, 9) == 0, kvg_error(client));
		must(kv_feed(&kv, 501, 7) == 0, "feed");
		must(kv_evict(&kv, KVG_EVICT_PREFILL) == 0, "evict");
		must(kv_check(&kv) == 0, "content");
		process_say(fd, 'k');
		if (process_listen(fd) < 0)
			break;
		must(kv_check(&kv) == 0, "content");
		must(kv_free(&kv) == 0, "free");
	} while (1);
	(void)kvg_close(client);
	return 0;
}

struct scene {
	struct fixture fixture;
	struct process other;
	uint64_t rest; /* bytes that the bystander holds */
	char victim_path[FIXTURE_PATH];
};

static void scene_open(struct scene *scene)
{
	struct fixture_usage usage;
	char path[FIXTURE_PATH];

	fixture_start(&scene->fixture, CONFIG);
	(void)fixture_path(&scene->fixture, "state/victim.sock", scene->victim_path);
	process_fork(
		&scene->other, bystander, (void *)(uintptr_t)fixture_path(&scene->fixture, "state/other.sock", path));
	assert_int_equal(process_hear(&scene->other), 'k');
	fixture_tenant(&scene->fixture, "other", &usage);
	scene->rest = usage.charged;
	assert_true(scene->rest > 0);
}

static void scene_close(struct scene *scene)
{
	process_tell(&scene->other, 'a');
	assert_int_equal(process_hear(&scene->other), 'k');
	process_finish(&scene->other);
	assert_true(fixture_wait_gone(&scene->fixture, 0, 0, BACK_MS));
	fixture_audit(&scene->fixture);
	fixture_stop(&scene->fixture);
}

/* The victim is dead: everything of it is back in time, and the books agree. */
static void check_back(struct scene *scene)
{
	struct fixture_usage usage;

	assert_true(fixture_wait_gone(&scene->fixture, 1, scene->rest, BACK_MS));
	fixture_tenant(&scene->fixture, "victim", &usage);
	assert_int_equal(usage.charged, 0);
	assert_int_equal(usage.promised, 0);
	assert_int_equal(usage.workers, 0);
	assert_int_equal(usage.sequences, 0);
	assert_int_equal(fixture_physical(&scene->fixture), scene->rest);
	fixture_audit(&scene->fixture);
}

/* Kills a victim after it said `said` bytes more than that it is ready. */
static void kill_after(struct scene *scene, int (*victim)(int fd, void *socket), unsigned said)
{
	struct process process;

	process_fork(&process, victim, scene->victim_path);
	assert_int_equal(process_hear(&process), 'r');
	for (unsigned i = 0; i < said; i++)
		assert_int_equal(process_hear(&process), 's');
	process_kill(&process);
	check_back(scene);
}

static void test_a_worker_that_has_just_registered(void **state)
{
	struct scene scene;

	(void)state;
	scene_open(&scene);
	for (int i = 0; i < ROUNDS; i++)
		kill_after(&scene, registered, 0);
	scene_close(&scene);
}

static void test_a_worker_with_idle_sequences(void **state)
{
	struct scene scene;

	(void)state;
	scene_open(&scene);
	for (int i = 0; i < 2; i++)
		kill_after(&scene, idle_with_sequences, 0);
	scene_close(&scene);
}

static void test_a_worker_amid_reserving(void **state)
{
	struct scene scene;

	(void)state;
	scene_open(&scene);
	for (unsigned i = 0; i < 2 * ROUNDS; i++)
		kill_after(&scene, reserving, 1 + i * 3);
	scene_close(&scene);
}

static void test_a_worker_amid_staging(void **state)
{
	struct scene scene;

	(void)state;
	scene_open(&scene);
	for (unsigned i = 0; i < ROUNDS; i++)
		kill_after(&scene, staging, 1 + i * 2);
	scene_close(&scene);
}

static void test_a_worker_amid_evicting(void **state)
{
	struct scene scene;

	(void)state;
	scene_open(&scene);
	for (unsigned i = 0; i < ROUNDS; i++)
		kill_after(&scene, evicting, 1 + i % 2);
	scene_close(&scene);
}

static void test_a_worker_whose_child_still_maps_the_memory(void **state)
{
	struct scene scene;
	struct process victim;

	(void)state;
	assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
	scene_open(&scene);
	process_fork(&victim, with_a_child, scene.victim_path);
	for (int i = 0; i < 2; i++)
		assert_true(process_hear(&victim) != 0);
	assert_int_equal(kill(victim.pid, SIGKILL), 0);
	assert_int_equal(waitpid(victim.pid, NULL, 0), victim.pid);
	check_back(&scene);
	(void)close(victim.fd);
	assert_true(waitpid(-1, NULL, 0) > 0);
	scene_close(&scene);
	assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 0), 0);
}

static void test_a_worker_whose_child_abandons_the_client(void **state)
{
	struct fixture_usage before, after;
	struct process victim;
	struct scene scene;

	(void)state;
	scene_open(&scene);
	process_fork(&victim, with_a_child_that_abandons, scene.victim_path);
	assert_int_equal(process_hear(&victim), 'r');
	fixture_tenant(&scene.fixture, "victim", &before);
	process_tell(&victim, 'f');
	assert_int_equal(process_hear(&victim), 'c');
	fixture_tenant(&scene.fixture, "victim", &after);
	assert_true(before.charged > 0);
	assert_int_equal(after.charged, before.charged);
	assert_int_equal(after.promised, before.promised);
	assert_int_equal(after.unreturned, before.unreturned);
	assert_int_equal(after.workers, 1);
	assert_int_equal(after.sequences, 1);
	process_tell(&victim, 'g');
	assert_int_equal(process_hear(&victim), 'd');
	check_back(&scene);
	process_finish(&victim);
	scene_close(&scene);
}

static void test_a_worker_that_goes_without_closing_anything(void **state)
{
	struct scene scene;
	struct process process;

	(void)state;
	scene_open(&scene);
	process_fork(&process, idle_with_sequences, scene.victim_path);
	assert_int_equal(process_hear(&process), 'r');
	process_tell(&process, 'x');
	assert_int_equal(waitpid(process.pid, NULL, 0), process.pid);
	(void)close(process.fd);
	check_back(&scene);
	scene_close(&scene);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_a_worker_that_has_just_registered),
		cmocka_unit_test(test_a_worker_with_idle_sequences),
		cmocka_unit_test(test_a_worker_amid_reserving),
		cmocka_unit_test(test_a_worker_amid_staging),
		cmocka_unit_test(test_a_worker_amid_evicting),
		cmocka_unit_test(test_a_worker_whose_child_still_maps_the_memory),
		cmocka_unit_test(test_a_worker_whose_child_abandons_the_client),
		cmocka_unit_test(test_a_worker_that_goes_without_closing_anything),
	};

	return runner_run("kill", tests, sizeof(tests) / sizeof(*tests));
}
