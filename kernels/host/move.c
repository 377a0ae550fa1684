#include "kernels/host/move.h"

#include <assert.h>
#include <string.h>

/* Whether the pair goes on where the move ends. */
static int continues(const struct kvg_move *move, const struct kvg_place *src, const struct kvg_place *dst)
{
	return move->src == src->block && move->dst == dst->block && move->count < UINT8_MAX &&
	       (uint32_t)move->src_place + move->count == src->place &&
	       (uint32_t)move->dst_place + move->count == dst->place;
}

size_t kvg_move_plan(const struct kvg_place *src, const struct kvg_place *dst, size_t n, struct kvg_move *moves)
{
	size_t count = 0;

	for (size_t i = 0; i < n; i++) {
		if (count && continues(&moves[count - 1], &src[i], &dst[i])) {
			moves[count - 1].count++;
			continue;
		}
		assert(src[i].place <= UINT8_MAX && dst[i].place <= UINT8_MAX);
		moves[count++] = (struct kvg_move){
			.src = src[i].block,
			.dst = dst[i].block,
			.src_place = (uint8_t)src[i].place,
			.dst_place = (uint8_t)dst[i].place,
			.count = 1,
		};
	}
	return count;
}

static void copy_half(uint8_t *base, size_t stride, size_t bytes, const struct kvg_move *move)
{
	memcpy(base + move->dst * stride + move->dst_place * bytes, base + move->src * stride + move->src_place * bytes,
		move->count * bytes);
}

void kvg_move_run(const struct kvg_move_area *area, const struct kvg_move *moves, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		if (area->k_bytes)
			copy_half(area->k_base, area->stride, area->k_bytes, &moves[i]);
		if (area->v_bytes)
			copy_half(area->v_base, area->stride, area->v_bytes, &moves[i]);
	}
}
