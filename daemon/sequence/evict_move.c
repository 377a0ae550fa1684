/* MOVE of the host kind: the redo record of a step, and its moves. */
#include <math.h>
#include <string.h>

#include "daemon/sequence/evict_host.h"

_Static_assert(sizeof(struct meta_move) == sizeof(struct kvg_move), "a redo record is a plan");

static struct meta_place *places_of(const struct sequence *sequence, uint32_t block)
{
	return blocks_places(sequence->space->arena, sequence->space->pool->meta, block);
}

static bool is_dropped(const struct meta_place *place)
{
	return isinf(place->score) && place->score < 0;
}

/* The survivors of one row in stripe s go to src. Returns how many. */
static uint32_t list_stripe(
	const struct sequence *sequence, const struct evict *evict, uint32_t row, uint32_t s, struct kvg_place *src)
{
	uint32_t first = meta_run(&sequence->space->part, sequence->slot, s)[row], kept = 0;
	uint32_t fresh = evict->length[row] - evict->held[row], begin = s * KVG_STRIPE_TOKENS;
	const struct meta_place *places = places_of(sequence, first);

	for (uint32_t i = 0; i < KVG_STRIPE_TOKENS && begin + i < fresh; i++)
		if (!is_dropped(&places[i]))
			src[kept++] = (struct kvg_place){
				.block = first + i / KVG_BLOCK_TOKENS, .place = i % KVG_BLOCK_TOKENS};
	return kept;
}

static struct kvg_place held_place(const uint32_t *held, uint32_t index)
{
	return (struct kvg_place){.block = held[index / KVG_BLOCK_TOKENS], .place = index % KVG_BLOCK_TOKENS};
}

static bool is_hole(const struct sequence *sequence, const uint32_t *held, uint32_t index)
{
	return is_dropped(&places_of(sequence, held[index / KVG_BLOCK_TOKENS])[index % KVG_BLOCK_TOKENS]);
}

/* The next dropped place of a row's held blocks. There is one. */
static struct kvg_place next_hole(const struct sequence *sequence, const struct evict *evict, uint32_t row)
{
	const uint32_t *held = meta_held(&sequence->space->part, sequence->slot, row);
	uint32_t *cursor = &evict->host->cursor[row];

	while (!is_hole(sequence, held, *cursor))
		++*cursor;
	return held_place(held, (*cursor)++);
}

/* One row's sources and destinations. Returns how many. */
static uint32_t list_step(const struct sequence *sequence, const struct evict *evict, uint32_t row)
{
	const struct evict_step *step = &evict->steps[row];
	const uint32_t *held = meta_held(&sequence->space->part, sequence->slot, row);
	struct kvg_place *dst = evict->host->dst;
	uint32_t n = 0;

	for (uint32_t s = evict->step_first; s < evict->step_last; s++)
		n += list_stripe(sequence, evict, row, s, evict->host->src + n);
	for (uint32_t i = 0; i < n; i++)
		dst[i] = i < step->hole_count ? next_hole(sequence, evict, row)
					      : held_place(held, step->tail + i - step->hole_count);
	return n;
}

static uint32_t list_compaction(const struct sequence *sequence, const struct evict *evict, uint32_t row)
{
	const struct evict_step *step = &evict->steps[row];
	const uint32_t *held = meta_held(&sequence->space->part, sequence->slot, row);
	uint32_t n = 0;

	for (uint32_t i = step->tail - step->closed; i < step->tail; i++)
		if (!is_hole(sequence, held, i))
			evict->host->src[n++] = held_place(held, i);
	for (uint32_t i = 0; i < n; i++)
		evict->host->dst[i] = next_hole(sequence, evict, row);
	return n;
}

/* Every move is written down before the first is made. */
static void write_redo(const struct sequence *sequence, const struct evict *evict)
{
	struct meta_redo *redo = evict->record->redo;
	struct kvg_move *moves = (struct kvg_move *)evict->record->moves;
	uint32_t count = 0;

	for (uint32_t row = redo->row_begin; row < redo->row_end; row++) {
		uint32_t n =
			evict->compacting ? list_compaction(sequence, evict, row) : list_step(sequence, evict, row);

		count += (uint32_t)kvg_move_plan(evict->host->src, evict->host->dst, n, moves + count);
	}
	redo->move_count = count;
	__atomic_store_n(&redo->state, META_REDO_PLANNED, __ATOMIC_RELEASE);
}

void evict_move(const struct sequence *sequence, struct evict *evict)
{
	const struct meta_redo *redo = evict->record->redo;
	const struct arena *arena = sequence->space->arena;
	const struct kvg_group *group = &arena->layout.groups[0];
	const struct kvg_move *moves = (const struct kvg_move *)evict->record->moves;
	struct kvg_move_area area = {.k_base = arena->base,
		.v_base = arena->base + arena->extent_size / 2,
		.stride = arena->stride,
		.k_bytes = group->k_dim * (group->k_dtype == KVG_F32 ? 4u : 2u),
		.v_bytes = group->v_dim * (group->v_dtype == KVG_F32 ? 4u : 2u)};

	if (redo->kind == META_REDO_PACK)
		write_redo(sequence, evict);
	kvg_move_run(&area, moves, redo->move_count);
	for (uint32_t i = 0; i < redo->move_count; i++)
		memcpy(places_of(sequence, moves[i].dst) + moves[i].dst_place,
			places_of(sequence, moves[i].src) + moves[i].src_place,
			moves[i].count * sizeof(struct meta_place));
}
