#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/memory/kind.h"
#include "proto/frame.h"

static int host_create(size_t size)
{
	int fd = kvg_memfd_new("kvgate-extent", size);

	if (fd < 0)
		return fd;
	while (fallocate(fd, 0, 0, (off_t)size) < 0) {
		int error = errno;

		if (error == EINTR)
			continue;
		(void)close(fd);
		return -error;
	}
	return fd;
}

static void *host_reserve(size_t size)
{
	void *base = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return base == MAP_FAILED ? NULL : base;
}

static void host_unreserve(void *base, size_t size)
{
	if (base)
		(void)munmap(base, size);
}

static int host_map(int fd, void *at, size_t size)
{
	if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
		return -errno;
	if (madvise(at, size, MADV_DONTDUMP) < 0 || madvise(at, size, MADV_DONTFORK) < 0)
		return -errno;
	return 0;
}

static int host_unmap(void *at, size_t size)
{
	if (mmap(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
		return -errno;
	return 0;
}

static uint64_t host_physical(int fd)
{
	struct stat st;

	return fstat(fd, &st) < 0 ? UINT64_MAX : (uint64_t)st.st_blocks * 512u;
}

/* Punching makes the bytes unreachable through every mapping; a write through a stale one would bring a page back. */
static int host_destroy(int fd, size_t size)
{
	if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)size) < 0 || host_physical(fd) != 0)
		return -EBUSY;
	(void)close(fd);
	return 0;
}

const struct kind_ops kind_host = {
	.name = "host",
	.create = host_create,
	.reserve = host_reserve,
	.unreserve = host_unreserve,
	.map = host_map,
	.unmap = host_unmap,
	.destroy = host_destroy,
	.physical = host_physical,
};
