/* Rows of an eviction: 36 layers of 8 heads with 16000 tokens each, of which 30% stay, every head its own share. */
#include <stdlib.h>

#include "kernels/cuda/evict.h"
#include "tools/bench/gpu.h"

#define LAYERS     36u
#define HEADS      8u
#define ROWS       (LAYERS * HEADS)
#define TOKENS     16000u
#define BLOCKS     (TOKENS / KVG_CUDA_PLACES) /* of a row */
#define PAIR_BYTES 256u                       /* K of a pair, and V: 128 bf16 numbers */
#define STRIDE     (PAIR_BYTES * KVG_CUDA_PLACES)
#define EXTENT     ((size_t)64 << 20)
#define EXTENT_IDS ((uint32_t)(EXTENT / STRIDE))
#define EXTENTS    48u /* 36 of fresh tokens, 11 of survivors */
#define RUN        8u  /* blocks of a row's part of a stripe */
#define CHUNKS     (BLOCKS / RUN)
#define CHUNK_CAP  ((CHUNKS + 3) / 4 * 4)
#define STEP       8u /* stripes of a step, where moves are done stripe by stripe */
#define STEPS      ((CHUNKS + STEP - 1) / STEP)
#define COPIES     3u /* of the metadata, in turn: more than the cache holds */

struct eviction {
	const struct kvg_cuda *cuda;
	struct kvg_cuda_evict *kernels;
	struct kvg_cuda_area areas[COPIES];
	struct kvg_cuda_rows rows;
	struct kvg_cuda_scope scope;
	struct kvg_cuda_kept kept;
	struct kvg_cuda_counts counts;
	struct kvg_cuda_lists lists;
	struct kvg_cuda_moves moves, steps[STEPS];
	float *scores[COPIES];
	uint32_t *found;
	uint64_t survivors;
	CUdeviceptr owned[24 + STEPS];
	uint32_t owned_count;
};

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state * 0x2545f4914f6cdd1du;
}

static double uniform(uint64_t *state)
{
	return (double)(next_random(state) >> 11) * 0x1p-53;
}

/* Device memory that lives as long as the eviction; data, if any, comes from there. */
static void *own(struct gpu_bench *bench, struct eviction *eviction, size_t bytes, const void *data)
{
	CUdeviceptr at = data ? gpu_alloc(bench, bytes) : gpu_random(bench, bytes, 0);

	if (at)
		eviction->owned[eviction->owned_count++] = at;
	if (at && data)
		(void)gpu_check(bench, bench->cuda->driver->cuMemcpyHtoD(at, data, bytes), "upload");
	return (void *)at;
}

/* Number n of a kind of block lies in the first half of an extent's ids. */
static uint32_t block_id(uint32_t n)
{
	return n / (EXTENT_IDS / 2) * EXTENT_IDS + n % (EXTENT_IDS / 2);
}

static void make_area(struct gpu_bench *bench, struct eviction *eviction)
{
	uint8_t *base = own(bench, eviction, EXTENTS * EXTENT, NULL);

	for (uint32_t i = 0; i < COPIES; i++) {
		eviction->areas[i] = (struct kvg_cuda_area){.k_base = base,
			.v_base = base + EXTENT / 2,
			.stride = STRIDE,
			.k_bytes = PAIR_BYTES,
			.v_bytes = PAIR_BYTES,
			.pairs = own(bench, eviction,
				EXTENTS * (EXTENT_IDS / 2) * KVG_CUDA_PLACES * sizeof(struct kvg_cuda_pair), NULL),
			.ids_per_extent = EXTENT_IDS,
			.blocks_per_extent = EXTENT_IDS / 2};
		eviction->scores[i] = own(bench, eviction, (size_t)ROWS * TOKENS * sizeof(float), NULL);
	}
}

/* Fresh tokens only, in stripes: a run of 8 blocks for each row in turn. */
static void make_rows(struct gpu_bench *bench, struct eviction *eviction)
{
	static uint32_t ids[ROWS][BLOCKS], zeros[ROWS], length[ROWS], offset[ROWS];

	for (uint32_t row = 0; row < ROWS; row++) {
		for (uint32_t i = 0; i < BLOCKS; i++)
			ids[row][i] = block_id((i / RUN * ROWS + row) * RUN + i % RUN);
		length[row] = TOKENS;
		offset[row] = row * TOKENS;
	}
	eviction->rows = (struct kvg_cuda_rows){.layers = LAYERS,
		.heads = HEADS,
		.ids = own(bench, eviction, sizeof(ids), ids),
		.ids_cap = BLOCKS,
		.base_len = own(bench, eviction, sizeof(zeros), zeros),
		.length = own(bench, eviction, sizeof(length), length),
		.held = own(bench, eviction, sizeof(zeros), zeros),
		.max_length = TOKENS};
	eviction->kept.offset = own(bench, eviction, sizeof(offset), offset);
	kvg_cuda_scope_prefill(&eviction->scope, 0, TOKENS, 0, 0, NULL, 0);
}

/* Shares of the rows from 5% to 80%, 30% on average; which of a row's pairs stay is drawn. */
static void make_decisions(struct gpu_bench *bench, struct eviction *eviction)
{
	uint8_t *keep = malloc((size_t)ROWS * TOKENS);
	uint64_t state = 0x9e3779b97f4a7c15u;

	if (!keep) {
		(void)gpu_check(bench, CUDA_ERROR_OUT_OF_MEMORY, "host memory");
		return;
	}
	for (uint32_t row = 0; row < ROWS; row++) {
		double at = ((double)(row * 89 % ROWS) + 0.5) / ROWS, share = 0.05 + 0.75 * at * at;

		for (uint32_t i = 0; i < TOKENS; i++)
			keep[row * TOKENS + i] = uniform(&state) < share;
	}
	eviction->kept.keep = own(bench, eviction, (size_t)ROWS * TOKENS, keep);
	free(keep);
	eviction->counts = (struct kvg_cuda_counts){.kept = own(bench, eviction, ROWS * sizeof(uint32_t), NULL),
		.holes = own(bench, eviction, ROWS * sizeof(uint32_t), NULL),
		.stripe_kept = own(bench, eviction, (size_t)ROWS * CHUNK_CAP, NULL),
		.chunk_holes = own(bench, eviction, (size_t)ROWS * CHUNK_CAP, NULL),
		.chunk_cap = CHUNK_CAP};
	eviction->lists = (struct kvg_cuda_lists){
		.survivors = own(bench, eviction, (size_t)ROWS * TOKENS * sizeof(uint32_t), NULL),
		.survivor_cap = TOKENS};
	eviction->found = own(bench, eviction, ROWS * sizeof(uint32_t), NULL);
}

/* ---- work ---- */

static CUresult gather(void *user, CUstream stream, unsigned turn)
{
	struct eviction *eviction = user;
	unsigned i = turn % COPIES;

	return kvg_cuda_evict_gather(eviction->kernels, &eviction->areas[i], &eviction->rows, &eviction->scope,
		eviction->kept.offset, eviction->scores[i], eviction->found, stream);
}

static CUresult count(void *user, CUstream stream, unsigned turn)
{
	struct eviction *eviction = user;

	return kvg_cuda_evict_count(eviction->kernels, &eviction->areas[turn % COPIES], &eviction->rows,
		&eviction->scope, &eviction->kept, &eviction->counts, stream);
}

static CUresult mark(void *user, CUstream stream, unsigned turn)
{
	struct eviction *eviction = user;

	return kvg_cuda_evict_mark(eviction->kernels, &eviction->areas[turn % COPIES], &eviction->rows,
		&eviction->scope, &eviction->kept, &eviction->counts, &eviction->lists, stream);
}

/* Scores of all layers as the gate's kernel leaves them. */
static CUresult store(void *user, CUstream stream, unsigned turn)
{
	struct eviction *eviction = user;
	struct kvg_cuda_scores scores = {.scores = eviction->scores[turn % COPIES],
		.layer_stride = (uint64_t)HEADS * TOKENS,
		.head_stride = TOKENS,
		.token_stride = 1,
		.layer_count = LAYERS,
		.tokens = TOKENS};

	return kvg_cuda_evict_store(
		eviction->kernels, &eviction->areas[turn % COPIES], &eviction->rows, &scores, stream);
}

static CUresult move(void *user, CUstream stream, unsigned turn)
{
	struct eviction *eviction = user;

	(void)turn;
	return kvg_cuda_evict_move(eviction->kernels, &eviction->areas[0], &eviction->moves, stream);
}

static CUresult move_in_steps(void *user, CUstream stream, unsigned turn)
{
	struct eviction *eviction = user;
	CUresult result = CUDA_SUCCESS;

	(void)turn;
	for (uint32_t i = 0; result == CUDA_SUCCESS && i < STEPS; i++)
		result = kvg_cuda_evict_move(eviction->kernels, &eviction->areas[0], &eviction->steps[i], stream);
	return result;
}

/* ---- plans ---- */

/* Survivors of each stripe of each row. */
static uint8_t stripe_kept[ROWS][CHUNK_CAP];

static bool mark_once(struct gpu_bench *bench, struct eviction *eviction)
{
	const struct kvg_cuda_driver *driver = eviction->cuda->driver;
	CUresult result = count(eviction, bench->stream, 0);

	if (result == CUDA_SUCCESS)
		result = mark(eviction, bench->stream, 0);
	if (result == CUDA_SUCCESS)
		result = driver->cuStreamSynchronize(bench->stream);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemcpyDtoH(
			stripe_kept, (CUdeviceptr)eviction->counts.stripe_kept, sizeof(stripe_kept));
	return !gpu_check(bench, result, "marking");
}

/* The moves of stripes [first, last) of all rows; done: what earlier steps have moved, updated. */
static void plan_step(struct gpu_bench *bench, struct eviction *eviction, uint32_t first, uint32_t last, uint32_t *done,
	struct kvg_cuda_moves *ret)
{
	struct kvg_cuda_move_row rows[ROWS];

	*ret = eviction->moves;
	ret->tiles = 0;
	for (uint32_t row = 0; row < ROWS; row++) {
		uint32_t kept = 0;

		for (uint32_t s = first; s < last; s++)
			kept += stripe_kept[row][s];
		rows[row] = (struct kvg_cuda_move_row){
			.tile_first = ret->tiles, .count = kept, .src_first = done[row], .tail_first = done[row]};
		ret->tiles += (kept + KVG_CUDA_MOVE_TILE - 1) / KVG_CUDA_MOVE_TILE;
		done[row] += kept;
	}
	ret->move_rows = own(bench, eviction, sizeof(rows), rows);
}

/* All survivors go to new blocks, in one step and in many. */
static bool plan(struct gpu_bench *bench, struct eviction *eviction)
{
	static uint32_t ids[ROWS][BLOCKS];
	uint32_t done[ROWS] = {0}, taken = 0;
	struct kvg_cuda_moves whole;

	if (!mark_once(bench, eviction))
		return false;
	eviction->moves = (struct kvg_cuda_moves){.rows = ROWS,
		.src_ids = eviction->rows.ids,
		.src_cap = BLOCKS,
		.dst_cap = BLOCKS,
		.lists = eviction->lists};
	plan_step(bench, eviction, 0, CHUNKS, done, &whole);
	for (uint32_t row = 0; row < ROWS; row++) {
		eviction->survivors += done[row];
		for (uint32_t i = 0; i * KVG_CUDA_PLACES < done[row]; i++)
			ids[row][i] = block_id(36 * EXTENT_IDS / 2 + taken++);
		done[row] = 0;
	}
	whole.dst_ids = eviction->moves.dst_ids = own(bench, eviction, sizeof(ids), ids);
	for (uint32_t i = 0; i < STEPS; i++)
		plan_step(bench, eviction, i * STEP, (i + 1) * STEP < CHUNKS ? (i + 1) * STEP : CHUNKS, done,
			&eviction->steps[i]);
	eviction->moves = whole;
	return !bench->failed && taken <= (EXTENTS - 36) * EXTENT_IDS / 2;
}

/* ---- rows ---- */

static void measure_row(
	struct gpu_bench *bench, struct eviction *eviction, gpu_work work, double bytes, struct gpu_row row)
{
	if (!gpu_wants(bench, row.id))
		return;
	row.us = gpu_time(bench, work, eviction, false);
	row.floor_us = bytes / bench->copy_rate * 1e6;
	row.rate = bytes / row.us * 1e6;
	if (!bench->failed)
		gpu_row(bench, &row);
}

static void measure_rows(struct gpu_bench *bench, struct eviction *eviction)
{
	const double pairs = (double)ROWS * TOKENS;

	measure_row(bench, eviction, move, (double)eviction->survivors * 2 * (2 * PAIR_BYTES + 8),
		(struct gpu_row){.id = "evict-moves-30",
			.work = "survivors' K, V and metadata to new blocks, 36 x 8 x 16000 at 30%",
			.floor = "each survivor read once, written once",
			.first_us = 500,
			.then_us = 400});
	measure_row(bench, eviction, move_in_steps, (double)eviction->survivors * 2 * (2 * PAIR_BYTES + 8),
		(struct gpu_row){.id = "evict-moves-30-steps",
			.work = "the same in 16 launches, 8 stripes in each",
			.floor = "each survivor read once, written once"});
	measure_row(bench, eviction, gather, pairs * 12,
		(struct gpu_row){.id = "evict-gather-scores",
			.work = "candidates' scores in order, 36 x 8 x 16000",
			.floor = "8 bytes a pair read, 4 written"});
	measure_row(bench, eviction, count, pairs,
		(struct gpu_row){.id = "evict-count",
			.work = "what the decisions mean, 36 x 8 x 16000",
			.floor = "1 byte a pair read"});
	measure_row(bench, eviction, mark, pairs * 17 + (double)eviction->survivors * 4,
		(struct gpu_row){.id = "evict-mark",
			.work = "positions, marks and the list of survivors, 36 x 8 x 16000 at 30%",
			.floor = "9 bytes a pair read, 8 written, 4 a survivor"});
	measure_row(bench, eviction, store, pairs * 12,
		(struct gpu_row){.id = "evict-store-scores",
			.work = "scores to their pairs, 36 x 8 x 16000",
			.floor = "4 bytes a pair read, 8 written"});
}

void gpu_bench_evict(struct gpu_bench *bench)
{
	struct eviction *eviction = calloc(1, sizeof(*eviction));
	CUresult result;

	if (!eviction) {
		(void)gpu_check(bench, CUDA_ERROR_OUT_OF_MEMORY, "host memory");
		return;
	}
	eviction->cuda = bench->cuda;
	eviction->kernels = kvg_cuda_evict_new(bench->cuda, &result);
	if (gpu_check(bench, result, "kernels of evict")) {
		free(eviction);
		return;
	}
	make_area(bench, eviction);
	make_rows(bench, eviction);
	make_decisions(bench, eviction);
	if (!bench->failed && plan(bench, eviction))
		measure_rows(bench, eviction);
	for (uint32_t i = 0; i < eviction->owned_count; i++)
		gpu_free(bench, eviction->owned[i]);
	(void)kvg_cuda_evict_free(eviction->kernels);
	free(eviction);
}
