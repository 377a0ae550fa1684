/* Workers that do not behave: everybody else must not notice, and the daemon ends those that keep memory back. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/stress/stress.h"

#define STAGING   (1u << 20)
#define SHORT_NS  3000000000ull
#define LONG_NS   20000000000ull /* longer than any deadline of the daemon's */
#define SEQUENCES 8u

static struct kvg_client *come(struct stress_task *task, const char *name)
{
	struct kvg_layout layout;
	struct kvg_client *client;
	char text[STRESS_TEXT] = "";
	int r = kvg_connect(task->socket, name, &client, text, sizeof(text));

	if (r < 0) {
		(void)fprintf(stderr, "bad worker: connect: %s\n", text);
		return NULL;
	}
	stress_layout(&layout, task->seat->tenant);
	r = kvg_register(client, &layout, STAGING);
	if (r == 0)
		return client;
	(void)fprintf(stderr, "bad worker: register: %s\n", kvg_error(client));
	return kvg_close(client);
}

/* Calls nothing until the daemon has had enough, or the time is over: a call would unmap and acknowledge. */
static int stay_away(struct stress_task *task, struct kvg_client *client)
{
	struct pollfd polled = {.fd = kvg_fd(client), .events = POLLRDHUP};
	uint64_t end = stress_now_ns() + (stress_between(&task->seat->seed, 0, 3) ? SHORT_NS : LONG_NS);

	while (stress_now_ns() < end && !__atomic_load_n(&task->shared->ending, __ATOMIC_ACQUIRE)) {
		if (poll(&polled, 1, 50) != 1)
			continue;
		if (kvg_process(client) != -EPIPE) {
			(void)fprintf(stderr, "bad worker: the connection ended and the library says nothing\n");
			return 1;
		}
		task->seat->counts.disconnected++;
		(void)snprintf(task->seat->text, sizeof(task->seat->text), "%s", kvg_error(client));
		return 0;
	}
	return 0;
}

static struct kvg_policy plain(uint32_t tokens)
{
	return (struct kvg_policy){.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = tokens};
}

static int fill(struct kvg_client *client, uint32_t tokens, uint64_t *ret_seq)
{
	struct kvg_policy policy = plain(tokens);
	int r = kvg_create(client, &policy, ret_seq);

	return r < 0 ? r : kvg_reserve(client, *ret_seq, tokens);
}

/* Frees a sequence and does not hear what it has to unmap for that. */
static int mute(struct stress_task *task)
{
	struct kvg_client *client = come(task, "mute");
	struct kvg_sqe sqe = {.op = KVG_OP_FREE};
	int r;

	if (!client)
		return 1;
	r = fill(client, stress_between(&task->seat->seed, 200, 800), &sqe.seq);
	if (r == 0)
		r = kvg_submit(client, &sqe);
	if (r < 0 && r != -ENOSPC) {
		(void)fprintf(stderr, "mute worker: %s\n", kvg_error(client));
		return 1;
	}
	return stay_away(task, client);
}

/* Takes what it gets and then hears nothing. */
static int deaf(struct stress_task *task)
{
	struct kvg_client *client = come(task, "deaf");
	uint64_t seq;
	int r = client ? 0 : -EPIPE;

	for (unsigned i = 0; r == 0 && i < SEQUENCES; i++)
		r = fill(client, stress_between(&task->seat->seed, 500, 1500), &seq);
	if (r < 0 && r != -ENOSPC) {
		(void)fprintf(stderr, "deaf worker: %s\n", client ? kvg_error(client) : "");
		return 1;
	}
	return stay_away(task, client);
}

static int knock(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	memcpy(address.sun_path, path, strnlen(path, sizeof(address.sun_path) - 1));
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
		(void)fprintf(stderr, "hasty worker: %s\n", strerror(errno));
		return 1;
	}
	(void)close(fd);
	return 0;
}

static int hasty(struct stress_task *task)
{
	uint32_t when = stress_between(&task->seat->seed, 0, 3);
	struct kvg_client *client;
	uint64_t seq;

	if (when == 0)
		return knock(task->socket);
	client = come(task, "hasty");
	if (!client)
		return 1;
	if (when == 1)
		return kvg_close(client) != NULL;
	if (when == 2)
		(void)fill(client, 300, &seq);
	return 0;
}

int stress_bad(struct stress_task *task)
{
	switch (task->seat->kind) {
	case KIND_MUTE:
		return mute(task);
	case KIND_DEAF:
		return deaf(task);
	default:
		return hasty(task);
	}
}
