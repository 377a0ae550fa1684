/*
 * ring.h - the worker's end of the submission and completion rings.
 *
 * The shared header is checked once, when the ring is mapped, and its sizes are
 * kept privately. No more entries are outstanding (submitted and their completion
 * not taken) than the smaller of the two rings holds, so neither can overrun.
 * The daemon's words are read once and checked: nonsense is -EPROTO.
 */
#ifndef KVG_CLIENT_RING_H
#define KVG_CLIENT_RING_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/kvgate_abi.h"

struct ring {
	struct kvg_ring *shared;
	uint64_t size;
	int doorbell; /* owned eventfd */
	uint32_t capacity, sq_mask, cq_mask;
	struct kvg_sqe *sq;
	const struct kvg_cqe *cq;
	const char *texts;
	uint32_t sq_tail, cq_head; /* ours, free-running */
	uint32_t outstanding;
};

/*
 * Maps and checks a ring memfd (not closed). Takes the doorbell over on success only.
 * 0; -EPROTO when the header is nonsense (*ret_what then says what); another negative errno.
 */
int ring_map(int memfd, int doorbell, struct ring *ret, const char **ret_what);

/* Unmaps and closes; a zeroed ring with doorbell -1 is fine. */
void ring_deinit(struct ring *ring);

/* Publishes one entry and rings the doorbell when the daemon asks for it. There is room: outstanding < capacity. */
void ring_submit(struct ring *ring, const struct kvg_sqe *entry);

/* The next completion, in shared memory: 1 with *ret, 0 when there is none, -EPROTO when cq_tail is nonsense. */
int ring_peek(const struct ring *ring, const struct kvg_cqe **ret);

/* Copies the text of the completion that ring_peek() returned; "" when it has none. */
void ring_text(const struct ring *ring, const struct kvg_cqe *entry, char text[KVG_TEXT_SIZE]);

/* Gives the peeked completion's place back to the daemon. */
void ring_advance(struct ring *ring);

/* Control events that the daemon says it has sent. */
uint32_t ring_events(const struct ring *ring);

/* The number of the daemon's last request for memory, or 0. */
uint32_t ring_pressure(const struct ring *ring);

/* Announces that the worker is about to sleep, in one total order with ring_peek()'s look, or has woken. */
void ring_set_sleeping(struct ring *ring, bool sleeping);

#endif
