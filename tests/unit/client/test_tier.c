#include "tests/support/runner.h"

#include <errno.h>
#include <string.h>

#include "client/client.h"
#include "tests/unit/client/peer.h"

static const struct kvg_policy policy = {.ratio = 0.5, .mode = KVG_MODE_CHUNKED, .flags = KVG_POLICY_RETAIN_HOST};
static const float row[PEER_DIM] = {1};

static int append(struct kvg_client *client, uint64_t seq, uint32_t pos)
{
	return kvg_append(client, seq, 0, 0, pos, 1, row, PEER_DIM, row, PEER_DIM);
}

static int attend(struct kvg_client *client, uint64_t seq, uint32_t pos)
{
	float q[2 * PEER_DIM] = {0}, out[2 * PEER_DIM];

	return kvg_attend(client, seq, 0, 0, pos, 1, 1.0f, q, PEER_DIM, out, PEER_DIM);
}

/* A sequence with 30 of 40 tokens. */
static uint64_t begin(struct kvg_client *client)
{
	uint64_t seq;

	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(append(client, seq, 0), 0);
	assert_int_equal(kvg_commit(client, seq, 30), 0);
	return seq;
}

static void end(struct kvg_client *client, struct peer *peer)
{
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void goes_to_the_host_and_comes_back(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint64_t seq = begin(client), bytes = 0;
	struct kvg_view view;

	(void)state;
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(kvg_offload(client, seq, &bytes), 0);
	assert_int_equal(bytes, 4713);
	/* Unmapped and back in the pool; nothing is there to be read or written. */
	assert_int_equal(kvg_mapped_bytes(client), 0);
	assert_int_equal(client->ack_done, client->drop_event);
	assert_int_equal(append(client, seq, 30), -EBUSY);
	assert_int_equal(attend(client, seq, 29), -EBUSY);
	assert_int_equal(kvg_restore(client, seq), 0);
	/* At the same slots, which can be used again, with the same counter. */
	assert_int_equal(kvg_mapped_bytes(client), 4 * PEER_EXTENT);
	assert_int_equal(view.appended[0], 30);
	assert_int_equal(append(client, seq, 30), 0);
	assert_int_equal(attend(client, seq, 29), 0);
	/* A reserve brings it back, also when there was room before. */
	assert_int_equal(kvg_offload(client, seq, NULL), 0);
	assert_int_equal(kvg_reserve(client, seq, 5), 0);
	assert_int_equal(append(client, seq, 30), 0);
	assert_int_equal(kvg_offload(client, seq + 1, NULL), -ENOENT);
	assert_int_equal(kvg_restore(client, seq + 1), -ENOENT);
	end(client, peer);
}

static void is_released_and_used_again(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint64_t seq = begin(client), other = begin(client);
	struct kvg_sequence_info info;

	(void)state;
	assert_int_equal(kvg_idle(client, seq), 0);
	assert_int_equal(append(client, seq, 30), -EBUSY);
	assert_int_equal(attend(client, seq, 29), -EBUSY);
	assert_int_equal(append(client, other, 30), 0);
	assert_int_equal(kvg_query(client, seq, &info), 0);
	assert_int_equal(kvg_restore(client, seq), 0);
	assert_int_equal(append(client, seq, 30), 0);
	assert_int_equal(kvg_idle(client, seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 1), 0);
	assert_int_equal(append(client, seq, 30), 0);
	assert_int_equal(kvg_idle(client, 5), -ENOENT);
	end(client, peer);
}

/* An operator evicted it while it was idle: what was appended is folded. */
static bool evict_idle(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	struct kvg_slot *slot = (struct kvg_slot *)(void *)((uint8_t *)peer->table + peer->table->slot_offset);

	if (sqe->op == KVG_OP_QUERY && slot->flags) {
		slot->generation++;
		slot->fold_pos = slot->committed_pos;
	}
	cqe->generation = slot->generation;
	return true;
}

static void finds_what_changed_meanwhile(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_sequence_info info;
	struct kvg_view view;
	uint64_t seq;

	(void)state;
	peer->tamper = evict_idle;
	client = peer_connect(peer, 50);
	seq = begin(client);
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(kvg_idle(client, seq), 0);
	assert_int_equal(kvg_query(client, seq, &info), 0);
	assert_int_equal(info.generation, 2);
	assert_int_equal(view.appended[0], 30);
	assert_int_equal(kvg_restore(client, seq), 0);
	assert_int_equal(view.appended[0], 0);
	end(client, peer);
}

static void recalls(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	struct kvg_recall_result result;
	uint64_t seq = begin(client);
	struct kvg_view view;

	(void)state;
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(kvg_recall(client, seq, 0.3, &result), 0);
	assert_int_equal(result.pairs_held, 30);
	assert_int_equal(result.pairs_recalled, 12);
	assert_int_equal(result.bytes, 4712);
	assert_int_equal(result.generation, 2);
	assert_int_equal(view.appended[0], 0);
	assert_int_equal(client->ack_done, client->drop_event);
	assert_float_equal(peer_last(peer, KVG_OP_RECALL).recall.ratio, 0.3, 0);
	assert_int_equal(peer_last(peer, KVG_OP_RECALL).recall.flags, 0);
	assert_int_equal(peer_last(peer, KVG_OP_RECALL).generation, 1);
	assert_int_equal(kvg_recall_budget(client, seq, 200, NULL), 0);
	assert_int_equal(peer_last(peer, KVG_OP_RECALL).recall.flags, KVG_RECALL_BUDGET);
	assert_int_equal(peer_last(peer, KVG_OP_RECALL).recall.budget, 200);
	assert_int_equal(peer_last(peer, KVG_OP_RECALL).generation, 2);
	assert_int_equal(kvg_recall(client, seq + 1, 0.3, NULL), -ENOENT);
	end(client, peer);
}

static bool no_room(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	if (sqe->op == KVG_OP_OFFLOAD || sqe->op == KVG_OP_RESTORE || sqe->op == KVG_OP_RECALL) {
		cqe->status = -ENOSPC;
		cqe->text = 1;
	}
	return true;
}

static void says_what_is_missing(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_recall_result result = {.pairs_held = 1};
	uint64_t seq, bytes = 17;

	(void)state;
	peer->tamper = no_room;
	client = peer_connect(peer, 50);
	seq = begin(client);
	assert_int_equal(kvg_offload(client, seq, &bytes), -ENOSPC);
	assert_string_equal(kvg_error(client), "peer: status -28");
	assert_int_equal(bytes, 17);
	assert_int_equal(kvg_restore(client, seq), -ENOSPC);
	assert_int_equal(kvg_recall(client, seq, 1.0, &result), -ENOSPC);
	assert_int_equal(result.pairs_held, 1);
	end(client, peer);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(goes_to_the_host_and_comes_back),
		cmocka_unit_test(is_released_and_used_again),
		cmocka_unit_test(finds_what_changed_meanwhile),
		cmocka_unit_test(recalls),
		cmocka_unit_test(says_what_is_missing),
	};

	return runner_run("tier", tests, sizeof(tests) / sizeof(*tests));
}
