#include "tests/support/runner.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/arena.h"
#include "proto/frame.h"

enum { EXTENT = 8192, SLOTS = 5 };

/* Whether the kernel can read that address for us. */
static bool readable(const void *address)
{
	int ends[2];
	ssize_t n;

	assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
	n = write(ends[1], address, 1);
	(void)close(ends[0]);
	(void)close(ends[1]);
	return n == 1;
}

static void maps_and_unmaps_slots(void **state)
{
	struct arena arena;
	int fd = kvg_memfd_new("extent", EXTENT), other = kvg_memfd_new("extent", EXTENT + 4096);
	char byte;

	(void)state;
	assert_int_equal(arena_init(&arena, &arena_host, NULL, SLOTS, EXTENT), 0);
	assert_false(readable(arena.base));
	assert_int_equal(arena_map(&arena, 1, fd), 0);
	assert_int_equal(arena_map(&arena, 2, other), 0);
	assert_int_equal(arena.mapped_count, 2);
	arena.base[EXTENT] = 'a';
	arena.base[2 * EXTENT - 1] = 'b';
	assert_int_equal(pread(fd, &byte, 1, EXTENT - 1), 1);
	assert_int_equal(byte, 'b');
	assert_int_equal(arena_unmap(&arena, 1, 2), 0);
	assert_int_equal(arena.mapped_count, 0);
	assert_false(readable(arena.base + EXTENT));
	/* The address comes back with what the memory held. */
	assert_int_equal(arena_map(&arena, 1, fd), 0);
	assert_int_equal(arena.base[EXTENT], 'a');
	arena_deinit(&arena);
	arena_deinit(&arena);
	assert_int_equal(close(fd), 0);
	assert_int_equal(close(other), 0);
}

static void refuses_nonsense(void **state)
{
	struct arena arena = {0};
	int fd = kvg_memfd_new("extent", EXTENT), small = kvg_memfd_new("extent", EXTENT - 1);

	(void)state;
	assert_int_equal(arena_init(&arena, &arena_host, NULL, 0, EXTENT), -EPROTO);
	assert_int_equal(arena_init(&arena, &arena_host, NULL, 4, 0), -EPROTO);
	assert_int_equal(arena_init(&arena, &arena_host, NULL, 4, EXTENT + 1), -EPROTO);
	assert_int_equal(arena_init(&arena, &arena_host, NULL, UINT32_MAX, 1ull << 60), -EPROTO);
	assert_int_equal(arena_init(&arena, &arena_host, NULL, SLOTS, EXTENT), 0);
	assert_int_equal(arena_map(&arena, SLOTS, fd), -EPROTO);
	assert_int_equal(arena_map(&arena, 0, small), -EPROTO);
	assert_int_equal(arena_map(&arena, 0, fd), 0);
	assert_int_equal(arena_map(&arena, 0, fd), -EPROTO);
	assert_int_equal(arena_unmap(&arena, 0, 2), -EPROTO);
	assert_int_equal(arena_unmap(&arena, 4, 2), -EPROTO);
	assert_int_equal(arena_unmap(&arena, UINT32_MAX, 2), -EPROTO);
	assert_int_equal(arena.mapped_count, 1);
	assert_true(readable(arena.base));
	arena_deinit(&arena);
	assert_int_equal(close(fd), 0);
	assert_int_equal(close(small), 0);
}

/* "VmFlags:" of the mapping at an address. */
static void read_flags(const void *address, char *flags, size_t size)
{
	FILE *maps = fopen("/proc/self/smaps", "re");
	bool here = false;
	char line[256];

	assert_non_null(maps);
	flags[0] = '\0';
	while (fgets(line, sizeof(line), maps)) {
		unsigned long begin, end;

		if (sscanf(line, "%lx-%lx ", &begin, &end) == 2)
			here = begin <= (unsigned long)address && (unsigned long)address < end;
		else if (here && strncmp(line, "VmFlags:", 8) == 0)
			(void)snprintf(flags, size, "%s", line + 8);
	}
	(void)fclose(maps);
}

/* Where they were, anything may be by now. */
static int maps_extents(void)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[512];
	int count = maps ? 0 : -1;

	while (maps && fgets(line, sizeof(line), maps))
		count += strstr(line, "memfd:extent") != NULL;
	if (maps)
		(void)fclose(maps);
	return count;
}

static void stays_out_of_children_and_dumps(void **state)
{
	struct arena arena;
	int fd = kvg_memfd_new("extent", EXTENT), status;
	char flags[256];
	pid_t pid;

	(void)state;
	assert_int_equal(arena_init(&arena, &arena_host, NULL, SLOTS, EXTENT), 0);
	assert_int_equal(arena_map(&arena, 3, fd), 0);
	read_flags(arena.base + 3 * EXTENT, flags, sizeof(flags));
	assert_non_null(strstr(flags, " dc"));
	assert_non_null(strstr(flags, " dd"));
	assert_int_equal(maps_extents(), 1);
	pid = fork();
	if (pid == 0)
		_exit(maps_extents());
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
	arena_deinit(&arena);
	assert_int_equal(close(fd), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(maps_and_unmaps_slots),
		cmocka_unit_test(refuses_nonsense),
		cmocka_unit_test(stays_out_of_children_and_dumps),
	};

	return runner_run("arena", tests, sizeof(tests) / sizeof(*tests));
}
