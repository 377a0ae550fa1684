#include "tests/stress/observe.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "control.pb-c.h"
#include "proto/frame.h"
#include "tests/support/runner.h"

#define RESCANS 5

static const char *const names[STRESS_TENANTS] = {"a", "b", "c"};

/* ---- asking ---- */

static Kvg__AdminReply *ask(const struct observer *observer, Kvg__AdminRequest *request)
{
	struct pollfd polled = {.fd = observer->fd, .events = POLLIN};
	struct kvg_frame frame;
	uint8_t packet[256];
	Kvg__AdminReply *reply;

	request->id = 1;
	assert_true(kvg__admin_request__get_packed_size(request) <= sizeof(packet));
	assert_int_equal(kvg_frame_send(observer->fd, packet, kvg__admin_request__pack(request, packet), NULL, 0), 0);
	assert_int_equal(poll(&polled, 1, FIXTURE_WAIT_MS), 1);
	assert_int_equal(kvg_frame_receive(observer->fd, KVG_FRAME_LARGE_MAX, 1, 1, &frame), 1);
	reply = kvg__admin_reply__unpack(NULL, frame.size, frame.data);
	assert_non_null(reply);
	kvg_frame_deinit(&frame);
	if (reply->body_case == KVG__ADMIN_REPLY__BODY_ERROR)
		fail_msg("admin: %s", reply->error->text);
	return reply;
}

static Kvg__AdminReply *ask_plain(const struct observer *observer, Kvg__AdminRequest__BodyCase what)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__Empty empty = KVG__EMPTY__INIT;

	request.body_case = what;
	request.status = &empty;
	return ask(observer, &request);
}

static const Kvg__Tenant *tenant_of(const Kvg__AdminReply *reply, unsigned tenant)
{
	assert_int_equal(reply->body_case, KVG__ADMIN_REPLY__BODY_TENANTS);
	for (size_t i = 0; i < reply->tenants->n_tenants; i++)
		if (strcmp(reply->tenants->tenants[i]->name, names[tenant]) == 0)
			return reply->tenants->tenants[i];
	fail_msg("the daemon knows no tenant %s", names[tenant]);
	return NULL;
}

/* ---- the kernel's word ---- */

struct scan {
	unsigned descriptors, extents;
	uint64_t physical;
};

static struct scan scan_daemon(const struct observer *observer)
{
	struct scan scan = {0};
	struct dirent *entry;
	char path[64];
	DIR *dir;

	(void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)observer->fixture->pid);
	dir = opendir(path);
	assert_non_null(dir);
	while ((entry = readdir(dir))) {
		char target[256];
		ssize_t n = readlinkat(dirfd(dir), entry->d_name, target, sizeof(target) - 1);

		if (n <= 0)
			continue;
		target[n] = '\0';
		scan.descriptors++;
		scan.extents += strncmp(target, "/memfd:kvgate-extent", strlen("/memfd:kvgate-extent")) == 0;
	}
	(void)closedir(dir);
	scan.physical = fixture_physical(observer->fixture);
	return scan;
}

/* ---- at the beginning ---- */

static int connect_admin(const struct fixture *fixture)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char path[FIXTURE_PATH];
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	assert_true(fd >= 0);
	assert_true(strlen(fixture_path(fixture, "state/admin.sock", path)) < sizeof(address.sun_path));
	memcpy(address.sun_path, path, strlen(path));
	assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
	return fd;
}

void observer_open(struct observer *observer, const struct fixture *fixture)
{
	struct fixture_usage usage;
	Kvg__AdminReply *reply;
	struct scan scan;

	fixture_usage(fixture, &usage);
	*observer = (struct observer){.fixture = fixture, .pool = usage.pool_size, .fd = connect_admin(fixture)};
	reply = ask_plain(observer, KVG__ADMIN_REQUEST__BODY_TENANTS);
	for (unsigned i = 0; i < STRESS_TENANTS; i++) {
		const Kvg__Tenant *tenant = tenant_of(reply, i);

		observer->max[i] = tenant->device_max;
		observer->min[i] = tenant->device_min;
		assert_true(tenant->device_min > 0);
	}
	kvg__admin_reply__free_unpacked(reply, NULL);
	scan = scan_daemon(observer);
	observer->descriptors = scan.descriptors - scan.extents;
}

void observer_close(struct observer *observer)
{
	(void)close(observer->fd);
	observer->fd = -1;
}

/* ---- at every instant ---- */

static void watch_time(struct observer *observer, uint64_t period_ns)
{
	uint64_t now = stress_now_ns(), gap = observer->last_ns ? now - observer->last_ns : 0;

	observer->last_ns = now;
	observer->samples++;
	observer->late += gap > 2 * period_ns;
	if (gap > observer->longest_gap_ns)
		observer->longest_gap_ns = gap;
}

/* Returns what the pool keeps for the tenant: its use, or its min when that is more. */
static uint64_t look_at(struct observer *observer, const Kvg__Tenant *tenant, unsigned index)
{
	struct observed_tenant *seen = &observer->tenants[index];
	uint64_t used = tenant->charged + tenant->promised;

	if (used > observer->max[index] || tenant->high_water > observer->max[index])
		fail_msg("tenant %s: max %" PRIu64 ", charged %" PRIu64 ", promised %" PRIu64 ", high water %" PRIu64,
			tenant->name, observer->max[index], tenant->charged, tenant->promised, tenant->high_water);
	assert_int_equal(tenant->device_max, observer->max[index]);
	assert_true(tenant->unreturned <= tenant->charged);
	if (used > seen->most_used)
		seen->most_used = used;
	if (tenant->charged > seen->most_charged)
		seen->most_charged = tenant->charged;
	assert_true(tenant->charged <= tenant->high_water);
	seen->high_water = tenant->high_water;
	seen->refusals = tenant->refusals;
	seen->unreturned_samples += tenant->unreturned > 0;
	seen->pressure_samples += tenant->pressure != 0;
	return used > observer->min[index] ? used : observer->min[index];
}

void observer_sample(struct observer *observer, uint64_t period_ns)
{
	Kvg__AdminReply *reply = ask_plain(observer, KVG__ADMIN_REQUEST__BODY_TENANTS);
	uint64_t committed = 0;

	for (unsigned i = 0; i < STRESS_TENANTS; i++)
		committed += look_at(observer, tenant_of(reply, i), i);
	if (committed > observer->pool)
		fail_msg("the pool has %" PRIu64 " bytes, and its tenants %" PRIu64, observer->pool, committed);
	if (committed > observer->most_used)
		observer->most_used = committed;
	kvg__admin_reply__free_unpacked(reply, NULL);
	watch_time(observer, period_ns);
}

/* Extents come and go while the folder is read, so that one too high sum may have counted one twice. */
static void look_at_kernel(struct observer *observer)
{
	uint64_t least = UINT64_MAX;

	for (int i = 0; i < RESCANS && least > observer->pool; i++) {
		uint64_t physical = fixture_physical(observer->fixture);

		least = physical < least ? physical : least;
	}
	if (least > observer->pool)
		fail_msg("the daemon's extents have %" PRIu64 " bytes, the pool %" PRIu64, least, observer->pool);
	if (least > observer->most_physical)
		observer->most_physical = least;
}

/* Returns the bytes that it found. */
static uint64_t look_at_audit(struct observer *observer, const Kvg__Audit *audit)
{
	uint64_t physical = 0;

	for (size_t i = 0; i < audit->n_differences; i++)
		print_error("audit: %s\n", audit->differences[i]);
	assert_int_equal(audit->n_differences, 0);
	assert_true(audit->clean);
	assert_int_equal(audit->n_rows, STRESS_TENANTS);
	for (size_t i = 0; i < audit->n_rows; i++) {
		const Kvg__AuditRow *row = audit->rows[i];

		assert_int_equal(row->extent_bytes, row->charged);
		assert_int_equal(row->physical, row->charged + row->reserved);
		assert_int_equal(row->host_counted, row->host_charged);
		physical += row->physical;
	}
	observer->audits++;
	return physical;
}

uint64_t observer_audit(struct observer *observer)
{
	Kvg__AdminReply *reply = ask_plain(observer, KVG__ADMIN_REQUEST__BODY_AUDIT);
	uint64_t physical;

	assert_int_equal(reply->body_case, KVG__ADMIN_REPLY__BODY_AUDIT);
	physical = look_at_audit(observer, reply->audit);
	kvg__admin_reply__free_unpacked(reply, NULL);
	look_at_kernel(observer);
	return physical;
}

/* ---- at the end ---- */

/* Bytes that stay charged without a worker: published contexts' extents. */
static uint64_t staying(const struct observer *observer, uint64_t *ret_images)
{
	Kvg__AdminReply *reply = ask_plain(observer, KVG__ADMIN_REQUEST__BODY_TENANTS);
	uint64_t bytes = 0;
	bool contexts = false;

	for (unsigned i = 0; i < STRESS_TENANTS; i++)
		contexts |= tenant_of(reply, i)->contexts > 0;
	kvg__admin_reply__free_unpacked(reply, NULL);
	*ret_images = 0;
	if (!contexts)
		return bytes;
	reply = ask_plain(observer, KVG__ADMIN_REQUEST__BODY_CONTEXTS);
	for (size_t i = 0; i < reply->contexts->n_contexts; i++) {
		assert_int_equal(reply->contexts->contexts[i]->attached, 0);
		bytes += reply->contexts->contexts[i]->bytes;
		*ret_images += reply->contexts->contexts[i]->image;
	}
	kvg__admin_reply__free_unpacked(reply, NULL);
	return bytes;
}

/* physical: what the daemon's books say that its memory has. */
static void assert_nothing_else(const struct observer *observer, uint64_t images, uint64_t physical)
{
	Kvg__AdminReply *reply = ask_plain(observer, KVG__ADMIN_REQUEST__BODY_STATUS);
	struct scan scan = scan_daemon(observer);

	assert_int_equal(reply->status->promised, 0);
	assert_int_equal(reply->status->unreturned, 0);
	assert_int_equal(reply->status->workers, 0);
	assert_int_equal(reply->status->sequences, 0);
	assert_int_equal(reply->status->host_charged, images);
	assert_int_equal(scan.physical, physical);
	if (scan.descriptors - scan.extents != observer->descriptors)
		fail_msg("the daemon had %u descriptors besides extents, and has %u", observer->descriptors,
			scan.descriptors - scan.extents);
	kvg__admin_reply__free_unpacked(reply, NULL);
}

/* What a tenant does not use of its min is created again in the background. */
static void wait_for_min(struct observer *observer)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;

	while (observer_audit(observer) != fixture_physical(observer->fixture) ||
		observer_audit(observer) < observer->min[0] + observer->min[1] + observer->min[2])
		assert_true(fixture_now_ms() < deadline);
}

void observer_end(struct observer *observer)
{
	uint64_t images, stays = staying(observer, &images);

	assert_true(fixture_wait_gone(observer->fixture, 0, stays, FIXTURE_WAIT_MS));
	wait_for_min(observer);
	assert_nothing_else(observer, images, observer_audit(observer));
}
