/* Control messages of a worker: hello, register, load gate. */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "control.pb-c.h"
#include "daemon/base/log.h"
#include "daemon/sequence/gates.h"
#include "daemon/session/worker.h"
#include "proto/frame.h"

#define STAGING_MAX ((uint64_t)1 << 30) /* bytes of rows; sparse */

static void reply_send(struct worker *worker, Kvg__WorkerReply *reply, uint64_t id, const int *fds, unsigned fd_count)
{
	int r;

	reply->has_id = 1;
	reply->id = id;
	r = outbox_send(&worker->outbox, &reply->base, fds, fd_count);
	if (r < 0)
		worker_kill(worker, worker_send_failure(r));
}

static void __attribute__((format(printf, 4, 5)))
reply_error(struct worker *worker, uint64_t id, int status, const char *format, ...)
{
	Kvg__Error error = KVG__ERROR__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	char text[KVG_TEXT_SIZE];
	va_list arguments;

	va_start(arguments, format);
	(void)vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	error.status = status;
	error.text = text;
	reply.body_case = KVG__WORKER_REPLY__BODY_ERROR;
	reply.error = &error;
	worker->errors++;
	reply_send(worker, &reply, id, NULL, 0);
}

/* ---- hello ---- */

static void send_welcome(struct worker *worker, uint64_t id)
{
	Kvg__Welcome welcome = KVG__WELCOME__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	int fds[2] = {worker->ring.fd, worker->ring.doorbell};

	welcome.abi = KVG_ABI_VERSION;
	welcome.tenant = worker->tenant->name;
	welcome.worker = worker->id;
	welcome.extent_size = worker->server->pool->extent_size;
	welcome.daemon_version = (char *)(uintptr_t)KVG_VERSION;
	reply.body_case = KVG__WORKER_REPLY__BODY_WELCOME;
	reply.welcome = &welcome;
	reply_send(worker, &reply, id, fds, 2);
}

static void on_hello(struct worker *worker, uint64_t id, const Kvg__Hello *hello)
{
	uint32_t entries = hello->sq_entries;
	int r;

	if (worker->ready) {
		reply_error(worker, id, -EALREADY, "hello: said already");
	} else if (hello->abi_min > KVG_ABI_VERSION || hello->abi_max < KVG_ABI_VERSION) {
		reply_error(worker, id, -EPROTO, "hello: versions %u to %u, this daemon speaks %u", hello->abi_min,
			hello->abi_max, KVG_ABI_VERSION);
	} else if (entries < RING_ENTRIES_MIN || entries > RING_ENTRIES_MAX || (entries & (entries - 1))) {
		reply_error(worker, id, -EINVAL, "hello: %u ring entries, must be a power of two, %u to %u", entries,
			RING_ENTRIES_MIN, RING_ENTRIES_MAX);
	} else {
		(void)snprintf(worker->name, sizeof(worker->name), "%s", hello->name);
		r = worker_open_rings(worker, entries);
		if (r < 0) {
			worker_kill(worker, "no memory for its rings");
			return;
		}
		worker->ready = true;
		loop_timer_set(worker->hello_timer, 0);
		send_welcome(worker, id);
	}
}

/* ---- register ---- */

static void group_from_message(const Kvg__Group *m, struct kvg_group *group)
{
	*group = (struct kvg_group){.kind = m->kind,
		.layers = m->layers,
		.head_begin = m->head_begin,
		.head_count = m->head_count,
		.head_total = m->head_total,
		.rank = m->rank,
		.world = m->world,
		.group_id = m->group_id,
		.k_dim = m->k_dim,
		.v_dim = m->v_dim,
		.k_dtype = m->k_dtype,
		.v_dtype = m->v_dtype,
		.scale_kind = m->scale_kind,
		.scale_offset = m->scale_offset,
		.block_tokens = m->block_tokens,
		.window = m->window,
		.max_rollback = m->max_rollback,
		.query_heads = m->query_heads};
}

static int layout_from_message(const Kvg__Layout *m, struct kvg_layout *layout, char *text)
{
	*layout = (struct kvg_layout){.hidden_dim = m->hidden_dim,
		.group_count = (uint32_t)m->n_groups,
		.max_sequences = m->max_sequences,
		.max_tokens = m->max_tokens};
	if (m->n_groups > KVG_MAX_GROUPS || strlen(m->model) >= sizeof(layout->model)) {
		(void)snprintf(text, KVG_TEXT_SIZE, "layout: %zu groups, a name of %zu bytes; at most %u and %zu",
			m->n_groups, strlen(m->model), KVG_MAX_GROUPS, sizeof(layout->model) - 1);
		return -EINVAL;
	}
	(void)snprintf(layout->model, sizeof(layout->model), "%s", m->model);
	for (size_t i = 0; i < m->n_groups; i++)
		group_from_message(m->groups[i], &layout->groups[i]);
	return 0;
}

static int open_staging(struct worker *worker, uint32_t max_sequences, uint64_t bytes, char *text)
{
	if (bytes > STAGING_MAX) {
		(void)snprintf(text, KVG_TEXT_SIZE, "staging: %" PRIu64 " bytes, at most %" PRIu64, bytes, STAGING_MAX);
		return -EINVAL;
	}
	worker->rows_offset = (max_sequences * sizeof(uint32_t) + 4095) & ~(size_t)4095;
	worker->staging_size = (worker->rows_offset + bytes + 4095) & ~(size_t)4095;
	worker->staging_fd = kvg_memfd_new("kvgate-staging", worker->staging_size);
	if (worker->staging_fd < 0)
		return worker->staging_fd;
	worker->staging =
		mmap(NULL, worker->staging_size, PROT_READ, MAP_SHARED | MAP_NORESERVE, worker->staging_fd, 0);
	if (worker->staging == MAP_FAILED) {
		worker->staging = NULL;
		return -errno;
	}
	(void)madvise(worker->staging, worker->staging_size, MADV_DONTDUMP);
	return 0;
}

static void close_staging(struct worker *worker)
{
	if (worker->staging)
		(void)munmap(worker->staging, worker->staging_size);
	if (worker->staging_fd >= 0)
		(void)close(worker->staging_fd);
	worker->staging = NULL;
	worker->staging_fd = -1;
}

static void send_registered(struct worker *worker, uint64_t id)
{
	const struct space *space = worker->space;
	Kvg__Registered registered = KVG__REGISTERED__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	int fds[2] = {space->table.reader_fd, worker->staging_fd};

	registered.extent_size = space->arena->extent_size;
	registered.stride = space->arena->stride;
	registered.arena_slots = space->arena->slots;
	registered.row_cap = space->part.worker->row_cap;
	registered.staging_rows_offset = worker->rows_offset;
	registered.staging_size = worker->staging_size;
	reply.body_case = KVG__WORKER_REPLY__BODY_REGISTERED;
	reply.registered = &registered;
	reply_send(worker, &reply, id, fds, 2);
}

static void name_in_metadata(const struct worker *worker)
{
	struct meta_worker *meta = worker->space->part.worker;

	meta->uid = worker->peer.uid;
	meta->pid = (uint32_t)worker->peer.pid;
	(void)snprintf(meta->name, sizeof(meta->name), "%s", worker->name);
}

static void on_register(struct worker *worker, uint64_t id, const Kvg__Register *message)
{
	struct kvg_layout layout;
	char text[KVG_TEXT_SIZE] = "";
	int r;

	if (worker->space) {
		reply_error(worker, id, -EALREADY, "register: this connection has a layout already (%s)",
			worker->space->part.worker->layout.model);
		return;
	}
	r = layout_from_message(message->layout, &layout, text);
	if (r >= 0)
		r = space_new(worker->tenant, &layout, worker->id, &worker_space_ops, worker, &worker->space, text);
	if (r >= 0) {
		r = open_staging(worker, layout.max_sequences, message->staging_bytes, text);
		if (r < 0) {
			worker->space = space_free(worker->space);
			close_staging(worker);
		}
	}
	if (r < 0) {
		reply_error(worker, id, r, "%s", text[0] ? text : strerror(-r));
		return;
	}
	worker->space->staging = worker->staging + worker->rows_offset;
	worker->space->staging_size = worker->staging_size - worker->rows_offset;
	name_in_metadata(worker);
	send_registered(worker, id);
}

/* ---- gate ---- */

struct gate_job {
	struct job job;
	struct worker *worker;
	uint64_t id;
	int fd, status;
	struct gate_set *gates;
	char text[KVG_TEXT_SIZE];
};

static void gate_run(struct job *job)
{
	struct gate_job *gate = list_entry(job, struct gate_job, job);
	const struct kvg_layout *layout = &gate->worker->space->part.worker->layout;

	gate->status = gate_set_load(gate->fd, layout, &gate->gates, gate->text, sizeof(gate->text));
}

static void gate_done(struct job *job)
{
	struct gate_job *gate = list_entry(job, struct gate_job, job);
	struct worker *worker = gate->worker;
	struct loop *loop = worker->server->loop;
	Kvg__GateLoaded loaded = KVG__GATE_LOADED__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;

	worker->gate_job = NULL;
	if (worker->dead) {
		(void)gate_set_free(gate->gates);
		if (worker->closing)
			worker_finish(worker);
	} else if (gate->status < 0) {
		reply_error(worker, gate->id, gate->status, "%s", gate->text);
	} else {
		space_set_gates(worker->space, gate->gates);
		loaded.layers = gate->gates->layers;
		loaded.folded_layers = gate->gates->folded;
		reply.body_case = KVG__WORKER_REPLY__BODY_GATE_LOADED;
		reply.gate_loaded = &loaded;
		reply_send(worker, &reply, gate->id, NULL, 0);
	}
	loop_close_fd(loop, gate->fd);
	free(gate);
}

static void on_load_gate(struct worker *worker, uint64_t id, int *fds, unsigned fd_count)
{
	struct gate_job *gate;

	if (!worker->space || worker->gate_job || worker->space->gates) {
		reply_error(worker, id, worker->space ? -EALREADY : -ENOTCONN,
			worker->space ? "gate: loaded already" : "gate: no layout is registered");
		return;
	}
	if (fd_count != 1) {
		reply_error(worker, id, -EBADF, "gate: %u descriptors, needs 1", fd_count);
		return;
	}
	gate = calloc(1, sizeof(*gate));
	if (!gate) {
		reply_error(worker, id, -ENOMEM, "gate: out of memory");
		return;
	}
	gate->job = (struct job){.run = gate_run, .done = gate_done};
	gate->worker = worker;
	gate->id = id;
	gate->fd = fds[0];
	fds[0] = -1;
	worker->gate_job = gate;
	executor_submit(worker->server->executor, &gate->job);
}

/* ---- dispatch ---- */

static void dispatch(struct worker *worker, const Kvg__WorkerRequest *request, int *fds, unsigned fd_count)
{
	bool is_hello = request->body_case == KVG__WORKER_REQUEST__BODY_HELLO;

	if (!is_hello && !worker->ready)
		reply_error(worker, request->id, -ENOTCONN, "control: the first message must be hello");
	else if (fd_count && request->body_case != KVG__WORKER_REQUEST__BODY_LOAD_GATE)
		reply_error(worker, request->id, -EBADF, "control: %u descriptors where none belong", fd_count);
	else if (is_hello)
		on_hello(worker, request->id, request->hello);
	else if (request->body_case == KVG__WORKER_REQUEST__BODY_REGISTER_LAYOUT)
		on_register(worker, request->id, request->register_layout);
	else if (request->body_case == KVG__WORKER_REQUEST__BODY_LOAD_GATE)
		on_load_gate(worker, request->id, fds, fd_count);
	else
		reply_error(worker, request->id, -EOPNOTSUPP, "control: a message of unknown type");
}

void worker_control(struct worker *worker, const uint8_t *data, size_t size, int *fds, unsigned fd_count)
{
	Kvg__WorkerRequest *request = kvg__worker_request__unpack(NULL, size, data);

	if (!request) {
		worker_kill(worker, "a control message is truncated or malformed");
		return;
	}
	dispatch(worker, request, fds, fd_count);
	kvg__worker_request__free_unpacked(request, NULL);
}
