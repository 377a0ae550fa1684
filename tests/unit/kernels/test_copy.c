#include "tests/support/runner.h"

#include "kernels/host/copy.h"
#include "kernels/host/simd.h"
#include "tests/unit/kernels/random.h"

#include <stdlib.h>
#include <string.h>

#define SIZE  16384u
#define GUARD 64u

struct buffers {
	uint8_t *src, *dst;
};

static void fill(struct buffers *buffers)
{
	struct random random = {5};

	buffers->src = aligned_alloc(64, SIZE + 2 * GUARD);
	buffers->dst = aligned_alloc(64, SIZE + 2 * GUARD);
	assert_true(buffers->src && buffers->dst);
	for (size_t i = 0; i < SIZE + 2 * GUARD; i++)
		buffers->src[i] = (uint8_t)random_bits(&random);
}

/* What lies around the destination stays. */
static void check(const struct buffers *buffers, size_t to, size_t from, size_t size)
{
	assert_memory_equal(buffers->dst + to, buffers->src + from, size);
	for (size_t i = 0; i < to; i++)
		assert_int_equal(buffers->dst[i], 0xa5);
	for (size_t i = to + size; i < SIZE + 2 * GUARD; i++)
		assert_int_equal(buffers->dst[i], 0xa5);
}

static void test_any_size_and_alignment(void **state)
{
	static const size_t sizes[] = {0, 1, 63, 64, 511, 512, 513, 575, 576, 2048, 4096, 4097, SIZE};
	static const size_t places[] = {0, 1, 16, 63};
	struct buffers buffers;

	(void)state;
	fill(&buffers);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
		for (size_t k = 0; k < 16; k++) {
			memset(buffers.dst, 0xa5, SIZE + 2 * GUARD);
			kvg_stream_copy(buffers.dst + places[k / 4], buffers.src + places[k % 4], sizes[i]);
			kvg_stream_fence();
			check(&buffers, places[k / 4], places[k % 4], sizes[i]);
		}
	free(buffers.src);
	free(buffers.dst);
}

static void test_every_instruction_set(void **state)
{
	struct buffers buffers;
	const struct kvg_simd *simd;

	(void)state;
	fill(&buffers);
	for (unsigned i = 0; (simd = kvg_simd_at(i)); i++) {
		memset(buffers.dst, 0xa5, SIZE + 2 * GUARD);
		simd->streams(&(uint8_t *){buffers.dst + 64}, &(const uint8_t *){buffers.src + 7}, 1, 4096 + 192);
		kvg_stream_fence();
		check(&buffers, 64, 7, 4096 + 192);
	}
	free(buffers.src);
	free(buffers.dst);
}

/* Copy i of several goes from i * 4096 + from to i * 4096 + to. */
static void check_copies(const struct buffers *buffers, unsigned count, size_t to, size_t from, size_t size)
{
	size_t at = 0;

	for (unsigned i = 0; i < count; i++) {
		for (; at < i * 4096 + to; at++)
			assert_int_equal(buffers->dst[at], 0xa5);
		assert_memory_equal(buffers->dst + at, buffers->src + i * 4096 + from, size);
		at += size;
	}
	for (; at < SIZE + 2 * GUARD; at++)
		assert_int_equal(buffers->dst[at], 0xa5);
}

static void test_side_by_side(void **state)
{
	static const size_t sizes[] = {0, 64, 192, 511, 512, 704, 2048, 2049, 4032};
	static const size_t places[] = {0, 16, 63};
	struct buffers buffers;
	uint8_t *dst[4];
	const uint8_t *src[4];

	(void)state;
	fill(&buffers);
	for (size_t n = 0; n < sizeof(sizes) / sizeof(*sizes) * 4 * 9; n++) {
		size_t size = sizes[n / 36], to = places[n % 3], from = places[n / 3 % 3];
		unsigned count = (unsigned)(n / 9 % 4 + 1);

		for (unsigned i = 0; i < count; i++) {
			dst[i] = buffers.dst + (size_t)i * 4096 + to;
			src[i] = buffers.src + (size_t)i * 4096 + from;
		}
		memset(buffers.dst, 0xa5, SIZE + 2 * GUARD);
		kvg_stream_copies(dst, src, count, size);
		kvg_stream_fence();
		check_copies(&buffers, count, to, from, size);
	}
	free(buffers.src);
	free(buffers.dst);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_any_size_and_alignment),
		cmocka_unit_test(test_every_instruction_set),
		cmocka_unit_test(test_side_by_side),
	};

	return runner_run("kernels/copy", tests, sizeof(tests) / sizeof(*tests));
}
