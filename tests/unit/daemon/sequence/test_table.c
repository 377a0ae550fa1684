#include "daemon/sequence/table.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/support/runner.h"

#define ROW_CAP 1040u /* more than a page of ids */

static struct kvg_layout layout_of(uint32_t layers, uint32_t heads, uint32_t sequences)
{
	struct kvg_layout layout = {.max_sequences = sequences};

	layout.groups[0] = (struct kvg_group){.layers = layers, .head_count = heads};
	return layout;
}

static void test_header_and_addresses(void **state)
{
	struct kvg_layout layout = layout_of(3, 5, 7);
	struct table table;

	(void)state;
	assert_int_equal(table_init(&table, &layout, ROW_CAP), 0);
	assert_int_equal(table.header->magic, KVG_TABLE_MAGIC);
	assert_int_equal(table.header->version, KVG_ABI_VERSION);
	assert_int_equal(table.header->row_cap, ROW_CAP);
	assert_int_equal(table.header->size, table.size);
	/* [layers][max_sequences][heads]: layer 2, slot 6, head 4 is the last. */
	assert_ptr_equal(table_base_len(&table, 6, 2 * 5 + 4), table.base_len + 3 * 7 * 5 - 1);
	assert_ptr_equal(table_base_len(&table, 2, 5 + 3), table.base_len + (1 * 7 + 2) * 5 + 3);
	assert_ptr_equal(table_row(&table, 2, 5 + 3), table.ids + ((1 * 7 + 2) * 5 + 3) * ROW_CAP);
	table_row(&table, 6, 14)[ROW_CAP - 1] = 1; /* within the file */
	assert_int_equal(
		(const uint8_t *)(table_row(&table, 6, 14) + ROW_CAP) <= (const uint8_t *)table.header + table.size, 1);
	table_deinit(&table);
	table_deinit(&table);
	assert_int_equal(table.fd, -1);
}

/* The worker's descriptor: no writing, no writable mapping, no other size, no more seals. */
static void test_reader_can_only_read(void **state)
{
	struct kvg_layout layout = layout_of(1, 1, 1);
	struct table table;
	struct stat st;
	const struct kvg_table *view;

	(void)state;
	assert_int_equal(table_init(&table, &layout, 24), 0);
	assert_int_equal(fcntl(table.reader_fd, F_GETFL) & O_ACCMODE, O_RDONLY);
	assert_int_equal(write(table.reader_fd, "x", 1), -1);
	assert_ptr_equal(mmap(NULL, table.size, PROT_READ | PROT_WRITE, MAP_SHARED, table.reader_fd, 0), MAP_FAILED);
	assert_int_equal(errno, EACCES);
	assert_int_equal(fstat(table.reader_fd, &st), 0);
	assert_int_equal(st.st_mode & 0777, 0600);
	assert_int_equal(fcntl(table.fd, F_GET_SEALS), F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW);
	view = mmap(NULL, table.size, PROT_READ, MAP_SHARED, table.reader_fd, 0);
	assert_ptr_not_equal(view, MAP_FAILED);
	table.slots[0].reserved_pos = 42;
	assert_int_equal(
		((const struct kvg_slot *)(const void *)((const char *)view + view->slot_offset))->reserved_pos, 42);
	assert_int_equal(munmap((void *)(uintptr_t)view, table.size), 0);
	table_deinit(&table);
}

/* A slot's rows are forgotten, with their memory; the neighbours' stay to the last id. */
static void test_forget(void **state)
{
	struct kvg_layout layout = layout_of(2, 4, 3);
	struct table table;
	uint64_t before;

	(void)state;
	assert_int_equal(table_init(&table, &layout, ROW_CAP), 0);
	for (uint32_t slot = 0; slot < 3; slot++) {
		for (uint32_t row = 0; row < 8; row++) {
			memset(table_row(&table, slot, row), (int)slot + 1, ROW_CAP * sizeof(uint32_t));
			*table_base_len(&table, slot, row) = slot + 1;
		}
		table.slots[slot].epoch = slot + 1;
	}
	before = table_physical(&table);
	table_forget(&table, 1);
	assert_true(table_physical(&table) <= before - 2 * 3 * 4096);
	for (uint32_t row = 0; row < 8; row++) {
		assert_int_equal(table_row(&table, 0, row)[ROW_CAP - 1], 0x01010101);
		assert_int_equal(table_row(&table, 2, row)[0], 0x03030303);
		assert_int_equal(*table_base_len(&table, 0, row), 1);
		assert_int_equal(*table_base_len(&table, 1, row), 0);
		assert_int_equal(*table_base_len(&table, 2, row), 3);
	}
	assert_int_equal(table.slots[1].epoch, 0);
	assert_int_equal(table.slots[2].epoch, 3);
	table_deinit(&table);
}

static void test_untouched_rows_cost_nothing(void **state)
{
	struct kvg_layout layout = layout_of(32, 8, 10000);
	struct table table;

	(void)state;
	assert_int_equal(table_init(&table, &layout, 8208), 0);
	assert_true(table.size > (uint64_t)1 << 36);
	assert_true(table_physical(&table) <= 8192);
	table_deinit(&table);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_header_and_addresses),
		cmocka_unit_test(test_reader_can_only_read),
		cmocka_unit_test(test_forget),
		cmocka_unit_test(test_untouched_rows_cost_nothing),
	};

	return runner_run("table", tests, sizeof(tests) / sizeof(tests[0]));
}
