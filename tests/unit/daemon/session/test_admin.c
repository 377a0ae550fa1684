/* What the operator sees and may change. */
#include "tests/support/session_fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct scene {
	struct session *session;
	struct session_peer *client, *worker;
	Kvg__AdminReply *reply;
	uint64_t handle;
};

static int setup(void **state)
{
	struct scene *scene = calloc(1, sizeof(*scene));
	struct kvg_sqe sqe = {.op = KVG_OP_CREATE, .create.context_tokens = 1024};

	if (!scene)
		return -1;
	scene->session = session_new();
	scene->client = session_connect_admin(scene->session);
	scene->worker = session_connect(scene->session, 0);
	session_hello(scene->worker);
	session_register(scene->worker);
	session_submit(scene->worker, &sqe);
	scene->handle = session_reap(scene->worker).seq;
	sqe = (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = scene->handle, .reserve.tokens = 128};
	session_submit(scene->worker, &sqe);
	assert_int_equal(session_reap(scene->worker).status, 0);
	*state = scene;
	return 0;
}

static int teardown(void **state)
{
	struct scene *scene = *state;

	if (scene->reply)
		kvg__admin_reply__free_unpacked(scene->reply, NULL);
	session_peer_free(scene->worker);
	session_peer_free(scene->client);
	session_free(scene->session);
	free(scene);
	return 0;
}

static void tell(struct scene *scene, Kvg__AdminRequest *request)
{
	uint8_t data[1024];
	size_t size;

	request->id = ++scene->client->next_id;
	size = kvg__admin_request__get_packed_size(request);
	assert_true(size <= sizeof(data));
	(void)kvg__admin_request__pack(request, data);
	assert_int_equal(kvg_frame_send(scene->client->fd, data, size, NULL, 0), 0);
}

static Kvg__AdminReply *ask(struct scene *scene, Kvg__AdminRequest *request)
{
	tell(scene, request);
	assert_true(session_receive(scene->client));
	if (scene->reply)
		kvg__admin_reply__free_unpacked(scene->reply, NULL);
	scene->reply = kvg__admin_reply__unpack(NULL, scene->client->frame.size, scene->client->frame.data);
	assert_non_null(scene->reply);
	assert_int_equal(scene->reply->id, request->id);
	return scene->reply;
}

/* All requests without content. */
static Kvg__AdminReply *ask_plain(struct scene *scene, Kvg__AdminRequest__BodyCase what)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__Empty empty = KVG__EMPTY__INIT;

	request.body_case = what;
	request.status = &empty;
	return ask(scene, &request);
}

static Kvg__AdminReply *ask_budget(struct scene *scene, const char *tenant, const uint64_t *device_max)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__BudgetKey key = KVG__BUDGET_KEY__INIT;
	Kvg__BudgetSet set = KVG__BUDGET_SET__INIT;

	key.tenant = set.tenant = (char *)(uintptr_t)tenant;
	if (device_max) {
		set.has_device_max = 1;
		set.device_max = *device_max;
		request.body_case = KVG__ADMIN_REQUEST__BODY_BUDGET_SET;
		request.budget_set = &set;
	} else {
		request.body_case = KVG__ADMIN_REQUEST__BODY_BUDGET_GET;
		request.budget_get = &key;
	}
	return ask(scene, &request);
}

static void test_status(void **state)
{
	struct scene *scene = *state;
	const Kvg__Status *status = ask_plain(scene, KVG__ADMIN_REQUEST__BODY_STATUS)->status;

	assert_int_equal(scene->reply->body_case, KVG__ADMIN_REPLY__BODY_STATUS);
	assert_int_equal(status->pid, getpid());
	assert_string_equal(status->version, KVG_VERSION);
	assert_string_equal(status->kind, "host");
	assert_string_equal(status->state_dir, "/state");
	assert_int_equal(status->extent_size, SESSION_EXTENT);
	assert_int_equal(status->pool_size, 16 * SESSION_EXTENT);
	assert_int_equal(status->charged, SESSION_EXTENT);
	assert_int_equal(status->promised, SESSION_EXTENT);
	assert_int_equal(status->unreturned, 0);
	assert_true(status->overhead > 0);
	assert_int_equal(status->extents, 1);
	assert_int_equal(status->workers, 1);
	assert_int_equal(status->sequences, 1);
}

static const struct kind_device device = {
	.name = "A GPU (0000:01:00.0)", .driver = "1.2, CUDA 13.0", .mps = true, .total = UINT64_C(80) << 30};
static int usage_status;
static unsigned usage_calls;

static const struct kind_device *some_about(struct kind *kind)
{
	(void)kind;
	return &device;
}

static int some_usage(struct kind *kind, uint64_t *ret_bytes)
{
	(void)kind;
	usage_calls++;
	*ret_bytes = UINT64_C(7) << 30;
	return usage_status;
}

/* The pool's kind gets a device, of which the executor asks how much is in use. */
static void with_device(struct scene *scene, struct kind_ops *ops)
{
	struct kind *kind = scene->session->kind;

	assert_false(ask_plain(scene, KVG__ADMIN_REQUEST__BODY_STATUS)->status->has_device_used);
	*ops = *kind->ops;
	ops->about = some_about;
	ops->usage = some_usage;
	kind->ops = ops;
	scene->session->server.isolation = "shared";
	usage_status = 0;
	usage_calls = 0;
}

static void test_status_of_a_device(void **state)
{
	struct scene *scene = *state;
	const struct kind_ops *before = scene->session->kind->ops;
	struct kind_ops ops;
	const Kvg__Status *status;

	with_device(scene, &ops);
	status = ask_plain(scene, KVG__ADMIN_REQUEST__BODY_STATUS)->status;
	assert_string_equal(status->device, "A GPU (0000:01:00.0)");
	assert_string_equal(status->driver, "1.2, CUDA 13.0");
	assert_string_equal(status->isolation, "shared");
	assert_true(status->has_mps && status->mps);
	assert_true(status->has_device_total && status->has_device_used);
	assert_int_equal(status->device_total, UINT64_C(80) << 30);
	assert_int_equal(status->device_used, UINT64_C(7) << 30);
	assert_int_equal(usage_calls, 1);
	usage_status = -EIO;
	status = ask_plain(scene, KVG__ADMIN_REQUEST__BODY_STATUS)->status;
	assert_true(status->has_device_total);
	assert_false(status->has_device_used);
	assert_int_equal(usage_calls, 2);
	scene->session->kind->ops = before;
}

/* An operator who goes before the device has answered, and one who asks twice. */
static void test_status_of_a_device_unread(void **state)
{
	struct scene *scene = *state;
	const struct kind_ops *before = scene->session->kind->ops;
	struct kind_ops ops;
	struct session_peer *leaver = session_connect_admin(scene->session);
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__Empty empty = KVG__EMPTY__INIT;
	uint8_t data[64];
	size_t size;

	with_device(scene, &ops);
	request.body_case = KVG__ADMIN_REQUEST__BODY_STATUS;
	request.status = &empty;
	size = kvg__admin_request__pack(&request, data);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(kvg_frame_send(leaver->fd, data, size, NULL, 0), 0);
	session_peer_free(leaver);
	assert_int_equal(kvg_frame_send(scene->client->fd, data, size, NULL, 0), 0);
	assert_true(session_receive(scene->client));
	assert_int_equal(ask_plain(scene, KVG__ADMIN_REQUEST__BODY_STATUS)->status->device_used, UINT64_C(7) << 30);
	scene->session->kind->ops = before;
}

static void test_lists(void **state)
{
	struct scene *scene = *state;
	const Kvg__TenantList *tenants = ask_plain(scene, KVG__ADMIN_REQUEST__BODY_TENANTS)->tenants;
	const Kvg__WorkerList *workers;
	const Kvg__SequenceList *sequences;

	assert_int_equal(tenants->n_tenants, 2);
	assert_string_equal(tenants->tenants[0]->name, "a");
	assert_string_equal(tenants->tenants[0]->socket, "/nowhere");
	assert_int_equal(tenants->tenants[0]->device_max, SESSION_BUDGET);
	assert_int_equal(tenants->tenants[0]->charged, SESSION_EXTENT);
	assert_int_equal(tenants->tenants[0]->high_water, SESSION_EXTENT);
	assert_int_equal(tenants->tenants[0]->sequences, 1);
	assert_int_equal(tenants->tenants[1]->workers, 0);
	workers = ask_plain(scene, KVG__ADMIN_REQUEST__BODY_WORKERS)->workers;
	assert_int_equal(workers->n_workers, 1);
	assert_string_equal(workers->workers[0]->name, "test");
	assert_string_equal(workers->workers[0]->tenant, "a");
	assert_string_equal(workers->workers[0]->model, "model");
	assert_int_equal(workers->workers[0]->pid, getpid());
	assert_int_equal(workers->workers[0]->blocks, 32);
	assert_int_equal(workers->workers[0]->charged, SESSION_EXTENT);
	assert_int_equal(workers->workers[0]->submitted, 2);
	sequences = ask_plain(scene, KVG__ADMIN_REQUEST__BODY_SEQUENCES)->sequences;
	assert_int_equal(sequences->n_sequences, 1);
	assert_int_equal(sequences->sequences[0]->seq, scene->handle);
	assert_int_equal(sequences->sequences[0]->reserved_pos, 128);
	assert_int_equal(sequences->sequences[0]->blocks, 32);
	assert_int_equal(sequences->sequences[0]->bytes, 32 * 512);
}

/* Hundreds of workers: the reply is larger than a packet. */
static void test_large_list(void **state)
{
	struct scene *scene = *state;
	struct session_peer *peers[1000];

	for (unsigned i = 0; i < 1000; i++)
		peers[i] = session_connect(scene->session, 1);
	assert_int_equal(ask_plain(scene, KVG__ADMIN_REQUEST__BODY_WORKERS)->workers->n_workers, 1001);
	assert_string_equal(scene->reply->workers->workers[1000]->model, "");
	for (unsigned i = 0; i < 1000; i++)
		session_peer_free(peers[i]);
}

static void test_audit(void **state)
{
	struct scene *scene = *state;
	struct quota_account *account = scene->session->server.tenants[1]->quota.account;

	assert_true(ask_plain(scene, KVG__ADMIN_REQUEST__BODY_AUDIT)->audit->clean);
	assert_int_equal(scene->reply->audit->n_rows, 2);
	assert_int_equal(scene->reply->audit->rows[0]->blocks, 32);
	assert_int_equal(scene->reply->audit->rows[0]->physical, SESSION_EXTENT);
	account->charged += 5;
	assert_false(ask_plain(scene, KVG__ADMIN_REQUEST__BODY_AUDIT)->audit->clean);
	assert_int_equal(scene->reply->audit->n_differences, 2); /* and what the pool has given away */
	assert_string_equal(scene->reply->audit->differences[0], "b: bytes charged counted 0, the account says 5");
	account->charged -= 5;
}

static void test_budget(void **state)
{
	struct scene *scene = *state;
	uint64_t most = 16 * SESSION_EXTENT, more = most + 1, none = 0;

	assert_int_equal(ask_budget(scene, "a", NULL)->budget->device_max, SESSION_BUDGET);
	assert_int_equal(scene->reply->budget->charged, SESSION_EXTENT);
	assert_int_equal(ask_budget(scene, "a", &most)->budget->device_max, most);
	assert_int_equal(scene->session->server.tenants[0]->quota.account->max, most);
	assert_int_equal(ask_budget(scene, "a", &more)->body_case, KVG__ADMIN_REPLY__BODY_ERROR);
	assert_int_equal(scene->reply->error->status, -EINVAL);
	assert_string_equal(scene->reply->error->text, "tenant a: device.max 1.0 MiB is more than the pool's 1.0 MiB");
	assert_int_equal(ask_budget(scene, "c", NULL)->error->status, -ENOENT);
	assert_string_equal(scene->reply->error->text, "tenant c: there is no such tenant");
	assert_int_equal(ask_budget(scene, "a", &none)->budget->device_max, 0);
}

static Kvg__AdminReply *reset_budget(struct scene *scene, const char *tenant)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__BudgetKey key = KVG__BUDGET_KEY__INIT;

	key.tenant = (char *)(uintptr_t)tenant;
	request.body_case = KVG__ADMIN_REQUEST__BODY_BUDGET_RESET;
	request.budget_reset = &key;
	return ask(scene, &request);
}

/* What is not named stays; all go back together. */
static void test_budget_of_several_values(void **state)
{
	struct scene *scene = *state;
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__BudgetSet set = KVG__BUDGET_SET__INIT;
	const Kvg__Budget *budget = ask_budget(scene, "b", NULL)->budget;

	assert_true(budget->has_live && !budget->live);
	assert_false(budget->has_device_high || budget->has_host_high);
	assert_true(budget->has_device_min && budget->has_host_max && budget->has_unreturned);
	set.tenant = (char *)(uintptr_t) "b";
	set.has_device_min = set.has_device_high = true;
	set.device_min = SESSION_EXTENT;
	set.device_high = 2 * SESSION_EXTENT;
	request.body_case = KVG__ADMIN_REQUEST__BODY_BUDGET_SET;
	request.budget_set = &set;
	budget = ask(scene, &request)->budget;
	assert_int_equal(scene->reply->body_case, KVG__ADMIN_REPLY__BODY_BUDGET);
	assert_int_equal(budget->device_min, SESSION_EXTENT);
	assert_int_equal(budget->device_high, 2 * SESSION_EXTENT);
	assert_int_equal(budget->device_max, SESSION_BUDGET);
	assert_true(budget->live);
	while (!ask_plain(scene, KVG__ADMIN_REQUEST__BODY_TENANTS)->tenants->tenants[1]->reserved)
		; /* its min is being created */
	assert_int_equal(scene->reply->tenants->tenants[1]->reserved, SESSION_EXTENT);
	assert_int_equal(scene->reply->tenants->tenants[1]->device_min, SESSION_EXTENT);
	assert_int_equal(ask_plain(scene, KVG__ADMIN_REQUEST__BODY_STATUS)->status->reserved, SESSION_EXTENT);
	assert_true(ask_plain(scene, KVG__ADMIN_REQUEST__BODY_AUDIT)->audit->clean);
	assert_int_equal(scene->reply->audit->rows[1]->reserved, SESSION_EXTENT);
	assert_int_equal(scene->reply->audit->rows[1]->physical, SESSION_EXTENT);
	set.has_device_high = false;
	set.device_min = 3 * SESSION_EXTENT;
	assert_int_equal(ask(scene, &request)->error->status, -EINVAL);
	assert_string_equal(scene->reply->error->text, "tenant b: device.high 128.0 KiB is less than min, 192.0 KiB");
	assert_int_equal(reset_budget(scene, "c")->error->status, -ENOENT);
	budget = reset_budget(scene, "b")->budget;
	assert_int_equal(budget->device_min, 0);
	assert_false(budget->has_device_high || budget->live);
	assert_int_equal(ask_plain(scene, KVG__ADMIN_REQUEST__BODY_STATUS)->status->reserved, 0);
}

/* A lowered budget refuses at once; raised again it grants. */
static void test_budget_is_exact(void **state)
{
	struct scene *scene = *state;
	uint64_t tight = 2 * SESSION_EXTENT;
	struct kvg_sqe sqe = {.op = KVG_OP_CREATE, .create.context_tokens = 1};

	(void)ask_budget(scene, "a", &tight); /* what is charged and promised, to the byte */
	session_submit(scene->worker, &sqe);
	assert_int_equal(session_reap(scene->worker).status, -ENOSPC);
	assert_memory_equal(session_text(scene->worker), "tenant a: device budget 128.0 KiB, in use 64.0 KiB", 50);
	tight += SESSION_EXTENT;
	(void)ask_budget(scene, "a", &tight);
	session_submit(scene->worker, &sqe);
	assert_int_equal(session_reap(scene->worker).status, 0);
}

static bool holds_for_new_min(struct session *session)
{
	return session->server.tenants[1]->quota.account->min == SESSION_EXTENT;
}

/*
 * The connections end with the admin while the file is written: the budget is set all the same, or refused as here, and
 * nobody is told. The disk is a pipe, at first without anybody who reads it.
 */
static void test_the_end_while_a_budget_is_written(void **state)
{
	struct scene *scene = *state;
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__BudgetSet set = KVG__BUDGET_SET__INIT;
	char name[] = "b", path[80];
	int fd;

	(void)snprintf(path, sizeof(path), "%s/budgets.conf.new", scene->session->dir);
	assert_int_equal(mkfifo(path, 0600), 0);
	set.tenant = name;
	set.has_device_min = 1;
	set.device_min = SESSION_EXTENT;
	request.body_case = KVG__ADMIN_REQUEST__BODY_BUDGET_SET;
	request.budget_set = &set;
	tell(scene, &request);
	session_run(scene->session, holds_for_new_min, NULL);
	admin_deinit(&scene->session->admin);
	assert_true(list_empty(&scene->session->admin.settles));
	fd = open(path, O_RDONLY | O_CLOEXEC);
	assert_true(fd >= 0);
	assert_int_equal(close(fd), 0);
	scene->session->server.budgets = budgets_free(scene->session->server.budgets);
	assert_int_equal(scene->session->server.tenants[1]->quota.account->min, 0);
	assert_false(session_receive(scene->client));
}

static void test_unknown_and_malformed(void **state)
{
	struct scene *scene = *state;
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;

	assert_int_equal(ask(scene, &request)->error->status, -EOPNOTSUPP);
	assert_string_equal(scene->reply->error->text, "admin: a message of unknown type");
	assert_int_equal(kvg_frame_send(scene->client->fd, "\xff", 1, NULL, 0), 0);
	assert_true(session_receive(scene->client)); /* the reason, then the end */
	assert_false(session_receive(scene->client));
	session_peer_free(scene->client);
	scene->client = session_connect_admin(scene->session); /* others are served as before */
	assert_int_equal(ask_plain(scene, KVG__ADMIN_REQUEST__BODY_STATUS)->status->workers, 1);
}

/* Too large, or with descriptors: the connection ends, nothing stays open. */
static void test_oversized_and_descriptors(void **state)
{
	struct scene *scene = *state;
	char large[8192] = {0};

	assert_int_equal(kvg_frame_send(scene->client->fd, large, sizeof(large), NULL, 0), 0);
	assert_false(session_receive(scene->client));
	session_peer_free(scene->client);
	scene->client = session_connect_admin(scene->session);
	assert_int_equal(kvg_frame_send(scene->client->fd, large, 4, &scene->worker->fd, 1), 0);
	assert_false(session_receive(scene->client));
	session_peer_free(scene->client);
	scene->client = session_connect_admin(scene->session);
	assert_int_equal(ask_plain(scene, KVG__ADMIN_REQUEST__BODY_STATUS)->status->workers, 1);
}

#define ADMIN_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		ADMIN_TEST(test_status),
		ADMIN_TEST(test_status_of_a_device),
		ADMIN_TEST(test_status_of_a_device_unread),
		ADMIN_TEST(test_lists),
		ADMIN_TEST(test_large_list),
		ADMIN_TEST(test_audit),
		ADMIN_TEST(test_budget),
		ADMIN_TEST(test_budget_of_several_values),
		ADMIN_TEST(test_budget_is_exact),
		ADMIN_TEST(test_the_end_while_a_budget_is_written),
		ADMIN_TEST(test_unknown_and_malformed),
		ADMIN_TEST(test_oversized_and_descriptors),
	};

	return runner_run("admin", tests, sizeof(tests) / sizeof(tests[0]));
}
