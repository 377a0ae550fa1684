/* The host kind's work: kernels/host over mapped memory, done when a function returns. */
#include "daemon/sequence/compute.h"

#include <string.h>

#include "daemon/sequence/evict_host.h"
#include "daemon/sequence/image.h"
#include "daemon/sequence/recall.h"
#include "daemon/sequence/score.h"

#define COPY_SLICE ((size_t)512 << 10) /* bytes */

static void seal_places(struct meta_place *places)
{
	for (uint32_t i = 0; i < KVG_BLOCK_TOKENS; i++)
		places[i] = (struct meta_place){.pos = 0, .score = 1};
}

static int host_open(struct space *space, const struct space_memory *memory, char *text)
{
	(void)space;
	(void)memory;
	(void)text;
	return 0;
}

static int host_select(struct request *request)
{
	int r = evict_survey(request->sequence, request->evict);

	if (r >= 0)
		r = evict_select(request->sequence, request->evict);
	if (r >= 0)
		evict_count(request->sequence, request->evict);
	return r;
}

static int host_mark(struct request *request)
{
	evict_mark(request->sequence, request->evict);
	return 0;
}

static int host_move(struct request *request)
{
	evict_move(request->sequence, request->evict);
	return 0;
}

/* One slice: others have their turn after about 100 us. */
static int host_copy_blocks(struct request *request)
{
	const struct space *space = request->space;
	const struct arena *arena = space->arena;
	const struct kvg_group *group = &arena->layout.groups[0];
	size_t k_bytes = KVG_BLOCK_TOKENS * group->k_dim * (group->k_dtype == KVG_F32 ? 4u : 2u);
	size_t v_bytes = KVG_BLOCK_TOKENS * group->v_dim * (group->v_dtype == KVG_F32 ? 4u : 2u);
	struct block_copy *copy = &request->copy;

	for (size_t bytes = 0; copy->done < copy->count && bytes < COPY_SLICE; copy->done++) {
		const uint8_t *src = arena->base + copy->src[copy->done] * arena->stride;
		uint8_t *dst = arena->base + copy->dst[copy->done] * arena->stride;

		if (dst != src) {
			memcpy(dst, src, k_bytes);
			memcpy(dst + arena->extent_size / 2, src + arena->extent_size / 2, v_bytes);
		}
		if (copy->done < copy->places)
			seal_places(blocks_places(arena, space->pool->meta, copy->dst[copy->done]));
		bytes += k_bytes + v_bytes;
	}
	return 0;
}

static int host_copy(struct request *request)
{
	return image_copy(request->image);
}

static int host_pack(struct request *request)
{
	return evict_pack(request->sequence, request->evict);
}

static void put_row(const struct sequence *sequence, struct recall *recall, uint32_t row)
{
	struct evict_cursor at = evict_cursor(sequence, row);

	while (evict_cursor_next(&at))
		for (uint32_t i = 0; i < at.count; i++)
			recall_put(sequence, recall, row, at.index + i, evict_cursor_pos(&at, i), at.places[i].score);
}

static int host_recall(struct request *request)
{
	const struct sequence *sequence = request->sequence;
	struct evict *evict = request->evict;
	int r = evict_survey(sequence, evict);

	if (r >= 0)
		r = evict_keep_all(sequence, evict);
	if (r >= 0)
		r = recall_open(sequence, evict->length, evict->recall);
	for (uint32_t row = 0; r >= 0 && row < sequence->space->rows; row++)
		put_row(sequence, evict->recall, row);
	if (r >= 0)
		r = recall_decide(sequence, evict->recall);
	if (r < 0)
		return r;
	evict_count(sequence, evict);
	recall_count(sequence, evict);
	return 0;
}

static int host_unpack(struct request *request)
{
	return evict_unpack(request->sequence, request->evict);
}

const struct compute_ops compute_host = {
	.open = host_open,
	.select = host_select,
	.mark = host_mark,
	.move = host_move,
	.pack = host_pack,
	.recall = host_recall,
	.unpack = host_unpack,
	.evictions = 1,
	.score = score_slice,
	.copy = host_copy_blocks,
	.unload = host_copy,
	.load = host_copy,
};
