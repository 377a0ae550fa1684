#include "daemon/tier/host.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "daemon/base/pages.h"
#include "daemon/tenant/reclaim.h"
#include "proto/frame.h"
#include "proto/size.h"

#define STEP         (2u << 20)  /* bytes that are populated at a time */
#define PIECE        (2u << 20)  /* bytes that are populated and pinned together, on the host kind and */
#define PIECE_DEVICE (32u << 20) /* where there is a device: registering costs much for each piece */

/* The executor's: how far a piece is. */
struct piece {
	uint32_t populated; /* bytes */
	bool ready;         /* pinned as well */
};

struct host_tier {
	struct pool *pool;
	uint64_t size;
	uint32_t frame_size, frame_count, piece_size;
	int fd;
	uint8_t *base;
	struct meta_frame *frames; /* in the metadata */
	uint32_t *free;            /* a stack: what was given back last, and is in place already, is taken first */
	uint32_t free_count;
	struct piece *pieces;
	_Atomic(uint64_t) populated;
	struct turns turns;
};

static uint32_t piece_count(const struct host_tier *tier)
{
	return (uint32_t)((tier->size + tier->piece_size - 1) / tier->piece_size);
}

/* The memory: addresses and a file, of which nothing is allocated. */
static int open_memory(struct host_tier *tier)
{
	tier->fd = kvg_memfd_new("kvgate-host", tier->size);
	if (tier->fd < 0)
		return tier->fd;
	tier->base = pages_reserve(tier->size);
	if (!tier->base)
		return -ENOMEM;
	if (mmap(tier->base, tier->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, tier->fd, 0) ==
		MAP_FAILED)
		return -errno;
	if (madvise(tier->base, tier->size, MADV_DONTDUMP) < 0 || madvise(tier->base, tier->size, MADV_DONTFORK) < 0)
		return -errno;
	(void)madvise(tier->base, tier->size, MADV_HUGEPAGE); /* where the kernel gives them to shared memory */
	return 0;
}

static int fill(struct host_tier *tier)
{
	struct pool *pool = tier->pool;
	int r = open_memory(tier);

	tier->free = malloc(tier->frame_count * sizeof(uint32_t));
	tier->pieces = calloc(piece_count(tier), sizeof(struct piece));
	if (r >= 0 && (!tier->free || !tier->pieces))
		r = -ENOMEM;
	if (r >= 0)
		r = meta_add_frames(pool->meta, tier->frame_count, tier->frame_size);
	if (r < 0)
		return r;
	tier->frames = pool->meta->frames;
	for (uint32_t i = 0; i < tier->frame_count; i++)
		tier->free[i] = tier->frame_count - 1 - i;
	tier->free_count = tier->frame_count;
	return 0;
}

int host_tier_new(struct pool *pool, uint64_t size, struct host_tier **ret)
{
	struct host_tier *tier = calloc(1, sizeof(*tier));
	bool device = pool->kind->ops->pin != NULL;
	int r = 0;

	if (!tier)
		return -ENOMEM;
	tier->pool = pool;
	tier->fd = -1;
	tier->frame_size = device ? HOST_FRAME_DEVICE : HOST_FRAME;
	tier->piece_size = device ? PIECE_DEVICE : PIECE;
	tier->size = size / tier->frame_size * tier->frame_size;
	if (tier->size / tier->frame_size > UINT32_MAX - 1)
		r = -EFBIG;
	tier->frame_count = (uint32_t)(tier->size / tier->frame_size);
	if (r >= 0 && tier->frame_count)
		r = fill(tier);
	if (r < 0) {
		(void)host_tier_free(tier);
		return r;
	}
	pool->tier = tier;
	pool->host.account->max = tier->size;
	*ret = tier;
	return 0;
}

static uint32_t piece_bytes(const struct host_tier *tier, uint32_t piece)
{
	uint64_t begin = (uint64_t)piece * tier->piece_size, rest = tier->size - begin;

	return rest < tier->piece_size ? (uint32_t)rest : tier->piece_size;
}

struct host_tier *host_tier_free(struct host_tier *tier)
{
	struct kind *kind;

	if (!tier)
		return NULL;
	kind = tier->pool->kind;
	if (tier->pool->tier == tier)
		tier->pool->tier = NULL;
	for (uint32_t i = 0; tier->pieces && kind->ops->unpin && i < piece_count(tier); i++)
		if (tier->pieces[i].ready)
			kind->ops->unpin(kind, tier->base + (size_t)i * tier->piece_size, piece_bytes(tier, i));
	if (tier->base)
		(void)munmap(tier->base, tier->size);
	if (tier->fd >= 0)
		(void)close(tier->fd);
	free(tier->free);
	free(tier->pieces);
	free(tier);
	return NULL;
}

uint32_t host_tier_frame_size(const struct host_tier *tier)
{
	return tier->frame_size;
}

uint32_t host_tier_frame_count(const struct host_tier *tier)
{
	return tier->frame_count;
}

uint64_t host_tier_populated(const struct host_tier *tier)
{
	return atomic_load_explicit(&tier->populated, memory_order_relaxed);
}

/* ---- chains ---- */

int host_tier_take(struct host_tier *tier, struct tenant *tenant, uint32_t count, const char *what, uint32_t *ret_first,
	char text[QUOTA_TEXT])
{
	uint32_t *link = ret_first;
	int r;

	assert(count > 0);
	if (!tier || !tier->frame_count) {
		(void)snprintf(text, QUOTA_TEXT, "%s: %s needs the host tier, and there is none (host.size is 0)",
			tenant->host.name, what);
		return -ENOSPC;
	}
	r = quota_charge(&tenant->host, (uint64_t)count * tier->frame_size, 0, what, text);
	if (r < 0)
		return r;
	reclaim_host_check(tenant);
	assert(count <= tier->free_count); /* the pool's account has as many bytes as there are frames */
	for (; count > 0; count--) {
		uint32_t frame = tier->free[--tier->free_count];

		tier->frames[frame] = (struct meta_frame){.tenant = tenant->index + 1};
		*link = frame + 1;
		link = &tier->frames[frame].next;
	}
	return 0;
}

void host_tier_give(struct host_tier *tier, struct tenant *tenant, uint32_t first)
{
	uint32_t count = 0, next;

	for (; first; first = next) {
		struct meta_frame *frame = &tier->frames[first - 1];

		assert(frame->tenant == tenant->index + 1);
		next = frame->next;
		*frame = (struct meta_frame){0};
		tier->free[tier->free_count++] = first - 1;
		count++;
	}
	/* The stack hands the chain out again in its order. */
	for (uint32_t i = 0; i < count / 2; i++) {
		uint32_t *a = &tier->free[tier->free_count - count + i], *b = &tier->free[tier->free_count - 1 - i];
		uint32_t frame = *a;

		*a = *b;
		*b = frame;
	}
	if (count)
		quota_refund(&tenant->host, (uint64_t)count * tier->frame_size);
}

void host_tier_cut(struct host_tier *tier, struct tenant *tenant, uint32_t last)
{
	uint32_t rest = tier->frames[last - 1].next;

	tier->frames[last - 1].next = 0;
	host_tier_give(tier, tenant, rest);
}

void host_tier_join(struct host_tier *tier, uint32_t last, uint32_t first)
{
	assert(!tier->frames[last - 1].next && tier->frames[last - 1].tenant == tier->frames[first - 1].tenant);
	tier->frames[last - 1].next = first;
}

uint32_t host_tier_next(const struct host_tier *tier, uint32_t frame)
{
	return tier->frames[frame - 1].next;
}

static uint32_t piece_of(const struct host_tier *tier, uint32_t frame)
{
	return (uint32_t)((uint64_t)(frame - 1) * tier->frame_size / tier->piece_size);
}

bool host_tier_is_together(const struct host_tier *tier, uint32_t frame, uint32_t next)
{
	return frame == next || (frame + 1 == next && piece_of(tier, frame) == piece_of(tier, next));
}

uint8_t *host_tier_at(const struct host_tier *tier, uint32_t frame)
{
	return tier->base + (size_t)(frame - 1) * tier->frame_size;
}

/* ---- memory ---- */

int host_tier_open(struct host_tier *tier, uint32_t frame)
{
	uint32_t index = piece_of(tier, frame);
	uint64_t begin = (uint64_t)index * tier->piece_size;
	uint32_t bytes = piece_bytes(tier, index), step;
	struct piece *piece = &tier->pieces[index];
	struct kind *kind = tier->pool->kind;
	int r;

	if (piece->ready)
		return 0;
	if (piece->populated < bytes) {
		step = bytes - piece->populated < STEP ? bytes - piece->populated : STEP;
		r = pages_populate(tier->fd, begin + piece->populated, tier->base + begin + piece->populated, step,
			tier->pool->kind->large_pages);
		if (r < 0)
			return r;
		piece->populated += step;
		atomic_fetch_add_explicit(&tier->populated, step, memory_order_relaxed);
		if (piece->populated < bytes)
			return -EAGAIN;
	}
	r = kind->ops->pin ? kind->ops->pin(kind, tier->base + begin, bytes) : 0;
	piece->ready = r >= 0;
	return r;
}

struct turns *host_tier_turns(struct host_tier *tier)
{
	return &tier->turns;
}

/* ---- cursors ---- */

uint8_t *host_cursor_take_some(struct host_cursor *cursor, uint32_t size, uint32_t most, uint32_t *ret_count)
{
	uint8_t *at;
	uint32_t fit;

	if (cursor->frame && cursor->offset + size > cursor->tier->frame_size) {
		cursor->frame = host_tier_next(cursor->tier, cursor->frame);
		cursor->offset = 0;
	}
	if (!cursor->frame)
		return NULL;
	fit = (cursor->tier->frame_size - cursor->offset) / size;
	*ret_count = fit < most ? fit : most;
	at = host_tier_at(cursor->tier, cursor->frame) + cursor->offset;
	cursor->offset += *ret_count * size;
	return at;
}

uint8_t *host_cursor_take(struct host_cursor *cursor, uint32_t size)
{
	uint32_t one;

	return host_cursor_take_some(cursor, size, 1, &one);
}

uint32_t host_tier_frames(const struct host_tier *tier, uint64_t count, uint32_t size)
{
	uint32_t each = tier->frame_size / size;
	uint64_t frames = (count + each - 1) / each;

	return frames > UINT32_MAX ? UINT32_MAX : (uint32_t)frames;
}
