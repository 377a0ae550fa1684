#include "tests/integration/process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/daemon.h"
#include "tests/support/runner.h"

/* ---- the test's side ---- */

void process_fork(struct process *process, int (*main)(int fd, void *arg), void *arg)
{
	int pair[2];

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
	process->pid = fork();
	assert_true(process->pid >= 0);
	if (process->pid == 0) {
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		(void)close(pair[0]);
		_exit(main(pair[1], arg));
	}
	(void)close(pair[1]);
	process->fd = pair[0];
}

char process_hear(struct process *process)
{
	struct pollfd polled = {.fd = process->fd, .events = POLLIN};
	char byte = 0;

	assert_int_equal(poll(&polled, 1, FIXTURE_WAIT_MS), 1);
	assert_int_equal(read(process->fd, &byte, 1), 1);
	return byte;
}

void process_tell(struct process *process, char byte)
{
	assert_int_equal(send(process->fd, &byte, 1, MSG_NOSIGNAL), 1);
}

void process_kill(struct process *process)
{
	int status = 0;

	assert_int_equal(kill(process->pid, SIGKILL), 0);
	assert_int_equal(waitpid(process->pid, &status, 0), process->pid);
	(void)close(process->fd);
	*process = (struct process){.fd = -1};
	assert_true(WIFSIGNALED(status));
}

/* Waits for the end of a process and reaps it; kills it when that takes too long. */
static int reap(pid_t pid, unsigned limit_ms)
{
	int status = 0;
	struct pollfd polled = {.fd = (int)syscall(SYS_pidfd_open, pid, 0), .events = POLLIN};

	assert_true(polled.fd >= 0);
	if (poll(&polled, 1, (int)limit_ms) != 1)
		(void)kill(pid, SIGKILL);
	(void)close(polled.fd);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

void process_finish(struct process *process)
{
	int status;

	(void)shutdown(process->fd, SHUT_WR);
	status = reap(process->pid, FIXTURE_WAIT_MS);
	(void)close(process->fd);
	*process = (struct process){.fd = -1};
	assert_int_equal(status, 0);
}

/* ---- the worker's side ---- */

void process_say(int fd, char byte)
{
	if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1)
		_exit(3);
}

int process_listen(int fd)
{
	char byte;

	return read(fd, &byte, 1) == 1 ? byte : -1;
}

void process_must(int holds, const char *what, const char *why)
{
	if (holds)
		return;
	(void)fprintf(stderr, "worker %d: %s does not hold: %s\n", (int)getpid(), what, why);
	_exit(1);
}

/* ---- programs ---- */

/* Appends what there is to text; false at the end of the stream. */
static bool drain(int fd, char *text, size_t size, size_t *used)
{
	char lost[4096];
	size_t room = size - 1 - *used;
	ssize_t n = read(fd, room ? text + *used : lost, room ? room : sizeof(lost));

	if (n <= 0)
		return false;
	if (room)
		*used += (size_t)n;
	text[*used] = '\0';
	return true;
}

static pid_t start_program(const char *const argv[], int out, int err)
{
	pid_t pid = fork();

	assert_true(pid >= 0);
	if (pid == 0) {
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (dup2(out, STDOUT_FILENO) >= 0 && (err < 0 || dup2(err, STDERR_FILENO) >= 0))
			(void)execvp(argv[0], (char *const *)(uintptr_t)argv);
		_exit(127);
	}
	return pid;
}

void process_start(struct process_program *program, const char *const argv[])
{
	int out[2], err[2];

	assert_int_equal(pipe2(out, O_CLOEXEC), 0);
	assert_int_equal(pipe2(err, O_CLOEXEC), 0);
	program->pid = start_program(argv, out[1], err[1]);
	(void)close(out[1]);
	(void)close(err[1]);
	program->out = out[0];
	program->err = err[0];
}

void process_collect(struct process_program *program, unsigned limit_ms, struct process_output *ret)
{
	uint64_t now, deadline = fixture_now_ms() + limit_ms;
	size_t out_used = 0, err_used = 0;
	struct pollfd polled[2] = {{.fd = program->out, .events = POLLIN}, {.fd = program->err, .events = POLLIN}};

	*ret = (struct process_output){.status = 0};
	while ((polled[0].fd >= 0 || polled[1].fd >= 0) && (now = fixture_now_ms()) < deadline) {
		(void)poll(polled, 2, (int)(deadline - now));
		if (polled[0].revents && !drain(program->out, ret->out, sizeof(ret->out), &out_used))
			polled[0].fd = -1;
		if (polled[1].revents && !drain(program->err, ret->err, sizeof(ret->err), &err_used))
			polled[1].fd = -1;
	}
	(void)close(program->out);
	(void)close(program->err);
	now = fixture_now_ms();
	ret->status = reap(program->pid, now < deadline ? (unsigned)(deadline - now) : 0);
}

void process_run(const char *const argv[], unsigned limit_ms, struct process_output *ret)
{
	struct process_program program;

	process_start(&program, argv);
	process_collect(&program, limit_ms, ret);
}

void process_spawn(struct process *process, const char *const argv[])
{
	int pair[2];

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
	process->pid = start_program(argv, pair[1], -1);
	(void)close(pair[1]);
	process->fd = pair[0];
}

void process_line(struct process *process, char *ret, size_t size)
{
	size_t used = 0;

	while ((ret[used] = process_hear(process)) != '\n' && used + 2 < size)
		used++;
	ret[used] = '\0';
}
