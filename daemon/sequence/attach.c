/* Sequences that begin with a context, and which workers map it. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/admission.h"
#include "daemon/sequence/compute.h"
#include "daemon/sequence/context.h"
#include "daemon/sequence/keep.h"
#include "daemon/sequence/promise.h"

#define MAP_SHARE  64u   /* descriptors of one message */
#define DROP_SHARE 1024u /* slots of one message */

/* ---- mappings ---- */

static struct mapping *find_mapping(const struct space *space, const struct context *context)
{
	struct mapping *found = NULL;

	HASH_FIND_PTR(space->mappings, &context, found);
	return found;
}

/* Hands the descriptors of all extents over, a few messages of them. */
static int send_extents(struct space *space, const struct context *context)
{
	const struct list *extents = &context->blocks.extents, *node = extents->next;
	struct extent *part[MAP_SHARE];
	int r = 0;

	while (r >= 0 && node != extents) {
		uint32_t count = 0;

		for (; count < MAP_SHARE && node != extents; node = node->next)
			part[count++] = list_entry(node, struct extent, node);
		r = space->ops->extents_added(space->user, part, count);
	}
	return r;
}

/* Maps a context and what it goes on from, unless that is so already. NULL: no memory, or the worker is gone. */
static struct mapping *map_context(struct space *space, struct context *context)
{
	struct mapping *mapping = find_mapping(space, context);

	if (mapping)
		return mapping;
	if (context->parent && !map_context(space, context->parent))
		return NULL;
	mapping = calloc(1, sizeof(*mapping));
	if (!mapping)
		return NULL;
	*mapping = (struct mapping){.context = context, .space = space};
	list_add_tail(&context->mappings, &mapping->node);
	context->mapped++;
	HASH_ADD_PTR(space->mappings, context, mapping);
	if (space->most_tails < context->tails)
		space->most_tails = context->tails;
	return send_extents(space, context) < 0 ? NULL : mapping;
}

/* Asks the worker to unmap; the mapping waits for its answer, if there is something to unmap. */
static void drop_mapping(struct mapping *mapping)
{
	struct space *space = mapping->space;
	const struct list *extents = &mapping->context->blocks.extents, *node = extents->next;
	uint32_t slots[DROP_SHARE];

	HASH_DEL(space->mappings, mapping);
	list_remove(&mapping->node);
	if (!space->mappings)
		space->most_tails = 0;
	if (node == extents) {
		mapping->context->mapped--;
		free(mapping);
		return;
	}
	while (node != extents) {
		uint32_t count = 0;

		for (; count < DROP_SHARE && node != extents; node = node->next)
			slots[count++] = list_entry(node, struct extent, node)->meta->slot;
		mapping->event = space->dropped_event = space->ops->extents_dropped(space->user, slots, count);
	}
	list_add_tail(&space->unmapping, &mapping->node);
	if (!space->closing) /* then its extents are on their way */
		space_return_spare(space);
}

void context_unmap(struct context *context)
{
	while (!list_empty(&context->mappings))
		drop_mapping(list_entry(context->mappings.next, struct mapping, node));
}

static void end_mapping(struct mapping *mapping, struct request *ender)
{
	struct context *context = mapping->context;

	list_remove(&mapping->node);
	free(mapping);
	context_mapping_ended(context, ender);
}

void context_unmapped(struct request *request, uint32_t event)
{
	struct list *all = &request->space->unmapping;

	while (!list_empty(all)) {
		struct mapping *mapping = list_entry(all->next, struct mapping, node);

		if ((int32_t)(mapping->event - event) > 0)
			return;
		end_mapping(mapping, request);
	}
}

void context_space_ended(struct space *space)
{
	struct mapping *mapping, *next;
	struct list *node;

	while ((node = list_pop(&space->context_waits)))
		list_remove(&list_entry(node, struct request, context_wait)->node);
	HASH_ITER(hh, space->mappings, mapping, next)
	{
		HASH_DEL(space->mappings, mapping);
		end_mapping(mapping, NULL);
	}
	while (!list_empty(&space->unmapping))
		end_mapping(list_entry(space->unmapping.next, struct mapping, node), NULL);
}

/* ---- sequences ---- */

int context_join(struct sequence *sequence, struct context *context)
{
	struct context *published = context_published(context);

	if (published && !map_context(sequence->space, published))
		return -ENOMEM;
	(void)context_ref(context);
	context_leave(sequence);
	if (published)
		published->attached++;
	sequence->context = context;
	sequence->shared = context->shared;
	sequence->meta->context = (uint32_t)(context->part.context - sequence->space->pool->meta->contexts) + 1;
	return 0;
}

void context_leave(struct sequence *sequence)
{
	struct context *context = sequence->context, *published = context_published(context);

	if (!context)
		return;
	if (published)
		published->attached--;
	sequence->context = NULL;
	sequence->shared = NULL;
	sequence->meta->context = 0;
	context_unref(context);
}

void context_write_rows(struct sequence *sequence)
{
	const struct space *space = sequence->space;
	const struct meta_row *rows = meta_rows(&space->part, sequence->slot);

	for (const struct context *at = sequence->context; at; at = at->parent) {
		for (uint32_t row = 0; row < space->rows; row++) {
			const struct meta_context_row *from = &at->part.rows[row];

			memcpy(table_row(&space->table, sequence->slot, row) + at->shared[row] - from->blocks,
				at->part.ids + from->first, from->blocks * sizeof(uint32_t));
		}
	}
	for (uint32_t row = 0; row < space->rows; row++) {
		memcpy(sequence_table_row(sequence, row), meta_held(&space->part, sequence->slot, row),
			rows[row].held_blocks * sizeof(uint32_t));
		sequence_table_length(sequence, row);
	}
}

void context_freeze_policy(struct kvg_policy *policy, uint32_t tokens)
{
	uint64_t total = (uint64_t)policy->prefix_tokens + policy->context_tokens, end = total + policy->max_new_tokens;

	if (policy->prefix_tokens < tokens)
		policy->prefix_tokens = tokens;
	if (total < policy->prefix_tokens)
		total = policy->prefix_tokens;
	policy->context_tokens = (uint32_t)(total - policy->prefix_tokens);
	policy->max_new_tokens = end > total ? (uint32_t)(end - total) : 0;
}

/* ---- blocks of its own for the tails ---- */

void block_copy_deinit(struct block_copy *copy)
{
	free(copy->src);
	*copy = (struct block_copy){0};
}

int block_copy_init(struct block_copy *copy, uint64_t count, uint64_t places)
{
	*copy = (struct block_copy){.count = (uint32_t)count, .places = (uint32_t)places};
	copy->src = malloc((2 * count + 1) * sizeof(uint32_t));
	if (!copy->src)
		return -ENOMEM;
	copy->dst = copy->src + count;
	return 0;
}

static void step(struct request *request);

/* Nothing has come of it. */
static void fail_tails(struct request *request, int status)
{
	struct sequence *child = request->child;

	request->child = NULL;
	block_copy_deinit(&request->copy);
	request->cqe.status = status;
	sequence_end(request, child);
}

/* Extents to create before the tails can be taken; what others and evictions count on is left to them. */
static uint32_t tails_missing(struct request *request)
{
	const struct space *space = request->space;
	uint64_t count = request->copy.places, need = count + space->evict_reserve;
	uint64_t all = blocks_free_anywhere(&space->blocks), each = space->arena->blocks_per_extent;
	uint32_t others = space->blocks.spare_count - keep_usable(request->child), missing;

	if (request->withheld > others)
		request->withheld = others;
	missing = blocks_missing(&space->blocks, &request->child->owner, META_HELD, count, 0, request->withheld);
	if (space->evicting && need > all && missing * each < need - all)
		missing = (uint32_t)((need - all + each - 1) / each);
	return missing;
}

static void step(struct request *request)
{
	struct space *space = request->space;
	struct sequence *child = request->child;
	uint64_t count = request->copy.places;
	uint32_t missing = tails_missing(request);

	if (missing && request->grow_status >= 0) {
		request->grow_status = space_try_grow(request, missing, "the sequence", step);
		if (request->grow_status >= 0)
			return;
	}
	if (missing && blocks_free_anywhere(&space->blocks) < count + space->evict_reserve) {
		if (request->grow_status != -ENOSPC || !space_wait_memory(request, request->lack, step))
			fail_tails(request, request->grow_status);
		return;
	}
	if (missing)
		blocks_take_anywhere(&space->blocks, &child->owner, count, request->copy.dst);
	else
		blocks_take(&space->blocks, &child->owner, META_HELD, count, 0, request->copy.dst);
	child->meta->blocks = child->tails = (uint32_t)count;
	request->tails_taken(request);
}

void context_take_tails(struct request *request)
{
	request->withheld = UINT32_MAX;
	step(request);
}

/* ---- ATTACH ---- */

static void attached(struct request *request)
{
	struct sequence *sequence = request->sequence = request->child;
	const struct space *space = request->space;

	request->child = NULL;
	block_copy_deinit(&request->copy);
	sequence_publish(sequence);
	request->cqe.value[0] = sequence->slot;
	request->cqe.value[1] = sequence->right * space->arena->extent_size;
	request->cqe.value[2] = sequence->meta->shared_pos;
	request->cqe.value[3] = sequence->meta->blocks * 2 * space->arena->stride;
	request->publish = (struct publish){.held = true, .lengths = true, .shared = true};
	compute_publish(request, request_finish);
}

static void copied(struct request *request)
{
	if (!space_job_ended(request->space) && !space_job_lost(request))
		attached(request);
}

/* Rows begin with their copies of the tails. */
static void fill_rows(struct request *request)
{
	struct sequence *sequence = request->child;
	const struct meta_context_row *from = sequence->context->part.rows;
	struct meta_seq *meta = sequence->meta;
	struct space *space = request->space;
	struct meta_row *rows = meta_rows(&space->part, sequence->slot);
	uint32_t n = 0, slack = KVG_BLOCK_TOKENS;

	for (uint32_t row = 0; row < space->rows; row++) {
		uint32_t tail = from[row].tail, room = tail ? KVG_BLOCK_TOKENS - tail : 0;

		rows[row] = (struct meta_row){.base_len = tail, .held_len = tail, .held_blocks = tail > 0};
		meta->pairs += tail;
		slack = room < slack ? room : slack;
		if (tail)
			*meta_held(&space->part, sequence->slot, row) = request->copy.dst[n++];
	}
	sequence->min_slack = slack;
	meta->reserved_pos += slack;
	if (meta->reserved_pos > space->part.worker->layout.max_tokens)
		meta->reserved_pos = space->part.worker->layout.max_tokens;
	promise_update(sequence);
	keep_update(sequence);
}

static void tails_taken(struct request *request)
{
	struct sequence *child = request->child;
	bool copies = request->copy.count > 0;

	if (copies) /* beside what follows */
		compute_copy_blocks(request, copied);
	fill_rows(request);
	context_write_rows(child);
	if (!copies)
		attached(request);
}

static int list_tails(struct request *request, const struct context *context)
{
	uint32_t n = 0;
	int r = block_copy_init(&request->copy, context->tails, context->tails);

	for (uint32_t row = 0; r >= 0 && row < context->rows; row++)
		if (context->part.rows[row].tail)
			request->copy.src[n++] = context->part.rows[row].tail_block;
	return r;
}

/* The sequence, with everything but blocks. */
static int new_child(struct request *request, struct context *context, const struct kvg_policy *policy, uint64_t blocks)
{
	struct sequence *child = sequence_new(request->space, policy, blocks);
	uint32_t tokens = context->part.context->tokens;
	int r = child ? context_join(child, context) : -ENOMEM;

	if (r >= 0)
		r = list_tails(request, context);
	if (r < 0) {
		if (child)
			sequence_drop(child);
		return r;
	}
	child->meta->fold_pos = child->meta->committed_pos = child->meta->reserved_pos = tokens;
	child->meta->shared_pos = tokens;
	child->busy = true; /* a worker can tell its handle before it is complete */
	request->child = child;
	promise_update(child);
	return 0;
}

/* The context is held as long as the request waits for memory, lest it goes itself. */
static void let_go(struct request *request)
{
	struct context *context = request->context;

	request->context = NULL;
	if (context)
		context_let_go(context);
}

static void begin_attach(struct request *request, struct context *context, const struct kvg_policy *policy)
{
	struct space *space = request->space;
	uint64_t blocks = context->tails + admission_blocks(&request->sqe.attach, space->rows, 0, 0);
	int r;

	if (!context_is_here(request, context))
		return;
	if (!request->context)
		request->context = context_hold(context);
	r = promise_admit(space, blocks, "the sequence", request->text);
	if (r == -ENOSPC && space_wait_memory(request, promise_bytes(space, blocks), op_attach))
		return;
	if (r < 0) {
		let_go(request);
		request->cqe.status = r;
		request_finish(request);
		return;
	}
	r = new_child(request, context, policy, blocks);
	let_go(request);
	if (r < 0) {
		promise_settle(space);
		request_fail(request, r, "attach: %s", strerror(-r));
		return;
	}
	request->tails_taken = tails_taken;
	context_take_tails(request);
}

static int check(struct request *request, const struct context *context, struct kvg_policy *policy)
{
	const struct space *space = request->space;
	const uint32_t tokens = context->part.context->tokens;

	if (!__builtin_add_overflow(policy->prefix_tokens, tokens, &policy->prefix_tokens))
		return admission_check(
			policy, space->part.worker->layout.max_tokens, request->text, sizeof(request->text));
	(void)snprintf(request->text, sizeof(request->text), "attach: prefix_tokens %u behind the context's %u",
		request->sqe.attach.prefix_tokens, tokens);
	return -EINVAL;
}

void op_attach(struct request *request)
{
	struct space *space = request->space;
	struct context *context =
		request->context ? request->context : context_find_id(space->tenant, request->sqe.seq);
	struct kvg_policy policy = request->sqe.attach;
	int r;

	if (!context || context->arena != space->arena) {
		request_fail(request, -ENOENT, "attach: there is no context %" PRIu64, request->sqe.seq);
		return;
	}
	if (!space->compute->copy) {
		request_fail(request, -EOPNOTSUPP, "attach: this kind has no contexts");
		return;
	}
	r = check(request, context, &policy);
	if (r >= 0 && !space->free_count) {
		(void)snprintf(request->text, sizeof(request->text),
			"attach: all %u sequences of the layout are in use", space->part.worker->max_sequences);
		r = -EUSERS;
	}
	if (r >= 0)
		r = tenant_check_sequences(space->tenant, 1, request->text, sizeof(request->text));
	if (r >= 0) {
		begin_attach(request, context, &policy);
		return;
	}
	let_go(request);
	request->cqe.status = r;
	request_finish(request);
}
