#include "tools/lm/hash.h"

#include "tests/support/runner.h"

/* The published examples of FNV-1a. */
static void test_known_hashes(void **state)
{
	(void)state;
	assert_true(lm_hash(LM_HASH_BASIS, "", 0) == 0xcbf29ce484222325u);
	assert_true(lm_hash(LM_HASH_BASIS, "a", 1) == 0xaf63dc4c8601ec8cu);
	assert_true(lm_hash(LM_HASH_BASIS, "foobar", 6) == 0x85944171f73967e8u);
	assert_true(lm_hash(lm_hash(LM_HASH_BASIS, "foo", 3), "bar", 3) == 0x85944171f73967e8u);
}

static void test_tokens_are_little_endian(void **state)
{
	const int32_t tokens[] = {0x64636261, -1};

	(void)state;
	assert_true(lm_hash_tokens(tokens, 2) == lm_hash(LM_HASH_BASIS, "abcd\xff\xff\xff\xff", 8));
	assert_true(lm_hash_tokens(tokens, 0) == LM_HASH_BASIS);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_known_hashes),
		cmocka_unit_test(test_tokens_are_little_endian),
	};

	return runner_run("tools/lm/hash", tests, sizeof(tests) / sizeof(tests[0]));
}
