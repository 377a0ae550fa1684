/* RELOCATE: emptying sparse extents, whole blocks at a time. */
#include <stdlib.h>

#include "daemon/sequence/evict.h"

#define RELOCATE_SHARE 4u /* of the sequence's blocks, free ones are at least this part when decoding */

/* The extents that hold the sequence's blocks. */
struct survey {
	struct extent **extents;
	uint32_t count, capacity;
};

static bool survey_add(struct survey *survey, struct extent *extent)
{
	if (survey->count == survey->capacity) {
		uint32_t capacity = survey->capacity ? 2 * survey->capacity : 64;
		struct extent **grown = realloc(survey->extents, capacity * sizeof(*grown));

		if (!grown)
			return false;
		survey->extents = grown;
		survey->capacity = capacity;
	}
	survey->extents[survey->count++] = extent;
	return true;
}

static bool survey_rows(const struct sequence *sequence, struct survey *survey)
{
	const struct space *space = sequence->space;
	const struct meta_row *rows = meta_rows(&space->part, sequence->slot);

	for (uint32_t row = 0; row < space->rows; row++) {
		const uint32_t *held = meta_held(&space->part, sequence->slot, row);

		for (uint32_t i = 0; i < rows[row].held_blocks; i++) {
			struct extent *extent = blocks_extent(&space->blocks, held[i]);

			if (extent->counted == 0 && !survey_add(survey, extent))
				return false;
			extent->counted++;
		}
	}
	return true;
}

static int by_use(const void *a, const void *b)
{
	uint32_t x = (*(struct extent *const *)a)->meta->used, y = (*(struct extent *const *)b)->meta->used;

	return (x > y) - (x < y);
}

/* Closes the sparsest extents whose blocks are all the sequence's and fit in what is free elsewhere. */
static void close_sparse(struct sequence *sequence, struct survey *survey, uint64_t room)
{
	struct block_space *blocks = &sequence->space->blocks;
	uint64_t moved = 0;

	if (survey->count == 0)
		return;
	qsort(survey->extents, survey->count, sizeof(struct extent *), by_use);
	for (uint32_t i = 0; i < survey->count; i++) {
		struct extent *extent = survey->extents[i];
		uint64_t own = extent->meta->generation == META_HELD ? extent->meta->blocks - extent->meta->used : 0;

		if (extent->counted != extent->meta->used || extent->owner == &blocks->closed ||
			moved + extent->meta->used + own > room)
			continue;
		room -= own;
		moved += extent->meta->used;
		blocks_close_extent(blocks, extent);
	}
}

static void choose_extents(struct sequence *sequence, uint64_t room)
{
	struct survey survey = {0};

	if (survey_rows(sequence, &survey))
		close_sparse(sequence, &survey, room);
	for (uint32_t i = 0; i < survey.count; i++)
		survey.extents[i]->counted = 0;
	free(survey.extents);
}

/* Lists blocks of closed extents, as many as a step may move. */
static uint32_t list_blocks(const struct sequence *sequence, const struct meta_record *record)
{
	const struct space *space = sequence->space;
	const struct meta_part *part = &space->part;
	const struct meta_row *rows = meta_rows(part, sequence->slot);
	uint32_t count = 0;

	for (uint32_t row = 0; row < space->rows; row++) {
		const uint32_t *held = meta_held(part, sequence->slot, row);

		for (uint32_t i = 0; i < rows[row].held_blocks && count < part->worker->move_cap; i++) {
			if (blocks_extent(&space->blocks, held[i])->owner != &space->blocks.closed)
				continue;
			record->relocations[count] = (struct meta_relocation){.row = row, .index = i};
			record->moves[count++] = (struct meta_move){.src = held[i], .count = KVG_BLOCK_TOKENS};
		}
	}
	return count;
}

/*
 * Looking for extents to empty takes as long as the sequence has blocks: only where there is one's worth of free
 * blocks, and in decoding, which comes by every 128 tokens, only where they are a good part of all.
 */
static bool is_worthwhile(const struct sequence *sequence, const struct evict *evict, uint64_t room)
{
	return room >= sequence->space->arena->blocks_per_extent &&
	       (!evict->decode || room * RELOCATE_SHARE >= sequence->meta->blocks);
}

/* Free blocks of held extents that the sequence may take, but for those that other evictions have secured. */
static uint64_t room_of(const struct sequence *sequence, const struct evict *evict)
{
	const struct space *space = sequence->space;
	uint64_t room = (uint64_t)sequence->owner.free_units[META_HELD] + space->blocks.shared.free_units[META_HELD],
		 most = evict_free_blocks(space, evict);

	return room < most ? room : most;
}

bool evict_plan_relocation(struct sequence *sequence, const struct evict *evict)
{
	struct space *space = sequence->space;
	const struct meta_record *record = evict->record;
	uint64_t room = room_of(sequence, evict);
	uint32_t count, *ids;

	if (space->blocks.closed.extents == 0 && !is_worthwhile(sequence, evict, room))
		return false;
	if (space->blocks.closed.extents == 0)
		choose_extents(sequence, room);
	if (space->blocks.closed.extents == 0)
		return false;
	count = list_blocks(sequence, record);
	if (count == 0 || count > room_of(sequence, evict))
		return false;
	ids = malloc((count + 1) * sizeof(uint32_t));
	if (!ids)
		return false;
	blocks_take_open(&space->blocks, &sequence->owner, count, ids);
	for (uint32_t i = 0; i < count; i++)
		record->moves[i].dst = ids[i];
	free(ids);
	sequence->meta->blocks += count;
	*record->redo = (struct meta_redo){.seq = sequence->slot,
		.stripe_first = sequence->meta->stripe_first,
		.move_count = count,
		.kind = META_REDO_RELOCATE};
	__atomic_store_n(&record->redo->state, META_REDO_PLANNED, __ATOMIC_RELEASE);
	return true;
}
