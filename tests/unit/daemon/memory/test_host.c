#include "daemon/memory/kind.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/runner.h"

#define SIZE (256u << 10)

static struct kind *kind;
static const struct kind_ops *ops;

static int setup(void **state)
{
	(void)state;
	if (kind_host_new(&kind) < 0)
		return -1;
	ops = kind->ops;
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	kind = kind_free(kind);
	return kind ? -1 : 0;
}

static void test_create_is_whole_and_sealed(void **state)
{
	int fd = ops->create(kind, SIZE), seals;

	(void)state;
	assert_true(fd >= 0);
	assert_int_equal(ops->physical(kind, fd, SIZE), SIZE);
	seals = fcntl(fd, F_GET_SEALS);
	assert_int_equal(seals & (F_SEAL_SHRINK | F_SEAL_GROW), F_SEAL_SHRINK | F_SEAL_GROW);
	assert_int_equal(ftruncate(fd, 0), -1);
	assert_int_equal(ftruncate(fd, 2 * SIZE), -1);
	assert_int_equal(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
	assert_int_equal(ops->destroy(kind, fd, SIZE), 0);
	assert_int_equal(fcntl(fd, F_GETFD), -1);
}

static void test_map_and_unmap_within_a_range(void **state)
{
	uint8_t *base = ops->reserve(kind, 4 * SIZE), zero[64] = {0};
	int fd = ops->create(kind, SIZE), fds[2];

	(void)state;
	assert_non_null(base);
	assert_int_equal(ops->map(kind, fd, base + SIZE, SIZE), 0);
	assert_memory_equal(base + SIZE, zero, sizeof(zero));
	memset(base + SIZE, 7, SIZE);
	assert_int_equal(ops->unmap(kind, base + SIZE, SIZE), 0);
	assert_int_equal(pipe(fds), 0); /* the range is there still, and nothing can be read from it */
	assert_int_equal(write(fds[1], base + SIZE, 1), -1);
	assert_int_equal(errno, EFAULT);
	assert_int_equal(close(fds[0]) | close(fds[1]), 0);
	assert_int_equal(ops->map(kind, fd, base + 3 * SIZE, SIZE), 0);
	assert_int_equal(base[3 * SIZE], 7);
	assert_int_equal(ops->unmap(kind, base + 3 * SIZE, SIZE), 0);
	assert_int_equal(ops->destroy(kind, fd, SIZE), 0);
	ops->unreserve(kind, base, 4 * SIZE);
	ops->unreserve(kind, NULL, SIZE);
}

static bool has_flag(const void *at, const char *flag)
{
	FILE *file = fopen("/proc/self/smaps", "re");
	char line[512];
	bool inside = false, found = false;

	assert_non_null(file);
	while (fgets(line, sizeof(line), file)) {
		unsigned long begin, end;

		if (sscanf(line, "%lx-%lx ", &begin, &end) == 2)
			inside = (unsigned long)at >= begin && (unsigned long)at < end;
		else if (inside && strncmp(line, "VmFlags:", 8) == 0)
			found = strstr(line, flag) != NULL;
	}
	assert_int_equal(fclose(file), 0);
	return found;
}

static void test_not_in_dumps_and_forks(void **state)
{
	uint8_t *base = ops->reserve(kind, SIZE);
	int fd = ops->create(kind, SIZE);

	(void)state;
	assert_int_equal(ops->map(kind, fd, base, SIZE), 0);
	assert_true(has_flag(base, " dd"));
	assert_true(has_flag(base, " dc"));
	assert_int_equal(ops->unmap(kind, base, SIZE), 0);
	assert_int_equal(ops->destroy(kind, fd, SIZE), 0);
	ops->unreserve(kind, base, SIZE);
}

/* Whoever still maps an extent reads zeros once it is destroyed. */
static void test_destroy_empties_a_stale_mapping(void **state)
{
	int fd = ops->create(kind, SIZE), copy = dup(fd);
	uint8_t *stale = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	(void)state;
	assert_ptr_not_equal(stale, MAP_FAILED);
	memset(stale, 9, SIZE);
	assert_int_equal(ops->destroy(kind, fd, SIZE), 0);
	assert_int_equal(ops->physical(kind, copy, SIZE), 0);
	assert_int_equal(stale[SIZE / 2], 0);
	assert_int_equal(munmap(stale, SIZE), 0);
	assert_int_equal(close(copy), 0);
}

/* Bytes that cannot be given back (here: the descriptor cannot be punched) leave it open. */
static void test_destroy_of_what_stays(void **state)
{
	int fds[2];

	(void)state;
	assert_int_equal(pipe(fds), 0);
	assert_int_equal(ops->destroy(kind, fds[0], SIZE), -EBUSY);
	assert_true(fcntl(fds[0], F_GETFD) >= 0);
	assert_int_equal(close(fds[0]) | close(fds[1]), 0);
}

/* What only a device has. */
static void test_no_device(void **state)
{
	uint64_t used = 4711;
	char text[KIND_TEXT];

	(void)state;
	assert_int_equal(kind->granularity, 4096);
	assert_null(ops->device(kind));
	assert_null(ops->about(kind));
	assert_int_equal(ops->usage(kind, &used), -ENODEV);
	assert_int_equal(used, 4711);
	assert_int_equal(ops->failure_fd(kind), -1);
	assert_null(ops->failure(kind, text));
	assert_int_equal(ops->scrub(kind, NULL, SIZE), 0);
	assert_null(kind_free(NULL));
}

static void test_errors(void **state)
{
	uint8_t *base = ops->reserve(kind, SIZE);

	(void)state;
	assert_true(ops->create(kind, (size_t)1 << 63) < 0);
	assert_int_equal(ops->map(kind, -1, base, SIZE), -EBADF);
	assert_null(ops->reserve(kind, (size_t)1 << 60));
	ops->unreserve(kind, base, SIZE);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_create_is_whole_and_sealed, setup, teardown),
		cmocka_unit_test_setup_teardown(test_map_and_unmap_within_a_range, setup, teardown),
		cmocka_unit_test_setup_teardown(test_not_in_dumps_and_forks, setup, teardown),
		cmocka_unit_test_setup_teardown(test_destroy_empties_a_stale_mapping, setup, teardown),
		cmocka_unit_test_setup_teardown(test_destroy_of_what_stays, setup, teardown),
		cmocka_unit_test_setup_teardown(test_no_device, setup, teardown),
		cmocka_unit_test_setup_teardown(test_errors, setup, teardown),
	};

	return runner_run("host", tests, sizeof(tests) / sizeof(tests[0]));
}
