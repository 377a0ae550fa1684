/*
 * Which pairs come back: exactly those that an eviction at the other ratio, or budget, would have kept; by the naive
 * oracle, and by the golden masks.
 */
#include "daemon/sequence/recall.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/safetensors.h"
#include "tests/support/recall_model.h"

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
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
	struct model *whole = recall_read_prompt(fixture, policy, high, pattern, protect);
	struct model *model = recall_read_prompt(fixture, policy, low, pattern, protect);
	uint64_t before = model_pairs(model), came;

	assert_true(is_part(model, whole) || !is_monotone(policy, low));
	assert_int_equal(recall_retained(model), 505 * model->rows - before);
	came = recall_take_over(model, whole);
	if (recall_ratio(model, high) < 0)
		fail_msg("%s", fixture->text);
	recall_check(model, came);
	assert_int_equal(recall_retained(model), 505 * model->rows - before - came);
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
	struct kvg_policy policy = recall_policy;

	(void)state;
	policy.chunk_tokens = 0;
	policy.flags &= (uint16_t)~KVG_POLICY_WINDOW_ABSOLUTE;
	every_level_and_pattern(policy);
}

/* Ranges are decided one by one, with the borders that they have at the greater ratio. */
static void test_several_ranges(void **state)
{
	(void)state;
	every_level_and_pattern(recall_policy);
}

static void test_once(void **state)
{
	struct kvg_policy policy = recall_policy;

	(void)state;
	policy.mode = KVG_MODE_ONCE;
	every_level_and_pattern(policy);
}

static void test_everything_comes_back(void **state)
{
	(void)state;
	for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
		struct kvg_policy policy = recall_policy;
		struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
		struct model *whole = recall_read_prompt(fixture, &policy, 1.0, (enum score_pattern)pattern, false);
		struct model *model = recall_read_prompt(fixture, &policy, 0.1, (enum score_pattern)pattern, false);
		uint64_t came = recall_take_over(model, whole);

		assert_int_equal(recall_ratio(model, 1.0), 0);
		recall_check(model, came);
		assert_int_equal(recall_retained(model), 0);
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
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST, .max_sequences = 16});
	struct model *model = recall_read_prompt(fixture, &recall_policy, 0.05, SCORES_RANDOM, false);

	(void)state;
	for (size_t i = 0; i < sizeof(ratios) / sizeof(ratios[0]); i++) {
		struct model *whole = recall_read_prompt(fixture, &recall_policy, ratios[i], SCORES_RANDOM, false);
		uint64_t came = recall_take_over(model, whole);

		assert_true(came > 0);
		assert_int_equal(recall_ratio(model, ratios[i]), 0);
		recall_check(model, came);
		assert_int_equal(recall_ratio(model, 0.05), 0); /* less than is held: nothing goes */
		recall_check(model, 0);
		model_release(whole);
	}
	model_release(model);
	fixture_free(fixture);
}

/* A threshold's evictions know no ratio: what CHUNKED keeps comes back besides. */
static void test_threshold(void **state)
{
	(void)state;
	for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
		struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
		struct kvg_policy policy = recall_policy;
		struct model *whole = recall_read_prompt(fixture, &policy, 0.4, (enum score_pattern)pattern, true),
			     *model;
		uint64_t came;

		policy.mode = KVG_MODE_THRESHOLD;
		policy.threshold = 0.85f;
		model = recall_read_prompt(fixture, &policy, 0.1, (enum score_pattern)pattern, true);
		came = recall_take_over(model, whole);
		assert_int_equal(recall_ratio(model, 0.4), 0);
		recall_check(model, came);
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
	struct fixture *fixture =
		fixture_new(&(struct fixture_options){.host_size = RECALL_HOST, .layers = 1, .heads = 4});
	struct kvg_policy policy = {.mode = KVG_MODE_CHUNKED,
		.level = KVG_LEVEL_ADAKV_LAYER,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE | KVG_POLICY_RETAIN_HOST,
		.context_tokens = 100};
	struct model *whole = recall_read_prompt(fixture, &policy, 0.05, SCORES_ONE_ROW, false);
	struct model *model = recall_read_prompt(fixture, &policy, 0.0499, SCORES_ONE_ROW, false);
	uint64_t came;

	(void)state;
	assert_false(is_part(model, whole));
	came = recall_take_over(model, whole);
	assert_true(came > 0);
	assert_int_equal(recall_ratio(model, 0.05), 0);
	recall_check(model, came);
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
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
	struct kvg_policy policy = recall_policy;
	struct model *whole, *model;
	uint64_t came;

	(void)state;
	policy.mode = KVG_MODE_ONCE;
	whole = recall_read_prompt(fixture, &policy, 0.052, SCORES_RANDOM, false);
	model = recall_read_prompt(fixture, &policy, 0.0518, SCORES_RANDOM, false);
	assert_false(is_part(model, whole));
	came = recall_take_over(model, whole);
	assert_int_equal(came, model->rows); /* the window is one position wider */
	assert_int_equal(recall_ratio(model, 0.052), 0);
	recall_check(model, came);
	model_release(whole);
	model_release(model);
	fixture_free(fixture);
}

/* A budget event, then a greater budget: the pairs of an event with that. */
static void compare_budgets(uint32_t floor, enum score_pattern pattern)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
	struct kvg_policy policy = recall_policy;
	struct model *whole, *model;
	uint64_t came;

	policy.floor = floor;
	policy.budget = 300;
	whole = recall_read_prompt(fixture, &policy, 1.0, pattern, true);
	policy.budget = 170;
	model = recall_read_prompt(fixture, &policy, 1.0, pattern, true);
	assert_int_equal(model_append(whole, 50), 0);
	assert_int_equal(model_append(model, 50), 0);
	model_evict(whole, KVG_EVICT_DECODE);
	model_evict(model, KVG_EVICT_DECODE);
	assert_true(is_part(model, whole));
	came = recall_take_over(model, whole);
	assert_int_equal(recall_budget(model, 300), 0);
	recall_check(model, came);
	came = 555 * model->rows - model_pairs(model);
	for (uint32_t row = 0; row < model->rows; row++)
		memset(model->held + (size_t)row * model->max_tokens, 1, model->committed);
	assert_int_equal(recall_budget(model, 4000), 0);
	recall_check(model, came);
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

/* ---- golden masks: evicted at 0.1, recalled to what the file has masks of, in all of its chunks ---- */

/* One mask, as its metadata says. */
struct golden {
	char scores[32], level[32];
	double ratio;
	unsigned chunk, window, prompt;
};

struct context {
	struct fixture *fixture;
	const struct kvg_tensor *scores; /* [layers][heads][tokens] */
	struct kvg_policy policy;
	uint64_t handle;
	uint32_t layers, heads, tokens;
};

static struct golden read_golden(const struct kvg_safetensors *file, unsigned index)
{
	struct golden golden;
	char name[32];

	(void)snprintf(name, sizeof(name), "keep_%u", index);
	assert_int_equal(
		sscanf(kvg_safetensors_metadata(file, name),
			"{\"scores\": \"%31[^\"]\", \"level\": \"%31[^\"]\", \"ratio\": %lf, \"chunk\": %u, "
			"\"window\": %u, "
			"\"system_prompt\": %u}",
			golden.scores, golden.level, &golden.ratio, &golden.chunk, &golden.window, &golden.prompt),
		6);
	return golden;
}

static uint8_t level_of(const char *name)
{
	static const char *const names[] = {"pair", "pair-head", "pair-layer", "adakv-layer"};

	for (uint8_t i = 0; i < 4; i++)
		if (strcmp(name, names[i]) == 0)
			return i;
	fail_msg("level %s", name);
	return 0;
}

static void append(struct context *context, uint32_t begin, uint32_t end)
{
	uint32_t prefix = context->policy.prefix_tokens, first = begin < prefix ? prefix : begin, n = end - first;
	float *staged = calloc((size_t)context->layers * context->heads * n, sizeof(float));
	const float *scores = context->scores->data;

	assert_non_null(staged);
	for (size_t layer = 0; layer < context->layers; layer++)
		for (size_t i = 0; i < n; i++)
			for (size_t head = 0; head < context->heads; head++)
				staged[(layer * n + i) * context->heads + head] =
					scores[(layer * context->heads + head) * context->tokens + first - prefix + i];
	assert_int_equal(fixture_reserve(context->fixture, context->handle, end - begin), 0);
	assert_int_equal(fixture_stage(context->fixture, context->handle, first, n, staged), 0);
	assert_int_equal(fixture_commit(context->fixture, context->handle, end), 0);
	assert_int_equal(fixture_evict(context->fixture, context->handle, KVG_EVICT_PREFILL), 0);
	free(staged);
}

static struct context read_golden_prompt(const struct kvg_safetensors *file, const struct golden *golden)
{
	struct context context = {.scores = kvg_safetensors_find(file, golden->scores)};
	uint32_t total;

	assert_non_null(context.scores);
	context.layers = (uint32_t)context.scores->shape[0];
	context.heads = (uint32_t)context.scores->shape[1];
	context.tokens = (uint32_t)context.scores->shape[2];
	total = context.tokens + golden->prompt;
	context.policy = (struct kvg_policy){.ratio = 0.1,
		.mode = KVG_MODE_CHUNKED,
		.level = level_of(golden->level),
		.flags = KVG_POLICY_RETAIN_HOST,
		.prefix_tokens = golden->prompt,
		.context_tokens = context.tokens,
		.chunk_tokens = golden->chunk,
		.window = golden->window};
	context.fixture = fixture_new(
		&(struct fixture_options){.layers = context.layers, .heads = context.heads, .host_size = 16u << 20});
	assert_int_equal(fixture_create(context.fixture, &context.policy, &context.handle), 0);
	for (uint32_t at = 0; at < total;) {
		uint32_t end = golden->chunk < total - at ? at + golden->chunk : total;

		append(&context, at, end);
		at = end;
	}
	return context;
}

/* The positions that a row holds. */
static void list_row(const struct context *context, uint32_t row, uint8_t *ret_held)
{
	const struct space *space = context->fixture->space;
	uint32_t slot = (uint32_t)context->handle, length = *table_base_len(&space->table, slot, row);

	for (uint32_t i = 0; i < length; i++) {
		uint32_t id = table_row(&space->table, slot, row)[i / KVG_BLOCK_TOKENS];
		int32_t pos = blocks_places(space->arena, space->pool->meta, id)[i % KVG_BLOCK_TOKENS].pos;

		assert_in_range(pos, 0, context->tokens + context->policy.prefix_tokens - 1);
		assert_int_equal(ret_held[pos]++, 0);
	}
}

static void check_mask(const struct context *context, const struct kvg_tensor *mask)
{
	const uint8_t *keep = mask->data;
	uint32_t prefix = context->policy.prefix_tokens;
	uint8_t *held = malloc((size_t)context->tokens + prefix + 1);

	assert_non_null(held);
	for (uint32_t row = 0; row < context->layers * context->heads; row++) {
		memset(held, 0, context->tokens + prefix);
		list_row(context, row, held);
		for (uint32_t i = 0; i < prefix; i++)
			assert_int_equal(held[i], 1);
		if (memcmp(held + prefix, keep + (size_t)row * context->tokens, context->tokens) != 0)
			fail_msg("%s: row %u is not what it says", mask->name, row);
	}
	free(held);
}

static const struct kvg_tensor *find_mask(
	const struct kvg_safetensors *file, const struct golden *like, unsigned count, double ratio)
{
	char name[32];

	for (unsigned i = 0; i < count; i++) {
		struct golden golden = read_golden(file, i);

		(void)snprintf(name, sizeof(name), "keep_%u", i);
		if (strcmp(golden.scores, like->scores) == 0 && strcmp(golden.level, like->level) == 0 &&
			golden.chunk == like->chunk && golden.ratio == ratio)
			return kvg_safetensors_find(file, name);
	}
	fail_msg("%s, %s, chunk %u: no mask at %g", like->scores, like->level, like->chunk, ratio);
	return NULL;
}

static void test_golden_masks(void **state)
{
	static const double ratios[] = {0.3, 0.5, 0.9};
	struct kvg_safetensors *file;
	unsigned count, runs = 0;
	char text[256];

	(void)state;
	if (kvg_safetensors_open("golden/evict_prefill.safetensors", &file, text, sizeof(text)) < 0)
		fail_msg("%s", text);
	count = (unsigned)kvg_safetensors_count(file) - 2;
	for (unsigned i = 0; i < count; i++) {
		struct golden golden = read_golden(file, i);
		struct context context;

		if (golden.ratio != 0.1)
			continue;
		context = read_golden_prompt(file, &golden);
		check_mask(&context, find_mask(file, &golden, count, 0.1));
		for (unsigned k = 0; k < 3; k++) {
			struct kvg_sqe sqe = {.op = KVG_OP_RECALL, .seq = context.handle, .recall.ratio = ratios[k]};

			sqe.generation = fixture_generation(context.fixture, context.handle);
			assert_int_equal(fixture_call(context.fixture, &sqe), 0);
			assert_true(context.fixture->cqe.value[1] > 0);
			check_mask(&context, find_mask(file, &golden, count, ratios[k]));
		}
		assert_int_equal(fixture_release(context.fixture, context.handle), 0);
		fixture_free(context.fixture);
		runs++;
	}
	assert_int_equal(runs, 24);
	(void)kvg_safetensors_free(file);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_one_range),
		cmocka_unit_test(test_several_ranges),
		cmocka_unit_test(test_once),
		cmocka_unit_test(test_everything_comes_back),
		cmocka_unit_test(test_step_by_step),
		cmocka_unit_test(test_threshold),
		cmocka_unit_test(test_adakv_is_not_monotone),
		cmocka_unit_test(test_once_is_not_monotone),
		cmocka_unit_test(test_budget),
		cmocka_unit_test(test_golden_masks),
	};

	return runner_run("recall_select", tests, sizeof(tests) / sizeof(tests[0]));
}
