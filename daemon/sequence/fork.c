/* FORK, and how a sequence goes on behind a context that has what it holds. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/admission.h"
#include "daemon/sequence/compute.h"
#include "daemon/sequence/context.h"
#include "daemon/sequence/evict.h"
#include "daemon/sequence/keep.h"
#include "daemon/sequence/promise.h"
#include "daemon/sequence/retain.h"

struct row_extent context_row_extent(const struct sequence *sequence, uint32_t row)
{
	const struct meta_seq *meta = sequence->meta;
	uint32_t length =
		meta_rows(&sequence->space->part, sequence->slot)[row].base_len + meta->committed_pos - meta->fold_pos;

	return (struct row_extent){.blocks = length / KVG_BLOCK_TOKENS, .tail = length % KVG_BLOCK_TOKENS};
}

/* Of a row's own blocks the one with the tail stays. */
static void reduce_row(struct sequence *sequence, uint32_t row, bool give)
{
	struct space *space = sequence->space;
	struct meta_row *meta = &meta_rows(&space->part, sequence->slot)[row];
	struct row_extent at = context_row_extent(sequence, row);
	uint32_t count = meta->held_blocks + sequence->meta->stripes * KVG_RUN_BLOCKS, kept = 0;

	for (uint32_t i = 0; i < count; i++) {
		uint32_t id = sequence_block(sequence, row, i * KVG_BLOCK_TOKENS);

		if (i == at.blocks && at.tail)
			kept = id;
		else if (give || i >= at.blocks)
			blocks_give(&space->blocks, id);
	}
	*meta = (struct meta_row){.base_len = at.tail, .held_len = at.tail, .held_blocks = at.tail > 0};
	if (at.tail)
		*meta_held(&space->part, sequence->slot, row) = kept;
}

static void reduce(struct sequence *sequence, bool give)
{
	struct space *space = sequence->space;
	struct meta_seq *meta = sequence->meta;
	uint32_t slack = KVG_BLOCK_TOKENS;

	meta->pairs = 0;
	sequence->tails = 0;
	for (uint32_t row = 0; row < space->rows; row++) {
		const struct meta_row *at = &meta_rows(&space->part, sequence->slot)[row];
		uint32_t room;

		reduce_row(sequence, row, give);
		room = at->held_blocks * KVG_BLOCK_TOKENS - at->held_len;
		slack = room < slack ? room : slack;
		meta->pairs += at->held_len;
		sequence->tails += at->held_blocks;
	}
	meta->blocks = sequence->tails;
	meta->stripe_first = meta->stripes = 0;
	sequence->min_slack = slack;
}

/* Everything is folded and sealed. */
static void freeze(struct sequence *sequence)
{
	const struct meta_part *part = &sequence->space->part;
	struct meta_seq *meta = sequence->meta;
	uint32_t max_tokens = part->worker->layout.max_tokens, layers = part->worker->layers;

	context_freeze_policy(&meta->policy, meta->committed_pos);
	meta->fold_pos = meta->shared_pos = meta->committed_pos;
	meta->reserved_pos = meta->committed_pos + sequence->min_slack;
	if (meta->reserved_pos > max_tokens)
		meta->reserved_pos = max_tokens;
	meta->prune_start = meta->next_prune_start = 0;
	for (uint32_t i = 0; i < layers; i++)
		part->scored[(size_t)sequence->slot * layers + i] = meta->policy.prefix_tokens;
}

int context_adopt(struct sequence *sequence, struct context *context, bool give)
{
	struct meta_seq *meta = sequence->meta;
	int r = context_join(sequence, context);

	if (r < 0)
		return r;
	reduce(sequence, give);
	freeze(sequence);
	retain_forget(sequence); /* all of it is of the prefix now */
	meta->generation++;
	meta->admitted = evict_future_need(sequence, meta->pairs, meta->blocks);
	promise_update(sequence);
	keep_update(sequence);
	context_write_rows(sequence);
	sequence_publish(sequence);
	return 0;
}

/* ---- FORK ---- */

struct own {
	uint64_t blocks; /* full ones */
	uint32_t tails;
};

static struct own count_own(const struct sequence *sequence)
{
	struct own own = {0};

	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		struct row_extent at = context_row_extent(sequence, row);

		own.blocks += at.blocks;
		own.tails += at.tail > 0;
	}
	return own;
}

/* The child has taken its blocks, and no row has them yet. */
static void fail(struct request *request, int status)
{
	struct sequence *child = request->child;

	request->child = NULL;
	for (uint32_t i = 0; i < request->copy.count; i++)
		blocks_give(&request->space->blocks, request->copy.dst[i]);
	child->meta->blocks = 0;
	block_copy_deinit(&request->copy);
	request->cqe.status = status;
	(void)snprintf(request->text, sizeof(request->text), "sequence %#" PRIx64 ": fork: %s", request->sqe.seq,
		strerror(-status));
	sequence_end(request, child);
}

static void child_published(struct request *request)
{
	struct sequence *child = request->sequence, *parent = request->child;
	struct space *space = request->space;
	struct list waiting, *node;

	request->child = NULL;
	child->busy = false;
	list_init(&waiting);
	while ((node = list_pop(&child->queue)))
		list_add_tail(&waiting, node);
	request->sequence = parent;
	request_finish(request);
	while ((node = list_pop(&waiting))) /* one may free the child */
		space_submit(space, list_entry(node, struct request, node));
}

/* The table that the worker's kernels read gets the child's rows behind the parent's. */
static void parent_published(struct request *request)
{
	struct sequence *parent = request->sequence;

	request->sequence = request->child;
	request->child = parent;
	request->publish = (struct publish){.held = true, .lengths = true, .shared = true};
	compute_publish(request, child_published);
}

static void forked(struct request *request)
{
	const struct sequence *child = request->child;

	sequence_publish(child);
	space_return_spare(request->space);
	request->cqe.value[0] = child->slot;
	request->cqe.value[1] = sequence_handle(child);
	request->cqe.value[2] = child->right * request->space->arena->extent_size;
	request->cqe.value[3] = child->meta->blocks * 2 * request->space->arena->stride;
	block_copy_deinit(&request->copy);
	request->publish = (struct publish){.held = true, .lengths = true, .shared = true};
	compute_publish(request, parent_published);
}

static void copied(struct request *request)
{
	if (!space_job_ended(request->space) && !space_job_lost(request))
		forked(request);
}

/* The parent's full blocks become a context's. */
static int seal(struct sequence *parent, uint64_t blocks)
{
	struct context *context;
	uint32_t n = 0;
	int r = context_new(parent->space, parent->context, NULL, parent->meta->committed_pos, blocks, &context);

	if (r < 0)
		return r;
	for (uint32_t row = 0; row < parent->space->rows; row++) {
		struct row_extent at = context_row_extent(parent, row);

		context->part.rows[row] = (struct meta_context_row){.first = n, .blocks = at.blocks};
		for (uint32_t i = 0; i < at.blocks; i++)
			context->part.ids[n++] = sequence_block(parent, row, i * KVG_BLOCK_TOKENS);
	}
	context_seal(context);
	r = context_adopt(parent, context, false);
	if (r < 0) {
		context->part.context->ids = 0; /* they are the parent's */
		context_let_go(context_hold(context));
	}
	return r;
}

/* Rows of the child: the parent's tails. */
static void fill_rows(const struct sequence *parent, struct sequence *child, struct block_copy *copy)
{
	struct space *space = child->space;
	struct meta_row *rows = meta_rows(&space->part, child->slot);
	uint32_t n = 0, slack = KVG_BLOCK_TOKENS;

	for (uint32_t row = 0; row < space->rows; row++) {
		uint32_t tail = context_row_extent(parent, row).tail, room = tail ? KVG_BLOCK_TOKENS - tail : 0;

		rows[row] = (struct meta_row){.base_len = tail, .held_len = tail, .held_blocks = tail > 0};
		child->meta->pairs += tail;
		slack = room < slack ? room : slack;
		if (!tail)
			continue;
		copy->src[n] = sequence_block(parent, row, 0);
		*meta_held(&space->part, child->slot, row) = copy->dst[n++];
	}
	child->min_slack = slack;
}

/* Places of the parent's own tails are set where it was sealed: fresh pairs have none yet. */
static void add_parent_tails(const struct sequence *parent, struct block_copy *copy)
{
	uint32_t n = copy->count;

	for (uint32_t row = 0; row < parent->space->rows; row++)
		if (meta_rows(&parent->space->part, parent->slot)[row].held_blocks)
			copy->src[n] = copy->dst[n] = *meta_held(&parent->space->part, parent->slot, row), n++;
	copy->count = copy->places = n;
}

static void tails_taken(struct request *request)
{
	struct sequence *parent = request->sequence, *child = request->child;
	struct own own = count_own(parent);
	int r = own.blocks ? seal(parent, own.blocks) : 0;

	if (r >= 0 && parent->context)
		r = context_join(child, parent->context);
	if (r < 0) {
		fail(request, r);
		return;
	}
	fill_rows(parent, child, &request->copy);
	if (own.blocks)
		add_parent_tails(parent, &request->copy);
	freeze(child);
	promise_update(child);
	keep_update(child);
	context_write_rows(child);
	if (request->copy.count)
		compute_copy_blocks(request, copied);
	else
		forked(request);
}

/* What the child begins with, but for blocks. */
static struct sequence *new_child(struct request *request, const struct kvg_policy *policy, uint64_t blocks)
{
	const struct sequence *parent = request->sequence;
	struct sequence *child = sequence_new(request->space, policy, blocks);
	struct meta_seq *meta;

	if (!child)
		return NULL;
	meta = child->meta;
	meta->committed_pos = meta->fold_pos = meta->reserved_pos = meta->shared_pos = parent->meta->committed_pos;
	meta->protected_count = parent->meta->protected_count;
	memcpy(meta->protect_begin, parent->meta->protect_begin, sizeof(meta->protect_begin));
	memcpy(meta->protect_end, parent->meta->protect_end, sizeof(meta->protect_end));
	child->decodes = parent->decodes;
	child->busy = true;
	promise_update(child);
	return child;
}

static uint64_t child_need(const struct sequence *parent, const struct kvg_policy *policy, uint32_t tails)
{
	struct kvg_policy behind = admission_behind(policy, parent->meta->committed_pos);
	uint32_t rows = parent->space->rows;

	return tails + admission_blocks(&behind, rows, 0, 0) +
	       protected_blocks(parent->meta, rows, parent->meta->committed_pos);
}

void op_fork(struct request *request)
{
	struct space *space = request->space;
	const struct sequence *parent = request->sequence;
	struct own own = count_own(parent);
	struct kvg_policy policy = parent->meta->policy;
	uint64_t blocks;
	int r;

	if (!space->compute->copy) {
		request_fail(request, -EOPNOTSUPP, "fork: this kind has no contexts");
		return;
	}
	if (!space->free_count) {
		request_fail(request, -EUSERS, "fork: all %u sequences of the layout are in use",
			space->part.worker->max_sequences);
		return;
	}
	context_freeze_policy(&policy, parent->meta->committed_pos);
	blocks = child_need(parent, &policy, own.tails);
	r = tenant_check_sequences(space->tenant, 1, request->text, sizeof(request->text));
	if (r >= 0)
		r = promise_admit(space, blocks, "the fork", request->text);
	if (r == -ENOSPC && space_wait_memory(request, promise_bytes(space, blocks), op_fork))
		return;
	if (r < 0) {
		request->cqe.status = r;
		request_finish(request);
		return;
	}
	request->child = new_child(request, &policy, blocks);
	/* Room for the parent's own tails as well. */
	r = request->child ? block_copy_init(&request->copy, 2 * (uint64_t)own.tails, own.tails) : -ENOMEM;
	if (r < 0) {
		if (request->child)
			sequence_drop(request->child);
		request->child = NULL;
		promise_settle(space);
		request_fail(request, r, "fork: out of memory");
		return;
	}
	request->copy.count = own.tails;
	request->tails_taken = tails_taken;
	context_take_tails(request);
}
