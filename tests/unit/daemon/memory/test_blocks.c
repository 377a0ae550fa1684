/* The block allocator against a naive model, and its rules at their boundaries. */
#include "daemon/memory/blocks.h"

#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/kernels/random.h"

#define EXTENT  (64u << 10)
#define EACH    128u /* blocks of an extent */
#define RUNS    (EACH / KVG_RUN_BLOCKS)
#define EXTENTS 64u
#define OWNERS  4u

struct fixture {
	struct loop *loop;
	struct executor *executor;
	struct kind *kind;
	struct pool *pool;
	struct arena *arena;
	struct quota_account account;
	struct quota quota;
	struct block_space space;
	struct block_owner owners[OWNERS];
	char text[QUOTA_TEXT];
	/* The model: who has which block, and as what. */
	uint8_t used[EXTENTS * EACH * 2];
	uint32_t *units[OWNERS][2];
	size_t count[OWNERS][2];
	struct random random;
};

static void on_made(struct extent_batch *batch)
{
	struct fixture *f = batch->user;
	struct list *node;

	while ((node = list_pop(&batch->extents)))
		blocks_add_extent(&f->space, list_entry(node, struct extent, node));
	(void)extent_batch_free(batch);
	loop_stop(f->loop);
}

static void add_extents(struct fixture *f, uint32_t count)
{
	struct extent_batch *batch = extent_batch_new(f->pool, on_made, f);

	if (!count) {
		(void)extent_batch_free(batch);
		return;
	}
	assert_int_equal(quota_charge(&f->quota, (uint64_t)count * EXTENT, 0, "x", f->text), 0);
	assert_int_equal(extent_batch_add_new(batch, f->arena, &f->quota, 0, 0, count), 0);
	extent_batch_create(batch);
	assert_int_equal(loop_run(f->loop), 0);
}

static void on_gone(struct extent_batch *batch)
{
	struct fixture *f = batch->user;

	while (!list_empty(&batch->extents))
		extent_release(f->pool, list_entry(batch->extents.next, struct extent, node), 0);
	(void)extent_batch_free(batch);
	loop_stop(f->loop);
}

static uint32_t return_spare(struct fixture *f)
{
	struct extent_batch *batch = extent_batch_new(f->pool, on_gone, f);
	uint32_t count = f->space.spare_count;
	struct list *node;

	while ((node = list_pop(&f->space.spare)))
		list_add_tail(&batch->extents, node);
	f->space.extent_count -= count;
	f->space.spare_count = 0;
	extent_batch_destroy(batch);
	assert_int_equal(loop_run(f->loop), 0);
	return count;
}

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	struct kvg_layout layout = {.model = "m", .group_count = 1};

	if (!f)
		return -1;
	layout.groups[0] = (struct kvg_group){.k_dim = 8, .v_dim = 8, .k_dtype = KVG_BF16, .v_dtype = KVG_BF16};
	f->random.state = 99;
	f->account.max = EXTENTS * EXTENT;
	assert_int_equal(loop_new(&f->loop), 0);
	assert_int_equal(executor_new(f->loop, &f->executor), 0);
	assert_int_equal(kind_host_new(&f->kind), 0);
	assert_int_equal(pool_new(f->loop, f->executor, f->kind, EXTENTS * EXTENT, EXTENT, &f->pool), 0);
	assert_int_equal(arena_new(f->pool, &layout, &f->arena), 0);
	assert_int_equal(f->arena->blocks_per_extent, EACH);
	f->quota = (struct quota){.name = "t", .tier = "device", .parent = &f->pool->quota, .account = &f->account};
	block_space_init(&f->space, f->pool, f->arena);
	for (uint32_t i = 0; i < OWNERS; i++) {
		block_owner_init(&f->owners[i], i + 1);
		for (unsigned g = 0; g < 2; g++)
			f->units[i][g] = calloc(EXTENTS * EACH, sizeof(uint32_t));
	}
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(f->space.used_blocks, 0);
	assert_int_equal(f->space.extent_count, f->space.spare_count);
	for (uint32_t i = 0; i < OWNERS; i++) {
		block_owner_deinit(&f->space, &f->owners[i]);
		free(f->units[i][0]);
		free(f->units[i][1]);
	}
	(void)return_spare(f);
	assert_int_equal(f->account.charged, 0);
	(void)arena_unref(f->arena);
	(void)executor_free(f->executor);
	(void)pool_free(f->pool);
	(void)kind_free(f->kind);
	(void)loop_free(f->loop);
	free(f);
	return 0;
}

/* ---- the model ---- */

static void note_taken(struct fixture *f, uint32_t owner, unsigned generation, const uint32_t *ids, size_t count)
{
	uint32_t width = generation == META_NURSERY ? KVG_RUN_BLOCKS : 1;

	for (size_t i = 0; i < count; i++) {
		if (generation == META_NURSERY)
			assert_int_equal(ids[i] % KVG_RUN_BLOCKS, 0);
		for (uint32_t j = 0; j < width; j++) {
			assert_true((ids[i] + j) % f->arena->ids_per_extent < EACH);
			assert_false(f->used[ids[i] + j]);
			f->used[ids[i] + j] = 1;
		}
		f->units[owner][generation][f->count[owner][generation]++] = ids[i];
	}
}

static void take(struct fixture *f, uint32_t owner, unsigned generation, uint32_t units, uint32_t ahead)
{
	uint32_t *ids = calloc(units + 1, sizeof(uint32_t));
	uint32_t missing = blocks_missing(&f->space, &f->owners[owner], generation, units, ahead, 0);

	if (missing <= f->pool->free_count) {
		add_extents(f, missing);
		assert_int_equal(blocks_missing(&f->space, &f->owners[owner], generation, units, ahead, 0), 0);
		blocks_take(&f->space, &f->owners[owner], generation, units, ahead, ids);
		note_taken(f, owner, generation, ids, units);
	}
	free(ids);
}

static void give_one(struct fixture *f, uint32_t owner, unsigned generation, size_t index)
{
	uint32_t *list = f->units[owner][generation], id = list[index];
	uint32_t width = generation == META_NURSERY ? KVG_RUN_BLOCKS : 1;

	list[index] = list[--f->count[owner][generation]];
	for (uint32_t j = 0; j < width; j++)
		f->used[id + j] = 0;
	if (generation == META_NURSERY)
		blocks_give_run(&f->space, id);
	else
		blocks_give(&f->space, id);
}

static void give_all(struct fixture *f, uint32_t owner)
{
	for (unsigned g = 0; g < 2; g++)
		while (f->count[owner][g])
			give_one(f, owner, g, f->count[owner][g] - 1);
}

static void check_extent(struct fixture *f, const struct extent *extent, uint64_t *used, uint64_t open[OWNERS + 2][2])
{
	uint32_t first = extent->meta->slot * f->arena->ids_per_extent, count = 0, runs = 0;

	for (uint32_t i = 0; i < EACH; i++) {
		bool bit = (extent->bitmap[i / 8] >> (i % 8) & 1) != 0;

		assert_int_equal(bit, f->used[first + i]);
		count += bit;
	}
	for (uint32_t i = 0; i < RUNS; i++)
		runs += extent->bitmap[i] == 0;
	assert_int_equal(extent->meta->used, count);
	assert_int_equal(extent->free_runs, runs);
	*used += count;
	if (!extent->owner) {
		assert_int_equal(count, 0);
		return;
	}
	open[extent->meta->owner][extent->meta->generation] +=
		extent->meta->generation == META_NURSERY ? runs : EACH - count;
}

/* Bitmaps, counters and lists say what the model says. */
static void check(struct fixture *f)
{
	uint64_t used = 0, open[OWNERS + 2][2] = {{0}};
	uint32_t extents = 0;

	for (uint32_t i = 0; i < EXTENTS; i++) {
		if (!f->pool->extents[i])
			continue;
		check_extent(f, f->pool->extents[i], &used, open);
		extents++;
	}
	assert_int_equal(f->space.extent_count, extents);
	assert_int_equal(f->space.used_blocks, used);
	assert_int_equal(blocks_free_anywhere(&f->space), (uint64_t)extents * EACH - used);
	for (unsigned g = 0; g < 2; g++) {
		assert_int_equal(f->space.shared.free_units[g] + f->space.closed.free_units[g], open[0][g]);
		for (uint32_t i = 0; i < OWNERS; i++)
			assert_int_equal(f->owners[i].free_units[g], open[i + 1][g]);
	}
}

/* ---- tests ---- */

static void random_step(struct fixture *f)
{
	uint32_t owner = random_below(&f->random, OWNERS), n;
	unsigned generation = random_below(&f->random, 2);
	uint32_t most = generation == META_NURSERY ? 40 : 300;

	switch (random_below(&f->random, 8)) {
	case 0:
	case 1:
	case 2:
		take(f, owner, generation, random_below(&f->random, most),
			random_below(&f->random, 2) ? random_below(&f->random, most) : 0);
		break;
	case 3:
		give_all(f, owner);
		block_owner_deinit(&f->space, &f->owners[owner]);
		block_owner_init(&f->owners[owner], owner + 1);
		break;
	case 4:
		(void)return_spare(f);
		break;
	default:
		for (n = random_below(&f->random, 60); n && f->count[owner][generation]; n--)
			give_one(f, owner, generation, random_below(&f->random, (uint32_t)f->count[owner][generation]));
	}
}

static void test_random_operations(void **state)
{
	struct fixture *f = *state;

	for (unsigned i = 0; i < 3000; i++) {
		random_step(f);
		check(f);
	}
	for (uint32_t i = 0; i < OWNERS; i++)
		give_all(f, i);
	check(f);
}

/* A whole extent is the owner's, a rest comes from what all share. */
static void test_own_and_shared(void **state)
{
	struct fixture *f = *state;

	take(f, 0, META_NURSERY, RUNS, 0);
	assert_int_equal(f->owners[0].extents, 1);
	assert_int_equal(f->space.shared.extents, 0);
	take(f, 0, META_NURSERY, RUNS - 1, 0);
	assert_int_equal(f->owners[0].extents, 1);
	assert_int_equal(f->space.shared.extents, 1);
	assert_int_equal(f->space.shared.free_units[META_NURSERY], 1);
	assert_int_equal(blocks_missing(&f->space, &f->owners[1], META_NURSERY, 1, 0, 0), 0);
	assert_int_equal(blocks_missing(&f->space, &f->owners[1], META_NURSERY, 2, 0, 0), 1);
	assert_int_equal(blocks_missing(&f->space, &f->owners[1], META_HELD, 1, 0, 0), 1);
	take(f, 1, META_NURSERY, 1, RUNS - 1); /* what lies ahead fills an extent of its own */
	assert_int_equal(f->owners[1].extents, 1);
	assert_int_equal(f->owners[1].free_units[META_NURSERY], RUNS - 1);
	check(f);
	give_all(f, 0);
	give_all(f, 1);
	check(f);
}

/* The last block of an extent makes it spare, whoever had it; then it serves either generation. */
static void test_spare_serves_either_generation(void **state)
{
	struct fixture *f = *state;

	take(f, 0, META_NURSERY, RUNS, 0);
	give_all(f, 0);
	assert_int_equal(f->space.spare_count, 1);
	assert_int_equal(blocks_missing(&f->space, &f->owners[0], META_HELD, EACH, 0, 0), 0);
	take(f, 0, META_HELD, EACH, 0);
	assert_int_equal(f->space.extent_count, 1);
	assert_int_equal(f->space.spare_count, 0);
	give_one(f, 0, META_HELD, 5);
	assert_int_equal(f->space.spare_count, 0);
	give_all(f, 0);
	assert_int_equal(f->space.spare_count, 1);
	check(f);
}

/* Runs that are given back together: some of an extent, whole extents, and back and forth between them. */
static void test_many_runs_go_together(void **state)
{
	struct fixture *f = *state;
	uint32_t *units = f->units[0][META_NURSERY], mixed[4];

	take(f, 0, META_NURSERY, 2 * RUNS + 3, 0);
	assert_int_equal(f->space.extent_count, 3);
	for (unsigned i = 0; i < 4; i++)
		mixed[i] = units[i % 2 * RUNS + i];
	blocks_give_runs(&f->space, mixed, 4);
	assert_int_equal(f->space.used_blocks, (2 * RUNS - 1) * KVG_RUN_BLOCKS);
	assert_int_equal(f->owners[0].free_units[META_NURSERY], 4);
	assert_int_equal(f->space.spare_count, 0);
	blocks_give_runs(&f->space, units + RUNS + 4, RUNS - 4 + 3); /* the rest of the second extent, and the third */
	assert_int_equal(f->space.spare_count, 1);
	for (uint32_t i = 0; i < RUNS + 4; i++)
		if (i != 0 && i != 2 && i != RUNS + 1 && i != RUNS + 3)
			blocks_give_runs(&f->space, units + i, 1);
	assert_int_equal(f->space.spare_count, 3);
	assert_int_equal(f->space.used_blocks, 0);
	blocks_give_runs(&f->space, units, 0);
	memset(f->used, 0, sizeof(f->used));
	f->count[0][META_NURSERY] = 0;
	check(f);
}

/* Spare extents that are withheld do not count. */
static void test_withheld(void **state)
{
	struct fixture *f = *state;

	add_extents(f, 2);
	assert_int_equal(blocks_missing(&f->space, &f->owners[0], META_HELD, 2 * EACH, 0, 0), 0);
	assert_int_equal(blocks_missing(&f->space, &f->owners[0], META_HELD, 2 * EACH, 0, 1), 1);
	assert_int_equal(blocks_missing(&f->space, &f->owners[0], META_HELD, 2 * EACH, 0, 9), 2);
}

/* Extents of a sequence that goes become everybody's, as far as others have blocks in them. */
static void test_owner_leaves(void **state)
{
	struct fixture *f = *state;
	uint32_t ids[EACH];

	take(f, 0, META_HELD, EACH, 0);
	give_one(f, 0, META_HELD, 0);
	blocks_take_anywhere(&f->space, &f->owners[1], 1, ids);
	note_taken(f, 1, META_HELD, ids, 1);
	give_all(f, 0);
	block_owner_deinit(&f->space, &f->owners[0]);
	assert_int_equal(f->owners[0].extents, 0);
	assert_int_equal(f->space.shared.extents, 1);
	assert_int_equal(f->space.shared.free_units[META_HELD], EACH - 1);
	check(f);
	give_all(f, 1);
	check(f);
}

/* The way out: every free block of every extent, runs broken up where need be, and not one more or less. */
static void test_take_anywhere(void **state)
{
	struct fixture *f = *state;
	uint32_t *ids = calloc(4 * EACH, sizeof(uint32_t));
	uint64_t all;

	take(f, 0, META_NURSERY, RUNS + 3, 0);
	take(f, 1, META_HELD, EACH + 5, 0);
	give_one(f, 0, META_NURSERY, 2);
	give_one(f, 1, META_HELD, 17);
	add_extents(f, 1);
	all = blocks_free_anywhere(&f->space);
	assert_int_equal(all, 5 * EACH - (RUNS + 2) * KVG_RUN_BLOCKS - (EACH + 4));
	assert_true(all <= 4 * EACH);
	blocks_take_anywhere(&f->space, &f->owners[2], all, ids);
	note_taken(f, 2, META_HELD, ids, all);
	assert_int_equal(blocks_free_anywhere(&f->space), 0);
	check(f);
	give_all(f, 2);
	check(f);
	for (uint32_t i = 0; i < OWNERS; i++)
		give_all(f, i);
	check(f);
	free(ids);
}

/* Whole runs of extents of either generation, when no extent can be had. */
static void test_take_runs_anywhere(void **state)
{
	struct fixture *f = *state;
	uint32_t ids[3 * RUNS];
	uint64_t all;

	take(f, 0, META_HELD, 17, 0); /* leaves 13 whole runs */
	take(f, 1, META_NURSERY, 5, 0);
	give_one(f, 1, META_NURSERY, 1);
	add_extents(f, 1);
	all = blocks_free_runs_anywhere(&f->space);
	assert_int_equal(all, 13 + 12 + RUNS);
	blocks_take_runs_anywhere(&f->space, &f->owners[2], all, ids);
	note_taken(f, 2, META_NURSERY, ids, all);
	assert_int_equal(blocks_free_runs_anywhere(&f->space), 0);
	check(f);
	for (uint32_t i = 0; i < OWNERS; i++)
		give_all(f, i);
	check(f);
}

static void test_closed_extents_give_nothing(void **state)
{
	struct fixture *f = *state;
	struct extent *extent;
	uint32_t ids[EACH];

	take(f, 0, META_HELD, EACH, 0);
	take(f, 0, META_HELD, 10, EACH - 10);
	give_one(f, 0, META_HELD, 0);
	extent = blocks_extent(&f->space, f->units[0][META_HELD][20]);
	assert_ptr_equal(extent->owner, &f->owners[0]);
	blocks_close_extent(&f->space, extent);
	blocks_take_open(&f->space, &f->owners[0], EACH - 10, ids);
	for (uint32_t i = 0; i < EACH - 10; i++)
		assert_ptr_not_equal(blocks_extent(&f->space, ids[i]), extent);
	note_taken(f, 0, META_HELD, ids, EACH - 10);
	check(f);
	give_all(f, 0);
	assert_int_equal(f->space.closed.extents, 0);
	assert_int_equal(f->space.spare_count, f->space.extent_count);
	check(f);
}

/* Metadata of places lies where the block does. */
static void test_places(void **state)
{
	struct fixture *f = *state;
	struct extent *extent;
	uint32_t id;

	take(f, 0, META_HELD, EACH, 0);
	id = f->units[0][META_HELD][EACH - 1];
	extent = blocks_extent(&f->space, id);
	assert_ptr_equal(blocks_places(f->arena, f->pool->meta, id),
		extent->places + (size_t)(id % f->arena->ids_per_extent) * KVG_BLOCK_TOKENS);
	give_all(f, 0);
}

/* What nobody owns has its room once: it is not there again as what others leave. */
static void test_shared_room_counts_once(void **state)
{
	struct fixture *f = *state;
	uint32_t ids[EACH + 5];

	add_extents(f, 1);
	blocks_take(&f->space, &f->space.shared, META_HELD, EACH - 10, 0, ids);
	assert_int_equal(blocks_missing(&f->space, &f->space.shared, META_HELD, 10, 0, 0), 0);
	assert_int_equal(blocks_missing(&f->space, &f->space.shared, META_HELD, 15, 0, 0), 1);
	add_extents(f, 1);
	assert_int_equal(blocks_missing(&f->space, &f->space.shared, META_HELD, 15, 0, 0), 0);
	blocks_take(&f->space, &f->space.shared, META_HELD, 15, 0, ids + EACH - 10);
	for (uint32_t i = 0; i < EACH + 5; i++)
		blocks_give(&f->space, ids[i]);
}

#define BLOCKS_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		BLOCKS_TEST(test_random_operations),
		BLOCKS_TEST(test_own_and_shared),
		BLOCKS_TEST(test_spare_serves_either_generation),
		BLOCKS_TEST(test_many_runs_go_together),
		BLOCKS_TEST(test_withheld),
		BLOCKS_TEST(test_owner_leaves),
		BLOCKS_TEST(test_take_anywhere),
		BLOCKS_TEST(test_take_runs_anywhere),
		BLOCKS_TEST(test_closed_extents_give_nothing),
		BLOCKS_TEST(test_places),
		BLOCKS_TEST(test_shared_room_counts_once),
	};

	return runner_run("blocks", tests, sizeof(tests) / sizeof(tests[0]));
}
