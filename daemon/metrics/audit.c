#include "daemon/metrics/audit.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "daemon/memory/pool.h"

/* The walk: the metadata as mapped, and what has been counted. */
struct walk {
	int fd;
	const uint8_t *base; /* the fixed part */
	const struct meta_header *header;
	const struct meta_tenant *tenants;
	const struct meta_worker *workers;
	const struct meta_extent *extents;
	const struct meta_context *contexts;
	uint32_t *context_refs;   /* by context: sequences and contexts that name it */
	uint32_t *context_extent; /* by context: the first of its extents, and */
	uint32_t *next_extent;    /* by extent: the next of the same context's; SLOT_NONE ends */
	const struct meta_frame *frames;
	uint8_t *seen_frames;            /* that objects refer to */
	uint8_t *seen;                   /* bitmaps of blocks that rows refer to */
	uint32_t *extent_of_slot;        /* of one worker at a time */
	uint64_t *promised, *unreturned; /* by tenant */
	struct audit *audit;
};

static void __attribute__((format(printf, 2, 3))) differ(struct walk *walk, const char *format, ...)
{
	struct audit *audit = walk->audit;
	va_list arguments;

	if (audit->difference_count < AUDIT_DIFFERENCES) {
		va_start(arguments, format);
		(void)vsnprintf(audit->differences[audit->difference_count], AUDIT_TEXT, format, arguments);
		va_end(arguments);
	}
	audit->difference_count++;
}

static void expect(struct walk *walk, const char *object, const char *what, uint64_t counted, uint64_t said)
{
	if (counted != said)
		differ(walk, "%s: %s counted %" PRIu64 ", the account says %" PRIu64, object, what, counted, said);
}

static const uint8_t *bitmap(const struct walk *walk, uint32_t extent)
{
	return walk->base + walk->header->bitmaps_offset + extent * walk->header->bitmap_size;
}

/* Memory of a tenant's min that nobody uses: it is there, and not charged. */
static void count_raw(struct walk *walk, uint32_t index, audit_physical physical, void *user)
{
	const struct meta_extent *extent = &walk->extents[index];
	struct audit_row *row = &walk->audit->rows[extent->tenant];
	uint64_t bytes = physical(user, index);
	char object[64];

	row->reserved += extent->bytes;
	row->physical += bytes;
	(void)snprintf(object, sizeof(object), "raw extent %u", index);
	expect(walk, object, "bytes of memory", bytes, extent->bytes);
}

static void count_extent(struct walk *walk, uint32_t index, audit_physical physical, void *user)
{
	const struct meta_extent *extent = &walk->extents[index];
	struct audit_row *row = &walk->audit->rows[extent->tenant];
	uint64_t used = 0, bytes;
	char object[64];

	if (extent->state == META_RAW) {
		count_raw(walk, index, physical, user);
		return;
	}
	row->extents++;
	row->extent_bytes += extent->bytes;
	if (extent->state == META_DROPPED)
		walk->unreturned[extent->tenant] += extent->bytes;
	if (extent->state != META_LIVE) {
		row->physical += extent->bytes;
		return;
	}
	bytes = physical(user, index);
	row->physical += bytes;
	(void)snprintf(object, sizeof(object), "extent %u", index);
	expect(walk, object, "bytes of memory", bytes, extent->bytes);
	for (uint64_t i = 0; i < walk->header->bitmap_size; i++)
		used += (unsigned)__builtin_popcount(bitmap(walk, index)[i]);
	expect(walk, object, "blocks in its bitmap", used, extent->used);
}

/* A block that a row refers to: its extent is the owner's and alive, and no other row refers to it. */
static void see_block(struct walk *walk, const char *owner, uint64_t number, uint32_t ids_per_extent, uint32_t id)
{
	uint32_t slot = id / ids_per_extent, block = id % ids_per_extent;
	uint32_t index = slot < walk->header->extent_count ? walk->extent_of_slot[slot] : SLOT_NONE;
	uint8_t *byte, mask = (uint8_t)(1u << block % 8);

	if (index == SLOT_NONE || block >= walk->extents[index].blocks) {
		differ(walk, "%s %" PRIu64 ": a row refers to block %u, of which there is no extent", owner, number,
			id);
		return;
	}
	byte = &walk->seen[index * walk->header->bitmap_size + block / 8];
	if (*byte & mask)
		differ(walk, "%s %" PRIu64 ": two rows refer to block %u", owner, number, id);
	*byte |= mask;
	walk->audit->rows[walk->extents[index].tenant].blocks++;
}

/* A chain of frames, all of one tenant, which no other object refers to. Returns its bytes. */
static uint64_t see_chain(struct walk *walk, const char *object, uint32_t tenant, uint32_t first)
{
	const struct meta_header *header = walk->header;
	uint64_t count = 0;

	for (uint32_t at = first; at; at = walk->frames[at - 1].next, count++) {
		if (at > header->frame_count || walk->frames[at - 1].tenant != tenant + 1) {
			differ(walk, "%s: frame %u of the host tier is not its tenant's", object, at - 1);
			break;
		}
		if (walk->seen_frames[at - 1]) {
			differ(walk, "%s: frame %u of the host tier is another object's, too", object, at - 1);
			break;
		}
		walk->seen_frames[at - 1] = 1;
	}
	return count * header->frame_size;
}

/* Entries of the contexts' table that may be in use. */
static uint32_t walk_contexts(const struct walk *walk)
{
	return walk->header->context_count < META_MAX_CONTEXTS ? walk->header->context_count : META_MAX_CONTEXTS;
}

struct sequence_walk {
	struct walk *walk;
	uint32_t worker, slot, ids_per_extent;
	struct meta_seq seq;
	struct meta_row *rows; /* buffers of the worker */
	uint32_t *ids;         /* [max(row_cap, rows)] */
};

/*
 * A worker's part is read, not mapped: it is mostly holes, and looking at a hole of shared memory
 * through a mapping would fill it.
 */
static bool read_part(const struct walk *walk, uint64_t offset, void *to, uint64_t size)
{
	return pread(walk->fd, to, size, (off_t)offset) == (ssize_t)size;
}

static uint64_t see_row(const struct sequence_walk *at, uint32_t row, uint64_t *pairs)
{
	const struct meta_worker *worker = &at->walk->workers[at->worker];
	const struct meta_row *meta = &at->rows[row];
	uint64_t index = (uint64_t)at->slot * worker->layers * worker->heads + row;
	uint32_t blocks = meta->held_blocks + meta->pending;

	*pairs += meta->base_len;
	if (at->seq.residency == META_OFFLOADED)
		return 0;
	if (blocks > worker->row_cap || meta->held_len > blocks * KVG_BLOCK_TOKENS ||
		!read_part(at->walk, worker->held_offset + index * worker->row_cap * sizeof(uint32_t), at->ids,
			blocks * sizeof(uint32_t))) {
		differ(at->walk,
			"worker %" PRIu64 ", sequence slot %u, row %u: %u pairs in %u blocks, room for %u blocks",
			worker->id, at->slot, row, meta->held_len, blocks, worker->row_cap);
		return 0;
	}
	for (uint32_t i = 0; i < blocks; i++)
		see_block(at->walk, "worker", worker->id, at->ids_per_extent, at->ids[i]);
	return blocks;
}

static uint64_t see_stripes(const struct sequence_walk *at)
{
	const struct meta_worker *worker = &at->walk->workers[at->worker];
	uint32_t rows = worker->layers * worker->heads;
	uint64_t blocks = 0;

	for (uint32_t s = at->seq.stripe_first; at->seq.residency != META_OFFLOADED && s < at->seq.stripes; s++) {
		uint64_t index = ((uint64_t)at->slot * worker->stripe_cap + s) * rows;

		if (!read_part(
			    at->walk, worker->runs_offset + index * sizeof(uint32_t), at->ids, rows * sizeof(uint32_t)))
			continue;
		for (uint32_t i = 0; i < rows * KVG_RUN_BLOCKS; i++)
			see_block(at->walk, "worker", worker->id, at->ids_per_extent,
				at->ids[i / KVG_RUN_BLOCKS] + i % KVG_RUN_BLOCKS);
		blocks += (uint64_t)rows * KVG_RUN_BLOCKS;
	}
	return blocks;
}

/* Blocks that a relocation under way has taken and not yet put in a row. */
static uint64_t see_relocation(const struct sequence_walk *at, uint32_t record)
{
	const struct meta_worker *worker = &at->walk->workers[at->worker];
	uint64_t begin = worker->redo_offset + record * worker->redo_size;
	uint64_t offset = begin + sizeof(struct meta_redo) +
			  (uint64_t)worker->layers * worker->heads * sizeof(struct meta_redo_row);
	struct meta_redo redo;
	struct meta_move move;

	if (!read_part(at->walk, begin, &redo, sizeof(redo)) || redo.state == META_REDO_NONE ||
		redo.kind != META_REDO_RELOCATE || redo.seq != at->slot)
		return 0;
	for (uint32_t i = 0; i < redo.move_count; i++)
		if (read_part(at->walk, offset + i * sizeof(move), &move, sizeof(move)))
			see_block(at->walk, "worker", worker->id, at->ids_per_extent, move.dst);
	return redo.move_count;
}

/* What it has on the host, and that it has no more than its state says. */
static void see_host(const struct sequence_walk *at, const char *object)
{
	uint32_t tenant = at->walk->workers[at->worker].tenant;
	uint64_t retained;

	if (at->seq.residency == META_RESIDENT && at->seq.image)
		differ(at->walk, "%s: it is resident and has an image", object);
	expect(at->walk, object, "bytes of its image", see_chain(at->walk, object, tenant, at->seq.image),
		at->seq.image_bytes);
	retained = see_chain(at->walk, object, tenant, at->seq.retained);
	if (at->seq.retained_bytes > retained)
		differ(at->walk, "%s: %" PRIu64 " bytes retained in frames of %" PRIu64, object, at->seq.retained_bytes,
			retained);
}

static void see_sequence(const struct sequence_walk *at)
{
	const struct meta_worker *worker = &at->walk->workers[at->worker];
	uint32_t rows = worker->layers * worker->heads;
	uint64_t blocks, pairs = 0;
	char object[96];

	(void)snprintf(object, sizeof(object), "worker %" PRIu64 ", sequence slot %u", worker->id, at->slot);
	if (at->seq.stripe_first > at->seq.stripes || at->seq.stripes > worker->stripe_cap) {
		differ(at->walk, "%s: stripes %u to %u of %u", object, at->seq.stripe_first, at->seq.stripes,
			worker->stripe_cap);
		return;
	}
	if (at->seq.context > walk_contexts(at->walk) ||
		(at->seq.context && at->walk->contexts[at->seq.context - 1].tenant != worker->tenant))
		differ(at->walk, "%s: begins with context %u, which is not its tenant's", object, at->seq.context - 1);
	else if (at->seq.context)
		at->walk->context_refs[at->seq.context - 1]++;
	blocks = see_stripes(at);
	for (uint32_t i = 0; i < META_RECORDS; i++)
		blocks += see_relocation(at, i);
	if (!read_part(at->walk, worker->rows_offset + (uint64_t)at->slot * rows * sizeof(struct meta_row), at->rows,
		    rows * sizeof(struct meta_row)))
		differ(at->walk, "%s: its rows cannot be read", object);
	for (uint32_t row = 0; row < rows; row++)
		blocks += see_row(at, row, &pairs);
	expect(at->walk, object, "blocks", blocks, at->seq.blocks);
	expect(at->walk, object, "pairs", pairs, at->seq.pairs);
	see_host(at, object);
}

/* The first slot from `slot` on whose entry may hold something. */
static uint32_t skip_hole(const struct walk *walk, const struct meta_worker *worker, uint32_t slot)
{
	uint64_t offset = worker->seqs_offset + (uint64_t)slot * sizeof(struct meta_seq);
	off_t data = lseek(walk->fd, (off_t)offset, SEEK_DATA);

	if (data < 0)
		return worker->max_sequences;
	return (uint64_t)data <= offset ? slot
					: (uint32_t)(((uint64_t)data - worker->seqs_offset) / sizeof(struct meta_seq));
}

static void see_sequences(struct walk *walk, uint32_t index, struct meta_row *rows, uint32_t *ids)
{
	const struct meta_worker *worker = &walk->workers[index];
	size_t extent_size = arena_extent_size(walk->header->extent_size, worker->stride, walk->header->granularity);
	struct sequence_walk at = {.walk = walk,
		.worker = index,
		.ids_per_extent = (uint32_t)(extent_size / worker->stride),
		.rows = rows,
		.ids = ids};

	for (at.slot = skip_hole(walk, worker, 0); at.slot < worker->max_sequences;
		at.slot = skip_hole(walk, worker, at.slot + 1)) {
		uint64_t offset = worker->seqs_offset + (uint64_t)at.slot * sizeof(at.seq);

		if (read_part(walk, offset, &at.seq, sizeof(at.seq)) && at.seq.epoch)
			see_sequence(&at);
	}
}

/* ---- contexts ---- */

/* Rows and ids of a context, whose extents extent_of_slot has. */
static void see_rows(
	struct walk *walk, const struct meta_context *context, const struct meta_context_row *rows, const uint32_t *ids)
{
	size_t extent_size = arena_extent_size(walk->header->extent_size, context->stride, walk->header->granularity);
	uint32_t each = (uint32_t)(extent_size / context->stride);
	uint64_t blocks = 0;
	char object[96];

	(void)snprintf(object, sizeof(object), "context %" PRIu64, context->id);
	for (uint32_t row = 0; row < context->rows; row++) {
		const struct meta_context_row *at = &rows[row];

		if (at->first > context->ids || at->blocks > context->ids - at->first) {
			differ(walk, "%s, row %u: %u blocks from %u, there are %u ids", object, row, at->blocks,
				at->first, context->ids);
			return;
		}
		for (uint32_t i = 0; i < at->blocks; i++)
			see_block(walk, "context", context->id, each, ids[at->first + i]);
		if (at->tail && context->worker == META_NO_WORKER)
			see_block(walk, "context", context->id, each, at->tail_block);
		blocks += at->blocks + (at->tail > 0);
	}
	if (context->state == META_CONTEXT_SEALED)
		expect(walk, object, "blocks", blocks, context->blocks);
}

/* Its image, and that it has no more than its state says. Returns whether its rows name blocks. */
static bool see_context_host(struct walk *walk, const struct meta_context *context)
{
	bool nowhere =
		context->residency == META_OFFLOADED || (context->residency == META_RESTORING && !context->blocks);
	char object[96];

	(void)snprintf(object, sizeof(object), "context %" PRIu64, context->id);
	if (context->residency == META_RESIDENT && context->image)
		differ(walk, "%s: it is on the device and has an image", object);
	expect(walk, object, "bytes of its image", see_chain(walk, object, context->tenant, context->image),
		context->image_bytes);
	if (nowhere)
		expect(walk, object, "blocks", 0, context->blocks);
	return !nowhere;
}

static void see_context(struct walk *walk, const struct meta_context *context)
{
	uint64_t rows_size = context->rows * sizeof(struct meta_context_row);
	uint8_t *part = malloc(context->size + 1);

	if (part && rows_size + context->ids * sizeof(uint32_t) <= context->size &&
		read_part(walk, context->offset, part, context->size))
		see_rows(walk, context, (const void *)part, (const void *)(part + rows_size));
	else
		differ(walk, "context %" PRIu64 ": its rows cannot be read", context->id);
	free(part);
}

/* Published ones have extents of their own. */
static void see_published(struct walk *walk, uint32_t index)
{
	uint32_t first = walk->context_extent[index];

	for (uint32_t i = first; i != SLOT_NONE; i = walk->next_extent[i])
		walk->extent_of_slot[walk->extents[i].slot] = i;
	if (see_context_host(walk, &walk->contexts[index]))
		see_context(walk, &walk->contexts[index]);
	for (uint32_t i = first; i != SLOT_NONE; i = walk->next_extent[i])
		walk->extent_of_slot[walk->extents[i].slot] = SLOT_NONE;
}

/* Extents that no worker has are a context's of the same tenant. */
static void list_context_extents(struct walk *walk)
{
	for (uint32_t i = 0; i < walk_contexts(walk); i++)
		walk->context_extent[i] = SLOT_NONE;
	for (uint32_t i = 0; i < walk->header->extent_count; i++) {
		const struct meta_extent *extent = &walk->extents[i];
		uint32_t owner = extent->owner;

		if (extent->state != META_LIVE || extent->worker != META_NO_WORKER)
			continue;
		if (!owner || owner > walk_contexts(walk) || !walk->contexts[owner - 1].id ||
			walk->contexts[owner - 1].tenant != extent->tenant) {
			differ(walk, "extent %u: belongs to no worker and no context", i);
			continue;
		}
		walk->next_extent[i] = walk->context_extent[owner - 1];
		walk->context_extent[owner - 1] = i;
	}
}

static void see_all_published(struct walk *walk)
{
	list_context_extents(walk);
	for (uint32_t i = 0; i < walk->header->extent_count; i++)
		walk->extent_of_slot[i] = SLOT_NONE;
	for (uint32_t i = 0; i < walk_contexts(walk); i++) {
		const struct meta_context *context = &walk->contexts[i];

		if (!context->id)
			continue;
		if (context->parent && context->parent <= walk_contexts(walk))
			walk->context_refs[context->parent - 1]++;
		if (context->worker == META_NO_WORKER && context->state != META_CONTEXT_ENDING)
			see_published(walk, i);
	}
}

static void compare_references(struct walk *walk)
{
	for (uint32_t i = 0; i < walk_contexts(walk); i++) {
		char object[64];

		if (!walk->contexts[i].id)
			continue;
		(void)snprintf(object, sizeof(object), "context %" PRIu64, walk->contexts[i].id);
		expect(walk, object, "references", walk->context_refs[i], walk->contexts[i].refs);
	}
}

/* ---- workers ---- */

static void see_worker(struct walk *walk, uint32_t index)
{
	const struct meta_worker *worker = &walk->workers[index];
	uint32_t count = worker->layers * worker->heads, most = count > worker->row_cap ? count : worker->row_cap;
	struct meta_row *rows = calloc(count, sizeof(*rows));
	uint32_t *ids = calloc(most, sizeof(*ids));

	for (uint32_t i = 0; i < walk->header->extent_count; i++)
		walk->extent_of_slot[i] = SLOT_NONE;
	for (uint32_t i = 0; i < walk->header->extent_count; i++)
		if (walk->extents[i].state == META_LIVE && walk->extents[i].worker == index)
			walk->extent_of_slot[walk->extents[i].slot] = i;
	walk->promised[worker->tenant] += worker->promised;
	for (uint32_t i = 0; i < walk_contexts(walk); i++)
		if (walk->contexts[i].id && walk->contexts[i].worker == index)
			see_context(walk, &walk->contexts[i]);
	if (rows && ids)
		see_sequences(walk, index, rows, ids);
	else
		differ(walk, "worker %" PRIu64 ": no memory to read its rows", worker->id);
	free(rows);
	free(ids);
}

/* Every block in use belongs to a row, and no row has a block that is free. */
static void compare_bitmaps(struct walk *walk)
{
	uint64_t size = walk->header->bitmap_size;

	for (uint32_t i = 0; i < walk->header->extent_count; i++)
		if (walk->extents[i].state == META_LIVE && memcmp(bitmap(walk, i), walk->seen + i * size, size) != 0)
			differ(walk, "extent %u: its bitmap and the rows that refer to it differ", i);
}

/* What is raw is of min, and no more than that leaves. */
static void compare_reserve(struct walk *walk, const struct audit_row *row, const struct quota_account *account)
{
	if (row->reserved && (account->charged > account->min || row->reserved > account->min - account->charged))
		differ(walk, "%s: %" PRIu64 " bytes raw and %" PRIu64 " charged, of a min of %" PRIu64, row->tenant,
			row->reserved, account->charged, account->min);
}

/* What the pool has given away: of each tenant its min, or its use if that is more. */
static void compare_committed(struct walk *walk)
{
	uint64_t device = 0, host = 0;

	for (uint32_t i = 0; i < walk->header->tenant_count; i++) {
		const struct quota_account *account = &walk->tenants[i].account, *on_host = &walk->tenants[i].host;

		device += account->min > quota_use(account) ? account->min : quota_use(account);
		host += on_host->min > quota_use(on_host) ? on_host->min : quota_use(on_host);
	}
	expect(walk, "pool", "bytes committed", device, walk->header->pool.committed);
	expect(walk, "pool", "bytes of the host committed", host, walk->header->host.committed);
}

/* Every frame in use belongs to an object, and to an account. */
static void compare_frames(struct walk *walk)
{
	uint32_t size = walk->header->frame_size;

	for (uint32_t i = 0; i < walk->header->frame_count; i++) {
		if (!walk->frames[i].tenant)
			continue;
		walk->audit->rows[walk->frames[i].tenant - 1].host_counted += size;
		if (!walk->seen_frames[i])
			differ(walk, "frame %u of the host tier: nothing refers to it", i);
	}
}

static void compare_host(struct walk *walk)
{
	uint64_t charged = 0;

	for (uint32_t i = 0; i < walk->header->tenant_count; i++) {
		struct audit_row *row = &walk->audit->rows[i];

		row->host_charged = walk->tenants[i].host.charged;
		expect(walk, row->tenant, "bytes charged on the host", row->host_counted, row->host_charged);
		charged += row->host_counted;
	}
	expect(walk, "host", "bytes charged", charged, walk->header->host.charged);
}

static void compare_accounts(struct walk *walk)
{
	const struct quota_account *pool = &walk->header->pool;
	uint64_t charged = 0, promised = 0, unreturned = 0;

	for (uint32_t i = 0; i < walk->header->tenant_count; i++) {
		const struct quota_account *account = &walk->tenants[i].account;
		struct audit_row *row = &walk->audit->rows[i];

		(void)snprintf(row->tenant, sizeof(row->tenant), "%s", walk->tenants[i].name);
		row->charged = account->charged;
		expect(walk, row->tenant, "bytes charged", row->extent_bytes, account->charged);
		expect(walk, row->tenant, "bytes promised", walk->promised[i], account->promised);
		expect(walk, row->tenant, "bytes unreturned", walk->unreturned[i], account->unreturned);
		compare_reserve(walk, row, account);
		charged += row->extent_bytes;
		promised += walk->promised[i];
		unreturned += walk->unreturned[i];
	}
	expect(walk, "pool", "bytes charged", charged, pool->charged);
	expect(walk, "pool", "bytes promised", promised, pool->promised);
	expect(walk, "pool", "bytes unreturned", unreturned, pool->unreturned);
}

static int walk_init(struct walk *walk, int fd, const uint8_t *base, struct audit *audit)
{
	walk->fd = fd;
	walk->base = base;
	walk->header = (const void *)base;
	walk->tenants = (const void *)(base + walk->header->tenants_offset);
	walk->workers = (const void *)(base + walk->header->workers_offset);
	walk->extents = (const void *)(base + walk->header->extents_offset);
	walk->frames = (const void *)(base + walk->header->frames_offset);
	walk->seen_frames = calloc((size_t)walk->header->frame_count + 1, 1);
	walk->contexts = (const void *)(base + walk->header->contexts_offset);
	walk->audit = audit;
	walk->context_refs = calloc(walk_contexts(walk) + 1, sizeof(uint32_t));
	walk->context_extent = calloc(walk_contexts(walk) + 1, sizeof(uint32_t));
	walk->next_extent = calloc(walk->header->extent_count, sizeof(uint32_t));
	walk->seen = calloc(walk->header->extent_count, walk->header->bitmap_size);
	walk->extent_of_slot = calloc(walk->header->extent_count, sizeof(uint32_t));
	walk->promised = calloc(META_MAX_TENANTS, sizeof(uint64_t));
	walk->unreturned = calloc(META_MAX_TENANTS, sizeof(uint64_t));
	audit->row_count = walk->header->tenant_count;
	audit->rows = calloc(audit->row_count + 1, sizeof(struct audit_row));
	audit->differences = calloc(AUDIT_DIFFERENCES, AUDIT_TEXT);
	return walk->context_refs && walk->context_extent && walk->next_extent && walk->seen && walk->seen_frames &&
			       walk->extent_of_slot && walk->promised && walk->unreturned && audit->rows &&
			       audit->differences
		       ? 0
		       : -ENOMEM;
}

static void walk_all(struct walk *walk, audit_physical physical, void *user)
{
	for (uint32_t i = 0; i < walk->header->extent_count; i++)
		if (walk->extents[i].state != META_EMPTY)
			count_extent(walk, i, physical, user);
	see_all_published(walk);
	for (uint32_t i = 0; i < META_MAX_WORKERS; i++)
		if (walk->workers[i].id)
			see_worker(walk, i);
	compare_references(walk);
	compare_bitmaps(walk);
	compare_frames(walk);
	compare_accounts(walk);
	compare_committed(walk);
	compare_host(walk);
}

int audit_run(int meta_fd, audit_physical physical, void *user, struct audit *ret)
{
	struct walk walk = {0};
	struct audit audit = {0};
	struct meta_header header;
	ssize_t n = pread(meta_fd, &header, sizeof(header), 0);
	uint8_t *base;
	int r;

	if (n < 0)
		return -errno;
	if (n != sizeof(header) || header.magic != META_MAGIC || header.granularity == 0)
		return -EBADMSG;
	base = mmap(NULL, header.fixed_size, PROT_READ, MAP_SHARED | MAP_NORESERVE, meta_fd, 0);
	if (base == MAP_FAILED)
		return -errno;
	r = walk_init(&walk, meta_fd, base, &audit);
	if (r >= 0)
		walk_all(&walk, physical, user);
	free(walk.context_refs);
	free(walk.context_extent);
	free(walk.next_extent);
	free(walk.seen);
	free(walk.seen_frames);
	free(walk.extent_of_slot);
	free(walk.promised);
	free(walk.unreturned);
	(void)munmap(base, header.fixed_size);
	if (r < 0)
		audit_deinit(&audit);
	else
		*ret = audit;
	return r;
}

void audit_deinit(struct audit *audit)
{
	free(audit->rows);
	free(audit->differences);
	*audit = (struct audit){0};
}
