/* What a tenant has on the host goes down to its budget there, and to an operator's word. */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define FRAME 65536u
#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 16M\nextent_size = 256K\nhost.size = 32M\n"                                             \
	"[tenant search]\nsocket = search.sock\n"                                                                      \
	"[tenant chat]\nsocket = chat.sock\n"

struct stage {
	struct fixture fixture;
	struct kvg_layout layout;
	struct kvg_client *client;
};

static void stage_open(struct stage *s)
{
	char path[FIXTURE_PATH];

	fixture_start(&s->fixture, CONFIG);
	kv_small_layout(&s->layout, 32, 8192);
	s->client = kv_connect(fixture_path(&s->fixture, "state/search.sock", path), "worker", &s->layout);
	assert_non_null(s->client);
}

static void stage_close(struct stage *s)
{
	fixture_audit(&s->fixture);
	s->client = kvg_close(s->client);
	assert_true(fixture_wait_gone(&s->fixture, 0, UINT64_MAX, FIXTURE_WAIT_MS));
	fixture_audit(&s->fixture);
	fixture_stop(&s->fixture);
}

static uint64_t host_charged(const struct stage *s)
{
	struct fixture_usage usage;

	fixture_tenant(&s->fixture, "search", &usage);
	return usage.host_charged;
}

/* kvgatectl with up to five words, while the worker takes turns; its exit status. */
static int control(const struct stage *s, const char *const words[6], struct process_output *ret)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;
	struct pollfd fd = {.events = POLLIN};
	struct process_program program;
	char admin[FIXTURE_PATH];
	const char *argv[10] = {KVG_BIN_CTL, "--socket", fixture_path(&s->fixture, "state/admin.sock", admin)};

	for (size_t i = 0; words[i]; i++)
		argv[3 + i] = words[i];
	process_start(&program, argv);
	fd.fd = program.out;
	while (fixture_now_ms() < deadline && poll(&fd, 1, 0) == 0)
		assert_int_equal(kvg_nop(s->client), 0);
	process_collect(&program, FIXTURE_WAIT_MS, ret);
	return ret->status;
}

static void set_budget(const struct stage *s, const char *key, uint64_t bytes, struct process_output *ret)
{
	char value[64];

	(void)snprintf(value, sizeof(value), "%s=%" PRIu64, key, bytes);
	if (control(s, (const char *const[6]){"budget", "set", "search", value}, ret) != 0)
		fail_msg("%s", ret->err);
}

static void assert_names(const char *text, const char *what)
{
	if (!strstr(text, what))
		fail_msg("\"%s\" does not name \"%s\"", text, what);
}

/* A context on the host that nobody uses. Its bytes there. */
static uint64_t put_context(const struct stage *s, uint8_t number)
{
	const struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = 2 * KVG_STRIPE_TOKENS};
	uint8_t key[KVG_KEY_SIZE] = {number};
	uint64_t before = host_charged(s);
	struct process_output output;
	struct kv kv;

	assert_int_equal(kv_create(&kv, s->client, &s->layout, &policy, number), 0);
	assert_int_equal(kv_feed(&kv, 2 * KVG_STRIPE_TOKENS, 1), 0);
	assert_int_equal(kvg_publish(s->client, kv.id, key, NULL), 0);
	assert_int_equal(kv_free(&kv), 0);
	assert_int_equal(kvg_return_memory(s->client), 0);
	if (control(s, (const char *const[6]){"reclaim", "search"}, &output) != 0)
		fail_msg("%s", output.err);
	return host_charged(s) - before;
}

static bool is_there(const struct stage *s, uint8_t number)
{
	uint8_t key[KVG_KEY_SIZE] = {number};
	struct kvg_context_info info;
	int r = kvg_find(s->client, key, &info);

	assert_true(r == 0 || r == -ENOENT);
	return r == 0;
}

/* A sequence whose evicted pairs are on the host. Their bytes there. */
static uint64_t put_retained(const struct stage *s, struct kv *kv, uint32_t seed)
{
	struct kvg_policy policy = kv_policy(1500, 0.1, 50);
	uint64_t before = host_charged(s);

	policy.flags |= KVG_POLICY_RETAIN_HOST;
	assert_int_equal(kv_create(kv, s->client, &s->layout, &policy, seed), 0);
	assert_int_equal(kv_feed(kv, 1501, 1), 0);
	assert_int_equal(kv_evict(kv, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kvg_return_memory(s->client), 0);
	return host_charged(s) - before;
}

/* ---- what comes back ---- */

struct ranked {
	float score;
	size_t at;
};

static int best_first(const void *a, const void *b)
{
	const struct ranked *x = a, *y = b;

	return (x->score < y->score) - (x->score > y->score);
}

/* The model holds the best `count` of what it does not. */
static void hold_best(struct kv *kv, uint64_t count)
{
	const struct kvg_group *g = &kv->layout->groups[0];
	struct ranked *list = calloc((size_t)g->layers * g->head_count * kv->pos, sizeof(*list));
	size_t n = 0;

	assert_non_null(list);
	for (uint32_t layer = 0; layer < g->layers; layer++) {
		for (uint32_t head = 0; head < g->head_count; head++) {
			for (uint32_t pos = 0; pos < kv->pos; pos++) {
				size_t at = ((size_t)layer * g->head_count + head) * kv->capacity + pos;

				if (!kv->held[at])
					list[n++] = (struct ranked){kv_score(kv, layer, head, pos), at};
			}
		}
	}
	assert_true(count < n);
	qsort(list, n, sizeof(*list), best_first);
	for (size_t i = 0; i < count; i++)
		kv->held[list[i].at] = 1;
	kv->fold = kv->pos;
	free(list);
}

/* Everything that is retained comes back, and it is the best. */
static uint64_t recall_all(struct kv *kv)
{
	struct kvg_recall_result result;

	if (kvg_recall(kv->client, kv->id, 1, &result) < 0)
		fail_msg("%s", kvg_error(kv->client));
	hold_best(kv, result.pairs_recalled);
	assert_int_equal(kv_check(kv), 0);
	return result.pairs_recalled;
}

/* ---- tests ---- */

static void test_a_lower_max_drops_contexts_then_the_lowest_scores_and_names_images(void **state)
{
	struct process_output output;
	uint64_t context, retained, image = 0, before;
	struct kv kvs[2], full;
	struct stage s;

	(void)state;
	stage_open(&s);
	context = put_context(&s, 1);
	assert_int_equal(put_context(&s, 2), context);
	assert_int_equal(put_context(&s, 3), context);
	retained = put_retained(&s, &kvs[0], 5);
	assert_int_equal(put_retained(&s, &kvs[1], 6), retained);
	assert_true(context > 2 * FRAME && retained > 8 * FRAME);
	assert_int_equal(kv_create(&full, s.client, &s.layout,
				 &(struct kvg_policy){.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = 512}, 7),
		0);
	assert_int_equal(kv_feed(&full, 512, 1), 0);
	before = host_charged(&s);
	assert_int_equal(kvg_offload(s.client, full.id, NULL), 0);
	image = host_charged(&s) - before;
	assert_int_equal(kvg_return_memory(s.client), 0);

	set_budget(&s, "host.max", host_charged(&s) - 1, &output);
	assert_null(strstr(output.out, "in the way"));
	assert_int_equal(host_charged(&s), 2 * context + 2 * retained + image);
	assert_false(is_there(&s, 1)); /* the oldest */
	assert_true(is_there(&s, 2) && is_there(&s, 3));

	set_budget(&s, "host.max", retained + image, &output);
	assert_null(strstr(output.out, "in the way"));
	assert_false(is_there(&s, 2) || is_there(&s, 3));
	assert_in_range(host_charged(&s), retained + image - 2 * FRAME, retained + image);
	before = host_charged(&s);
	set_budget(&s, "host.max", before - 1, &output);
	assert_int_equal(host_charged(&s), before - FRAME); /* of one of them */
	fixture_audit(&s.fixture);
	assert_true(recall_all(&kvs[0]) > 0);
	assert_true(recall_all(&kvs[1]) > 0);
	assert_int_equal(host_charged(&s), image);

	set_budget(&s, "host.max", image - 1, &output);
	assert_names(output.out, "in the way");
	assert_names(output.out, "above host.max; images of sequences");
	assert_int_equal(host_charged(&s), image);
	assert_int_equal(kvg_restore(s.client, full.id), 0);
	assert_int_equal(kv_check(&full), 0);
	assert_int_equal(host_charged(&s), 0);
	assert_int_equal(kvg_offload(s.client, full.id, NULL), -ENOSPC);
	assert_int_equal(kv_free(&full), 0);
	assert_int_equal(kv_free(&kvs[0]), 0);
	assert_int_equal(kv_free(&kvs[1]), 0);
	stage_close(&s);
}

static void wait_for(const struct stage *s, uint64_t most)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;

	while (host_charged(s) > most)
		assert_true(fixture_now_ms() < deadline);
}

/* Above high what nobody reads goes in the background, and nobody is refused. */
static void test_above_high_the_background_drops(void **state)
{
	struct process_output output;
	struct stage s;
	struct kv kv;

	(void)state;
	stage_open(&s);
	set_budget(&s, "host.high", 6 * FRAME, &output);
	(void)put_context(&s, 1);
	wait_for(&s, 6 * FRAME);
	assert_false(is_there(&s, 1));
	(void)put_retained(&s, &kv, 5);
	wait_for(&s, 6 * FRAME);
	assert_true(recall_all(&kv) > 0);
	set_budget(&s, "host.high", 0, &output);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s);
}

static void test_an_operator_drops_a_context(void **state)
{
	static const struct kvg_policy question = {.mode = KVG_MODE_OFF, .ratio = 1, .context_tokens = 100};
	static const uint8_t key[KVG_KEY_SIZE] = {2};
	struct process_output output;
	uint64_t seq, context;
	struct stage s;

	(void)state;
	stage_open(&s);
	context = put_context(&s, 1);
	(void)put_context(&s, 2);
	assert_int_equal(control(&s, (const char *const[6]){"contexts"}, &output), 0);
	assert_names(output.out, "host");
	if (control(&s, (const char *const[6]){"contexts", "drop", "search", "1"}, &output) != 0)
		fail_msg("%s", output.err);
	assert_names(output.out, "of the device 0 B");
	assert_false(is_there(&s, 1));
	assert_int_equal(host_charged(&s), context);
	assert_int_equal(control(&s, (const char *const[6]){"contexts", "drop", "search", "1"}, &output), 1);
	assert_names(output.err, "tenant search: there is no context 1");
	assert_int_equal(control(&s, (const char *const[6]){"contexts", "drop", "chat", "2"}, &output), 1);
	assert_names(output.err, "tenant chat: there is no context 2");
	assert_int_equal(kvg_attach(s.client, key, &question, &seq, NULL), 0);
	assert_int_equal(control(&s, (const char *const[6]){"contexts", "drop", "search", "2"}, &output), 1);
	assert_names(output.err, "tenant search, context 2: in use: 1 sequences are attached to it");
	assert_int_equal(kvg_free(s.client, seq), 0);
	assert_int_equal(control(&s, (const char *const[6]){"contexts", "drop", "search", "2"}, &output), 0);
	assert_names(output.out, "of the device 512.0 KiB"); /* it is back there, mapped by the worker */
	assert_false(is_there(&s, 2));
	assert_int_equal(kvg_return_memory(s.client), 0);
	assert_true(fixture_wait_charged(&s.fixture, 0, FIXTURE_WAIT_MS));
	stage_close(&s);
}

/* ---- the min of the host ---- */

/* A full sequence of four stripes; what its offload says. */
static int put_image(const struct stage *s, struct kvg_client *client, struct kv *kv)
{
	const struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = 4 * KVG_STRIPE_TOKENS};
	int r;

	assert_int_equal(kv_create(kv, client, &s->layout, &policy, 9), 0);
	assert_int_equal(kv_feed(kv, 4 * KVG_STRIPE_TOKENS, 1), 0);
	r = kvg_offload(client, kv->id, NULL);
	assert_int_equal(kvg_return_memory(client), 0);
	return r;
}

static struct fixture_usage usage_of(const struct stage *s, const char *tenant)
{
	struct fixture_usage usage;

	fixture_tenant(&s->fixture, tenant, &usage);
	return usage;
}

/* As many images as one has room for, of at most `most`; their number. Each that there is no room for stays. */
static unsigned put_images(const struct stage *s, struct kvg_client *client, struct kv *kvs, unsigned most, int *ret)
{
	unsigned n = 0;

	while (n < most && (*ret = put_image(s, client, &kvs[n])) == 0)
		n++;
	return n;
}

/* Another tenant has taken all that it can, more than is its own, and still every byte of the min is there. */
static void test_within_its_min_a_tenant_is_never_refused(void **state)
{
	const uint64_t image = 17 * FRAME, min = 3 * image; /* four stripes and their places */
	struct process_output output;
	struct kvg_client *chat;
	struct kv ours[4], theirs[40];
	char path[FIXTURE_PATH];
	unsigned count, more;
	struct stage s;
	int r = 0;

	(void)state;
	stage_open(&s);
	chat = kv_connect(fixture_path(&s.fixture, "state/chat.sock", path), "other", &s.layout);
	assert_non_null(chat);
	set_budget(&s, "host.min", min, &output);
	count = put_images(&s, chat, theirs, 40, &r);
	assert_int_equal(r, -ENOSPC);
	assert_names(kvg_error(chat), "tenant chat: host pool 32.0 MiB");
	assert_names(kvg_error(chat), "others' unused min 3.1 MiB");
	assert_int_equal(count, ((32u << 20) - min) / image);
	assert_int_equal(usage_of(&s, "chat").host_charged, count * image);
	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(put_image(&s, s.client, &ours[i]), 0);
		assert_int_equal(
			kvg_offload(chat, theirs[count].id, NULL), -ENOSPC); /* nothing of it has become theirs */
	}
	assert_int_equal(usage_of(&s, "search").host_charged, min);
	fixture_audit(&s.fixture);
	more = put_images(&s, s.client, &ours[3], 1, &r); /* what is above its min is anybody's */
	assert_int_equal(more, ((32u << 20) - min) % image / image);
	assert_int_equal(r, -ENOSPC);
	assert_names(kvg_error(s.client), "tenant search: host pool 32.0 MiB");
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(kv_free(&ours[i]), 0);
	assert_int_equal(kvg_offload(chat, theirs[count].id, NULL), -ENOSPC); /* also when it is empty again */
	for (unsigned i = 0; i <= count; i++)
		assert_int_equal(kv_free(&theirs[i]), 0);
	(void)kvg_close(chat);
	stage_close(&s);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_a_lower_max_drops_contexts_then_the_lowest_scores_and_names_images),
		cmocka_unit_test(test_above_high_the_background_drops),
		cmocka_unit_test(test_an_operator_drops_a_context),
		cmocka_unit_test(test_within_its_min_a_tenant_is_never_refused),
	};

	return runner_run("integration/host_budget", tests, sizeof(tests) / sizeof(*tests));
}
