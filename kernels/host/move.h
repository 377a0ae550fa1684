/*
 * move.h - copies of pairs between blocks.
 *
 * A move copies `count` consecutive places of K and of V from a source block to a
 * destination block; slot metadata is its owner's to copy along. In one plan no place is both a
 * source and a destination, so that a plan can be executed again after a crash.
 */
#ifndef KVG_KERNELS_MOVE_H
#define KVG_KERNELS_MOVE_H

#include <stddef.h>
#include <stdint.h>

struct kvg_move {
	uint32_t src, dst; /* block ids */
	uint8_t src_place, dst_place, count;
	uint8_t reserved;
};

/* Places that a planner fills or empties in a row: pairs to move and free places, each as (block id, place). */
struct kvg_place {
	uint32_t block;
	uint32_t place;
};

/*
 * Pairs sources with destinations in order and joins neighbours (same blocks,
 * consecutive places on both sides) to one move. moves has room for n entries.
 * Returns the number of moves.
 */
size_t kvg_move_plan(const struct kvg_place *src, const struct kvg_place *dst, size_t n, struct kvg_move *moves);

/* Where blocks lie: K(id) = k_base + id * stride, V likewise; bytes of one token of K and of V. */
struct kvg_move_area {
	uint8_t *k_base, *v_base;
	size_t stride;
	size_t k_bytes, v_bytes;
};

void kvg_move_run(const struct kvg_move_area *area, const struct kvg_move *moves, size_t n);

#endif
