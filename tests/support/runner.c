#include "tests/support/runner.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Prints what each open descriptor is when ret_count is NULL. */
static int list_fds(int *ret_count)
{
	DIR *dir = opendir("/proc/self/fd");
	struct dirent *entry;
	int count = 0;

	if (!dir)
		return -errno;
	while ((entry = readdir(dir))) {
		char target[256];
		ssize_t n = entry->d_name[0] == '.' ? -1
						    : readlinkat(dirfd(dir), entry->d_name, target, sizeof(target) - 1);

		if (n < 0 || atoi(entry->d_name) == dirfd(dir))
			continue;
		target[n] = '\0';
		count++;
		if (!ret_count)
			print_error("open: %s -> %s\n", entry->d_name, target);
	}
	(void)closedir(dir);
	if (ret_count)
		*ret_count = count;
	return 0;
}

/* A test that failed could not end its processes: the next one must not fail for that. */
static void end_leftovers(void)
{
	FILE *file = fopen("/proc/thread-self/children", "re");
	int pid;

	while (file && fscanf(file, "%d", &pid) == 1) {
		(void)kill(pid, SIGKILL);
		(void)waitpid(pid, NULL, 0);
	}
	if (file)
		(void)fclose(file);
}

static void run_checked(void **state)
{
	const struct CMUnitTest *test = *state;
	int before = 0, after = 0;
	void *own = test->initial_state;

	end_leftovers();
	assert_int_equal(list_fds(&before), 0);
	if (test->setup_func)
		assert_int_equal(test->setup_func(&own), 0);
	test->test_func(&own);
	if (test->teardown_func)
		assert_int_equal(test->teardown_func(&own), 0);
	assert_int_equal(list_fds(&after), 0);
	if (before != after) {
		(void)list_fds(NULL);
		fail_msg("%s: %d descriptors before, %d after", test->name, before, after);
	}
	if (waitpid(-1, NULL, WNOHANG) != -1 || errno != ECHILD)
		fail_msg("%s: left a child process behind", test->name);
}

int runner_run(const char *group, const struct CMUnitTest *tests, size_t count)
{
	struct CMUnitTest *checked = calloc(count, sizeof(*checked));
	int failed;

	if (!checked)
		return -1;
	for (size_t i = 0; i < count; i++)
		checked[i] = (struct CMUnitTest){
			.name = tests[i].name, .test_func = run_checked, .initial_state = (void *)(uintptr_t)&tests[i]};
	failed = _cmocka_run_group_tests(group, checked, count, NULL, NULL);
	free(checked);
	return failed;
}
