#include "tools/ctl/admin.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "proto/frame.h"

#define _cleanup_frame_ __attribute__((cleanup(kvg_frame_deinit)))

__attribute__((format(printf, 3, 4))) static int fail(int r, char text[ADMIN_TEXT], const char *format, ...)
{
	va_list args;

	va_start(args, format);
	(void)vsnprintf(text, ADMIN_TEXT, format, args);
	va_end(args);
	return r;
}

static int64_t now_ms(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Connects fd. A daemon whose backlog stays full counts as one that does not answer. */
static int admin_connect(const char *path, int fd, int timeout_ms, char text[ADMIN_TEXT])
{
	struct timeval timeout = {.tv_sec = timeout_ms / 1000, .tv_usec = timeout_ms % 1000 * 1000};
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	size_t length = strlen(path);

	if (length == 0 || length >= sizeof(address.sun_path))
		return fail(-ENAMETOOLONG, text, "admin socket '%.128s': the path has %zu bytes, allowed are 1 to %zu",
			path, length, sizeof(address.sun_path) - 1);
	memcpy(address.sun_path, path, length);
	if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)) == 0 &&
		connect(fd, (const struct sockaddr *)&address, sizeof(address)) == 0)
		return 0;
	if (errno == EAGAIN)
		return fail(-ETIMEDOUT, text, "admin socket %s: not accepted within %d ms", path, timeout_ms);
	return fail(-errno, text, "admin socket %s: %s", path, strerror(errno));
}

static int admin_send(const char *path, int fd, const Kvg__AdminRequest *request, char text[ADMIN_TEXT])
{
	size_t size = kvg__admin_request__get_packed_size(request);
	uint8_t *data = malloc(size);
	int r;

	if (!data)
		return fail(-ENOMEM, text, "request of %zu bytes: out of memory", size);
	r = kvg_frame_send(fd, data, kvg__admin_request__pack(request, data), NULL, 0);
	free(data);
	if (r < 0)
		return fail(r, text, "admin socket %s: request not sent: %s", path, strerror(-r));
	return 0;
}

/* Waits until there is something to receive. */
static int admin_wait(const char *path, int fd, int timeout_ms, char text[ADMIN_TEXT])
{
	struct pollfd poller = {.fd = fd, .events = POLLIN};
	int64_t deadline = now_ms() + timeout_ms;

	for (;;) {
		int64_t left = deadline - now_ms();
		int n = poll(&poller, 1, left > 0 ? (int)left : 0);

		if (n > 0)
			return 0;
		if (n == 0)
			return fail(-ETIMEDOUT, text, "admin socket %s: no answer within %d ms", path, timeout_ms);
		if (errno != EINTR)
			return fail(-errno, text, "admin socket %s: poll: %s", path, strerror(errno));
	}
}

static int admin_receive(const char *path, int fd, Kvg__AdminReply **ret, char text[ADMIN_TEXT])
{
	_cleanup_frame_ struct kvg_frame frame = {0};
	Kvg__AdminReply *reply;
	int r = kvg_frame_receive(fd, KVG_FRAME_LARGE_MAX, 0, 1, &frame);

	if (r == 0 || r == -ECONNRESET)
		return fail(-EPIPE, text, "admin socket %s: the daemon hung up without an answer", path);
	if (r < 0)
		return fail(r, text, "admin socket %s: answer not received: %s", path, strerror(-r));
	reply = kvg__admin_reply__unpack(NULL, frame.size, frame.data);
	if (!reply)
		return fail(-EBADMSG, text, "admin socket %s: an answer of %zu bytes is not an AdminReply", path,
			frame.size);
	*ret = reply;
	return 0;
}

/* Checks that a reply answers the request. */
static int admin_check(
	const char *path, const Kvg__AdminRequest *request, const Kvg__AdminReply *reply, char text[ADMIN_TEXT])
{
	if (reply->body_case == KVG__ADMIN_REPLY__BODY_ERROR)
		return fail(reply->error->status < 0 ? reply->error->status : -EPROTO, text, "%s", reply->error->text);
	if (reply->id != request->id)
		return fail(-EPROTO, text, "admin socket %s: an answer to request %" PRIu64 ", asked was %" PRIu64,
			path, reply->id, request->id);
	return 0;
}

/* The whole conversation on a fresh socket. */
static int admin_talk(const char *path, int fd, const Kvg__AdminRequest *request, int timeout_ms, Kvg__AdminReply **ret,
	char text[ADMIN_TEXT])
{
	Kvg__AdminReply *reply = NULL;
	int r = admin_connect(path, fd, timeout_ms, text);

	if (r == 0)
		r = admin_send(path, fd, request, text);
	if (r == 0)
		r = admin_wait(path, fd, timeout_ms, text);
	if (r < 0)
		return r;
	r = admin_receive(path, fd, &reply, text);
	if (!reply)
		return r;
	r = admin_check(path, request, reply, text);
	if (r < 0) {
		kvg__admin_reply__free_unpacked(reply, NULL);
		return r;
	}
	*ret = reply;
	return 0;
}

int admin_call(const char *path, const Kvg__AdminRequest *request, int timeout_ms, Kvg__AdminReply **ret,
	char text[ADMIN_TEXT])
{
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	int r;

	if (fd < 0)
		return fail(-errno, text, "admin socket %s: %s", path, strerror(errno));
	r = admin_talk(path, fd, request, timeout_ms, ret, text);
	(void)close(fd);
	return r;
}
