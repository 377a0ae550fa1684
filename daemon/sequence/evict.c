/* An eviction from request to completion. */
#include "daemon/sequence/evict.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>

#include "daemon/sequence/admission.h"
#include "daemon/sequence/compute.h"
#include "daemon/sequence/keep.h"
#include "daemon/sequence/promise.h"
#include "daemon/sequence/recall.h"
#include "daemon/sequence/retain.h"

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

/* It is no longer under way. */
static void leave(struct request *request)
{
	struct space *space = request->space;

	set_reserve(request, 0);
	if (!request->evict->recall)
		request->sequence->decodes = request->evict->decode;
	space->evict_slots &= ~(1u << request->evict->slot);
	space->evicting--;
	request->evict = evict_free(request->evict);
	keep_update(request->sequence);
	if (list_empty(&space->evict_queue)) /* else the next one may want them */
		space_return_spare(space);
	reclaim_wake(space->tenant);
}

/* The request is done with; the next evictions of the space may start. */
static void over(struct request *request)
{
	struct space *space = request->space;

	leave(request);
	request_finish(request);
	evict_begin_queued(space);
}

/* One that may wait for memory does so without keeping others waiting or spare extents here, and starts anew. */
static void over_failed(struct request *request, int status)
{
	struct space *space = request->space;
	void (*again)(struct request *) = request->evict->recall ? op_recall : op_evict;

	recall_unpromise(request);
	request->cqe.status = status;
	leave(request);
	if (status != -ENOSPC || !space_wait_memory(request, request->lack, again))
		request_finish(request);
	evict_begin_queued(space);
}

void evict_report(struct request *request, uint64_t moved)
{
	const struct space *space = request->space;
	const struct meta_seq *meta = request->sequence->meta;

	request->cqe.value[0] = sequence_pairs(request->sequence);
	request->cqe.value[1] = moved;
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

/* Those it has, when all its tokens have been read and made. */
uint64_t evict_future_need(const struct sequence *sequence, uint64_t pairs, uint64_t blocks)
{
	const struct meta_seq *meta = sequence->meta;
	const struct kvg_policy *policy = &meta->policy, behind = admission_behind(policy, meta->shared_pos);
	uint32_t rows = sequence->space->rows;

	if (meta->committed_pos >= (uint64_t)policy->prefix_tokens + policy->context_tokens + policy->max_new_tokens)
		return blocks;
	return sequence->tails + admission_blocks(&behind, rows, meta->committed_pos - meta->shared_pos, pairs) +
	       protected_blocks(meta, rows, meta->committed_pos);
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
	meta->evictions += !request->evict->recall;
	meta->prune_start = meta->next_prune_start;
	set_phase(meta, META_PHASE_NONE);
	meta->admitted = evict_future_need(sequence, meta->pairs, meta->blocks);
	promise_update(sequence);
	sequence_publish(sequence);
	evict_report(request, request->evict->recall ? request->evict->recall->chosen_count : request->evict->dropped);
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

static void unpack_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (space_job_ended(request->space))
		return;
	if (request->job_status == -EAGAIN) {
		compute_submit(request, request->space->compute->unpack, unpack_done);
	} else if (!space_job_lost(request)) {
		evict_publish(request->sequence, request->evict);
		request->evict->published = false;
		retain_settle(request->sequence);
		step(request);
	}
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
	if (evict->appending)
		recall_append(sequence, evict, ids);
	else
		evict_plan(sequence, evict, ids);
	set_reserve(request, evict->reserve - min_u64(evict->reserve, need));
	free(ids);
	if (evict->appending)
		compute_submit(request, space->compute->unpack, unpack_done);
	else
		compute_submit(request, space->compute->move, move_done);
	evict->appending = false;
}

/* The next step of an eviction, or what comes after the last. */
static bool choose_step(struct request *request)
{
	struct evict *evict = request->evict;
	bool found = evict_choose_step(request->sequence, evict);

	if (found || !evict->recall || evict->recall->appended)
		return found;
	evict->step_blocks = evict->recall->extra;
	evict->appending = true;
	return true;
}

static void step(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct evict *evict = request->evict;
	uint32_t missing;
	bool anywhere;

	if (!choose_step(request)) {
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

static void mark(struct request *request)
{
	request->sequence->meta->next_prune_start = request->evict->context_end;
	set_phase(request->sequence->meta, META_PHASE_MARKING);
	compute_submit(request, request->space->compute->mark, mark_done);
}

/* Whether or not the dropped pairs are on the host now, they go. */
static void pack_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (space_job_ended(request->space))
		return;
	if (request->job_status == -EAGAIN) {
		compute_submit(request, request->space->compute->pack, pack_done);
		return;
	}
	request->job_status = 0;
	retain_settle(request->sequence);
	mark(request);
}

static void pack(struct request *request)
{
	if (!request->evict->recall && retain_wants(request->sequence) &&
		retain_take(request->sequence, request->evict->dropped))
		compute_submit(request, request->space->compute->pack, pack_done);
	else
		mark(request);
}

/* Blocks that the moves need at a time, and all of those for what comes back. */
static uint64_t needed_room(const struct request *request)
{
	const struct evict *evict = request->evict;
	uint64_t extra = evict->recall ? evict->recall->extra : 0;

	return min_u64((uint64_t)request->space->rows * EVICT_ROOM_BLOCKS, evict->new_blocks - extra) + extra;
}

static void room(struct request *request)
{
	struct space *space = request->space;
	uint64_t need = needed_room(request), have = evict_free_blocks(space, request->evict);
	const char *what = request->evict->recall ? "the recall" : "the eviction";
	uint32_t each = space->arena->blocks_per_extent;
	int r;

	if (request->grow_status < 0) {
		over_failed(request, request->grow_status);
	} else if (have < need) {
		r = space_try_grow(request, (uint32_t)((need - have + each - 1) / each), what, room);
		if (r < 0)
			over_failed(request, r);
	} else {
		request->evict->room = need;
		set_reserve(request, need);
		pack(request);
	}
}

/* What comes back is promised first: then the moves' room is all that can be refused. */
static void recall_selected(struct request *request)
{
	int r = request->evict->recall->chosen_count ? recall_promise(request) : 0;

	if (r < 0) {
		over_failed(request, r);
	} else if (request->evict->recall->chosen_count) {
		room(request);
	} else {
		evict_report(request, 0);
		over(request);
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
		(void)snprintf(request->text, sizeof(request->text), "sequence %#" PRIx64 ": %s: %s", request->sqe.seq,
			request->evict->recall ? "recall" : "eviction", strerror(-request->job_status));
		over_failed(request, request->job_status);
	} else if (request->evict->recall) {
		recall_selected(request);
	} else if (request->evict->dropped == 0) {
		request->sequence->meta->prune_start = request->evict->context_end;
		evict_report(request, 0);
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

/* PACK comes before MARK, and a recall has another SELECT. */
static bool may_mark(const struct request *request)
{
	return request->space->compute->select_marks && !request->evict->recall && !retain_wants(request->sequence);
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
		evict->marked = may_mark(request);
	}
	if (evict->marked)
		set_phase(request->sequence->meta, META_PHASE_MARKING);
	compute_submit(request, evict->recall ? space->compute->recall : space->compute->select, select_done);
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
	evict->budget = meta->policy.budget * rows;
	if (request->share > 0)
		evict->budget =
			(uint64_t)ceil(request->share * (double)((meta->committed_pos - meta->shared_pos) * rows));
	return meta->pairs + fresh > evict->budget;
}

/* Later evictions will look at what this one folds. */
bool evict_is_scored(struct request *request, const char *what)
{
	const struct space *space = request->space;
	const struct meta_seq *meta = request->sequence->meta;
	uint32_t layers = space->part.worker->layers;
	const uint32_t *scored = space->part.scored + (size_t)request->sequence->slot * layers;

	for (uint32_t i = 0; i < layers; i++) {
		if (scored[i] >= meta->committed_pos)
			continue;
		request_fail(request, -ENODATA, "sequence %#" PRIx64 ": %s: layer %u is scored to %u, committed are %u",
			request->sqe.seq, what, i, scored[i], meta->committed_pos);
		return false;
	}
	return true;
}

void evict_submit(struct request *request)
{
	list_add_tail(&request->space->evict_queue, &request->node);
	evict_begin_queued(request->space);
}

void op_evict(struct request *request)
{
	const struct meta_seq *meta = request->sequence->meta;
	struct evict *evict;

	if (request->sqe.evict.mode > KVG_EVICT_DECODE ||
		(request->sqe.evict.mode == KVG_EVICT_DECODE && meta->policy.budget == 0 && !(request->share > 0))) {
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
		evict_report(request, 0);
		request_finish(request);
		return;
	}
	if (!evict_is_scored(request, "eviction")) {
		(void)evict_free(evict);
		return;
	}
	request->evict = evict;
	evict_submit(request);
	if (evict->decode && !list_empty(&request->space->evict_queue))
		grow_room(request->space);
}
