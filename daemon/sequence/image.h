/*
 * image.h - the image of a sequence in the host tier: its own blocks in canonical order, then their places; or that of
 * a context: its blocks alone, for nobody asks for their places.
 *
 * The order is that of the rows: each row's held blocks, then for each stripe each row's run; of a context each row's
 * full blocks, then each row's tail. A block is its K half
 * (16 * k_bytes) and then its V half; places are the 16 of each block, in the same order. Blocks follow each other in
 * a frame as long as they fit whole (where a block is larger than a frame, each half has a frame for itself); places
 * begin behind the last block at a multiple of 128. Ids are not stored: whatever blocks the rows name when it is read
 * take what it says.
 *
 * The places lie in the metadata on the host kind, and on the device where there is one.
 */
#ifndef KVG_IMAGE_H
#define KVG_IMAGE_H

#include "daemon/sequence/space.h"
#include "daemon/tier/host.h"

#define IMAGE_PLACES (KVG_BLOCK_TOKENS * (uint32_t)sizeof(struct meta_place)) /* bytes of a block's places */

/* Where in the canonical order. */
struct image_walk {
	uint32_t stripe; /* UINT32_MAX: in the held blocks, or full ones of a context */
	uint32_t row, index;
};

/* How blocks lie in frames. */
struct image_shape {
	uint32_t k_half, v_half; /* bytes */
	uint32_t unit;           /* bytes that lie in one frame */
	uint32_t units;          /* of a block: 1, or 2 with a half each */
};

/* A copy under way, to or from the image. */
struct image {
	const struct sequence *sequence; /* whose blocks they are, or NULL and */
	const struct context *context;
	const struct arena *arena; /* in which they lie */
	const struct meta *meta;
	struct host_tier *tier;
	bool load;       /* from the image to the blocks */
	uint32_t first;  /* frame + 1; 0: there are no blocks */
	uint32_t opened; /* the frame + 1 to open next; 0: all are */
	uint64_t blocks;
	uint64_t copied, placed; /* blocks whose halves, and whose places, are through; a context's places all are */
	struct image_walk walk;
	struct host_cursor cursor;
	uint64_t begun_ns; /* when its first bytes were copied; 0: not yet */
	struct turn turn;
};

struct image_shape image_shape(const struct kvg_group *group, uint32_t frame_size);

/* Frames that the image of so many blocks takes, with their places or without. */
uint32_t image_frames(const struct image_shape *shape, uint32_t frame_size, uint64_t blocks, bool places);

/* A copy of the sequence's blocks, or of the context's own, from the beginning. NULL: no memory. */
struct image *image_new(const struct sequence *sequence, uint32_t first, bool load);
struct image *image_new_context(const struct context *context, uint32_t first, bool load);
struct image *image_free(struct image *image);

/* Nanoseconds since its first bytes were copied; others' turns are in it. */
uint64_t image_copy_ns(const struct image *image);

static inline bool image_is_complete(const struct image *image)
{
	return image->copied == image->blocks && image->placed == image->blocks;
}

/* ---- on the executor ---- */

void image_walk_init(struct image_walk *walk);

/* The next blocks of the canonical order, at most `most`. Returns how many; 0: there are no more. */
uint32_t image_walk_next(struct image *image, uint32_t *ids, uint32_t most);

/* Moves the cursor from the blocks to their places. */
void image_seek_places(struct host_cursor *cursor);

/* Makes the image's frames ready, for a turn; 0: all are, -EAGAIN: more to do, or another negative errno. */
int image_open(struct image *image);

/* The host kind's copy, for a turn: 0 or -EAGAIN. */
int image_copy(struct image *image);

#endif
