#include "daemon/base/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/support/runner.h"

#define LINES 200

/* Standard error as a pipe. */
struct capture {
	int saved;
	int read_fd;
	char text[65536];
};

static void capture_begin(struct capture *capture)
{
	int fds[2];

	assert_int_equal(pipe(fds), 0);
	capture->saved = dup(STDERR_FILENO);
	assert_true(capture->saved >= 0);
	assert_int_equal(dup2(fds[1], STDERR_FILENO), STDERR_FILENO);
	assert_int_equal(close(fds[1]), 0);
	capture->read_fd = fds[0];
}

/* One read(), which is one line when one was written. */
static void capture_end(struct capture *capture)
{
	ssize_t n;

	assert_int_equal(dup2(capture->saved, STDERR_FILENO), STDERR_FILENO);
	assert_int_equal(close(capture->saved), 0);
	n = read(capture->read_fd, capture->text, sizeof(capture->text) - 1);
	assert_true(n >= 0);
	capture->text[n] = '\0';
	assert_int_equal(read(capture->read_fd, capture->text + n, 1), 0);
	assert_int_equal(close(capture->read_fd), 0);
}

static void name_journal(int fd)
{
	char stream[64];
	struct stat st;

	assert_int_equal(fstat(fd, &st), 0);
	(void)snprintf(
		stream, sizeof(stream), "%llu:%llu", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino);
	assert_int_equal(setenv("JOURNAL_STREAM", stream, 1), 0);
}

static int without_journal(void **state)
{
	(void)state;
	return unsetenv("JOURNAL_STREAM");
}

static void test_plain(void **state)
{
	struct capture capture;

	(void)state;
	capture_begin(&capture);
	errno = ENOENT;
	log_info("up with %d tenants", 2);
	assert_int_equal(errno, ENOENT);
	log_warning("slow");
	log_error("%s: %m", "file");
	capture_end(&capture);
	assert_string_equal(
		capture.text, "kvgated: up with 2 tenants\nkvgated: slow\nkvgated: file: No such file or directory\n");
}

static void test_journal(void **state)
{
	struct capture capture;

	(void)state;
	capture_begin(&capture);
	name_journal(STDERR_FILENO);
	log_info("one");
	log_warning("two");
	log_error("three");
	capture_end(&capture);
	assert_string_equal(capture.text, "<6>one\n<4>two\n<3>three\n");
}

/* The variable is inherited from a service, but standard error went elsewhere. */
static void test_other_journal(void **state)
{
	struct capture capture;

	(void)state;
	capture_begin(&capture);
	name_journal(capture.saved);
	log_info("one");
	assert_int_equal(setenv("JOURNAL_STREAM", "nonsense", 1), 0);
	log_info("two");
	capture_end(&capture);
	assert_string_equal(capture.text, "kvgated: one\nkvgated: two\n");
}

static void test_one_line(void **state)
{
	struct capture capture;

	(void)state;
	capture_begin(&capture);
	log_info("worker '%s'", "a\nkvgated: b\r\x1b[1m\x7f");
	capture_end(&capture);
	assert_string_equal(capture.text, "kvgated: worker 'a?kvgated: b??[1m?'\n");
}

static void test_long(void **state)
{
	struct capture capture;
	char text[10000];
	size_t size;

	(void)state;
	memset(text, 'x', sizeof(text) - 1);
	text[sizeof(text) - 1] = '\0';
	capture_begin(&capture);
	log_info("%s", text);
	capture_end(&capture);
	size = strlen(capture.text);
	assert_int_equal(size, 4096);
	assert_string_equal(capture.text + size - 5, "x...\n");
}

static void *write_lines(void *arg)
{
	for (int i = 0; i < LINES; i++)
		log_info("%s", (const char *)arg);
	return NULL;
}

static void test_threads(void **state)
{
	struct capture capture;
	pthread_t threads[2];
	char *rest = NULL;
	int counts[2] = {0};

	(void)state;
	capture_begin(&capture);
	assert_int_equal(pthread_create(&threads[0], NULL, write_lines, (void *)(uintptr_t) "aaaaaaaaaaaaaaaa"), 0);
	assert_int_equal(pthread_create(&threads[1], NULL, write_lines, (void *)(uintptr_t) "bbbbbbbbbbbbbbbb"), 0);
	for (int i = 0; i < 2; i++)
		assert_int_equal(pthread_join(threads[i], NULL), 0);
	capture_end(&capture);
	for (char *line = strtok_r(capture.text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
		counts[0] += strcmp(line, "kvgated: aaaaaaaaaaaaaaaa") == 0;
		counts[1] += strcmp(line, "kvgated: bbbbbbbbbbbbbbbb") == 0;
	}
	assert_int_equal(counts[0], LINES);
	assert_int_equal(counts[1], LINES);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup(test_plain, without_journal),
		cmocka_unit_test_setup(test_journal, without_journal),
		cmocka_unit_test_setup(test_other_journal, without_journal),
		cmocka_unit_test_setup(test_one_line, without_journal),
		cmocka_unit_test_setup(test_long, without_journal),
		cmocka_unit_test_setup(test_threads, without_journal),
	};

	return runner_run("log", tests, sizeof(tests) / sizeof(tests[0]));
}
