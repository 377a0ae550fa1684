/* PUBLISH and FIND. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/context.h"
#include "daemon/sequence/keep.h"
#include "daemon/sequence/promise.h"

static void report(struct request *request, const struct context *context)
{
	request->cqe.value[0] = context->part.context->id;
	request->cqe.value[1] = context->chain_blocks * 2 * context->arena->stride;
	request->cqe.value[2] = context->part.context->tokens;
}

/* ---- the sequence goes on behind the context ---- */

static void published(struct request *request)
{
	space_return_spare(request->space);
	request->publish = (struct publish){.held = true, .lengths = true, .shared = true};
	compute_publish(request, request_finish);
}

/* Rows take the copies of their tails. */
static void put_tails(struct sequence *sequence, const uint32_t *ids)
{
	struct space *space = sequence->space;

	for (uint32_t row = 0; row < space->rows; row++) {
		struct meta_row *meta = &meta_rows(&space->part, sequence->slot)[row];
		uint32_t *held = meta_held(&space->part, sequence->slot, row);

		if (!meta->held_blocks)
			continue;
		meta->pending = 0;
		blocks_give(&space->blocks, held[0]);
		held[0] = *ids++;
		*sequence_table_row(sequence, row) = held[0];
	}
	sequence->meta->blocks = sequence->tails;
	promise_update(sequence);
	keep_update(sequence);
}

static void tails_moved(struct request *request)
{
	if (space_job_ended(request->space) || space_job_lost(request))
		return;
	put_tails(request->sequence, request->copy.dst);
	block_copy_deinit(&request->copy);
	published(request);
}

/* Whether the tails keep extents that could go back if they were in others. */
static bool tails_are_scattered(const struct sequence *sequence)
{
	const struct space *space = sequence->space;
	const struct extent *first = NULL;

	for (uint32_t row = 0; row < space->rows; row++) {
		const struct extent *extent;

		if (!meta_rows(&space->part, sequence->slot)[row].held_blocks)
			continue;
		extent = blocks_extent(&space->blocks, *meta_held(&space->part, sequence->slot, row));
		if (first && extent != first)
			return true;
		first = extent;
	}
	return false;
}

/*
 * The full blocks have gone, and with them whole extents, but for tails between them: these move together, to where
 * other sequences' tails may join them.
 */
static void gather_tails(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct space *space = request->space;
	struct block_copy *copy = &request->copy;
	uint32_t n = 0, others = space->blocks.spare_count - keep_usable(sequence);

	if (!tails_are_scattered(sequence) ||
		blocks_free_anywhere(&space->blocks) < sequence->tails + space->evict_reserve ||
		blocks_missing(&space->blocks, &space->blocks.shared, META_HELD, sequence->tails, 0, others) ||
		block_copy_init(copy, sequence->tails, sequence->tails) < 0) {
		published(request);
		return;
	}
	blocks_take(&space->blocks, &space->blocks.shared, META_HELD, sequence->tails, 0, copy->dst);
	sequence->meta->blocks += sequence->tails;
	for (uint32_t row = 0; row < space->rows; row++) {
		uint32_t *held = meta_held(&space->part, sequence->slot, row);

		if (!meta_rows(&space->part, sequence->slot)[row].held_blocks)
			continue;
		meta_rows(&space->part, sequence->slot)[row].pending = 1;
		copy->src[n] = held[0];
		held[1] = copy->dst[n++];
	}
	compute_copy_blocks(request, tails_moved);
}

static void adopted(struct request *request, struct context *context, bool existed)
{
	int r = context_adopt(request->sequence, context, true);

	block_copy_deinit(&request->copy);
	if (r < 0) {
		request_fail(request, r, "publish: out of memory");
		return;
	}
	report(request, context);
	request->cqe.value[3] = existed;
	gather_tails(request);
}

/* Its own tails stay: they count as prefix from now on. Lists them from entry `n` of the copies on. */
static void list_own_tails(const struct sequence *sequence, struct block_copy *copy, uint32_t n)
{
	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		struct row_extent at = context_row_extent(sequence, row);

		if (!at.tail)
			continue;
		copy->src[n] = copy->dst[n] = sequence_block(sequence, row, at.blocks * KVG_BLOCK_TOKENS);
		n++;
	}
}

/* ---- another sequence had published the key ---- */

static bool lengths_agree(const struct sequence *sequence, const struct context *context)
{
	if (context->part.context->tokens != sequence->meta->committed_pos)
		return false;
	for (uint32_t row = 0; row < context->rows; row++) {
		struct row_extent at = context_row_extent(sequence, row);

		if (at.blocks + sequence_shared(sequence, row) != context->shared[row] ||
			at.tail != context->part.rows[row].tail)
			return false;
	}
	return true;
}

static void existing_sealed(struct request *request)
{
	struct context *context = request->context;

	if (space_job_ended(request->space)) {
		request->context = NULL;
		context_let_go(context);
		return;
	}
	request->context = NULL;
	if (!space_job_lost(request))
		adopted(request, context, true);
	context_let_go(context);
}

static void join_existing(struct request *request, struct context *context)
{
	const struct sequence *sequence = request->sequence;

	if (!lengths_agree(sequence, context)) {
		request_fail(request, -EEXIST,
			"sequence %#" PRIx64 ": publish: the key names context %" PRIu64
			" of %u tokens, which does not "
			"hold what the sequence of %u does",
			request->sqe.seq, context->part.context->id, context->part.context->tokens,
			sequence->meta->committed_pos);
		return;
	}
	if (!context_is_here(request, context))
		return;
	if (!request->context)
		request->context = context_hold(context);
	if (block_copy_init(&request->copy, context->tails, context->tails) < 0) {
		context_request_ended(request);
		request_fail(request, -ENOMEM, "publish: out of memory");
		return;
	}
	list_own_tails(sequence, &request->copy, 0);
	compute_copy_blocks(request, existing_sealed);
}

/* ---- a new context ---- */

/* Nothing is left of it. */
static void give_up(struct request *request, int status)
{
	struct context *context = request->context;

	request->context = NULL;
	block_copy_deinit(&request->copy);
	request->cqe.status = status;
	context_abort(context);
	request_finish(request);
}

/* The end of a job; false when the worker is gone, and the context with it. */
static bool goes_on(struct request *request)
{
	struct context *context = request->context;
	bool dying = atomic_load_explicit(&request->space->dying, memory_order_relaxed);

	if (dying) {
		request->context = NULL;
		context_abort(context);
	}
	return !space_job_ended(request->space) && !dying;
}

static void copied(struct request *request)
{
	struct context *context = request->context;

	if (!goes_on(request))
		return;
	if (request->job_status < 0) {
		(void)snprintf(request->text, sizeof(request->text), "publish: %s", strerror(-request->job_status));
		give_up(request, request->job_status);
		return;
	}
	request->context = NULL;
	context_seal(context);
	(void)context_hold(context);
	adopted(request, context, false);
	context_wake(context);
	context_let_go(context);
}

/* Blocks of a row that lie in anonymous contexts, oldest first. */
static uint32_t list_anonymous(const struct context *at, uint32_t row, uint32_t *ids)
{
	const struct meta_context_row *from;
	uint32_t n;

	if (!at || context_is_published(at))
		return 0;
	from = &at->part.rows[row];
	n = list_anonymous(at->parent, row, ids);
	memcpy(ids + n, at->part.ids + from->first, from->blocks * sizeof(uint32_t));
	return n + from->blocks;
}

/* Copies: tails, then the sequence's own tails (places alone), then full blocks row by row. */
static void list_copies(struct request *request)
{
	const struct sequence *sequence = request->sequence;
	struct context *context = request->context;
	struct block_copy *copy = &request->copy;
	uint32_t tails = copy->places / 2, n = 0, tail = 0, *full = copy->src + copy->places;

	list_own_tails(sequence, copy, tails);
	memcpy(copy->src, copy->src + tails, tails * sizeof(uint32_t));
	memcpy(context->part.ids, copy->dst + copy->places, (copy->count - copy->places) * sizeof(uint32_t));
	for (uint32_t row = 0; row < context->rows; row++) {
		struct row_extent at = context_row_extent(sequence, row);
		uint32_t first = n;

		n += list_anonymous(sequence->context, row, full + n);
		for (uint32_t i = 0; i < at.blocks; i++)
			full[n++] = sequence_block(sequence, row, i * KVG_BLOCK_TOKENS);
		context->part.rows[row] = (struct meta_context_row){.first = first,
			.blocks = n - first,
			.tail = at.tail,
			.tail_block = at.tail ? copy->dst[tail++] : 0};
	}
}

/* Its extents are there. */
static void fill(struct request *request)
{
	struct context *context = request->context;
	struct block_copy *copy = &request->copy;
	uint32_t tails = copy->places / 2;

	blocks_take(&context->blocks, &context->blocks.shared, META_HELD, tails, copy->count - copy->places, copy->dst);
	blocks_take(&context->blocks, &context->blocks.shared, META_HELD, copy->count - copy->places, 0,
		copy->dst + copy->places);
	list_copies(request);
	compute_copy_blocks(request, copied);
}

static void created(struct extent_batch *batch)
{
	struct request *request = batch->user;
	int status = context_add_extents(request->context, batch);

	if (!goes_on(request))
		return;
	if (status >= 0) {
		fill(request);
		return;
	}
	(void)snprintf(request->text, sizeof(request->text), "%s: memory of a context: %s",
		request->space->tenant->quota.name, strerror(-status));
	give_up(request, status);
}

static void grow_or_wait(struct request *request)
{
	const struct arena *arena = request->space->arena;
	uint32_t each = arena->blocks_per_extent;
	uint32_t extents = (request->copy.count - request->copy.places / 2 + each - 1) / each;
	int r = context_create_extents(request->context, extents, created, request, request->text);

	if (r >= 0)
		request->space->jobs++;
	if (r == -ENOSPC && space_wait_memory(request, extents * (uint64_t)arena->extent_size, grow_or_wait))
		return;
	if (r < 0)
		give_up(request, r);
}

struct size {
	uint64_t full;
	uint32_t tails;
};

/* Blocks behind those of the published context that the sequence begins with. */
static struct size measure(const struct sequence *sequence, const struct context *parent)
{
	struct size size = {0};

	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		struct row_extent at = context_row_extent(sequence, row);

		size.full += at.blocks + sequence_shared(sequence, row) - (parent ? parent->shared[row] : 0);
		size.tails += at.tail > 0;
	}
	return size;
}

/* Links that have no full blocks are left out: else one worker could make chains that cost time and no memory. */
static struct context *full_parent(struct context *context)
{
	while (context && !context->part.context->ids)
		context = context->parent;
	return context;
}

static void make(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct context *parent = full_parent(context_published(sequence->context));
	struct size size = measure(sequence, parent);
	int r = context_new(request->space, parent, request->sqe.publish.key, sequence->meta->committed_pos, size.full,
		&request->context);

	if (r < 0) {
		request_fail(request, r, "publish: %s", r == -EUSERS ? "there are too many contexts" : "out of memory");
		return;
	}
	r = block_copy_init(&request->copy, size.full + 2 * (uint64_t)size.tails, 2 * (uint64_t)size.tails);
	if (r < 0)
		give_up(request, r);
	else
		grow_or_wait(request);
}

void op_publish(struct request *request)
{
	struct space *space = request->space;
	const struct meta_seq *meta = request->sequence->meta;
	struct context *existing = request->context; /* held while it waited for memory to bring it back */

	if (!existing)
		existing = context_find(space->tenant, space->arena, request->sqe.publish.key);

	if (!space->compute->copy)
		request_fail(request, -EOPNOTSUPP, "publish: this kind has no contexts");
	else if (!meta->committed_pos)
		request_fail(request, -EINVAL, "sequence %#" PRIx64 ": publish: it has no committed tokens",
			request->sqe.seq);
	else if (!existing)
		make(request);
	else if (existing->part.context->state == META_CONTEXT_COPYING)
		context_wait(request, existing);
	else
		join_existing(request, existing);
}

/* ---- FIND ---- */

void op_find(struct request *request)
{
	const struct space *space = request->space;
	const struct context *context = context_find(space->tenant, space->arena, request->sqe.find.key);

	if (context && context->part.context->state == META_CONTEXT_SEALED) {
		report(request, context);
		request->cqe.value[3] = context->attached;
	}
	request_finish(request);
}
