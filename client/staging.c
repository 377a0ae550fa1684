#include "client/staging.h"

#include <errno.h>
#include <stdlib.h>

static uint64_t align(uint64_t bytes)
{
	return (bytes + STAGING_ALIGN - 1) & ~(uint64_t)(STAGING_ALIGN - 1);
}

int staging_init(struct staging *staging, uint64_t size, uint32_t max_pieces)
{
	struct staging_piece *pieces = calloc(max_pieces, sizeof(*pieces));

	if (!pieces)
		return -ENOMEM;
	*staging =
		(struct staging){.size = size & ~(uint64_t)(STAGING_ALIGN - 1), .pieces = pieces, .room = max_pieces};
	return 0;
}

void staging_deinit(struct staging *staging)
{
	free(staging->pieces);
	*staging = (struct staging){0};
}

int staging_place(const struct staging *staging, uint64_t bytes, uint64_t *ret_offset)
{
	uint64_t head, offset;

	if (bytes > staging->size)
		return -EMSGSIZE;
	bytes = align(bytes);
	offset = bytes <= staging->size - staging->tail ? staging->tail : 0;
	if (staging->count == staging->room)
		return -EAGAIN;
	if (staging->count) {
		head = staging->pieces[staging->first].offset;
		/* In use: [head, tail), or [head, size) and [0, tail) when the pieces have wrapped. */
		if (staging->tail > head && offset == 0 && bytes > head)
			return -EAGAIN;
		if (staging->tail <= head && (offset != staging->tail || bytes > head - staging->tail))
			return -EAGAIN;
	}
	*ret_offset = offset;
	return 0;
}

uint32_t staging_take(struct staging *staging, uint64_t bytes, uint64_t offset)
{
	uint32_t index = (staging->first + staging->count) % staging->room;

	staging->pieces[index] = (struct staging_piece){.offset = offset};
	staging->tail = offset + align(bytes);
	staging->count++;
	return index;
}

void staging_done(struct staging *staging, uint32_t piece)
{
	staging->pieces[piece].done = true;
	while (staging->count && staging->pieces[staging->first].done) {
		staging->first = (staging->first + 1) % staging->room;
		staging->count--;
	}
}
