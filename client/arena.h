/*
 * arena.h - the address range of a layout's extents. Reserved once, so that
 * addresses stay; a slot is either mapped to its extent or inaccessible.
 */
#ifndef KVG_CLIENT_ARENA_H
#define KVG_CLIENT_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct arena {
	uint8_t *base;
	uint64_t extent_size;
	uint32_t slots;
	uint32_t mapped_count;
	bool *mapped; /* [slots] */
};

/* Reserves slots * extent_size bytes of addresses. 0; -EPROTO for absurd sizes; another negative errno. */
int arena_init(struct arena *arena, uint32_t slots, uint64_t extent_size);

/* Unmaps everything; a zeroed arena is fine. */
void arena_deinit(struct arena *arena);

/*
 * Maps an extent's descriptor (not closed) at a slot. -EPROTO when the slot is outside the arena or taken, or
 * the descriptor smaller than an extent; another negative errno.
 */
int arena_map(struct arena *arena, uint32_t slot, int fd);

/* Makes `count` neighbouring slots inaccessible. -EPROTO when one of them is not mapped; another negative errno. */
int arena_unmap(struct arena *arena, uint32_t slot, uint32_t count);

#endif
