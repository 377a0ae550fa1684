/*
 * What one tenant can reach of another on a GPU: handles that are stale, foreign or forged, memory that another tenant
 * had, and the daemon's descriptors, tried from other uids where the test runs as root.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/gpu/live.h"
#include "tests/integration/process.h"
#include "tests/integration/raw.h"
#include "tests/support/runner.h"

#define UID_A "65501"
#define UID_B "65502"

#define BUFFER (4u << 20)

static void start(struct fixture *fixture, const char *tenants)
{
	char config[1024];

	live_config(config, sizeof(config), true, "64M", tenants);
	fixture_start(fixture, config);
}

/* ---- handles ---- */

/* Opens a device, allocates, and hands the handle over; ends when it is told, or at once. */
static int owner(int fd, void *stays)
{
	struct synthetic *synthetic;
	CUipcMemHandle handle;
	CUdeviceptr at;

	must(synthetic_open(0, &synthetic) == 0, "device");
	must(synthetic->cuda->driver->cuMemAlloc(&at, BUFFER) == CUDA_SUCCESS, "memory");
	must(synthetic->cuda->driver->cuIpcGetMemHandle(&handle, at) == CUDA_SUCCESS, "handle");
	must(write(fd, &handle, sizeof(handle)) == sizeof(handle), "send");
	if (stays)
		(void)process_listen(fd);
	(void)synthetic_close(synthetic);
	return 0;
}

static void hear_handle(struct process *process, uint8_t handle[sizeof(CUipcMemHandle)])
{
	for (size_t i = 0; i < sizeof(CUipcMemHandle); i++)
		handle[i] = (uint8_t)process_hear(process);
}

static void send_import(struct raw *raw, uint8_t *handle, size_t size, uint64_t bytes)
{
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	Kvg__ImportBuffer import = KVG__IMPORT_BUFFER__INIT;

	import.handle.data = handle;
	import.handle.len = size;
	import.size = bytes;
	request.body_case = KVG__WORKER_REQUEST__BODY_IMPORT_BUFFER;
	request.import_buffer = &import;
	raw_request(raw, &request, NULL, 0);
}

static void send_import_event(struct raw *raw, uint8_t *handle, size_t size)
{
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	Kvg__ImportEvent import = KVG__IMPORT_EVENT__INIT;

	import.handle.data = handle;
	import.handle.len = size;
	request.body_case = KVG__WORKER_REQUEST__BODY_IMPORT_EVENT;
	request.import_event = &import;
	raw_request(raw, &request, NULL, 0);
}

/* The daemon must refuse with a text and go on. */
static void assert_refused(const struct fixture *fixture, struct raw *raw, const char *what)
{
	struct fixture_usage usage;
	int r = raw_refused(raw);

	assert_true(r < 0);
	print_message("%s: %s: %s\n", what, strerror(-r), raw->text);
	fixture_usage(fixture, &usage);
}

/* An eviction through the real path still works. */
static int works(int fd, void *socket)
{
	const struct kvg_policy policy = {.ratio = 0.3, .mode = KVG_MODE_CHUNKED, .context_tokens = 1000};
	struct live_sequence sequence;
	struct kvg_layout layout;
	struct live live;

	(void)fd;
	live_layout(&layout, 2, 2048);
	live_open(&live, socket, true, &layout);
	live_create(&live, &policy, 3, &sequence);
	live_feed(&live, &sequence, 1000);
	live_evict(&live, &sequence, KVG_EVICT_PREFILL, NULL);
	live_free(&live, &sequence);
	live_close(&live);
	return 0;
}

static void assert_works(const struct fixture *fixture, const char *name)
{
	struct process process;
	char path[FIXTURE_PATH];

	process_fork(&process, works, (void *)(uintptr_t)fixture_path(fixture, name, path));
	process_finish(&process);
}

static void open_raw(const struct fixture *fixture, const char *name, struct raw *raw)
{
	struct kvg_layout layout;
	char path[FIXTURE_PATH];

	live_layout(&layout, 2, 2048);
	raw_open(raw, fixture_path(fixture, name, path), &layout);
}

static void test_stale_and_forged_handles_are_refused_and_harm_nothing(void **state)
{
	uint8_t handle[sizeof(CUipcMemHandle)], forged[sizeof(CUipcMemHandle)];
	struct process process;
	struct fixture fixture;
	struct raw raw;

	(void)state;
	start(&fixture, "[tenant a]\nsocket = a.sock\nipc = yes\n");
	open_raw(&fixture, "state/a.sock", &raw);
	process_fork(&process, owner, NULL);
	hear_handle(&process, handle);
	process_finish(&process);
	send_import(&raw, handle, sizeof(handle), BUFFER);
	assert_refused(&fixture, &raw, "handle of a process that is gone");
	for (size_t i = 0; i < sizeof(forged); i++)
		forged[i] = (uint8_t)(17 * i + 3);
	send_import(&raw, forged, sizeof(forged), BUFFER);
	assert_refused(&fixture, &raw, "forged handle");
	memset(forged, 0, sizeof(forged));
	send_import(&raw, forged, sizeof(forged), BUFFER);
	assert_refused(&fixture, &raw, "handle of zeros");
	send_import(&raw, forged, 7, BUFFER);
	assert_refused(&fixture, &raw, "handle of seven bytes");
	send_import_event(&raw, forged, sizeof(forged));
	assert_refused(&fixture, &raw, "event handle of zeros");
	raw_close(&raw);
	assert_works(&fixture, "state/a.sock");
	assert_true(fixture_wait_gone(&fixture, 0, 0, 2000));
	live_audit(&fixture);
	fixture_stop(&fixture);
}

/* Live, but smaller than the worker says. */
static void test_a_handle_reaches_no_further_than_its_memory(void **state)
{
	uint8_t handle[sizeof(CUipcMemHandle)];
	struct process process;
	struct fixture fixture;
	struct raw raw;

	(void)state;
	start(&fixture, "[tenant a]\nsocket = a.sock\nipc = yes\n");
	open_raw(&fixture, "state/a.sock", &raw);
	process_fork(&process, owner, &fixture);
	hear_handle(&process, handle);
	send_import(&raw, handle, sizeof(handle), (uint64_t)1 << 40);
	assert_refused(&fixture, &raw, "more than there is");
	raw_close(&raw);
	process_finish(&process);
	assert_works(&fixture, "state/a.sock");
	assert_true(fixture_wait_gone(&fixture, 0, 0, 2000));
	fixture_stop(&fixture);
}

static void test_a_tenant_without_ipc_is_refused(void **state)
{
	uint8_t handle[sizeof(CUipcMemHandle)];
	struct process process;
	struct fixture fixture;
	struct raw raw;

	(void)state;
	start(&fixture, "[tenant a]\nsocket = a.sock\n");
	open_raw(&fixture, "state/a.sock", &raw);
	process_fork(&process, owner, &fixture);
	hear_handle(&process, handle);
	send_import(&raw, handle, sizeof(handle), BUFFER);
	assert_int_equal(raw_refused(&raw), -EACCES);
	raw_close(&raw);
	process_finish(&process);
	assert_true(fixture_wait_gone(&fixture, 0, 0, 2000));
	fixture_stop(&fixture);
}

/* ---- memory that another tenant had ---- */

#define TOKENS 3000u
#define ROUNDS 6u

/* Fills memory with a pattern of ones; 'k' when a sequence is full, and frees it on a byte. */
static int filler(int fd, void *socket)
{
	const struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = TOKENS};
	struct live_sequence sequence;
	struct kvg_layout layout;
	struct live live;

	live_layout(&layout, 2, 4096);
	live_open(&live, socket, true, &layout);
	while (process_listen(fd) > 0) {
		live_create(&live, &policy, 0xffffffffffffffffu, &sequence);
		live_feed(&live, &sequence, TOKENS);
		(void)live_check(&live, &sequence, NULL);
		process_say(fd, 'k');
		must(process_listen(fd) > 0, "free");
		live_free(&live, &sequence);
		process_say(fd, 'f');
	}
	live_close(&live);
	return 0;
}

/* Words that are not zero in the blocks of a fresh sequence, found by copies that know nothing of our kernels. */
static uint64_t count_words(const struct live *live, const struct kvg_view *view, uint32_t slot)
{
	const struct kvg_cuda_driver *driver = live->synthetic->cuda->driver;
	uint32_t blocks = TOKENS / KVG_BLOCK_TOKENS, half = KVG_BLOCK_TOKENS * 32 * 2, ids[TOKENS / KVG_BLOCK_TOKENS];
	uint32_t words[KVG_BLOCK_TOKENS * 32 / 2];
	uint64_t sum = 0;

	for (uint32_t row = 0; row < view->layers * view->heads; row++) {
		size_t at =
			((size_t)(row / view->heads) * view->max_sequences + slot) * view->heads + row % view->heads;

		must(driver->cuMemcpyDtoH(ids, (CUdeviceptr)(uintptr_t)(view->ids + at * view->row_cap),
			     blocks * sizeof(*ids)) == CUDA_SUCCESS,
			"table");
		for (uint32_t i = 0; i < 2 * blocks; i++) {
			const uint8_t *base = i % 2 ? view->v_base : view->k_base;

			must(driver->cuMemcpyDtoH(words, (CUdeviceptr)(uintptr_t)(base + ids[i / 2] * view->stride),
				     half) == CUDA_SUCCESS,
				"block");
			for (uint32_t word = 0; word < half / 4; word++)
				sum += words[word] != 0;
		}
	}
	return sum;
}

/* Reserves where the other one's memory was, and reads it before it writes anything. */
static int reader(int fd, void *socket)
{
	const struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = TOKENS};
	struct live_sequence sequence;
	struct kvg_layout layout;
	struct kvg_view view;
	struct live live;

	live_layout(&layout, 2, 4096);
	live_open(&live, socket, true, &layout);
	must(kvg_view(live.client, &view) == 0, "view");
	while (process_listen(fd) > 0) {
		live_create(&live, &policy, 1, &sequence);
		must(kvg_reserve(live.client, sequence.seq, TOKENS) == 0, kvg_error(live.client));
		must(count_words(&live, &view, (uint32_t)sequence.seq) == 0, "zeros only");
		live_free(&live, &sequence);
		process_say(fd, 'z');
	}
	live_close(&live);
	return 0;
}

static void test_memory_of_another_tenant_comes_as_zeros(void **state)
{
	char a[FIXTURE_PATH], b[FIXTURE_PATH];
	struct process fill, read_back;
	struct fixture fixture;

	(void)state;
	start(&fixture, "[tenant a]\nsocket = a.sock\n[tenant b]\nsocket = b.sock\n");
	process_fork(&fill, filler, (void *)(uintptr_t)fixture_path(&fixture, "state/a.sock", a));
	process_fork(&read_back, reader, (void *)(uintptr_t)fixture_path(&fixture, "state/b.sock", b));
	for (unsigned i = 0; i < ROUNDS; i++) {
		process_tell(&fill, 'g');
		assert_int_equal(process_hear(&fill), 'k');
		process_tell(&fill, 'g');
		assert_int_equal(process_hear(&fill), 'f');
		process_tell(&read_back, 'g');
		assert_int_equal(process_hear(&read_back), 'z');
	}
	process_finish(&fill);
	process_finish(&read_back);
	assert_true(fixture_wait_gone(&fixture, 0, 0, 2000));
	live_audit(&fixture);
	fixture_stop(&fixture);
}

/* ---- other uids ---- */

static void copy_file(const char *from, const char *to)
{
	char data[65536];
	int in = open(from, O_RDONLY | O_CLOEXEC), out = open(to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0755);
	ssize_t n;

	assert_true(in >= 0 && out >= 0);
	while ((n = read(in, data, sizeof(data))) > 0)
		assert_int_equal(write(out, data, (size_t)n), n);
	assert_int_equal(n, 0);
	assert_int_equal(fchmod(out, 0755), 0);
	(void)close(in);
	(void)close(out);
}

/* Runs what a worker of some uid tries (tests/integration/role.c) and looks for a line of its output. */
static void assert_role(
	const struct fixture *fixture, const char *uid, const char *command, const char *argument, const char *line)
{
	char role[FIXTURE_PATH], library_path[FIXTURE_PATH + 32];
	const char *argv[] = {"setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "env", library_path,
		fixture_path(fixture, "role", role), command, argument, NULL};
	struct process_output output;

	(void)snprintf(library_path, sizeof(library_path), "LD_LIBRARY_PATH=%s", fixture->dir);
	process_run(argv, FIXTURE_WAIT_MS, &output);
	if (output.status || !strstr(output.out, line))
		fail_msg("role %s %s: status %d, \"%s\", no line \"%s\"; %s", command, argument, output.status,
			output.out, line, output.err);
}

/* Libraries that lie outside of the system's folders, from ldd's lines "NAME => PATH (ADDRESS)". */
static void publish_libraries(const struct fixture *fixture, const char *program)
{
	const char *argv[] = {"ldd", program, NULL};
	struct process_output output;
	char to[FIXTURE_PATH];

	process_run(argv, FIXTURE_WAIT_MS, &output);
	assert_int_equal(output.status, 0);
	for (char *rest = output.out, *line; (line = strsep(&rest, "\n"));) {
		char name[64], path[512];

		if (sscanf(line, " %63s => %511s", name, path) == 2 && path[0] == '/' &&
			strncmp(path, "/lib", 4) != 0 && strncmp(path, "/usr/lib", 8) != 0)
			copy_file(path, fixture_path(fixture, name, to));
	}
}

/* The build folder may be closed to other uids: the program and its libraries go where they can be read. */
static void publish(const struct fixture *fixture)
{
	const char *program = getenv("KVG_ROLE");
	char path[FIXTURE_PATH];

	assert_int_equal(chmod(fixture->dir, 0755), 0);
	assert_int_equal(chmod(fixture_path(fixture, "state", path), 0755), 0);
	copy_file(program ? program : KVG_BIN_ROLE, fixture_path(fixture, "role", path));
	publish_libraries(fixture, program ? program : KVG_BIN_ROLE);
}

static void test_another_uid_reaches_neither_socket_nor_descriptors(void **state)
{
	char a[FIXTURE_PATH], pid[32];
	struct process holder;
	struct fixture fixture;

	(void)state;
	if (geteuid() != 0) {
		print_message("not root: other uids are not tried\n");
		skip();
	}
	start(&fixture, "[tenant a]\nsocket = a.sock\nmode = 0666\nuids = 0\n"
			"[tenant b]\nsocket = b.sock\nmode = 0666\nuids = " UID_B "\n");
	publish(&fixture);
	process_fork(&holder, filler, (void *)(uintptr_t)fixture_path(&fixture, "state/a.sock", a));
	process_tell(&holder, 'g');
	assert_int_equal(process_hear(&holder), 'k');
	assert_role(&fixture, UID_B, "connect", a, "connect EACCES\n");
	assert_role(&fixture, UID_A, "connect", a, "connect EACCES\n");
	(void)snprintf(pid, sizeof(pid), "%d", (int)fixture.pid);
	assert_role(&fixture, UID_B, "proc", pid, "descriptors 0\n");
	(void)snprintf(pid, sizeof(pid), "%d", (int)holder.pid);
	assert_role(&fixture, UID_B, "proc", pid, "descriptors 0\n");
	process_tell(&holder, 'g');
	assert_int_equal(process_hear(&holder), 'f');
	process_finish(&holder);
	assert_true(fixture_wait_gone(&fixture, 0, 0, 2000));
	fixture_stop(&fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_stale_and_forged_handles_are_refused_and_harm_nothing),
		cmocka_unit_test(test_a_handle_reaches_no_further_than_its_memory),
		cmocka_unit_test(test_a_tenant_without_ipc_is_refused),
		cmocka_unit_test(test_memory_of_another_tenant_comes_as_zeros),
		cmocka_unit_test(test_another_uid_reaches_neither_socket_nor_descriptors),
	};

	if (!live_gpu())
		return 77;
	return runner_run("isolation", tests, sizeof(tests) / sizeof(*tests));
}
