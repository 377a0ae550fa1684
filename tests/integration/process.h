/*
 * process.h - other processes of a test: workers (a forked function that talks
 * through a socket) and programs that run to their end. Waiting is bounded by
 * FIXTURE_WAIT_MS or a given limit, and always for an event.
 */
#ifndef KVG_TEST_PROCESS_H
#define KVG_TEST_PROCESS_H

#include <stddef.h>
#include <sys/types.h>

struct process {
	pid_t pid; /* 0: none */
	int fd;    /* the test's end of the socket pair */
};

/* ---- the test's side ---- */

/* Forks a worker that runs main(its end, arg) and exits with what that returns. */
void process_fork(struct process *process, int (*main)(int fd, void *arg), void *arg);

/* The next byte that the worker says; fails the test when it ends instead. */
char process_hear(struct process *process);
void process_tell(struct process *process, char byte);

/* Kills and reaps it. */
void process_kill(struct process *process);

/* Closes the pair, which tells the worker to end, and fails the test unless it ends with status 0. */
void process_finish(struct process *process);

/* ---- the worker's side (no CMocka assertions here: they would run on in a second copy of the test) ---- */

void process_say(int fd, char byte);

/* The next byte of the test, or -1 when it has closed its end. */
int process_listen(int fd);

/* Ends the worker with status 1 and a line when what must hold does not. */
void process_must(int holds, const char *what, const char *why);
#define must(expression, why) process_must((expression) ? 1 : 0, #expression, why)

/* ---- programs ---- */

struct process_output {
	int status;      /* exit status, or 128 + signal */
	char out[32768]; /* standard output and error, NUL-terminated */
	char err[16384];
};

/* A program whose output is collected. */
struct process_program {
	pid_t pid;
	int out, err;
};

/* Starts argv[0] (looked up in PATH). */
void process_start(struct process_program *program, const char *const argv[]);

/* Waits for its end; one that takes longer than limit_ms is killed, and its status is then 137. */
void process_collect(struct process_program *program, unsigned limit_ms, struct process_output *ret);

/* Both at once. */
void process_run(const char *const argv[], unsigned limit_ms, struct process_output *ret);

/* A program that runs beside the test, its standard output going to the socket pair; ended by one of the above. */
void process_spawn(struct process *process, const char *const argv[]);

/* The next line of a spawned program without its newline; fails the test when it ends instead. */
void process_line(struct process *process, char *ret, size_t size);

#endif
