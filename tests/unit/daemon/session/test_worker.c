/* One connection from hello to its end, whoever ends it. */
#include "tests/support/session_fixture.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static struct session_peer *ready_peer(struct session *session, size_t tenant)
{
	struct session_peer *peer = session_connect(session, tenant);

	session_hello(peer);
	session_register(peer);
	return peer;
}

static struct kvg_cqe call(struct session_peer *peer, struct kvg_sqe sqe)
{
	static uint64_t next;
	struct kvg_cqe cqe;

	sqe.user_data = ++next;
	session_submit(peer, &sqe);
	cqe = session_reap(peer);
	assert_int_equal(cqe.user_data, next);
	return cqe;
}

static uint64_t create(struct session_peer *peer, uint32_t context)
{
	struct kvg_cqe cqe = call(peer, (struct kvg_sqe){.op = KVG_OP_CREATE, .create.context_tokens = context});

	assert_int_equal(cqe.status, 0);
	return cqe.seq;
}

static void expect_goodbye(struct session_peer *peer, const char *reason)
{
	while (session_reply(peer)->body_case != KVG__WORKER_REPLY__BODY_GOODBYE)
		;
	assert_string_equal(peer->reply->goodbye->reason, reason);
	assert_false(session_receive(peer));
}

/* Extents come as events before the completion that counts them, with descriptors for each slot. */
static void test_life(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = ready_peer(session, 0);
	const struct quota_account *account = session->server.tenants[0]->quota.account;
	struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .seq = create(peer, 1024), .reserve.tokens = 1024};
	struct kvg_cqe cqe = call(peer, sqe);

	(void)state;
	assert_int_equal(cqe.status, 0);
	assert_int_equal(cqe.events, 1);
	assert_int_equal(session_reply(peer)->body_case, KVG__WORKER_REPLY__BODY_EXTENTS_ADDED);
	assert_int_equal(peer->reply->extents_added->n_slots, 2);
	assert_int_equal(peer->frame.fd_count, 2);
	assert_int_equal(
		session->kind->ops->physical(session->kind, peer->frame.fds[1], SESSION_EXTENT), SESSION_EXTENT);
	assert_int_equal(account->charged, 2 * SESSION_EXTENT);
	cqe = call(peer, (struct kvg_sqe){.op = KVG_OP_FREE, .seq = sqe.seq});
	assert_int_equal(cqe.status, 0);
	assert_int_equal(cqe.events, 2);
	assert_int_equal(session_reply(peer)->body_case, KVG__WORKER_REPLY__BODY_EXTENTS_DROPPED);
	assert_int_equal(peer->reply->extents_dropped->n_slots, 2);
	assert_int_equal(account->unreturned, 2 * SESSION_EXTENT);
	cqe = call(peer, (struct kvg_sqe){.op = KVG_OP_UNMAPPED, .unmapped.event = 2});
	assert_int_equal(cqe.status, 0);
	assert_int_equal(account->charged, 0);
	assert_int_equal(session_worker(session, 0)->submitted, 4);
	assert_int_equal(session_worker(session, 0)->errors, 0);
	session_peer_free(peer);
	session_free(session);
}

static void test_entries_before_a_layout(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);

	(void)state;
	session_hello(peer);
	assert_int_equal(call(peer, (struct kvg_sqe){.op = KVG_OP_NOP}).status, 0);
	assert_int_equal(call(peer, (struct kvg_sqe){.op = KVG_OP_CREATE}).status, -ENOTCONN);
	assert_string_equal(session_text(peer), "entry: operation 1 before a layout is registered");
	assert_int_equal(session_worker(session, 0)->errors, 1);
	session_peer_free(peer);
	session_free(session);
}

/* Entries with wild contents get an error each, and the worker lives on. */
static void test_wild_entries(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = ready_peer(session, 0);
	uint64_t seed = 88172645463325252u;

	(void)state;
	(void)create(peer, 100);
	for (unsigned i = 0; i < 3000; i++) {
		struct kvg_sqe sqe;
		uint64_t *words = (uint64_t *)(void *)&sqe;

		for (unsigned j = 0; j < sizeof(sqe) / sizeof(uint64_t); j++) {
			seed ^= seed << 13;
			seed ^= seed >> 7;
			seed ^= seed << 17;
			words[j] = seed;
		}
		sqe.op = (uint8_t)(seed % 12);
		if (i % 2) {
			sqe.flags = 0;
			sqe.reserved0 = 0;
			sqe.layout = sqe.wait_event = 0;
			sqe.wait_value = sqe.signal_value = 0;
			sqe.seq = (uint64_t)1 << 32;
			sqe.generation = 0;
		}
		(void)call(peer, sqe);
	}
	assert_int_equal(call(peer, (struct kvg_sqe){.op = KVG_OP_NOP}).status, 0);
	session_peer_free(peer);
	session_free(session);
}

static void test_lying_cursor(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = ready_peer(session, 0);

	(void)state;
	(void)call(peer, (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = create(peer, 1024), .reserve.tokens = 1024});
	peer->sq_tail += SESSION_ENTRIES + 1;
	session_submit(peer, &(struct kvg_sqe){.op = KVG_OP_NOP});
	expect_goodbye(peer, "a ring cursor is out of range");
	session_wait_empty(session);
	session_peer_free(peer);
	session_free(session);
}

/* Messages that are none. */
static void test_broken_messages(void **state)
{
	static const char junk[] = "\xff\xff\xff\xff\xff";
	struct session *session = session_new();
	struct session_peer *peers[3];
	int event = eventfd(0, EFD_CLOEXEC), fds[5] = {event, event, event, event, event};
	char *large = calloc(1, 64 * 1024 + 1);

	(void)state;
	assert_non_null(large);
	for (unsigned i = 0; i < 3; i++)
		peers[i] = session_connect(session, 0);
	assert_int_equal(kvg_frame_send(peers[0]->fd, junk, sizeof(junk) - 1, NULL, 0), 0);
	expect_goodbye(peers[0], "a control message is truncated or malformed");
	assert_int_equal(kvg_frame_send(peers[1]->fd, large, 64 * 1024 + 1, NULL, 0), 0);
	expect_goodbye(peers[1], "a control message is larger than 65536 bytes");
	assert_int_equal(kvg_frame_send(peers[2]->fd, junk, 1, fds, 5), 0);
	expect_goodbye(peers[2], "a control message carries more than 4 descriptors");
	session_wait_empty(session);
	for (unsigned i = 0; i < 3; i++)
		session_peer_free(peers[i]);
	assert_int_equal(close(event), 0);
	free(large);
	session_free(session);
}

/* A peer that hangs up in the middle of everything gives all of it back. */
static void test_hang_up(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = ready_peer(session, 0), *other = ready_peer(session, 1);
	uint64_t handle = create(peer, 1024);

	(void)state;
	session_submit(peer, &(struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = handle, .reserve.tokens = 1024});
	session_submit(peer, &(struct kvg_sqe){.op = KVG_OP_FREE, .seq = handle});
	session_submit(peer, &(struct kvg_sqe){.op = KVG_OP_CREATE, .create.context_tokens = 100});
	session_peer_free(peer);
	assert_int_equal(call(other, (struct kvg_sqe){.op = KVG_OP_NOP}).status, 0);
	session_peer_free(other);
	session_wait_empty(session);
	assert_int_equal(session->server.pool->quota.account->charged, 0);
	session_free(session);
}

/* Its process is gone, although a forked child keeps the socket open: the pidfd tells. */
static void test_process_dies(void **state)
{
	struct session *session = session_new();
	struct ucred peer = {.uid = getuid(), .gid = getgid()};
	int fds[2], hold[2];
	char byte;

	(void)state;
	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
	assert_int_equal(pipe(hold), 0);
	peer.pid = fork();
	assert_true(peer.pid >= 0);
	if (peer.pid == 0) {
		(void)close(hold[1]);
		_exit((int)read(hold[0], &byte, 1));
	}
	assert_int_equal(worker_new(&session->server, session->server.tenants[0], fds[1], &peer), 0);
	assert_int_equal(session->server.worker_count, 1);
	assert_int_equal(close(hold[0]) | close(hold[1]), 0); /* the child ends */
	session_wait_empty(session);
	assert_int_equal(waitpid(peer.pid, NULL, 0), peer.pid);
	assert_int_equal(close(fds[0]), 0);
	session_free(session);
}

/* Sends requests that are answered with an error, as many as the socket takes. */
static bool flood(struct session *session)
{
	const struct session_peer *peer = session->user;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	uint8_t data[64];
	size_t size;

	request.id = 1;
	size = kvg__worker_request__pack(&request, data);
	while (kvg_frame_send(peer->fd, data, size, NULL, 0) == 0)
		;
	return session->server.worker_count == 0;
}

/* A peer that asks and asks and never reads an answer is told to go. */
static void test_does_not_read(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = ready_peer(session, 0);

	(void)state;
	session_run(session, flood, peer);
	session_peer_free(peer);
	session_free(session);
}

/* A worker that sleeps is sent a wake event with the completion, once. */
static void test_wake(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = ready_peer(session, 0);

	(void)state;
	__atomic_store_n(&peer->ring->sleeping, 1, __ATOMIC_SEQ_CST);
	assert_int_equal(call(peer, (struct kvg_sqe){.op = KVG_OP_NOP}).status, 0);
	assert_int_equal(session_reply(peer)->body_case, KVG__WORKER_REPLY__BODY_WAKE);
	assert_int_equal(peer->reply->id, 0);
	assert_int_equal(peer->ring->sleeping, 0);
	session_peer_free(peer);
	session_free(session);
}

/* Entries under way count for all workers of a tenant; what gives memory back is taken all the same. */
static void test_entries_of_a_tenant(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = ready_peer(session, 0), *other = ready_peer(session, 0),
			    *stranger = ready_peer(session, 1);
	struct tenant *tenant = session->server.tenants[0];
	struct kvg_sqe reserve = {.op = KVG_OP_RESERVE, .seq = create(peer, 1024), .reserve.tokens = 128};
	struct kvg_sqe end = {.op = KVG_OP_FREE, .seq = reserve.seq};

	(void)state;
	tenant->limits.entries = 2;
	for (unsigned i = 0; i < 3; i++)
		session_submit(peer, &reserve);
	session_submit(peer, &end);
	assert_int_equal(session_reap(peer).status, 0); /* in order, the refused one, too */
	assert_int_equal(session_reap(peer).status, 0);
	assert_int_equal(session_reap(peer).status, -EAGAIN);
	assert_string_equal(session_text(peer), "tenant a: 2 entries under way, at most 2 (max_entries)");
	assert_int_equal(session_reap(peer).status, 0);
	assert_int_equal(tenant->entries, 0);

	tenant->limits.entries = 1;
	reserve.seq = create(peer, 1024);
	session_submit(peer, &reserve);
	session_submit(other, &(struct kvg_sqe){.op = KVG_OP_CREATE, .create.context_tokens = 1});
	session_submit(stranger, &(struct kvg_sqe){.op = KVG_OP_CREATE, .create.context_tokens = 1});
	assert_int_equal(session_reap(other).status, -EAGAIN);
	assert_int_equal(session_reap(stranger).status, 0);
	assert_int_equal(session_reap(peer).status, 0);
	session_submit(peer, &reserve);
	session_peer_free(peer); /* what was under way goes with it */
	session_peer_free(other);
	session_peer_free(stranger);
	session_wait_empty(session);
	assert_int_equal(tenant->entries, 0);
	session_free(session);
}

static void test_staged_rows_of_a_tenant(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = ready_peer(session, 0);
	struct tenant *tenant = session->server.tenants[0];
	struct kvg_sqe stage = {.op = KVG_OP_STAGE,
		.seq = create(peer, 1024),
		.stage = {.kind = KVG_STAGE_SCORE, .layer_count = 2, .rows = 512}}; /* too many for the reactor */

	(void)state;
	assert_int_equal(
		call(peer, (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = stage.seq, .reserve.tokens = 512}).status, 0);
	tenant->limits.staged_rows = 2048; /* two layers of 512 rows, twice */
	for (unsigned i = 0; i < 2; i++)
		session_submit(peer, &stage);
	stage.stage.layer_count = stage.stage.rows = 1;
	session_submit(peer, &stage);
	assert_int_equal(session_reap(peer).status, 0);
	assert_int_equal(session_reap(peer).status, 0);
	assert_int_equal(session_reap(peer).status, -EAGAIN);
	assert_string_equal(session_text(peer),
		"tenant a: stage: 1 rows of all layers, 2048 under way, at most 2048 (max_staged_rows)");
	assert_int_equal(tenant->staged_rows, 0);
	assert_int_equal(call(peer, stage).status, 0);
	stage.stage.rows = stage.stage.layer_count = UINT32_MAX;
	assert_int_equal(call(peer, stage).status, -EAGAIN);
	session_submit(peer, &stage);
	session_peer_free(peer);
	session_wait_empty(session);
	assert_int_equal(tenant->staged_rows, 0);
	session_free(session);
}

static void test_overhead(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	uint64_t before;

	(void)state;
	assert_int_equal(worker_overhead(session_worker(session, 0)), 0);
	session_hello(peer);
	before = worker_overhead(session_worker(session, 0));
	assert_true(before > 0);
	session_register(peer);
	assert_true(worker_overhead(session_worker(session, 0)) > before);
	session_peer_free(peer);
	session_free(session);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_life),
		cmocka_unit_test(test_entries_before_a_layout),
		cmocka_unit_test(test_wild_entries),
		cmocka_unit_test(test_lying_cursor),
		cmocka_unit_test(test_broken_messages),
		cmocka_unit_test(test_hang_up),
		cmocka_unit_test(test_process_dies),
		cmocka_unit_test(test_does_not_read),
		cmocka_unit_test(test_wake),
		cmocka_unit_test(test_entries_of_a_tenant),
		cmocka_unit_test(test_staged_rows_of_a_tenant),
		cmocka_unit_test(test_overhead),
	};

	return runner_run("worker", tests, sizeof(tests) / sizeof(tests[0]));
}
