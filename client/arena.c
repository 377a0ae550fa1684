#include "client/arena.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Neither in a child process nor in a core dump. */
static void keep_private(void *address, size_t size)
{
	(void)madvise(address, size, MADV_DONTFORK);
	(void)madvise(address, size, MADV_DONTDUMP);
}

static uint8_t *slot_address(const struct arena *arena, uint32_t slot)
{
	return arena->base + (uint64_t)slot * arena->extent_size;
}

int arena_init(struct arena *arena, uint32_t slots, uint64_t extent_size)
{
	uint64_t size;
	bool *mapped;
	void *base;
	int r;

	if (!slots || !extent_size || extent_size % (uint64_t)sysconf(_SC_PAGESIZE) ||
		__builtin_mul_overflow(slots, extent_size, &size) || size > INT64_MAX)
		return -EPROTO;
	mapped = calloc(slots, sizeof(*mapped));
	if (!mapped)
		return -ENOMEM;
	base = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED) {
		r = -errno;
		free(mapped);
		return r;
	}
	keep_private(base, size);
	*arena = (struct arena){.base = base, .extent_size = extent_size, .slots = slots, .mapped = mapped};
	return 0;
}

void arena_deinit(struct arena *arena)
{
	if (arena->base)
		(void)munmap(arena->base, arena->slots * arena->extent_size);
	free(arena->mapped);
	*arena = (struct arena){0};
}

int arena_map(struct arena *arena, uint32_t slot, int fd)
{
	struct stat st;
	void *address;

	if (slot >= arena->slots || arena->mapped[slot])
		return -EPROTO;
	if (fstat(fd, &st) < 0)
		return -errno;
	if (st.st_size < 0 || (uint64_t)st.st_size < arena->extent_size)
		return -EPROTO;
	address = mmap(
		slot_address(arena, slot), arena->extent_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	if (address == MAP_FAILED)
		return -errno;
	keep_private(address, arena->extent_size);
	arena->mapped[slot] = true;
	arena->mapped_count++;
	return 0;
}

int arena_unmap(struct arena *arena, uint32_t slot, uint32_t count)
{
	size_t size = count * arena->extent_size;
	void *address;

	if (slot >= arena->slots || count > arena->slots - slot)
		return -EPROTO;
	for (uint32_t i = slot; i < slot + count; i++)
		if (!arena->mapped[i])
			return -EPROTO;
	address = mmap(slot_address(arena, slot), size, PROT_NONE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	if (address == MAP_FAILED)
		return -errno;
	keep_private(address, size);
	for (uint32_t i = slot; i < slot + count; i++)
		arena->mapped[i] = false;
	arena->mapped_count -= count;
	return 0;
}
