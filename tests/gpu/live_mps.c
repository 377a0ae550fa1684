/*
 * What a fault of one client of an MPS server does to the others. MPS may end the contexts of all of them, and with
 * them the daemon's; then the daemon must say so and end with status 3, and what the worker is told is -EPIPE.
 * If it survives, everything must still be right. The test says which of the two it saw.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/gpu/live.h"
#include "tests/integration/process.h"
#include "tests/support/runner.h"

#define STATUS_GPU_LOST 3
#define NOTICE_MS       15000

static const struct kvg_policy policy = {
	.ratio = 0.3, .mode = KVG_MODE_CHUNKED, .context_tokens = 2000, .max_new_tokens = 2000};

/* Holds a sequence; on a byte it looks at it and asks the daemon for something that takes the GPU, and says 'k', or 'p'
 * when that failed: a daemon that has nothing to do there notices a lost GPU with its next work. */
static int witness(int fd, void *socket)
{
	struct live_sequence sequence;
	struct kvg_layout layout;
	struct live live;
	struct content_counts counts;
	uint32_t *bits;
	int r;

	live_layout(&layout, 2, 4096);
	live_open(&live, socket, true, &layout);
	live_create(&live, &policy, 9, &sequence);
	live_feed(&live, &sequence, 2000);
	live_evict(&live, &sequence, KVG_EVICT_PREFILL, NULL);
	process_say(fd, 'r');
	(void)process_listen(fd);
	bits = malloc((size_t)content_rows(live.content) * content_words(live.content) * sizeof(*bits));
	must(bits, "memory");
	r = content_check(live.content, sequence.seq, sequence.tag, sequence.pos, bits, &counts);
	if (r == 0)
		must(!counts.wrong && !counts.repeated && !counts.strange, "every byte");
	(void)fprintf(stderr, "witness: its own context: %s\n", r ? strerror(-r) : "works, and every byte is right");
	r = kvg_reserve(live.client, sequence.seq, 2000);
	(void)fprintf(stderr, "witness: the daemon: %s\n", r ? kvg_error(live.client) : "answers");
	process_say(fd, r ? 'p' : 'k');
	(void)process_listen(fd);
	return 0;
}

/* A client of the same server that writes where nothing is. */
static int careless(int fd, void *unused)
{
	struct synthetic *synthetic;
	CUresult result;

	(void)unused;
	must(synthetic_open(0, &synthetic) == 0, "device");
	process_say(fd, 'r');
	(void)process_listen(fd);
	(void)synthetic_poke(synthetic, 0x10, synthetic->stream);
	result = synthetic->cuda->driver->cuStreamSynchronize(synthetic->stream);
	(void)fprintf(stderr, "careless client: %s\n", kvg_cuda_error(synthetic->cuda->driver, result));
	process_say(fd, 'f');
	return 0;
}

/* A server of our own: whoever inherits the variables is its client. It ends when its clients have. */
static bool mps_open(char *dir, size_t size)
{
	(void)snprintf(dir, size, "/tmp/kvgate-mps.XXXXXX");
	if (!mkdtemp(dir))
		return false;
	(void)setenv("CUDA_MPS_PIPE_DIRECTORY", dir, 1);
	(void)setenv("CUDA_MPS_LOG_DIRECTORY", dir, 1);
	return system("nvidia-cuda-mps-control -d </dev/null >/dev/null 2>&1") == 0;
}

static void mps_close(const char *dir)
{
	char command[128];

	(void)!system("echo quit -t 10 | timeout 30 nvidia-cuda-mps-control >/dev/null 2>&1");
	(void)snprintf(command, sizeof(command), "rm -rf -- '%s'", dir);
	(void)!system(command);
}

/* Whether the daemon ended within the time. */
static bool daemon_ended(struct fixture *fixture, int *ret_status)
{
	struct pollfd polled = {.fd = (int)syscall(SYS_pidfd_open, fixture->pid, 0), .events = POLLIN};
	bool ended;

	assert_true(polled.fd >= 0);
	ended = poll(&polled, 1, NOTICE_MS) == 1;
	(void)close(polled.fd);
	if (ended) {
		assert_int_equal(waitpid(fixture->pid, ret_status, 0), fixture->pid);
		fixture->pid = 0;
		(void)close(fixture->notify);
		fixture->notify = -1;
	}
	return ended;
}

static void print_log(const struct fixture *fixture)
{
	char path[FIXTURE_PATH], line[512];
	FILE *file = fopen(fixture_path(fixture, "log", path), "re");

	while (file && fgets(line, sizeof(line), file))
		print_message("| %s", line);
	if (file)
		(void)fclose(file);
}

static void fault(struct fixture *fixture, struct process *worker)
{
	struct process process;
	int status = 0;
	bool ended;

	process_fork(&process, careless, NULL);
	assert_int_equal(process_hear(&process), 'r');
	process_tell(&process, 'g');
	assert_int_equal(process_hear(&process), 'f');
	process_finish(&process);
	process_tell(worker, 'g');
	print_message("the worker says '%c'\n", process_hear(worker));
	ended = daemon_ended(fixture, &status);
	print_message("the daemon %s\n", ended ? "ended" : "survived");
	print_log(fixture);
	if (ended) {
		assert_true(WIFEXITED(status));
		assert_int_equal(WEXITSTATUS(status), STATUS_GPU_LOST);
	}
	process_kill(worker);
}

static void test_a_fault_of_a_client_of_the_same_server(void **state)
{
	char config[512], path[FIXTURE_PATH];
	struct process worker;
	struct fixture fixture;

	(void)state;
	live_config(config, sizeof(config), true, "64M", "[tenant a]\nsocket = a.sock\n");
	fixture_start(&fixture, config);
	process_fork(&worker, witness, (void *)(uintptr_t)fixture_path(&fixture, "state/a.sock", path));
	assert_int_equal(process_hear(&worker), 'r');
	fault(&fixture, &worker);
	if (fixture.pid) {
		assert_true(fixture_wait_gone(&fixture, 0, 0, 5000));
		live_audit(&fixture);
		fixture_stop(&fixture);
	} else {
		fixture_remove(&fixture);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_a_fault_of_a_client_of_the_same_server),
	};
	char dir[64];
	int failed;

	if (!live_gpu())
		return 77;
	if (!mps_open(dir, sizeof(dir))) {
		(void)fprintf(stderr, "skipped: nvidia-cuda-mps-control does not start\n");
		mps_close(dir);
		return 77;
	}
	failed = runner_run("mps", tests, sizeof(tests) / sizeof(*tests));
	mps_close(dir);
	return failed;
}
