/* FORK: parent and child hold the same pairs, share full blocks, and go their own ways from there. */
#include "daemon/sequence/context.h"

#include <errno.h>
#include <string.h>

#include "tests/support/space_model.h"

static struct model *fork_model(struct model *parent)
{
	struct kvg_policy policy = model_frozen(&parent->policy, parent->committed);
	struct fixture *fixture = parent->fixture;
	uint32_t generation = fixture_generation(fixture, parent->handle);
	uint64_t child = 0;
	struct model *model;

	if (fixture_fork(fixture, parent->handle, &child) < 0)
		fail_msg("%s", fixture->text);
	assert_int_equal(fixture->cqe.seq, parent->handle);
	assert_int_equal(fixture->cqe.value[0], (uint32_t)child);
	assert_int_equal(fixture->cqe.value[3],
		fixture->space->sequences[(uint32_t)child]->meta->blocks * 2 * fixture->space->arena->stride);
	model = model_attached(fixture, parent, &policy, child);
	if (fixture_generation(fixture, parent->handle) != generation)
		model_seal(parent);
	return model;
}

static uint64_t used(const struct fixture *fixture)
{
	return fixture->space->blocks.used_blocks;
}

/* A prompt, evicted; a fork; both go on with tokens of their own. */
static void test_fork_of_an_evicted_prompt(void **state)
{
	struct kvg_policy policy = {
		.mode = KVG_MODE_CHUNKED, .ratio = 0.4, .context_tokens = 700, .max_new_tokens = 300};
	struct fixture *fixture = fixture_new(NULL);
	struct model *parent = model_new(fixture, &policy, SCORES_RANDOM), *child;
	uint64_t before;

	(void)state;
	model_prefill(parent);
	before = used(fixture);
	child = fork_model(parent);
	assert_in_range(used(fixture) - before, 1, 4); /* tails */
	assert_int_equal(fixture->space->table.slots[(uint32_t)child->handle].shared_pos, 700);
	assert_int_equal(fixture->space->table.slots[(uint32_t)parent->handle].shared_pos, 700);
	model_check(parent);
	model_check(child);
	assert_int_equal(model_append(child, 50), 0);
	assert_int_equal(model_append(parent, 200), 0);
	model_check(parent);
	model_check(child);
	assert_int_equal(fixture_query(fixture, child->handle), 0);
	assert_int_equal(fixture->cqe.value[0], model_pairs(child));
	model_release(parent);
	model_check(child);
	assert_int_equal(model_append(child, 100), 0);
	model_check(child);
	model_release(child);
	assert_int_equal(used(fixture), 0);
	assert_int_equal(fixture_account(fixture)->charged, 0);
	fixture_free(fixture);
}

/* Fresh tokens are sealed where they are, in the nursery; what was reserved goes back. */
static void test_fork_of_fresh_tokens(void **state)
{
	static const uint32_t lengths[] = {1, 15, 16, 17, 128, 129, 200, 256};
	struct kvg_policy policy = {.context_tokens = 512, .max_new_tokens = 100};
	struct fixture *fixture = fixture_new(NULL);

	(void)state;
	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		struct model *parent = model_new(fixture, &policy, SCORES_RANDOM), *child;
		uint32_t generation = fixture_generation(fixture, parent->handle), n = lengths[i];
		uint64_t full = n / 16 * 4, tails = n % 16 ? 4 : 0;

		assert_int_equal(model_append(parent, n), 0);
		assert_int_equal(fixture_reserve(fixture, parent->handle, 130), 0);
		child = fork_model(parent);
		if (n >= 16) {
			assert_int_equal(fixture_generation(fixture, parent->handle), generation + 1);
			assert_int_equal(used(fixture), full + 2 * tails);
		} else { /* nothing to share: the parent is as it was */
			assert_int_equal(fixture_generation(fixture, parent->handle), generation);
		}
		model_check(parent);
		model_check(child);
		assert_int_equal(model_append(parent, 20), 0);
		assert_int_equal(model_append(child, 300), 0);
		model_check(parent);
		model_check(child);
		model_release(child);
		model_check(parent);
		model_release(parent);
		assert_int_equal(used(fixture), 0);
	}
	fixture_free(fixture);
}

/* A child of tails alone leaves nothing to the next sequence in its slot, resident or offloaded. */
static void test_slot_after_a_child_of_tails(void **state)
{
	struct kvg_policy policy = {.context_tokens = 400, .max_new_tokens = 100};
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = 1 << 20});
	struct model *parent = model_new(fixture, &policy, SCORES_RANDOM), *child, *next;
	uint32_t slot;

	(void)state;
	assert_int_equal(model_append(parent, 15), 0);
	for (unsigned i = 0; i < 2; i++) {
		child = fork_model(parent);
		slot = (uint32_t)child->handle;
		if (i)
			assert_int_equal(
				fixture_call(fixture, &(struct kvg_sqe){.op = KVG_OP_OFFLOAD, .seq = child->handle}),
				0);
		model_release(child);
		next = model_new(fixture, &policy, SCORES_RANDOM);
		assert_int_equal((uint32_t)next->handle, slot);
		assert_int_equal(model_append(next, 40), 0);
		model_check(next);
		model_check(parent);
		model_release(next);
	}
	model_release(parent);
	assert_int_equal(used(fixture), 0);
	fixture_free(fixture);
}

/* A fork of a fork of a fork, freed from the middle. */
static void test_chains(void **state)
{
	struct kvg_policy policy = {.context_tokens = 100, .max_new_tokens = 1000};
	struct fixture *fixture = fixture_new(NULL);
	struct model *models[6];

	(void)state;
	models[0] = model_new(fixture, &policy, SCORES_RANDOM);
	assert_int_equal(model_append(models[0], 100), 0);
	for (unsigned i = 1; i < 6; i++) {
		models[i] = fork_model(models[i - 1]);
		assert_int_equal(model_append(models[i], 37), 0);
	}
	for (unsigned i = 0; i < 6; i++)
		model_check(models[i]);
	for (unsigned i = 0; i < 6; i += 2)
		model_release(models[i]);
	for (unsigned i = 1; i < 6; i += 2) {
		assert_int_equal(model_append(models[i], 64), 0);
		model_check(models[i]);
	}
	for (unsigned i = 1; i < 6; i += 2)
		model_release(models[i]);
	assert_int_equal(used(fixture), 0);
	assert_int_equal(fixture->pool->meta->free_context_count, META_MAX_CONTEXTS);
	fixture_free(fixture);
}

/* Evictions of forks drop their own pairs only. */
static void test_decode_evictions(void **state)
{
	struct kvg_policy policy = {.context_tokens = 300, .max_new_tokens = 2000, .budget = 200, .decode_window = 16};
	struct fixture *fixture = fixture_new(NULL);
	struct model *parent = model_new(fixture, &policy, SCORES_RANDOM), *child;

	(void)state;
	model_prefill(parent);
	child = fork_model(parent);
	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(model_append(child, 250), 0);
		model_evict(child, KVG_EVICT_DECODE);
		assert_int_equal(model_append(parent, 270), 0);
		model_evict(parent, KVG_EVICT_DECODE);
		model_check(child);
	}
	assert_true(model_pairs(child) < 4 * (300 + 3 * 250));
	model_release(parent);
	model_check(child);
	model_release(child);
	fixture_free(fixture);
}

/* A prompt of which a part is sealed: the rest is evicted by the policy, over its own tokens. */
static void test_prefill_evictions(void **state)
{
	for (unsigned level = 0; level < 4; level++) {
		struct kvg_policy policy = {.mode = KVG_MODE_CHUNKED,
			.level = (uint8_t)level,
			.ratio = 0.5,
			.chunk_tokens = 250,
			.context_tokens = 1000,
			.window = 20,
			.flags = KVG_POLICY_WINDOW_ABSOLUTE,
			.max_new_tokens = 10};
		struct fixture *fixture = fixture_new(NULL);
		struct model *parent = model_new(fixture, &policy, SCORES_RANDOM), *child;

		assert_int_equal(model_append(parent, 250), 0);
		model_evict(parent, KVG_EVICT_PREFILL);
		child = fork_model(parent);
		model_prefill(child);
		model_prefill(parent);
		model_check(child);
		model_release(child);
		model_release(parent);
		fixture_free(fixture);
	}
	(void)state;
}

/* Not before what is sealed; protected ranges are inherited. */
static void test_truncate_and_protect(void **state)
{
	struct kvg_policy policy = {.context_tokens = 100, .max_new_tokens = 500, .budget = 100, .decode_window = 8};
	struct fixture *fixture = fixture_new(NULL);
	struct model *parent = model_new(fixture, &policy, SCORES_RANDOM), *child;

	(void)state;
	model_prefill(parent);
	model_protect(parent, 110, 120);
	child = fork_model(parent);
	child->protect_begin = 110;
	child->protect_end = 120;
	assert_int_equal(fixture_truncate(fixture, child->handle, 99), -EINVAL);
	assert_int_equal(fixture_truncate(fixture, parent->handle, 99), -EINVAL);
	assert_int_equal(model_append(child, 40), 0);
	model_truncate(child, 105);
	assert_int_equal(model_append(child, 200), 0);
	model_evict(child, KVG_EVICT_DECODE);
	model_release(child);
	model_release(parent);
	fixture_free(fixture);
}

/* A fork that does not fit says so, and nothing has changed. */
static void test_refusals(void **state)
{
	struct kvg_policy policy = {.context_tokens = 500, .max_new_tokens = 0};
	struct fixture *fixture = fixture_new(&(struct fixture_options){.max_sequences = 2, .device_max = 65536 * 2});
	struct model *parent = model_new(fixture, &policy, SCORES_RANDOM);
	struct kvg_policy more = {.context_tokens = 512};
	uint64_t handle = 0, other;

	(void)state;
	model_prefill(parent);
	assert_int_equal(fixture_account(fixture)->charged, 65536);
	assert_int_equal(fixture_create(fixture, &more, &other), 0); /* promised what is left */
	assert_int_equal(fixture_fork(fixture, parent->handle, &handle), -EUSERS);
	assert_int_equal(fixture_release(fixture, other), 0);
	assert_int_equal(fixture_create(fixture, &more, &other), 0);
	fixture->space->free_count = 1; /* a slot that nobody uses: the refusal is the budget's */
	assert_int_equal(fixture_fork(fixture, parent->handle, &handle), -ENOSPC);
	assert_non_null(strstr(fixture->text, "the fork needs"));
	fixture->space->free_count = 0;
	model_check(parent);
	assert_int_equal(fixture_fork(fixture, 12345, &handle), -ENOENT);
	assert_int_equal(fixture_release(fixture, other), 0);
	model_release(parent);
	fixture_free(fixture);
}

/* The worker goes with forks of forks. */
static void test_worker_dies(void **state)
{
	struct kvg_policy policy = {.context_tokens = 300, .max_new_tokens = 1000};
	struct fixture *fixture = fixture_new(NULL);
	struct model *parent = model_new(fixture, &policy, SCORES_RANDOM), *child, *grandchild;

	(void)state;
	model_prefill(parent);
	child = fork_model(parent);
	assert_int_equal(model_append(child, 100), 0);
	grandchild = fork_model(child);
	(void)fixture_start(fixture, &(struct kvg_sqe){.op = KVG_OP_FORK, .seq = grandchild->handle});
	fixture_kill(fixture);
	assert_int_equal(fixture->pool->meta->free_context_count, META_MAX_CONTEXTS);
	model_free(parent);
	model_free(child);
	model_free(grandchild);
	fixture_free(fixture);
}

/* Entries that name the child before its FORK has ended come after it, and all of them end. */
static void test_entries_before_its_end(void **state)
{
	struct kvg_policy policy = {.context_tokens = 300, .max_new_tokens = 100};
	struct fixture *fixture = fixture_new(NULL);
	struct model *parent = model_new(fixture, &policy, SCORES_RANDOM);
	const struct space *space = fixture->space;
	struct call *fork, *gone, *late;
	uint64_t handle;

	(void)state;
	model_prefill(parent);
	handle = (uint64_t)(space->epoch + 1) << 32 | space->free_slots[space->free_count - 1];
	fork = fixture_start(fixture, &(struct kvg_sqe){.op = KVG_OP_FORK, .seq = parent->handle});
	gone = fixture_start(fixture, &(struct kvg_sqe){.op = KVG_OP_FREE, .seq = handle});
	late = fixture_start(fixture, &(struct kvg_sqe){.op = KVG_OP_QUERY, .seq = handle});
	fixture_wait(fixture, late);
	assert_true(fork->done && gone->done && fork->order < gone->order);
	assert_int_equal(fork->request.cqe.value[1], handle);
	assert_int_equal(gone->request.cqe.status, 0);
	assert_int_equal(late->request.cqe.status, -ENOENT);
	model_seal(parent);
	model_check(parent);
	model_release(parent);
	fixture_free(fixture);
}

/* Those that wait for a child that comes to nothing fail: there are too many contexts. */
static void test_entries_before_its_failure(void **state)
{
	struct kvg_policy policy = {.context_tokens = 512, .max_new_tokens = 100};
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = 16 << 10});
	struct model *parent = model_new(fixture, &policy, SCORES_RANDOM);
	const struct space *space = fixture->space;
	struct call *fork, *late;
	uint64_t handle;

	(void)state;
	assert_int_equal(model_append(parent, 500), 0);
	handle = (uint64_t)(space->epoch + 1) << 32 | space->free_slots[space->free_count - 1];
	fixture->pool->meta->free_context_count = 0;
	fork = fixture_start(fixture, &(struct kvg_sqe){.op = KVG_OP_FORK, .seq = parent->handle});
	assert_false(fork->done);
	late = fixture_start(fixture, &(struct kvg_sqe){.op = KVG_OP_QUERY, .seq = handle});
	fixture_wait(fixture, late);
	fixture->pool->meta->free_context_count = META_MAX_CONTEXTS;
	assert_true(fork->done && fork->order < late->order);
	assert_int_equal(fork->request.cqe.status, -EUSERS);
	assert_int_equal(late->request.cqe.status, -ENOENT);
	assert_int_equal(fixture->space->sequence_count, 1);
	model_check(parent);
	model_release(parent);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_fork_of_an_evicted_prompt),
		cmocka_unit_test(test_fork_of_fresh_tokens),
		cmocka_unit_test(test_slot_after_a_child_of_tails),
		cmocka_unit_test(test_chains),
		cmocka_unit_test(test_decode_evictions),
		cmocka_unit_test(test_prefill_evictions),
		cmocka_unit_test(test_truncate_and_protect),
		cmocka_unit_test(test_refusals),
		cmocka_unit_test(test_worker_dies),
		cmocka_unit_test(test_entries_before_its_end),
		cmocka_unit_test(test_entries_before_its_failure),
	};

	return runner_run("fork", tests, sizeof(tests) / sizeof(tests[0]));
}
