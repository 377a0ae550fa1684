#include "tools/bench/service.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "control.pb-c.h"
#include "proto/frame.h"

#define START_SECONDS 30.0
#define STOP_MS       30000
#define ANSWER_MS     30000

/* Says what is wrong in one line; the status. */
#define fail(status, ...) ((void)fprintf(stderr, "kvgate-bench: " __VA_ARGS__), (void)fputc('\n', stderr), (status))

double service_seconds(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void pause_ms(unsigned ms)
{
	const struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};

	(void)nanosleep(&time, NULL);
}

const char *service_path(const struct service *service, const char *name, char ret[SERVICE_PATH])
{
	(void)snprintf(ret, SERVICE_PATH, "%.80s/%.20s", service->dir, name);
	return ret;
}

/* ---- the admin socket ---- */

static int connect_admin(const struct service *service)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char path[SERVICE_PATH];
	int r, fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -errno;
	(void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", service_path(service, "admin.sock", path));
	if (connect(fd, (const struct sockaddr *)&address, sizeof(address)) == 0)
		return fd;
	r = -errno;
	(void)close(fd);
	return r;
}

static int receive(int fd, Kvg__AdminReply **ret)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};
	struct kvg_frame frame;
	int r;

	if (poll(&polled, 1, ANSWER_MS) != 1)
		return -ETIMEDOUT;
	r = kvg_frame_receive(fd, KVG_FRAME_LARGE_MAX, 1, 1, &frame);
	if (r <= 0)
		return r ? r : -EPIPE;
	*ret = kvg__admin_reply__unpack(NULL, frame.size, frame.data);
	kvg_frame_deinit(&frame);
	return *ret ? 0 : -EBADMSG;
}

/* One exchange on a connection of its own; the caller frees the reply. Says nothing when it fails. */
static int ask(const struct service *service, Kvg__AdminRequest__BodyCase what, Kvg__AdminReply **ret)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__Empty empty = KVG__EMPTY__INIT;
	uint8_t packet[64];
	int r, fd = connect_admin(service);

	if (fd < 0)
		return fd;
	request.id = 1;
	request.body_case = what;
	request.status = &empty;
	r = kvg_frame_send(fd, packet, kvg__admin_request__pack(&request, packet), NULL, 0);
	if (r == 0)
		r = receive(fd, ret);
	(void)close(fd);
	return r;
}

static void copy_text(char *ret, size_t size, const char *text)
{
	(void)snprintf(ret, size, "%s", text ? text : "");
}

static int read_status(const struct service *service, struct service_status *ret)
{
	Kvg__AdminReply *reply = NULL;
	const Kvg__Status *status;
	int r = ask(service, KVG__ADMIN_REQUEST__BODY_STATUS, &reply);

	if (!reply)
		return r;
	status = reply->body_case == KVG__ADMIN_REPLY__BODY_STATUS ? reply->status : NULL;
	if (status) {
		*ret = (struct service_status){
			.extent_size = status->extent_size,
			.pool_size = status->pool_size,
			.charged = status->charged,
			.unreturned = status->unreturned,
			.overhead = status->overhead,
			.reserved = status->has_reserved ? status->reserved : 0,
			.device_used = status->has_device_used ? status->device_used : 0,
			.workers = status->workers,
			.sequences = status->sequences,
			.cuda = strcmp(status->kind, "cuda") == 0,
			.mps = status->has_mps && status->mps,
		};
		copy_text(ret->device, sizeof(ret->device), status->device);
		copy_text(ret->driver, sizeof(ret->driver), status->driver);
	}
	kvg__admin_reply__free_unpacked(reply, NULL);
	return status ? 0 : -EPROTO;
}

int service_status(const struct service *service, struct service_status *ret)
{
	int r = read_status(service, ret);

	return r < 0 ? fail(r, "%s: status: %s", service->dir, strerror(-r)) : 0;
}

int service_audit(const struct service *service, struct service_audit *ret)
{
	Kvg__AdminReply *reply = NULL;
	const Kvg__Audit *audit = NULL;
	int r = ask(service, KVG__ADMIN_REQUEST__BODY_AUDIT, &reply);

	if (!reply)
		return fail(r, "%s: audit: %s", service->dir, strerror(-r));
	if (reply->body_case == KVG__ADMIN_REPLY__BODY_AUDIT)
		audit = reply->audit;
	*ret = (struct service_audit){.clean = audit && audit->clean};
	for (size_t i = 0; audit && i < audit->n_rows; i++) {
		ret->physical += audit->rows[i]->physical;
		ret->charged += audit->rows[i]->charged;
	}
	if (audit && audit->n_differences)
		copy_text(ret->difference, sizeof(ret->difference), audit->differences[0]);
	kvg__admin_reply__free_unpacked(reply, NULL);
	return audit ? 0 : fail(-EPROTO, "%s: audit: not an audit", service->dir);
}

int service_wait_empty(const struct service *service, unsigned limit_ms)
{
	double end = service_seconds() + limit_ms / 1e3;
	struct service_status status;

	for (;;) {
		int r = service_status(service, &status);

		if (r < 0 || (!status.charged && !status.unreturned))
			return r;
		if (service_seconds() > end)
			return fail(-ETIMEDOUT, "after %u ms %llu bytes are charged and %llu unreturned", limit_ms,
				(unsigned long long)status.charged, (unsigned long long)status.unreturned);
		pause_ms(1);
	}
}

/* ---- a daemon of our own ---- */

/* The kvgated beside this program, or in ../sbin. */
static int find_program(char ret[SERVICE_TEXT])
{
	char self[SERVICE_TEXT - 32] = "";
	ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
	char *slash = n > 0 ? strrchr(self, '/') : NULL;

	if (!slash)
		return -ENOENT;
	*slash = '\0';
	(void)snprintf(ret, SERVICE_TEXT, "%s/kvgated", self);
	if (access(ret, X_OK) == 0)
		return 0;
	(void)snprintf(ret, SERVICE_TEXT, "%s/../sbin/kvgated", self);
	return access(ret, X_OK) == 0 ? 0 : -ENOENT;
}

static int write_config(const struct service *service, const char *config)
{
	char path[SERVICE_PATH];
	FILE *file = fopen(service_path(service, "kvgated.conf", path), "we");
	int r;

	if (!file)
		return -errno;
	r = fputs(config, file) < 0 ? -EIO : 0;
	return fclose(file) == 0 ? r : -EIO;
}

static _Noreturn void run_daemon(const struct service *service, const char *program)
{
	char config[SERVICE_PATH], log[SERVICE_PATH];
	const char *argv[] = {
		program, "--config", service_path(service, "kvgated.conf", config), "--state-dir", service->dir, NULL};
	int fd = open(service_path(service, "log", log), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);

	(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (fd >= 0 && dup2(fd, STDOUT_FILENO) >= 0 && dup2(fd, STDERR_FILENO) >= 0)
		(void)execv(program, (char *const *)(uintptr_t)argv);
	_exit(127);
}

static void show_log(const struct service *service)
{
	char path[SERVICE_PATH], line[SERVICE_TEXT];
	FILE *file = fopen(service_path(service, "log", path), "re");

	while (file && fgets(line, sizeof(line), file))
		(void)fprintf(stderr, "| %s", line);
	if (file)
		(void)fclose(file);
}

/* Waits until the daemon answers or ends. */
static int wait_ready(const struct service *service)
{
	double end = service_seconds() + START_SECONDS;
	struct service_status status;

	while (service_seconds() < end) {
		if (waitpid(service->pid, NULL, WNOHANG) == service->pid)
			return -ECHILD;
		if (read_status(service, &status) == 0)
			return 0;
		pause_ms(10);
	}
	return -ETIMEDOUT;
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *at)
{
	(void)st, (void)type, (void)at;
	return remove(path);
}

int service_start(struct service *service, const char *program, const char *config)
{
	char beside[SERVICE_TEXT];
	int r = program ? 0 : find_program(beside);

	*service = (struct service){.dir = "/tmp/kvgate-bench.XXXXXX"};
	if (r < 0)
		return fail(r, "there is no kvgated beside kvgate-bench: name one with --kvgated");
	if (!mkdtemp(service->dir))
		return fail(-errno, "%s: %s", service->dir, strerror(errno));
	r = write_config(service, config);
	if (r < 0)
		return fail(r, "%s: configuration: %s", service->dir, strerror(-r));
	service->pid = fork();
	if (service->pid == 0)
		run_daemon(service, program ? program : beside);
	r = service->pid < 0 ? -errno : wait_ready(service);
	if (r == 0)
		return 0;
	show_log(service);
	if (service->pid > 0 && r != -ECHILD && kill(service->pid, SIGKILL) == 0)
		(void)waitpid(service->pid, NULL, 0);
	(void)nftw(service->dir, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
	return fail(r, "kvgated does not start: %s", strerror(-r));
}

int service_attach(struct service *service, const char *dir)
{
	struct service_status status;

	*service = (struct service){.pid = 0};
	if (snprintf(service->dir, sizeof(service->dir), "%s", dir) > 80)
		return fail(-ENAMETOOLONG, "%s: the path is longer than 80 bytes", dir);
	return service_status(service, &status);
}

int service_stop(struct service *service)
{
	struct pollfd polled = {.events = POLLIN};
	int status = 0;

	if (!service->pid)
		return 0;
	polled.fd = (int)syscall(SYS_pidfd_open, service->pid, 0);
	(void)kill(service->pid, SIGTERM);
	if (polled.fd < 0 || poll(&polled, 1, STOP_MS) != 1)
		(void)kill(service->pid, SIGKILL);
	(void)waitpid(service->pid, &status, 0);
	if (polled.fd >= 0)
		(void)close(polled.fd);
	service->pid = 0;
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		show_log(service);
	(void)nftw(service->dir, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		return fail(-ECHILD, "kvgated ended with wait status 0x%x", (unsigned)status);
	return 0;
}
