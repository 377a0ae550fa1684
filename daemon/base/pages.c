#include "daemon/base/pages.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/frame.h"

#define SMALL 4096

void *pages_reserve(size_t size)
{
	size_t all, before, after;
	uint8_t *base;

	size = (size + SMALL - 1) / SMALL * SMALL;
	if (__builtin_add_overflow(size, PAGES_HUGE, &all))
		return NULL;
	base = mmap(NULL, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		return NULL;
	before = (PAGES_HUGE - (uintptr_t)base % PAGES_HUGE) % PAGES_HUGE;
	after = PAGES_HUGE - before;
	if (before)
		(void)munmap(base, before);
	if (after)
		(void)munmap(base + before + size, after);
	return base + before;
}

static int map_at(int fd, uint64_t offset, void *at, size_t size)
{
	if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, (off_t)offset) == MAP_FAILED)
		return -errno;
	(void)madvise(at, size, MADV_HUGEPAGE);
	return 0;
}

static int populate_mapped(void *at, size_t size)
{
	while (madvise(at, size, MADV_POPULATE_WRITE) < 0)
		if (errno != EINTR && errno != EAGAIN)
			return errno == EFAULT ? -ENOSPC : -errno; /* the fault would have been a SIGBUS */
	return 0;
}

static int touch(int fd, uint8_t *at)
{
	int r = map_at(fd, 0, at, PAGES_HUGE);

	return r < 0 ? r : populate_mapped(at, SMALL); /* a lack of memory is an error here as well */
}

bool pages_are_large(void)
{
	int fd = kvg_memfd_new("kvgate-probe", PAGES_HUGE);
	void *at = fd >= 0 ? pages_reserve(PAGES_HUGE) : NULL;
	struct stat st = {0};
	bool large = at && touch(fd, at) >= 0 && fstat(fd, &st) == 0 && st.st_blocks * 512 > SMALL;

	if (at)
		(void)munmap(at, PAGES_HUGE);
	if (fd >= 0)
		(void)close(fd);
	return large;
}

static int populate_apart(int fd, uint64_t offset, size_t size)
{
	void *at = pages_reserve(size);
	int r = at ? map_at(fd, offset, at, size) : -ENOMEM;

	if (r >= 0)
		r = populate_mapped(at, size);
	if (at)
		(void)munmap(at, size);
	return r;
}

/* Small pages are allocated first: faults that only map them cost less than faults that look for memory as well. */
int pages_populate(int fd, uint64_t offset, void *at, size_t size, bool large)
{
	while (!large && fallocate(fd, 0, (off_t)offset, (off_t)size) < 0)
		if (errno != EINTR)
			return -errno;
	if (at)
		return populate_mapped(at, size);
	return large ? populate_apart(fd, offset, size) : 0;
}
