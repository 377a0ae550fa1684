/*
 * arena.h - the address range of a layout's extents. Reserved once, so that
 * addresses stay; a slot is either mapped to its extent or inaccessible.
 *
 * Addresses are the process's own on the host kind and the device's on the cuda kind, where the device's context
 * must be retained as long as the arena lives.
 */
#ifndef KVG_CLIENT_ARENA_H
#define KVG_CLIENT_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct arena;
struct kvg_cuda;

/* Where the extents lie. Slots have been checked. Each returns 0 or a negative errno. */
struct arena_ops {
	int (*reserve)(struct arena *arena, size_t size); /* sets base */
	void (*release)(struct arena *arena, size_t size);
	int (*map)(struct arena *arena, uint32_t slot, int fd);
	int (*unmap)(struct arena *arena, uint32_t slot, uint32_t count);
};

extern const struct arena_ops arena_host, arena_cuda; /* arena_cuda: only in a library built with the kind */

struct arena {
	const struct arena_ops *ops;
	struct kvg_cuda *cuda; /* borrowed; NULL on the host kind */
	uint8_t *base;
	uint64_t extent_size;
	uint32_t slots;
	uint32_t mapped_count;
	bool *mapped;    /* [slots] */
	const char *why; /* what the driver said last, or NULL */
};

/* Reserves slots * extent_size bytes of addresses. 0; -EPROTO for absurd sizes; another negative errno. */
int arena_init(
	struct arena *arena, const struct arena_ops *ops, struct kvg_cuda *cuda, uint32_t slots, uint64_t extent_size);

/* Unmaps everything; a zeroed arena is fine. On the cuda kind nothing on the device may use it any more. */
void arena_deinit(struct arena *arena);

/*
 * Maps an extent's descriptor (not closed) at a slot. -EPROTO when the slot is outside the arena or taken, or
 * the descriptor smaller than an extent; another negative errno.
 */
int arena_map(struct arena *arena, uint32_t slot, int fd);

/*
 * Makes `count` neighbouring slots inaccessible. -EPROTO when one of them is not mapped; another negative errno. On the
 * cuda kind kernels no longer use them: the daemon drops extents when the eviction or free that emptied them is done,
 * which waited for the worker's stream, and kernels behind it find no id of theirs in the tables.
 */
int arena_unmap(struct arena *arena, uint32_t slot, uint32_t count);

/* One line on the last failure with that status. */
const char *arena_error(const struct arena *arena, int status);

static inline uint8_t *arena_slot(const struct arena *arena, uint32_t slot)
{
	return arena->base + (uint64_t)slot * arena->extent_size;
}

#endif
