/*
 * ring.h - the daemon's end of a worker's rings (struct kvg_ring in kvgate_abi.h).
 *
 * The cursors that count are private; what the worker wrote is read once,
 * checked and copied before it is used. As many entries are taken as there is
 * room for completions, so that a completion never waits.
 */
#ifndef KVG_DAEMON_RING_H
#define KVG_DAEMON_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/kvgate_abi.h"

#define RING_ENTRIES_MIN 16u
#define RING_ENTRIES_MAX 4096u

struct ring {
	int fd, doorbell;
	size_t size;
	struct kvg_ring *shared;
	struct kvg_sqe *sq;
	struct kvg_cqe *cq;
	char *text;
	uint32_t entries;
	uint32_t sq_head, cq_tail, cq_head;
	uint32_t outstanding; /* taken and not completed */
	uint32_t events;      /* control events counted */
};

/* entries: a power of two between the limits, for both rings. 0 or a negative errno. */
int ring_init(struct ring *ring, uint32_t entries);
void ring_deinit(struct ring *ring);

/* 1 and a copy of the next entry, 0 when there is none (or no room for its completion), -EPROTO for a cursor that
 * cannot be. */
int ring_take(struct ring *ring, struct kvg_sqe *ret);

/* Posts a completion; text says why when cqe->status is negative. Returns true when the worker sleeps and wants a wake
 * event. */
bool ring_complete(struct ring *ring, struct kvg_cqe *cqe, const char *text);

/* Asks the worker to ring the doorbell (or not); returns true when there are entries already that can be taken. */
bool ring_set_wakeup(struct ring *ring, bool on);

/* Counts a control event that has been sent. Returns its number. */
uint32_t ring_count_event(struct ring *ring);

#endif
