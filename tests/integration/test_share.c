/* One context for many workers: each reads the same bytes through its own mapping, and they are charged once. */
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define EXTENT    (256u * 1024u) /* 128 blocks of the layout, eight of each row */
#define TOKENS    1500u
#define ATTACHERS 8u
#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 64M\nextent_size = 256K\n"                                                              \
	"[tenant search]\nsocket = search.sock\ndevice.max = 48M\n"                                                    \
	"[tenant spy]\nsocket = spy.sock\ndevice.max = 16M\n"

#define HOST_CONFIG                                                                                                    \
	"[pool]\ndevice.size = 64M\nextent_size = 256K\nhost.size = 16M\n"                                             \
	"[tenant search]\nsocket = search.sock\ndevice.max = 48M\n"                                                    \
	"[tenant spy]\nsocket = spy.sock\ndevice.max = 16M\n"

static const struct kvg_policy question = {.mode = KVG_MODE_OFF, .ratio = 1, .context_tokens = 100};

struct stage {
	struct fixture fixture;
	struct kvg_layout layout;
	char socket[FIXTURE_PATH], spy[FIXTURE_PATH];
};

static void stage_open_with(struct stage *s, const char *config)
{
	fixture_start(&s->fixture, config);
	kv_small_layout(&s->layout, 8, 4096);
	(void)fixture_path(&s->fixture, "state/search.sock", s->socket);
	(void)fixture_path(&s->fixture, "state/spy.sock", s->spy);
}

static void stage_open(struct stage *s)
{
	stage_open_with(s, CONFIG);
}

static void stage_close(struct stage *s)
{
	assert_true(fixture_wait_gone(&s->fixture, 0, UINT64_MAX, FIXTURE_WAIT_MS));
	fixture_audit(&s->fixture);
	fixture_stop(&s->fixture);
}

/* ---- the operations, as ring entries ---- */

static int call(struct kvg_client *client, const struct kvg_sqe *sqe, struct kvg_cqe *ret, char *text)
{
	const char *why = "";
	int r = kvg_submit(client, sqe);

	if (r == 0)
		r = kvg_reap(client, ret, &why, 1, 1);
	if (r < 0)
		return r;
	if (text)
		(void)snprintf(text, KVG_TEXT_SIZE, "%s", why);
	return ret->status;
}

static void make_key(uint8_t key[KVG_KEY_SIZE], uint8_t number)
{
	for (uint8_t i = 0; i < KVG_KEY_SIZE; i++)
		key[i] = (uint8_t)(number + i);
}

/* An entry that publishes; its generation is asked for. */
static int publish_entry(struct kvg_client *client, uint64_t seq, uint8_t number, struct kvg_sqe *ret)
{
	struct kvg_sequence_info info;
	int r = kvg_query(client, seq, &info);

	*ret = (struct kvg_sqe){.op = KVG_OP_PUBLISH, .seq = seq, .generation = info.generation};
	make_key(ret->publish.key, number);
	return r;
}

static int publish(struct kvg_client *client, uint64_t seq, uint8_t number, struct kvg_cqe *ret)
{
	struct kvg_sqe sqe;
	int r = publish_entry(client, seq, number, &sqe);

	if (r == 0)
		r = call(client, &sqe, ret, NULL);
	if (r == 0)
		r = kvg_return_memory(client);
	return r;
}

static uint64_t find(struct kvg_client *client, uint8_t number, struct kvg_cqe *ret)
{
	struct kvg_sqe sqe = {.op = KVG_OP_FIND};

	make_key(sqe.find.key, number);
	assert_int_equal(call(client, &sqe, ret, NULL), 0);
	return ret->value[0];
}

static int attach(struct kvg_client *client, uint64_t context, struct kvg_cqe *ret, char *text)
{
	const struct kvg_sqe sqe = {.op = KVG_OP_ATTACH, .seq = context, .attach = question};

	return call(client, &sqe, ret, text);
}

/* A prompt, read and evicted; the same for each seed wherever it is made. */
static int read_prompt(struct kv *kv, struct kvg_client *client, const struct kvg_layout *layout, uint32_t seed)
{
	struct kvg_policy policy = kv_policy(TOKENS - 1, 0.3, 50);
	int r = kv_create(kv, client, layout, &policy, seed);

	if (r == 0)
		r = kv_feed(kv, TOKENS, 7);
	return r ? r : kv_evict(kv, KVG_EVICT_PREFILL);
}

/* Blocks of rows with those pairs, and how many rows have a partial one. */
static uint64_t blocks_of(const struct kv *kv, uint64_t *ret_tails)
{
	uint64_t blocks = 0;

	*ret_tails = 0;
	for (uint32_t layer = 0; layer < kv->layout->groups[0].layers; layer++) {
		for (uint32_t head = 0; head < kv->layout->groups[0].head_count; head++) {
			uint32_t pairs = kv_row_pairs(kv, layer, head);

			blocks += (pairs + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS;
			*ret_tails += pairs % KVG_BLOCK_TOKENS > 0;
		}
	}
	return blocks;
}

/* ---- a publisher of its own process ---- */

static int publisher_main(int fd, void *arg)
{
	const struct stage *s = arg;
	struct kvg_client *client = kv_connect(s->socket, "publisher", &s->layout);
	struct kvg_cqe cqe = {0};
	struct kv kv;

	must(client, "connect");
	must(read_prompt(&kv, client, &s->layout, 5) == 0, "prompt");
	must(publish(client, kv.id, 1, &cqe) == 0, "publish");
	must(kv_check(&kv) == 0, "what it published");
	process_say(fd, 'p');
	while (process_listen(fd) >= 0)
		must(kv_check(&kv) == 0, "what it published");
	return 0;
}

struct reader {
	struct kvg_client *client;
	struct kv kv;
};

static void reader_open(const struct stage *s, struct reader *reader, const struct kv *twin, uint64_t context)
{
	struct kvg_cqe cqe = {0};

	reader->client = kv_connect(s->socket, "reader", &s->layout);
	assert_non_null(reader->client);
	assert_int_equal(attach(reader->client, context, &cqe, NULL), 0);
	assert_int_equal(cqe.value[2], TOKENS);
	assert_int_equal(kv_attached(&reader->kv, reader->client, twin, &question, cqe.seq), 0);
	assert_int_equal(kv_check(&reader->kv), 0);
}

static void reader_close(struct reader *reader)
{
	kv_forget(&reader->kv);
	reader->client = kvg_close(reader->client);
}

static uint64_t charged(const struct stage *s)
{
	struct fixture_usage usage;

	fixture_tenant(&s->fixture, "search", &usage);
	return usage.charged;
}

static void test_eight_attachers_and_a_dead_publisher(void **state)
{
	struct stage s;
	struct process publisher;
	struct reader readers[ATTACHERS];
	struct kvg_client *client;
	struct kv twin;
	struct kvg_cqe cqe = {0};
	uint64_t context, tails, blocks, extents;

	(void)state;
	stage_open(&s);
	process_fork(&publisher, publisher_main, &s);
	assert_int_equal(process_hear(&publisher), 'p');
	fixture_audit(&s.fixture);
	client = kv_connect(s.socket, "twin", &s.layout);
	assert_non_null(client);
	assert_int_equal(read_prompt(&twin, client, &s.layout, 5), 0);
	blocks = blocks_of(&twin, &tails);
	assert_true(tails > 0);
	extents = (blocks + 127) / 128;
	context = find(client, 1, &cqe);
	assert_true(context > 0);
	assert_int_equal(cqe.value[1], blocks * EXTENT / 128);
	assert_int_equal(cqe.value[2], TOKENS);
	assert_int_equal(cqe.value[3], 1);
	/* The same key: what it had of its own goes, but for the tails. */
	assert_int_equal(publish(client, twin.id, 1, &cqe), 0);
	assert_int_equal(cqe.value[0], context);
	assert_int_equal(cqe.value[3], 1);
	assert_int_equal(kv_check(&twin), 0);
	assert_int_equal(charged(&s), (extents + 2) * EXTENT);
	fixture_audit(&s.fixture);
	for (unsigned i = 0; i < ATTACHERS; i++) {
		reader_open(&s, &readers[i], &twin, context);
		assert_int_equal(charged(&s), (extents + 3 + i) * EXTENT);
		fixture_audit(&s.fixture);
	}
	assert_int_equal(find(client, 1, &cqe), context);
	assert_int_equal(cqe.value[3], ATTACHERS + 2);
	process_kill(&publisher);
	assert_true(fixture_wait_gone(&s.fixture, ATTACHERS + 1, (extents + 1 + ATTACHERS) * EXTENT, FIXTURE_WAIT_MS));
	fixture_audit(&s.fixture);
	for (unsigned i = 0; i < ATTACHERS; i++) {
		assert_int_equal(kv_feed(&readers[i].kv, 10 + 9 * i, (uint8_t)(i + 9)), 0);
		assert_int_equal(kv_check(&readers[i].kv), 0);
	}
	fixture_audit(&s.fixture);
	for (unsigned i = 0; i < ATTACHERS; i++) {
		assert_int_equal(kv_check(&readers[i].kv), 0);
		reader_close(&readers[i]);
	}
	kv_forget(&twin);
	(void)kvg_close(client);
	/* It outlives everybody. */
	assert_true(fixture_wait_gone(&s.fixture, 0, extents * EXTENT, FIXTURE_WAIT_MS));
	assert_int_equal(charged(&s), extents * EXTENT);
	stage_close(&s);
}

/* ---- another tenant ---- */

static void test_another_tenant_learns_nothing(void **state)
{
	struct stage s;
	struct kvg_client *client, *spy;
	char there[KVG_TEXT_SIZE], nowhere[KVG_TEXT_SIZE];
	struct kvg_cqe cqe = {0};
	uint64_t context;
	struct kv kv;

	(void)state;
	stage_open(&s);
	client = kv_connect(s.socket, "publisher", &s.layout);
	spy = kv_connect(s.spy, "spy", &s.layout);
	assert_true(client && spy);
	assert_int_equal(read_prompt(&kv, client, &s.layout, 5), 0);
	assert_int_equal(publish(client, kv.id, 1, &cqe), 0);
	context = cqe.value[0];
	assert_int_equal(find(spy, 1, &cqe), 0);
	assert_int_equal(cqe.value[1] | cqe.value[2] | cqe.value[3], 0);
	assert_int_equal(attach(spy, context, &cqe, there), -ENOENT);
	assert_int_equal(attach(spy, context + 1, &cqe, nowhere), -ENOENT);
	assert_string_equal(there, "attach: there is no context 1");
	assert_string_equal(nowhere, "attach: there is no context 2");
	assert_int_equal(attach(client, context + 1, &cqe, there), -ENOENT);
	assert_string_equal(there, nowhere);
	fixture_audit(&s.fixture);
	kv_forget(&kv);
	(void)kvg_close(client);
	(void)kvg_close(spy);
	stage_close(&s);
}

/* The key of something else: nothing changes hands. */
static void test_a_key_in_use(void **state)
{
	struct stage s;
	struct kvg_client *client;
	struct kvg_cqe cqe = {0};
	struct kv a, b;

	(void)state;
	stage_open(&s);
	client = kv_connect(s.socket, "publisher", &s.layout);
	assert_non_null(client);
	assert_int_equal(read_prompt(&a, client, &s.layout, 5), 0);
	assert_int_equal(read_prompt(&b, client, &s.layout, 6), 0);
	assert_int_equal(publish(client, a.id, 1, &cqe), 0);
	assert_int_equal(publish(client, b.id, 1, &cqe), -EEXIST);
	assert_int_equal(kv_check(&b), 0);
	fixture_audit(&s.fixture);
	assert_int_equal(publish(client, b.id, 2, &cqe), 0);
	assert_int_equal(kv_check(&a), 0);
	assert_int_equal(kv_check(&b), 0);
	kv_forget(&a);
	kv_forget(&b);
	(void)kvg_close(client);
	stage_close(&s);
}

/* Fresh tokens are sealed by a fork: the parent's counter starts anew as well as the children's. */
static void test_forks_through_the_library(void **state)
{
	static const uint32_t tokens[] = {10, 16, 300};
	struct stage s;
	struct kvg_client *client;

	(void)state;
	stage_open(&s);
	client = kv_connect(s.socket, "forks", &s.layout);
	assert_non_null(client);
	for (unsigned i = 0; i < 3; i++) {
		struct kvg_policy policy = {.mode = KVG_MODE_OFF, .ratio = 1, .context_tokens = 1000};
		struct kv parent, children[2];
		uint64_t ids[2];

		assert_int_equal(kv_create(&parent, client, &s.layout, &policy, i), 0);
		assert_int_equal(kv_feed(&parent, tokens[i], 3), 0);
		assert_int_equal(kvg_fork(client, parent.id, 2, ids), 0);
		for (unsigned k = 0; k < 2; k++)
			assert_int_equal(kv_attached(&children[k], client, &parent, &policy, ids[k]), 0);
		assert_int_equal(kv_check(&parent), 0);
		for (unsigned k = 0; k < 2; k++) {
			assert_int_equal(kv_check(&children[k]), 0);
			assert_int_equal(kv_feed(&children[k], 50 + k, (uint8_t)(5 + k)), 0);
		}
		assert_int_equal(kv_feed(&parent, 33, 4), 0);
		assert_int_equal(kv_check(&parent), 0);
		assert_int_equal(kv_free(&parent), 0);
		for (unsigned k = 0; k < 2; k++) {
			assert_int_equal(kv_check(&children[k]), 0);
			assert_int_equal(kv_free(&children[k]), 0);
		}
		fixture_audit(&s.fixture);
	}
	assert_int_equal(charged(&s), 0);
	(void)kvg_close(client);
	stage_close(&s);
}

/* ---- to the host and back ---- */

/* Publishes in a process that is then killed. Returns the context's extents. */
static uint64_t publish_and_die(struct stage *s)
{
	struct process publisher;
	struct fixture_context context;

	process_fork(&publisher, publisher_main, s);
	assert_int_equal(process_hear(&publisher), 'p');
	process_kill(&publisher);
	assert_true(fixture_wait_gone(&s->fixture, 0, UINT64_MAX, FIXTURE_WAIT_MS));
	fixture_audit(&s->fixture);
	assert_true(fixture_find_context(&s->fixture, "search", 1, &context));
	assert_string_equal(context.state, "device");
	assert_int_equal(context.image, 0);
	assert_int_equal(context.bytes, charged(s));
	return context.bytes / EXTENT;
}

static uint64_t host_charged(const struct stage *s)
{
	struct fixture_usage usage;

	fixture_tenant(&s->fixture, "search", &usage);
	return usage.host_charged;
}

static void check_on_host(const struct stage *s)
{
	struct fixture_context context;

	assert_true(fixture_find_context(&s->fixture, "search", 1, &context));
	assert_string_equal(context.state, "host");
	assert_int_equal(context.bytes, 0);
	assert_true(context.image > 0);
	assert_int_equal(context.image, host_charged(s));
	assert_int_equal(context.attached, 0);
	assert_int_equal(context.workers, 0);
	assert_int_equal(fixture_physical(&s->fixture), charged(s));
	fixture_audit(&s->fixture);
}

/* Its publisher is gone, and then its device memory: whoever attaches has the same bytes. */
static void test_to_the_host_and_back(void **state)
{
	struct stage s;
	struct reader reader, second;
	struct fixture_context context;
	struct kvg_client *client;
	struct kvg_cqe cqe = {0};
	struct kv twin;
	uint64_t extents;

	(void)state;
	stage_open_with(&s, HOST_CONFIG);
	extents = publish_and_die(&s);
	for (unsigned round = 0; round < 3; round++) {
		assert_int_equal(fixture_reclaim(&s.fixture, "search"), 1);
		assert_int_equal(charged(&s), 0);
		check_on_host(&s);
		assert_int_equal(fixture_reclaim(&s.fixture, "search"), 0);
		client = kv_connect(s.socket, "twin", &s.layout);
		assert_non_null(client);
		assert_int_equal(read_prompt(&twin, client, &s.layout, 5), 0);
		assert_int_equal(find(client, 1, &cqe), 1);
		assert_int_equal(cqe.value[2], TOKENS);
		assert_int_equal(cqe.value[3], 0);
		check_on_host(&s);
		reader_open(&s, &reader, &twin, 1);
		reader_open(&s, &second, &twin, 1);
		assert_true(fixture_find_context(&s.fixture, "search", 1, &context));
		assert_string_equal(context.state, "device");
		assert_int_equal(context.bytes, extents * EXTENT);
		assert_int_equal(context.image, 0);
		assert_int_equal(context.attached, 2);
		assert_int_equal(host_charged(&s), 0);
		fixture_audit(&s.fixture);
		assert_int_equal(kv_feed(&reader.kv, 30, 9), 0);
		assert_int_equal(kv_check(&reader.kv), 0);
		assert_int_equal(kv_check(&second.kv), 0);
		assert_int_equal(publish(client, twin.id, 1, &cqe), 0);
		assert_int_equal(cqe.value[0], 1);
		assert_int_equal(kv_check(&twin), 0);
		reader_close(&reader);
		reader_close(&second);
		kv_forget(&twin);
		(void)kvg_close(client);
		assert_true(fixture_wait_gone(&s.fixture, 0, extents * EXTENT, FIXTURE_WAIT_MS));
		fixture_audit(&s.fixture);
	}
	assert_int_equal(fixture_reclaim(&s.fixture, "search"), 1); /* the daemon stops with it on the host */
	stage_close(&s);
}

/* Published again while it is on the host. */
static void test_published_again_on_the_host(void **state)
{
	struct stage s;
	struct kvg_client *client;
	struct kvg_cqe cqe = {0};
	struct kv twin;

	(void)state;
	stage_open_with(&s, HOST_CONFIG);
	(void)publish_and_die(&s);
	assert_int_equal(fixture_reclaim(&s.fixture, "search"), 1);
	check_on_host(&s);
	client = kv_connect(s.socket, "twin", &s.layout);
	assert_non_null(client);
	assert_int_equal(read_prompt(&twin, client, &s.layout, 5), 0);
	assert_int_equal(publish(client, twin.id, 1, &cqe), 0);
	assert_int_equal(cqe.value[0], 1);
	assert_int_equal(cqe.value[3], 1);
	assert_int_equal(kv_check(&twin), 0);
	assert_int_equal(host_charged(&s), 0);
	fixture_audit(&s.fixture);
	kv_forget(&twin);
	(void)kvg_close(client);
	stage_close(&s);
}

static void test_no_room_on_the_host(void **state)
{
	struct stage s;
	struct fixture_context context;
	char text[FIXTURE_TEXT];

	(void)state;
	stage_open_with(&s, HOST_CONFIG);
	assert_int_equal(fixture_budget_change(&s.fixture, "search", "host.max", 65536, text), 0);
	(void)publish_and_die(&s);
	assert_int_equal(fixture_reclaim(&s.fixture, "search"), 1);
	assert_false(fixture_find_context(&s.fixture, "search", 1, &context));
	assert_int_equal(charged(&s), 0);
	assert_int_equal(host_charged(&s), 0);
	fixture_audit(&s.fixture);
	stage_close(&s);
}

/* ---- killed half-way ---- */

static int hasty_main(int fd, void *arg)
{
	const struct stage *s = arg;
	struct kvg_client *client = kv_connect(s->socket, "hasty", &s->layout);
	struct kvg_sqe sqe;
	struct kv kv;

	(void)fd;
	must(client, "connect");
	must(read_prompt(&kv, client, &s->layout, 5) == 0, "prompt");
	must(publish_entry(client, kv.id, 1, &sqe) == 0, "entry");
	must(kvg_submit(client, &sqe) == 0, "submit");
	(void)raise(SIGKILL);
	return 1;
}

/* Either it is all there, or nothing of it. */
static void test_publishers_killed_half_way(void **state)
{
	struct stage s;
	struct kvg_client *client;
	struct kvg_cqe cqe = {0};
	struct kv twin, kv;
	uint64_t before, tails, extents;

	(void)state;
	stage_open(&s);
	client = kv_connect(s.socket, "twin", &s.layout);
	assert_non_null(client);
	assert_int_equal(read_prompt(&twin, client, &s.layout, 5), 0);
	before = charged(&s);
	extents = (blocks_of(&twin, &tails) + 127) / 128;
	for (unsigned i = 0; i < 10; i++) {
		struct process hasty;
		uint64_t context;

		process_fork(&hasty, hasty_main, &s);
		(void)waitpid(hasty.pid, NULL, 0);
		(void)close(hasty.fd);
		assert_true(fixture_wait_gone(&s.fixture, 1, before + extents * EXTENT, FIXTURE_WAIT_MS));
		fixture_audit(&s.fixture);
		context = find(client, 1, &cqe);
		assert_int_equal(charged(&s), before + (context ? extents * EXTENT : 0));
		if (!context)
			continue;
		assert_int_equal(attach(client, context, &cqe, NULL), 0);
		assert_int_equal(kv_attached(&kv, client, &twin, &question, cqe.seq), 0);
		assert_int_equal(kv_check(&kv), 0);
		assert_int_equal(kv_free(&kv), 0);
		fixture_audit(&s.fixture);
	}
	assert_int_equal(kv_check(&twin), 0);
	kv_forget(&twin);
	(void)kvg_close(client);
	stage_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_eight_attachers_and_a_dead_publisher),
		cmocka_unit_test(test_another_tenant_learns_nothing),
		cmocka_unit_test(test_a_key_in_use),
		cmocka_unit_test(test_forks_through_the_library),
		cmocka_unit_test(test_publishers_killed_half_way),
		cmocka_unit_test(test_to_the_host_and_back),
		cmocka_unit_test(test_published_again_on_the_host),
		cmocka_unit_test(test_no_room_on_the_host),
	};

	return runner_run("share", tests, sizeof(tests) / sizeof(tests[0]));
}
