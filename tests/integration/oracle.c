#include "tests/integration/oracle.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#include "kernels/host/select.h"

/* One pair that a decision looks at. */
struct pair {
	float score;
	uint32_t row, pos;
	uint8_t keep;
};

/* Pairs of rows one after the other, each row in order of position. */
struct pairs {
	struct pair *at;
	size_t *row; /* [rows + 1] */
	size_t rows, heads;
	float *sorted; /* scratch of all pairs */
};

static int descending(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x < y) - (x > y);
}

static int best_first(const void *a, const void *b)
{
	const struct pair *x = *(struct pair *const *)a, *y = *(struct pair *const *)b;

	return x->score != y->score ? (x->score < y->score) - (x->score > y->score)
				    : (x->pos > y->pos) - (x->pos < y->pos);
}

static const float *sort_scores(struct pairs *pairs, size_t begin, size_t end)
{
	for (size_t i = begin; i < end; i++)
		pairs->sorted[i - begin] = pairs->at[i].score;
	qsort(pairs->sorted, end - begin, sizeof(float), descending);
	return pairs->sorted;
}

static void keep_above_share(struct pairs *pairs, size_t begin, size_t end, double ratio)
{
	long m = (long)((double)(end - begin) * ratio) - 1;
	float threshold;

	if (begin == end)
		return;
	threshold = sort_scores(pairs, begin, end)[m > 0 ? m : 0];
	for (size_t i = begin; i < end; i++)
		pairs->at[i].keep = pairs->at[i].score > threshold;
}

/* Marks the best `count` pairs of a row, or raises their scores to 2 where `raise`. */
static int take_best(struct pairs *pairs, size_t row, size_t count, bool raise)
{
	size_t begin = pairs->row[row], n = pairs->row[row + 1] - begin;
	struct pair **order = malloc((n + 1) * sizeof(struct pair *));

	if (!order)
		return -ENOMEM;
	for (size_t i = 0; i < n; i++)
		order[i] = &pairs->at[begin + i];
	qsort(order, n, sizeof(struct pair *), best_first);
	for (size_t i = 0; i < n && i < count; i++) {
		if (raise)
			order[i]->score = 2;
		else
			order[i]->keep = 1;
	}
	free(order);
	return 0;
}

static int keep_by_level(struct pairs *pairs, uint32_t level, double ratio)
{
	int r = 0;

	if (level == KVG_LEVEL_PAIR)
		keep_above_share(pairs, 0, pairs->row[pairs->rows], ratio);
	for (size_t row = 0; r == 0 && row < pairs->rows; row++) {
		size_t share = (size_t)((double)(pairs->row[row + 1] - pairs->row[row]) * ratio);

		if (level == KVG_LEVEL_PAIR_HEAD)
			r = take_best(pairs, row, share, false);
		if (level == KVG_LEVEL_ADAKV_LAYER)
			r = take_best(pairs, row, (size_t)(0.2 * (double)share), true);
	}
	if (level == KVG_LEVEL_PAIR_LAYER || level == KVG_LEVEL_ADAKV_LAYER)
		for (size_t row = 0; row < pairs->rows; row += pairs->heads)
			keep_above_share(pairs, pairs->row[row], pairs->row[row + pairs->heads], ratio);
	return r;
}

static int keep_floor(struct pairs *pairs, uint32_t floor)
{
	int r = 0;

	for (size_t row = 0; r == 0 && row < pairs->rows; row++) {
		size_t kept = 0;

		for (size_t i = pairs->row[row]; i < pairs->row[row + 1]; i++)
			kept += pairs->at[i].keep;
		if (kept < floor)
			r = take_best(pairs, row, floor, false);
	}
	return r;
}

/* Collects the held pairs at positions [begin, end), protected ones left out, with their true scores. */
static int collect(const struct kv *kv, uint32_t begin, uint32_t end, struct pairs *ret)
{
	const struct kvg_group *g = &kv->layout->groups[0];
	size_t most = (size_t)(end - begin) * g->layers * g->head_count + 1, n = 0;

	*ret = (struct pairs){.rows = (size_t)g->layers * g->head_count, .heads = g->head_count};
	ret->at = malloc(most * sizeof(*ret->at));
	ret->sorted = malloc(most * sizeof(*ret->sorted));
	ret->row = malloc((ret->rows + 1) * sizeof(*ret->row));
	if (!ret->at || !ret->sorted || !ret->row)
		return -ENOMEM;
	for (uint32_t row = 0; row < ret->rows; row++) {
		uint32_t layer = row / g->head_count, head = row % g->head_count;

		ret->row[row] = n;
		for (uint32_t pos = begin; pos < end; pos++)
			if (kv_holds(kv, layer, head, pos) && !kv->kept[pos])
				ret->at[n++] =
					(struct pair){.score = kv_score(kv, layer, head, pos), .row = row, .pos = pos};
	}
	ret->row[ret->rows] = n;
	return 0;
}

static void apply(struct kv *kv, const struct pairs *pairs)
{
	for (size_t i = 0; i < pairs->row[pairs->rows]; i++)
		if (!pairs->at[i].keep)
			kv->held[(size_t)pairs->at[i].row * kv->capacity + pairs->at[i].pos] = 0;
}

static void pairs_deinit(struct pairs *pairs)
{
	free(pairs->at);
	free(pairs->sorted);
	free(pairs->row);
}

static int decide(struct pairs *pairs, const struct kvg_policy *policy, double ratio, uint32_t safe_from)
{
	int r = 0;

	for (size_t i = 0; i < pairs->row[pairs->rows]; i++) {
		if (pairs->at[i].pos >= safe_from)
			pairs->at[i].score = 2;
		if (policy->mode == KVG_MODE_THRESHOLD)
			pairs->at[i].keep = pairs->at[i].score > policy->threshold;
	}
	if (policy->mode != KVG_MODE_THRESHOLD)
		r = keep_by_level(pairs, policy->level, ratio);
	return r ? r : keep_floor(pairs, policy->floor);
}

int oracle_prefill(struct kv *kv)
{
	const struct kvg_policy *p = &kv->policy;
	bool once = p->mode == KVG_MODE_ONCE;
	uint32_t end = kv->pos, last = p->prefix_tokens + p->context_tokens;
	uint64_t window;
	double ratio;
	struct pairs pairs;
	int r;

	kvg_select_prefill_params(p->context_tokens, p->chunk_tokens, p->ratio, p->window,
		p->flags & KVG_POLICY_WINDOW_ABSOLUTE ? 1 : 0, &ratio, &window);
	if (end > last)
		end = last;
	if (p->mode == KVG_MODE_OFF || (once && end < last))
		return 0;
	if (!once)
		end = end > window ? end - (uint32_t)window : 0;
	if (end <= kv->start)
		return 0;
	r = collect(kv, kv->start, end, &pairs);
	if (r == 0)
		r = decide(&pairs, p, once ? p->ratio : ratio, once ? end - (uint32_t)window : UINT32_MAX);
	if (r == 0)
		apply(kv, &pairs);
	pairs_deinit(&pairs);
	kv->start = end;
	return r;
}

int oracle_decode(struct kv *kv)
{
	const struct kvg_policy *p = &kv->policy;
	uint32_t first = p->decode_first ? p->decode_first : 4, window = p->decode_window ? p->decode_window : 128;
	struct pairs pairs;
	int r = collect(kv, 0, kv->pos, &pairs);
	size_t n, budget;

	if (r == 0) {
		n = pairs.row[pairs.rows];
		budget = (size_t)p->budget * pairs.rows;
		for (size_t i = 0; i < n; i++)
			if (pairs.at[i].pos < first || pairs.at[i].pos < p->prefix_tokens ||
				pairs.at[i].pos + window >= kv->pos)
				pairs.at[i].score = 1;
		if (n > budget) {
			float threshold = sort_scores(&pairs, 0, n)[budget - 1];

			for (size_t i = 0; i < n; i++)
				pairs.at[i].keep = pairs.at[i].score >= threshold;
			apply(kv, &pairs);
		}
	}
	pairs_deinit(&pairs);
	return r;
}
