/* Budgets are exact: the last extent that fits is granted, the next refused with all the figures. */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "control.pb-c.h"
#include "proto/frame.h"
#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/integration/raw.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define EXTENT (256u * 1024u)
#define MIB    (1024u * 1024u)
#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 8M\nextent_size = 256K\n"                                                               \
	"[tenant search]\nsocket = search.sock\ndevice.max = 4M\n"                                                     \
	"[tenant chat]\nsocket = chat.sock\ndevice.max = 6M\n"

struct stage {
	struct fixture fixture;
	struct kvg_layout layout;
	struct kvg_client *search, *chat;
	char search_path[FIXTURE_PATH], chat_path[FIXTURE_PATH];
};

static void stage_open(struct stage *s)
{
	fixture_start(&s->fixture, CONFIG);
	kv_small_layout(&s->layout, 8, 8192);
	(void)fixture_path(&s->fixture, "state/search.sock", s->search_path);
	(void)fixture_path(&s->fixture, "state/chat.sock", s->chat_path);
	s->search = kv_connect(s->search_path, "search-1", &s->layout);
	s->chat = kv_connect(s->chat_path, "chat-1", &s->layout);
	assert_non_null(s->search);
	assert_non_null(s->chat);
}

static void stage_close(struct stage *s)
{
	fixture_audit(&s->fixture);
	s->search = kvg_close(s->search);
	s->chat = kvg_close(s->chat);
	assert_true(fixture_wait_charged(&s->fixture, 0, FIXTURE_WAIT_MS));
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
	if (!strcasestr(text, what))
		fail_msg("\"%s\" does not name \"%s\"", text, what);
}

/* Reserves stripe after stripe beyond what was promised until the daemon refuses; returns the stripes that it gave. */
static uint32_t reserve_until_refused(struct kvg_client *client, uint64_t seq, int *ret_error)
{
	uint32_t stripes = 0;

	while (stripes < 64 && (*ret_error = kvg_reserve(client, seq, (stripes + 1) * KVG_STRIPE_TOKENS)) == 0)
		stripes++;
	return stripes;
}

static void test_the_last_extent_is_granted_and_the_next_refused_by_name(void **state)
{
	struct fixture_usage usage;
	struct stage s;
	struct kv kv;
	char text[FIXTURE_TEXT];
	uint32_t stripes;
	int r;

	(void)state;
	stage_open(&s);
	assert_int_equal(create_stripes(&s, s.search, &kv, 2), 0);
	stripes = reserve_until_refused(s.search, kv.id, &r);
	assert_int_equal(r, -ENOSPC);
	assert_names(kvg_error(s.search), "search");
	assert_names(kvg_error(s.search), "budget 4.0 MiB");
	assert_names(kvg_error(s.search), "in use");
	assert_names(kvg_error(s.search), "needs 256.0 KiB");
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.charged, (uint64_t)stripes * EXTENT);
	assert_true(usage.charged + usage.promised + EXTENT > 4 * MIB);
	assert_true(usage.charged + usage.promised <= 4 * MIB);
	assert_int_equal(usage.refusals, 1);

	/* One byte short of one more extent, and exactly one more extent. */
	uint64_t exact = usage.charged + usage.promised + EXTENT;
	assert_int_equal(fixture_budget_set(&s.fixture, "search", exact - 1, text), 0);
	assert_int_equal(kvg_reserve(s.search, kv.id, (stripes + 1) * KVG_STRIPE_TOKENS), -ENOSPC);
	assert_int_equal(fixture_budget_set(&s.fixture, "search", exact, text), 0);
	assert_int_equal(kvg_reserve(s.search, kv.id, (stripes + 1) * KVG_STRIPE_TOKENS), 0);
	assert_int_equal(kvg_reserve(s.search, kv.id, (stripes + 2) * KVG_STRIPE_TOKENS), -ENOSPC);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.charged, (uint64_t)(stripes + 1) * EXTENT);
	assert_int_equal(usage.refusals, 3);
	assert_int_equal(kv_feed(&kv, stripes * KVG_STRIPE_TOKENS, 1), 0);
	assert_int_equal(kv_check(&kv), 0);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s);
}

/* The most stripes that a new sequence of this client is admitted with. */
static uint32_t admitted_stripes(const struct stage *s, struct kvg_client *client)
{
	uint32_t stripes = 0;
	struct kv kv;

	while (stripes < 64 && create_stripes(s, client, &kv, stripes + 1) == 0) {
		stripes++;
		assert_int_equal(kv_free(&kv), 0);
	}
	return stripes;
}

static void test_admission_promises_the_whole_need_or_says_how_many_bytes_short(void **state)
{
	struct fixture_usage usage;
	struct stage s;
	struct kv kv, refused;
	uint32_t stripes;

	(void)state;
	stage_open(&s);
	stripes = admitted_stripes(&s, s.search);
	assert_in_range(stripes, 8, 16);
	assert_int_equal(create_stripes(&s, s.search, &kv, stripes + 1), -ENOSPC);
	assert_names(kvg_error(s.search), "search");
	assert_names(kvg_error(s.search), "budget 4.0 MiB");
	assert_names(kvg_error(s.search), "262144 bytes short");
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.charged, 0);
	assert_int_equal(usage.promised, 0);

	assert_int_equal(create_stripes(&s, s.search, &kv, stripes), 0);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_in_range(usage.promised, stripes * EXTENT, 4 * MIB);
	assert_int_equal(create_stripes(&s, s.search, &refused, stripes), -ENOSPC);
	assert_int_equal(kv_feed(&kv, stripes * KVG_STRIPE_TOKENS, 1), 0);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.charged, stripes * EXTENT);
	assert_int_equal(usage.high_water, stripes * EXTENT);
	assert_int_equal(kv_check(&kv), 0);
	assert_int_equal(kv_free(&kv), 0);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.promised, 0);
	stage_close(&s);
}

static void test_two_half_fed_sequences_cannot_block_each_other(void **state)
{
	struct stage s;
	struct kv first, second;
	uint32_t stripes;

	(void)state;
	stage_open(&s);
	stripes = admitted_stripes(&s, s.search) / 2;
	assert_int_equal(create_stripes(&s, s.search, &first, stripes - 1), 0);
	if (create_stripes(&s, s.search, &second, stripes - 3) < 0)
		fail_msg("%s", kvg_error(s.search));
	for (uint32_t i = 0; i < stripes - 3; i++) {
		assert_int_equal(kv_feed(&first, KVG_STRIPE_TOKENS, 1), 0);
		assert_int_equal(kv_feed(&second, KVG_STRIPE_TOKENS, 2), 0);
	}
	assert_int_equal(kv_feed(&first, 2 * KVG_STRIPE_TOKENS, 1), 0);
	assert_int_equal(kv_check(&first), 0);
	assert_int_equal(kv_check(&second), 0);
	assert_int_equal(kv_free(&first), 0);
	assert_int_equal(kv_free(&second), 0);
	stage_close(&s);
}

static void test_the_pool_binds_all_tenants_together(void **state)
{
	struct fixture_usage usage;
	struct stage s;
	struct kv search, chat;
	uint32_t stripes;
	int r;

	(void)state;
	stage_open(&s);
	assert_int_equal(create_stripes(&s, s.search, &search, 12), 0);
	assert_int_equal(kv_feed(&search, 12 * KVG_STRIPE_TOKENS, 1), 0);
	assert_int_equal(create_stripes(&s, s.chat, &chat, 1), 0);
	stripes = reserve_until_refused(s.chat, chat.id, &r);
	assert_int_equal(r, -ENOSPC);
	assert_names(kvg_error(s.chat), "pool");
	assert_names(kvg_error(s.chat), "8.0 MiB");
	fixture_usage(&s.fixture, &usage);
	assert_int_equal(usage.charged, (uint64_t)(12 + stripes) * EXTENT);
	assert_true(usage.charged + usage.promised <= 8 * MIB);
	assert_true(usage.charged + usage.promised + EXTENT > 8 * MIB);
	assert_int_equal(kv_free(&search), 0);
	assert_int_equal(kvg_reserve(s.chat, chat.id, (stripes + 1) * KVG_STRIPE_TOKENS), 0);
	assert_int_equal(kv_free(&chat), 0);
	stage_close(&s);
}

static void test_a_budget_below_the_use_takes_nothing_and_grants_nothing(void **state)
{
	struct stage s;
	struct kv kv, more;
	char text[FIXTURE_TEXT];

	(void)state;
	stage_open(&s);
	assert_int_equal(create_stripes(&s, s.search, &kv, 6), 0);
	assert_int_equal(kv_feed(&kv, 6 * KVG_STRIPE_TOKENS, 1), 0);
	if (fixture_budget_set(&s.fixture, "search", 2 * EXTENT, text) == 0) {
		assert_int_equal(create_stripes(&s, s.search, &more, 1), -ENOSPC);
		assert_int_equal(kvg_reserve(s.search, kv.id, 3 * KVG_STRIPE_TOKENS), -ENOSPC);
	} else {
		assert_names(text, "search");
	}
	assert_int_equal(kv_check(&kv), 0);
	assert_int_equal(kv_free(&kv), 0);
	stage_close(&s);
}

static void test_a_budget_of_nobody_is_refused(void **state)
{
	struct stage s;
	char text[FIXTURE_TEXT] = "";

	(void)state;
	stage_open(&s);
	assert_true(fixture_budget_set(&s.fixture, "nobody", 4 * MIB, text) < 0);
	assert_names(text, "nobody");
	stage_close(&s);
}

/* A worker of one tenant: feeds, evicts, checks and frees until the test closes its end. */
static int busy_worker(int fd, void *arg)
{
	struct kvg_policy policy = kv_policy(600, 0.3, 30);
	struct kvg_layout layout;
	struct kvg_client *client;
	struct kv kv;
	int rounds;

	kv_small_layout(&layout, 2, 2048);
	client = kv_connect(arg, "busy", &layout);
	must(client, "connect");
	process_say(fd, 'r');
	must(process_listen(fd) == 'g', "start");
	for (rounds = 0; rounds < 20; rounds++) {
		must(kv_create(&kv, client, &layout, &policy, (uint32_t)rounds) == 0, kvg_error(client));
		must(kv_feed(&kv, 601, (uint8_t)rounds) == 0, "feed");
		must(kv_evict(&kv, KVG_EVICT_PREFILL) == 0, "evict");
		must(kv_check(&kv) == 0, "content");
		must(kv_free(&kv) == 0, "free");
	}
	process_say(fd, 'd');
	(void)kvg_close(client);
	return 0;
}

static void test_workers_of_two_tenants_run_at_once(void **state)
{
	char search_path[FIXTURE_PATH], chat_path[FIXTURE_PATH];
	struct process search, chat;
	struct fixture_usage usage;
	struct fixture f;

	(void)state;
	fixture_start(&f, CONFIG);
	process_fork(&search, busy_worker, (void *)(uintptr_t)fixture_path(&f, "state/search.sock", search_path));
	process_fork(&chat, busy_worker, (void *)(uintptr_t)fixture_path(&f, "state/chat.sock", chat_path));
	assert_int_equal(process_hear(&search), 'r');
	assert_int_equal(process_hear(&chat), 'r');
	fixture_usage(&f, &usage);
	assert_int_equal(usage.workers, 2);
	process_tell(&search, 'g');
	process_tell(&chat, 'g');
	assert_int_equal(process_hear(&search), 'd');
	assert_int_equal(process_hear(&chat), 'd');
	process_finish(&search);
	process_finish(&chat);
	fixture_tenant(&f, "search", &usage);
	assert_in_range(usage.high_water, 5 * EXTENT, 4 * MIB);
	fixture_tenant(&f, "chat", &usage);
	assert_in_range(usage.high_water, 5 * EXTENT, 6 * MIB);
	assert_true(fixture_wait_charged(&f, 0, FIXTURE_WAIT_MS));
	fixture_audit(&f);
	fixture_stop(&f);
}

static size_t pack_budget_set(uint8_t *packet, size_t size)
{
	Kvg__AdminRequest request = KVG__ADMIN_REQUEST__INIT;
	Kvg__BudgetSet set = KVG__BUDGET_SET__INIT;

	set.tenant = (char *)(uintptr_t) "search";
	set.has_device_max = 1;
	set.device_max = 8u * MIB;
	request.id = 3;
	request.body_case = KVG__ADMIN_REQUEST__BODY_BUDGET_SET;
	request.budget_set = &set;
	assert_true(kvg__admin_request__get_packed_size(&request) <= size);
	return kvg__admin_request__pack(&request, packet);
}

static void test_a_worker_cannot_set_its_budget(void **state)
{
	struct fixture_usage usage;
	struct stage s;
	struct raw raw;
	uint8_t packet[256];
	size_t size = pack_budget_set(packet, sizeof(packet));

	(void)state;
	stage_open(&s);
	raw_connect(&raw, s.search_path);
	raw_send(&raw, packet, size, NULL, 0);
	assert_true(raw_refused(&raw) < 0);
	raw_close(&raw);
	raw_connect(&raw, s.search_path);
	raw_hello(&raw);
	raw_send(&raw, packet, size, NULL, 0);
	assert_true(raw_refused(&raw) < 0);
	raw_close(&raw);
	fixture_tenant(&s.fixture, "search", &usage);
	assert_int_equal(usage.device_max, 4 * MIB);
	stage_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_workers_of_two_tenants_run_at_once),
		cmocka_unit_test(test_the_last_extent_is_granted_and_the_next_refused_by_name),
		cmocka_unit_test(test_admission_promises_the_whole_need_or_says_how_many_bytes_short),
		cmocka_unit_test(test_two_half_fed_sequences_cannot_block_each_other),
		cmocka_unit_test(test_the_pool_binds_all_tenants_together),
		cmocka_unit_test(test_a_budget_below_the_use_takes_nothing_and_grants_nothing),
		cmocka_unit_test(test_a_budget_of_nobody_is_refused),
		cmocka_unit_test(test_a_worker_cannot_set_its_budget),
	};

	return runner_run("budget", tests, sizeof(tests) / sizeof(*tests));
}
