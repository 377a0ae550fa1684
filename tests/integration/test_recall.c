/* What evictions dropped comes back from the host's memory, through the real daemon. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "tests/integration/kv.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 64M\nextent_size = 256K\nhost.size = 64M\n"                                             \
	"[tenant search]\nsocket = search.sock\ndevice.max = 64M\nhost.max = "

#define FRAME (64u << 10) /* what host memory is given in */

struct stage {
	struct fixture fixture;
	struct kvg_layout layout;
	struct kvg_client *client;
};

static void stage_open(struct stage *s, const char *host_max)
{
	char path[FIXTURE_PATH], config[512];

	(void)snprintf(config, sizeof(config), "%s%s\n", CONFIG, host_max);
	fixture_start(&s->fixture, config);
	kv_pilot_layout(&s->layout, KVG_BF16, 8, 4096);
	s->client = kv_connect(fixture_path(&s->fixture, "state/search.sock", path), "recall", &s->layout);
	assert_non_null(s->client);
}

static uint64_t host_charged(const struct stage *s)
{
	struct fixture_usage usage;

	fixture_tenant(&s->fixture, "search", &usage);
	return usage.host_charged;
}

static void stage_close(struct stage *s)
{
	assert_true(fixture_wait_charged(&s->fixture, 0, FIXTURE_WAIT_MS));
	assert_int_equal(host_charged(s), 0);
	fixture_audit(&s->fixture);
	s->client = kvg_close(s->client);
	fixture_stop(&s->fixture);
}

static struct kvg_policy policy_of(double ratio, uint8_t level)
{
	struct kvg_policy policy = kv_policy(1500, ratio, 59);

	policy.level = level;
	policy.chunk_tokens = 600;
	policy.flags |= KVG_POLICY_RETAIN_HOST;
	policy.budget = 500;
	policy.max_new_tokens = 600;
	return policy;
}

/* A prompt in chunks, evicted after each. Scores are the seed's, whatever the policy. */
static struct kv read_prompt(const struct stage *s, const struct kvg_policy *policy, uint32_t seed)
{
	uint32_t total = policy->prefix_tokens + policy->context_tokens;
	struct kv kv;

	assert_int_equal(kv_create(&kv, s->client, &s->layout, policy, seed), 0);
	while (kv.pos < total) {
		uint32_t end = kv.pos + policy->chunk_tokens;

		assert_int_equal(kv_feed(&kv, (end < total ? end : total) - kv.pos, 1), 0);
		if (policy->ratio < 1.0)
			assert_int_equal(kv_evict(&kv, KVG_EVICT_PREFILL), 0);
	}
	assert_int_equal(kv_check(&kv), 0);
	return kv;
}

/* The model of one holds what the other does besides. Returns how many pairs that brings. */
static uint64_t take_over(struct kv *kv, const struct kv *other)
{
	const struct kvg_group *g = &kv->layout->groups[0];
	uint64_t came = 0;

	for (size_t i = 0; i < (size_t)g->layers * g->head_count * kv->capacity; i++) {
		came += other->held[i] && !kv->held[i];
		kv->held[i] |= other->held[i];
	}
	kv->fold = kv->pos;
	return came;
}

static void recall(struct kv *kv, double ratio, uint64_t came)
{
	struct kvg_recall_result result;

	if (kvg_recall(kv->client, kv->id, ratio, &result) < 0)
		fail_msg("%s", kvg_error(kv->client));
	assert_int_equal(result.pairs_recalled, came);
	assert_int_equal(result.pairs_held, kv_pairs(kv));
	assert_int_equal(kv_check(kv), 0);
}

/* Evicted at 0.1 and recalled to 0.3 a sequence holds what one evicted at 0.3 does; then it decodes, and more comes. */
static void test_a_recall_is_the_eviction_at_its_ratio(void **state)
{
	struct stage s;

	(void)state;
	stage_open(&s, "64M");
	for (unsigned level = KVG_LEVEL_PAIR; level <= KVG_LEVEL_ADAKV_LAYER; level++) {
		struct kvg_policy policy = policy_of(0.1, (uint8_t)level), higher = policy_of(0.3, (uint8_t)level);
		struct kv whole = read_prompt(&s, &higher, 5), kv = read_prompt(&s, &policy, 5);
		uint64_t came = take_over(&kv, &whole), before = host_charged(&s);

		assert_true(came > 0 && before > 0);
		recall(&kv, 0.3, came);
		assert_true(host_charged(&s) < before);
		fixture_audit(&s.fixture);
		for (unsigned i = 0; i < 3; i++) {
			assert_int_equal(kv_feed(&kv, 128, 2), 0);
			assert_int_equal(kv_evict(&kv, KVG_EVICT_DECODE), 0);
			assert_int_equal(kv_check(&kv), 0);
		}
		recall(&kv, 0.3, take_over(&kv, &whole)); /* whatever decoding has dropped of it */
		fixture_audit(&s.fixture);
		assert_int_equal(kv_free(&whole), 0);
		assert_int_equal(kv_free(&kv), 0);
	}
	stage_close(&s);
}

static void test_a_budget_brings_the_best_of_all(void **state)
{
	struct kvg_policy policy = policy_of(1.0, KVG_LEVEL_PAIR), higher = policy;
	struct kvg_recall_result result;
	struct kv whole, kv;
	uint64_t came;
	struct stage s;

	(void)state;
	stage_open(&s, "64M");
	policy.budget = 400;
	higher.budget = 900;
	whole = read_prompt(&s, &higher, 6);
	kv = read_prompt(&s, &policy, 6);
	assert_int_equal(kv_evict(&whole, KVG_EVICT_DECODE), 0);
	assert_int_equal(kv_evict(&kv, KVG_EVICT_DECODE), 0);
	came = take_over(&kv, &whole);
	assert_true(came > 0);
	assert_int_equal(kvg_recall_budget(s.client, kv.id, 900, &result), 0);
	assert_int_equal(result.pairs_recalled, came);
	assert_int_equal(kv_check(&kv), 0);
	assert_int_equal(kv_free(&whole), 0);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s);
}

/* The host's budget is never passed, the eviction is as ever, and what there was room for comes back. */
static void test_little_host_memory_keeps_the_best(void **state)
{
	struct kvg_policy policy = policy_of(0.1, KVG_LEVEL_PAIR);
	struct kvg_recall_result result;
	struct kv kv;
	struct stage s;

	(void)state;
	stage_open(&s, "256K");
	kv = read_prompt(&s, &policy, 7);
	assert_int_equal(host_charged(&s), 256 << 10);
	fixture_audit(&s.fixture);
	assert_int_equal(kvg_recall(s.client, kv.id, 1.0, &result), 0);
	assert_true(result.pairs_recalled > 4 * (FRAME / 160) && result.pairs_recalled <= 4 * (FRAME / 140));
	assert_int_equal(result.pairs_held, kv_pairs(&kv) + result.pairs_recalled);
	assert_int_equal(host_charged(&s), 0);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s);
}

/* More than the device's budget has: refused with the bytes, nothing has changed, and later it works. */
static void test_little_device_memory_refuses(void **state)
{
	struct kvg_policy policy = policy_of(0.1, KVG_LEVEL_PAIR), higher = policy_of(0.9, KVG_LEVEL_PAIR);
	struct kv whole, kv;
	struct fixture_usage usage;
	char text[FIXTURE_TEXT];
	struct stage s;

	(void)state;
	stage_open(&s, "64M");
	whole = read_prompt(&s, &higher, 8);
	kv = read_prompt(&s, &policy, 8);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(fixture_budget_set(&s.fixture, "search", usage.charged + usage.promised, text), 0);
	assert_int_equal(kvg_recall(s.client, kv.id, 0.9, NULL), -ENOSPC);
	assert_non_null(strstr(kvg_error(s.client), "the recall needs"));
	assert_non_null(strstr(kvg_error(s.client), "bytes short"));
	assert_int_equal(kv_check(&kv), 0);
	fixture_audit(&s.fixture);
	assert_int_equal(fixture_budget_set(&s.fixture, "search", 64 << 20, text), 0);
	recall(&kv, 0.9, take_over(&kv, &whole));
	assert_int_equal(kv_free(&whole), 0);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s);
}

static void test_what_cannot_be_is_refused(void **state)
{
	struct kvg_policy policy = policy_of(0.1, KVG_LEVEL_PAIR), plain = policy;
	struct kv kv, other;
	struct stage s;

	(void)state;
	stage_open(&s, "64M");
	plain.flags &= (uint16_t)~KVG_POLICY_RETAIN_HOST;
	kv = read_prompt(&s, &policy, 9);
	other = read_prompt(&s, &plain, 9);
	assert_int_equal(kvg_recall(s.client, other.id, 0.3, NULL), -EINVAL);
	assert_non_null(strstr(kvg_error(s.client), "without RETAIN_HOST"));
	assert_int_equal(kvg_recall(s.client, kv.id, 0.0, NULL), -EINVAL);
	assert_int_equal(kvg_recall(s.client, kv.id, 1.01, NULL), -EINVAL);
	assert_int_equal(kvg_recall_budget(s.client, kv.id, 0, NULL), -EINVAL);
	assert_int_equal(kvg_offload(s.client, kv.id, NULL), 0);
	assert_int_equal(kvg_recall(s.client, kv.id, 0.3, NULL), -EBUSY);
	assert_int_equal(kvg_restore(s.client, kv.id), 0);
	assert_int_equal(kv_check(&kv), 0);
	assert_int_equal(kvg_recall(s.client, kv.id, 0.3, NULL), 0);
	assert_int_equal(kv_free(&kv), 0);
	assert_int_equal(kv_free(&other), 0);
	stage_close(&s);
}

/* A worker that goes takes along what the host kept for it. */
static void test_host_memory_comes_back_with_the_worker(void **state)
{
	struct kvg_policy policy = policy_of(0.1, KVG_LEVEL_PAIR);
	struct stage s;
	struct kv kv[3];

	(void)state;
	stage_open(&s, "64M");
	for (unsigned i = 0; i < 3; i++)
		kv[i] = read_prompt(&s, &policy, 10 + i);
	assert_true(host_charged(&s) > 3 * (3u << 20));
	for (unsigned i = 0; i < 3; i++)
		kv_forget(&kv[i]);
	s.client = kvg_close(s.client);
	assert_true(fixture_wait_gone(&s.fixture, 0, 0, FIXTURE_WAIT_MS));
	assert_int_equal(host_charged(&s), 0);
	fixture_audit(&s.fixture);
	fixture_stop(&s.fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_a_recall_is_the_eviction_at_its_ratio),
		cmocka_unit_test(test_a_budget_brings_the_best_of_all),
		cmocka_unit_test(test_little_host_memory_keeps_the_best),
		cmocka_unit_test(test_little_device_memory_refuses),
		cmocka_unit_test(test_what_cannot_be_is_refused),
		cmocka_unit_test(test_host_memory_comes_back_with_the_worker),
	};

	return runner_run("recall", tests, sizeof(tests) / sizeof(tests[0]));
}
