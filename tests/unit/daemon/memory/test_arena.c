/* Addressing: extent sizes, strides and slots. */
#include <string.h>

#include "daemon/memory/pool.h"

#include "tests/support/runner.h"

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

/* For every head_dim: whole runs in each half, whole pages, blocks that the metadata has room for, not a unit too many.
 */
static void test_extent_size_fits_every_geometry(void **state)
{
	(void)state;
	for (size_t pool = 64 << 10; pool <= 1 << 20; pool *= 2) {
		for (uint32_t dim = 4; dim <= 1024; dim++) {
			size_t stride = KVG_BLOCK_TOKENS * dim * 2, size = arena_extent_size(pool, stride);

			assert_true(size >= pool);
			assert_int_equal(size % 4096, 0);
			assert_int_equal(size % (2 * stride * KVG_RUN_BLOCKS), 0);
			assert_int_equal(size / 2 % stride, 0);
			assert_true(size / (2 * stride) <=
				    (pool / (2 * META_MIN_STRIDE) < 64 ? 64 : pool / (2 * META_MIN_STRIDE)));
			assert_int_equal(arena_extent_size(size, stride), size);
		}
	}
}

static void test_addresses(void **state)
{
	struct kvg_layout layout = {.model = "m", .group_count = 1};
	struct arena *arena = NULL;
	uint32_t last;

	(void)state;
	layout.groups[0] = group_of(80, 48, KVG_BF16, KVG_BF16);
	assert_int_equal(arena_new(&kind_host, &layout, 64 << 10, 10, &arena), 0);
	assert_int_equal(arena->extent_size, 81920);
	assert_int_equal(arena->ids_per_extent, 2 * arena->blocks_per_extent);
	assert_int_equal(arena->free_count, 10);
	assert_int_equal(arena->free_slots[9], 0); /* low slots first */
	for (uint32_t i = 0; i < 10; i++)
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

static void *no_reserve(size_t size)
{
	(void)size;
	return NULL;
}

static void test_no_address_space(void **state)
{
	struct kind_ops kind = kind_host;
	struct kvg_layout layout = {.model = "m", .group_count = 1};
	struct arena *arena = (void *)&kind;

	(void)state;
	kind.reserve = no_reserve;
	layout.groups[0] = group_of(8, 8, KVG_BF16, KVG_BF16);
	assert_true(arena_new(&kind, &layout, 64 << 10, 10, &arena) < 0);
	assert_ptr_equal(arena, &kind);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_stride_is_the_larger_half),
		cmocka_unit_test(test_extent_size_fits_every_geometry),
		cmocka_unit_test(test_addresses),
		cmocka_unit_test(test_no_address_space),
	};

	return runner_run("arena", tests, sizeof(tests) / sizeof(tests[0]));
}
