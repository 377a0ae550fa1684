/*
 * outbox.h - replies and events on their way to one peer. Sends at once when
 * the socket takes it, or at the end of the reactor's round what can wait until then, queues otherwise, and gives up on
 * a peer that lets too much pile up.
 *
 * Descriptors that a peer has not received yet count against one limit of the whole daemon (RLIMIT_NOFILE,
 * unix(7)), so a peer that does not read may hold up only a few.
 */
#ifndef KVG_OUTBOX_H
#define KVG_OUTBOX_H

#include <protobuf-c/protobuf-c.h>

#include "daemon/base/list.h"
#include "daemon/loop/loop.h"

#define OUTBOX_PACKETS   1024u /* queued */
#define OUTBOX_FDS       4096u /* queued */
#define OUTBOX_IN_FLIGHT 256u  /* descriptors sent and perhaps not received */

struct outbox {
	int fd; /* borrowed */
	struct list packets;
	unsigned count, fd_count; /* queued */
	unsigned in_flight;       /* descriptors sent since the peer was last seen to have read everything */
	struct loop *loop;        /* NULL: nobody looks whether the socket takes more */
	struct loop_watch *watch; /* that it does; only while something is queued */
	loop_watch_cb writable;
	void *user;
};

void outbox_init(struct outbox *outbox, int fd);

/*
 * From now on writable(user) is called, and is to call outbox_flush(), whenever something is queued and the socket may
 * take it. Only then is anybody interested in that: each packet that the peer reads would wake the reactor otherwise.
 */
void outbox_watch(struct outbox *outbox, struct loop *loop, loop_watch_cb writable, void *user);
void outbox_deinit(struct outbox *outbox);

/* No call of writable() from now on: before the socket is closed, which an armed watch would keep open. */
void outbox_unwatch(struct outbox *outbox);

/* Sends or queues a message; descriptors are duplicated when queued. 0, -EOVERFLOW (the queue is full), or another
 * negative errno. */
int outbox_send(struct outbox *outbox, const ProtobufCMessage *message, const int *fds, unsigned fd_count);

/*
 * Queues a message that somebody will soon send with outbox_flush(), or with what outbox_send() sends next; only when
 * the queue is full it is sent at once. As outbox_send() otherwise.
 */
int outbox_queue(struct outbox *outbox, const ProtobufCMessage *message, const int *fds, unsigned fd_count);

/* Sends what is queued as far as the socket takes it. 0 or a negative errno of the connection. */
int outbox_flush(struct outbox *outbox);

#endif
