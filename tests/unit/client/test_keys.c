#include "tests/support/runner.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/client.h"
#include "tests/unit/client/peer.h"

enum { TOKENS = 2500, CHUNK = 1200 };

static const struct kvg_policy policy = {.ratio = 0.3,
	.mode = KVG_MODE_CHUNKED,
	.level = KVG_LEVEL_PAIR_LAYER,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE,
	.prefix_tokens = 1,
	.chunk_tokens = CHUNK,
	.window = 4096,
	.floor = 3,
	.threshold = 0.25f};

static void fill(uint32_t tokens[TOKENS])
{
	for (uint32_t i = 0; i < TOKENS; i++)
		tokens[i] = i * 2654435761u;
}

static void check_key(const uint8_t key[KVG_KEY_SIZE], const char *want)
{
	char text[2 * KVG_KEY_SIZE + 1];

	for (unsigned i = 0; i < KVG_KEY_SIZE; i++)
		(void)snprintf(text + (size_t)2 * i, 3, "%02x", key[i]);
	assert_string_equal(text, want);
}

static void load_gate(struct kvg_client *client)
{
	char path[] = "/tmp/kvgate-keys-XXXXXX";
	int fd = mkstemp(path);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, "a gate\n", 7), 7);
	assert_int_equal(close(fd), 0);
	assert_int_equal(kvg_load_gate(client, path), 0);
	assert_int_equal(unlink(path), 0);
}

/* Computed by Python's hashlib from the description in kvgate.h. */
static void are_what_others_compute(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	uint8_t keys[4][KVG_KEY_SIZE] = {{0}};
	uint32_t tokens[TOKENS];

	(void)state;
	fill(tokens);
	assert_int_equal(kvg_context_keys(client, &policy, tokens, TOKENS, CHUNK, keys[0]), 0);
	check_key(keys[0], "1fec36fb2419ae3c57bec3bdec11950e7263f4b9314f3a8a4cceeab330e8ae7e");
	check_key(keys[1], "14aebc572752fd4f7e68c3ea6e365d76532a10c35e375870771fe8e816b0d7a3");
	check_key(keys[2], "ac6587d1c9e54dda92ac6c9f70b9940b2388d406779a2695ae047877c7a3105b");
	assert_int_equal(keys[3][0], 0);
	load_gate(client);
	assert_int_equal(kvg_context_keys(client, &policy, tokens, TOKENS, CHUNK, keys[0]), 0);
	check_key(keys[0], "a3934bb8798b477b00351ff06f696c86bfd89c574d77e77594cbb032acab9e7e");
	check_key(keys[1], "55692532f3e9d3c7d6d84d43f9178685964bf612143c3c75e45d6adbb2d71088");
	check_key(keys[2], "d926e63fe8f158f46e4a64dcbd5ae5fa4797459287d3766f12abd0d4febf48cc");
	assert_int_equal(kvg_context_keys(client, &policy, tokens, TOKENS, 0, keys[0]), 0);
	check_key(keys[0], "e57492bbf63d5bbec373784dac3091172a30c00c14a3a26fbfb37d990bc0596a");
	assert_int_equal(kvg_context_keys(client, &policy, tokens, 0, 0, keys[3]), 0);
	assert_int_equal(keys[3][0], 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

/* Whether a policy has another key for the same tokens than the one above. */
static bool differs(struct kvg_client *client, const struct kvg_policy *other)
{
	uint8_t keys[2][KVG_KEY_SIZE];
	uint32_t tokens[TOKENS];

	fill(tokens);
	assert_int_equal(kvg_context_keys(client, &policy, tokens, TOKENS, 0, keys[0]), 0);
	assert_int_equal(kvg_context_keys(client, other, tokens, TOKENS, 0, keys[1]), 0);
	return memcmp(keys[0], keys[1], KVG_KEY_SIZE) != 0;
}

static void depend_on_what_is_kept(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 50);
	struct kvg_policy p[9], same = policy;

	(void)state;
	for (unsigned i = 0; i < 9; i++)
		p[i] = policy;
	p[0].ratio = 0.31;
	p[1].mode = KVG_MODE_ONCE;
	p[2].level = KVG_LEVEL_PAIR;
	p[3].flags = 0;
	p[4].prefix_tokens = 2;
	p[5].chunk_tokens = 0;
	p[6].window = 0;
	p[7].floor = 0;
	p[8].threshold = 0.0f;
	for (unsigned i = 0; i < 9; i++)
		assert_true(differs(client, &p[i]));
	same.flags |= KVG_POLICY_RETAIN_HOST;
	same.context_tokens = 99;
	same.max_new_tokens = 98;
	same.budget = 97;
	same.decode_first = 96;
	same.decode_window = 95;
	assert_false(differs(client, &same));
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void need_a_layout(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_hello(peer, 50);
	const uint32_t token = 1;
	uint8_t key[KVG_KEY_SIZE];

	(void)state;
	assert_int_equal(kvg_context_keys(client, &policy, &token, 1, 0, key), -EINVAL);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(are_what_others_compute),
		cmocka_unit_test(depend_on_what_is_kept),
		cmocka_unit_test(need_a_layout),
	};

	return runner_run("keys", tests, sizeof(tests) / sizeof(*tests));
}
