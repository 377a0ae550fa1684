/* PACK and UNPACK of the host kind: copies between blocks and a sequence's store. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/evict_host.h"
#include "daemon/sequence/recall.h"

#define SLICE_BYTES (1u << 20) /* copied before others have their turn */

/* K or V of a place. */
static uint8_t *half_of(const struct arena *arena, bool v, uint32_t block, uint32_t place, uint32_t bytes)
{
	return arena->base + (v ? arena->extent_size / 2 : 0) + block * arena->stride + (size_t)place * bytes;
}

static uint64_t slice_pairs(const struct retain *retain)
{
	return SLICE_BYTES / retain_pair_bytes(&retain->form);
}

/* ---- PACK ---- */

/* The dropped pairs' scores, row by row. */
static void list_scores(const struct sequence *sequence, const struct evict *evict, float *scores)
{
	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		struct evict_cursor at = evict_cursor(sequence, row);

		while (evict_cursor_next(&at))
			for (uint32_t i = 0; i < at.count; i++)
				if (evict_is_dropped(evict, row, at.index + i, evict_cursor_pos(&at, i)))
					*scores++ = at.places[i].score;
	}
}

static int plan_pack(const struct sequence *sequence, struct evict *evict)
{
	float *scores = malloc((evict->dropped + 1) * sizeof(float));
	int r = -ENOMEM;

	if (scores) {
		list_scores(sequence, evict, scores);
		r = retain_plan(sequence->retain, scores, evict->dropped, &evict->host->plan);
	}
	free(scores);
	return r;
}

static void pack_pair(const struct sequence *sequence, const struct evict_cursor *at, uint32_t i, uint64_t to)
{
	const struct arena *arena = sequence->space->arena;
	const struct retain *retain = sequence->retain;
	uint32_t k = retain->form.k_bytes, v = retain->form.v_bytes;

	memcpy(retain_k(retain, to), half_of(arena, false, at->block, i, k), k);
	memcpy(retain_v(retain, to), half_of(arena, true, at->block, i, v), v);
	*retain_entry(retain, to) =
		(struct retain_entry){.row = at->row, .pos = evict_cursor_pos(at, i), .score = at->places[i].score};
}

static void pack_row(const struct sequence *sequence, const struct evict *evict, uint32_t row)
{
	struct evict_cursor at = evict_cursor(sequence, row);
	struct evict_host *host = evict->host;

	while (evict_cursor_next(&at))
		for (uint32_t i = 0; i < at.count; i++)
			if (evict_is_dropped(evict, row, at.index + i, evict_cursor_pos(&at, i))) {
				uint64_t to = host->plan.place[host->packed++];

				if (to != RETAIN_NOWHERE)
					pack_pair(sequence, &at, i, to);
			}
}

int evict_pack(const struct sequence *sequence, struct evict *evict)
{
	struct evict_host *host = evict->host;
	uint64_t begin = host->packed;
	int r = retain_open(sequence);

	if (r >= 0 && !host->plan.place)
		r = plan_pack(sequence, evict);
	if (r < 0)
		return r;
	while (host->pack_row < sequence->space->rows) {
		if (host->packed - begin > slice_pairs(sequence->retain))
			return -EAGAIN;
		pack_row(sequence, evict, host->pack_row++);
	}
	sequence->retain->count = host->plan.count;
	return 0;
}

/* ---- UNPACK ---- */

/* The pair goes behind those that its row holds already. */
static void unpack_pair(const struct sequence *sequence, struct recall *recall, uint64_t from)
{
	const struct space *space = sequence->space;
	const struct retain *retain = sequence->retain;
	const struct retain_entry *entry = retain_entry(retain, from);
	uint32_t k = retain->form.k_bytes, v = retain->form.v_bytes, row = entry->row;
	uint32_t index = meta_rows(&space->part, sequence->slot)[row].held_len + recall->seen[row]++;
	uint32_t block = meta_held(&space->part, sequence->slot, row)[index / KVG_BLOCK_TOKENS];
	uint32_t place = index % KVG_BLOCK_TOKENS;

	memcpy(half_of(space->arena, false, block, place, k), retain_k(retain, from), k);
	memcpy(half_of(space->arena, true, block, place, v), retain_v(retain, from), v);
	blocks_places(space->arena, space->pool->meta, block)[place] =
		(struct meta_place){.pos = (int32_t)entry->pos, .score = entry->score};
}

int evict_unpack(const struct sequence *sequence, struct evict *evict)
{
	struct recall *recall = evict->recall;
	uint64_t end = recall->unpacked + slice_pairs(sequence->retain) + 1;

	for (; recall->unpacked < recall->chosen_count; recall->unpacked++) {
		if (recall->unpacked == end)
			return -EAGAIN;
		unpack_pair(sequence, recall, recall->chosen[recall->unpacked]);
	}
	retain_remove(sequence->retain, recall->chosen, recall->chosen_count);
	return 0;
}
