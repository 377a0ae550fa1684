/* What is set live holds, is written before it does, is found again, and goes with a reset. */
#include "daemon/session/budgets.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/support/runner.h"

#define EXTENT (64u << 10)
#define POOL   (16u * EXTENT)

enum { DEVICE_MIN, DEVICE_HIGH, DEVICE_MAX, HOST_MIN, HOST_HIGH, HOST_MAX };

struct fixture {
	struct loop *loop;
	struct executor *executor;
	struct kind *kind;
	struct pool *pool;
	struct tenant *tenants[2];
	struct budgets *budgets;
	unsigned changes; /* that are done */
	char dir[40], text[BUDGET_TEXT];
};

static void configure(struct fixture *f, size_t tenant, uint64_t device_min, uint64_t device_max)
{
	const struct budget device = {.min = device_min, .max = device_max}, host = {.max = POOL};

	assert_int_equal(tenant_set_budget(f->tenants[tenant], TENANT_DEVICE, &device, f->text), 0);
	assert_int_equal(tenant_set_budget(f->tenants[tenant], TENANT_HOST, &host, f->text), 0);
}

/* The daemon's start, but for budgets_load(): tenant a has 2 to 8 extents, b 0 to 16. */
static void start(struct fixture *f, uint64_t pool, const char *second)
{
	assert_int_equal(loop_new(&f->loop), 0);
	assert_int_equal(executor_new(f->loop, &f->executor), 0);
	assert_int_equal(kind_host_new(&f->kind), 0);
	assert_int_equal(pool_new(f->loop, f->executor, f->kind, pool, EXTENT, &f->pool), 0);
	f->pool->host.account->max = POOL;
	assert_int_equal(tenant_new(f->pool, "a", 0, &f->tenants[0]), 0);
	assert_int_equal(tenant_new(f->pool, second, 0, &f->tenants[1]), 0);
	configure(f, 0, 2 * EXTENT, 8 * EXTENT);
	configure(f, 1, 0, pool);
	assert_int_equal(budgets_new(f->loop, f->tenants, 2, f->dir, &f->budgets), 0);
}

static void stop(struct fixture *f)
{
	f->budgets = budgets_free(f->budgets);
	reserve_stop_all(f->pool);
	(void)executor_free(f->executor);
	(void)tenant_free(f->tenants[0]);
	(void)tenant_free(f->tenants[1]);
	(void)pool_free(f->pool);
	(void)kind_free(f->kind);
	(void)loop_free(f->loop);
}

static void restart(struct fixture *f, uint64_t pool, const char *second)
{
	stop(f);
	start(f, pool, second);
	assert_int_equal(budgets_load(f->budgets, f->text), 0);
}

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	if (!f)
		return -1;
	(void)snprintf(f->dir, sizeof(f->dir), "/tmp/kvgate-budgets-XXXXXX");
	assert_non_null(mkdtemp(f->dir));
	start(f, POOL, "b");
	assert_int_equal(budgets_load(f->budgets, f->text), 0); /* without a file */
	*state = f;
	return 0;
}

static const char *path_of(const struct fixture *f, char ret[80])
{
	(void)snprintf(ret, 80, "%s/budgets.conf", f->dir);
	return ret;
}

static int teardown(void **state)
{
	struct fixture *f = *state;
	char path[80];

	stop(f);
	(void)unlink(path_of(f, path));
	assert_int_equal(rmdir(f->dir), 0); /* no temporary file is left */
	free(f);
	return 0;
}

struct change {
	struct budget_change change;
	struct fixture *fixture;
	unsigned order; /* of done(), from 1 */
};

static void changed(struct budget_change *change)
{
	struct change *whole = list_entry(change, struct change, change);

	whole->order = ++whole->fixture->changes;
	loop_stop(whole->fixture->loop);
}

static void begin(struct fixture *f, struct change *change)
{
	change->fixture = f;
	change->change.done = changed;
	budgets_change(f->budgets, &change->change);
}

static int finish(struct fixture *f, const struct change *change)
{
	while (!change->order)
		assert_int_equal(loop_run(f->loop), 0);
	(void)snprintf(f->text, sizeof(f->text), "%s", change->change.text);
	return change->change.status;
}

static int set_values(struct fixture *f, size_t tenant, const struct budget_values *values)
{
	struct change change = {.change = {.tenant = tenant, .values = *values}};

	begin(f, &change);
	return finish(f, &change);
}

static int reset(struct fixture *f, size_t tenant)
{
	struct change change = {.change = {.tenant = tenant, .reset = true}};

	begin(f, &change);
	return finish(f, &change);
}

static struct budget_values only(unsigned key, uint64_t bytes)
{
	struct budget_values values = {0};

	values.set[key] = true;
	values.bytes[key] = bytes;
	return values;
}

static int set(struct fixture *f, size_t tenant, unsigned key, uint64_t bytes)
{
	struct budget_values values = only(key, bytes);

	return set_values(f, tenant, &values);
}

static void must_set(struct fixture *f, size_t tenant, unsigned key, uint64_t bytes)
{
	if (set(f, tenant, key, bytes) < 0)
		fail_msg("%s", f->text);
}

static void check(const struct fixture *f, size_t tenant, uint64_t min, uint64_t high, uint64_t max, bool live)
{
	struct budget budget = tenant_budget(f->tenants[tenant], TENANT_DEVICE);

	assert_int_equal(budget.min, min);
	assert_int_equal(budget.high, high);
	assert_int_equal(budget.max, max);
	assert_int_equal(budgets_are_live(f->budgets, tenant), live);
}

static void read_file(const struct fixture *f, char ret[1024])
{
	char path[80];
	int fd = open(path_of(f, path), O_RDONLY | O_CLOEXEC);
	ssize_t n = read(fd, ret, 1023);

	assert_true(n >= 0);
	ret[n] = '\0';
	assert_int_equal(close(fd), 0);
}

static void write_file(const struct fixture *f, const char *text)
{
	char path[80];
	FILE *file = fopen(path_of(f, path), "we");

	assert_non_null(file);
	assert_true(fputs(text, file) >= 0);
	assert_int_equal(fclose(file), 0);
}

static void test_set_and_reset(void **state)
{
	struct fixture *f = *state;
	char file[1024];

	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
	must_set(f, 0, DEVICE_MAX, 6 * EXTENT);
	must_set(f, 0, DEVICE_HIGH, 5 * EXTENT);
	must_set(f, 1, HOST_HIGH, 7);
	check(f, 0, 2 * EXTENT, 5 * EXTENT, 6 * EXTENT, true);
	assert_int_equal(tenant_budget(f->tenants[1], TENANT_HOST).high, 7);
	read_file(f, file);
	assert_non_null(
		strstr(file, "\n[tenant a]\ndevice.high = 327680\ndevice.max = 393216\n\n[tenant b]\nhost.high = 7\n"));
	assert_int_equal(reset(f, 0), 0);
	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
	read_file(f, file);
	assert_null(strstr(file, "[tenant a]"));
	assert_non_null(strstr(file, "[tenant b]"));
	assert_int_equal(reset(f, 0), 0); /* again */
}

static void test_a_restart_keeps_them(void **state)
{
	struct fixture *f = *state;

	must_set(f, 0, DEVICE_MIN, 4 * EXTENT);
	must_set(f, 0, DEVICE_MAX, 6 * EXTENT);
	restart(f, POOL, "b");
	check(f, 0, 4 * EXTENT, 0, 6 * EXTENT, true);
	check(f, 1, 0, 0, POOL, false);
	assert_int_equal(f->pool->quota.account->committed, 4 * EXTENT);
	assert_int_equal(reset(f, 0), 0);
	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
	restart(f, POOL, "b");
	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
}

/* A value that equals the configured one is set all the same: it stays when the configuration changes. */
static void test_equal_values_are_live(void **state)
{
	struct fixture *f = *state;

	must_set(f, 1, DEVICE_MAX, POOL);
	check(f, 1, 0, 0, POOL, true);
	restart(f, POOL + EXTENT, "b");
	check(f, 1, 0, 0, POOL, true);
}

static void test_refusals_change_nothing(void **state)
{
	struct fixture *f = *state;
	struct budget_values both = {.set = {true, false, true, true}, .bytes = {EXTENT, 0, 4 * EXTENT, POOL + 1}};
	char path[80];
	struct stat st;

	assert_int_equal(set(f, 0, DEVICE_MIN, 9 * EXTENT), -EINVAL);
	assert_string_equal(f->text, "tenant a: device.min 576.0 KiB is more than max, 512.0 KiB");
	assert_int_equal(set(f, 1, DEVICE_MIN, 15 * EXTENT), -ENOSPC);
	assert_non_null(strstr(f->text, "tenant b: device.min 960.0 KiB: of the pool, 1.0 MiB"));
	assert_int_equal(set_values(f, 0, &both), -EINVAL); /* the host's; the device's is fine */
	assert_string_equal(f->text, "tenant a: host.min 1.0 MiB is more than max, 1.0 MiB");
	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
	check(f, 1, 0, 0, POOL, false);
	assert_int_equal(f->pool->quota.account->committed, 2 * EXTENT);
	assert_int_equal(stat(path_of(f, path), &st), -1);
}

/* The configuration's min may be somebody else's by now. */
static void test_a_reset_that_overbooks(void **state)
{
	struct fixture *f = *state;

	must_set(f, 0, DEVICE_MIN, 0);
	must_set(f, 1, DEVICE_MIN, POOL);
	assert_int_equal(reset(f, 0), -ENOSPC);
	check(f, 0, 0, 0, 8 * EXTENT, true);
	restart(f, POOL, "b"); /* b's min fits only when a's is gone */
	check(f, 0, 0, 0, 8 * EXTENT, true);
	check(f, 1, POOL, 0, POOL, true);
	assert_int_equal(reset(f, 1), 0);
	assert_int_equal(reset(f, 0), 0);
	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
}

/* On a full disk as on any other. The link is not what becomes the file. */
static void test_a_full_disk(void **state)
{
	struct fixture *f = *state;
	char path[80], before[1024], file[1024];

	must_set(f, 0, DEVICE_MAX, 6 * EXTENT);
	read_file(f, before);
	(void)snprintf(path, sizeof(path), "%s/budgets.conf.new", f->dir);
	assert_int_equal(symlink("/dev/full", path), 0);
	assert_int_equal(set(f, 0, DEVICE_MAX, 5 * EXTENT), -ENOSPC);
	assert_non_null(
		strstr(f->text, "/budgets.conf: cannot be written: No space left on device; nothing was changed"));
	check(f, 0, 2 * EXTENT, 0, 6 * EXTENT, true);
	read_file(f, file);
	assert_string_equal(file, before);
}

/* A folder stands where the file must go: nothing changes, and the reason is told. */
static void test_a_failed_write(void **state)
{
	struct fixture *f = *state;
	char path[80], file[1024];

	must_set(f, 0, DEVICE_MAX, 6 * EXTENT);
	(void)snprintf(path, sizeof(path), "%s/budgets.conf.new", f->dir);
	assert_int_equal(mkdir(path, 0700), 0);
	assert_int_equal(set(f, 0, DEVICE_MAX, 5 * EXTENT), -EISDIR);
	assert_non_null(strstr(f->text, "/budgets.conf: cannot be written: Is a directory; nothing was changed"));
	check(f, 0, 2 * EXTENT, 0, 6 * EXTENT, true);
	assert_int_equal(reset(f, 0), -EISDIR);
	check(f, 0, 2 * EXTENT, 0, 6 * EXTENT, true);
	assert_int_equal(set(f, 1, DEVICE_MIN, EXTENT), -EISDIR);
	check(f, 1, 0, 0, POOL, false);
	assert_int_equal(f->pool->quota.account->committed, 2 * EXTENT);
	assert_int_equal(rmdir(path), 0);
	read_file(f, file);
	assert_non_null(strstr(file, "device.max = 393216\n"));
}

/* One after the other, refusals too; each holds when its file is safe, and not before. */
static void test_changes_at_once(void **state)
{
	struct fixture *f = *state;
	struct change changes[] = {
		{.change = {.values = only(DEVICE_MAX, 6 * EXTENT)}},
		{.change = {.values = only(DEVICE_MIN, 7 * EXTENT)}}, /* fits now, but not behind the first */
		{.change = {.tenant = 1, .values = only(DEVICE_MAX, 9 * EXTENT)}},
		{.change = {.values = only(DEVICE_MAX, 5 * EXTENT)}},
	};
	char file[1024];

	for (unsigned i = 0; i < 4; i++)
		begin(f, &changes[i]);
	assert_int_equal(f->changes, 0);
	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
	assert_int_equal(finish(f, &changes[3]), 0);
	assert_int_equal(changes[1].change.status, -EINVAL);
	assert_string_equal(changes[1].change.text, "tenant a: device.min 448.0 KiB is more than max, 384.0 KiB");
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(changes[i].order, i + 1);
	assert_int_equal(changes[0].change.status | changes[2].change.status, 0);
	check(f, 0, 2 * EXTENT, 0, 5 * EXTENT, true);
	check(f, 1, 0, 0, 9 * EXTENT, true);
	read_file(f, file);
	assert_non_null(strstr(file, "\n[tenant a]\ndevice.max = 327680\n\n[tenant b]\ndevice.max = 589824\n"));
}

/* Changes that are under way come to their end before the budgets do. */
static void test_end_with_changes(void **state)
{
	struct fixture *f = *state;
	struct change first = {.change = {.values = only(DEVICE_MAX, 6 * EXTENT)}};
	struct change second = {.change = {.values = only(DEVICE_HIGH, 5 * EXTENT)}};

	begin(f, &first);
	begin(f, &second);
	f->budgets = budgets_free(f->budgets);
	assert_int_equal(first.order, 1);
	assert_int_equal(second.order, 2);
	restart(f, POOL, "b");
	check(f, 0, 2 * EXTENT, 5 * EXTENT, 6 * EXTENT, true);
}

/* A disk that does not answer: a pipe that nobody reads stands where the file is written. */
static void stall(const struct fixture *f, char path[80])
{
	(void)snprintf(path, 80, "%s/budgets.conf.new", f->dir);
	assert_int_equal(mkfifo(path, 0600), 0);
}

/* It does, with an error. */
static void end_stall(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	assert_true(fd >= 0);
	assert_int_equal(close(fd), 0);
}

static int charge(const struct fixture *f, size_t tenant, unsigned extents)
{
	char text[QUOTA_TEXT];

	return quota_charge(&f->tenants[tenant]->quota, extents * (uint64_t)EXTENT, 0, "it", text);
}

static void stop_loop(void *user)
{
	loop_stop(user);
}

/* The reactor goes on, with the old values; and nobody else gets what either of the two min claims. */
static void test_a_slow_disk(void **state)
{
	struct fixture *f = *state;
	struct change more = {.change = {.values = only(DEVICE_MIN, 5 * EXTENT)}};
	struct change less = {.change = {.values = only(DEVICE_MIN, 0)}};
	struct loop_timer *timer;
	char path[80];

	stall(f, path);
	assert_int_equal(loop_timer_new(f->loop, stop_loop, f->loop, &timer), 0);
	begin(f, &more);
	loop_timer_set(timer, 1);
	assert_int_equal(loop_run(f->loop), 0);
	assert_int_equal(f->changes, 0);
	assert_int_equal(tenant_budget(f->tenants[0], TENANT_DEVICE).max, 8 * EXTENT);
	assert_false(budgets_are_live(f->budgets, 0));
	assert_int_equal(charge(f, 1, 12), -ENOSPC);
	assert_int_equal(charge(f, 1, 11), 0);
	end_stall(path);
	assert_true(finish(f, &more) < 0);
	assert_non_null(strstr(f->text, "/budgets.conf: cannot be written: "));
	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
	assert_int_equal(charge(f, 1, 3), 0);
	stall(f, path);
	begin(f, &less);
	assert_int_equal(charge(f, 1, 1), -ENOSPC);
	end_stall(path);
	assert_true(finish(f, &less) < 0);
	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
	assert_int_equal(charge(f, 0, 2), 0);
	quota_refund(&f->tenants[0]->quota, 2 * EXTENT);
	quota_refund(&f->tenants[1]->quota, 14 * EXTENT);
	(void)loop_timer_free(timer);
}

static void start_in(struct fixture *f, const char *parent, const char *name)
{
	stop(f);
	(void)snprintf(f->dir, sizeof(f->dir), "%s%s", parent, name);
	start(f, POOL, "b");
	assert_int_equal(budgets_load(f->budgets, f->text), 0);
}

/* One that is missing is made; where that cannot be, the configuration holds and every change is refused. */
static void test_a_missing_directory(void **state)
{
	struct fixture *f = *state;
	char parent[40], path[80];

	(void)snprintf(parent, sizeof(parent), "%s", f->dir);
	start_in(f, parent, "/new");
	must_set(f, 0, DEVICE_MAX, 6 * EXTENT);
	assert_int_equal(unlink(path_of(f, path)), 0);
	assert_int_equal(rmdir(f->dir), 0);
	assert_int_equal(set(f, 0, DEVICE_MAX, 5 * EXTENT), -ENOENT);
	check(f, 0, 2 * EXTENT, 0, 6 * EXTENT, true);
	start_in(f, parent, "/not/there");
	assert_int_equal(set(f, 0, DEVICE_MAX, 5 * EXTENT), -ENOENT);
	assert_non_null(strstr(
		f->text, "/not/there/budgets.conf: cannot be written: No such file or directory; nothing was changed"));
	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
	start_in(f, parent, "");
}

static void test_what_fits_no_more_is_left(void **state)
{
	struct fixture *f = *state;
	char file[1024];

	must_set(f, 0, DEVICE_MIN, 8 * EXTENT);
	must_set(f, 0, HOST_MAX, 3);
	must_set(f, 1, DEVICE_MIN, 8 * EXTENT);
	must_set(f, 1, DEVICE_MAX, 9 * EXTENT);
	restart(f, 12 * EXTENT, "b"); /* the pool is smaller: one of the two min is too much */
	check(f, 0, 8 * EXTENT, 0, 8 * EXTENT, true);
	assert_int_equal(tenant_budget(f->tenants[0], TENANT_HOST).max, 3);
	check(f, 1, 0, 0, 12 * EXTENT, false);
	restart(f, POOL, "c"); /* b is gone */
	check(f, 0, 8 * EXTENT, 0, 8 * EXTENT, true);
	check(f, 1, 0, 0, POOL, false);
	must_set(f, 0, HOST_MAX, 4);
	read_file(f, file);
	assert_null(strstr(file, "[tenant b]")); /* forgotten */
}

static void test_a_file_of_any_form(void **state)
{
	struct fixture *f = *state;
	char path[80];

	write_file(f, "garbage\ndevice.max = 1\n[pool]\n[tenant a\n; x\n  # y\n\n[tenant a]\r\n  device.max=7M\r\n"
		      "device.max = 393216 \ndevice.mid = 3\ndevice.high = lots\nhost.max\n[tenant ]\n[");
	restart(f, POOL, "b");
	check(f, 0, 2 * EXTENT, 0, 6 * EXTENT, true); /* the last one counts */
	check(f, 1, 0, 0, POOL, false);
	assert_int_equal(unlink(path_of(f, path)), 0);
	assert_int_equal(mkdir(path, 0700), 0);
	stop(f);
	start(f, POOL, "b");
	assert_int_equal(budgets_load(f->budgets, f->text), -EISDIR);
	assert_non_null(strstr(f->text, "/budgets.conf: cannot be read: Is a directory"));
	assert_int_equal(rmdir(path), 0);
}

static void refuse_to_start(struct fixture *f, int status)
{
	stop(f);
	start(f, POOL, "b");
	assert_int_equal(budgets_load(f->budgets, f->text), status);
	assert_non_null(strstr(f->text, "/budgets.conf: cannot be read: "));
}

/* What would hang the start, or fill the memory; and numbers that nothing fits. */
static void test_what_is_no_file_of_budgets(void **state)
{
	struct fixture *f = *state;
	char path[80];

	assert_int_equal(mkfifo(path_of(f, path), 0600), 0);
	refuse_to_start(f, -EINVAL);
	assert_int_equal(unlink(path), 0);
	write_file(f, "# large\n");
	assert_int_equal(truncate(path, (off_t)1 << 40), 0);
	refuse_to_start(f, -EFBIG);
	write_file(f,
		"[tenant a]\ndevice.max = 99999999999999999999\ndevice.high = -1\ndevice.min = 4611686018427387904\n"
		"[tenant b]\nhost.min = 18446744073709551615\ndevice.min = 0x10\nhost.high = 5 E\n");
	restart(f, POOL, "b");
	check(f, 0, 2 * EXTENT, 0, 8 * EXTENT, false);
	check(f, 1, 0, 0, POOL, false);
	assert_int_equal(f->pool->quota.account->committed, 2 * EXTENT);
}

static void test_keys(void **state)
{
	(void)state;
	assert_string_equal(budget_key_name(DEVICE_HIGH), "device.high");
	assert_string_equal(budget_key_name(HOST_MAX), "host.max");
	assert_null(budgets_free(NULL));
}

#define BUDGETS_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		BUDGETS_TEST(test_set_and_reset),
		BUDGETS_TEST(test_a_restart_keeps_them),
		BUDGETS_TEST(test_equal_values_are_live),
		BUDGETS_TEST(test_refusals_change_nothing),
		BUDGETS_TEST(test_a_reset_that_overbooks),
		BUDGETS_TEST(test_a_failed_write),
		BUDGETS_TEST(test_a_full_disk),
		BUDGETS_TEST(test_changes_at_once),
		BUDGETS_TEST(test_end_with_changes),
		BUDGETS_TEST(test_a_slow_disk),
		BUDGETS_TEST(test_a_missing_directory),
		BUDGETS_TEST(test_what_is_no_file_of_budgets),
		BUDGETS_TEST(test_what_fits_no_more_is_left),
		BUDGETS_TEST(test_a_file_of_any_form),
		cmocka_unit_test(test_keys),
	};

	return runner_run("budgets", tests, sizeof(tests) / sizeof(tests[0]));
}
