/* Staged rows become scores in the places of their pairs. */
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/gates.h"
#include "daemon/sequence/space.h"

#define TILE_ROWS  256u
#define SLICE_ROWS 1024u

/* -inf marks what an eviction dropped, and order needs numbers. */
static float clean_score(float score)
{
	if (isnan(score))
		return 0.0f;
	return score < -FLT_MAX ? -FLT_MAX : score > FLT_MAX ? FLT_MAX : score;
}

/* scores [rows][heads] of one layer, for tokens pos .. pos + rows - 1. */
static void store_scores(
	const struct sequence *sequence, uint32_t layer, uint32_t pos, uint32_t rows, const float *scores)
{
	const struct space *space = sequence->space;
	uint32_t heads = space->part.worker->heads, fold_pos = sequence->meta->fold_pos;

	for (uint32_t head = 0; head < heads; head++) {
		uint32_t row = layer * heads + head;
		uint32_t index = meta_rows(&space->part, sequence->slot)[row].base_len + pos - fold_pos;

		for (uint32_t i = 0; i < rows; i++, index++) {
			uint32_t block = sequence_block(sequence, row, index);
			struct meta_place *places = blocks_places(space->arena, space->pool->meta, block);

			places[index % KVG_BLOCK_TOKENS].score = clean_score(scores[(size_t)i * heads + head]);
		}
	}
}

static const uint8_t *staged(const struct request *request, uint32_t layer, uint32_t row, size_t row_bytes)
{
	const struct space *space = request->space;
	size_t index = (size_t)(layer - request->sqe.stage.layer_begin) * request->sqe.stage.rows + row;

	return space->staging + request->sqe.stage.offset + index * row_bytes;
}

/* Scratch of the gate and scores of a tile, for one slice. */
struct tile {
	void *scratch;
	float *scores;
};

static int tile_init(struct tile *tile, const struct request *request)
{
	const struct space *space = request->space;
	size_t scratch = 0, scores = TILE_ROWS * space->part.worker->heads * sizeof(float);

	for (uint32_t i = 0; space->gates && i < space->gates->layers; i++)
		if (scratch < kvg_gate_scratch(space->gates->gates[i], TILE_ROWS))
			scratch = kvg_gate_scratch(space->gates->gates[i], TILE_ROWS);
	scratch = (scratch + 63) / 64 * 64;
	tile->scratch = aligned_alloc(64, scratch + (scores + 63) / 64 * 64);
	tile->scores = (float *)(void *)((uint8_t *)tile->scratch + scratch);
	return tile->scratch ? 0 : -ENOMEM;
}

static void score_tile(const struct request *request, const struct tile *tile, uint32_t rows)
{
	const struct space *space = request->space;
	uint32_t layer = request->layer, row = request->row;
	const float *scores = tile->scores;

	if (request->sqe.stage.kind == KVG_STAGE_HIDDEN)
		kvg_gate_score(space->gates->gates[layer],
			(const void *)staged(
				request, layer, row, space->part.worker->layout.hidden_dim * sizeof(uint16_t)),
			rows, tile->scores, tile->scratch);
	else
		scores = (const void *)staged(request, layer, row, space->part.worker->heads * sizeof(float));
	store_scores(request->sequence, layer, request->sqe.stage.pos + row, rows, scores);
}

static bool is_complete(const struct request *request)
{
	return request->layer == request->sqe.stage.layer_begin + request->sqe.stage.layer_count;
}

/* A slice of the rows, so that the jobs of others get their turn. */
static void stage_run(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	struct tile tile;

	request->cqe.status = tile_init(&tile, request);
	for (uint32_t done = 0; request->cqe.status == 0 && done < SLICE_ROWS && !is_complete(request);) {
		uint32_t left = request->sqe.stage.rows - request->row, n = left < TILE_ROWS ? left : TILE_ROWS;

		score_tile(request, &tile, n);
		done += n;
		request->row += n;
		if (request->row == request->sqe.stage.rows) {
			request->row = 0;
			request->layer++;
		}
	}
	free(tile.scratch);
}

static void stage_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	struct space *space = request->space;
	uint32_t *scored = space->part.scored + (size_t)request->sequence->slot * space->part.worker->layers;
	uint32_t end = request->sqe.stage.pos + request->sqe.stage.rows;

	if (space_job_ended(space))
		return;
	if (request->cqe.status < 0) {
		request_fail(request, request->cqe.status, "sequence %#" PRIx64 ": scoring: %s", request->sqe.seq,
			strerror(-request->cqe.status));
		return;
	}
	if (!is_complete(request)) {
		space_submit_job(request, stage_run, stage_done);
		return;
	}
	for (uint32_t i = 0; i < request->sqe.stage.layer_count; i++)
		if (scored[request->sqe.stage.layer_begin + i] < end)
			scored[request->sqe.stage.layer_begin + i] = end;
	request_finish(request);
}

static bool check_area(struct request *request)
{
	const struct space *space = request->space;
	const struct meta_worker *worker = space->part.worker;
	bool hidden = request->sqe.stage.kind == KVG_STAGE_HIDDEN;
	uint64_t row_bytes = hidden ? worker->layout.hidden_dim * sizeof(uint16_t) : worker->heads * sizeof(float);
	uint64_t bytes = row_bytes * request->sqe.stage.rows * request->sqe.stage.layer_count;
	uint64_t offset = request->sqe.stage.offset;

	if (request->sqe.stage.kind != KVG_STAGE_HIDDEN && request->sqe.stage.kind != KVG_STAGE_SCORE)
		request_fail(request, -EOPNOTSUPP, "stage: kind %u, this daemon takes HIDDEN (1) and SCORE (3)",
			request->sqe.stage.kind);
	else if (offset % 4 || offset > space->staging_size || bytes > space->staging_size - offset)
		request_fail(request, -EINVAL, "stage: %" PRIu64 " bytes at %" PRIu64 ", the staging area has %" PRIu64,
			bytes, offset, space->staging_size);
	else if (hidden && !space->gates)
		request_fail(request, -ENOKEY, "stage: hidden states, but no gate is loaded");
	else
		return true;
	return false;
}

static bool check_rows(struct request *request)
{
	const struct space *space = request->space;
	const struct meta_seq *meta = request->sequence->meta;
	uint32_t layers = space->part.worker->layers, begin = request->sqe.stage.layer_begin;
	uint32_t count = request->sqe.stage.layer_count, pos = request->sqe.stage.pos, rows = request->sqe.stage.rows;
	const uint32_t *scored = space->part.scored + (size_t)request->sequence->slot * layers;

	if (!count || begin >= layers || count > layers - begin) {
		request_fail(request, -EINVAL, "stage: layers %u + %u, the layout has %u", begin, count, layers);
		return false;
	}
	if (!rows || pos < meta->fold_pos || pos > meta->reserved_pos || rows > meta->reserved_pos - pos) {
		request_fail(request, -EINVAL, "sequence %#" PRIx64 ": stage %u rows from %u, possible are %u to %u",
			request->sqe.seq, rows, pos, meta->fold_pos, meta->reserved_pos);
		return false;
	}
	for (uint32_t i = begin; i < begin + count; i++) {
		if (pos > scored[i]) {
			request_fail(request, -EINVAL,
				"sequence %#" PRIx64 ": stage from %u, but layer %u is scored to %u only",
				request->sqe.seq, pos, i, scored[i]);
			return false;
		}
	}
	return true;
}

void op_stage(struct request *request)
{
	if (!check_area(request) || !check_rows(request))
		return;
	request->layer = request->sqe.stage.layer_begin;
	request->row = 0;
	space_submit_job(request, stage_run, stage_done);
}
