#include "daemon/memory/meta.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/frame.h"

#define PAGE     4096u
#define PART_MAX ((uint64_t)1 << 40) /* bytes of one worker's tables, sparse */

static uint64_t page_up(uint64_t size)
{
	return (size + PAGE - 1) & ~(uint64_t)(PAGE - 1);
}

/* Takes `size` bytes at *offset, page-aligned. */
static uint64_t take(uint64_t *offset, uint64_t size)
{
	uint64_t at = *offset;

	*offset = page_up(at + size);
	return at;
}

/*
 * Blocks of the largest extent, see arena_extent_size(). One that is larger than the pool's extent size has at most
 * granularity / gcd runs, where gcd, of the granularity and a unit of 8 blocks of K and V, is at least 512.
 */
static uint64_t most_blocks(uint64_t extent_size, uint64_t granularity)
{
	uint64_t fitting = extent_size / (2 * META_MIN_STRIDE), rounded = granularity / 512 * KVG_RUN_BLOCKS;

	return fitting > rounded ? fitting : rounded;
}

static void plan_fixed(struct meta_header *header, uint64_t pool_size, uint64_t extent_size, uint32_t granularity)
{
	uint64_t offset = page_up(sizeof(*header));
	uint64_t blocks = most_blocks(extent_size, granularity);

	*header = (struct meta_header){.magic = META_MAGIC,
		.version = META_VERSION,
		.extent_size = extent_size,
		.pool_size = pool_size,
		.granularity = granularity};
	header->extent_count = (uint32_t)(pool_size / extent_size);
	header->bitmap_size = (blocks + 63) / 64 * 8;
	header->places_size = page_up(blocks * KVG_BLOCK_TOKENS * sizeof(struct meta_place));
	header->tenants_offset = take(&offset, META_MAX_TENANTS * sizeof(struct meta_tenant));
	header->workers_offset = take(&offset, META_MAX_WORKERS * sizeof(struct meta_worker));
	header->extents_offset = take(&offset, header->extent_count * sizeof(struct meta_extent));
	header->contexts_offset = take(&offset, META_MAX_CONTEXTS * sizeof(struct meta_context));
	header->bitmaps_offset = take(&offset, header->extent_count * header->bitmap_size);
	header->places_offset = take(&offset, header->extent_count * header->places_size);
	header->fixed_size = offset;
}

int meta_new(uint64_t pool_size, uint64_t extent_size, uint32_t granularity, struct meta **ret)
{
	struct meta *meta = calloc(1, sizeof(*meta));
	struct meta_header header;
	uint8_t *base;

	if (!meta)
		return -ENOMEM;
	list_init(&meta->ranges);
	meta->free_contexts = malloc(META_MAX_CONTEXTS * sizeof(uint32_t));
	if (!meta->free_contexts) {
		free(meta);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < META_MAX_CONTEXTS; i++)
		meta->free_contexts[i] = META_MAX_CONTEXTS - 1 - i;
	meta->free_context_count = META_MAX_CONTEXTS;
	plan_fixed(&header, pool_size, extent_size, granularity);
	meta->fd = memfd_create("kvgate-meta", MFD_CLOEXEC);
	if (meta->fd < 0 || ftruncate(meta->fd, (off_t)header.fixed_size) < 0)
		goto fail;
	base = mmap(NULL, header.fixed_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, meta->fd, 0);
	if (base == MAP_FAILED)
		goto fail;
	meta->header = (struct meta_header *)(void *)base;
	meta->mapped = header.fixed_size;
	*meta->header = header;
	meta->tenants = (struct meta_tenant *)(void *)(base + header.tenants_offset);
	meta->workers = (struct meta_worker *)(void *)(base + header.workers_offset);
	meta->extents = (struct meta_extent *)(void *)(base + header.extents_offset);
	meta->contexts = (struct meta_context *)(void *)(base + header.contexts_offset);
	*ret = meta;
	return 0;
fail:;
	int error = errno;

	if (meta->fd >= 0)
		(void)close(meta->fd);
	free(meta->free_contexts);
	free(meta);
	return -error;
}

struct meta *meta_free(struct meta *meta)
{
	if (!meta)
		return NULL;
	if (meta->frames)
		(void)munmap(meta->frames, meta->header->fixed_size - meta->mapped);
	(void)munmap(meta->header, meta->mapped);
	(void)close(meta->fd);
	free(meta->free_contexts);
	free(meta);
	return NULL;
}

int meta_add_frames(struct meta *meta, uint32_t count, uint32_t frame_size)
{
	uint64_t size = page_up(count * sizeof(struct meta_frame));
	void *base;

	assert(!meta->frames && meta->header->fixed_size == meta->mapped);
	if (ftruncate(meta->fd, (off_t)(meta->mapped + size)) < 0)
		return -errno;
	base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, meta->fd, (off_t)meta->mapped);
	if (base == MAP_FAILED)
		return -errno;
	meta->frames = base;
	meta->header->frames_offset = meta->mapped;
	meta->header->frame_count = count;
	meta->header->frame_size = frame_size;
	meta->header->fixed_size += size;
	return 0;
}

uint8_t *meta_bitmap(const struct meta *meta, uint32_t extent)
{
	return (uint8_t *)meta->header + meta->header->bitmaps_offset + extent * meta->header->bitmap_size;
}

struct meta_place *meta_places(const struct meta *meta, uint32_t extent)
{
	uint8_t *base = (uint8_t *)meta->header + meta->header->places_offset + extent * meta->header->places_size;

	return (struct meta_place *)(void *)base;
}

static void punch(const struct meta *meta, uint64_t begin, uint64_t end)
{
	begin = page_up(begin);
	end &= ~(uint64_t)(PAGE - 1);
	if (begin < end)
		(void)fallocate(
			meta->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)begin, (off_t)(end - begin));
}

/* Where that fails, faults do it. */
void meta_populate_places(const struct meta *meta, uint32_t extent, uint32_t blocks)
{
	uint64_t size = blocks * KVG_BLOCK_TOKENS * sizeof(struct meta_place);

	if (size > meta->header->places_size)
		size = meta->header->places_size;
	(void)madvise(meta_places(meta, extent), size, MADV_POPULATE_WRITE);
}

void meta_forget_places(const struct meta *meta, uint32_t extent)
{
	uint64_t begin = meta->header->places_offset + extent * meta->header->places_size;

	punch(meta, begin, begin + meta->header->places_size);
}

/* Lays a worker's tables out from offset 0; the caller moves them to their range. */
static void plan_part(struct meta_worker *worker, const struct kvg_layout *layout, uint32_t row_cap)
{
	const struct kvg_group *group = &layout->groups[0];
	uint64_t rows = (uint64_t)group->layers * group->head_count, n = layout->max_sequences, offset = 0;

	worker->layout = *layout;
	worker->layers = group->layers;
	worker->heads = group->head_count;
	worker->max_sequences = layout->max_sequences;
	worker->row_cap = row_cap;
	worker->stripe_cap = row_cap / KVG_RUN_BLOCKS;
	worker->move_cap = (uint32_t)(rows * KVG_STRIPE_TOKENS) + row_cap * KVG_BLOCK_TOKENS;
	worker->seqs_offset = take(&offset, n * sizeof(struct meta_seq));
	worker->rows_offset = take(&offset, n * rows * sizeof(struct meta_row));
	worker->scored_offset = take(&offset, n * worker->layers * sizeof(uint32_t));
	worker->held_offset = take(&offset, n * rows * row_cap * sizeof(uint32_t));
	worker->runs_offset = take(&offset, n * worker->stripe_cap * rows * sizeof(uint32_t));
	worker->redo_size = sizeof(struct meta_redo) + rows * sizeof(struct meta_redo_row) +
			    worker->move_cap * (sizeof(struct meta_move) + sizeof(struct meta_relocation));
	worker->redo_size = (worker->redo_size + PAGE - 1) / PAGE * PAGE;
	worker->redo_offset = take(&offset, META_RECORDS * worker->redo_size);
	worker->size = offset;
}

/* ---- ranges ---- */

static void range_free(struct meta *meta, struct meta_range *range)
{
	punch(meta, range->offset, range->offset + range->size);
	list_remove(&range->node);
	free(range);
}

/* The lowest range of `size` bytes, a whole number of pages, after the fixed part that no part has; NULL: no memory. */
static struct meta_range *range_new(struct meta *meta, uint64_t size)
{
	struct meta_range *range = malloc(sizeof(*range));
	uint64_t at = meta->header->fixed_size;
	struct list *node = meta->ranges.next;

	for (; range && node != &meta->ranges; node = node->next) {
		const struct meta_range *other = list_entry(node, struct meta_range, node);

		if (at + size <= other->offset)
			break;
		at = other->offset + other->size;
	}
	if (!range)
		return NULL;
	*range = (struct meta_range){.offset = at, .size = size};
	list_insert_before(node, &range->node);
	return range;
}

/* Maps a range, for which the file grows. NULL with errno. */
static void *range_map(const struct meta *meta, const struct meta_range *range)
{
	uint64_t end = range->offset + range->size;
	struct stat st;
	void *base;

	if (fstat(meta->fd, &st) < 0 || ((uint64_t)st.st_size < end && ftruncate(meta->fd, (off_t)end) < 0))
		return NULL;
	base = mmap(
		NULL, range->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, meta->fd, (off_t)range->offset);
	return base == MAP_FAILED ? NULL : base;
}

/* ---- workers ---- */

static void place_part(struct meta_worker *worker, uint64_t at)
{
	worker->offset = at;
	worker->seqs_offset += at;
	worker->rows_offset += at;
	worker->scored_offset += at;
	worker->held_offset += at;
	worker->runs_offset += at;
	worker->redo_offset += at;
}

static void point_part(struct meta_part *part)
{
	const struct meta_worker *worker = part->worker;
	uint8_t *base = part->base;
	uint64_t rows = (uint64_t)worker->layers * worker->heads;

	part->seqs = (void *)(base + (worker->seqs_offset - worker->offset));
	part->rows = (void *)(base + (worker->rows_offset - worker->offset));
	part->scored = (void *)(base + (worker->scored_offset - worker->offset));
	part->held = (void *)(base + (worker->held_offset - worker->offset));
	part->runs = (void *)(base + (worker->runs_offset - worker->offset));
	for (uint32_t i = 0; i < META_RECORDS; i++) {
		struct meta_record *record = &part->records[i];

		record->redo = (void *)(base + (worker->redo_offset - worker->offset) + i * worker->redo_size);
		record->rows = (void *)(record->redo + 1);
		record->moves = (void *)(record->rows + rows);
		record->relocations = (void *)(record->moves + worker->move_cap);
	}
}

static struct meta_worker *free_worker(struct meta *meta)
{
	for (uint32_t i = 0; i < META_MAX_WORKERS; i++)
		if (!meta->workers[i].id)
			return &meta->workers[i];
	return NULL;
}

int meta_part_new(struct meta *meta, const struct kvg_layout *layout, uint32_t row_cap, struct meta_part *ret)
{
	struct meta_worker *entry = free_worker(meta), plan = {0};
	struct meta_part part;

	if (!entry)
		return -EUSERS;
	plan_part(&plan, layout, row_cap);
	if (plan.size > PART_MAX)
		return -EFBIG;
	part.range = range_new(meta, plan.size);
	if (!part.range)
		return -ENOMEM;
	place_part(&plan, part.range->offset);
	part.base = range_map(meta, part.range);
	if (!part.base) {
		int error = errno;

		range_free(meta, part.range);
		return -error;
	}
	*entry = plan;
	part.worker = entry;
	point_part(&part);
	*ret = part;
	return 0;
}

void meta_part_deinit(struct meta *meta, struct meta_part *part)
{
	if (!part->base)
		return;
	(void)munmap(part->base, part->worker->size);
	range_free(meta, part->range);
	*part->worker = (struct meta_worker){0};
	*part = (struct meta_part){0};
}

void meta_part_clear(const struct meta_part *part, uint32_t slot)
{
	const struct meta_worker *worker = part->worker;
	uint64_t rows = (uint64_t)worker->layers * worker->heads;

	memset(meta_rows(part, slot), 0, rows * sizeof(struct meta_row));
	memset(part->scored + (size_t)slot * worker->layers, 0, worker->layers * sizeof(uint32_t));
}

void meta_part_forget(const struct meta *meta, const struct meta_part *part, uint32_t slot)
{
	const struct meta_worker *worker = part->worker;
	uint64_t rows = (uint64_t)worker->layers * worker->heads;
	uint64_t held = rows * worker->row_cap * sizeof(uint32_t), runs = rows * worker->stripe_cap * sizeof(uint32_t);

	punch(meta, worker->held_offset + slot * held, worker->held_offset + (slot + 1) * held);
	punch(meta, worker->runs_offset + slot * runs, worker->runs_offset + (slot + 1) * runs);
	meta_part_clear(part, slot);
}

/* ---- contexts ---- */

int meta_context_new(struct meta *meta, uint64_t id, uint32_t rows, uint32_t ids, struct meta_context_part *ret)
{
	uint64_t size = page_up(rows * sizeof(struct meta_context_row) + ids * sizeof(uint32_t));
	struct meta_context_part part;
	uint32_t index;

	if (!meta->free_context_count)
		return -EUSERS;
	part.range = range_new(meta, size);
	if (!part.range)
		return -ENOMEM;
	part.rows = range_map(meta, part.range);
	if (!part.rows) {
		int error = errno;

		range_free(meta, part.range);
		return -error;
	}
	part.ids = (uint32_t *)(part.rows + rows);
	index = meta->free_contexts[--meta->free_context_count];
	part.context = &meta->contexts[index];
	if (meta->header->context_count <= index)
		meta->header->context_count = index + 1;
	*part.context = (struct meta_context){.id = id,
		.worker = META_NO_WORKER,
		.offset = part.range->offset,
		.size = size,
		.rows = rows,
		.ids = ids};
	*ret = part;
	return 0;
}

void meta_context_deinit(struct meta *meta, struct meta_context_part *part)
{
	if (!part->context)
		return;
	(void)munmap(part->rows, part->range->size);
	range_free(meta, part->range);
	meta->free_contexts[meta->free_context_count++] = (uint32_t)(part->context - meta->contexts);
	*part->context = (struct meta_context){0};
	*part = (struct meta_context_part){0};
}

uint64_t meta_physical(const struct meta *meta)
{
	struct stat st;

	return fstat(meta->fd, &st) < 0 ? 0 : (uint64_t)st.st_blocks * 512u;
}
