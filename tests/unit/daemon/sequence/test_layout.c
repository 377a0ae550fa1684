#include "daemon/sequence/layout.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "tests/support/runner.h"

static struct kvg_layout good(void)
{
	struct kvg_layout layout = {
		.model = "m", .hidden_dim = 256, .group_count = 1, .max_sequences = 4, .max_tokens = 128};

	layout.groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = 6,
		.head_count = 4,
		.head_total = 4,
		.world = 1,
		.k_dim = 32,
		.v_dim = 32,
		.k_dtype = KVG_BF16,
		.v_dtype = KVG_BF16,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 2};
	return layout;
}

static void expect(const struct kvg_layout *layout, int status, const char *expected)
{
	char text[KVG_TEXT_SIZE] = "";

	assert_int_equal(layout_check(layout, text, sizeof(text)), status);
	assert_string_equal(text, expected);
}

static void test_row_cap(void **state)
{
	struct kvg_layout layout = good();

	(void)state;
	layout.max_tokens = 1;
	assert_int_equal(layout_row_cap(&layout), 24);
	layout.max_tokens = 128;
	assert_int_equal(layout_row_cap(&layout), 24);
	layout.max_tokens = 129;
	assert_int_equal(layout_row_cap(&layout), 32);
	layout.max_tokens = 4096;
	assert_int_equal(layout_row_cap(&layout), 34 * 8);
	layout.max_tokens = 1u << 24;
	assert_int_equal(layout_row_cap(&layout), ((1u << 17) + 2) * 8);
}

static void test_names(void **state)
{
	struct kvg_layout layout = good();

	(void)state;
	expect(&layout, 0, "");
	layout.model[0] = '\0';
	expect(&layout, -EINVAL, "layout: the model's name must have 1 to 127 bytes");
	memset(layout.model, 'x', sizeof(layout.model));
	expect(&layout, -EINVAL, "layout: the model's name must have 1 to 127 bytes");
	layout.model[127] = '\0';
	assert_int_equal(layout_check(&layout, (char[512]){0}, 512), 0);
}

/* What the ABI knows and this daemon does not build is refused by name. */
static void test_not_built(void **state)
{
	struct kvg_layout layout = good();

	(void)state;
	layout.group_count = 2;
	expect(&layout, -EOPNOTSUPP, "layout m: 2 groups, this daemon takes 1");
	layout.group_count = 0;
	expect(&layout, -EOPNOTSUPP, "layout m: 0 groups, this daemon takes 1");
	layout = good();
	layout.groups[0].kind = KVG_GROUP_MLA;
	expect(&layout, -EOPNOTSUPP, "layout m: group kind MLA (3), this daemon takes GLOBAL");
	layout.groups[0].kind = 77;
	expect(&layout, -EOPNOTSUPP, "layout m: group kind unknown (77), this daemon takes GLOBAL");
	layout = good();
	layout.groups[0].v_dtype = 4;
	expect(&layout, -EOPNOTSUPP, "layout m: dtypes 1 and 4, this daemon takes bf16 (1), f16 (2), f32 (3)");
	layout.groups[0].v_dtype = 0;
	expect(&layout, -EOPNOTSUPP, "layout m: dtypes 1 and 0, this daemon takes bf16 (1), f16 (2), f32 (3)");
	layout = good();
	layout.groups[0].scale_kind = 1;
	expect(&layout, -EOPNOTSUPP, "layout m: scale kind 1, this daemon takes none");
	layout = good();
	layout.groups[0].block_tokens = 32;
	expect(&layout, -EOPNOTSUPP, "layout m: blocks of 32 tokens, this daemon takes 16");
}

/* The last value that is taken on either side of a range, and the first that is not. */
static void check_range(size_t offset, uint32_t least, uint32_t most, const char *name)
{
	struct kvg_layout layout = good();
	uint32_t *field = (uint32_t *)(void *)((char *)&layout + offset);
	char text[KVG_TEXT_SIZE], start[64];

	(void)snprintf(start, sizeof(start), "layout m: %s is ", name);
	*field = least;
	assert_int_equal(layout_check(&layout, text, sizeof(text)), 0);
	*field = most;
	if (layout_check(&layout, text, sizeof(text)) < 0)
		fail_msg("%s", text);
	*field = least - 1;
	assert_int_equal(layout_check(&layout, text, sizeof(text)), -EINVAL);
	assert_memory_equal(text, start, strlen(start));
	*field = most + 1;
	assert_int_equal(layout_check(&layout, text, sizeof(text)), -EINVAL);
	assert_memory_equal(text, start, strlen(start));
}

#define GROUP(field) (offsetof(struct kvg_layout, groups) + offsetof(struct kvg_group, field))

static void test_ranges(void **state)
{
	(void)state;
	check_range(GROUP(layers), 1, 1024, "layers");
	check_range(GROUP(k_dim), 4, 1024, "k_dim");
	check_range(GROUP(v_dim), 4, 1024, "v_dim");
	check_range(GROUP(query_heads), 1, 128, "query_heads");
	check_range(GROUP(head_total), 4, 4096, "head_total");
	check_range(offsetof(struct kvg_layout, hidden_dim), 1, 1u << 17, "hidden_dim");
	check_range(offsetof(struct kvg_layout, max_sequences), 1, 1u << 20, "max_sequences");
	check_range(offsetof(struct kvg_layout, max_tokens), 1, 1u << 24, "max_tokens");
}

static void test_heads_and_ranks(void **state)
{
	struct kvg_layout layout = good();
	char text[KVG_TEXT_SIZE];

	(void)state;
	layout.groups[0].head_begin = UINT32_MAX; /* + head_count must not wrap */
	assert_int_equal(layout_check(&layout, text, sizeof(text)), -EINVAL);
	layout = good();
	layout.groups[0].rank = 1;
	assert_int_equal(layout_check(&layout, text, sizeof(text)), -EINVAL);
	layout.groups[0].world = 2;
	assert_int_equal(layout_check(&layout, text, sizeof(text)), 0);
	layout.groups[0].world = 0;
	assert_int_equal(layout_check(&layout, text, sizeof(text)), -EINVAL);
	layout = good();
	layout.groups[0].head_count = 0;
	assert_int_equal(layout_check(&layout, text, sizeof(text)), -EINVAL);
}

static void test_tables_have_a_limit(void **state)
{
	struct kvg_layout layout = good();
	char text[KVG_TEXT_SIZE];

	(void)state;
	layout.groups[0].layers = 1024;
	layout.groups[0].head_count = layout.groups[0].head_total = 1024;
	layout.max_sequences = 1u << 20;
	layout.max_tokens = 1u << 24;
	assert_int_equal(layout_check(&layout, text, sizeof(text)), -EINVAL);
	assert_non_null(strstr(text, "bytes of tables is "));
	layout.max_sequences = 2;
	layout.max_tokens = 128 * 254; /* row_cap 2048: 2^20 rows x 2 x 2^11 x 4 = 2^34 */
	if (layout_check(&layout, text, sizeof(text)) < 0)
		fail_msg("%s", text);
	layout.max_tokens++;
	assert_int_equal(layout_check(&layout, text, sizeof(text)), -EINVAL);
}

static void expect_device(const struct kvg_layout *layout, int status, const char *expected)
{
	char text[KVG_TEXT_SIZE] = "";

	assert_int_equal(layout_check(layout, text, sizeof(text)), 0);
	assert_int_equal(layout_check_device(layout, text, sizeof(text)), status);
	assert_string_equal(text, expected);
}

/* What a GPU's kernels cannot do is refused when a worker registers, not when they fault. */
static void test_device(void **state)
{
	struct kvg_layout layout = good();

	(void)state;
	expect_device(&layout, 0, "");
	layout.groups[0].k_dim = 36;
	expect_device(
		&layout, -EOPNOTSUPP, "layout m: k_dim is 36, 72 bytes; the kind cuda takes multiples of 16 bytes");
	layout.groups[0].k_dtype = KVG_F32;
	expect_device(&layout, 0, "");
	layout.groups[0].v_dim = 6;
	layout.groups[0].v_dtype = KVG_F32;
	expect_device(
		&layout, -EOPNOTSUPP, "layout m: v_dim is 6, 24 bytes; the kind cuda takes multiples of 16 bytes");
	layout = good();
	layout.groups[0].layers = 255;
	layout.groups[0].head_count = layout.groups[0].head_total = 257;
	expect_device(&layout, 0, "");
	layout.groups[0].layers = 256;
	layout.groups[0].head_count = layout.groups[0].head_total = 256;
	expect_device(
		&layout, -EOPNOTSUPP, "layout m: 256 layers of 256 heads are 65536 rows; the kind cuda takes 65535");
}

static void test_device_table(void **state)
{
	struct kvg_layout layout = good();

	(void)state;
	/* 24 rows of 4 sequences: 384 bytes of lengths, and 24 ids each. */
	assert_int_equal(layout_device_table(&layout), 512 + 96 * 24 * 4);
	layout.max_tokens = 1u << 24;
	layout.max_sequences = 20; /* 480 rows of 2^20 + 16 ids */
	expect_device(&layout, 0, "");
	layout.max_sequences = 86;
	expect_device(&layout, -EOPNOTSUPP,
		"layout m: 86 sequences of 16777216 tokens need a table of 8657184000 bytes on the device, at most "
		"8589934592");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_row_cap),
		cmocka_unit_test(test_names),
		cmocka_unit_test(test_not_built),
		cmocka_unit_test(test_ranges),
		cmocka_unit_test(test_heads_and_ranks),
		cmocka_unit_test(test_tables_have_a_limit),
		cmocka_unit_test(test_device),
		cmocka_unit_test(test_device_table),
	};

	return runner_run("layout", tests, sizeof(tests) / sizeof(tests[0]));
}
