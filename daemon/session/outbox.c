#include "daemon/session/outbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "proto/frame.h"

/*
 * The kernel counts a packet with its bookkeeping, hundreds of bytes; of one that was read it keeps one byte until it
 * has said that the socket may take more. Whoever is told and looks at once sees that byte, and is not told again.
 */
#define PACKET_LEAST 256

struct packet {
	struct list node;
	uint8_t *data;
	size_t size;
	unsigned fd_count;
	int fds[];
};

void outbox_init(struct outbox *outbox, int fd)
{
	*outbox = (struct outbox){.fd = fd};
	list_init(&outbox->packets);
}

void outbox_watch(struct outbox *outbox, struct loop *loop, loop_watch_cb writable, void *user)
{
	outbox->loop = loop;
	outbox->writable = writable;
	outbox->user = user;
}

void outbox_unwatch(struct outbox *outbox)
{
	outbox->watch = loop_watch_free(outbox->watch);
	outbox->loop = NULL;
}

static void packet_free(struct packet *packet)
{
	for (unsigned i = 0; i < packet->fd_count; i++)
		(void)close(packet->fds[i]);
	free(packet->data);
	free(packet);
}

void outbox_deinit(struct outbox *outbox)
{
	struct list *node;

	while ((node = list_pop(&outbox->packets)))
		packet_free(list_entry(node, struct packet, node));
	outbox_unwatch(outbox);
}

static bool is_full(const struct outbox *outbox, unsigned fd_count)
{
	return outbox->count == OUTBOX_PACKETS || outbox->fd_count + fd_count > OUTBOX_FDS;
}

static int enqueue(struct outbox *outbox, const uint8_t *data, size_t size, const int *fds, unsigned fd_count)
{
	struct packet *packet;

	if (is_full(outbox, fd_count))
		return -EOVERFLOW;
	packet = calloc(1, sizeof(*packet) + fd_count * sizeof(int));
	if (!packet)
		return -ENOMEM;
	packet->data = malloc(size ? size : 1);
	if (packet->data)
		memcpy(packet->data, data, size);
	packet->size = size;
	for (; packet->data && packet->fd_count < fd_count; packet->fd_count++) {
		packet->fds[packet->fd_count] = fcntl(fds[packet->fd_count], F_DUPFD_CLOEXEC, 0);
		if (packet->fds[packet->fd_count] < 0)
			break;
	}
	if (!packet->data || packet->fd_count < fd_count) {
		packet_free(packet);
		return -ENOMEM;
	}
	list_add_tail(&outbox->packets, &packet->node);
	outbox->count++;
	outbox->fd_count += fd_count;
	return 0;
}

/* Sends unless too many descriptors are under way; the peer's reading makes the socket ready again. */
static int send_now(struct outbox *outbox, const void *data, size_t size, const int *fds, unsigned fd_count)
{
	int unread = 1, r;

	if (fd_count && outbox->in_flight + fd_count > OUTBOX_IN_FLIGHT) {
		if (ioctl(outbox->fd, SIOCOUTQ, &unread) < 0 || unread >= PACKET_LEAST)
			return -EAGAIN;
		outbox->in_flight = 0;
	}
	r = kvg_frame_send(outbox->fd, data, size, fds, fd_count);
	if (r >= 0)
		outbox->in_flight += fd_count;
	return r;
}

/* Somebody calls outbox_flush() when the socket takes what is queued. */
static int wait_for_peer(struct outbox *outbox)
{
	if (!outbox->loop || outbox->watch)
		return 0;
	return loop_watch_new(outbox->loop, outbox->fd, POLLOUT, outbox->writable, outbox->user, &outbox->watch);
}

int outbox_flush(struct outbox *outbox)
{
	while (!list_empty(&outbox->packets)) {
		struct packet *packet = list_entry(outbox->packets.next, struct packet, node);
		int r = send_now(outbox, packet->data, packet->size, packet->fds, packet->fd_count);

		if (r == -EAGAIN)
			return wait_for_peer(outbox);
		if (r < 0)
			return r;
		outbox->count--;
		outbox->fd_count -= packet->fd_count;
		packet_free(list_entry(list_pop(&outbox->packets), struct packet, node));
	}
	outbox->watch = loop_watch_free(outbox->watch);
	return 0;
}

static int send_or_queue(struct outbox *outbox, const uint8_t *data, size_t size, const int *fds, unsigned fd_count)
{
	int r = outbox_flush(outbox);

	if (r < 0)
		return r;
	r = list_empty(&outbox->packets) ? send_now(outbox, data, size, fds, fd_count) : -EAGAIN;
	if (r != -EAGAIN)
		return r;
	r = enqueue(outbox, data, size, fds, fd_count);
	return r < 0 ? r : wait_for_peer(outbox);
}

static int put(struct outbox *outbox, const ProtobufCMessage *message, const int *fds, unsigned fd_count, bool now)
{
	size_t size = protobuf_c_message_get_packed_size(message);
	uint8_t *data = malloc(size ? size : 1);
	int r;

	if (!data)
		return -ENOMEM;
	(void)protobuf_c_message_pack(message, data);
	if (now || is_full(outbox, fd_count))
		r = send_or_queue(outbox, data, size, fds, fd_count);
	else
		r = enqueue(outbox, data, size, fds, fd_count);
	free(data);
	return r;
}

int outbox_send(struct outbox *outbox, const ProtobufCMessage *message, const int *fds, unsigned fd_count)
{
	return put(outbox, message, fds, fd_count, true);
}

int outbox_queue(struct outbox *outbox, const ProtobufCMessage *message, const int *fds, unsigned fd_count)
{
	return put(outbox, message, fds, fd_count, false);
}
