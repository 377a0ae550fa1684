/* Which retained pairs come back: what an eviction at another ratio or budget would have kept. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/recall.h"
#include "daemon/sequence/retain.h"
#include "kernels/host/select.h"

struct recall *recall_free(struct recall *recall)
{
	if (!recall)
		return NULL;
	free(recall->ranges);
	free(recall->skip);
	free(recall->offset);
	free(recall->seen);
	free(recall->scores);
	free(recall->keep);
	free(recall->chosen);
	free(recall->count);
	free(recall);
	return NULL;
}

/* ---- ranges ---- */

static void window_of(const struct kvg_policy *policy, double at, double *ret_ratio, uint32_t *ret_window)
{
	uint64_t window;

	kvg_select_prefill_params(policy->context_tokens, policy->chunk_tokens, at, policy->window,
		(policy->flags & KVG_POLICY_WINDOW_ABSOLUTE) != 0, ret_ratio, &window);
	*ret_window = (uint32_t)window;
}

/* Tokens of the context that had been read at the last prefill eviction. */
static uint32_t seen_tokens(const struct meta_seq *meta)
{
	const struct kvg_policy *policy = &meta->policy;
	bool gated = policy->mode == KVG_MODE_CHUNKED || policy->mode == KVG_MODE_ONCE;
	uint32_t window;
	double ratio;
	uint64_t seen;

	window_of(policy, gated ? policy->ratio : 1.0, &ratio, &window);
	seen = (uint64_t)meta->prune_start + (policy->mode == KVG_MODE_ONCE ? 0 : window);
	return seen < policy->context_tokens ? (uint32_t)seen : policy->context_tokens;
}

/* The range up to `end` tokens of the context, if there are any that are not in the one before. */
static void add_range(const struct kvg_policy *policy, struct recall *recall, uint64_t end)
{
	uint32_t begin = recall->range_count ? recall->ranges[recall->range_count - 1].end : policy->prefix_tokens;

	if (policy->prefix_tokens + end > begin)
		recall->ranges[recall->range_count++] =
			(struct recall_range){.begin = begin, .end = policy->prefix_tokens + (uint32_t)end};
}

int recall_set_ratio(const struct sequence *sequence, struct recall *recall, double ratio)
{
	const struct meta_seq *meta = sequence->meta;
	const struct kvg_policy *policy = &meta->policy;
	uint64_t seen = seen_tokens(meta), chunk = policy->chunk_tokens, window;
	uint32_t share;

	window_of(policy, ratio, &recall->ratio, &share);
	window = share;
	if (policy->mode == KVG_MODE_ONCE) {
		recall->ratio = ratio;
		recall->window = share;
		window = chunk = 0;
	}
	recall->pruned_end = policy->prefix_tokens + meta->prune_start;
	recall->ranges = calloc((chunk ? seen / chunk : 0) + 2, sizeof(struct recall_range));
	if (!recall->ranges)
		return -ENOMEM;
	/* Boundaries count the prefix. */
	for (uint64_t at = chunk ? (policy->prefix_tokens / chunk + 1) * chunk - policy->prefix_tokens : seen;
		at < seen; at += chunk)
		if (at > window)
			add_range(policy, recall, at - window);
	if (seen > window)
		add_range(policy, recall, seen - window);
	return 0;
}

/* ---- scores ---- */

/* Protected positions before each one of the ranges. */
static int count_protected(const struct meta_seq *meta, struct recall *recall)
{
	uint32_t begin = meta->policy.prefix_tokens, skipped = 0, n;

	if (!meta->protected_count || !recall->range_count)
		return 0;
	n = recall->ranges[recall->range_count - 1].end - begin;
	recall->skip = malloc((n + 1) * sizeof(uint32_t));
	if (!recall->skip)
		return -ENOMEM;
	for (uint32_t i = 0; i < n; i++) {
		recall->skip[i] = skipped;
		skipped += evict_is_protected(meta, begin + i);
	}
	recall->skip[n] = skipped;
	return 0;
}

static uint32_t skipped(const struct sequence *sequence, const struct recall *recall, uint32_t pos)
{
	return recall->skip ? recall->skip[pos - sequence->meta->policy.prefix_tokens] : 0;
}

static size_t lay_out_ranges(const struct sequence *sequence, struct recall *recall)
{
	size_t n = 0;

	for (uint32_t i = 0; i < recall->range_count; i++) {
		struct recall_range *range = &recall->ranges[i];

		range->base = n;
		range->candidates = range->end - range->begin -
				    (skipped(sequence, recall, range->end) - skipped(sequence, recall, range->begin));
		n += (size_t)range->candidates * sequence->space->rows;
	}
	return n;
}

/* Each row's pairs, then what is retained of it. */
static size_t lay_out_rows(const struct sequence *sequence, const uint32_t *lengths, struct recall *recall)
{
	const struct retain *retain = sequence->retain;
	uint32_t rows = sequence->space->rows;

	for (uint64_t i = 0; i < retain->count; i++)
		recall->offset[retain_entry(retain, i)->row + 1]++;
	for (uint32_t row = 0; row < rows; row++) {
		recall->seen[row] = lengths[row];
		recall->offset[row + 1] += recall->offset[row] + lengths[row];
	}
	return recall->offset[rows];
}

int recall_open(const struct sequence *sequence, const uint32_t *lengths, struct recall *recall)
{
	uint32_t rows = sequence->space->rows;
	int r = count_protected(sequence->meta, recall);

	recall->offset = calloc(rows + 1, sizeof(size_t));
	recall->seen = calloc(rows, sizeof(uint32_t));
	recall->count = calloc(rows, sizeof(uint32_t));
	recall->chosen = malloc((sequence->retain->count + 1) * sizeof(uint64_t));
	if (r < 0 || !recall->offset || !recall->seen || !recall->count || !recall->chosen)
		return -ENOMEM;
	recall->score_count =
		recall->by_budget ? lay_out_rows(sequence, lengths, recall) : lay_out_ranges(sequence, recall);
	recall->scores = malloc((recall->score_count + 1) * sizeof(float));
	recall->keep = malloc(recall->score_count + 1);
	if (!recall->scores || !recall->keep)
		return -ENOMEM;
	for (size_t i = 0; i < recall->score_count; i++)
		recall->scores[i] = -INFINITY;
	return 0;
}

/* The range of a position, or NULL. */
static const struct recall_range *range_of(const struct recall *recall, uint32_t pos)
{
	uint32_t low = 0, high = recall->range_count;

	while (low < high) {
		uint32_t middle = (low + high) / 2;

		if (pos >= recall->ranges[middle].end)
			low = middle + 1;
		else
			high = middle;
	}
	return low < recall->range_count && pos >= recall->ranges[low].begin ? &recall->ranges[low] : NULL;
}

/* Where a pair's score is, or RECALL_NONE when nothing has to be decided about it. */
static size_t find_score(const struct sequence *sequence, const struct recall *recall, uint32_t row, uint32_t pos)
{
	const struct recall_range *range = range_of(recall, pos);

	if (!range || (recall->skip && skipped(sequence, recall, pos + 1) != skipped(sequence, recall, pos)))
		return RECALL_NONE;
	return range->base + (size_t)row * range->candidates + (pos - range->begin) -
	       (skipped(sequence, recall, pos) - skipped(sequence, recall, range->begin));
}

static void put(const struct sequence *sequence, struct recall *recall, size_t at, uint32_t pos, float score)
{
	if (recall->by_budget)
		recall->scores[at] = evict_decode_score(sequence, pos, score);
	else if (recall->window && pos + recall->window >= recall->pruned_end)
		recall->scores[at] = INFINITY;
	else
		recall->scores[at] = score;
}

void recall_put(
	const struct sequence *sequence, struct recall *recall, uint32_t row, uint32_t index, uint32_t pos, float score)
{
	size_t at = recall->by_budget ? recall->offset[row] + index : find_score(sequence, recall, row, pos);

	if (at != RECALL_NONE)
		put(sequence, recall, at, pos, score);
}

/* ---- the decision ---- */

static void keep_maxima(const struct recall *recall)
{
	for (size_t i = 0; i < recall->score_count; i++)
		if (isinf(recall->scores[i]) && recall->scores[i] > 0)
			recall->keep[i] = 1;
}

static void decide_range(const struct sequence *sequence, struct recall *recall, const struct recall_range *range,
	struct kvg_select_input *in, void *scratch)
{
	const struct kvg_policy *policy = &sequence->meta->policy;

	for (uint32_t row = 0; row <= sequence->space->rows; row++)
		recall->offset[row] = range->base + (size_t)row * range->candidates;
	kvg_select_ratio(in, policy->level, recall->ratio, recall->keep, scratch);
	if (policy->floor)
		kvg_select_floor(in, policy->floor, recall->keep, scratch);
}

static int decide(const struct sequence *sequence, struct recall *recall)
{
	const struct space *space = sequence->space;
	struct kvg_select_input in = {.scores = recall->scores,
		.offset = recall->offset,
		.layers = space->part.worker->layers,
		.heads = space->part.worker->heads};
	void *scratch = aligned_alloc(64, (kvg_select_scratch(recall->score_count, space->rows) + 127) / 64 * 64);

	if (!scratch)
		return -ENOMEM;
	for (uint32_t i = 0; i < recall->range_count; i++)
		decide_range(sequence, recall, &recall->ranges[i], &in, scratch);
	if (recall->by_budget) {
		kvg_select_budget(&in, recall->budget, recall->keep, scratch);
		if (sequence->meta->policy.floor)
			kvg_select_floor(&in, sequence->meta->policy.floor, recall->keep, scratch);
	}
	keep_maxima(recall);
	free(scratch);
	return 0;
}

/* Where the score of a retained pair is: asked about in the order of the store. */
static size_t find_retained(const struct sequence *sequence, struct recall *recall, const struct retain_entry *entry)
{
	if (recall->by_budget)
		return recall->offset[entry->row] + recall->seen[entry->row]++;
	return find_score(sequence, recall, entry->row, entry->pos);
}

static bool comes_back(const struct sequence *sequence, struct recall *recall, const struct retain_entry *entry)
{
	size_t at = find_retained(sequence, recall, entry);

	if (entry->pos < sequence->meta->policy.prefix_tokens) /* in a context that the sequence is attached to */
		return false;
	if (recall->by_budget)
		return recall->keep[at];
	return entry->pos < recall->pruned_end && (at == RECALL_NONE || recall->keep[at]);
}

int recall_decide(const struct sequence *sequence, struct recall *recall)
{
	const struct retain *retain = sequence->retain;
	uint32_t rows = sequence->space->rows;
	uint32_t *lengths = malloc(rows * sizeof(uint32_t));
	int r = lengths ? 0 : -ENOMEM;

	if (r < 0)
		return r;
	memcpy(lengths, recall->seen, rows * sizeof(uint32_t));
	for (uint64_t i = 0; i < retain->count; i++) {
		const struct retain_entry *entry = retain_entry(retain, i);
		size_t at = find_retained(sequence, recall, entry);

		if (at != RECALL_NONE)
			put(sequence, recall, at, entry->pos, entry->score);
	}
	r = decide(sequence, recall);
	memcpy(recall->seen, lengths, rows * sizeof(uint32_t));
	for (uint64_t i = 0; r >= 0 && i < retain->count; i++) {
		if (!comes_back(sequence, recall, retain_entry(retain, i)))
			continue;
		recall->chosen[recall->chosen_count++] = i;
		recall->count[retain_entry(retain, i)->row]++;
	}
	memset(recall->seen, 0, rows * sizeof(uint32_t)); /* UNPACK counts with it */
	free(lengths);
	return r;
}

static uint64_t blocks_for(uint64_t pairs)
{
	return (pairs + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS;
}

void recall_count(const struct sequence *sequence, struct evict *evict)
{
	struct recall *recall = evict->recall;

	recall->extra = 0;
	for (uint32_t row = 0; row < sequence->space->rows; row++)
		recall->extra +=
			blocks_for((uint64_t)evict->length[row] + recall->count[row]) - blocks_for(evict->length[row]);
	evict->new_blocks += recall->extra;
}
