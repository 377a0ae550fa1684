#include "tests/support/runner.h"

#include <errno.h>
#include <string.h>

#include "client/client.h"
#include "tests/unit/client/peer.h"

static const struct kvg_policy policy = {.ratio = 0.5, .mode = KVG_MODE_CHUNKED};

static void lives_from_create_to_free(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	struct kvg_evict_result result;
	struct kvg_sequence_info info;
	struct kvg_view view;
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_mapped_bytes(client), 5 * PEER_EXTENT);
	assert_int_equal(kvg_commit(client, seq, 30), 0);
	assert_int_equal(view.appended[0], 30);
	assert_int_equal(kvg_commit(client, seq, 2), 0);
	assert_int_equal(view.appended[0], 32);
	assert_int_equal(kvg_truncate(client, seq, 31), 0);
	assert_int_equal(view.appended[0], 31);
	assert_int_equal(kvg_commit(client, seq, 10), -EINVAL);
	assert_string_equal(kvg_error(client), "sequence 0: commit of 10 tokens at position 31 passes the reserved 40");
	assert_int_equal(kvg_evict(client, seq, KVG_EVICT_PREFILL, &result), 0);
	/* What went is unmapped here and acknowledged before the call returned. */
	assert_int_equal(kvg_mapped_bytes(client), 4 * PEER_EXTENT);
	assert_int_equal(client->ack_done, 2);
	assert_int_equal(result.pairs_held, 15 * 4);
	assert_int_equal(result.pairs_dropped, 16 * 4);
	assert_int_equal(result.bytes, 4711);
	assert_int_equal(result.generation, 2);
	assert_int_equal(view.appended[0], 0);
	assert_int_equal(kvg_query(client, seq, &info), 0);
	assert_int_equal(info.generation, 2);
	assert_int_equal(info.fold_pos, 31);
	assert_int_equal(info.committed_pos, 31);
	assert_int_equal(info.reserved_pos, 31);
	assert_int_equal(info.pairs, 31);
	assert_int_equal(info.bytes, 3 * 2 * PEER_STRIDE);
	assert_int_equal(kvg_truncate(client, seq, 30), -EINVAL);
	assert_int_equal(kvg_protect(client, seq, 1, 5), 0);
	/* The extra extent comes back, and the generation is the new one. */
	assert_int_equal(kvg_reserve(client, seq, 1), 0);
	assert_int_equal(kvg_mapped_bytes(client), 5 * PEER_EXTENT);
	assert_int_equal(kvg_evict(client, seq, KVG_EVICT_DECODE, NULL), 0);
	assert_int_equal(kvg_free(client, seq), 0);
	assert_int_equal(kvg_mapped_bytes(client), 0);
	assert_int_equal(kvg_free(client, seq), -ENOENT);
	(void)kvg_close(client);
	peer_stop(peer);
	assert_int_equal(peer->acknowledged, peer->events);
	peer_free(peer);
}

static void reserve_asks_only_when_there_is_no_room(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 20), 0);
	assert_int_equal(kvg_commit(client, seq, 15), 0);
	assert_int_equal(client->serial, 3);
	assert_int_equal(kvg_reserve(client, seq, 5), 0);
	assert_int_equal(client->serial, 3);
	assert_int_equal(kvg_reserve(client, seq, 6), 0);
	assert_int_equal(client->serial, 4);
	assert_int_equal(kvg_reserve(client, seq, 114), -ENOSPC);
	assert_string_equal(kvg_error(client), "peer: status -28");
	/* A refusal changes nothing. */
	assert_int_equal(kvg_commit(client, seq, 6), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void refuses_handles_that_are_not_ours(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint64_t seq, bad[4];
	struct kvg_sequence_info info;

	(void)state;
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	bad[0] = seq + 1;
	bad[1] = seq + (1ull << 32);
	bad[2] = seq | 0xffffffff;
	bad[3] = 0;
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(kvg_reserve(client, bad[i], 1), -ENOENT);
		assert_int_equal(kvg_commit(client, bad[i], 0), -ENOENT);
		assert_int_equal(kvg_evict(client, bad[i], 0, NULL), -ENOENT);
		assert_int_equal(kvg_truncate(client, bad[i], 0), -ENOENT);
		assert_int_equal(kvg_protect(client, bad[i], 0, 1), -ENOENT);
		assert_int_equal(kvg_query(client, bad[i], &info), -ENOENT);
		assert_int_equal(kvg_free(client, bad[i]), -ENOENT);
	}
	assert_non_null(strstr(kvg_error(client), "sequence 0: no such sequence"));
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void holds_as_many_as_there_are_slots(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint64_t seqs[PEER_SEQUENCES], more = 5;

	(void)state;
	for (unsigned i = 0; i < PEER_SEQUENCES; i++) {
		assert_int_equal(kvg_create(client, &policy, &seqs[i]), 0);
		assert_int_equal(kvg_reserve(client, seqs[i], 16 * (i + 1)), 0);
	}
	assert_int_equal(kvg_create(client, &policy, &more), -EUSERS);
	assert_int_equal(more, 5);
	assert_int_equal(kvg_mapped_bytes(client), PEER_SLOTS * PEER_EXTENT);
	for (unsigned i = 0; i < PEER_SEQUENCES; i++)
		assert_int_equal(kvg_free(client, seqs[i]), 0);
	assert_int_equal(kvg_mapped_bytes(client), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static bool foreign_sequence(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	if (sqe->op == KVG_OP_CREATE)
		cqe->seq += 77;
	return true;
}

static void a_created_sequence_must_be_in_the_table(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	uint64_t seq = 3;

	(void)state;
	peer->tamper = foreign_sequence;
	client = peer_connect(peer, 50);
	assert_int_equal(kvg_create(client, &policy, &seq), -EPROTO);
	assert_int_equal(seq, 3);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

/* An eviction and a free through the ring: kvg_process() acknowledges what they drop. */
static void submitted_evictions_return_memory_too(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	struct kvg_sqe sqe = {.user_data = 8};
	struct kvg_cqe cqe;
	struct kvg_view view;
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_commit(client, seq, 40), 0);
	sqe.op = KVG_OP_EVICT;
	sqe.seq = seq;
	sqe.generation = 9;
	assert_int_equal(kvg_submit(client, &sqe), 0);
	assert_int_equal(kvg_reap(client, &cqe, NULL, 1, 1), 1);
	assert_int_equal(cqe.status, -ESTALE);
	assert_int_equal(view.appended[0], 40);
	sqe.generation = cqe.generation;
	assert_int_equal(kvg_submit(client, &sqe), 0);
	assert_int_equal(kvg_reap(client, &cqe, NULL, 1, 1), 1);
	assert_int_equal(cqe.status, 0);
	assert_int_equal(cqe.user_data, 8);
	assert_int_equal(view.appended[0], 0);
	assert_int_equal(kvg_mapped_bytes(client), 4 * PEER_EXTENT);
	assert_int_equal(kvg_return_memory(client), 0);
	assert_int_equal(client->ack_done, 2);
	sqe.op = KVG_OP_FREE;
	assert_int_equal(kvg_submit(client, &sqe), 0);
	assert_int_equal(kvg_reap(client, &cqe, NULL, 1, 1), 1);
	assert_int_equal(kvg_mapped_bytes(client), 0);
	assert_int_equal(kvg_query(client, seq, &(struct kvg_sequence_info){0}), -ENOENT);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static bool hold_evictions(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	(void)cqe;
	return sqe->op != KVG_OP_EVICT;
}

/* An eviction in two halves, with a reserve behind it. */
static void evicts_in_the_background(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_evict_result result;
	uint64_t seq, other;

	(void)state;
	peer->tamper = hold_evictions;
	client = peer_connect(peer, 50);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_create(client, &policy, &other), 0);
	assert_int_equal(kvg_evict_finish(client, seq, NULL), -ENOENT);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_commit(client, seq, 40), 0);
	assert_int_equal(kvg_evict_async(client, seq, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kvg_evict_async(client, seq, KVG_EVICT_PREFILL), -EBUSY);
	assert_int_equal(kvg_commit(client, seq, 0), -EBUSY);
	assert_string_equal(kvg_error(client), "sequence 0: an eviction is under way: kvg_evict_finish() first");
	assert_int_equal(kvg_free(client, seq), -EBUSY);
	assert_int_equal(kvg_reserve_async(client, seq, 8), 0);
	assert_int_equal(kvg_reserve_async(client, seq, 8), -EBUSY);
	/* Others go on meanwhile. */
	assert_int_equal(kvg_reserve(client, other, 8), 0);
	peer_release(peer);
	assert_int_equal(kvg_evict_finish(client, seq, &result), 0);
	assert_int_equal(result.pairs_held, 20 * 4);
	assert_int_equal(result.generation, 2);
	assert_int_equal(kvg_reserve_finish(client, seq), 0);
	assert_int_equal(kvg_reserve_finish(client, seq), -ENOENT);
	assert_int_equal(kvg_commit(client, seq, 8), 0);
	/* What fails says so in the second half; what nobody finishes ends with the client. */
	assert_int_equal(kvg_reserve_async(client, seq, 4000), 0);
	assert_int_equal(kvg_reserve_finish(client, seq), -ENOSPC);
	assert_int_equal(kvg_evict_async(client, seq, KVG_EVICT_PREFILL), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static bool hold_all(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	(void)cqe;
	return sqe->op != KVG_OP_EVICT && sqe->op != KVG_OP_STAGE;
}

/* The scores' completion is seen when the tables are the eviction's already. */
static void counts_anew_after_late_scores(void **state)
{
	static const float scores[40 * PEER_HEADS];
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_view view;
	uint64_t seq;

	(void)state;
	peer->tamper = hold_all;
	client = peer_connect(peer, 50);
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_commit(client, seq, 40), 0);
	assert_int_equal(kvg_stage_scores(client, seq, 0, 0, 40, scores), 0);
	assert_int_equal(kvg_evict_async(client, seq, KVG_EVICT_PREFILL), 0);
	peer_release(peer);
	assert_int_equal(kvg_evict_finish(client, seq, NULL), 0);
	assert_int_equal(view.appended[0], 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static bool hold_acknowledgements(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	(void)cqe;
	return sqe->op != KVG_OP_UNMAPPED;
}

/* The second half of an eviction leaves it to the daemon to give the extents back. */
static void finishes_without_the_pool(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_evict_result result;
	uint64_t seq, mapped;

	(void)state;
	peer->tamper = hold_acknowledgements;
	client = peer_connect(peer, 50);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_commit(client, seq, 40), 0);
	mapped = kvg_mapped_bytes(client);
	assert_int_equal(kvg_evict_async(client, seq, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kvg_evict_finish(client, seq, &result), 0);
	assert_int_equal(result.pairs_held, 20 * 4);
	assert_true(kvg_mapped_bytes(client) < mapped);
	assert_int_not_equal(client->ack_done, client->drop_event);
	peer_release(peer);
	assert_int_equal(kvg_return_memory(client), 0);
	assert_int_equal(client->ack_done, client->drop_event);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void needs_a_layout(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	uint64_t seq;

	(void)state;
	peer_start(peer);
	assert_int_equal(kvg_connect(peer->path, "test", &client, NULL, 0), 0);
	assert_int_equal(kvg_create(client, &policy, &seq), -EINVAL);
	assert_string_equal(kvg_error(client), "no layout is registered on this connection");
	assert_int_equal(kvg_reserve(client, 7ull << 32, 1), -EINVAL);
	assert_int_equal(kvg_nop(client), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(lives_from_create_to_free),
		cmocka_unit_test(reserve_asks_only_when_there_is_no_room),
		cmocka_unit_test(refuses_handles_that_are_not_ours),
		cmocka_unit_test(holds_as_many_as_there_are_slots),
		cmocka_unit_test(a_created_sequence_must_be_in_the_table),
		cmocka_unit_test(submitted_evictions_return_memory_too),
		cmocka_unit_test(evicts_in_the_background),
		cmocka_unit_test(counts_anew_after_late_scores),
		cmocka_unit_test(finishes_without_the_pool),
		cmocka_unit_test(needs_a_layout),
	};

	return runner_run("sequence", tests, sizeof(tests) / sizeof(*tests));
}
