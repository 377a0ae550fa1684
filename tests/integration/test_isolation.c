/*
 * Two tenants under two uids: what one can reach of the other, tried by programs that setpriv
 * runs under those uids. Needs root to become them; skipped (77) otherwise.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/integration/raw.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define UID_A "65501"
#define UID_B "65502"

struct stage {
	struct fixture fixture;
	char role[FIXTURE_PATH]; /* the copied program, readable for everyone */
	char library_path[FIXTURE_PATH + 32];
	char a[FIXTURE_PATH], b[FIXTURE_PATH], admin[FIXTURE_PATH];
};

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

/* Both tenants with these settings, each for its own uid. */
#define TENANTS(settings)                                                                                              \
	"[pool]\ndevice.size = 32M\nextent_size = 256K\n"                                                              \
	"[tenant a]\nsocket = a.sock\nuids = " UID_A "\n" settings "[tenant b]\nsocket = b.sock\nuids = " UID_B        \
	"\n" settings
#define OPEN_TENANTS TENANTS("mode = 0666\n")

/* The build folder may be closed to other uids: the program and the library go where they can be read. */
static void stage_open(struct stage *s, const char *config, uid_t daemon)
{
	char library[FIXTURE_PATH], name[FIXTURE_PATH];
	const char *file = strrchr(KVG_LIB_CLIENT, '/') + 1;

	fixture_prepare(&s->fixture, config);
	s->fixture.uid = daemon;
	fixture_begin(&s->fixture);
	assert_int_equal(chmod(s->fixture.dir, 0755), 0);
	assert_int_equal(chmod(fixture_path(&s->fixture, "state", name), 0755), 0);
	(void)fixture_path(&s->fixture, "state/a.sock", s->a);
	(void)fixture_path(&s->fixture, "state/b.sock", s->b);
	(void)fixture_path(&s->fixture, "state/admin.sock", s->admin);
	copy_file(KVG_BIN_ROLE, fixture_path(&s->fixture, "role", s->role));
	assert_in_range(snprintf(name, sizeof(name), "%s", file), 1, sizeof(name) - 1);
	copy_file(KVG_LIB_CLIENT, fixture_path(&s->fixture, name, library));
	(void)snprintf(s->library_path, sizeof(s->library_path), "LD_LIBRARY_PATH=%s", s->fixture.dir);
}

static void stage_close(struct stage *s)
{
	fixture_audit(&s->fixture);
	fixture_stop(&s->fixture);
}

#define ROLE_ARGV(stage, uid, command, argument)                                                                       \
	{                                                                                                              \
		"setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "env", (stage)->library_path,             \
			(stage)->role, command, argument, NULL                                                         \
	}

static void run_role(
	const struct stage *s, const char *uid, const char *command, const char *argument, struct process_output *ret)
{
	const char *argv[] = ROLE_ARGV(s, uid, command, argument);

	process_run(argv, FIXTURE_WAIT_MS, ret);
	if (ret->status)
		fail_msg("role %s: status %d, %s", command, ret->status, ret->err);
}

static void assert_line(const struct process_output *output, const char *line)
{
	const char *at = strstr(output->out, line);

	if (!at || at[strlen(line)] != '\n')
		fail_msg("no line \"%s\" in \"%s\"", line, output->out);
}

static void start_holder(const struct stage *s, const char *uid, const char *socket, struct process *ret, char pid[32])
{
	const char *argv[] = ROLE_ARGV(s, uid, "hold", socket);
	char line[64];

	process_spawn(ret, argv);
	process_line(ret, line, sizeof(line));
	assert_int_equal(sscanf(line, "holding %31s", pid), 1);
}

static void test_a_worker_reaches_its_own_socket_and_not_the_others(void **state)
{
	struct process_output output;
	struct stage s;

	(void)state;
	stage_open(&s, OPEN_TENANTS, 0);
	run_role(&s, UID_A, "connect", s.b, &output);
	assert_line(&output, "connect EACCES");
	run_role(&s, UID_B, "connect", s.a, &output);
	assert_line(&output, "connect EACCES");
	run_role(&s, UID_A, "connect", s.a, &output);
	assert_line(&output, "connect ok");
	assert_true(fixture_wait_gone(&s.fixture, 0, 0, FIXTURE_WAIT_MS));
	stage_close(&s);
}

/* 0600 with one uid makes the socket that uid's; with more the mode would let none of them in. */
static void test_a_private_socket_belongs_to_its_one_uid(void **state)
{
	struct process_output output;
	struct stage s;
	struct stat st;

	(void)state;
	stage_open(&s, TENANTS("mode = 0600\n"), 0);
	assert_int_equal(stat(s.a, &st), 0);
	assert_int_equal(st.st_mode & 07777, 0600);
	run_role(&s, UID_A, "connect", s.a, &output);
	assert_line(&output, "connect ok");
	run_role(&s, UID_B, "connect", s.a, &output);
	assert_line(&output, "connect EACCES");
	assert_true(fixture_wait_gone(&s.fixture, 0, 0, FIXTURE_WAIT_MS));
	stage_close(&s);
}

static void test_a_worker_cannot_reach_the_admin_socket(void **state)
{
	struct process_output output;
	struct stage s;

	(void)state;
	stage_open(&s, OPEN_TENANTS, 0);
	run_role(&s, UID_A, "admin", s.admin, &output);
	assert_line(&output, "admin EACCES");
	stage_close(&s);
}

static void test_a_worker_cannot_open_anything_of_the_daemon(void **state)
{
	struct process_output output;
	struct process holder;
	struct stage s;
	char pid[32];

	(void)state;
	stage_open(&s, OPEN_TENANTS, 0);
	start_holder(&s, UID_B, s.b, &holder, pid);
	(void)snprintf(pid, sizeof(pid), "%d", (int)s.fixture.pid);
	run_role(&s, UID_A, "proc", pid, &output);
	assert_line(&output, "fd EACCES");
	assert_line(&output, "descriptors 0");
	assert_line(&output, "mem EACCES");
	process_finish(&holder);
	stage_close(&s);
}

static void test_a_worker_cannot_open_anything_of_another_tenants_worker(void **state)
{
	struct process_output output;
	struct process holder;
	struct stage s;
	char pid[32];

	(void)state;
	stage_open(&s, OPEN_TENANTS, 0);
	start_holder(&s, UID_B, s.b, &holder, pid);
	run_role(&s, UID_A, "proc", pid, &output);
	assert_line(&output, "fd EACCES");
	assert_line(&output, "descriptors 0");
	assert_line(&output, "mem EACCES");
	process_finish(&holder);
	stage_close(&s);
}

/* The descriptor of the table goes to a program of another uid than the daemon's as its standard input. */
static void test_a_worker_cannot_write_to_its_table(void **state)
{
	struct process_output output;
	struct kvg_layout layout;
	struct stage s;
	struct raw raw;
	int keep;

	(void)state;
	stage_open(&s, "[pool]\ndevice.size = 32M\n[tenant a]\nsocket = a.sock\n", 0);
	kv_small_layout(&layout, 2, 2048);
	raw_open(&raw, s.a, &layout);
	keep = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 10);
	assert_int_equal(dup2(raw.table, STDIN_FILENO), STDIN_FILENO);
	run_role(&s, UID_A, "tables", "-", &output);
	if (keep >= 0)
		(void)dup2(keep, STDIN_FILENO);
	(void)close(keep);
	assert_line(&output, "read ok");
	assert_line(&output, "map EACCES");
	assert_line(&output, "mprotect EACCES");
	assert_line(&output, "reopen EACCES");
	assert_line(&output, "append EACCES");
	assert_line(&output, "write EBADF");
	assert_line(&output, "truncate EINVAL");
	assert_line(&output, "chmod EPERM");
	raw_close(&raw);
	assert_true(fixture_wait_gone(&s.fixture, 0, 0, FIXTURE_WAIT_MS));
	stage_close(&s);
}

/* The whole service without root: daemon and worker under one uid, a stranger refused. */
static void test_the_daemon_serves_without_privileges(void **state)
{
	struct process_output output;
	struct process holder;
	struct stage s;
	char pid[32];

	(void)state;
	stage_open(&s, OPEN_TENANTS, 65503);
	start_holder(&s, UID_A, s.a, &holder, pid);
	run_role(&s, UID_A, "connect", s.b, &output);
	assert_line(&output, "connect EACCES");
	(void)snprintf(pid, sizeof(pid), "%d", (int)s.fixture.pid);
	run_role(&s, UID_A, "proc", pid, &output);
	assert_line(&output, "descriptors 0");
	process_finish(&holder);
	assert_true(fixture_wait_gone(&s.fixture, 0, 0, FIXTURE_WAIT_MS));
	stage_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_a_worker_reaches_its_own_socket_and_not_the_others),
		cmocka_unit_test(test_a_private_socket_belongs_to_its_one_uid),
		cmocka_unit_test(test_a_worker_cannot_reach_the_admin_socket),
		cmocka_unit_test(test_a_worker_cannot_open_anything_of_the_daemon),
		cmocka_unit_test(test_a_worker_cannot_open_anything_of_another_tenants_worker),
		cmocka_unit_test(test_a_worker_cannot_write_to_its_table),
		cmocka_unit_test(test_the_daemon_serves_without_privileges),
	};

	if (geteuid() != 0) {
		(void)fprintf(stderr, "skipped: needs root to run workers under other uids\n");
		return 77;
	}
	return runner_run("isolation", tests, sizeof(tests) / sizeof(*tests));
}
