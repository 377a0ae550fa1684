/*
 * frame.h - packets of the control sockets: bytes of one protobuf message and
 * the descriptors that travel with it (SCM_RIGHTS).
 *
 * Nothing here blocks: every send and receive is MSG_DONTWAIT. Received
 * descriptors are close-on-exec. A message larger than KVG_FRAME_MAX is put in a
 * sealed memfd, and the packet that is sent is KVG_FRAME_OVERSIZE followed by
 * its size (the encoding of control.proto's Oversize), with the memfd before the
 * message's own descriptors; the receiving side resolves that by itself.
 */
#ifndef KVG_FRAME_H
#define KVG_FRAME_H

#include <stddef.h>
#include <stdint.h>

#define KVG_FRAME_MAX       (128u * 1024u)        /* bytes of a packet */
#define KVG_FRAME_LARGE_MAX (64u * 1024u * 1024u) /* bytes of a message in a memfd */
#define KVG_FRAME_FDS       64u                   /* descriptors of a packet */
#define KVG_FRAME_OVERSIZE  0x79u                 /* first byte of a packet that stands for a message in a memfd */

/* How received descriptors are closed that nobody took; NULL: close(2). */
typedef void (*kvg_frame_close)(void *user, int fd);

struct kvg_frame {
	uint8_t *data; /* owned; NULL after kvg_frame_deinit() */
	size_t size;
	int fds[KVG_FRAME_FDS]; /* owned; a taker sets its entry to -1 */
	unsigned fd_count;
	kvg_frame_close close;
	void *close_user;
};

/* Sends one message. 0; -EAGAIN when the peer's buffer is full; another negative errno when the connection is gone. */
int kvg_frame_send(int socket, const void *data, size_t size, const int *fds, unsigned fd_count);

/*
 * Receives one message of at most max_size bytes and max_fds descriptors into
 * *ret (which is only touched on success). 1 on success, 0 at the end of the
 * stream, -EAGAIN when there is none, -EMSGSIZE when the packet is larger than
 * max_size (or KVG_FRAME_MAX), -ETOOMANYREFS when it carries more than max_fds
 * descriptors, -EBADMSG when an oversize packet lies; on errors everything
 * received has been closed. allow_large: messages in memfds are accepted.
 */
int kvg_frame_receive(int socket, size_t max_size, unsigned max_fds, int allow_large, struct kvg_frame *ret);

/* The same with a way of its own to close descriptors, here and in kvg_frame_deinit(). */
int kvg_frame_receive_with(int socket, size_t max_size, unsigned max_fds, int allow_large, kvg_frame_close close,
	void *user, struct kvg_frame *ret);

/* Frees the data and closes what is left of the descriptors. */
void kvg_frame_deinit(struct kvg_frame *frame);

/* A memfd with MFD_CLOEXEC and MFD_ALLOW_SEALING of the given size, with seals SHRINK|GROW|SEAL; or a negative errno.
 */
int kvg_memfd_new(const char *name, uint64_t size);

/* A memfd that holds a copy of data, sealed against any change; or a negative errno. */
int kvg_memfd_from(const char *name, const void *data, size_t size);

#endif
