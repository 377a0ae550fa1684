/* Staged rows become scores in the places of their pairs. */
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/gates.h"
#include "daemon/sequence/space.h"

#define TILE_ROWS 256u /* scored between two looks at `dying` */

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

static int score_hidden(const struct request *request, uint32_t layer)
{
	const struct space *space = request->space;
	const struct kvg_gate *gate = space->gates->gates[layer];
	size_t scratch_bytes = (kvg_gate_scratch(gate, TILE_ROWS) + 63) / 64 * 64;
	size_t row_bytes = space->part.worker->layout.hidden_dim * sizeof(uint16_t);
	uint32_t rows = request->sqe.stage.rows;
	uint8_t *scratch =
		aligned_alloc(64, scratch_bytes + TILE_ROWS * space->part.worker->heads * sizeof(float) + 64);
	float *scores = (float *)(void *)(scratch + scratch_bytes);

	if (!scratch)
		return -ENOMEM;
	for (uint32_t row = 0; row < rows; row += TILE_ROWS) {
		uint32_t n = rows - row < TILE_ROWS ? rows - row : TILE_ROWS;

		if (atomic_load_explicit(&space->dying, memory_order_relaxed))
			break;
		kvg_gate_score(gate, (const void *)staged(request, layer, row, row_bytes), n, scores, scratch);
		store_scores(request->sequence, layer, request->sqe.stage.pos + row, n, scores);
	}
	free(scratch);
	return 0;
}

static void stage_run(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	uint32_t begin = request->sqe.stage.layer_begin, end = begin + request->sqe.stage.layer_count;
	size_t row_bytes = request->space->part.worker->heads * sizeof(float);

	for (uint32_t layer = begin; layer < end && request->cqe.status == 0; layer++) {
		if (request->sqe.stage.kind == KVG_STAGE_HIDDEN)
			request->cqe.status = score_hidden(request, layer);
		else
			store_scores(request->sequence, layer, request->sqe.stage.pos, request->sqe.stage.rows,
				(const void *)staged(request, layer, 0, row_bytes));
	}
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
	if (check_area(request) && check_rows(request))
		space_submit_job(request, stage_run, stage_done);
}
