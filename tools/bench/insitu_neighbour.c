#include "tools/bench/insitu_neighbour.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/kvgate.h"
#include "tools/bench/insitu_model.h"

#define TOKENS  4096u
#define STAGING (1u << 20)

uint64_t neighbour_bytes(uint32_t layers)
{
	return (uint64_t)TOKENS * layers * MODEL_HEADS * MODEL_DIM * 2 * 2;
}

/* ---- in its process ---- */

struct worker {
	struct synthetic *synthetic;
	struct kvg_client *client;
	uint64_t seq;
	uint32_t layers;
};

static int fail(const struct worker *worker, int r, const char *what)
{
	if (r < 0)
		(void)fprintf(stderr, "kvgate-bench: neighbour: %s: %s\n", what, kvg_error(worker->client));
	return r;
}

static int open_worker(struct worker *worker, const char *socket, int device)
{
	const struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = TOKENS};
	struct kvg_layout layout = {.model = "kvgate-bench-neighbour",
		.hidden_dim = MODEL_HIDDEN,
		.group_count = 1,
		.max_sequences = 1,
		.max_tokens = TOKENS};
	char text[SERVICE_TEXT] = "";
	int r = synthetic_open(device, &worker->synthetic);

	layout.groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = worker->layers,
		.head_count = MODEL_HEADS,
		.head_total = MODEL_HEADS,
		.world = 1,
		.k_dim = MODEL_DIM,
		.v_dim = MODEL_DIM,
		.k_dtype = KVG_BF16,
		.v_dtype = KVG_BF16,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = MODEL_GROUP};
	if (r == 0)
		r = kvg_connect(socket, "kvgate-bench", &worker->client, text, sizeof(text));
	if (r < 0) {
		(void)fprintf(stderr, "kvgate-bench: neighbour: %s\n", text);
		return r;
	}
	r = kvg_set_stream(worker->client, worker->synthetic->stream);
	if (r == 0)
		r = kvg_register(worker->client, &layout, STAGING);
	if (r == 0)
		r = kvg_create(worker->client, &policy, &worker->seq);
	if (r == 0)
		r = kvg_reserve(worker->client, worker->seq, TOKENS);
	if (r == 0)
		r = kvg_commit(worker->client, worker->seq, TOKENS);
	return fail(worker, r, "a sequence");
}

/* There and back, the first time too: the tier has its memory then. */
static int turn(struct worker *worker)
{
	int r = fail(worker, kvg_offload(worker->client, worker->seq, NULL), "offload");

	return r == 0 ? fail(worker, kvg_restore(worker->client, worker->seq), "restore") : r;
}

static bool is_told(int fd)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};

	return poll(&polled, 1, 0) != 0;
}

/* Says what it has moved, and how long that took. */
static int move(struct worker *worker, int fd)
{
	double moved[2] = {0}, start = service_seconds();
	int r = 0;
	char byte;

	while (r == 0 && !is_told(fd)) {
		r = turn(worker);
		moved[0] += 2 * (double)neighbour_bytes(worker->layers);
	}
	moved[1] = service_seconds() - start;
	if (r == 0 && (read(fd, &byte, 1) != 1 || write(fd, moved, sizeof(moved)) != sizeof(moved)))
		r = -EPIPE;
	return r;
}

static int work(int fd, int device, uint32_t layers)
{
	struct worker worker = {.layers = layers};
	char socket[SERVICE_PATH], byte = 'r';
	int r;

	if (read(fd, socket, sizeof(socket)) != sizeof(socket))
		return 0;
	r = open_worker(&worker, socket, device);
	if (r == 0)
		r = turn(&worker);
	if (r == 0 && write(fd, &byte, 1) != 1)
		r = -EPIPE;
	while (r == 0 && read(fd, &byte, 1) == 1)
		r = move(&worker, fd);
	worker.client = kvg_close(worker.client);
	worker.synthetic = synthetic_close(worker.synthetic);
	return r;
}

/* ---- in the first worker's ---- */

int neighbour_fork(struct neighbour *neighbour, int device, uint32_t layers)
{
	int fds[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
		return -errno;
	(void)fflush(NULL);
	*neighbour = (struct neighbour){.pid = fork(), .fd = fds[0]};
	if (neighbour->pid == 0) {
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		(void)close(fds[0]);
		_exit(work(fds[1], device, layers) < 0);
	}
	(void)close(fds[1]);
	return neighbour->pid < 0 ? -errno : 0;
}

static int gone(void)
{
	(void)fprintf(stderr, "kvgate-bench: the neighbour has ended\n");
	return -EPIPE;
}

static int tell(const struct neighbour *neighbour, const void *data, size_t size)
{
	return send(neighbour->fd, data, size, MSG_NOSIGNAL) == (ssize_t)size ? 0 : gone();
}

static int hear(const struct neighbour *neighbour, void *data, size_t size)
{
	return recv(neighbour->fd, data, size, MSG_WAITALL) == (ssize_t)size ? 0 : gone();
}

int neighbour_open(struct neighbour *neighbour, const struct service *service)
{
	char path[SERVICE_PATH] = "", byte;
	int r;

	(void)service_path(service, "a.sock", path);
	r = tell(neighbour, path, sizeof(path));
	return r == 0 ? hear(neighbour, &byte, 1) : r;
}

int neighbour_go(struct neighbour *neighbour)
{
	return tell(neighbour, "g", 1);
}

int neighbour_stop(struct neighbour *neighbour)
{
	double moved[2];
	int r = tell(neighbour, "s", 1);

	if (r == 0)
		r = hear(neighbour, moved, sizeof(moved));
	if (r == 0) {
		neighbour->bytes += moved[0];
		neighbour->seconds += moved[1];
	}
	return r;
}

void neighbour_close(struct neighbour *neighbour)
{
	if (neighbour->pid <= 0)
		return;
	(void)close(neighbour->fd);
	(void)waitpid(neighbour->pid, NULL, 0);
	neighbour->pid = 0;
}
