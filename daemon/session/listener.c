#include "daemon/session/listener.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon/base/log.h"

#define BACKLOG      128
#define ACCEPT_SHARE 16u
#define RETRY_NS     100000000u

struct listener {
	int fd;
	char *path;
	uid_t *uids;
	size_t uid_count;
	struct loop_watch *watch;
	struct loop_timer *timer; /* tries again when a connection could not be accepted */
	bool failing;             /* has been logged */
	listener_accept accept;
	listener_refuse refuse;
	void *user;
};

static bool may_connect(const struct listener *listener, uid_t uid)
{
	for (size_t i = 0; i < listener->uid_count; i++)
		if (listener->uids[i] == uid)
			return true;
	return listener->uid_count == 0;
}

static void accept_one(struct listener *listener, int fd)
{
	struct ucred peer = {0};
	socklen_t size = sizeof(peer);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || !may_connect(listener, peer.uid)) {
		log_warning("%s: uid %u (pid %d) is not allowed", listener->path, peer.uid, peer.pid);
		if (listener->refuse)
			listener->refuse(listener->user, fd, &peer);
		(void)close(fd);
		return;
	}
	listener->accept(listener->user, fd, &peer);
}

/* The connection stays in the backlog, and no event will tell of it again. */
static void accept_failed(struct listener *listener, int error)
{
	if (!listener->failing)
		log_error("%s: accept: %s; trying again", listener->path, strerror(error));
	listener->failing = true;
	loop_timer_set(listener->timer, RETRY_NS);
}

static void try_again(void *user)
{
	const struct listener *listener = user;

	loop_watch_again(listener->watch);
}

static void ready(void *user, uint32_t revents)
{
	struct listener *listener = user;

	(void)revents;
	for (unsigned i = 0; i < ACCEPT_SHARE; i++) {
		int fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd >= 0) {
			listener->failing = false;
			accept_one(listener, fd);
		} else if (errno == EAGAIN) {
			return;
		} else if (errno != ECONNABORTED && errno != EINTR) {
			accept_failed(listener, errno);
			return;
		}
	}
	loop_watch_again(listener->watch);
}

/* Whether somebody listens at the address; a socket file without one is removed. */
static int clear_stale(const struct sockaddr_un *address)
{
	struct stat st;
	int fd, r;

	if (lstat(address->sun_path, &st) < 0)
		return errno == ENOENT ? 0 : -errno;
	if (!S_ISSOCK(st.st_mode))
		return -EEXIST;
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	r = connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0 ? errno : 0;
	(void)close(fd);
	if (r != ECONNREFUSED)
		return -EADDRINUSE;
	return unlink(address->sun_path) < 0 ? -errno : 0;
}

static int bind_listener(struct listener *listener, const struct listener_options *options)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	mode_t mask;
	int r;

	if (strlen(options->path) >= sizeof(address.sun_path))
		return -ENAMETOOLONG;
	(void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", options->path);
	r = clear_stale(&address);
	if (r < 0)
		return r;
	listener->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	mask = umask(0777);
	r = listener->fd < 0 || bind(listener->fd, (const struct sockaddr *)&address, sizeof(address)) < 0 ? -errno : 0;
	(void)umask(mask);
	if (r < 0)
		return r;
	listener->path = strdup(options->path);
	if (!listener->path)
		return -ENOMEM;
	if ((options->owner != (uid_t)-1 || options->group != (gid_t)-1) &&
		chown(options->path, options->owner, options->group) < 0)
		return -errno;
	return chmod(options->path, options->mode) < 0 || listen(listener->fd, BACKLOG) < 0 ? -errno : 0;
}

static int copy_uids(struct listener *listener, const struct listener_options *options)
{
	if (!options->uid_count)
		return 0;
	listener->uids = malloc(options->uid_count * sizeof(uid_t));
	if (!listener->uids)
		return -ENOMEM;
	memcpy(listener->uids, options->uids, options->uid_count * sizeof(uid_t));
	listener->uid_count = options->uid_count;
	return 0;
}

int listener_new(struct loop *loop, const struct listener_options *options, listener_accept accept, void *user,
	struct listener **ret, char *text)
{
	struct listener *listener = calloc(1, sizeof(*listener));
	int r;

	if (!listener)
		return -ENOMEM;
	*listener = (struct listener){.fd = -1, .accept = accept, .refuse = options->refuse, .user = user};
	r = copy_uids(listener, options);
	if (r >= 0)
		r = bind_listener(listener, options);
	if (r >= 0)
		r = loop_timer_new(loop, try_again, listener, &listener->timer);
	if (r >= 0)
		r = loop_watch_new(loop, listener->fd, POLLIN, ready, listener, &listener->watch);
	if (r < 0) {
		(void)snprintf(text, LISTENER_TEXT, "socket %s: %s", options->path,
			r == -EADDRINUSE ? "in use: another process listens there"
			: r == -EEXIST   ? "there is a file of another kind"
					 : strerror(-r));
		(void)listener_free(listener);
		return r;
	}
	*ret = listener;
	return 0;
}

struct listener *listener_free(struct listener *listener)
{
	if (!listener)
		return NULL;
	listener->watch = loop_watch_free(listener->watch);
	listener->timer = loop_timer_free(listener->timer);
	if (listener->path)
		(void)unlink(listener->path);
	if (listener->fd >= 0)
		(void)close(listener->fd);
	free(listener->path);
	free(listener->uids);
	free(listener);
	return NULL;
}
