#include "daemon/session/worker.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "control.pb-c.h"
#include "daemon/base/log.h"
#include "daemon/session/pressure.h"
#include "proto/frame.h"

#define MESSAGE_MAX   (64u * 1024u) /* bytes of a worker's message */
#define HELLO_NS      10000000000u
#define MESSAGE_FDS   4u
#define MESSAGE_SHARE 16u /* messages, and */
#define ENTRY_SHARE   64u /* entries, of one worker in one round */

/* ---- the end ---- */

void worker_kill(struct worker *worker, const char *reason)
{
	Kvg__Goodbye goodbye = KVG__GOODBYE__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;

	if (worker->dead)
		return;
	worker->dead = true;
	if (reason) {
		log_warning("worker %llu (%s, %s): %s", (unsigned long long)worker->id, worker->tenant->quota.name,
			worker->name, reason);
		goodbye.reason = (char *)(uintptr_t)reason;
		reply.body_case = KVG__WORKER_REPLY__BODY_GOODBYE;
		reply.goodbye = &goodbye;
		(void)outbox_send(&worker->outbox, &reply.base, NULL, 0);
	}
	list_remove(&worker->unsent_node);
	list_remove(&worker->active_node);
	list_add_tail(&worker->server->dead, &worker->active_node);
}

static void unwatch(struct worker *worker)
{
	outbox_unwatch(&worker->outbox);
	worker->watch = loop_watch_free(worker->watch);
	worker->pid_watch = loop_watch_free(worker->pid_watch);
	worker->doorbell_watch = loop_watch_free(worker->doorbell_watch);
	worker->hello_timer = loop_timer_free(worker->hello_timer);
	pressure_forget(worker);
	if (worker->pidfd >= 0)
		(void)close(worker->pidfd);
	if (worker->fd >= 0)
		(void)close(worker->fd);
	worker->pidfd = worker->fd = -1;
}

static void worker_free(struct worker *worker)
{
	list_remove(&worker->node);
	worker->server->worker_count--;
	worker->tenant->workers--;
	worker->tenant->entries -= worker->entries;
	worker->tenant->staged_rows -= worker->staged_rows;
	(void)space_free(worker->space);
	for (uint32_t i = 0; worker->requests && i < worker->ring.entries; i++)
		request_deinit(&worker->requests[i]);
	if (worker->staging)
		(void)munmap(worker->staging, worker->staging_size);
	if (worker->staging_fd >= 0)
		(void)close(worker->staging_fd);
	ring_deinit(&worker->ring);
	outbox_deinit(&worker->outbox);
	free(worker->requests);
	free(worker);
}

void worker_finish(struct worker *worker)
{
	if (worker->space)
		space_kill(worker->space);
	else
		worker_free(worker);
}

void worker_take_down(struct worker *worker)
{
	worker->closing = true;
	unwatch(worker);
	if (!worker->setup)
		worker_finish(worker);
}

static void space_closed(void *user)
{
	worker_free(user);
}

/* ---- what the space tells us ---- */

const char *worker_send_failure(int status)
{
	switch (status) {
	case -EOVERFLOW:
		return "does not read its control socket";
	case -ETOOMANYREFS:
		return "the daemon's limit of descriptors in flight (LimitNOFILE) is reached";
	case -EMFILE:
	case -ENFILE:
	case -ENOMEM:
		return "the daemon is out of descriptors or memory";
	default:
		return NULL; /* it hung up */
	}
}

static void send_event(struct worker *worker, Kvg__WorkerReply *reply, const int *fds, unsigned fd_count)
{
	int r = worker->dead ? 0 : outbox_send(&worker->outbox, &reply->base, fds, fd_count);

	if (r < 0)
		worker_kill(worker, worker_send_failure(r));
}

/*
 * At the end of the round: a peer that wakes for a packet may do so on this CPU, and what the reactor still has to
 * start would wait for it. Completions say which events come before them (kvg_cqe.events).
 */
static void queue_event(struct worker *worker, Kvg__WorkerReply *reply, const int *fds, unsigned fd_count)
{
	int r = worker->dead ? 0 : outbox_queue(&worker->outbox, &reply->base, fds, fd_count);

	if (r < 0)
		worker_kill(worker, worker_send_failure(r));
	else if (list_empty(&worker->unsent_node) && !worker->dead)
		list_add_tail(&worker->server->unsent, &worker->unsent_node);
}

void worker_flush(struct worker *worker)
{
	int r = worker->dead ? 0 : outbox_flush(&worker->outbox);

	if (r < 0)
		worker_kill(worker, worker_send_failure(r));
}

static void send_wake(struct worker *worker)
{
	Kvg__Wake wake = KVG__WAKE__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;

	reply.body_case = KVG__WORKER_REPLY__BODY_WAKE;
	reply.wake = &wake;
	send_event(worker, &reply, NULL, 0);
}

/* ---- how much is under way ---- */

static void count_entry(struct worker *worker, const struct request *request)
{
	worker->entries++;
	worker->tenant->entries++;
	worker->staged_rows += request->staged_rows;
	worker->tenant->staged_rows += request->staged_rows;
}

static void uncount_entry(struct worker *worker, const struct request *request)
{
	worker->entries--;
	worker->tenant->entries--;
	worker->staged_rows -= request->staged_rows;
	worker->tenant->staged_rows -= request->staged_rows;
}

/* What gives memory back is never refused. */
static bool gives_back(uint8_t op)
{
	return op == KVG_OP_UNMAPPED || op == KVG_OP_FREE || op == KVG_OP_RELIEF || op == KVG_OP_NOP;
}

/* Whether the tenant may have one more entry under way, with the rows that it stages; if not, text says why. */
static bool is_allowed(const struct worker *worker, struct request *request)
{
	const struct tenant *tenant = worker->tenant;
	const struct kvg_sqe *sqe = &request->sqe;
	uint64_t rows = sqe->op == KVG_OP_STAGE ? (uint64_t)sqe->stage.rows * sqe->stage.layer_count : 0;

	if (tenant->entries >= tenant->limits.entries && !gives_back(sqe->op)) {
		(void)snprintf(request->text, sizeof(request->text),
			"%s: %u entries under way, at most %u (max_entries)", tenant->quota.name, tenant->entries,
			tenant->limits.entries);
		return false;
	}
	if (rows && (rows > tenant->limits.staged_rows || tenant->staged_rows > tenant->limits.staged_rows - rows)) {
		(void)snprintf(request->text, sizeof(request->text),
			"%s: stage: %llu rows of all layers, %llu under way, at most %llu (max_staged_rows)",
			tenant->quota.name, (unsigned long long)rows, (unsigned long long)tenant->staged_rows,
			(unsigned long long)tenant->limits.staged_rows);
		return false;
	}
	request->staged_rows = rows;
	return true;
}

static void complete(void *user, struct request *request)
{
	struct worker *worker = user;

	if (!request->refused)
		uncount_entry(worker, request);
	worker->errors += request->cqe.status < 0;
	list_remove(&request->node);
	list_add_head(&worker->free_requests, &request->node);
	if (ring_complete(&worker->ring, &request->cqe, request->text))
		send_wake(worker);
}

static int extents_added(void *user, struct extent *const *extents, uint32_t count)
{
	struct worker *worker = user;
	Kvg__ExtentsAdded added = KVG__EXTENTS_ADDED__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	uint32_t slots[KVG_FRAME_FDS];
	int fds[KVG_FRAME_FDS];

	for (uint32_t i = 0; i < count; i++) {
		slots[i] = extents[i]->meta->slot;
		fds[i] = extents[i]->fd;
	}
	added.slots = slots;
	added.n_slots = count;
	reply.body_case = KVG__WORKER_REPLY__BODY_EXTENTS_ADDED;
	reply.extents_added = &added;
	queue_event(worker, &reply, fds, count);
	(void)ring_count_event(&worker->ring);
	return 0;
}

static uint32_t extents_dropped(void *user, const uint32_t *slots, uint32_t count)
{
	struct worker *worker = user;
	Kvg__ExtentsDropped dropped = KVG__EXTENTS_DROPPED__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	uint32_t event;

	dropped.slots = (uint32_t *)(uintptr_t)slots;
	dropped.n_slots = count;
	reply.body_case = KVG__WORKER_REPLY__BODY_EXTENTS_DROPPED;
	reply.extents_dropped = &dropped;
	queue_event(worker, &reply, NULL, 0);
	event = ring_count_event(&worker->ring);
	pressure_dropped(worker, event);
	return event;
}

static void space_broken(void *user, const char *reason)
{
	worker_kill(user, reason);
}

const struct space_ops worker_space_ops = {
	.complete = complete,
	.extents_added = extents_added,
	.extents_dropped = extents_dropped,
	.closed = space_closed,
	.broken = space_broken,
};

/* ---- rings ---- */

static void activate(struct worker *worker)
{
	worker->last_work_ns = loop_now();
	if (worker->dead || !list_empty(&worker->active_node))
		return;
	list_add_tail(&worker->server->active, &worker->active_node);
	(void)ring_set_wakeup(&worker->ring, false);
}

static void relief(struct worker *worker, struct request *request)
{
	uint32_t number = request->sqe.relief.pressure;

	if (!pressure_relieved(worker, number)) {
		request->cqe.status = -EINVAL;
		(void)snprintf(request->text, sizeof(request->text), "relief: number %u, the last one asked with is %u",
			number, worker->pressure);
	}
	complete(worker, request);
}

static void submit(struct worker *worker, const struct kvg_sqe *sqe)
{
	struct request *request = list_entry(list_pop(&worker->free_requests), struct request, node);

	*request = (struct request){.sqe = *sqe, .cqe.user_data = sqe->user_data};
	list_init(&request->node);
	worker->submitted++;
	if (is_allowed(worker, request))
		count_entry(worker, request);
	else
		request->refused = -EAGAIN;
	if (sqe->op == KVG_OP_RELIEF) {
		relief(worker, request);
		return;
	}
	if (worker->registered) {
		space_submit(worker->space, request);
		return;
	}
	if (request->refused) {
		request->cqe.status = request->refused;
	} else if (sqe->op != KVG_OP_NOP) {
		request->cqe.status = -ENOTCONN;
		(void)snprintf(request->text, sizeof(request->text),
			"entry: operation %u before a layout is registered", sqe->op);
	}
	complete(worker, request);
}

bool worker_poll(struct worker *worker)
{
	struct kvg_sqe sqe;
	unsigned taken = 0;
	int r = 0;

	while (taken < ENTRY_SHARE && !worker->dead && (r = ring_take(&worker->ring, &sqe)) > 0) {
		submit(worker, &sqe);
		taken++;
	}
	if (r < 0)
		worker_kill(worker, "a ring cursor is out of range");
	if (taken)
		worker->last_work_ns = loop_now();
	return taken > 0;
}

/* Never read: the poll is edge-triggered, and a worker could make a read block. */
static void doorbell_rung(void *user, uint32_t revents)
{
	(void)revents;
	activate(user);
}

/* ---- control socket ---- */

static void close_received(void *user, int fd)
{
	loop_close_fd(user, fd);
}

static void receive(struct worker *worker)
{
	for (unsigned i = 0; i < MESSAGE_SHARE && !worker->dead; i++) {
		struct kvg_frame frame;
		int r = kvg_frame_receive_with(
			worker->fd, MESSAGE_MAX, MESSAGE_FDS, 0, close_received, worker->server->loop, &frame);

		if (r == -EAGAIN)
			return;
		if (r == -EMSGSIZE) {
			worker_kill(worker, "a control message is larger than 65536 bytes");
		} else if (r == -ETOOMANYREFS) {
			worker_kill(worker, "a control message carries more than 4 descriptors");
		} else if (r <= 0) {
			worker_kill(worker, NULL);
		} else {
			worker_control(worker, frame.data, frame.size, frame.fds, frame.fd_count);
			kvg_frame_deinit(&frame);
		}
	}
	if (!worker->dead)
		loop_watch_again(worker->watch);
}

static void socket_ready(void *user, uint32_t revents)
{
	struct worker *worker = user;

	(void)revents;
	if (!worker->dead)
		receive(worker);
}

static void socket_writable(void *user, uint32_t revents)
{
	struct worker *worker = user;

	(void)revents;
	worker_flush(worker);
}

/* A forked child may keep the socket open; the process itself is gone. */
static void process_died(void *user, uint32_t revents)
{
	(void)revents;
	worker_kill(user, NULL);
}

/* ---- the beginning ---- */

static void no_hello(void *user)
{
	worker_kill(user, "has not said hello in time");
}

static int watch_all(struct worker *worker)
{
	struct loop *loop = worker->server->loop;
	int r = loop_watch_new(loop, worker->fd, POLLIN, socket_ready, worker, &worker->watch);

	outbox_watch(&worker->outbox, loop, socket_writable, worker);
	if (r >= 0)
		r = loop_timer_new(loop, no_hello, worker, &worker->hello_timer);
	if (r >= 0)
		loop_timer_set(worker->hello_timer, HELLO_NS);

	if (r < 0 || worker->peer.pid <= 0)
		return r;
	worker->pidfd = (int)syscall(SYS_pidfd_open, worker->peer.pid, 0);
	if (worker->pidfd < 0)
		return 0; /* of another PID namespace, or gone: then the socket tells */
	return loop_watch_new(loop, worker->pidfd, POLLIN, process_died, worker, &worker->pid_watch);
}

int worker_new(struct server *server, struct tenant *tenant, int fd, const struct ucred *peer)
{
	struct worker *worker = calloc(1, sizeof(*worker));
	int r;

	if (!worker) {
		(void)close(fd);
		return -ENOMEM;
	}
	*worker = (struct worker){
		.server = server, .tenant = tenant, .id = ++server->next_worker, .peer = *peer, .fd = fd};
	worker->pidfd = worker->staging_fd = -1;
	worker->ring = (struct ring){.fd = -1, .doorbell = -1};
	list_init(&worker->active_node);
	list_init(&worker->unsent_node);
	list_init(&worker->free_requests);
	outbox_init(&worker->outbox, fd);
	list_add_tail(&server->workers, &worker->node);
	server->worker_count++;
	tenant->workers++;
	r = watch_all(worker);
	if (r < 0)
		worker_kill(worker, NULL);
	return r;
}

void worker_refuse(int fd, int status, const char *format, ...)
{
	Kvg__Error error = KVG__ERROR__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	struct outbox outbox;
	char text[KVG_TEXT_SIZE];
	va_list arguments;

	va_start(arguments, format);
	(void)vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	error.status = status;
	error.text = text;
	reply.body_case = KVG__WORKER_REPLY__BODY_ERROR;
	reply.error = &error;
	outbox_init(&outbox, fd);
	(void)outbox_send(&outbox, &reply.base, NULL, 0);
	outbox_deinit(&outbox);
}

int worker_open_rings(struct worker *worker, uint32_t entries)
{
	int r = ring_init(&worker->ring, entries);

	if (r < 0)
		return r;
	worker->requests = calloc(entries, sizeof(struct request));
	if (!worker->requests)
		return -ENOMEM;
	for (uint32_t i = 0; i < entries; i++) {
		list_init(&worker->requests[i].node);
		list_add_tail(&worker->free_requests, &worker->requests[i].node);
	}
	return loop_watch_new(
		worker->server->loop, worker->ring.doorbell, POLLIN, doorbell_rung, worker, &worker->doorbell_watch);
}

static uint64_t occupied(int fd)
{
	struct stat st;

	return fd < 0 || fstat(fd, &st) < 0 ? 0 : (uint64_t)st.st_blocks * 512u;
}

uint64_t worker_overhead(const struct worker *worker)
{
	uint64_t bytes = occupied(worker->ring.fd) + occupied(worker->staging_fd);

	if (worker->registered)
		bytes += space_overhead(worker->space) + worker->space->device.table_size +
			 worker->space->device.staging_size;
	return bytes;
}
