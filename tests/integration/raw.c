#include "tests/integration/raw.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/frame.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

void raw_connect(struct raw *raw, const char *socket_path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int n = snprintf(address.sun_path, sizeof(address.sun_path), "%s", socket_path);

	assert_in_range(n, 1, sizeof(address.sun_path) - 1);
	*raw = (struct raw){.doorbell = -1, .table = -1, .staging = -1};
	raw->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	assert_true(raw->socket >= 0);
	assert_int_equal(connect(raw->socket, (struct sockaddr *)&address, sizeof(address)), 0);
}

static void close_one(int *fd)
{
	if (*fd >= 0)
		(void)close(*fd);
	*fd = -1;
}

void raw_close(struct raw *raw)
{
	close_one(&raw->socket);
	close_one(&raw->doorbell);
	close_one(&raw->table);
	close_one(&raw->staging);
	if (raw->ring)
		(void)munmap(raw->ring, raw->ring_size);
	raw->ring = NULL;
}

void raw_send(struct raw *raw, const void *data, size_t size, const int *fds, unsigned fd_count)
{
	struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = size};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int) * 253)];
	} control;
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

	memset(&control, 0, sizeof(control));
	if (fd_count > 0) {
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
		memcpy(CMSG_DATA(&control.header), fds, sizeof(int) * fd_count);
		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
	}
	assert_int_equal(sendmsg(raw->socket, &message, MSG_NOSIGNAL), size);
}

void raw_request(struct raw *raw, Kvg__WorkerRequest *request, const int *fds, unsigned fd_count)
{
	uint8_t packet[8192];

	request->id = 1;
	assert_true(kvg__worker_request__get_packed_size(request) <= sizeof(packet));
	raw_send(raw, packet, kvg__worker_request__pack(request, packet), fds, fd_count);
}

/* Takes the next packet; false at the end of the stream. */
static bool receive(struct raw *raw, struct kvg_frame *frame)
{
	struct pollfd polled = {.fd = raw->socket, .events = POLLIN};
	int r;

	assert_int_equal(poll(&polled, 1, FIXTURE_WAIT_MS), 1);
	r = kvg_frame_receive(raw->socket, KVG_FRAME_LARGE_MAX, KVG_FRAME_FDS, 1, frame);
	if (r == -ECONNRESET) /* our last packets went unread; what the daemon said before is still there */
		r = kvg_frame_receive(raw->socket, KVG_FRAME_LARGE_MAX, KVG_FRAME_FDS, 1, frame);
	assert_in_range(r, 0, 1);
	return r == 1;
}

/* The next packet that is not an event of extents or a wake, unpacked; NULL at the end of the stream. */
static Kvg__WorkerReply *next_reply(struct raw *raw, struct kvg_frame *frame)
{
	while (receive(raw, frame)) {
		Kvg__WorkerReply *reply = kvg__worker_reply__unpack(NULL, frame->size, frame->data);

		assert_non_null(reply);
		if (reply->body_case != KVG__WORKER_REPLY__BODY_EXTENTS_ADDED &&
			reply->body_case != KVG__WORKER_REPLY__BODY_EXTENTS_DROPPED &&
			reply->body_case != KVG__WORKER_REPLY__BODY_WAKE)
			return reply;
		raw->events += reply->body_case != KVG__WORKER_REPLY__BODY_WAKE;
		raw->dropped += reply->body_case == KVG__WORKER_REPLY__BODY_EXTENTS_DROPPED;
		kvg__worker_reply__free_unpacked(reply, NULL);
		kvg_frame_deinit(frame);
	}
	return NULL;
}

static int take_fd(struct kvg_frame *frame, unsigned index)
{
	int fd;

	assert_true(index < frame->fd_count);
	fd = frame->fds[index];
	frame->fds[index] = -1;
	return fd;
}

void raw_hello(struct raw *raw)
{
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	Kvg__Hello hello = KVG__HELLO__INIT;
	Kvg__WorkerReply *reply;
	struct kvg_frame frame;
	struct kvg_ring *head;
	int ring;

	hello.abi_min = hello.abi_max = KVG_ABI_VERSION;
	hello.name = (char *)(uintptr_t) "raw";
	request.body_case = KVG__WORKER_REQUEST__BODY_HELLO;
	request.hello = &hello;
	raw_request(raw, &request, NULL, 0);
	reply = next_reply(raw, &frame);
	assert_non_null(reply);
	assert_int_equal(reply->body_case, KVG__WORKER_REPLY__BODY_WELCOME);
	ring = take_fd(&frame, 0);
	raw->doorbell = take_fd(&frame, 1);
	head = mmap(NULL, sizeof(*head), PROT_READ, MAP_SHARED, ring, 0);
	assert_ptr_not_equal(head, MAP_FAILED);
	assert_int_equal(head->magic, KVG_RING_MAGIC);
	raw->ring_size = head->size;
	(void)munmap(head, sizeof(*head));
	raw->ring = mmap(NULL, raw->ring_size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, 0);
	assert_ptr_not_equal(raw->ring, MAP_FAILED);
	(void)close(ring);
	kvg__worker_reply__free_unpacked(reply, NULL);
	kvg_frame_deinit(&frame);
}

void raw_make_register(struct raw_layout *s, const struct kvg_layout *layout, uint64_t staging_bytes)
{
	s->body = (Kvg__Register)KVG__REGISTER__INIT;
	s->layout = (Kvg__Layout)KVG__LAYOUT__INIT;
	s->body.layout = &s->layout;
	s->body.staging_bytes = staging_bytes;
	s->layout.model = (char *)(uintptr_t)layout->model;
	s->layout.hidden_dim = layout->hidden_dim;
	s->layout.max_sequences = layout->max_sequences;
	s->layout.max_tokens = layout->max_tokens;
	s->layout.n_groups = layout->group_count;
	s->layout.groups = s->list;
	for (uint32_t i = 0; i < layout->group_count; i++) {
		const struct kvg_group *g = &layout->groups[i];

		s->groups[i] = (Kvg__Group)KVG__GROUP__INIT;
		s->list[i] = &s->groups[i];
		s->groups[i].kind = g->kind;
		s->groups[i].layers = g->layers;
		s->groups[i].head_begin = g->head_begin;
		s->groups[i].head_count = g->head_count;
		s->groups[i].head_total = g->head_total;
		s->groups[i].k_dim = g->k_dim;
		s->groups[i].v_dim = g->v_dim;
		s->groups[i].k_dtype = g->k_dtype;
		s->groups[i].v_dtype = g->v_dtype;
		s->groups[i].block_tokens = g->block_tokens;
		s->groups[i].query_heads = g->query_heads;
		s->groups[i].has_window = g->window != 0;
		s->groups[i].window = g->window;
	}
}

void raw_register(struct raw *raw, struct raw_layout *layout)
{
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;

	request.body_case = KVG__WORKER_REQUEST__BODY_REGISTER_LAYOUT;
	request.register_layout = &layout->body;
	raw_request(raw, &request, NULL, 0);
}

void raw_registered(struct raw *raw)
{
	struct kvg_frame frame;
	Kvg__WorkerReply *reply = next_reply(raw, &frame);

	assert_non_null(reply);
	if (reply->body_case == KVG__WORKER_REPLY__BODY_ERROR)
		fail_msg("register: %s", reply->error->text);
	assert_int_equal(reply->body_case, KVG__WORKER_REPLY__BODY_REGISTERED);
	raw->table = take_fd(&frame, 0);
	raw->staging = take_fd(&frame, 1);
	raw->staging_rows = reply->registered->staging_rows_offset;
	raw->staging_size = reply->registered->staging_size;
	kvg__worker_reply__free_unpacked(reply, NULL);
	kvg_frame_deinit(&frame);
}

void raw_open(struct raw *raw, const char *socket_path, const struct kvg_layout *layout)
{
	struct raw_layout storage;

	raw_connect(raw, socket_path);
	raw_hello(raw);
	raw_make_register(&storage, layout, 1u << 20);
	raw_register(raw, &storage);
	raw_registered(raw);
}

/* Takes in a goodbye: its reason, and the end of the stream that must follow. */
static int take_goodbye(struct raw *raw, const Kvg__Goodbye *goodbye)
{
	struct kvg_frame frame;

	assert_true(goodbye->reason[0] != '\0');
	(void)snprintf(raw->text, sizeof(raw->text), "%s", goodbye->reason);
	assert_false(receive(raw, &frame));
	return -EPIPE;
}

int raw_refused(struct raw *raw)
{
	struct kvg_frame frame;
	Kvg__WorkerReply *reply = next_reply(raw, &frame);
	int r;

	assert_non_null(reply); /* else disconnected without a reason */
	if (reply->body_case == KVG__WORKER_REPLY__BODY_GOODBYE) {
		r = take_goodbye(raw, reply->goodbye);
	} else {
		assert_int_equal(reply->body_case, KVG__WORKER_REPLY__BODY_ERROR);
		r = reply->error->status;
		(void)snprintf(raw->text, sizeof(raw->text), "%s", reply->error->text);
	}
	kvg__worker_reply__free_unpacked(reply, NULL);
	kvg_frame_deinit(&frame);
	assert_true(r < 0);
	assert_true(raw->text[0] != '\0');
	return r;
}

/* ---- the ring ---- */

static void *ring_at(const struct raw *raw, uint32_t offset)
{
	return (uint8_t *)raw->ring + offset;
}

static void ring_doorbell(struct raw *raw)
{
	uint64_t one = 1;

	assert_int_equal(write(raw->doorbell, &one, sizeof(one)), sizeof(one));
}

void raw_publish(struct raw *raw, uint32_t tail)
{
	__atomic_store_n(&raw->ring->sq_tail, tail, __ATOMIC_RELEASE);
	ring_doorbell(raw);
}

void raw_submit(struct raw *raw, const struct kvg_sqe *sqe)
{
	struct kvg_sqe *entries = ring_at(raw, raw->ring->sq_offset);

	entries[raw->sq_tail & (raw->ring->sq_entries - 1)] = *sqe;
	__atomic_store_n(&raw->ring->sq_tail, ++raw->sq_tail, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&raw->ring->need_wakeup, __ATOMIC_SEQ_CST))
		ring_doorbell(raw);
}

/* Asks to be woken and waits for any packet when no completion is there; false after a goodbye. */
static bool wait_event(struct raw *raw)
{
	struct kvg_frame frame;
	Kvg__WorkerReply *reply;
	bool on;

	__atomic_store_n(&raw->ring->sleeping, 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&raw->ring->cq_tail, __ATOMIC_SEQ_CST) != raw->cq_head)
		return true;
	if (!receive(raw, &frame))
		fail_msg("%s", "disconnected without a reason");
	reply = kvg__worker_reply__unpack(NULL, frame.size, frame.data);
	assert_non_null(reply);
	on = reply->body_case != KVG__WORKER_REPLY__BODY_GOODBYE;
	raw->events += reply->body_case == KVG__WORKER_REPLY__BODY_EXTENTS_ADDED ||
		       reply->body_case == KVG__WORKER_REPLY__BODY_EXTENTS_DROPPED;
	raw->dropped += reply->body_case == KVG__WORKER_REPLY__BODY_EXTENTS_DROPPED;
	if (!on)
		(void)take_goodbye(raw, reply->goodbye);
	kvg__worker_reply__free_unpacked(reply, NULL);
	kvg_frame_deinit(&frame);
	return on;
}

bool raw_complete(struct raw *raw, struct kvg_cqe *ret)
{
	const struct kvg_cqe *entries = ring_at(raw, raw->ring->cq_offset);
	uint32_t index = raw->cq_head & (raw->ring->cq_entries - 1);

	while (__atomic_load_n(&raw->ring->cq_tail, __ATOMIC_ACQUIRE) == raw->cq_head)
		if (!wait_event(raw))
			return false;
	*ret = entries[index];
	raw->text[0] = '\0';
	if (ret->text)
		(void)snprintf(raw->text, sizeof(raw->text), "%.*s", (int)KVG_TEXT_SIZE,
			(const char *)ring_at(raw, raw->ring->text_offset + index * KVG_TEXT_SIZE));
	__atomic_store_n(&raw->ring->cq_head, ++raw->cq_head, __ATOMIC_RELEASE);
	return true;
}

int raw_submit_refused(struct raw *raw, const struct kvg_sqe *sqe)
{
	struct kvg_cqe cqe;

	raw_submit(raw, sqe);
	if (!raw_complete(raw, &cqe))
		return -EPIPE;
	assert_int_equal(cqe.user_data, sqe->user_data);
	if (cqe.status >= 0 || raw->text[0] == '\0')
		fail_msg("operation %u: status %d, text \"%s\"", sqe->op, cqe.status, raw->text);
	return cqe.status;
}

void raw_submit_done(struct raw *raw, const struct kvg_sqe *sqe, struct kvg_cqe *ret)
{
	raw_submit(raw, sqe);
	assert_true(raw_complete(raw, ret));
	if (ret->status)
		fail_msg("op %u: %d %s", sqe->op, ret->status, raw->text);
	assert_int_equal(ret->user_data, sqe->user_data);
}
