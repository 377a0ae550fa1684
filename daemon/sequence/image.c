#include "daemon/sequence/image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/context.h"
#include "kernels/host/copy.h"

#define STRIPE_HELD  UINT32_MAX
#define PLACES_ALIGN 128u
#define SOME_BLOCKS  32u /* between two looks at the clock */
#define SIDE         4u  /* blocks that are copied side by side */

/* ---- shape ---- */

static uint32_t half_size(uint32_t dim, uint32_t dtype)
{
	return KVG_BLOCK_TOKENS * dim * (dtype == KVG_F32 ? 4u : 2u);
}

struct image_shape image_shape(const struct kvg_group *group, uint32_t frame_size)
{
	struct image_shape shape = {
		.k_half = half_size(group->k_dim, group->k_dtype), .v_half = half_size(group->v_dim, group->v_dtype)};
	uint32_t block = shape.k_half + shape.v_half;

	shape.unit = block <= frame_size ? block : frame_size;
	shape.units = block <= frame_size ? 1 : 2;
	return shape;
}

static uint32_t align_places(uint32_t offset)
{
	return (offset + PLACES_ALIGN - 1) / PLACES_ALIGN * PLACES_ALIGN;
}

uint32_t image_frames(const struct image_shape *shape, uint32_t frame_size, uint64_t blocks, bool places)
{
	uint64_t units = blocks * shape->units, each = frame_size / shape->unit, frames, rest = places ? blocks : 0;
	uint64_t in_frame = frame_size / IMAGE_PLACES, tail;

	if (!blocks)
		return 0;
	frames = (units + each - 1) / each;
	tail = frame_size - align_places((uint32_t)((units - 1) % each + 1) * shape->unit);
	tail /= IMAGE_PLACES;
	rest = rest > tail ? rest - tail : 0;
	frames += (rest + in_frame - 1) / in_frame;
	return frames < UINT32_MAX ? (uint32_t)frames : UINT32_MAX;
}

void image_seek_places(struct host_cursor *cursor)
{
	cursor->offset = align_places(cursor->offset);
}

/* ---- the canonical order ---- */

void image_walk_init(struct image_walk *walk)
{
	*walk = (struct image_walk){.stripe = STRIPE_HELD};
}

static uint32_t take_held(const struct sequence *sequence, struct image_walk *walk, uint32_t *ids, uint32_t most)
{
	const struct meta_part *part = &sequence->space->part;
	const struct meta_row *rows = meta_rows(part, sequence->slot);
	uint32_t count = 0;

	while (count < most && walk->row < sequence->space->rows) {
		const uint32_t *held = meta_held(part, sequence->slot, walk->row);
		uint32_t left = rows[walk->row].held_blocks - walk->index,
			 n = left < most - count ? left : most - count;

		memcpy(ids + count, held + walk->index, n * sizeof(uint32_t));
		count += n;
		walk->index += n;
		if (n == left) {
			walk->row++;
			walk->index = 0;
		}
	}
	return count;
}

static uint32_t take_runs(const struct sequence *sequence, struct image_walk *walk, uint32_t *ids, uint32_t most)
{
	const struct meta_part *part = &sequence->space->part;
	uint32_t count = 0;

	while (count < most && walk->stripe < sequence->meta->stripes) {
		ids[count++] = meta_run(part, sequence->slot, walk->stripe)[walk->row] + walk->index;
		if (++walk->index < KVG_RUN_BLOCKS)
			continue;
		walk->index = 0;
		if (++walk->row == sequence->space->rows) {
			walk->row = 0;
			walk->stripe++;
		}
	}
	return count;
}

/* Ids of full blocks lie row by row. */
static uint32_t take_full(const struct context *context, struct image_walk *walk, uint32_t *ids, uint32_t most)
{
	uint32_t left = context->part.context->ids - walk->index, n = left < most ? left : most;

	memcpy(ids, context->part.ids + walk->index, n * sizeof(uint32_t));
	walk->index += n;
	if (n == left)
		*walk = (struct image_walk){0};
	return n;
}

static uint32_t take_tails(const struct context *context, struct image_walk *walk, uint32_t *ids, uint32_t most)
{
	uint32_t count = 0;

	for (; count < most && walk->row < context->rows; walk->row++)
		if (context->part.rows[walk->row].tail)
			ids[count++] = context->part.rows[walk->row].tail_block;
	return count;
}

static uint32_t next_of_context(const struct context *context, struct image_walk *walk, uint32_t *ids, uint32_t most)
{
	uint32_t count = walk->stripe == STRIPE_HELD ? take_full(context, walk, ids, most) : 0;

	if (walk->stripe != STRIPE_HELD)
		count += take_tails(context, walk, ids + count, most - count);
	return count;
}

uint32_t image_walk_next(struct image *image, uint32_t *ids, uint32_t most)
{
	const struct sequence *sequence = image->sequence;
	struct image_walk *walk = &image->walk;
	uint32_t count = 0;

	if (!sequence)
		return next_of_context(image->context, walk, ids, most);
	if (walk->stripe == STRIPE_HELD) {
		count = take_held(sequence, walk, ids, most);
		if (walk->row == sequence->space->rows)
			*walk = (struct image_walk){0};
	}
	if (walk->stripe != STRIPE_HELD)
		count += take_runs(sequence, walk, ids + count, most - count);
	return count;
}

/* ---- copies ---- */

static struct image *new_image(const struct tenant *tenant, const struct arena *arena, uint32_t first, bool load)
{
	struct host_tier *tier = tenant->pool->tier;
	struct image *image = malloc(sizeof(*image));

	if (!image)
		return NULL;
	*image = (struct image){.arena = arena,
		.meta = tenant->pool->meta,
		.tier = tier,
		.load = load,
		.first = first,
		.opened = first,
		.cursor = host_cursor(tier, first),
		.turn.tenant = tenant->index};
	image_walk_init(&image->walk);
	return image;
}

struct image *image_new(const struct sequence *sequence, uint32_t first, bool load)
{
	const struct space *space = sequence->space;
	struct image *image = new_image(space->tenant, space->arena, first, load);

	if (!image)
		return NULL;
	image->sequence = sequence;
	image->blocks = sequence->meta->blocks;
	return image;
}

struct image *image_new_context(const struct context *context, uint32_t first, bool load)
{
	struct image *image = new_image(context->tenant, context->arena, first, load);

	if (!image)
		return NULL;
	image->context = context;
	image->blocks = image->placed = context->part.context->blocks;
	return image;
}

struct image *image_free(struct image *image)
{
	free(image);
	return NULL;
}

static bool is_over(const struct image *image)
{
	return turns_over(&image->turn, loop_now(), executor_slice(image->arena->pool->executor));
}

int image_open(struct image *image)
{
	while (image->opened) {
		int r = host_tier_open(image->tier, image->opened);

		if (r >= 0)
			image->opened = host_tier_next(image->tier, image->opened);
		else if (r != -EAGAIN)
			return r;
		if (image->opened && is_over(image))
			return -EAGAIN;
	}
	return 0;
}

uint64_t image_copy_ns(const struct image *image)
{
	return image->begun_ns ? loop_now() - image->begun_ns : 0;
}

/* Blocks that are copied side by side: where their halves are in the arena and in the image. */
struct side {
	unsigned count;
	uint8_t *k[SIDE], *v[SIDE], *image_k[SIDE], *image_v[SIDE];
};

static void take_side(const struct image_shape *shape, struct image *image, const uint32_t *ids, struct side *side)
{
	const struct arena *arena = image->arena;

	for (unsigned i = 0; i < side->count; i++) {
		side->k[i] = arena->base + ids[i] * arena->stride;
		side->v[i] = side->k[i] + arena->extent_size / 2;
		side->image_k[i] = host_cursor_take(&image->cursor, shape->unit);
		side->image_v[i] = shape->units == 1 ? side->image_k[i] + shape->k_half
						     : host_cursor_take(&image->cursor, shape->unit);
	}
}

static void copy_halves(bool load, uint8_t *const *at, uint8_t *const *in_image, unsigned count, size_t size)
{
	uint8_t *const *dst = load ? at : in_image, *const *src = load ? in_image : at;

	kvg_stream_copies(dst, (const uint8_t *const *)src, count, size);
}

static void copy_blocks(const struct image_shape *shape, struct image *image, const uint32_t *ids, uint32_t count)
{
	for (uint32_t i = 0; i < count; i += SIDE) {
		struct side side = {.count = count - i < SIDE ? count - i : SIDE};

		take_side(shape, image, ids + i, &side);
		copy_halves(image->load, side.k, side.image_k, side.count, shape->k_half);
		copy_halves(image->load, side.v, side.image_v, side.count, shape->v_half);
	}
}

static void copy_places(struct image *image, uint32_t id)
{
	struct meta_place *places = blocks_places(image->arena, image->meta, id);
	uint8_t *in_image = host_cursor_take(&image->cursor, IMAGE_PLACES);

	if (image->load)
		memcpy(places, in_image, IMAGE_PLACES);
	else
		memcpy(in_image, places, IMAGE_PLACES);
}

/* The next few blocks, or places of them. */
static void copy_some(const struct image_shape *shape, struct image *image)
{
	uint32_t ids[SOME_BLOCKS], n = image_walk_next(image, ids, SOME_BLOCKS);
	bool places = image->copied == image->blocks;

	if (places) {
		for (uint32_t i = 0; i < n; i++)
			copy_places(image, ids[i]);
		image->placed += n;
		return;
	}
	copy_blocks(shape, image, ids, n);
	image->copied += n;
	if (image->copied == image->blocks) {
		image_walk_init(&image->walk);
		image_seek_places(&image->cursor);
	}
}

int image_copy(struct image *image)
{
	const struct image_shape shape =
		image_shape(&image->arena->layout.groups[0], host_tier_frame_size(image->tier));

	if (!image->begun_ns)
		image->begun_ns = loop_now();
	while (!image_is_complete(image)) {
		copy_some(&shape, image);
		if (is_over(image))
			break;
	}
	kvg_stream_fence();
	return image_is_complete(image) ? 0 : -EAGAIN;
}
