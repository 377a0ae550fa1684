/* STAGE: what an entry may name, and what its end means for the sequence. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/gates.h"
#include "daemon/sequence/score.h"

/* Bytes of one staged row, or 0 for a kind that this daemon does not take. */
static uint64_t row_bytes(const struct space *space, uint32_t kind)
{
	const struct meta_worker *worker = space->part.worker;

	if (kind == KVG_STAGE_HIDDEN)
		return worker->layout.hidden_dim * sizeof(uint16_t);
	if (kind == KVG_STAGE_SCORE)
		return worker->heads * sizeof(float);
	if (kind == KVG_STAGE_PREACT && space->sync && space->gates)
		return (uint64_t)worker->heads * (worker->layout.groups[0].query_heads + 1) * space->gates->width *
		       sizeof(uint16_t);
	return 0;
}

/* Bytes of the buffer that the entry names; -1: there is no such buffer. */
static int64_t buffer_size(struct request *request)
{
	struct space *space = request->space;
	uint32_t id = request->sqe.stage.buffer;

	if (id == KVG_BUFFER_STAGING)
		return (int64_t)space->staging_size;
	if (id == KVG_BUFFER_DEVICE)
		return space->sync ? (int64_t)space->device.staging_size : -1;
	request->buffer = imports_find(&space->imports, id, IMPORT_BUFFER);
	if (!request->buffer)
		return -1;
	import_use(request->buffer);
	return (int64_t)request->buffer->size;
}

/* Bytes from the first to the last staged row's end; UINT64_MAX when they cannot be counted. */
static uint64_t area_bytes(const struct kvg_sqe *sqe, uint64_t row)
{
	uint64_t layer = row * sqe->stage.rows, stride = sqe->stage.layer_stride, bytes;

	if (!sqe->stage.layer_count)
		return 0;
	if (!stride)
		stride = layer;
	if (__builtin_mul_overflow(stride, sqe->stage.layer_count - 1, &bytes) ||
		__builtin_add_overflow(bytes, layer, &bytes))
		return UINT64_MAX;
	return bytes;
}

static bool check_kind(struct request *request)
{
	const struct space *space = request->space;
	uint32_t kind = request->sqe.stage.kind;

	if (kind != KVG_STAGE_SCORE && !space->gates && (kind == KVG_STAGE_HIDDEN || space->sync))
		request_fail(request, -ENOKEY, "stage: %s, but no gate is loaded",
			kind == KVG_STAGE_HIDDEN ? "hidden states" : "the gate's products");
	else if (!row_bytes(space, kind))
		request_fail(request, -EOPNOTSUPP, "stage: kind %u; this daemon takes HIDDEN (1), SCORE (3)%s", kind,
			space->sync ? " and PREACT (2)" : "; PREACT (2) with the kind cuda only");
	else
		return true;
	return false;
}

static bool check_area(struct request *request)
{
	const struct kvg_sqe *sqe = &request->sqe;
	uint64_t row = row_bytes(request->space, sqe->stage.kind), bytes = area_bytes(sqe, row);
	uint64_t offset = sqe->stage.offset, align = request->space->sync ? 16 : 4;
	int64_t size = buffer_size(request);
	uint64_t address = (request->buffer ? request->buffer->address : 0) + offset; /* the other areas are aligned */

	if (size < 0)
		request_fail(request, -ENOENT, "stage: there is no buffer %u", sqe->stage.buffer);
	else if (sqe->stage.layer_stride && sqe->stage.layer_stride < row * sqe->stage.rows)
		request_fail(request, -EINVAL, "stage: layers %" PRIu64 " bytes apart, each has %" PRIu64,
			sqe->stage.layer_stride, row * sqe->stage.rows);
	else if (address % align || sqe->stage.layer_stride % align || offset > (uint64_t)size ||
		 bytes > (uint64_t)size - offset)
		request_fail(request, -EINVAL,
			"stage: %" PRIu64 " bytes at %" PRIu64 " (address a multiple of %" PRIu64
			"), the staging area has %" PRIi64,
			bytes, offset, align, size);
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

static void stage_done(struct job *job);

static void go_on(struct request *request)
{
	const struct space *space = request->space;
	uint32_t *scored = space->part.scored + (size_t)request->sequence->slot * space->part.worker->layers;
	uint32_t end = request->sqe.stage.pos + request->sqe.stage.rows;

	if (request->job_status < 0) {
		request_fail(request, request->job_status, "sequence %#" PRIx64 ": scoring: %s", request->sqe.seq,
			strerror(-request->job_status));
		return;
	}
	if (!score_is_complete(request)) {
		compute_submit(request, space->compute->score, stage_done);
		return;
	}
	for (uint32_t i = 0; i < request->sqe.stage.layer_count; i++)
		if (scored[request->sqe.stage.layer_begin + i] < end)
			scored[request->sqe.stage.layer_begin + i] = end;
	request_finish(request);
}

static void stage_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (!space_job_ended(request->space))
		go_on(request);
}

void op_stage(struct request *request)
{
	if (!check_kind(request) || !check_area(request) || !check_rows(request))
		return;
	request->layer = request->sqe.stage.layer_begin;
	request->row = 0;
	if (score_is_short(request)) {
		request->job_status = score_slice(request);
		go_on(request);
		return;
	}
	compute_submit(request, request->space->compute->score, stage_done);
}
