/*
 * What nobody uses makes room: for a request, for what is above high, for a lower budget and for an operator. Workers
 * are libkvgate's, all in this process, and take turns.
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define EXTENT (256u * 1024u)
#define MIB    (1024u * 1024u)
#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 8M\nextent_size = 256K\nhost.size = 32M\n"                                              \
	"[tenant search]\nsocket = search.sock\ndevice.max = 4M\n"                                                     \
	"[tenant chat]\nsocket = chat.sock\ndevice.max = 8M\n"

/* Of the image of that many full stripes: their blocks with places, in whole frames. */
#define IMAGE(stripes) (((stripes) * (EXTENT + 16384u) + 65535u) / 65536u * 65536u)

struct stage {
	struct fixture fixture;
	struct kvg_layout layout;                /* a stripe is an extent */
	struct kvg_client *idler, *asker, *chat; /* two of search, one of chat */
	bool context_stays;                      /* on the host, at the end */
};

static struct kvg_client *connect_to(const struct stage *s, const char *socket, const char *name)
{
	char path[FIXTURE_PATH];
	struct kvg_client *client = kv_connect(fixture_path(&s->fixture, socket, path), name, &s->layout);

	assert_non_null(client);
	return client;
}

static void stage_open(struct stage *s)
{
	s->context_stays = false;
	fixture_start(&s->fixture, CONFIG);
	kv_small_layout(&s->layout, 32, 8192);
	s->idler = connect_to(s, "state/search.sock", "idler");
	s->asker = connect_to(s, "state/search.sock", "asker");
	s->chat = connect_to(s, "state/chat.sock", "chat");
}

static void stage_close(struct stage *s)
{
	struct fixture_usage usage;

	fixture_audit(&s->fixture);
	s->idler = kvg_close(s->idler);
	s->asker = kvg_close(s->asker);
	s->chat = kvg_close(s->chat);
	assert_true(fixture_wait_gone(&s->fixture, 0, 0, FIXTURE_WAIT_MS));
	fixture_audit(&s->fixture);
	fixture_usage(&s->fixture, &usage);
	assert_int_equal(usage.host_charged > 0, s->context_stays);
	fixture_stop(&s->fixture);
}

static void assert_names(const char *text, const char *what)
{
	if (!strstr(text, what))
		fail_msg("\"%s\" does not name \"%s\"", text, what);
}

/* ---- turns ---- */

/* A worker unmaps and acknowledges what it was asked to, and answers pressure. */
static void turn(struct kvg_client *client)
{
	if (kvg_nop(client) < 0)
		fail_msg("%s", kvg_error(client));
}

static void all_turn(const struct stage *s)
{
	turn(s->idler);
	turn(s->asker);
	turn(s->chat);
}

static struct kvg_sqe create(uint32_t stripes)
{
	return (struct kvg_sqe){.op = KVG_OP_CREATE,
		.create = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = stripes * KVG_STRIPE_TOKENS}};
}

static void submit(struct kvg_client *client, const struct kvg_sqe *sqe)
{
	if (kvg_submit(client, sqe) < 0)
		fail_msg("%s", kvg_error(client));
}

static bool is_done(struct kvg_client *client, struct kvg_cqe *ret, char *text)
{
	const char *why = "";
	int r = kvg_reap(client, ret, &why, 1, 0);

	assert_true(r >= 0);
	if (r)
		(void)snprintf(text, KVG_TEXT_SIZE, "%s", why);
	return r;
}

/* One entry while all workers take turns; the status. */
static int ask(
	const struct stage *s, struct kvg_client *client, const struct kvg_sqe *sqe, struct kvg_cqe *ret, char *text)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;

	submit(client, sqe);
	while (!is_done(client, ret, text)) {
		assert_true(fixture_now_ms() < deadline);
		all_turn(s);
	}
	return ret->status;
}

static void granted(const struct stage *s, struct kvg_client *client, const struct kvg_sqe *sqe, struct kvg_cqe *ret)
{
	char text[KVG_TEXT_SIZE];

	if (ask(s, client, sqe, ret, text) < 0)
		fail_msg("status %d: %s", ret->status, text);
}

static uint64_t create_granted(const struct stage *s, struct kvg_client *client, uint32_t stripes)
{
	const struct kvg_sqe sqe = create(stripes);
	struct kvg_cqe cqe;

	granted(s, client, &sqe, &cqe);
	return cqe.seq;
}

static void free_sequence(const struct stage *s, struct kvg_client *client, uint64_t seq)
{
	const struct kvg_sqe sqe = {.op = KVG_OP_FREE, .seq = seq};
	struct kvg_cqe cqe;

	granted(s, client, &sqe, &cqe);
	all_turn(s);
}

/* Brings it back and looks at all of it. Whether it was on the host. */
static bool restore(const struct stage *s, const struct kv *kv)
{
	const struct kvg_sqe sqe = {.op = KVG_OP_RESTORE, .seq = kv->id};
	struct kvg_cqe cqe;

	granted(s, kv->client, &sqe, &cqe);
	assert_int_equal(kv_check(kv), 0);
	return cqe.value[0] != 0;
}

/* A full sequence of so many stripes. */
static void fill(const struct stage *s, struct kvg_client *client, struct kv *kv, uint32_t stripes)
{
	struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = stripes * KVG_STRIPE_TOKENS};

	assert_int_equal(kv_create(kv, client, &s->layout, &policy, stripes), 0);
	assert_int_equal(kv_feed(kv, stripes * KVG_STRIPE_TOKENS, 1), 0);
}

static void fill_idle(const struct stage *s, struct kvg_client *client, struct kv *kv, uint32_t stripes)
{
	fill(s, client, kv, stripes);
	assert_int_equal(kvg_idle(client, kv->id), 0);
}

static void forget(struct kv *kvs, unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		kv_forget(&kvs[i]);
}

static struct fixture_usage usage_of(const struct stage *s, const char *tenant)
{
	struct fixture_usage usage;

	fixture_tenant(&s->fixture, tenant, &usage);
	return usage;
}

/* All turn until a tenant has at most `charged` bytes, none of them unreturned. */
static void settle(const struct stage *s, const char *tenant, uint64_t charged)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;
	struct fixture_usage usage;

	while (usage = usage_of(s, tenant), usage.charged > charged || usage.unreturned) {
		if (fixture_now_ms() > deadline)
			fail_msg("%" PRIu64 " charged, %" PRIu64 " unreturned", usage.charged, usage.unreturned);
		all_turn(s);
	}
}

/* ---- the operator ---- */

static void control_start(const struct stage *s, struct process_program *program, const char *const words[])
{
	const char *argv[12] = {KVG_BIN_CTL, "--socket"};
	char socket[FIXTURE_PATH];
	unsigned n = 2;

	argv[n++] = fixture_path(&s->fixture, "state/admin.sock", socket);
	while (*words)
		argv[n++] = *words++;
	argv[n] = NULL;
	process_start(program, argv);
}

/* kvgatectl while all workers take turns. */
static void control(const struct stage *s, struct process_output *ret, const char *const words[])
{
	struct process_program program;
	struct pollfd fd = {.events = POLLIN};
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;

	control_start(s, &program, words);
	fd.fd = program.out;
	while (fixture_now_ms() < deadline && poll(&fd, 1, 0) == 0)
		all_turn(s);
	process_collect(&program, FIXTURE_WAIT_MS, ret);
	if (ret->status)
		fail_msg("status %d: %s", ret->status, ret->err);
}

/* ---- requests ---- */

static void test_the_oldest_idle_sequences_go_and_the_request_succeeds(void **state)
{
	static const unsigned order[] = {1, 0, 2};
	struct fixture_usage usage;
	struct stage s;
	struct kv kvs[3];
	uint64_t seq;

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 3; i++)
		fill(&s, s.idler, &kvs[i], 4);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(kvg_idle(s.idler, kvs[order[i]].id), 0);
	seq = create_granted(&s, s.asker, 8);
	usage = usage_of(&s, "search");
	assert_int_equal(usage.charged, 8 * EXTENT);
	assert_int_equal(usage.promised, 8 * EXTENT);
	assert_int_equal(usage.host_charged, IMAGE(4));
	assert_int_equal(usage.refusals, 0);
	fixture_audit(&s.fixture);
	free_sequence(&s, s.asker, seq);
	assert_false(restore(&s, &kvs[0]));
	assert_true(restore(&s, &kvs[1]));
	assert_false(restore(&s, &kvs[2]));
	forget(kvs, 3);
	stage_close(&s);
}

static void test_what_was_taken_up_again_is_not_taken(void **state)
{
	struct stage s;
	struct kv kvs[2];
	uint64_t seq;

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 2; i++)
		fill_idle(&s, s.idler, &kvs[i], 4);
	assert_false(restore(&s, &kvs[0]));
	seq = create_granted(&s, s.asker, 10);
	assert_int_equal(kv_check(&kvs[0]), 0); /* it is readable all the time */
	free_sequence(&s, s.asker, seq);
	assert_true(restore(&s, &kvs[1]));
	forget(kvs, 2);
	stage_close(&s);
}

static void test_contexts_that_nobody_uses_go_before_idle_sequences(void **state)
{
	static const uint8_t key[KVG_KEY_SIZE] = {1, 2, 3};
	struct kvg_context_info info;
	struct stage s;
	struct kv idle, publisher;
	uint64_t seq;

	(void)state;
	stage_open(&s);
	fill_idle(&s, s.idler, &idle, 4);
	fill(&s, s.idler, &publisher, 4);
	if (kvg_publish(s.idler, publisher.id, key, &info) < 0)
		fail_msg("%s", kvg_error(s.idler));
	assert_int_equal(kv_free(&publisher), 0);
	all_turn(&s);
	assert_int_equal(kvg_find(s.asker, key, &info), 0);
	seq = create_granted(&s, s.asker, 12);
	assert_int_equal(kvg_find(s.asker, key, &info), 0); /* on the host, */
	assert_true(usage_of(&s, "search").host_charged > 0);
	assert_int_equal(usage_of(&s, "search").unreturned, 0);
	fixture_audit(&s.fixture);
	free_sequence(&s, s.asker, seq);
	assert_false(restore(&s, &idle));
	(void)create_granted(&s, s.asker, 12); /* it is not idle any more */
	forget(&idle, 1);
	s.context_stays = true; /* for whoever attaches next */
	stage_close(&s);
}

static void test_no_room_on_the_host_is_a_refusal_that_says_so(void **state)
{
	const struct kvg_sqe sqe = create(16);
	char text[FIXTURE_TEXT];
	struct kvg_cqe cqe;
	struct stage s;
	struct kv kv;

	(void)state;
	stage_open(&s);
	assert_int_equal(fixture_budget_change(&s.fixture, "search", "host.max", 64u * 1024u, text), 0);
	fill_idle(&s, s.idler, &kv, 4);
	assert_int_equal(ask(&s, s.asker, &sqe, &cqe, text), -ENOSPC);
	assert_names(text, "tenant search: device budget 4.0 MiB");
	assert_names(text, "1048576 bytes short");
	assert_names(text, "idle 1.0 MiB (no room for it on the host)");
	assert_int_equal(usage_of(&s, "search").refusals, 1);
	fixture_audit(&s.fixture);
	assert_false(restore(&s, &kv));
	forget(&kv, 1);
	stage_close(&s);
}

/* What is too large for the host stands in nobody's way. */
static void test_a_smaller_one_goes_when_the_host_has_no_room_for_the_oldest(void **state)
{
	char text[FIXTURE_TEXT];
	struct stage s;
	struct kv large, small;
	uint64_t seq;

	(void)state;
	stage_open(&s);
	assert_int_equal(fixture_budget_change(&s.fixture, "search", "host.max", IMAGE(4), text), 0);
	fill_idle(&s, s.idler, &large, 8);
	fill_idle(&s, s.idler, &small, 4);
	seq = create_granted(&s, s.asker, 8);
	assert_int_equal(usage_of(&s, "search").refusals, 0);
	free_sequence(&s, s.asker, seq);
	assert_false(restore(&s, &large));
	assert_true(restore(&s, &small));
	forget(&large, 1);
	forget(&small, 1);
	stage_close(&s);
}

/* What is idle is on its way to the host or still mapped when the eviction's room is not within the budget. */
static void test_an_eviction_waits_for_its_room(void **state)
{
	const struct kvg_policy policy = kv_policy(1200, 0.4, 40);
	struct kvg_sqe sqe = {.op = KVG_OP_EVICT, .evict.mode = KVG_EVICT_PREFILL};
	char text[FIXTURE_TEXT];
	struct kvg_cqe cqe;
	struct stage s;
	struct kv idle, kv;

	(void)state;
	stage_open(&s);
	fill(&s, s.idler, &idle, 4);
	assert_int_equal(kv_create(&kv, s.asker, &s.layout, &policy, 1), 0);
	assert_int_equal(kv_feed(&kv, 1201, 1), 0);
	assert_int_equal(usage_of(&s, "search").charged, 14 * EXTENT);
	assert_int_equal(fixture_budget_set(&s.fixture, "search", 12 * EXTENT, text), 0);
	assert_int_equal(kvg_idle(s.idler, idle.id), 0);
	while (usage_of(&s, "search").unreturned < 4 * EXTENT)
		continue;
	sqe.seq = kv.id;
	submit(s.asker, &sqe);
	turn(s.asker);
	if (is_done(s.asker, &cqe, text))
		fail_msg("does not wait: status %d, %s", cqe.status, text);
	while (!is_done(s.asker, &cqe, text))
		all_turn(&s);
	if (cqe.status)
		fail_msg("status %d: %s", cqe.status, text);
	assert_int_equal(usage_of(&s, "search").refusals, 0);
	assert_int_equal(kv_evict_model(&kv, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kv_check(&kv), 0);
	fixture_audit(&s.fixture);
	assert_int_equal(kv_free(&kv), 0);
	assert_true(restore(&s, &idle));
	forget(&idle, 1);
	stage_close(&s);
}

static void wait_unreturned(const struct stage *s, uint64_t bytes)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;

	while (usage_of(s, "search").unreturned < bytes)
		assert_true(fixture_now_ms() < deadline);
}

/* There is room for the second at once, but the first waits for it; the third dies while it waits for its turn. */
static void test_a_newcomer_does_not_overtake(void **state)
{
	const struct kvg_sqe all = create(16), most = create(12);
	uint64_t deadline = fixture_now_ms() + 5000; /* less than pressure_ms */
	char text[KVG_TEXT_SIZE];
	struct kvg_client *second, *third;
	struct kvg_cqe cqe;
	struct stage s;
	struct kv kv;

	(void)state;
	stage_open(&s);
	second = connect_to(&s, "state/search.sock", "second");
	third = connect_to(&s, "state/search.sock", "third");
	fill_idle(&s, s.idler, &kv, 4);
	submit(s.asker, &all);
	wait_unreturned(&s, 4 * EXTENT);
	submit(second, &most);
	submit(third, &most);
	for (unsigned i = 0; i < 10; i++) {
		turn(second);
		turn(third);
	}
	assert_int_equal(usage_of(&s, "search").promised, 0);
	(void)kvg_close(third);
	while (usage_of(&s, "search").workers > 3) /* it does not wait to die */
		assert_true(fixture_now_ms() < deadline);
	while (!is_done(s.asker, &cqe, text))
		all_turn(&s);
	if (cqe.status)
		fail_msg("status %d: %s", cqe.status, text);
	while (!is_done(second, &cqe, text))
		turn(second);
	assert_int_equal(cqe.status, -ENOSPC);
	(void)kvg_close(second);
	assert_int_equal(usage_of(&s, "search").refusals, 1);
	forget(&kv, 1);
	stage_close(&s);
}

/* ---- others ---- */

static void test_a_full_pool_takes_what_others_have_idle_above_their_min(void **state)
{
	const struct kvg_sqe too_much = create(15);
	char text[FIXTURE_TEXT];
	struct kvg_cqe cqe;
	struct stage s;
	struct kv kvs[5];
	uint64_t seq;

	(void)state;
	stage_open(&s);
	assert_int_equal(fixture_budget_change(&s.fixture, "chat", "device.min", 19 * EXTENT, text), 0);
	for (unsigned i = 0; i < 5; i++)
		fill_idle(&s, s.chat, &kvs[i], 5);
	seq = create_granted(&s, s.asker, 12); /* five lack */
	assert_int_equal(usage_of(&s, "chat").charged, 20 * EXTENT);
	free_sequence(&s, s.asker, seq);
	assert_int_equal(ask(&s, s.asker, &too_much, &cqe, text), -ENOSPC);
	assert_names(text, "pool");
	assert_int_equal(usage_of(&s, "chat").charged, 20 * EXTENT); /* 15 would be less than its min */
	fixture_audit(&s.fixture);
	for (unsigned i = 0; i < 5; i++)
		assert_int_equal(restore(&s, &kvs[i]), i == 0);
	assert_int_equal(fixture_budget_reset(&s.fixture, "chat", text), 0); /* no memory of a min comes back later */
	fixture_wait_reserved(&s.fixture, "chat", 0);
	forget(kvs, 5);
	stage_close(&s);
}

/* Each takes what the other has idle, again and again: nobody is refused, and nothing is lost. */
static void test_two_tenants_at_war(void **state)
{
	struct kvg_cqe cqe;
	char text[KVG_TEXT_SIZE];
	struct stage s;
	struct kv ours[4], theirs[4];

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 4; i++) {
		fill_idle(&s, s.idler, &ours[i], 4);
		fill(&s, s.chat, &theirs[i], i < 3 ? 5 : 1);
		assert_int_equal(kvg_idle(s.chat, theirs[i].id), 0);
	}
	for (unsigned round = 0; round < 12; round++) {
		const struct kv *our = &ours[round % 4], *their = &theirs[round * 3 % 4];
		const struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .seq = our->id};
		uint64_t seq;

		submit(s.idler, &sqe);
		(void)restore(&s, their);
		while (!is_done(s.idler, &cqe, text))
			all_turn(&s);
		if (cqe.status)
			fail_msg("status %d: %s", cqe.status, text);
		assert_int_equal(kv_check(our), 0);
		assert_int_equal(kvg_idle(s.idler, our->id), 0);
		assert_int_equal(kvg_idle(s.chat, their->id), 0);
		seq = create_granted(&s, s.chat, round % 2 ? 24 : 20);
		fixture_audit(&s.fixture);
		free_sequence(&s, s.chat, seq);
	}
	assert_int_equal(usage_of(&s, "search").refusals, 0);
	assert_int_equal(usage_of(&s, "chat").refusals, 0);
	forget(ours, 4);
	forget(theirs, 4);
	stage_close(&s);
}

/* ---- races ---- */

static void test_an_idle_sequence_is_touched_while_it_goes(void **state)
{
	struct stage s;
	struct kv kvs[2];

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 2; i++)
		fill_idle(&s, s.idler, &kvs[i], 4);
	for (unsigned round = 0; round < 8; round++) {
		const struct kv *kv = &kvs[round % 2];
		const struct kvg_sqe sqe = create(12), reserve = {.op = KVG_OP_RESERVE, .seq = kv->id};
		struct kvg_cqe cqe;
		char text[KVG_TEXT_SIZE];

		submit(s.asker, &sqe);
		granted(&s, s.idler, &reserve, &cqe);
		assert_int_equal(kv_check(kv), 0);
		while (!is_done(s.asker, &cqe, text))
			all_turn(&s);
		if (cqe.status)
			fail_msg("status %d: %s", cqe.status, text);
		assert_int_equal(kv_check(kv), 0);
		fixture_audit(&s.fixture);
		free_sequence(&s, s.asker, cqe.seq);
		assert_int_equal(kvg_idle(s.idler, kv->id), 0);
	}
	assert_int_equal(usage_of(&s, "search").refusals, 0);
	forget(kvs, 2);
	stage_close(&s);
}

static void test_the_owner_of_what_goes_dies(void **state)
{
	const struct kvg_sqe sqe = create(16);
	struct stage s;
	struct kv kvs[4];

	(void)state;
	stage_open(&s);
	for (unsigned round = 0; round < 4; round++) {
		char text[KVG_TEXT_SIZE];
		struct kvg_cqe cqe;

		for (unsigned i = 0; i < 4; i++)
			fill_idle(&s, s.idler, &kvs[i], 4);
		submit(s.asker, &sqe);
		for (unsigned i = 0; i < round; i++)
			turn(s.asker);
		s.idler = kvg_close(s.idler);
		forget(kvs, 4);
		while (!is_done(s.asker, &cqe, text))
			turn(s.asker);
		if (cqe.status)
			fail_msg("status %d: %s", cqe.status, text);
		s.idler = connect_to(&s, "state/search.sock", "idler");
		fixture_audit(&s.fixture);
		assert_int_equal(usage_of(&s, "search").host_charged, 0);
		free_sequence(&s, s.asker, cqe.seq);
	}
	stage_close(&s);
}

/* ---- high ---- */

static void test_above_high_the_background_reclaims_and_refuses_nobody(void **state)
{
	char text[FIXTURE_TEXT];
	struct fixture_usage usage;
	struct stage s;
	struct kv kvs[2], active;

	(void)state;
	stage_open(&s);
	assert_int_equal(fixture_budget_change(&s.fixture, "search", "device.high", 10 * EXTENT, text), 0);
	for (unsigned i = 0; i < 2; i++)
		fill_idle(&s, s.idler, &kvs[i], 4);
	fill(&s, s.asker, &active, 6);
	settle(&s, "search", 10 * EXTENT);
	usage = usage_of(&s, "search");
	assert_int_equal(usage.charged, 10 * EXTENT); /* and no more than that */
	assert_int_equal(usage.refusals, 0);
	fixture_audit(&s.fixture);
	assert_int_equal(kv_check(&active), 0);
	assert_int_equal(kv_free(&active), 0);
	assert_true(restore(&s, &kvs[0]));
	assert_false(restore(&s, &kvs[1]));
	forget(kvs, 2);
	stage_close(&s);
}

/* ---- the operator ---- */

static void test_a_lower_max_reclaims_down_to_it_and_answers_then(void **state)
{
	static const char *const words[] = {"budget", "set", "search", "device.max=2M", NULL};
	struct process_output output;
	struct fixture_usage usage;
	struct stage s;
	struct kv kvs[4];

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 4; i++)
		fill_idle(&s, s.idler, &kvs[i], 4);
	control(&s, &output, words);
	usage = usage_of(&s, "search"); /* as soon as it has answered */
	assert_int_equal(usage.charged, 8 * EXTENT);
	assert_int_equal(usage.unreturned, 0);
	assert_int_equal(usage.host_charged, 2 * IMAGE(4));
	if (strstr(output.out, "in the way"))
		fail_msg("%s", output.out);
	fixture_audit(&s.fixture);
	assert_false(restore(&s, &kvs[2]));
	assert_false(restore(&s, &kvs[3]));
	assert_int_equal(kv_free(&kvs[2]), 0);
	assert_int_equal(kv_free(&kvs[3]), 0);
	assert_true(restore(&s, &kvs[0]));
	assert_true(restore(&s, &kvs[1]));
	forget(kvs, 2);
	stage_close(&s);
}

static void test_what_is_in_use_stands_in_the_way_of_a_lower_max(void **state)
{
	static const char *const words[] = {"budget", "set", "search", "device.max=1M", NULL};
	const struct kvg_sqe one = create(1);
	struct process_output output;
	char text[FIXTURE_TEXT];
	struct kvg_cqe cqe;
	struct stage s;
	struct kv kv;

	(void)state;
	stage_open(&s);
	fill(&s, s.idler, &kv, 8);
	control(&s, &output, words);
	assert_names(output.out, "in the way");
	assert_names(output.out, "1.0 MiB above device.max; in use 2.0 MiB");
	assert_int_equal(usage_of(&s, "search").device_max, 4 * EXTENT);
	assert_int_equal(ask(&s, s.asker, &one, &cqe, text), -ENOSPC);
	assert_names(text, "budget 1.0 MiB");
	assert_names(text, "1310720 bytes short");
	assert_int_equal(kv_check(&kv), 0);
	fixture_audit(&s.fixture);
	assert_int_equal(kv_free(&kv), 0);
	(void)create_granted(&s, s.asker, 4);
	assert_int_equal(ask(&s, s.asker, &one, &cqe, text), -ENOSPC);
	control(&s, &output, (const char *const[]){"budget", "set", "search", "device.max=512K", NULL});
	assert_names(output.out, "512.0 KiB above device.max; promised 1.0 MiB"); /* nothing of it is there yet */
	stage_close(&s);
}

static void test_budgets_that_go_up_and_down_while_sequences_come_and_go(void **state)
{
	static const char *const bytes[] = {"device.max=1M", "device.max=4M", "device.high=512K", "device.high=0"};
	struct process_output output;
	struct stage s;
	struct kv kvs[4];

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 4; i++)
		fill_idle(&s, s.idler, &kvs[i], 3);
	for (unsigned i = 0; i < 16; i++) {
		const char *const words[] = {"budget", "set", "search", bytes[i % 4], NULL};

		control(&s, &output, words);
		fixture_audit(&s.fixture);
		if (i % 4 != 1 && i % 4 != 3)
			continue;
		(void)restore(&s, &kvs[i / 4 % 4]);
		assert_int_equal(kvg_idle(s.idler, kvs[i / 4 % 4].id), 0);
	}
	for (unsigned i = 0; i < 4; i++)
		(void)restore(&s, &kvs[i]);
	forget(kvs, 4);
	stage_close(&s);
}

static void test_reclaim_counts_what_it_begins(void **state)
{
	static const uint8_t key[KVG_KEY_SIZE] = {1, 2, 3};
	static const char *const some[] = {"--json", "reclaim", "search", "1280K", NULL};
	static const char *const all[] = {"--json", "reclaim", "search", NULL};
	struct process_output output;
	struct stage s;
	struct kv kvs[3], publisher;

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 3; i++)
		fill_idle(&s, s.idler, &kvs[i], 3);
	fill(&s, s.idler, &publisher, 2);
	assert_int_equal(kvg_publish(s.idler, publisher.id, key, NULL), 0);
	assert_int_equal(kv_free(&publisher), 0);
	all_turn(&s);
	control(&s, &output, some);
	assert_names(output.out, "\"device_bytes\": 1310720");
	assert_names(output.out, "\"host_bytes\": 1376256");
	assert_names(output.out, "\"contexts\": 1");
	assert_names(output.out, "\"sequences\": 1");
	assert_int_equal(usage_of(&s, "search").charged, 6 * EXTENT);
	assert_int_equal(usage_of(&s, "search").unreturned, 0);
	fixture_audit(&s.fixture);
	control(&s, &output, all);
	assert_names(output.out, "\"device_bytes\": 1572864");
	assert_names(output.out, "\"contexts\": 0");
	assert_names(output.out, "\"sequences\": 2");
	assert_int_equal(usage_of(&s, "search").charged, 0);
	fixture_audit(&s.fixture);
	for (unsigned i = 0; i < 3; i++)
		assert_true(restore(&s, &kvs[i]));
	forget(kvs, 3);
	s.context_stays = true;
	stage_close(&s);
}

static void test_a_tenant_is_pressed_while_its_workers_are_asked(void **state)
{
	const struct kvg_sqe sqe = create(16);
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;
	char text[KVG_TEXT_SIZE];
	struct kvg_cqe cqe;
	struct stage s;
	struct kv kv;

	(void)state;
	stage_open(&s);
	fill_idle(&s, s.idler, &kv, 4);
	assert_false(usage_of(&s, "search").pressure);
	submit(s.asker, &sqe);
	while (!usage_of(&s, "search").pressure)
		assert_true(fixture_now_ms() < deadline);
	assert_false(usage_of(&s, "chat").pressure);
	assert_int_equal(usage_of(&s, "search").unreturned, 4 * EXTENT);
	while (!is_done(s.asker, &cqe, text))
		all_turn(&s);
	assert_int_equal(cqe.status, 0);
	while (usage_of(&s, "search").pressure)
		assert_true(fixture_now_ms() < deadline);
	free_sequence(&s, s.asker, cqe.seq);
	assert_true(restore(&s, &kv));
	forget(&kv, 1);
	stage_close(&s);
}

/* ---- the end ---- */

/* A request waits, a reclaim is under way, an operator waits for both: the daemon ends at once, and cleanly. */
static void test_the_daemon_ends_while_all_of_them_wait(void **state)
{
	static const char *const words[] = {"reclaim", "search", NULL};
	const struct kvg_sqe sqe = create(16);
	struct process_program program;
	struct process_output output;
	struct stage s;
	struct kv kvs[2];

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 2; i++)
		fill_idle(&s, s.idler, &kvs[i], 4);
	control_start(&s, &program, words);
	wait_unreturned(&s, 8 * EXTENT); /* nobody but the operator wants so much */
	submit(s.asker, &sqe);
	while (!usage_of(&s, "search").pressure) /* somebody waits */
		continue;
	fixture_stop(&s.fixture);
	process_collect(&program, FIXTURE_WAIT_MS, &output);
	assert_int_equal(output.status, 1);
	assert_names(output.err, "the daemon hung up without an answer");
	forget(kvs, 2);
	s.idler = kvg_close(s.idler);
	s.asker = kvg_close(s.asker);
	s.chat = kvg_close(s.chat);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_the_oldest_idle_sequences_go_and_the_request_succeeds),
		cmocka_unit_test(test_what_was_taken_up_again_is_not_taken),
		cmocka_unit_test(test_contexts_that_nobody_uses_go_before_idle_sequences),
		cmocka_unit_test(test_no_room_on_the_host_is_a_refusal_that_says_so),
		cmocka_unit_test(test_a_smaller_one_goes_when_the_host_has_no_room_for_the_oldest),
		cmocka_unit_test(test_an_eviction_waits_for_its_room),
		cmocka_unit_test(test_a_newcomer_does_not_overtake),
		cmocka_unit_test(test_a_full_pool_takes_what_others_have_idle_above_their_min),
		cmocka_unit_test(test_two_tenants_at_war),
		cmocka_unit_test(test_an_idle_sequence_is_touched_while_it_goes),
		cmocka_unit_test(test_the_owner_of_what_goes_dies),
		cmocka_unit_test(test_above_high_the_background_reclaims_and_refuses_nobody),
		cmocka_unit_test(test_a_lower_max_reclaims_down_to_it_and_answers_then),
		cmocka_unit_test(test_what_is_in_use_stands_in_the_way_of_a_lower_max),
		cmocka_unit_test(test_budgets_that_go_up_and_down_while_sequences_come_and_go),
		cmocka_unit_test(test_reclaim_counts_what_it_begins),
		cmocka_unit_test(test_a_tenant_is_pressed_while_its_workers_are_asked),
		cmocka_unit_test(test_the_daemon_ends_while_all_of_them_wait),
	};

	return runner_run("integration/reclaim", tests, sizeof(tests) / sizeof(*tests));
}
