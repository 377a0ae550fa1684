/* kernels/cuda/tier against a model in host memory; every byte that a kernel could reach is compared. */
#include "kernels/cuda/tier.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/evict.h"
#include "tests/gpu/arena.h"

static struct kvg_cuda_tier *tier;
static struct kvg_cuda_evict *evict;

static const uint32_t grids[] = {0, 1, 3};

#define GRIDS (sizeof(grids) / sizeof(*grids))

/* Positions do not say which pair it is elsewhere in the arena: they are random as well. */
static void assert_arena(const struct arena *arena, const char *after)
{
	uint8_t *got = malloc(arena->bytes);

	assert_non_null(got);
	dev_read(arena->device.k_base, got, arena->bytes);
	for (size_t i = 0; memcmp(got, arena->host.k_base, arena->bytes) != 0 && i < arena->bytes; i++)
		if (got[i] != arena->host.k_base[i])
			fail_msg("after %s: byte %zu of the arena's %zu is %u, not %u", after, i, arena->bytes, got[i],
				arena->host.k_base[i]);
	free(got);
	assert_device(arena->device.pairs, arena->host.pairs, arena->pair_count * sizeof(struct kvg_cuda_pair));
}

/* ---- whole blocks ---- */

static void check_blocks(struct arena *arena, uint32_t count, enum kvg_cuda_block_pairs pairs, uint32_t grid)
{
	struct kvg_cuda_relocation *list = new_array(count, sizeof(*list)), *there;
	const struct kvg_cuda_area *area = &arena->host;

	for (uint32_t i = 0; i < count; i++) {
		/* A source may have several destinations, and be one itself: then of itself. */
		list[i] = (struct kvg_cuda_relocation){arena->free_ids[random_below(&rng, count)],
			arena->free_ids[pairs == KVG_CUDA_PAIRS_FRESH && i % 3 == 0 ? i : count + i]};
		if (pairs == KVG_CUDA_PAIRS_FRESH && i % 3 == 0)
			list[i].src = list[i].dst;
		memmove(area->k_base + list[i].dst * area->stride, area->k_base + list[i].src * area->stride,
			(size_t)16 * area->k_bytes);
		memmove(area->v_base + list[i].dst * area->stride, area->v_base + list[i].src * area->stride,
			(size_t)16 * area->v_bytes);
		for (uint32_t place = 0; place < 16; place++) {
			struct kvg_cuda_pair *pair = pair_at(area, &list[i].dst, place);

			if (pairs == KVG_CUDA_PAIRS_COPIED)
				*pair = *pair_at(area, &list[i].src, place);
			else if (pairs == KVG_CUDA_PAIRS_FRESH)
				*pair = (struct kvg_cuda_pair){0, 1.0f};
		}
	}
	there = dev_new(list, count * sizeof(*list));
	check(kvg_cuda_tier_blocks(tier, &arena->device, there, count, pairs, grid, NULL));
	assert_arena(arena, "copying blocks");
	dev_free(there);
	free(list);
}

static void check_pairs(struct arena *arena, uint32_t count, uint32_t grid)
{
	size_t size = (size_t)count * 16 * sizeof(struct kvg_cuda_pair);
	struct kvg_cuda_pair *want = new_array((size_t)count * 16, sizeof(*want)),
			     *fresh = new_array((size_t)count * 16, sizeof(*fresh));
	uint32_t *ids = dev_new(arena->free_ids, count * sizeof(uint32_t));
	uint8_t *packed = dev_new(NULL, size + 16), poison[16];
	struct kvg_cuda_pair *there;

	memset(poison, POISON, sizeof(poison));
	for (uint32_t i = 0; i < count * 16; i++) {
		want[i] = *pair_at(&arena->host, &arena->free_ids[i / 16], i % 16);
		fresh[i] = (struct kvg_cuda_pair){(int32_t)random_bits(&rng), random_float(&rng)};
		*pair_at(&arena->host, &arena->free_ids[i / 16], i % 16) = fresh[i];
	}
	check(kvg_cuda_tier_pairs_gather(
		tier, &arena->device, ids, count, (struct kvg_cuda_pair *)(void *)packed, grid, NULL));
	assert_device(packed, want, size);
	assert_device(packed + size, poison, sizeof(poison));
	there = dev_new(fresh, size);
	check(kvg_cuda_tier_pairs_scatter(tier, &arena->device, ids, count, there, grid, NULL));
	assert_arena(arena, "scattering pairs");
	dev_free(ids);
	dev_free(packed);
	dev_free(there);
	free(want);
	free(fresh);
}

static void run_blocks(uint32_t k_bytes, uint32_t v_bytes, uint32_t blocks_per_extent, uint32_t extents)
{
	struct arena arena;

	arena_init(&arena, k_bytes, v_bytes, blocks_per_extent, extents);
	for (size_t i = 0; i < GRIDS; i++) {
		check_blocks(&arena, arena.free_count / 2, KVG_CUDA_PAIRS_LEFT, grids[i]);
		check_blocks(&arena, arena.free_count / 3, KVG_CUDA_PAIRS_COPIED, grids[i]);
		check_blocks(&arena, 9, KVG_CUDA_PAIRS_FRESH, grids[i]);
		check_blocks(&arena, 0, KVG_CUDA_PAIRS_FRESH, grids[i]);
		check_pairs(&arena, arena.free_count, grids[i]);
		check_pairs(&arena, 1, grids[i]);
		check_pairs(&arena, 0, grids[i]);
	}
	arena_deinit(&arena);
}

static void test_blocks(void **state)
{
	(void)state;
	run_blocks(256, 256, 37, 5);
	run_blocks(64, 64, 1, 90);
	run_blocks(512, 256, 10, 9);
	run_blocks(16, 1040, 3, 20);
	run_blocks(576, 0, 8, 4);
}

/* ---- packed forms ---- */

/* K, V, and then what is known of the pairs, as the host keeps them. */
static struct kvg_cuda_packed with_rows(const struct kvg_cuda_area *area, uint32_t pairs)
{
	struct kvg_cuda_packed packed = {.pairs = pairs,
		.v = pairs * area->k_bytes,
		.entry_bytes = 12,
		.row = pairs * (area->k_bytes + area->v_bytes)};

	packed.pos = packed.row + 4;
	packed.score = packed.row + 8;
	packed.frame_bytes = (packed.row + pairs * 12 + 15) / 16 * 16 + 32; /* and some bytes of nobody */
	return packed;
}

/* Positions and scores before K and V, and no rows. */
static struct kvg_cuda_packed without_rows(const struct kvg_cuda_area *area, uint32_t pairs)
{
	struct kvg_cuda_packed packed = {.pairs = pairs,
		.pos = 20,
		.score = 16,
		.row = KVG_CUDA_NO_FIELD,
		.entry_bytes = 8,
		.k = (pairs * 8 + 47) / 16 * 16};

	packed.v = packed.k + pairs * area->k_bytes;
	packed.frame_bytes = packed.v + (uint64_t)pairs * area->v_bytes;
	return packed;
}

/* Scores alone, one after the other. */
static struct kvg_cuda_packed scores_only(uint32_t pairs)
{
	return (struct kvg_cuda_packed){.pairs = pairs,
		.pos = KVG_CUDA_NO_FIELD,
		.row = KVG_CUDA_NO_FIELD,
		.k = KVG_CUDA_NO_FIELD,
		.entry_bytes = 4,
		.frame_bytes = (uint64_t)pairs * 4};
}

static uint64_t packed_bytes(const struct kvg_cuda_packed *packed, uint32_t pairs)
{
	return (pairs / packed->pairs + 1) * packed->frame_bytes;
}

/* Puts a pair of the arena's mirror at its spot of the packed form's mirror. */
static void model_pack(const struct kvg_cuda_packed *packed, uint8_t *at, struct kvg_cuda_spot spot,
	const struct kvg_cuda_area *area, uint32_t id, uint32_t place, struct kvg_cuda_pair pair, uint32_t row)
{
	size_t i = spot.pair;

	at += spot.frame * packed->frame_bytes;
	if (packed->k != KVG_CUDA_NO_FIELD) {
		memcpy(at + packed->k + i * area->k_bytes,
			area->k_base + id * area->stride + (size_t)place * area->k_bytes, area->k_bytes);
		memcpy(at + packed->v + i * area->v_bytes,
			area->v_base + id * area->stride + (size_t)place * area->v_bytes, area->v_bytes);
	}
	if (packed->row != KVG_CUDA_NO_FIELD)
		memcpy(at + packed->row + i * packed->entry_bytes, &row, 4);
	if (packed->pos != KVG_CUDA_NO_FIELD)
		memcpy(at + packed->pos + i * packed->entry_bytes, &pair.pos, 4);
	memcpy(at + packed->score + i * packed->entry_bytes, &pair.score, 4);
}

static void model_return(const struct kvg_cuda_packed *packed, const uint8_t *at, const struct kvg_cuda_return *where,
	const struct kvg_cuda_area *area)
{
	struct kvg_cuda_pair *pair = pair_at(area, &where->id, where->place);
	size_t i = where->from.pair;

	at += where->from.frame * packed->frame_bytes;
	memcpy(area->k_base + where->id * area->stride + (size_t)where->place * area->k_bytes,
		at + packed->k + i * area->k_bytes, area->k_bytes);
	memcpy(area->v_base + where->id * area->stride + (size_t)where->place * area->v_bytes,
		at + packed->v + i * area->v_bytes, area->v_bytes);
	memcpy(&pair->pos, at + packed->pos + i * packed->entry_bytes, 4);
	memcpy(&pair->score, at + packed->score + i * packed->entry_bytes, 4);
}

/* ---- collect ---- */

struct shape {
	uint32_t layers, heads, k_bytes, v_bytes, blocks_per_extent, extents;
	uint32_t begin, fold, end; /* positions: candidates, first fresh one, committed */
	bool decode;
};

struct rows {
	struct shape shape;
	struct arena arena;
	uint32_t count, cap;
	uint32_t *ids, *base_len, *length, *held;
	struct kvg_cuda_rows there;
	struct kvg_cuda_scope scope;
	struct kvg_cuda_range protect[2];
	uint32_t prefix;
	uint32_t *offset; /* of decisions */
	uint8_t *keep;
	uint8_t *goes;   /* [count][16 * cap] */
	uint32_t *first; /* [count + 1]: numbers of dropped pairs */
	struct kvg_cuda_kept kept;
	struct kvg_cuda_counts counts;
	uint32_t *dev_first;
};

/* Folded pairs: all positions of [begin, fold) and a few older ones, in random order. */
static void rows_init_row(struct rows *rows, uint32_t row)
{
	const struct shape *shape = &rows->shape;
	uint32_t old = shape->begin ? random_below(&rng, shape->begin + 1) : 0, base = shape->fold - shape->begin + old;
	uint32_t length = base + shape->end - shape->fold, blocks = (base + 15) / 16 + random_below(&rng, 2);
	uint32_t *ids = rows->ids + (size_t)row * rows->cap;

	rows->base_len[row] = base;
	rows->length[row] = length;
	rows->held[row] = blocks * 16 < length ? blocks * 16 : length;
	if (rows->there.max_length < length)
		rows->there.max_length = length;
	for (uint32_t i = 0; i < (length + 15) / 16; i++)
		ids[i] = take_block(&rows->arena);
	for (uint32_t i = 0; i < base; i++) {
		uint32_t at = random_below(&rng, i + 1);
		struct kvg_cuda_pair *pair = pair_at(&rows->arena.host, ids, i),
				     *other = pair_at(&rows->arena.host, ids, at);

		pair->pos = other->pos;
		other->pos = (int32_t)(i < old ? i : shape->begin + i - old);
	}
	for (uint32_t i = 0; i < length; i++)
		if (random_below(&rng, 9) == 0)
			pair_at(&rows->arena.host, ids, i)->score = -INFINITY; /* a former owner's */
}

static bool is_protected(const struct rows *rows, uint32_t pos)
{
	for (size_t i = 0; i < 2; i++)
		if (pos >= rows->protect[i].begin && pos < rows->protect[i].end)
			return true;
	return pos < rows->prefix;
}

static uint32_t rows_pos(const struct rows *rows, uint32_t row, uint32_t index)
{
	if (index >= rows->base_len[row])
		return rows->shape.fold + index - rows->base_len[row];
	return (uint32_t)pair_at(&rows->arena.host, rows->ids + (size_t)row * rows->cap, index)->pos;
}

/* Decisions of one row, and which of its pairs they drop. Rows keep unlike shares; the last keeps all. */
static void decide_row(struct rows *rows, uint32_t row, const uint32_t *rank)
{
	uint32_t share = row + 1 == rows->count ? 100 : random_below(&rng, 101), dropped = 0;
	uint8_t *goes = rows->goes + (size_t)row * rows->cap * 16;

	for (uint32_t i = rows->offset[row]; i < rows->offset[row + 1]; i++)
		rows->keep[i] = random_below(&rng, 100) < share;
	for (uint32_t i = 0; i < rows->length[row]; i++) {
		uint32_t pos = rows_pos(rows, row, i);

		if (rows->shape.decode)
			goes[i] = !rows->keep[rows->offset[row] + i];
		else if (pos >= rows->shape.begin && pos < rows->shape.end && !is_protected(rows, pos))
			goes[i] = !rows->keep[rows->offset[row] + rank[pos]];
		dropped += goes[i];
	}
	rows->first[row + 1] = rows->first[row] + dropped;
}

static void decide(struct rows *rows)
{
	const struct shape *shape = &rows->shape;
	uint32_t *rank = new_array(shape->end, sizeof(*rank)), candidates = 0, span = shape->end - shape->begin;

	for (size_t i = 0; i < 2; i++) {
		rows->protect[i].begin = shape->begin + random_below(&rng, span);
		rows->protect[i].end = rows->protect[i].begin + random_below(&rng, span / 5 + 1);
	}
	rows->prefix = shape->begin + random_below(&rng, 3);
	for (uint32_t pos = shape->begin; pos < shape->end; pos++) {
		rank[pos] = candidates;
		candidates += !is_protected(rows, pos);
	}
	if (shape->decode)
		kvg_cuda_scope_decode(&rows->scope, 4, 20, shape->end, rows->prefix, rows->protect, 2);
	else
		kvg_cuda_scope_prefill(&rows->scope, shape->begin, shape->end, 16, rows->prefix, rows->protect, 2);
	for (uint32_t row = 0; row < rows->count; row++)
		rows->offset[row + 1] = rows->offset[row] + (shape->decode ? rows->length[row] : candidates);
	rows->keep = new_array(rows->offset[rows->count], 1);
	for (uint32_t row = 0; row < rows->count; row++)
		decide_row(rows, row, rank);
	free(rank);
}

static void rows_upload(struct rows *rows)
{
	uint32_t cap = (rows->there.max_length / 128 + 4) / 4 * 4;

	check(cuda->driver->cuMemcpyHtoD((CUdeviceptr)rows->arena.device.pairs, rows->arena.host.pairs,
		rows->arena.pair_count * sizeof(struct kvg_cuda_pair)));
	rows->there.ids = dev_new(rows->ids, (size_t)rows->count * rows->cap * 4);
	rows->there.base_len = dev_new(rows->base_len, rows->count * 4);
	rows->there.length = dev_new(rows->length, rows->count * 4);
	rows->there.held = dev_new(rows->held, rows->count * 4);
	rows->kept.keep = dev_new(rows->keep, rows->offset[rows->count]);
	rows->kept.offset = dev_new(rows->offset, (rows->count + 1) * 4);
	rows->dev_first = dev_new(rows->first, (rows->count + 1) * 4);
	rows->counts = (struct kvg_cuda_counts){.kept = dev_new(NULL, rows->count * 4),
		.holes = dev_new(NULL, rows->count * 4),
		.stripe_kept = dev_new(NULL, (size_t)rows->count * cap),
		.chunk_holes = dev_new(NULL, (size_t)rows->count * cap),
		.chunk_cap = cap};
	check(kvg_cuda_evict_count(
		evict, &rows->arena.device, &rows->there, &rows->scope, &rows->kept, &rows->counts, NULL));
}

static void rows_init(struct rows *rows, const struct shape *shape)
{
	*rows = (struct rows){.shape = *shape, .count = shape->layers * shape->heads, .cap = shape->end / 16 + 4};
	arena_init(&rows->arena, shape->k_bytes, shape->v_bytes, shape->blocks_per_extent, shape->extents);
	rows->ids = new_array((size_t)rows->count * rows->cap, 4);
	rows->base_len = new_array(rows->count, 4);
	rows->length = new_array(rows->count, 4);
	rows->held = new_array(rows->count, 4);
	rows->offset = new_array(rows->count + 1, 4);
	rows->first = new_array(rows->count + 1, 4);
	rows->goes = new_array((size_t)rows->count * rows->cap * 16, 1);
	rows->there = (struct kvg_cuda_rows){
		.layers = shape->layers, .heads = shape->heads, .ids_cap = rows->cap, .fold_pos = shape->fold};
	for (uint32_t row = 0; row < rows->count; row++)
		rows_init_row(rows, row);
	decide(rows);
	rows_upload(rows);
}

static void rows_deinit(struct rows *rows)
{
	const void *device[] = {rows->there.ids, rows->there.base_len, rows->there.length, rows->there.held,
		rows->kept.keep, rows->kept.offset, rows->dev_first, rows->counts.kept, rows->counts.holes,
		rows->counts.stripe_kept, rows->counts.chunk_holes};
	void *host[] = {
		rows->ids, rows->base_len, rows->length, rows->held, rows->offset, rows->first, rows->goes, rows->keep};

	for (size_t i = 0; i < sizeof(device) / sizeof(device[0]); i++)
		dev_free(device[i]);
	for (size_t i = 0; i < sizeof(host) / sizeof(host[0]); i++)
		free(host[i]);
	arena_deinit(&rows->arena);
}

/* The packed form of pairs numbered what->begin .. what->end - 1 of the rows that are meant. */
static void model_collect(const struct rows *rows, const struct kvg_cuda_collection *what,
	const struct kvg_cuda_spot *spots, const struct kvg_cuda_packed *packed, uint8_t *at)
{
	for (uint32_t row = what->row_begin; row < what->row_end; row++) {
		const uint32_t *ids = rows->ids + (size_t)row * rows->cap;
		uint32_t number = rows->first[row];

		for (uint32_t i = 0; i < rows->length[row]; i++) {
			struct kvg_cuda_pair pair = *pair_at(&rows->arena.host, ids, i);

			if (!rows->goes[(size_t)row * rows->cap * 16 + i])
				continue;
			pair.pos = (int32_t)rows_pos(rows, row, i);
			pair.score = pair.score == -INFINITY ? 0 : pair.score;
			if (number >= what->begin && number < what->end &&
				spots[number - what->begin].frame != UINT32_MAX)
				model_pack(packed, at, spots[number - what->begin], &rows->arena.host, ids[i / 16],
					i % 16, pair, row);
			number++;
		}
		assert_int_equal(number, rows->first[row + 1]);
	}
}

/* Spots in the order of the pairs' numbers; or in any order, and some nowhere. */
static struct kvg_cuda_spot *make_spots(uint32_t count, const struct kvg_cuda_packed *form, bool in_order)
{
	struct kvg_cuda_spot *spots = new_array(count, sizeof(*spots));

	for (uint32_t i = 0; i < count; i++) {
		uint32_t at = in_order ? i : random_below(&rng, i + 1);

		spots[i] = spots[at];
		spots[at] = (struct kvg_cuda_spot){i / form->pairs, i % form->pairs};
	}
	for (uint32_t i = 0; !in_order && i < count; i++)
		if (random_below(&rng, 4) == 0)
			spots[i].frame = UINT32_MAX;
	return spots;
}

static void check_collect(struct rows *rows, const struct kvg_cuda_collection *what, const struct kvg_cuda_packed *form,
	bool in_order, uint32_t grid)
{
	uint32_t count = what->end - what->begin;
	size_t size = packed_bytes(form, count);
	struct kvg_cuda_spot *spots = make_spots(count, form, in_order), *dev_spots;
	struct kvg_cuda_collection there = *what;
	struct kvg_cuda_packed packed = *form;
	uint8_t *want = new_array(size, 1);

	memset(want, POISON, size);
	model_collect(rows, what, spots, form, want);
	packed.at = dev_new(NULL, size);
	dev_spots = dev_new(spots, count * sizeof(*spots));
	there.first = rows->dev_first;
	there.spots = in_order ? NULL : dev_spots;
	check(kvg_cuda_tier_collect(tier, &rows->arena.device, &rows->there, &rows->scope, &rows->kept, &rows->counts,
		&there, &packed, grid, NULL));
	assert_device(packed.at, want, size);
	assert_arena(&rows->arena, "collecting");
	dev_free(packed.at);
	dev_free(dev_spots);
	free(want);
	free(spots);
}

/* In parts, each with the rows that it touches. */
static void check_parts(struct rows *rows, const struct kvg_cuda_packed *form, uint32_t each, uint32_t grid)
{
	uint32_t total = rows->first[rows->count];

	for (uint32_t begin = 0, row = 0; begin < total; begin += each) {
		struct kvg_cuda_collection what = {.begin = begin, .end = total - begin < each ? total : begin + each};

		while (rows->first[row + 1] <= begin)
			row++;
		what.row_begin = row;
		for (what.row_end = row; what.row_end < rows->count && rows->first[what.row_end] < what.end;)
			what.row_end++;
		check_collect(rows, &what, form, random_below(&rng, 2), grid);
	}
}

static void check_collections(struct rows *rows, uint32_t grid)
{
	uint32_t total = rows->first[rows->count], pairs = 1 + random_below(&rng, 300);
	const struct kvg_cuda_packed one = without_rows(&rows->arena.host, total + 1),
				     many = with_rows(&rows->arena.host, pairs), bare = scores_only(total + 1);
	const struct kvg_cuda_collection all = {.row_end = rows->count, .end = total}, none = {.row_end = rows->count};

	check_collect(rows, &all, &one, true, grid);
	check_collect(rows, &all, &bare, true, grid);
	check_collect(rows, &all, &many, true, grid);
	check_collect(rows, &all, &many, false, grid);
	check_collect(rows, &none, &many, true, grid);
	check_parts(rows, &many, 1 + random_below(&rng, 700), grid);
}

static void run_collect(const struct shape *shape)
{
	for (size_t i = 0; i < GRIDS; i++) {
		struct rows rows;

		rows_init(&rows, shape);
		check_collections(&rows, grids[i]);
		rows_deinit(&rows);
	}
}

static void test_collect_prefill(void **state)
{
	struct shape shape = {.layers = 2,
		.heads = 3,
		.k_bytes = 64,
		.v_bytes = 64,
		.blocks_per_extent = 37,
		.extents = 20,
		.begin = 60,
		.fold = 150,
		.end = 901};

	(void)state;
	run_collect(&shape);
	shape.fold = shape.begin;
	run_collect(&shape);
	shape.begin = 0;
	shape.fold = shape.end;
	run_collect(&shape);
	shape.fold = 0;
	shape.end = 128;
	run_collect(&shape);
}

static void test_collect_decode(void **state)
{
	struct shape shape = {.layers = 3,
		.heads = 1,
		.k_bytes = 32,
		.v_bytes = 48,
		.blocks_per_extent = 64,
		.extents = 10,
		.begin = 200,
		.fold = 700,
		.end = 931,
		.decode = true};

	(void)state;
	run_collect(&shape);
	shape.end = shape.fold;
	run_collect(&shape);
}

static void test_collect_sizes(void **state)
{
	static const uint32_t sizes[][2] = {{256, 256}, {192, 192}, {512, 256}, {16, 1024}, {1040, 0}};

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct shape shape = {.layers = 1,
			.heads = 2,
			.k_bytes = sizes[i][0],
			.v_bytes = sizes[i][1],
			.blocks_per_extent = 5 + (uint32_t)i * 3,
			.extents = 20,
			.begin = 40,
			.fold = 130,
			.end = 300};

		run_collect(&shape);
	}
}

/* ---- return ---- */

/* Random pairs of `frames` frames go to random places, in order of frames as the daemon names them or in any. */
static void check_return(
	struct arena *arena, const struct kvg_cuda_packed *form, uint32_t frames, uint32_t grid, bool on_host)
{
	uint32_t count = frames * form->pairs / 2, places = arena->free_count * 16;
	size_t size = frames * form->frame_bytes;
	struct kvg_cuda_return *list = new_array(count, sizeof(*list)), *there;
	struct kvg_cuda_packed packed = *form;
	uint32_t *order = new_array(places, sizeof(*order));
	uint8_t *bytes = new_array(size, 1);
	void *pinned = NULL;

	for (size_t i = 0; i < size; i++)
		bytes[i] = (uint8_t)random_bits(&rng);
	for (uint32_t i = 0; i < places; i++) {
		uint32_t at = random_below(&rng, i + 1);

		order[i] = order[at];
		order[at] = i;
	}
	count = count < places ? count : places;
	for (uint32_t i = 0; i < count; i++) {
		list[i] =
			(struct kvg_cuda_return){.from = {random_below(&rng, frames), random_below(&rng, form->pairs)},
				.id = arena->free_ids[order[i] / 16],
				.place = order[i] % 16};
		model_return(form, bytes, &list[i], &arena->host);
	}
	if (on_host) {
		check(cuda->driver->cuMemHostAlloc(&pinned, size, CU_MEMHOSTALLOC_DEVICEMAP));
		memcpy(pinned, bytes, size);
		packed.at = pinned;
	} else {
		packed.at = dev_new(bytes, size);
	}
	there = dev_new(list, count * sizeof(*list));
	check(kvg_cuda_tier_return(tier, &arena->device, &packed, there, count, grid, NULL));
	assert_arena(arena, "returning pairs");
	dev_free(there);
	if (on_host)
		check(cuda->driver->cuMemFreeHost(pinned));
	else
		dev_free(packed.at);
	free(list);
	free(order);
	free(bytes);
}

static void run_return(uint32_t k_bytes, uint32_t v_bytes)
{
	struct kvg_cuda_packed form;
	struct arena arena;

	arena_init(&arena, k_bytes, v_bytes, 11, 9);
	for (size_t i = 0; i < GRIDS; i++) {
		form = with_rows(&arena.host, 100);
		check_return(&arena, &form, 3, grids[i], false);
		check_return(&arena, &form, 40, grids[i], true);
		form = without_rows(&arena.host, 2);
		check_return(&arena, &form, 1, grids[i], false);
		check_return(&arena, &form, 77, grids[i], true);
	}
	arena_deinit(&arena);
}

static void test_return(void **state)
{
	(void)state;
	run_return(256, 256);
	run_return(64, 64);
	run_return(192, 192);
	run_return(16, 1040);
	run_return(576, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_blocks),
		cmocka_unit_test(test_collect_prefill),
		cmocka_unit_test(test_collect_decode),
		cmocka_unit_test(test_collect_sizes),
		cmocka_unit_test(test_return),
	};
	char text[256];
	CUresult result;
	int failed;

	if (kvg_cuda_open(0, &cuda, text, sizeof(text)) < 0) {
		(void)fprintf(stderr, "skipped: %s\n", text);
		return 77;
	}
	tier = kvg_cuda_tier_new(cuda, &result);
	evict = tier ? kvg_cuda_evict_new(cuda, &result) : NULL;
	if (!evict) {
		(void)fprintf(stderr, "%s\n", kvg_cuda_error(cuda->driver, result));
		return 1;
	}
	failed = runner_run("gpu/tier", tests, sizeof(tests) / sizeof(tests[0]));
	(void)kvg_cuda_tier_free(tier);
	(void)kvg_cuda_evict_free(evict);
	(void)kvg_cuda_close(cuda);
	return failed;
}
