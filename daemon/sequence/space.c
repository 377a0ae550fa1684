#include "daemon/sequence/space.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/context.h"
#include "daemon/sequence/evict.h"
#include "daemon/sequence/gates.h"
#include "daemon/sequence/image.h"
#include "daemon/sequence/keep.h"
#include "daemon/sequence/layout.h"
#include "daemon/sequence/offload.h"
#include "daemon/sequence/promise.h"
#include "daemon/sequence/retain.h"

#define WAIT_NS 10000000000u

static int space_fill(struct space *space, const struct kvg_layout *layout, uint64_t worker_id)
{
	uint32_t row_cap = layout_row_cap(layout), n = layout->max_sequences;
	int r = tenant_arena(space->tenant, layout, &space->arena);

	if (r >= 0)
		r = meta_part_new(space->pool->meta, layout, row_cap, &space->part);
	if (r < 0)
		return r;
	space->part.worker->id = worker_id;
	space->part.worker->tenant = space->tenant->index;
	space->part.worker->stride = space->arena->stride;
	space->index = (uint32_t)(space->part.worker - space->pool->meta->workers);
	space->sequences = calloc(n, sizeof(struct sequence *));
	space->free_slots = malloc(n * sizeof(uint32_t));
	if (!space->sequences || !space->free_slots)
		return -ENOMEM;
	for (uint32_t i = 0; i < n; i++)
		space->free_slots[i] = n - 1 - i;
	space->free_count = n;
	block_space_init(&space->blocks, space->pool, space->arena);
	return table_init(&space->table, layout, row_cap);
}

static bool has_device(const struct pool *pool)
{
	return pool->kind->ops->device(pool->kind);
}

int space_new(struct tenant *tenant, const struct kvg_layout *layout, uint64_t worker_id, const struct space_ops *ops,
	void *user, struct space **ret, char *text)
{
	struct space *space;
	int r = layout_check(layout, text, KVG_TEXT_SIZE);

	if (r >= 0 && has_device(tenant->pool))
		r = layout_check_device(layout, text, KVG_TEXT_SIZE);
	if (r >= 0)
		r = tenant_check_layout(tenant, layout, text, KVG_TEXT_SIZE);
	if (r < 0)
		return r;
	space = calloc(1, sizeof(*space));
	if (!space)
		return -ENOMEM;
	space->tenant = tenant;
	space->pool = tenant->pool;
	space->ops = ops;
	space->user = user;
	space->rows = layout->groups[0].layers * layout->groups[0].head_count;
	space->table = (struct table){.fd = -1, .reader_fd = -1};
	space->device = (struct space_device){.table_fd = -1, .staging_fd = -1};
	space->compute = compute_of(space->pool->kind);
	list_init(&space->dropped);
	list_init(&space->wait_queue);
	list_init(&space->ready);
	list_init(&space->evict_queue);
	list_init(&space->unmapping);
	list_init(&space->context_waits);
	list_init(&space->own);
	block_space_init(&space->blocks, space->pool, NULL);
	r = space_fill(space, layout, worker_id);
	if (r < 0) {
		(void)snprintf(text, KVG_TEXT_SIZE, "layout %s: %u sequences of %u tokens: %s", layout->model,
			layout->max_sequences, layout->max_tokens, strerror(-r));
		(void)space_free(space);
		return r;
	}
	*ret = space;
	return 0;
}

static uint64_t round_up(uint64_t size, uint64_t unit)
{
	return (size + unit - 1) / unit * unit;
}

int space_claim(struct space *space, uint64_t device_staging_bytes, char *text)
{
	uint64_t granularity = space->pool->kind->granularity, bytes;
	int r;

	if (!has_device(space->pool))
		return 0;
	bytes = round_up(layout_device_table(&space->part.worker->layout), granularity) +
		round_up(device_staging_bytes, granularity);
	r = tenant_claim(space->tenant, bytes, text, KVG_TEXT_SIZE);
	if (r >= 0)
		space->claimed = bytes;
	return r;
}

int space_open(struct space *space, const struct space_memory *memory, char *text)
{
	int r = arena_open(space->arena);

	if (r < 0) {
		(void)snprintf(text, KVG_TEXT_SIZE, "layout: %u extents of %zu bytes: no addresses for them: %s",
			space->arena->slots, space->arena->extent_size, strerror(-r));
		return r;
	}
	space->staging = memory->staging + memory->rows_offset;
	space->staging_size = memory->staging_size - memory->rows_offset;
	space->wait_ns = memory->wait_ns ? memory->wait_ns : WAIT_NS;
	return space->compute->open(space, memory, text);
}

struct space *space_free(struct space *space)
{
	if (!space)
		return NULL;
	for (uint32_t i = 0; space->sequences && i < space->part.worker->max_sequences; i++)
		free(space->sequences[i]);
	tenant_unclaim(space->tenant, space->claimed);
	table_deinit(&space->table);
	meta_part_deinit(space->pool->meta, &space->part);
	(void)arena_unref(space->arena);
	(void)gate_set_free(space->gates);
	free(space->sequences);
	free(space->free_slots);
	free(space);
	return NULL;
}

void space_set_gates(struct space *space, struct gate_set *gates)
{
	(void)gate_set_free(space->gates);
	space->gates = gates;
}

uint64_t space_overhead(const struct space *space)
{
	return table_physical(&space->table) + (space->gates ? space->gates->device_bytes : 0) +
	       atomic_load_explicit(&space->device.scratch, memory_order_relaxed);
}

/* ---- the end of a space ---- */

/* Refunds extents whose memory is gone; what the worker's sequences have a right to stays promised. */
static void release_batch(struct space *space, struct extent_batch *batch)
{
	while (!list_empty(&batch->extents)) {
		struct extent *extent = list_entry(batch->extents.next, struct extent, node);

		extent_release(batch->pool, extent, promise_refund(space, extent->meta->bytes));
	}
}

static void close_run(struct job *job)
{
	struct space *space = list_entry(job, struct space, close_job);

	imports_close(&space->imports, space->pool->kind->ops->device(space->pool->kind));
	if (space->compute->close)
		space->compute->close(space);
}

static void close_done(struct job *job)
{
	struct space *space = list_entry(job, struct space, close_job);

	space->tenant->ending--;
	reclaim_wake(space->tenant);
	space->ops->closed(space->user);
}

static void all_returned(struct extent_batch *batch)
{
	struct space *space = batch->user;

	release_batch(space, batch);
	(void)extent_batch_free(batch);
	space->close_job = (struct job){.run = close_run, .done = close_done};
	executor_submit(space->pool->executor, &space->close_job);
}

static void move_all(struct list *from, struct list *to)
{
	struct list *node;

	while ((node = list_pop(from))) {
		struct extent *extent = list_entry(node, struct extent, node);

		list_remove(&extent->open);
		if (extent->meta->state != META_DROPPED)
			extent->meta->state = META_DYING;
		list_add_tail(to, &extent->node);
	}
}

static void drop_sequences(struct space *space)
{
	for (uint32_t i = 0; i < space->part.worker->max_sequences; i++) {
		struct sequence *sequence = space->sequences[i];

		if (!sequence)
			continue;
		context_leave(sequence);
		offload_forget(sequence);
		retain_forget(sequence);
		memset(sequence->meta, 0, sizeof(*sequence->meta));
		space->tenant->sequences--;
		free(sequence);
		space->sequences[i] = NULL;
	}
	space->sequence_count = 0;
	promise_end(space);
}

static void close_now(struct space *space)
{
	struct extent_batch *batch = extent_batch_new(space->pool, all_returned, space);

	if (!batch)
		abort(); /* 100 bytes were not to be had: the service manager starts us again */
	space->closing = true;
	offload_cancel(space);
	/* Extents leave the sequences' lists before those go. */
	move_all(&space->blocks.extents, &batch->extents);
	move_all(&space->blocks.spare, &batch->extents);
	move_all(&space->dropped, &batch->extents);
	drop_sequences(space);
	context_space_ended(space);
	extent_batch_destroy(batch);
}

void space_kill(struct space *space)
{
	if (!atomic_exchange(&space->dying, true)) {
		space->tenant->ending++;
		reclaim_wake(space->tenant); /* its requests that wait do so no longer */
	}
	if (space->jobs == 0 && !space->closing)
		close_now(space);
}

bool space_job_ended(struct space *space)
{
	space->jobs--;
	if (!atomic_load_explicit(&space->dying, memory_order_relaxed))
		return false;
	if (space->jobs == 0 && !space->closing)
		close_now(space);
	return true;
}

void space_submit_job(
	struct request *request, void (*run)(struct job *), bool (*poll)(struct job *), void (*done)(struct job *))
{
	request->space->jobs++;
	request->job = (struct job){.run = run, .poll = poll, .done = done};
	executor_submit(request->space->pool->executor, &request->job);
}

bool space_job_lost(const struct request *request)
{
	const struct space *space = request->space;

	if (request->job_status >= 0)
		return false;
	space->ops->broken(space->user, "work on its KV failed on the device half-way");
	return true;
}

/* ---- requests ---- */

static void run(struct request *request);

/* Whatever became of the entry: nobody waits for ever. The stream may have done it already. */
static void signal_slot(const struct space *space, const struct kvg_sqe *sqe)
{
	uint32_t slot = (uint32_t)sqe->seq;

	if (!space->sync || !sqe->signal_value || slot >= space->part.worker->max_sequences ||
		sqe->op == KVG_OP_ATTACH) /* which names a context there */
		return;
	if (__atomic_load_n(&space->sync->slots[slot], __ATOMIC_RELAXED) < sqe->signal_value)
		__atomic_store_n(&space->sync->slots[slot], sqe->signal_value, __ATOMIC_RELEASE);
}

static void unuse(struct import **import)
{
	if (*import)
		import_unuse(*import);
	*import = NULL;
}

/* However many entries end one after the other, they do so in one loop: a worker chooses how many wait. */
static void run_ready(struct space *space)
{
	struct list *node;

	if (space->running)
		return;
	space->running = true;
	while (!space->closing && (node = list_pop(&space->ready)))
		run(list_entry(node, struct request, node));
	space->running = false;
}

void request_finish(struct request *request)
{
	struct space *space = request->space;
	struct sequence *sequence = request->sequence;

	signal_slot(space, &request->sqe);
	unuse(&request->event);
	unuse(&request->buffer);
	if (sequence) {
		request->cqe.seq = sequence_handle(sequence);
		request->cqe.generation = sequence->meta->generation;
		request->sequence = NULL;
		sequence->busy = false;
		offload_settle(sequence);
		if (!list_empty(&sequence->queue)) {
			list_add_tail(&space->ready, list_pop(&sequence->queue));
			sequence->busy = true;
		}
	}
	if (request->completed) {
		list_remove(&request->own_node);
		request->completed(request);
	} else {
		space->ops->complete(space->user, request);
	}
	run_ready(space);
}

void request_deinit(struct request *request)
{
	request->evict = evict_free(request->evict);
	block_copy_deinit(&request->copy);
	context_request_ended(request);
	request->image = image_free(request->image);
}

void request_fail(struct request *request, int status, const char *format, ...)
{
	va_list arguments;

	request->cqe.status = status;
	va_start(arguments, format);
	(void)vsnprintf(request->text, sizeof(request->text), format, arguments);
	va_end(arguments);
	request_finish(request);
}

/* In its turn: its value of the sequence's timeline comes after those of the entries before it. */
static void refuse(struct request *request)
{
	request->cqe.status = request->refused;
	request_finish(request);
}

struct sequence *space_sequence(const struct space *space, uint64_t handle)
{
	uint32_t slot = (uint32_t)handle;
	struct sequence *sequence = slot < space->part.worker->max_sequences ? space->sequences[slot] : NULL;

	return sequence && sequence->meta->epoch == handle >> 32 ? sequence : NULL;
}

void space_unmapped_part(struct request *request)
{
	if (!space_job_ended(request->space) && --request->parts == 0)
		request_finish(request);
}

static void unmapped_done(struct extent_batch *batch)
{
	struct request *request = batch->user;

	release_batch(request->space, batch);
	(void)extent_batch_free(batch);
	space_unmapped_part(request);
}

static void op_unmapped(struct request *request)
{
	struct space *space = request->space;
	uint32_t event = request->sqe.unmapped.event;
	struct extent_batch *batch;

	if ((int32_t)(event - space->dropped_event) > 0) {
		request_fail(request, -EINVAL, "unmapped: event %u, the last one asked for is %u", event,
			space->dropped_event);
		return;
	}
	batch = extent_batch_new(space->pool, unmapped_done, request);
	if (!batch) {
		request_fail(request, -ENOMEM, "unmapped: out of memory");
		return;
	}
	while (!list_empty(&space->dropped)) {
		struct extent *extent = list_entry(space->dropped.next, struct extent, node);

		if ((int32_t)(extent->meta->event - event) > 0)
			break;
		list_remove(&extent->node);
		list_add_tail(&batch->extents, &extent->node);
	}
	space->jobs++;
	request->parts = 1;
	context_unmapped(request, event);
	extent_batch_destroy(batch);
}

/* What takes memory anew comes after the tenant's requests that wait for some; sequences at work go on. */
static bool takes_anew(const struct request *request)
{
	uint8_t op = request->sqe.op;

	return op == KVG_OP_CREATE || op == KVG_OP_ATTACH || op == KVG_OP_FORK || op == KVG_OP_PUBLISH ||
	       op == KVG_OP_RESTORE || (op == KVG_OP_RESERVE && request->sequence->meta->residency != META_RESIDENT);
}

static void park(struct request *request, void (*again)(struct request *));

/* Begins an operation, or lets it wait for its turn. */
static void begin(struct request *request, void (*op)(struct request *))
{
	if (takes_anew(request) && reclaim_is_awaited(request->space->tenant))
		park(request, op);
	else
		op(request);
}

static void dispatch(struct request *request)
{
	static void (*const ops[])(struct request *) = {
		[KVG_OP_RESERVE] = op_reserve,
		[KVG_OP_COMMIT] = op_commit,
		[KVG_OP_STAGE] = op_stage,
		[KVG_OP_EVICT] = op_evict,
		[KVG_OP_TRUNCATE] = op_truncate,
		[KVG_OP_FREE] = op_free,
		[KVG_OP_PROTECT] = op_protect,
		[KVG_OP_QUERY] = op_query,
		[KVG_OP_PUBLISH] = op_publish,
		[KVG_OP_FORK] = op_fork,
		[KVG_OP_OFFLOAD] = op_offload,
		[KVG_OP_RESTORE] = op_restore,
		[KVG_OP_IDLE] = op_idle,
		[KVG_OP_RECALL] = op_recall,
	};

	if (!offload_allows(request))
		return;
	if (request->act)
		request->act(request);
	else
		begin(request, ops[request->sqe.op]);
}

static void waited(struct request *request)
{
	if (request->job_status < 0)
		request_fail(request, request->job_status,
			"sequence %#" PRIx64 ": waiting for value %" PRIu64 " of the worker's stream and event %u: %s",
			request->sqe.seq, request->sqe.wait_value, request->sqe.wait_event,
			request->job_status == -ETIME ? "the deadline has passed" : strerror(-request->job_status));
	else
		dispatch(request);
}

static void run(struct request *request)
{
	const struct kvg_sqe *sqe = &request->sqe;
	struct sequence *sequence = space_sequence(request->space, sqe->seq);
	bool versioned = sqe->op == KVG_OP_COMMIT || sqe->op == KVG_OP_STAGE || sqe->op == KVG_OP_EVICT ||
			 sqe->op == KVG_OP_TRUNCATE || sqe->op == KVG_OP_RECALL || sqe->op == KVG_OP_PUBLISH;

	if (!sequence) {
		request_fail(request, -ENOENT, "sequence %#" PRIx64 ": there is no such sequence", sqe->seq);
		return;
	}
	request->sequence = sequence;
	sequence->busy = true;
	if (request->refused) {
		refuse(request);
		return;
	}
	request->event = sqe->wait_event ? imports_find(&request->space->imports, sqe->wait_event, IMPORT_EVENT) : NULL;
	if (request->event)
		import_use(request->event);
	if (sqe->wait_event && !request->event)
		request_fail(request, -ENOENT, "sequence %#" PRIx64 ": there is no event %u to wait for", sqe->seq,
			sqe->wait_event);
	else if (versioned && !request->completed && sqe->generation != sequence->meta->generation)
		request_fail(request, -ESTALE, "sequence %#" PRIx64 ": generation %u, it is at %u", sqe->seq,
			sqe->generation, sequence->meta->generation);
	else if (compute_must_wait(request))
		compute_wait(request, waited);
	else
		dispatch(request);
}

/* Those that name no sequence of the worker. */
static bool is_unnamed(uint8_t op)
{
	return op == KVG_OP_NOP || op == KVG_OP_CREATE || op == KVG_OP_UNMAPPED || op == KVG_OP_FIND ||
	       op == KVG_OP_ATTACH;
}

static void run_unnamed(struct request *request)
{
	switch (request->sqe.op) {
	case KVG_OP_CREATE:
		begin(request, op_create);
		break;
	case KVG_OP_UNMAPPED:
		op_unmapped(request);
		break;
	case KVG_OP_FIND:
		op_find(request);
		break;
	case KVG_OP_ATTACH:
		begin(request, op_attach);
		break;
	default:
		request_finish(request);
	}
}

static bool is_known(const struct space *space, const struct kvg_sqe *sqe)
{
	bool timeline = sqe->wait_value || sqe->signal_value || sqe->wait_event;

	return sqe->op <= KVG_OP_FORK && !sqe->flags && !sqe->reserved0 && !sqe->layout && (!timeline || space->sync);
}

void space_submit(struct space *space, struct request *request)
{
	const struct kvg_sqe *sqe = &request->sqe;
	struct sequence *sequence;

	request->space = space;
	request->sequence = NULL;
	if (!is_known(space, sqe)) {
		request_fail(request, -EINVAL, "entry: operation %u, flags %#x, layout %u, timeline %s: not known here",
			sqe->op, sqe->flags, sqe->layout,
			sqe->wait_value || sqe->signal_value || sqe->wait_event ? "used" : "unused");
		return;
	}
	if (is_unnamed(sqe->op)) {
		if (request->refused)
			refuse(request);
		else
			run_unnamed(request);
		return;
	}
	sequence = space_sequence(space, sqe->seq);
	if (sequence && sequence->busy)
		list_add_tail(&sequence->queue, &request->node);
	else
		run(request);
}

/* ---- extents come and go ---- */

struct grow {
	struct request *request;
	void (*again)(struct request *);
	uint32_t arrived;
};

static int announce(struct space *space, struct list *new)
{
	struct extent *extents[64];
	int r = 0;

	while (!list_empty(new)) {
		uint32_t count = 0;
		struct list *node;

		while (count < 64 && (node = list_pop(new))) {
			extents[count] = list_entry(node, struct extent, node);
			blocks_add_extent(&space->blocks, extents[count++]);
		}
		if (r >= 0)
			r = space->ops->extents_added(space->user, extents, count);
	}
	return r;
}

/* The worker maps some while others are created. */
static void grown_part(struct extent_batch *batch, struct list *extents)
{
	struct grow *grow = batch->user;
	struct space *space = grow->request->space;
	uint32_t before = space->blocks.spare_count;

	(void)announce(space, extents);
	grow->arrived += space->blocks.spare_count - before;
	space->arrived += space->blocks.spare_count - before;
}

static void grown(struct extent_batch *batch)
{
	struct grow grow = *(struct grow *)batch->user;
	struct request *request = grow.request;
	struct space *space = request->space;
	int status = batch->status;

	free(batch->user);
	space->arrived -= grow.arrived;
	if (status < 0)
		release_batch(space, batch);
	else
		status = announce(space, &batch->extents);
	(void)extent_batch_free(batch);
	if (space_job_ended(space))
		return;
	if (status < 0)
		(void)snprintf(request->text, sizeof(request->text), "%s: memory of the %s: %s",
			space->tenant->quota.name, has_device(space->pool) ? "device" : "host", strerror(-status));
	request->grow_status = status;
	if (status < 0)
		space_return_spare(space);
	grow.again(request);
}

/* The batch could not even be filled. */
static void undo_charge(struct space *space, struct extent_batch *batch, uint64_t bytes)
{
	uint64_t rest = bytes - (batch ? batch->count * space->arena->extent_size : 0);

	quota_refund_to_promise(&space->tenant->quota, rest, promise_refund(space, rest));
	if (batch)
		release_batch(space, batch);
	(void)extent_batch_free(batch);
}

static int undo_grow(struct request *request, struct extent_batch *batch, uint64_t bytes, int status)
{
	const struct space *space = request->space;

	undo_charge(request->space, batch, bytes);
	(void)snprintf(request->text, sizeof(request->text), "%s: extents of %" PRIu64 " bytes: %s",
		space->tenant->quota.name, bytes, strerror(-status));
	return status;
}

int space_try_grow(struct request *request, uint32_t extents, const char *what, void (*again)(struct request *))
{
	struct space *space = request->space;
	uint64_t bytes = extents * (uint64_t)space->arena->extent_size;
	uint64_t drawn = promise_available(request->child ? request->child : request->sequence, bytes);
	struct extent_batch *batch;
	struct grow *grow;
	int r = quota_charge(&space->tenant->quota, bytes, drawn, what, request->text);

	request->lack = bytes - drawn;
	if (r < 0)
		return r;
	reclaim_check(space->tenant);
	promise_drawn(space, drawn);
	grow = malloc(sizeof(*grow));
	if (grow)
		*grow = (struct grow){.request = request, .again = again};
	batch = extent_batch_new(space->pool, grown, grow);
	r = grow && batch ? extent_batch_add_new(batch, space->arena, &space->tenant->quota, space->tenant->index,
				    space->index, extents)
			  : -ENOMEM;
	if (r < 0) {
		free(grow);
		return undo_grow(request, batch, bytes, r);
	}
	batch->part = grown_part;
	space->jobs++;
	extent_batch_create(batch);
	return 0;
}

static void memory_again(struct memory_wait *wait)
{
	struct request *request = list_entry(wait, struct request, wait);

	if (atomic_load_explicit(&request->space->dying, memory_order_relaxed))
		context_request_ended(request);
	if (space_job_ended(request->space))
		return;
	if (wait->behind) {
		park(request, request->after);
		return;
	}
	request->grow_status = request->cqe.status = 0;
	request->text[0] = '\0';
	request->after(request);
}

/* An eviction under way holds room that its end gives back, and wakes whoever waits. */
static bool is_coming(const struct space *space, uint64_t bytes)
{
	return reclaim_want(space->tenant, bytes) || (space->tenant->reclaim && space->evicting);
}

static void park(struct request *request, void (*again)(struct request *))
{
	request->wait.again = memory_again;
	request->wait.request = true;
	request->wait.in_turn = takes_anew(request);
	request->after = again;
	request->space->jobs++;
	reclaim_wait(request->space->tenant, &request->wait);
}

bool space_wait_memory(struct request *request, uint64_t bytes, void (*again)(struct request *))
{
	struct tenant *tenant = request->space->tenant;
	size_t used = strlen(request->text);

	if (!request->wait.expired && is_coming(request->space, bytes)) {
		quota_forgive(&tenant->quota);
		park(request, again);
		return true;
	}
	if (tenant->reclaim)
		reclaim_explain(tenant, bytes, request->text + used, sizeof(request->text) - used);
	return false;
}

static void grown_ahead(struct extent_batch *batch)
{
	struct space *space = batch->user;

	space->growing = false;
	if (batch->status < 0)
		release_batch(space, batch);
	else
		(void)announce(space, &batch->extents);
	(void)extent_batch_free(batch);
	if (space_job_ended(space))
		return;
	evict_begin_queued(space);
	space_return_spare(space); /* what it was for may be over */
}

void space_grow_ahead(struct space *space, uint32_t extents)
{
	uint64_t bytes = extents * (uint64_t)space->arena->extent_size;
	struct extent_batch *batch;
	char text[QUOTA_TEXT];

	if (!extents || space->growing || bytes > space->part.worker->promised ||
		quota_charge(&space->tenant->quota, bytes, bytes, "an eviction to come", text) < 0)
		return;
	promise_drawn(space, bytes);
	batch = extent_batch_new(space->pool, grown_ahead, space);
	if (!batch || extent_batch_add_new(batch, space->arena, &space->tenant->quota, space->tenant->index,
			      space->index, extents) < 0) {
		undo_charge(space, batch, bytes);
		return;
	}
	space->growing = true;
	space->jobs++;
	extent_batch_create(batch);
}

void space_return_spare(struct space *space)
{
	uint32_t slots[1024], keep = space->arrived;

	if (!space->tenant->pressed)
		keep += keep_count(space) + keep_for_tails(space);

	while (!space->evicting && space->blocks.spare_count > keep) {
		uint32_t count = 0;
		struct list taken, *node;

		list_init(&taken);
		while (count < 1024 && space->blocks.spare_count - count > keep) {
			struct extent *extent = list_entry(list_pop(&space->blocks.spare), struct extent, node);

			slots[count++] = extent->meta->slot;
			extent->meta->state = META_DROPPED;
			quota_unreturned_add(extent->quota, extent->meta->bytes);
			list_add_tail(&taken, &extent->node);
		}
		space->blocks.spare_count -= count;
		space->blocks.extent_count -= count;
		space->dropped_event = space->ops->extents_dropped(space->user, slots, count);
		while ((node = list_pop(&taken))) {
			list_entry(node, struct extent, node)->meta->event = space->dropped_event;
			list_add_tail(&space->dropped, node);
		}
	}
}

uint64_t space_unmapping(const struct space *space, uint32_t *ret_event)
{
	uint64_t bytes = 0;
	uint32_t oldest = space->dropped_event;

	for (const struct list *node = space->dropped.next; node != &space->dropped; node = node->next) {
		const struct meta_extent *extent = list_entry(node, struct extent, node)->meta;

		bytes += extent->bytes;
		oldest = (int32_t)(extent->event - oldest) < 0 ? extent->event : oldest;
	}
	for (const struct list *node = space->unmapping.next; node != &space->unmapping; node = node->next) {
		const struct mapping *mapping = list_entry(node, struct mapping, node);

		bytes += context_bytes(mapping->context);
		oldest = (int32_t)(mapping->event - oldest) < 0 ? mapping->event : oldest;
	}
	if (ret_event)
		*ret_event = oldest;
	return bytes;
}

uint32_t sequence_block(const struct sequence *sequence, uint32_t row, uint32_t index)
{
	const struct meta_part *part = &sequence->space->part;
	uint32_t held = meta_rows(part, sequence->slot)[row].held_blocks * KVG_BLOCK_TOKENS, fresh = index - held;

	if (index < held)
		return meta_held(part, sequence->slot, row)[index / KVG_BLOCK_TOKENS];
	return meta_run(part, sequence->slot, fresh / KVG_STRIPE_TOKENS)[row] +
	       fresh % KVG_STRIPE_TOKENS / KVG_BLOCK_TOKENS;
}

uint32_t *sequence_table_row(const struct sequence *sequence, uint32_t row)
{
	return table_row(&sequence->space->table, sequence->slot, row) + sequence_shared(sequence, row);
}

void sequence_table_length(const struct sequence *sequence, uint32_t row)
{
	const struct space *space = sequence->space;

	*table_base_len(&space->table, sequence->slot, row) = sequence_shared(sequence, row) * KVG_BLOCK_TOKENS +
							      meta_rows(&space->part, sequence->slot)[row].base_len;
}

uint64_t sequence_pairs(const struct sequence *sequence)
{
	const struct meta_seq *meta = sequence->meta;
	uint64_t fresh = (uint64_t)(meta->committed_pos - meta->fold_pos) * sequence->space->rows;

	return meta->pairs + fresh + (sequence->context ? sequence->context->shared_pairs : 0);
}

void sequence_publish(const struct sequence *sequence)
{
	const struct meta_seq *meta = sequence->meta;
	struct kvg_slot *slot = &sequence->space->table.slots[sequence->slot];

	slot->epoch = meta->epoch;
	slot->generation = meta->generation;
	slot->fold_pos = meta->fold_pos;
	slot->committed_pos = meta->committed_pos;
	slot->reserved_pos = meta->reserved_pos;
	slot->shared_pos = meta->shared_pos;
	slot->flags = (meta->residency != META_RESIDENT ? KVG_SLOT_OFFLOADED : 0) | (meta->idle ? KVG_SLOT_IDLE : 0);
}
