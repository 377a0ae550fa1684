#include "daemon/daemon.h"
#include "daemon/device.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/test_kind.h"

struct place {
	char dir[64];
	int notify; /* where the daemon reports its readiness */
};

static void path_in(const struct place *place, const char *name, struct sockaddr_un *ret)
{
	*ret = (struct sockaddr_un){.sun_family = AF_UNIX};
	(void)snprintf(ret->sun_path, sizeof(ret->sun_path), "%s/%s", place->dir, name);
}

static int begin(void **state)
{
	static struct place place;
	const struct timeval limit = {.tv_sec = 20};
	struct sockaddr_un address;

	place = (struct place){.dir = "/tmp/kvg-daemon-XXXXXX"};
	assert_non_null(mkdtemp(place.dir));
	path_in(&place, "notify", &address);
	place.notify = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	assert_true(place.notify >= 0);
	assert_int_equal(bind(place.notify, (const struct sockaddr *)&address, sizeof(address)), 0);
	assert_int_equal(setsockopt(place.notify, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)), 0);
	*state = &place;
	return 0;
}

/* The folder holds what the daemon may leave behind, and nothing else. */
static int end(void **state)
{
	struct place *place = *state;
	struct sockaddr_un address;

	assert_int_equal(close(place->notify), 0);
	path_in(place, "notify", &address);
	assert_int_equal(unlink(address.sun_path), 0);
	path_in(place, "lock", &address);
	assert_int_equal(unlink(address.sun_path), 0);
	assert_int_equal(rmdir(place->dir), 0);
	return 0;
}

static uint64_t device_min; /* of tenant a */

/* Runs a daemon in a child process; mode: of tenant a's socket. */
static pid_t start_with(const struct place *place, mode_t mode, struct kind *kind)
{
	char name[] = "a", socket_name[] = "a.sock";
	struct config_tenant tenant = {.name = name,
		.socket = socket_name,
		.mode = mode,
		.budgets = {{.min = device_min, .max = 16 << 20}},
		.limits = TENANT_LIMITS};
	const struct config config = {.device_size = 64 << 20,
		.extent_size = 256 << 10,
		.spin_us = 50,
		.admin_mode = 0600,
		.tenants = &tenant,
		.tenant_count = 1};
	const struct daemon_options options = {.state_dir = place->dir, .kind = kind};
	struct sockaddr_un notify;
	pid_t pid = fork();

	if (pid == 0) {
		path_in(place, "notify", &notify);
		(void)setenv("NOTIFY_SOCKET", notify.sun_path, 1);
		_exit(daemon_run(&config, &options));
	}
	assert_true(pid > 0);
	return pid;
}

static pid_t start(const struct place *place, mode_t mode)
{
	return start_with(place, mode, NULL);
}

static void expect_notice(const struct place *place, const char *expected)
{
	char text[256];
	ssize_t n = recv(place->notify, text, sizeof(text) - 1, 0);

	assert_true(n > 0);
	text[n] = '\0';
	assert_memory_equal(text, expected, strlen(expected));
}

static int wait_status(pid_t pid)
{
	int status;

	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	return WEXITSTATUS(status);
}

static void check_socket(const struct place *place, const char *name, mode_t mode)
{
	struct sockaddr_un address;
	struct stat st;
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	path_in(place, name, &address);
	assert_int_equal(stat(address.sun_path, &st), 0);
	assert_int_equal(st.st_mode, S_IFSOCK | mode);
	assert_int_equal(connect(fd, (const struct sockaddr *)&address, sizeof(address)), 0);
	assert_int_equal(close(fd), 0);
}

static void check_no_socket(const struct place *place, const char *name)
{
	struct sockaddr_un address;

	path_in(place, name, &address);
	assert_int_equal(access(address.sun_path, F_OK), -1);
	assert_int_equal(errno, ENOENT);
}

static void run_until_signal(const struct place *place, int signal)
{
	pid_t pid = start(place, 0640);

	expect_notice(place, "READY=1\nSTATUS=host pool of 64.0 MiB, 1 tenants");
	check_socket(place, "a.sock", 0640);
	check_socket(place, "admin.sock", 0600);
	assert_int_equal(kill(pid, signal), 0);
	expect_notice(place, "STOPPING=1");
	assert_int_equal(wait_status(pid), EXIT_SUCCESS);
	check_no_socket(place, "a.sock");
	check_no_socket(place, "admin.sock");
}

static void test_start_and_stop(void **state)
{
	run_until_signal(*state, SIGTERM);
	run_until_signal(*state, SIGINT); /* and the same folder again */
}

static void test_second_on_same_folder(void **state)
{
	const struct place *place = *state;
	pid_t first = start(place, 0600);

	expect_notice(place, "READY=1");
	assert_int_equal(wait_status(start(place, 0666)), EXIT_FAILURE);
	check_socket(place, "a.sock", 0600); /* the first one's, untouched */
	assert_int_equal(kill(first, SIGTERM), 0);
	assert_int_equal(wait_status(first), EXIT_SUCCESS);
}

/* ---- memory of min ---- */

static int creations_left;
static int gate[2]; /* a pipe that creating waits for, once */

static int few_creations(struct kind *kind, size_t size)
{
	return creations_left-- > 0 ? test_kind_host(kind)->create(kind, size) : -ENOMEM;
}

/* The first asks for the daemon's end, and is not over before that has begun. */
static int interrupted_creation(struct kind *kind, size_t size)
{
	char byte;

	if (creations_left-- == 1) {
		(void)kill(getpid(), SIGTERM);
		(void)read(gate[0], &byte, 1);
	}
	return test_kind_host(kind)->create(kind, size);
}

static void test_memory_of_min_is_there_first(void **state)
{
	const struct place *place = *state;
	pid_t pid;

	device_min = 4 << 20;
	pid = start(place, 0600);
	expect_notice(place, "STATUS=Creating the memory of min\nEXTEND_TIMEOUT_USEC=");
	expect_notice(place, "READY=1");
	assert_int_equal(kill(pid, SIGTERM), 0);
	assert_int_equal(wait_status(pid), EXIT_SUCCESS);
	expect_notice(place, "STOPPING=1");
	device_min = 0;
}

static void test_no_memory_for_min(void **state)
{
	const struct place *place = *state;
	struct test_kind kind;
	char text[16];

	test_kind_init(&kind);
	kind.ops.create = few_creations;
	creations_left = 15; /* of 16 */
	device_min = 4 << 20;
	assert_int_equal(wait_status(start_with(place, 0600, &kind.kind)), EXIT_FAILURE);
	expect_notice(place, "STATUS=Creating");
	assert_int_equal(recv(place->notify, text, sizeof(text), MSG_DONTWAIT), -1); /* it was never ready */
	check_no_socket(place, "a.sock");
	device_min = 0;
	test_kind_deinit(&kind);
}

static void test_signal_while_memory_of_min_is_created(void **state)
{
	const struct place *place = *state;
	struct test_kind kind;
	pid_t pid;

	test_kind_init(&kind);
	kind.ops.create = interrupted_creation;
	creations_left = 1;
	device_min = 4 << 20;
	assert_int_equal(pipe(gate), 0);
	pid = start_with(place, 0600, &kind.kind);
	expect_notice(place, "STATUS=Creating");
	expect_notice(place, "STOPPING=1");
	assert_int_equal(write(gate[1], "", 1), 1);
	assert_int_equal(wait_status(pid), EXIT_SUCCESS);
	check_no_socket(place, "a.sock");
	assert_int_equal(close(gate[0]) | close(gate[1]), 0);
	device_min = 0;
	test_kind_deinit(&kind);
}

/* ---- a kind with a device ---- */

static struct kind_device device = {.name = "A GPU", .driver = "1.2", .total = UINT64_C(1) << 30};
static uint64_t used;
static int failure = -1;

static const struct kind_device *some_about(struct kind *kind)
{
	(void)kind;
	return &device;
}

static int some_usage(struct kind *kind, uint64_t *ret_bytes)
{
	(void)kind;
	*ret_bytes = used;
	return 0;
}

static int some_failure_fd(struct kind *kind)
{
	(void)kind;
	return failure;
}

static const char *some_failure(struct kind *kind, char *text)
{
	(void)kind;
	(void)snprintf(text, KIND_TEXT, "CUDA_ERROR_ILLEGAL_ADDRESS (a test)");
	return text;
}

static void device_kind_init(struct test_kind *kind)
{
	test_kind_init(kind);
	kind->ops.about = some_about;
	kind->ops.usage = some_usage;
	kind->ops.failure_fd = some_failure_fd;
	kind->ops.failure = some_failure;
	device.mps = false;
	used = 0;
}

/* The daemon tells why, ends by itself, and its status says that it should be started again. */
static void test_lost_device(void **state)
{
	const struct place *place = *state;
	struct test_kind kind;
	char text[256];
	pid_t pid;
	ssize_t n;

	device_kind_init(&kind);
	failure = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	assert_true(failure >= 0);
	pid = start_with(place, 0600, &kind.kind);
	expect_notice(place, "READY=1");
	check_socket(place, "a.sock", 0600);
	assert_int_equal(eventfd_write(failure, 1), 0);
	n = recv(place->notify, text, sizeof(text), 0);
	assert_true(n > 0);
	assert_int_equal(wait_status(pid), DAEMON_DEVICE_LOST);
	check_no_socket(place, "a.sock");
	check_no_socket(place, "admin.sock");
	assert_int_equal(close(failure), 0);
	failure = -1;
	test_kind_deinit(&kind);
}

/* The first question is the start's; the daemon is a process of its own, so it counts from 0. */
static int usage_that_fails(struct kind *kind, uint64_t *ret_bytes)
{
	static unsigned questions;

	(void)kind;
	*ret_bytes = 0;
	if (questions++ == 0)
		return 0;
	(void)eventfd_write(failure, 1);
	return -EIO;
}

/* Nobody asks for anything, and still: where there is a worker, the loss of the device is noticed. */
static void test_lost_device_of_idle_workers(void **state)
{
	const struct place *place = *state;
	struct sockaddr_un address;
	struct test_kind kind;
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	pid_t pid;

	device_kind_init(&kind);
	kind.ops.usage = usage_that_fails;
	failure = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	assert_true(fd >= 0 && failure >= 0);
	pid = start_with(place, 0600, &kind.kind);
	expect_notice(place, "READY=1");
	path_in(place, "a.sock", &address);
	assert_int_equal(connect(fd, (const struct sockaddr *)&address, sizeof(address)), 0);
	assert_int_equal(wait_status(pid), DAEMON_DEVICE_LOST);
	assert_int_equal(close(fd) | close(failure), 0);
	failure = -1;
	test_kind_deinit(&kind);
}

static void test_check_of_sizes(void **state)
{
	struct config config = {.kind = CONFIG_CUDA, .device_size = UINT64_C(1) << 30, .extent_size = 1 << 20};
	struct test_kind kind;
	char text[DEVICE_TEXT] = "";
	uint64_t extent = 0;

	(void)state;
	device_kind_init(&kind);
	assert_int_equal(device_check(&config, &kind.kind, &extent, text), 0);
	assert_int_equal(extent, 1 << 20);
	used = 1; /* now there is less, which is only a warning */
	assert_int_equal(device_check(&config, &kind.kind, &extent, text), 0);
	kind.kind.granularity = 2 << 20;
	assert_int_equal(device_check(&config, &kind.kind, &extent, text), 0);
	assert_int_equal(extent, 2 << 20);
	config.device_size++;
	assert_int_equal(device_check(&config, &kind.kind, &extent, text), -EINVAL);
	assert_string_equal(text, "device.size: 1.0 GiB is more than the 1.0 GiB of A GPU");
	config.device_size = 1 << 20;
	assert_int_equal(device_check(&config, &kind.kind, &extent, text), -EINVAL);
	assert_string_equal(text, "device.size: 1.0 MiB is less than one extent, 2.0 MiB");
	test_kind_deinit(&kind);
}

static void test_check_of_isolation(void **state)
{
	struct config config = {.kind = CONFIG_CUDA, .device_size = 64 << 20, .extent_size = 2 << 20};
	struct test_kind kind;
	char text[DEVICE_TEXT] = "";
	uint64_t extent = 0;

	(void)state;
	device_kind_init(&kind);
	config.isolation = CONFIG_STRICT;
	assert_int_equal(device_check(&config, &kind.kind, &extent, text), 0);
	device.mps = true;
	assert_int_equal(device_check(&config, &kind.kind, &extent, text), -EINVAL);
	assert_memory_equal(text, "isolation: strict, but this daemon is a client of an MPS server", 63);
	config.isolation = CONFIG_SHARED;
	assert_int_equal(device_check(&config, &kind.kind, &extent, text), 0);
	test_kind_deinit(&kind);
}

static void test_open(void **state)
{
	struct config config = {.kind = CONFIG_HOST};
	struct kind *kind = NULL;
	char text[DEVICE_TEXT] = "";

	(void)state;
	assert_int_equal(device_open(&config, &kind, text), 0);
	assert_string_equal(kind->ops->name, "host");
	kind = kind_free(kind);
	config.kind = CONFIG_CUDA;
	config.device_index = 1000; /* there is no such GPU, no driver, or no support for any */
	assert_true(device_open(&config, &kind, text) < 0);
	assert_null(kind);
	assert_true(strlen(text) > 10);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_start_and_stop, begin, end),
		cmocka_unit_test_setup_teardown(test_second_on_same_folder, begin, end),
		cmocka_unit_test_setup_teardown(test_memory_of_min_is_there_first, begin, end),
		cmocka_unit_test_setup_teardown(test_no_memory_for_min, begin, end),
		cmocka_unit_test_setup_teardown(test_signal_while_memory_of_min_is_created, begin, end),
		cmocka_unit_test_setup_teardown(test_lost_device, begin, end),
		cmocka_unit_test_setup_teardown(test_lost_device_of_idle_workers, begin, end),
		cmocka_unit_test(test_check_of_sizes),
		cmocka_unit_test(test_check_of_isolation),
		cmocka_unit_test(test_open),
	};

	return runner_run("daemon", tests, sizeof(tests) / sizeof(tests[0]));
}
