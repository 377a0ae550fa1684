/*
 * raw.h - a worker without the library: packets and ring entries exactly as a
 * test wants them, right or wrong. Fails the test when the daemon does not
 * answer within FIXTURE_WAIT_MS.
 */
#ifndef KVG_TEST_RAW_H
#define KVG_TEST_RAW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "control.pb-c.h"
#include "proto/kvgate_abi.h"

#define RAW_TEXT 512

struct raw {
	int socket; /* -1: closed */
	int doorbell;
	int table, staging;    /* descriptors of the reply to register; -1: none */
	struct kvg_ring *ring; /* NULL before hello */
	size_t ring_size;
	uint32_t sq_tail, cq_head; /* this side's cursors */
	uint64_t staging_rows, staging_size;
	uint32_t events;     /* control events seen */
	uint32_t dropped;    /* of those that took extents away */
	char text[RAW_TEXT]; /* of the last refusal */
};

void raw_connect(struct raw *raw, const char *socket);
void raw_close(struct raw *raw);

/* Sends bytes with descriptors as one packet; no matter how large. */
void raw_send(struct raw *raw, const void *data, size_t size, const int *fds, unsigned fd_count);

/* Packs and sends a request with its descriptors. */
void raw_request(struct raw *raw, Kvg__WorkerRequest *request, const int *fds, unsigned fd_count);

/* Says hello and maps the ring. */
void raw_hello(struct raw *raw);

/* Fills a request with that layout; the groups live in `storage`. */
struct raw_layout {
	Kvg__Register body;
	Kvg__Layout layout;
	Kvg__Group groups[KVG_MAX_GROUPS];
	Kvg__Group *list[KVG_MAX_GROUPS];
};
void raw_make_register(struct raw_layout *storage, const struct kvg_layout *layout, uint64_t staging_bytes);

/* Sends a registration and returns nothing of the reply: see raw_registered() and raw_refused(). */
void raw_register(struct raw *raw, struct raw_layout *layout);

/* The reply must be Registered; keeps its descriptors. */
void raw_registered(struct raw *raw);

/* raw_connect(), raw_hello(), a registration of the layout that must succeed. */
void raw_open(struct raw *raw, const char *socket, const struct kvg_layout *layout);

/*
 * The next reply (events of extents are taken in on the way) must be an error with a negative
 * status and a text, or a goodbye with a reason followed by the end of the stream; the words
 * land in raw->text. Returns the status, or -EPIPE for a goodbye.
 */
int raw_refused(struct raw *raw);

/* ---- the ring ---- */

/* Writes an entry, publishes the tail and rings the doorbell when asked to. */
void raw_submit(struct raw *raw, const struct kvg_sqe *sqe);

/* Publishes any tail and rings in any case. */
void raw_publish(struct raw *raw, uint32_t tail);

/* Waits for the next completion, taking in events; false when the daemon says goodbye (raw->text) instead. */
bool raw_complete(struct raw *raw, struct kvg_cqe *ret);

/* The entry must complete with an error and a text, or the daemon say goodbye. Returns as raw_refused(). */
int raw_submit_refused(struct raw *raw, const struct kvg_sqe *sqe);

/* The entry must complete with status 0. */
void raw_submit_done(struct raw *raw, const struct kvg_sqe *sqe, struct kvg_cqe *ret);

#endif
