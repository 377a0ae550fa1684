/* SELECT and MARK: which pairs of a sequence stay. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/evict.h"

#define DECODE_FIRST  4u
#define DECODE_WINDOW 128u

struct evict *evict_free(struct evict *evict)
{
	if (!evict)
		return NULL;
	free(evict->scores);
	free(evict->keep);
	free(evict->offset);
	free(evict->rank_skip);
	free(evict->kept);
	free(evict->holes);
	free(evict->cursor);
	free(evict->fresh);
	free(evict->src);
	free(evict->dst);
	free(evict);
	return NULL;
}

/* One row's pairs, block by block. */
struct cursor {
	const struct sequence *sequence;
	uint32_t row, base_len, length;
	uint32_t index; /* of places[0] */
	uint32_t count;
	struct meta_place *places;
};

static bool cursor_next(struct cursor *at)
{
	const struct space *space = at->sequence->space;

	at->index += at->count;
	if (at->index >= at->length)
		return false;
	at->count = at->length - at->index < KVG_BLOCK_TOKENS ? at->length - at->index : KVG_BLOCK_TOKENS;
	at->places = blocks_places(space->arena, space->pool->meta, sequence_block(at->sequence, at->row, at->index));
	return true;
}

static struct cursor cursor_row(const struct sequence *sequence, uint32_t row)
{
	const struct meta_row *meta = &meta_rows(&sequence->space->part, sequence->slot)[row];

	return (struct cursor){.sequence = sequence,
		.row = row,
		.base_len = meta->base_len,
		.length = meta->base_len + sequence->meta->committed_pos - sequence->meta->fold_pos};
}

/* Position of place i under the cursor: written down for folded pairs, implied by the index for fresh ones. */
static uint32_t cursor_pos(const struct cursor *at, uint32_t i)
{
	uint32_t index = at->index + i;

	return index < at->base_len ? (uint32_t)at->places[i].pos
				    : at->sequence->meta->fold_pos + (index - at->base_len);
}

static bool is_protected(const struct meta_seq *meta, uint32_t pos)
{
	for (uint32_t i = 0; i < meta->protected_count; i++)
		if (pos >= meta->protect_begin[i] && pos < meta->protect_end[i])
			return true;
	return pos < meta->policy.prefix_tokens;
}

/* Index of a position among its row's candidates, or UINT32_MAX when it is none. */
static uint32_t rank_of(const struct evict *evict, uint32_t pos)
{
	uint32_t at;

	if (pos < evict->begin || pos >= evict->end)
		return UINT32_MAX;
	at = pos - evict->begin;
	if (!evict->rank_skip)
		return at;
	return evict->rank_skip[at + 1] != evict->rank_skip[at] ? UINT32_MAX : at - evict->rank_skip[at];
}

static int count_candidates(const struct sequence *sequence, struct evict *evict)
{
	uint32_t n = evict->end - evict->begin, skipped = 0;

	evict->candidates = n;
	if (!sequence->meta->protected_count)
		return 0;
	evict->rank_skip = malloc((n + 1) * sizeof(uint32_t));
	if (!evict->rank_skip)
		return -ENOMEM;
	for (uint32_t i = 0; i < n; i++) {
		evict->rank_skip[i] = skipped;
		skipped += is_protected(sequence->meta, evict->begin + i);
	}
	evict->rank_skip[n] = skipped;
	evict->candidates = n - skipped;
	return 0;
}

static int allocate(const struct sequence *sequence, struct evict *evict)
{
	uint32_t rows = sequence->space->rows;
	size_t n = 0, most = KVG_STRIPE_TOKENS;

	evict->fresh = calloc(rows, sizeof(uint32_t));
	evict->offset = malloc((rows + 1) * sizeof(size_t));
	evict->kept = calloc(rows, sizeof(uint32_t));
	evict->holes = calloc(rows, sizeof(uint32_t));
	evict->cursor = calloc(rows, sizeof(uint32_t));
	if (!evict->fresh || !evict->offset || !evict->kept || !evict->holes || !evict->cursor)
		return -ENOMEM;
	for (uint32_t row = 0; row < rows; row++) {
		if (most < cursor_row(sequence, row).length)
			most = cursor_row(sequence, row).length;
		evict->offset[row] = n;
		n += evict->decode ? cursor_row(sequence, row).length : evict->candidates;
	}
	evict->offset[rows] = n;
	evict->scores = malloc((n + 1) * sizeof(float));
	evict->keep = malloc(n + 1);
	evict->src = malloc(most * sizeof(struct kvg_place));
	evict->dst = malloc(most * sizeof(struct kvg_place));
	return evict->scores && evict->keep && evict->src && evict->dst ? 0 : -ENOMEM;
}

/* Decode eviction: the first tokens count as 1.0 and so do the newest, for this decision only. */
static float decode_score(const struct sequence *sequence, uint32_t pos, float score)
{
	const struct kvg_policy *policy = &sequence->meta->policy;
	uint32_t first = policy->decode_first ? policy->decode_first : DECODE_FIRST;
	uint32_t window = policy->decode_window ? policy->decode_window : DECODE_WINDOW;

	if (is_protected(sequence->meta, pos))
		return INFINITY;
	return pos < first || (uint64_t)pos + window >= sequence->meta->committed_pos ? 1.0f : score;
}

/* Fills the row's candidates; false when one is missing. */
static bool gather_row(const struct sequence *sequence, struct evict *evict, uint32_t row)
{
	struct cursor at = cursor_row(sequence, row);
	float *scores = evict->scores + evict->offset[row];
	uint32_t found = 0;

	while (cursor_next(&at)) {
		for (uint32_t i = 0; i < at.count; i++) {
			uint32_t pos = cursor_pos(&at, i), rank;

			if (evict->decode) {
				scores[at.index + i] = decode_score(sequence, pos, at.places[i].score);
				continue;
			}
			rank = rank_of(evict, pos);
			if (rank == UINT32_MAX)
				continue;
			scores[rank] =
				evict->window && pos + evict->window >= evict->end ? INFINITY : at.places[i].score;
			found++;
		}
	}
	return evict->decode || found == evict->candidates;
}

/* What counts as the maximum stays even where the whole share is made of it. */
static void keep_maxima(struct evict *evict, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (isinf(evict->scores[i]) && evict->scores[i] > 0)
			evict->keep[i] = 1;
}

static int decide(const struct sequence *sequence, struct evict *evict)
{
	const struct space *space = sequence->space;
	const struct kvg_policy *policy = &sequence->meta->policy;
	struct kvg_select_input in = {.scores = evict->scores,
		.offset = evict->offset,
		.layers = space->part.worker->layers,
		.heads = space->part.worker->heads};
	size_t bytes = (kvg_select_scratch(evict->offset[space->rows], space->rows) + 127) / 64 * 64;
	void *scratch = aligned_alloc(64, bytes);

	if (!scratch)
		return -ENOMEM;
	if (evict->decode)
		kvg_select_budget(&in, (uint64_t)policy->budget * space->rows, evict->keep, scratch);
	else if (policy->mode == KVG_MODE_THRESHOLD)
		kvg_select_threshold(&in, policy->threshold, evict->keep);
	else
		kvg_select_ratio(&in, policy->level, evict->ratio, evict->keep, scratch);
	if (policy->floor)
		kvg_select_floor(&in, policy->floor, evict->keep, scratch);
	if (evict->window || evict->decode)
		keep_maxima(evict, evict->offset[space->rows]);
	free(scratch);
	return 0;
}

/* Pairs that stay, and the held blocks that they will need beyond those there are. */
static void count_kept(const struct sequence *sequence, struct evict *evict)
{
	const struct meta_row *rows = meta_rows(&sequence->space->part, sequence->slot);

	evict->new_blocks = evict->dropped = evict->total = 0;
	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		uint32_t length = cursor_row(sequence, row).length, dropped = 0, blocks;

		for (size_t i = evict->offset[row]; i < evict->offset[row + 1]; i++)
			dropped += !evict->keep[i];
		evict->kept[row] = length - dropped;
		evict->total += length;
		evict->dropped += dropped;
		blocks = (evict->kept[row] + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS;
		if (blocks > rows[row].held_blocks)
			evict->new_blocks += blocks - rows[row].held_blocks;
	}
}

int evict_select(const struct sequence *sequence, struct evict *evict)
{
	int r = evict->decode ? 0 : count_candidates(sequence, evict);

	if (r >= 0)
		r = allocate(sequence, evict);
	if (r < 0)
		return r;
	for (uint32_t row = 0; row < sequence->space->rows; row++)
		if (!gather_row(sequence, evict, row))
			return -EUCLEAN;
	r = decide(sequence, evict);
	if (r >= 0)
		count_kept(sequence, evict);
	return r;
}

void evict_mark(const struct sequence *sequence, struct evict *evict)
{
	struct meta_row *rows = meta_rows(&sequence->space->part, sequence->slot);

	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		struct cursor at = cursor_row(sequence, row);
		const uint8_t *keep = evict->keep + evict->offset[row];
		uint32_t held = rows[row].held_blocks * KVG_BLOCK_TOKENS;

		rows[row].held_len = at.length < held ? at.length : held;
		evict->fresh[row] = at.length - rows[row].held_len;
		if (evict->stripes * KVG_STRIPE_TOKENS < evict->fresh[row])
			evict->stripes = (evict->fresh[row] + KVG_STRIPE_TOKENS - 1) / KVG_STRIPE_TOKENS;
		while (cursor_next(&at)) {
			for (uint32_t i = 0; i < at.count; i++) {
				uint32_t pos = cursor_pos(&at, i);
				uint32_t rank = evict->decode ? at.index + i : rank_of(evict, pos);

				at.places[i].pos = (int32_t)pos;
				if (rank != UINT32_MAX && !keep[rank]) {
					at.places[i].score = -INFINITY;
					evict->holes[row] += at.index + i < held;
				} else if (at.places[i].score == -INFINITY) {
					at.places[i].score = 0; /* never scored: the mark is a former owner's */
				}
			}
		}
	}
}
