#include "tests/integration/turns.h"

#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "tests/support/runner.h"

#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 8M\nextent_size = 256K\nhost.size = 32M\n"                                              \
	"[tenant search]\nsocket = search.sock\ndevice.max = 4M\n"                                                     \
	"[tenant chat]\nsocket = chat.sock\ndevice.max = 8M\n"

struct kvg_client *connect_to(const struct stage *s, const char *socket, const char *name)
{
	char path[FIXTURE_PATH];
	struct kvg_client *client = kv_connect(fixture_path(&s->fixture, socket, path), name, &s->layout);

	assert_non_null(client);
	return client;
}

void stage_open(struct stage *s)
{
	s->context_stays = false;
	fixture_start(&s->fixture, CONFIG);
	kv_small_layout(&s->layout, 32, 8192);
	s->idler = connect_to(s, "state/search.sock", "idler");
	s->asker = connect_to(s, "state/search.sock", "asker");
	s->chat = connect_to(s, "state/chat.sock", "chat");
}

void stage_close(struct stage *s)
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

void assert_names(const char *text, const char *what)
{
	if (!strstr(text, what))
		fail_msg("\"%s\" does not name \"%s\"", text, what);
}

/* ---- turns ---- */

/* A worker unmaps and acknowledges what it was asked to, and answers pressure. */
void turn(struct kvg_client *client)
{
	if (kvg_nop(client) < 0)
		fail_msg("%s", kvg_error(client));
}

void all_turn(const struct stage *s)
{
	turn(s->idler);
	turn(s->asker);
	turn(s->chat);
}

struct kvg_sqe create(uint32_t stripes)
{
	return (struct kvg_sqe){.op = KVG_OP_CREATE,
		.create = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = stripes * KVG_STRIPE_TOKENS}};
}

void submit(struct kvg_client *client, const struct kvg_sqe *sqe)
{
	if (kvg_submit(client, sqe) < 0)
		fail_msg("%s", kvg_error(client));
}

bool is_done(struct kvg_client *client, struct kvg_cqe *ret, char *text)
{
	const char *why = "";
	int r = kvg_reap(client, ret, &why, 1, 0);

	assert_true(r >= 0);
	if (r)
		(void)snprintf(text, KVG_TEXT_SIZE, "%s", why);
	return r;
}

/* One entry while all workers take turns; the status. */
int ask(const struct stage *s, struct kvg_client *client, const struct kvg_sqe *sqe, struct kvg_cqe *ret, char *text)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;

	submit(client, sqe);
	while (!is_done(client, ret, text)) {
		assert_true(fixture_now_ms() < deadline);
		all_turn(s);
	}
	return ret->status;
}

void granted(const struct stage *s, struct kvg_client *client, const struct kvg_sqe *sqe, struct kvg_cqe *ret)
{
	char text[KVG_TEXT_SIZE];

	if (ask(s, client, sqe, ret, text) < 0)
		fail_msg("status %d: %s", ret->status, text);
}

uint64_t create_granted(const struct stage *s, struct kvg_client *client, uint32_t stripes)
{
	const struct kvg_sqe sqe = create(stripes);
	struct kvg_cqe cqe;

	granted(s, client, &sqe, &cqe);
	return cqe.seq;
}

void free_sequence(const struct stage *s, struct kvg_client *client, uint64_t seq)
{
	const struct kvg_sqe sqe = {.op = KVG_OP_FREE, .seq = seq};
	struct kvg_cqe cqe;

	granted(s, client, &sqe, &cqe);
	all_turn(s);
}

/* Brings it back and looks at all of it. Whether it was on the host. */
bool restore(const struct stage *s, const struct kv *kv)
{
	const struct kvg_sqe sqe = {.op = KVG_OP_RESTORE, .seq = kv->id};
	struct kvg_cqe cqe;

	granted(s, kv->client, &sqe, &cqe);
	assert_int_equal(kv_check(kv), 0);
	return cqe.value[0] != 0;
}

/* A full sequence of so many stripes. */
void fill(const struct stage *s, struct kvg_client *client, struct kv *kv, uint32_t stripes)
{
	struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = stripes * KVG_STRIPE_TOKENS};

	assert_int_equal(kv_create(kv, client, &s->layout, &policy, stripes), 0);
	assert_int_equal(kv_feed(kv, stripes * KVG_STRIPE_TOKENS, 1), 0);
}

void fill_idle(const struct stage *s, struct kvg_client *client, struct kv *kv, uint32_t stripes)
{
	fill(s, client, kv, stripes);
	assert_int_equal(kvg_idle(client, kv->id), 0);
}

void forget(struct kv *kvs, unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		kv_forget(&kvs[i]);
}

struct fixture_usage usage_of(const struct stage *s, const char *tenant)
{
	struct fixture_usage usage;

	fixture_tenant(&s->fixture, tenant, &usage);
	return usage;
}

/* All turn until a tenant has at most `charged` bytes, none of them unreturned. */
void settle(const struct stage *s, const char *tenant, uint64_t charged)
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

void control_start(const struct stage *s, struct process_program *program, const char *const words[])
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
void control(const struct stage *s, struct process_output *ret, const char *const words[])
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

void wait_unreturned(const struct stage *s, uint64_t bytes)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;

	while (usage_of(s, "search").unreturned < bytes)
		assert_true(fixture_now_ms() < deadline);
}
