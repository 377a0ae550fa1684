#include "daemon/daemon.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/runner.h"

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

/* Runs a daemon in a child process; mode: of tenant a's socket. */
static pid_t start(const struct place *place, mode_t mode)
{
	char name[] = "a", socket_name[] = "a.sock";
	struct config_tenant tenant = {.name = name, .socket = socket_name, .mode = mode, .device_max = 16 << 20};
	const struct config config = {.device_size = 64 << 20,
		.extent_size = 256 << 10,
		.spin_us = 50,
		.admin_mode = 0600,
		.tenants = &tenant,
		.tenant_count = 1};
	const struct daemon_options options = {.state_dir = place->dir};
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

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_start_and_stop, begin, end),
		cmocka_unit_test_setup_teardown(test_second_on_same_folder, begin, end),
	};

	return runner_run("daemon", tests, sizeof(tests) / sizeof(tests[0]));
}
