/* Evicted memory is really returned: what the kernel counts, not what the daemon says. */
#include <inttypes.h>
#include <stdio.h>

#include "tests/integration/kv.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define EXTENT  (256u * 1024u)
#define CONTEXT 3000u
#define TOKENS  (CONTEXT + 1)

static uint64_t round_to_extents(uint64_t bytes)
{
	return (bytes + EXTENT - 1) / EXTENT * EXTENT;
}

static void start(struct fixture *f, uint64_t pool, uint64_t max)
{
	char config[512];

	(void)snprintf(config, sizeof(config),
		"[pool]\ndevice.size = %" PRIu64 "\nextent_size = 256K\n"
		"[tenant a]\nsocket = a.sock\ndevice.max = %" PRIu64 "\n"
		"[tenant b]\nsocket = b.sock\ndevice.max = %" PRIu64 "\n",
		pool, max, pool);
	fixture_start(f, config);
}

static struct kvg_client *open_tenant(const struct fixture *f, char tenant, const struct kvg_layout *layout)
{
	char name[32], path[FIXTURE_PATH];
	struct kvg_client *client;

	(void)snprintf(name, sizeof(name), "state/%c.sock", tenant);
	client = kv_connect(fixture_path(f, name, path), "memory", layout);
	assert_non_null(client);
	return client;
}

/* What the daemon's extents take, which must be what it says and what the worker has mapped. */
static uint64_t settled_bytes(const struct fixture *f, struct kvg_client *client)
{
	struct fixture_usage usage;

	assert_int_equal(kvg_return_memory(client), 0);
	fixture_tenant(f, "a", &usage);
	assert_int_equal(usage.unreturned, 0);
	assert_int_equal(usage.charged, fixture_physical(f));
	assert_int_equal(usage.charged, kvg_mapped_bytes(client));
	return usage.charged;
}

/* Fills and evicts one sequence in tenant a; returns what is held after it, within the bound. */
static uint64_t evict_within_bound(struct fixture *f, struct kv *kv, double ratio)
{
	uint64_t full = round_to_extents(kv_full_bytes(kv->layout, TOKENS)), held;

	assert_int_equal(kv_feed(kv, TOKENS, 1), 0);
	assert_true(settled_bytes(f, kv->client) >= full);
	assert_int_equal(kv_evict(kv, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kv_check(kv), 0);
	held = settled_bytes(f, kv->client);
	print_message("ratio %.1f: full %" PRIu64 ", held %" PRIu64 ", bound %.0f\n", ratio, full, held,
		1.25 * ratio * (double)full + 4.0 * EXTENT);
	assert_true((double)held <= 1.25 * ratio * (double)full + 4.0 * EXTENT);
	fixture_audit(f);
	return held;
}

static void second_tenant_takes(
	struct fixture *f, struct kvg_client *b, const struct kvg_layout *layout, const struct kvg_policy *policy)
{
	uint32_t tokens = policy->prefix_tokens + policy->context_tokens;
	struct kv kv;

	if (kv_create(&kv, b, layout, policy, 5) < 0)
		fail_msg("%s", kvg_error(b));
	assert_int_equal(kv_feed(&kv, tokens, 9), 0);
	assert_int_equal(kv_check(&kv), 0);
	fixture_audit(f);
	assert_int_equal(kv_free(&kv), 0);
}

static void returned_at(double ratio, enum kv_scores scores)
{
	struct kvg_policy policy = kv_policy(CONTEXT, ratio, 60), rest = {.mode = KVG_MODE_OFF, .ratio = 1};
	struct kvg_layout layout;
	struct fixture f;
	struct kvg_client *a, *b;
	struct kv kv;
	uint64_t pool, full, held, seq;

	kv_pilot_layout(&layout, KVG_BF16, 2, 4096);
	full = round_to_extents(kv_full_bytes(&layout, TOKENS));
	pool = round_to_extents(full + 2 * kv_stripe_bytes(&layout)) + 2 * EXTENT;
	start(&f, pool, pool);
	a = open_tenant(&f, 'a', &layout);
	b = open_tenant(&f, 'b', &layout);
	assert_int_equal(kv_create(&kv, a, &layout, &policy, 3), 0);
	kv.scores = scores;
	rest.context_tokens =
		KVG_STRIPE_TOKENS * (uint32_t)((1 - 1.25 * ratio) * (double)full / (double)kv_stripe_bytes(&layout));
	assert_true(kvg_create(b, &rest, &seq) < 0);
	held = evict_within_bound(&f, &kv, ratio);
	rest.context_tokens = KVG_STRIPE_TOKENS * (uint32_t)((full - held) / kv_stripe_bytes(&layout));
	second_tenant_takes(&f, b, &layout, &rest);
	assert_int_equal(kv_check(&kv), 0);
	assert_int_equal(kv_free(&kv), 0);
	assert_true(fixture_wait_charged(&f, 0, FIXTURE_WAIT_MS));
	fixture_audit(&f);
	(void)kvg_close(a);
	(void)kvg_close(b);
	fixture_stop(&f);
}

static void test_three_tenths_of_a_sequence_hold_three_tenths_of_its_memory(void **state)
{
	(void)state;
	returned_at(0.3, KV_SCORES_RANDOM);
}

static void test_one_tenth_of_a_sequence_holds_one_tenth_of_its_memory(void **state)
{
	(void)state;
	returned_at(0.1, KV_SCORES_RANDOM);
}

static void test_three_tenths_hold_no_more_where_some_heads_keep_nearly_all(void **state)
{
	(void)state;
	returned_at(0.3, KV_SCORES_SKEWED);
}

static void test_one_tenth_holds_no_more_where_some_heads_keep_nearly_all(void **state)
{
	(void)state;
	returned_at(0.1, KV_SCORES_SKEWED);
}

static void evict_in_full_plus_two_stripes(enum kv_scores scores, double ratio)
{
	struct kvg_policy policy = kv_policy(CONTEXT, ratio, 60);
	struct kvg_layout layout;
	struct fixture f;
	struct kvg_client *a;
	struct kv kv;
	uint64_t max;

	kv_pilot_layout(&layout, KVG_BF16, 2, 4096);
	max = round_to_extents(kv_full_bytes(&layout, TOKENS)) + round_to_extents(2 * kv_stripe_bytes(&layout));
	start(&f, 64u << 20, max);
	a = open_tenant(&f, 'a', &layout);
	if (kv_create(&kv, a, &layout, &policy, 3) < 0)
		fail_msg("%s", kvg_error(a));
	kv.scores = scores;
	(void)evict_within_bound(&f, &kv, ratio);
	struct fixture_usage usage;
	fixture_tenant(&f, "a", &usage);
	assert_true(usage.high_water <= max);
	assert_int_equal(kv_free(&kv), 0);
	(void)kvg_close(a);
	fixture_audit(&f);
	fixture_stop(&f);
}

static void test_an_eviction_needs_no_more_than_two_spare_stripes(void **state)
{
	(void)state;
	evict_in_full_plus_two_stripes(KV_SCORES_RANDOM, 0.3);
	evict_in_full_plus_two_stripes(KV_SCORES_SKEWED, 0.3);
	evict_in_full_plus_two_stripes(KV_SCORES_RANDOM, 0.9);
}

static void test_what_was_reserved_and_not_used_goes_back_with_the_eviction(void **state)
{
	struct kvg_policy policy = kv_policy(1000, 0.1, 20);
	struct kvg_layout layout;
	struct fixture f;
	struct kvg_client *a;
	struct kv kv;
	uint64_t before, after;

	(void)state;
	policy.max_new_tokens = 1500;
	kv_pilot_layout(&layout, KVG_BF16, 2, 4096);
	start(&f, 64u << 20, 64u << 20);
	a = open_tenant(&f, 'a', &layout);
	assert_int_equal(kv_create(&kv, a, &layout, &policy, 3), 0);
	assert_int_equal(kvg_reserve(a, kv.id, 2500), 0);
	assert_int_equal(kv_feed(&kv, 1001, 1), 0);
	before = settled_bytes(&f, a);
	assert_true(before >= kv_full_bytes(&layout, 2500));
	assert_int_equal(kv_evict(&kv, KVG_EVICT_PREFILL), 0);
	after = settled_bytes(&f, a);
	assert_true((double)after <= 0.125 * (double)kv_full_bytes(&layout, 1001) + 4.0 * EXTENT);
	assert_int_equal(kv_check(&kv), 0);
	assert_int_equal(kv_free(&kv), 0);
	assert_int_equal(settled_bytes(&f, a), 0);
	fixture_audit(&f);
	(void)kvg_close(a);
	fixture_stop(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_three_tenths_of_a_sequence_hold_three_tenths_of_its_memory),
		cmocka_unit_test(test_one_tenth_of_a_sequence_holds_one_tenth_of_its_memory),
		cmocka_unit_test(test_three_tenths_hold_no_more_where_some_heads_keep_nearly_all),
		cmocka_unit_test(test_one_tenth_holds_no_more_where_some_heads_keep_nearly_all),
		cmocka_unit_test(test_an_eviction_needs_no_more_than_two_spare_stripes),
		cmocka_unit_test(test_what_was_reserved_and_not_used_goes_back_with_the_eviction),
	};

	return runner_run("memory", tests, sizeof(tests) / sizeof(*tests));
}
