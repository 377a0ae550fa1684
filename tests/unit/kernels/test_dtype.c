#include "tests/support/runner.h"

#include "kernels/host/dtype.h"
#include "proto/kvgate_abi.h"
#include "tests/unit/kernels/random.h"

#include <math.h>
#include <string.h>

static void test_values_are_the_abi(void **state)
{
	(void)state;
	assert_int_equal(KVG_KERNEL_BF16, KVG_BF16);
	assert_int_equal(KVG_KERNEL_F16, KVG_F16);
	assert_int_equal(KVG_KERNEL_F32, KVG_F32);
}

static void test_sizes(void **state)
{
	(void)state;
	assert_int_equal(kvg_dtype_size(KVG_KERNEL_BF16), 2);
	assert_int_equal(kvg_dtype_size(KVG_KERNEL_F16), 2);
	assert_int_equal(kvg_dtype_size(KVG_KERNEL_F32), 4);
	assert_int_equal(kvg_dtype_size(0), 0);
	assert_int_equal(kvg_dtype_size(4), 0);
}

static void test_known_values(void **state)
{
	static const float values[] = {0.0f, -0.0f, 1.0f, -2.0f, 65504.0f, 1.00390625f, 1e30f, INFINITY};
	static const uint16_t bf16[] = {0, 0x8000, 0x3f80, 0xc000, 0x4780, 0x3f80, 0x714a, 0x7f80};
	static const uint16_t f16[] = {0, 0x8000, 0x3c00, 0xc000, 0x7bff, 0x3c04, 0x7c00, 0x7c00};
	uint16_t stored[8];

	(void)state;
	kvg_dtype_store(KVG_KERNEL_BF16, stored, values, 8);
	assert_memory_equal(stored, bf16, sizeof(stored));
	kvg_dtype_store(KVG_KERNEL_F16, stored, values, 8);
	assert_memory_equal(stored, f16, sizeof(stored));
}

/* What a type holds comes back exactly, from any alignment of its elements, and nothing else is written. */
static void test_round_trip(void **state)
{
	struct random random = {7};

	(void)state;
	for (uint32_t dtype = KVG_KERNEL_BF16; dtype <= KVG_KERNEL_F32; dtype++)
		for (size_t count = 0; count < 70; count++) {
			size_t size = kvg_dtype_size(dtype);
			float *in = random_floats(&random, count, 100.0f);
			float *once = malloc(sizeof(float) * (count + 1)), *twice = malloc(sizeof(float) * (count + 1));
			uint8_t *stored = malloc((count + 2) * size);

			memset(stored, 0xa5, (count + 2) * size);
			once[count] = 42.0f;
			kvg_dtype_store(dtype, stored + size, in, count);
			kvg_dtype_load(dtype, once, stored + size, count);
			for (size_t i = 0; i < size; i++) {
				assert_int_equal(stored[i], 0xa5);
				assert_int_equal(stored[(count + 1) * size + i], 0xa5);
			}
			assert_true(once[count] == 42.0f);
			for (size_t i = 0; i < count; i++)
				assert_true(fabsf(once[i] - in[i]) <=
					    fabsf(in[i]) * (dtype == KVG_KERNEL_BF16 ? 0x1p-8f : 0x1p-11f));
			kvg_dtype_store(dtype, stored, once, count);
			kvg_dtype_load(dtype, twice, stored, count);
			assert_memory_equal(once, twice, count * sizeof(float));
			free(in);
			free(once);
			free(twice);
			free(stored);
		}
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_values_are_the_abi),
		cmocka_unit_test(test_sizes),
		cmocka_unit_test(test_known_values),
		cmocka_unit_test(test_round_trip),
	};

	return runner_run("kernels/dtype", tests, sizeof(tests) / sizeof(*tests));
}
