#include "client/client.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

static int extents_added(struct kvg_client *client, const Kvg__ExtentsAdded *added, const struct kvg_frame *frame)
{
	if (!client->registered || added->n_slots != frame->fd_count)
		return client_break(client, -EPROTO, "daemon: %zu extents came with %u descriptors", added->n_slots,
			frame->fd_count);
	for (size_t i = 0; i < added->n_slots; i++) {
		int r = arena_map(&client->arena, added->slots[i], frame->fds[i]);

		if (r < 0)
			return client_break(client, r, "extent for slot %u of %u cannot be mapped: %s", added->slots[i],
				client->arena.slots, arena_error(&client->arena, r));
	}
	client->events++;
	return 0;
}

static int extents_dropped(struct kvg_client *client, const Kvg__ExtentsDropped *dropped)
{
	if (!client->registered)
		return client_break(client, -EPROTO, "daemon: extents dropped before a layout was registered");
	for (size_t i = 0, run; i < dropped->n_slots; i += run) {
		uint32_t slot = dropped->slots[i];
		int r;

		for (run = 1; i + run < dropped->n_slots && dropped->slots[i + run] == slot + run;)
			run++;
		r = arena_unmap(&client->arena, slot, (uint32_t)run);
		if (r < 0)
			return client_break(client, r, "extents at slots %u to %zu of %u cannot be unmapped: %s", slot,
				slot + run - 1, client->arena.slots, arena_error(&client->arena, r));
	}
	client->drop_event = ++client->events;
	return 0;
}

/* Keeps the reply that a request waits for; takes message and frame over on success. */
static int keep_reply(struct kvg_client *client, Kvg__WorkerReply *message, struct kvg_frame *frame)
{
	if (message->id != client->awaited_id || client->reply)
		return client_break(client, -EPROTO, "daemon: reply to request %llu, which is not waited for",
			(unsigned long long)message->id);
	client->reply = message;
	client->reply_frame = *frame;
	*frame = (struct kvg_frame){0};
	return 0;
}

static int handle_event(struct kvg_client *client, const Kvg__WorkerReply *message, const struct kvg_frame *frame)
{
	switch (message->body_case) {
	case KVG__WORKER_REPLY__BODY_EXTENTS_ADDED:
		return extents_added(client, message->extents_added, frame);
	case KVG__WORKER_REPLY__BODY_EXTENTS_DROPPED:
		return extents_dropped(client, message->extents_dropped);
	case KVG__WORKER_REPLY__BODY_WAKE:
		return 0;
	case KVG__WORKER_REPLY__BODY_GOODBYE:
		return client_break(client, -EPIPE, "daemon ended the connection: %s", message->goodbye->reason);
	case KVG__WORKER_REPLY__BODY_ERROR:
		return client_break(client, message->error->status < 0 ? message->error->status : -EPIPE, "%s",
			message->error->text);
	default:
		return client_break(client, -EPROTO, "daemon: event of unknown type %d", (int)message->body_case);
	}
}

static int handle_frame(struct kvg_client *client, struct kvg_frame *frame)
{
	Kvg__WorkerReply *message = kvg__worker_reply__unpack(NULL, frame->size, frame->data);
	int r;

	if (!message)
		return client_break(client, -EPROTO, "daemon: a message of %zu bytes cannot be read", frame->size);
	if (message->id) {
		r = keep_reply(client, message, frame);
		if (r == 0)
			return 0;
	} else {
		r = handle_event(client, message, frame);
	}
	kvg__worker_reply__free_unpacked(message, NULL);
	return r;
}

int client_receive(struct kvg_client *client)
{
	struct kvg_frame frame;
	int r = client_check(client);

	while (r == 0) {
		int got = kvg_frame_receive(client->socket, KVG_FRAME_MAX, KVG_FRAME_FDS, 1, &frame);

		/* Told once, before what the daemon said last. */
		if (got == -ECONNRESET)
			got = kvg_frame_receive(client->socket, KVG_FRAME_MAX, KVG_FRAME_FDS, 1, &frame);
		if (got == -EAGAIN)
			break;
		if (got == 0 || got == -ECONNRESET)
			return client_break(client, -EPIPE, "the daemon is gone");
		if (got < 0)
			return client_break(client, got, "daemon: message cannot be received: %s", strerror(-got));
		r = handle_frame(client, &frame);
		kvg_frame_deinit(&frame);
	}
	return r;
}

/* Waits for the socket; what arrives meanwhile is handled. */
static int wait_socket(struct kvg_client *client, short events)
{
	struct pollfd poll_fd = {.fd = client->socket, .events = events};
	int r;

	if (client->entries)
		ring_set_sleeping(&client->ring, true);
	if (!client_is_pressed(client) && !client_owes(client) && poll(&poll_fd, 1, -1) < 0 && errno != EINTR)
		return client_break(client, -errno, "control socket: %s", strerror(errno));
	if (client->entries)
		ring_set_sleeping(&client->ring, false);
	r = client_receive(client);
	return r == 0 && client->entries ? client_advance(client) : r;
}

static int send_request(struct kvg_client *client, const Kvg__WorkerRequest *request, const int *fds, unsigned fd_count)
{
	size_t size = kvg__worker_request__get_packed_size(request);
	uint8_t *bytes = malloc(size);
	int r;

	if (!bytes)
		return client_fail(client, -ENOMEM, "request: no memory for %zu bytes", size);
	(void)kvg__worker_request__pack(request, bytes);
	while ((r = kvg_frame_send(client->socket, bytes, size, fds, fd_count)) == -EAGAIN) {
		r = wait_socket(client, POLLIN | POLLOUT);
		if (r < 0)
			break;
	}
	free(bytes);
	/* The daemon may have said why before it closed. */
	if ((r == -EPIPE || r == -ECONNRESET) && client_receive(client) == 0)
		return client_break(client, -EPIPE, "the daemon is gone");
	if (r < 0 && !client->broken)
		return client_fail(client, r, "request of %zu bytes cannot be sent: %s", size, strerror(-r));
	return client->broken;
}

int client_request(struct kvg_client *client, Kvg__WorkerRequest *request, const int *fds, unsigned fd_count)
{
	int r = client_check(client);

	if (r < 0)
		return r;
	request->id = ++client->request_id;
	client->awaited_id = request->id;
	r = send_request(client, request, fds, fd_count);
	while (r == 0 && !client->reply)
		r = wait_socket(client, POLLIN);
	client->awaited_id = 0;
	/* A reply that came before the connection ended still counts. */
	if (!client->reply)
		return r;
	if (client->reply->body_case == KVG__WORKER_REPLY__BODY_ERROR) {
		const Kvg__Error *error = client->reply->error;

		r = client_fail(client, error->status < 0 ? error->status : -EPROTO, "%s", error->text);
		client_reply_free(client);
		return r;
	}
	return 0;
}

void client_reply_free(struct kvg_client *client)
{
	if (!client->reply)
		return;
	kvg__worker_reply__free_unpacked(client->reply, NULL);
	client->reply = NULL;
	kvg_frame_deinit(&client->reply_frame);
}
