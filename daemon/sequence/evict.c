/* An eviction from request to completion. */
#include "daemon/sequence/evict.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>

#include "daemon/sequence/admission.h"
#include "daemon/sequence/compute.h"
#include "daemon/sequence/keep.h"
#include "daemon/sequence/promise.h"

static void step(struct request *request);

/* Free blocks that nobody else may take. */
static void set_reserve(struct request *request, uint64_t blocks)
{
	request->space->evict_reserve += blocks - request->evict->reserve;
	request->evict->reserve = blocks;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* The request is done with, one way or the other; the next evictions of the space may start. */
static void over(struct request *request)
{
	struct space *space = request->space;

	set_reserve(request, 0);
	space->evict_slots &= ~(1u << request->evict->slot);
	space->evicting--;
	request->evict = evict_free(request->evict);
	request->sequence->decodes = request->sqe.evict.mode == KVG_EVICT_DECODE;
	keep_update(request->sequence);
	if (list_empty(&space->evict_queue)) /* else the next one may want them */
		space_return_spare(space);
	request_finish(request);
	evict_begin_queued(space);
}

static void over_failed(struct request *request, int status)
{
	request->cqe.status = status;
	over(request);
}

static void report(struct request *request, uint64_t dropped)
{
	const struct space *space = request->space;
	const struct meta_seq *meta = request->sequence->meta;

	request->cqe.value[0] = sequence_pairs(request->sequence);
	request->cqe.value[1] = dropped;
	request->cqe.value[2] = meta->blocks * 2 * space->arena->stride;
	request->cqe.value[3] = (uint64_t)meta->committed_pos << 32 | meta->reserved_pos;
}

static void set_phase(struct meta_seq *meta, enum meta_phase phase)
{
	__atomic_store_n(&meta->phase, phase, __ATOMIC_RELEASE);
}

/* ---- END ---- */

static void fold_rows(struct sequence *sequence, const struct evict *evict)
{
	struct space *space = sequence->space;
	struct meta_row *rows = meta_rows(&space->part, sequence->slot);
	uint32_t slack = KVG_BLOCK_TOKENS;

	sequence->meta->pairs = 0;
	for (uint32_t row = 0; row < space->rows; row++) {
		uint32_t blocks = rows[row].held_blocks, room = blocks * KVG_BLOCK_TOKENS - rows[row].held_len;
		uint32_t first = evict_first_changed(evict, row);

		rows[row].base_len = rows[row].held_len;
		sequence->meta->pairs += rows[row].held_len;
		slack = room < slack ? room : slack;
		if (first < blocks)
			memcpy(sequence_table_row(sequence, row) + first,
				meta_held(&space->part, sequence->slot, row) + first,
				(blocks - first) * sizeof(uint32_t));
		sequence_table_length(sequence, row);
	}
	sequence->min_slack = slack;
}

/* What was reserved and not committed goes back. */
static void give_rest(struct sequence *sequence)
{
	struct space *space = sequence->space;
	struct meta_seq *meta = sequence->meta;

	for (; meta->stripe_first < meta->stripes; meta->stripe_first++) {
		blocks_give_runs(
			&space->blocks, meta_run(&space->part, sequence->slot, meta->stripe_first), space->rows);
		meta->blocks -= (uint64_t)space->rows * KVG_RUN_BLOCKS;
	}
	meta->stripe_first = meta->stripes = 0;
}

/* The next rows of scores must be staged anew: their places have gone. */
static void clamp_scored(const struct sequence *sequence)
{
	const struct meta_part *part = &sequence->space->part;
	uint32_t *scored = part->scored + (size_t)sequence->slot * part->worker->layers;

	for (uint32_t i = 0; i < part->worker->layers; i++)
		if (scored[i] > sequence->meta->committed_pos)
			scored[i] = sequence->meta->committed_pos;
}

static void end(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct meta_seq *meta = sequence->meta;
	uint32_t max_tokens = request->space->part.worker->layout.max_tokens;

	set_phase(meta, META_PHASE_FOLDING);
	give_rest(sequence);
	fold_rows(sequence, request->evict);
	clamp_scored(sequence);
	meta->fold_pos = meta->committed_pos;
	meta->reserved_pos = meta->committed_pos + sequence->min_slack;
	if (meta->reserved_pos > max_tokens)
		meta->reserved_pos = max_tokens;
	meta->generation++;
	meta->evictions++;
	meta->prune_start = meta->next_prune_start;
	set_phase(meta, META_PHASE_NONE);
	meta->admitted = sequence_need(sequence);
	promise_update(sequence);
	sequence_publish(sequence);
	report(request, request->evict->dropped);
	if (request->evict->published && !request->evict->relocated) {
		over(request);
		return;
	}
	request->publish = (struct publish){.held = true, .lengths = true};
	compute_publish(request, over);
}

/* ---- the steps ---- */

static void move_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (space_job_ended(request->space) || space_job_lost(request))
		return;
	evict_publish(request->sequence, request->evict);
	set_reserve(request, min_u64(request->evict->room, request->evict->new_blocks));
	step(request);
}

static void take_step(struct request *request, bool anywhere)
{
	struct sequence *sequence = request->sequence;
	struct space *space = request->space;
	struct evict *evict = request->evict;
	uint64_t need = evict->step_blocks;
	uint32_t *ids = malloc((need + 1) * sizeof(uint32_t));

	if (!ids)
		abort(); /* past the point of no return: the redo record lets a successor go on */
	if (anywhere)
		blocks_take_anywhere(&space->blocks, &sequence->owner, need, ids);
	else
		blocks_take(&space->blocks, &sequence->owner, META_HELD, need, evict->new_blocks - need, ids);
	evict_plan(sequence, evict, ids);
	set_reserve(request, evict->reserve - min_u64(evict->reserve, need));
	free(ids);
	compute_submit(request, space->compute->move, move_done);
}

static void step(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct evict *evict = request->evict;
	uint32_t missing;
	bool anywhere;

	if (!evict_choose_step(sequence, evict)) {
		if (evict_plan_relocation(sequence, evict))
			compute_submit(request, request->space->compute->move, move_done);
		else
			end(request);
		return;
	}
	missing = blocks_missing(&request->space->blocks, &sequence->owner, META_HELD, evict->step_blocks,
		evict->new_blocks - evict->step_blocks, 0);
	anywhere = missing > 0;
	if (missing && request->grow_status >= 0 && space_try_grow(request, missing, "the eviction", step) >= 0)
		return;
	request->grow_status = 0;
	take_step(request, anywhere);
}

/* ---- SELECT, ROOM, MARK ---- */

static void marked(struct request *request)
{
	struct space *space = request->space;

	for (uint32_t row = 0; row < space->rows; row++)
		meta_rows(&space->part, request->sequence->slot)[row].held_len = request->evict->held[row];
	set_phase(request->sequence->meta, META_PHASE_MOVING);
	step(request);
}

static void mark_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (!space_job_ended(request->space) && !space_job_lost(request))
		marked(request);
}

static void room(struct request *request)
{
	struct space *space = request->space;
	uint64_t need = (uint64_t)space->rows * EVICT_ROOM_BLOCKS, have = evict_free_blocks(space, request->evict);
	uint32_t each = space->arena->blocks_per_extent;
	int r;

	if (need > request->evict->new_blocks)
		need = request->evict->new_blocks;
	if (request->grow_status < 0) {
		over_failed(request, request->grow_status);
	} else if (have < need) {
		r = space_try_grow(request, (uint32_t)((need - have + each - 1) / each), "the eviction", room);
		if (r < 0)
			over_failed(request, r);
	} else {
		request->evict->room = need;
		set_reserve(request, need);
		request->sequence->meta->next_prune_start = request->evict->context_end;
		set_phase(request->sequence->meta, META_PHASE_MARKING);
		compute_submit(request, space->compute->mark, mark_done);
	}
}

static void select_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (space_job_ended(request->space))
		return;
	if (request->job_status < 0 || request->evict->dropped == 0)
		set_phase(request->sequence->meta, META_PHASE_NONE);
	if (request->job_status < 0) {
		(void)snprintf(request->text, sizeof(request->text), "sequence %#" PRIx64 ": eviction: %s",
			request->sqe.seq, strerror(-request->job_status));
		over_failed(request, request->job_status);
	} else if (request->evict->dropped == 0) {
		request->sequence->meta->prune_start = request->evict->context_end;
		report(request, 0);
		over(request);
	} else if (request->evict->marked) {
		request->evict->room = min_u64(request->evict->room, request->evict->new_blocks);
		set_reserve(request, request->evict->room);
		request->sequence->meta->next_prune_start = request->evict->context_end;
		marked(request);
	} else {
		room(request);
	}
}

/* The most that an eviction needs, and whether it is there besides what others have secured. */
static uint64_t most_room(const struct space *space)
{
	return (uint64_t)space->rows * EVICT_ROOM_BLOCKS;
}

static bool has_room(const struct space *space)
{
	return blocks_free_anywhere(&space->blocks) >= space->evict_reserve + most_room(space);
}

static void begin(struct request *request)
{
	struct space *space = request->space;
	struct evict *evict = request->evict;

	evict->slot = (uint32_t)__builtin_ctz(~space->evict_slots);
	evict->record = &space->part.records[evict->slot];
	space->evict_slots |= 1u << evict->slot;
	space->evicting++;
	request->grow_status = 0;
	if ((space->compute->select_marks || space->compute->evictions > 1) && has_room(space)) {
		evict->room = most_room(space);
		set_reserve(request, evict->room);
		evict->marked = space->compute->select_marks;
	}
	if (evict->marked)
		set_phase(request->sequence->meta, META_PHASE_MARKING);
	compute_submit(request, space->compute->select, select_done);
}

/* Whether its room is there besides the extents that others keep; not asked of who has a right to as much. */
static bool has_own_room(const struct request *request)
{
	const struct space *space = request->space;
	uint64_t each = space->arena->blocks_per_extent, kept = 0;

	if (request->sequence->right * each < most_room(space))
		kept = (space->blocks.spare_count - keep_usable(request->sequence)) * each;
	return blocks_free_anywhere(&space->blocks) >= space->evict_reserve + most_room(space) + kept;
}

/* Only the first of all may begin without its room. */
static bool may_begin(const struct space *space)
{
	return !space->evicting || (space->evicting < space->compute->evictions &&
					   has_own_room(list_entry(space->evict_queue.next, struct request, node)));
}

void evict_begin_queued(struct space *space)
{
	while (!list_empty(&space->evict_queue) && may_begin(space))
		begin(list_entry(list_pop(&space->evict_queue), struct request, node));
}

/* Room for as many evictions at a time as there can be, where the worker's sequences are promised it anyway. */
static void grow_room(struct space *space)
{
	unsigned most = space->compute->evictions;
	uint64_t have = blocks_free_anywhere(&space->blocks), need, missing, each = space->arena->blocks_per_extent;

	if (most > space->sequence_count)
		most = space->sequence_count;
	if (space->evicting >= most)
		return;
	need = space->evict_reserve + (most - space->evicting) * most_room(space);
	missing = need > have ? (need - have + each - 1) / each : 0;
	space_grow_ahead(space, (uint32_t)min_u64(missing, space->part.worker->promised / space->arena->extent_size));
}

/* ---- what an eviction means for a sequence ---- */

/* The range of a prefill eviction, relative to the context; false: there is nothing to do. */
static bool prefill_range(const struct meta_seq *meta, struct evict *evict)
{
	const struct kvg_policy *policy = &meta->policy;
	uint64_t n = policy->context_tokens, seen, window;
	bool absolute = (policy->flags & KVG_POLICY_WINDOW_ABSOLUTE) != 0,
	     threshold = policy->mode == KVG_MODE_THRESHOLD;

	if (policy->mode == KVG_MODE_OFF || (policy->ratio >= 1.0 && !threshold) ||
		meta->committed_pos <= policy->prefix_tokens)
		return false;
	seen = meta->committed_pos - policy->prefix_tokens;
	if (seen > n)
		seen = n;
	kvg_select_prefill_params(n, policy->chunk_tokens, threshold ? 1.0 : policy->ratio, policy->window, absolute,
		&evict->ratio, &window);
	if (policy->mode == KVG_MODE_ONCE) {
		if (seen < n || meta->prune_start)
			return false;
		evict->ratio = policy->ratio;
		evict->window = (uint32_t)window;
		window = 0;
	}
	if (seen <= window || seen - window <= meta->prune_start)
		return false;
	evict->begin = policy->prefix_tokens + meta->prune_start;
	evict->context_end = (uint32_t)(seen - window);
	evict->end = policy->prefix_tokens + evict->context_end;
	return true;
}

static bool is_needed(struct request *request, struct evict *evict)
{
	const struct meta_seq *meta = request->sequence->meta;
	uint64_t rows = request->space->rows, fresh = (uint64_t)(meta->committed_pos - meta->fold_pos) * rows;

	if (request->sqe.evict.mode == KVG_EVICT_PREFILL)
		return prefill_range(meta, evict);
	evict->decode = true;
	evict->context_end =
		meta->policy.context_tokens; /* positions may be missing from now on: no prefill eviction any more */
	return meta->pairs + fresh > meta->policy.budget * rows;
}

/* All committed tokens must have scores: an eviction folds them, and later ones will look at them. */
static bool is_scored(struct request *request)
{
	const struct space *space = request->space;
	const struct meta_seq *meta = request->sequence->meta;
	uint32_t layers = space->part.worker->layers;
	const uint32_t *scored = space->part.scored + (size_t)request->sequence->slot * layers;

	for (uint32_t i = 0; i < layers; i++) {
		if (scored[i] >= meta->committed_pos)
			continue;
		request_fail(request, -ENODATA,
			"sequence %#" PRIx64 ": eviction: layer %u is scored to %u, committed are %u", request->sqe.seq,
			i, scored[i], meta->committed_pos);
		return false;
	}
	return true;
}

void op_evict(struct request *request)
{
	const struct meta_seq *meta = request->sequence->meta;
	struct evict *evict;

	if (request->sqe.evict.mode > KVG_EVICT_DECODE ||
		(request->sqe.evict.mode == KVG_EVICT_DECODE && meta->policy.budget == 0)) {
		request_fail(request, -EINVAL, "sequence %#" PRIx64 ": eviction mode %u, decode budget %u tokens",
			request->sqe.seq, request->sqe.evict.mode, meta->policy.budget);
		return;
	}
	if (request->sqe.evict.mode == KVG_EVICT_DECODE &&
		meta->committed_pos < (uint64_t)meta->policy.prefix_tokens + meta->policy.context_tokens) {
		request_fail(request, -EBUSY,
			"sequence %#" PRIx64 ": decode eviction at %u tokens, the prompt has %u + %u", request->sqe.seq,
			meta->committed_pos, meta->policy.prefix_tokens, meta->policy.context_tokens);
		return;
	}
	evict = calloc(1, sizeof(*evict));
	if (!evict) {
		request_fail(request, -ENOMEM, "sequence %#" PRIx64 ": eviction: out of memory", request->sqe.seq);
		return;
	}
	if (!is_needed(request, evict)) {
		(void)evict_free(evict);
		report(request, 0);
		request_finish(request);
		return;
	}
	if (!is_scored(request)) {
		(void)evict_free(evict);
		return;
	}
	request->evict = evict;
	list_add_tail(&request->space->evict_queue, &request->node);
	evict_begin_queued(request->space);
	if (evict->decode && !list_empty(&request->space->evict_queue))
		grow_room(request->space);
}
