#include "daemon/session/listener.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/support/runner.h"

#define MANY 40 /* more than a listener accepts in one round */

struct setting {
	char dir[64], path[128], text[LISTENER_TEXT];
	struct loop *loop;
	struct listener *listener;
	unsigned accepted, refused, awaited;
	int fds[MANY];
	struct ucred peer;
};

static int setting_setup(void **state)
{
	static struct setting setting;

	setting = (struct setting){.dir = "/tmp/kvg-listener-XXXXXX"};
	assert_non_null(mkdtemp(setting.dir));
	(void)snprintf(setting.path, sizeof(setting.path), "%s/socket", setting.dir);
	assert_int_equal(loop_new(&setting.loop), 0);
	*state = &setting;
	return 0;
}

static int setting_teardown(void **state)
{
	struct setting *setting = *state;

	setting->listener = listener_free(setting->listener);
	for (unsigned i = 0; i < setting->accepted; i++)
		assert_int_equal(close(setting->fds[i]), 0);
	(void)loop_free(setting->loop);
	assert_int_equal(rmdir(setting->dir), 0); /* no socket file is left */
	return 0;
}

static void count_one(struct setting *setting)
{
	if (setting->accepted + setting->refused == setting->awaited)
		loop_stop(setting->loop);
}

static void on_accept(void *user, int fd, const struct ucred *peer)
{
	struct setting *setting = user;

	assert_true(setting->accepted < MANY);
	assert_int_equal(fcntl(fd, F_GETFD), FD_CLOEXEC);
	assert_true(fcntl(fd, F_GETFL) & O_NONBLOCK);
	setting->fds[setting->accepted++] = fd;
	setting->peer = *peer;
	count_one(setting);
}

static void on_refuse(void *user, int fd, const struct ucred *peer)
{
	struct setting *setting = user;

	assert_int_equal(send(fd, "no", 2, MSG_NOSIGNAL), 2);
	setting->refused++;
	setting->peer = *peer;
	count_one(setting);
}

static struct listener_options default_options(const struct setting *setting)
{
	return (struct listener_options){
		.path = setting->path, .mode = 0600, .owner = (uid_t)-1, .group = (gid_t)-1, .refuse = on_refuse};
}

static int listen_with(struct setting *setting, const struct listener_options *options, struct listener **ret)
{
	setting->text[0] = '\0';
	return listener_new(setting->loop, options, on_accept, setting, ret, setting->text);
}

static void start(struct setting *setting)
{
	struct listener_options options = default_options(setting);

	if (listen_with(setting, &options, &setting->listener) != 0)
		fail_msg("%s", setting->text);
}

/* A refusal leaves *ret alone and says why. */
static void expect_failure(struct setting *setting, const struct listener_options *options, int status, const char *why)
{
	struct listener *listener = (void *)setting;
	char expected[LISTENER_TEXT];

	assert_int_equal(listen_with(setting, options, &listener), status);
	assert_ptr_equal(listener, setting);
	(void)snprintf(expected, sizeof(expected), "socket %s: %s", options->path, why);
	assert_string_equal(setting->text, expected);
}

static int socket_new(const char *path, struct sockaddr_un *ret)
{
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	assert_true(fd >= 0);
	*ret = (struct sockaddr_un){.sun_family = AF_UNIX};
	assert_true(strlen(path) < sizeof(ret->sun_path));
	(void)snprintf(ret->sun_path, sizeof(ret->sun_path), "%s", path);
	return fd;
}

static int client_new(const char *path)
{
	struct sockaddr_un address;
	int fd = socket_new(path, &address);

	assert_int_equal(connect(fd, (const struct sockaddr *)&address, sizeof(address)), 0);
	return fd;
}

/* Runs the loop until that many connections have been decided on. */
static void await(struct setting *setting, unsigned count)
{
	setting->awaited = count;
	assert_int_equal(loop_run(setting->loop), 0);
	assert_int_equal(setting->accepted + setting->refused, count);
}

static void check_works(struct setting *setting)
{
	unsigned before = setting->accepted;
	int client = client_new(setting->path);

	await(setting, before + 1);
	assert_int_equal(setting->accepted, before + 1);
	assert_int_equal(close(client), 0);
}

/* ---- binding ---- */

static void test_mode_and_path(void **state)
{
	struct setting *setting = *state;
	struct listener_options options = default_options(setting);
	struct stat st;
	mode_t mask = umask(027);

	options.mode = 0666;
	assert_int_equal(listen_with(setting, &options, &setting->listener), 0);
	assert_int_equal(umask(mask), 027);
	assert_int_equal(lstat(setting->path, &st), 0);
	assert_int_equal(st.st_mode, S_IFSOCK | 0666);
	assert_int_equal(st.st_uid, geteuid());
	check_works(setting);
	setting->listener = listener_free(setting->listener);
	assert_int_equal(lstat(setting->path, &st), -1);
	assert_int_equal(errno, ENOENT);
	assert_null(listener_free(NULL));
}

/* Root gives the socket away; anybody else may not, and leaves no file behind. */
static void test_owner(void **state)
{
	struct setting *setting = *state;
	struct listener_options options = default_options(setting);
	struct stat st;

	options.owner = 4711;
	options.group = 4712;
	if (geteuid() != 0) {
		expect_failure(setting, &options, -EPERM, "Operation not permitted");
		return;
	}
	assert_int_equal(listen_with(setting, &options, &setting->listener), 0);
	assert_int_equal(lstat(setting->path, &st), 0);
	assert_int_equal(st.st_uid, 4711);
	assert_int_equal(st.st_gid, 4712);
	assert_int_equal(st.st_mode, S_IFSOCK | 0600);
}

static void test_stale_socket_is_replaced(void **state)
{
	struct setting *setting = *state;
	struct sockaddr_un address;
	int fd = socket_new(setting->path, &address);

	assert_int_equal(bind(fd, (const struct sockaddr *)&address, sizeof(address)), 0);
	assert_int_equal(listen(fd, 1), 0);
	assert_int_equal(close(fd), 0);
	assert_int_equal(access(setting->path, F_OK), 0);
	start(setting);
	check_works(setting);
}

static void test_in_use(void **state)
{
	struct setting *setting = *state;
	struct listener_options options = default_options(setting);

	start(setting);
	expect_failure(setting, &options, -EADDRINUSE, "in use: another process listens there");
	await(setting, 1); /* its attempt to connect */
	check_works(setting);
}

static void test_other_kind_of_file(void **state)
{
	struct setting *setting = *state;
	struct listener_options options = default_options(setting);
	struct stat st;
	int fd = open(setting->path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);

	assert_int_equal(write(fd, "kept", 4), 4);
	assert_int_equal(close(fd), 0);
	expect_failure(setting, &options, -EEXIST, "there is a file of another kind");
	assert_int_equal(lstat(setting->path, &st), 0);
	assert_int_equal(st.st_size, 4);
	assert_int_equal(unlink(setting->path), 0);
	assert_int_equal(symlink("nowhere", setting->path), 0);
	expect_failure(setting, &options, -EEXIST, "there is a file of another kind");
	assert_int_equal(unlink(setting->path), 0);
}

static void test_path_length(void **state)
{
	struct setting *setting = *state;
	struct listener_options options = default_options(setting);
	size_t used = strlen(setting->dir) + 1, longest = sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1;

	memset(setting->path + used, 'x', sizeof(setting->path) - used);
	setting->path[longest + 1] = '\0';
	expect_failure(setting, &options, -ENAMETOOLONG, "File name too long");
	setting->path[longest] = '\0';
	start(setting);
	check_works(setting);
}

static void test_no_such_folder(void **state)
{
	struct setting *setting = *state;
	struct listener_options options = default_options(setting);

	(void)snprintf(setting->path, sizeof(setting->path), "%s/missing/socket", setting->dir);
	expect_failure(setting, &options, -ENOENT, "No such file or directory");
}

/* ---- accepting ---- */

static void test_credentials(void **state)
{
	struct setting *setting = *state;
	struct listener_options options = default_options(setting);
	const uid_t uids[] = {geteuid() + 1, geteuid()};

	options.uids = uids;
	options.uid_count = 2;
	assert_int_equal(listen_with(setting, &options, &setting->listener), 0);
	check_works(setting);
	assert_int_equal(setting->refused, 0);
	assert_int_equal(setting->peer.pid, getpid());
	assert_int_equal(setting->peer.uid, geteuid());
	assert_int_equal(setting->peer.gid, getegid());
}

static void test_uid_refused(void **state)
{
	struct setting *setting = *state;
	struct listener_options options = default_options(setting);
	uid_t uids[] = {geteuid() + 1};
	char bytes[8];
	int client;

	options.uids = uids;
	options.uid_count = 1;
	assert_int_equal(listen_with(setting, &options, &setting->listener), 0);
	uids[0] = geteuid(); /* the listener keeps its own copy */
	client = client_new(setting->path);
	await(setting, 1);
	assert_int_equal(setting->refused, 1);
	assert_int_equal(setting->accepted, 0);
	assert_int_equal(setting->peer.uid, geteuid());
	assert_int_equal(recv(client, bytes, sizeof(bytes), 0), 2);
	assert_memory_equal(bytes, "no", 2);
	assert_int_equal(recv(client, bytes, sizeof(bytes), 0), 0);
	assert_int_equal(close(client), 0);
}

static void test_many_at_once(void **state)
{
	struct setting *setting = *state;
	int clients[MANY];

	start(setting);
	for (unsigned i = 0; i < MANY; i++)
		clients[i] = client_new(setting->path);
	await(setting, MANY);
	assert_int_equal(setting->accepted, MANY);
	for (unsigned i = 0; i < MANY; i++)
		assert_int_equal(close(clients[i]), 0);
}

/* ---- out of descriptors ---- */

struct shortage {
	struct rlimit limit;
	struct setting *setting;
	int saved_stderr, pipe_fds[2];
	char line[512];
};

/* The listener has logged that it could not accept: lets it. */
static void on_logged(void *user, uint32_t revents)
{
	struct shortage *shortage = user;
	ssize_t n = read(shortage->pipe_fds[0], shortage->line, sizeof(shortage->line) - 1);

	(void)revents;
	if (n <= 0)
		return;
	shortage->line[n] = '\0';
	assert_int_equal(shortage->setting->accepted, 0);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &shortage->limit), 0);
}

/* Standard error goes into a pipe, and no descriptor is free any more. */
static void shortage_begin(struct shortage *shortage, struct loop_watch **ret_watch)
{
	struct rlimit none;
	int lowest;

	assert_int_equal(getrlimit(RLIMIT_NOFILE, &shortage->limit), 0);
	assert_int_equal(pipe2(shortage->pipe_fds, O_CLOEXEC | O_NONBLOCK), 0);
	shortage->saved_stderr = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0);
	assert_true(shortage->saved_stderr >= 0);
	assert_int_equal(dup2(shortage->pipe_fds[1], STDERR_FILENO), STDERR_FILENO);
	assert_int_equal(
		loop_watch_new(shortage->setting->loop, shortage->pipe_fds[0], POLLIN, on_logged, shortage, ret_watch),
		0);
	lowest = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0);
	assert_true(lowest >= 0);
	assert_int_equal(close(lowest), 0);
	none = shortage->limit;
	none.rlim_cur = (rlim_t)lowest;
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
}

static void shortage_end(struct shortage *shortage, struct loop_watch *watch)
{
	(void)loop_watch_free(watch);
	assert_int_equal(dup2(shortage->saved_stderr, STDERR_FILENO), STDERR_FILENO);
	assert_int_equal(close(shortage->saved_stderr), 0);
	assert_int_equal(close(shortage->pipe_fds[0]), 0);
	assert_int_equal(close(shortage->pipe_fds[1]), 0);
}

/* No event tells of the connection again; the listener comes back to it by itself. */
static void test_out_of_descriptors(void **state)
{
	struct setting *setting = *state;
	struct shortage shortage = {.setting = setting};
	struct loop_watch *watch;
	int client;

	start(setting);
	client = client_new(setting->path);
	shortage_begin(&shortage, &watch);
	await(setting, 1);
	shortage_end(&shortage, watch);
	assert_int_equal(setting->accepted, 1);
	assert_non_null(strstr(shortage.line, setting->path));
	assert_non_null(strstr(shortage.line, "accept: Too many open files; trying again\n"));
	assert_int_equal(close(client), 0);
	check_works(setting);
}

#define WITH_LOOP(test) cmocka_unit_test_setup_teardown(test, setting_setup, setting_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		WITH_LOOP(test_mode_and_path),
		WITH_LOOP(test_owner),
		WITH_LOOP(test_stale_socket_is_replaced),
		WITH_LOOP(test_in_use),
		WITH_LOOP(test_other_kind_of_file),
		WITH_LOOP(test_path_length),
		WITH_LOOP(test_no_such_folder),
		WITH_LOOP(test_credentials),
		WITH_LOOP(test_uid_refused),
		WITH_LOOP(test_many_at_once),
		WITH_LOOP(test_out_of_descriptors),
	};

	return runner_run("daemon/session/listener", tests, sizeof(tests) / sizeof(tests[0]));
}
