#include "tests/support/runner.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "client/client.h"
#include "tests/unit/client/peer.h"

enum { TOKENS = 40, GROUP = 2 };

static const struct kvg_policy policy = {.ratio = 0.5, .mode = KVG_MODE_CHUNKED};

/* A value for token t, head h, element i of K (kind 0), V (1) or Q (2). */
static float value(unsigned kind, unsigned t, unsigned h, unsigned i)
{
	uint32_t random = (kind * 1000003u + t * 7919u + h * 613u + i) * 2654435761u;

	return (float)(random >> 8 & 0xffff) / 65536.0f - 0.5f;
}

static void append(const struct kvg_client *client, uint64_t seq, uint32_t head, uint32_t pos, uint32_t count)
{
	float k[TOKENS][PEER_DIM], v[TOKENS][PEER_DIM];

	for (unsigned t = 0; t < count; t++)
		for (unsigned i = 0; i < PEER_DIM; i++) {
			k[t][i] = value(0, pos + t, head, i);
			v[t][i] = value(1, pos + t, head, i);
		}
	assert_int_equal(kvg_append(client, seq, 1, head, pos, count, k[0], PEER_DIM, v[0], PEER_DIM), 0);
}

/* Plain attention of one query over pairs `first` to `last` of a head. */
static void expect(unsigned head, unsigned pos, unsigned g, const unsigned *pairs, unsigned count, float *out)
{
	double weights[TOKENS], total = 0;

	for (unsigned n = 0; n < count; n++) {
		double dot = 0;

		for (unsigned i = 0; i < PEER_DIM; i++)
			dot += (double)value(2, pos, head * GROUP + g, i) * (double)value(0, pairs[n], head, i);
		total += weights[n] = exp(dot * 0.25);
	}
	for (unsigned i = 0; i < PEER_DIM; i++) {
		double sum = 0;

		for (unsigned n = 0; n < count; n++)
			sum += weights[n] * (double)value(1, pairs[n], head, i);
		out[i] = (float)(sum / total);
	}
}

/* Attention of [pos, pos + count) over pairs, the last `count` of which are the queries' own. */
static void check_attend(const struct kvg_client *client, uint64_t seq, uint32_t head, uint32_t pos, uint32_t count,
	const unsigned *pairs, unsigned pair_count)
{
	float q[TOKENS][GROUP][PEER_DIM], out[TOKENS][GROUP][PEER_DIM], want[PEER_DIM];

	for (unsigned t = 0; t < count; t++)
		for (unsigned g = 0; g < GROUP; g++)
			for (unsigned i = 0; i < PEER_DIM; i++)
				q[t][g][i] = value(2, pos + t, head * GROUP + g, i);
	assert_int_equal(kvg_attend(client, seq, 1, head, pos, count, 0.25f, q[0][0], GROUP * PEER_DIM, out[0][0],
				 GROUP * PEER_DIM),
		0);
	for (unsigned t = 0; t < count; t++)
		for (unsigned g = 0; g < GROUP; g++) {
			expect(head, pos + t, g, pairs, pair_count - count + t + 1, want);
			for (unsigned i = 0; i < PEER_DIM; i++)
				assert_true(fabsf(out[t][g][i] - want[i]) < 1e-5f);
		}
}

static void appends_and_attends_in_place(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	unsigned pairs[TOKENS];
	uint64_t other, seq;

	(void)state;
	/* A sequence in a slot that is not the first, in two batches that end within blocks. */
	assert_int_equal(kvg_create(client, &policy, &other), 0);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, TOKENS), 0);
	for (unsigned i = 0; i < TOKENS; i++)
		pairs[i] = i;
	for (uint32_t head = 0; head < PEER_HEADS; head++) {
		append(client, seq, head, 0, 21);
		check_attend(client, seq, head, 0, 21, pairs, 21);
	}
	assert_int_equal(kvg_commit(client, seq, 21), 0);
	for (uint32_t head = 0; head < PEER_HEADS; head++) {
		append(client, seq, head, 21, TOKENS - 21);
		check_attend(client, seq, head, 21, TOKENS - 21, pairs, TOKENS);
		check_attend(client, seq, head, 30, 1, pairs, 31);
	}
	assert_int_equal(kvg_commit(client, seq, TOKENS - 21), 0);
	/* The peer's eviction keeps the first half; what comes next lies behind it, at the true position. */
	assert_int_equal(kvg_evict(client, seq, KVG_EVICT_PREFILL, NULL), 0);
	assert_int_equal(kvg_reserve(client, seq, 3), 0);
	for (unsigned i = 0; i < 3; i++)
		pairs[TOKENS / 2 + i] = TOKENS + i;
	for (uint32_t head = 0; head < PEER_HEADS; head++) {
		append(client, seq, head, TOKENS, 3);
		check_attend(client, seq, head, TOKENS, 3, pairs, TOKENS / 2 + 3);
	}
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static int append_at(
	const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos, uint32_t count)
{
	static const float zeros[TOKENS * PEER_DIM];
	float out[TOKENS * GROUP * PEER_DIM];
	int r = kvg_append(client, seq, layer, head, pos, count, zeros, PEER_DIM, zeros, PEER_DIM);

	/* Attention has the same limits. */
	assert_int_equal(kvg_attend(client, seq, layer, head, pos, count, 1, zeros, 0, out, GROUP * PEER_DIM), r);
	return r;
}

static void refuses_what_is_out_of_range(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(append_at(client, seq, 0, 0, 0, 1), -ERANGE);
	assert_int_equal(append_at(client, seq, 0, 0, 0, 0), 0);
	assert_int_equal(kvg_reserve(client, seq, 20), 0);
	assert_int_equal(append_at(client, seq, 0, 0, 0, 20), 0);
	assert_int_equal(append_at(client, seq, 0, 0, 0, 21), -ERANGE);
	assert_int_equal(append_at(client, seq, 0, 0, 20, 1), -ERANGE);
	assert_int_equal(append_at(client, seq, 0, 0, 21, 0), -ERANGE);
	assert_int_equal(append_at(client, seq, 0, 0, UINT32_MAX, 2), -ERANGE);
	assert_int_equal(append_at(client, seq, PEER_LAYERS, 0, 0, 1), -EINVAL);
	assert_int_equal(append_at(client, seq, 0, PEER_HEADS, 0, 1), -EINVAL);
	assert_int_equal(append_at(client, seq + 1, 0, 0, 0, 1), -ENOENT);
	assert_int_equal(append_at(client, seq + (1ull << 32), 0, 0, 0, 1), -ENOENT);
	assert_int_equal(append_at(client, 0, 0, 0, 0, 1), -ENOENT);
	assert_int_equal(kvg_commit(client, seq, 20), 0);
	assert_int_equal(kvg_evict(client, seq, KVG_EVICT_PREFILL, NULL), 0);
	assert_int_equal(append_at(client, seq, 0, 0, 19, 1), -ERANGE);
	assert_int_equal(kvg_free(client, seq), 0);
	assert_int_equal(append_at(client, seq, 0, 0, 20, 1), -ENOENT);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

/* Ids of a broken daemon: outside the arena, in the V half, in an extent that is not mapped. */
static void never_follows_wild_ids(void **state)
{
	static const uint32_t wild[] = {UINT32_MAX, PEER_SLOTS * 16, 8, 16 * 4};
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint32_t *ids = (uint32_t *)(void *)((uint8_t *)peer->table + peer->table->ids_offset);
	uint32_t *base_len = (uint32_t *)(void *)((uint8_t *)peer->table + peer->table->base_len_offset);
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 20), 0);
	for (size_t i = 0; i < sizeof(wild) / sizeof(*wild); i++) {
		ids[1] = wild[i];
		assert_int_equal(append_at(client, seq, 0, 0, 0, 16), 0);
		assert_int_equal(append_at(client, seq, 0, 0, 0, 17), -EPROTO);
	}
	ids[1] = 1;
	assert_int_equal(append_at(client, seq, 0, 0, 0, 17), 0);
	base_len[0] = PEER_ROW_CAP * 16 - 16;
	assert_int_equal(append_at(client, seq, 0, 0, 0, 16), 0);
	assert_int_equal(append_at(client, seq, 0, 0, 0, 17), -EPROTO);
	base_len[0] = UINT32_MAX;
	assert_int_equal(append_at(client, seq, 0, 0, 0, 1), -EPROTO);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void views_the_memory(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	const float k[PEER_DIM] = {1, 2, 3, 4, 5, 6, 7, 8}, v[PEER_DIM] = {8, 7, 6, 5, 4, 3, 2, 1};
	struct kvg_view view;
	uint32_t id;
	uint64_t seq;

	(void)state;
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 20), 0);
	assert_int_equal(view.slots[0].reserved_pos, 20);
	assert_int_equal(kvg_append(client, seq, 1, 1, 18, 1, k, PEER_DIM, v, PEER_DIM), 0);
	id = view.ids[((1 * view.max_sequences + 0) * view.heads + 1) * view.row_cap + 1];
	assert_memory_equal(view.k_base + id * view.stride + 2 * sizeof(k), k, sizeof(k));
	assert_memory_equal(view.v_base + id * view.stride + 2 * sizeof(v), v, sizeof(v));
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(appends_and_attends_in_place),
		cmocka_unit_test(refuses_what_is_out_of_range),
		cmocka_unit_test(never_follows_wild_ids),
		cmocka_unit_test(views_the_memory),
	};

	return runner_run("kv", tests, sizeof(tests) / sizeof(*tests));
}
