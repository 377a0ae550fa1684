/* Starting and stopping: what a daemon refuses in one line, and what it leaves behind. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define POOL   "[pool]\ndevice.size = 32M\nextent_size = 256K\n"
#define TENANT "[tenant a]\nsocket = a.sock\n"

static void run_daemon(const struct fixture *f, struct process_output *ret)
{
	char config[FIXTURE_PATH], state[FIXTURE_PATH];
	const char *argv[] = {fixture_program(), "--config", fixture_path(f, "kvgated.conf", config), "--state-dir",
		fixture_path(f, "state", state), NULL};

	process_run(argv, FIXTURE_WAIT_MS, ret);
}

/* A non-zero exit that is no crash, and exactly one line that names what is wrong. */
static void assert_refusal(const struct process_output *output, const char *names)
{
	const char *end = strchr(output->err, '\n');

	if (output->status < 1 || output->status > 2 || !end || end[1] != '\0' || !strstr(output->err, names))
		fail_msg("status %d, and not one line with \"%s\": \"%s\"", output->status, names, output->err);
}

static void refuse_config(const char *config, const char *names)
{
	struct process_output output;
	struct fixture f;
	char path[FIXTURE_PATH];

	fixture_prepare(&f, config);
	run_daemon(&f, &output);
	assert_refusal(&output, names);
	assert_int_not_equal(access(fixture_path(&f, "state/a.sock", path), F_OK), 0);
	fixture_remove(&f);
}

static void test_unknown_keys_and_sections_are_refused(void **state)
{
	(void)state;
	refuse_config(POOL "colour = red\n" TENANT, "colour");
	refuse_config(POOL TENANT "device.min_max = 3\n", "device.min_max");
	refuse_config(POOL TENANT "[cellar]\nwine = 3\n", "cellar");
	refuse_config(POOL TENANT "[tenant]\nsocket = b.sock\n", "tenant");
	refuse_config(POOL TENANT "this is no line\n", "kvgated.conf");
}

static void test_wrong_sizes_are_refused(void **state)
{
	(void)state;
	refuse_config("[pool]\ndevice.size = lots\n" TENANT, "device.size");
	refuse_config("[pool]\ndevice.size = -4M\n" TENANT, "device.size");
	refuse_config("[pool]\ndevice.size = 0\n" TENANT, "device.size");
	refuse_config("[pool]\ndevice.size = 99999999999999999999\n" TENANT, "device.size");
	refuse_config("[pool]\ndevice.size = 32M\nextent_size = 300K\n" TENANT, "extent_size");
	refuse_config("[pool]\ndevice.size = 32M\nextent_size = 1K\n" TENANT, "extent_size");
	refuse_config("[pool]\ndevice.size = 32M\nextent_size = 2G\n" TENANT, "extent_size");
	refuse_config("[pool]\nextent_size = 256K\n" TENANT, "device.size");
	refuse_config(POOL TENANT "device.max = 12 apples\n", "device.max");
	refuse_config(POOL TENANT "mode = 0999\n", "mode");
	refuse_config(POOL TENANT "uids = root me\n", "uids");
}

static void test_tenants_must_be_there_and_differ(void **state)
{
	(void)state;
	refuse_config(POOL, "tenant");
	refuse_config(POOL TENANT "[tenant b]\nsocket = a.sock\n", "a.sock");
}

static void test_a_missing_file_and_bad_arguments_are_refused(void **state)
{
	struct process_output output;
	const char *missing[] = {fixture_program(), "--config", "/nonexistent/kvgated.conf", NULL};
	const char *unknown[] = {fixture_program(), "--colour", "red", NULL};

	(void)state;
	process_run(missing, FIXTURE_WAIT_MS, &output);
	assert_refusal(&output, "/nonexistent/kvgated.conf");
	process_run(unknown, FIXTURE_WAIT_MS, &output);
	assert_in_range(output.status, 1, 2);
	assert_non_null(strstr(output.err, "colour"));
}

static void test_a_second_daemon_on_one_state_folder_is_refused(void **state)
{
	struct process_output output;
	struct fixture f;
	char path[FIXTURE_PATH];
	struct kvg_layout layout;
	struct kvg_client *client;

	(void)state;
	fixture_start(&f, POOL TENANT);
	run_daemon(&f, &output);
	assert_refusal(&output, f.dir);
	kv_small_layout(&layout, 2, 1024);
	client = kv_connect(fixture_path(&f, "state/a.sock", path), "still", &layout);
	assert_non_null(client);
	(void)kvg_close(client);
	fixture_audit(&f);
	fixture_stop(&f);
}

static void test_a_socket_in_use_is_refused_and_left_alone(void **state)
{
	struct process_output output;
	struct fixture first, second;
	char config[512], path[FIXTURE_PATH];
	struct kvg_layout layout;
	struct kvg_client *client;

	(void)state;
	fixture_start(&first, POOL TENANT);
	(void)fixture_path(&first, "state/a.sock", path);
	(void)snprintf(config, sizeof(config), POOL "[tenant b]\nsocket = %s\n", path);
	fixture_prepare(&second, config);
	run_daemon(&second, &output);
	assert_refusal(&output, path);
	kv_small_layout(&layout, 2, 1024);
	client = kv_connect(path, "still", &layout);
	assert_non_null(client);
	(void)kvg_close(client);
	fixture_remove(&second);
	fixture_audit(&first);
	fixture_stop(&first);
}

static void test_a_file_that_is_no_socket_is_refused_and_left_alone(void **state)
{
	struct process_output output;
	struct fixture f;
	char path[FIXTURE_PATH];
	struct stat st;
	FILE *file;

	(void)state;
	fixture_prepare(&f, POOL TENANT);
	file = fopen(fixture_path(&f, "state/a.sock", path), "we");
	assert_non_null(file);
	assert_true(fputs("precious\n", file) >= 0);
	assert_int_equal(fclose(file), 0);
	run_daemon(&f, &output);
	assert_refusal(&output, path);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_size, 9);
	fixture_remove(&f);
}

static void test_a_stale_socket_is_replaced(void **state)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct fixture f;
	char path[FIXTURE_PATH];
	struct kvg_layout layout;
	struct kvg_client *client;
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	(void)state;
	fixture_prepare(&f, POOL TENANT);
	(void)snprintf(address.sun_path, sizeof(address.sun_path), "%.100s", fixture_path(&f, "state/a.sock", path));
	assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
	(void)close(fd);
	fixture_begin(&f);
	kv_small_layout(&layout, 2, 1024);
	client = kv_connect(path, "fresh", &layout);
	assert_non_null(client);
	(void)kvg_close(client);
	fixture_audit(&f);
	fixture_stop(&f);
}

static void test_a_stop_takes_the_sockets_away_and_a_start_brings_them_back(void **state)
{
	struct fixture f;
	char path[FIXTURE_PATH], admin[FIXTURE_PATH], status[256];
	struct stat st;

	(void)state;
	fixture_start(&f, POOL TENANT "mode = 0640\n");
	(void)fixture_path(&f, "state/a.sock", path);
	(void)fixture_path(&f, "state/admin.sock", admin);
	for (int i = 0; i < 3; i++) {
		assert_int_equal(stat(path, &st), 0);
		assert_true(S_ISSOCK(st.st_mode));
		assert_int_equal(st.st_mode & 07777, 0640);
		assert_int_equal(stat(admin, &st), 0);
		assert_int_equal(st.st_mode & 07777, 0660);
		fixture_audit(&f);
		fixture_end(&f);
		assert_int_equal(access(path, F_OK), -1);
		assert_int_equal(access(admin, F_OK), -1);
		fixture_begin(&f);
	}
	fixture_status_text(&f, status, sizeof(status));
	fixture_stop(&f);
}

static void test_a_stop_says_goodbye_to_workers(void **state)
{
	struct kvg_policy policy = kv_policy(300, 0.3, 20);
	struct fixture f;
	struct kvg_layout layout;
	struct kvg_client *client;
	struct kv kv;
	char path[FIXTURE_PATH];

	(void)state;
	fixture_start(&f, POOL TENANT);
	kv_small_layout(&layout, 2, 1024);
	client = kv_connect(fixture_path(&f, "state/a.sock", path), "left", &layout);
	assert_non_null(client);
	assert_int_equal(kv_create(&kv, client, &layout, &policy, 1), 0);
	assert_int_equal(kv_feed(&kv, 301, 1), 0);
	fixture_audit(&f);
	fixture_end(&f);
	assert_int_equal(kvg_nop(client), -EPIPE);
	assert_true(*kvg_error(client));
	kv_forget(&kv);
	(void)kvg_close(client);
	fixture_stop(&f);
}

static void test_the_socket_option_overrides_the_first_tenants(void **state)
{
	struct fixture f;
	struct process_output output;
	char config[FIXTURE_PATH], state_dir[FIXTURE_PATH], path[FIXTURE_PATH];

	(void)state;
	fixture_start(&f, POOL TENANT);
	fixture_end(&f);
	const char *argv[] = {fixture_program(), "--config", fixture_path(&f, "kvgated.conf", config), "--state-dir",
		fixture_path(&f, "state", state_dir), "--socket", "/nonexistent/folder/x.sock", NULL};
	process_run(argv, FIXTURE_WAIT_MS, &output);
	assert_refusal(&output, "/nonexistent/folder/x.sock");
	assert_int_equal(access(fixture_path(&f, "state/admin.sock", path), F_OK), -1);
	fixture_stop(&f);
}

static int make_folder(const struct fixture *f, const char *name, mode_t mode)
{
	char path[FIXTURE_PATH];

	return mkdir(fixture_path(f, name, path), mode);
}

static bool log_has(const struct fixture *f, const char *text)
{
	char path[FIXTURE_PATH], log[8192];
	FILE *file = fopen(fixture_path(f, "log", path), "re");
	size_t n;

	assert_non_null(file);
	n = fread(log, 1, sizeof(log) - 1, file);
	log[n] = '\0';
	assert_int_equal(fclose(file), 0);
	return strstr(log, text);
}

/* The lock cannot be there, and nothing can be done without it. */
static void test_a_read_only_state_folder_is_refused(void **state)
{
	struct process_output output;
	struct fixture f;
	char config[FIXTURE_PATH], folder[FIXTURE_PATH], expected[2 * FIXTURE_PATH];
	const char *argv[12];
	size_t n = 0;

	(void)state;
	fixture_prepare(&f, POOL TENANT);
	(void)fixture_path(&f, "kvgated.conf", config);
	(void)fixture_path(&f, "state", folder);
	assert_int_equal(chmod(folder, 0555), 0);
	for (const char *const *word = fixture_obedience(); *word; word++)
		argv[n++] = *word;
	const char *const rest[] = {fixture_program(), "--config", config, "--state-dir", folder, NULL};
	memcpy(argv + n, rest, sizeof(rest));
	process_run(argv, FIXTURE_WAIT_MS, &output);
	(void)snprintf(expected, sizeof(expected), "state directory %s: lock: Permission denied", folder);
	assert_refusal(&output, expected);
	assert_int_equal(chmod(folder, 0700), 0);
	fixture_remove(&f);
}

static void test_budgets_have_a_folder_of_their_own(void **state)
{
	struct fixture f;
	char path[FIXTURE_PATH], text[FIXTURE_TEXT];
	struct fixture_usage usage;

	(void)state;
	fixture_start(&f, POOL "[daemon]\nbudgets_dir = ../kept\n" TENANT);
	assert_int_equal(fixture_budget_set(&f, "a", 8 << 20, text), 0);
	assert_int_equal(access(fixture_path(&f, "kept/budgets.conf", path), F_OK), 0);
	assert_int_equal(access(fixture_path(&f, "state/budgets.conf", path), F_OK), -1);
	fixture_end(&f);
	fixture_begin(&f);
	fixture_tenant(&f, "a", &usage);
	assert_int_equal(usage.device_max, 8 << 20);
	fixture_stop(&f);
}

/* It is said at the start, and to whoever would set one. Everything else works. */
static void test_budgets_that_cannot_be_kept(void **state)
{
	struct fixture f;
	char path[FIXTURE_PATH], text[FIXTURE_TEXT];
	struct fixture_usage usage;
	struct kvg_layout layout;
	struct kvg_client *client;

	(void)state;
	fixture_prepare(&f, POOL "[daemon]\nbudgets_dir = kept\n" TENANT);
	assert_int_equal(make_folder(&f, "state/kept", 0555), 0);
	f.obedient = true;
	fixture_begin(&f);
	assert_true(log_has(&f, "state/kept: Permission denied: budgets cannot be set while the daemon runs\n"));
	assert_int_equal(fixture_budget_set(&f, "a", 8 << 20, text), -EACCES);
	assert_non_null(
		strstr(text, "state/kept/budgets.conf: cannot be written: Permission denied; nothing was changed"));
	fixture_tenant(&f, "a", &usage);
	assert_int_equal(usage.device_max, 32 << 20);
	assert_false(fixture_budget_is_live(&f, "a"));
	kv_small_layout(&layout, 2, 1024);
	client = kv_connect(fixture_path(&f, "state/a.sock", path), "still", &layout);
	assert_non_null(client);
	(void)kvg_close(client);
	fixture_stop(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_unknown_keys_and_sections_are_refused),
		cmocka_unit_test(test_wrong_sizes_are_refused),
		cmocka_unit_test(test_tenants_must_be_there_and_differ),
		cmocka_unit_test(test_a_missing_file_and_bad_arguments_are_refused),
		cmocka_unit_test(test_a_second_daemon_on_one_state_folder_is_refused),
		cmocka_unit_test(test_a_socket_in_use_is_refused_and_left_alone),
		cmocka_unit_test(test_a_file_that_is_no_socket_is_refused_and_left_alone),
		cmocka_unit_test(test_a_stale_socket_is_replaced),
		cmocka_unit_test(test_a_stop_takes_the_sockets_away_and_a_start_brings_them_back),
		cmocka_unit_test(test_a_stop_says_goodbye_to_workers),
		cmocka_unit_test(test_a_read_only_state_folder_is_refused),
		cmocka_unit_test(test_budgets_have_a_folder_of_their_own),
		cmocka_unit_test(test_budgets_that_cannot_be_kept),
		cmocka_unit_test(test_the_socket_option_overrides_the_first_tenants),
	};

	return runner_run("config", tests, sizeof(tests) / sizeof(*tests));
}
