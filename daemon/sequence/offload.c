/* OFFLOAD and IDLE, and requests of the daemon's own. */
#include "daemon/sequence/offload.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/context.h"
#include "daemon/sequence/image.h"
#include "daemon/sequence/keep.h"
#include "daemon/sequence/promise.h"

static void set_residency(struct meta_seq *meta, enum meta_residency residency)
{
	__atomic_store_n(&meta->residency, residency, __ATOMIC_RELEASE);
}

/* ---- requests of the daemon's own ---- */

void offload_submit(struct space *space, struct request *request)
{
	list_init(&request->node);
	list_init(&request->own_node);
	request->space = space;
	if (atomic_load(&space->dying)) {
		request->cqe.status = -ECANCELED;
		(void)snprintf(request->text, sizeof(request->text), "sequence %#" PRIx64 ": its worker has gone",
			request->sqe.seq);
		request->completed(request);
		return;
	}
	list_add_tail(&space->own, &request->own_node);
	space_submit(space, request);
}

void offload_cancel(struct space *space)
{
	struct list *node;

	while ((node = list_pop(&space->own))) {
		struct request *request = list_entry(node, struct request, own_node);

		list_remove(&request->node);
		request->sequence = NULL;
		request->cqe.status = -ECANCELED;
		(void)snprintf(request->text, sizeof(request->text), "sequence %#" PRIx64 ": its worker has gone",
			request->sqe.seq);
		request->completed(request);
	}
}

/* ---- states ---- */

static bool is_for_any_state(uint8_t op)
{
	return op == KVG_OP_QUERY || op == KVG_OP_FREE || op == KVG_OP_IDLE || op == KVG_OP_OFFLOAD ||
	       op == KVG_OP_RESERVE || op == KVG_OP_RESTORE;
}

bool offload_allows(struct request *request)
{
	struct meta_seq *meta = request->sequence->meta;
	bool offloaded = meta->residency == META_OFFLOADED;
	uint8_t op = request->sqe.op;

	if (!is_for_any_state(op) && (offloaded || (meta->idle && !request->completed))) {
		request_fail(request, -EBUSY,
			"sequence %#" PRIx64 ": operation %u: it is %s; RESERVE or RESTORE put it to use again",
			request->sqe.seq, op, offloaded ? "offloaded" : "idle");
		return false;
	}
	if (request->completed && op != KVG_OP_QUERY && !meta->idle && !offloaded) {
		request_fail(request, -EBUSY, "sequence %#" PRIx64 ": its worker has not released it as idle",
			request->sqe.seq);
		return false;
	}
	if (op != KVG_OP_QUERY && op != KVG_OP_IDLE && op != KVG_OP_OFFLOAD)
		reclaim_withdraw(&request->sequence->reclaimable);
	if (meta->idle && !request->completed && (op == KVG_OP_RESERVE || op == KVG_OP_RESTORE)) {
		meta->idle = 0;
		sequence_publish(request->sequence);
	}
	return true;
}

/* ---- idle sequences ---- */

/* The offload of an idle sequence for whoever needs memory. */
struct reclaim_request {
	struct request request;
	struct tenant *tenant;
	uint64_t bytes;
	bool begun, over; /* begin() has returned; the request is completed */
};

static void reclaimed(struct request *request)
{
	struct reclaim_request *own = list_entry(request, struct reclaim_request, request);

	own->over = true;
	if (!own->begun)
		return;
	reclaim_progress(own->tenant, own->bytes);
	request_deinit(request);
	free(own);
}

static int reclaim_begin_offload(struct reclaimable *reclaimable)
{
	struct sequence *sequence = list_entry(reclaimable, struct sequence, reclaimable);
	struct reclaim_request *own;
	int r;

	if (sequence->busy)
		return -EBUSY;
	own = calloc(1, sizeof(*own));
	if (!own)
		return -ENOMEM;
	*own = (struct reclaim_request){.tenant = reclaimable->tenant, .bytes = reclaimable->bytes};
	own->request.sqe = (struct kvg_sqe){.op = KVG_OP_OFFLOAD, .seq = sequence_handle(sequence)};
	own->request.completed = reclaimed;
	offload_submit(sequence->space, &own->request);
	own->begun = true;
	if (!own->over)
		return 0;
	r = own->request.cqe.status;
	if (r >= 0)
		reclaim_progress(own->tenant, own->bytes);
	request_deinit(&own->request);
	free(own);
	return r;
}

void offload_settle(struct sequence *sequence)
{
	const struct space *space = sequence->space;
	const struct meta_seq *meta = sequence->meta;
	struct reclaimable *reclaimable = &sequence->reclaimable;

	if (!meta->idle || sequence->stays || meta->residency != META_RESIDENT || !list_empty(&reclaimable->node))
		return;
	reclaimable->bytes = meta->blocks * 2 * space->arena->stride + sequence->right * space->arena->extent_size;
	reclaimable->begin = reclaim_begin_offload;
	if (reclaimable->bytes)
		reclaim_offer(space->tenant, RECLAIM_SEQUENCE, reclaimable);
}

void offload_forget(struct sequence *sequence)
{
	const struct space *space = sequence->space;

	reclaim_withdraw(&sequence->reclaimable);
	host_tier_give(space->pool->tier, space->tenant, sequence->meta->image);
	sequence->meta->image = 0;
}

void op_idle(struct request *request)
{
	struct sequence *sequence = request->sequence;

	sequence->meta->idle = 1;
	sequence->stays = false;
	keep_update(sequence);
	space_return_spare(sequence->space);
	sequence_publish(sequence);
	request_finish(request);
}

/* ---- OFFLOAD ---- */

static uint64_t block_bytes(const struct space *space)
{
	return 2 * space->arena->stride;
}

/* Stripes that have committed tokens in some row. */
static uint32_t used_stripes(const struct sequence *sequence)
{
	const struct meta_seq *meta = sequence->meta;
	uint32_t fresh = meta->committed_pos - meta->fold_pos, slack = sequence->min_slack;

	return fresh > slack ? (fresh - slack + KVG_STRIPE_TOKENS - 1) / KVG_STRIPE_TOKENS : 0;
}

/* Scores of what has no place any more must be staged anew. */
static void clamp_scored(const struct sequence *sequence)
{
	const struct meta_part *part = &sequence->space->part;
	const struct meta_seq *meta = sequence->meta;
	uint32_t layers = part->worker->layers, *scored = part->scored + (size_t)sequence->slot * layers;
	uint32_t limit = meta->reserved_pos;

	if (limit < meta->policy.prefix_tokens)
		limit = meta->policy.prefix_tokens;
	for (uint32_t i = 0; i < layers; i++)
		if (scored[i] > limit)
			scored[i] = limit;
}

/* Whole stripes that were reserved and have no committed token go back. Returns their blocks. */
static uint64_t give_uncommitted(struct sequence *sequence)
{
	struct space *space = sequence->space;
	struct meta_seq *meta = sequence->meta;
	uint32_t used = used_stripes(sequence);
	uint64_t given = 0;

	while (meta->stripes > used) {
		meta->stripes--;
		blocks_give_runs(&space->blocks, meta_run(&space->part, sequence->slot, meta->stripes), space->rows);
		meta->blocks -= (uint64_t)space->rows * KVG_RUN_BLOCKS;
		given += (uint64_t)space->rows * KVG_RUN_BLOCKS;
	}
	if (given) {
		meta->reserved_pos = meta->fold_pos + sequence->min_slack + used * KVG_STRIPE_TOKENS;
		clamp_scored(sequence);
	}
	return given;
}

static void give_image(struct sequence *sequence)
{
	offload_forget(sequence);
	sequence->meta->image_bytes = 0;
}

/* The image is complete, or there is nothing to keep: the blocks go. */
static void leave_device(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct space *space = request->space;
	struct meta_seq *meta = sequence->meta;

	request->cqe.value[0] = meta->image_bytes;
	request->cqe.value[1] += meta->blocks * block_bytes(space);
	if (meta->blocks)
		sequence_give_blocks(sequence);
	block_owner_deinit(&space->blocks, &sequence->owner);
	meta->blocks = 0;
	meta->admitted_before = meta->admitted;
	meta->admitted = 0;
	set_residency(meta, META_OFFLOADED);
	promise_update(sequence);
	keep_update(sequence);
	sequence_publish(sequence);
	space_return_spare(space);
	request_finish(request);
}

static void unloaded(struct request *request)
{
	struct sequence *sequence = request->sequence;

	if (request->image)
		request->cqe.value[2] = image_copy_ns(request->image);
	request->image = image_free(request->image);
	if (request->job_status >= 0) {
		leave_device(request);
		return;
	}
	give_image(sequence);
	sequence->stays = true; /* else it would be tried again at once, without end */
	set_residency(sequence->meta, META_RESIDENT);
	promise_update(sequence);
	keep_update(sequence);
	sequence_publish(sequence);
	request_fail(request, request->job_status, "sequence %#" PRIx64 ": offload: memory of the host tier: %s",
		request->sqe.seq, strerror(-request->job_status));
}

/* Frames for its committed blocks. Nothing has changed when there are none. */
static int take_image(struct request *request)
{
	const struct sequence *sequence = request->sequence;
	struct space *space = request->space;
	struct meta_seq *meta = sequence->meta;
	struct host_tier *tier = space->pool->tier;
	uint64_t surplus = (uint64_t)(meta->stripes - used_stripes(sequence)) * space->rows * KVG_RUN_BLOCKS;
	uint32_t size = tier ? host_tier_frame_size(tier) : HOST_FRAME, count;
	struct image_shape shape = image_shape(&space->arena->layout.groups[0], size);
	int r;

	count = image_frames(&shape, size, meta->blocks - surplus, true);
	if (!count)
		return 0;
	context_make_host_room(space->tenant, (uint64_t)count * size, false);
	r = host_tier_take(tier, space->tenant, count, "the image of a sequence", &meta->image, request->text);
	if (r >= 0)
		meta->image_bytes = (uint64_t)count * size;
	return r;
}

static void offload(struct request *request)
{
	struct sequence *sequence = request->sequence;
	int r = take_image(request);

	if (r < 0) {
		request->cqe.status = r;
		request_finish(request);
		return;
	}
	reclaim_withdraw(&sequence->reclaimable);
	request->cqe.value[1] = give_uncommitted(sequence) * block_bytes(request->space);
	if (!sequence->meta->image) {
		leave_device(request);
		return;
	}
	request->image = image_new(sequence, sequence->meta->image, false);
	if (!request->image) {
		request->job_status = -ENOMEM;
		unloaded(request);
		return;
	}
	set_residency(sequence->meta, META_OFFLOADING);
	compute_copy(request, unloaded);
}

void op_offload(struct request *request)
{
	const struct meta_seq *meta = request->sequence->meta;

	if (meta->residency != META_OFFLOADED) {
		offload(request);
		return;
	}
	request->cqe.value[0] = meta->image_bytes;
	request_finish(request);
}
