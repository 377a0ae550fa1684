#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/base/pages.h"
#include "daemon/memory/kind.h"
#include "proto/frame.h"

#define PAGE 4096u

static int host_create(struct kind *kind, size_t size)
{
	int fd = kvg_memfd_new("kvgate-extent", size), r;

	if (fd < 0)
		return fd;
	r = pages_populate(fd, 0, NULL, size, kind->large_pages);
	if (r < 0) {
		(void)close(fd);
		return r;
	}
	return fd;
}

static void *host_reserve(struct kind *kind, size_t size)
{
	(void)kind;
	return pages_reserve(size);
}

static void host_unreserve(struct kind *kind, void *base, size_t size)
{
	(void)kind;
	if (base)
		(void)munmap(base, size);
}

static int host_map(struct kind *kind, int fd, void *at, size_t size)
{
	if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
		return -errno;
	if (kind->large_pages)
		(void)madvise(at, size, MADV_HUGEPAGE);
	if (madvise(at, size, MADV_DONTDUMP) < 0 || madvise(at, size, MADV_DONTFORK) < 0)
		return -errno;
	/* The pages are there: mapped together they cost a tenth of a fault each. What is not mapped now is by faults.
	 */
	(void)madvise(at, size, MADV_POPULATE_READ);
	return 0;
}

static int host_unmap(struct kind *kind, void *at, size_t size)
{
	(void)kind;
	if (mmap(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
		return -errno;
	return 0;
}

/* A new memfd is zeros. */
static int host_scrub(struct kind *kind, void *at, size_t size)
{
	(void)kind;
	(void)at;
	(void)size;
	return 0;
}

static uint64_t host_physical(struct kind *kind, int fd, size_t size)
{
	struct stat st;

	(void)kind;
	(void)size;
	return fstat(fd, &st) < 0 ? UINT64_MAX : (uint64_t)st.st_blocks * 512u;
}

/* Punching makes the bytes unreachable through every mapping; a write through a stale one would bring a page back. */
static int host_destroy(struct kind *kind, int fd, size_t size)
{
	if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)size) < 0 ||
		host_physical(kind, fd, size) != 0)
		return -EBUSY;
	(void)close(fd);
	return 0;
}

static struct kvg_cuda *host_device(struct kind *kind)
{
	(void)kind;
	return NULL;
}

static const struct kind_device *host_about(struct kind *kind)
{
	(void)kind;
	return NULL;
}

static int host_usage(struct kind *kind, uint64_t *ret_bytes)
{
	(void)kind;
	(void)ret_bytes;
	return -ENODEV;
}

static int host_failure_fd(struct kind *kind)
{
	(void)kind;
	return -1;
}

static const char *host_failure(struct kind *kind, char *text)
{
	(void)kind;
	(void)text;
	return NULL;
}

static struct kind *host_free(struct kind *kind)
{
	free(kind);
	return NULL;
}

static const struct kind_ops host_ops = {
	.name = "host",
	.create = host_create,
	.reserve = host_reserve,
	.unreserve = host_unreserve,
	.map = host_map,
	.unmap = host_unmap,
	.scrub = host_scrub,
	.destroy = host_destroy,
	.physical = host_physical,
	.device = host_device,
	.about = host_about,
	.usage = host_usage,
	.failure_fd = host_failure_fd,
	.failure = host_failure,
	.free = host_free,
};

int kind_host_new(struct kind **ret)
{
	struct kind *kind = malloc(sizeof(*kind));

	if (!kind)
		return -ENOMEM;
	*kind = (struct kind){.ops = &host_ops, .granularity = PAGE, .large_pages = pages_are_large()};
	*ret = kind;
	return 0;
}
