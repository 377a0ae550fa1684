/* A context from beginning to end. */
#include "daemon/sequence/context.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/tier/host.h"

static uint32_t context_index(const struct context *context)
{
	return (uint32_t)(context->part.context - context->tenant->pool->meta->contexts);
}

static void context_free(struct context *context)
{
	struct context *parent = context->parent;

	list_remove(&context->host_node);
	host_tier_give(context->tenant->pool->tier, context->tenant, context->part.context->image);
	meta_context_deinit(context->tenant->pool->meta, &context->part);
	context->tenant->context_entries--;
	(void)arena_unref(context->arena);
	free(context->shared);
	free(context);
	context_unref(parent);
}

/*
 * Entries of the table that all tenants share: a tenant gets none when it has as many as are left for all. A little
 * before that, those of contexts that nobody uses are on their way back, the ones on the host first.
 */
static void make_entries(struct tenant *tenant, uint32_t free_count)
{
	const struct list *on_host = &tenant->host_contexts, *on_offer = &tenant->offers[RECLAIM_CONTEXT];

	if (tenant->context_entries + free_count / 8 < free_count)
		return;
	if (!list_empty(on_host))
		context_forget(list_entry(on_host->next, struct context, host_node));
	else if (!list_empty(on_offer))
		context_forget(list_entry(on_offer->next, struct context, offer.node));
}

static int take_entry(const struct space *space, uint64_t id, uint64_t ids, struct meta_context_part *ret)
{
	struct tenant *tenant = space->tenant;
	struct meta *meta = space->pool->meta;
	int r = -EUSERS;

	make_entries(tenant, meta->free_context_count);
	if (tenant->context_entries < meta->free_context_count)
		r = meta_context_new(meta, id, space->rows, (uint32_t)ids, ret);
	tenant->context_entries += r >= 0;
	return r;
}

static void fill_meta(struct context *context, const struct space *space, uint32_t tokens)
{
	struct meta_context *meta = context->part.context;

	meta->state = META_CONTEXT_COPYING;
	meta->tenant = context->tenant->index;
	meta->worker = context->space ? space->index : META_NO_WORKER;
	meta->parent = context->parent ? context_index(context->parent) + 1 : 0;
	meta->tokens = tokens;
	meta->stride = context->arena->stride;
	meta->layout = space->part.worker->layout;
}

static void init_blocks(struct context *context)
{
	block_space_init(&context->blocks, context->tenant->pool, context->arena);
	block_owner_init(&context->blocks.shared, context_index(context) + 1);
}

static void add_key(struct context *context, const uint8_t *key)
{
	struct tenant *tenant = context->tenant;

	memcpy(context->part.context->key, key, KVG_KEY_SIZE);
	memcpy(context->key.key, key, KVG_KEY_SIZE);
	context->key.arena = context->arena;
	init_blocks(context);
	HASH_ADD(by_key, tenant->contexts_by_key, key, sizeof(struct context_key), context);
}

static void init_lists(struct context *context)
{
	list_init(&context->offer.node);
	list_init(&context->mappings);
	list_init(&context->waiting);
	list_init(&context->host_node);
}

int context_new(struct space *space, struct context *parent, const uint8_t *key, uint32_t tokens, uint64_t ids,
	struct context **ret)
{
	struct context *context = calloc(1, sizeof(*context));
	uint64_t id = space->tenant->next_context + 1;
	int r = -ENOMEM;

	if (!context)
		return -ENOMEM;
	context->rows = space->rows;
	context->shared = calloc(space->rows, sizeof(uint32_t));
	if (context->shared)
		r = take_entry(space, id, ids, &context->part);
	if (r < 0) {
		free(context->shared);
		free(context);
		return r;
	}
	init_lists(context);
	context->tenant = space->tenant;
	context->tenant->next_context = id;
	context->arena = arena_ref(space->arena);
	context->space = key ? NULL : space;
	context->parent = parent ? context_ref(parent) : NULL;
	fill_meta(context, space, tokens);
	if (key)
		add_key(context, key);
	*ret = context;
	return 0;
}

void context_seal(struct context *context)
{
	const struct meta_context_row *rows = context->part.rows;
	struct meta_context *meta = context->part.context;
	const struct context *parent = context->parent;
	uint64_t blocks = 0, shared = 0;

	for (uint32_t row = 0; row < context->rows; row++) {
		context->shared[row] = (parent ? parent->shared[row] : 0) + rows[row].blocks;
		context->tails += rows[row].tail > 0;
		blocks += rows[row].blocks;
		shared += context->shared[row];
	}
	context->shared_pairs = shared * KVG_BLOCK_TOKENS;
	context->chain_blocks = shared + context->tails;
	meta->blocks = blocks + context->tails;
	meta->state = META_CONTEXT_SEALED;
	if (!context_is_published(context))
		return;
	context->tenant->contexts++;
	HASH_ADD(by_id, context->tenant->contexts_by_id, part.context->id, sizeof(uint64_t), context);
}

/* ---- extents of its own ---- */

int context_create_extents(
	struct context *context, uint32_t extents, void (*created)(struct extent_batch *batch), void *user, char *text)
{
	struct tenant *tenant = context->tenant;
	struct quota *quota = &tenant->quota;
	uint64_t size = context->arena->extent_size, bytes = extents * size;
	struct extent_batch *batch;
	int r = quota_charge(quota, bytes, 0, "the context", text);

	if (r < 0)
		return r;
	reclaim_check(tenant);
	batch = extent_batch_new(tenant->pool, created, user);
	r = batch ? extent_batch_add_new(batch, context->arena, quota, tenant->index, META_NO_WORKER, extents)
		  : -ENOMEM;
	if (r < 0) {
		quota_refund(quota, bytes - (batch ? batch->count * size : 0));
		while (batch && !list_empty(&batch->extents))
			extent_release(tenant->pool, list_entry(batch->extents.next, struct extent, node), 0);
		(void)extent_batch_free(batch);
		(void)snprintf(
			text, QUOTA_TEXT, "%s: extents of %" PRIu64 " bytes: %s", quota->name, bytes, strerror(-r));
		return r;
	}
	extent_batch_create(batch);
	return 0;
}

int context_add_extents(struct context *context, struct extent_batch *batch)
{
	int status = batch->status;
	struct list *node;

	while (status < 0 && !list_empty(&batch->extents))
		extent_release(batch->pool, list_entry(batch->extents.next, struct extent, node), 0);
	while ((node = list_pop(&batch->extents)))
		blocks_add_extent(&context->blocks, list_entry(node, struct extent, node));
	(void)extent_batch_free(batch);
	return status;
}

/* ---- finding ---- */

struct context *context_find(const struct tenant *tenant, const struct arena *arena, const uint8_t *key)
{
	struct context_key wanted = {.arena = arena};
	struct context *found = NULL;

	memcpy(wanted.key, key, KVG_KEY_SIZE);
	HASH_FIND(by_key, tenant->contexts_by_key, &wanted, sizeof(wanted), found);
	return found;
}

struct context *context_find_id(const struct tenant *tenant, uint64_t id)
{
	struct context *found = NULL;

	HASH_FIND(by_id, tenant->contexts_by_id, &id, sizeof(id), found);
	return found;
}

struct context *context_published(struct context *context)
{
	while (context && !context_is_published(context))
		context = context->parent;
	return context;
}

uint64_t context_bytes(const struct context *context)
{
	return context->blocks.extent_count * (uint64_t)context->arena->extent_size;
}

uint64_t context_pairs(const struct context *context)
{
	uint64_t pairs = context->shared_pairs;

	for (uint32_t row = 0; row < context->rows; row++)
		pairs += context->part.rows[row].tail;
	return pairs;
}

const struct context *context_first(const struct tenant *tenant)
{
	return tenant->contexts_by_id;
}

const struct context *context_next(const struct context *context)
{
	return context->by_id.next;
}

/* ---- the end ---- */

static void release_all(struct extent_batch *batch)
{
	while (!list_empty(&batch->extents))
		extent_release(batch->pool, list_entry(batch->extents.next, struct extent, node), 0);
	(void)extent_batch_free(batch);
}

static void destroyed(struct extent_batch *batch)
{
	struct context *context = batch->user;
	struct request *ender = context->ender;

	release_all(batch);
	if (context->reclaimed)
		reclaim_progress(context->tenant, context->offer.bytes);
	context_free(context);
	if (ender)
		space_unmapped_part(ender);
}

static void take_extents(struct list *from, struct list *to)
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

static void destroy_then(struct context *context, void (*done)(struct extent_batch *batch))
{
	struct extent_batch *batch = extent_batch_new(context->tenant->pool, done, context);

	if (!batch)
		abort(); /* 100 bytes were not to be had: the service manager starts us again */
	take_extents(&context->blocks.extents, &batch->extents);
	take_extents(&context->blocks.spare, &batch->extents);
	extent_batch_destroy(batch);
}

static void destroy(struct context *context)
{
	destroy_then(context, destroyed);
}

void context_discard_extents(struct context *context)
{
	destroy_then(context, release_all);
	init_blocks(context);
}

static void ask_back(const struct list *extents)
{
	for (const struct list *node = extents->next; node != extents; node = node->next) {
		struct extent *extent = list_entry(node, struct extent, node);

		extent->meta->state = META_DROPPED;
		quota_unreturned_add(extent->quota, extent->meta->bytes);
	}
}

/* Nobody refers to it or finds it. */
static void end_published(struct context *context)
{
	context->part.context->state = META_CONTEXT_ENDING;
	if (!context->blocks.extent_count) {
		context_unmap(context); /* at once: there is nothing to unmap */
		if (context->reclaimed)
			reclaim_progress(context->tenant, context->offer.bytes);
		context_free(context);
		return;
	}
	if (!context->mapped) {
		destroy(context);
		return;
	}
	ask_back(&context->blocks.extents);
	if (context->reclaimed) /* from now on it is unreturned */
		reclaim_progress(context->tenant, context->offer.bytes);
	context->reclaimed = false;
	context_unmap(context);
}

struct context *context_shell_new(struct context *context)
{
	struct context *shell = calloc(1, sizeof(*shell));

	if (!shell)
		return NULL;
	if (meta_context_new(context->tenant->pool->meta, context->part.context->id, 1, 0, &shell->part) < 0) {
		free(shell);
		return NULL;
	}
	init_lists(shell);
	shell->tenant = context->tenant;
	shell->tenant->context_entries++;
	shell->arena = arena_ref(context->arena);
	shell->forgotten = true;
	shell->part.context->state = META_CONTEXT_ENDING;
	shell->part.context->tenant = shell->tenant->index;
	shell->part.context->stride = shell->arena->stride;
	init_blocks(shell);
	return shell;
}

struct context *context_shell_free(struct context *shell)
{
	if (shell)
		context_free(shell);
	return NULL;
}

static void move_extents(struct list *from, struct list *to)
{
	struct list *node;

	while ((node = list_pop(from))) {
		list_remove(&list_entry(node, struct extent, node)->open);
		list_add_tail(to, node);
	}
}

void context_shed(struct context *context, struct context *shell)
{
	struct list *node;

	shell->reclaimed = true;
	shell->offer.bytes = context_bytes(context);
	shell->blocks.extent_count = context->blocks.extent_count;
	move_extents(&context->blocks.extents, &shell->blocks.extents);
	move_extents(&context->blocks.spare, &shell->blocks.extents);
	init_blocks(context);
	while ((node = list_pop(&context->mappings))) {
		list_entry(node, struct mapping, node)->context = shell;
		list_add_tail(&shell->mappings, node);
	}
	shell->mapped = context->mapped;
	context->mapped = 0;
	end_published(shell);
}

void context_mapping_ended(struct context *context, struct request *ender)
{
	if (--context->mapped || context->part.context->state != META_CONTEXT_ENDING)
		return;
	context->ender = ender;
	if (ender) {
		ender->parts++;
		ender->space->jobs++;
	}
	destroy(context);
}

static void end_anonymous(struct context *context)
{
	struct space *space = context->space;
	const struct meta_context *meta = context->part.context;

	for (uint32_t i = 0; i < meta->ids && !space->closing; i++)
		blocks_give(&space->blocks, context->part.ids[i]);
	context_free(context);
}

struct context *context_ref(struct context *context)
{
	reclaim_withdraw(&context->offer);
	list_remove(&context->host_node);
	context->part.context->refs++;
	return context;
}

/* Somebody needs its memory. */
static int begin_reclaim(struct reclaimable *offer)
{
	struct context *context = list_entry(offer, struct context, offer);

	if (context_offload(context) >= 0)
		return 0;
	reclaim_withdraw(offer);
	context->reclaimed = true;
	context_forget(context);
	return 0;
}

/* Whether anybody uses it still. */
static void left(struct context *context)
{
	if (context->part.context->refs || context->holds)
		return;
	if (!context_is_published(context)) {
		end_anonymous(context);
	} else if (context->forgotten) {
		end_published(context);
	} else if (context->part.context->residency == META_OFFLOADED) {
		if (list_empty(&context->host_node))
			list_add_tail(&context->tenant->host_contexts, &context->host_node);
		reclaim_host_check(context->tenant);
	} else if (list_empty(&context->offer.node)) {
		context->offer.bytes = context_bytes(context);
		context->offer.begin = begin_reclaim;
		reclaim_offer(context->tenant, RECLAIM_CONTEXT, &context->offer);
	}
}

void context_unref(struct context *context)
{
	if (!context)
		return;
	context->part.context->refs--;
	left(context);
}

struct context *context_hold(struct context *context)
{
	reclaim_withdraw(&context->offer);
	list_remove(&context->host_node);
	context->holds++;
	return context;
}

void context_let_go(struct context *context)
{
	context->holds--;
	left(context);
}

void context_wait(struct request *request, struct context *context)
{
	list_add_tail(&context->waiting, &request->node);
	list_init(&request->context_wait);
	list_add_tail(&request->space->context_waits, &request->context_wait);
}

void context_begin_anew(struct request *request)
{
	if (request->sqe.op == KVG_OP_ATTACH)
		op_attach(request);
	else
		op_publish(request);
}

void context_end_waits(struct context *context, void (*then)(struct request *request, void *user), void *user)
{
	struct list waiting, *node;

	list_init(&waiting);
	while ((node = list_pop(&context->waiting)))
		list_add_tail(&waiting, node);
	while ((node = list_pop(&waiting))) {
		struct request *request = list_entry(node, struct request, node);

		list_remove(&request->context_wait);
		if (!atomic_load_explicit(&request->space->dying, memory_order_relaxed))
			then(request, user);
	}
}

static void begin_anew(struct request *request, void *user)
{
	(void)user;
	context_begin_anew(request);
}

void context_wake(struct context *context)
{
	context_end_waits(context, begin_anew, NULL);
}

static void unlist(struct context *context)
{
	struct tenant *tenant = context->tenant;

	context->forgotten = true;
	HASH_DELETE(by_key, tenant->contexts_by_key, context);
	if (context->part.context->state != META_CONTEXT_SEALED)
		return;
	HASH_DELETE(by_id, tenant->contexts_by_id, context);
	tenant->contexts--;
}

void context_abort(struct context *context)
{
	unlist(context);
	context_wake(context);
	end_published(context);
}

void context_forget(struct context *context)
{
	if (context->forgotten)
		return;
	reclaim_withdraw(&context->offer);
	list_remove(&context->host_node);
	unlist(context);
	left(context);
}

void context_request_ended(struct request *request)
{
	struct context *context = request->context;

	request->context = NULL;
	if (context && context->part.context->state == META_CONTEXT_COPYING)
		context_abort(context);
	else if (context)
		context_let_go(context);
}

void context_forget_all(struct tenant *tenant)
{
	struct context *context, *next;

	HASH_ITER(by_id, tenant->contexts_by_id, context, next)
	context_forget(context);
}
