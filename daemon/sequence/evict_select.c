/* SELECT and MARK of the host kind: which pairs of a sequence stay. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/evict_host.h"

struct evict_host *evict_host_free(struct evict_host *host)
{
	if (!host)
		return NULL;
	free(host->scores);
	free(host->keep);
	free(host->offset);
	free(host->rank_skip);
	retain_plan_deinit(&host->plan);
	free(host->cursor);
	free(host->src);
	free(host->dst);
	free(host);
	return NULL;
}

bool evict_cursor_next(struct evict_cursor *at)
{
	const struct space *space = at->sequence->space;

	at->index += at->count;
	if (at->index >= at->length)
		return false;
	at->count = at->length - at->index < KVG_BLOCK_TOKENS ? at->length - at->index : KVG_BLOCK_TOKENS;
	at->block = sequence_block(at->sequence, at->row, at->index);
	at->places = blocks_places(space->arena, space->pool->meta, at->block);
	return true;
}

struct evict_cursor evict_cursor(const struct sequence *sequence, uint32_t row)
{
	const struct meta_row *meta = &meta_rows(&sequence->space->part, sequence->slot)[row];

	return (struct evict_cursor){.sequence = sequence,
		.row = row,
		.base_len = meta->base_len,
		.length = meta->base_len + sequence->meta->committed_pos - sequence->meta->fold_pos};
}

uint32_t evict_cursor_pos(const struct evict_cursor *at, uint32_t i)
{
	uint32_t index = at->index + i;

	return index < at->base_len ? (uint32_t)at->places[i].pos
				    : at->sequence->meta->fold_pos + (index - at->base_len);
}

/* Index of a position among its row's candidates, or UINT32_MAX when it is none. */
static uint32_t rank_of(const struct evict *evict, uint32_t pos)
{
	const uint32_t *skip = evict->host->rank_skip;
	uint32_t at;

	if (pos < evict->begin || pos >= evict->end)
		return UINT32_MAX;
	at = pos - evict->begin;
	if (!skip)
		return at;
	return skip[at + 1] != skip[at] ? UINT32_MAX : at - skip[at];
}

/* Protected positions before each one of the range. */
static int count_protected(const struct sequence *sequence, struct evict *evict)
{
	uint32_t n = evict->end - evict->begin, skipped = 0;

	if (evict->decode || evict->candidates == n)
		return 0;
	evict->host->rank_skip = malloc((n + 1) * sizeof(uint32_t));
	if (!evict->host->rank_skip)
		return -ENOMEM;
	for (uint32_t i = 0; i < n; i++) {
		evict->host->rank_skip[i] = skipped;
		skipped += evict_is_protected(sequence->meta, evict->begin + i);
	}
	evict->host->rank_skip[n] = skipped;
	return 0;
}

static int allocate(const struct sequence *sequence, struct evict *evict)
{
	struct evict_host *host = evict->host = calloc(1, sizeof(*host));
	uint32_t rows = sequence->space->rows;
	size_t n = 0, most = KVG_STRIPE_TOKENS;

	if (!host)
		return -ENOMEM;
	host->offset = malloc((rows + 1) * sizeof(size_t));
	host->cursor = calloc(rows, sizeof(uint32_t));
	if (!host->offset || !host->cursor)
		return -ENOMEM;
	for (uint32_t row = 0; row < rows; row++) {
		if (most < evict->length[row])
			most = evict->length[row];
		host->offset[row] = n;
		n += evict->decode ? evict->length[row] : evict->candidates;
	}
	host->offset[rows] = n;
	host->scores = malloc((n + 1) * sizeof(float));
	host->keep = malloc(n + 1);
	host->src = malloc(most * sizeof(struct kvg_place));
	host->dst = malloc(most * sizeof(struct kvg_place));
	return host->scores && host->keep && host->src && host->dst ? count_protected(sequence, evict) : -ENOMEM;
}

float evict_decode_score(const struct sequence *sequence, uint32_t pos, float score)
{
	const struct kvg_policy *policy = &sequence->meta->policy;
	uint32_t first = policy->decode_first ? policy->decode_first : EVICT_DECODE_FIRST;
	uint32_t window = policy->decode_window ? policy->decode_window : EVICT_DECODE_WINDOW;

	if (evict_is_protected(sequence->meta, pos))
		return INFINITY;
	return pos < first || (uint64_t)pos + window >= sequence->meta->committed_pos ? 1.0f : score;
}

/* Fills the row's candidates; false when one is missing. */
static bool gather_row(const struct sequence *sequence, struct evict *evict, uint32_t row)
{
	struct evict_cursor at = evict_cursor(sequence, row);
	float *scores = evict->host->scores + evict->host->offset[row];
	uint32_t found = 0;

	while (evict_cursor_next(&at)) {
		for (uint32_t i = 0; i < at.count; i++) {
			uint32_t pos = evict_cursor_pos(&at, i), rank;

			if (evict->decode) {
				scores[at.index + i] = evict_decode_score(sequence, pos, at.places[i].score);
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
static void keep_maxima(struct evict_host *host, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (isinf(host->scores[i]) && host->scores[i] > 0)
			host->keep[i] = 1;
}

static int decide(const struct sequence *sequence, struct evict *evict)
{
	const struct space *space = sequence->space;
	const struct kvg_policy *policy = &sequence->meta->policy;
	struct evict_host *host = evict->host;
	struct kvg_select_input in = {.scores = host->scores,
		.offset = host->offset,
		.layers = space->part.worker->layers,
		.heads = space->part.worker->heads};
	size_t bytes = (kvg_select_scratch(host->offset[space->rows], space->rows) + 127) / 64 * 64;
	void *scratch = aligned_alloc(64, bytes);

	if (!scratch)
		return -ENOMEM;
	if (evict->decode)
		kvg_select_budget(&in, evict->budget, host->keep, scratch);
	else if (policy->mode == KVG_MODE_THRESHOLD)
		kvg_select_threshold(&in, policy->threshold, host->keep);
	else
		kvg_select_ratio(&in, policy->level, evict->ratio, host->keep, scratch);
	if (policy->floor)
		kvg_select_floor(&in, policy->floor, host->keep, scratch);
	if (evict->window || evict->decode)
		keep_maxima(host, host->offset[space->rows]);
	free(scratch);
	return 0;
}

static void count_kept(const struct sequence *sequence, struct evict *evict)
{
	const struct evict_host *host = evict->host;

	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		uint32_t dropped = 0;

		for (size_t i = host->offset[row]; i < host->offset[row + 1]; i++)
			dropped += !host->keep[i];
		evict->kept[row] = evict->length[row] - dropped;
	}
}

int evict_select(const struct sequence *sequence, struct evict *evict)
{
	int r = allocate(sequence, evict);

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

int evict_keep_all(const struct sequence *sequence, struct evict *evict)
{
	memcpy(evict->kept, evict->length, sequence->space->rows * sizeof(uint32_t));
	return allocate(sequence, evict);
}

bool evict_is_dropped(const struct evict *evict, uint32_t row, uint32_t index, uint32_t pos)
{
	const uint8_t *keep = evict->host->keep + evict->host->offset[row];
	uint32_t rank = evict->decode ? index : rank_of(evict, pos);

	return rank != UINT32_MAX && !keep[rank];
}

static void mark_place(const struct evict *evict, uint32_t row, uint32_t index, uint32_t pos, struct meta_place *place)
{
	uint32_t held = evict->held[row];
	bool dropped = evict_is_dropped(evict, row, index, pos);

	place->pos = (int32_t)pos;
	if (dropped)
		place->score = -INFINITY;
	else if (place->score == -INFINITY)
		place->score = 0; /* never scored: the mark is a former owner's */
	if (index < held)
		evict->holes[row] += dropped;
	else
		evict->stripe_kept[row * evict->stripes + (index - held) / KVG_STRIPE_TOKENS] += !dropped;
}

void evict_mark(const struct sequence *sequence, struct evict *evict)
{
	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		struct evict_cursor at = evict_cursor(sequence, row);

		while (evict_cursor_next(&at))
			for (uint32_t i = 0; i < at.count; i++)
				mark_place(evict, row, at.index + i, evict_cursor_pos(&at, i), &at.places[i]);
	}
}
