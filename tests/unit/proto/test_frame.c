#include "tests/support/runner.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/frame.h"

struct pair {
	int left, right;
};

static int setup(void **state)
{
	struct pair *pair = malloc(sizeof(*pair));
	int fds[2];

	assert_non_null(pair);
	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
	*pair = (struct pair){.left = fds[0], .right = fds[1]};
	*state = pair;
	return 0;
}

static int teardown(void **state)
{
	struct pair *pair = *state;

	(void)close(pair->left);
	(void)close(pair->right);
	free(pair);
	return 0;
}

static unsigned count_fds(void)
{
	unsigned count = 0;

	for (int fd = 0; fd < 1024; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void fill_fds(int *fds, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		fds[i] = memfd_create("test", MFD_CLOEXEC);
		assert_true(fds[i] >= 0);
	}
}

static void close_fds(const int *fds, unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		assert_int_equal(close(fds[i]), 0);
}

static void sends_bytes_and_descriptors(void **state)
{
	const struct pair *pair = *state;
	struct kvg_frame frame;
	struct stat sent, got;
	int fds[KVG_FRAME_FDS];

	fill_fds(fds, KVG_FRAME_FDS);
	assert_int_equal(kvg_frame_send(pair->left, "hello", 5, fds, KVG_FRAME_FDS), 0);
	assert_int_equal(kvg_frame_receive(pair->right, 5, KVG_FRAME_FDS, 0, &frame), 1);
	assert_int_equal(frame.size, 5);
	assert_memory_equal(frame.data, "hello", 5);
	assert_int_equal(frame.fd_count, KVG_FRAME_FDS);
	for (unsigned i = 0; i < KVG_FRAME_FDS; i++) {
		assert_int_equal(fstat(fds[i], &sent), 0);
		assert_int_equal(fstat(frame.fds[i], &got), 0);
		assert_int_equal(sent.st_ino, got.st_ino);
		assert_int_equal(fcntl(frame.fds[i], F_GETFD), FD_CLOEXEC);
	}
	/* A taken descriptor stays open. */
	int taken = frame.fds[3];

	frame.fds[3] = -1;
	kvg_frame_deinit(&frame);
	assert_null(frame.data);
	assert_int_equal(close(taken), 0);
	close_fds(fds, KVG_FRAME_FDS);
}

static void receives_nothing_and_the_end(void **state)
{
	struct pair *pair = *state;
	struct kvg_frame frame = {.size = 77};

	assert_int_equal(kvg_frame_receive(pair->right, 100, 0, 0, &frame), -EAGAIN);
	assert_int_equal(kvg_frame_send(pair->left, "x", 0, NULL, 0), -EINVAL);
	assert_int_equal(shutdown(pair->left, SHUT_RDWR), 0);
	assert_int_equal(kvg_frame_receive(pair->right, 100, 0, 0, &frame), 0);
	assert_int_equal(kvg_frame_send(pair->right, "x", 1, NULL, 0), -EPIPE);
	assert_int_equal(frame.size, 77);
}

static void refuses_a_packet_one_byte_too_large(void **state)
{
	const struct pair *pair = *state;
	struct kvg_frame frame;
	unsigned before;
	int fd;

	fill_fds(&fd, 1);
	before = count_fds();
	assert_int_equal(kvg_frame_send(pair->left, "123456", 6, &fd, 1), 0);
	assert_int_equal(kvg_frame_send(pair->left, "12345", 5, NULL, 0), 0);
	assert_int_equal(kvg_frame_receive(pair->right, 5, 4, 0, &frame), -EMSGSIZE);
	assert_int_equal(count_fds(), before);
	assert_int_equal(kvg_frame_receive(pair->right, 5, 4, 0, &frame), 1);
	kvg_frame_deinit(&frame);
	assert_int_equal(close(fd), 0);
}

static void refuses_one_descriptor_too_many(void **state)
{
	const struct pair *pair = *state;
	const unsigned limits[] = {0, 1, 2, 3, 8, KVG_FRAME_FDS - 1};
	int fds[KVG_FRAME_FDS];
	struct kvg_frame frame;
	unsigned before;

	fill_fds(fds, KVG_FRAME_FDS);
	before = count_fds();
	for (unsigned i = 0; i < sizeof(limits) / sizeof(*limits); i++) {
		assert_int_equal(kvg_frame_send(pair->left, "a", 1, fds, limits[i] + 1), 0);
		assert_int_equal(kvg_frame_receive(pair->right, 100, limits[i], 0, &frame), -ETOOMANYREFS);
		assert_int_equal(count_fds(), before);
		assert_int_equal(kvg_frame_send(pair->left, "a", 1, fds, limits[i]), 0);
		assert_int_equal(kvg_frame_receive(pair->right, 100, limits[i], 0, &frame), 1);
		kvg_frame_deinit(&frame);
	}
	close_fds(fds, KVG_FRAME_FDS);
}

/* A peer that does not use our sender: more descriptors than any control buffer of ours holds. */
static void closes_a_flood_of_descriptors(void **state)
{
	const struct pair *pair = *state;
	enum { COUNT = 200 };
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int) * COUNT)];
	} control = {0};
	char byte = 'a';
	struct iovec iov = {.iov_base = &byte, .iov_len = 1};
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	struct kvg_frame frame;
	unsigned before = count_fds();
	int same[COUNT];

	for (unsigned i = 0; i < COUNT; i++)
		same[i] = pair->left;
	control.header.cmsg_level = SOL_SOCKET;
	control.header.cmsg_type = SCM_RIGHTS;
	control.header.cmsg_len = CMSG_LEN(sizeof(same));
	memcpy(CMSG_DATA(&control.header), same, sizeof(same));
	assert_int_equal(sendmsg(pair->left, &message, MSG_NOSIGNAL), 1);
	assert_int_equal(kvg_frame_receive(pair->right, 100, KVG_FRAME_FDS, 1, &frame), -ETOOMANYREFS);
	assert_int_equal(count_fds(), before);
}

static void sends_a_large_message_in_a_memfd(void **state)
{
	const struct pair *pair = *state;
	size_t size = KVG_FRAME_MAX + 1;
	uint8_t *large = malloc(size);
	struct kvg_frame frame;
	struct stat sent, got;
	int fd;

	assert_non_null(large);
	for (size_t i = 0; i < size; i++)
		large[i] = (uint8_t)(i * 7);
	fill_fds(&fd, 1);
	assert_int_equal(kvg_frame_send(pair->left, large, size, &fd, 1), 0);
	assert_int_equal(kvg_frame_receive(pair->right, KVG_FRAME_MAX, 1, 1, &frame), 1);
	assert_int_equal(frame.size, size);
	assert_memory_equal(frame.data, large, size);
	assert_int_equal(frame.fd_count, 1);
	assert_int_equal(fstat(fd, &sent), 0);
	assert_int_equal(fstat(frame.fds[0], &got), 0);
	assert_int_equal(sent.st_ino, got.st_ino);
	kvg_frame_deinit(&frame);

	assert_int_equal(kvg_frame_send(pair->left, large, size - 1, NULL, 0), 0);
	assert_int_equal(kvg_frame_receive(pair->right, KVG_FRAME_MAX, 0, 0, &frame), 1);
	assert_int_equal(frame.size, KVG_FRAME_MAX);
	kvg_frame_deinit(&frame);

	assert_int_equal(kvg_frame_send(pair->left, large, KVG_FRAME_LARGE_MAX + 1ul, NULL, 0), -EMSGSIZE);
	free(large);
	assert_int_equal(close(fd), 0);
}

/* Sends a packet that stands for `size` bytes in fd. */
static int send_claim(int socket, uint64_t size, int fd)
{
	uint8_t packet[9] = {KVG_FRAME_OVERSIZE};

	memcpy(packet + 1, &size, sizeof(size));
	return kvg_frame_send(socket, packet, sizeof(packet), &fd, 1);
}

static void refuses_a_large_message_that_lies(void **state)
{
	const struct pair *pair = *state;
	int sealed = kvg_memfd_from("test", "0123456789", 10), open_memfd;
	struct kvg_frame frame;
	unsigned before;

	assert_true(sealed >= 0);
	fill_fds(&open_memfd, 1);
	assert_int_equal(ftruncate(open_memfd, 10), 0);
	before = count_fds();
	const struct {
		uint64_t size;
		int fd, status;
	} claims[] = {
		{11, sealed, -EBADMSG},
		{9, sealed, -EBADMSG},
		{0, sealed, -EBADMSG},
		{UINT64_MAX, sealed, -EBADMSG},
		{10, open_memfd, -EBADMSG},
		{10, pair->left, -EBADMSG},
		{10, sealed, 1},
	};
	for (size_t i = 0; i < sizeof(claims) / sizeof(*claims); i++) {
		assert_int_equal(send_claim(pair->left, claims[i].size, claims[i].fd), 0);
		assert_int_equal(kvg_frame_receive(pair->right, 100, 4, 1, &frame), claims[i].status);
		if (claims[i].status == 1)
			kvg_frame_deinit(&frame);
		assert_int_equal(count_fds(), before);
	}
	/* Where large messages are not accepted the same packet is plain bytes with a descriptor. */
	assert_int_equal(send_claim(pair->left, 10, sealed), 0);
	assert_int_equal(kvg_frame_receive(pair->right, 100, 1, 0, &frame), 1);
	assert_int_equal(frame.size, 9);
	assert_int_equal(frame.fd_count, 1);
	kvg_frame_deinit(&frame);
	assert_int_equal(close(sealed), 0);
	assert_int_equal(close(open_memfd), 0);
}

static void a_full_socket_says_again(void **state)
{
	const struct pair *pair = *state;
	static uint8_t bytes[KVG_FRAME_MAX];
	struct kvg_frame frame;
	unsigned sent = 0;
	int r;

	while ((r = kvg_frame_send(pair->left, bytes, sizeof(bytes), NULL, 0)) == 0)
		assert_true(++sent < 10000);
	assert_int_equal(r, -EAGAIN);
	for (unsigned i = 0; i < sent; i++) {
		assert_int_equal(kvg_frame_receive(pair->right, sizeof(bytes), 0, 0, &frame), 1);
		kvg_frame_deinit(&frame);
	}
	assert_int_equal(kvg_frame_receive(pair->right, sizeof(bytes), 0, 0, &frame), -EAGAIN);
}

static void memfds_are_sealed(void **state)
{
	int fixed = kvg_memfd_new("test", 8192), frozen = kvg_memfd_from("test", "abc", 3);
	char text[3];

	(void)state;
	assert_true(fixed >= 0 && frozen >= 0);
	assert_int_equal(pwrite(fixed, "abc", 3, 8000), 3);
	assert_int_equal(ftruncate(fixed, 8191), -1);
	assert_int_equal(ftruncate(fixed, 8193), -1);
	assert_int_equal(fcntl(fixed, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	assert_int_equal(pread(frozen, text, 3, 0), 3);
	assert_memory_equal(text, "abc", 3);
	assert_int_equal(pwrite(frozen, "x", 1, 0), -1);
	assert_int_equal(fcntl(frozen, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
	assert_int_equal(fcntl(frozen, F_GETFD), FD_CLOEXEC);
	assert_int_equal(kvg_memfd_new("test", UINT64_MAX), -EFBIG);
	close_fds(&fixed, 1);
	close_fds(&frozen, 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(sends_bytes_and_descriptors, setup, teardown),
		cmocka_unit_test_setup_teardown(receives_nothing_and_the_end, setup, teardown),
		cmocka_unit_test_setup_teardown(refuses_a_packet_one_byte_too_large, setup, teardown),
		cmocka_unit_test_setup_teardown(refuses_one_descriptor_too_many, setup, teardown),
		cmocka_unit_test_setup_teardown(closes_a_flood_of_descriptors, setup, teardown),
		cmocka_unit_test_setup_teardown(sends_a_large_message_in_a_memfd, setup, teardown),
		cmocka_unit_test_setup_teardown(refuses_a_large_message_that_lies, setup, teardown),
		cmocka_unit_test_setup_teardown(a_full_socket_says_again, setup, teardown),
		cmocka_unit_test(memfds_are_sealed),
	};

	return runner_run("frame", tests, sizeof(tests) / sizeof(*tests));
}
