#include "client/arena.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define HUGE ((size_t)2 << 20)

/* ---- the host kind ---- */

/* Neither in a child process nor in a core dump. */
static void keep_private(void *address, size_t size)
{
	(void)madvise(address, size, MADV_DONTFORK);
	(void)madvise(address, size, MADV_DONTDUMP);
}

/* From a multiple of HUGE on: extents in huge pages are mapped with one fault for each. */
static int host_reserve(struct arena *arena, size_t size)
{
	size_t before;
	uint8_t *base;

	if (size > SIZE_MAX - HUGE)
		return -ENOMEM;
	base = mmap(NULL, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		return -errno;
	before = (HUGE - (uintptr_t)base % HUGE) % HUGE;
	if (before)
		(void)munmap(base, before);
	(void)munmap(base + before + size, HUGE - before);
	keep_private(base + before, size);
	arena->base = base + before;
	return 0;
}

static void host_release(struct arena *arena, size_t size)
{
	(void)munmap(arena->base, size);
}

static int host_map(struct arena *arena, uint32_t slot, int fd)
{
	struct stat st;
	void *address;

	if (fstat(fd, &st) < 0)
		return -errno;
	if (st.st_size < 0 || (uint64_t)st.st_size < arena->extent_size)
		return -EPROTO;
	address = mmap(
		arena_slot(arena, slot), arena->extent_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	if (address == MAP_FAILED)
		return -errno;
	keep_private(address, arena->extent_size);
	return 0;
}

static int host_unmap(struct arena *arena, uint32_t slot, uint32_t count)
{
	size_t size = count * arena->extent_size;
	void *address = mmap(arena_slot(arena, slot), size, PROT_NONE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);

	if (address == MAP_FAILED)
		return -errno;
	keep_private(address, size);
	return 0;
}

const struct arena_ops arena_host = {
	.reserve = host_reserve, .release = host_release, .map = host_map, .unmap = host_unmap};

/* ---- any kind ---- */

int arena_init(
	struct arena *arena, const struct arena_ops *ops, struct kvg_cuda *cuda, uint32_t slots, uint64_t extent_size)
{
	uint64_t size;
	int r;

	if (!slots || !extent_size || extent_size % (uint64_t)sysconf(_SC_PAGESIZE) ||
		__builtin_mul_overflow(slots, extent_size, &size) || size > INT64_MAX)
		return -EPROTO;
	*arena = (struct arena){.ops = ops, .cuda = cuda, .extent_size = extent_size, .slots = slots};
	arena->mapped = calloc(slots, sizeof(*arena->mapped));
	if (!arena->mapped)
		return -ENOMEM;
	r = ops->reserve(arena, size);
	if (r < 0) {
		free(arena->mapped);
		*arena = (struct arena){.why = arena->why};
	}
	return r;
}

void arena_deinit(struct arena *arena)
{
	if (arena->base)
		arena->ops->release(arena, arena->slots * arena->extent_size);
	free(arena->mapped);
	*arena = (struct arena){0};
}

int arena_map(struct arena *arena, uint32_t slot, int fd)
{
	int r;

	arena->why = NULL;
	if (slot >= arena->slots || arena->mapped[slot])
		return -EPROTO;
	r = arena->ops->map(arena, slot, fd);
	if (r < 0)
		return r;
	arena->mapped[slot] = true;
	arena->mapped_count++;
	return 0;
}

int arena_unmap(struct arena *arena, uint32_t slot, uint32_t count)
{
	int r;

	arena->why = NULL;
	if (slot >= arena->slots || count > arena->slots - slot)
		return -EPROTO;
	for (uint32_t i = slot; i < slot + count; i++)
		if (!arena->mapped[i])
			return -EPROTO;
	r = arena->ops->unmap(arena, slot, count);
	if (r < 0)
		return r;
	for (uint32_t i = slot; i < slot + count; i++)
		arena->mapped[i] = false;
	arena->mapped_count -= count;
	return 0;
}

const char *arena_error(const struct arena *arena, int status)
{
	return arena->why ? arena->why : strerror(-status);
}
