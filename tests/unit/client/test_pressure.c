#include "tests/support/runner.h"

#include <errno.h>
#include <string.h>

#include "client/client.h"
#include "tests/unit/client/peer.h"

static const struct kvg_policy policy = {.ratio = 0.5, .mode = KVG_MODE_CHUNKED};

static void end(struct kvg_client *client, struct peer *peer)
{
	(void)kvg_close(client);
	peer_stop(peer);
}

static void answers_each_number_once(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_pressure(client), 0);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 20), 0);
	peer_press(peer, 3);
	/* A call that submits nothing itself. */
	assert_int_equal(kvg_reserve(client, seq, 10), 0);
	assert_int_equal(client->relieved, 3);
	assert_int_equal(kvg_pressure(client), 3);
	assert_int_equal(kvg_nop(client), 0);
	assert_int_equal(kvg_process(client), 0);
	peer_press(peer, 0);
	assert_int_equal(kvg_nop(client), 0);
	assert_int_equal(kvg_pressure(client), 0);
	peer_press(peer, 4);
	assert_int_equal(kvg_pressure(client), 4);
	assert_int_equal(kvg_nop(client), 0);
	end(client, peer);
	assert_int_equal(peer->reliefs, 2);
	assert_int_equal(peer_last(peer, KVG_OP_RELIEF).relief.pressure, 4);
	peer_free(peer);
}

static bool press_with_evictions(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)cqe;
	if (sqe->op == KVG_OP_EVICT)
		peer_press(peer, 5);
	return true;
}

static void acknowledges_before_it_answers(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	uint64_t seq;

	(void)state;
	peer->tamper = press_with_evictions;
	client = peer_connect(peer, 0);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_commit(client, seq, 40), 0);
	assert_int_equal(kvg_evict_async(client, seq, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kvg_evict_finish(client, seq, NULL), 0);
	assert_int_equal(kvg_nop(client), 0);
	end(client, peer);
	assert_int_equal(peer->reliefs, 1);
	assert_int_equal(peer->acknowledged_at_relief, 2);
	peer_free(peer);
}

/* The rows are scored only when the worker has answered. */
static bool score_after_relief(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)cqe;
	if (sqe->op == KVG_OP_RELIEF)
		peer_release(peer);
	return sqe->op != KVG_OP_STAGE;
}

static void answers_while_it_waits(void **state)
{
	static const float scores[4 * PEER_HEADS];

	(void)state;
	for (uint32_t spin = 0; spin <= 50; spin += 50) {
		struct peer *peer = peer_new();
		struct kvg_client *client;
		uint64_t seq;

		peer->tamper = score_after_relief;
		client = peer_connect(peer, spin);
		assert_int_equal(kvg_create(client, &policy, &seq), 0);
		assert_int_equal(kvg_reserve(client, seq, 4), 0);
		assert_int_equal(kvg_stage_scores(client, seq, 0, 0, 4, scores), 0);
		peer_press(peer, 9);
		assert_int_equal(kvg_stage_wait(client), 0);
		end(client, peer);
		assert_int_equal(peer->reliefs, 1);
		peer_free(peer);
	}
}

/* The eviction is completed only when what it dropped has been acknowledged. */
static bool evict_after_acknowledgement(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)cqe;
	if (sqe->op == KVG_OP_UNMAPPED)
		peer_release(peer);
	return sqe->op != KVG_OP_EVICT;
}

/* What was dropped while the worker was spinning is acknowledged before it sleeps, however long that may be. */
static void acknowledges_before_it_sleeps(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	uint32_t before;
	uint64_t seq;

	(void)state;
	peer->tamper = evict_after_acknowledgement;
	client = peer_connect(peer, 0);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_commit(client, seq, 40), 0);
	before = client->drop_event;
	assert_int_equal(kvg_evict_async(client, seq, KVG_EVICT_PREFILL), 0);
	while (client->drop_event == before) /* as a spinning client does */
		assert_int_equal(client_receive(client), 0);
	assert_int_not_equal(client->ack_sent, client->drop_event);
	while (client->ack_done != client->drop_event)
		assert_int_equal(client_wait(client), 0);
	assert_int_equal(kvg_evict_finish(client, seq, NULL), 0);
	end(client, peer);
	peer_free(peer);
}

static bool hold_nops(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	if (sqe->op == KVG_OP_RELIEF)
		cqe->status = -EINVAL;
	return sqe->op != KVG_OP_NOP;
}

/* The place that is kept for acknowledgements takes the answer, and what the daemon says to it is no error. */
static void answers_when_the_ring_is_full(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_sqe nop = {.op = KVG_OP_NOP};
	struct kvg_cqe cqes[PEER_ENTRIES];

	(void)state;
	peer->tamper = hold_nops;
	client = peer_connect(peer, 50);
	for (unsigned i = 0; i < PEER_ENTRIES - 1; i++)
		assert_int_equal(kvg_submit(client, &nop), 0);
	assert_int_equal(kvg_submit(client, &nop), -EAGAIN);
	peer_press(peer, 1);
	assert_int_equal(kvg_process(client), 0);
	assert_int_equal(client->relieved, 1);
	peer_release(peer);
	assert_int_equal(kvg_reap(client, cqes, NULL, PEER_ENTRIES, PEER_ENTRIES - 1), PEER_ENTRIES - 1);
	assert_int_equal(kvg_process(client), 0);
	end(client, peer);
	assert_int_equal(peer->reliefs, 1);
	peer_free(peer);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(answers_each_number_once),
		cmocka_unit_test(acknowledges_before_it_answers),
		cmocka_unit_test(answers_while_it_waits),
		cmocka_unit_test(acknowledges_before_it_sleeps),
		cmocka_unit_test(answers_when_the_ring_is_full),
	};

	return runner_run("pressure", tests, sizeof(tests) / sizeof(*tests));
}
