#include "tests/support/runner.h"

#include <errno.h>
#include <string.h>

#include "client/client.h"
#include "tests/unit/client/peer.h"

static const struct kvg_policy policy = {.ratio = 0.5, .mode = KVG_MODE_CHUNKED, .max_new_tokens = 9};
static const float row[PEER_DIM] = {1};
static const uint8_t keys[3][KVG_KEY_SIZE] = {{0xab, 1}, {0xcd, 2}, {0xef, 3}};

static int append(struct kvg_client *client, uint64_t seq, uint32_t pos)
{
	return kvg_append(client, seq, 0, 0, pos, 1, row, PEER_DIM, row, PEER_DIM);
}

/* A sequence with 30 of 40 tokens. */
static uint64_t begin(struct kvg_client *client)
{
	uint64_t seq;

	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 40), 0);
	assert_int_equal(kvg_commit(client, seq, 30), 0);
	return seq;
}

static void end(struct kvg_client *client, struct peer *peer)
{
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void publishes(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	struct kvg_context_info info = {0};
	uint64_t seq = begin(client), second = begin(client);

	(void)state;
	assert_int_equal(kvg_publish(client, seq, keys[0], &info), 0);
	assert_int_equal(info.id, 7);
	assert_int_equal(info.bytes, 4096);
	assert_int_equal(info.tokens, 30);
	assert_int_equal(info.attached, 1);
	assert_int_equal(info.existed, 0);
	assert_int_equal(peer_last(peer, KVG_OP_PUBLISH).generation, 1);
	/* What its full blocks were in is back in the pool. */
	assert_int_equal(client->ack_done, client->drop_event);
	assert_int_equal(client->drop_event, client->events);
	assert_int_equal(kvg_mapped_bytes(client), 9 * PEER_EXTENT);
	/* What is shared is not written. */
	assert_int_equal(append(client, seq, 29), -ERANGE);
	assert_int_equal(append(client, seq, 30), 0);
	assert_int_equal(kvg_publish(client, second, keys[0], &info), 0);
	assert_int_equal(info.existed, 1);
	assert_int_equal(info.attached, 2);
	assert_int_equal(kvg_publish(client, second, keys[1], &info), -EEXIST);
	assert_int_equal(info.existed, 1);
	assert_int_equal(kvg_publish(client, second + 9, keys[0], NULL), -ENOENT);
	assert_int_equal(kvg_publish(client, second, keys[0], NULL), 0);
	end(client, peer);
}

static void finds(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	struct kvg_context_info info = {.id = 1};
	uint32_t index = 9;
	uint64_t seq = begin(client);

	(void)state;
	assert_int_equal(kvg_find(client, keys[0], &info), -ENOENT);
	assert_string_equal(kvg_error(client),
		"context ab01000000000000000000000000000000000000000000000000000000000000: tenant search has none");
	assert_int_equal(kvg_find_longest(client, keys[0], 3, &index, &info), -ENOENT);
	assert_string_equal(kvg_error(client), "contexts: tenant search has none of 3");
	assert_int_equal(info.id, 1);
	assert_int_equal(index, 9);
	assert_int_equal(kvg_publish(client, seq, keys[1], NULL), 0);
	assert_int_equal(kvg_find(client, keys[0], &info), -ENOENT);
	assert_int_equal(kvg_find(client, keys[1], &info), 0);
	assert_int_equal(info.id, 7);
	assert_int_equal(info.tokens, 30);
	assert_int_equal(info.attached, 1);
	assert_int_equal(kvg_find_longest(client, keys[0], 3, &index, &info), 0);
	assert_int_equal(index, 1);
	assert_int_equal(kvg_find_longest(client, keys[0], 1, &index, &info), -ENOENT);
	end(client, peer);
}

static void attaches(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	struct kvg_context_info info = {0};
	struct kvg_sequence_info now;
	struct kvg_view view;
	uint64_t seq = begin(client), mine = 0;

	(void)state;
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(kvg_attach(client, keys[0], &policy, &mine, &info), -ENOENT);
	assert_int_equal(mine, 0);
	assert_int_equal(kvg_publish(client, seq, keys[0], NULL), 0);
	view.appended[1] = 77;
	assert_int_equal(kvg_attach(client, keys[0], &policy, &mine, &info), 0);
	assert_int_equal((uint32_t)mine, 1);
	assert_int_equal(info.tokens, 30);
	assert_int_equal(info.attached, 2);
	assert_int_equal(peer_last(peer, KVG_OP_ATTACH).attach.max_new_tokens, 9);
	/* It is there at once, behind the context's tokens. */
	assert_int_equal(view.appended[1], 0);
	assert_int_equal(kvg_query(client, mine, &now), 0);
	assert_int_equal(now.fold_pos, 30);
	assert_int_equal(now.committed_pos, 30);
	assert_int_equal(kvg_reserve(client, mine, 2), 0);
	assert_int_equal(append(client, mine, 30), 0);
	assert_int_equal(kvg_commit(client, mine, 1), 0);
	assert_int_equal(view.appended[1], 1);
	assert_int_equal(kvg_attach(client, keys[0], &policy, &mine, NULL), 0);
	assert_int_equal(kvg_attach(client, keys[0], &policy, &mine, NULL), 0);
	/* Slots run out. */
	assert_int_equal(kvg_attach(client, keys[0], &policy, &mine, NULL), -EUSERS);
	end(client, peer);
}

static bool foreign_sequence(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)peer;
	if (sqe->op == KVG_OP_ATTACH)
		cqe->seq += 2;
	if (sqe->op == KVG_OP_FORK)
		cqe->value[1] = 0xffffffffffu;
	return true;
}

static void new_sequences_must_be_in_the_table(void **state)
{
	(void)state;
	for (unsigned fork = 0; fork < 2; fork++) {
		struct peer *peer = peer_new();
		struct kvg_client *client;
		uint64_t seq, mine = 3;

		peer->tamper = foreign_sequence;
		client = peer_connect(peer, 50);
		seq = begin(client);
		if (!fork)
			assert_int_equal(kvg_publish(client, seq, keys[0], NULL), 0);
		assert_int_equal(
			fork ? kvg_fork(client, seq, 1, &mine) : kvg_attach(client, keys[0], &policy, &mine, NULL),
			-EPROTO);
		assert_int_equal(mine, 3);
		end(client, peer);
	}
}

static void forks(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint64_t seq = begin(client), copies[3] = {5, 5, 5};
	struct kvg_sequence_info info;
	struct kvg_view view;

	(void)state;
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(kvg_fork(client, seq, 2, copies), 0);
	for (uint32_t i = 0; i < 2; i++) {
		assert_int_equal((uint32_t)copies[i], i + 1);
		assert_int_equal(view.appended[i + 1], 30);
		assert_int_equal(kvg_query(client, copies[i], &info), 0);
		assert_int_equal(info.committed_pos, 30);
		/* Each writes its own tail, and none what is shared. */
		assert_int_equal(kvg_reserve(client, copies[i], 12), 0);
		assert_int_equal(append(client, copies[i], 16), 0);
		assert_int_equal(append(client, copies[i], 15), -ERANGE);
	}
	assert_int_equal(append(client, seq, 15), -ERANGE);
	assert_int_equal(append(client, seq, 30), 0);
	assert_int_equal(view.appended[0], 30);
	assert_int_equal(kvg_commit(client, copies[0], 1), 0);
	assert_int_equal(view.appended[1], 31);
	assert_int_equal(view.appended[0], 30);
	end(client, peer);
}

static void a_fork_folds_the_original_as_well(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client;
	struct kvg_view view;
	uint64_t seq, copy;

	(void)state;
	peer->fork_folds = true;
	client = peer_connect(peer, 50);
	seq = begin(client);
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(view.appended[0], 30);
	assert_int_equal(kvg_fork(client, seq, 1, &copy), 0);
	assert_int_equal(view.appended[0], 0);
	assert_int_equal(view.appended[1], 0);
	end(client, peer);
}

static void forks_all_or_none(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint64_t seq = begin(client), copies[4] = {5, 5, 5, 5};

	(void)state;
	/* The fourth finds no slot. */
	assert_int_equal(kvg_fork(client, seq, 4, copies), -EUSERS);
	assert_string_equal(kvg_error(client), "peer: status -87");
	assert_int_equal(copies[0], 5);
	assert_int_equal(kvg_fork(client, seq, 3, copies), 0);
	assert_int_equal(kvg_fork(client, seq, 0, copies), -EINVAL);
	assert_int_equal(kvg_fork(client, seq, PEER_SEQUENCES + 1, copies), -EINVAL);
	assert_string_equal(kvg_error(client), "sequence 0: fork into 5 more, outside 1 to 4");
	assert_int_equal(kvg_fork(client, 5, 1, copies), -ENOENT);
	end(client, peer);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(publishes),
		cmocka_unit_test(finds),
		cmocka_unit_test(attaches),
		cmocka_unit_test(new_sequences_must_be_in_the_table),
		cmocka_unit_test(forks),
		cmocka_unit_test(a_fork_folds_the_original_as_well),
		cmocka_unit_test(forks_all_or_none),
	};

	return runner_run("context", tests, sizeof(tests) / sizeof(*tests));
}
