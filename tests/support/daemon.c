#include "tests/support/daemon.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <inttypes.h>
#include <limits.h>
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
#include "tests/support/runner.h"

uint64_t fixture_now_ms(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

const char *fixture_program(void)
{
	const char *program = getenv("KVG_KVGATED");

	return program ? program : KVG_BIN_KVGATED;
}

const char *fixture_path(const struct fixture *fixture, const char *name, char ret[FIXTURE_PATH])
{
	int n = snprintf(ret, FIXTURE_PATH, "%s/%s", fixture->dir, name);

	assert_in_range(n, 1, FIXTURE_PATH - 1);
	return ret;
}

static void make_address(const struct fixture *fixture, const char *name, struct sockaddr_un *ret)
{
	int n;

	*ret = (struct sockaddr_un){.sun_family = AF_UNIX};
	n = snprintf(ret->sun_path, sizeof(ret->sun_path), "%s/%s", fixture->dir, name);
	assert_in_range(n, 1, sizeof(ret->sun_path) - 1);
}

/* ---- the process ---- */

void fixture_prepare(struct fixture *fixture, const char *config)
{
	const char *tmp = getenv("TMPDIR");
	char path[FIXTURE_PATH];
	int n;
	FILE *file;

	*fixture = (struct fixture){.notify = -1};
	n = snprintf(fixture->dir, sizeof(fixture->dir), "%s/kvg.XXXXXX", tmp && *tmp ? tmp : "/tmp");
	assert_in_range(n, 1, sizeof(fixture->dir) - 1);
	assert_non_null(mkdtemp(fixture->dir));
	assert_int_equal(mkdir(fixture_path(fixture, "state", path), 0700), 0);
	file = fopen(fixture_path(fixture, "kvgated.conf", path), "we");
	assert_non_null(file);
	assert_true(fputs(config, file) >= 0);
	assert_int_equal(fclose(file), 0);
}

static void open_notify(struct fixture *fixture)
{
	struct sockaddr_un address;

	make_address(fixture, "notify", &address);
	(void)unlink(address.sun_path);
	fixture->notify = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	assert_true(fixture->notify >= 0);
	assert_int_equal(bind(fixture->notify, (struct sockaddr *)&address, sizeof(address)), 0);
	assert_int_equal(chmod(address.sun_path, 0666), 0);
}

static void hand_over(const struct fixture *fixture)
{
	char path[FIXTURE_PATH];

	assert_int_equal(chown(fixture->dir, fixture->uid, fixture->uid), 0);
	assert_int_equal(chown(fixture_path(fixture, "state", path), fixture->uid, fixture->uid), 0);
	assert_int_equal(chown(fixture_path(fixture, "kvgated.conf", path), fixture->uid, fixture->uid), 0);
}

const char *const *fixture_obedience(void)
{
	static const char *const root[] = {"setpriv", "--bounding-set", "-dac_override", NULL};

	return geteuid() == 0 ? root : root + 3;
}

static _Noreturn void exec_obedient(const char *const *argv)
{
	const char *all[12];
	size_t n = 0;

	for (const char *const *word = fixture_obedience(); *word; word++)
		all[n++] = *word;
	for (; *argv; argv++)
		all[n++] = *argv;
	all[n] = NULL;
	(void)execvp(all[0], (char *const *)(uintptr_t)all);
	_exit(127);
}

static _Noreturn void run_daemon(const struct fixture *fixture)
{
	char config[FIXTURE_PATH], state[FIXTURE_PATH], log[FIXTURE_PATH], notify[FIXTURE_PATH], uid[32];
	const char *argv[] = {"setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--pdeathsig", "KILL",
		fixture_program(), "--config", config, "--state-dir", state, NULL};
	int fd = open(fixture_path(fixture, "log", log), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);

	if (fd < 0 || dup2(fd, STDOUT_FILENO) < 0 || dup2(fd, STDERR_FILENO) < 0)
		_exit(126);
	(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
	(void)setenv("NOTIFY_SOCKET", fixture_path(fixture, "notify", notify), 1);
	(void)snprintf(uid, sizeof(uid), "%u", fixture->uid);
	(void)fixture_path(fixture, "kvgated.conf", config);
	(void)fixture_path(fixture, "state", state);
	if (fixture->obedient)
		exec_obedient(argv + 8);
	if (fixture->uid)
		(void)execvp(argv[0], (char *const *)(uintptr_t)argv);
	else
		(void)execv(fixture_program(), (char *const *)(uintptr_t)(argv + 8));
	_exit(127);
}

static void show_log(const struct fixture *fixture)
{
	char path[FIXTURE_PATH], line[512];
	FILE *file = fopen(fixture_path(fixture, "log", path), "re");

	while (file && fgets(line, sizeof(line), file))
		print_error("| %s", line);
	if (file)
		(void)fclose(file);
}

/* Whether one of the lines of the next notification starts with word; false when there is none. */
static bool next_notification(const struct fixture *fixture, const char *word)
{
	char text[4096];
	ssize_t n = recv(fixture->notify, text, sizeof(text) - 1, MSG_DONTWAIT);

	if (n <= 0)
		return false;
	text[n] = '\0';
	for (char *rest = text, *line; (line = strsep(&rest, "\n"));)
		if (strncmp(line, word, strlen(word)) == 0)
			return true;
	return false;
}

/* Waits for a notification with that word; false when the daemon ends or the time does first. */
static bool wait_notification(const struct fixture *fixture, const char *word, int pidfd)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;
	struct pollfd polled[2] = {{.fd = fixture->notify, .events = POLLIN}, {.fd = pidfd, .events = POLLIN}};

	while (fixture_now_ms() < deadline) {
		if (poll(polled, 2, (int)(deadline - fixture_now_ms())) <= 0)
			continue;
		if (next_notification(fixture, word))
			return true;
		if (!(polled[0].revents & POLLIN) && polled[1].revents)
			return false;
	}
	return false;
}

void fixture_begin(struct fixture *fixture)
{
	int pidfd;
	bool ready;

	assert_int_equal(fixture->pid, 0);
	open_notify(fixture);
	if (fixture->uid)
		hand_over(fixture);
	fixture->pid = fork();
	assert_true(fixture->pid >= 0);
	if (fixture->pid == 0)
		run_daemon(fixture);
	pidfd = (int)syscall(SYS_pidfd_open, fixture->pid, 0);
	assert_true(pidfd >= 0);
	ready = wait_notification(fixture, "READY=1", pidfd);
	(void)close(pidfd);
	if (ready)
		return;
	show_log(fixture);
	fail_msg("%s: not ready within %d ms", fixture_program(), FIXTURE_WAIT_MS);
}

void fixture_end(struct fixture *fixture)
{
	int status = 0, pidfd = (int)syscall(SYS_pidfd_open, fixture->pid, 0);
	struct pollfd polled = {.fd = pidfd, .events = POLLIN};
	bool said;

	assert_true(pidfd >= 0);
	assert_int_equal(kill(fixture->pid, SIGTERM), 0);
	said = wait_notification(fixture, "STOPPING=1", pidfd);
	if (poll(&polled, 1, FIXTURE_WAIT_MS) != 1)
		(void)kill(fixture->pid, SIGKILL);
	assert_int_equal(waitpid(fixture->pid, &status, 0), fixture->pid);
	(void)close(pidfd);
	(void)close(fixture->notify);
	fixture->pid = 0;
	fixture->notify = -1;
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
		show_log(fixture);
		fail_msg("kvgated: wait status 0x%x after SIGTERM", (unsigned)status);
	}
	assert_true(said);
}

void fixture_start(struct fixture *fixture, const char *config)
{
	fixture_prepare(fixture, config);
	fixture_begin(fixture);
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *at)
{
	(void)st, (void)type, (void)at;
	return remove(path);
}

void fixture_remove(struct fixture *fixture)
{
	assert_int_equal(nftw(fixture->dir, remove_entry, 8, FTW_DEPTH | FTW_PHYS), 0);
	fixture->dir[0] = '\0';
}

void fixture_stop(struct fixture *fixture)
{
	if (fixture->pid)
		fixture_end(fixture);
	fixture_remove(fixture);
}

void fixture_status_text(const struct fixture *fixture, char *ret, size_t size)
{
	char text[4096];
	ssize_t n;

	*ret = '\0';
	while ((n = recv(fixture->notify, text, sizeof(text) - 1, MSG_DONTWAIT)) > 0) {
		text[n] = '\0';
		for (char *rest = text, *line; (line = strsep(&rest, "\n"));)
			if (strncmp(line, "STATUS=", 7) == 0)
				(void)snprintf(ret, size, "%s", line + 7);
	}
}

/* ---- the admin socket ---- */

/* One exchange on a connection of its own. The caller frees the reply. */
static Kvg__AdminReply *exchange(const struct fixture *fixture, Kvg__AdminRequest *request)
{
	struct sockaddr_un address;
	struct kvg_frame frame;
	uint8_t packet[4096];
	size_t size;
	struct pollfd polled = {.events = POLLIN};
	Kvg__AdminReply *reply;

	make_address(fixture, "state/admin.sock", &address);
	polled.fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	assert_true(polled.fd >= 0);
	assert_int_equal(connect(polled.fd, (struct sockaddr *)&address, sizeof(address)), 0);
	request->id = 7;
	assert_true(kvg__admin_request__get_packed_size(request) <= sizeof(packet));
	size = kvg__admin_request__pack(request, packet);
	assert_int_equal(kvg_frame_send(polled.fd, packet, size, NULL, 0), 0);
	assert_int_equal(poll(&polled, 1, FIXTURE_WAIT_MS), 1);
	assert_int_equal(kvg_frame_receive(polled.fd, KVG_FRAME_LARGE_MAX, 1, 1, &frame), 1);
	reply = kvg__admin_reply__unpack(NULL, frame.size, frame.data);
	assert_non_null(reply);
	assert_int_equal(reply->id, 7);
	kvg_frame_deinit(&frame);
	(void)close(polled.fd);
	return reply;
}

static Kvg__AdminReply *ask(const struct fixture *fixture, Kvg__AdminRequest__BodyCase what)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__Empty empty = KVG__EMPTY__INIT;
	Kvg__AdminReply *reply;

	request.body_case = what;
	request.status = &empty;
	reply = exchange(fixture, &request);
	if (reply->body_case == KVG__ADMIN_REPLY__BODY_ERROR)
		fail_msg("admin: %s", reply->error->text);
	return reply;
}

void fixture_usage(const struct fixture *fixture, struct fixture_usage *ret)
{
	Kvg__AdminReply *reply = ask(fixture, KVG__ADMIN_REQUEST__BODY_STATUS);
	const Kvg__Status *status = reply->status;

	assert_int_equal(reply->body_case, KVG__ADMIN_REPLY__BODY_STATUS);
	*ret = (struct fixture_usage){
		.extent_size = status->extent_size,
		.pool_size = status->pool_size,
		.charged = status->charged,
		.promised = status->promised,
		.unreturned = status->unreturned,
		.overhead = status->overhead,
		.extents = status->extents,
		.reserved = status->reserved,
		.host_charged = status->host_charged,
		.workers = status->workers,
		.sequences = status->sequences,
	};
	kvg__admin_reply__free_unpacked(reply, NULL);
}

void fixture_tenant(const struct fixture *fixture, const char *tenant, struct fixture_usage *ret)
{
	Kvg__AdminReply *reply = ask(fixture, KVG__ADMIN_REQUEST__BODY_TENANTS);
	const Kvg__Tenant *found = NULL;

	assert_int_equal(reply->body_case, KVG__ADMIN_REPLY__BODY_TENANTS);
	for (size_t i = 0; i < reply->tenants->n_tenants; i++)
		if (strcmp(reply->tenants->tenants[i]->name, tenant) == 0)
			found = reply->tenants->tenants[i];
	if (!found) {
		fail_msg("the daemon knows no tenant %s", tenant);
		return;
	}
	*ret = (struct fixture_usage){
		.device_max = found->device_max,
		.charged = found->charged,
		.promised = found->promised,
		.unreturned = found->unreturned,
		.high_water = found->high_water,
		.refusals = found->refusals,
		.device_min = found->device_min,
		.device_high = found->device_high,
		.reserved = found->reserved,
		.host_min = found->host_min,
		.host_high = found->host_high,
		.host_max = found->host_max,
		.host_charged = found->host_charged,
		.pressure = found->pressure,
		.workers = found->workers,
		.sequences = found->sequences,
	};
	kvg__admin_reply__free_unpacked(reply, NULL);
}

void fixture_audit(const struct fixture *fixture)
{
	Kvg__AdminReply *reply = ask(fixture, KVG__ADMIN_REQUEST__BODY_AUDIT);
	const Kvg__Audit *audit = reply->audit;
	uint64_t physical = 0;

	assert_int_equal(reply->body_case, KVG__ADMIN_REPLY__BODY_AUDIT);
	for (size_t i = 0; i < audit->n_differences; i++)
		print_error("audit: %s\n", audit->differences[i]);
	assert_int_equal(audit->n_differences, 0);
	assert_true(audit->clean);
	assert_true(audit->n_rows > 0);
	for (size_t i = 0; i < audit->n_rows; i++) {
		const Kvg__AuditRow *row = audit->rows[i];

		assert_int_equal(row->extent_bytes, row->charged);
		assert_int_equal(row->physical, row->charged + row->reserved);
		physical += row->physical;
	}
	assert_int_equal(physical, fixture_physical(fixture));
	kvg__admin_reply__free_unpacked(reply, NULL);
}

/* A request that is answered with the tenant's budget, or refused. */
static int ask_budget(
	const struct fixture *fixture, Kvg__AdminRequest *request, const char *tenant, char *text, bool *ret_live)
{
	Kvg__AdminReply *reply = exchange(fixture, request);
	int r = 0;

	if (reply->body_case == KVG__ADMIN_REPLY__BODY_ERROR) {
		r = reply->error->status;
		assert_true(r < 0);
		(void)snprintf(text, FIXTURE_TEXT, "%s", reply->error->text);
	} else {
		assert_int_equal(reply->body_case, KVG__ADMIN_REPLY__BODY_BUDGET);
		assert_string_equal(reply->budget->tenant, tenant);
		*ret_live = reply->budget->live;
	}
	kvg__admin_reply__free_unpacked(reply, NULL);
	return r;
}

int fixture_budget_change(
	const struct fixture *fixture, const char *tenant, const char *key, uint64_t bytes, char *text)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__BudgetSet set = KVG__BUDGET_SET__INIT;
	struct {
		const char *key;
		protobuf_c_boolean *has;
		uint64_t *bytes;
	} fields[] = {
		{"device.min", &set.has_device_min, &set.device_min},
		{"device.high", &set.has_device_high, &set.device_high},
		{"device.max", &set.has_device_max, &set.device_max},
		{"host.min", &set.has_host_min, &set.host_min},
		{"host.high", &set.has_host_high, &set.host_high},
		{"host.max", &set.has_host_max, &set.host_max},
	};
	bool live;

	set.tenant = (char *)(uintptr_t)tenant;
	for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); i++) {
		if (strcmp(fields[i].key, key) != 0)
			continue;
		*fields[i].has = 1;
		*fields[i].bytes = bytes;
	}
	request.body_case = KVG__ADMIN_REQUEST__BODY_BUDGET_SET;
	request.budget_set = &set;
	return ask_budget(fixture, &request, tenant, text, &live);
}

int fixture_budget_set(const struct fixture *fixture, const char *tenant, uint64_t device_max, char *text)
{
	struct fixture_usage usage;
	int r = fixture_budget_change(fixture, tenant, "device.max", device_max, text);

	if (r == 0) {
		fixture_tenant(fixture, tenant, &usage);
		assert_int_equal(usage.device_max, device_max);
	}
	return r;
}

int fixture_budget_reset(const struct fixture *fixture, const char *tenant, char *text)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__BudgetKey key = KVG__BUDGET_KEY__INIT;
	bool live = false;
	int r;

	key.tenant = (char *)(uintptr_t)tenant;
	request.body_case = KVG__ADMIN_REQUEST__BODY_BUDGET_RESET;
	request.budget_reset = &key;
	r = ask_budget(fixture, &request, tenant, text, &live);
	assert_true(r < 0 || !live);
	return r;
}

bool fixture_budget_is_live(const struct fixture *fixture, const char *tenant)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__BudgetKey key = KVG__BUDGET_KEY__INIT;
	char text[FIXTURE_TEXT];
	bool live = false;

	key.tenant = (char *)(uintptr_t)tenant;
	request.body_case = KVG__ADMIN_REQUEST__BODY_BUDGET_GET;
	request.budget_get = &key;
	if (ask_budget(fixture, &request, tenant, text, &live) < 0)
		fail_msg("%s", text);
	return live;
}

uint32_t fixture_reclaim(const struct fixture *fixture, const char *tenant)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__Reclaim reclaim = KVG__RECLAIM__INIT;
	Kvg__AdminReply *reply;
	uint32_t contexts;

	reclaim.tenant = (char *)(uintptr_t)tenant;
	request.body_case = KVG__ADMIN_REQUEST__BODY_RECLAIM;
	request.reclaim = &reclaim;
	reply = exchange(fixture, &request);
	assert_int_equal(reply->body_case, KVG__ADMIN_REPLY__BODY_RECLAIMED);
	contexts = reply->reclaimed->contexts;
	kvg__admin_reply__free_unpacked(reply, NULL);
	return contexts;
}

bool fixture_find_context(const struct fixture *fixture, const char *tenant, uint64_t id, struct fixture_context *ret)
{
	Kvg__AdminReply *reply = ask(fixture, KVG__ADMIN_REQUEST__BODY_CONTEXTS);
	const Kvg__ContextList *list = reply->contexts;
	bool found = false;

	assert_int_equal(reply->body_case, KVG__ADMIN_REPLY__BODY_CONTEXTS);
	for (size_t i = 0; i < list->n_contexts && !found; i++) {
		const Kvg__Context *at = list->contexts[i];

		if (at->id != id || strcmp(at->tenant, tenant) != 0)
			continue;
		*ret = (struct fixture_context){
			.bytes = at->bytes, .image = at->image, .attached = at->attached, .workers = at->workers};
		(void)snprintf(ret->state, sizeof(ret->state), "%s", at->state);
		found = true;
	}
	kvg__admin_reply__free_unpacked(reply, NULL);
	return found;
}

void fixture_wait_reserved(const struct fixture *fixture, const char *tenant, uint64_t bytes)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;
	struct fixture_usage usage = {0};

	do {
		fixture_tenant(fixture, tenant, &usage);
		if (usage.reserved == bytes)
			return;
	} while (fixture_now_ms() < deadline);
	fail_msg("tenant %s: %" PRIu64 " bytes reserved, expected %" PRIu64, tenant, usage.reserved, bytes);
}

bool fixture_wait_gone(const struct fixture *fixture, uint32_t workers, uint64_t charged, unsigned limit_ms)
{
	uint64_t deadline = fixture_now_ms() + limit_ms;
	struct fixture_usage usage;

	do {
		fixture_usage(fixture, &usage);
		if (usage.workers <= workers && usage.charged <= charged && usage.unreturned == 0)
			return true;
	} while (fixture_now_ms() < deadline);
	print_error("after %u ms: %u workers, %" PRIu64 " bytes charged, %" PRIu64 " unreturned; expected %u, %" PRIu64
		    ", 0\n",
		limit_ms, usage.workers, usage.charged, usage.unreturned, workers, charged);
	return false;
}

bool fixture_wait_charged(const struct fixture *fixture, uint64_t charged, unsigned limit_ms)
{
	return fixture_wait_gone(fixture, UINT32_MAX, charged, limit_ms);
}

/* ---- from outside ---- */

uint64_t fixture_physical(const struct fixture *fixture)
{
	char path[64];
	uint64_t sum = 0;
	DIR *dir;
	struct dirent *entry;

	(void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)fixture->pid);
	dir = opendir(path);
	assert_non_null(dir);
	while ((entry = readdir(dir))) {
		char target[256];
		struct stat st;
		ssize_t n = readlinkat(dirfd(dir), entry->d_name, target, sizeof(target) - 1);

		if (n <= 0)
			continue;
		target[n] = '\0';
		if (strncmp(target, "/memfd:kvgate-extent", strlen("/memfd:kvgate-extent")) == 0 &&
			fstatat(dirfd(dir), entry->d_name, &st, 0) == 0)
			sum += (uint64_t)st.st_blocks * 512;
	}
	(void)closedir(dir);
	return sum;
}

void fixture_wait_physical(const struct fixture *fixture, uint64_t bytes)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;

	while (fixture_physical(fixture) != bytes && fixture_now_ms() < deadline)
		;
	assert_int_equal(fixture_physical(fixture), bytes);
}
