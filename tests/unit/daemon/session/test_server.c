/* Rings that are polled and rings that rest; all workers taken down at once. */
#include "tests/support/session_fixture.h"

#include <string.h>
#include <unistd.h>

static bool is_resting(struct session *session)
{
	return list_empty(&session->server.active);
}

static void nop(struct session_peer *peer, uint64_t user_data)
{
	session_submit(peer, &(struct kvg_sqe){.op = KVG_OP_NOP, .user_data = user_data});
	assert_int_equal(session_reap(peer).user_data, user_data);
}

/* The doorbell makes a ring active; it rests again when it has been quiet, and wants the doorbell then. */
static void test_active_and_resting(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);

	(void)state;
	session_hello(peer);
	for (uint64_t i = 1; i < 200; i++) {
		session_run(session, is_resting, NULL);
		assert_int_equal(__atomic_load_n(&peer->ring->need_wakeup, __ATOMIC_SEQ_CST), 1);
		nop(peer, i);
	}
	session_peer_free(peer);
	session_free(session);
}

/* While it is active no doorbell is needed. */
static void test_spinning(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);

	(void)state;
	session->server.spin_ns = 10000000000u;
	session_hello(peer);
	nop(peer, 1);
	assert_false(list_empty(&session->server.active));
	assert_int_equal(__atomic_load_n(&peer->ring->need_wakeup, __ATOMIC_SEQ_CST), 0);
	for (uint64_t i = 2; i < 1000; i++)
		nop(peer, i);
	session_peer_free(peer);
	session_free(session);
}

/* Everybody gets a turn, even beside one that never stops. */
static void test_fair_share(void **state)
{
	struct session *session = session_new();
	struct session_peer *peers[5];

	(void)state;
	for (unsigned i = 0; i < 5; i++) {
		peers[i] = session_connect(session, i % 2);
		session_hello(peers[i]);
	}
	for (uint64_t round = 0; round < 50; round++) {
		for (unsigned i = 0; i < 5; i++)
			for (uint64_t n = 0; n < SESSION_ENTRIES; n++)
				session_submit(peers[i], &(struct kvg_sqe){.op = KVG_OP_NOP, .user_data = n});
		for (unsigned i = 0; i < 5; i++)
			for (uint64_t n = 0; n < SESSION_ENTRIES; n++)
				assert_int_equal(session_reap(peers[i]).user_data, n);
	}
	for (unsigned i = 0; i < 5; i++)
		session_peer_free(peers[i]);
	session_free(session);
}

static void test_stop_says_why(void **state)
{
	struct session *session = session_new();
	struct session_peer *peers[3];

	(void)state;
	for (unsigned i = 0; i < 3; i++) {
		peers[i] = session_connect(session, 0);
		session_hello(peers[i]);
	}
	session_register(peers[2]);
	assert_int_equal(session->server.tenants[0]->workers, 3);
	server_stop(&session->server, "over");
	session_wait_empty(session);
	assert_int_equal(session->server.tenants[0]->workers, 0);
	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(session_reply(peers[i])->body_case, KVG__WORKER_REPLY__BODY_GOODBYE);
		assert_string_equal(peers[i]->reply->goodbye->reason, "over");
		assert_false(session_receive(peers[i]));
		session_peer_free(peers[i]);
	}
	session_free(session);
}

static void test_tenants_by_name(void **state)
{
	struct session *session = session_new();

	(void)state;
	assert_ptr_equal(server_tenant(&session->server, "b"), session->server.tenants[1]);
	assert_null(server_tenant(&session->server, "c"));
	assert_null(server_tenant(&session->server, ""));
	session_free(session);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_active_and_resting),
		cmocka_unit_test(test_spinning),
		cmocka_unit_test(test_fair_share),
		cmocka_unit_test(test_stop_says_why),
		cmocka_unit_test(test_tenants_by_name),
	};

	return runner_run("server", tests, sizeof(tests) / sizeof(tests[0]));
}
