/*
 * offload.h - sequences that nobody uses, and those whose blocks are on the host.
 *
 *   RESIDENT   its blocks are in the worker's extents
 *   OFFLOADING its image is being written; its blocks are still its own
 *   OFFLOADED  no blocks, nothing admitted; the image is all there is. Lengths, generation, scores stay
 *   RESTORING  blocks are taken anew and are being filled; the image is still there
 * and besides, IDLE: its worker has released it. Idle and resident, it is on offer to whoever needs device memory
 * (tenant/reclaim.h). RESERVE and RESTORE put it to use again; what else a worker asks of an idle or offloaded sequence
 * is -EBUSY, but for QUERY, IDLE, OFFLOAD and FREE.
 *
 * A step that fails leaves the state that it began with. A worker that dies takes all with it, whatever the state: jobs
 * under way are waited for, then frames go back as extents do.
 *
 * Besides a worker's requests there are the daemon's own (reclaiming, administration): they carry `completed`, wait
 * their turn like others, work on idle and offloaded sequences only, and do not end idleness. One with the operation
 * QUERY waits for its turn at any sequence; what it does then is in `act`.
 */
#ifndef KVG_OFFLOAD_H
#define KVG_OFFLOAD_H

#include "daemon/sequence/space.h"

/*
 * Submits a request of the daemon's own: sqe (op, seq and what the op takes) and completed are set, the rest is zero.
 * completed() is called once, on the reactor, possibly before this returns: with cqe.status, or -ECANCELED when the
 * worker has gone meanwhile. It owns the request then.
 */
void offload_submit(struct space *space, struct request *request);

/* Ends the daemon's own requests: the space goes. */
void offload_cancel(struct space *space);

/* Whether the sequence's state allows the operation; otherwise the request has failed. Ends idleness. */
bool offload_allows(struct request *request);

/* After an operation: what is idle and has blocks is on offer. */
void offload_settle(struct sequence *sequence);

/* The sequence goes: its image is given back. */
void offload_forget(struct sequence *sequence);

/* Calls then(request) when the sequence's blocks are on the device; or the request fails. */
void restore_before(struct request *request, void (*then)(struct request *));

#endif
