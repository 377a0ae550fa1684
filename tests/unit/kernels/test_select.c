#include "tests/support/runner.h"

#include "kernels/host/select.h"
#include "proto/kvgate_abi.h"
#include "tests/unit/kernels/random.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <time.h>

/* Rows of scores, the result and what it should be; made by fixture_init() from row lengths. */
struct fixture {
	struct kvg_select_input in;
	size_t rows, count;
	size_t *offset;
	float *scores;
	uint8_t *keep, *expected;
	void *scratch;
};

static void fixture_init(struct fixture *f, uint32_t layers, uint32_t heads, const uint32_t *lengths)
{
	f->rows = (size_t)layers * heads;
	f->offset = malloc((f->rows + 1) * sizeof(*f->offset));
	f->offset[0] = 0;
	for (size_t row = 0; row < f->rows; row++)
		f->offset[row + 1] = f->offset[row] + lengths[row];
	f->count = f->offset[f->rows];
	f->scores = malloc(f->count * sizeof(float) + 1);
	f->keep = malloc(f->count + 1);
	f->expected = malloc(f->count + 1);
	f->scratch = aligned_new(kvg_select_scratch(f->count, f->rows));
	f->in = (struct kvg_select_input){f->scores, f->offset, layers, heads};
}

static void fixture_deinit(struct fixture *f)
{
	free(f->offset);
	free(f->scores);
	free(f->keep);
	free(f->expected);
	free(f->scratch);
}

/* ---- the rules as they are written, with a full sort ---- */

static int descending(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x < y) - (x > y);
}

static float *sorted(const float *scores, size_t n)
{
	float *copy = malloc(n * sizeof(float) + 1);

	memcpy(copy, scores, n * sizeof(float));
	qsort(copy, n, sizeof(float), descending);
	return copy;
}

static void rule_pair(const float *scores, size_t n, double ratio, uint8_t *keep)
{
	size_t share = (size_t)((double)n * ratio);
	float *copy = sorted(scores, n);

	for (size_t i = 0; i < n; i++)
		keep[i] = scores[i] > copy[share ? share - 1 : 0];
	free(copy);
}

/* i is among the k best: fewer than k are greater, or equal and before it. */
static void rule_top(const float *scores, size_t n, size_t k, uint8_t *keep)
{
	for (size_t i = 0; i < n; i++) {
		size_t better = 0;

		for (size_t j = 0; j < n; j++)
			better += scores[j] > scores[i] || (scores[j] == scores[i] && j < i);
		keep[i] = better < k;
	}
}

static void rule_adakv(const struct fixture *f, uint32_t layer, double ratio)
{
	size_t first = layer * f->in.heads, begin = f->offset[first], n = f->offset[first + f->in.heads] - begin;
	float *scores = malloc(n * sizeof(float) + 1);
	uint8_t *safe = calloc(n + 1, 1);

	for (size_t row = first; row < first + f->in.heads; row++) {
		size_t length = f->offset[row + 1] - f->offset[row];

		rule_top(f->scores + f->offset[row], length, (size_t)(0.2 * floor((double)length * ratio)),
			safe + f->offset[row] - begin);
	}
	for (size_t i = 0; i < n; i++)
		scores[i] = safe[i] ? INFINITY : f->scores[begin + i];
	rule_pair(scores, n, ratio, f->expected + begin);
	for (size_t i = 0; i < n; i++)
		f->expected[begin + i] |= safe[i];
	free(scores);
	free(safe);
}

static void rule(const struct fixture *f, uint32_t level, double ratio)
{
	if (level == KVG_SELECT_PAIR)
		rule_pair(f->scores, f->count, ratio, f->expected);
	for (size_t row = 0; level == KVG_SELECT_PAIR_HEAD && row < f->rows; row++) {
		size_t n = f->offset[row + 1] - f->offset[row];

		rule_top(f->scores + f->offset[row], n, (size_t)((double)n * ratio), f->expected + f->offset[row]);
	}
	for (uint32_t layer = 0; level == KVG_SELECT_PAIR_LAYER && layer < f->in.layers; layer++) {
		size_t begin = f->offset[layer * f->in.heads], end = f->offset[(layer + 1) * f->in.heads];

		rule_pair(f->scores + begin, end - begin, ratio, f->expected + begin);
	}
	for (uint32_t layer = 0; level == KVG_SELECT_ADAKV_LAYER && layer < f->in.layers; layer++)
		rule_adakv(f, layer, ratio);
}

static void rule_budget(const struct fixture *f, uint64_t budget)
{
	float *copy = sorted(f->scores, f->count);

	for (size_t i = 0; i < f->count; i++)
		f->expected[i] = f->count <= budget || (budget && f->scores[i] >= copy[budget - 1]);
	free(copy);
}

/* ---- inputs ---- */

enum kind { UNIFORM, TIES, EQUAL, WILD, KINDS };

static float score_of_kind(struct random *random, enum kind kind)
{
	static const float wild[] = {0.0f, -0.0f, FLT_TRUE_MIN, -FLT_TRUE_MIN, FLT_MIN, FLT_MAX, -FLT_MAX, INFINITY,
		-INFINITY, 1.0f, 0.99999994f, 1e-40f};

	switch (kind) {
	case UNIFORM:
		return random_float(random) * 0.5f + 0.5f;
	case TIES:
		return (float)random_below(random, 16) / 16.0f;
	case EQUAL:
		return 0.25f;
	default:
		return random_below(random, 2) ? wild[random_below(random, 12)] : random_float(random) * 1e-38f;
	}
}

static void fixture_random(struct fixture *f, struct random *random, int uniform)
{
	uint32_t layers = 1 + random_below(random, 4), heads = 1 + random_below(random, 4), lengths[16];
	uint32_t most = random_below(random, 4) ? 60 : 300, length = random_below(random, most);
	enum kind kind = (enum kind)random_below(random, KINDS);

	for (size_t row = 0; row < 16; row++)
		lengths[row] = uniform ? length : random_below(random, most) * random_below(random, 2);
	fixture_init(f, layers, heads, lengths);
	for (size_t i = 0; i < f->count; i++)
		f->scores[i] = score_of_kind(random, kind);
}

static void assert_expected(const struct fixture *f)
{
	for (size_t i = 0; i < f->count; i++)
		assert_int_equal(f->keep[i], f->expected[i]);
}

/* ---- tests ---- */

static void test_levels_are_the_abi(void **state)
{
	(void)state;
	assert_int_equal(KVG_SELECT_PAIR, KVG_LEVEL_PAIR);
	assert_int_equal(KVG_SELECT_PAIR_HEAD, KVG_LEVEL_PAIR_HEAD);
	assert_int_equal(KVG_SELECT_PAIR_LAYER, KVG_LEVEL_PAIR_LAYER);
	assert_int_equal(KVG_SELECT_ADAKV_LAYER, KVG_LEVEL_ADAKV_LAYER);
}

static void test_ratio_against_sort(void **state)
{
	static const double ratios[] = {0.0, 0.001, 0.1, 1.0 / 3, 0.5, 0.9, 0.999999};
	struct random random = {53};

	(void)state;
	for (size_t round = 0; round < 1500; round++) {
		struct fixture f;
		double ratio = ratios[random_below(&random, 7)];

		fixture_random(&f, &random, round % 2);
		for (uint32_t level = KVG_SELECT_PAIR; level <= KVG_SELECT_ADAKV_LAYER; level++) {
			memset(f.keep, 0xee, f.count);
			kvg_select_ratio(&f.in, level, ratio, f.keep, f.scratch);
			rule(&f, level, ratio);
			assert_expected(&f);
		}
		kvg_select_ratio(&f.in, KVG_SELECT_PAIR, 1.0, f.keep, f.scratch);
		memset(f.expected, 1, f.count);
		assert_expected(&f);
		fixture_deinit(&f);
	}
}

static void test_budget_against_sort(void **state)
{
	struct random random = {59};

	(void)state;
	for (size_t round = 0; round < 1500; round++) {
		struct fixture f;
		uint64_t budget;

		fixture_random(&f, &random, 0);
		budget = random_below(&random, 4) ? random_below(&random, (uint32_t)f.count + 2) : 0;
		kvg_select_budget(&f.in, budget, f.keep, f.scratch);
		rule_budget(&f, budget);
		assert_expected(&f);
		fixture_deinit(&f);
	}
}

static void test_threshold(void **state)
{
	struct random random = {61};

	(void)state;
	for (size_t round = 0; round < 200; round++) {
		struct fixture f;

		fixture_random(&f, &random, 0);
		kvg_select_threshold(&f.in, 0.25f, f.keep);
		for (size_t i = 0; i < f.count; i++)
			f.expected[i] = f.scores[i] > 0.25f;
		assert_expected(&f);
		fixture_deinit(&f);
	}
}

/* What was kept stays, and each row gets its best others, up to the floor. */
static void test_floor(void **state)
{
	struct random random = {67};

	(void)state;
	for (size_t round = 0; round < 1500; round++) {
		struct fixture f;
		uint32_t floor = random_below(&random, 9);

		fixture_random(&f, &random, 0);
		for (size_t i = 0; i < f.count; i++)
			f.keep[i] = random_below(&random, 16) == 0;
		memcpy(f.expected, f.keep, f.count);
		for (size_t row = 0; row < f.rows; row++) {
			size_t kept = 0;

			for (size_t i = f.offset[row]; i < f.offset[row + 1]; i++)
				kept += f.expected[i];
			for (; kept < floor && kept < f.offset[row + 1] - f.offset[row]; kept++) {
				size_t best = f.count;

				for (size_t i = f.offset[row]; i < f.offset[row + 1]; i++)
					if (!f.expected[i] && (best == f.count || f.scores[i] > f.scores[best]))
						best = i;
				f.expected[best] = 1;
			}
		}
		kvg_select_floor(&f.in, floor, f.keep, f.scratch);
		assert_expected(&f);
		fixture_deinit(&f);
	}
}

/* Sub-ranges: a row table that does not start at 0 leaves what lies before it alone. */
static void test_first_offset(void **state)
{
	static const uint32_t lengths[] = {10, 20, 20};
	struct fixture f;
	struct random random = {71};

	(void)state;
	fixture_init(&f, 1, 3, lengths);
	for (size_t i = 0; i < f.count; i++)
		f.scores[i] = random_float(&random);
	struct kvg_select_input rest = {f.scores, f.offset + 1, 1, 2};

	for (uint32_t level = KVG_SELECT_PAIR; level <= KVG_SELECT_ADAKV_LAYER; level++) {
		memset(f.keep, 0xee, f.count);
		kvg_select_ratio(&rest, level, 0.5, f.keep, f.scratch);
		for (size_t i = 0; i < f.count; i++)
			assert_true(i < 10 ? f.keep[i] == 0xee : f.keep[i] <= 1);
	}
	memset(f.keep, 0xee, f.count);
	kvg_select_budget(&rest, 7, f.keep, f.scratch);
	assert_int_equal(f.keep[9], 0xee);
	rule_top(f.scores + 10, 40, 7, f.expected + 10);
	assert_memory_equal(f.keep + 10, f.expected + 10, 40);
	fixture_deinit(&f);
}

static void test_huge(void **state)
{
	static const uint32_t lengths[] = {2000000, 1};
	struct random random = {73};
	struct fixture f;

	(void)state;
	fixture_init(&f, 1, 2, lengths);
	for (size_t i = 0; i < f.count; i++)
		f.scores[i] = score_of_kind(&random, i % 2 ? UNIFORM : TIES);
	kvg_select_ratio(&f.in, KVG_SELECT_PAIR, 0.3, f.keep, f.scratch);
	rule(&f, KVG_SELECT_PAIR, 0.3);
	assert_memory_equal(f.keep, f.expected, f.count);
	kvg_select_budget(&f.in, 12345, f.keep, f.scratch);
	rule_budget(&f, 12345);
	assert_memory_equal(f.keep, f.expected, f.count);
	fixture_deinit(&f);
}

/* Scores that are not numbers break the caller's promise; they must not break memory. */
static void test_nan_is_harmless(void **state)
{
	static const uint32_t lengths[] = {40, 40};
	struct fixture f;

	(void)state;
	fixture_init(&f, 1, 2, lengths);
	for (size_t i = 0; i < f.count; i++)
		f.scores[i] = i % 3 ? NAN : -NAN;
	for (uint32_t level = KVG_SELECT_PAIR; level <= KVG_SELECT_ADAKV_LAYER; level++) {
		memset(f.keep, 0xee, f.count);
		kvg_select_ratio(&f.in, level, 0.5, f.keep, f.scratch);
		for (size_t i = 0; i < f.count; i++)
			assert_true(f.keep[i] <= 1);
	}
	fixture_deinit(&f);
}

static void test_prefill_params(void **state)
{
	double ratio = -1;
	uint64_t window = 77;

	(void)state;
	kvg_select_prefill_params(2600, 1000, 0.3, 256, 0, &ratio, &window);
	assert_int_equal(window, 256);
	assert_true(ratio == (0.3 * 2600 - 256) / (2600 - 256));
	kvg_select_prefill_params(2600, 100000, 0.3, 256, 0, &ratio, &window); /* shorter than a chunk: 2% */
	assert_int_equal(window, 52);
	assert_true(ratio == (0.3 * 2600 - 52) / (2600 - 52));
	kvg_select_prefill_params(2600, 2600, 0.3, 256, 0, &ratio, &window);
	assert_int_equal(window, 256);
	kvg_select_prefill_params(2600, 0, 0.3, 256, 0, &ratio, &window); /* one chunk, however long */
	assert_int_equal(window, 52);
	kvg_select_prefill_params(2600, 100000, 0.3, 256, 1, &ratio, &window);
	assert_int_equal(window, 256);
	kvg_select_prefill_params(3000, 1000, 0.3, 4096, 0, &ratio, &window); /* only the window is left */
	assert_int_equal(window, 900);
	assert_true(ratio == 0.0);
	kvg_select_prefill_params(100, 10, 1.0, 100, 1, &ratio, &window);
	assert_int_equal(window, 100);
	assert_true(ratio == 1.0);
	kvg_select_prefill_params(100, 10, 1.0, 4096, 1, &ratio, &window);
	assert_int_equal(window, 100);
	kvg_select_prefill_params(0, 10, 0.5, 0, 0, &ratio, &window);
	assert_int_equal(window, 0);
	assert_true(ratio == 0.0);
	kvg_select_prefill_params(10, 100, 0.5, 0, 1, &ratio, &window);
	assert_int_equal(window, 0);
	assert_true(ratio == 0.5);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The least of a few times that the selection of `rows` rows takes. */
static uint64_t time_of_rows(uint32_t rows, uint32_t length)
{
	struct random random = {71};
	uint32_t *lengths = malloc(rows * sizeof(*lengths));
	uint64_t best = UINT64_MAX;
	struct fixture f;

	for (uint32_t row = 0; row < rows; row++)
		lengths[row] = length;
	fixture_init(&f, 1, rows, lengths);
	free(lengths);
	for (size_t i = 0; i < f.count; i++)
		f.scores[i] = score_of_kind(&random, UNIFORM);
	for (unsigned i = 0; i < 5; i++) {
		uint64_t begun = now_ns(), ns;

		kvg_select_ratio(&f.in, KVG_SELECT_PAIR_HEAD, 0.5, f.keep, f.scratch);
		ns = now_ns() - begun;
		best = ns < best ? ns : best;
	}
	fixture_deinit(&f);
	return best;
}

/* Many small selections (a recall has one for each chunk, however short) cost about as much as one large one. */
static void test_small_rows(void **state)
{
	uint64_t small = time_of_rows(20000, 8), large = time_of_rows(1, 160000);

	(void)state;
	if (small > 12 * large)
		fail_msg("20000 rows of 8: %" PRIu64 " ns, one of 160000: %" PRIu64 " ns", small, large);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_levels_are_the_abi),
		cmocka_unit_test(test_ratio_against_sort),
		cmocka_unit_test(test_budget_against_sort),
		cmocka_unit_test(test_threshold),
		cmocka_unit_test(test_floor),
		cmocka_unit_test(test_first_offset),
		cmocka_unit_test(test_huge),
		cmocka_unit_test(test_nan_is_harmless),
		cmocka_unit_test(test_prefill_params),
		cmocka_unit_test(test_small_rows),
	};

	return runner_run("kernels/select", tests, sizeof(tests) / sizeof(*tests));
}
