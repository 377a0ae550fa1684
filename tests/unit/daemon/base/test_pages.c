/* Memory of memfds, in small pages and in large ones where the machine has them; each test runs with both. */
#include "daemon/base/pages.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/frame.h"
#include "tests/support/runner.h"

#define SIZE (4 * PAGES_HUGE)

static uint64_t allocated(int fd)
{
	struct stat st;

	assert_int_equal(fstat(fd, &st), 0);
	return (uint64_t)st.st_blocks * 512;
}

static void test_addresses_fit_huge_pages(void **state)
{
	uint8_t *a = pages_reserve(12345), *b = pages_reserve(SIZE), *c = pages_reserve(SIZE + 4096);

	(void)state;
	assert_int_equal((uintptr_t)a % PAGES_HUGE, 0);
	assert_int_equal((uintptr_t)b % PAGES_HUGE, 0);
	assert_int_equal((uintptr_t)c % PAGES_HUGE, 0);
	assert_null(pages_reserve(SIZE_MAX - 4096));
	assert_null(pages_reserve((size_t)1 << 60));
	/* What is around them is not mapped: unmapping them leaves nothing behind. */
	assert_int_equal(mprotect(b, SIZE, PROT_READ), 0);
	assert_int_equal(munmap(a, 12345) | munmap(b, SIZE) | munmap(c, SIZE + 4096), 0);
	assert_int_equal(mprotect(b, 4096, PROT_READ), -1);
	assert_int_equal(errno, ENOMEM);
}

static void test_populates_what_is_named(void **state)
{
	bool large = *state;
	int fd = kvg_memfd_new("pages", SIZE);
	uint8_t *at = pages_reserve(SIZE), zero[64] = {0};

	assert_true(fd >= 0);
	assert_int_equal(pages_populate(fd, PAGES_HUGE, NULL, PAGES_HUGE, large), 0);
	assert_int_equal(allocated(fd), PAGES_HUGE);
	assert_ptr_equal(mmap(at, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0), at);
	assert_int_equal(pages_populate(fd, 2 * PAGES_HUGE, at + 2 * PAGES_HUGE, PAGES_HUGE, large), 0);
	assert_int_equal(allocated(fd), 2 * PAGES_HUGE);
	assert_memory_equal(at + PAGES_HUGE, zero, sizeof(zero));
	memset(at + PAGES_HUGE, 7, 2 * PAGES_HUGE);
	/* Again: what is there stays as it is. */
	assert_int_equal(pages_populate(fd, PAGES_HUGE, NULL, 2 * PAGES_HUGE, large), 0);
	assert_int_equal(allocated(fd), 2 * PAGES_HUGE);
	assert_int_equal(at[PAGES_HUGE], 7);
	assert_int_equal(at[3 * PAGES_HUGE - 1], 7);
	assert_int_equal(munmap(at, SIZE), 0);
	assert_int_equal(close(fd), 0);
}

/* Less than a huge page is no more than that. */
static void test_small_memory(void **state)
{
	bool large = *state;
	int fd = kvg_memfd_new("pages", 64 << 10);

	assert_int_equal(pages_populate(fd, 0, NULL, 64 << 10, large), 0);
	assert_int_equal(allocated(fd), 64 << 10);
	assert_int_equal(close(fd), 0);
}

static void test_no_memory(void **state)
{
	bool large = *state;
	int fd = kvg_memfd_new("pages", PAGES_HUGE);

	assert_int_equal(pages_populate(fd, PAGES_HUGE, NULL, PAGES_HUGE, large), large ? -ENOSPC : -EPERM);
	assert_int_equal(allocated(fd), 0);
	assert_true(pages_populate(fd, 0, NULL, (size_t)1 << 60, large) < 0);
	assert_int_equal(close(fd), 0);
	assert_int_equal(pages_populate(-1, 0, NULL, PAGES_HUGE, large), -EBADF);
}

/* The answer is what a fault gets. */
static void test_large_pages_are_what_a_fault_gets(void **state)
{
	int fd = kvg_memfd_new("pages", SIZE);
	uint8_t *at = pages_reserve(SIZE);

	(void)state;
	assert_ptr_equal(mmap(at, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0), at);
	(void)madvise(at, SIZE, MADV_HUGEPAGE);
	at[PAGES_HUGE + 1] = 1;
	assert_int_equal(pages_are_large(), allocated(fd) > 4096);
	assert_int_equal(munmap(at, SIZE), 0);
	assert_int_equal(close(fd), 0);
}

int main(void)
{
	static bool large = true;
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_addresses_fit_huge_pages),
		cmocka_unit_test(test_populates_what_is_named),
		cmocka_unit_test_prestate(test_populates_what_is_named, &large),
		cmocka_unit_test(test_small_memory),
		cmocka_unit_test_prestate(test_small_memory, &large),
		cmocka_unit_test(test_no_memory),
		cmocka_unit_test_prestate(test_no_memory, &large),
		cmocka_unit_test(test_large_pages_are_what_a_fault_gets),
	};

	return runner_run("base/pages", tests, sizeof(tests) / sizeof(tests[0]));
}
