#include "tests/support/runner.h"

#include <errno.h>
#include <string.h>

#include "client/client.h"
#include "tests/unit/client/peer.h"

static const struct kvg_policy policy = {.ratio = 0.5, .mode = KVG_MODE_CHUNKED};

static struct kvg_client *open_sequence(struct peer *peer, uint64_t *ret_seq)
{
	struct kvg_client *client = peer_connect(peer, 50);

	assert_int_equal(kvg_create(client, &policy, ret_seq), 0);
	return client;
}

static uint8_t sum(const void *data, size_t size)
{
	const uint8_t *bytes = data;
	uint8_t total = 0;

	for (size_t i = 0; i < size; i++)
		total = (uint8_t)(total + bytes[i]);
	return total;
}

/* Rows of 64 bytes in an area of 1024, many times over: each is read before its place is used again. */
static void every_row_arrives(void **state)
{
	struct peer *peer = peer_new();
	uint64_t seq;
	struct kvg_client *client = open_sequence(peer, &seq);
	uint8_t sums[40];

	(void)state;
	for (uint32_t i = 0; i < 40; i++) {
		uint16_t hidden[7 * PEER_HIDDEN];
		uint32_t rows = 1 + i % 7;

		for (uint32_t n = 0; n < rows * PEER_HIDDEN; n++)
			hidden[n] = (uint16_t)(n * 31 + i * 77);
		sums[i] = sum(hidden, rows * PEER_HIDDEN * 2);
		assert_int_equal(kvg_stage_hidden(client, seq, i % 2, i, rows, hidden), 0);
	}
	assert_int_equal(kvg_stage_wait(client), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	assert_int_equal(peer->stage_count, 40);
	for (uint32_t i = 0; i < 40; i++) {
		assert_int_equal(peer->stage_rows[i], 1 + i % 7);
		assert_int_equal(peer->stage_sum[i], sums[i]);
	}
	peer_free(peer);
}

static void rows_beyond_the_area_go_in_pieces(void **state)
{
	enum { ROWS = 37 };
	struct peer *peer = peer_new();
	uint64_t seq;
	struct kvg_client *client = open_sequence(peer, &seq);
	uint16_t hidden[ROWS * PEER_HIDDEN];
	float scores[PEER_HEADS] = {0.5f, 0.25f};
	uint8_t seen = 0;

	(void)state;
	for (uint32_t i = 0; i < ROWS * PEER_HIDDEN; i++)
		hidden[i] = (uint16_t)(i * 7);
	assert_int_equal(kvg_stage_hidden(client, seq, 1, 100, ROWS, hidden), 0);
	assert_int_equal(kvg_stage_scores(client, seq, 0, 9, 1, scores), 0);
	assert_int_equal(kvg_stage_wait(client), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	assert_int_equal(peer->stage_count, 4);
	assert_int_equal(peer->stage_rows[0], 16);
	assert_int_equal(peer->stage_rows[1], 16);
	assert_int_equal(peer->stage_rows[2], 5);
	for (unsigned i = 0; i < 3; i++)
		seen = (uint8_t)(seen + peer->stage_sum[i]);
	assert_int_equal(seen, sum(hidden, sizeof(hidden)));
	assert_int_equal(peer->stage_rows[3], 1);
	assert_int_equal(peer->stage_sum[3], sum(scores, sizeof(scores)));
	peer_free(peer);
}

static void rows_made_in_place_are_not_moved(void **state)
{
	struct peer *peer = peer_new();
	uint64_t seq;
	struct kvg_client *client = open_sequence(peer, &seq);
	const size_t bytes = 5 * PEER_HIDDEN * 2;
	uint8_t *base = client->staging_map.base + PEER_STAGING_OFFSET;
	uint64_t offsets[20];
	uint8_t sums[20];

	(void)state;
	for (uint8_t i = 0; i < 20; i++) {
		uint8_t *place = kvg_stage_buffer(client, bytes);

		assert_non_null(place);
		offsets[i] = (uint64_t)(place - base);
		memset(place, i + 1, bytes);
		sums[i] = sum(place, bytes);
		assert_int_equal(kvg_stage_hidden(client, seq, 0, i, 5, (const uint16_t *)(void *)place), 0);
	}
	assert_int_equal(kvg_stage_wait(client), 0);
	assert_null(kvg_stage_buffer(client, PEER_STAGING_ROWS + 1));
	assert_string_equal(kvg_error(client), "staging area of 1024 bytes cannot take 1025");
	(void)kvg_close(client);
	peer_stop(peer);
	for (unsigned i = 0; i < 20; i++) {
		assert_int_equal(peer->stage_offset[i], offsets[i]);
		assert_int_equal(peer->stage_sum[i], sums[i]);
	}
	peer_free(peer);
}

static bool fail_third(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	if (sqe->op == KVG_OP_STAGE && peer->stage_count >= 3) {
		cqe->status = peer->stage_count == 3 ? -ENODATA : -EIO;
		cqe->text = 1;
	}
	return true;
}

static void the_first_error_is_reported_once(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_evict_result result = {.bytes = 3};
	uint16_t hidden[PEER_HIDDEN] = {0};
	struct kvg_client *client;
	uint64_t seq;

	(void)state;
	peer->tamper = fail_third;
	client = open_sequence(peer, &seq);
	for (uint32_t i = 0; i < 5; i++)
		assert_int_equal(kvg_stage_hidden(client, seq, 0, i, 1, hidden), 0);
	assert_int_equal(kvg_evict(client, seq, KVG_EVICT_PREFILL, &result), -ENODATA);
	assert_string_equal(kvg_error(client), "peer: status -61");
	assert_int_equal(result.bytes, 3);
	assert_int_equal(kvg_stage_wait(client), 0);
	assert_int_equal(kvg_evict(client, seq, KVG_EVICT_PREFILL, &result), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static bool hold_stages(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	(void)cqe;
	if (sqe->op == KVG_OP_STAGE && peer->stage_count == 3)
		peer_release(peer);
	return sqe->op != KVG_OP_STAGE;
}

/* The fourth piece waits for the first three, whose completions the peer holds until it has seen them all. */
static void waits_only_for_staging_space(void **state)
{
	struct peer *peer = peer_new();
	uint16_t hidden[5 * PEER_HIDDEN] = {0};
	struct kvg_client *client;
	uint64_t seq;

	(void)state;
	peer->tamper = hold_stages;
	client = open_sequence(peer, &seq);
	for (uint32_t i = 0; i < 3; i++)
		assert_int_equal(kvg_stage_hidden(client, seq, 0, i, 5, hidden), 0);
	assert_int_equal(kvg_stage_hidden(client, seq, 0, 4, 1, hidden), 0);
	assert_int_equal(kvg_stage_hidden(client, seq, 0, 5, 5, hidden), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void refuses_what_is_out_of_range(void **state)
{
	struct peer *peer = peer_new();
	uint16_t hidden[PEER_HIDDEN] = {0};
	uint64_t seq;
	struct kvg_client *client = open_sequence(peer, &seq);

	(void)state;
	assert_int_equal(kvg_stage_hidden(client, seq, PEER_LAYERS, 0, 1, hidden), -EINVAL);
	assert_string_equal(kvg_error(client), "sequence 0: layer 2 of 2 cannot be staged");
	assert_int_equal(kvg_stage_hidden(client, seq + 1, 0, 0, 1, hidden), -ENOENT);
	assert_int_equal(kvg_stage_hidden(client, seq, 0, 0, 0, hidden), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	assert_int_equal(peer->stage_count, 0);
	peer_free(peer);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_row_arrives),
		cmocka_unit_test(rows_beyond_the_area_go_in_pieces),
		cmocka_unit_test(rows_made_in_place_are_not_moved),
		cmocka_unit_test(the_first_error_is_reported_once),
		cmocka_unit_test(waits_only_for_staging_space),
		cmocka_unit_test(refuses_what_is_out_of_range),
	};

	return runner_run("stage", tests, sizeof(tests) / sizeof(*tests));
}
