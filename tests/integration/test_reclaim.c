/* What nobody uses makes room: for a request, and for what is above high. */
#include <errno.h>
#include <string.h>

#include "tests/integration/turns.h"
#include "tests/support/runner.h"

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

/* ---- pressure ---- */

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
		cmocka_unit_test(test_a_tenant_is_pressed_while_its_workers_are_asked),
	};

	return runner_run("integration/reclaim", tests, sizeof(tests) / sizeof(*tests));
}
