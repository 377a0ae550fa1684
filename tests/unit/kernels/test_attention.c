#include "tests/support/runner.h"

#include "kernels/host/attention.h"
#include "kernels/host/dtype.h"
#include "tests/unit/kernels/random.h"

#include <cblas.h>
#include <math.h>
#include <string.h>

/* A row in scattered blocks and the same pairs as doubles, rounded as the storage rounds them. */
struct fixture {
	struct kvg_row_view view;
	uint32_t length, blocks;
	uint8_t *memory;
	uint32_t *ids;
	float *k, *v; /* [length][dim] */
};

static void fixture_init(struct fixture *f, struct random *random)
{
	struct kvg_row_view *view = &f->view;
	size_t k_bytes = view->k_dim * kvg_dtype_size(view->k_dtype),
	       v_bytes = view->v_dim * kvg_dtype_size(view->v_dtype);

	view->stride = (k_bytes > v_bytes ? k_bytes : v_bytes) * view->block_tokens;
	f->blocks = (f->length + view->block_tokens - 1) / view->block_tokens;
	f->memory = malloc(2 * 2 * f->blocks * view->stride);
	memset(f->memory, 0xff, 2 * 2 * f->blocks * view->stride); /* NaN in every dtype */
	f->ids = malloc(f->blocks * sizeof(*f->ids));
	for (uint32_t i = 0; i < f->blocks; i++)
		f->ids[i] = 2 * (f->blocks - 1 - i) + random_below(random, 2);
	view->ids = f->ids;
	view->k_base = f->memory;
	view->v_base = f->memory + 2 * f->blocks * view->stride;
	f->k = random_floats(random, (size_t)f->length * view->k_dim, 2.0f);
	f->v = random_floats(random, (size_t)f->length * view->v_dim, 1.0f);
	uint32_t half = f->length / 2;

	kvg_row_append(view, 0, half, f->k, view->k_dim, f->v, view->v_dim);
	kvg_row_append(view, half, f->length - half, f->k + (size_t)half * view->k_dim, view->k_dim,
		f->v + (size_t)half * view->v_dim, view->v_dim);
}

static void fixture_deinit(struct fixture *f)
{
	free(f->memory);
	free(f->ids);
	free(f->k);
	free(f->v);
}

static float stored(uint32_t dtype, float value)
{
	uint8_t bytes[4];

	kvg_dtype_store(dtype, bytes, &value, 1);
	kvg_dtype_load(dtype, &value, bytes, 1);
	return value;
}

/* One line by the definition, in doubles. */
static void define(const struct fixture *f, size_t keys, double scale, const float *q, double *out)
{
	const struct kvg_row_view *view = &f->view;
	double *weight = malloc(keys * sizeof(*weight)), largest = -INFINITY, sum = 0;

	for (size_t t = 0; t < keys; t++) {
		weight[t] = 0;
		for (uint32_t i = 0; i < view->k_dim; i++)
			weight[t] += (double)q[i] * (double)stored(view->k_dtype, f->k[t * view->k_dim + i]) * scale;
		largest = fmax(largest, weight[t]);
	}
	memset(out, 0, view->v_dim * sizeof(*out));
	for (size_t t = 0; t < keys; t++) {
		double p = exp(weight[t] - largest);

		sum += p;
		for (uint32_t i = 0; i < view->v_dim; i++)
			out[i] += p * (double)stored(view->v_dtype, f->v[t * view->v_dim + i]);
	}
	for (uint32_t i = 0; i < view->v_dim; i++)
		out[i] /= sum;
	free(weight);
}

/* Compares some lines of one call with the definition; out between the lines stays untouched. */
static void check_attend(const struct fixture *f, uint32_t queries, uint32_t group, struct random *random)
{
	const struct kvg_row_view *view = &f->view;
	size_t q_stride = group * view->k_dim + 5, o_stride = group * view->v_dim + 3, lines = (size_t)queries * group;
	float *q = random_floats(random, queries * q_stride, 2.0f), *out = malloc(queries * o_stride * sizeof(float));
	void *scratch = aligned_new(kvg_row_attend_scratch(queries, group, f->length, view->k_dim, view->v_dim));
	double *expected = malloc(view->v_dim * sizeof(double));

	memset(scratch, 0xff, kvg_row_attend_scratch(queries, group, f->length, view->k_dim, view->v_dim)); /* NaN */
	for (size_t i = 0; i < queries * o_stride; i++)
		out[i] = 42.0f;
	kvg_row_attend(view, f->length, queries, group, 0.25f, q, q_stride, out, o_stride, scratch);
	for (size_t line = 0; line < lines; line += 1 + lines / 40) {
		size_t i = line / group, g = line % group;

		define(f, f->length - queries + i + 1, 0.25, q + i * q_stride + g * view->k_dim, expected);
		for (uint32_t j = 0; j < view->v_dim; j++)
			assert_true(fabs((double)out[i * o_stride + g * view->v_dim + j] - expected[j]) <= 2e-5);
	}
	for (size_t i = 0; i < queries; i++)
		for (size_t j = group * view->v_dim; j < o_stride; j++)
			assert_true(out[i * o_stride + j] == 42.0f);
	free(q);
	free(out);
	free(scratch);
	free(expected);
}

struct shape {
	uint32_t length, queries, group, k_dim, v_dim, block_tokens;
};

static void test_definition(void **state)
{
	static const struct shape shapes[] = {
		{1, 1, 1, 1, 1, 16},
		{1, 1, 2, 32, 32, 16},
		{17, 1, 4, 32, 32, 16},
		{1000, 1, 8, 128, 64, 16},
		{63, 5, 3, 20, 36, 16},  /* a few queries, odd dimensions */
		{64, 16, 1, 32, 32, 1},  /* as many lines as the small path takes */
		{65, 17, 1, 32, 32, 16}, /* and one more */
		{130, 130, 2, 32, 32, 16},
		{900, 300, 2, 32, 32, 16},  /* several tiles of lines and keys */
		{1537, 400, 3, 24, 50, 16}, /* tiles end inside a query's group */
		{600, 520, 1, 64, 64, 7},
	};
	struct random random = {41};

	(void)state;
	for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++)
		for (uint32_t dtype = KVG_KERNEL_BF16; dtype <= KVG_KERNEL_F32; dtype++) {
			const struct shape *s = &shapes[i];
			struct fixture f = {.length = s->length};

			f.view = (struct kvg_row_view){.block_tokens = s->block_tokens,
				.k_dim = s->k_dim,
				.v_dim = s->v_dim,
				.k_dtype = dtype,
				.v_dtype = i % 2 ? dtype : KVG_KERNEL_F16};
			fixture_init(&f, &random);
			check_attend(&f, s->queries, s->group, &random);
			fixture_deinit(&f);
		}
}

/* Appending in pieces, with strides, stores exactly what one conversion stores, and only that. */
static void test_append_places(void **state)
{
	uint8_t memory[2 * 4 * 16 * 3 * 2], expected[sizeof(memory)];
	static const uint32_t ids[] = {2, 0, 3};
	struct kvg_row_view view = {
		memory, memory + sizeof(memory) / 2, 16 * 3 * 2, ids, 16, 3, 2, KVG_KERNEL_BF16, KVG_KERNEL_F16};
	struct random random = {43};
	float *k = random_floats(&random, 40 * 8, 1.0f), *v = random_floats(&random, 40 * 8, 1.0f);

	(void)state;
	memset(memory, 0xa5, sizeof(memory));
	memset(expected, 0xa5, sizeof(expected));
	for (uint32_t first = 0, n; first < 40; first += n) {
		n = first + 9 < 40 ? 9 : 40 - first;
		kvg_row_append(&view, first, n, k + first * 8, 8, v + first * 8, 8);
	}
	for (uint32_t t = 0; t < 40; t++) {
		uint8_t *block = expected + ids[t / 16] * view.stride;

		kvg_dtype_store(KVG_KERNEL_BF16, block + t % 16 * 6, k + t * 8, 3);
		kvg_dtype_store(KVG_KERNEL_F16, block + sizeof(memory) / 2 + t % 16 * 4, v + t * 8, 2);
	}
	assert_memory_equal(memory, expected, sizeof(memory));
	free(k);
	free(v);
}

/* A key that outweighs all others by far, early or late, takes everything without overflow. */
static void test_peaks(void **state)
{
	struct random random = {47};
	static const uint32_t peaks[] = {0, 70, 1199};

	(void)state;
	for (size_t i = 0; i < 3; i++)
		for (uint32_t queries = 1; queries <= 41; queries += 40) {
			struct fixture f = {.length = 1240};
			float q[41 * 16], out[41 * 16], big[16];
			void *scratch = aligned_new(kvg_row_attend_scratch(queries, 1, 1240, 16, 16));

			f.view = (struct kvg_row_view){.block_tokens = 16,
				.k_dim = 16,
				.v_dim = 16,
				.k_dtype = KVG_KERNEL_F32,
				.v_dtype = KVG_KERNEL_F32};
			fixture_init(&f, &random);
			for (size_t j = 0; j < 16; j++)
				big[j] = 1e4f;
			for (size_t j = 0; j < 41 * 16; j++)
				q[j] = 1e3f;
			kvg_row_append(&f.view, peaks[i], 1, big, 16, f.v + peaks[i] * 16, 16);
			kvg_row_attend(&f.view, 1240, queries, 1, 1.0f, q, 16, out, 16, scratch);
			for (size_t j = 0; j < (size_t)queries * 16; j++)
				assert_true(out[j] == f.v[peaks[i] * 16 + j % 16]);
			free(scratch);
			fixture_deinit(&f);
		}
}

static void test_scratch_is_a_tile(void **state)
{
	(void)state;
	assert_true(kvg_row_attend_scratch(1, 8, 1000000, 128, 128) < 128 * 1024);
	assert_true(kvg_row_attend_scratch(3000, 8, 1000000, 128, 128) < 2 * 1024 * 1024);
	assert_true(kvg_row_attend_scratch(1, 2, 10, 32, 32) < 8 * 1024);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_definition),
		cmocka_unit_test(test_append_places),
		cmocka_unit_test(test_peaks),
		cmocka_unit_test(test_scratch_is_a_tile),
	};

	openblas_set_num_threads(1);
	return runner_run("kernels/attention", tests, sizeof(tests) / sizeof(*tests));
}
