#include "proto/frame.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define OVERSIZE_BYTES (1 + sizeof(uint64_t))

/* Room for the descriptors of a message and the memfd of an oversize one. */
union control {
	struct cmsghdr align;
	char bytes[CMSG_SPACE(sizeof(int) * (KVG_FRAME_FDS + 1))];
};

static int send_packet(int socket, void *data, size_t size, const int *fds, unsigned fd_count)
{
	union control control = {0};
	struct iovec iov = {.iov_base = data, .iov_len = size};
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd_count) {
		struct cmsghdr *header = &control.align;

		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
		memcpy(CMSG_DATA(header), fds, sizeof(int) * fd_count);
	}
	if (sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		return -errno;
	return 0;
}

static int send_oversize(int socket, const void *data, size_t size, const int *fds, unsigned fd_count)
{
	int all[KVG_FRAME_FDS + 1];
	uint8_t packet[OVERSIZE_BYTES] = {KVG_FRAME_OVERSIZE};
	uint64_t bytes = size;
	int r;

	if (size > KVG_FRAME_LARGE_MAX)
		return -EMSGSIZE;
	all[0] = kvg_memfd_from("kvgate-message", data, size);
	if (all[0] < 0)
		return all[0];
	if (fd_count)
		memcpy(&all[1], fds, sizeof(int) * fd_count);
	memcpy(packet + 1, &bytes, sizeof(bytes));
	r = send_packet(socket, packet, sizeof(packet), all, fd_count + 1);
	(void)close(all[0]);
	return r;
}

int kvg_frame_send(int socket, const void *data, size_t size, const int *fds, unsigned fd_count)
{
	if (fd_count > KVG_FRAME_FDS || !size)
		return -EINVAL;
	if (size > KVG_FRAME_MAX)
		return send_oversize(socket, data, size, fds, fd_count);
	return send_packet(socket, (void *)(uintptr_t)data, size, fds, fd_count);
}

/* Who closes the descriptors of a frame. */
struct closer {
	kvg_frame_close close;
	void *user;
};

static void close_one(const struct closer *closer, int fd)
{
	if (closer->close)
		closer->close(closer->user, fd);
	else
		(void)close(fd);
}

static void close_fds(const struct closer *closer, const int *fds, unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		if (fds[i] >= 0)
			close_one(closer, fds[i]);
}

/* Takes the descriptors out of a received message; all has room for what union control can carry. */
static unsigned take_fds(const struct closer *closer, struct msghdr *message, int *all, unsigned room)
{
	unsigned count = 0;

	for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
		size_t n = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < n; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(fd));
			if (count < room)
				all[count++] = fd;
			else
				close_one(closer, fd);
		}
	}
	return count;
}

/* Replaces the packet that stands for a large message by the message. all[0] is its memfd. */
static int read_oversize(int fd, const uint8_t *packet, uint8_t **ret_data, size_t *ret_size)
{
	const int sealed = F_SEAL_SHRINK | F_SEAL_WRITE;
	struct stat st;
	uint64_t size;
	uint8_t *data;
	int seals;

	memcpy(&size, packet + 1, sizeof(size));
	/* Only memfds have seals: nothing else is read, as it might block. */
	seals = fcntl(fd, F_GET_SEALS);
	if (seals < 0 || (seals & sealed) != sealed || fstat(fd, &st) < 0)
		return -EBADMSG;
	if (!size || size > KVG_FRAME_LARGE_MAX || (uint64_t)st.st_size != size)
		return -EBADMSG;
	data = malloc(size);
	if (!data)
		return -ENOMEM;
	for (size_t done = 0; done < size;) {
		ssize_t n = pread(fd, data + done, size - done, (off_t)done);

		if (n <= 0) {
			free(data);
			return -EBADMSG;
		}
		done += (size_t)n;
	}
	*ret_data = data;
	*ret_size = size;
	return 0;
}

/* Receives a packet of `size` bytes, known from a look ahead. all[] gets its descriptors, also on errors. */
static int receive_packet(const struct closer *closer, int socket, uint8_t *data, size_t size, int *all, unsigned room,
	unsigned *ret_count)
{
	union control control;
	struct iovec iov = {.iov_base = data, .iov_len = size};
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	ssize_t n = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (n < 0)
		return -errno;
	*ret_count = take_fds(closer, &message, all, room);
	if (message.msg_flags & MSG_CTRUNC)
		return -ETOOMANYREFS;
	if (message.msg_flags & MSG_TRUNC)
		return -EMSGSIZE;
	return (size_t)n == size ? 0 : -EBADMSG;
}

/* Makes the frame of a packet and its descriptors; takes *data over on success. */
static int build_frame(const struct closer *closer, uint8_t *data, size_t size, int *all, unsigned count,
	unsigned max_fds, bool large, struct kvg_frame *ret)
{
	struct kvg_frame frame = {.data = data, .size = size, .close = closer->close, .close_user = closer->user};
	unsigned first = 0;

	if (large && count && size == OVERSIZE_BYTES && data[0] == KVG_FRAME_OVERSIZE) {
		int r = read_oversize(all[0], data, &frame.data, &frame.size);

		if (r < 0)
			return r;
		first = 1;
	}
	if (count - first > max_fds) {
		if (first)
			free(frame.data);
		return -ETOOMANYREFS;
	}
	if (first) {
		(void)close(all[0]);
		free(data);
	}
	frame.fd_count = count - first;
	for (unsigned i = 0; i < KVG_FRAME_FDS; i++)
		frame.fds[i] = i < frame.fd_count ? all[first + i] : -1;
	*ret = frame;
	return 1;
}

int kvg_frame_receive(int socket, size_t max_size, unsigned max_fds, int allow_large, struct kvg_frame *ret)
{
	return kvg_frame_receive_with(socket, max_size, max_fds, allow_large, NULL, NULL, ret);
}

int kvg_frame_receive_with(int socket, size_t max_size, unsigned max_fds, int allow_large, kvg_frame_close close_fd,
	void *user, struct kvg_frame *ret)
{
	const struct closer closer = {.close = close_fd, .user = user};
	int all[KVG_FRAME_FDS + 2];
	unsigned count = 0;
	uint8_t *data, none;
	ssize_t size;
	int r;

	if (max_size > KVG_FRAME_MAX)
		max_size = KVG_FRAME_MAX;
	if (max_fds > KVG_FRAME_FDS)
		max_fds = KVG_FRAME_FDS;
	size = recv(socket, &none, 0, MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT);
	if (size < 0)
		return -errno;
	if (size == 0 || (size_t)size > max_size) {
		r = receive_packet(&closer, socket, &none, 0, all, sizeof(all) / sizeof(*all), &count);
		close_fds(&closer, all, count);
		return size ? -EMSGSIZE : (r == -ETOOMANYREFS ? r : 0);
	}
	data = malloc((size_t)size);
	if (!data)
		return -ENOMEM;
	r = receive_packet(&closer, socket, data, (size_t)size, all, sizeof(all) / sizeof(*all), &count);
	if (r == 0)
		r = build_frame(&closer, data, (size_t)size, all, count, max_fds, allow_large, ret);
	if (r < 0) {
		close_fds(&closer, all, count);
		free(data);
	}
	return r;
}

void kvg_frame_deinit(struct kvg_frame *frame)
{
	const struct closer closer = {.close = frame->close, .user = frame->close_user};

	close_fds(&closer, frame->fds, frame->fd_count);
	frame->fd_count = 0;
	free(frame->data);
	frame->data = NULL;
	frame->size = 0;
}

/* A memfd of that size, with room for more seals. */
static int memfd_open(const char *name, uint64_t size)
{
	int fd, r;

	if (size > INT64_MAX)
		return -EFBIG;
	fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return -errno;
	if (ftruncate(fd, (off_t)size) < 0) {
		r = -errno;
		(void)close(fd);
		return r;
	}
	return fd;
}

static int memfd_seal(int fd, int seals)
{
	int r;

	if (fcntl(fd, F_ADD_SEALS, seals) == 0)
		return fd;
	r = -errno;
	(void)close(fd);
	return r;
}

int kvg_memfd_new(const char *name, uint64_t size)
{
	int fd = memfd_open(name, size);

	return fd < 0 ? fd : memfd_seal(fd, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
}

int kvg_memfd_from(const char *name, const void *data, size_t size)
{
	const uint8_t *bytes = data;
	int fd = memfd_open(name, size);

	if (fd < 0)
		return fd;
	for (size_t done = 0; done < size;) {
		ssize_t n = pwrite(fd, bytes + done, size - done, (off_t)done);

		if (n <= 0) {
			int r = n < 0 ? -errno : -EIO;

			if (r == -EINTR)
				continue;
			(void)close(fd);
			return r;
		}
		done += (size_t)n;
	}
	return memfd_seal(fd, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
}
