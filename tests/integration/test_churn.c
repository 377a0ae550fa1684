/*
 * Eight sequences of different lengths come, evict and go: after every operation the physical
 * memory is within the bound, and what was kept is still there. KVG_CHURN_SECONDS (20) and
 * KVG_CHURN_SEED (of the clock) come from the environment; the seed is printed.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "tests/integration/kv.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define EXTENT    (256u * 1024u)
#define SEQUENCES 8

struct churn {
	struct fixture fixture;
	struct kvg_layout layout;
	struct kvg_client *client;
	uint64_t random;
	uint64_t operations, evictions;
	double fullest; /* largest share of the bound that was in use */
	struct one {
		struct kv kv;
		int live, evicted;
	} one[SEQUENCES];
};

static uint64_t setting(const char *name, uint64_t otherwise)
{
	const char *value = getenv(name);

	return value ? strtoull(value, NULL, 10) : otherwise;
}

static uint32_t between(struct churn *c, uint32_t low, uint32_t high)
{
	return low + (uint32_t)(kv_random(&c->random) % (high - low + 1));
}

static double bound(const struct churn *c)
{
	uint32_t rows = c->layout.groups[0].layers * c->layout.groups[0].head_count;
	double stripe = (double)kv_stripe_bytes(&c->layout), block = stripe / rows / KVG_RUN_BLOCKS, sum = 4.0 * EXTENT;

	for (int i = 0; i < SEQUENCES; i++) {
		const struct kv *kv = &c->one[i].kv;
		double full = c->one[i].live ? (double)kv_full_bytes(&c->layout, kv->pos) : 0;

		if (c->one[i].live)
			sum += c->one[i].evicted ? 1.25 * kv->policy.ratio * full + 2.0 * rows * block : full + stripe;
	}
	return sum;
}

static void check_bound(struct churn *c)
{
	double limit = bound(c), held = (double)fixture_physical(&c->fixture);

	if (held / limit > c->fullest)
		c->fullest = held / limit;
	if (held > limit)
		fail_msg("operation %" PRIu64 ": %.0f bytes held, bound %.0f", c->operations, held, limit);
}

static void come(struct churn *c, struct one *one)
{
	static const double ratios[] = {0.1, 0.3, 0.5};
	struct kvg_policy policy = kv_policy(between(c, 150, 3000), ratios[between(c, 0, 2)], 16);

	policy.window = policy.context_tokens / 50;
	if (kv_create(&one->kv, c->client, &c->layout, &policy, between(c, 1, 1u << 20)) < 0)
		fail_msg("create: %s", kvg_error(c->client));
	one->kv.scores = between(c, 0, 1) ? KV_SCORES_SKEWED : KV_SCORES_RANDOM;
	one->live = 1;
	one->evicted = 0;
}

/* Feeds up to a thousand tokens, evicts when the prompt is complete, and later leaves. */
static void step(struct churn *c, struct one *one)
{
	uint32_t need = one->live ? one->kv.policy.prefix_tokens + one->kv.policy.context_tokens - one->kv.pos : 0;

	if (!one->live) {
		come(c, one);
	} else if (need > 0) {
		assert_int_equal(
			kv_feed(&one->kv, need > 1000 ? between(c, 200, 1000) : need, (uint8_t)between(c, 1, 255)), 0);
	} else if (!one->evicted) {
		assert_int_equal(kv_evict(&one->kv, KVG_EVICT_PREFILL), 0);
		one->evicted = 1;
		c->evictions++;
	} else {
		assert_int_equal(kv_check(&one->kv), 0);
		assert_int_equal(kv_free(&one->kv), 0);
		one->live = 0;
	}
}

static void churn_open(struct churn *c)
{
	char path[FIXTURE_PATH];

	*c = (struct churn){.random = setting("KVG_CHURN_SEED", (uint64_t)time(NULL))};
	print_message("KVG_CHURN_SEED=%" PRIu64 "\n", c->random);
	fixture_start(&c->fixture,
		"[pool]\ndevice.size = 128M\nextent_size = 256K\n[tenant a]\nsocket = a.sock\ndevice.max = 128M\n");
	kv_pilot_layout(&c->layout, KVG_BF16, SEQUENCES, 4096);
	c->client = kv_connect(fixture_path(&c->fixture, "state/a.sock", path), "churn", &c->layout);
	assert_non_null(c->client);
}

static void churn_close(struct churn *c)
{
	for (int i = 0; i < SEQUENCES; i++)
		if (c->one[i].live)
			assert_int_equal(kv_free(&c->one[i].kv), 0);
	assert_true(fixture_wait_charged(&c->fixture, 0, FIXTURE_WAIT_MS));
	fixture_audit(&c->fixture);
	c->client = kvg_close(c->client);
	fixture_stop(&c->fixture);
}

static void test_memory_stays_within_the_bound_while_sequences_come_and_go(void **state)
{
	uint64_t end;
	struct churn c;

	(void)state;
	churn_open(&c);
	end = fixture_now_ms() + 1000 * setting("KVG_CHURN_SECONDS", 20);
	while (fixture_now_ms() < end) {
		step(&c, &c.one[between(&c, 0, SEQUENCES - 1)]);
		assert_int_equal(kvg_return_memory(c.client), 0);
		c.operations++;
		check_bound(&c);
		if (c.operations % 20 == 0) {
			const struct one *one = &c.one[between(&c, 0, SEQUENCES - 1)];

			fixture_audit(&c.fixture);
			if (one->live)
				assert_int_equal(kv_check(&one->kv), 0);
		}
	}
	print_message("%" PRIu64 " operations, %" PRIu64 " evictions, at most %.0f%% of the bound\n", c.operations,
		c.evictions, 100 * c.fullest);
	assert_true(c.evictions > 0);
	churn_close(&c);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_memory_stays_within_the_bound_while_sequences_come_and_go),
	};

	return runner_run("churn", tests, sizeof(tests) / sizeof(*tests));
}
