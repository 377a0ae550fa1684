/* Sequences that go to the host and come back, with a real daemon and workers that are killed meanwhile. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define MIB    (1024u * 1024u)
#define TOKENS 1900u
#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 6M\nextent_size = 256K\nhost.size = 16M\n"                                              \
	"[tenant search]\nsocket = search.sock\n"                                                                      \
	"[tenant chat]\nsocket = chat.sock\nhost.max = 64K\n"

struct stage {
	struct fixture fixture;
	struct kvg_layout layout;
	struct kvg_client *search, *chat;
	char search_path[FIXTURE_PATH], chat_path[FIXTURE_PATH];
};

static void stage_open(struct stage *s)
{
	fixture_start(&s->fixture, CONFIG);
	kv_small_layout(&s->layout, 8, 8192);
	(void)fixture_path(&s->fixture, "state/search.sock", s->search_path);
	(void)fixture_path(&s->fixture, "state/chat.sock", s->chat_path);
	s->search = kv_connect(s->search_path, "search-1", &s->layout);
	s->chat = kv_connect(s->chat_path, "chat-1", &s->layout);
	assert_non_null(s->search);
	assert_non_null(s->chat);
}

static void stage_close(struct stage *s)
{
	struct fixture_usage usage;

	s->search = kvg_close(s->search);
	s->chat = kvg_close(s->chat);
	assert_true(fixture_wait_charged(&s->fixture, 0, FIXTURE_WAIT_MS));
	fixture_audit(&s->fixture);
	fixture_usage(&s->fixture, &usage);
	assert_int_equal(usage.host_charged, 0);
	fixture_stop(&s->fixture);
}

/* One entry and its completion; the status. */
static int call(struct kvg_client *client, uint8_t op, uint64_t seq, struct kvg_cqe *ret, char *text)
{
	struct kvg_sqe sqe = {.op = op, .seq = seq};
	const char *why;

	assert_int_equal(kvg_submit(client, &sqe), 0);
	assert_int_equal(kvg_reap(client, ret, &why, 1, 1), 1);
	(void)snprintf(text, FIXTURE_TEXT, "%s", why);
	return ret->status;
}

static void done(struct kvg_client *client, uint8_t op, uint64_t seq, struct kvg_cqe *ret)
{
	char text[FIXTURE_TEXT];

	if (call(client, op, seq, ret, text) < 0)
		fail_msg("%s", text);
	assert_int_equal(kvg_return_memory(client), 0);
}

static int create_plain(const struct stage *s, struct kvg_client *client, struct kv *kv, uint32_t tokens)
{
	struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = tokens};

	return kv_create(kv, client, &s->layout, &policy, 1);
}

static struct kvg_sequence_info query(const struct kv *kv)
{
	struct kvg_sequence_info info;

	assert_int_equal(kvg_query(kv->client, kv->id, &info), 0);
	return info;
}

static void test_device_memory_is_others_meanwhile(void **state)
{
	struct kvg_policy policy = kv_policy(TOKENS, 0.4, 40);
	struct kvg_sequence_info before, after;
	struct fixture_usage usage;
	struct stage s;
	struct kv kv, other;
	struct kvg_cqe cqe;

	(void)state;
	stage_open(&s);
	policy.max_new_tokens = 400;
	assert_int_equal(kv_create(&kv, s.search, &s.layout, &policy, 3), 0);
	assert_int_equal(kv_feed(&kv, TOKENS, 1), 0);
	before = query(&kv);
	assert_int_equal(create_plain(&s, s.chat, &other, 3000), -ENOSPC);

	done(s.search, KVG_OP_OFFLOAD, kv.id, &cqe);
	assert_int_equal(cqe.value[1], before.bytes);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.charged + usage.promised, 0);
	assert_int_equal(usage.host_charged, cqe.value[0]);
	fixture_audit(&s.fixture);
	assert_int_equal(create_plain(&s, s.chat, &other, 3000), 0); /* the whole pool is somebody else's */
	assert_int_equal(kv_feed(&other, 3000, 2), 0);
	fixture_audit(&s.fixture);
	assert_int_equal(kv_free(&other), 0);
	assert_int_equal(kvg_return_memory(s.chat), 0);

	done(s.search, KVG_OP_RESTORE, kv.id, &cqe);
	assert_int_equal(cqe.value[0], before.bytes);
	fixture_audit(&s.fixture);
	after = query(&kv);
	assert_memory_equal(&after, &before, sizeof(before));
	assert_int_equal(kv_check(&kv), 0);
	assert_int_equal(kv_feed(&kv, 1, 1), 0); /* life goes on */
	assert_int_equal(kv_evict(&kv, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kv_check(&kv), 0);
	done(s.search, KVG_OP_OFFLOAD, kv.id, &cqe);
	assert_int_equal(kvg_reserve(s.search, kv.id, 100), 0); /* brings it back, too */
	assert_int_equal(kv_feed(&kv, 300, 4), 0);
	assert_int_equal(kv_check(&kv), 0);
	fixture_audit(&s.fixture);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s);
}

static void test_no_room_on_the_host(void **state)
{
	struct stage s;
	struct kv kv;
	struct kvg_cqe cqe;
	char text[FIXTURE_TEXT];

	(void)state;
	stage_open(&s);
	assert_int_equal(create_plain(&s, s.chat, &kv, 1000), 0);
	assert_int_equal(kv_feed(&kv, 1000, 1), 0);
	assert_int_equal(call(s.chat, KVG_OP_OFFLOAD, kv.id, &cqe, text), -ENOSPC);
	if (!strstr(text, "tenant chat: host budget 64.0 KiB") || !strstr(text, "bytes short"))
		fail_msg("%s", text);
	assert_int_equal(kv_check(&kv), 0);
	fixture_audit(&s.fixture);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s);
}

/* Releases its sequence, gives back what it is asked for, and takes the sequence up again when it is told. */
static int idler(int fd, void *socket)
{
	struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = 2000};
	struct kvg_layout layout;
	struct kvg_client *client;
	struct kv kv;

	kv_small_layout(&layout, 4, 4096);
	client = kv_connect(socket, "idler", &layout);
	must(client, "connect");
	must(kv_create(&kv, client, &layout, &policy, 7) == 0, kvg_error(client));
	must(kv_feed(&kv, 1500, 1) == 0, "feed");
	must(kvg_idle(client, kv.id) == 0, kvg_error(client));
	process_say(fd, 'r');
	for (;;) {
		struct pollfd fds[] = {{.fd = fd, .events = POLLIN}, {.fd = kvg_fd(client), .events = POLLIN}};

		must(poll(fds, 2, -1) > 0, "poll");
		must(kvg_process(client) >= 0, kvg_error(client));
		if (fds[0].revents)
			break;
	}
	must(process_listen(fd) == 'g', "the test ends too soon");
	must(kvg_restore(client, kv.id) == 0, kvg_error(client));
	must(kv_check(&kv) == 0, "content");
	must(kv_feed(&kv, 300, 2) == 0, "feed");
	must(kv_check(&kv) == 0, "content");
	must(kv_free(&kv) == 0, "free");
	process_say(fd, 'd');
	(void)process_listen(fd);
	(void)kvg_close(client);
	return 0;
}

/* Another tenant needs the whole pool: what is idle goes to the host, and its worker finds it as it was. */
static void test_an_idle_sequence_makes_room(void **state)
{
	struct fixture_usage usage;
	struct process process;
	struct stage s;
	struct kv other;

	(void)state;
	stage_open(&s);
	process_fork(&process, idler, s.search_path);
	assert_int_equal(process_hear(&process), 'r');
	fixture_tenant(&s.fixture, "search", &usage);
	assert_true(usage.charged > 2 * MIB);
	assert_int_equal(create_plain(&s, s.chat, &other, 3000), 0);
	assert_int_equal(kv_feed(&other, 3000, 2), 0);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.charged + usage.promised, 0);
	assert_true(usage.host_charged > 2 * MIB);
	fixture_audit(&s.fixture);
	assert_int_equal(kv_check(&other), 0);
	assert_int_equal(kv_free(&other), 0);
	assert_int_equal(kvg_return_memory(s.chat), 0);
	process_tell(&process, 'g');
	assert_int_equal(process_hear(&process), 'd');
	process_finish(&process);
	stage_close(&s);
}

/* kvgatectl COMMAND of a sequence; the exit status. */
static int control(const struct stage *s, const char *command, const struct kv *kv, struct process_output *ret)
{
	char socket[FIXTURE_PATH], worker[32], seq[32];
	const char *argv[] = {KVG_BIN_CTL, "--socket", fixture_path(&s->fixture, "state/admin.sock", socket), command,
		worker, seq, NULL};

	(void)snprintf(worker, sizeof(worker), "%u", 1u);
	(void)snprintf(seq, sizeof(seq), "%u:%u", (unsigned)(kv->id >> 32), (unsigned)kv->id);
	process_run(argv, FIXTURE_WAIT_MS, ret);
	return ret->status;
}

static void test_the_operator_moves_what_is_idle(void **state)
{
	struct process_output output;
	struct fixture_usage usage;
	struct stage s;
	struct kv kv;

	(void)state;
	stage_open(&s);
	assert_int_equal(create_plain(&s, s.search, &kv, 1500), 0);
	assert_int_equal(kv_feed(&kv, 1000, 1), 0);
	assert_int_not_equal(control(&s, "offload", &kv, &output), 0);
	if (!strstr(output.err, "has not released it"))
		fail_msg("%s", output.err);
	assert_int_equal(kvg_idle(s.search, kv.id), 0);
	if (control(&s, "offload", &kv, &output) != 0)
		fail_msg("%s", output.err);
	assert_int_equal(kvg_return_memory(s.search), 0);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.charged, 0);
	assert_true(usage.host_charged > 0);
	fixture_audit(&s.fixture);
	if (control(&s, "restore", &kv, &output) != 0)
		fail_msg("%s", output.err);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.host_charged, 0);
	assert_int_equal(kvg_restore(s.search, kv.id), 0);
	assert_int_equal(kv_check(&kv), 0);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s);
}

/* Sends what it has there and back, for ever. */
static int victim(int fd, void *socket)
{
	struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = TOKENS};
	struct kvg_layout layout;
	struct kvg_client *client;
	struct kvg_cqe cqe;
	struct kv kv;

	kv_small_layout(&layout, 4, 4096);
	client = kv_connect(socket, "victim", &layout);
	must(client, "connect");
	must(kv_create(&kv, client, &layout, &policy, 5) == 0, kvg_error(client));
	must(kv_feed(&kv, TOKENS, 1) == 0, "feed");
	process_say(fd, 'r');
	for (unsigned i = 0; i < UINT32_MAX; i++) {
		struct kvg_sqe sqe = {.op = i & 1 ? KVG_OP_RESTORE : KVG_OP_OFFLOAD, .seq = kv.id};

		must(kvg_submit(client, &sqe) == 0, kvg_error(client));
		process_say(fd, 's');
		must(kvg_reap(client, &cqe, NULL, 1, 1) == 1 && cqe.status == 0, "offload or restore");
		must(kvg_return_memory(client) == 0, kvg_error(client));
	}
	return 0;
}

static void test_a_worker_killed_while_it_moves(void **state)
{
	struct fixture_usage usage;
	struct process process;
	struct stage s;

	(void)state;
	stage_open(&s);
	for (unsigned round = 0; round < 10; round++) {
		process_fork(&process, victim, s.search_path);
		assert_int_equal(process_hear(&process), 'r');
		for (unsigned i = 0; i <= round % 5; i++)
			assert_int_equal(process_hear(&process), 's');
		process_kill(&process);
		assert_true(fixture_wait_gone(&s.fixture, 2, 0, FIXTURE_WAIT_MS));
		fixture_usage(&s.fixture, &usage);
		assert_int_equal(usage.host_charged, 0);
		fixture_audit(&s.fixture);
	}
	stage_close(&s);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_device_memory_is_others_meanwhile),
		cmocka_unit_test(test_no_room_on_the_host),
		cmocka_unit_test(test_an_idle_sequence_makes_room),
		cmocka_unit_test(test_the_operator_moves_what_is_idle),
		cmocka_unit_test(test_a_worker_killed_while_it_moves),
	};

	return runner_run("integration/offload", tests, sizeof(tests) / sizeof(*tests));
}
