/* A min is there whatever the others do, what is set live outlives the daemon, and limits are those of the tenant. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/integration/raw.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define EXTENT (256u * 1024u)
#define MIB    (1024u * 1024u)
#define POOL   "[pool]\ndevice.size = 8M\nextent_size = 256K\n"
#define SEARCH "[tenant search]\nsocket = search.sock\n"
#define CHAT   "[tenant chat]\nsocket = chat.sock\n"

struct stage {
	struct fixture fixture;
	struct kvg_layout layout;
	struct kvg_client *search, *chat;
};

static struct kvg_client *connect_to(const struct stage *s, const char *socket, const char *name)
{
	char path[FIXTURE_PATH];
	struct kvg_client *client = kv_connect(fixture_path(&s->fixture, socket, path), name, &s->layout);

	assert_non_null(client);
	return client;
}

static void stage_open(struct stage *s, const char *config)
{
	fixture_start(&s->fixture, config);
	kv_small_layout(&s->layout, 8, 8192);
	s->search = connect_to(s, "state/search.sock", "search-1");
	s->chat = connect_to(s, "state/chat.sock", "chat-1");
}

/* search's min is all that is left in the end. */
static void stage_close(struct stage *s, uint64_t min)
{
	s->search = kvg_close(s->search);
	s->chat = kvg_close(s->chat);
	assert_true(fixture_wait_charged(&s->fixture, 0, FIXTURE_WAIT_MS));
	fixture_wait_reserved(&s->fixture, "search", min);
	fixture_wait_physical(&s->fixture, min);
	fixture_audit(&s->fixture);
	fixture_stop(&s->fixture);
}

/* A sequence that is never evicted, of so many stripes (one extent each). */
static int create_stripes(const struct stage *s, struct kvg_client *client, struct kv *kv, uint32_t stripes)
{
	struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = stripes * KVG_STRIPE_TOKENS};

	return kv_create(kv, client, &s->layout, &policy, 1);
}

static void assert_names(const char *text, const char *what)
{
	if (!strstr(text, what))
		fail_msg("\"%s\" does not name \"%s\"", text, what);
}

static uint32_t reserve_until_refused(struct kvg_client *client, uint64_t seq, int *ret_error)
{
	uint32_t stripes = 0;

	while (stripes < 64 && (*ret_error = kvg_reserve(client, seq, (stripes + 1) * KVG_STRIPE_TOKENS)) == 0)
		stripes++;
	return stripes;
}

static void test_min_exists_from_the_start_and_holds_against_a_greedy_neighbour(void **state)
{
	struct fixture_usage usage;
	struct stage s;
	struct kv greedy, kv;
	int r;

	(void)state;
	stage_open(&s, POOL SEARCH "device.min = 4M\n" CHAT);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.device_min, 4 * MIB);
	assert_int_equal(usage.reserved, 4 * MIB);
	assert_int_equal(usage.charged, 0);
	assert_int_equal(fixture_physical(&s.fixture), 4 * MIB);
	fixture_audit(&s.fixture);

	assert_int_equal(create_stripes(&s, s.chat, &greedy, 1), 0);
	assert_int_equal(reserve_until_refused(s.chat, greedy.id, &r), 16); /* all but the min, to the last extent */
	assert_int_equal(r, -ENOSPC);
	assert_names(kvg_error(s.chat), "device pool 8.0 MiB");
	assert_names(kvg_error(s.chat), "others' unused min 4.0 MiB");
	assert_int_equal(fixture_physical(&s.fixture), 8 * MIB);

	assert_int_equal(create_stripes(&s, s.search, &kv, 16), 0);
	assert_int_equal(kv_feed(&kv, 14 * KVG_STRIPE_TOKENS, 1), 0);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.charged, 14 * EXTENT);
	assert_int_equal(usage.reserved, 2 * EXTENT); /* promised and not drawn yet */
	assert_int_equal(fixture_physical(&s.fixture), 8 * MIB);
	fixture_audit(&s.fixture);
	assert_int_equal(kvg_reserve(s.chat, greedy.id, 17 * KVG_STRIPE_TOKENS), -ENOSPC);
	assert_int_equal(kv_check(&kv), 0);
	assert_int_equal(kv_free(&kv), 0);
	assert_int_equal(kvg_reserve(s.chat, greedy.id, 17 * KVG_STRIPE_TOKENS), -ENOSPC); /* it stays search's */
	assert_int_equal(kv_free(&greedy), 0);
	stage_close(&s, 4 * MIB);
}

/* Rows of 160 bytes: extents are no multiple of the pool's, so raw ones are of no use and make room. */
static void test_min_holds_for_odd_strides(void **state)
{
	const struct kvg_policy policy = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = 1};
	struct fixture_usage usage;
	struct kvg_layout odd;
	struct kvg_client *client;
	struct stage s;
	struct kv kv;
	char path[FIXTURE_PATH];
	uint32_t stripes;
	int r;

	(void)state;
	stage_open(&s, POOL SEARCH "device.min = 4M\n" CHAT);
	odd = s.layout;
	odd.groups[0].k_dim = odd.groups[0].v_dim = 40;
	client = kv_connect(fixture_path(&s.fixture, "state/search.sock", path), "odd", &odd);
	assert_non_null(client);
	assert_int_equal(kv_create(&kv, client, &odd, &policy, 1), 0);
	stripes = reserve_until_refused(client, kv.id, &r);
	assert_int_equal(r, -ENOSPC);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_true(usage.charged > 4 * MIB);
	assert_int_equal(usage.reserved, 0);
	assert_int_equal(fixture_physical(&s.fixture), usage.charged);
	assert_true(stripes > 16);
	fixture_audit(&s.fixture);
	assert_int_equal(kv_free(&kv), 0);
	(void)kvg_close(client);
	stage_close(&s, 4 * MIB);
}

static void test_min_that_is_set_live_is_created_and_goes(void **state)
{
	char text[FIXTURE_TEXT] = "";
	struct stage s;
	struct kv kv;

	(void)state;
	stage_open(&s, POOL SEARCH CHAT);
	assert_int_equal(fixture_physical(&s.fixture), 0);
	assert_int_equal(fixture_budget_change(&s.fixture, "search", "device.min", 6 * MIB, text), 0);
	fixture_wait_reserved(&s.fixture, "search", 6 * MIB);
	assert_int_equal(fixture_physical(&s.fixture), 6 * MIB);
	assert_int_equal(create_stripes(&s, s.chat, &kv, 9), -ENOSPC);
	assert_int_equal(fixture_budget_change(&s.fixture, "chat", "device.min", 3 * MIB, text), -ENOSPC);
	assert_names(
		text, "tenant chat: device.min 3.0 MiB: of the pool, 8.0 MiB, other tenants' min and use take 6.0 MiB");
	assert_names(text, "1048576 bytes short");
	assert_int_equal(fixture_budget_change(&s.fixture, "search", "device.min", 5 * MIB, text), 0);
	assert_int_equal(fixture_budget_change(&s.fixture, "chat", "device.min", 3 * MIB, text), 0);
	fixture_wait_reserved(&s.fixture, "chat", 3 * MIB);
	fixture_wait_reserved(&s.fixture, "search", 5 * MIB);
	fixture_audit(&s.fixture);
	assert_int_equal(fixture_budget_reset(&s.fixture, "chat", text), 0);
	fixture_wait_reserved(&s.fixture, "chat", 0);
	assert_int_equal(fixture_budget_reset(&s.fixture, "search", text), 0);
	assert_int_equal(create_stripes(&s, s.chat, &kv, 9), 0);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s, 0);
}

static void check_search(const struct fixture *f, uint64_t min, uint64_t high, uint64_t max, bool live)
{
	struct fixture_usage usage;

	fixture_tenant(f, "search", &usage);
	assert_int_equal(usage.device_min, min);
	assert_int_equal(usage.device_high, high);
	assert_int_equal(usage.device_max, max);
	assert_int_equal(usage.reserved, min);
	assert_int_equal(fixture_budget_is_live(f, "search"), live);
}

static void change(const struct fixture *f, const char *key, uint64_t bytes)
{
	char text[FIXTURE_TEXT] = "";

	if (fixture_budget_change(f, "search", key, bytes, text) < 0)
		fail_msg("%s: %s", key, text);
}

static void test_a_live_budget_survives_a_restart_and_a_reset_returns(void **state)
{
	char text[FIXTURE_TEXT];
	struct fixture_usage usage;
	struct fixture f;

	(void)state;
	fixture_start(&f, POOL "host.size = 64M\n" SEARCH "device.min = 1M\ndevice.high = 3M\ndevice.max = 4M\n"
			       "host.max = 32M\n" CHAT);
	check_search(&f, 1 * MIB, 3 * MIB, 4 * MIB, false);
	change(&f, "device.max", 6 * MIB);
	change(&f, "device.min", 2 * MIB);
	change(&f, "host.high", 16 * MIB);
	fixture_wait_reserved(&f, "search", 2 * MIB);
	fixture_end(&f);
	fixture_begin(&f);
	check_search(&f, 2 * MIB, 3 * MIB, 6 * MIB, true);
	assert_int_equal(fixture_physical(&f), 2 * MIB);
	fixture_tenant(&f, "search", &usage);
	assert_int_equal(usage.host_high, 16 * MIB);
	assert_int_equal(usage.host_max, 32 * MIB);
	fixture_tenant(&f, "chat", &usage);
	assert_int_equal(usage.device_max, 8 * MIB);
	assert_int_equal(usage.host_max, 64 * MIB);
	assert_false(fixture_budget_is_live(&f, "chat"));
	assert_int_equal(fixture_budget_reset(&f, "search", text), 0);
	fixture_wait_reserved(&f, "search", 1 * MIB);
	check_search(&f, 1 * MIB, 3 * MIB, 4 * MIB, false);
	fixture_end(&f);
	fixture_begin(&f);
	check_search(&f, 1 * MIB, 3 * MIB, 4 * MIB, false);
	fixture_stop(&f);
}

/* A non-zero exit and one line that names what is wrong. */
static void refuse_config(const char *config, const char *names)
{
	struct process_output output;
	struct fixture f;
	char path[FIXTURE_PATH], state[FIXTURE_PATH];

	fixture_prepare(&f, config);
	process_run((const char *const[]){fixture_program(), "--config", fixture_path(&f, "kvgated.conf", path),
			    "--state-dir", fixture_path(&f, "state", state), NULL},
		FIXTURE_WAIT_MS, &output);
	assert_int_equal(output.status, 1);
	assert_names(output.err, names);
	fixture_remove(&f);
}

static void test_overbooking_in_the_configuration_is_refused(void **state)
{
	(void)state;
	refuse_config(POOL SEARCH "device.min = 5M\n" CHAT "device.min = 3073K\n",
		"kvgated.conf:9: device.min: with tenant 'chat' the min of all tenants are 8.0 MiB (8389632 bytes), "
		"more "
		"than device.size of [pool], 8.0 MiB (8388608 bytes in whole extents)");
	refuse_config(POOL SEARCH "device.min = 5M\ndevice.max = 4M\n", "kvgated.conf:6: device.min: 5.0 MiB");
	refuse_config(POOL SEARCH "host.max = 1M\n", "kvgated.conf:6: host.max: 1.0 MiB");
}

static void test_connections_and_layouts_are_limited(void **state)
{
	struct kvg_layout other;
	struct kvg_client *third;
	struct stage s;
	struct raw raw;
	char path[FIXTURE_PATH];

	(void)state;
	stage_open(&s, POOL SEARCH "max_connections = 2\nmax_layouts = 1\n" CHAT);
	other = s.layout;
	(void)snprintf(other.model, sizeof(other.model), "another");
	(void)fixture_path(&s.fixture, "state/search.sock", path);
	assert_null(kv_connect(path, "other model", &other)); /* the second connection, and over again */
	assert_true(fixture_wait_gone(&s.fixture, 2, 0, FIXTURE_WAIT_MS));
	third = kv_connect(path, "same model", &s.layout);
	assert_non_null(third);
	raw_connect(&raw, path);
	assert_int_equal(raw_refused(&raw), -EUSERS);
	raw_close(&raw);
	(void)kvg_close(third);
	assert_true(fixture_wait_gone(&s.fixture, 2, 0, FIXTURE_WAIT_MS));
	raw_connect(&raw, path);
	raw_hello(&raw);
	raw_close(&raw);
	stage_close(&s, 0);
}

static void test_sequences_are_limited_over_all_workers(void **state)
{
	struct kvg_client *second;
	struct stage s;
	struct kv kv[2], chat;

	(void)state;
	stage_open(&s, POOL SEARCH "max_sequences = 2\n" CHAT);
	second = connect_to(&s, "state/search.sock", "search-2");
	assert_int_equal(create_stripes(&s, s.search, &kv[0], 1), 0);
	assert_int_equal(create_stripes(&s, second, &kv[1], 1), 0);
	assert_int_equal(create_stripes(&s, s.search, &chat, 1), -EUSERS);
	assert_names(kvg_error(s.search), "tenant search: 2 sequences, 1 more asked for, at most 2 (max_sequences)");
	assert_int_equal(create_stripes(&s, s.chat, &chat, 1), 0);
	assert_int_equal(kv_free(&kv[1]), 0);
	assert_int_equal(create_stripes(&s, s.search, &kv[1], 1), 0);
	assert_int_equal(kv_free(&kv[0]), 0);
	assert_int_equal(kv_free(&kv[1]), 0);
	assert_int_equal(kv_free(&chat), 0);
	(void)kvg_close(second);
	stage_close(&s, 0);
}

/* Scores of the first rows of one layer. */
static int stage_rows(struct kvg_client *client, uint64_t seq, uint32_t rows)
{
	const float scores[9 * 4] = {0};

	assert_int_equal(kvg_reserve(client, seq, 9), 0);
	assert_int_equal(kvg_stage_scores(client, seq, 0, 0, rows, scores), 0);
	return kvg_stage_wait(client);
}

static void test_staged_rows_are_limited(void **state)
{
	struct stage s;
	struct kv kv;

	(void)state;
	stage_open(&s, POOL SEARCH "max_staged_rows = 8\n" CHAT);
	assert_int_equal(create_stripes(&s, s.search, &kv, 4), 0);
	assert_int_equal(stage_rows(s.search, kv.id, 8), 0);
	assert_int_equal(stage_rows(s.search, kv.id, 9), -EAGAIN);
	assert_names(kvg_error(s.search), "tenant search: stage: 9 rows of all layers, 0 under way, at most 8");
	assert_int_equal(stage_rows(s.search, kv.id, 8), 0);
	assert_int_equal(kv_free(&kv), 0);
	assert_int_equal(create_stripes(&s, s.chat, &kv, 4), 0);
	assert_int_equal(stage_rows(s.chat, kv.id, 9), 0);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_min_exists_from_the_start_and_holds_against_a_greedy_neighbour),
		cmocka_unit_test(test_min_holds_for_odd_strides),
		cmocka_unit_test(test_min_that_is_set_live_is_created_and_goes),
		cmocka_unit_test(test_a_live_budget_survives_a_restart_and_a_reset_returns),
		cmocka_unit_test(test_overbooking_in_the_configuration_is_refused),
		cmocka_unit_test(test_connections_and_layouts_are_limited),
		cmocka_unit_test(test_sequences_are_limited_over_all_workers),
		cmocka_unit_test(test_staged_rows_are_limited),
	};

	return runner_run("min", tests, sizeof(tests) / sizeof(*tests));
}
