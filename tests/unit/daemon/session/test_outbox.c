#include "daemon/session/outbox.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control.pb-c.h"
#include "proto/frame.h"
#include "tests/support/runner.h"

struct ends {
	struct outbox outbox;
	int daemon, peer;
	uint64_t sent, received; /* numbers of messages */
};

static int ends_setup(void **state)
{
	static struct ends ends;
	int fds[2];

	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
	ends = (struct ends){.daemon = fds[0], .peer = fds[1]};
	outbox_init(&ends.outbox, ends.daemon);
	*state = &ends;
	return 0;
}

static int ends_teardown(void **state)
{
	struct ends *ends = *state;

	outbox_deinit(&ends->outbox);
	(void)close(ends->daemon);
	if (ends->peer >= 0)
		(void)close(ends->peer);
	return 0;
}

/* Messages are numbered from 1. */
static int put_fds(struct ends *ends, const int *fds, unsigned fd_count, bool now)
{
	Kvg__Wake wake = KVG__WAKE__INIT;
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	int r;

	reply.has_id = 1;
	reply.id = ends->sent + 1;
	reply.body_case = KVG__WORKER_REPLY__BODY_WAKE;
	reply.wake = &wake;
	r = (now ? outbox_send : outbox_queue)(&ends->outbox, &reply.base, fds, fd_count);
	ends->sent += r == 0;
	return r;
}

static int send_fds(struct ends *ends, const int *fds, unsigned fd_count)
{
	return put_fds(ends, fds, fd_count, true);
}

static int queue_one(struct ends *ends)
{
	return put_fds(ends, NULL, 0, false);
}

static int send_one(struct ends *ends)
{
	return send_fds(ends, NULL, 0);
}

/* Sends the same descriptor many times in one message. */
static int send_copies(struct ends *ends, int fd, unsigned count)
{
	int fds[KVG_FRAME_FDS];

	for (unsigned i = 0; i < count; i++)
		fds[i] = fd;
	return send_fds(ends, fds, count);
}

/* The peer reads the next message, which must be the next in number. False when there is none. */
static bool receive_one(struct ends *ends, struct kvg_frame *frame)
{
	Kvg__WorkerReply *reply;
	int r = kvg_frame_receive(ends->peer, KVG_FRAME_MAX, KVG_FRAME_FDS, 0, frame);

	if (r == -EAGAIN)
		return false;
	assert_int_equal(r, 1);
	reply = kvg__worker_reply__unpack(NULL, frame->size, frame->data);
	assert_non_null(reply);
	assert_int_equal(reply->id, ++ends->received);
	assert_int_equal(reply->body_case, KVG__WORKER_REPLY__BODY_WAKE);
	kvg__worker_reply__free_unpacked(reply, NULL);
	return true;
}

/* Reads one message with that many descriptors and closes them. */
static void expect_fds(struct ends *ends, unsigned count)
{
	struct kvg_frame frame;

	assert_true(receive_one(ends, &frame));
	assert_int_equal(frame.fd_count, count);
	kvg_frame_deinit(&frame);
}

static void receive_all(struct ends *ends)
{
	struct kvg_frame frame;

	while (receive_one(ends, &frame))
		kvg_frame_deinit(&frame);
}

static void fill_socket(struct ends *ends)
{
	while (ends->outbox.count == 0)
		assert_int_equal(send_one(ends), 0);
	assert_true(ends->sent > 1);
}

static void test_sends_at_once(void **state)
{
	struct ends *ends = *state;
	struct kvg_frame frame;

	assert_int_equal(outbox_flush(&ends->outbox), 0);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(send_one(ends), 0);
	assert_int_equal(ends->outbox.count, 0);
	for (unsigned i = 0; i < 3; i++)
		expect_fds(ends, 0);
	assert_false(receive_one(ends, &frame));
}

static void test_queued_until_flushed(void **state)
{
	struct ends *ends = *state;
	struct kvg_frame frame;

	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(queue_one(ends), 0);
	assert_false(receive_one(ends, &frame));
	assert_int_equal(outbox_flush(&ends->outbox), 0);
	for (unsigned i = 0; i < 3; i++)
		expect_fds(ends, 0);
	assert_int_equal(queue_one(ends), 0);
	assert_false(receive_one(ends, &frame));
	assert_int_equal(send_one(ends), 0); /* what is queued goes first */
	expect_fds(ends, 0);
	expect_fds(ends, 0);
	assert_int_equal(ends->outbox.count, 0);
}

/* A queue that is full is sent, not refused, as long as the peer reads. */
static void test_queue_past_its_limit(void **state)
{
	struct ends *ends = *state;

	while (ends->outbox.count < OUTBOX_PACKETS)
		assert_int_equal(queue_one(ends), 0);
	assert_int_equal(queue_one(ends), 0);
	assert_true(ends->outbox.count < OUTBOX_PACKETS);
	while (ends->outbox.count) {
		receive_all(ends);
		assert_int_equal(outbox_flush(&ends->outbox), 0);
	}
	receive_all(ends);
	assert_int_equal(ends->received, ends->sent);
}

static void test_order_across_full_socket(void **state)
{
	struct ends *ends = *state;

	fill_socket(ends);
	for (unsigned i = 0; i < 100; i++)
		assert_int_equal(send_one(ends), 0);
	assert_int_equal(ends->outbox.count, 101);
	assert_int_equal(outbox_flush(&ends->outbox), 0);
	assert_int_equal(ends->outbox.count, 101);
	expect_fds(ends, 0);
	receive_all(ends);
	assert_int_equal(ends->received, ends->sent - 101);
	assert_int_equal(send_one(ends), 0); /* what is queued goes first */
	assert_int_equal(ends->outbox.count, 0);
	receive_all(ends);
	assert_int_equal(ends->received, ends->sent);
}

static void test_flush_in_parts(void **state)
{
	struct ends *ends = *state;

	fill_socket(ends);
	for (unsigned i = 1; i < OUTBOX_PACKETS; i++)
		assert_int_equal(send_one(ends), 0);
	while (ends->outbox.count) {
		unsigned before = ends->outbox.count;

		receive_all(ends);
		assert_int_equal(outbox_flush(&ends->outbox), 0);
		assert_true(ends->outbox.count < before);
	}
	receive_all(ends);
	assert_int_equal(ends->received, ends->sent);
}

static void test_packet_limit(void **state)
{
	struct ends *ends = *state;

	fill_socket(ends);
	while (ends->outbox.count < OUTBOX_PACKETS)
		assert_int_equal(send_one(ends), 0);
	assert_int_equal(send_one(ends), -EOVERFLOW);
	assert_int_equal(ends->outbox.count, OUTBOX_PACKETS);
	receive_all(ends);
	assert_int_equal(send_one(ends), 0);
	while (ends->received < ends->sent) {
		receive_all(ends);
		assert_int_equal(outbox_flush(&ends->outbox), 0);
	}
	assert_int_equal(ends->outbox.count, 0);
}

/* ---- descriptors ---- */

static int file_new(ino_t *ret_inode)
{
	struct stat st;
	int fd = kvg_memfd_new("outbox", 4096);

	assert_true(fd >= 0);
	assert_int_equal(fstat(fd, &st), 0);
	*ret_inode = st.st_ino;
	return fd;
}

static void test_queued_descriptor_is_a_duplicate(void **state)
{
	struct ends *ends = *state;
	struct kvg_frame frame;
	struct stat st;
	ino_t inode;
	int fd = file_new(&inode);

	fill_socket(ends);
	assert_int_equal(send_fds(ends, &fd, 1), 0);
	assert_int_equal(ends->outbox.fd_count, 1);
	assert_int_equal(close(fd), 0);
	receive_all(ends);
	assert_int_equal(outbox_flush(&ends->outbox), 0);
	assert_int_equal(ends->outbox.fd_count, 0);
	expect_fds(ends, 0);
	assert_true(receive_one(ends, &frame));
	assert_int_equal(frame.fd_count, 1);
	assert_int_equal(fstat(frame.fds[0], &st), 0);
	assert_int_equal(st.st_ino, inode);
	kvg_frame_deinit(&frame);
	assert_int_equal(ends->received, ends->sent);
}

/* The runner counts descriptors; this one sees when the last reference to a file goes. */
static void test_deinit_closes_descriptors(void **state)
{
	struct ends *ends = *state;
	int pipe_fds[2];
	char byte;

	assert_int_equal(pipe2(pipe_fds, O_CLOEXEC | O_NONBLOCK), 0);
	fill_socket(ends);
	assert_int_equal(send_copies(ends, pipe_fds[1], 3), 0);
	assert_int_equal(close(pipe_fds[1]), 0);
	assert_int_equal(read(pipe_fds[0], &byte, 1), -1);
	assert_int_equal(errno, EAGAIN);
	outbox_deinit(&ends->outbox);
	assert_int_equal(read(pipe_fds[0], &byte, 1), 0);
	assert_int_equal(close(pipe_fds[0]), 0);
}

/* Fills the share of descriptors in flight: four messages. */
static void fill_flight(struct ends *ends, int fd)
{
	for (unsigned i = 0; i < OUTBOX_IN_FLIGHT / KVG_FRAME_FDS; i++)
		assert_int_equal(send_copies(ends, fd, KVG_FRAME_FDS), 0);
	assert_int_equal(ends->outbox.count, 0);
	assert_int_equal(ends->outbox.in_flight, OUTBOX_IN_FLIGHT);
}

static void test_descriptors_in_flight(void **state)
{
	struct ends *ends = *state;
	struct kvg_frame frame;
	ino_t inode;
	int fd = file_new(&inode);

	fill_flight(ends, fd);
	assert_int_equal(send_one(ends), 0); /* without descriptors: passes */
	assert_int_equal(ends->outbox.count, 0);
	assert_int_equal(send_fds(ends, &fd, 1), 0);
	assert_int_equal(send_one(ends), 0); /* behind the one that waits */
	assert_int_equal(ends->outbox.count, 2);
	for (unsigned i = 0; i < OUTBOX_IN_FLIGHT / KVG_FRAME_FDS; i++)
		expect_fds(ends, KVG_FRAME_FDS);
	assert_int_equal(outbox_flush(&ends->outbox), 0);
	assert_int_equal(ends->outbox.count, 2); /* one packet is unread */
	expect_fds(ends, 0);
	assert_false(receive_one(ends, &frame));
	assert_int_equal(outbox_flush(&ends->outbox), 0);
	assert_int_equal(ends->outbox.count, 0);
	assert_int_equal(ends->outbox.in_flight, 1);
	expect_fds(ends, 1);
	expect_fds(ends, 0);
	assert_int_equal(close(fd), 0);
}

static void test_descriptor_limit(void **state)
{
	struct ends *ends = *state;
	struct rlimit before, limit;
	ino_t inode;
	int fd = file_new(&inode);

	assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
	assert_true(before.rlim_max > OUTBOX_FDS + 100);
	limit = before;
	limit.rlim_cur = before.rlim_max;
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
	fill_flight(ends, fd);
	for (unsigned i = 0; i < OUTBOX_FDS / KVG_FRAME_FDS; i++)
		assert_int_equal(send_copies(ends, fd, KVG_FRAME_FDS), 0);
	assert_int_equal(ends->outbox.fd_count, OUTBOX_FDS);
	assert_int_equal(send_fds(ends, &fd, 1), -EOVERFLOW);
	assert_int_equal(ends->outbox.fd_count, OUTBOX_FDS);
	assert_int_equal(send_one(ends), 0);
	while (ends->received < ends->sent) {
		receive_all(ends);
		assert_int_equal(outbox_flush(&ends->outbox), 0);
		assert_true(ends->outbox.in_flight <= OUTBOX_IN_FLIGHT);
	}
	assert_int_equal(ends->outbox.fd_count, 0);
	assert_int_equal(close(fd), 0);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
}

/* ---- the peer is gone ---- */

static void test_peer_gone(void **state)
{
	struct ends *ends = *state;

	assert_int_equal(close(ends->peer), 0);
	ends->peer = -1;
	assert_int_equal(send_one(ends), -EPIPE);
	assert_int_equal(ends->outbox.count, 0);
	assert_int_equal(outbox_flush(&ends->outbox), 0);
}

static void test_peer_gone_with_queue(void **state)
{
	struct ends *ends = *state;

	fill_socket(ends);
	receive_all(ends);
	assert_int_equal(close(ends->peer), 0);
	ends->peer = -1;
	assert_int_equal(outbox_flush(&ends->outbox), -EPIPE);
	assert_int_equal(send_one(ends), -EPIPE);
	assert_int_equal(ends->outbox.count, 1);
}

struct writable {
	struct ends *ends;
	struct loop *loop;
	unsigned calls;
};

static void on_writable(void *user, uint32_t revents)
{
	struct writable *writable = user;

	assert_true(revents & POLLOUT);
	writable->calls++;
	assert_int_equal(outbox_flush(&writable->ends->outbox), 0);
	if (!writable->ends->outbox.count)
		loop_stop(writable->loop);
}

static void on_reading(void *user)
{
	receive_all(user);
}

static void on_late(void *user)
{
	loop_stop(user);
}

/* Writable sockets interest nobody unless something is queued. */
static void test_watched_while_queued(void **state)
{
	struct ends *ends = *state;
	struct writable writable = {.ends = ends};
	struct loop_timer *reading, *late;

	assert_int_equal(loop_new(&writable.loop), 0);
	assert_int_equal(loop_timer_new(writable.loop, on_reading, ends, &reading), 0);
	assert_int_equal(loop_timer_new(writable.loop, on_late, writable.loop, &late), 0);
	outbox_watch(&ends->outbox, writable.loop, on_writable, &writable);
	assert_int_equal(send_one(ends), 0);
	assert_null(ends->outbox.watch);
	fill_socket(ends);
	assert_non_null(ends->outbox.watch);
	loop_timer_set(reading, 1000000);
	assert_int_equal(loop_run(writable.loop), 0); /* ends when the queue is empty */
	assert_true(writable.calls > 0);
	assert_null(ends->outbox.watch);
	writable.calls = 0;
	loop_timer_set(reading, 1000000); /* reads, and nobody is told */
	loop_timer_set(late, 5000000);
	assert_int_equal(loop_run(writable.loop), 0);
	assert_int_equal(writable.calls, 0);
	assert_int_equal(ends->received, ends->sent);
	fill_socket(ends);
	outbox_unwatch(&ends->outbox);
	assert_null(ends->outbox.watch);
	(void)loop_timer_free(reading);
	(void)loop_timer_free(late);
	(void)loop_free(writable.loop);
}

#define RACES 3000u

/* A peer on a thread of its own that reads whatever comes. */
struct reader {
	int fd;
	unsigned want, got;
};

static void *read_all(void *user)
{
	struct reader *reader = user;
	struct pollfd event = {.fd = reader->fd, .events = POLLIN};
	struct kvg_frame frame;

	while (reader->got < reader->want && poll(&event, 1, 10000) == 1) {
		while (kvg_frame_receive(reader->fd, KVG_FRAME_MAX, KVG_FRAME_FDS, 0, &frame) == 1) {
			kvg_frame_deinit(&frame);
			reader->got++;
		}
	}
	return NULL;
}

/*
 * What is queued because too many descriptors are under way goes when the peer has read the others, however its last
 * read and the look at what is unread meet.
 */
static void test_peer_reads_at_any_moment(void **state)
{
	struct ends *ends = *state;
	struct writable writable = {.ends = ends};
	struct reader reader = {.fd = ends->peer, .want = RACES * 5};
	int fd = kvg_memfd_new("outbox", 4096);
	struct loop_timer *late;
	pthread_t thread;

	assert_int_equal(loop_new(&writable.loop), 0);
	assert_int_equal(loop_timer_new(writable.loop, on_late, writable.loop, &late), 0);
	outbox_watch(&ends->outbox, writable.loop, on_writable, &writable);
	assert_int_equal(pthread_create(&thread, NULL, read_all, &reader), 0);
	for (unsigned i = 0; i < RACES && ends->outbox.count == 0; i++) {
		for (unsigned n = 0; n < 5; n++)
			assert_int_equal(send_copies(ends, fd, KVG_FRAME_FDS), 0);
		loop_timer_set(late, 2000000000);
		if (ends->outbox.count)
			assert_int_equal(loop_run(writable.loop), 0);
	}
	assert_int_equal(ends->outbox.count, 0);
	assert_int_equal(pthread_join(thread, NULL), 0);
	assert_int_equal(reader.got, reader.want);
	outbox_unwatch(&ends->outbox);
	(void)loop_timer_free(late);
	(void)loop_free(writable.loop);
	(void)close(fd);
}

#define WITH_ENDS(test) cmocka_unit_test_setup_teardown(test, ends_setup, ends_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		WITH_ENDS(test_sends_at_once),
		WITH_ENDS(test_queued_until_flushed),
		WITH_ENDS(test_queue_past_its_limit),
		WITH_ENDS(test_order_across_full_socket),
		WITH_ENDS(test_flush_in_parts),
		WITH_ENDS(test_packet_limit),
		WITH_ENDS(test_queued_descriptor_is_a_duplicate),
		WITH_ENDS(test_deinit_closes_descriptors),
		WITH_ENDS(test_descriptors_in_flight),
		WITH_ENDS(test_descriptor_limit),
		WITH_ENDS(test_peer_gone),
		WITH_ENDS(test_peer_gone_with_queue),
		WITH_ENDS(test_watched_while_queued),
		WITH_ENDS(test_peer_reads_at_any_moment),
	};

	return runner_run("daemon/session/outbox", tests, sizeof(tests) / sizeof(tests[0]));
}
