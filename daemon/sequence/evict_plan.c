/* PLAN and PUBLISH: where the survivors of a step go, by counts alone. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/evict.h"
#include "daemon/sequence/keep.h"
#include "daemon/sequence/recall.h"

struct evict *evict_free(struct evict *evict)
{
	if (!evict)
		return NULL;
	evict->host = evict_host_free(evict->host);
	evict->recall = recall_free(evict->recall);
	free(evict->length);
	free(evict->held);
	free(evict->kept);
	free(evict->holes);
	free(evict->stripe_kept);
	free(evict->steps);
	free(evict);
	return NULL;
}

bool evict_is_protected(const struct meta_seq *meta, uint32_t pos)
{
	for (uint32_t i = 0; i < meta->protected_count; i++)
		if (pos >= meta->protect_begin[i] && pos < meta->protect_end[i])
			return true;
	return pos < meta->policy.prefix_tokens;
}

static uint32_t count_candidates(const struct meta_seq *meta, const struct evict *evict)
{
	uint32_t n = evict->end - evict->begin;

	for (uint32_t pos = evict->begin; meta->protected_count && pos < evict->end; pos++)
		n -= evict_is_protected(meta, pos);
	return n;
}

static void survey_rows(const struct sequence *sequence, struct evict *evict)
{
	const struct meta_row *rows = meta_rows(&sequence->space->part, sequence->slot);
	uint32_t fresh = sequence->meta->committed_pos - sequence->meta->fold_pos;

	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		uint32_t length = rows[row].base_len + fresh, room = rows[row].held_blocks * KVG_BLOCK_TOKENS;
		uint32_t held = length < room ? length : room;
		uint32_t stripes = (length - held + KVG_STRIPE_TOKENS - 1) / KVG_STRIPE_TOKENS;

		evict->length[row] = length;
		evict->held[row] = held;
		if (evict->stripes < stripes)
			evict->stripes = stripes;
	}
}

int evict_survey(const struct sequence *sequence, struct evict *evict)
{
	size_t rows = sequence->space->rows;

	evict->candidates = evict->decode ? 0 : count_candidates(sequence->meta, evict);
	evict->length = calloc(rows, sizeof(uint32_t));
	evict->held = calloc(rows, sizeof(uint32_t));
	evict->kept = calloc(rows, sizeof(uint32_t));
	evict->holes = calloc(rows, sizeof(uint32_t));
	evict->steps = calloc(rows, sizeof(struct evict_step));
	if (!evict->length || !evict->held || !evict->kept || !evict->holes || !evict->steps)
		return -ENOMEM;
	survey_rows(sequence, evict);
	evict->stripe_kept = calloc(rows * evict->stripes + 1, sizeof(uint32_t));
	return evict->stripe_kept ? 0 : -ENOMEM;
}

void evict_count(const struct sequence *sequence, struct evict *evict)
{
	const struct meta_row *rows = meta_rows(&sequence->space->part, sequence->slot);

	evict->new_blocks = evict->dropped = evict->total = 0;
	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		uint32_t blocks = (evict->kept[row] + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS;

		evict->total += evict->length[row];
		evict->dropped += evict->length[row] - evict->kept[row];
		if (blocks > rows[row].held_blocks)
			evict->new_blocks += blocks - rows[row].held_blocks;
	}
}

uint64_t evict_free_blocks(const struct space *space, const struct evict *evict)
{
	uint64_t all = blocks_free_anywhere(&space->blocks), others = space->evict_reserve - evict->reserve;

	return all > others ? all - others : 0;
}

uint32_t evict_first_changed(const struct evict *evict, uint32_t row)
{
	return evict->relocated ? 0 : evict->held[row] / KVG_BLOCK_TOKENS;
}

/* ---- choosing a step ---- */

/* Held blocks that a row takes for `count` more survivors. */
static uint32_t row_blocks(const struct evict *evict, const struct meta_row *meta, uint32_t row, uint32_t count)
{
	uint32_t room = evict->holes[row] + meta->held_blocks * KVG_BLOCK_TOKENS - meta->held_len;

	return count > room ? (count - room + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS : 0;
}

struct step_size {
	uint64_t blocks, moves;
};

/* Blocks and moves when stripe s joins the step. */
static struct step_size size_with(const struct sequence *sequence, const struct evict *evict, uint32_t s)
{
	const struct meta_row *rows = meta_rows(&sequence->space->part, sequence->slot);
	struct step_size size = {0};

	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		uint32_t count = evict->steps[row].count + evict->stripe_kept[row * evict->stripes + s];

		size.moves += count;
		size.blocks += row_blocks(evict, &rows[row], row, count);
	}
	return size;
}

static void add_stripe(const struct sequence *sequence, struct evict *evict, uint32_t s, const struct step_size *size)
{
	for (uint32_t row = 0; row < sequence->space->rows; row++)
		evict->steps[row].count += evict->stripe_kept[row * evict->stripes + s];
	evict->step_blocks = size->blocks;
	evict->step_last = s + 1;
}

/* Moves that a step may have: where the device works them out from its lists, the redo record has none of them. */
static uint64_t most_moves(const struct space *space)
{
	return space->compute->closes_holes ? UINT64_MAX : space->part.worker->move_cap;
}

/*
 * Whether a step of that size needs no extents, no blocks of others, no more moves than the record has room for, and
 * leaves others the extents without blocks that they count on.
 */
static bool is_possible(const struct sequence *sequence, const struct evict *evict, const struct step_size *size)
{
	const struct space *space = sequence->space;
	uint32_t others = space->blocks.spare_count - keep_usable(sequence);
	uint64_t kept = (uint64_t)others * space->arena->blocks_per_extent;

	return size->moves <= most_moves(space) && size->blocks + kept <= evict_free_blocks(space, evict) &&
	       !blocks_missing(&space->blocks, &sequence->owner, META_HELD, size->blocks,
		       evict->new_blocks - size->blocks, others);
}

/* All stripes that are left, where that is possible. */
static bool choose_all(const struct sequence *sequence, struct evict *evict)
{
	const struct meta_row *rows = meta_rows(&sequence->space->part, sequence->slot);
	struct step_size size = {0};

	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		uint32_t count = 0;

		for (uint32_t s = evict->step_first; s < evict->stripes; s++)
			count += evict->stripe_kept[row * evict->stripes + s];
		evict->steps[row].count = count;
		size.moves += count;
		size.blocks += row_blocks(evict, &rows[row], row, count);
	}
	evict->step_blocks = size.blocks;
	evict->step_last = evict->stripes;
	return is_possible(sequence, evict, &size);
}

/* At least one stripe, and more while blocks are free for them and the redo record has room. */
static void choose_stripes(const struct sequence *sequence, struct evict *evict)
{
	struct step_size size;

	evict->step_first = sequence->meta->stripe_first;
	if (choose_all(sequence, evict))
		return;
	for (uint32_t row = 0; row < sequence->space->rows; row++)
		evict->steps[row].count = 0;
	for (uint32_t s = evict->step_first; s < evict->stripes; s++) {
		size = size_with(sequence, evict, s);
		if (s > evict->step_first && !is_possible(sequence, evict, &size))
			return;
		add_stripe(sequence, evict, s, &size);
	}
}

/* Rows from compact_row on, up to as many as the redo record has room for. */
static bool choose_rows(const struct sequence *sequence, struct evict *evict)
{
	const struct space *space = sequence->space;
	uint32_t row = evict->compact_row, holes = 0;

	for (; row < space->rows && holes + (uint64_t)evict->holes[row] <= most_moves(space); row++)
		holes += evict->holes[row];
	evict->compact_end = row;
	evict->step_blocks = 0;
	return holes > 0;
}

bool evict_choose_step(const struct sequence *sequence, struct evict *evict)
{
	evict->compacting = sequence->meta->stripe_first >= evict->stripes;
	if (evict->compacting)
		return choose_rows(sequence, evict);
	choose_stripes(sequence, evict);
	return true;
}

/* ---- PLAN ---- */

/* Places for the step's survivors of a row: holes, then the end of its held blocks. Returns the blocks taken from ids.
 */
static uint32_t place_row(const struct sequence *sequence, struct evict *evict, uint32_t row, const uint32_t *ids)
{
	const struct meta_part *part = &sequence->space->part;
	struct meta_row *meta = &meta_rows(part, sequence->slot)[row];
	struct evict_step *step = &evict->steps[row];
	uint32_t taken = row_blocks(evict, meta, row, step->count), length;

	memcpy(meta_held(part, sequence->slot, row) + meta->held_blocks, ids, taken * sizeof(uint32_t));
	step->hole_count = step->count < evict->holes[row] ? step->count : evict->holes[row];
	step->tail = meta->held_len;
	evict->holes[row] -= step->hole_count;
	meta->pending = taken;
	length = step->tail + step->count - step->hole_count;
	evict->record->rows[row] = (struct meta_redo_row){.held_len = length, .held_blocks = meta->held_blocks + taken};
	return taken;
}

/* Pairs at the end of a row's held blocks go into the holes that are left before them. */
static void close_row(struct evict *evict, uint32_t row)
{
	struct meta_redo_row *redo = &evict->record->rows[row];

	evict->steps[row].closed = evict->holes[row];
	if (!evict->holes[row])
		return;
	redo->held_len -= evict->holes[row];
	redo->held_blocks = (redo->held_len + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS;
	evict->holes[row] = 0;
}

static void plan_stripes(struct sequence *sequence, struct evict *evict, const uint32_t *ids)
{
	const struct space *space = sequence->space;
	bool closing = space->compute->closes_holes && evict->step_last == evict->stripes;

	for (uint32_t row = 0; row < space->rows; row++) {
		ids += place_row(sequence, evict, row, ids);
		if (closing)
			close_row(evict, row);
	}
	evict->publishes = closing && space->compute->move_publishes;
	sequence->meta->blocks += evict->step_blocks;
	evict->new_blocks -= evict->step_blocks;
	*evict->record->redo = (struct meta_redo){
		.seq = sequence->slot, .stripe_first = evict->step_last, .row_begin = 0, .row_end = space->rows};
}

static void plan_compaction(const struct sequence *sequence, struct evict *evict)
{
	const struct meta_part *part = &sequence->space->part;
	const struct meta_row *rows = meta_rows(part, sequence->slot);

	for (uint32_t row = evict->compact_row; row < evict->compact_end; row++) {
		evict->steps[row].count = evict->steps[row].hole_count = 0;
		evict->steps[row].tail = rows[row].held_len;
		evict->record->rows[row] =
			(struct meta_redo_row){.held_len = rows[row].held_len, .held_blocks = rows[row].held_blocks};
		close_row(evict, row);
	}
	*evict->record->redo = (struct meta_redo){.seq = sequence->slot,
		.stripe_first = sequence->meta->stripe_first,
		.row_begin = evict->compact_row,
		.row_end = evict->compact_end};
	evict->compact_row = evict->compact_end;
}

void evict_plan(struct sequence *sequence, struct evict *evict, const uint32_t *ids)
{
	if (evict->compacting)
		plan_compaction(sequence, evict);
	else
		plan_stripes(sequence, evict, ids);
}

/* ---- PUBLISH ---- */

static void publish_row(struct sequence *sequence, const struct evict *evict, uint32_t row)
{
	struct space *space = sequence->space;
	struct meta_row *meta = &meta_rows(&space->part, sequence->slot)[row];
	const struct meta_redo_row *redo = &evict->record->rows[row];
	const uint32_t *held = meta_held(&space->part, sequence->slot, row);
	uint32_t before = meta->held_blocks + meta->pending;

	meta->held_len = redo->held_len;
	meta->held_blocks = redo->held_blocks;
	meta->pending = 0;
	for (uint32_t i = redo->held_blocks; i < before; i++)
		blocks_give(&space->blocks, held[i]);
	sequence->meta->blocks -= before - redo->held_blocks;
}

static void publish_relocation(struct sequence *sequence, struct evict *evict)
{
	struct space *space = sequence->space;
	const struct meta_record *record = evict->record;

	evict->relocated = true;
	for (uint32_t i = 0; i < record->redo->move_count; i++) {
		const struct meta_relocation *at = &record->relocations[i];

		meta_held(&space->part, sequence->slot, at->row)[at->index] = record->moves[i].dst;
		blocks_give(&space->blocks, record->moves[i].src);
		sequence->meta->blocks--;
	}
}

/* The next step goes on where this one ended. */
static void advance(struct evict *evict, uint32_t rows)
{
	for (uint32_t row = 0; row < rows; row++) {
		struct evict_step *step = &evict->steps[row];

		step->source += step->count;
		step->hole += step->hole_count + step->closed;
		step->count = step->hole_count = step->closed = 0;
	}
}

void evict_publish(struct sequence *sequence, struct evict *evict)
{
	struct space *space = sequence->space;
	struct meta_redo *redo = evict->record->redo;

	redo->state = META_REDO_MOVED;
	if (redo->kind == META_REDO_RELOCATE)
		publish_relocation(sequence, evict);
	for (uint32_t row = redo->row_begin; row < redo->row_end; row++)
		publish_row(sequence, evict, row);
	for (; sequence->meta->stripe_first < redo->stripe_first; sequence->meta->stripe_first++) {
		blocks_give_runs(&space->blocks, meta_run(&space->part, sequence->slot, sequence->meta->stripe_first),
			space->rows);
		sequence->meta->blocks -= (uint64_t)space->rows * KVG_RUN_BLOCKS;
	}
	redo->state = META_REDO_NONE;
	evict->published |= evict->publishes;
	evict->publishes = false;
	advance(evict, space->rows);
}
