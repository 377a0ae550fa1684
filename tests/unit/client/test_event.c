#include "tests/support/runner.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "client/client.h"
#include "tests/unit/client/peer.h"

/* Sends slots added (with that many descriptors of a whole extent) or dropped. */
static void send_slots(struct peer *peer, bool added, const uint32_t *slots, unsigned count, unsigned fd_count)
{
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	Kvg__ExtentsAdded add = KVG__EXTENTS_ADDED__INIT;
	Kvg__ExtentsDropped drop = KVG__EXTENTS_DROPPED__INIT;
	uint32_t copy[8];
	int fds[8] = {0};

	memcpy(copy, slots, count * sizeof(*slots));
	for (unsigned i = 0; i < fd_count; i++)
		fds[i] = kvg_memfd_new("extent", PEER_EXTENT);
	add.slots = drop.slots = copy;
	add.n_slots = drop.n_slots = count;
	reply.body_case = added ? KVG__WORKER_REPLY__BODY_EXTENTS_ADDED : KVG__WORKER_REPLY__BODY_EXTENTS_DROPPED;
	if (added)
		reply.extents_added = &add;
	else
		reply.extents_dropped = &drop;
	peer_send(peer, &reply, fds, fd_count);
	for (unsigned i = 0; i < fd_count; i++)
		(void)close(fds[i]);
}

static void maps_what_comes_and_unmaps_what_goes(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 0);
	struct kvg_view view;

	(void)state;
	send_slots(peer, true, (const uint32_t[]){3, 9, 4}, 3, 3);
	assert_int_equal(kvg_mapped_bytes(client), 0);
	assert_int_equal(kvg_process(client), 0);
	assert_int_equal(kvg_mapped_bytes(client), 3 * PEER_EXTENT);
	assert_int_equal(kvg_view(client, &view), 0);
	memset(view.k_base + 3 * PEER_EXTENT, 1, 2 * PEER_EXTENT);
	view.k_base[9 * PEER_EXTENT] = 1;
	send_slots(peer, false, (const uint32_t[]){3, 4, 9}, 3, 0);
	assert_int_equal(kvg_process(client), 0);
	assert_int_equal(kvg_mapped_bytes(client), 0);
	/* Acknowledged without being asked; this waits for it. */
	assert_int_equal(kvg_return_memory(client), 0);
	send_slots(peer, true, (const uint32_t[]){3}, 1, 1);
	assert_int_equal(kvg_process(client), 0);
	assert_int_equal(view.k_base[3 * PEER_EXTENT], 0);
	(void)kvg_close(client);
	peer_stop(peer);
	assert_int_equal(peer->acknowledged, 2);
	peer_free(peer);
}

struct late {
	struct peer *peer;
	atomic_bool over;
};

/* Sends what was counted when nothing is left for the client but to wait for it. */
static void *send_late(void *user)
{
	struct late *late = user;

	while (!atomic_load(&late->over) && !__atomic_load_n(&late->peer->ring->sleeping, __ATOMIC_ACQUIRE))
		(void)sched_yield();
	if (!atomic_load(&late->over))
		send_slots(late->peer, false, (const uint32_t[]){3}, 1, 0);
	return NULL;
}

static void returns_memory_that_it_hears_of_late(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 0);
	struct late late = {.peer = peer};
	pthread_t thread;

	(void)state;
	send_slots(peer, true, (const uint32_t[]){3}, 1, 1);
	assert_int_equal(kvg_process(client), 0);
	__atomic_store_n(&peer->ring->events, client->events + 1, __ATOMIC_RELEASE);
	assert_int_equal(pthread_create(&thread, NULL, send_late, &late), 0);
	assert_int_equal(kvg_return_memory(client), 0);
	atomic_store(&late.over, true);
	assert_int_equal(pthread_join(thread, NULL), 0);
	assert_int_equal(kvg_mapped_bytes(client), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	assert_int_equal(peer->acknowledged, 2);
	peer_free(peer);
}

static void send_goodbye(struct peer *peer)
{
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	Kvg__Goodbye goodbye = KVG__GOODBYE__INIT;

	goodbye.reason = (char *)(uintptr_t) "kvgated stops";
	reply.body_case = KVG__WORKER_REPLY__BODY_GOODBYE;
	reply.goodbye = &goodbye;
	peer_send(peer, &reply, NULL, 0);
}

static void send_garbage(struct peer *peer)
{
	assert_int_equal(kvg_frame_send(peer->connection, "\xff\xff\xff", 3, NULL, 0), 0);
}

static void send_unasked_reply(struct peer *peer)
{
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	Kvg__GateLoaded loaded = KVG__GATE_LOADED__INIT;

	reply.has_id = 1;
	reply.id = 99;
	reply.body_case = KVG__WORKER_REPLY__BODY_GATE_LOADED;
	reply.gate_loaded = &loaded;
	peer_send(peer, &reply, NULL, 0);
}

static void send_bodiless(struct peer *peer)
{
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;

	reply.has_id = 1;
	peer_send(peer, &reply, NULL, 0);
}

static void send_too_few_fds(struct peer *peer)
{
	send_slots(peer, true, (const uint32_t[]){1, 2}, 2, 1);
}

static void send_wild_slot(struct peer *peer)
{
	send_slots(peer, true, (const uint32_t[]){PEER_SLOTS}, 1, 1);
}

static void send_same_slot_twice(struct peer *peer)
{
	send_slots(peer, true, (const uint32_t[]){1, 1}, 2, 2);
}

static void send_unknown_drop(struct peer *peer)
{
	send_slots(peer, false, (const uint32_t[]){5, 6}, 2, 0);
}

static void a_broken_daemon_ends_the_connection(void **state)
{
	static const struct {
		void (*send)(struct peer *peer);
		int status;
		const char *says;
	} wrongs[] = {
		{send_goodbye, -EPIPE, "daemon ended the connection: kvgated stops"},
		{send_garbage, -EPROTO, "a message of 3 bytes cannot be read"},
		{send_unasked_reply, -EPROTO, "reply to request 99"},
		{send_bodiless, -EPROTO, "event of unknown type 0"},
		{send_too_few_fds, -EPROTO, "2 extents came with 1 descriptors"},
		{send_wild_slot, -EPROTO, "slot 20 of 20"},
		{send_same_slot_twice, -EPROTO, "slot 1 of 20"},
		{send_unknown_drop, -EPROTO, "slots 5 to 6 of 20 cannot be unmapped"},
		{peer_stop, -EPIPE, "the daemon is gone"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(wrongs) / sizeof(*wrongs); i++) {
		struct peer *peer = peer_new();
		struct kvg_client *client = peer_connect(peer, 0);
		struct pollfd poll_fd = {.fd = kvg_fd(client), .events = POLLIN};

		wrongs[i].send(peer);
		assert_int_equal(poll(&poll_fd, 1, -1), 1);
		assert_int_equal(kvg_process(client), wrongs[i].status);
		if (!strstr(kvg_error(client), wrongs[i].says))
			fail_msg("'%s' does not say '%s'", kvg_error(client), wrongs[i].says);
		/* And so does every later call. */
		assert_int_equal(kvg_nop(client), wrongs[i].status);
		assert_int_equal(kvg_load_gate(client, "pilot-lm/config.json"), wrongs[i].status);
		assert_non_null(strstr(kvg_error(client), wrongs[i].says));
		(void)kvg_close(client);
		if (wrongs[i].send != peer_stop)
			peer_stop(peer);
		peer_free(peer);
	}
}

static void extents_before_a_layout_are_refused(void **state)
{
	static const bool added[] = {true, false};

	(void)state;
	for (unsigned i = 0; i < 2; i++) {
		struct peer *peer = peer_new();
		struct kvg_client *client;

		peer_start(peer);
		assert_int_equal(kvg_connect(peer->path, "test", &client, NULL, 0), 0);
		send_slots(peer, added[i], (const uint32_t[]){0}, 1, added[i]);
		assert_int_equal(kvg_process(client), -EPROTO);
		(void)kvg_close(client);
		peer_stop(peer);
		peer_free(peer);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(maps_what_comes_and_unmaps_what_goes),
		cmocka_unit_test(returns_memory_that_it_hears_of_late),
		cmocka_unit_test(a_broken_daemon_ends_the_connection),
		cmocka_unit_test(extents_before_a_layout_are_refused),
	};

	return runner_run("event", tests, sizeof(tests) / sizeof(*tests));
}
