#include "client/client.h"

#include <sched.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SPIN_BATCH   64u        /* looks between two readings of the clock */
#define SPIN_LOOK_NS 1000000ull /* a spinning call looks at the socket this often: the daemon may be gone */
#define NO_ENTRY     UINT32_MAX

int client_entries_new(struct kvg_client *client)
{
	uint32_t capacity = client->ring.capacity;

	client->entries = calloc(capacity, sizeof(*client->entries));
	client->ready = calloc(capacity, sizeof(*client->ready));
	if (!client->entries || !client->ready)
		return client_fail(client, -ENOMEM, "no memory for %u ring entries", capacity);
	for (uint32_t i = 0; i < capacity; i++)
		client->entries[i].next_free = i + 1 < capacity ? i + 1 : NO_ENTRY;
	client->free_entry = 0;
	return 0;
}

static int submit(struct kvg_client *client, const struct kvg_sqe *sqe, const struct entry *content)
{
	/* One place is kept for acknowledgements and relief, so that memory can go back whatever the caller has in
	 * flight. */
	bool kept = content->kind == ENTRY_ACK || content->kind == ENTRY_RELIEF;
	uint32_t room = client->ring.capacity - (kept ? 0 : 1);
	uint32_t index = client->free_entry;
	struct kvg_sqe wire = *sqe;
	struct entry *entry;
	int r;

	if (index == NO_ENTRY || client->ring.outstanding >= room)
		return -EAGAIN;
	r = client->gpu ? gpu_order(client, &wire) : 0;
	if (r < 0)
		return r == -EAGAIN ? -EIO : r;
	entry = &client->entries[index];
	client->free_entry = entry->next_free;
	*entry = *content;
	entry->op = sqe->op;
	entry->serial = ++client->serial;
	entry->next_free = NO_ENTRY;
	wire.user_data = (uint64_t)entry->serial << 32 | index;
	ring_submit(&client->ring, &wire);
	return 0;
}

int client_submit(struct kvg_client *client, enum entry_kind kind, const struct kvg_sqe *sqe, uint64_t user_data,
	uint32_t argument)
{
	const struct entry entry = {.kind = kind, .argument = argument, .user_data = user_data};

	return submit(client, sqe, &entry);
}

int client_submit_stage(struct kvg_client *client, const struct kvg_sqe *sqe, enum stage_area area, uint32_t piece)
{
	const struct entry entry = {.kind = ENTRY_STAGE, .argument = piece, .area = (uint8_t)area};

	return submit(client, sqe, &entry);
}

/* The entry in flight that a completion belongs to, or NULL for nonsense. */
static struct entry *find_entry(struct kvg_client *client, uint64_t user_data)
{
	uint32_t index = (uint32_t)user_data;
	struct entry *entry;

	if (index >= client->ring.capacity)
		return NULL;
	entry = &client->entries[index];
	return entry->kind != ENTRY_FREE && entry->serial == user_data >> 32 ? entry : NULL;
}

static void keep_ready(struct kvg_client *client, const struct completion *completion)
{
	uint32_t index = (client->ready_first + client->ready_count++) % client->ring.capacity;

	client->ready[index] = *completion;
}

/* STAGE: the piece is free again; the first error is kept until a call reports it. */
static void stage_completed(struct kvg_client *client, const struct entry *entry, const struct completion *completion)
{
	if (entry->area == AREA_HOST)
		staging_done(&client->staging, entry->argument);
	else if (entry->area == AREA_DEVICE)
		staging_done(&client->gpu->staging, entry->argument);
	client->stage_count--;
	if (completion->cqe.status >= 0 || client->stage_status)
		return;
	client->stage_status = completion->cqe.status;
	memcpy(client->stage_text, completion->text, sizeof(client->stage_text));
}

/* ASYNC: kept for its _finish(). What waits for it in the worker's stream goes on; the extents it brought are mapped.
 */
static void async_completed(struct kvg_client *client, const struct entry *entry, const struct completion *completion)
{
	struct pending *pending = client->pending;
	uint32_t slot, appended;

	while (pending && pending->number != entry->argument)
		pending = pending->next;
	if (!pending)
		return;
	pending->completion = *completion;
	pending->done = true;
	if (!pending->gate)
		return;
	slot = (uint32_t)pending->seq;
	appended = client->sequences[slot].committed_pos - client->sequences[slot].fold_pos;
	gpu_gate_open(client->gpu, slot, pending->gate, completion->moved ? &appended : NULL);
}

static int complete(struct kvg_client *client, struct completion *completion)
{
	struct entry *entry = find_entry(client, completion->cqe.user_data);
	int r = 0;

	if (!entry || completion->cqe.status > 0)
		return client_break(client, -EPROTO, "daemon: completion %llx with status %d belongs to no entry",
			(unsigned long long)completion->cqe.user_data, completion->cqe.status);
	completion->op = entry->op;
	completion->moved = client_refresh(client, entry->op, &completion->cqe);
	switch (entry->kind) {
	case ENTRY_USER:
		completion->cqe.user_data = entry->user_data;
		keep_ready(client, completion);
		break;
	case ENTRY_CALL:
		client->call = *completion;
		client->call_done = true;
		r = client_move_counter(client, completion);
		break;
	case ENTRY_ASYNC:
		async_completed(client, entry, completion);
		break;
	case ENTRY_STAGE:
		stage_completed(client, entry, completion);
		break;
	case ENTRY_ACK:
		client->ack_in_flight = false;
		client->ack_done = entry->argument;
		if (completion->cqe.status < 0)
			r = client_break(client, -EPROTO, "daemon: refuses that event %u is unmapped: %s",
				entry->argument, completion->text);
		break;
	case ENTRY_RELIEF:
	case ENTRY_FREE:
		break;
	}
	entry->kind = ENTRY_FREE;
	entry->next_free = client->free_entry;
	client->free_entry = (uint32_t)(entry - client->entries);
	return r;
}

/* The next completion whose events are handled: 1 with *ret, 0 when there is none, or a broken connection's status. */
static int peek_ready(struct kvg_client *client, const struct kvg_cqe **ret)
{
	int r = ring_peek(&client->ring, ret);

	if (r < 0)
		return client_break(client, r, "daemon: completion cursor is out of range, %u entries are in flight",
			client->ring.outstanding);
	return r && (int32_t)(client->events - (*ret)->events) >= 0;
}

static int acknowledge(struct kvg_client *client)
{
	struct kvg_sqe sqe = {.op = KVG_OP_UNMAPPED, .unmapped.event = client->drop_event};

	if (client->ack_in_flight || client->ack_sent == client->drop_event)
		return 0;
	if (client_submit(client, ENTRY_ACK, &sqe, 0, client->drop_event) < 0)
		return 0; /* again when a completion has made room */
	client->ack_in_flight = true;
	client->ack_sent = client->drop_event;
	return 0;
}

int client_advance(struct kvg_client *client)
{
	const struct kvg_cqe *cqe = NULL;
	struct completion completion;
	int r = client_check(client);

	if (r == 0 && ring_events(&client->ring) != client->events)
		r = client_receive(client);
	while (r == 0 && (r = peek_ready(client, &cqe)) > 0) {
		completion.cqe = *cqe;
		ring_text(&client->ring, cqe, completion.text);
		ring_advance(&client->ring);
		r = complete(client, &completion);
	}
	if (r == 0)
		r = acknowledge(client);
	return r < 0 ? r : client_relieve(client);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield" ::: "memory");
#endif
}

/* Whether something can be handled without waiting. Events are counted before they come. */
static int something_ready(struct kvg_client *client)
{
	const struct kvg_cqe *cqe;
	uint32_t events = client->events;
	int r = ring_events(&client->ring) != events ? client_receive(client) : 0;

	if (r < 0)
		return r;
	return peek_ready(client, &cqe) ?: client->events != events || client_is_pressed(client);
}

/* Looks until something is there or the spinning time is over: 1, 0 or a broken connection's status. */
static int spin(struct kvg_client *client)
{
	uint64_t start = now_ns(), now = start, look = start + SPIN_LOOK_NS;
	uint64_t end = start + client->spin_us * 1000ull;

	while (now < end) {
		for (unsigned i = 0; i < SPIN_BATCH; i++) {
			int r = something_ready(client);

			if (r)
				return r;
			relax();
		}
		(void)sched_yield(); /* the daemon may share this core */
		now = now_ns();
		if (now >= look) {
			int r = client_receive(client);

			if (r < 0)
				return r;
			look = now + SPIN_LOOK_NS;
		}
	}
	return 0;
}

/*
 * Sleeps on the control socket, where everything that ends a wait arrives. What arrived while it was spinning may have
 * asked for something: then it goes on instead.
 */
static int doze(struct kvg_client *client)
{
	struct pollfd poll_fd = {.fd = client->socket, .events = POLLIN};
	const struct kvg_cqe *cqe;
	int r;

	ring_set_sleeping(&client->ring, true);
	r = peek_ready(client, &cqe);
	if (r == 0 && !client_is_pressed(client) && !client_owes(client) && poll(&poll_fd, 1, -1) < 0 && errno != EINTR)
		r = client_break(client, -errno, "control socket: %s", strerror(errno));
	ring_set_sleeping(&client->ring, false);
	return r < 0 ? r : client_receive(client);
}

int client_wait(struct kvg_client *client)
{
	int r = client_check(client);

	if (r == 0 && client->spin_us)
		r = spin(client);
	if (r == 0)
		r = doze(client);
	return r < 0 ? r : client_advance(client);
}

/* The status of client->call. */
static int call_status(struct kvg_client *client)
{
	int r = client->call.cqe.status;

	if (r < 0)
		return client_fail(client, r, "%s", client->call.text[0] ? client->call.text : strerror(-r));
	return 0;
}

int client_call(struct kvg_client *client, const struct kvg_sqe *sqe)
{
	int r = client_advance(client);

	client->call_done = false;
	if (r < 0)
		return r;
	while ((r = client_submit(client, ENTRY_CALL, sqe, 0, 0)) == -EAGAIN) {
		r = client_wait(client);
		if (r < 0)
			return r;
	}
	while (r == 0 && !client->call_done)
		r = client_wait(client);
	return r < 0 ? r : call_status(client);
}

/* ---- asynchronous calls ---- */

struct pending *client_pending(const struct kvg_client *client, uint64_t seq, uint8_t op)
{
	struct pending *pending = client->pending;

	while (pending && (pending->seq != seq || pending->op != op))
		pending = pending->next;
	return pending;
}

int client_submit_async(struct kvg_client *client, const struct kvg_sqe *sqe, struct pending *pending)
{
	int r = client_advance(client);

	pending->seq = sqe->seq;
	pending->op = sqe->op;
	pending->number = ++client->last_pending;
	while (r == 0) {
		r = client_submit(client, ENTRY_ASYNC, sqe, 0, pending->number);
		if (r != -EAGAIN)
			break;
		r = client_wait(client);
	}
	if (r < 0)
		return r;
	pending->next = client->pending;
	client->pending = pending;
	return 0;
}

int client_finish(struct kvg_client *client, uint64_t seq, uint8_t op, const char *call)
{
	struct pending *pending = client_pending(client, seq, op), **link = &client->pending;
	int r = client_advance(client);

	if (!pending)
		return r < 0 ? r
			     : client_fail(client, -ENOENT, "%s: sequence %llx has nothing under way", call,
				       (unsigned long long)seq);
	while (r == 0 && !pending->done)
		r = client_wait(client);
	if (r < 0)
		return r;
	while (*link != pending)
		link = &(*link)->next;
	*link = pending->next;
	client->call = pending->completion;
	/* An eviction's gate has moved it already. */
	r = pending->gate ? 0 : client_move_counter(client, &client->call);
	free(pending);
	return r < 0 ? r : call_status(client);
}

int client_return_memory(struct kvg_client *client)
{
	uint32_t counted = ring_events(&client->ring), event;
	int r = client_advance(client);

	while (r == 0 && (int32_t)(client->events - counted) < 0)
		r = client_wait(client);
	event = client->drop_event;
	while (r == 0 && (int32_t)(client->ack_done - event) < 0)
		r = client_wait(client);
	return r;
}

int client_call_for_room(struct kvg_client *client, const struct kvg_sqe *sqe)
{
	uint32_t returned = client->ack_done;
	int r = client_call(client, sqe);

	if (r == -ENOSPC && returned != client->drop_event) {
		r = client_return_memory(client);
		if (r == 0)
			r = client_call(client, sqe);
	}
	return r;
}

int kvg_return_memory(struct kvg_client *client)
{
	CLIENT_TURN(client);
	int r = client_receive(client);

	return r < 0 ? r : client_return_memory(client);
}

int kvg_process(struct kvg_client *client)
{
	CLIENT_TURN(client);
	int r = client_receive(client);

	return r < 0 ? r : client_advance(client);
}

int kvg_submit(struct kvg_client *client, const struct kvg_sqe *entry)
{
	CLIENT_TURN(client);
	int r = client_advance(client);

	if (r < 0)
		return r;
	if (entry->user_data >> 63)
		return client_fail(client, -EINVAL, "entry: user_data %llx is not below 2^63",
			(unsigned long long)entry->user_data);
	if (client->user_count < client->ring.capacity)
		r = client_submit(client, ENTRY_USER, entry, entry->user_data, 0);
	else
		r = -EAGAIN;
	if (r == -EAGAIN)
		return client_fail(client, r, "ring: %u entries in flight and %u completions to reap, room for %u",
			client->ring.outstanding, client->ready_count, client->ring.capacity - 1);
	if (r == 0)
		client->user_count++;
	return r;
}

/* The device's counters follow here, in the caller's turn, so that their place in its stream is the call's. */
static uint32_t take_ready(struct kvg_client *client, struct kvg_cqe *ret, const char **texts, uint32_t max)
{
	uint32_t taken = 0;

	for (; taken < max && client->ready_count; taken++) {
		struct completion *completion = &client->ready[client->ready_first];

		(void)client_move_counter(client, completion);
		ret[taken] = completion->cqe;
		if (texts)
			texts[taken] = completion->text;
		client->ready_first = (client->ready_first + 1) % client->ring.capacity;
		client->ready_count--;
		client->user_count--;
	}
	return taken;
}

int kvg_reap(struct kvg_client *client, struct kvg_cqe *ret, const char **texts, uint32_t max, uint32_t min)
{
	CLIENT_TURN(client);
	int r;

	if (max > INT32_MAX)
		max = INT32_MAX;
	if (min > max || min > client->user_count)
		return client_fail(client, -EINVAL, "reap: %u completions wanted, %u entries in flight, room for %u",
			min, client->user_count, max);
	r = client_advance(client);
	/* Completions that came before the connection ended are handed out first. */
	while (r == 0 && client->ready_count < min)
		r = client_wait(client);
	if (r < 0 && client->ready_count == 0)
		return r;
	return (int)take_ready(client, ret, texts, max);
}
