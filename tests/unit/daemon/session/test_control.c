/* hello, register, load gate: in order, in range, and refused with one clear line otherwise. */
#include "tests/support/session_fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static void expect_error(const Kvg__WorkerReply *reply, int status, const char *text)
{
	assert_int_equal(reply->body_case, KVG__WORKER_REPLY__BODY_ERROR);
	if (!strstr(reply->error->text, text))
		fail_msg("'%s', not '%s'", reply->error->text, text);
	assert_int_equal(reply->error->status, status);
}

static Kvg__WorkerReply *call_hello(struct session_peer *peer, uint32_t abi_min, uint32_t abi_max, uint32_t entries)
{
	Kvg__Hello hello = KVG__HELLO__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;

	hello.abi_min = abi_min;
	hello.abi_max = abi_max;
	hello.name = (char *)(uintptr_t) "w";
	hello.has_sq_entries = 1;
	hello.sq_entries = entries;
	request.body_case = KVG__WORKER_REQUEST__BODY_HELLO;
	request.hello = &hello;
	return session_call(peer, &request, NULL, 0);
}

static Kvg__WorkerReply *call_register(struct session_peer *peer, Kvg__Layout *layout, uint64_t staging)
{
	Kvg__Register registration = KVG__REGISTER__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;

	registration.layout = layout;
	registration.staging_bytes = staging;
	request.body_case = KVG__WORKER_REQUEST__BODY_REGISTER_LAYOUT;
	request.register_layout = &registration;
	return session_call(peer, &request, NULL, 0);
}

static Kvg__WorkerReply *call_load_gate(struct session_peer *peer, const int *fds, unsigned fd_count)
{
	Kvg__LoadGate load = KVG__LOAD_GATE__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;

	request.body_case = KVG__WORKER_REQUEST__BODY_LOAD_GATE;
	request.load_gate = &load;
	return session_call(peer, &request, fds, fd_count);
}

static void test_hello(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 1);

	(void)state;
	expect_error(call_hello(peer, 2, 3, 16), -EPROTO, "hello: versions 2 to 3, this daemon speaks 1");
	expect_error(call_hello(peer, 0, 0, 16), -EPROTO, "hello: versions 0 to 0");
	expect_error(call_hello(peer, 1, 1, 8), -EINVAL, "hello: 8 ring entries, must be a power of two, 16 to 4096");
	expect_error(call_hello(peer, 1, 1, 8192), -EINVAL, "hello: 8192 ring entries");
	expect_error(call_hello(peer, 1, 1, 24), -EINVAL, "hello: 24 ring entries");
	session_hello(peer);
	assert_string_equal(peer->reply->welcome->tenant, "b");
	assert_int_equal(peer->reply->welcome->extent_size, SESSION_EXTENT);
	assert_int_equal(peer->ring->sq_entries, SESSION_ENTRIES);
	expect_error(call_hello(peer, 1, 1, 16), -EALREADY, "hello: said already");
	session_peer_free(peer);
	session_free(session);
}

static void test_widest_hello(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);

	(void)state;
	assert_int_equal(call_hello(peer, 0, UINT32_MAX, 4096)->body_case, KVG__WORKER_REPLY__BODY_WELCOME);
	session_peer_free(peer);
	session_free(session);
}

static void test_hello_comes_first(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	Kvg__Group group, *groups;
	Kvg__Layout layout;

	(void)state;
	session_layout(&layout, &group, &groups);
	expect_error(call_register(peer, &layout, 0), -ENOTCONN, "control: the first message must be hello");
	expect_error(call_load_gate(peer, NULL, 0), -ENOTCONN, "control: the first message must be hello");
	expect_error(session_call(peer, &request, NULL, 0), -ENOTCONN, "control: the first message must be hello");
	session_hello(peer);
	expect_error(session_call(peer, &request, NULL, 0), -EOPNOTSUPP, "control: a message of unknown type");
	session_peer_free(peer);
	session_free(session);
}

static void test_register(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	const struct space *space;
	Kvg__Group group, *groups;
	Kvg__Layout layout;

	(void)state;
	session_hello(peer);
	session_register(peer);
	space = session_worker(session, 0)->space;
	assert_int_equal(peer->reply->registered->extent_size, space->arena->extent_size);
	assert_int_equal(peer->reply->registered->stride, space->arena->stride);
	assert_int_equal(peer->reply->registered->arena_slots, 16);
	assert_int_equal(peer->reply->registered->row_cap, space->part.worker->row_cap);
	assert_int_equal(peer->reply->registered->staging_rows_offset, 4096);
	assert_int_equal(peer->reply->registered->staging_size, 4096 + (64 << 10));
	assert_int_equal(space->staging_size, 64 << 10);
	assert_string_equal(space->part.worker->name, "test");
	assert_int_equal(fcntl(peer->table_fd, F_GETFL) & O_ACCMODE, O_RDONLY);
	assert_int_equal(fcntl(peer->staging_fd, F_GETFL) & O_ACCMODE, O_RDWR);
	session_layout(&layout, &group, &groups);
	expect_error(call_register(peer, &layout, 0), -EALREADY, "this connection has a layout already (model)");
	session_peer_free(peer);
	session_free(session);
}

/* A refused layout leaves nothing behind, and a good one is taken afterwards. */
static void test_refused_layouts(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	Kvg__Group group, *groups, *many[9];
	Kvg__Layout layout;
	char name[200];

	(void)state;
	session_hello(peer);
	session_layout(&layout, &group, &groups);
	group.kind = KVG_GROUP_WINDOW;
	expect_error(call_register(peer, &layout, 0), -EOPNOTSUPP, "layout model: group kind WINDOW (2)");
	session_layout(&layout, &group, &groups);
	for (unsigned i = 0; i < 9; i++)
		many[i] = &group;
	layout.groups = many;
	layout.n_groups = 9;
	expect_error(
		call_register(peer, &layout, 0), -EINVAL, "layout: 9 groups, a name of 5 bytes; at most 8 and 127");
	layout.n_groups = 0;
	expect_error(call_register(peer, &layout, 0), -EOPNOTSUPP, "layout model: 0 groups, this daemon takes 1");
	session_layout(&layout, &group, &groups);
	memset(name, 'n', sizeof(name));
	name[128] = '\0';
	layout.model = name;
	expect_error(call_register(peer, &layout, 0), -EINVAL, "a name of 128 bytes");
	name[127] = '\0';
	expect_error(
		call_register(peer, &layout, UINT64_MAX), -EINVAL, "staging: 18446744073709551615 bytes, at most ");
	assert_null(session_worker(session, 0)->space);
	assert_int_equal(session_worker(session, 0)->errors, 5);
	session_register(peer);
	session_peer_free(peer);
	session_free(session);
}

static int pilot_gate(void)
{
	int file = open("pilot-lm/gate.safetensors", O_RDONLY | O_CLOEXEC), fd;
	off_t size = lseek(file, 0, SEEK_END);
	uint8_t *data = malloc((size_t)size);

	assert_non_null(data);
	assert_int_equal(pread(file, data, (size_t)size, 0), size);
	fd = kvg_memfd_from("gate", data, (size_t)size);
	assert_true(fd >= 0);
	free(data);
	assert_int_equal(close(file), 0);
	return fd;
}

static void register_pilot(struct session_peer *peer)
{
	Kvg__Group group, *groups;
	Kvg__Layout layout;

	session_layout(&layout, &group, &groups);
	group.layers = 6;
	group.head_count = group.head_total = 4;
	layout.hidden_dim = 256;
	assert_int_equal(call_register(peer, &layout, 4096)->body_case, KVG__WORKER_REPLY__BODY_REGISTERED);
}

static void test_load_gate(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	int gate = pilot_gate(), fds[2] = {gate, gate}, plain = eventfd(0, EFD_CLOEXEC);

	(void)state;
	session_hello(peer);
	expect_error(call_load_gate(peer, &gate, 1), -ENOTCONN, "gate: no layout is registered");
	register_pilot(peer);
	expect_error(call_load_gate(peer, NULL, 0), -EBADF, "gate: 0 descriptors, needs 1");
	expect_error(call_load_gate(peer, fds, 2), -EBADF, "gate: 2 descriptors, needs 1");
	expect_error(call_load_gate(peer, &plain, 1), -EINVAL, "gate: the descriptor is not a memfd sealed");
	assert_int_equal(call_load_gate(peer, &gate, 1)->body_case, KVG__WORKER_REPLY__BODY_GATE_LOADED);
	assert_int_equal(peer->reply->gate_loaded->layers, 6);
	assert_int_equal(peer->reply->gate_loaded->folded_layers, 6);
	expect_error(call_load_gate(peer, &gate, 1), -EALREADY, "gate: loaded already");
	assert_int_equal(close(gate) | close(plain), 0);
	session_peer_free(peer);
	session_free(session);
}

static void test_gate_of_another_geometry(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	int gate = pilot_gate();

	(void)state;
	session_hello(peer);
	session_register(peer);
	expect_error(call_load_gate(peer, &gate, 1), -EINVAL, "gate: 6 layers, the layout has 2");
	assert_null(session_worker(session, 0)->space->gates);
	assert_int_equal(close(gate), 0);
	session_peer_free(peer);
	session_free(session);
}

/* The peer is gone before its gate is loaded. */
static void test_hang_up_while_a_gate_loads(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	Kvg__LoadGate load = KVG__LOAD_GATE__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	int gate = pilot_gate();

	(void)state;
	session_hello(peer);
	register_pilot(peer);
	request.body_case = KVG__WORKER_REQUEST__BODY_LOAD_GATE;
	request.load_gate = &load;
	session_send(peer, &request, &gate, 1);
	assert_int_equal(close(gate), 0);
	session_peer_free(peer);
	session_wait_empty(session);
	session_free(session);
}

/* ---- while the executor is busy ---- */

struct block {
	struct job job;
	sem_t go;
};

static void block_run(struct job *job)
{
	assert_int_equal(sem_wait(&list_entry(job, struct block, job)->go), 0);
}

static void block_done(struct job *job)
{
	(void)job;
}

static void block_executor(struct session *session, struct block *block)
{
	*block = (struct block){.job = {.run = block_run, .done = block_done}};
	assert_int_equal(sem_init(&block->go, 0, 0), 0);
	executor_submit(session->server.executor, &block->job);
}

static void send_register(struct session_peer *peer)
{
	Kvg__Register registration = KVG__REGISTER__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	Kvg__Group group, *groups;
	Kvg__Layout layout;

	session_layout(&layout, &group, &groups);
	registration.layout = &layout;
	request.body_case = KVG__WORKER_REQUEST__BODY_REGISTER_LAYOUT;
	request.register_layout = &registration;
	session_send(peer, &request, NULL, 0);
}

/* The space is opened on the executor; until then entries are refused, and so are other requests that need it. */
static void test_registration_takes_its_time(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	struct block block;
	Kvg__Group group, *groups;
	Kvg__Layout layout;

	(void)state;
	session_hello(peer);
	block_executor(session, &block);
	send_register(peer);
	session_layout(&layout, &group, &groups);
	expect_error(call_register(peer, &layout, 0), -EBUSY, "register: another request of this worker is under way");
	expect_error(call_load_gate(peer, NULL, 0), -ENOTCONN, "gate: no layout is registered");
	session_submit(peer, &(struct kvg_sqe){.op = KVG_OP_CREATE});
	assert_int_equal(session_reap(peer).status, -ENOTCONN);
	assert_true(worker_overhead(session_worker(session, 0)) > 0);
	assert_int_equal(sem_post(&block.go), 0);
	assert_int_equal(session_reply(peer)->body_case, KVG__WORKER_REPLY__BODY_REGISTERED);
	assert_int_equal(peer->reply->id, 2);
	session_submit(peer, &(struct kvg_sqe){.op = KVG_OP_CREATE, .create.context_tokens = 100});
	assert_int_equal(session_reap(peer).status, 0);
	session_peer_free(peer);
	session_free(session);
	assert_int_equal(sem_destroy(&block.go), 0);
}

static bool is_closing(struct session *session)
{
	return session_worker(session, 0)->closing;
}

static void test_hang_up_while_registering(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	struct block block;

	(void)state;
	session_hello(peer);
	block_executor(session, &block);
	send_register(peer);
	session_peer_free(peer);
	session_run(session, is_closing, NULL);
	assert_int_equal(session->server.worker_count, 1);
	assert_int_equal(sem_post(&block.go), 0);
	session_wait_empty(session);
	session_free(session);
	assert_int_equal(sem_destroy(&block.go), 0);
}

/* ---- what the host kind does not have ---- */

static void test_host_kind(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	Kvg__Register registration = KVG__REGISTER__INIT;
	Kvg__ImportBuffer buffer = KVG__IMPORT_BUFFER__INIT;
	Kvg__ImportEvent event = KVG__IMPORT_EVENT__INIT;
	Kvg__Release release = KVG__RELEASE__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	Kvg__Group group, *groups;
	Kvg__Layout layout;
	uint8_t handle[IMPORT_HANDLE] = {0};

	(void)state;
	session_hello(peer);
	assert_string_equal(peer->reply->welcome->kind, "host");
	assert_false(peer->reply->welcome->has_device_uuid);
	session_layout(&layout, &group, &groups);
	registration.layout = &layout;
	registration.has_device_staging_bytes = 1;
	registration.device_staging_bytes = 4096;
	request.body_case = KVG__WORKER_REQUEST__BODY_REGISTER_LAYOUT;
	request.register_layout = &registration;
	expect_error(session_call(peer, &request, NULL, 0), -EOPNOTSUPP,
		"staging: 4096 bytes of device memory, the kind is host");
	registration.device_staging_bytes = ((uint64_t)8 << 30) + 1;
	expect_error(session_call(peer, &request, NULL, 0), -EINVAL,
		"staging: 8589934593 bytes of device memory, at most 8589934592");
	session_register(peer);
	assert_false(peer->reply->registered->has_device_table_size);
	session->server.tenants[0]->ipc = true;
	buffer.handle = event.handle = (ProtobufCBinaryData){.len = sizeof(handle), .data = handle};
	buffer.size = 1;
	request.body_case = KVG__WORKER_REQUEST__BODY_IMPORT_BUFFER;
	request.import_buffer = &buffer;
	expect_error(
		session_call(peer, &request, NULL, 0), -EOPNOTSUPP, "import: this daemon's memory is of the kind host");
	request.body_case = KVG__WORKER_REQUEST__BODY_IMPORT_EVENT;
	request.import_event = &event;
	expect_error(session_call(peer, &request, NULL, 0), -EOPNOTSUPP, "import: ");
	request.body_case = KVG__WORKER_REQUEST__BODY_RELEASE;
	request.release = &release;
	expect_error(session_call(peer, &request, NULL, 0), -EOPNOTSUPP, "import: ");
	session_peer_free(peer);
	session_free(session);
}

/* Descriptors where none belong are refused, and closed. */
static void test_unwanted_descriptors(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	int event = eventfd(0, EFD_CLOEXEC);

	(void)state;
	session_hello(peer);
	expect_error(session_call(peer, &request, (int[]){event, event}, 2), -EBADF,
		"control: 2 descriptors where none belong");
	assert_int_equal(close(event), 0);
	session_peer_free(peer);
	session_free(session);
}

static struct kvg_cuda *some_device(struct kind *kind)
{
	return (struct kvg_cuda *)(void *)kind; /* nobody looks into it */
}

/* Where a driver would pin the rows. */
static void test_limit_of_pinned_rows(void **state)
{
	struct session *session = session_new();
	struct session_peer *peer = session_connect(session, 0);
	const struct kind_ops *host = session->kind->ops;
	struct kind_ops ops = *host;
	Kvg__Group group, *groups;
	Kvg__Layout layout;

	(void)state;
	session_hello(peer);
	session_layout(&layout, &group, &groups);
	ops.device = some_device;
	session->kind->ops = &ops;
	expect_error(
		call_register(peer, &layout, (64u << 20) + 1), -EINVAL, "staging: 67108865 bytes, at most 67108864");
	session->kind->ops = host;
	assert_int_equal(call_register(peer, &layout, (64u << 20) + 1)->body_case, KVG__WORKER_REPLY__BODY_REGISTERED);
	session_peer_free(peer);
	session_free(session);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_hello),
		cmocka_unit_test(test_widest_hello),
		cmocka_unit_test(test_hello_comes_first),
		cmocka_unit_test(test_register),
		cmocka_unit_test(test_refused_layouts),
		cmocka_unit_test(test_load_gate),
		cmocka_unit_test(test_gate_of_another_geometry),
		cmocka_unit_test(test_hang_up_while_a_gate_loads),
		cmocka_unit_test(test_registration_takes_its_time),
		cmocka_unit_test(test_hang_up_while_registering),
		cmocka_unit_test(test_host_kind),
		cmocka_unit_test(test_unwanted_descriptors),
		cmocka_unit_test(test_limit_of_pinned_rows),
	};

	return runner_run("control", tests, sizeof(tests) / sizeof(tests[0]));
}
