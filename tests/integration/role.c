/*
 * role.c - what a worker of some uid tries, as a program of its own, so that
 * setpriv can run it: role COMMAND ARGUMENT. Prints one line for each attempt,
 * "ATTEMPT RESULT", where RESULT is "ok" or the name of the errno, and exits 0.
 *
 *   connect SOCKET    says hello on a tenant's socket
 *   admin SOCKET      connects to the admin socket
 *   proc PID          opens /proc/PID/fd, each descriptor in it, and /proc/PID/mem
 *   tables -          tries to write to the table that is its standard input
 *   hold SOCKET       registers, fills a sequence, prints "holding PID", waits for the end of standard input
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/integration/kv.h"

static void say(const char *attempt, int error)
{
	(void)printf("%s %s\n", attempt, error ? strerrorname_np(error) : "ok");
}

static int run_connect(const char *path)
{
	struct kvg_client *client;
	char text[256] = "";
	int r = kvg_connect(path, "role", &client, text, sizeof(text));

	say("connect", -r);
	if (r < 0)
		(void)fprintf(stderr, "%s\n", text);
	else
		(void)kvg_close(client);
	return 0;
}

static int run_admin(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	(void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	say("admin", connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ? errno : 0);
	(void)close(fd);
	return 0;
}

static void try_open(const char *attempt, const char *path, int flags)
{
	int fd = open(path, flags | O_CLOEXEC);

	say(attempt, fd < 0 ? errno : 0);
	if (fd >= 0)
		(void)close(fd);
}

static int run_proc(const char *pid)
{
	char path[128];
	int opened = 0;

	(void)snprintf(path, sizeof(path), "/proc/%s/fd", pid);
	try_open("fd", path, O_RDONLY | O_DIRECTORY);
	for (int i = 0; i < 256; i++) {
		(void)snprintf(path, sizeof(path), "/proc/%s/fd/%d", pid, i);
		int fd = open(path, O_RDWR | O_CLOEXEC);

		if (fd >= 0) {
			opened++;
			(void)close(fd);
		}
	}
	(void)printf("descriptors %d\n", opened);
	(void)snprintf(path, sizeof(path), "/proc/%s/mem", pid);
	try_open("mem", path, O_RDWR);
	(void)snprintf(path, sizeof(path), "/proc/%s/map_files", pid);
	try_open("map_files", path, O_RDONLY | O_DIRECTORY);
	return 0;
}

static void try_map(int fd, size_t size)
{
	void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	say("map", map == MAP_FAILED ? errno : 0);
	if (map != MAP_FAILED)
		(void)munmap(map, size);
	map = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
	say("read", map == MAP_FAILED ? errno : 0);
	if (map == MAP_FAILED)
		return;
	say("mprotect", mprotect(map, size, PROT_READ | PROT_WRITE) < 0 ? errno : 0);
	(void)munmap(map, size);
}

static int run_tables(const char *unused)
{
	struct stat st;
	uint32_t magic = 0;

	(void)unused;
	if (fstat(STDIN_FILENO, &st) < 0 || pread(STDIN_FILENO, &magic, sizeof(magic), 0) != sizeof(magic) ||
		magic != KVG_TABLE_MAGIC)
		return 2;
	try_map(STDIN_FILENO, (size_t)st.st_size);
	try_open("reopen", "/proc/self/fd/0", O_RDWR);
	try_open("append", "/proc/self/fd/0", O_WRONLY | O_APPEND);
	say("write", write(STDIN_FILENO, "x", 1) < 0 ? errno : 0);
	say("truncate", ftruncate(STDIN_FILENO, 0) < 0 ? errno : 0);
	say("chmod", fchmod(STDIN_FILENO, 0666) < 0 ? errno : 0);
	return 0;
}

static int run_hold(const char *path)
{
	struct kvg_policy policy = kv_policy(500, 0.3, 20);
	struct kvg_layout layout;
	struct kvg_client *client;
	struct kv kv;
	char byte;

	kv_small_layout(&layout, 2, 2048);
	client = kv_connect(path, "hold", &layout);
	if (!client || kv_create(&kv, client, &layout, &policy, 1) < 0 || kv_feed(&kv, 501, 1) < 0)
		return 2;
	(void)printf("holding %d\n", (int)getpid());
	(void)fflush(stdout);
	while (read(STDIN_FILENO, &byte, 1) > 0)
		continue;
	if (kv_evict(&kv, KVG_EVICT_PREFILL) < 0 || kv_check(&kv) < 0 || kv_free(&kv) < 0)
		return 2;
	(void)kvg_close(client);
	return 0;
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*run)(const char *argument);
	} roles[] = {{"connect", run_connect}, {"admin", run_admin}, {"proc", run_proc}, {"tables", run_tables},
		{"hold", run_hold}};

	for (size_t i = 0; argc == 3 && i < sizeof(roles) / sizeof(*roles); i++)
		if (strcmp(argv[1], roles[i].name) == 0)
			return roles[i].run(argv[2]);
	(void)fprintf(stderr, "usage: role connect|admin|proc|tables|hold ARGUMENT\n");
	return 2;
}
