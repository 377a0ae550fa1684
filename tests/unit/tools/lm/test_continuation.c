#include "tools/lm/continuation.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"
#include "tests/unit/tools/lm/bench.h"
#include "tests/unit/tools/lm/scratch.h"

static void test_read(void **state)
{
	struct lm_config config = {.max_positions = 20};
	struct scratch scratch;
	struct lm_text_file file;
	char text[LM_TEXT];

	(void)state;
	scratch_init(&scratch);
	assert_int_equal(lm_text_read(scratch_text(&scratch, "t", "0123456789"), &config, 9, &file, text), 0);
	assert_int_equal(file.size, 10);
	assert_memory_equal(file.data, "0123456789", 10);
	lm_text_deinit(&file);
	assert_int_equal(lm_text_read(scratch.path, &config, 10, &file, text), -EINVAL);
	assert_non_null(strstr(
		text, "/t: is longer than 9 bytes, what max_position_embeddings 20 leaves beside 11 other tokens"));
	assert_int_equal(lm_text_read(scratch.path, &config, 4096, &file, text), -EINVAL);
	assert_int_equal(lm_text_read(scratch_text(&scratch, "t", ""), &config, 9, &file, text), -EINVAL);
	assert_non_null(strstr(text, "/t: is empty"));
	assert_int_equal(lm_text_read("no-such-file", &config, 9, &file, text), -ENOENT);
	assert_string_equal(text, "no-such-file: No such file or directory");
	assert_int_equal(lm_text_read(scratch.dir, &config, 9, &file, text), -EIO);
	scratch_deinit(&scratch);
}

/* Text that repeats is written on by a model that has learnt to copy: the bytes are its own, not noise. */
static void test_continue(void **state)
{
	static const char line[] = "The kernel keeps a list of free pages for every zone.\n";
	struct bench *b = *state;
	struct lm_text_file file = {.data = calloc(1, 1000)};
	struct lm_options options = {.ratio = 0.5, .chunk = 100, .window = 4, .generate = 20};
	char *written = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&written, &size);

	assert_true(file.data && out);
	for (unsigned i = 0; i < 8; i++)
		memcpy(file.data + i * strlen(line), line, strlen(line));
	file.size = (uint32_t)(8 * strlen(line));
	bench_open(b, file.size + 21, "g");
	if (lm_continue(b->worker, &options, &file, out, b->text) < 0)
		fail_msg("%s", b->text);
	assert_int_equal(fclose(out), 0);
	assert_int_equal(size, 20);
	assert_memory_equal(written, line, 20);
	assert_int_equal(b->fake->sequences, 0);
	free(written);
	lm_text_deinit(&file);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_read),
		cmocka_unit_test_setup_teardown(test_continue, bench_setup, bench_teardown),
	};

	return runner_run("tools/lm/continuation", tests, sizeof(tests) / sizeof(tests[0]));
}
