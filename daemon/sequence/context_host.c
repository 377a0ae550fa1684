/* Published contexts that nobody uses go to the host tier, and come back for those that attach. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/context.h"
#include "daemon/sequence/image.h"

/*
 * A copy under way. It is nobody's request: the publisher may have gone, and whoever attaches may go meanwhile. The
 * carrier is a space without a worker, with what copies look at.
 */
struct context_move {
	struct request request;
	struct space carrier;
	struct context *context; /* a hold */
	struct context *shell;   /* to the host: for what is given back */
	uint64_t bytes;          /* to the host: what was on offer */
};

static void set_residency(const struct context *context, enum meta_residency residency)
{
	__atomic_store_n(&context->part.context->residency, residency, __ATOMIC_RELEASE);
}

static void give_image(const struct context *context)
{
	struct meta_context *meta = context->part.context;

	host_tier_give(context->tenant->pool->tier, context->tenant, meta->image);
	meta->image = 0;
	meta->image_bytes = 0;
}

/* ---- moves ---- */

static struct context_move *move_free(struct context_move *move)
{
	if (!move)
		return NULL;
	move->request.image = image_free(move->request.image);
	(void)context_shell_free(move->shell);
	free(move->carrier.device.compute);
	free(move);
	return NULL;
}

static struct context_move *move_new(struct context *context)
{
	struct context_move *move = calloc(1, sizeof(*move));
	struct space *carrier;

	if (!move)
		return NULL;
	carrier = &move->carrier;
	carrier->tenant = context->tenant;
	carrier->pool = context->tenant->pool;
	carrier->arena = context->arena;
	carrier->compute = compute_of(carrier->pool->kind);
	carrier->device.table_fd = carrier->device.staging_fd = -1;
	move->request.space = carrier;
	move->context = context;
	if (carrier->compute->carry && carrier->compute->carry(carrier) < 0)
		return move_free(move);
	return move;
}

static void move_begin(struct context_move *move)
{
	move->context->move = move;
	(void)context_hold(move->context);
}

/* Those that wait look again at how things are. */
static void move_end(struct context_move *move)
{
	struct context *context = move->context;

	context->move = NULL;
	(void)move_free(move);
	context_wake(context);
	context_let_go(context);
}

/* ---- to the host ---- */

static bool has_room(const struct tenant *tenant, uint64_t bytes)
{
	return !quota_lack(&tenant->host, bytes) && !quota_lack_pool(&tenant->host, bytes);
}

/* Bytes of contexts that may be forgotten. */
static uint64_t idle_bytes(const struct tenant *tenant)
{
	const struct list *all = &tenant->host_contexts;
	uint64_t bytes = 0;

	for (const struct list *node = all->next; node != all; node = node->next)
		bytes += list_entry(node, struct context, host_node)->part.context->image_bytes;
	return bytes;
}

void context_make_host_room(struct tenant *tenant, uint64_t bytes, bool partly)
{
	struct list *all = &tenant->host_contexts;
	uint64_t own, pool;

	if (list_empty(all) || has_room(tenant, bytes))
		return;
	own = quota_lack(&tenant->host, bytes);
	pool = quota_lack_pool(&tenant->host, bytes);
	if (!partly && (own > pool ? own : pool) > idle_bytes(tenant))
		return;
	while (!list_empty(all) && !has_room(tenant, bytes))
		context_forget(list_entry(all->next, struct context, host_node));
}

void context_forget_host(struct tenant *tenant, uint64_t most)
{
	struct list *all = &tenant->host_contexts;

	while (!list_empty(all) && tenant->host.account->charged > most)
		context_forget(list_entry(all->next, struct context, host_node));
}

static int take_image(const struct context *context)
{
	struct meta_context *meta = context->part.context;
	struct host_tier *tier = context->tenant->pool->tier;
	struct image_shape shape;
	char text[QUOTA_TEXT];
	uint32_t size, count;
	int r;

	if (!tier || !host_tier_frame_count(tier))
		return -ENOSPC;
	size = host_tier_frame_size(tier);
	shape = image_shape(&context->arena->layout.groups[0], size);
	count = image_frames(&shape, size, meta->blocks, false);
	context_make_host_room(context->tenant, (uint64_t)count * size, false);
	if (!has_room(context->tenant, (uint64_t)count * size))
		return -ENOSPC;
	r = host_tier_take(tier, context->tenant, count, "the image of a context", &meta->image, text);
	if (r >= 0)
		meta->image_bytes = (uint64_t)count * size;
	return r;
}

/* It has not gone: it is wanted again, or else is forgotten. */
static void stay(struct context_move *move)
{
	struct context *context = move->context;

	give_image(context);
	set_residency(context, META_RESIDENT);
	if (!list_empty(&context->waiting)) {
		reclaim_progress(context->tenant, move->bytes);
		return;
	}
	context->reclaimed = true;
	context_forget(context);
}

/* The image is complete: what it has of the device goes. */
static void leave(struct context_move *move)
{
	struct context *context = move->context;

	context->part.context->blocks = 0;
	set_residency(context, META_OFFLOADED);
	context_shed(context, move->shell);
	move->shell = NULL;
}

static void unloaded(struct request *request)
{
	struct context_move *move = list_entry(request, struct context_move, request);
	const struct context *context = move->context;

	if (request->job_status < 0 || context->forgotten || !list_empty(&context->waiting))
		stay(move);
	else
		leave(move);
	move_end(move);
}

static int prepare(struct context_move *move)
{
	struct context *context = move->context;
	int r = take_image(context);

	if (r < 0)
		return r;
	move->shell = context_shell_new(context);
	move->request.image = image_new_context(context, context->part.context->image, false);
	if (move->shell && move->request.image)
		return 0;
	give_image(context);
	return -ENOMEM;
}

int context_offload(struct context *context)
{
	struct context_move *move;
	int r;

	if (context->parent || !context->part.context->blocks)
		return -EOPNOTSUPP;
	move = move_new(context);
	r = move ? prepare(move) : -ENOMEM;
	if (r < 0) {
		(void)move_free(move);
		return r;
	}
	move->bytes = context->offer.bytes;
	move_begin(move);
	set_residency(context, META_OFFLOADING);
	compute_copy(&move->request, unloaded);
	return 0;
}

/* ---- and back ---- */

/* Why a move has failed. */
struct failure {
	int status;
	const char *what;
};

static void fail_waiting(struct request *request, void *user)
{
	const struct failure *failure = user;

	request_fail(request, failure->status, "%s: %s: %s", request->space->tenant->quota.name, failure->what,
		strerror(-failure->status));
}

/* It stays on the host, and those that wait fail. */
static void fail(struct context_move *move, int status, const char *what)
{
	struct context *context = move->context;
	struct failure failure = {.status = status, .what = what};

	context->part.context->blocks = 0;
	set_residency(context, META_OFFLOADED);
	context_end_waits(context, fail_waiting, &failure);
	move_end(move);
}

static void loaded(struct request *request)
{
	struct context_move *move = list_entry(request, struct context_move, request);
	struct context *context = move->context;

	if (request->job_status < 0) {
		context_discard_extents(context);
		fail(move, request->job_status, "a context comes back from the host");
		return;
	}
	set_residency(context, META_RESIDENT);
	give_image(context);
	move_end(move);
}

/* Blocks as it had them, under other ids. */
static int take_blocks(struct context *context)
{
	struct meta_context_part *part = &context->part;
	uint32_t *tails = malloc((context->tails + 1) * sizeof(uint32_t)), n = 0;

	if (!tails)
		return -ENOMEM;
	blocks_take(&context->blocks, &context->blocks.shared, META_HELD, context->tails, part->context->ids, tails);
	blocks_take(&context->blocks, &context->blocks.shared, META_HELD, part->context->ids, 0, part->ids);
	for (uint32_t row = 0; row < context->rows; row++)
		if (part->rows[row].tail)
			part->rows[row].tail_block = tails[n++];
	part->context->blocks = (uint64_t)part->context->ids + context->tails;
	free(tails);
	return 0;
}

static void created(struct extent_batch *batch)
{
	struct context_move *move = batch->user;
	struct context *context = move->context;
	int r = context_add_extents(context, batch);

	if (r < 0) {
		fail(move, r, "memory of a context");
		return;
	}
	r = take_blocks(context);
	if (r >= 0) {
		move->request.image = image_new_context(context, context->part.context->image, true);
		r = move->request.image ? 0 : -ENOMEM;
	}
	if (r >= 0) {
		compute_copy(&move->request, loaded);
		return;
	}
	context_discard_extents(context);
	fail(move, r, "memory of a context");
}

static uint32_t extents_of(const struct context *context)
{
	uint64_t each = context->arena->blocks_per_extent;

	return (uint32_t)((context->part.context->ids + context->tails + each - 1) / each);
}

static int restore(struct context *context, char *text)
{
	struct context_move *move = move_new(context);
	int r;

	if (!move) {
		(void)snprintf(text, QUOTA_TEXT, "%s: the context: out of memory", context->tenant->quota.name);
		return -ENOMEM;
	}
	r = context_create_extents(context, extents_of(context), created, move, text);
	if (r < 0) {
		(void)move_free(move);
		return r;
	}
	move_begin(move);
	set_residency(context, META_RESTORING);
	return 0;
}

/* For a request that is held up by memory, by the restore, or fails. */
static void bring_back(struct request *request, struct context *context)
{
	uint64_t bytes = extents_of(context) * (uint64_t)context->arena->extent_size;
	int r;

	if (!request->context)
		request->context = context_hold(context); /* it does not make room for others meanwhile */
	r = restore(context, request->text);
	if (r == -ENOSPC && space_wait_memory(request, bytes, context_begin_anew))
		return;
	context_request_ended(request);
	if (r >= 0) {
		context_wait(request, context);
		return;
	}
	request->cqe.status = r;
	request_finish(request);
}

bool context_is_here(struct request *request, struct context *context)
{
	if (context->part.context->residency == META_RESIDENT)
		return true;
	if (context->move) {
		context_request_ended(request);
		context_wait(request, context);
	} else {
		bring_back(request, context);
	}
	return false;
}
