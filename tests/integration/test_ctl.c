/* The operator's tool against the real daemon: what it shows is what is, in text and in JSON. */
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define MIB   (1024 * 1024)
#define WORDS 5

struct stage {
	struct fixture fixture;
	struct kvg_layout layout;
	struct kvg_client *client;
	struct kv kv;
};

static void stage_open(struct stage *s)
{
	struct kvg_policy policy = kv_policy(600, 0.3, 20);
	char path[FIXTURE_PATH];

	fixture_start(&s->fixture, "[pool]\ndevice.size = 32M\nextent_size = 256K\n[tenant search]\nsocket = "
				   "search.sock\ndevice.max = 16M\n");
	kv_small_layout(&s->layout, 2, 2048);
	s->client = kv_connect(fixture_path(&s->fixture, "state/search.sock", path), "shown", &s->layout);
	assert_non_null(s->client);
	assert_int_equal(kv_create(&s->kv, s->client, &s->layout, &policy, 1), 0);
	assert_int_equal(kv_feed(&s->kv, 601, 1), 0);
	assert_int_equal(kv_evict(&s->kv, KVG_EVICT_PREFILL), 0);
}

static void stage_close(struct stage *s)
{
	assert_int_equal(kv_check(&s->kv), 0);
	assert_int_equal(kv_free(&s->kv), 0);
	s->client = kvg_close(s->client);
	fixture_audit(&s->fixture);
	fixture_stop(&s->fixture);
}

/* Runs kvgatectl with up to five words; returns its exit status. */
static int ctl(const struct stage *s, int as_json, const char *const words[WORDS], struct process_output *ret)
{
	char admin[FIXTURE_PATH];
	const char *argv[10] = {KVG_BIN_CTL, "--socket", fixture_path(&s->fixture, "state/admin.sock", admin)};
	size_t n = 3;

	if (as_json)
		argv[n++] = "--json";
	for (size_t i = 0; i < WORDS && words[i]; i++)
		argv[n++] = words[i];
	process_run(argv, FIXTURE_WAIT_MS, ret);
	return ret->status;
}

static void test_every_listing_names_what_is_there(void **state)
{
	static const char *const listings[][2] = {{"status", "32.0 MiB"}, {"tenants", "search"}, {"workers", "shown"},
		{"sequences", "search"}, {"audit", "search"}};
	struct process_output output;
	struct stage s;

	(void)state;
	stage_open(&s);
	for (size_t i = 0; i < sizeof(listings) / sizeof(*listings); i++) {
		const char *const words[WORDS] = {listings[i][0]};
		json_t *json;

		assert_int_equal(ctl(&s, 0, words, &output), 0);
		if (!strstr(output.out, listings[i][1]))
			fail_msg("%s shows no \"%s\": %s", listings[i][0], listings[i][1], output.out);
		assert_int_equal(ctl(&s, 1, words, &output), 0);
		json = json_loads(output.out, 0, NULL);
		if (!json)
			fail_msg("%s: not JSON: %s", listings[i][0], output.out);
		json_decref(json);
	}
	stage_close(&s);
}

static void test_a_budget_is_set_and_holds_at_once(void **state)
{
	static const char *const set[WORDS] = {"budget", "set", "search", "device.max=8M"};
	static const char *const get[WORDS] = {"budget", "get", "search"};
	struct fixture_usage usage;
	struct process_output output;
	struct stage s;

	(void)state;
	stage_open(&s);
	assert_int_equal(ctl(&s, 0, set, &output), 0);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.device_max, 8 * MIB);
	assert_int_equal(ctl(&s, 0, get, &output), 0);
	assert_non_null(strstr(output.out, "8.0 MiB"));
	assert_int_equal(ctl(&s, 1, get, &output), 0);
	assert_non_null(strstr(output.out, "8388608"));
	stage_close(&s);
}

/* Several values in one call, and all of them back. */
static void test_a_budget_of_several_values_is_reset(void **state)
{
	static const char *const set[WORDS] = {"budget", "set", "search", "device.max=12M", "device.min=10M"};
	static const char *const reset[WORDS] = {"budget", "reset", "search"};
	struct fixture_usage usage;
	struct process_output output;
	struct stage s;

	(void)state;
	stage_open(&s);
	assert_int_equal(ctl(&s, 0, set, &output), 0);
	assert_non_null(strstr(output.out, "set live    yes"));
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.device_max, 12 * MIB);
	assert_int_equal(usage.device_min, 10 * MIB);
	assert_int_equal(ctl(&s, 0, reset, &output), 0);
	assert_non_null(strstr(output.out, "set live    no"));
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.device_max, 16 * MIB);
	assert_int_equal(usage.device_min, 0);
	fixture_wait_reserved(&s.fixture, "search", 0);
	stage_close(&s);
}

static void test_a_wrong_word_or_tenant_is_named(void **state)
{
	static const char *const wrong[][WORDS] = {{"budget", "get", "nobody"},
		{"budget", "set", "nobody", "device.max=1M"}, {"budget", "set", "search", "device.max=lots"},
		{"dance"}};
	static const char *const names[] = {"nobody", "nobody", "lots", "dance"};
	struct process_output output;
	struct stage s;

	(void)state;
	stage_open(&s);
	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++) {
		assert_in_range(ctl(&s, 0, wrong[i], &output), 1, 2);
		output.err[strcspn(output.err, "\n")] = '\0'; /* a hint may follow */
		if (!strstr(output.err, names[i]))
			fail_msg("no line with \"%s\": \"%s\"", names[i], output.err);
	}
	stage_close(&s);
}

static void stall(const struct stage *s, char path[FIXTURE_PATH])
{
	assert_int_equal(mkfifo(fixture_path(&s->fixture, "state/budgets.conf.new", path), 0600), 0);
}

static void end_stall(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(close(fd), 0);
}

static void wait_min(const struct stage *s, uint64_t bytes)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;
	struct fixture_usage usage;

	while (fixture_tenant(&s->fixture, "search", &usage), usage.device_min != bytes)
		assert_true(fixture_now_ms() < deadline);
}

/*
 * The disk does not answer: a pipe that nobody reads stands where the file is written. Everybody else is served,
 * whether the operator waits or is killed, and when the disk fails in the end nothing has changed.
 */
static void test_a_slow_disk_stops_nobody(void **state)
{
	static const char *const set[WORDS] = {"budget", "set", "search", "device.min=1M", "device.max=12M"};
	static const char *const listing[WORDS] = {"tenants"};
	char path[FIXTURE_PATH], admin[FIXTURE_PATH];
	const char *argv[9] = {KVG_BIN_CTL, "--socket"};
	struct process_program program;
	struct process_output output;
	struct fixture_usage usage;
	struct stage s;

	(void)state;
	stage_open(&s);
	argv[2] = fixture_path(&s.fixture, "state/admin.sock", admin);
	memcpy(argv + 3, set, sizeof(set));
	for (unsigned killed = 0; killed < 2; killed++) {
		stall(&s, path);
		process_start(&program, argv);
		wait_min(&s, MIB); /* kept free from now on, for it may have to hold */
		assert_int_equal(ctl(&s, 0, listing, &output), 0);
		assert_int_equal(kv_feed(&s.kv, 200, 1), 0);
		fixture_audit(&s.fixture);
		fixture_tenant(&s.fixture, "search", &usage);
		assert_int_equal(usage.device_max, 16 * MIB);
		assert_false(fixture_budget_is_live(&s.fixture, "search"));
		if (killed)
			assert_int_equal(kill(program.pid, SIGKILL), 0);
		else
			end_stall(path);
		process_collect(&program, FIXTURE_WAIT_MS, &output);
		assert_int_equal(output.status, killed ? 128 + SIGKILL : 1);
		if (killed)
			end_stall(path);
		else
			assert_non_null(strstr(output.err, "budgets.conf: cannot be written: "));
		wait_min(&s, 0);
	}
	fixture_wait_reserved(&s.fixture, "search", 0);
	assert_int_equal(ctl(&s, 0, set, &output), 0);
	wait_min(&s, MIB);
	assert_int_equal(fixture_budget_reset(&s.fixture, "search", output.err), 0);
	fixture_wait_reserved(&s.fixture, "search", 0);
	stage_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_every_listing_names_what_is_there),
		cmocka_unit_test(test_a_budget_is_set_and_holds_at_once),
		cmocka_unit_test(test_a_budget_of_several_values_is_reset),
		cmocka_unit_test(test_a_wrong_word_or_tenant_is_named),
		cmocka_unit_test(test_a_slow_disk_stops_nobody),
	};

	return runner_run("ctl", tests, sizeof(tests) / sizeof(*tests));
}
