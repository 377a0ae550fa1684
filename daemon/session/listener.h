/*
 * listener.h - a listening SOCK_SEQPACKET socket: its path, mode and owner, and
 * the check of peer credentials.
 */
#ifndef KVG_LISTENER_H
#define KVG_LISTENER_H

#include <stddef.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "daemon/loop/loop.h"

#define LISTENER_TEXT 512

/* Takes an accepted connection: owns fd. */
typedef void (*listener_accept)(void *user, int fd, const struct ucred *peer);

/* Tells a peer whose uid is not allowed; fd is closed afterwards by the caller. */
typedef void (*listener_refuse)(void *user, int fd, const struct ucred *peer);

struct listener_options {
	const char *path;
	mode_t mode;
	uid_t owner;       /* (uid_t)-1: leave */
	gid_t group;       /* (gid_t)-1: leave */
	const uid_t *uids; /* who may connect; empty: whoever the mode lets in */
	size_t uid_count;
	listener_refuse refuse; /* or NULL */
};

struct listener;

/*
 * Binds and listens. A socket file that nobody listens on is replaced. On failure text (LISTENER_TEXT bytes)
 * says why; -EADDRINUSE: somebody listens there.
 */
int listener_new(struct loop *loop, const struct listener_options *options, listener_accept accept, void *user,
	struct listener **ret, char *text);

/* Closes and removes the socket file. */
struct listener *listener_free(struct listener *listener);

#endif
