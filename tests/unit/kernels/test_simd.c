#include "tests/support/runner.h"

#include "kernels/host/simd.h"
#include "tests/unit/kernels/random.h"

#include <math.h>
#include <string.h>

static float float_of(uint32_t bits)
{
	float f;

	memcpy(&f, &bits, sizeof(f));
	return f;
}

static uint32_t bits_of(float f)
{
	uint32_t bits;

	memcpy(&bits, &f, sizeof(bits));
	return bits;
}

/* Equal bits, or both NaN. */
static void assert_same(float got, float expected)
{
	if (isnan(expected))
		assert_true(isnan(got));
	else
		assert_int_equal(bits_of(got), bits_of(expected));
}

static void test_tables(void **state)
{
	unsigned count = 0;
	const struct kvg_simd *last = NULL;

	(void)state;
	assert_string_equal(kvg_simd_at(0)->name, "baseline");
	while (kvg_simd_at(count))
		last = kvg_simd_at(count++);
	assert_ptr_equal(kvg_simd(), last);
	assert_null(kvg_simd_at(3));
}

/* IEEE binary16 by its definition. */
static float value_of_f16(uint16_t half)
{
	int exponent = half >> 10 & 31, mantissa = half & 1023;
	double value = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);

	if (exponent == 31)
		value = mantissa ? NAN : INFINITY;
	return (float)(half & 0x8000 ? -value : value);
}

/* Rounded to a multiple of the last place of its exponent, ties to even, in exact arithmetic. */
static uint16_t nearest_f16(float f)
{
	uint16_t sign = signbit(f) ? 0x8000 : 0;
	double magnitude = fabs((double)f);
	int exponent = magnitude < 0x1p-14 ? -14 : ilogb(magnitude);

	if (magnitude >= 65520.0)
		return sign | 0x7c00;
	int steps = (int)nearbyint(ldexp(magnitude, 10 - exponent));

	return (uint16_t)(sign | (steps + ((exponent + 14) << 10)));
}

static void test_loads_every_half(void **state)
{
	uint16_t *halves = malloc(65536 * 2);
	float *floats = malloc(65536 * sizeof(float));
	const struct kvg_simd *simd;

	(void)state;
	for (uint32_t i = 0; i < 65536; i++)
		halves[i] = (uint16_t)i;
	for (unsigned t = 0; (simd = kvg_simd_at(t)); t++) {
		simd->bf16_load(floats, halves, 65536);
		for (uint32_t i = 0; i < 65536; i++)
			assert_same(floats[i], float_of(i << 16));
		simd->f16_load(floats, halves, 65536);
		for (uint32_t i = 0; i < 65536; i++)
			assert_same(floats[i], value_of_f16((uint16_t)i));
	}
	free(halves);
	free(floats);
}

/* The nearest bf16 by distance, the even one of two equally near. */
static uint16_t nearest_bf16(float f)
{
	uint32_t low = bits_of(f) >> 16, high = low + 1;
	double below, above;

	if (isinf(f))
		return (uint16_t)low;
	below = fabs((double)f - (double)float_of(low << 16));
	/* the step beyond the largest finite value is as wide as the one below it */
	above = (high & 0x7f80) == 0x7f80 ? ldexp(1.0, 120) - below : fabs((double)float_of(high << 16) - (double)f);
	return (uint16_t)(below < above || (below == above && !(low & 1)) ? low : high);
}

static void assert_stored(const struct kvg_simd *simd, const float *floats, size_t count)
{
	uint16_t *halves = malloc((count + 1) * 2);

	simd->bf16_store(halves, floats, count);
	for (size_t i = 0; i < count; i++)
		if (isnan(floats[i]))
			assert_true((halves[i] & 0x7fff) > 0x7f80);
		else
			assert_int_equal(halves[i], nearest_bf16(floats[i]));
	simd->f16_store(halves, floats, count);
	for (size_t i = 0; i < count; i++)
		if (isnan(floats[i]))
			assert_true((halves[i] & 0x7fff) > 0x7c00);
		else
			assert_int_equal(halves[i], nearest_f16(floats[i]));
	free(halves);
}

/* Random bits of every exponent, and each rounding boundary of both types with its neighbours. */
static void test_stores(void **state)
{
	size_t count = 300000;
	float *floats = malloc(count * sizeof(float));
	struct random random = {3};
	const struct kvg_simd *simd;
	size_t n = 0;

	(void)state;
	for (uint32_t half = 0; half < 65536; half += 3)
		for (int step = -1; step <= 1; step++) {
			uint32_t middle = ((half & 0x7fff) << 13) + (112u << 23) + 0x1000;

			floats[n++] = float_of((half << 16) + 0x8000 + (uint32_t)step);
			floats[n++] = float_of((middle | (half & 0x8000) << 16) + (uint32_t)step);
			floats[n++] = ((float)(half & 1023) + 0.5f) * 0x1p-24f + (float)step * 0x1p-40f;
		}
	while (n < count)
		floats[n++] = float_of(random_bits(&random));
	for (unsigned t = 0; (simd = kvg_simd_at(t)); t++)
		assert_stored(simd, floats, count);
	free(floats);
}

/* Any length is converted whole and nothing behind it is touched. */
static void test_lengths(void **state)
{
	const struct kvg_simd *simd;
	struct random random = {5};

	(void)state;
	for (unsigned t = 0; (simd = kvg_simd_at(t)); t++)
		for (size_t count = 0; count < 50; count++) {
			float *in = random_floats(&random, count, 1.0f), *out = malloc((count + 1) * sizeof(float));
			uint16_t *halves = malloc((count + 1) * 2);

			halves[count] = 0xbeef;
			out[count] = 42.0f;
			simd->f16_store(halves, in, count);
			simd->f16_load(out, halves, count);
			for (size_t i = 0; i < count; i++)
				assert_true(fabsf(out[i] - in[i]) <= fabsf(in[i]) * 0x1p-11f + 0x1p-25f);
			simd->bf16_store(halves, in, count);
			simd->bf16_load(out, halves, count);
			for (size_t i = 0; i < count; i++)
				assert_true(fabsf(out[i] - in[i]) <= fabsf(in[i]) * 0x1p-8f);
			assert_int_equal(halves[count], 0xbeef);
			assert_true(out[count] == 42.0f);
			free(in);
			free(out);
			free(halves);
		}
}

/* exp, as the softmax shows it when the maximum so far is 0: within 2 ulp down to the smallest normal number. */
static void test_exp(void **state)
{
	const size_t count = 4096;
	float *row = malloc(count * sizeof(float)), *in = malloc(count * sizeof(float));
	const struct kvg_simd *simd;

	(void)state;
	for (size_t i = 0; i < count; i++)
		in[i] = -110.0f * (float)i / (float)count;
	in[count - 1] = -INFINITY;
	in[count - 2] = -1e30f;
	for (unsigned t = 0; (simd = kvg_simd_at(t)); t++) {
		struct kvg_simd_softmax softmax = {0.0f, 0.0f};
		double worst = 0;

		memcpy(row, in, count * sizeof(float));
		assert_true(simd->softmax(row, count, count, &softmax) == 1.0f);
		for (size_t i = 0; i < count; i++) {
			double expected = exp((double)in[i]), error = fabs((double)row[i] - expected);

			if (in[i] > -87.0f)
				worst = fmax(worst, error / expected);
			else
				assert_true(error <= 0x1p-148);
		}
		assert_true(worst <= 0x1p-22);
	}
	free(row);
	free(in);
}

/* Pieces of any length with the running state give what one softmax of everything gives; the rest becomes 0. */
static void test_softmax_in_pieces(void **state)
{
	struct random random = {9};
	const struct kvg_simd *simd;

	(void)state;
	for (unsigned t = 0; (simd = kvg_simd_at(t)); t++)
		for (size_t valid = 1; valid < 64; valid++) {
			float *all = random_floats(&random, 2 * valid, 20.0f), row[64];
			struct kvg_simd_softmax softmax = {-INFINITY, 0.0f};
			double sum = 0, largest = -INFINITY;

			for (size_t part = 0; part < 2; part++) {
				float before = softmax.max;
				float correction;

				memcpy(row, all + part * valid, valid * sizeof(float));
				memset(row + valid, 0x7f, (64 - valid) * sizeof(float));
				correction = simd->softmax(row, valid, 64, &softmax);
				assert_true(fabsf(correction - expf(before - softmax.max)) <= 1e-6f);
				for (size_t i = 0; i < valid; i++)
					assert_true(fabsf(row[i] - expf(all[part * valid + i] - softmax.max)) <= 1e-6f);
				for (size_t i = valid; i < 64; i++)
					assert_true(row[i] == 0.0f);
			}
			for (size_t i = 0; i < 2 * valid; i++)
				largest = fmax(largest, (double)all[i]);
			for (size_t i = 0; i < 2 * valid; i++)
				sum += exp((double)all[i] - largest);
			assert_true((double)softmax.max == largest);
			assert_true(fabs((double)softmax.sum - sum) <= 1e-5 * sum);
			free(all);
		}
}

static void check_products(const struct kvg_simd *simd, struct random *random, size_t rows, size_t keys, size_t dim)
{
	size_t ld = keys + 3;
	float *a = random_floats(random, rows * dim, 1.0f), *b = random_floats(random, keys * dim, 1.0f);
	float *logits = malloc((rows * ld + 1) * sizeof(float)), *out = random_floats(random, rows * dim, 1.0f);
	float *old = malloc(rows * dim * sizeof(float));

	memcpy(old, out, rows * dim * sizeof(float));
	simd->dots(a, rows, b, keys, dim, logits, ld);
	simd->mix(logits, rows, ld, b, keys, dim, out);
	for (size_t r = 0; r < rows; r++) {
		for (size_t k = 0; k < keys; k++) {
			double sum = 0;

			for (size_t i = 0; i < dim; i++)
				sum += (double)a[r * dim + i] * (double)b[k * dim + i];
			assert_true(fabs((double)logits[r * ld + k] - sum) <= 1e-5 * (double)dim);
		}
		for (size_t i = 0; i < dim; i++) {
			double sum = (double)old[r * dim + i];

			for (size_t k = 0; k < keys; k++)
				sum += (double)logits[r * ld + k] * (double)b[k * dim + i];
			assert_true(fabs((double)out[r * dim + i] - sum) <= 1e-5 * (double)(keys + dim));
		}
	}
	free(a);
	free(b);
	free(logits);
	free(out);
	free(old);
}

static void test_products(void **state)
{
	struct random random = {13};
	const struct kvg_simd *simd;

	(void)state;
	for (unsigned t = 0; (simd = kvg_simd_at(t)); t++)
		for (size_t rows = 1; rows < 6; rows++)
			for (size_t keys = 1; keys < 18; keys++)
				for (size_t dim = 16; dim <= 80; dim += 16)
					check_products(simd, &random, rows, keys, dim);
}

static void test_scale(void **state)
{
	const struct kvg_simd *simd;
	float row[48], guard = 3.0f;

	(void)state;
	for (unsigned t = 0; (simd = kvg_simd_at(t)); t++) {
		for (size_t i = 0; i < 48; i++)
			row[i] = (float)i;
		row[32] = guard;
		simd->scale(row, 32, 2.5f);
		for (size_t i = 0; i < 32; i++)
			assert_true(row[i] == 2.5f * (float)i);
		assert_true(row[32] == guard);
	}
}

/* The tables agree with each other on the gate; test_gate.c compares the best one with the definition. */
static void test_gate_of_all_tables(void **state)
{
	enum { HEADS = 3, GROUP = 2, WIDTH = 12, SINKS = 5, LD = 48, ROWS = 39 };
	size_t queries = HEADS * GROUP * WIDTH, columns = queries + HEADS * WIDTH;
	struct random random = {17};
	float *projected = random_floats(&random, columns * LD, 3.0f), *bq = random_floats(&random, queries, 1.0f);
	float *b = random_floats(&random, HEADS * GROUP, 1.0f), *qk = random_floats(&random, WIDTH, 1.0f);
	float *base = random_floats(&random, HEADS * SINKS * WIDTH, 1.0f);
	struct kvg_simd_gate gate = {HEADS, GROUP, WIDTH, SINKS, 1.0f, bq, b, qk, base};
	float expected[ROWS * HEADS], scores[ROWS * HEADS + 1];
	const struct kvg_simd *simd;

	(void)state;
	projected[5] = NAN; /* row 5 of column 0: head 0 alone */
	kvg_simd_at(0)->gate(&gate, projected, LD, ROWS, expected);
	assert_true(expected[5 * HEADS] == 0.0f && expected[5 * HEADS + 1] > 0.0f && expected[4 * HEADS] > 0.0f);
	for (unsigned t = 0; (simd = kvg_simd_at(t)); t++) {
		scores[ROWS * HEADS] = 42.0f;
		simd->gate(&gate, projected, LD, ROWS, scores);
		for (size_t i = 0; i < ROWS * HEADS; i++)
			assert_true(fabsf(scores[i] - expected[i]) <= 1e-6f);
		assert_true(scores[ROWS * HEADS] == 42.0f);
	}
	free(projected);
	free(bq);
	free(b);
	free(qk);
	free(base);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_tables),
		cmocka_unit_test(test_loads_every_half),
		cmocka_unit_test(test_stores),
		cmocka_unit_test(test_lengths),
		cmocka_unit_test(test_exp),
		cmocka_unit_test(test_softmax_in_pieces),
		cmocka_unit_test(test_products),
		cmocka_unit_test(test_scale),
		cmocka_unit_test(test_gate_of_all_tables),
	};

	return runner_run("kernels/simd", tests, sizeof(tests) / sizeof(*tests));
}
