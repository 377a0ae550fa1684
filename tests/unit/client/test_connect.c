#include "tests/support/runner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/client.h"
#include "tests/unit/client/peer.h"

/* Connects to a peer that does something wrong; the status, with the text. */
static int try_connect(struct peer *peer, char text[256])
{
	struct kvg_client *client = NULL;
	int r;

	peer_start(peer);
	r = kvg_connect(peer->path, "unit test", &client, text, 256);
	if (r == 0)
		(void)kvg_close(client);
	else
		assert_null(client);
	peer_stop(peer);
	peer_free(peer);
	return r;
}

static void connects_and_registers(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 0);
	struct kvg_layout layout = peer_layout();
	struct kvg_view view;

	(void)state;
	assert_int_equal(kvg_abi_version(), KVG_ABI_VERSION);
	assert_string_equal(kvg_tenant(client), "search");
	assert_true(kvg_fd(client) >= 0);
	assert_int_equal(kvg_mapped_bytes(client), 0);
	assert_int_equal(kvg_kind(client), KVG_KIND_HOST);
	assert_int_equal(kvg_view(client, &view), 0);
	assert_int_equal(view.v_base - view.k_base, PEER_EXTENT / 2);
	assert_int_equal(view.stride, PEER_STRIDE);
	assert_int_equal(view.row_cap, PEER_ROW_CAP);
	assert_int_equal(kvg_arena_bytes(client), PEER_SLOTS * PEER_EXTENT);
	assert_int_equal(kvg_register(client, &layout, PEER_STAGING_ROWS), -EALREADY);
	assert_non_null(strstr(kvg_error(client), "layout tiny"));
	assert_null(kvg_close(client));
	assert_null(kvg_close(NULL));
	peer_stop(peer);
	assert_int_equal(peer->asked_staging, PEER_STAGING_ROWS);
	assert_int_equal(peer->asked_device_staging, 0);
	peer_free(peer);
}

static void says_why_there_is_no_daemon(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = NULL;
	char text[256], path[200];

	(void)state;
	assert_int_equal(kvg_connect("/nowhere/kvgate.sock", "test", &client, text, sizeof(text)), -ENOENT);
	assert_string_equal(text, "socket /nowhere/kvgate.sock: No such file or directory");
	assert_int_equal(kvg_connect("/nowhere/kvgate.sock", "test", &client, NULL, 0), -ENOENT);
	memset(path, 'a', sizeof(path) - 1);
	path[sizeof(path) - 1] = '\0';
	assert_int_equal(kvg_connect(path, "test", &client, text, sizeof(text)), -ENAMETOOLONG);
	assert_int_equal(close(peer->listener), 0);
	peer->listener = -1;
	assert_int_equal(kvg_connect(peer->path, "test", &client, text, sizeof(text)), -ECONNREFUSED);
	assert_null(client);
	peer_free(peer);
}

static Kvg__Error refusal;

static bool refuse(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	(void)peer;
	kvg__error__init(&refusal);
	refusal.status = -EACCES;
	refusal.text = (char *)(uintptr_t) "uid 7 is not allowed";
	reply->body_case = KVG__WORKER_REPLY__BODY_ERROR;
	reply->error = &refusal;
	*fd_count = 0;
	return true;
}

static bool hang_up(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	(void)peer;
	(void)reply;
	(void)fd_count;
	return false;
}

static bool keep_one_fd(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	(void)peer;
	(void)reply;
	*fd_count -= *fd_count > 0;
	return true;
}

static bool other_version(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	(void)peer;
	(void)fd_count;
	reply->welcome->abi = 2;
	return true;
}

static bool wrong_id(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	(void)peer;
	(void)fd_count;
	reply->id += 5;
	return true;
}

static bool unknown_kind(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	(void)peer;
	(void)fd_count;
	reply->welcome->kind = (char *)(uintptr_t) "disk";
	return true;
}

/* A GPU that no test machine has, or a library without the kind: refused either way, and said. */
static bool strange_gpu(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	static uint8_t uuid[16] = {1, 2, 3};

	(void)peer;
	(void)fd_count;
	reply->welcome->kind = (char *)(uintptr_t) "cuda";
	reply->welcome->has_device_uuid = 1;
	reply->welcome->device_uuid = (ProtobufCBinaryData){.len = sizeof(uuid), .data = uuid};
	return true;
}

static void bad_magic(struct peer *peer)
{
	peer->ring->magic = 0;
}

static void refuses_a_wrong_welcome(void **state)
{
	static const struct {
		bool (*tamper_reply)(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count);
		void (*tamper_ring)(struct peer *peer);
		int status;
		const char *says;
	} wrongs[] = {
		{refuse, NULL, -EACCES, "uid 7 is not allowed"},
		{hang_up, NULL, -EPIPE, "the daemon is gone"},
		{keep_one_fd, NULL, -EPROTO, "with 1 descriptors"},
		{other_version, NULL, -EPROTO, "speaks version 2, this library 1"},
		{wrong_id, NULL, -EPROTO, "reply to request 6"},
		{NULL, bad_magic, -EPROTO, "the ring's magic"},
		{unknown_kind, NULL, -EPROTO, "its memory is of the kind disk, which this library does not know"},
#ifdef KVG_HAS_CUDA
		{strange_gpu, NULL, -ENODEV, "the daemon's memory is on a GPU: "},
#else
		{strange_gpu, NULL, -EOPNOTSUPP, "this libkvgate was built without the kind cuda"},
#endif
	};

	(void)state;
	for (size_t i = 0; i < sizeof(wrongs) / sizeof(*wrongs); i++) {
		struct peer *peer = peer_new();
		char text[256] = "";

		peer->tamper_reply = wrongs[i].tamper_reply;
		peer->tamper_ring = wrongs[i].tamper_ring;
		assert_int_equal(try_connect(peer, text), wrongs[i].status);
		if (!strstr(text, wrongs[i].says))
			fail_msg("'%s' does not say '%s'", text, wrongs[i].says);
	}
}

static void bad_table(struct peer *peer)
{
	peer->table->row_cap++;
}

static bool odd_stride(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	(void)peer;
	(void)fd_count;
	if (reply->body_case == KVG__WORKER_REPLY__BODY_REGISTERED)
		reply->registered->stride = 500;
	return true;
}

static bool huge_arena(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	(void)peer;
	(void)fd_count;
	if (reply->body_case == KVG__WORKER_REPLY__BODY_REGISTERED)
		reply->registered->extent_size = 1ull << 60;
	if (reply->body_case == KVG__WORKER_REPLY__BODY_REGISTERED)
		reply->registered->stride = 1ull << 40;
	return true;
}

static bool short_staging(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	(void)peer;
	(void)fd_count;
	if (reply->body_case == KVG__WORKER_REPLY__BODY_REGISTERED)
		reply->registered->staging_size = 1ull << 40;
	return true;
}

static bool refuse_register(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	return reply->body_case != KVG__WORKER_REPLY__BODY_REGISTERED || refuse(peer, reply, fd_count);
}

static bool one_fd(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count)
{
	return reply->body_case != KVG__WORKER_REPLY__BODY_REGISTERED || keep_one_fd(peer, reply, fd_count);
}

static void refuses_a_wrong_registration(void **state)
{
	static const struct {
		bool (*tamper_reply)(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count);
		void (*tamper_table)(struct peer *peer);
		int status;
		const char *says;
	} wrongs[] = {
		{NULL, bad_table, -EPROTO, "the table's shape"},
		{odd_stride, NULL, -EPROTO, "extents of 8192 bytes do not hold blocks of 2 x 500"},
		{huge_arena, NULL, -EPROTO, "arena of 20 extents"},
		{short_staging, NULL, -EPROTO, "the staging area's size"},
		{refuse_register, NULL, -EACCES, "uid 7 is not allowed"},
		{one_fd, NULL, -EPROTO, "with 1 descriptors, not"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(wrongs) / sizeof(*wrongs); i++) {
		struct peer *peer = peer_new();
		struct kvg_layout layout = peer_layout();
		struct kvg_client *client;
		struct kvg_view view;
		uint64_t seq = 3;

		peer->tamper_reply = wrongs[i].tamper_reply;
		peer->tamper_table = wrongs[i].tamper_table;
		peer_start(peer);
		assert_int_equal(kvg_connect(peer->path, "test", &client, NULL, 0), 0);
		assert_int_equal(kvg_register(client, &layout, 1024), wrongs[i].status);
		if (!strstr(kvg_error(client), wrongs[i].says))
			fail_msg("'%s' does not say '%s'", kvg_error(client), wrongs[i].says);
		assert_int_equal(kvg_view(client, &view), -EINVAL);
		assert_true(kvg_create(client, &(struct kvg_policy){0}, &seq) < 0);
		assert_int_equal(seq, 3);
		(void)kvg_close(client);
		peer_stop(peer);
		peer_free(peer);
	}
}

/* Every call of the cuda kind says what it is that it cannot do. */
static void refuses_the_cuda_calls_by_name(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 0);
	uint32_t id = 7;

	(void)state;
#define REFUSED(call, ...)                                                                                             \
	do {                                                                                                           \
		assert_int_equal(call(client, __VA_ARGS__), -EOPNOTSUPP);                                              \
		assert_string_equal(kvg_error(client), #call ": this connection's memory is of the kind host");        \
	} while (0)
	REFUSED(kvg_set_stream, NULL);
	REFUSED(kvg_stream_wait, 1);
	REFUSED(kvg_stage_device, 1, KVG_STAGE_HIDDEN, 0, 1, 0, 1, NULL, 0);
	REFUSED(kvg_import_buffer, NULL, 1, &id);
	REFUSED(kvg_import_event, NULL, &id);
	REFUSED(kvg_release, 2);
	REFUSED(kvg_cuda_append, 0, 1, NULL, NULL, NULL, 8, NULL, 8);
	REFUSED(kvg_cuda_advance, NULL, 1, 1);
	REFUSED(kvg_cuda_plan, 0, 1, 1, NULL, 0);
	REFUSED(kvg_cuda_attend, 0, 1.0f, NULL, 8, NULL, 8);
	REFUSED(kvg_cuda_export_table, 0, 1, NULL, 0, NULL, 1, NULL);
	REFUSED(kvg_cuda_export_csr, 0, 1, NULL, 0, NULL, NULL, NULL);
#undef REFUSED
	assert_null(kvg_stage_device_buffer(client, 64));
	assert_string_equal(kvg_error(client), "kvg_stage_device_buffer: this connection's memory is of the kind host");
	assert_int_equal(id, 7);
	assert_int_equal(kvg_nop(client), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void refuses_layouts_of_unequal_groups(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_layout layout = peer_layout();
	struct kvg_client *client;

	(void)state;
	peer_start(peer);
	assert_int_equal(kvg_connect(peer->path, "test", &client, NULL, 0), 0);
	layout.group_count = 0;
	assert_int_equal(kvg_register(client, &layout, 1024), -EINVAL);
	layout.group_count = KVG_MAX_GROUPS + 1;
	assert_int_equal(kvg_register(client, &layout, 1024), -EINVAL);
	layout.group_count = 2;
	layout.groups[1] = layout.groups[0];
	layout.groups[1].k_dim++;
	assert_int_equal(kvg_register(client, &layout, 1024), -EOPNOTSUPP);
	layout = peer_layout();
	memset(layout.model, 'm', sizeof(layout.model));
	assert_int_equal(kvg_register(client, &layout, 1024), -EINVAL);
	/* Two equal groups are one table of their layers together. */
	layout = peer_layout();
	layout.group_count = 2;
	layout.groups[0].layers = 1;
	layout.groups[1] = layout.groups[0];
	assert_int_equal(kvg_register(client, &layout, 1024), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void loads_a_gate(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 0);

	(void)state;
	assert_int_equal(kvg_load_gate(client, "pilot-lm/none.safetensors"), -ENOENT);
	assert_string_equal(kvg_error(client), "gate pilot-lm/none.safetensors: No such file or directory");
	assert_int_equal(kvg_load_gate(client, "pilot-lm"), -EINVAL);
	assert_int_equal(kvg_load_gate(client, "/dev/null"), -EINVAL);
	assert_int_equal(kvg_load_gate(client, "pilot-lm/config.json"), 0);
	assert_int_equal(kvg_nop(client), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	assert_int_equal(peer->gate[0], '{');
	peer_free(peer);
}

/* Also with calls under way. */
static void is_abandoned_by_a_child(void **state)
{
	const struct kvg_policy policy = {.ratio = 0.5, .mode = KVG_MODE_CHUNKED};
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_connect(peer, 0);
	uint64_t seq;
	pid_t child;

	(void)state;
	assert_null(kvg_abandon(NULL));
	assert_int_equal(kvg_create(client, &policy, &seq), 0);
	assert_int_equal(kvg_reserve(client, seq, 20), 0);
	assert_int_equal(kvg_evict_async(client, seq, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kvg_reserve_async(client, seq, 20), 0);
	child = fork();
	if (child == 0)
		peer_child(client, 2);
	assert_true(peer_child_ended(child));
	assert_int_equal(kvg_evict_finish(client, seq, NULL), 0);
	assert_int_equal(kvg_reserve_finish(client, seq), 0);
	assert_int_equal(kvg_free(client, seq), 0);
	assert_int_equal(kvg_mapped_bytes(client), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

static void is_abandoned_without_a_layout(void **state)
{
	struct peer *peer = peer_new();
	struct kvg_client *client = peer_hello(peer, 0);
	pid_t child;

	(void)state;
	assert_int_equal(kvg_arena_bytes(client), 0);
	child = fork();
	if (child == 0)
		peer_child(client, 2);
	assert_true(peer_child_ended(child));
	assert_int_equal(kvg_nop(client), 0);
	(void)kvg_close(client);
	peer_stop(peer);
	peer_free(peer);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(connects_and_registers),
		cmocka_unit_test(says_why_there_is_no_daemon),
		cmocka_unit_test(refuses_a_wrong_welcome),
		cmocka_unit_test(refuses_a_wrong_registration),
		cmocka_unit_test(refuses_layouts_of_unequal_groups),
		cmocka_unit_test(refuses_the_cuda_calls_by_name),
		cmocka_unit_test(loads_a_gate),
		cmocka_unit_test(is_abandoned_by_a_child),
		cmocka_unit_test(is_abandoned_without_a_layout),
	};

	return runner_run("connect", tests, sizeof(tests) / sizeof(*tests));
}
