#include "tests/support/runner.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client/table.h"
#include "proto/frame.h"

enum { LAYERS = 3, SLOTS = 2, HEADS = 2, CAP = 4, ROWS = LAYERS * SLOTS * HEADS };

static const struct table_shape shape = {.layers = LAYERS, .heads = HEADS, .max_sequences = SLOTS, .row_cap = CAP};

struct image {
	struct kvg_table header;
	struct kvg_slot slots[SLOTS];
	uint32_t base_len[ROWS];
	uint32_t ids[ROWS * CAP];
};

static struct image make(void)
{
	struct image image = {.header = {.magic = KVG_TABLE_MAGIC,
				      .version = KVG_ABI_VERSION,
				      .layers = LAYERS,
				      .heads = HEADS,
				      .max_sequences = SLOTS,
				      .row_cap = CAP,
				      .slot_offset = offsetof(struct image, slots),
				      .base_len_offset = offsetof(struct image, base_len),
				      .ids_offset = offsetof(struct image, ids),
				      .size = sizeof(struct image)}};

	for (uint32_t i = 0; i < ROWS; i++)
		image.base_len[i] = 100 + i;
	for (uint32_t i = 0; i < ROWS * CAP; i++)
		image.ids[i] = 1000 + i;
	image.slots[1].generation = 42;
	return image;
}

static int map(const struct image *image, size_t size, struct table *ret, const char **what)
{
	int fd = kvg_memfd_from("table", image, size), r;

	assert_true(fd >= 0);
	r = table_map(fd, &shape, ret, what);
	assert_int_equal(close(fd), 0);
	return r;
}

static void finds_rows(void **state)
{
	struct image image = make();
	struct table table;
	const char *what;

	(void)state;
	assert_int_equal(map(&image, sizeof(image), &table, &what), 0);
	assert_int_equal(table.slots[1].generation, 42);
	/* [layers][max_sequences][heads] */
	assert_int_equal(table_row(&table, 2, 1, 1), 2 * 4 + 1 * 2 + 1);
	assert_int_equal(table.base_len[table_row(&table, 2, 1, 1)], 111);
	assert_int_equal(table.ids[table_row(&table, 1, 0, 1) * CAP + 3], 1000 + 5 * CAP + 3);
	table_deinit(&table);
	table_deinit(&table);
}

static void refuses_nonsense_headers(void **state)
{
	static const struct {
		size_t offset;
		uint32_t value;
		const char *what;
	} lies[] = {
		{offsetof(struct kvg_table, magic), KVG_RING_MAGIC, "magic"},
		{offsetof(struct kvg_table, version), 2, "version"},
		{offsetof(struct kvg_table, layers), LAYERS + 1, "shape"},
		{offsetof(struct kvg_table, heads), 0, "shape"},
		{offsetof(struct kvg_table, max_sequences), UINT32_MAX, "shape"},
		{offsetof(struct kvg_table, row_cap), CAP - 1, "shape"},
		{offsetof(struct kvg_table, size), sizeof(struct image) + 1, "size"},
		{offsetof(struct kvg_table, size), sizeof(struct image) - 1, "offsets"},
		{offsetof(struct kvg_table, slot_offset), 0, "offsets"},
		{offsetof(struct kvg_table, base_len_offset), sizeof(struct image), "offsets"},
		{offsetof(struct kvg_table, ids_offset), offsetof(struct image, ids) + 8, "offsets"},
		{offsetof(struct kvg_table, ids_offset) + 4, UINT32_MAX, "offsets"},
	};
	struct table table = {0};
	const char *what;

	(void)state;
	for (size_t i = 0; i < sizeof(lies) / sizeof(*lies); i++) {
		struct image image = make();

		memcpy((uint8_t *)&image.header + lies[i].offset, &lies[i].value, sizeof(uint32_t));
		assert_int_equal(map(&image, sizeof(image), &table, &what), -EPROTO);
		assert_string_equal(what, lies[i].what);
		assert_null(table.header);
	}
	struct image image = make();

	assert_int_equal(map(&image, sizeof(struct kvg_table) - 1, &table, &what), -EPROTO);
	assert_string_equal(what, "size");
}

static void maps_the_staging_area(void **state)
{
	static const struct {
		uint64_t size, rows;
		uint32_t sequences;
		const char *what;
	} lies[] = {
		{4097, 64, 4, "size"},
		{UINT64_MAX, 64, 4, "size"},
		{4096, 4096, 4, "rows offset"},
		{4096, 60, 4, "rows offset"},
		{4096, 64, 17, "rows offset"},
		{4096, 64, UINT32_MAX, "rows offset"},
	};
	int fd = kvg_memfd_new("staging", 4096);
	struct staging_map staging = {0};
	const char *what;
	char byte;

	(void)state;
	for (size_t i = 0; i < sizeof(lies) / sizeof(*lies); i++) {
		assert_int_equal(
			staging_map(fd, lies[i].size, lies[i].rows, lies[i].sequences, &staging, &what), -EPROTO);
		assert_string_equal(what, lies[i].what);
	}
	assert_null(staging.base);
	assert_int_equal(staging_map(fd, 4096, 64, 16, &staging, &what), 0);
	staging.base[4095] = 'z';
	assert_int_equal(pread(fd, &byte, 1, 4095), 1);
	assert_int_equal(byte, 'z');
	staging_unmap(&staging);
	staging_unmap(&staging);
	assert_int_equal(close(fd), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(finds_rows),
		cmocka_unit_test(refuses_nonsense_headers),
		cmocka_unit_test(maps_the_staging_area),
	};

	return runner_run("table", tests, sizeof(tests) / sizeof(*tests));
}
