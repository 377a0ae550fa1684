/* Operations that never leave the reactor, but for reserve when it needs extents. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/admission.h"
#include "daemon/sequence/compute.h"
#include "daemon/sequence/context.h"
#include "daemon/sequence/keep.h"
#include "daemon/sequence/offload.h"
#include "daemon/sequence/promise.h"
#include "daemon/sequence/retain.h"
#include "daemon/sequence/space.h"

/* 0 means that there is no sequence. */
static uint32_t next_epoch(struct space *space)
{
	space->epoch += space->epoch == UINT32_MAX ? 2 : 1;
	return space->epoch;
}

struct sequence *sequence_new(struct space *space, const struct kvg_policy *policy, uint64_t admitted)
{
	struct sequence *sequence = calloc(1, sizeof(*sequence));
	struct meta_seq *meta;

	if (!sequence)
		return NULL;
	sequence->space = space;
	sequence->slot = space->free_slots[--space->free_count];
	sequence->meta = meta = &space->part.seqs[sequence->slot];
	block_owner_init(&sequence->owner, sequence->slot + 1);
	list_init(&sequence->queue);
	list_init(&sequence->reclaimable.node);
	*meta = (struct meta_seq){.epoch = next_epoch(space), .admitted = admitted, .policy = *policy};
	for (uint32_t i = 0; i < space->part.worker->layers; i++)
		space->part.scored[(size_t)sequence->slot * space->part.worker->layers + i] = policy->prefix_tokens;
	space->sequences[sequence->slot] = sequence;
	space->sequence_count++;
	space->tenant->sequences++;
	sequence_publish(sequence);
	return sequence;
}

void op_create(struct request *request)
{
	struct space *space = request->space;
	const struct kvg_policy *policy = &request->sqe.create;
	uint64_t blocks;
	int r = admission_check(policy, space->part.worker->layout.max_tokens, request->text, sizeof(request->text));

	if (r >= 0 && !space->free_count) {
		request_fail(request, -EUSERS, "create: all %u sequences of the layout are in use",
			space->part.worker->max_sequences);
		return;
	}
	if (r >= 0)
		r = tenant_check_sequences(space->tenant, 1, request->text, sizeof(request->text));
	blocks = r < 0 ? 0 : admission_blocks(policy, space->rows, 0, 0);
	if (r >= 0)
		r = promise_admit(space, blocks, "the sequence", request->text);
	if (r == -ENOSPC && space_wait_memory(request, promise_bytes(space, blocks), op_create))
		return;
	if (r >= 0) {
		request->sequence = sequence_new(space, policy, blocks);
		if (!request->sequence) {
			promise_settle(space);
			request_fail(request, -ENOMEM, "create: out of memory");
			return;
		}
		promise_update(request->sequence);
		request->cqe.value[0] = request->sequence->slot;
		request->cqe.value[1] = request->sequence->right * space->arena->extent_size;
		request->sequence->busy = true;
		request->publish = (struct publish){.lengths = true};
		compute_publish(request, request_finish);
		return;
	}
	request->cqe.status = r;
	request_finish(request);
}

/* ---- reserve ---- */

/* Runs of stripes from `begin` on go to the table, row by row: rows lie pages apart. */
void sequence_publish_stripes(struct sequence *sequence, uint32_t begin, uint32_t end)
{
	struct space *space = sequence->space;

	for (uint32_t row = 0; row < space->rows; row++) {
		uint32_t held = meta_rows(&space->part, sequence->slot)[row].held_blocks;
		uint32_t *ids = sequence_table_row(sequence, row) + held + (size_t)begin * KVG_RUN_BLOCKS;

		for (uint32_t s = begin; s < end; s++, ids += KVG_RUN_BLOCKS) {
			uint32_t first = meta_run(&space->part, sequence->slot, s)[row];

			for (uint32_t i = 0; i < KVG_RUN_BLOCKS; i++)
				ids[i] = first + i;
		}
	}
}

/* ahead: runs that the stripes after this one will take; anywhere: from whatever extent has free ones. */
static void add_stripe(struct sequence *sequence, uint64_t ahead, bool anywhere)
{
	struct space *space = sequence->space;
	struct meta_seq *meta = sequence->meta;
	uint32_t *runs = meta_run(&space->part, sequence->slot, meta->stripes);

	if (anywhere)
		blocks_take_runs_anywhere(&space->blocks, &sequence->owner, space->rows, runs);
	else
		blocks_take(&space->blocks, &sequence->owner, META_NURSERY, space->rows, ahead, runs);
	meta->stripes++;
	meta->blocks += (uint64_t)space->rows * KVG_RUN_BLOCKS;
}

/* Extents to create before `stripes` can be taken; blocks that an eviction or others count on are left to them. */
static uint32_t reserve_missing(const struct request *request, uint32_t stripes)
{
	const struct sequence *sequence = request->sequence;
	const struct space *space = sequence->space;
	uint64_t units = (uint64_t)stripes * space->rows, need = units * KVG_RUN_BLOCKS + space->evict_reserve;
	uint64_t all = blocks_free_anywhere(&space->blocks), each = space->arena->blocks_per_extent;
	uint32_t missing = blocks_missing(&space->blocks, &sequence->owner, META_NURSERY, units, 0, request->withheld);

	if (space->evicting && need > all && missing * each < need - all)
		missing = (uint32_t)((need - all + each - 1) / each);
	return missing;
}

/* Whether extents of either generation have that many runs besides what an eviction and others count on. */
static bool has_runs_anywhere(const struct request *request, uint64_t units)
{
	const struct space *space = request->space;
	uint32_t spare = space->blocks.spare_count, kept = request->withheld < spare ? request->withheld : spare;
	uint64_t others = (uint64_t)kept * space->arena->blocks_per_extent;

	return blocks_free_anywhere(&space->blocks) >= units * KVG_RUN_BLOCKS + space->evict_reserve + others &&
	       blocks_free_runs_anywhere(&space->blocks) >= units + others / KVG_RUN_BLOCKS;
}

/* What the next eviction will want is created when nobody waits for this request any more. */
static void reserve_done(struct request *request)
{
	const struct sequence *sequence = request->sequence;
	struct space *space = request->space;
	uint32_t ahead = keep_ahead(sequence);

	request_finish(request);
	space_grow_ahead(space, ahead);
}

static void reserved(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct meta_seq *meta = sequence->meta;
	uint32_t max = request->space->part.worker->layout.max_tokens;

	meta->reserved_pos = meta->fold_pos + sequence->min_slack + meta->stripes * KVG_STRIPE_TOKENS;
	if (meta->reserved_pos > max)
		meta->reserved_pos = max;
	promise_update(sequence);
	keep_update(sequence);
	sequence_publish(sequence);
	request->cqe.value[0] = meta->reserved_pos;
	if (request->publish.stripe_end > request->publish.stripe_begin)
		compute_publish(request, reserve_done);
	else
		reserve_done(request);
}

/* Others may have taken meanwhile what they counted on; what this request created for itself is not theirs. */
static void count_withheld(struct request *request)
{
	uint32_t now = request->space->blocks.spare_count - keep_usable(request->sequence);

	if (request->withheld > now)
		request->withheld = now;
}

static void reserve_step(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct meta_seq *meta = sequence->meta;
	uint32_t fresh = meta->committed_pos + request->sqe.reserve.tokens - meta->fold_pos;
	uint32_t stripes = 0, missing = 0;
	uint64_t units;

	if (fresh > sequence->min_slack)
		stripes = (fresh - sequence->min_slack + KVG_STRIPE_TOKENS - 1) / KVG_STRIPE_TOKENS;
	stripes = stripes > meta->stripes ? stripes - meta->stripes : 0;
	units = (uint64_t)stripes * sequence->space->rows;
	count_withheld(request);
	if (stripes)
		missing = reserve_missing(request, stripes);
	if (missing && request->grow_status >= 0) {
		request->grow_status = space_try_grow(request, missing, "reserve", reserve_step);
		if (request->grow_status >= 0)
			return;
	}
	/* Its blocks are there, if not in extents of its own: the promise counts blocks of both generations as one. */
	if (missing && !has_runs_anywhere(request, units)) {
		request->cqe.status = request->grow_status;
		space_return_spare(request->space);
		if (request->cqe.status == -ENOSPC && space_wait_memory(request, request->lack, reserve_step))
			return;
		request_finish(request);
		return;
	}
	request->publish = (struct publish){.stripe_begin = meta->stripes, .stripe_end = meta->stripes + stripes};
	for (uint32_t i = 0; i < stripes; i++)
		add_stripe(sequence, (uint64_t)(stripes - i - 1) * sequence->space->rows, missing > 0);
	sequence_publish_stripes(sequence, request->publish.stripe_begin, meta->stripes);
	reserved(request);
}

static void reserve_resident(struct request *request)
{
	request->withheld = UINT32_MAX;
	request->grow_status = 0;
	reserve_step(request);
}

void op_reserve(struct request *request)
{
	const struct meta_seq *meta = request->sequence->meta;
	uint64_t target = (uint64_t)meta->committed_pos + request->sqe.reserve.tokens;
	uint32_t max = request->space->part.worker->layout.max_tokens;

	if (target > max) {
		request_fail(request, -E2BIG,
			"sequence %#" PRIx64 ": reserve to %" PRIu64 " tokens, the layout's max_tokens is %u",
			request->sqe.seq, target, max);
		return;
	}
	restore_before(request, reserve_resident);
}

/* ---- the short ones ---- */

void op_commit(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct meta_seq *meta = sequence->meta;
	uint32_t pos = request->sqe.commit.pos;

	if (pos < meta->committed_pos || pos > meta->reserved_pos) {
		request_fail(request, -EINVAL, "sequence %#" PRIx64 ": commit to %u, committed are %u, reserved %u",
			request->sqe.seq, pos, meta->committed_pos, meta->reserved_pos);
		return;
	}
	meta->committed_pos = pos;
	sequence_publish(sequence);
	request_finish(request);
}

void op_truncate(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct meta_seq *meta = sequence->meta;
	uint32_t pos = request->sqe.truncate.pos, layers = request->space->part.worker->layers;
	uint32_t *scored = request->space->part.scored + (size_t)sequence->slot * layers;

	if (pos < meta->fold_pos || pos > meta->committed_pos) {
		request_fail(request, -EINVAL, "sequence %#" PRIx64 ": truncate to %u, possible are %u to %u",
			request->sqe.seq, pos, meta->fold_pos, meta->committed_pos);
		return;
	}
	meta->committed_pos = pos;
	if (pos < meta->policy.prefix_tokens)
		pos = meta->policy.prefix_tokens;
	for (uint32_t i = 0; i < layers; i++)
		if (scored[i] > pos)
			scored[i] = pos;
	sequence_publish(sequence);
	request_finish(request);
}

void op_protect(struct request *request)
{
	struct meta_seq *meta = request->sequence->meta;
	uint32_t begin = request->sqe.protect.begin, end = request->sqe.protect.end;
	uint64_t before, more;

	if (begin >= end || meta->protected_count == KVG_MAX_PROTECTED) {
		request_fail(request, -EINVAL, "sequence %#" PRIx64 ": protect [%u, %u), ranges in use %u of %u",
			request->sqe.seq, begin, end, meta->protected_count, KVG_MAX_PROTECTED);
		return;
	}
	before = protected_blocks(meta, request->space->rows, meta->fold_pos);
	meta->protect_begin[meta->protected_count] = begin;
	meta->protect_end[meta->protected_count] = end;
	meta->protected_count++;
	more = protected_blocks(meta, request->space->rows, meta->fold_pos) - before;
	request->cqe.status = promise_admit(request->space, more, "the protected range", request->text);
	if (request->cqe.status < 0)
		meta->protected_count--;
	else
		meta->admitted += more;
	promise_update(request->sequence);
	request_finish(request);
}

void op_query(struct request *request)
{
	const struct meta_seq *meta = request->sequence->meta;

	request->cqe.value[0] = sequence_pairs(request->sequence);
	request->cqe.value[1] = meta->blocks;
	request->cqe.value[2] = meta->committed_pos;
	request->cqe.value[3] = meta->reserved_pos;
	request_finish(request);
}

/* ---- free ---- */

void sequence_give_blocks(struct sequence *sequence)
{
	struct space *space = sequence->space;
	const struct meta_row *rows = meta_rows(&space->part, sequence->slot);

	for (uint32_t row = 0; row < space->rows; row++) {
		const uint32_t *held = meta_held(&space->part, sequence->slot, row);

		for (uint32_t i = 0; i < rows[row].held_blocks; i++)
			blocks_give(&space->blocks, held[i]);
	}
	for (uint32_t s = 0; s < sequence->meta->stripes; s++)
		blocks_give_runs(&space->blocks, meta_run(&space->part, sequence->slot, s), space->rows);
}

/*
 * Rows of attached sequences are long, and the next one takes the same slot: the memory of the last one's is kept for
 * it, and goes when another slot is freed.
 */
static void keep_warm(struct space *space, uint32_t slot)
{
	uint32_t before = space->warm_slot_plus_one - 1;

	if (space->warm_slot_plus_one && before != slot && !space->sequences[before]) {
		meta_part_forget(space->pool->meta, &space->part, before);
		table_forget(&space->table, before);
	}
	meta_part_clear(&space->part, slot);
	table_clear(&space->table, slot);
	space->warm_slot_plus_one = slot + 1;
}

void sequence_drop(struct sequence *sequence)
{
	struct space *space = sequence->space;
	uint32_t slot = sequence->slot;

	bool attached = sequence->context;

	if (sequence->meta->blocks)
		sequence_give_blocks(sequence);
	if (attached)
		keep_warm(space, slot);
	else if (sequence->meta->stripes || sequence->meta->evictions || sequence->tails)
		meta_part_forget(space->pool->meta, &space->part, slot);
	offload_forget(sequence);
	retain_forget(sequence);
	context_leave(sequence);
	block_owner_deinit(&space->blocks, &sequence->owner);
	promise_forget(sequence);
	keep_forget(sequence);
	if (!attached)
		table_forget(&space->table, slot);
	memset(sequence->meta, 0, sizeof(*sequence->meta));
	space->sequences[slot] = NULL;
	space->free_slots[space->free_count++] = slot;
	space->sequence_count--;
	space->tenant->sequences--;
	free(sequence);
}

void sequence_end(struct request *request, struct sequence *sequence)
{
	struct space *space = request->space;
	struct list waiting, *node;

	list_init(&waiting);
	while ((node = list_pop(&sequence->queue)))
		list_add_tail(&waiting, node);
	sequence_drop(sequence);
	space_return_spare(space);
	request_finish(request);
	while ((node = list_pop(&waiting))) {
		struct request *next = list_entry(node, struct request, node);

		request_fail(next, -ENOENT, "sequence %#" PRIx64 ": there is no such sequence", next->sqe.seq);
	}
}

void op_free(struct request *request)
{
	struct sequence *sequence = request->sequence;

	request->cqe.seq = sequence_handle(sequence);
	request->sequence = NULL;
	sequence_end(request, sequence);
}
