#include "tests/support/space_model.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/host/dtype.h"

#define PAIR_MAX 4096u /* bytes of one K or V */

static size_t at(const struct model *model, uint32_t row, uint32_t pos)
{
	return (size_t)row * model->max_tokens + pos;
}

static struct model *blank(struct fixture *fixture, const struct kvg_policy *policy, enum score_pattern pattern)
{
	struct model *model = calloc(1, sizeof(*model));

	assert_non_null(model);
	model->fixture = fixture;
	model->policy = *policy;
	model->rows = fixture->space->rows;
	model->max_tokens = fixture->layout.max_tokens;
	model->pattern = pattern;
	model->random.state = 88172645463325252u + pattern;
	model->scores = calloc((size_t)model->rows * model->max_tokens, sizeof(float));
	model->held = calloc((size_t)model->rows * model->max_tokens, sizeof(bool));
	model->shared = calloc(model->rows, sizeof(uint32_t));
	assert_true(model->scores && model->held && model->shared);
	return model;
}

struct model *model_new(struct fixture *fixture, const struct kvg_policy *policy, enum score_pattern pattern)
{
	struct model *model = blank(fixture, policy, pattern);

	if (fixture_create(fixture, policy, &model->handle) < 0)
		fail_msg("%s", fixture->text);
	return model;
}

struct kvg_policy model_frozen(const struct kvg_policy *policy, uint32_t tokens)
{
	uint32_t total = policy->prefix_tokens + policy->context_tokens, end = total + policy->max_new_tokens;
	struct kvg_policy frozen = *policy;

	if (tokens <= policy->prefix_tokens)
		return frozen;
	frozen.prefix_tokens = tokens;
	frozen.context_tokens = total > tokens ? total - tokens : 0;
	if (total < tokens)
		frozen.max_new_tokens = end > tokens ? end - tokens : 0;
	return frozen;
}

/* Pairs of a row in full blocks. */
static uint32_t full_pairs(const struct model *model, uint32_t row)
{
	uint32_t pairs = 0;

	for (uint32_t pos = 0; pos < model->committed; pos++)
		pairs += model->held[at(model, row, pos)];
	return pairs / KVG_BLOCK_TOKENS * KVG_BLOCK_TOKENS;
}

void model_seal(struct model *model)
{
	model->policy = model_frozen(&model->policy, model->committed);
	model->sealed = model->fold = model->committed;
	model->prune_start = 0;
	for (uint32_t row = 0; row < model->rows; row++)
		model->shared[row] = full_pairs(model, row);
}

struct model *model_attached(
	struct fixture *fixture, const struct model *from, const struct kvg_policy *policy, uint64_t handle)
{
	struct model *model = blank(fixture, policy, from->pattern);
	size_t size = (size_t)from->rows * from->max_tokens;

	assert_int_equal(model->max_tokens, from->max_tokens);
	model->handle = handle;
	model->committed = from->committed;
	memcpy(model->held, from->held, size * sizeof(bool));
	memcpy(model->scores, from->scores, size * sizeof(float));
	model_seal(model);
	return model;
}

void model_free(struct model *model)
{
	free(model->shared);
	free(model->scores);
	free(model->held);
	free(model);
}

void model_release(struct model *model)
{
	assert_int_equal(fixture_release(model->fixture, model->handle), 0);
	model_free(model);
}

/* ---- contents ---- */

static void fill_pair(uint8_t *bytes, size_t size, uint32_t row, uint32_t pos, uint32_t salt)
{
	uint32_t head[2] = {pos, row ^ salt}, hash = pos * 2654435761u + row * 40503u + salt;

	for (size_t i = 0; i < size; i++) {
		hash = hash * 1664525u + 1013904223u;
		bytes[i] = (uint8_t)(hash >> 24);
	}
	memcpy(bytes, head, sizeof(head));
}

struct pair_place {
	uint8_t *k, *v;
	size_t k_bytes, v_bytes;
	struct meta_place *meta;
};

/* Where the worker's own arithmetic puts index `index` of a row. */
static struct pair_place find_pair(const struct model *model, uint32_t row, uint32_t index)
{
	const struct space *space = model->fixture->space;
	const struct arena *arena = space->arena;
	const struct kvg_group *group = &model->fixture->layout.groups[0];
	uint32_t block = table_row(&space->table, (uint32_t)model->handle, row)[index / KVG_BLOCK_TOKENS];
	uint32_t place = index % KVG_BLOCK_TOKENS;
	struct pair_place found = {.k_bytes = group->k_dim * kvg_dtype_size(group->k_dtype),
		.v_bytes = group->v_dim * kvg_dtype_size(group->v_dtype)};

	assert_true(model->fixture->mapped[block / arena->ids_per_extent]);
	found.k = arena->base + block * arena->stride + place * found.k_bytes;
	found.v = arena->base + arena->extent_size / 2 + block * arena->stride + place * found.v_bytes;
	found.meta = blocks_places(arena, space->pool->meta, block) + place;
	return found;
}

static uint32_t base_len(const struct model *model, uint32_t row)
{
	return *table_base_len(&model->fixture->space->table, (uint32_t)model->handle, row);
}

void model_write(const struct model *model, uint32_t begin, uint32_t end)
{
	for (uint32_t row = 0; row < model->rows; row++) {
		for (uint32_t pos = begin; pos < end; pos++) {
			struct pair_place pair = find_pair(model, row, base_len(model, row) + pos - model->fold);

			fill_pair(pair.k, pair.k_bytes, row, pos, 0);
			fill_pair(pair.v, pair.v_bytes, row, pos, 0x5a5a5a5a);
		}
	}
}

static void check_pair(const struct model *model, uint32_t row, uint32_t index, uint8_t *seen)
{
	struct pair_place pair = find_pair(model, row, index);
	uint8_t expected[PAIR_MAX];
	uint32_t pos;

	memcpy(&pos, pair.k, sizeof(pos));
	assert_in_range(pos, 0, model->committed - 1);
	fill_pair(expected, pair.k_bytes, row, pos, 0);
	assert_memory_equal(pair.k, expected, pair.k_bytes);
	fill_pair(expected, pair.v_bytes, row, pos, 0x5a5a5a5a);
	assert_memory_equal(pair.v, expected, pair.v_bytes);
	if (!model->held[at(model, row, pos)])
		fail_msg("row %u holds position %u, which must be gone", row, pos);
	if (seen[pos]++)
		fail_msg("row %u holds position %u twice", row, pos);
	if (pos < model->sealed) {
		assert_true(index < base_len(model, row));
		assert_true(index < model->shared[row] || (uint32_t)pair.meta->pos < model->policy.prefix_tokens);
	} else if (index < base_len(model, row)) {
		assert_int_equal(pair.meta->pos, pos);
		if (pos >= model->policy.prefix_tokens)
			assert_memory_equal(&pair.meta->score, &model->scores[at(model, row, pos)], sizeof(float));
	}
}

void model_check(const struct model *model)
{
	const struct kvg_slot *slot = &model->fixture->space->table.slots[(uint32_t)model->handle];
	uint8_t *seen = malloc(model->max_tokens);

	assert_non_null(seen);
	assert_int_equal(slot->fold_pos, model->fold);
	assert_int_equal(slot->committed_pos, model->committed);
	for (uint32_t row = 0; row < model->rows; row++) {
		uint32_t length = base_len(model, row) + model->committed - model->fold;

		memset(seen, 0, model->max_tokens);
		for (uint32_t i = 0; i < length; i++)
			check_pair(model, row, i, seen);
		for (uint32_t pos = 0; pos < model->committed; pos++)
			if (model->held[at(model, row, pos)] && !seen[pos])
				fail_msg("row %u lost position %u", row, pos);
	}
	free(seen);
}

uint64_t model_pairs(const struct model *model)
{
	uint64_t pairs = 0;

	for (uint32_t row = 0; row < model->rows; row++)
		for (uint32_t pos = 0; pos < model->committed; pos++)
			pairs += model->held[at(model, row, pos)];
	return pairs;
}

/* ---- growth ---- */

static float make_score(struct model *model, uint32_t row, uint32_t pos)
{
	static const float wild[] = {NAN, INFINITY, -INFINITY, -1.0f, 0.0f, -0.0f, 1e30f, FLT_MAX, 1e-40f, 0.5f};
	float score = (random_float(&model->random) + 1.0f) / 2;

	switch (model->pattern) {
	case SCORES_TIES:
		return (float)random_below(&model->random, 16) / 16;
	case SCORES_EQUAL:
		return 0.25f;
	case SCORES_ASCENDING:
		return (float)pos / 65536.0f;
	case SCORES_DESCENDING:
		return 1.0f - (float)pos / 65536.0f;
	case SCORES_ONE_ROW:
		return row == model->rows / 2 ? score + 2.0f : score;
	case SCORES_WILD:
		return wild[random_below(&model->random, sizeof(wild) / sizeof(wild[0]))];
	default:
		return score;
	}
}

/* What the daemon makes of a score. */
static float cleaned(float score)
{
	if (isnan(score))
		return 0.0f;
	if (isinf(score))
		return score > 0 ? FLT_MAX : -FLT_MAX;
	return score;
}

int model_stage(struct model *model, uint32_t begin, uint32_t end)
{
	uint32_t heads = model->fixture->layout.groups[0].head_count, n = end - begin;
	float *staged = malloc((size_t)model->rows * n * sizeof(float) + 1);
	int r;

	assert_non_null(staged);
	for (uint32_t row = 0; row < model->rows; row++) {
		for (uint32_t i = 0; i < n; i++) {
			float score = make_score(model, row, begin + i);

			staged[((size_t)(row / heads) * n + i) * heads + row % heads] = score;
			model->scores[at(model, row, begin + i)] = cleaned(score);
		}
	}
	r = fixture_stage(model->fixture, model->handle, begin, n, staged);
	free(staged);
	return r;
}

int model_append(struct model *model, uint32_t tokens)
{
	uint32_t begin = model->committed, end = begin + tokens;
	uint32_t scored = begin < model->policy.prefix_tokens ? model->policy.prefix_tokens : begin;
	int r = fixture_reserve(model->fixture, model->handle, tokens);

	if (r < 0)
		return r;
	assert_true(model->fixture->cqe.value[0] >= end);
	model_write(model, begin, end);
	if (scored < end) /* the prefix has no scores at all */
		assert_int_equal(model_stage(model, scored, end), 0);
	assert_int_equal(fixture_commit(model->fixture, model->handle, end), 0);
	for (uint32_t row = 0; row < model->rows; row++)
		for (uint32_t pos = begin; pos < end; pos++)
			model->held[at(model, row, pos)] = true;
	model->committed = end;
	return 0;
}

void model_truncate(struct model *model, uint32_t pos)
{
	assert_int_equal(fixture_truncate(model->fixture, model->handle, pos), 0);
	for (uint32_t row = 0; row < model->rows; row++)
		for (uint32_t i = pos; i < model->committed; i++)
			model->held[at(model, row, i)] = false;
	model->committed = pos;
}

void model_protect(struct model *model, uint32_t begin, uint32_t end)
{
	struct kvg_sqe sqe = {.op = KVG_OP_PROTECT, .seq = model->handle, .protect = {.begin = begin, .end = end}};

	assert_int_equal(fixture_call(model->fixture, &sqe), 0);
	model->protect_begin = begin;
	model->protect_end = end;
}

/* ---- the oracle ---- */

struct candidate {
	float score;
	uint32_t row, pos;
	bool keep;
};

struct candidates {
	struct candidate *list; /* row by row, positions ascending */
	size_t count;
};

static int best_first(const void *a, const void *b)
{
	const struct candidate *const *x = a, *const *y = b;

	if ((*x)->score != (*y)->score)
		return (*x)->score < (*y)->score ? 1 : -1;
	return (*x)->row != (*y)->row ? ((*x)->row > (*y)->row) - ((*x)->row < (*y)->row)
				      : ((*x)->pos > (*y)->pos) - ((*x)->pos < (*y)->pos);
}

/* The candidates of rows [begin, end), best first; equal ones in order. */
static struct candidate **sorted(const struct candidates *all, uint32_t begin, uint32_t end, size_t *ret_count)
{
	struct candidate **list = malloc((all->count + 1) * sizeof(*list));
	size_t n = 0;

	assert_non_null(list);
	for (size_t i = 0; i < all->count; i++)
		if (all->list[i].row >= begin && all->list[i].row < end)
			list[n++] = &all->list[i];
	if (n)
		qsort(list, n, sizeof(*list), best_first);
	*ret_count = n;
	return list;
}

/* keep score > sorted_descending[max(int(n r) - 1, 0)] */
static void keep_share(const struct candidates *all, uint32_t begin, uint32_t end, double ratio)
{
	size_t n, m;
	struct candidate **list = sorted(all, begin, end, &n);

	m = (size_t)((double)n * ratio);
	m = m ? m - 1 : 0;
	for (size_t i = 0; i < n; i++)
		list[i]->keep = list[i]->score > list[m]->score;
	free(list);
}

static void keep_best(const struct candidates *all, uint32_t row, size_t count)
{
	size_t n;
	struct candidate **list = sorted(all, row, row + 1, &n);

	for (size_t i = 0; i < n && i < count; i++)
		list[i]->keep = true;
	free(list);
}

static void mark_safe(const struct candidates *all, uint32_t row, double ratio)
{
	size_t n, safe;
	struct candidate **list = sorted(all, row, row + 1, &n);

	safe = (size_t)(0.2 * (double)(size_t)((double)n * ratio));
	for (size_t i = 0; i < safe; i++)
		list[i]->score = INFINITY;
	free(list);
}

static void keep_ratio(const struct model *model, const struct candidates *all, double ratio)
{
	uint32_t heads = model->fixture->layout.groups[0].head_count, rows = model->rows;
	size_t each = all->count / rows;

	switch (model->policy.level) {
	case KVG_LEVEL_PAIR:
		keep_share(all, 0, rows, ratio);
		return;
	case KVG_LEVEL_PAIR_HEAD:
		for (uint32_t row = 0; row < rows; row++)
			keep_best(all, row, (size_t)((double)each * ratio));
		return;
	case KVG_LEVEL_ADAKV_LAYER:
		for (uint32_t row = 0; row < rows; row++)
			mark_safe(all, row, ratio);
		break;
	default:
		break;
	}
	for (uint32_t row = 0; row < rows; row += heads)
		keep_share(all, row, row + heads, ratio);
}

static void keep_floor(const struct model *model, const struct candidates *all)
{
	for (uint32_t row = 0; model->policy.floor && row < model->rows; row++) {
		size_t n, kept = 0;
		struct candidate **list = sorted(all, row, row + 1, &n);

		for (size_t i = 0; i < n; i++)
			kept += list[i]->keep;
		for (size_t i = 0; i < n && kept < model->policy.floor; i++) {
			kept += !list[i]->keep;
			list[i]->keep = true;
		}
		free(list);
	}
}

static bool is_protected(const struct model *model, uint32_t pos)
{
	return pos < model->policy.prefix_tokens || (pos >= model->protect_begin && pos < model->protect_end);
}

static struct candidates collect(const struct model *model, uint32_t begin, uint32_t end, bool protected_too)
{
	struct candidates all = {.list = calloc((size_t)model->rows * model->max_tokens, sizeof(struct candidate))};

	assert_non_null(all.list);
	for (uint32_t row = 0; row < model->rows; row++)
		for (uint32_t pos = begin; pos < end; pos++)
			if (model->held[at(model, row, pos)] && (protected_too || !is_protected(model, pos)))
				all.list[all.count++] = (struct candidate){
					.score = model->scores[at(model, row, pos)], .row = row, .pos = pos};
	return all;
}

static uint64_t apply(struct model *model, struct candidates *all)
{
	uint64_t gone = 0;

	for (size_t i = 0; i < all->count; i++) {
		if (all->list[i].keep)
			continue;
		model->held[at(model, all->list[i].row, all->list[i].pos)] = false;
		gone++;
	}
	free(all->list);
	if (gone)
		model->fold = model->committed;
	return gone;
}

/* Copies of sealed pairs that do not fill a block: held by the sequence, and never gone. */
static size_t tails(const struct model *model)
{
	size_t n = 0;

	for (uint32_t row = 0; row < model->rows; row++) {
		for (uint32_t pos = 0; pos < model->sealed; pos++)
			n += model->held[at(model, row, pos)];
		n -= model->shared[row];
	}
	return n;
}

static uint64_t predict_decode(struct model *model)
{
	uint32_t first = model->policy.decode_first ? model->policy.decode_first : 4;
	uint32_t window = model->policy.decode_window ? model->policy.decode_window : 128;
	size_t budget = (size_t)model->policy.budget * model->rows, fixed = tails(model), n;
	struct candidates all = collect(model, model->sealed, model->committed, true);
	struct candidate **list;

	for (size_t i = 0; i < all.count; i++) {
		struct candidate *candidate = &all.list[i];

		if (is_protected(model, candidate->pos))
			candidate->score = INFINITY;
		else if (candidate->pos < first || candidate->pos + window >= model->committed)
			candidate->score = 1.0f;
	}
	list = sorted(&all, 0, model->rows, &n);
	for (size_t i = 0; i < n; i++)
		list[i]->keep = n + fixed <= budget || isinf(list[i]->score) ||
				(budget > fixed && list[i]->score >= list[budget - fixed - 1]->score);
	free(list);
	if (n + fixed > budget)
		model->prune_start = model->policy.context_tokens; /* no prefill eviction any more */
	keep_floor(model, &all);
	return apply(model, &all);
}

/* Method.md section 2, as written there. */
static double prefill_window(const struct model *model, uint32_t *ret_window)
{
	const struct kvg_policy *policy = &model->policy;
	double n = policy->context_tokens, r = policy->mode == KVG_MODE_THRESHOLD ? 1.0 : policy->ratio;
	uint32_t w = policy->window;

	if (!(policy->flags & KVG_POLICY_WINDOW_ABSOLUTE) && (!policy->chunk_tokens || n < policy->chunk_tokens))
		w = (uint32_t)(0.02 * n);
	if (r >= 1.0) {
		*ret_window = w < n ? w : (uint32_t)n;
		return 1.0;
	}
	*ret_window = r * n < w ? (uint32_t)(r * n) : w;
	return r * n < w ? 0.0 : (r * n - w) / (n - w);
}

static uint64_t predict_once(struct model *model, uint32_t window)
{
	uint32_t prefix = model->policy.prefix_tokens, end = prefix + model->policy.context_tokens;
	struct candidates all = collect(model, prefix, end, false);

	for (size_t i = 0; i < all.count; i++)
		if (all.list[i].pos + window >= end)
			all.list[i].score = INFINITY;
	keep_ratio(model, &all, model->policy.ratio);
	keep_floor(model, &all);
	for (size_t i = 0; i < all.count; i++)
		all.list[i].keep |= all.list[i].pos + window >= end;
	model->prune_start = model->policy.context_tokens;
	return apply(model, &all);
}

static uint64_t predict_prefill(struct model *model)
{
	const struct kvg_policy *policy = &model->policy;
	uint32_t prefix = policy->prefix_tokens, window, seen;
	double ratio = prefill_window(model, &window);
	struct candidates all;

	if (policy->mode == KVG_MODE_OFF || model->committed <= prefix)
		return 0;
	seen = model->committed - prefix < policy->context_tokens ? model->committed - prefix : policy->context_tokens;
	if (policy->mode == KVG_MODE_ONCE)
		return seen == policy->context_tokens && !model->prune_start ? predict_once(model, window) : 0;
	if (seen <= window || seen - window <= model->prune_start ||
		(policy->ratio >= 1.0 && policy->mode != KVG_MODE_THRESHOLD))
		return 0;
	all = collect(model, prefix + model->prune_start, prefix + seen - window, false);
	if (policy->mode == KVG_MODE_THRESHOLD)
		for (size_t i = 0; i < all.count; i++)
			all.list[i].keep = all.list[i].score > policy->threshold;
	else
		keep_ratio(model, &all, ratio);
	keep_floor(model, &all);
	model->prune_start = seen - window;
	return apply(model, &all);
}

uint64_t model_predict(struct model *model, uint32_t mode)
{
	return mode == KVG_EVICT_DECODE ? predict_decode(model) : predict_prefill(model);
}

void model_evict(struct model *model, uint32_t mode)
{
	uint64_t gone = model_predict(model, mode), held = model_pairs(model);

	if (fixture_evict(model->fixture, model->handle, mode) < 0)
		fail_msg("%s", model->fixture->text);
	assert_int_equal(model->fixture->cqe.value[1], gone);
	assert_int_equal(model->fixture->cqe.value[0], held);
	model_check(model);
}

void model_prefill(struct model *model)
{
	uint32_t total = model->policy.prefix_tokens + model->policy.context_tokens;
	uint32_t chunk = model->policy.chunk_tokens ? model->policy.chunk_tokens : total;

	while (model->committed < total) {
		uint32_t end = (model->committed / chunk + 1) * chunk;

		if (model_append(model, (end < total ? end : total) - model->committed) < 0)
			fail_msg("%s", model->fixture->text);
		model_evict(model, KVG_EVICT_PREFILL);
	}
}
