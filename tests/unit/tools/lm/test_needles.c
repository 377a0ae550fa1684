#include "tools/lm/needles.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/tools/lm/scratch.h"

static int setup(void **state)
{
	struct scratch *scratch = calloc(1, sizeof(*scratch));

	assert_non_null(scratch);
	scratch_init(scratch);
	*state = scratch;
	return 0;
}

static int teardown(void **state)
{
	scratch_deinit(*state);
	free(*state);
	return 0;
}

static void assert_bytes(const struct lm_bytes *bytes, const char *want, size_t size)
{
	assert_int_equal(bytes->size, size);
	assert_memory_equal(bytes->data, want, size);
}

static void test_pilot_file(void **state)
{
	struct lm_needles needles;
	char text[LM_TEXT];
	size_t queries = 0;

	(void)state;
	assert_int_equal(lm_needles_read("pilot-lm/needles.jsonl", 0, &needles, text), 0);
	assert_int_equal(needles.count, 24);
	for (size_t i = 0; i < needles.count; i++)
		queries += needles.list[i].query_count;
	assert_int_equal(queries, 191);
	assert_int_equal(needles.list[0].context.size, 2999);
	assert_bytes(&needles.list[0].queries[0].name, "DAKO", 4);
	assert_bytes(&needles.list[0].queries[0].code, "06125", 5);
	lm_needles_deinit(&needles);
}

static void test_limit_lines_and_bytes(void **state)
{
	struct scratch *scratch = *state;
	const char *path = scratch_text(scratch, "n.jsonl",
		"\n{\"context\": \"a\\u00e9\\u0000b\", \"queries\": [{\"name\": \"N\", \"code\": "
		"\"1234567890123456\"}]}\n"
		"  \n{\"context\": \"c\", \"queries\": [{\"name\": \"M\", \"code\": \"2\"}]}");
	struct lm_needles needles;
	char text[LM_TEXT];

	assert_int_equal(lm_needles_read(path, 0, &needles, text), 0);
	assert_int_equal(needles.count, 2);
	assert_int_equal(needles.list[0].line, 2);
	assert_int_equal(needles.list[1].line, 4);
	assert_bytes(&needles.list[0].context, "a\xc3\xa9\0b", 5);
	lm_needles_deinit(&needles);
	assert_int_equal(lm_needles_read(path, 1, &needles, text), 0);
	assert_int_equal(needles.count, 1);
	lm_needles_deinit(&needles);
}

#define GOOD "{\"context\": \"c\", \"queries\": [{\"name\": \"M\", \"code\": \"2\"}]}\n"

static void test_bad_lines_are_named(void **state)
{
	static const struct {
		const char *file, *says;
	} cases[] = {
		{GOOD "{\n", "n.jsonl:2: column "},
		{GOOD "{\"context\": 3}\n", "n.jsonl:2: context is not a string"},
		{"[]\n", "n.jsonl:1: context is not a string"},
		{"{\"context\": \"\"}\n", "n.jsonl:1: context has 0 bytes, not 1 to 67108864"},
		{"{\"context\": \"c\"}\n", "n.jsonl:1: queries is not a list of at least one"},
		{"{\"context\": \"c\", \"queries\": []}\n", "n.jsonl:1: queries is not a list of at least one"},
		{"{\"context\": \"c\", \"queries\": [{\"code\": \"1\"}]}\n", "n.jsonl:1: name is not a string"},
		{"{\"context\": \"c\", \"queries\": [{\"name\": \"M\", \"code\": \"12345678901234567\"}]}\n",
			"n.jsonl:1: code has 17 bytes, not 1 to 16"},
		{GOOD GOOD "{\"context\": \"c\", \"queries\": [{\"name\": \"M\", \"code\": \"2\"}]} x\n",
			"n.jsonl:3: "},
		{"\n\n", "n.jsonl: has no context"},
		{"", "n.jsonl: has no context"},
	};
	struct scratch *scratch = *state;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		const char *path = scratch_text(scratch, "n.jsonl", cases[i].file);
		struct lm_needles needles = {.count = 77};
		char text[LM_TEXT] = "";

		assert_int_equal(lm_needles_read(path, 0, &needles, text), -EINVAL);
		if (!strstr(text, cases[i].says))
			fail_msg("'%s' lacks '%s'", text, cases[i].says);
		assert_int_equal(needles.count, 77);
	}
}

static void test_missing_file(void **state)
{
	struct lm_needles needles;
	char text[LM_TEXT];

	(void)state;
	assert_int_equal(lm_needles_read("no-such-file", 0, &needles, text), -ENOENT);
	assert_string_equal(text, "no-such-file: No such file or directory");
	assert_int_equal(lm_needles_read("pilot-lm", 0, &needles, text), -EIO);
	assert_string_equal(text, "pilot-lm: Is a directory");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_pilot_file),
		cmocka_unit_test_setup_teardown(test_limit_lines_and_bytes, setup, teardown),
		cmocka_unit_test_setup_teardown(test_bad_lines_are_named, setup, teardown),
		cmocka_unit_test(test_missing_file),
	};

	return runner_run("tools/lm/needles", tests, sizeof(tests) / sizeof(tests[0]));
}
