/* One worker, one tenant: what a sequence holds after every kind of call, byte by byte. */
#include <errno.h>
#include <math.h>

#include "tests/integration/kv.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 64M\nextent_size = 256K\n[tenant search]\nsocket = search.sock\ndevice.max = 64M\n"

/* The usual stage: a daemon, a connected worker with the pilot's geometry, one sequence. */
struct stage {
	struct fixture fixture;
	struct kvg_layout layout;
	struct kvg_client *client;
	struct kv kv;
};

static void stage_connect(struct stage *s, uint32_t dtype)
{
	char path[FIXTURE_PATH];

	fixture_start(&s->fixture, CONFIG);
	kv_pilot_layout(&s->layout, dtype, 4, 4096);
	s->client = kv_connect(fixture_path(&s->fixture, "state/search.sock", path), "sequence", &s->layout);
	assert_non_null(s->client);
}

static void stage_open(struct stage *s, const struct kvg_policy *policy)
{
	stage_connect(s, KVG_BF16);
	assert_int_equal(kv_create(&s->kv, s->client, &s->layout, policy, 11), 0);
}

/* Everything freed is back in the pool and the books agree. */
static void stage_close(struct stage *s)
{
	assert_int_equal(kv_check(&s->kv), 0);
	fixture_audit(&s->fixture);
	assert_int_equal(kv_free(&s->kv), 0);
	assert_true(fixture_wait_charged(&s->fixture, 0, FIXTURE_WAIT_MS));
	fixture_audit(&s->fixture);
	s->client = kvg_close(s->client);
	fixture_stop(&s->fixture);
}

static void feed_and_evict(struct kv *kv, uint32_t tokens)
{
	assert_int_equal(kv_feed(kv, tokens, 1), 0);
	assert_int_equal(kv_check(kv), 0);
	assert_int_equal(kv_evict(kv, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kv_check(kv), 0);
}

static void test_pairs_are_where_the_tables_say_in_each_dtype(void **state)
{
	static const uint32_t dtypes[] = {KVG_BF16, KVG_F16, KVG_F32};
	struct kvg_policy policy = kv_policy(300, 1.0, 16);

	(void)state;
	for (size_t i = 0; i < sizeof(dtypes) / sizeof(*dtypes); i++) {
		struct stage s;

		stage_connect(&s, dtypes[i]);
		assert_int_equal(kv_create(&s.kv, s.client, &s.layout, &policy, 1), 0);
		assert_int_equal(kv_feed(&s.kv, 1, 3), 0);
		assert_int_equal(kv_feed(&s.kv, 127, 3), 0);
		assert_int_equal(kv_feed(&s.kv, 130, 3), 0);
		assert_int_equal(kv_pairs(&s.kv), 258 * 24);
		stage_close(&s);
	}
}

static void evict_at_level(uint8_t level)
{
	struct kvg_policy policy = kv_policy(900, 0.3, 59);
	struct stage s;

	policy.level = level;
	stage_open(&s, &policy);
	feed_and_evict(&s.kv, 901);
	assert_true(kv_pairs(&s.kv) < 901 * 24);
	stage_close(&s);
}

static void test_eviction_at_level_pair_keeps_what_the_rule_keeps(void **state)
{
	(void)state;
	evict_at_level(KVG_LEVEL_PAIR);
}

static void test_eviction_at_level_pair_head_keeps_what_the_rule_keeps(void **state)
{
	(void)state;
	evict_at_level(KVG_LEVEL_PAIR_HEAD);
}

static void test_eviction_at_level_pair_layer_keeps_what_the_rule_keeps(void **state)
{
	(void)state;
	evict_at_level(KVG_LEVEL_PAIR_LAYER);
}

static void test_eviction_at_level_adakv_layer_keeps_what_the_rule_keeps(void **state)
{
	(void)state;
	evict_at_level(KVG_LEVEL_ADAKV_LAYER);
}

static void test_ratio_below_the_window_leaves_a_smaller_window(void **state)
{
	struct kvg_policy policy = kv_policy(900, 0.05, 59);
	struct stage s;

	(void)state;
	stage_open(&s, &policy);
	feed_and_evict(&s.kv, 901);
	assert_int_equal(kv_pairs(&s.kv), (45 + 1) * 24);
	stage_close(&s);
}

static void test_floor_leaves_every_row_its_best_pairs(void **state)
{
	struct kvg_policy policy = kv_policy(900, 0.1, 20);
	struct stage s;

	(void)state;
	policy.floor = 8;
	stage_open(&s, &policy);
	s.kv.scores = KV_SCORES_SKEWED;
	feed_and_evict(&s.kv, 901);
	for (uint32_t row = 0; row < 24; row++)
		assert_true(kv_row_pairs(&s.kv, row / 4, row % 4) >= 8 + 20 + 1);
	assert_int_equal(kv_row_pairs(&s.kv, 0, 1), 8 + 20 + 1);
	stage_close(&s);
}

static void test_eviction_after_each_chunk_follows_the_rule(void **state)
{
	struct kvg_policy policy = kv_policy(1500, 0.3, 59);
	struct stage s;

	(void)state;
	policy.chunk_tokens = 500;
	stage_open(&s, &policy);
	feed_and_evict(&s.kv, 500);
	assert_int_equal(s.kv.start, 441);
	feed_and_evict(&s.kv, 500);
	feed_and_evict(&s.kv, 500);
	feed_and_evict(&s.kv, 1);
	stage_close(&s);
}

static void test_a_small_context_gets_a_window_of_two_percent(void **state)
{
	struct kvg_policy policy = kv_policy(1000, 0.4, 4096);
	struct stage s;

	(void)state;
	policy.flags = 0;
	policy.chunk_tokens = 16000;
	stage_open(&s, &policy);
	feed_and_evict(&s.kv, 1001);
	assert_int_equal(s.kv.start, 1001 - 20);
	stage_close(&s);
}

static void test_mode_once_decides_over_the_whole_prompt(void **state)
{
	struct kvg_policy policy = kv_policy(1000, 0.4, 50);
	struct stage s;

	(void)state;
	policy.mode = KVG_MODE_ONCE;
	stage_open(&s, &policy);
	assert_int_equal(kv_feed(&s.kv, 600, 1), 0);
	feed_and_evict(&s.kv, 401);
	assert_true(kv_holds(&s.kv, 0, 0, 1000) && kv_holds(&s.kv, 5, 3, 951));
	stage_close(&s);
}

static void test_mode_threshold_keeps_what_scores_above(void **state)
{
	struct kvg_policy policy = kv_policy(1000, 0.5, 50);
	struct stage s;

	(void)state;
	policy.mode = KVG_MODE_THRESHOLD;
	policy.threshold = 0.75f;
	stage_open(&s, &policy);
	feed_and_evict(&s.kv, 501);
	feed_and_evict(&s.kv, 500);
	assert_in_range(kv_pairs(&s.kv), 24 * 200, 24 * 400);
	stage_close(&s);
}

static void test_mode_off_drops_nothing(void **state)
{
	struct kvg_policy policy = kv_policy(500, 0.1, 50);
	struct stage s;

	(void)state;
	policy.mode = KVG_MODE_OFF;
	stage_open(&s, &policy);
	feed_and_evict(&s.kv, 501);
	assert_int_equal(kv_pairs(&s.kv), 24 * 501);
	stage_close(&s);
}

static void test_ratio_one_drops_nothing(void **state)
{
	struct kvg_policy policy = kv_policy(500, 1.0, 50);
	struct stage s;

	(void)state;
	stage_open(&s, &policy);
	assert_int_equal(kv_feed(&s.kv, 501, 1), 0);
	assert_int_equal(kvg_evict(s.client, s.kv.id, KVG_EVICT_PREFILL, NULL), 0);
	stage_close(&s);
}

static void test_decode_eviction_holds_the_budget(void **state)
{
	struct kvg_policy policy = kv_policy(300, 1.0, 16);
	struct stage s;

	(void)state;
	policy.mode = KVG_MODE_OFF;
	policy.budget = 200;
	policy.max_new_tokens = 500;
	stage_open(&s, &policy);
	assert_int_equal(kv_feed(&s.kv, 301, 1), 0);
	for (int event = 0; event < 3; event++) {
		assert_int_equal(kv_evict(&s.kv, KVG_EVICT_DECODE), 0);
		assert_int_equal(kv_pairs(&s.kv), 200 * 24);
		assert_int_equal(kv_check(&s.kv), 0);
		assert_int_equal(kv_feed(&s.kv, 128, 1), 0);
		assert_int_equal(kv_check(&s.kv), 0);
	}
	stage_close(&s);
}

static void test_decode_budget_after_prefill_eviction_uses_the_true_scores(void **state)
{
	struct kvg_policy policy = kv_policy(800, 0.5, 30);
	struct stage s;

	(void)state;
	policy.budget = 260;
	policy.max_new_tokens = 300;
	stage_open(&s, &policy);
	feed_and_evict(&s.kv, 801);
	assert_int_equal(kv_feed(&s.kv, 150, 2), 0);
	assert_int_equal(kv_evict(&s.kv, KVG_EVICT_DECODE), 0);
	assert_int_equal(kv_pairs(&s.kv), 260 * 24);
	stage_close(&s);
}

static void test_protected_ranges_stay_whole(void **state)
{
	struct kvg_policy policy = kv_policy(900, 0.2, 30);
	struct stage s;

	(void)state;
	stage_open(&s, &policy);
	assert_int_equal(kv_protect(&s.kv, 100, 164), 0);
	assert_int_equal(kv_protect(&s.kv, 400, 401), 0);
	feed_and_evict(&s.kv, 901);
	for (uint32_t row = 0; row < 24; row++) {
		for (uint32_t pos = 100; pos < 164; pos++)
			assert_true(kv_holds(&s.kv, row / 4, row % 4, pos));
		assert_true(kv_holds(&s.kv, row / 4, row % 4, 400));
		assert_true(kv_holds(&s.kv, row / 4, row % 4, 0));
	}
	stage_close(&s);
}

static void test_a_protected_range_too_many_is_refused(void **state)
{
	struct kvg_policy policy = kv_policy(900, 0.2, 30);
	struct stage s;

	(void)state;
	stage_open(&s, &policy);
	for (uint32_t i = 0; i < KVG_MAX_PROTECTED; i++)
		assert_int_equal(kv_protect(&s.kv, 100 + 10 * i, 105 + 10 * i), 0);
	assert_true(kv_protect(&s.kv, 500, 505) < 0);
	assert_true(*kvg_error(s.client));
	assert_true(kv_protect(&s.kv, 7, 7) < 0 || kv_protect(&s.kv, 9, 8) < 0);
	stage_close(&s);
}

static void test_truncate_forgets_and_the_room_is_written_again(void **state)
{
	struct kvg_policy policy = kv_policy(600, 0.3, 30);
	struct stage s;

	(void)state;
	policy.max_new_tokens = 64;
	stage_open(&s, &policy);
	feed_and_evict(&s.kv, 601);
	for (uint8_t round = 2; round < 6; round++) {
		assert_int_equal(kv_feed(&s.kv, 40, round), 0);
		assert_int_equal(kv_check(&s.kv), 0);
		assert_int_equal(kv_truncate(&s.kv, 601 + round), 0);
		assert_int_equal(kv_check(&s.kv), 0);
		assert_int_equal(kv_feed(&s.kv, 3, 100), 0);
		assert_int_equal(kv_check(&s.kv), 0);
		assert_int_equal(kv_truncate(&s.kv, 601), 0);
	}
	stage_close(&s);
}

static void test_truncate_before_the_last_eviction_is_refused(void **state)
{
	struct kvg_policy policy = kv_policy(600, 0.3, 30);
	struct stage s;

	(void)state;
	policy.max_new_tokens = 64;
	stage_open(&s, &policy);
	feed_and_evict(&s.kv, 601);
	assert_int_equal(kv_feed(&s.kv, 10, 1), 0);
	assert_int_equal(kv_truncate(&s.kv, 600), -EINVAL);
	assert_true(*kvg_error(s.client));
	assert_true(kv_truncate(&s.kv, 612) < 0);
	assert_int_equal(kv_truncate(&s.kv, 601), 0);
	stage_close(&s);
}

static void test_an_unscored_range_is_not_evicted(void **state)
{
	struct kvg_policy policy = kv_policy(600, 0.3, 30);
	struct stage s;

	(void)state;
	stage_open(&s, &policy);
	assert_int_equal(kvg_reserve(s.client, s.kv.id, 601), 0);
	assert_int_equal(kv_write(&s.kv, 601, 1), 0);
	assert_int_equal(kv_commit(&s.kv, 601), 0);
	assert_true(kvg_evict(s.client, s.kv.id, KVG_EVICT_PREFILL, NULL) < 0);
	assert_true(*kvg_error(s.client));
	assert_int_equal(kv_check(&s.kv), 0);
	s.kv.pos = 0;
	assert_int_equal(kv_stage(&s.kv, 601), 0);
	s.kv.pos = 601;
	assert_int_equal(kv_evict(&s.kv, KVG_EVICT_PREFILL), 0);
	stage_close(&s);
}

/* Submits one raw entry and returns its completion's status. */
static int32_t submit_one(struct stage *s, const struct kvg_sqe *sqe)
{
	struct kvg_cqe cqe;
	const char *text;

	assert_int_equal(kvg_submit(s->client, sqe), 0);
	assert_int_equal(kvg_reap(s->client, &cqe, &text, 1, 1), 1);
	assert_int_equal(cqe.user_data, sqe->user_data);
	if (cqe.status)
		assert_true(*text);
	return cqe.status;
}

static void test_a_stale_generation_is_refused(void **state)
{
	struct kvg_policy policy = kv_policy(600, 0.3, 30);
	struct kvg_sequence_info before, after;
	struct stage s;

	(void)state;
	policy.max_new_tokens = 64;
	stage_open(&s, &policy);
	assert_int_equal(kv_feed(&s.kv, 601, 1), 0);
	assert_int_equal(kvg_query(s.client, s.kv.id, &before), 0);
	assert_int_equal(kv_evict(&s.kv, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kvg_query(s.client, s.kv.id, &after), 0);
	assert_int_equal(after.generation, before.generation + 1);
	assert_int_equal(after.fold_pos, 601);
	assert_int_equal(after.pairs, kv_pairs(&s.kv));
	struct kvg_sqe sqe = {.op = KVG_OP_TRUNCATE,
		.user_data = 5,
		.seq = s.kv.id,
		.generation = before.generation,
		.truncate.pos = 601};
	assert_int_equal(submit_one(&s, &sqe), -ESTALE);
	sqe.op = KVG_OP_COMMIT;
	assert_int_equal(submit_one(&s, &sqe), -ESTALE);
	sqe.generation = after.generation;
	assert_int_equal(submit_one(&s, &sqe), 0);
	stage_close(&s);
}

static void test_a_freed_handle_is_not_the_next_sequence(void **state)
{
	struct kvg_policy policy = kv_policy(100, 0.3, 10);
	struct stage s;
	uint64_t old;

	(void)state;
	stage_open(&s, &policy);
	old = s.kv.id;
	assert_int_equal(kv_free(&s.kv), 0);
	assert_int_equal(kv_create(&s.kv, s.client, &s.layout, &policy, 12), 0);
	assert_true(s.kv.id != old);
	assert_true(kvg_reserve(s.client, old, 10) < 0);
	assert_true(kvg_free(s.client, old) < 0);
	assert_int_equal(kv_feed(&s.kv, 101, 1), 0);
	stage_close(&s);
}

static void test_more_than_was_reserved_is_not_committed(void **state)
{
	struct kvg_policy policy = kv_policy(100, 0.3, 10);
	struct kvg_sequence_info info;
	struct stage s;

	(void)state;
	stage_open(&s, &policy);
	assert_int_equal(kv_feed(&s.kv, 101, 1), 0);
	assert_int_equal(kvg_query(s.client, s.kv.id, &info), 0);
	assert_true(info.reserved_pos >= 101);
	assert_true(kvg_commit(s.client, s.kv.id, info.reserved_pos - 101 + 1) < 0);
	assert_true(*kvg_error(s.client));
	assert_true(kvg_reserve(s.client, s.kv.id, 5000) < 0);
	stage_close(&s);
}

static void test_two_sequences_in_turn_do_not_touch_each_other(void **state)
{
	struct kvg_policy policy = kv_policy(1000, 0.3, 40), other = kv_policy(700, 0.1, 20);
	struct stage s;
	struct kv second;

	(void)state;
	policy.chunk_tokens = 300;
	stage_open(&s, &policy);
	assert_int_equal(kv_create(&second, s.client, &s.layout, &other, 99), 0);
	feed_and_evict(&s.kv, 300);
	assert_int_equal(kv_feed(&second, 701, 50), 0);
	feed_and_evict(&s.kv, 300);
	assert_int_equal(kv_evict(&second, KVG_EVICT_PREFILL), 0);
	assert_int_equal(kv_check(&s.kv), 0);
	feed_and_evict(&s.kv, 401);
	assert_int_equal(kv_check(&second), 0);
	fixture_audit(&s.fixture);
	assert_int_equal(kv_free(&second), 0);
	stage_close(&s);
}

static void test_a_sequence_too_many_is_refused(void **state)
{
	struct kvg_policy policy = kv_policy(100, 0.3, 10);
	struct stage s;
	struct kv more[3];
	uint64_t seq = 77;

	(void)state;
	stage_open(&s, &policy);
	for (int i = 0; i < 3; i++)
		assert_int_equal(kv_create(&more[i], s.client, &s.layout, &policy, 1), 0);
	assert_true(kvg_create(s.client, &policy, &seq) < 0);
	assert_true(*kvg_error(s.client));
	assert_int_equal(seq, 77);
	for (int i = 0; i < 3; i++)
		assert_int_equal(kv_free(&more[i]), 0);
	assert_int_equal(kv_feed(&s.kv, 101, 1), 0);
	stage_close(&s);
}

static void refuse_policy(struct stage *s, struct kvg_policy policy)
{
	uint64_t seq = 77;

	assert_true(kvg_create(s->client, &policy, &seq) < 0);
	assert_true(*kvg_error(s->client));
	assert_int_equal(seq, 77);
}

static void test_senseless_policies_are_refused(void **state)
{
	struct kvg_policy policy = kv_policy(100, 0.3, 10), bad;
	struct stage s;

	(void)state;
	stage_open(&s, &policy);
	assert_int_equal(kv_feed(&s.kv, 101, 1), 0);
	bad = policy, bad.ratio = 0;
	refuse_policy(&s, bad);
	bad = policy, bad.ratio = 1.5;
	refuse_policy(&s, bad);
	bad = policy, bad.ratio = NAN;
	refuse_policy(&s, bad);
	bad = policy, bad.mode = 9;
	refuse_policy(&s, bad);
	bad = policy, bad.level = 9;
	refuse_policy(&s, bad);
	bad = policy, bad.context_tokens = 5000;
	refuse_policy(&s, bad);
	bad = policy, bad.context_tokens = UINT32_MAX, bad.prefix_tokens = 2;
	refuse_policy(&s, bad);
	stage_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_pairs_are_where_the_tables_say_in_each_dtype),
		cmocka_unit_test(test_eviction_at_level_pair_keeps_what_the_rule_keeps),
		cmocka_unit_test(test_eviction_at_level_pair_head_keeps_what_the_rule_keeps),
		cmocka_unit_test(test_eviction_at_level_pair_layer_keeps_what_the_rule_keeps),
		cmocka_unit_test(test_eviction_at_level_adakv_layer_keeps_what_the_rule_keeps),
		cmocka_unit_test(test_ratio_below_the_window_leaves_a_smaller_window),
		cmocka_unit_test(test_floor_leaves_every_row_its_best_pairs),
		cmocka_unit_test(test_eviction_after_each_chunk_follows_the_rule),
		cmocka_unit_test(test_a_small_context_gets_a_window_of_two_percent),
		cmocka_unit_test(test_mode_once_decides_over_the_whole_prompt),
		cmocka_unit_test(test_mode_threshold_keeps_what_scores_above),
		cmocka_unit_test(test_mode_off_drops_nothing),
		cmocka_unit_test(test_ratio_one_drops_nothing),
		cmocka_unit_test(test_decode_eviction_holds_the_budget),
		cmocka_unit_test(test_decode_budget_after_prefill_eviction_uses_the_true_scores),
		cmocka_unit_test(test_protected_ranges_stay_whole),
		cmocka_unit_test(test_a_protected_range_too_many_is_refused),
		cmocka_unit_test(test_truncate_forgets_and_the_room_is_written_again),
		cmocka_unit_test(test_truncate_before_the_last_eviction_is_refused),
		cmocka_unit_test(test_an_unscored_range_is_not_evicted),
		cmocka_unit_test(test_a_stale_generation_is_refused),
		cmocka_unit_test(test_a_freed_handle_is_not_the_next_sequence),
		cmocka_unit_test(test_more_than_was_reserved_is_not_committed),
		cmocka_unit_test(test_two_sequences_in_turn_do_not_touch_each_other),
		cmocka_unit_test(test_a_sequence_too_many_is_refused),
		cmocka_unit_test(test_senseless_policies_are_refused),
	};

	return runner_run("sequence", tests, sizeof(tests) / sizeof(*tests));
}
