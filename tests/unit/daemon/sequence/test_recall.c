/* Recalls in the midst of everything else, and where room lacks. */
#include "daemon/sequence/recall.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "tests/support/recall_model.h"
#include "tests/support/test_kind.h"

/* In the midst of a prompt, with tokens that have had no eviction yet; the rest of it is read as if nothing was. */
static void test_within_a_prompt(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
	struct kvg_policy other = recall_policy;
	struct model *model = model_new(fixture, &recall_policy, SCORES_RANDOM), *whole;
	uint64_t came;

	(void)state;
	other.ratio = 0.4;
	whole = model_new(fixture, &other, SCORES_RANDOM);
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(model_append(model, 200), 0);
		assert_int_equal(model_append(whole, 200), 0);
		model_evict(model, KVG_EVICT_PREFILL);
		model_evict(whole, KVG_EVICT_PREFILL);
	}
	assert_int_equal(model_append(model, 30), 0);
	assert_int_equal(model_append(whole, 30), 0);
	came = recall_take_over(model, whole);
	assert_true(came > 0);
	assert_int_equal(recall_ratio(model, 0.4), 0);
	recall_check(model, came);
	assert_int_equal(model_append(model, 75), 0);
	model_evict(model, KVG_EVICT_PREFILL);
	recall_check_store(model);
	model_release(model);
	model_release(whole);
	fixture_free(fixture);
}

static void do_something(struct model *model, struct random *random)
{
	uint32_t total = model->policy.prefix_tokens + model->policy.context_tokens, chunk = model->policy.chunk_tokens;
	double ratio = 0.1 + 0.9 * random_below(random, 1000) / 1000.0;

	if (model->committed < total) {
		uint32_t rest = total - model->committed;

		assert_int_equal(model_append(model, chunk < rest ? chunk : rest), 0);
		model_evict(model, KVG_EVICT_PREFILL);
	} else if (random_below(random, 2)) {
		assert_int_equal(model_append(model, 1 + random_below(random, 60)), 0);
		model_evict(model, KVG_EVICT_DECODE);
	}
	recall_check_store(model);
	if (random_below(random, 2)) {
		uint64_t came = recall_predict(model, ratio);

		if (recall_ratio(model, ratio) < 0)
			fail_msg("%s", model->fixture->text);
		recall_check(model, came);
	}
}

static struct kvg_policy any_policy(struct random *random)
{
	struct kvg_policy policy = recall_policy;

	policy.level = (uint8_t)random_below(random, 3); /* adakv is not monotone */
	policy.prefix_tokens = random_below(random, 40);
	policy.context_tokens = 300 + random_below(random, 600);
	policy.chunk_tokens = 100 + random_below(random, 400);
	policy.window = random_below(random, 30);
	policy.budget = 60 + random_below(random, 200);
	policy.max_new_tokens = 1200;
	policy.ratio = 0.1;
	return policy;
}

static void run_churn(size_t extent_size, unsigned evictions, uint64_t seed)
{
	struct fixture *fixture =
		fixture_new(&(struct fixture_options){.host_size = RECALL_HOST, .extent_size = extent_size});
	struct compute_ops ops = *fixture->space->compute;
	struct random random = {.state = seed};
	struct model *models[5] = {NULL};

	ops.evictions = evictions;
	fixture->space->compute = &ops;
	for (unsigned i = 0; i < 120; i++) {
		unsigned at = random_below(&random, 5);
		struct kvg_policy policy = any_policy(&random);

		if (!models[at]) {
			models[at] = model_new(fixture, &policy, (enum score_pattern)random_below(&random, 7));
		} else if (models[at]->committed > models[at]->policy.context_tokens + 800) {
			model_release(models[at]);
			models[at] = NULL;
		} else {
			do_something(models[at], &random);
		}
	}
	for (unsigned i = 0; i < 5; i++) {
		if (!models[i])
			continue;
		model_check(models[i]);
		model_release(models[i]);
	}
	assert_int_equal(fixture->tenant->host.account->charged, 0);
	fixture_free(fixture);
}

static void test_churn(void **state)
{
	static const size_t sizes[] = {16 << 10, 64 << 10, 1 << 20};

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		for (uint64_t seed = 1; seed <= 3; seed++)
			run_churn(sizes[i], seed == 3 ? META_RECORDS : 1, seed * 7919 + i);
}

/* Recalls and evictions of several sequences, submitted together, one behind the other or at a time. */
static void run_together(unsigned evictions)
{
	struct fixture *fixture =
		fixture_new(&(struct fixture_options){.host_size = RECALL_HOST, .extent_size = 16 << 10});
	struct compute_ops ops = *fixture->space->compute;
	struct kvg_policy policy = recall_policy;
	struct call *calls[6];
	struct model *models[6];
	uint64_t moved[6];

	ops.evictions = evictions;
	fixture->space->compute = &ops;
	policy.budget = 120;
	for (unsigned i = 0; i < 6; i++) {
		models[i] = recall_read_prompt(fixture, &policy, 0.3, (enum score_pattern)i, false);
		assert_int_equal(model_append(models[i], 50 + i), 0);
	}
	for (unsigned i = 0; i < 6; i++) {
		struct kvg_sqe sqe = {.op = i % 2 ? KVG_OP_RECALL : KVG_OP_EVICT, .seq = models[i]->handle};

		if (i % 2)
			sqe.recall.ratio = 0.8;
		else
			sqe.evict.mode = KVG_EVICT_DECODE;
		sqe.generation = fixture_generation(fixture, sqe.seq);
		moved[i] = i % 2 ? recall_predict(models[i], 0.8) : model_predict(models[i], KVG_EVICT_DECODE);
		calls[i] = fixture_start(fixture, &sqe);
	}
	for (unsigned i = 0; i < 6; i++) {
		fixture_wait(fixture, calls[i]);
		assert_int_equal(calls[i]->request.cqe.status, 0);
		assert_int_equal(calls[i]->request.cqe.value[1], moved[i]);
	}
	assert_int_equal(fixture->space->evict_reserve, 0);
	fixture_acknowledge(fixture);
	for (unsigned i = 0; i < 6; i++) {
		model_check(models[i]);
		recall_check_store(models[i]);
		model_release(models[i]);
	}
	fixture_free(fixture);
}

static void test_together(void **state)
{
	(void)state;
	run_together(1);
	run_together(META_RECORDS);
}

/* Copies in several slices each. */
static void test_large_pairs(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = 64 << 20,
		.k_dim = 1024,
		.v_dim = 1024,
		.k_dtype = KVG_F32,
		.v_dtype = KVG_F32,
		.pool_size = 128 << 20,
		.extent_size = 1 << 20});
	struct kvg_policy policy = recall_policy;
	struct model *model;
	uint64_t came;

	(void)state;
	policy.chunk_tokens = 0;
	model = recall_read_prompt(fixture, &policy, 0.1, SCORES_RANDOM, false);
	assert_true(recall_retained(model) * retain_pair_bytes(&recall_store(model)->form) > 12 << 20);
	came = recall_predict(model, 0.9);
	assert_int_equal(recall_ratio(model, 0.9), 0);
	recall_check(model, came);
	model_release(model);
	fixture_free(fixture);
}

static void decode(struct model *model, unsigned events)
{
	for (unsigned i = 0; i < events; i++) {
		assert_int_equal(model_append(model, 64), 0);
		model_evict(model, KVG_EVICT_DECODE);
		recall_check_store(model);
	}
}

static void test_decoding_goes_on(void **state)
{
	(void)state;
	for (int pattern = 0; pattern < SCORES_PATTERNS; pattern++) {
		struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
		struct kvg_policy policy = recall_policy;
		struct model *whole, *model;
		uint64_t came;

		policy.budget = 180;
		whole = recall_read_prompt(fixture, &policy, 0.5, (enum score_pattern)pattern, false);
		model = recall_read_prompt(fixture, &policy, 0.1, (enum score_pattern)pattern, false);
		assert_int_equal(model_append(model, 33), 0);
		came = recall_take_over(model, whole);
		assert_int_equal(recall_ratio(model, 0.5), 0);
		recall_check(model, came);
		decode(model, 3);
		assert_int_equal(
			recall_ratio(model, 0.5), 0); /* of the context, as before: what decoding dropped of it */
		came = recall_take_over(model, whole);
		recall_check(model, came);
		decode(model, 2);
		model_release(whole);
		model_release(model);
		fixture_free(fixture);
	}
}

/* Refused by the device's budget: nothing has changed, and with more of it all comes. */
static void test_little_device_memory(void **state)
{
	struct fixture *fixture =
		fixture_new(&(struct fixture_options){.host_size = RECALL_HOST, .extent_size = 16 << 10});
	struct kvg_policy policy = recall_policy;
	struct model *model, *whole;
	struct quota_account *account;
	uint64_t before, promised, came;

	(void)state;
	policy.max_new_tokens = 0;
	whole = recall_read_prompt(fixture, &policy, 0.9, SCORES_RANDOM, false);
	model = recall_read_prompt(fixture, &policy, 0.1, SCORES_RANDOM, false);
	account = fixture->tenant->quota.account;
	before = recall_retained(model);
	promised = account->promised;
	account->max = account->charged + account->promised;
	assert_int_equal(recall_ratio(model, 0.9), -ENOSPC);
	assert_non_null(strstr(fixture->text, "the recall needs"));
	assert_int_equal(recall_retained(model), before);
	assert_int_equal(account->promised, promised);
	assert_int_equal(fixture_generation(fixture, model->handle), 3);
	model_check(model);
	account->max = 64 << 20;
	came = recall_take_over(model, whole);
	assert_int_equal(recall_ratio(model, 0.9), 0);
	recall_check(model, came);
	model_release(model);
	model_release(whole);
	fixture_free(fixture);
}

/*
 * A reserve of another sequence in the midst of a recall, with so many extents more than both were admitted with: the
 * reserve gets what it was promised, and the recall all or nothing. Returns whether it got it.
 */
static bool reserve_amid_recall(size_t extent_size, uint32_t tokens, unsigned extents)
{
	struct fixture *fixture =
		fixture_new(&(struct fixture_options){.host_size = RECALL_HOST, .extent_size = extent_size});
	struct kvg_policy policy = recall_policy, other = {.context_tokens = tokens};
	struct quota_account *account = fixture->tenant->quota.account;
	struct model *model;
	struct kvg_sqe sqe = {.op = KVG_OP_RECALL, .recall.ratio = 0.95};
	struct call *recall, *reserve;
	uint64_t handle, came;
	bool back;

	policy.max_new_tokens = 100;
	model = recall_read_prompt(fixture, &policy, 0.1, SCORES_RANDOM, false);
	assert_int_equal(model_append(model, 100), 0);
	assert_int_equal(fixture_create(fixture, &other, &handle), 0);
	account->max = account->charged + account->promised + extents * fixture->space->arena->extent_size;
	sqe.seq = model->handle;
	sqe.generation = fixture_generation(fixture, sqe.seq);
	recall = fixture_start(fixture, &sqe);
	sqe = (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = handle, .reserve.tokens = tokens};
	reserve = fixture_start(fixture, &sqe);
	fixture_wait(fixture, recall);
	fixture_wait(fixture, reserve);
	if (reserve->request.cqe.status < 0)
		fail_msg("%zu, %u: %s", extent_size, tokens, reserve->request.text);
	assert_true(account->charged + account->promised <= account->max);
	back = recall->request.cqe.status == 0;
	if (!back)
		assert_int_equal(recall->request.cqe.status, -ENOSPC);
	came = back ? recall_predict(model, 0.95) : 0;
	assert_int_equal(recall->request.cqe.value[1], came);
	model_check(model);
	recall_check_store(model);
	fixture_acknowledge(fixture);
	assert_int_equal(fixture_release(fixture, handle), 0);
	model_release(model);
	fixture_free(fixture);
	return back;
}

static void test_reserve_amid_a_recall(void **state)
{
	static const size_t sizes[] = {8 << 10, 16 << 10, 64 << 10, 256 << 10};

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		for (uint32_t tokens = 128; tokens <= 2048; tokens *= 4) {
			unsigned extents = 0;

			while (!reserve_amid_recall(sizes[i], tokens, extents))
				assert_true(++extents < 64);
			assert_true(sizes[i] > 64 << 10 || extents > 0);
			(void)reserve_amid_recall(sizes[i], tokens, extents + 1);
		}
	}
}

static _Atomic(unsigned) creations; /* that still succeed */

static int create_some(struct kind *kind, size_t size)
{
	if (!creations)
		return -ENOMEM;
	creations--;
	return test_kind_host(kind)->create(kind, size);
}

/* Memory that is in the budget and cannot be had after all: the recall has all its room, or has changed nothing. */
static int recall_with_creations(size_t extent_size, unsigned count)
{
	struct test_kind kind;
	struct fixture *fixture;
	struct model *model;
	int status;

	test_kind_init(&kind);
	kind.ops.create = create_some;
	creations = UINT32_MAX;
	fixture = fixture_new(
		&(struct fixture_options){.kind = &kind.kind, .host_size = RECALL_HOST, .extent_size = extent_size});
	model = recall_read_prompt(fixture, &recall_policy, 0.1, SCORES_RANDOM, false);
	assert_int_equal(model_append(model, 100), 0);
	creations = count;
	status = recall_ratio(model, 0.95);
	creations = UINT32_MAX;
	if (status < 0)
		assert_int_equal(status, -ENOMEM);
	else
		(void)recall_predict(model, 0.95);
	model_check(model);
	recall_check_store(model);
	assert_int_equal(fixture_generation(fixture, model->handle), status < 0 ? 3 : 4);
	if (status < 0) {
		uint64_t came = recall_predict(model, 0.95);

		assert_int_equal(recall_ratio(model, 0.95), 0);
		recall_check(model, came);
	}
	model_release(model);
	fixture_free(fixture);
	test_kind_deinit(&kind);
	return status;
}

static void test_creation_fails(void **state)
{
	static const size_t sizes[] = {8 << 10, 16 << 10, 64 << 10};

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		unsigned count = 0;

		while (recall_with_creations(sizes[i], count) < 0)
			assert_true(++count < 64);
		assert_true(sizes[i] > 16 << 10 || count > 0);
		for (unsigned more = 1; more < 8; more++)
			assert_int_equal(recall_with_creations(sizes[i], count + more), 0);
	}
}

static void on_pressure(void *user, struct tenant *tenant, bool on)
{
	(void)user;
	(void)tenant;
	(void)on;
}

/* Memory is on its way: the recall waits for it, and an eviction of the same worker does not wait for the recall. */
static void test_waits_for_memory(void **state)
{
	static const struct reclaim_ops ops = {.pressure = on_pressure};
	static const size_t one = 1;
	struct fixture *fixture =
		fixture_new(&(struct fixture_options){.host_size = RECALL_HOST, .extent_size = 16 << 10});
	struct kvg_policy policy = recall_policy, plain = {.ratio = 1.0, .context_tokens = 1500};
	struct quota_account *account = fixture->tenant->quota.account;
	struct model *model, *whole, *idle, *other;
	struct call *waiting, *evict;
	struct reclaim reclaim;
	uint64_t came;

	(void)state;
	assert_int_equal(
		reclaim_init(&reclaim, fixture->loop, fixture->pool, &fixture->tenant, &one, 10000000000u, &ops, NULL),
		0);
	fixture->tenant->reclaim = &reclaim;
	policy.max_new_tokens = 0;
	whole = recall_read_prompt(fixture, &policy, 0.9, SCORES_RANDOM, false);
	model = recall_read_prompt(fixture, &policy, 0.1, SCORES_RANDOM, false);
	came = recall_take_over(model, whole);
	model_release(whole);
	other = model_new(fixture, &policy, SCORES_TIES);
	assert_int_equal(model_append(other, 200), 0);
	idle = model_new(fixture, &plain, SCORES_RANDOM);
	assert_int_equal(model_append(idle, 1500), 0);
	assert_int_equal(fixture_call(fixture, &(struct kvg_sqe){.op = KVG_OP_IDLE, .seq = idle->handle}), 0);
	account->max = account->charged + account->promised;
	waiting = fixture_start(fixture, &(struct kvg_sqe){.op = KVG_OP_RECALL,
						 .seq = model->handle,
						 .generation = fixture_generation(fixture, model->handle),
						 .recall.ratio = 0.9});
	evict = fixture_start(fixture, &(struct kvg_sqe){.op = KVG_OP_EVICT, .seq = other->handle});
	(void)model_predict(other, KVG_EVICT_PREFILL);
	fixture_wait(fixture, evict);
	assert_int_equal(evict->request.cqe.status, 0);
	assert_false(waiting->done);
	while (!waiting->done) {
		fixture_acknowledge(fixture);
		fixture_turn(fixture);
	}
	assert_int_equal(waiting->request.cqe.status, 0);
	fixture->cqe = waiting->request.cqe;
	recall_check(model, came);
	model_check(other);
	assert_int_equal(fixture->space->table.slots[(uint32_t)idle->handle].flags, KVG_SLOT_OFFLOADED | KVG_SLOT_IDLE);
	fixture_acknowledge(fixture);
	model_release(model);
	model_release(other);
	model_release(idle);
	fixture->tenant->reclaim = NULL;
	reclaim_deinit(&reclaim);
	fixture_free(fixture);
}

/* What was admitted is there after a recall, too: the tokens that are still to come have their room. */
static void test_promise_holds(void **state)
{
	struct fixture *fixture =
		fixture_new(&(struct fixture_options){.host_size = RECALL_HOST, .extent_size = 16 << 10});
	struct model *model = recall_read_prompt(fixture, &recall_policy, 0.1, SCORES_RANDOM, false);
	struct model *whole = recall_read_prompt(fixture, &recall_policy, 0.8, SCORES_RANDOM, false);
	struct quota_account *account = fixture->tenant->quota.account;
	uint64_t came = recall_take_over(model, whole);

	(void)state;
	model_release(whole);
	assert_int_equal(recall_ratio(model, 0.8), 0);
	recall_check(model, came);
	account->max = account->charged + account->promised;
	assert_int_equal(model_append(model, 400), 0);
	model_check(model);
	model_release(model);
	fixture_free(fixture);
}

/* It dies in the midst of an eviction or a recall, wherever that is. */
static void test_death_on_the_way(void **state)
{
	(void)state;
	for (unsigned turns = 0; turns < 12; turns++) {
		struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
		struct model *model = recall_read_prompt(fixture, &recall_policy, 0.1, SCORES_RANDOM, false);
		struct model *other = model_new(fixture, &recall_policy, SCORES_RANDOM);
		struct kvg_sqe sqe = {.op = KVG_OP_RECALL, .seq = model->handle, .generation = 3, .recall.ratio = 0.9};

		assert_int_equal(model_append(other, 200), 0);
		(void)fixture_start(fixture, &sqe);
		sqe = (struct kvg_sqe){.op = KVG_OP_EVICT, .seq = other->handle};
		(void)fixture_start(fixture, &sqe);
		for (unsigned i = 0; i < turns; i++)
			fixture_turn(fixture);
		model_free(model);
		model_free(other);
		fixture_kill(fixture);
		assert_int_equal(fixture->tenant->host.account->charged, 0);
		fixture_free(fixture);
	}
}

static void test_refusals(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
	struct kvg_policy plain = recall_policy;
	struct model *model = recall_read_prompt(fixture, &recall_policy, 0.1, SCORES_RANDOM, false), *other;

	(void)state;
	plain.flags = KVG_POLICY_WINDOW_ABSOLUTE;
	other = recall_read_prompt(fixture, &plain, 0.1, SCORES_RANDOM, false);
	assert_null(recall_store(other));
	assert_int_equal(recall_ratio(other, 0.3), -EINVAL);
	assert_non_null(strstr(fixture->text, "without RETAIN_HOST"));
	assert_int_equal(recall_ratio(model, 0), -EINVAL);
	assert_int_equal(recall_ratio(model, 1.5), -EINVAL);
	assert_non_null(strstr(fixture->text, "ratio 1.5, must be above 0 and at most 1"));
	assert_int_equal(recall_ratio(model, (double)NAN), -EINVAL);
	assert_int_equal(recall_budget(model, 0), -EINVAL);
	assert_int_equal(recall_submit(model, &(struct kvg_sqe){.recall = {.ratio = 0.5, .flags = 2}}), -EINVAL);
	assert_int_equal(fixture_call(fixture, &(struct kvg_sqe){.op = KVG_OP_OFFLOAD, .seq = model->handle}), 0);
	assert_int_equal(recall_ratio(model, 0.3), -EBUSY);
	assert_non_null(strstr(fixture->text, "offloaded"));
	assert_int_equal(fixture_call(fixture, &(struct kvg_sqe){.op = KVG_OP_RESTORE, .seq = model->handle}), 0);
	assert_int_equal(
		fixture_call(fixture,
			&(struct kvg_sqe){
				.op = KVG_OP_RECALL, .seq = model->handle, .generation = 2, .recall.ratio = 0.5}),
		-ESTALE);
	assert_int_equal(fixture_reserve(fixture, model->handle, 10), 0);
	assert_int_equal(fixture_commit(fixture, model->handle, 515), 0);
	assert_int_equal(recall_ratio(model, 0.3), -ENODATA);
	assert_non_null(strstr(fixture->text, "recall: layer 0 is scored to 505, committed are 515"));
	assert_int_equal(fixture_truncate(fixture, model->handle, 505), 0);
	model_check(model);
	model_release(model);
	model_release(other);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_within_a_prompt),
		cmocka_unit_test(test_churn),
		cmocka_unit_test(test_together),
		cmocka_unit_test(test_large_pairs),
		cmocka_unit_test(test_decoding_goes_on),
		cmocka_unit_test(test_little_device_memory),
		cmocka_unit_test(test_reserve_amid_a_recall),
		cmocka_unit_test(test_creation_fails),
		cmocka_unit_test(test_waits_for_memory),
		cmocka_unit_test(test_promise_holds),
		cmocka_unit_test(test_death_on_the_way),
		cmocka_unit_test(test_refusals),
	};

	return runner_run("recall", tests, sizeof(tests) / sizeof(tests[0]));
}
