#include "tests/support/runner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "client/client.h"
#include "tests/unit/client/peer.h"

#define SPIN_LONG 1000000u

static void nop(struct kvg_client *client, uint64_t user_data)
{
	const struct kvg_sqe sqe = {.op = KVG_OP_NOP, .user_data = user_data};

	assert_int_equal(kvg_submit(client, &sqe), 0);
}

static void calls_complete_spinning_and_sleeping(void **state)
{
	static const uint32_t spins[] = {0, 1, SPIN_LONG};

	(void)state;
	for (size_t i = 0; i < sizeof(spins) / sizeof(*spins); i++) {
		struct peer *peer = peer_new();
		struct kvg_client *client = peer_connect(peer, spins[i]);

		for (unsigned n = 0; n < 1000; n++)
			assert_int_equal(kvg_nop(client), 0);
		(void)kvg_close(client);
		peer_stop(peer);
		assert_int_equal(peer->sq_head, 1000);
		peer_free(peer);
	}
}

static bool fail_odd(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)sqe;
	if (peer->sq_head % 2 == 0) {
		cqe->status = -ENOSPC;
		cqe->text = 1;
	}
	return true;
}

static void reaps_what_was_submitted(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_cqe cqes[8];
	const char *texts[8];

	(void)state;
	peer->tamper = fail_odd;
	client = peer_connect(peer, 50);
	assert_int_equal(kvg_reap(client, cqes, texts, 8, 0), 0);
	for (unsigned i = 0; i < 5; i++)
		nop(client, 1000 + i);
	assert_int_equal(kvg_reap(client, cqes, texts, 2, 2), 2);
	assert_int_equal(cqes[0].user_data, 1000);
	assert_int_equal(cqes[0].status, 0);
	assert_string_equal(texts[0], "");
	assert_int_equal(cqes[1].user_data, 1001);
	assert_int_equal(cqes[1].status, -ENOSPC);
	assert_string_equal(texts[1], "peer: status -28");
	/* A call in between leaves the others' completions alone. */
	assert_int_equal(kvg_nop(client), -ENOSPC);
	assert_string_equal(kvg_error(client), "peer: status -28");
	assert_int_equal(kvg_reap(client, cqes, NULL, 8, 3), 3);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(cqes[i].user_data, 1002 + i);
	assert_int_equal(kvg_reap(client, cqes, NULL, 8, 1), -EINVAL);
	assert_int_equal(kvg_reap(client, cqes, NULL, 0, 1), -EINVAL);
	assert_int_equal(kvg_submit(client, &(struct kvg_sqe){.user_data = 1ull << 63}), -EINVAL);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static bool hold_nops(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	(void)cqe;
	return sqe->op != KVG_OP_NOP;
}

static void a_full_ring_says_again(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_cqe cqes[PEER_ENTRIES];

	(void)state;
	peer->tamper = hold_nops;
	client = peer_connect(peer, 0);
	for (unsigned round = 0; round < 3; round++) {
		const struct kvg_sqe sqe = {.op = KVG_OP_NOP, .user_data = 99};

		/* One entry is kept for acknowledgements. */
		for (unsigned i = 0; i < PEER_ENTRIES - 1; i++)
			nop(client, i);
		assert_int_equal(kvg_submit(client, &sqe), -EAGAIN);
		assert_string_equal(
			kvg_error(client), "ring: 7 entries in flight and 0 completions to reap, room for 7");
		peer_release(peer);
		assert_int_equal(kvg_reap(client, cqes, NULL, PEER_ENTRIES, PEER_ENTRIES - 1), PEER_ENTRIES - 1);
	}
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

/* Completions nobody reaps do not pile up beyond the ring. */
static void unreaped_completions_are_bounded(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	struct kvg_cqe cqes[PEER_ENTRIES];

	(void)state;
	for (unsigned i = 0; i < PEER_ENTRIES; i++) {
		nop(client, i);
		assert_int_equal(kvg_nop(client), 0);
	}
	assert_int_equal(kvg_submit(client, &(struct kvg_sqe){.op = KVG_OP_NOP}), -EAGAIN);
	assert_int_equal(kvg_nop(client), 0);
	assert_int_equal(kvg_reap(client, cqes, NULL, PEER_ENTRIES, PEER_ENTRIES), PEER_ENTRIES);
	for (unsigned i = 0; i < PEER_ENTRIES; i++)
		assert_int_equal(cqes[i].user_data, i);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void events_come_before_results(void **state)
{
	static const uint32_t spins[] = {0, SPIN_LONG};

	(void)state;
	for (unsigned i = 0; i < 2; i++) {
		struct peer *peer = peer_new();
		struct kvg_client *client;
		uint64_t seq;

		peer->complete_before_events = true;
		client = peer_connect(peer, spins[i]);
		assert_int_equal(kvg_create(client, &(struct kvg_policy){.ratio = 1}, &seq), 0);
		assert_int_equal(kvg_reserve(client, seq, 10), 0);
		assert_int_equal(kvg_mapped_bytes(client), 5 * PEER_EXTENT);
		(void)kvg_close(client);
		peer_stop(peer);
		peer_free(peer);
	}
}

static bool unknown_user_data(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	(void)sqe;
	cqe->user_data ^= 1ull << 32;
	return true;
}

static bool wild_index(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	(void)sqe;
	cqe->user_data |= 0xffffff;
	return true;
}

static bool positive_status(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	(void)sqe;
	cqe->status = 1;
	return true;
}

static bool wild_cursor(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)sqe;
	(void)cqe;
	peer->cq_tail += 100;
	return true;
}

static void nonsense_completions_end_the_connection(void **state)
{
	bool (*const tampers[])(struct peer *, const struct kvg_sqe *, struct kvg_cqe *) = {
		unknown_user_data, wild_index, positive_status, wild_cursor};

	(void)state;
	for (size_t i = 0; i < sizeof(tampers) / sizeof(*tampers); i++) {
		struct peer *peer = peer_new();
		struct kvg_client *client;

		peer->tamper = tampers[i];
		client = peer_connect(peer, 0);
		assert_int_equal(kvg_nop(client), -EPROTO);
		assert_non_null(strstr(kvg_error(client), "daemon: completion"));
		assert_int_equal(kvg_process(client), -EPROTO);
		(void)kvg_close(client);
		peer_stop(peer);
		peer_free(peer);
	}
}

static void a_hang_up_ends_every_wait(void **state)
{
	static const uint32_t spins[] = {0, UINT32_MAX};

	(void)state;
	for (unsigned i = 0; i < 2; i++) {
		struct peer *peer = peer_new();
		struct kvg_client *client;
		struct kvg_cqe cqe;

		peer->hang_up_on_nop = true;
		client = peer_connect(peer, spins[i]);
		assert_int_equal(kvg_nop(client), -EPIPE);
		assert_string_equal(kvg_error(client), "the daemon is gone");
		assert_int_equal(kvg_submit(client, &(struct kvg_sqe){.op = KVG_OP_NOP}), -EPIPE);
		assert_int_equal(kvg_reap(client, &cqe, NULL, 1, 0), -EPIPE);
		assert_int_equal(kvg_return_memory(client), -EPIPE);
		(void)kvg_close(client);
		peer_stop(peer);
		peer_free(peer);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(calls_complete_spinning_and_sleeping),
		cmocka_unit_test(reaps_what_was_submitted),
		cmocka_unit_test(a_full_ring_says_again),
		cmocka_unit_test(unreaped_completions_are_bounded),
		cmocka_unit_test(events_come_before_results),
		cmocka_unit_test(nonsense_completions_end_the_connection),
		cmocka_unit_test(a_hang_up_ends_every_wait),
	};

	return runner_run("call", tests, sizeof(tests) / sizeof(*tests));
}
