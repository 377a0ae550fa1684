/* kernels/cuda/evict against a model in host memory: the same steps on a mirror of the whole arena. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/evict.h"
#include "tests/gpu/arena.h"

static struct kvg_cuda_evict *evict;

/* ---- a sequence ---- */

struct shape {
	uint32_t layers, heads, k_bytes, v_bytes, blocks_per_extent, extents;
	uint32_t begin, fold, end; /* positions: candidates, first fresh one, committed */
	uint32_t old;              /* bounds the pairs of a row below `begin` */
};

struct sequence {
	struct shape shape;
	struct arena arena;
	uint32_t row_count, cap; /* cap: of ids and of lists / 16 */
	uint32_t *ids, *base_len, *length, *held;
	struct kvg_cuda_rows rows; /* device */
	struct kvg_cuda_scope scope;
	struct kvg_cuda_range protect[3];
	uint32_t prefix, protect_count;
	/* the decisions */
	uint32_t *offset, total;
	float *scores;
	uint8_t *keep;
	void *dev_offset, *dev_keep;
	struct kvg_cuda_counts counts, dev_counts;
	struct kvg_cuda_lists lists, dev_lists;
	/* the moves: held blocks as they grow */
	uint32_t *held_ids, *held_len, *first_survivor, *first_hole;
	uint32_t *dev_held_ids;
};

static uint32_t *row_ids(const struct sequence *sequence, uint32_t row)
{
	return sequence->ids + (size_t)row * sequence->cap;
}

/* Folded pairs of a row: positions [begin, fold) and some older ones, in any order. */
static void init_row(struct sequence *sequence, uint32_t row, uint32_t extra)
{
	const struct shape *shape = &sequence->shape;
	uint32_t base = shape->fold - shape->begin + extra, length = base + shape->end - shape->fold;
	uint32_t held_blocks = (base + 15) / 16 + random_below(&rng, 2), *ids = row_ids(sequence, row);

	sequence->base_len[row] = base;
	sequence->length[row] = length;
	sequence->held[row] = held_blocks * 16 < length ? held_blocks * 16 : length;
	for (uint32_t i = 0; i < (length + 15) / 16; i++)
		ids[i] = take_block(&sequence->arena);
	for (uint32_t i = 0; i < base; i++)
		*pair_at(&sequence->arena.host, ids, i) =
			(struct kvg_cuda_pair){(int32_t)(i < extra ? i : shape->begin + i - extra), random_float(&rng)};
	for (uint32_t i = 1; i < base; i++) {
		struct kvg_cuda_pair *pair = pair_at(&sequence->arena.host, ids, i);
		struct kvg_cuda_pair *other = pair_at(&sequence->arena.host, ids, random_below(&rng, i + 1)),
				     was = *pair;

		*pair = *other;
		*other = was;
	}
}

static void sequence_init(struct sequence *sequence, const struct shape *shape)
{
	uint32_t rows = shape->layers * shape->heads;

	*sequence = (struct sequence){.shape = *shape, .row_count = rows};
	arena_init(&sequence->arena, shape->k_bytes, shape->v_bytes, shape->blocks_per_extent, shape->extents);
	sequence->cap = (shape->end - shape->begin + shape->old) / 16 + 4;
	sequence->ids = new_array((size_t)rows * sequence->cap, sizeof(uint32_t));
	sequence->base_len = new_array(rows, sizeof(uint32_t));
	sequence->length = new_array(rows, sizeof(uint32_t));
	sequence->held = new_array(rows, sizeof(uint32_t));
	for (uint32_t row = 0; row < rows; row++)
		init_row(sequence, row, shape->old ? random_below(&rng, shape->old + 1) : 0);
	sequence->rows = (struct kvg_cuda_rows){.layers = shape->layers,
		.heads = shape->heads,
		.ids = dev_new(sequence->ids, (size_t)rows * sequence->cap * 4),
		.ids_cap = sequence->cap,
		.fold_pos = shape->fold,
		.base_len = dev_new(sequence->base_len, rows * 4),
		.length = dev_new(sequence->length, rows * 4),
		.held = dev_new(sequence->held, rows * 4)};
	for (uint32_t row = 0; row < rows; row++)
		if (sequence->rows.max_length < sequence->length[row])
			sequence->rows.max_length = sequence->length[row];
	if (sequence->arena.pair_count)
		check(cuda->driver->cuMemcpyHtoD((CUdeviceptr)sequence->arena.device.pairs, sequence->arena.host.pairs,
			sequence->arena.pair_count * sizeof(struct kvg_cuda_pair)));
}

static void sequence_deinit(struct sequence *sequence)
{
	const void *device[] = {sequence->rows.ids, sequence->rows.base_len, sequence->rows.length, sequence->rows.held,
		sequence->dev_offset, sequence->dev_keep, sequence->dev_counts.kept, sequence->dev_counts.holes,
		sequence->dev_counts.stripe_kept, sequence->dev_counts.chunk_holes, sequence->dev_lists.survivors,
		sequence->dev_lists.holes, sequence->dev_held_ids};
	void *host[] = {sequence->ids, sequence->base_len, sequence->length, sequence->held, sequence->offset,
		sequence->scores, sequence->keep, sequence->counts.kept, sequence->counts.holes,
		sequence->counts.stripe_kept, sequence->counts.chunk_holes, sequence->lists.survivors,
		sequence->lists.holes, sequence->held_ids, sequence->held_len, sequence->first_survivor,
		sequence->first_hole};

	for (size_t i = 0; i < sizeof(device) / sizeof(device[0]); i++)
		dev_free(device[i]);
	for (size_t i = 0; i < sizeof(host) / sizeof(host[0]); i++)
		free(host[i]);
	arena_deinit(&sequence->arena);
}

/* ---- store ---- */

static float clean(float score)
{
	return isnan(score) ? 0.0f : score > FLT_MAX ? FLT_MAX : score < -FLT_MAX ? -FLT_MAX : score;
}

static float *odd_floats(size_t count)
{
	static const float odd[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, FLT_MIN};
	float *floats = new_array(count, sizeof(float));

	for (size_t i = 0; i < count; i++)
		floats[i] = random_below(&rng, 20) ? random_float(&rng) : odd[random_below(&rng, 6)];
	return floats;
}

/* Scores of some layers and tokens, in either order of the staging, to device and mirror. */
static void store(
	struct sequence *sequence, uint32_t layer, uint32_t layers, uint32_t pos, uint32_t tokens, bool by_token)
{
	uint32_t heads = sequence->shape.heads, stride = by_token ? heads : tokens + random_below(&rng, 9);
	size_t layer_floats = (size_t)stride * (by_token ? tokens : heads);
	float *floats = odd_floats(layer_floats * layers);
	struct kvg_cuda_scores scores = {.scores = dev_new(floats, layer_floats * layers * sizeof(float)),
		.layer_stride = layer_floats,
		.head_stride = by_token ? 1 : stride,
		.token_stride = by_token ? stride : 1,
		.layer_begin = layer,
		.layer_count = layers,
		.pos = pos,
		.tokens = tokens};

	check(kvg_cuda_evict_store(evict, &sequence->arena.device, &sequence->rows, &scores, NULL));
	for (uint32_t i = 0; i < layers * heads * tokens; i++) {
		uint32_t at = i / heads / tokens, head = i / tokens % heads, t = i % tokens,
			 row = (layer + at) * heads + head;
		float score = floats[at * layer_floats + head * scores.head_stride + t * scores.token_stride];

		*pair_at(&sequence->arena.host, row_ids(sequence, row),
			sequence->base_len[row] + pos - sequence->shape.fold + t) =
			(struct kvg_cuda_pair){(int32_t)(pos + t), clean(score)};
	}
	assert_device(sequence->arena.device.pairs, sequence->arena.host.pairs,
		sequence->arena.pair_count * sizeof(struct kvg_cuda_pair));
	dev_free(scores.scores);
	free(floats);
}

static void store_all(struct sequence *sequence)
{
	const struct shape *shape = &sequence->shape;
	uint32_t fresh = shape->end - shape->fold, half = fresh / 2;

	if (half == 0)
		return;
	store(sequence, 0, shape->layers, shape->fold, half, false);
	store(sequence, 0, 1, shape->fold + half, fresh - half, true);
	if (shape->layers > 1)
		store(sequence, 1, shape->layers - 1, shape->fold + half, fresh - half, shape->heads % 2);
}

/* ---- gather ---- */

static bool is_protected(const struct sequence *sequence, uint32_t pos)
{
	for (uint32_t i = 0; i < sequence->protect_count; i++)
		if (pos >= sequence->protect[i].begin && pos < sequence->protect[i].end)
			return true;
	return pos < sequence->prefix;
}

static uint32_t pos_at(const struct sequence *sequence, uint32_t row, uint32_t index)
{
	uint32_t base = sequence->base_len[row];

	if (index >= base)
		return sequence->shape.fold + index - base;
	return (uint32_t)pair_at(&sequence->arena.host, row_ids(sequence, row), index)->pos;
}

/* Rank of the pair, or UINT32_MAX when it is no candidate. */
static uint32_t rank_at(const struct sequence *sequence, uint32_t row, uint32_t index)
{
	uint32_t pos = pos_at(sequence, row, index), rank = 0;

	if (sequence->scope.decode)
		return index;
	if (pos < sequence->scope.begin || pos >= sequence->scope.end || is_protected(sequence, pos))
		return UINT32_MAX;
	for (uint32_t p = sequence->scope.begin; p < pos; p++)
		rank += !is_protected(sequence, p);
	return rank;
}

#define DECODE_FIRST  7u
#define DECODE_WINDOW 33u

static float score_at(const struct sequence *sequence, uint32_t row, uint32_t index, uint32_t window)
{
	uint32_t pos = pos_at(sequence, row, index), end = sequence->shape.end;
	float score = pair_at(&sequence->arena.host, row_ids(sequence, row), index)->score;

	if (!sequence->scope.decode)
		return window && pos + window >= end ? INFINITY : score;
	if (is_protected(sequence, pos))
		return INFINITY;
	return pos < DECODE_FIRST || pos + DECODE_WINDOW >= end ? 1.0f : score;
}

static void set_scope(struct sequence *sequence, bool decode, uint32_t window)
{
	const struct shape *shape = &sequence->shape;
	uint32_t span = shape->end - shape->begin;

	sequence->prefix = shape->begin / 2;
	sequence->protect_count = random_below(&rng, 4);
	for (uint32_t i = 0; i < sequence->protect_count; i++) {
		sequence->protect[i].begin = shape->begin / 2 + random_below(&rng, span + 1);
		sequence->protect[i].end = sequence->protect[i].begin + random_below(&rng, span / 4 + 1);
	}
	if (decode)
		kvg_cuda_scope_decode(&sequence->scope, DECODE_FIRST, DECODE_WINDOW, shape->end, sequence->prefix,
			sequence->protect, sequence->protect_count);
	else
		kvg_cuda_scope_prefill(&sequence->scope, shape->begin, shape->end, window, sequence->prefix,
			sequence->protect, sequence->protect_count);
	sequence->offset = new_array(sequence->row_count + 1, sizeof(uint32_t));
	for (uint32_t row = 0; row < sequence->row_count; row++)
		sequence->offset[row + 1] =
			sequence->offset[row] + (decode ? sequence->length[row] : sequence->scope.candidates);
	sequence->total = sequence->offset[sequence->row_count];
	sequence->dev_offset = dev_new(sequence->offset, (sequence->row_count + 1) * 4);
}

static void gather(struct sequence *sequence, uint32_t window)
{
	uint32_t rows = sequence->row_count, *found = new_array(rows, sizeof(uint32_t));
	float *dev_scores = dev_new(NULL, sequence->total * sizeof(float));
	uint32_t *dev_found = dev_new(NULL, rows * 4);

	sequence->scores = new_array(sequence->total, sizeof(float));
	check(kvg_cuda_evict_gather(evict, &sequence->arena.device, &sequence->rows, &sequence->scope,
		sequence->dev_offset, dev_scores, dev_found, NULL));
	for (uint32_t row = 0; row < rows; row++) {
		for (uint32_t i = 0; i < sequence->length[row]; i++) {
			uint32_t rank = rank_at(sequence, row, i);

			if (rank == UINT32_MAX)
				continue;
			found[row]++;
			assert_true(rank < sequence->offset[row + 1] - sequence->offset[row]);
			sequence->scores[sequence->offset[row] + rank] = score_at(sequence, row, i, window);
		}
		assert_int_equal(found[row], sequence->offset[row + 1] - sequence->offset[row]);
	}
	assert_device(dev_found, found, rows * 4);
	assert_device(dev_scores, sequence->scores, sequence->total * sizeof(float));
	dev_free(dev_scores);
	dev_free(dev_found);
	free(found);
}

/* ---- count and mark ---- */

/* Each row keeps another share; some keep all or nothing. */
static void decide(struct sequence *sequence)
{
	sequence->keep = new_array(sequence->total, 1);
	for (uint32_t row = 0; row < sequence->row_count; row++) {
		uint32_t share = random_below(&rng, 140);

		for (uint32_t i = sequence->offset[row]; i < sequence->offset[row + 1]; i++)
			sequence->keep[i] = random_below(&rng, 100) + 20 < share;
	}
	sequence->dev_keep = dev_new(sequence->keep, sequence->total);
}

static bool stays(const struct sequence *sequence, uint32_t row, uint32_t index)
{
	uint32_t rank = rank_at(sequence, row, index);

	return rank == UINT32_MAX || sequence->keep[sequence->offset[row] + rank];
}

static void alloc_counts(struct sequence *sequence)
{
	uint32_t rows = sequence->row_count, cap = (sequence->cap * 16 / 128 + 4) / 4 * 4;

	sequence->counts = (struct kvg_cuda_counts){.kept = new_array(rows, 4),
		.holes = new_array(rows, 4),
		.stripe_kept = new_array((size_t)rows * cap, 1),
		.chunk_holes = new_array((size_t)rows * cap, 1),
		.chunk_cap = cap};
	sequence->dev_counts = (struct kvg_cuda_counts){.kept = dev_new(NULL, rows * 4),
		.holes = dev_new(NULL, rows * 4),
		.stripe_kept = dev_new(NULL, (size_t)rows * cap),
		.chunk_holes = dev_new(NULL, (size_t)rows * cap),
		.chunk_cap = cap};
}

/* What count finds, what mark writes and lists, in the mirror. */
static void model_row(struct sequence *sequence, uint32_t row)
{
	size_t chunks = (size_t)row * sequence->counts.chunk_cap;
	uint32_t held = sequence->held[row], cap = sequence->lists.survivor_cap, survivors = 0, holes = 0;
	uint8_t *keep = new_array(sequence->length[row], 1);

	for (uint32_t i = 0; i < sequence->length[row]; i++)
		keep[i] = stays(sequence, row, i);
	for (uint32_t i = 0; i < sequence->length[row]; i++) {
		struct kvg_cuda_pair *pair = pair_at(&sequence->arena.host, row_ids(sequence, row), i);

		pair->pos = (int32_t)pos_at(sequence, row, i);
		if (!keep[i])
			pair->score = -INFINITY;
		else if (pair->score == -INFINITY)
			pair->score = 0;
		sequence->counts.kept[row] += keep[i];
		if (i < held && !keep[i]) {
			sequence->lists.holes[row * cap + holes++] = i;
			sequence->counts.chunk_holes[chunks + i / 128]++;
		} else if (i >= held && keep[i]) {
			sequence->lists.survivors[row * cap + survivors++] = i;
			sequence->counts.stripe_kept[chunks + (i - held) / 128]++;
		}
	}
	sequence->counts.holes[row] = holes;
	free(keep);
}

static void alloc_lists(struct sequence *sequence)
{
	uint32_t cap = sequence->cap * 16;
	size_t entries = (size_t)sequence->row_count * cap;

	sequence->lists = (struct kvg_cuda_lists){.survivors = new_array(entries, 4),
		.holes = new_array(entries, 4),
		.survivor_cap = cap,
		.hole_cap = cap};
	memset(sequence->lists.survivors, POISON, entries * 4);
	memset(sequence->lists.holes, POISON, entries * 4);
	sequence->dev_lists = (struct kvg_cuda_lists){.survivors = dev_new(NULL, entries * 4),
		.holes = dev_new(NULL, entries * 4),
		.survivor_cap = cap,
		.hole_cap = cap};
}

static void count_and_mark(struct sequence *sequence)
{
	const struct kvg_cuda_kept kept = {.keep = sequence->dev_keep, .offset = sequence->dev_offset};
	struct arena *arena = &sequence->arena;
	uint32_t rows = sequence->row_count, cap = sequence->cap * 16;

	alloc_counts(sequence);
	alloc_lists(sequence);
	check(kvg_cuda_evict_count(
		evict, &arena->device, &sequence->rows, &sequence->scope, &kept, &sequence->dev_counts, NULL));
	arena_assert(arena);
	for (int turn = 0; turn < 2; turn++) /* it can be repeated */
		check(kvg_cuda_evict_mark(evict, &arena->device, &sequence->rows, &sequence->scope, &kept,
			&sequence->dev_counts, &sequence->dev_lists, NULL));
	for (uint32_t row = 0; row < rows; row++)
		model_row(sequence, row);
	assert_device(sequence->dev_counts.kept, sequence->counts.kept, rows * 4);
	assert_device(sequence->dev_counts.holes, sequence->counts.holes, rows * 4);
	assert_device(sequence->dev_counts.stripe_kept, sequence->counts.stripe_kept,
		(size_t)rows * sequence->counts.chunk_cap);
	assert_device(sequence->dev_counts.chunk_holes, sequence->counts.chunk_holes,
		(size_t)rows * sequence->counts.chunk_cap);
	assert_device(sequence->dev_lists.survivors, sequence->lists.survivors, (size_t)rows * cap * 4);
	assert_device(sequence->dev_lists.holes, sequence->lists.holes, (size_t)rows * cap * 4);
	arena_assert(arena);
}

/* ---- moves ---- */

static void start_moves(struct sequence *sequence)
{
	uint32_t rows = sequence->row_count;
	size_t ids = (size_t)rows * sequence->cap;

	sequence->held_ids = new_array(ids, 4);
	sequence->held_len = new_array(rows, 4);
	sequence->first_survivor = new_array(rows, 4);
	sequence->first_hole = new_array(rows, 4);
	memcpy(sequence->held_len, sequence->held, rows * 4);
	memset(sequence->held_ids, POISON, ids * 4);
	for (uint32_t row = 0; row < rows; row++)
		memcpy(sequence->held_ids + (size_t)row * sequence->cap, row_ids(sequence, row),
			(sequence->held[row] + 15) / 16 * 4);
	sequence->dev_held_ids = dev_new(NULL, ids * 4);
}

/* Survivors of the row in stripes [first, last). */
static uint32_t survivors_of(const struct sequence *sequence, uint32_t row, uint32_t first, uint32_t last)
{
	uint32_t n = 0;

	for (uint32_t s = first; s < last && s < sequence->counts.chunk_cap; s++)
		n += sequence->counts.stripe_kept[(size_t)row * sequence->counts.chunk_cap + s];
	return n;
}

/* Plans n moves of a row, takes blocks for its tail, and does them in the mirror. */
static struct kvg_cuda_move_row plan_row(struct sequence *sequence, uint32_t row, uint32_t n)
{
	const uint32_t *survivors = sequence->lists.survivors + (size_t)row * sequence->lists.survivor_cap;
	const uint32_t *holes = sequence->lists.holes + (size_t)row * sequence->lists.hole_cap;
	uint32_t *held_ids = sequence->held_ids + (size_t)row * sequence->cap;
	uint32_t left = sequence->counts.holes[row] - sequence->first_hole[row];
	struct kvg_cuda_move_row at = {.count = n,
		.src_first = sequence->first_survivor[row],
		.hole_first = sequence->first_hole[row],
		.hole_count = n < left ? n : left,
		.tail_first = sequence->held_len[row]};

	for (uint32_t k = 0; k < n; k++) {
		uint32_t src = survivors[at.src_first + k], dst;

		if (k < at.hole_count) {
			dst = holes[at.hole_first + k];
		} else {
			dst = sequence->held_len[row]++;
			if (dst % 16 == 0)
				held_ids[dst / 16] = take_block(&sequence->arena);
		}
		mirror_move(&sequence->arena.host, row_ids(sequence, row)[src / 16], src % 16, held_ids[dst / 16],
			dst % 16);
	}
	sequence->first_survivor[row] += n;
	sequence->first_hole[row] += at.hole_count;
	return at;
}

static void upload_held_ids(const struct sequence *sequence)
{
	check(cuda->driver->cuMemcpyHtoD((CUdeviceptr)sequence->dev_held_ids, sequence->held_ids,
		(size_t)sequence->row_count * sequence->cap * 4));
}

/* One step: stripes [first, last) of every row. */
static void move_stripes(struct sequence *sequence, uint32_t first, uint32_t last)
{
	struct kvg_cuda_move_row *rows = new_array(sequence->row_count, sizeof(*rows));
	struct kvg_cuda_moves moves = {.rows = sequence->row_count,
		.src_ids = sequence->rows.ids,
		.dst_ids = sequence->dev_held_ids,
		.src_cap = sequence->cap,
		.dst_cap = sequence->cap,
		.lists = sequence->dev_lists};

	for (uint32_t row = 0; row < sequence->row_count; row++) {
		rows[row] = plan_row(sequence, row, survivors_of(sequence, row, first, last));
		rows[row].tile_first = moves.tiles;
		moves.tiles += (rows[row].count + KVG_CUDA_MOVE_TILE - 1) / KVG_CUDA_MOVE_TILE;
	}
	upload_held_ids(sequence);
	moves.move_rows = dev_new(rows, sequence->row_count * sizeof(*rows));
	for (int turn = 0; turn < 2; turn++)
		check(kvg_cuda_evict_move(evict, &sequence->arena.device, &moves, NULL));
	arena_assert(&sequence->arena);
	dev_free(moves.move_rows);
	free(rows);
}

/* The mirror's part of a compaction of one row. */
static void close_holes(struct sequence *sequence, uint32_t row)
{
	const uint32_t *holes = sequence->lists.holes + (size_t)row * sequence->lists.hole_cap;
	const uint32_t *ids = sequence->held_ids + (size_t)row * sequence->cap;
	uint32_t first = sequence->first_hole[row], last = sequence->counts.holes[row];
	uint32_t left = sequence->held_len[row] - (last - first), hole = first, next = first;

	while (hole < last && holes[hole] < left)
		hole++;
	for (uint32_t i = left; i < sequence->held_len[row]; i++) {
		if (hole < last && holes[hole] == i) {
			hole++;
			continue;
		}
		mirror_move(&sequence->arena.host, ids[i / 16], i % 16, ids[holes[next] / 16], holes[next] % 16);
		next++;
	}
	sequence->held_len[row] = left;
}

static void compact(struct sequence *sequence)
{
	struct kvg_cuda_compact_row *rows = new_array(sequence->row_count, sizeof(*rows));
	struct kvg_cuda_compaction compaction = {.rows = sequence->row_count,
		.ids = sequence->dev_held_ids,
		.ids_cap = sequence->cap,
		.lists = sequence->dev_lists};

	for (uint32_t row = 0; row < sequence->row_count; row++) {
		uint32_t holes = sequence->counts.holes[row] - sequence->first_hole[row];

		rows[row] = (struct kvg_cuda_compact_row){.tile_first = compaction.tiles,
			.held_len = sequence->held_len[row],
			.hole_first = sequence->first_hole[row],
			.hole_count = holes};
		compaction.tiles += (holes + KVG_CUDA_MOVE_TILE - 1) / KVG_CUDA_MOVE_TILE;
		close_holes(sequence, row);
		assert_int_equal(sequence->held_len[row], sequence->counts.kept[row]);
	}
	compaction.compact_rows = dev_new(rows, sequence->row_count * sizeof(*rows));
	for (int turn = 0; turn < 2; turn++)
		check(kvg_cuda_evict_compact(evict, &sequence->arena.device, &compaction, NULL));
	arena_assert(&sequence->arena);
	dev_free(compaction.compact_rows);
	free(rows);
}

/* ---- relocate and publish ---- */

static void relocate(struct sequence *sequence)
{
	struct kvg_cuda_relocation *list = new_array(sequence->arena.free_count, sizeof(*list)), *dev_list;
	uint32_t count = 0;

	for (uint32_t row = 0; row < sequence->row_count; row++) {
		uint32_t *ids = sequence->held_ids + (size_t)row * sequence->cap;

		for (uint32_t i = 0; i < (sequence->held_len[row] + 15) / 16 && sequence->arena.free_count; i++) {
			if (random_below(&rng, 3))
				continue;
			list[count] = (struct kvg_cuda_relocation){ids[i], take_block(&sequence->arena)};
			for (uint32_t place = 0; place < 16; place++)
				mirror_move(&sequence->arena.host, ids[i], place, list[count].dst, place);
			ids[i] = list[count++].dst;
		}
	}
	dev_list = dev_new(list, count * sizeof(*list));
	check(kvg_cuda_evict_relocate(evict, &sequence->arena.device, dev_list, count, NULL));
	arena_assert(&sequence->arena);
	dev_free(dev_list);
	free(list);
}

/* The mirror's part of publishing one row, from some index on. */
static void publish_row(const struct sequence *sequence, uint32_t row, struct kvg_cuda_table *table, uint32_t slot,
	struct kvg_cuda_table_row *at)
{
	const uint32_t *ids = sequence->held_ids + (size_t)row * sequence->cap;
	uint32_t blocks = (sequence->held_len[row] + 15) / 16;
	size_t to = ((size_t)row / table->heads * table->max_sequences + slot) * table->heads + row % table->heads;

	at->first = blocks ? random_below(&rng, blocks) : 0;
	at->count = blocks - at->first;
	at->base_len = sequence->held_len[row];
	for (uint32_t i = 0; i < at->count && at->first + i < table->row_cap; i++)
		table->ids[to * table->row_cap + at->first + i] = ids[at->first + i];
	table->base_len[to] = at->base_len;
}

static void publish(struct sequence *sequence)
{
	uint32_t rows = sequence->row_count, slots = 3, cap = sequence->cap - 2, n = 0;
	size_t table_ids = (size_t)rows * slots * cap;
	struct kvg_cuda_table table = {.ids = new_array(table_ids, 4),
		.base_len = new_array((size_t)rows * slots, 4),
		.layers = sequence->shape.layers,
		.heads = sequence->shape.heads,
		.max_sequences = slots,
		.row_cap = cap};
	struct kvg_cuda_table device = table;
	struct kvg_cuda_table_row *at = new_array(rows, sizeof(*at)), *dev_at;
	uint32_t *packed = new_array((size_t)rows * sequence->cap, 4), *dev_packed;

	device.ids = dev_new(table.ids, table_ids * 4);
	device.base_len = dev_new(table.base_len, (size_t)rows * slots * 4);
	for (uint32_t row = 0; row < rows; row++) {
		publish_row(sequence, row, &table, 1, &at[row]);
		at[row].offset = n;
		memcpy(packed + n, sequence->held_ids + (size_t)row * sequence->cap + at[row].first, at[row].count * 4);
		n += at[row].count;
	}
	dev_at = dev_new(at, rows * sizeof(*at));
	dev_packed = dev_new(packed, n * 4);
	check(kvg_cuda_evict_publish(evict, &device, 1, dev_at, dev_packed, true, NULL));
	assert_device(device.ids, table.ids, table_ids * 4);
	assert_device(device.base_len, table.base_len, (size_t)rows * slots * 4);
	dev_free(device.ids);
	dev_free(device.base_len);
	dev_free(dev_at);
	dev_free(dev_packed);
	free(table.ids);
	free(table.base_len);
	free(at);
	free(packed);
}

/* ---- tests ---- */

static void run(const struct shape *shape, bool decode, uint32_t window, uint32_t group)
{
	struct sequence sequence;

	sequence_init(&sequence, shape);
	store_all(&sequence);
	set_scope(&sequence, decode, window);
	gather(&sequence, window);
	decide(&sequence);
	count_and_mark(&sequence);
	start_moves(&sequence);
	for (uint32_t s = 0; s * 128 < sequence.rows.max_length; s += group)
		move_stripes(&sequence, s, s + group);
	compact(&sequence);
	relocate(&sequence);
	publish(&sequence);
	sequence_deinit(&sequence);
}

static void test_prefill(void **state)
{
	struct shape shape = {.layers = 2,
		.heads = 3,
		.k_bytes = 256,
		.v_bytes = 256,
		.blocks_per_extent = 37,
		.extents = 40,
		.begin = 100,
		.fold = 150,
		.end = 1201,
		.old = 99};

	(void)state;
	run(&shape, false, 0, 2);
	run(&shape, false, 77, 3);
	shape.fold = shape.begin;
	run(&shape, false, 16, 100);
	shape.end = 1200;
	shape.fold = 1190;
	run(&shape, false, 16, 1);
}

static void test_decode(void **state)
{
	struct shape shape = {.layers = 3,
		.heads = 2,
		.k_bytes = 128,
		.v_bytes = 128,
		.blocks_per_extent = 64,
		.extents = 30,
		.fold = 700,
		.end = 931,
		.old = 0};

	(void)state;
	run(&shape, true, 0, 1);
	shape.begin = 600;
	shape.old = 550;
	run(&shape, true, 0, 2);
	shape.end = shape.fold;
	run(&shape, true, 0, 2);
}

static void test_sizes(void **state)
{
	static const uint32_t sizes[][2] = {
		{64, 64}, {160, 160}, {192, 192}, {512, 512}, {256, 128}, {16, 1024}, {1040, 0}};

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct shape shape = {.layers = 1,
			.heads = 3,
			.k_bytes = sizes[i][0],
			.v_bytes = sizes[i][1],
			.blocks_per_extent = 5 + (uint32_t)i * 3,
			.extents = 60,
			.begin = 40,
			.fold = 300,
			.end = 700,
			.old = 39};

		run(&shape, i % 2, 0, 2);
	}
}

/* Many short rows, some empty: the search for a tile's row. */
static void test_many_rows(void **state)
{
	struct shape shape = {.layers = 35,
		.heads = 37,
		.k_bytes = 32,
		.v_bytes = 32,
		.blocks_per_extent = 101,
		.extents = 90,
		.begin = 50,
		.fold = 50,
		.end = 51,
		.old = 40};

	(void)state;
	run(&shape, false, 0, 1);
	run(&shape, true, 0, 1);
	shape.begin = shape.fold = shape.end = 45;
	run(&shape, true, 0, 1);
}

/* Long rows: several blocks of the grids for each. */
static void test_long_rows(void **state)
{
	struct shape shape = {.layers = 1,
		.heads = 2,
		.k_bytes = 256,
		.v_bytes = 256,
		.blocks_per_extent = 512,
		.extents = 6,
		.begin = 600,
		.fold = 3000,
		.end = 9000,
		.old = 590};

	(void)state;
	run(&shape, true, 0, 16);
	shape.end = 3777;
	run(&shape, false, 128, 5);
}

static void test_scope(void **state)
{
	const struct kvg_cuda_range protect[] = {{50, 60}, {10, 20}, {15, 30}, {30, 31}, {90, 200}, {7, 7}};
	struct kvg_cuda_scope scope;

	(void)state;
	kvg_cuda_scope_prefill(&scope, 12, 100, 5, 13, protect, 6);
	assert_int_equal(scope.range_count, 3);
	assert_int_equal(scope.range_begin[0], 12);
	assert_int_equal(scope.range_end[0], 31);
	assert_int_equal(scope.range_end[1], 60);
	assert_int_equal(scope.range_begin[2], 90);
	assert_int_equal(scope.range_end[2], 100);
	assert_int_equal(scope.candidates, 88 - 19 - 10 - 10);
	kvg_cuda_scope_prefill(&scope, 12, 12, 5, 0, NULL, 0);
	assert_int_equal(scope.candidates, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_scope),
		cmocka_unit_test(test_prefill),
		cmocka_unit_test(test_decode),
		cmocka_unit_test(test_sizes),
		cmocka_unit_test(test_many_rows),
		cmocka_unit_test(test_long_rows),
	};
	char text[256];
	CUresult result;
	int failed;

	if (kvg_cuda_open(0, &cuda, text, sizeof(text)) < 0) {
		(void)fprintf(stderr, "skipped: %s\n", text);
		return 77;
	}
	evict = kvg_cuda_evict_new(cuda, &result);
	if (!evict) {
		(void)fprintf(stderr, "%s\n", kvg_cuda_error(cuda->driver, result));
		return 1;
	}
	failed = runner_run("gpu/evict", tests, sizeof(tests) / sizeof(tests[0]));
	(void)kvg_cuda_evict_free(evict);
	(void)kvg_cuda_close(cuda);
	return failed;
}
