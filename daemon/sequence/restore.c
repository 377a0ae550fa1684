/* RESTORE, and what comes before RESERVE: the blocks of an offloaded sequence come back. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/image.h"
#include "daemon/sequence/keep.h"
#include "daemon/sequence/offload.h"
#include "daemon/sequence/promise.h"

/* What the sequence will hold, by generation: single blocks, and runs. */
struct need {
	uint64_t held, runs;
};

static struct need need_of(const struct sequence *sequence)
{
	const struct space *space = sequence->space;
	const struct meta_row *rows = meta_rows(&space->part, sequence->slot);
	struct need need = {.runs = (uint64_t)sequence->meta->stripes * space->rows};

	for (uint32_t row = 0; row < space->rows; row++)
		need.held += rows[row].held_blocks;
	return need;
}

static uint64_t all_blocks(const struct need *need)
{
	return need->held + need->runs * KVG_RUN_BLOCKS;
}

/* ---- the end ---- */

static void restored(struct request *request)
{
	request->restored(request);
}

/* Its blocks are full: the image goes. */
static void loaded(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct meta_seq *meta = sequence->meta;

	if (request->image)
		request->cqe.value[1] = image_copy_ns(request->image);
	request->image = image_free(request->image);
	if (request->job_status < 0) { /* the frames are there: only a device that is lost can fail */
		(void)space_job_lost(request);
		return;
	}
	__atomic_store_n(&meta->residency, META_RESIDENT, __ATOMIC_RELEASE);
	offload_forget(sequence);
	meta->image_bytes = 0;
	meta->admitted_before = 0;
	request->cqe.value[0] = meta->blocks * 2 * request->space->arena->stride;
	promise_update(sequence);
	keep_update(sequence);
	sequence_publish(sequence);
	request->publish = (struct publish){.held = true, .lengths = true, .stripe_end = meta->stripes};
	compute_publish(request, restored);
}

/* Nothing has been taken: it stays where it is. */
static void refuse(struct request *request, int status)
{
	struct sequence *sequence = request->sequence;

	sequence->meta->admitted = 0;
	promise_update(sequence);
	keep_update(sequence);
	sequence_publish(sequence);
	request->cqe.status = status;
	space_return_spare(request->space);
	request_finish(request);
}

/* ---- blocks ---- */

/* Extents without blocks that others of the worker count on. */
static uint64_t others_spare(struct request *request)
{
	uint32_t now = request->space->blocks.spare_count - keep_usable(request->sequence);

	if (request->withheld > now)
		request->withheld = now;
	return request->withheld;
}

/* Free blocks that it may take, besides what evictions and others count on. */
static uint64_t free_blocks(struct request *request)
{
	const struct space *space = request->space;
	uint64_t all = blocks_free_anywhere(&space->blocks), each = space->arena->blocks_per_extent;
	uint64_t others = space->evict_reserve + others_spare(request) * each;

	return all > others ? all - others : 0;
}

/* Extents to create so that each generation has extents of its own. */
static uint32_t missing_extents(struct request *request, const struct need *need)
{
	const struct sequence *sequence = request->sequence;
	const struct space *space = request->space;
	const struct block_owner *owner = &sequence->owner;
	uint64_t spare = space->blocks.spare_count - others_spare(request), each = space->arena->blocks_per_extent;
	uint64_t extents = (uint64_t)blocks_missing(&space->blocks, owner, META_HELD, need->held, 0, UINT32_MAX) +
			   blocks_missing(&space->blocks, owner, META_NURSERY, need->runs, 0, UINT32_MAX);
	uint64_t missing = extents > spare ? extents - spare : 0, have = free_blocks(request);

	if (space->evicting && all_blocks(need) > have && missing * each < all_blocks(need) - have)
		missing = (all_blocks(need) - have + each - 1) / each;
	return (uint32_t)missing;
}

/* Extents that lack whatever their generation. */
static uint32_t least_extents(struct request *request, const struct need *need)
{
	uint64_t have = free_blocks(request), each = request->space->arena->blocks_per_extent;

	return all_blocks(need) > have ? (uint32_t)((all_blocks(need) - have + each - 1) / each) : 0;
}

static bool fits_anywhere(struct request *request, const struct need *need)
{
	const struct space *space = request->space;
	uint64_t others = others_spare(request) * space->arena->blocks_per_extent / KVG_RUN_BLOCKS;

	return !least_extents(request, need) && blocks_free_runs_anywhere(&space->blocks) >= need->runs + others;
}

/* ids: held ones, then runs stripe by stripe. */
static void take_blocks(struct sequence *sequence, const struct need *need, bool anywhere, uint32_t *ids)
{
	struct block_space *blocks = &sequence->space->blocks;
	struct block_owner *owner = &sequence->owner;

	if (anywhere) {
		blocks_take_runs_anywhere(blocks, owner, need->runs, ids + need->held);
		blocks_take_anywhere(blocks, owner, need->held, ids);
	} else {
		blocks_take(blocks, owner, META_HELD, need->held, 0, ids);
		blocks_take(blocks, owner, META_NURSERY, need->runs, 0, ids + need->held);
	}
}

/* To the rows, and to the worker's table. */
static void write_rows(struct sequence *sequence, const uint32_t *ids)
{
	struct space *space = sequence->space;
	const struct meta_row *rows = meta_rows(&space->part, sequence->slot);

	for (uint32_t row = 0; row < space->rows; row++) {
		size_t size = rows[row].held_blocks * sizeof(uint32_t);

		memcpy(meta_held(&space->part, sequence->slot, row), ids, size);
		memcpy(sequence_table_row(sequence, row), ids, size);
		ids += rows[row].held_blocks;
	}
	for (uint32_t s = 0; s < sequence->meta->stripes; s++, ids += space->rows)
		memcpy(meta_run(&space->part, sequence->slot, s), ids, space->rows * sizeof(uint32_t));
	sequence_publish_stripes(sequence, 0, sequence->meta->stripes);
}

static void fill(struct request *request, const struct need *need, bool anywhere)
{
	struct sequence *sequence = request->sequence;
	struct meta_seq *meta = sequence->meta;
	uint32_t *ids = malloc((need->held + need->runs + 1) * sizeof(uint32_t));

	meta->blocks = all_blocks(need);
	request->image = image_new(sequence, meta->image, true);
	if (!ids || !request->image) {
		meta->blocks = 0;
		request->image = image_free(request->image);
		free(ids);
		(void)snprintf(request->text, sizeof(request->text), "sequence %#" PRIx64 ": restore: out of memory",
			request->sqe.seq);
		refuse(request, -ENOMEM);
		return;
	}
	take_blocks(sequence, need, anywhere, ids);
	write_rows(sequence, ids);
	free(ids);
	__atomic_store_n(&meta->residency, META_RESTORING, __ATOMIC_RELEASE);
	promise_update(sequence);
	if (meta->image) {
		compute_copy(request, loaded);
	} else {
		request->job_status = 0;
		loaded(request);
	}
}

static void find_blocks(struct request *request)
{
	struct need need = need_of(request->sequence);
	uint32_t missing = missing_extents(request, &need), least;

	if (missing && request->grow_status >= 0) {
		request->grow_status = space_try_grow(request, missing, "the restore", find_blocks);
		if (request->grow_status >= 0)
			return;
		least = least_extents(request, &need);
		if (least && least < missing) {
			quota_forgive(&request->space->tenant->quota);
			if (space_try_grow(request, least, "the restore", find_blocks) >= 0)
				return;
		}
	}
	if (!missing || fits_anywhere(request, &need))
		fill(request, &need, missing > 0);
	else if (request->grow_status != -ENOSPC || !space_wait_memory(request, request->lack, find_blocks))
		refuse(request, request->grow_status);
}

/* What it was admitted with it is promised again. */
static void admit(struct request *request)
{
	struct sequence *sequence = request->sequence;
	struct meta_seq *meta = sequence->meta;
	int r = promise_admit(request->space, meta->admitted_before, "the sequence", request->text);

	if (r == -ENOSPC && space_wait_memory(request, promise_bytes(request->space, meta->admitted_before), admit))
		return;
	if (r < 0) {
		refuse(request, r);
		return;
	}
	meta->admitted = meta->admitted_before;
	promise_update(sequence);
	request->withheld = UINT32_MAX;
	request->grow_status = 0;
	find_blocks(request);
}

void restore_before(struct request *request, void (*then)(struct request *))
{
	request->restored = then;
	if (request->sequence->meta->residency == META_OFFLOADED)
		admit(request);
	else
		then(request);
}

static void finish(struct request *request)
{
	keep_update(request->sequence);
	sequence_publish(request->sequence);
	request_finish(request);
}

void op_restore(struct request *request)
{
	restore_before(request, finish);
}
