/* The program itself: its exit status and what it prints where. KVGATECTL is its path. */
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/runner.h"
#include "tests/unit/tools/ctl/fake_daemon.h"

#define OUTPUT_SIZE 16384
#define MAX_WORDS   8

struct outcome {
	int status;
	char out[OUTPUT_SIZE], err[OUTPUT_SIZE];
};

static void read_all(int fd, char text[OUTPUT_SIZE])
{
	ssize_t n = pread(fd, text, OUTPUT_SIZE - 1, 0);

	assert_true(n >= 0);
	text[n] = '\0';
}

/* Runs kvgatectl with out_fd (or a memfd, when negative) as its standard output. */
static void run_to(int out_fd, const char *const *words, struct outcome *ret)
{
	int out = memfd_create("out", MFD_CLOEXEC), err = memfd_create("err", MFD_CLOEXEC);
	char *argv[MAX_WORDS + 2] = {(char *)(uintptr_t)KVGATECTL};
	posix_spawn_file_actions_t actions;
	pid_t pid;
	int status;

	for (int i = 0; words[i]; i++) {
		assert_true(i < MAX_WORDS);
		argv[i + 1] = (char *)(uintptr_t)words[i];
	}
	assert_int_equal(posix_spawn_file_actions_init(&actions), 0);
	assert_int_equal(posix_spawn_file_actions_adddup2(&actions, out_fd < 0 ? out : out_fd, STDOUT_FILENO), 0);
	assert_int_equal(posix_spawn_file_actions_adddup2(&actions, err, STDERR_FILENO), 0);
	assert_int_equal(posix_spawn(&pid, KVGATECTL, &actions, NULL, argv, environ), 0);
	assert_int_equal(posix_spawn_file_actions_destroy(&actions), 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	ret->status = WEXITSTATUS(status);
	read_all(out, ret->out);
	read_all(err, ret->err);
	(void)close(out);
	(void)close(err);
}

static void run(const char *const *words, struct outcome *ret)
{
	run_to(-1, words, ret);
}

/* Runs a command against a fake daemon that gives this reply. */
static void run_answered(
	const Kvg__AdminReply *reply, const char *option, const char *command, int out_fd, struct outcome *ret)
{
	struct fake_daemon fake;

	fake_daemon_start(&fake, FAKE_REPLY, reply);
	run_to(out_fd, (const char *const[]){"--socket", fake.path, command, option, NULL}, ret);
	fake_daemon_stop(&fake);
	fake_daemon_deinit(&fake);
}

static void test_help(void **state)
{
	struct outcome got;

	(void)state;
	run((const char *const[]){"--help", NULL}, &got);
	assert_int_equal(got.status, 0);
	assert_non_null(strstr(got.out, "budget set TENANT KEY=SIZE..."));
	assert_non_null(strstr(got.out, "/run/kvgate/admin.sock"));
	assert_string_equal(got.err, "");
}

static void test_wrong_usage(void **state)
{
	struct outcome got;

	(void)state;
	run((const char *const[]){NULL}, &got);
	assert_int_equal(got.status, 2);
	assert_string_equal(got.out, "");
	run((const char *const[]){"budget", "set", "a", "device.max=lots", NULL}, &got);
	assert_int_equal(got.status, 2);
	assert_string_equal(got.err, "kvgatectl: device.max='lots': not a size such as 512M, 1.5G or 1073741824\n");
}

static void test_no_daemon(void **state)
{
	struct outcome got;

	(void)state;
	run((const char *const[]){"--socket", "/nowhere/admin.sock", "status", NULL}, &got);
	assert_int_equal(got.status, 1);
	assert_string_equal(got.out, "");
	assert_string_equal(got.err, "kvgatectl: admin socket /nowhere/admin.sock: No such file or directory\n");
}

static void test_audit_decides_the_status(void **state)
{
	char difference[] = "tenant a: charged 1, counted 2";
	char *differences[] = {difference};
	Kvg__Audit audit = KVG__AUDIT__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;
	struct outcome got;

	(void)state;
	reply.body_case = KVG__ADMIN_REPLY__BODY_AUDIT;
	reply.audit = &audit;
	audit.clean = 1;
	run_answered(&reply, NULL, "audit", -1, &got);
	assert_int_equal(got.status, 0);
	audit.clean = 0;
	audit.differences = differences;
	audit.n_differences = 1;
	run_answered(&reply, NULL, "audit", -1, &got);
	assert_int_equal(got.status, 1);
	assert_non_null(strstr(got.out, "difference: tenant a: charged 1, counted 2\n"));
	run_answered(&reply, "--json", "audit", -1, &got);
	assert_int_equal(got.status, 1);
	assert_non_null(strstr(got.out, "\"clean\": false"));
}

static void test_error_reply_is_one_line(void **state)
{
	char text[] = "two\nlines and \x1b[2J";
	Kvg__Error error = KVG__ERROR__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;
	struct outcome got;

	(void)state;
	error.status = -5;
	error.text = text;
	reply.body_case = KVG__ADMIN_REPLY__BODY_ERROR;
	reply.error = &error;
	run_answered(&reply, NULL, "status", -1, &got);
	assert_int_equal(got.status, 1);
	assert_string_equal(got.err, "kvgatectl: two lines and  [2J\n");
}

static void test_answer_of_another_kind(void **state)
{
	Kvg__TenantList tenants = KVG__TENANT_LIST__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;
	struct outcome got;

	(void)state;
	reply.body_case = KVG__ADMIN_REPLY__BODY_TENANTS;
	reply.tenants = &tenants;
	run_answered(&reply, NULL, "status", -1, &got);
	assert_int_equal(got.status, 1);
	assert_non_null(strstr(got.err, "another version"));
}

static void test_full_disk(void **state)
{
	Kvg__TenantList tenants = KVG__TENANT_LIST__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;
	int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
	struct outcome got;

	(void)state;
	assert_true(full >= 0);
	reply.body_case = KVG__ADMIN_REPLY__BODY_TENANTS;
	reply.tenants = &tenants;
	run_answered(&reply, NULL, "tenants", full, &got);
	assert_int_equal(got.status, 1);
	assert_string_equal(got.err, "kvgatectl: standard output: write failed\n");
	run_answered(&reply, "--json", "tenants", full, &got);
	assert_int_equal(got.status, 1);
	(void)close(full);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_help),
		cmocka_unit_test(test_wrong_usage),
		cmocka_unit_test(test_no_daemon),
		cmocka_unit_test(test_audit_decides_the_status),
		cmocka_unit_test(test_error_reply_is_one_line),
		cmocka_unit_test(test_answer_of_another_kind),
		cmocka_unit_test(test_full_disk),
	};

	return runner_run("tools/ctl/main", tests, sizeof(tests) / sizeof(*tests));
}
