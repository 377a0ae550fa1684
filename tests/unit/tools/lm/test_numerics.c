#include "tools/lm/numerics.h"

#include <math.h>

#include "tests/support/runner.h"

static void assert_near(float got, double want)
{
	if (!(fabs((double)got - want) <= 1e-5))
		fail_msg("%g instead of %g", (double)got, want);
}

static void test_rmsnorm(void **state)
{
	float x[11], w[11], out[11];
	double square = 0.0;

	(void)state;
	for (unsigned i = 0; i < 11; i++) {
		x[i] = (float)i - 4.5f;
		w[i] = 1.0f + 0.1f * (float)i;
		square += (double)x[i] * (double)x[i];
	}
	lm_rmsnorm(out, x, w, 11, 0.5f);
	for (unsigned i = 0; i < 11; i++)
		assert_near(out[i], (double)x[i] * (double)w[i] / sqrt(square / 11.0 + 0.5));
	lm_rmsnorm(x, x, w, 11, 0.5f);
	assert_memory_equal(x, out, sizeof(x));
}

static void test_rmsnorm_of_zeros_is_zeros(void **state)
{
	float x[3] = {0}, w[3] = {1, 2, 3};

	(void)state;
	lm_rmsnorm(x, x, w, 3, 1e-6f);
	for (unsigned i = 0; i < 3; i++)
		assert_true(x[i] == 0.0f);
}

/* Against complex multiplication: (a + ib) e^(i p f). */
static void test_rope(void **state)
{
	float x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, cosines[2 * 4], sines[2 * 4];

	(void)state;
	lm_rope_table(cosines, sines, 3000, 2, 8, 1e5);
	lm_rope(x, 8, cosines + 4, sines + 4);
	for (unsigned i = 0; i < 4; i++) {
		double a = i + 1, b = i + 5, angle = 3001.0 / pow(1e5, (double)i / 4.0);

		assert_near(x[i], a * cos(angle) - b * sin(angle));
		assert_near(x[i + 4], b * cos(angle) + a * sin(angle));
	}
}

static void test_rope_at_zero_changes_nothing(void **state)
{
	float x[4] = {1, -2, 3, -4}, cosines[2], sines[2];

	(void)state;
	lm_rope_table(cosines, sines, 0, 1, 4, 1e5);
	lm_rope(x, 4, cosines, sines);
	assert_true(x[0] == 1.0f && x[1] == -2.0f && x[2] == 3.0f && x[3] == -4.0f);
}

static void test_silu(void **state)
{
	float gate[] = {-200.0f, -1.0f, 0.0f, 1.0f, 200.0f}, up[] = {3.0f, 3.0f, 3.0f, 3.0f, 3.0f};
	const double want[] = {0.0, -3.0 / (1.0 + exp(1.0)), 0.0, 3.0 / (1.0 + exp(-1.0)), 600.0};

	(void)state;
	lm_silu_mul(gate, up, 5);
	for (unsigned i = 0; i < 5; i++)
		assert_near(gate[i], want[i]);
}

static void test_argmax(void **state)
{
	const float plain[] = {1, 5, 2, 5}, nan_first[] = {NAN, -3, -2, NAN}, one[] = {-INFINITY};

	(void)state;
	assert_int_equal(lm_argmax(plain, 4), 1);
	assert_int_equal(lm_argmax(nan_first, 4), 2);
	assert_int_equal(lm_argmax(one, 1), 0);
}

static void test_max_difference(void **state)
{
	const float a[] = {1, 2, 3}, b[] = {1.5f, 2, 1}, broken[] = {1, NAN, 3};

	(void)state;
	assert_true(lm_max_difference(a, b, 3) == 2.0f);
	assert_true(lm_max_difference(a, a, 3) == 0.0f);
	assert_true(isinf(lm_max_difference(a, broken, 3)));
	assert_true(isinf(lm_max_difference(broken, a, 3)));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_rmsnorm),
		cmocka_unit_test(test_rmsnorm_of_zeros_is_zeros),
		cmocka_unit_test(test_rope),
		cmocka_unit_test(test_rope_at_zero_changes_nothing),
		cmocka_unit_test(test_silu),
		cmocka_unit_test(test_argmax),
		cmocka_unit_test(test_max_difference),
	};

	return runner_run("tools/lm/numerics", tests, sizeof(tests) / sizeof(tests[0]));
}
