#include "daemon/memory/meta.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "tests/support/runner.h"

#define EXTENT (64u << 10)

static struct kvg_layout layout_of(uint32_t layers, uint32_t heads, uint32_t sequences)
{
	struct kvg_layout layout = {.model = "m", .group_count = 1, .max_sequences = sequences, .max_tokens = 1024};

	layout.groups[0] = (struct kvg_group){.layers = layers, .head_count = heads, .k_dim = 8, .v_dim = 8};
	return layout;
}

static void test_fixed_part(void **state)
{
	struct meta *meta;

	(void)state;
	assert_int_equal(meta_new(100 * EXTENT, EXTENT, 4096, &meta), 0);
	assert_int_equal(meta->header->magic, META_MAGIC);
	assert_int_equal(meta->header->version, META_VERSION);
	assert_int_equal(meta->header->extent_count, 100);
	assert_true(meta->header->bitmap_size * 8 >= EXTENT / (2 * META_MIN_STRIDE));
	assert_true(meta->header->places_size >=
		    EXTENT / (2 * META_MIN_STRIDE) * KVG_BLOCK_TOKENS * sizeof(struct meta_place));
	assert_ptr_equal(meta_bitmap(meta, 99) + meta->header->bitmap_size,
		meta_bitmap(meta, 0) + 100 * meta->header->bitmap_size);
	memset(meta_bitmap(meta, 99), 0xff, meta->header->bitmap_size);
	memset(meta_places(meta, 99), 0xff, meta->header->places_size);
	assert_int_equal(meta_places(meta, 0)->pos, 0);
	assert_null(meta_free(meta));
	assert_null(meta_free(NULL));
}

/* Places give their memory back, those of the neighbours stay. */
static void test_forget_places(void **state)
{
	struct meta *meta;
	uint64_t before;

	(void)state;
	assert_int_equal(meta_new(4 * EXTENT, EXTENT, 4096, &meta), 0);
	for (uint32_t i = 0; i < 4; i++)
		memset(meta_places(meta, i), 1, meta->header->places_size);
	before = meta_physical(meta);
	meta_forget_places(meta, 1);
	assert_int_equal(meta_physical(meta), before - meta->header->places_size);
	assert_int_equal(meta_places(meta, 1)->pos, 0);
	assert_int_equal(meta_places(meta, 0)->pos, 0x01010101);
	assert_int_equal(meta_places(meta, 2)->pos, 0x01010101);
	(void)meta_free(meta);
}

/* The extent's pages that exist, by bit. */
static uint64_t resident(const struct meta *meta, uint32_t extent)
{
	size_t pages = meta->header->places_size / 4096;
	unsigned char there[64] = {0};
	uint64_t mask = 0;

	assert_in_range(pages, 2, 63);
	assert_int_equal(mincore(meta_places(meta, extent), meta->header->places_size, there), 0);
	for (size_t i = 0; i < pages; i++)
		mask |= (uint64_t)(there[i] & 1) << i;
	return mask;
}

/* Of one extent as many as its blocks need, and at most all; of the others none. */
static void test_populate_places(void **state)
{
	const uint32_t blocks = 4096 / (KVG_BLOCK_TOKENS * sizeof(struct meta_place)); /* of a page */
	struct meta *meta;
	uint64_t all;

	(void)state;
	assert_int_equal(meta_new(4 * EXTENT, EXTENT, 4096, &meta), 0);
	all = (UINT64_C(1) << meta->header->places_size / 4096) - 1;
	for (uint32_t i = 0; i < 4; i++)
		assert_int_equal(resident(meta, i), 0);
	meta_populate_places(meta, 1, blocks + 1);
	assert_int_equal(resident(meta, 0), 0);
	assert_int_equal(resident(meta, 1), 3);
	assert_int_equal(resident(meta, 2), 0);
	meta_populate_places(meta, 2, (uint32_t)(meta->header->places_size / 4096 + 1) * blocks);
	assert_int_equal(resident(meta, 1), 3);
	assert_int_equal(resident(meta, 2), all);
	assert_int_equal(resident(meta, 3), 0);
	meta_forget_places(meta, 2);
	assert_int_equal(resident(meta, 2), 0);
	assert_int_equal(resident(meta, 1), 3);
	(void)meta_free(meta);
}

/* Every table of a part lies in it, none overlaps another: each is filled with a value of its own. */
static void fill_part(const struct meta_part *part, uint8_t value)
{
	const struct meta_worker *worker = part->worker;
	size_t rows = (size_t)worker->layers * worker->heads, n = worker->max_sequences;

	memset(part->seqs, value, n * sizeof(struct meta_seq));
	memset(part->rows, value + 1, n * rows * sizeof(struct meta_row));
	memset(part->scored, value + 2, n * worker->layers * sizeof(uint32_t));
	memset(part->held, value + 3, n * rows * worker->row_cap * sizeof(uint32_t));
	memset(part->runs, value + 4, n * worker->stripe_cap * rows * sizeof(uint32_t));
	for (uint8_t i = 0; i < META_RECORDS; i++) {
		const struct meta_record *record = &part->records[i];

		memset(record->redo, value + i + 5, sizeof(struct meta_redo));
		memset(record->rows, value + i + 6, rows * sizeof(struct meta_redo_row));
		memset(record->moves, value + i + 7, worker->move_cap * sizeof(struct meta_move));
		memset(record->relocations, value + i + 8, worker->move_cap * sizeof(struct meta_relocation));
	}
}

static void expect_bytes(const void *data, size_t size, uint8_t value)
{
	const uint8_t *bytes = data;

	assert_int_equal(bytes[0], value);
	assert_memory_equal(bytes, bytes + 1, size - 1);
}

static void check_part(const struct meta_part *part, uint8_t value)
{
	const struct meta_worker *worker = part->worker;
	size_t rows = (size_t)worker->layers * worker->heads, n = worker->max_sequences;

	expect_bytes(part->seqs, n * sizeof(struct meta_seq), value);
	expect_bytes(part->rows, n * rows * sizeof(struct meta_row), value + 1);
	expect_bytes(part->scored, n * worker->layers * sizeof(uint32_t), value + 2);
	expect_bytes(part->held, n * rows * worker->row_cap * sizeof(uint32_t), value + 3);
	expect_bytes(part->runs, n * worker->stripe_cap * rows * sizeof(uint32_t), value + 4);
	for (uint8_t i = 0; i < META_RECORDS; i++) {
		const struct meta_record *record = &part->records[i];
		uint8_t first = (uint8_t)(value + i);

		expect_bytes(record->redo, sizeof(struct meta_redo), (uint8_t)(first + 5));
		expect_bytes(record->rows, rows * sizeof(struct meta_redo_row), (uint8_t)(first + 6));
		expect_bytes(record->moves, worker->move_cap * sizeof(struct meta_move), (uint8_t)(first + 7));
		expect_bytes(
			record->relocations, worker->move_cap * sizeof(struct meta_relocation), (uint8_t)(first + 8));
	}
}

static void add_part(struct meta *meta, const struct kvg_layout *layout, uint64_t id, struct meta_part *part)
{
	assert_int_equal(meta_part_new(meta, layout, 80, part), 0);
	part->worker->id = id;
}

static void test_parts_do_not_overlap(void **state)
{
	struct kvg_layout small = layout_of(1, 1, 1), odd = layout_of(3, 5, 7), large = layout_of(2, 8, 40);
	struct meta_part parts[3];
	struct meta *meta;

	(void)state;
	assert_int_equal(meta_new(4 * EXTENT, EXTENT, 4096, &meta), 0);
	add_part(meta, &small, 1, &parts[0]);
	add_part(meta, &odd, 2, &parts[1]);
	add_part(meta, &large, 3, &parts[2]);
	for (uint8_t i = 0; i < 3; i++)
		fill_part(&parts[i], (uint8_t)(10 + 20 * i));
	for (uint8_t i = 0; i < 3; i++)
		check_part(&parts[i], (uint8_t)(10 + 20 * i));
	for (uint32_t i = 0; i < 3; i++)
		meta_part_deinit(meta, &parts[i]);
	(void)meta_free(meta);
}

/* A range that a worker left is empty when the next one gets it, and its neighbours keep theirs. */
static void test_ranges_are_reused_clean(void **state)
{
	struct kvg_layout layout = layout_of(2, 2, 4);
	struct meta_part parts[3], again;
	struct meta *meta;
	uint64_t offset;

	(void)state;
	assert_int_equal(meta_new(4 * EXTENT, EXTENT, 4096, &meta), 0);
	for (uint32_t i = 0; i < 3; i++) {
		add_part(meta, &layout, i + 1, &parts[i]);
		fill_part(&parts[i], (uint8_t)(20 * i + 1));
	}
	offset = parts[1].worker->offset;
	meta_part_deinit(meta, &parts[1]);
	meta_part_deinit(meta, &parts[1]); /* once more does nothing */
	add_part(meta, &layout, 9, &again);
	assert_int_equal(again.worker->offset, offset);
	expect_bytes(again.held, 64, 0);
	expect_bytes(again.records[0].redo, sizeof(struct meta_redo), 0);
	check_part(&parts[0], 1);
	check_part(&parts[2], 41);
	meta_part_deinit(meta, &again);
	meta_part_deinit(meta, &parts[0]);
	meta_part_deinit(meta, &parts[2]);
	(void)meta_free(meta);
}

static void test_forget_one_sequence(void **state)
{
	struct kvg_layout layout = layout_of(2, 8, 3);
	struct meta_part part;
	struct meta *meta;

	(void)state;
	layout.max_tokens = 1 << 16;
	assert_int_equal(meta_new(4 * EXTENT, EXTENT, 4096, &meta), 0);
	assert_int_equal(meta_part_new(meta, &layout, 4112, &part), 0);
	part.worker->id = 1;
	fill_part(&part, 1);
	meta_part_forget(meta, &part, 1);
	assert_int_equal(meta_rows(&part, 1)[0].base_len | meta_rows(&part, 1)[15].held_blocks, 0);
	assert_int_equal(meta_held(&part, 1, 8)[0], 0);
	assert_int_equal(meta_held(&part, 0, 15)[4111], 0x04040404);
	assert_int_equal(meta_held(&part, 2, 0)[0], 0x04040404);
	assert_int_equal(meta_rows(&part, 2)[0].base_len, 0x02020202);
	assert_int_equal(part.scored[2], 0);
	assert_int_equal(part.scored[1], 0x03030303);
	assert_int_equal(part.scored[4], 0x03030303);
	meta_part_deinit(meta, &part);
	(void)meta_free(meta);
}

static void test_table_is_full(void **state)
{
	struct kvg_layout layout = layout_of(1, 1, 1), huge = layout_of(1024, 1024, 1u << 20);
	struct meta_part part, kept = {0};
	struct meta *meta;

	(void)state;
	assert_int_equal(meta_new(4 * EXTENT, EXTENT, 4096, &meta), 0);
	assert_int_equal(meta_part_new(meta, &huge, 1 << 20, &kept), -EFBIG);
	assert_null(kept.base);
	for (uint32_t i = 0; i < META_MAX_WORKERS; i++)
		meta->workers[i].id = i + 1;
	assert_int_equal(meta_part_new(meta, &layout, 80, &part), -EUSERS);
	meta->workers[77].id = 0;
	add_part(meta, &layout, 1, &part);
	assert_ptr_equal(part.worker, &meta->workers[77]);
	meta_part_deinit(meta, &part);
	(void)meta_free(meta);
}

/* Position-independent: a second mapping elsewhere says the same. */
static void test_second_mapping(void **state)
{
	struct kvg_layout layout = layout_of(2, 3, 4);
	const struct meta_worker *worker;
	struct meta_part part;
	struct meta *meta;
	uint8_t *base;
	size_t size;

	(void)state;
	assert_int_equal(meta_new(4 * EXTENT, EXTENT, 4096, &meta), 0);
	add_part(meta, &layout, 5, &part);
	meta_held(&part, 3, 5)[79] = 4711;
	size = part.worker->offset + part.worker->size;
	base = mmap(NULL, size, PROT_READ, MAP_SHARED, meta->fd, 0);
	assert_ptr_not_equal(base, MAP_FAILED);
	worker = (const void *)(base + ((const struct meta_header *)(const void *)base)->workers_offset);
	assert_int_equal(worker->id, 5);
	assert_int_equal(((const uint32_t *)(const void *)(base + worker->held_offset))[(3 * 6 + 5) * 80 + 79], 4711);
	assert_int_equal(munmap(base, size), 0);
	meta_part_deinit(meta, &part);
	(void)meta_free(meta);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_fixed_part),
		cmocka_unit_test(test_forget_places),
		cmocka_unit_test(test_populate_places),
		cmocka_unit_test(test_parts_do_not_overlap),
		cmocka_unit_test(test_ranges_are_reused_clean),
		cmocka_unit_test(test_forget_one_sequence),
		cmocka_unit_test(test_table_is_full),
		cmocka_unit_test(test_second_mapping),
	};

	return runner_run("meta", tests, sizeof(tests) / sizeof(tests[0]));
}
