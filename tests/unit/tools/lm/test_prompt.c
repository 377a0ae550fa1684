#include "tools/lm/prompt.h"

#include <stdlib.h>

#include "tests/support/runner.h"

static void test_context(void **state)
{
	const uint8_t bytes[] = {'a', 0, 255};
	const int32_t want[] = {256, 'a', 0, 255};
	int32_t *tokens = lm_prompt_context(bytes, 3);

	(void)state;
	assert_non_null(tokens);
	assert_memory_equal(tokens, want, sizeof(want));
	free(tokens);
}

static void test_query(void **state)
{
	const uint8_t name[] = {'B', 'A'};
	const int32_t want[] = {258, 'B', 'A', 259};
	int32_t *tokens = lm_prompt_query(name, 2);

	(void)state;
	assert_non_null(tokens);
	assert_memory_equal(tokens, want, sizeof(want));
	free(tokens);
}

static void test_matches(void **state)
{
	const int32_t tokens[] = {'4', '8', 257};
	const uint8_t code[] = {'4', '8', '1'};

	(void)state;
	assert_true(lm_prompt_matches(tokens, 3, code, 2));
	assert_true(lm_prompt_matches(tokens, 2, code, 2));
	assert_false(lm_prompt_matches(tokens, 3, code, 3));
	assert_false(lm_prompt_matches(tokens, 1, code, 2));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_context),
		cmocka_unit_test(test_query),
		cmocka_unit_test(test_matches),
	};

	return runner_run("tools/lm/prompt", tests, sizeof(tests) / sizeof(tests[0]));
}
