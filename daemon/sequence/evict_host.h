/* evict_host.h - what the host kind's SELECT, MARK and MOVE share about one eviction. */
#ifndef KVG_EVICT_HOST_H
#define KVG_EVICT_HOST_H

#include "daemon/sequence/evict.h"
#include "daemon/sequence/retain.h"

struct evict_host {
	float *scores; /* of the candidates */
	uint8_t *keep;
	size_t *offset;              /* CSR, [rows + 1] */
	uint32_t *rank_skip;         /* [end - begin + 1]: protected positions before each; NULL without any */
	uint32_t *cursor;            /* [rows]: where to look for the next hole */
	struct kvg_place *src, *dst; /* room for one row's moves */
	/* PACK: where the dropped pairs go, row by row, and how far it is. */
	struct retain_plan plan;
	uint32_t pack_row;
	uint64_t packed;
};

/* One row's pairs, block by block. */
struct evict_cursor {
	const struct sequence *sequence;
	uint32_t row, base_len, length;
	uint32_t index; /* of places[0] */
	uint32_t count;
	uint32_t block;
	struct meta_place *places;
};

struct evict_cursor evict_cursor(const struct sequence *sequence, uint32_t row);
bool evict_cursor_next(struct evict_cursor *at);

/* Position of place i under the cursor: written down for folded pairs, implied by the index for fresh ones. */
uint32_t evict_cursor_pos(const struct evict_cursor *at, uint32_t i);

/* Whether SELECT has decided that a pair goes. */
bool evict_is_dropped(const struct evict *evict, uint32_t row, uint32_t index, uint32_t pos);

/* What a recall needs to be marked, which drops nothing. 0 or -ENOMEM. */
int evict_keep_all(const struct sequence *sequence, struct evict *evict);

/* retain_copy.c: PACK and UNPACK of the host kind, in slices: -EAGAIN until they are done. */
int evict_pack(const struct sequence *sequence, struct evict *evict);
int evict_unpack(const struct sequence *sequence, struct evict *evict);

#endif
