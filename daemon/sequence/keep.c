#include "daemon/sequence/keep.h"

#include "daemon/sequence/admission.h"
#include "daemon/sequence/compute.h"

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t extents_for(const struct space *space, uint64_t blocks)
{
	uint32_t each = space->arena->blocks_per_extent;

	return (blocks + each - 1) / each;
}

/* Tokens of the prompt that are not committed. */
static uint64_t unread(const struct sequence *sequence)
{
	const struct meta_seq *meta = sequence->meta;
	uint64_t total = (uint64_t)meta->policy.prefix_tokens + meta->policy.context_tokens;

	return total > meta->committed_pos ? total - meta->committed_pos : 0;
}

/* Tokens of the chunk that is being read, or comes next. */
static uint64_t chunk_tokens(const struct sequence *sequence)
{
	uint64_t rest = unread(sequence), chunk = sequence->meta->policy.chunk_tokens;

	return chunk && chunk < rest ? chunk : rest;
}

/* Blocks that the next chunk's tokens lack. */
static uint64_t chunk_blocks(const struct sequence *sequence)
{
	const struct meta_seq *meta = sequence->meta;
	uint64_t fresh = meta->committed_pos - meta->fold_pos + chunk_tokens(sequence), stripes = 0, have;

	if (fresh > sequence->min_slack)
		stripes = (fresh - sequence->min_slack + KVG_STRIPE_TOKENS - 1) / KVG_STRIPE_TOKENS;
	if (stripes <= meta->stripes)
		return 0;
	stripes = (stripes - meta->stripes) * sequence->space->rows;
	have = sequence->owner.free_units[META_NURSERY];
	return stripes > have ? (stripes - have) * KVG_RUN_BLOCKS : 0;
}

/* Blocks that the chunk's survivors will take beyond those that the sequence holds. */
static uint64_t room_blocks(const struct sequence *sequence)
{
	const struct meta_seq *meta = sequence->meta;
	uint32_t rows = sequence->space->rows;
	uint64_t held = meta->blocks - (uint64_t)meta->stripes * rows * KVG_RUN_BLOCKS, kept;
	struct kvg_policy policy = admission_behind(&meta->policy, meta->shared_pos);

	if (meta->policy.mode != KVG_MODE_CHUNKED || meta->policy.ratio >= 1)
		return 0;
	kept = admission_kept(&policy, rows, meta->committed_pos - meta->shared_pos + chunk_tokens(sequence));
	held += sequence->owner.free_units[META_HELD];
	return kept > held ? kept - held : 0;
}

static uint64_t wanted(const struct sequence *sequence)
{
	const struct space *space = sequence->space;
	uint64_t extents = 0;

	if (sequence->meta->idle)
		return 0;
	if (sequence->decodes)
		return sequence->right;
	if (!unread(sequence))
		return 0;
	if (sequence->meta->evictions)
		extents = extents_for(space, chunk_blocks(sequence));
	if (space->compute->creates_ahead)
		extents += extents_for(space, room_blocks(sequence));
	return min_u64(extents, sequence->right);
}

void keep_update(struct sequence *sequence)
{
	uint64_t now = wanted(sequence);

	sequence->space->wanted += now - sequence->wanted;
	sequence->wanted = now;
}

void keep_forget(struct sequence *sequence)
{
	sequence->space->wanted -= sequence->wanted;
	sequence->wanted = 0;
}

/* Of these rights, those that the promise does not cover. */
static uint64_t uncovered(const struct space *space, uint64_t rights)
{
	uint64_t promised = space->part.worker->promised / space->arena->extent_size;

	return rights > promised ? rights - promised : 0;
}

uint32_t keep_count(const struct space *space)
{
	return (uint32_t)min_u64(min_u64(space->wanted, uncovered(space, space->rights)), UINT32_MAX);
}

uint32_t keep_for_tails(const struct space *space)
{
	uint64_t tails = space->mappings ? space->most_tails : 0;

	return tails > space->blocks.shared.free_units[META_HELD] ? (uint32_t)extents_for(space, tails) : 0;
}

uint32_t keep_usable(const struct sequence *sequence)
{
	const struct space *space = sequence->space;
	uint64_t spare = space->blocks.spare_count, others = uncovered(space, space->rights - sequence->right);

	others = others < spare ? spare - others : 0;
	return (uint32_t)min_u64(spare, others > sequence->right ? others : sequence->right);
}

uint32_t keep_ahead(const struct sequence *sequence)
{
	const struct space *space = sequence->space;
	uint64_t extents = 0, usable = keep_usable(sequence);

	if (space->compute->creates_ahead && unread(sequence))
		extents = min_u64(extents_for(space, room_blocks(sequence)), sequence->right);
	extents = extents > usable ? extents - usable : 0;
	return (uint32_t)min_u64(extents, space->part.worker->promised / space->arena->extent_size);
}
