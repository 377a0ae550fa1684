/*
 * outbox.h - replies and events on their way to one peer. Sends at once when
 * the socket takes it, queues otherwise, and gives up on a peer that lets too much pile up.
 */
#ifndef KVG_OUTBOX_H
#define KVG_OUTBOX_H

#include <protobuf-c/protobuf-c.h>

#include "daemon/base/list.h"

#define OUTBOX_PACKETS 1024u

struct outbox {
	int fd; /* borrowed */
	struct list packets;
	unsigned count;
};

void outbox_init(struct outbox *outbox, int fd);
void outbox_deinit(struct outbox *outbox);

/* Sends or queues a message; descriptors are duplicated when queued. 0, -EOVERFLOW (the queue is full), or another
 * negative errno. */
int outbox_send(struct outbox *outbox, const ProtobufCMessage *message, const int *fds, unsigned fd_count);

/* Sends what is queued as far as the socket takes it. 0 or a negative errno of the connection. */
int outbox_flush(struct outbox *outbox);

#endif
