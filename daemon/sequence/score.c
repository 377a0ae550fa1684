/* The host kind's scores. */
#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/gates.h"
#include "daemon/sequence/score.h"

#define TILE_ROWS  256u
#define SLICE_ROWS 1024u
#define SHORT      1024u /* scores */

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
	uint64_t layers = layer - request->sqe.stage.layer_begin, stride = request->sqe.stage.layer_stride;

	if (!stride)
		stride = request->sqe.stage.rows * row_bytes;
	return request->space->staging + request->sqe.stage.offset + layers * stride + row * row_bytes;
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

bool score_is_complete(const struct request *request)
{
	return request->layer == request->sqe.stage.layer_begin + request->sqe.stage.layer_count;
}

bool score_is_short(const struct request *request)
{
	const struct space *space = request->space;
	const struct kvg_sqe *sqe = &request->sqe;
	uint64_t scores = (uint64_t)sqe->stage.rows * sqe->stage.layer_count * space->part.worker->heads;

	return space->compute->score == score_slice && sqe->stage.kind == KVG_STAGE_SCORE && scores <= SHORT;
}

int score_slice(struct request *request)
{
	struct tile tile;
	int r = tile_init(&tile, request);

	if (r < 0)
		return r;
	for (uint32_t done = 0; done < SLICE_ROWS && !score_is_complete(request);) {
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
	return 0;
}
