/* evict_host.h - what the host kind's SELECT, MARK and MOVE share about one eviction. */
#ifndef KVG_EVICT_HOST_H
#define KVG_EVICT_HOST_H

#include "daemon/sequence/evict.h"

struct evict_host {
	float *scores; /* of the candidates */
	uint8_t *keep;
	size_t *offset;              /* CSR, [rows + 1] */
	uint32_t *rank_skip;         /* [end - begin + 1]: protected positions before each; NULL without any */
	uint32_t *cursor;            /* [rows]: where to look for the next hole */
	struct kvg_place *src, *dst; /* room for one row's moves */
};

#endif
