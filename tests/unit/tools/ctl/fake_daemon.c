#include "tests/unit/tools/ctl/fake_daemon.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/frame.h"
#include "tests/support/runner.h"

static void wait_readable(int fd)
{
	struct pollfd poller = {.fd = fd, .events = POLLIN};

	(void)poll(&poller, 1, -1);
}

static void send_reply(struct fake_daemon *fake, int fd)
{
	Kvg__AdminReply reply = *fake->reply;
	uint8_t *data;
	size_t size;

	if (fake->answer == FAKE_REPLY && fake->request)
		reply.id = fake->request->id;
	size = kvg__admin_reply__get_packed_size(&reply);
	data = malloc(size);
	if (data)
		(void)kvg_frame_send(fd, data, kvg__admin_reply__pack(&reply, data), NULL, 0);
	free(data);
}

/* Serves one connection. What goes wrong here shows in what the client gets. */
static void *serve(void *context)
{
	struct fake_daemon *fake = context;
	int fd = accept4(fake->listener, NULL, NULL, SOCK_CLOEXEC);
	struct kvg_frame frame;

	wait_readable(fd);
	if (kvg_frame_receive(fd, KVG_FRAME_MAX, 0, 0, &frame) == 1) {
		fake->request = kvg__admin_request__unpack(NULL, frame.size, frame.data);
		kvg_frame_deinit(&frame);
	}
	if (fake->answer == FAKE_GARBAGE)
		(void)kvg_frame_send(fd, "\xff\xff\xff", 3, NULL, 0);
	else if (fake->answer == FAKE_REPLY || fake->answer == FAKE_VERBATIM)
		send_reply(fake, fd);
	if (fake->answer != FAKE_HANG_UP)
		wait_readable(fd);
	(void)close(fd);
	return NULL;
}

/* Takes the only place of the backlog. */
static void fill_backlog(struct fake_daemon *fake, const struct sockaddr_un *address)
{
	fake->filler = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	assert_int_equal(connect(fake->filler, (const struct sockaddr *)address, sizeof(*address)), 0);
}

void fake_daemon_start(struct fake_daemon *fake, enum fake_answer answer, const Kvg__AdminReply *reply)
{
	const char *tmp = getenv("TMPDIR");
	struct sockaddr_un address = {.sun_family = AF_UNIX};

	*fake = (struct fake_daemon){.answer = answer, .reply = reply, .filler = -1};
	/* a socket's path is short; a long TMPDIR would not do */
	if (!tmp || strlen(tmp) > 32)
		tmp = "/tmp";
	(void)snprintf(fake->dir, sizeof(fake->dir), "%s/kvgatectl-XXXXXX", tmp);
	assert_non_null(mkdtemp(fake->dir));
	(void)snprintf(fake->path, sizeof(fake->path), "%s/admin.sock", fake->dir);
	(void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", fake->path);
	fake->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	assert_true(fake->listener >= 0);
	assert_int_equal(bind(fake->listener, (const struct sockaddr *)&address, sizeof(address)), 0);
	assert_int_equal(listen(fake->listener, 0), 0);
	if (answer == FAKE_FULL)
		fill_backlog(fake, &address);
	else
		assert_int_equal(pthread_create(&fake->thread, NULL, serve, fake), 0);
}

void fake_daemon_stop(struct fake_daemon *fake)
{
	if (fake->answer == FAKE_FULL)
		(void)close(fake->filler);
	else
		assert_int_equal(pthread_join(fake->thread, NULL), 0);
	(void)close(fake->listener);
	assert_int_equal(unlink(fake->path), 0);
	assert_int_equal(rmdir(fake->dir), 0);
}

void fake_daemon_deinit(struct fake_daemon *fake)
{
	if (fake->request)
		kvg__admin_request__free_unpacked(fake->request, NULL);
	fake->request = NULL;
}
