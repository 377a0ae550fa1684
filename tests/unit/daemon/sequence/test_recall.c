/* What comes back: exactly what an eviction at the other ratio, or budget, would have kept. */
#include "daemon/sequence/recall.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/retain.h"
#include "daemon/tier/host.h"
#include "tests/support/space_model.h"

#define HOST (16u << 20)

static const struct kvg_policy chunked = {.ratio = 0.1,
	.mode = KVG_MODE_CHUNKED,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE | KVG_POLICY_RETAIN_HOST,
	.prefix_tokens = 5,
	.context_tokens = 500,
	.chunk_tokens = 200,
	.window = 37,
	.max_new_tokens = 400};

static int recall_entry(const struct model *model, struct kvg_sqe *sqe)
{
	sqe->op = KVG_OP_RECALL;
	sqe->seq = model->handle;
	sqe->generation = fixture_generation(model->fixture, model->handle);
	return fixture_call(model->fixture, sqe);
}

static int recall_ratio(const struct model *model, double ratio)
{
	return recall_entry(model, &(struct kvg_sqe){.recall.ratio = ratio});
}

static int recall_budget(const struct model *model, uint32_t budget)
{
	return recall_entry(model, &(struct kvg_sqe){.recall = {.budget = budget, .flags = KVG_RECALL_BUDGET}});
}

static const struct retain *store_of(const struct model *model)
{
	return model->fixture->space->sequences[(uint32_t)model->handle]->retain;
}

static uint64_t retained(const struct model *model)
{
	return store_of(model) ? store_of(model)->count : 0;
}

/* A retained pair is nowhere else, and nothing of a position that the row has is. */
static void check_store(const struct model *model)
{
	const struct retain *retain = store_of(model);
	const struct meta_seq *meta = &model->fixture->space->part.seqs[(uint32_t)model->handle];
	const struct quota_account *host = model->fixture->tenant->host.account;

	if (!retain) /* nothing was ever dropped */
		return;
	assert_true(retain->frame_count == retain_frames_for(&retain->form, retain->count));
	assert_int_equal(meta->retained_bytes, retain->count * retain_pair_bytes(&retain->form));
	assert_int_equal(meta->retained != 0, retain->count != 0);
	assert_true(host->charged >= (uint64_t)retain->frame_count * HOST_FRAME);
	for (uint64_t i = 0; i < retain->count; i++) {
		const struct retain_entry *entry = retain_entry(retain, i);
		uint32_t pos;

		assert_true(entry->row < model->rows && entry->pos < model->committed);
		assert_false(model->held[(size_t)entry->row * model->max_tokens + entry->pos]);
		assert_memory_equal(&entry->score, &model->scores[(size_t)entry->row * model->max_tokens + entry->pos],
			sizeof(float));
		memcpy(&pos, retain_k(retain, i), sizeof(pos)); /* as space_model.c writes it */
		assert_int_equal(pos, entry->pos);
	}
}

/* The model holds what others hold as well. Returns how many pairs that brings. */
static uint64_t take_over(struct model *model, const struct model *other)
{
	uint64_t came = 0;

	for (size_t i = 0; i < (size_t)model->rows * model->max_tokens; i++) {
		came += other->held[i] && !model->held[i];
		model->held[i] |= other->held[i];
	}
	if (came)
		model->fold = model->committed;
	return came;
}

static void check_recall(struct model *model, uint64_t came)
{
	const struct fixture *fixture = model->fixture;

	assert_int_equal(fixture->cqe.value[1], came);
	assert_int_equal(fixture->cqe.value[0], model_pairs(model));
	assert_int_equal(fixture->cqe.value[2],
		fixture->space->part.seqs[(uint32_t)model->handle].blocks * 2 * fixture->space->arena->stride);
	model_check(model);
	check_store(model);
}

/* A prompt read with this policy, with a range protected. */
static struct model *read_prompt(struct fixture *fixture, const struct kvg_policy *policy, double ratio,
	enum score_pattern pattern, bool protect)
{
	struct kvg_policy own = *policy;
	struct model *model;

	own.ratio = ratio;
	model = model_new(fixture, &own, pattern);
	if (protect)
		model_protect(model, 130, 190);
	model_prefill(model);
	return model;
}

static bool is_part(const struct model *part, const struct model *whole)
{
	for (size_t i = 0; i < (size_t)part->rows * part->max_tokens; i++)
		if (part->held[i] && !whole->held[i])
			return false;
	return true;
}

/*
 * Where the smaller ratio is less than the window, its window is smaller too, and the borders of its ranges lie
 * elsewhere. A floor's pairs are then the best of other ranges.
 */
static bool is_monotone(const struct kvg_policy *policy, double low)
{
	return !policy->floor || policy->mode == KVG_MODE_ONCE || !policy->chunk_tokens ||
	       low * policy->context_tokens >= policy->window;
}

/* recall(evict(x, low), high) is evict(x, high); where the method is not monotone, both. */
static void compare(const struct kvg_policy *policy, double low, double high, enum score_pattern pattern, bool protect)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
	struct model *whole = read_prompt(fixture, policy, high, pattern, protect);
	struct model *model = read_prompt(fixture, policy, low, pattern, protect);
	uint64_t before = model_pairs(model), came;

	assert_true(is_part(model, whole) || !is_monotone(policy, low));
	assert_int_equal(retained(model), 505 * model->rows - before);
	came = take_over(model, whole);
	if (recall_ratio(model, high) < 0)
		fail_msg("%s", fixture->text);
	check_recall(model, came);
	assert_int_equal(retained(model), 505 * model->rows - before - came);
	assert_int_equal(fixture_generation(fixture, model->handle),
		fixture_generation(fixture, whole->handle) + (high == 1.0 ? 3 : 0) + (came ? 1 : 0));
	model_release(whole);
	model_release(model);
	fixture_free(fixture);
}

static void compare_ratios(const struct kvg_policy *policy, enum score_pattern pattern)
{
	static const double pairs[][2] = {{0.1, 0.3}, {0.05, 0.3}, {0.3, 0.5}, {0.05, 0.06}};

	for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++)
		compare(policy, pairs[i][0], pairs[i][1], pattern, i % 2);
}

static void every_level_and_pattern(struct kvg_policy policy)
{
	for (unsigned level = 0; level <= KVG_LEVEL_ADAKV_LAYER; level++) {
		for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
			policy.level = (uint8_t)level;
			policy.floor = 0;
			compare_ratios(&policy, (enum score_pattern)pattern);
			policy.floor = 8;
			compare_ratios(&policy, (enum score_pattern)pattern);
		}
	}
}

static void test_one_range(void **state)
{
	struct kvg_policy policy = chunked;

	(void)state;
	policy.chunk_tokens = 0;
	policy.flags &= (uint16_t)~KVG_POLICY_WINDOW_ABSOLUTE;
	every_level_and_pattern(policy);
}

/* Ranges are decided one by one, with the borders that they have at the greater ratio. */
static void test_several_ranges(void **state)
{
	(void)state;
	every_level_and_pattern(chunked);
}

static void test_once(void **state)
{
	struct kvg_policy policy = chunked;

	(void)state;
	policy.mode = KVG_MODE_ONCE;
	every_level_and_pattern(policy);
}

static void test_everything_comes_back(void **state)
{
	(void)state;
	for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
		struct kvg_policy policy = chunked;
		struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
		struct model *whole = read_prompt(fixture, &policy, 1.0, (enum score_pattern)pattern, false);
		struct model *model = read_prompt(fixture, &policy, 0.1, (enum score_pattern)pattern, false);
		uint64_t came = take_over(model, whole);

		assert_int_equal(recall_ratio(model, 1.0), 0);
		check_recall(model, came);
		assert_int_equal(retained(model), 0);
		assert_int_equal(fixture->tenant->host.account->charged, 0);
		assert_int_equal(recall_ratio(model, 1.0), 0); /* again: there is nothing */
		assert_int_equal(fixture->cqe.value[1], 0);
		model_release(whole);
		model_release(model);
		fixture_free(fixture);
	}
}

/* Whatever way leads there. */
static void test_step_by_step(void **state)
{
	static const double ratios[] = {0.15, 0.2, 0.5, 0.51, 0.9};
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST, .max_sequences = 16});
	struct model *model = read_prompt(fixture, &chunked, 0.05, SCORES_RANDOM, false);

	(void)state;
	for (size_t i = 0; i < sizeof(ratios) / sizeof(ratios[0]); i++) {
		struct model *whole = read_prompt(fixture, &chunked, ratios[i], SCORES_RANDOM, false);
		uint64_t came = take_over(model, whole);

		assert_true(came > 0);
		assert_int_equal(recall_ratio(model, ratios[i]), 0);
		check_recall(model, came);
		assert_int_equal(recall_ratio(model, 0.05), 0); /* less than is held: nothing goes */
		check_recall(model, 0);
		model_release(whole);
	}
	model_release(model);
	fixture_free(fixture);
}

/* In the midst of a prompt, with tokens that have had no eviction yet; the rest of it is read as if nothing was. */
static void test_within_a_prompt(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
	struct kvg_policy other = chunked;
	struct model *model = model_new(fixture, &chunked, SCORES_RANDOM), *whole;
	uint64_t came;

	(void)state;
	other.ratio = 0.4;
	whole = model_new(fixture, &other, SCORES_RANDOM);
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(model_append(model, 200), 0);
		assert_int_equal(model_append(whole, 200), 0);
		model_evict(model, KVG_EVICT_PREFILL);
		model_evict(whole, KVG_EVICT_PREFILL);
	}
	assert_int_equal(model_append(model, 30), 0);
	assert_int_equal(model_append(whole, 30), 0);
	came = take_over(model, whole);
	assert_true(came > 0);
	assert_int_equal(recall_ratio(model, 0.4), 0);
	check_recall(model, came);
	assert_int_equal(model_append(model, 75), 0);
	model_evict(model, KVG_EVICT_PREFILL);
	check_store(model);
	model_release(model);
	model_release(whole);
	fixture_free(fixture);
}

/* A threshold's evictions know no ratio: what CHUNKED keeps comes back besides. */
static void test_threshold(void **state)
{
	(void)state;
	for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
		struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
		struct kvg_policy policy = chunked;
		struct model *whole = read_prompt(fixture, &policy, 0.4, (enum score_pattern)pattern, true), *model;
		uint64_t came;

		policy.mode = KVG_MODE_THRESHOLD;
		policy.threshold = 0.85f;
		model = read_prompt(fixture, &policy, 0.1, (enum score_pattern)pattern, true);
		came = take_over(model, whole);
		assert_int_equal(recall_ratio(model, 0.4), 0);
		check_recall(model, came);
		model_release(whole);
		model_release(model);
		fixture_free(fixture);
	}
}

/*
 * adakv-layer: the safe share of each head goes in steps of 5 pairs, so that with one pair more the others of a layer
 * have fewer places. Pairs of both come then.
 */
static void test_adakv_is_not_monotone(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST, .layers = 1, .heads = 4});
	struct kvg_policy policy = {.mode = KVG_MODE_CHUNKED,
		.level = KVG_LEVEL_ADAKV_LAYER,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE | KVG_POLICY_RETAIN_HOST,
		.context_tokens = 100};
	struct model *whole = read_prompt(fixture, &policy, 0.05, SCORES_ONE_ROW, false);
	struct model *model = read_prompt(fixture, &policy, 0.0499, SCORES_ONE_ROW, false);
	uint64_t came;

	(void)state;
	assert_false(is_part(model, whole));
	came = take_over(model, whole);
	assert_true(came > 0);
	assert_int_equal(recall_ratio(model, 0.05), 0);
	check_recall(model, came);
	model_release(whole);
	model_release(model);
	fixture_free(fixture);
}

/*
 * ONCE, where r n is less than the window: the window counts in the share and all but fills it. What is left of the
 * share goes to other pairs, up to one for each row, and is less where r n is whole.
 */
static void test_once_is_not_monotone(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
	struct kvg_policy policy = chunked;
	struct model *whole, *model;
	uint64_t came;

	(void)state;
	policy.mode = KVG_MODE_ONCE;
	whole = read_prompt(fixture, &policy, 0.052, SCORES_RANDOM, false);
	model = read_prompt(fixture, &policy, 0.0518, SCORES_RANDOM, false);
	assert_false(is_part(model, whole));
	came = take_over(model, whole);
	assert_int_equal(came, model->rows); /* the window is one position wider */
	assert_int_equal(recall_ratio(model, 0.052), 0);
	check_recall(model, came);
	model_release(whole);
	model_release(model);
	fixture_free(fixture);
}

/* ---- anything at any time ---- */

/* What evictions at another ratio leave, with the same scores, after the chunks that have been read. */
static uint64_t predict_recall(struct model *model, double ratio)
{
	uint32_t total = model->policy.prefix_tokens + model->policy.context_tokens;
	uint32_t read = model->committed < total ? model->committed : total;
	uint32_t chunk = model->policy.chunk_tokens ? model->policy.chunk_tokens : total;
	size_t size = (size_t)model->rows * model->max_tokens;
	struct model other = *model;
	uint64_t came;

	other.policy.ratio = ratio;
	other.prune_start = 0;
	other.held = calloc(size, sizeof(bool));
	assert_non_null(other.held);
	for (other.committed = 0; other.committed < read;) {
		uint32_t end = chunk < read - other.committed ? other.committed + chunk : read;

		for (uint32_t row = 0; row < other.rows; row++)
			memset(other.held + (size_t)row * other.max_tokens + other.committed, 1, end - other.committed);
		other.committed = end;
		(void)model_predict(&other, KVG_EVICT_PREFILL);
	}
	came = take_over(model, &other);
	free(other.held);
	return came;
}

static void do_something(struct model *model, struct random *random)
{
	uint32_t total = model->policy.prefix_tokens + model->policy.context_tokens, chunk = model->policy.chunk_tokens;
	double ratio = 0.1 + 0.9 * random_below(random, 1000) / 1000.0;

	if (model->committed < total) {
		uint32_t rest = total - model->committed;

		assert_int_equal(model_append(model, chunk < rest ? chunk : rest), 0);
		model_evict(model, KVG_EVICT_PREFILL);
	} else if (random_below(random, 2)) {
		assert_int_equal(model_append(model, 1 + random_below(random, 60)), 0);
		model_evict(model, KVG_EVICT_DECODE);
	}
	check_store(model);
	if (random_below(random, 2)) {
		uint64_t came = predict_recall(model, ratio);

		if (recall_ratio(model, ratio) < 0)
			fail_msg("%s", model->fixture->text);
		check_recall(model, came);
	}
}

static struct kvg_policy any_policy(struct random *random)
{
	struct kvg_policy policy = chunked;

	policy.level = (uint8_t)random_below(random, 3); /* adakv is not monotone */
	policy.prefix_tokens = random_below(random, 40);
	policy.context_tokens = 300 + random_below(random, 600);
	policy.chunk_tokens = 100 + random_below(random, 400);
	policy.window = random_below(random, 30);
	policy.budget = 60 + random_below(random, 200);
	policy.max_new_tokens = 1200;
	policy.ratio = 0.1;
	return policy;
}

static void run_churn(size_t extent_size, unsigned evictions, uint64_t seed)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST, .extent_size = extent_size});
	struct compute_ops ops = *fixture->space->compute;
	struct random random = {.state = seed};
	struct model *models[5] = {NULL};

	ops.evictions = evictions;
	fixture->space->compute = &ops;
	for (unsigned i = 0; i < 120; i++) {
		unsigned at = random_below(&random, 5);
		struct kvg_policy policy = any_policy(&random);

		if (!models[at]) {
			models[at] = model_new(fixture, &policy, (enum score_pattern)random_below(&random, 7));
		} else if (models[at]->committed > models[at]->policy.context_tokens + 800) {
			model_release(models[at]);
			models[at] = NULL;
		} else {
			do_something(models[at], &random);
		}
	}
	for (unsigned i = 0; i < 5; i++) {
		if (!models[i])
			continue;
		model_check(models[i]);
		model_release(models[i]);
	}
	assert_int_equal(fixture->tenant->host.account->charged, 0);
	fixture_free(fixture);
}

static void test_churn(void **state)
{
	static const size_t sizes[] = {16 << 10, 64 << 10, 1 << 20};

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		for (uint64_t seed = 1; seed <= 3; seed++)
			run_churn(sizes[i], seed == 3 ? META_RECORDS : 1, seed * 7919 + i);
}

/* Recalls and evictions of several sequences, submitted together, one behind the other or at a time. */
static void run_together(unsigned evictions)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST, .extent_size = 16 << 10});
	struct compute_ops ops = *fixture->space->compute;
	struct kvg_policy policy = chunked;
	struct call *calls[6];
	struct model *models[6];
	uint64_t moved[6];

	ops.evictions = evictions;
	fixture->space->compute = &ops;
	policy.budget = 120;
	for (unsigned i = 0; i < 6; i++) {
		models[i] = read_prompt(fixture, &policy, 0.3, (enum score_pattern)i, false);
		assert_int_equal(model_append(models[i], 50 + i), 0);
	}
	for (unsigned i = 0; i < 6; i++) {
		struct kvg_sqe sqe = {.op = i % 2 ? KVG_OP_RECALL : KVG_OP_EVICT, .seq = models[i]->handle};

		if (i % 2)
			sqe.recall.ratio = 0.8;
		else
			sqe.evict.mode = KVG_EVICT_DECODE;
		sqe.generation = fixture_generation(fixture, sqe.seq);
		moved[i] = i % 2 ? predict_recall(models[i], 0.8) : model_predict(models[i], KVG_EVICT_DECODE);
		calls[i] = fixture_start(fixture, &sqe);
	}
	for (unsigned i = 0; i < 6; i++) {
		fixture_wait(fixture, calls[i]);
		assert_int_equal(calls[i]->request.cqe.status, 0);
		assert_int_equal(calls[i]->request.cqe.value[1], moved[i]);
	}
	assert_int_equal(fixture->space->evict_reserve, 0);
	fixture_acknowledge(fixture);
	for (unsigned i = 0; i < 6; i++) {
		model_check(models[i]);
		check_store(models[i]);
		model_release(models[i]);
	}
	fixture_free(fixture);
}

static void test_together(void **state)
{
	(void)state;
	run_together(1);
	run_together(META_RECORDS);
}

/* Copies in several slices each. */
static void test_large_pairs(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = 64 << 20,
		.k_dim = 1024,
		.v_dim = 1024,
		.k_dtype = KVG_F32,
		.v_dtype = KVG_F32,
		.pool_size = 128 << 20,
		.extent_size = 1 << 20});
	struct kvg_policy policy = chunked;
	struct model *model;
	uint64_t came;

	(void)state;
	policy.chunk_tokens = 0;
	model = read_prompt(fixture, &policy, 0.1, SCORES_RANDOM, false);
	assert_true(retained(model) * retain_pair_bytes(&store_of(model)->form) > 12 << 20);
	came = predict_recall(model, 0.9);
	assert_int_equal(recall_ratio(model, 0.9), 0);
	check_recall(model, came);
	model_release(model);
	fixture_free(fixture);
}

/* ---- decoding ---- */

static void decode(struct model *model, unsigned events)
{
	for (unsigned i = 0; i < events; i++) {
		assert_int_equal(model_append(model, 64), 0);
		model_evict(model, KVG_EVICT_DECODE);
		check_store(model);
	}
}

static void test_decoding_goes_on(void **state)
{
	(void)state;
	for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
		struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
		struct kvg_policy policy = chunked;
		struct model *whole, *model;
		uint64_t came;

		policy.budget = 180;
		whole = read_prompt(fixture, &policy, 0.5, (enum score_pattern)pattern, false);
		model = read_prompt(fixture, &policy, 0.1, (enum score_pattern)pattern, false);
		assert_int_equal(model_append(model, 33), 0);
		came = take_over(model, whole);
		assert_int_equal(recall_ratio(model, 0.5), 0);
		check_recall(model, came);
		decode(model, 3);
		assert_int_equal(
			recall_ratio(model, 0.5), 0); /* of the context, as before: what decoding dropped of it */
		came = take_over(model, whole);
		check_recall(model, came);
		decode(model, 2);
		model_release(whole);
		model_release(model);
		fixture_free(fixture);
	}
}

/* A budget event, then a greater budget: the pairs of an event with that. */
static void compare_budgets(uint32_t floor, enum score_pattern pattern)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
	struct kvg_policy policy = chunked;
	struct model *whole, *model;
	uint64_t came;

	policy.floor = floor;
	policy.budget = 300;
	whole = read_prompt(fixture, &policy, 1.0, pattern, true);
	policy.budget = 170;
	model = read_prompt(fixture, &policy, 1.0, pattern, true);
	assert_int_equal(model_append(whole, 50), 0);
	assert_int_equal(model_append(model, 50), 0);
	model_evict(whole, KVG_EVICT_DECODE);
	model_evict(model, KVG_EVICT_DECODE);
	assert_true(is_part(model, whole));
	came = take_over(model, whole);
	assert_int_equal(recall_budget(model, 300), 0);
	check_recall(model, came);
	came = 555 * model->rows - model_pairs(model);
	for (uint32_t row = 0; row < model->rows; row++)
		memset(model->held + (size_t)row * model->max_tokens, 1, model->committed);
	assert_int_equal(recall_budget(model, 4000), 0);
	check_recall(model, came);
	model_release(whole);
	model_release(model);
	fixture_free(fixture);
}

static void test_budget(void **state)
{
	(void)state;
	for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
		compare_budgets(0, (enum score_pattern)pattern);
		compare_budgets(3, (enum score_pattern)pattern);
	}
}

/* ---- lack of room ---- */

struct ranked {
	float score;
	size_t at;
};

static int best_first(const void *a, const void *b)
{
	const struct ranked *x = a, *y = b;

	return x->score < y->score ? 1 : x->score > y->score ? -1 : (x->at > y->at) - (x->at < y->at);
}

/* Of what the model does not hold, the best `count`: that is what a store of that size must have. */
static void check_best(const struct model *model, uint64_t count)
{
	struct ranked *list = calloc((size_t)model->rows * model->committed + 1, sizeof(*list));
	const struct retain *retain = store_of(model);
	uint64_t n = 0;

	assert_non_null(list);
	for (uint32_t row = 0; row < model->rows; row++) {
		for (uint32_t pos = 0; pos < model->committed; pos++) {
			size_t at = (size_t)row * model->max_tokens + pos;

			if (!model->held[at])
				list[n++] = (struct ranked){model->scores[at], at};
		}
	}
	qsort(list, n, sizeof(*list), best_first);
	assert_int_equal(retain->count, count < n ? count : n);
	for (uint64_t i = 0; i < retain->count; i++)
		assert_true(retain_entry(retain, i)->score >= list[retain->count - 1].score);
	free(list);
}

/* As much as the tenant's host budget has: the best of all that was dropped, from every eviction. */
static void test_little_host_memory(void **state)
{
	(void)state;
	for (unsigned frames = 0; frames <= 2; frames++) {
		struct fixture *fixture = fixture_new(
			&(struct fixture_options){.host_size = HOST, .k_dim = 64, .v_dim = 64, .k_dtype = KVG_F32});
		struct kvg_policy policy = chunked;
		struct model *whole, *model;
		uint64_t came = 0, each;

		policy.budget = 60;
		whole = read_prompt(fixture, &policy, 0.6, SCORES_RANDOM, false);
		fixture->tenant->host.account->max = fixture->tenant->host.account->charged + frames * HOST_FRAME;
		model = read_prompt(fixture, &policy, 0.1, SCORES_RANDOM, false);
		decode(model, frames ? 3 : 0);
		if (frames) {
			each = store_of(model)->form.per_frame;
			assert_true(each > 100 && each < 300);
			check_best(model, frames * each);
			for (uint64_t i = 0; i < store_of(model)->count; i++) {
				const struct retain_entry *entry = retain_entry(store_of(model), i);
				size_t at = (size_t)entry->row * model->max_tokens + entry->pos;

				came += whole->held[at] && entry->pos < 505;
				model->held[at] |= whole->held[at] && entry->pos < 505;
			}
			model->fold = model->committed;
		}
		assert_int_equal(recall_ratio(model, 0.6), 0);
		assert_int_equal(fixture->cqe.value[1], came);
		assert_true(!frames || came > 0);
		model_check(model);
		model_release(whole);
		model_release(model);
		fixture_free(fixture);
	}
}

/* Refused by the device's budget: nothing has changed, and with more of it all comes. */
static void test_little_device_memory(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST, .extent_size = 16 << 10});
	struct kvg_policy policy = chunked;
	struct model *model, *whole;
	struct quota_account *account;
	uint64_t before, promised, came;

	(void)state;
	policy.max_new_tokens = 0;
	whole = read_prompt(fixture, &policy, 0.9, SCORES_RANDOM, false);
	model = read_prompt(fixture, &policy, 0.1, SCORES_RANDOM, false);
	account = fixture->tenant->quota.account;
	before = retained(model);
	promised = account->promised;
	account->max = account->charged + account->promised;
	assert_int_equal(recall_ratio(model, 0.9), -ENOSPC);
	assert_non_null(strstr(fixture->text, "the recall needs"));
	assert_int_equal(retained(model), before);
	assert_int_equal(account->promised, promised);
	assert_int_equal(fixture_generation(fixture, model->handle), 3);
	model_check(model);
	account->max = 64 << 20;
	came = take_over(model, whole);
	assert_int_equal(recall_ratio(model, 0.9), 0);
	check_recall(model, came);
	model_release(model);
	model_release(whole);
	fixture_free(fixture);
}

static void on_pressure(void *user, struct tenant *tenant, bool on)
{
	(void)user;
	(void)tenant;
	(void)on;
}

/* Memory is on its way: the recall waits for it, and an eviction of the same worker does not wait for the recall. */
static void test_waits_for_memory(void **state)
{
	static const struct reclaim_ops ops = {.pressure = on_pressure};
	static const size_t one = 1;
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST, .extent_size = 16 << 10});
	struct kvg_policy policy = chunked, plain = {.ratio = 1.0, .context_tokens = 1500};
	struct quota_account *account = fixture->tenant->quota.account;
	struct model *model, *whole, *idle, *other;
	struct call *waiting, *evict;
	struct reclaim reclaim;
	uint64_t came;

	(void)state;
	assert_int_equal(
		reclaim_init(&reclaim, fixture->loop, fixture->pool, &fixture->tenant, &one, 10000000000u, &ops, NULL),
		0);
	fixture->tenant->reclaim = &reclaim;
	policy.max_new_tokens = 0;
	whole = read_prompt(fixture, &policy, 0.9, SCORES_RANDOM, false);
	model = read_prompt(fixture, &policy, 0.1, SCORES_RANDOM, false);
	came = take_over(model, whole);
	model_release(whole);
	other = model_new(fixture, &policy, SCORES_TIES);
	assert_int_equal(model_append(other, 200), 0);
	idle = model_new(fixture, &plain, SCORES_RANDOM);
	assert_int_equal(model_append(idle, 1500), 0);
	assert_int_equal(fixture_call(fixture, &(struct kvg_sqe){.op = KVG_OP_IDLE, .seq = idle->handle}), 0);
	account->max = account->charged + account->promised;
	waiting = fixture_start(fixture, &(struct kvg_sqe){.op = KVG_OP_RECALL,
						 .seq = model->handle,
						 .generation = fixture_generation(fixture, model->handle),
						 .recall.ratio = 0.9});
	evict = fixture_start(fixture, &(struct kvg_sqe){.op = KVG_OP_EVICT, .seq = other->handle});
	(void)model_predict(other, KVG_EVICT_PREFILL);
	fixture_wait(fixture, evict);
	assert_int_equal(evict->request.cqe.status, 0);
	assert_false(waiting->done);
	while (!waiting->done) {
		fixture_acknowledge(fixture);
		fixture_turn(fixture);
	}
	assert_int_equal(waiting->request.cqe.status, 0);
	fixture->cqe = waiting->request.cqe;
	check_recall(model, came);
	model_check(other);
	assert_int_equal(fixture->space->table.slots[(uint32_t)idle->handle].flags, KVG_SLOT_OFFLOADED | KVG_SLOT_IDLE);
	fixture_acknowledge(fixture);
	model_release(model);
	model_release(other);
	model_release(idle);
	fixture->tenant->reclaim = NULL;
	reclaim_deinit(&reclaim);
	fixture_free(fixture);
}

/* What was admitted is there after a recall, too: the tokens that are still to come have their room. */
static void test_promise_holds(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST, .extent_size = 16 << 10});
	struct model *model = read_prompt(fixture, &chunked, 0.1, SCORES_RANDOM, false);
	struct model *whole = read_prompt(fixture, &chunked, 0.8, SCORES_RANDOM, false);
	struct quota_account *account = fixture->tenant->quota.account;
	uint64_t came = take_over(model, whole);

	(void)state;
	model_release(whole);
	assert_int_equal(recall_ratio(model, 0.8), 0);
	check_recall(model, came);
	account->max = account->charged + account->promised;
	assert_int_equal(model_append(model, 400), 0);
	model_check(model);
	model_release(model);
	fixture_free(fixture);
}

/* ---- what ends ---- */

static void test_frames_go_with_their_sequence(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
	struct model *first = read_prompt(fixture, &chunked, 0.1, SCORES_RANDOM, false);
	struct model *second = read_prompt(fixture, &chunked, 0.1, SCORES_TIES, false);
	uint64_t charged = fixture->tenant->host.account->charged;

	(void)state;
	assert_int_equal(
		charged, ((uint64_t)store_of(first)->frame_count + store_of(second)->frame_count) * HOST_FRAME);
	model_release(first);
	assert_int_equal(fixture->tenant->host.account->charged, charged - store_of(second)->frame_count * HOST_FRAME);
	check_store(second);
	model_free(second);
	fixture_kill(fixture); /* the worker dies with what it retains */
	assert_int_equal(fixture->tenant->host.account->charged, 0);
	fixture_free(fixture);
}

/* It dies in the midst of an eviction or a recall, wherever that is. */
static void test_death_on_the_way(void **state)
{
	(void)state;
	for (unsigned turns = 0; turns < 12; turns++) {
		struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
		struct model *model = read_prompt(fixture, &chunked, 0.1, SCORES_RANDOM, false);
		struct model *other = model_new(fixture, &chunked, SCORES_RANDOM);
		struct kvg_sqe sqe = {.op = KVG_OP_RECALL, .seq = model->handle, .generation = 3, .recall.ratio = 0.9};

		assert_int_equal(model_append(other, 200), 0);
		(void)fixture_start(fixture, &sqe);
		sqe = (struct kvg_sqe){.op = KVG_OP_EVICT, .seq = other->handle};
		(void)fixture_start(fixture, &sqe);
		for (unsigned i = 0; i < turns; i++)
			fixture_turn(fixture);
		model_free(model);
		model_free(other);
		fixture_kill(fixture);
		assert_int_equal(fixture->tenant->host.account->charged, 0);
		fixture_free(fixture);
	}
}

static void test_refusals(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
	struct kvg_policy plain = chunked;
	struct model *model = read_prompt(fixture, &chunked, 0.1, SCORES_RANDOM, false), *other;

	(void)state;
	plain.flags = KVG_POLICY_WINDOW_ABSOLUTE;
	other = read_prompt(fixture, &plain, 0.1, SCORES_RANDOM, false);
	assert_null(store_of(other));
	assert_int_equal(recall_ratio(other, 0.3), -EINVAL);
	assert_non_null(strstr(fixture->text, "without RETAIN_HOST"));
	assert_int_equal(recall_ratio(model, 0), -EINVAL);
	assert_int_equal(recall_ratio(model, 1.5), -EINVAL);
	assert_non_null(strstr(fixture->text, "ratio 1.5, must be above 0 and at most 1"));
	assert_int_equal(recall_ratio(model, (double)NAN), -EINVAL);
	assert_int_equal(recall_budget(model, 0), -EINVAL);
	assert_int_equal(recall_entry(model, &(struct kvg_sqe){.recall = {.ratio = 0.5, .flags = 2}}), -EINVAL);
	assert_int_equal(fixture_call(fixture, &(struct kvg_sqe){.op = KVG_OP_OFFLOAD, .seq = model->handle}), 0);
	assert_int_equal(recall_ratio(model, 0.3), -EBUSY);
	assert_non_null(strstr(fixture->text, "offloaded"));
	assert_int_equal(fixture_call(fixture, &(struct kvg_sqe){.op = KVG_OP_RESTORE, .seq = model->handle}), 0);
	assert_int_equal(
		fixture_call(fixture,
			&(struct kvg_sqe){
				.op = KVG_OP_RECALL, .seq = model->handle, .generation = 2, .recall.ratio = 0.5}),
		-ESTALE);
	assert_int_equal(fixture_reserve(fixture, model->handle, 10), 0);
	assert_int_equal(fixture_commit(fixture, model->handle, 515), 0);
	assert_int_equal(recall_ratio(model, 0.3), -ENODATA);
	assert_non_null(strstr(fixture->text, "recall: layer 0 is scored to 505, committed are 515"));
	assert_int_equal(fixture_truncate(fixture, model->handle, 505), 0);
	model_check(model);
	model_release(model);
	model_release(other);
	fixture_free(fixture);
}

/* Without a host tier the flag means nothing, and nothing comes back. */
static void test_without_a_tier(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = read_prompt(fixture, &chunked, 0.1, SCORES_RANDOM, false);

	(void)state;
	assert_null(store_of(model));
	assert_int_equal(recall_ratio(model, 0.9), 0);
	assert_int_equal(fixture->cqe.value[1], 0);
	model_check(model);
	model_release(model);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_one_range),
		cmocka_unit_test(test_several_ranges),
		cmocka_unit_test(test_once),
		cmocka_unit_test(test_everything_comes_back),
		cmocka_unit_test(test_step_by_step),
		cmocka_unit_test(test_within_a_prompt),
		cmocka_unit_test(test_threshold),
		cmocka_unit_test(test_adakv_is_not_monotone),
		cmocka_unit_test(test_once_is_not_monotone),
		cmocka_unit_test(test_churn),
		cmocka_unit_test(test_together),
		cmocka_unit_test(test_large_pairs),
		cmocka_unit_test(test_decoding_goes_on),
		cmocka_unit_test(test_budget),
		cmocka_unit_test(test_little_host_memory),
		cmocka_unit_test(test_little_device_memory),
		cmocka_unit_test(test_waits_for_memory),
		cmocka_unit_test(test_promise_holds),
		cmocka_unit_test(test_frames_go_with_their_sequence),
		cmocka_unit_test(test_death_on_the_way),
		cmocka_unit_test(test_refusals),
		cmocka_unit_test(test_without_a_tier),
	};

	return runner_run("recall", tests, sizeof(tests) / sizeof(tests[0]));
}
