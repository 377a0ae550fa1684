#include "tests/support/runner.h"

#include "kernels/host/dtype.h"
#include "kernels/host/gate.h"
#include "tests/unit/kernels/random.h"

#include <cblas.h>
#include <errno.h>
#include <math.h>
#include <string.h>

/* A gate's weights and inputs, all owned. */
struct fixture {
	uint32_t heads, group, hidden, width, sinks;
	size_t rows;
	float *wq, *bq, *wk, *b, *q_norm, *k_norm, *k_base;
	uint16_t *h; /* [rows][hidden] bf16 */
	float *scores;
};

static struct kvg_gate_weights weights_of(const struct fixture *f)
{
	return (struct kvg_gate_weights){f->heads, f->group, f->hidden, f->width, f->sinks, f->wq, f->bq, f->wk, f->b,
		f->q_norm, f->k_norm, f->k_base};
}

static void fixture_init(struct fixture *f, struct random *random, float scale)
{
	size_t queries = (size_t)f->heads * f->group * f->width, values = f->rows * f->hidden;
	float *hidden = random_floats(random, values, scale);

	f->wq = random_floats(random, queries * f->hidden, 0.3f);
	f->bq = random_floats(random, queries, 0.5f);
	f->wk = random_floats(random, (size_t)f->heads * f->width * f->hidden, 0.3f);
	f->b = random_floats(random, (size_t)f->heads * f->group, 2.0f);
	f->q_norm = random_floats(random, f->width, 1.5f);
	f->k_norm = random_floats(random, f->width, 1.5f);
	f->k_base = random_floats(random, (size_t)f->heads * f->sinks * f->width, 1.0f);
	f->h = malloc(values * 2 + 2);
	kvg_dtype_store(KVG_KERNEL_BF16, f->h, hidden, values);
	f->scores = malloc(f->rows * f->heads * sizeof(float) + 1);
	free(hidden);
}

static void fixture_deinit(struct fixture *f)
{
	free(f->wq);
	free(f->bq);
	free(f->wk);
	free(f->b);
	free(f->q_norm);
	free(f->k_norm);
	free(f->k_base);
	free(f->h);
	free(f->scores);
}

static void score(const struct fixture *f, const uint16_t *h)
{
	struct kvg_gate_weights weights = weights_of(f);
	struct kvg_gate *gate = NULL;
	void *scratch;

	assert_int_equal(kvg_gate_new(&weights, &gate), 0);
	scratch = aligned_new(kvg_gate_scratch(gate, f->rows));
	memset(scratch, 0xff, kvg_gate_scratch(gate, f->rows)); /* NaN */
	kvg_gate_score(gate, h, f->rows, f->scores, scratch);
	free(scratch);
	assert_null(kvg_gate_free(gate));
}

static void normed(const double *in, const float *weight, uint32_t width, double *out)
{
	double sum = 0;

	for (uint32_t i = 0; i < width; i++)
		sum += in[i] * in[i];
	for (uint32_t i = 0; i < width; i++)
		out[i] = in[i] / sqrt(sum / width + 1e-6) * (double)weight[i];
}

static void project(const struct fixture *f, size_t row, const float *w, const float *bias, double *out)
{
	for (uint32_t i = 0; i < f->width; i++) {
		out[i] = bias ? (double)bias[i] : 0.0;
		for (uint32_t j = 0; j < f->hidden; j++) {
			float h;

			kvg_dtype_load(KVG_KERNEL_BF16, &h, &f->h[row * f->hidden + j], 1);
			out[i] += (double)h * (double)w[(size_t)i * f->hidden + j];
		}
	}
}

/* The definition, in doubles: one score. */
static double define(const struct fixture *f, size_t row, uint32_t head)
{
	double q[64], k[64], scale = 1.0 / sqrt(f->width), mean = 0;

	project(f, row, f->wk + (size_t)head * f->width * f->hidden, NULL, k);
	normed(k, f->k_norm, f->width, k);
	for (uint32_t g = 0; g < f->group; g++) {
		size_t query = (size_t)head * f->group + g;
		double z = (double)f->b[query], sum = 1.0;

		project(f, row, f->wq + query * f->width * f->hidden, f->bq + query * f->width, q);
		normed(q, f->q_norm, f->width, q);
		for (uint32_t i = 0; i < f->width; i++)
			z += q[i] * k[i] * scale;
		for (uint32_t s = 0; s < f->sinks; s++) {
			double zs = 0;

			for (uint32_t i = 0; i < f->width; i++)
				zs += q[i] * (double)f->k_base[((size_t)head * f->sinks + s) * f->width + i] * scale;
			sum += exp(zs - z);
		}
		mean += 1.0 / sum / f->group;
	}
	return mean;
}

static void assert_scores(const struct fixture *f)
{
	for (size_t row = 0; row < f->rows; row++)
		for (uint32_t head = 0; head < f->heads; head++)
			assert_true(fabs((double)f->scores[row * f->heads + head] - define(f, row, head)) <= 2e-5);
}

static void test_definition(void **state)
{
	static const struct fixture shapes[] = {
		{.heads = 1, .group = 1, .hidden = 1, .width = 1, .sinks = 1, .rows = 1},
		{.heads = 2, .group = 1, .hidden = 33, .width = 16, .sinks = 16, .rows = 15},
		{.heads = 3, .group = 5, .hidden = 40, .width = 16, .sinks = 16, .rows = 17},
		{.heads = 1, .group = 7, .hidden = 64, .width = 13, .sinks = 3, .rows = 257},
		{.heads = 2, .group = 2, .hidden = 24, .width = 40, .sinks = 20, .rows = 600},
	};
	struct random random = {19};

	(void)state;
	for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) {
		struct fixture f = shapes[i];

		fixture_init(&f, &random, 1.0f);
		score(&f, f.h);
		assert_scores(&f);
		fixture_deinit(&f);
	}
}

/* The result of a row does not depend on the rows around it, nor on the alignment of the input. */
static void test_rows_alone_and_unaligned(void **state)
{
	struct fixture f = {.heads = 2, .group = 3, .hidden = 31, .width = 16, .sinks = 4, .rows = 300};
	struct random random = {23};
	uint16_t *shifted = malloc(300 * 31 * 2 + 2);
	float *all = malloc(300 * 2 * sizeof(float));

	(void)state;
	fixture_init(&f, &random, 1.0f);
	score(&f, f.h);
	memcpy(all, f.scores, 300 * 2 * sizeof(float));
	memcpy(shifted + 1, f.h, 300 * 31 * 2);
	for (size_t row = 0; row < 300; row += 7) {
		f.rows = 1;
		score(&f, shifted + 1 + row * 31);
		assert_true(fabsf(f.scores[0] - all[row * 2]) <= 1e-6f);
		assert_true(fabsf(f.scores[1] - all[row * 2 + 1]) <= 1e-6f);
	}
	free(shifted);
	free(all);
	fixture_deinit(&f);
}

static void test_equal_sinks_fold(void **state)
{
	struct fixture f = {.heads = 4, .group = 2, .hidden = 48, .width = 16, .sinks = 16, .rows = 100};
	struct random random = {29};
	struct kvg_gate_weights weights;
	struct kvg_gate *gate = NULL;

	(void)state;
	fixture_init(&f, &random, 1.0f);
	for (uint32_t head = 0; head < 4; head++)
		for (uint32_t s = 1; s < 16; s++)
			memcpy(f.k_base + (head * 16 + s) * 16, f.k_base + head * 16 * 16, 16 * sizeof(float));
	weights = weights_of(&f);
	assert_int_equal(kvg_gate_new(&weights, &gate), 0);
	assert_int_equal(kvg_gate_folded(gate), 1);
	kvg_gate_free(gate);
	score(&f, f.h);
	assert_scores(&f);

	f.k_base[(3 * 16 + 15) * 16 + 15] += 1e-3f;
	assert_int_equal(kvg_gate_new(&weights, &gate), 0);
	assert_int_equal(kvg_gate_folded(gate), 0);
	kvg_gate_free(gate);
	score(&f, f.h);
	assert_scores(&f);
	fixture_deinit(&f);
}

static void test_zero_weights_give_one_of_17(void **state)
{
	struct fixture f = {.heads = 2, .group = 2, .hidden = 8, .width = 16, .sinks = 16, .rows = 20};
	struct random random = {31};

	(void)state;
	fixture_init(&f, &random, 1.0f);
	memset(f.wq, 0, sizeof(float) * 2 * 2 * 16 * 8);
	memset(f.bq, 0, sizeof(float) * 2 * 2 * 16);
	memset(f.wk, 0, sizeof(float) * 2 * 16 * 8);
	memset(f.b, 0, sizeof(float) * 2 * 2);
	memset(f.k_base, 0, sizeof(float) * 2 * 16 * 16);
	score(&f, f.h);
	for (size_t i = 0; i < 40; i++)
		assert_true(fabsf(f.scores[i] - 1.0f / 17.0f) <= 1e-8f);
	fixture_deinit(&f);
}

/* Logits far beyond the range of exp saturate at 0 and 1; bad rows score 0 and leave their neighbours alone. */
static void test_extremes(void **state)
{
	struct fixture f = {.heads = 2, .group = 1, .hidden = 16, .width = 16, .sinks = 16, .rows = 40};
	struct random random = {37};
	float good;

	(void)state;
	fixture_init(&f, &random, 1.0f);
	f.b[0] = 1e4f;
	f.b[1] = -1e4f;
	score(&f, f.h);
	for (size_t row = 0; row < 40; row++) {
		assert_true(f.scores[row * 2] == 1.0f);
		assert_true(f.scores[row * 2 + 1] == 0.0f);
	}
	f.b[0] = f.b[1] = 0.0f;
	score(&f, f.h);
	good = f.scores[8 * 2];
	f.h[7 * 16] = 0x7fc0; /* NaN */
	f.h[9 * 16] = 0x7f80; /* infinity */
	score(&f, f.h);
	for (size_t head = 0; head < 2; head++) {
		assert_true(f.scores[7 * 2 + head] == 0.0f);
		assert_true(f.scores[9 * 2 + head] == 0.0f);
	}
	assert_true(fabsf(f.scores[8 * 2] - good) <= 1e-6f);
	for (size_t i = 0; i < 80; i++)
		assert_true(f.scores[i] >= 0.0f && f.scores[i] <= 1.0f);
	fixture_deinit(&f);
}

static void test_refuses_absurd_shapes(void **state)
{
	static const float one = 1.0f;
	const struct kvg_gate_weights good = {1, 1, 1, 1, 1, &one, &one, &one, &one, &one, &one, &one};
	struct kvg_gate *gate = NULL;

	(void)state;
	for (size_t field = 0; field < 5; field++)
		for (size_t i = 0; i < 2; i++) {
			struct kvg_gate_weights weights = good;
			uint32_t *fields[] = {
				&weights.heads, &weights.group, &weights.hidden, &weights.width, &weights.sinks};

			*fields[field] = i ? UINT32_MAX : 0;
			assert_int_equal(kvg_gate_new(&weights, &gate), -EINVAL);
			assert_null(gate);
		}
	struct kvg_gate_weights missing = good;

	missing.k_base = NULL;
	assert_int_equal(kvg_gate_new(&missing, &gate), -EINVAL);
	assert_int_equal(kvg_gate_new(&good, &gate), 0);
	assert_null(kvg_gate_free(gate));
	assert_null(kvg_gate_free(NULL));
}

/* A tile's memory is the most that any number of rows takes. */
static void test_scratch_is_bounded(void **state)
{
	static const float one = 1.0f;
	const struct kvg_gate_weights weights = {1, 1, 1, 1, 1, &one, &one, &one, &one, &one, &one, &one};
	struct kvg_gate *gate = NULL;

	(void)state;
	assert_int_equal(kvg_gate_new(&weights, &gate), 0);
	assert_true(kvg_gate_scratch(gate, 1) < kvg_gate_scratch(gate, 200));
	assert_int_equal(kvg_gate_scratch(gate, 300), kvg_gate_scratch(gate, 16000));
	kvg_gate_free(gate);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_definition),
		cmocka_unit_test(test_rows_alone_and_unaligned),
		cmocka_unit_test(test_equal_sinks_fold),
		cmocka_unit_test(test_zero_weights_give_one_of_17),
		cmocka_unit_test(test_extremes),
		cmocka_unit_test(test_refuses_absurd_shapes),
		cmocka_unit_test(test_scratch_is_bounded),
	};

	openblas_set_num_threads(1);
	return runner_run("kernels/gate", tests, sizeof(tests) / sizeof(*tests));
}
