/* Addressing: extent sizes, strides and slots. */
#include <errno.h>
#include <stdlib.h>

#include "daemon/memory/pool.h"

#include "tests/support/runner.h"

struct fixture {
	struct loop *loop;
	struct executor *executor;
	struct kind *kind;
	struct pool *pool; /* of 10 extents */
};

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	if (!f)
		return -1;
	assert_int_equal(loop_new(&f->loop), 0);
	assert_int_equal(executor_new(f->loop, &f->executor), 0);
	assert_int_equal(kind_host_new(&f->kind), 0);
	assert_int_equal(pool_new(f->loop, f->executor, f->kind, 10 * (64 << 10), 64 << 10, &f->pool), 0);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	(void)executor_free(f->executor);
	(void)pool_free(f->pool);
	(void)kind_free(f->kind);
	(void)loop_free(f->loop);
	free(f);
	return 0;
}

static struct kvg_group group_of(uint32_t k_dim, uint32_t v_dim, uint32_t k_dtype, uint32_t v_dtype)
{
	return (struct kvg_group){.k_dim = k_dim, .v_dim = v_dim, .k_dtype = k_dtype, .v_dtype = v_dtype};
}

static void test_stride_is_the_larger_half(void **state)
{
	struct kvg_group group = group_of(128, 64, KVG_BF16, KVG_BF16);

	(void)state;
	assert_int_equal(arena_stride(&group), 16 * 128 * 2);
	group = group_of(64, 64, KVG_BF16, KVG_F32);
	assert_int_equal(arena_stride(&group), 16 * 64 * 4);
	group = group_of(80, 80, KVG_F16, KVG_F16);
	assert_int_equal(arena_stride(&group), 2560);
}

static size_t blocks_with_metadata(size_t pool, size_t granularity)
{
	struct meta *meta;
	size_t blocks;

	assert_int_equal(meta_new(pool, pool, (uint32_t)granularity, &meta), 0);
	blocks = meta->header->bitmap_size * 8;
	if (meta->header->places_size / (KVG_BLOCK_TOKENS * sizeof(struct meta_place)) < blocks)
		blocks = meta->header->places_size / (KVG_BLOCK_TOKENS * sizeof(struct meta_place));
	(void)meta_free(meta);
	return blocks;
}

static void check_extent_size(size_t pool, size_t stride, size_t granularity, size_t most)
{
	size_t size = arena_extent_size(pool, stride, granularity);

	assert_true(size >= pool);
	assert_int_equal(size % granularity, 0);
	assert_int_equal(size % (2 * stride * KVG_RUN_BLOCKS), 0);
	assert_int_equal(size / 2 % stride, 0);
	assert_true(size / (2 * stride) <= most);
	assert_int_equal(arena_extent_size(size, stride, granularity), size);
}

/* For every head_dim: whole runs in each half, whole pages, blocks that the metadata has room for, not a unit too many.
 */
static void test_extent_size_fits_every_geometry(void **state)
{
	(void)state;
	for (size_t granularity = 4096; granularity <= 2 << 20; granularity *= 512)
		for (size_t pool = granularity == 4096 ? 64 << 10 : granularity; pool <= 64 << 20; pool *= 2) {
			size_t most = blocks_with_metadata(pool, granularity);

			for (uint32_t dim = 4; dim <= 1024; dim++)
				check_extent_size(pool, KVG_BLOCK_TOKENS * dim * 2, granularity, most);
		}
}

static void test_addresses(void **state)
{
	struct fixture *f = *state;
	struct kvg_layout layout = {.model = "m", .group_count = 1};
	struct arena *arena = NULL;
	uint32_t last;

	layout.groups[0] = group_of(80, 48, KVG_BF16, KVG_BF16);
	assert_int_equal(arena_new(f->pool, &layout, &arena), 0);
	assert_int_equal(arena->extent_size, 81920);
	assert_int_equal(arena->ids_per_extent, 2 * arena->blocks_per_extent);
	/* The pool's 10 extents of 64 KiB pay for 8 of these. */
	assert_int_equal(arena->slots, 8);
	assert_int_equal(arena->free_count, 8);
	assert_int_equal(arena->free_slots[7], 0); /* low slots first */
	for (uint32_t i = 0; i < 8; i++)
		assert_int_equal(arena->extent_of_slot[i], SLOT_NONE);
	/* V of the last block of slot 3 ends where slot 4 begins. */
	last = 3 * arena->ids_per_extent + arena->blocks_per_extent - 1;
	assert_int_equal(last * arena->stride + arena->extent_size / 2 + arena->stride, 4 * arena->extent_size);
	assert_int_equal((last + 1) * arena->stride, 3 * arena->extent_size + arena->extent_size / 2);
	assert_ptr_equal(arena_ref(arena), arena);
	assert_null(arena_unref(arena));
	assert_int_equal(arena->refs, 1);
	assert_null(arena_unref(arena));
	assert_null(arena_unref(NULL));
}

/* Addresses are reserved and given back on the executor, not by who refers to the arena. */
static void test_addresses_are_the_executors(void **state)
{
	struct fixture *f = *state;
	struct kvg_layout layout = {.model = "m", .group_count = 1};
	struct arena *arena = NULL;

	layout.groups[0] = group_of(8, 8, KVG_BF16, KVG_BF16);
	assert_int_equal(arena_new(f->pool, &layout, &arena), 0);
	assert_null(arena->base);
	assert_null(arena_unref(arena));
	assert_int_equal(executor_pending(f->executor), 0);
	assert_int_equal(arena_new(f->pool, &layout, &arena), 0);
	assert_int_equal(arena_open(arena), 0);
	assert_non_null(arena->base);
	assert_null(arena->pairs);
	assert_int_equal(arena_back_pairs(arena, 9), 0);
	assert_null(arena_unref(arena_ref(arena)));
	assert_int_equal(executor_pending(f->executor), 0);
	assert_null(arena_unref(arena));
	assert_int_equal(executor_pending(f->executor), 1); /* drained at the end */
}

static void test_too_many_blocks(void **state)
{
	struct fixture *f = *state;
	struct kvg_layout layout = {.model = "m", .group_count = 1};
	struct arena *arena = NULL;

	layout.groups[0] = group_of(8, 8, KVG_BF16, KVG_BF16);
	f->pool->extent_count = 1u << 26; /* of 256 ids each */
	assert_int_equal(arena_new(f->pool, &layout, &arena), -EOVERFLOW);
	assert_null(arena);
	f->pool->extent_count = 10;
}

/* An extent that is larger than the whole pool has a place, though nobody can pay for it. */
static void test_extent_larger_than_the_pool(void **state)
{
	struct fixture *f = *state;
	struct kvg_layout layout = {.model = "m", .group_count = 1};
	struct arena *arena = NULL;

	layout.groups[0] = group_of(1021, 1021, KVG_F32, KVG_F32);
	assert_int_equal(arena_new(f->pool, &layout, &arena), 0);
	assert_true(arena->extent_size > 10 * (64 << 10));
	assert_int_equal(arena->slots, 1);
	assert_null(arena_unref(arena));
}

#define ARENA_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_stride_is_the_larger_half),
		cmocka_unit_test(test_extent_size_fits_every_geometry),
		ARENA_TEST(test_addresses),
		ARENA_TEST(test_addresses_are_the_executors),
		ARENA_TEST(test_too_many_blocks),
		ARENA_TEST(test_extent_larger_than_the_pool),
	};

	return runner_run("arena", tests, sizeof(tests) / sizeof(tests[0]));
}
