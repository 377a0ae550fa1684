/* Extents that an eviction empties and the next tokens fill: they neither go nor come, and nobody has less by it. */
#include "daemon/sequence/keep.h"

#include <errno.h>
#include <stdlib.h>

#include "daemon/sequence/compute.h"
#include "tests/support/space_model.h"

#define EXTENT (16u << 10) /* a stripe of the fixture's geometry */
#define CHUNK  512u        /* four of them */

static const struct kvg_policy chunked = {.ratio = 0.25,
	.mode = KVG_MODE_CHUNKED,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE,
	.context_tokens = 5 * CHUNK,
	.chunk_tokens = CHUNK,
	.window = 16};

static struct fixture *fixture_of(unsigned extents)
{
	return fixture_new(&(struct fixture_options){.extent_size = EXTENT, .device_max = (uint64_t)extents * EXTENT});
}

/* Reads a chunk and evicts. */
static void read_chunk(struct model *model, uint32_t tokens)
{
	assert_int_equal(model_append(model, tokens), 0);
	model_evict(model, KVG_EVICT_PREFILL);
}

static void test_between_chunks(void **state)
{
	struct fixture *fixture = fixture_of(64);
	const struct quota_account *account = fixture_account(fixture);
	struct model *model = model_new(fixture, &chunked, SCORES_RANDOM);
	uint64_t committed = account->charged + account->promised;
	uint32_t dropped, grown;

	(void)state;
	read_chunk(model, CHUNK);
	assert_int_equal(fixture->space->blocks.spare_count, 4);
	dropped = fixture->dropped_event;
	for (unsigned i = 0; i < 3; i++) {
		grown = fixture->mapped_count;
		read_chunk(model, CHUNK);
		assert_int_equal(fixture->dropped_event, dropped); /* nothing goes */
		assert_true(fixture->mapped_count <= grown + 2);   /* what comes is what the survivors take */
		assert_int_equal(fixture->space->blocks.spare_count, 4);
		assert_true(account->charged + account->promised <= committed);
	}
	read_chunk(model, CHUNK);
	assert_int_equal(fixture->space->blocks.spare_count, 0); /* the prompt is over */
	assert_int_equal(fixture->space->wanted, 0);
	assert_int_equal(account->charged, fixture->mapped_count * (uint64_t)EXTENT);
	model_release(model);
	assert_int_equal(account->charged, 0);
	fixture_free(fixture);
}

/* The last chunk is smaller: only what it needs stays. */
static void test_last_chunk(void **state)
{
	struct fixture *fixture = fixture_of(64);
	struct kvg_policy policy = chunked;
	struct model *model;
	uint32_t events;

	(void)state;
	policy.context_tokens = 2 * CHUNK + 150;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	read_chunk(model, CHUNK);
	assert_int_equal(fixture->space->blocks.spare_count, 4);
	read_chunk(model, CHUNK);
	assert_int_equal(fixture->space->blocks.spare_count, 2);
	events = fixture->events;
	assert_int_equal(model_append(model, 150), 0);
	assert_int_equal(fixture->events, events);
	model_release(model);
	fixture_free(fixture);
}

static void test_free_gives_back(void **state)
{
	struct fixture *fixture = fixture_of(64);
	struct model *model = model_new(fixture, &chunked, SCORES_RANDOM);

	(void)state;
	read_chunk(model, CHUNK);
	assert_int_equal(fixture->space->wanted, 4);
	model_release(model);
	assert_int_equal(fixture->space->wanted, 0);
	assert_int_equal(fixture_account(fixture)->charged, 0);
	assert_int_equal(fixture->mapped_count, 0);
	fixture_free(fixture);
}

/* Who has no right to more does not get what another keeps for its next chunk; who is admitted gets its own. */
static void test_others_do_not_take_it(void **state)
{
	struct fixture *fixture = fixture_of(11);
	const struct quota_account *account = fixture_account(fixture);
	struct kvg_policy policy = chunked, small = {.context_tokens = 128};
	struct model *model;
	uint64_t other;

	(void)state;
	policy.context_tokens = 2 * CHUNK;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	assert_int_equal(fixture_create(fixture, &small, &other), 0);
	read_chunk(model, CHUNK);
	assert_int_equal(fixture->space->blocks.spare_count, 4);
	assert_int_equal(fixture_reserve(fixture, other, 128), 0);
	assert_int_equal(fixture_reserve(fixture, other, 6 * 128), -ENOSPC);
	assert_true(fixture->space->blocks.spare_count + account->promised / EXTENT >= 4);
	read_chunk(model, CHUNK);
	assert_true(account->charged + account->promised <= account->max);
	model_release(model);
	fixture_free(fixture);
}

/* Rights that the promise does not cover, because an extent is shared, make nobody create more than it needs. */
static void test_growth_is_what_is_missing(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = 64u << 10});
	struct kvg_policy policy = {.context_tokens = 640};
	uint64_t handles[3], beyond;

	(void)state;
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(fixture_create(fixture, &policy, &handles[i]), 0);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(fixture_reserve(fixture, handles[i], 128), 0);
	policy.context_tokens = 0;
	assert_int_equal(fixture_create(fixture, &policy, &beyond), 0);
	assert_int_equal(fixture->mapped_count, 1);
	assert_int_equal(fixture_reserve(fixture, beyond, 512), 0);
	assert_int_equal(fixture->mapped_count, 2);
	fixture_free(fixture);
}

/* ---- ahead ---- */

static void wait_ahead(struct fixture *fixture)
{
	while (fixture->space->growing)
		fixture_turn(fixture);
}

static struct compute_ops slow_creation(struct fixture *fixture)
{
	struct compute_ops ops = *fixture->space->compute;

	ops.creates_ahead = true;
	return ops;
}

/* Where creating takes long, the room of an eviction is there before it begins. */
static void test_room_is_created_ahead(void **state)
{
	struct fixture *fixture = fixture_of(64);
	const struct quota_account *account = fixture_account(fixture);
	const struct compute_ops ops = slow_creation(fixture);
	struct model *model = model_new(fixture, &chunked, SCORES_RANDOM);
	uint64_t committed = account->charged + account->promised;
	uint32_t events;

	(void)state;
	fixture->space->compute = &ops;
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(model_append(model, CHUNK), 0);
		wait_ahead(fixture);
		assert_true(fixture->space->blocks.spare_count > 0);
		assert_true(account->charged + account->promised <= committed);
		events = fixture->events;
		model_evict(model, KVG_EVICT_PREFILL);
		assert_int_equal(fixture->events, events); /* neither created nor given back */
	}
	model_release(model);
	assert_int_equal(account->charged, 0);
	fixture_free(fixture);
}

/* The prompt ends, or there is no promise to draw from: nothing is created ahead, nothing refused. */
static void test_nothing_ahead_beyond_the_promise(void **state)
{
	struct fixture *fixture = fixture_of(64);
	const struct compute_ops ops = slow_creation(fixture);
	struct kvg_policy policy = chunked;
	struct model *model;
	uint64_t charged;

	(void)state;
	fixture->space->compute = &ops;
	policy.context_tokens = CHUNK;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	assert_int_equal(model_append(model, CHUNK), 0);
	wait_ahead(fixture);
	charged = fixture_account(fixture)->charged;
	assert_true(charged <= (uint64_t)(4 + 2) * EXTENT); /* two spare stripes were admitted */
	model_evict(model, KVG_EVICT_PREFILL);
	assert_int_equal(fixture->space->blocks.spare_count, 0);
	assert_int_equal(fixture_reserve(fixture, model->handle, 128), 0);
	assert_false(fixture->space->growing);
	model_release(model);
	fixture_free(fixture);
}

static void test_kill_amid_creation_ahead(void **state)
{
	struct fixture *fixture = fixture_of(64);
	const struct compute_ops ops = slow_creation(fixture);
	struct model *model = model_new(fixture, &chunked, SCORES_RANDOM);

	(void)state;
	fixture->space->compute = &ops;
	assert_int_equal(fixture_reserve(fixture, model->handle, CHUNK), 0);
	assert_true(fixture->space->growing);
	fixture_kill(fixture);
	model_free(model);
	fixture_free(fixture);
}

/* What was created ahead for a sequence that is freed meanwhile goes back when it is there. */
static void test_freed_amid_creation_ahead(void **state)
{
	struct fixture *fixture = fixture_of(64);
	const struct compute_ops ops = slow_creation(fixture);
	struct model *model = model_new(fixture, &chunked, SCORES_RANDOM);

	(void)state;
	fixture->space->compute = &ops;
	assert_int_equal(fixture_reserve(fixture, model->handle, CHUNK), 0);
	assert_true(fixture->space->growing);
	model_release(model);
	wait_ahead(fixture);
	fixture_acknowledge(fixture);
	assert_int_equal(fixture_account(fixture)->charged, 0);
	fixture_free(fixture);
}

static struct kvg_sqe entry_of(struct fixture *fixture, uint8_t op, uint64_t handle, uint32_t tokens)
{
	struct kvg_sqe entry = {.op = op, .seq = handle, .generation = fixture_generation(fixture, handle)};

	entry.reserve.tokens = tokens;
	return entry;
}

/* Extents that come in parts are for who waits for them: another's end does not give the first of them back. */
static void test_parts_stay_for_who_waits(void **state)
{
	const struct kvg_policy large = {.context_tokens = 120 * 128}, small = {.context_tokens = 128};
	struct fixture *fixture = fixture_new(&(struct fixture_options){
		.extent_size = EXTENT, .max_tokens = 16384, .device_max = (uint64_t)121 * EXTENT});
	uint64_t waits = 0, ends = 0;
	struct call *call;
	struct kvg_sqe entry;

	(void)state;
	assert_int_equal(fixture_create(fixture, &large, &waits), 0);
	assert_int_equal(fixture_create(fixture, &small, &ends), 0);
	entry = entry_of(fixture, KVG_OP_RESERVE, waits, 120 * 128);
	call = fixture_start(fixture, &entry);
	while (!call->done && !fixture->space->blocks.spare_count)
		fixture_turn(fixture);
	assert_false(call->done);
	assert_int_equal(fixture_release(fixture, ends), 0);
	fixture_wait(fixture, call);
	assert_int_equal(call->request.cqe.status, 0);
	assert_int_equal(fixture_account(fixture)->charged, (uint64_t)120 * EXTENT);
	fixture_free(fixture);
}

/* While one waits for extents, another takes those kept for it: the first does not leave them out twice. */
static void test_kept_extents_count_once(void **state)
{
	struct fixture *fixture = fixture_of(15);
	struct kvg_policy policy = chunked, none = {.context_tokens = 0};
	struct kvg_sqe first, second;
	struct call *waits, *keeps;
	struct model *model;
	uint64_t other = 0;

	(void)state;
	policy.context_tokens = 2 * CHUNK;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	assert_int_equal(fixture_create(fixture, &none, &other), 0);
	read_chunk(model, CHUNK);
	first = entry_of(fixture, KVG_OP_RESERVE, other, 6 * 128);
	second = entry_of(fixture, KVG_OP_RESERVE, model->handle, CHUNK);
	waits = fixture_start(fixture, &first);
	keeps = fixture_start(fixture, &second);
	fixture_wait(fixture, waits);
	fixture_wait(fixture, keeps);
	assert_int_equal(keeps->request.cqe.status, 0);
	assert_int_equal(waits->request.cqe.status, 0);
	model_free(model);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_between_chunks),
		cmocka_unit_test(test_last_chunk),
		cmocka_unit_test(test_free_gives_back),
		cmocka_unit_test(test_others_do_not_take_it),
		cmocka_unit_test(test_growth_is_what_is_missing),
		cmocka_unit_test(test_room_is_created_ahead),
		cmocka_unit_test(test_nothing_ahead_beyond_the_promise),
		cmocka_unit_test(test_kill_amid_creation_ahead),
		cmocka_unit_test(test_freed_amid_creation_ahead),
		cmocka_unit_test(test_parts_stay_for_who_waits),
		cmocka_unit_test(test_kept_extents_count_once),
	};

	return runner_run("keep", tests, sizeof(tests) / sizeof(tests[0]));
}
