/*
 * promise.h - the memory that admitted sequences may still draw.
 *
 * Sequences of a worker share extents, so one may fill blocks of an extent that came out of
 * another's admission. The promise is therefore one amount for the worker, and each
 * sequence has a right to draw from it: whole extents for the blocks that it was admitted with
 * and does not have, less those free in its own extents. A sequence that takes more than it was
 * admitted with has no right beyond that, and needs memory that nobody was promised.
 *
 * The worker's promise is never more than the sum of the rights. It can be less (by what was
 * drawn for shared extents): what lacks comes out of the worker's own refunds.
 */
#ifndef KVG_PROMISE_H
#define KVG_PROMISE_H

#include "daemon/sequence/space.h"

/* Admits a need of blocks: 0, or -ENOSPC with text. */
int promise_admit(struct space *space, uint64_t blocks, const char *what, char text[QUOTA_TEXT]);

/* What promise_admit() asks for. */
uint64_t promise_bytes(const struct space *space, uint64_t blocks);

/* What nobody has a right to goes back. */
void promise_settle(struct space *space);

/* The sequence has other blocks than before, or another need: its right is counted anew and what nobody has a right to
 * goes back. */
void promise_update(struct sequence *sequence);

/* The sequence goes. */
void promise_forget(struct sequence *sequence);

/* Bytes of an extent need that the sequence may draw; promise_drawn() takes them out when they have been charged. */
uint64_t promise_available(const struct sequence *sequence, uint64_t bytes);
void promise_drawn(struct space *space, uint64_t bytes);

/* How much of a refund of `bytes` becomes promise again; counted in. */
uint64_t promise_refund(struct space *space, uint64_t bytes);

/* The whole promise goes back: the worker is gone. */
void promise_end(struct space *space);

#endif
