/* The store of retained pairs, in frames of ordinary memory. */
#include "daemon/sequence/retain.h"

#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/kernels/random.h"

#define FRAME  2048u
#define FRAMES 16u

static const struct kvg_group group = {.k_dim = 8, .v_dim = 12, .k_dtype = KVG_BF16, .v_dtype = KVG_F32};

/* The chain's frames lie in no order. */
static struct retain store_new(uint32_t frames)
{
	struct retain retain = {.base = calloc(FRAMES, FRAME), .frames = calloc(FRAMES, sizeof(uint32_t))};

	assert_true(retain.base && retain.frames);
	retain_form_init(&retain.form, &group, FRAME);
	for (uint32_t i = 0; i < FRAMES; i++)
		retain.frames[i] = i * 7 % FRAMES;
	retain.frame_count = frames;
	return retain;
}

static void store_free(struct retain *retain)
{
	free(retain->base);
	free(retain->frames);
}

/* A pair is known by its position. */
static void put(const struct retain *retain, uint64_t i, uint32_t pos, float score)
{
	*retain_entry(retain, i) = (struct retain_entry){.row = pos % 5, .pos = pos, .score = score};
	memset(retain_k(retain, i), (int)pos & 0xff, retain->form.k_bytes);
	memset(retain_v(retain, i), (int)(pos + 1) & 0xff, retain->form.v_bytes);
}

static void check(const struct retain *retain, uint64_t i, uint32_t pos)
{
	assert_int_equal(retain_entry(retain, i)->pos, pos);
	assert_int_equal(retain_entry(retain, i)->row, pos % 5);
	for (uint32_t b = 0; b < retain->form.k_bytes; b++)
		assert_int_equal(retain_k(retain, i)[b], pos & 0xff);
	for (uint32_t b = 0; b < retain->form.v_bytes; b++)
		assert_int_equal(retain_v(retain, i)[b], (pos + 1) & 0xff);
}

static void test_forms(void **state)
{
	static const size_t sizes[] = {2048, 4096, 65536, 2u << 20};
	struct kvg_group odd = group;
	struct retain_form form;

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		for (odd.k_dim = 4; odd.k_dim <= 256; odd.k_dim += 7) {
			size_t pair;

			odd.v_dim = 260 - odd.k_dim;
			retain_form_init(&form, &odd, sizes[i]);
			pair = retain_pair_bytes(&form);
			assert_int_equal(form.k_bytes, odd.k_dim * 2);
			assert_int_equal(form.v_bytes, odd.v_dim * 4);
			assert_int_equal(form.v_offset % 16 + form.index_offset % 16, 0);
			assert_true(form.v_offset >= form.per_frame * form.k_bytes);
			assert_true(form.index_offset >= form.v_offset + form.per_frame * form.v_bytes);
			assert_true(form.index_offset + form.per_frame * sizeof(struct retain_entry) <= sizes[i]);
			assert_true(form.per_frame + 1 >= (sizes[i] - 32) / pair); /* nothing is wasted */
		}
	}
	retain_form_init(&form, &group, 32);
	assert_int_equal(form.per_frame, 0);
}

/* Places do not overlap, also across frames. */
static void test_pairs_lie_apart(void **state)
{
	struct retain retain = store_new(FRAMES);

	(void)state;
	for (uint32_t i = 0; i < retain_capacity(&retain); i++)
		put(&retain, i, i * 3, (float)i);
	for (uint32_t i = 0; i < retain_capacity(&retain); i++)
		check(&retain, i, i * 3);
	assert_int_equal(retain_frames_for(&retain.form, retain_capacity(&retain)), FRAMES);
	assert_int_equal(retain_frames_for(&retain.form, retain_capacity(&retain) + 1), FRAMES + 1);
	assert_int_equal(retain_frames_for(&retain.form, 0), 0);
	store_free(&retain);
}

static void test_room_for_all(void **state)
{
	struct retain retain = store_new(2);
	float scores[] = {3, 1, 2};
	struct retain_plan plan;

	(void)state;
	retain.count = 4;
	assert_int_equal(retain_plan(&retain, scores, 3, &plan), 0);
	for (uint64_t i = 0; i < 3; i++)
		assert_int_equal(plan.place[i], 4 + i);
	assert_int_equal(plan.count, 7);
	retain_plan_deinit(&plan);
	store_free(&retain);
}

/* The naive way: whatever beats it, by score, then by age. */
static bool stays(const float *scores, uint64_t n, uint64_t i, uint64_t capacity)
{
	uint64_t better = 0;

	for (uint64_t j = 0; j < n; j++)
		better += scores[j] > scores[i] || (scores[j] == scores[i] && j < i);
	return better < capacity;
}

static void check_best(uint32_t frames, uint64_t old, uint64_t new_count, unsigned values, uint64_t seed)
{
	struct retain retain = store_new(frames);
	struct random random = {.state = seed};
	uint64_t n = old + new_count, kept = 0, capacity = retain_capacity(&retain);
	float *scores = calloc(n + 1, sizeof(float));
	uint8_t *seen = calloc(n + 1, 1);
	struct retain_plan plan;

	assert_true(scores && seen && old <= capacity);
	for (uint64_t i = 0; i < n; i++)
		scores[i] = (float)random_below(&random, values) - 3;
	for (uint64_t i = 0; i < old; i++)
		put(&retain, i, (uint32_t)i, scores[i]);
	retain.count = old;
	assert_int_equal(retain_plan(&retain, scores + old, new_count, &plan), 0);
	for (uint64_t i = 0; i < new_count; i++)
		if (plan.place[i] != RETAIN_NOWHERE)
			put(&retain, plan.place[i], (uint32_t)(old + i), scores[old + i]);
	retain.count = plan.count;
	for (uint64_t i = 0; i < retain.count; i++) {
		uint32_t at = retain_entry(&retain, i)->pos;

		check(&retain, i, at);
		assert_int_equal(seen[at]++, 0);
	}
	for (uint64_t i = 0; i < n; i++) {
		assert_int_equal(seen[i], stays(scores, n, i, capacity));
		kept += seen[i];
	}
	assert_int_equal(kept, plan.count);
	assert_int_equal(kept, n < capacity ? n : capacity);
	retain_plan_deinit(&plan);
	free(scores);
	free(seen);
	store_free(&retain);
}

static void test_lowest_go_first(void **state)
{
	struct retain retain = store_new(1);
	uint64_t per = retain.form.per_frame;

	(void)state;
	store_free(&retain);
	for (uint64_t seed = 1; seed < 20; seed++) {
		check_best(3, 3 * per, per, 1000, seed);
		check_best(3, 3 * per, 5 * per, 7, seed); /* ties everywhere */
		check_best(3, 2 * per + 1, 2 * per, 7, seed);
		check_best(3, per, per, 7, seed);
		check_best(3, 0, 4 * per, 1, seed); /* all equal: the first ones */
		check_best(0, 0, per, 7, seed);     /* no room at all */
	}
}

/* slice: at most so many at a time, from the last on. */
static void check_remove(uint64_t count, unsigned percent, uint64_t seed, uint64_t slice)
{
	struct retain retain = store_new(FRAMES);
	struct random random = {.state = seed};
	uint64_t *chosen = calloc(count + 1, sizeof(uint64_t)), n = 0;
	uint8_t *gone = calloc(count + 1, 1);

	assert_true(chosen && gone);
	for (uint64_t i = 0; i < count; i++) {
		put(&retain, i, (uint32_t)i, 0);
		gone[i] = random_below(&random, 100) < percent;
		if (gone[i])
			chosen[n++] = i;
	}
	retain.count = count;
	for (uint64_t left = n, part; left; left -= part) {
		part = left < slice ? left : slice;
		retain_remove(&retain, chosen + left - part, part);
	}
	assert_int_equal(retain.count, count - n);
	for (uint64_t i = 0; i < retain.count; i++) {
		uint32_t at = retain_entry(&retain, i)->pos;

		check(&retain, i, at);
		assert_int_equal(gone[at]++, 0);
	}
	free(chosen);
	free(gone);
	store_free(&retain);
}

static void test_holes_are_filled(void **state)
{
	struct retain retain = store_new(FRAMES);
	uint64_t capacity = retain_capacity(&retain);

	(void)state;
	store_free(&retain);
	for (uint64_t seed = 1; seed < 30; seed++)
		for (unsigned percent = 0; percent <= 100; percent += 10)
			check_remove(seed % 2 ? capacity : capacity / 3, percent, seed, seed % 3 ? UINT64_MAX : seed);
	check_remove(0, 50, 1, 1);
	check_remove(1, 100, 1, 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_forms),
		cmocka_unit_test(test_pairs_lie_apart),
		cmocka_unit_test(test_room_for_all),
		cmocka_unit_test(test_lowest_go_first),
		cmocka_unit_test(test_holes_are_filled),
	};

	return runner_run("retain", tests, sizeof(tests) / sizeof(tests[0]));
}
