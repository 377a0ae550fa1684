/* PLAN, MOVE and PUBLISH: survivors go to held blocks, one stripe at a time. */
#include <math.h>
#include <string.h>

#include "daemon/sequence/evict.h"

_Static_assert(sizeof(struct meta_move) == sizeof(struct kvg_move), "a redo record is a plan");

static struct meta_place *places_of(const struct sequence *sequence, uint32_t block)
{
	return blocks_places(sequence->space->arena, sequence->space->pool->meta, block);
}

static bool is_dropped(const struct meta_place *place)
{
	return isinf(place->score) && place->score < 0;
}

/* Pairs of one row in stripe s. */
static uint32_t stripe_length(const struct evict *evict, uint32_t row, uint32_t s)
{
	uint32_t before = s * KVG_STRIPE_TOKENS, fresh = evict->fresh[row];

	return fresh <= before ? 0 : fresh - before < KVG_STRIPE_TOKENS ? fresh - before : KVG_STRIPE_TOKENS;
}

/* Survivors of one row in stripe s; their places go to src unless it is NULL. */
static uint32_t stripe_kept(
	const struct sequence *sequence, const struct evict *evict, uint32_t row, uint32_t s, struct kvg_place *src)
{
	uint32_t first = meta_run(&sequence->space->part, sequence->slot, s)[row], kept = 0;
	uint32_t length = stripe_length(evict, row, s);
	const struct meta_place *places = places_of(sequence, first);

	for (uint32_t i = 0; i < length; i++) {
		if (is_dropped(&places[i]))
			continue;
		if (src)
			src[kept] = (struct kvg_place){
				.block = first + i / KVG_BLOCK_TOKENS, .place = i % KVG_BLOCK_TOKENS};
		kept++;
	}
	return kept;
}

static bool has_stripe(const struct sequence *sequence, const struct evict *evict)
{
	return sequence->meta->stripe_first < evict->stripes;
}

bool evict_has_step(const struct sequence *sequence, const struct evict *evict)
{
	if (has_stripe(sequence, evict))
		return true;
	for (uint32_t row = evict->compact_row; row < sequence->space->rows; row++)
		if (evict->holes[row])
			return true;
	return false;
}

uint64_t evict_step_blocks(const struct sequence *sequence, const struct evict *evict)
{
	const struct meta_row *rows = meta_rows(&sequence->space->part, sequence->slot);
	uint64_t blocks = 0;

	if (!has_stripe(sequence, evict))
		return 0;
	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		uint32_t kept = stripe_kept(sequence, evict, row, sequence->meta->stripe_first, NULL);
		uint32_t room = evict->holes[row] + rows[row].held_blocks * KVG_BLOCK_TOKENS - rows[row].held_len;

		blocks += kept > room ? (kept - room + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS : 0;
	}
	return blocks;
}

/* The next dropped place of a row's held blocks. There is one. */
static struct kvg_place next_hole(const struct sequence *sequence, struct evict *evict, uint32_t row)
{
	const uint32_t *held = meta_held(&sequence->space->part, sequence->slot, row);
	uint32_t i = evict->cursor[row];

	while (!is_dropped(&places_of(sequence, held[i / KVG_BLOCK_TOKENS])[i % KVG_BLOCK_TOKENS]))
		i++;
	evict->cursor[row] = i + 1;
	evict->holes[row]--;
	return (struct kvg_place){.block = held[i / KVG_BLOCK_TOKENS], .place = i % KVG_BLOCK_TOKENS};
}

/* Places for n survivors of a row. Takes blocks from ids as needed; returns how many. */
static uint32_t place_row(
	const struct sequence *sequence, struct evict *evict, uint32_t row, uint32_t n, const uint32_t *ids)
{
	const struct meta_part *part = &sequence->space->part;
	struct meta_row *meta = &meta_rows(part, sequence->slot)[row];
	uint32_t *held = meta_held(part, sequence->slot, row), length = meta->held_len, taken = 0;

	for (uint32_t i = 0; i < n; i++) {
		if (evict->holes[row]) {
			evict->dst[i] = next_hole(sequence, evict, row);
			continue;
		}
		if (length / KVG_BLOCK_TOKENS == meta->held_blocks + taken) {
			held[meta->held_blocks + taken] = ids[taken];
			taken++;
		}
		evict->dst[i] = (struct kvg_place){
			.block = held[length / KVG_BLOCK_TOKENS], .place = length % KVG_BLOCK_TOKENS};
		length++;
	}
	meta->pending = taken;
	part->redo_rows[row] = (struct meta_redo_row){.held_len = length, .held_blocks = meta->held_blocks + taken};
	return taken;
}

static uint32_t add_moves(const struct sequence *sequence, const struct evict *evict, uint32_t n, uint32_t count)
{
	struct kvg_move *moves = (struct kvg_move *)sequence->space->part.moves;

	return count + (uint32_t)kvg_move_plan(evict->src, evict->dst, n, moves + count);
}

static void plan_stripe(struct sequence *sequence, struct evict *evict, const uint32_t *ids)
{
	struct meta_redo *redo = sequence->space->part.redo;
	uint32_t s = sequence->meta->stripe_first, count = 0;

	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		uint32_t n = stripe_kept(sequence, evict, row, s, evict->src);
		uint32_t taken = place_row(sequence, evict, row, n, ids);

		ids += taken;
		sequence->meta->blocks += taken;
		count = add_moves(sequence, evict, n, count);
	}
	*redo = (struct meta_redo){.seq = sequence->slot,
		.stripe_first = s + 1,
		.row_begin = 0,
		.row_end = sequence->space->rows,
		.move_count = count};
}

/* Pairs at the end of a row's held blocks move into the holes before them. Returns how many. */
static uint32_t close_holes(const struct sequence *sequence, struct evict *evict, uint32_t row)
{
	const struct meta_part *part = &sequence->space->part;
	const uint32_t *held = meta_held(part, sequence->slot, row);
	uint32_t length = meta_rows(part, sequence->slot)[row].held_len, left = length - evict->holes[row], n = 0;

	for (uint32_t i = left; i < length; i++)
		if (!is_dropped(&places_of(sequence, held[i / KVG_BLOCK_TOKENS])[i % KVG_BLOCK_TOKENS]))
			evict->src[n++] =
				(struct kvg_place){.block = held[i / KVG_BLOCK_TOKENS], .place = i % KVG_BLOCK_TOKENS};
	for (uint32_t i = 0; i < n; i++)
		evict->dst[i] = next_hole(sequence, evict, row);
	evict->holes[row] = 0;
	part->redo_rows[row] = (struct meta_redo_row){
		.held_len = left, .held_blocks = (left + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS};
	return n;
}

static void plan_compaction(struct sequence *sequence, struct evict *evict)
{
	const struct meta_part *part = &sequence->space->part;
	const struct meta_row *rows = meta_rows(part, sequence->slot);
	uint32_t row = evict->compact_row, count = 0;

	for (; row < sequence->space->rows && count + evict->holes[row] <= part->worker->move_cap; row++) {
		if (evict->holes[row])
			count = add_moves(sequence, evict, close_holes(sequence, evict, row), count);
		else
			part->redo_rows[row] = (struct meta_redo_row){
				.held_len = rows[row].held_len, .held_blocks = rows[row].held_blocks};
	}
	*part->redo = (struct meta_redo){.seq = sequence->slot,
		.stripe_first = sequence->meta->stripe_first,
		.row_begin = evict->compact_row,
		.row_end = row,
		.move_count = count};
	evict->compact_row = row;
}

void evict_plan(struct sequence *sequence, struct evict *evict, const uint32_t *ids)
{
	if (has_stripe(sequence, evict))
		plan_stripe(sequence, evict, ids);
	else
		plan_compaction(sequence, evict);
	__atomic_store_n(&sequence->space->part.redo->state, META_REDO_PLANNED, __ATOMIC_RELEASE);
}

void evict_move(const struct sequence *sequence)
{
	const struct meta_part *part = &sequence->space->part;
	const struct arena *arena = sequence->space->arena;
	const struct kvg_group *group = &arena->layout.groups[0];
	const struct kvg_move *moves = (const struct kvg_move *)part->moves;
	struct kvg_move_area area = {.k_base = arena->base,
		.v_base = arena->base + arena->extent_size / 2,
		.stride = arena->stride,
		.k_bytes = group->k_dim * (group->k_dtype == KVG_F32 ? 4u : 2u),
		.v_bytes = group->v_dim * (group->v_dtype == KVG_F32 ? 4u : 2u)};

	kvg_move_run(&area, moves, part->redo->move_count);
	for (uint32_t i = 0; i < part->redo->move_count; i++)
		memcpy(places_of(sequence, moves[i].dst) + moves[i].dst_place,
			places_of(sequence, moves[i].src) + moves[i].src_place,
			moves[i].count * sizeof(struct meta_place));
}

static void publish_row(struct sequence *sequence, uint32_t row)
{
	struct space *space = sequence->space;
	struct meta_row *meta = &meta_rows(&space->part, sequence->slot)[row];
	const struct meta_redo_row *redo = &space->part.redo_rows[row];
	const uint32_t *held = meta_held(&space->part, sequence->slot, row);
	uint32_t before = meta->held_blocks + meta->pending;

	meta->held_len = redo->held_len;
	meta->held_blocks = redo->held_blocks;
	meta->pending = 0;
	for (uint32_t i = redo->held_blocks; i < before; i++)
		blocks_give(&space->blocks, held[i]);
	sequence->meta->blocks -= before - redo->held_blocks;
}

static void publish_relocation(struct sequence *sequence)
{
	struct space *space = sequence->space;
	const struct meta_part *part = &space->part;

	for (uint32_t i = 0; i < part->redo->move_count; i++) {
		const struct meta_relocation *at = &part->relocations[i];

		meta_held(part, sequence->slot, at->row)[at->index] = part->moves[i].dst;
		blocks_give(&space->blocks, part->moves[i].src);
		sequence->meta->blocks--;
	}
}

void evict_publish(struct sequence *sequence)
{
	struct space *space = sequence->space;
	struct meta_redo *redo = space->part.redo;

	redo->state = META_REDO_MOVED;
	if (redo->kind == META_REDO_RELOCATE)
		publish_relocation(sequence);
	for (uint32_t row = redo->row_begin; row < redo->row_end; row++)
		publish_row(sequence, row);
	for (; sequence->meta->stripe_first < redo->stripe_first; sequence->meta->stripe_first++) {
		const uint32_t *runs = meta_run(&space->part, sequence->slot, sequence->meta->stripe_first);

		for (uint32_t row = 0; row < space->rows; row++)
			blocks_give_run(&space->blocks, runs[row]);
		sequence->meta->blocks -= (uint64_t)space->rows * KVG_RUN_BLOCKS;
	}
	redo->state = META_REDO_NONE;
}
