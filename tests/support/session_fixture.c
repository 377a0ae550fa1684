#include "tests/support/session_fixture.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/tier/host.h"

/* ---- the loop ---- */

static bool ask(void *user)
{
	struct session *session = user;

	if (session->until && session->until(session)) {
		session->until = NULL;
		loop_stop(session->server.loop);
	}
	return false;
}

/* The loop goes round without sleeping as long as a test waits for something. */
static bool keep_awake(void *user, bool going)
{
	(void)going;
	return ((struct session *)user)->until != NULL;
}

static const struct loop_poller_ops asker = {.poll = ask, .sleep = keep_awake};

void session_run(struct session *session, bool (*until)(struct session *session), void *user)
{
	session->until = until;
	session->user = user;
	assert_int_equal(loop_run(session->server.loop), 0);
	assert_null(session->until);
}

static bool is_empty(struct session *session)
{
	return session->server.worker_count == 0 && session->server.pool->batches == 0;
}

void session_wait_empty(struct session *session)
{
	session_run(session, is_empty, NULL);
}

/* ---- from beginning to end ---- */

struct session *session_new(void)
{
	static const char *const names[] = {"a", "b"};
	struct session *session = calloc(1, sizeof(*session));
	struct server *server;

	assert_non_null(session);
	(void)snprintf(session->dir, sizeof(session->dir), "/tmp/kvgate-session-XXXXXX");
	server = &session->server;
	assert_int_equal(loop_new(&server->loop), 0);
	assert_int_equal(executor_new(server->loop, &server->executor), 0);
	assert_int_equal(kind_host_new(&session->kind), 0);
	assert_int_equal(pool_new(server->loop, server->executor, session->kind, 16 * SESSION_EXTENT, SESSION_EXTENT,
				 &server->pool),
		0);
	assert_int_equal(host_tier_new(server->pool, SESSION_HOST, &server->tier), 0);
	server->tenants = calloc(2, sizeof(struct tenant *));
	assert_non_null(server->tenants);
	for (; server->tenant_count < 2; server->tenant_count++) {
		assert_int_equal(tenant_new(server->pool, names[server->tenant_count], SESSION_BUDGET,
					 &server->tenants[server->tenant_count]),
			0);
		server->tenants[server->tenant_count]->host.account->max = SESSION_HOST;
		server->tenants[server->tenant_count]->socket = "/nowhere";
	}
	server->state_dir = "/state";
	assert_non_null(mkdtemp(session->dir));
	assert_int_equal(
		budgets_new(server->loop, server->tenants, server->tenant_count, session->dir, &server->budgets), 0);
	assert_int_equal(server_start(server), 0);
	assert_int_equal(loop_poller_add(server->loop, &asker, session), 0);
	admin_init(&session->admin, server);
	return session;
}

/* Budgets that were set are all that may be in it. */
static void remove_dir(const struct session *session)
{
	char path[80];

	(void)snprintf(path, sizeof(path), "%s/budgets.conf", session->dir);
	(void)unlink(path);
	assert_int_equal(rmdir(session->dir), 0);
}

void session_free(struct session *session)
{
	struct server *server = &session->server;

	admin_deinit(&session->admin);
	server_stop(server, "the test is over");
	session_wait_empty(session);
	assert_int_equal(server->pool->quota.account->charged, 0);
	assert_int_equal(server->pool->quota.account->promised, 0);
	assert_int_equal(server->pool->live, 0);
	assert_int_equal(server->pool->host.account->charged, 0);
	loop_poller_remove(server->loop, &asker, session);
	server_end(server);
	server->budgets = budgets_free(server->budgets);
	(void)executor_free(server->executor);
	(void)host_tier_free(server->tier);
	(void)pool_free(server->pool);
	(void)kind_free(session->kind);
	for (size_t i = 0; i < server->tenant_count; i++)
		(void)tenant_free(server->tenants[i]);
	free(server->tenants);
	remove_dir(session);
	(void)loop_free(server->loop);
	free(session);
}

/* ---- peers ---- */

static struct session_peer *peer_new(struct session *session, int *ret_far)
{
	struct session_peer *peer = calloc(1, sizeof(*peer));
	int fds[2];

	assert_non_null(peer);
	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
	*peer = (struct session_peer){.session = session, .fd = fds[0]};
	peer->ring_fd = peer->doorbell = peer->table_fd = peer->staging_fd = -1;
	*ret_far = fds[1];
	return peer;
}

struct session_peer *session_connect(struct session *session, size_t tenant)
{
	struct ucred credentials = {.pid = getpid(), .uid = getuid(), .gid = getgid()};
	int far;
	struct session_peer *peer = peer_new(session, &far);

	assert_int_equal(worker_new(&session->server, session->server.tenants[tenant], far, &credentials), 0);
	return peer;
}

struct session_peer *session_connect_admin(struct session *session)
{
	struct ucred credentials = {.pid = getpid(), .uid = getuid(), .gid = getgid()};
	int far;
	struct session_peer *peer = peer_new(session, &far);

	admin_accept(&session->admin, far, &credentials);
	return peer;
}

static void drop_frame(struct session_peer *peer)
{
	if (peer->reply)
		kvg__worker_reply__free_unpacked(peer->reply, NULL);
	peer->reply = NULL;
	kvg_frame_deinit(&peer->frame);
	peer->frame = (struct kvg_frame){0};
}

static void close_fd(int fd)
{
	if (fd >= 0)
		assert_int_equal(close(fd), 0);
}

void session_peer_free(struct session_peer *peer)
{
	drop_frame(peer);
	if (peer->ring)
		assert_int_equal(munmap(peer->ring, peer->ring->size), 0);
	close_fd(peer->ring_fd);
	close_fd(peer->doorbell);
	close_fd(peer->table_fd);
	close_fd(peer->staging_fd);
	close_fd(peer->fd);
	free(peer);
}

struct worker *session_worker(const struct session *session, unsigned index)
{
	const struct list *node = session->server.workers.next;

	while (index--)
		node = node->next;
	assert_ptr_not_equal(node, &session->server.workers);
	return list_entry(node, struct worker, node);
}

/* ---- control ---- */

struct wait_frame {
	struct session_peer *peer;
	int status;
};

static bool has_frame(struct session *session)
{
	struct wait_frame *wait = session->user;

	wait->status = kvg_frame_receive(wait->peer->fd, KVG_FRAME_LARGE_MAX, KVG_FRAME_FDS, 1, &wait->peer->frame);
	return wait->status != -EAGAIN;
}

bool session_receive(struct session_peer *peer)
{
	struct wait_frame wait = {.peer = peer};

	drop_frame(peer);
	session_run(peer->session, has_frame, &wait);
	return wait.status > 0;
}

Kvg__WorkerReply *session_reply(struct session_peer *peer)
{
	assert_true(session_receive(peer));
	peer->reply = kvg__worker_reply__unpack(NULL, peer->frame.size, peer->frame.data);
	assert_non_null(peer->reply);
	return peer->reply;
}

void session_send(struct session_peer *peer, Kvg__WorkerRequest *request, const int *fds, unsigned fd_count)
{
	size_t size;
	uint8_t *data;

	request->id = ++peer->next_id;
	size = kvg__worker_request__get_packed_size(request);
	data = malloc(size);
	assert_non_null(data);
	(void)kvg__worker_request__pack(request, data);
	assert_int_equal(kvg_frame_send(peer->fd, data, size, fds, fd_count), 0);
	free(data);
}

Kvg__WorkerReply *session_call(
	struct session_peer *peer, Kvg__WorkerRequest *request, const int *fds, unsigned fd_count)
{
	session_send(peer, request, fds, fd_count);
	assert_int_equal(session_reply(peer)->id, peer->next_id);
	return peer->reply;
}

static int take_fd(struct session_peer *peer, unsigned index)
{
	int fd;

	assert_true(index < peer->frame.fd_count);
	fd = peer->frame.fds[index];
	peer->frame.fds[index] = -1;
	return fd;
}

void session_hello(struct session_peer *peer)
{
	Kvg__Hello hello = KVG__HELLO__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	const Kvg__WorkerReply *reply;
	struct kvg_ring header;

	hello.abi_min = hello.abi_max = KVG_ABI_VERSION;
	hello.name = (char *)(uintptr_t) "test";
	hello.has_sq_entries = 1;
	hello.sq_entries = SESSION_ENTRIES;
	request.body_case = KVG__WORKER_REQUEST__BODY_HELLO;
	request.hello = &hello;
	reply = session_call(peer, &request, NULL, 0);
	assert_int_equal(reply->body_case, KVG__WORKER_REPLY__BODY_WELCOME);
	assert_int_equal(peer->frame.fd_count, 2);
	peer->ring_fd = take_fd(peer, 0);
	peer->doorbell = take_fd(peer, 1);
	assert_int_equal(pread(peer->ring_fd, &header, sizeof(header), 0), sizeof(header));
	peer->ring = mmap(NULL, header.size, PROT_READ | PROT_WRITE, MAP_SHARED, peer->ring_fd, 0);
	assert_ptr_not_equal(peer->ring, MAP_FAILED);
}

void session_layout(Kvg__Layout *layout, Kvg__Group *group, Kvg__Group **groups)
{
	kvg__layout__init(layout);
	kvg__group__init(group);
	group->kind = KVG_GROUP_GLOBAL;
	group->layers = group->head_count = group->head_total = 2;
	group->k_dim = group->v_dim = 8;
	group->k_dtype = group->v_dtype = KVG_BF16;
	group->block_tokens = KVG_BLOCK_TOKENS;
	group->query_heads = 2;
	*groups = group;
	layout->model = (char *)(uintptr_t) "model";
	layout->hidden_dim = 64;
	layout->max_sequences = 4;
	layout->max_tokens = 1024;
	layout->n_groups = 1;
	layout->groups = groups;
}

void session_register(struct session_peer *peer)
{
	Kvg__Register registration = KVG__REGISTER__INIT;
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	Kvg__Group group, *groups;
	Kvg__Layout layout;

	session_layout(&layout, &group, &groups);
	registration.layout = &layout;
	registration.staging_bytes = 64 << 10;
	request.body_case = KVG__WORKER_REQUEST__BODY_REGISTER_LAYOUT;
	request.register_layout = &registration;
	assert_int_equal(session_call(peer, &request, NULL, 0)->body_case, KVG__WORKER_REPLY__BODY_REGISTERED);
	assert_int_equal(peer->frame.fd_count, 2);
	peer->table_fd = take_fd(peer, 0);
	peer->staging_fd = take_fd(peer, 1);
}

/* ---- rings ---- */

void session_submit(struct session_peer *peer, const struct kvg_sqe *sqe)
{
	struct kvg_sqe *entries = (void *)((char *)peer->ring + peer->ring->sq_offset);

	entries[peer->sq_tail & (peer->ring->sq_entries - 1)] = *sqe;
	__atomic_store_n(&peer->ring->sq_tail, ++peer->sq_tail, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&peer->ring->need_wakeup, __ATOMIC_SEQ_CST))
		assert_int_equal(write(peer->doorbell, &(uint64_t){1}, sizeof(uint64_t)), sizeof(uint64_t));
}

static bool has_completion(struct session *session)
{
	const struct session_peer *peer = session->user;

	return __atomic_load_n(&peer->ring->cq_tail, __ATOMIC_ACQUIRE) != peer->cq_head;
}

struct kvg_cqe session_reap(struct session_peer *peer)
{
	const struct kvg_cqe *entries = (const void *)((char *)peer->ring + peer->ring->cq_offset);
	struct kvg_cqe cqe;

	session_run(peer->session, has_completion, peer);
	cqe = entries[peer->cq_head & (peer->ring->cq_entries - 1)];
	__atomic_store_n(&peer->ring->cq_head, ++peer->cq_head, __ATOMIC_RELEASE);
	return cqe;
}

const char *session_text(const struct session_peer *peer)
{
	uint32_t index = (peer->cq_head - 1) & (peer->ring->cq_entries - 1);

	return (const char *)peer->ring + peer->ring->text_offset + (size_t)index * KVG_TEXT_SIZE;
}
