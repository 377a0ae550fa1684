/* Control messages of a worker: hello, register, load gate, import, release. */
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
#include "daemon/sequence/imports.h"
#include "daemon/session/worker.h"
#include "proto/frame.h"

#ifdef KVG_HAS_CUDA
#include "kernels/cuda/device.h"
#endif

#define STAGING_MAX        ((uint64_t)1 << 30)  /* bytes of rows; sparse */
#define PINNED_STAGING_MAX ((uint64_t)64 << 20) /* the same on cuda, where the driver pins them */
#define DEVICE_STAGING_MAX ((uint64_t)8 << 30)  /* bytes of rows in device memory */

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

/* NULL on the host kind. */
static struct kvg_cuda *worker_device(const struct worker *worker)
{
	struct kind *kind = worker->server->pool->kind;

	return kind->ops->device(kind);
}

/* ---- hello ---- */

static void fill_kind(const struct worker *worker, Kvg__Welcome *welcome)
{
	welcome->kind = (char *)(uintptr_t)worker->server->pool->kind->ops->name;
#ifdef KVG_HAS_CUDA
	struct kvg_cuda *device = worker_device(worker);

	if (device) {
		welcome->has_device_uuid = 1;
		welcome->device_uuid = (ProtobufCBinaryData){.len = sizeof(device->uuid), .data = device->uuid};
	}
#endif
}

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
	fill_kind(worker, &welcome);
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

/* ---- what the executor has to do first ---- */

/* A request that a job on the executor answers; a worker has one at a time. */
struct setup {
	struct job job;
	struct worker *worker;
	uint64_t id; /* of the request */
	int status;
	char text[KVG_TEXT_SIZE];
	/* Executor. */
	int (*run)(struct setup *setup);
	/* Reactor, when run() has returned and the worker may be dead: keeps what came of it, or drops it. */
	void (*settle)(struct setup *setup);
	/* Reactor, after that, when status is not negative and the worker lives. */
	void (*reply)(struct setup *setup);

	struct space_memory memory;    /* REGISTER */
	int fd;                        /* LOAD_GATE; -1: none */
	struct gate_set *gates;        /* LOAD_GATE */
	uint8_t handle[IMPORT_HANDLE]; /* IMPORT_BUFFER, IMPORT_EVENT */
	uint64_t offset, size;         /* IMPORT_BUFFER */
	struct import import;          /* IMPORT_BUFFER, IMPORT_EVENT, RELEASE */
};

static void setup_run(struct job *job)
{
	struct setup *setup = list_entry(job, struct setup, job);

	setup->status = setup->run(setup);
}

static void setup_done(struct job *job)
{
	struct setup *setup = list_entry(job, struct setup, job);
	struct worker *worker = setup->worker;

	worker->setup = NULL;
	setup->settle(setup);
	if (worker->dead && worker->closing)
		worker_finish(worker);
	else if (!worker->dead && setup->status < 0)
		reply_error(worker, setup->id, setup->status, "%s",
			setup->text[0] ? setup->text : strerror(-setup->status));
	else if (!worker->dead)
		setup->reply(setup);
	free(setup);
}

/* NULL, and the request is answered, when another one is under way or there is no memory. */
static struct setup *setup_new(struct worker *worker, uint64_t id, const char *what)
{
	struct setup *setup = worker->setup ? NULL : calloc(1, sizeof(*setup));

	if (worker->setup)
		reply_error(worker, id, -EBUSY, "%s: another request of this worker is under way", what);
	else if (!setup)
		reply_error(worker, id, -ENOMEM, "%s: out of memory", what);
	if (!setup)
		return NULL;
	*setup = (struct setup){.worker = worker, .id = id, .fd = -1};
	setup->job = (struct job){.run = setup_run, .done = setup_done};
	return setup;
}

static void setup_submit(struct setup *setup)
{
	setup->worker->setup = setup;
	executor_submit(setup->worker->server->executor, &setup->job);
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

/* Where things lie in the staging memfd: the counters, the semaphores when there is a device, and the rows. */
static void lay_out_staging(const struct worker *worker, uint32_t max_sequences, struct space_memory *memory)
{
	size_t end = max_sequences * sizeof(uint32_t);

	if (worker_device(worker)) {
		memory->sync_offset = (end + 63) & ~(size_t)63;
		end = memory->sync_offset + sizeof(struct kvg_sync) + max_sequences * sizeof(uint64_t);
	}
	memory->rows_offset = (end + 4095) & ~(size_t)4095;
}

static int check_staging(const struct worker *worker, const Kvg__Register *message, char *text)
{
	uint64_t limit = worker_device(worker) ? PINNED_STAGING_MAX : STAGING_MAX;

	if (message->staging_bytes > limit) {
		(void)snprintf(text, KVG_TEXT_SIZE, "staging: %" PRIu64 " bytes, at most %" PRIu64,
			message->staging_bytes, limit);
		return -EINVAL;
	}
	if (message->device_staging_bytes > DEVICE_STAGING_MAX) {
		(void)snprintf(text, KVG_TEXT_SIZE, "staging: %" PRIu64 " bytes of device memory, at most %" PRIu64,
			message->device_staging_bytes, DEVICE_STAGING_MAX);
		return -EINVAL;
	}
	if (message->device_staging_bytes && !worker_device(worker)) {
		(void)snprintf(text, KVG_TEXT_SIZE, "staging: %" PRIu64 " bytes of device memory, the kind is host",
			message->device_staging_bytes);
		return -EOPNOTSUPP;
	}
	return 0;
}

/* The daemon only reads the rows; but its streams write the semaphores. */
static int open_staging(struct worker *worker, uint64_t bytes, struct space_memory *memory)
{
	int protection = worker_device(worker) ? PROT_READ | PROT_WRITE : PROT_READ;

	worker->rows_offset = memory->rows_offset;
	worker->staging_size = (memory->rows_offset + bytes + 4095) & ~(size_t)4095;
	worker->staging_fd = kvg_memfd_new("kvgate-staging", worker->staging_size);
	if (worker->staging_fd < 0)
		return worker->staging_fd;
	worker->staging =
		mmap(NULL, worker->staging_size, protection, MAP_SHARED | MAP_NORESERVE, worker->staging_fd, 0);
	if (worker->staging == MAP_FAILED) {
		worker->staging = NULL;
		return -errno;
	}
	(void)madvise(worker->staging, worker->staging_size, MADV_DONTDUMP);
	(void)madvise(worker->staging, worker->staging_size, MADV_DONTFORK);
	memory->staging = worker->staging;
	memory->staging_size = worker->staging_size;
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

static void name_in_metadata(const struct worker *worker)
{
	struct meta_worker *meta = worker->space->part.worker;

	meta->uid = worker->peer.uid;
	meta->pid = (uint32_t)worker->peer.pid;
	(void)snprintf(meta->name, sizeof(meta->name), "%s", worker->name);
}

static int register_run(struct setup *setup)
{
	return space_open(setup->worker->space, &setup->memory, setup->text);
}

static void register_settle(struct setup *setup)
{
	struct worker *worker = setup->worker;

	if (setup->status >= 0) {
		worker->registered = true;
		return;
	}
	worker->space = space_free(worker->space);
	close_staging(worker);
}

static void register_reply(struct setup *setup)
{
	struct worker *worker = setup->worker;
	const struct space *space = worker->space;
	const struct space_device *device = &space->device;
	Kvg__Registered registered = KVG__REGISTERED__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	int fds[4] = {space->table.reader_fd, worker->staging_fd, device->table_fd, device->staging_fd};

	registered.extent_size = space->arena->extent_size;
	registered.stride = space->arena->stride;
	registered.arena_slots = space->arena->slots;
	registered.row_cap = space->part.worker->row_cap;
	registered.staging_rows_offset = worker->rows_offset;
	registered.staging_size = worker->staging_size;
	if (device->table_size) {
		registered.has_sync_offset = registered.has_device_table_size = 1;
		registered.has_device_ids_offset = registered.has_device_staging_size = 1;
		registered.sync_offset = setup->memory.sync_offset;
		registered.device_table_size = device->table_size;
		registered.device_ids_offset = device->ids_offset;
		registered.device_staging_size = device->staging_size;
	}
	reply.body_case = KVG__WORKER_REPLY__BODY_REGISTERED;
	reply.registered = &registered;
	reply_send(worker, &reply, setup->id, fds, device->staging_size ? 4 : device->table_size ? 3 : 2);
}

static int begin_space(struct setup *setup, const Kvg__Register *message)
{
	struct worker *worker = setup->worker;
	struct kvg_layout layout;
	int r = layout_from_message(message->layout, &layout, setup->text);

	if (r >= 0)
		r = check_staging(worker, message, setup->text);
	if (r >= 0)
		r = space_new(
			worker->tenant, &layout, worker->id, &worker_space_ops, worker, &worker->space, setup->text);
	if (r < 0)
		return r;
	setup->memory = (struct space_memory){
		.device_staging_bytes = message->device_staging_bytes, .wait_ns = worker->server->wait_ns};
	lay_out_staging(worker, layout.max_sequences, &setup->memory);
	r = space_claim(worker->space, message->device_staging_bytes, setup->text);
	if (r >= 0)
		r = open_staging(worker, message->staging_bytes, &setup->memory);
	if (r < 0) {
		worker->space = space_free(worker->space);
		close_staging(worker);
	}
	return r;
}

static void on_register(struct worker *worker, uint64_t id, const Kvg__Register *message)
{
	struct setup *setup;
	int r;

	if (worker->registered) {
		reply_error(worker, id, -EALREADY, "register: this connection has a layout already (%s)",
			worker->space->part.worker->layout.model);
		return;
	}
	setup = setup_new(worker, id, "register");
	if (!setup)
		return;
	setup->run = register_run;
	setup->settle = register_settle;
	setup->reply = register_reply;
	r = begin_space(setup, message);
	if (r < 0) {
		reply_error(worker, id, r, "%s", setup->text[0] ? setup->text : strerror(-r));
		free(setup);
		return;
	}
	name_in_metadata(worker);
	setup_submit(setup);
}

/* ---- gate ---- */

static int gate_run(struct setup *setup)
{
	const struct worker *worker = setup->worker;
	const struct kvg_layout *layout = &worker->space->part.worker->layout;

	return gate_set_load(
		setup->fd, layout, worker->server->pool->kind, &setup->gates, setup->text, sizeof(setup->text));
}

/* The gates go with the space, on the executor where they belong, also when the worker is dead. */
static void gate_settle(struct setup *setup)
{
	if (setup->status >= 0)
		space_set_gates(setup->worker->space, setup->gates);
	loop_close_fd(setup->worker->server->loop, setup->fd);
}

static void gate_reply(struct setup *setup)
{
	Kvg__GateLoaded loaded = KVG__GATE_LOADED__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;

	loaded.layers = setup->gates->layers;
	loaded.folded_layers = setup->gates->folded;
	reply.body_case = KVG__WORKER_REPLY__BODY_GATE_LOADED;
	reply.gate_loaded = &loaded;
	reply_send(setup->worker, &reply, setup->id, NULL, 0);
}

static void on_load_gate(struct worker *worker, uint64_t id, int *fds, unsigned fd_count)
{
	struct setup *setup;

	if (!worker->registered || worker->space->gates) {
		reply_error(worker, id, worker->registered ? -EALREADY : -ENOTCONN,
			worker->registered ? "gate: loaded already" : "gate: no layout is registered");
		return;
	}
	if (fd_count != 1) {
		reply_error(worker, id, -EBADF, "gate: %u descriptors, needs 1", fd_count);
		return;
	}
	setup = setup_new(worker, id, "gate");
	if (!setup)
		return;
	setup->run = gate_run;
	setup->settle = gate_settle;
	setup->reply = gate_reply;
	setup->fd = fds[0];
	fds[0] = -1;
	setup_submit(setup);
}

/* ---- memory and events of the worker's own ---- */

/* NULL, and the request is answered, when this worker may not hand anything over, or nothing more. */
static struct setup *import_new(struct worker *worker, uint64_t id, const ProtobufCBinaryData *handle)
{
	struct setup *setup;

	if (!worker_device(worker))
		reply_error(worker, id, -EOPNOTSUPP, "import: this daemon's memory is of the kind host");
	else if (!worker->tenant->ipc)
		reply_error(worker, id, -EACCES, "import: tenant %s may not hand over memory or events (ipc = no)",
			worker->tenant->name);
	else if (!worker->registered)
		reply_error(worker, id, -ENOTCONN, "import: no layout is registered");
	else if (handle && handle->len != IMPORT_HANDLE)
		reply_error(worker, id, -EINVAL, "import: a handle of %zu bytes, not %u", handle->len, IMPORT_HANDLE);
	else if (handle && worker->space->imports.count == IMPORTS_MAX)
		reply_error(worker, id, -ENOSPC, "import: %u buffers and events already, no more are possible",
			IMPORTS_MAX);
	else {
		setup = setup_new(worker, id, handle ? "import" : "release");
		if (setup && handle)
			memcpy(setup->handle, handle->data, IMPORT_HANDLE);
		return setup;
	}
	return NULL;
}

static int buffer_run(struct setup *setup)
{
	return import_open_buffer(worker_device(setup->worker), setup->handle, setup->offset, setup->size,
		&setup->import, setup->text, sizeof(setup->text));
}

static int event_run(struct setup *setup)
{
	return import_open_event(
		worker_device(setup->worker), setup->handle, &setup->import, setup->text, sizeof(setup->text));
}

/* Also when the worker is dead: the space closes it. There is a place: one request at a time was let through. */
static void import_settle(struct setup *setup)
{
	if (setup->status >= 0)
		setup->import.id = imports_add(&setup->worker->space->imports, &setup->import);
}

static void import_reply(struct setup *setup)
{
	Kvg__Imported imported = KVG__IMPORTED__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;

	imported.id = setup->import.id;
	reply.body_case = KVG__WORKER_REPLY__BODY_IMPORTED;
	reply.imported = &imported;
	reply_send(setup->worker, &reply, setup->id, NULL, 0);
}

static void on_import_buffer(struct worker *worker, uint64_t id, const Kvg__ImportBuffer *message)
{
	struct setup *setup = import_new(worker, id, &message->handle);

	if (!setup)
		return;
	setup->run = buffer_run;
	setup->settle = import_settle;
	setup->reply = import_reply;
	setup->offset = message->offset;
	setup->size = message->size;
	setup_submit(setup);
}

static void on_import_event(struct worker *worker, uint64_t id, const Kvg__ImportEvent *message)
{
	struct setup *setup = import_new(worker, id, &message->handle);

	if (!setup)
		return;
	setup->run = event_run;
	setup->settle = import_settle;
	setup->reply = import_reply;
	setup_submit(setup);
}

static int release_run(struct setup *setup)
{
	import_close(worker_device(setup->worker), &setup->import);
	return 0;
}

static void release_settle(struct setup *setup)
{
	(void)setup;
}

static void release_reply(struct setup *setup)
{
	Kvg__Released released = KVG__RELEASED__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;

	reply.body_case = KVG__WORKER_REPLY__BODY_RELEASED;
	reply.released = &released;
	reply_send(setup->worker, &reply, setup->id, NULL, 0);
}

static void on_release(struct worker *worker, uint64_t id, const Kvg__Release *message)
{
	struct setup *setup = import_new(worker, id, NULL);
	int r;

	if (!setup)
		return;
	r = imports_take(&worker->space->imports, message->id, &setup->import);
	if (r < 0) {
		reply_error(worker, id, r, "release: import %u %s", message->id,
			r == -EBUSY ? "is in use by an entry" : "does not exist");
		free(setup);
		return;
	}
	setup->run = release_run;
	setup->settle = release_settle;
	setup->reply = release_reply;
	setup_submit(setup);
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
	else if (request->body_case == KVG__WORKER_REQUEST__BODY_IMPORT_BUFFER)
		on_import_buffer(worker, request->id, request->import_buffer);
	else if (request->body_case == KVG__WORKER_REQUEST__BODY_IMPORT_EVENT)
		on_import_event(worker, request->id, request->import_event);
	else if (request->body_case == KVG__WORKER_REQUEST__BODY_RELEASE)
		on_release(worker, request->id, request->release);
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
