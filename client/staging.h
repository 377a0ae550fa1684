/*
 * staging.h - room in the staging rows: a ring of pieces, each contiguous, taken
 * in order and given back in the order they were taken.
 *
 * Where the next piece goes depends only on its size and on what was taken
 * before, never on what has been given back meanwhile: a place that was named
 * stays right until something is taken.
 */
#ifndef KVG_CLIENT_STAGING_H
#define KVG_CLIENT_STAGING_H

#include <stdbool.h>
#include <stdint.h>

#define STAGING_ALIGN 64u

struct staging_piece {
	uint64_t offset;
	bool done;
};

struct staging {
	uint64_t size;                /* bytes of the area */
	uint64_t tail;                /* where the last piece ends */
	struct staging_piece *pieces; /* ring of `room` */
	uint32_t room, first, count;
};

/* At most max_pieces are taken at once. 0 or -ENOMEM. */
int staging_init(struct staging *staging, uint64_t size, uint32_t max_pieces);
void staging_deinit(struct staging *staging);

/* The offset of the next piece of that many bytes; -EMSGSIZE when it is larger than the area, -EAGAIN when there is no
 * room now. */
int staging_place(const struct staging *staging, uint64_t bytes, uint64_t *ret_offset);

/* Takes the place that staging_place() named. Returns the piece's index for staging_done(). */
uint32_t staging_take(struct staging *staging, uint64_t bytes, uint64_t offset);

/* The piece is read; it and done ones behind it become room when everything before them has. */
void staging_done(struct staging *staging, uint32_t piece);

#endif
