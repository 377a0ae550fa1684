#include "tests/support/runner.h"

#include "kernels/host/move.h"
#include "tests/unit/kernels/random.h"

#include <string.h>

#define BLOCKS 12
#define TOKENS 16

static void test_plan_joins_neighbours(void **state)
{
	static const struct kvg_place src[] = {{1, 3}, {1, 4}, {1, 5}, {2, 0}, {2, 1}, {2, 3}};
	static const struct kvg_place dst[] = {{7, 0}, {7, 1}, {7, 3}, {7, 4}, {8, 5}, {8, 6}};
	struct kvg_move moves[6];

	(void)state;
	assert_int_equal(kvg_move_plan(src, dst, 0, moves), 0);
	assert_int_equal(kvg_move_plan(src, dst, 6, moves), 5);
	assert_int_equal(moves[0].count, 2);
	assert_int_equal(moves[0].src, 1);
	assert_int_equal(moves[0].dst, 7);
	assert_int_equal(moves[0].src_place, 3);
	assert_int_equal(moves[0].dst_place, 0);
	for (size_t i = 1; i < 5; i++)
		assert_int_equal(moves[i].count, 1);
	assert_int_equal(moves[3].dst, 8);
	assert_int_equal(moves[4].src_place, 3);
}

static void test_plan_splits_at_255(void **state)
{
	struct kvg_place src[256], dst[256];
	struct kvg_move moves[256];

	(void)state;
	for (uint32_t i = 0; i < 256; i++) {
		src[i] = (struct kvg_place){1, i};
		dst[i] = (struct kvg_place){2, i};
	}
	assert_int_equal(kvg_move_plan(src, dst, 256, moves), 2);
	assert_int_equal(moves[0].count, 255);
	assert_int_equal(moves[1].count, 1);
	assert_int_equal(moves[1].src_place, 255);
}

/* A random disjoint plan puts each pair where it belongs and nothing else changes; again, it changes nothing. */
static void check_moves(struct random *random, size_t k_bytes, size_t v_bytes)
{
	struct kvg_place places[BLOCKS * TOKENS];
	struct kvg_move moves[BLOCKS * TOKENS / 2];
	size_t stride = 64 + TOKENS * (k_bytes > v_bytes ? k_bytes : v_bytes), size = BLOCKS * stride;
	size_t n = random_below(random, BLOCKS * TOKENS / 2);
	uint8_t *memory[3];

	for (size_t i = 0; i < 3; i++)
		memory[i] = malloc(2 * size);
	for (size_t i = 0; i < 2 * size; i++)
		memory[0][i] = memory[1][i] = (uint8_t)random_bits(random);
	for (uint32_t i = 0; i < BLOCKS * TOKENS; i++)
		places[i] = (struct kvg_place){i / TOKENS, i % TOKENS};
	for (uint32_t i = BLOCKS * TOKENS - 1; i > 0 && random->state % 3; i--) {
		uint32_t j = random_below(random, i + 1);
		struct kvg_place swap = places[i];

		places[i] = places[j];
		places[j] = swap;
	}
	struct kvg_move_area area = {memory[0], memory[0] + size, stride, k_bytes, v_bytes};
	const struct kvg_place *src = places, *dst = places + BLOCKS * TOKENS / 2;
	size_t count = kvg_move_plan(src, dst, n, moves);

	kvg_move_run(&area, moves, count);
	for (size_t i = 0; i < n; i++) {
		size_t to = dst[i].block * stride, from = src[i].block * stride;

		memcpy(memory[1] + to + dst[i].place * k_bytes, memory[1] + from + src[i].place * k_bytes, k_bytes);
		memcpy(memory[1] + size + to + dst[i].place * v_bytes, memory[1] + size + from + src[i].place * v_bytes,
			v_bytes);
	}
	assert_memory_equal(memory[0], memory[1], 2 * size);
	kvg_move_run(&area, moves, count);
	assert_memory_equal(memory[0], memory[1], 2 * size);
	for (size_t i = 0; i < 3; i++)
		free(memory[i]);
}

static void test_run(void **state)
{
	struct random random = {11};

	(void)state;
	for (size_t i = 0; i < 200; i++) {
		check_moves(&random, 64, 64);
		check_moves(&random, 256, 128);
		check_moves(&random, 6, 0);
	}
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_plan_joins_neighbours),
		cmocka_unit_test(test_plan_splits_at_255),
		cmocka_unit_test(test_run),
	};

	return runner_run("kernels/move", tests, sizeof(tests) / sizeof(*tests));
}
