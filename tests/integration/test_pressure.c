/*
 * Memory that is short: a request waits for what is on its way, is refused when nothing is, and a worker that holds
 * back what it was asked for is disconnected. Workers are raw ones, which unmap and acknowledge when told.
 */
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
#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 8M\nextent_size = 256K\n[daemon]\npressure_ms = 500\n"                                  \
	"[tenant search]\nsocket = search.sock\ndevice.max = 4M\n"                                                     \
	"[tenant chat]\nsocket = chat.sock\ndevice.max = 6M\n"
#define WAITING 7u /* user_data of what may wait, and of the NOP that asks whether it does */
#define ASKING  8u

struct scene {
	struct fixture fixture;
	struct kvg_layout layout; /* a stripe is an extent */
	struct raw mute, other;   /* of search */
	char search[FIXTURE_PATH], chat[FIXTURE_PATH];
};

static void scene_open(struct scene *scene)
{
	fixture_start(&scene->fixture, CONFIG);
	kv_small_layout(&scene->layout, 8, 8192);
	(void)fixture_path(&scene->fixture, "state/search.sock", scene->search);
	(void)fixture_path(&scene->fixture, "state/chat.sock", scene->chat);
	raw_open(&scene->mute, scene->search, &scene->layout);
	raw_open(&scene->other, scene->search, &scene->layout);
}

static void scene_close(struct scene *scene)
{
	fixture_audit(&scene->fixture);
	raw_close(&scene->mute);
	raw_close(&scene->other);
	assert_true(fixture_wait_gone(&scene->fixture, 0, 0, FIXTURE_WAIT_MS));
	fixture_audit(&scene->fixture);
	fixture_stop(&scene->fixture);
}

static void assert_names(const char *text, const char *what)
{
	if (!strcasestr(text, what))
		fail_msg("\"%s\" does not name \"%s\"", text, what);
}

/* ---- what a worker asks for ---- */

/* A sequence that is never evicted, of so many stripes. */
static struct kvg_sqe create(uint32_t stripes)
{
	return (struct kvg_sqe){.op = KVG_OP_CREATE,
		.user_data = WAITING,
		.create = {.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = stripes * KVG_STRIPE_TOKENS}};
}

static uint64_t fill(struct raw *raw, uint32_t stripes)
{
	struct kvg_sqe sqe = create(stripes);
	struct kvg_cqe cqe;

	raw_submit_done(raw, &sqe, &cqe);
	sqe = (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = cqe.seq, .reserve.tokens = stripes * KVG_STRIPE_TOKENS};
	raw_submit_done(raw, &sqe, &cqe);
	return cqe.seq;
}

/* Frees a sequence, and leaves what it is asked to unmap for that unacknowledged. Returns the event that asks. */
static uint32_t drop(struct raw *raw, uint64_t seq)
{
	const struct kvg_sqe sqe = {.op = KVG_OP_FREE, .seq = seq};
	struct kvg_cqe cqe;

	raw_submit_done(raw, &sqe, &cqe);
	return cqe.events;
}

static void acknowledge(struct raw *raw, uint32_t event)
{
	const struct kvg_sqe sqe = {.op = KVG_OP_UNMAPPED, .unmapped.event = event};
	struct kvg_cqe cqe;

	raw_submit_done(raw, &sqe, &cqe);
}

/* Submits what has to wait: a later entry is completed first. */
static void submit_waiting(struct raw *raw, const struct kvg_sqe *sqe)
{
	const struct kvg_sqe asking = {.op = KVG_OP_NOP, .user_data = ASKING};
	struct kvg_cqe cqe;

	raw_submit(raw, sqe);
	raw_submit(raw, &asking);
	assert_true(raw_complete(raw, &cqe));
	if (cqe.user_data != ASKING)
		fail_msg("does not wait: status %d, %s", cqe.status, raw->text);
}

/* What waited has got it. */
static uint64_t assert_granted(struct raw *raw)
{
	struct kvg_cqe cqe;

	assert_true(raw_complete(raw, &cqe));
	assert_int_equal(cqe.user_data, WAITING);
	if (cqe.status)
		fail_msg("status %d: %s", cqe.status, raw->text);
	return cqe.seq;
}

static uint32_t pressure(const struct raw *raw)
{
	return __atomic_load_n(&raw->ring->pressure, __ATOMIC_ACQUIRE);
}

static bool until(uint32_t (*value)(const struct raw *), const struct raw *raw, bool set)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;

	while ((value(raw) != 0) != set)
		if (fixture_now_ms() > deadline)
			return false;
	return true;
}

/* The mute one holds `stripes` of search's 16 extents back; the other has asked for all of them. */
static uint32_t hold_back(struct scene *scene, uint32_t stripes)
{
	const struct kvg_sqe all = create(16);
	struct fixture_usage usage;
	uint32_t event = drop(&scene->mute, fill(&scene->mute, stripes));

	fixture_tenant(&scene->fixture, "search", &usage);
	assert_int_equal(usage.unreturned, stripes * EXTENT);
	assert_int_equal(usage.charged, stripes * EXTENT);
	submit_waiting(&scene->other, &all);
	return event;
}

/* ---- waiting ---- */

static void test_a_request_waits_for_what_a_worker_was_asked_to_unmap(void **state)
{
	struct fixture_usage usage;
	struct scene scene;
	uint32_t event;

	(void)state;
	scene_open(&scene);
	event = hold_back(&scene, 4);
	acknowledge(&scene.mute, event);
	(void)assert_granted(&scene.other);
	fixture_tenant(&scene.fixture, "search", &usage);
	assert_int_equal(usage.unreturned, 0);
	assert_int_equal(usage.promised, 4 * MIB);
	scene_close(&scene);
}

static void test_a_reserve_waits_as_well(void **state)
{
	struct scene scene;
	struct kvg_sqe reserve = {.op = KVG_OP_RESERVE, .user_data = WAITING, .reserve.tokens = 12 * KVG_STRIPE_TOKENS};
	struct fixture_usage usage;
	uint32_t event;

	(void)state;
	scene_open(&scene);
	reserve.seq = fill(&scene.other, 1);
	event = drop(&scene.mute, fill(&scene.mute, 8));
	submit_waiting(&scene.other, &reserve);
	acknowledge(&scene.mute, event);
	(void)assert_granted(&scene.other);
	fixture_tenant(&scene.fixture, "search", &usage);
	assert_int_equal(usage.charged, 12 * EXTENT);
	scene_close(&scene);
}

static void test_a_request_waits_for_what_a_dead_worker_leaves(void **state)
{
	struct scene scene;

	(void)state;
	scene_open(&scene);
	(void)hold_back(&scene, 4);
	raw_close(&scene.mute);
	(void)assert_granted(&scene.other);
	scene_close(&scene);
}

static void test_those_who_wait_come_in_their_order(void **state)
{
	const struct kvg_sqe half = create(8);
	struct scene scene;
	struct raw third;
	uint32_t first_event, second_event;
	uint64_t first, second;

	(void)state;
	scene_open(&scene);
	raw_open(&third, scene.search, &scene.layout);
	first = fill(&scene.mute, 8);
	second = fill(&scene.mute, 8);
	first_event = drop(&scene.mute, first);
	second_event = drop(&scene.mute, second);
	assert_true(first_event != second_event);
	submit_waiting(&scene.other, &half);
	submit_waiting(&third, &half);
	acknowledge(&scene.mute, first_event);
	(void)assert_granted(&scene.other);
	acknowledge(&scene.mute, second_event);
	(void)assert_granted(&third);
	raw_close(&third);
	scene_close(&scene);
}

static void test_a_request_waits_for_another_tenant_when_the_pool_is_full(void **state)
{
	const struct kvg_sqe sixteen = create(16);
	struct scene scene;
	struct raw chat;
	uint32_t event;

	(void)state;
	scene_open(&scene);
	raw_open(&chat, scene.chat, &scene.layout);
	event = drop(&chat, fill(&chat, 20));
	submit_waiting(&scene.other, &sixteen);
	assert_true(until(pressure, &chat, true));
	acknowledge(&chat, event);
	(void)assert_granted(&scene.other);
	assert_true(until(pressure, &chat, false));
	raw_close(&chat);
	scene_close(&scene);
}

static void test_a_worker_dies_while_its_request_waits(void **state)
{
	struct fixture_usage usage;
	struct scene scene;
	uint32_t event;

	(void)state;
	scene_open(&scene);
	event = hold_back(&scene, 4);
	raw_close(&scene.other);
	acknowledge(&scene.mute, event);
	assert_true(fixture_wait_gone(&scene.fixture, 1, 0, FIXTURE_WAIT_MS));
	fixture_tenant(&scene.fixture, "search", &usage);
	assert_int_equal(usage.promised, 0);
	raw_open(&scene.other, scene.search, &scene.layout);
	(void)fill(&scene.other, 16);
	scene_close(&scene);
}

/* ---- refusals ---- */

static void test_nothing_is_on_its_way_so_the_refusal_comes_and_says_why(void **state)
{
	const struct kvg_sqe five = create(5);
	struct scene scene;

	(void)state;
	scene_open(&scene);
	(void)fill(&scene.mute, 12);
	assert_int_equal(raw_submit_refused(&scene.other, &five), -ENOSPC);
	assert_names(scene.other.text, "tenant search");
	assert_names(scene.other.text, "budget 4.0 MiB");
	assert_names(scene.other.text, "262144 bytes short");
	assert_names(scene.other.text, "in use 3.0 MiB");
	assert_int_equal(pressure(&scene.mute), 0);
	scene_close(&scene);
}

static void test_what_can_never_fit_does_not_wait(void **state)
{
	const struct kvg_sqe seventeen = create(17);
	struct scene scene;
	uint32_t event;

	(void)state;
	scene_open(&scene);
	event = drop(&scene.mute, fill(&scene.mute, 4));
	assert_int_equal(raw_submit_refused(&scene.other, &seventeen), -ENOSPC);
	assert_names(scene.other.text, "budget 4.0 MiB");
	acknowledge(&scene.mute, event);
	scene_close(&scene);
}

/* ---- pressure ---- */

static void test_workers_are_asked_while_somebody_waits_and_no_longer(void **state)
{
	struct scene scene;
	struct raw chat;
	uint32_t event;

	(void)state;
	scene_open(&scene);
	raw_open(&chat, scene.chat, &scene.layout);
	assert_int_equal(pressure(&scene.mute), 0);
	event = hold_back(&scene, 4);
	assert_true(until(pressure, &scene.mute, true));
	assert_int_equal(pressure(&chat), 0);
	acknowledge(&scene.mute, event);
	(void)assert_granted(&scene.other);
	assert_true(until(pressure, &scene.mute, false));
	assert_int_equal(pressure(&chat), 0);
	raw_close(&chat);
	scene_close(&scene);
}

static void test_relief_answers_a_number_that_was_asked_with(void **state)
{
	struct kvg_sqe relief = {.op = KVG_OP_RELIEF};
	struct kvg_cqe cqe;
	struct scene scene;
	uint32_t event, number;

	(void)state;
	scene_open(&scene);
	assert_int_equal(raw_submit_refused(&scene.mute, &relief), -EINVAL);
	event = hold_back(&scene, 4);
	assert_true(until(pressure, &scene.mute, true));
	number = pressure(&scene.mute);
	relief.relief.pressure = number + 1;
	assert_int_equal(raw_submit_refused(&scene.mute, &relief), -EINVAL);
	relief.relief.pressure = number;
	raw_submit_done(&scene.mute, &relief, &cqe);
	acknowledge(&scene.mute, event);
	(void)assert_granted(&scene.other);
	scene_close(&scene);
}

static void test_a_worker_that_holds_memory_back_is_disconnected_with_a_reason(void **state)
{
	struct kvg_cqe cqe;
	struct scene scene;

	(void)state;
	scene_open(&scene);
	(void)hold_back(&scene, 4);
	assert_false(raw_complete(&scene.mute, &cqe));
	assert_names(scene.mute.text, "memory is short");
	assert_names(scene.mute.text, "1.0 MiB");
	assert_names(scene.mute.text, "ms");
	(void)assert_granted(&scene.other);
	assert_true(fixture_wait_gone(&scene.fixture, 1, 0, FIXTURE_WAIT_MS));
	scene_close(&scene);
}

static void test_a_silent_worker_that_holds_nothing_back_stays(void **state)
{
	const struct kvg_sqe five = create(5);
	struct kvg_cqe cqe;
	struct scene scene;
	struct raw silent;

	(void)state;
	scene_open(&scene);
	raw_open(&silent, scene.search, &scene.layout);
	(void)fill(&silent, 8);
	(void)drop(&scene.mute, fill(&scene.mute, 8));
	submit_waiting(&scene.other, &five);
	assert_false(raw_complete(&scene.mute, &cqe)); /* it is the one that goes */
	(void)assert_granted(&scene.other);
	(void)fill(&silent, 1);
	raw_close(&silent);
	assert_true(fixture_wait_gone(&scene.fixture, 1, 0, FIXTURE_WAIT_MS));
	scene_close(&scene);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_a_request_waits_for_what_a_worker_was_asked_to_unmap),
		cmocka_unit_test(test_a_reserve_waits_as_well),
		cmocka_unit_test(test_a_request_waits_for_what_a_dead_worker_leaves),
		cmocka_unit_test(test_those_who_wait_come_in_their_order),
		cmocka_unit_test(test_a_request_waits_for_another_tenant_when_the_pool_is_full),
		cmocka_unit_test(test_a_worker_dies_while_its_request_waits),
		cmocka_unit_test(test_nothing_is_on_its_way_so_the_refusal_comes_and_says_why),
		cmocka_unit_test(test_what_can_never_fit_does_not_wait),
		cmocka_unit_test(test_workers_are_asked_while_somebody_waits_and_no_longer),
		cmocka_unit_test(test_relief_answers_a_number_that_was_asked_with),
		cmocka_unit_test(test_a_worker_that_holds_memory_back_is_disconnected_with_a_reason),
		cmocka_unit_test(test_a_silent_worker_that_holds_nothing_back_stays),
	};

	return runner_run("pressure", tests, sizeof(tests) / sizeof(*tests));
}
