/*
 * keep.h - extents that a worker keeps although they hold nothing, because its sequences fill them again soon.
 *
 * Creating an extent of device memory and giving it back takes over a millisecond whatever its size, in the daemon and
 * in the worker. So what an eviction empties stays where the next tokens of the same worker take it:
 *   a sequence whose prompt goes on keeps what its next chunk needs, and the room of the eviction behind that chunk;
 *   a sequence that decodes keeps what it has a right to draw;
 *   one that is idle or on the host keeps nothing.
 * Kept extents stay charged. They are never more than the rights of the worker's sequences that its promise does not
 * cover: the refund of an extent more would turn into that promise in the same step (promise.h), so nobody else has a
 * byte less by it, and giving them back would let nobody in who is refused.
 */
#ifndef KVG_KEEP_H
#define KVG_KEEP_H

#include "daemon/sequence/space.h"

/* The sequence has other blocks than before, or another right: what it keeps is counted anew. */
void keep_update(struct sequence *sequence);

/* The sequence goes. */
void keep_forget(struct sequence *sequence);

/* Extents without blocks that are not given back. */
uint32_t keep_count(const struct space *space);

/*
 * Extents without blocks that are kept besides, as long as memory is not asked for: one's worth of tails, in a worker
 * that maps contexts, so that the next sequence that attaches need not wait for it.
 */
uint32_t keep_for_tails(const struct space *space);

/*
 * Extents without blocks that the sequence may take: all but those that stand for the rights of others. What it has a
 * right to itself it may take in any case.
 */
uint32_t keep_usable(const struct sequence *sequence);

/*
 * Extents to create while the worker is busy with a chunk, so that the eviction behind it finds its room: only what the
 * sequence has a right to draw and is promised. 0 where creating takes no time.
 */
uint32_t keep_ahead(const struct sequence *sequence);

#endif
