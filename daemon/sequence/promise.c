#include "daemon/sequence/promise.h"

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t extents_for(const struct space *space, uint64_t blocks)
{
	uint32_t each = space->arena->blocks_per_extent;

	return (blocks + each - 1) / each;
}

/* Whole extents for what the sequence was admitted with and does not have. */
static uint64_t right_of(const struct sequence *sequence)
{
	const struct meta_seq *meta = sequence->meta;
	uint64_t own = (uint64_t)sequence->owner.free_units[META_NURSERY] * KVG_RUN_BLOCKS +
		       sequence->owner.free_units[META_HELD] + meta->blocks;

	return meta->admitted > own ? extents_for(sequence->space, meta->admitted - own) : 0;
}

void promise_settle(struct space *space)
{
	uint64_t *promised = &space->part.worker->promised, rights = space->rights * space->arena->extent_size;

	if (*promised > rights) {
		quota_unpromise(&space->tenant->quota, *promised - rights);
		*promised = rights;
	}
}

uint64_t promise_bytes(const struct space *space, uint64_t blocks)
{
	return extents_for(space, blocks) * space->arena->extent_size;
}

int promise_admit(struct space *space, uint64_t blocks, const char *what, char text[QUOTA_TEXT])
{
	uint64_t bytes = promise_bytes(space, blocks);
	int r = bytes ? quota_promise(&space->tenant->quota, bytes, what, text) : 0;

	if (r >= 0)
		space->part.worker->promised += bytes;
	return r;
}

void promise_update(struct sequence *sequence)
{
	uint64_t right = right_of(sequence);

	sequence->space->rights += right - sequence->right;
	sequence->right = right;
	promise_settle(sequence->space);
}

void promise_forget(struct sequence *sequence)
{
	sequence->space->rights -= sequence->right;
	sequence->right = 0;
	promise_settle(sequence->space);
}

uint64_t promise_available(const struct sequence *sequence, uint64_t bytes)
{
	const struct space *space = sequence->space;
	uint64_t right = right_of(sequence) * space->arena->extent_size;

	return min_u64(bytes, min_u64(right, space->part.worker->promised));
}

void promise_drawn(struct space *space, uint64_t bytes)
{
	space->part.worker->promised -= bytes;
}

uint64_t promise_refund(struct space *space, uint64_t bytes)
{
	uint64_t *promised = &space->part.worker->promised, rights = space->rights * space->arena->extent_size;
	uint64_t back = rights > *promised ? min_u64(bytes, rights - *promised) : 0;

	*promised += back;
	return back;
}

void promise_end(struct space *space)
{
	quota_unpromise(&space->tenant->quota, space->part.worker->promised);
	space->part.worker->promised = 0;
	space->rights = 0;
}
