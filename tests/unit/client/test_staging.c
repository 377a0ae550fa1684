#include "tests/support/runner.h"

#include <errno.h>
#include <string.h>

#include "client/staging.h"

static uint32_t take(struct staging *staging, uint64_t bytes, uint64_t expected)
{
	uint64_t offset = UINT64_MAX;

	assert_int_equal(staging_place(staging, bytes, &offset), 0);
	assert_int_equal(offset, expected);
	return staging_take(staging, bytes, offset);
}

static void assert_full(const struct staging *staging, uint64_t bytes)
{
	uint64_t offset = 77;

	assert_int_equal(staging_place(staging, bytes, &offset), -EAGAIN);
	assert_int_equal(offset, 77);
}

static void fills_to_the_last_byte(void **state)
{
	struct staging staging;
	uint64_t offset;
	uint32_t first;

	(void)state;
	assert_int_equal(staging_init(&staging, 1000, 8), 0);
	assert_int_equal(staging_place(&staging, 961, &offset), -EMSGSIZE);
	first = take(&staging, 960, 0);
	assert_full(&staging, 1);
	staging_done(&staging, first);
	first = take(&staging, 1, 0);
	(void)take(&staging, 896, 64);
	assert_full(&staging, 1);
	staging_done(&staging, first);
	(void)take(&staging, 64, 0);
	assert_full(&staging, 1);
	staging_deinit(&staging);
	staging_deinit(&staging);
}

static void wraps_and_waits_for_the_oldest(void **state)
{
	struct staging staging;
	uint32_t a, b, c;

	(void)state;
	assert_int_equal(staging_init(&staging, 640, 8), 0);
	a = take(&staging, 256, 0);
	b = take(&staging, 256, 256);
	assert_full(&staging, 192); /* neither behind b nor before a */
	c = take(&staging, 128, 512);
	staging_done(&staging, b); /* not the oldest: no room yet */
	assert_full(&staging, 64);
	staging_done(&staging, a);
	a = take(&staging, 512, 0);
	assert_full(&staging, 64);
	staging_done(&staging, c);
	b = take(&staging, 128, 512);
	staging_done(&staging, a);
	staging_done(&staging, b);
	assert_int_equal(staging.count, 0);
	staging_deinit(&staging);
}

static void a_named_place_stays(void **state)
{
	struct staging staging;
	uint64_t before, after;
	uint32_t piece;

	(void)state;
	assert_int_equal(staging_init(&staging, 640, 8), 0);
	piece = take(&staging, 128, 0);
	assert_int_equal(staging_place(&staging, 128, &before), 0);
	staging_done(&staging, piece);
	assert_int_equal(staging.count, 0);
	assert_int_equal(staging_place(&staging, 128, &after), 0);
	assert_int_equal(before, after);
	staging_deinit(&staging);
}

static void limits_the_pieces(void **state)
{
	struct staging staging;
	uint32_t first;

	(void)state;
	assert_int_equal(staging_init(&staging, 4096, 2), 0);
	first = take(&staging, 64, 0);
	(void)take(&staging, 64, 64);
	assert_full(&staging, 64);
	staging_done(&staging, first);
	(void)take(&staging, 64, 128);
	staging_deinit(&staging);
}

/* Random sizes and completions: pieces in use never overlap, and everything can be used again at the end. */
static void never_overlaps(void **state)
{
	enum { SIZE = 4096, PIECES = 16 };
	struct {
		uint64_t offset, bytes;
		bool live;
	} live[PIECES] = {0};
	uint8_t used[SIZE] = {0};
	struct staging staging;
	uint32_t random = 12345;

	(void)state;
	assert_int_equal(staging_init(&staging, SIZE, PIECES), 0);
	for (unsigned step = 0; step < 20000; step++) {
		uint64_t bytes, offset;

		random = random * 1664525u + 1013904223u;
		bytes = 1 + (random >> 8) % 900;
		if (random >> 31 && staging_place(&staging, bytes, &offset) == 0) {
			uint32_t index = staging_take(&staging, bytes, offset);

			assert_false(live[index].live);
			live[index].offset = offset;
			live[index].bytes = bytes;
			live[index].live = true;
			assert_true(offset + bytes <= SIZE);
			for (uint64_t i = offset; i < offset + bytes; i++)
				assert_int_equal(used[i]++, 0);
		} else if (live[(random >> 4) % PIECES].live) {
			uint32_t index = (random >> 4) % PIECES;

			for (uint64_t i = 0; i < live[index].bytes; i++)
				used[live[index].offset + i]--;
			live[index].live = false;
			staging_done(&staging, index);
		}
	}
	for (uint32_t i = 0; i < PIECES; i++)
		if (live[i].live)
			staging_done(&staging, i);
	assert_int_equal(staging.count, 0);
	staging_deinit(&staging);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(fills_to_the_last_byte),
		cmocka_unit_test(wraps_and_waits_for_the_oldest),
		cmocka_unit_test(a_named_place_stays),
		cmocka_unit_test(limits_the_pieces),
		cmocka_unit_test(never_overlaps),
	};

	return runner_run("staging", tests, sizeof(tests) / sizeof(*tests));
}
