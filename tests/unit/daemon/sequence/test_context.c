/* Contexts among the other states of sequences and of memory: what is on offer, what goes to the host, tables of keys.
 */
#include "daemon/sequence/context.h"

#include <errno.h>
#include <string.h>

#include "tests/support/space_model.h"

#define EXTENT (16u << 10) /* a stripe of the fixture's geometry: 32 blocks */

static const struct kvg_policy plain = {.ratio = 1.0, .context_tokens = 512};
static const struct kvg_policy question = {.context_tokens = 40, .max_new_tokens = 60};

static struct model *published(struct fixture *fixture, uint32_t tokens, uint32_t key)
{
	struct model *model = model_new(fixture, &plain, SCORES_RANDOM);

	assert_int_equal(model_append(model, tokens), 0);
	if (fixture_publish(fixture, model->handle, key) < 0)
		fail_msg("%s", fixture->text);
	model_seal(model);
	return model;
}

static struct model *attached(struct fixture *fixture, uint64_t context, const struct model *from)
{
	struct kvg_policy policy = question;
	uint64_t handle = 0;

	if (fixture_attach(fixture, context, &question, &handle) < 0)
		fail_msg("%s", fixture->text);
	policy.prefix_tokens = from->committed;
	return model_attached(fixture, from, &policy, handle);
}

static int call(struct model *model, uint8_t op)
{
	struct kvg_sqe sqe = {
		.op = op, .seq = model->handle, .generation = fixture_generation(model->fixture, model->handle)};

	return fixture_call(model->fixture, &sqe);
}

/* ---- memory that somebody needs ---- */

static void on_pressure(void *user, struct tenant *tenant, bool on)
{
	struct fixture *fixture = user;

	(void)tenant;
	if (on)
		space_return_spare(fixture->space);
}

static const struct reclaim_ops pressure_ops = {.pressure = on_pressure};
static const size_t one = 1;

static void reclaim_open(struct fixture *fixture, struct reclaim *reclaim)
{
	assert_int_equal(reclaim_init(reclaim, fixture->loop, fixture->pool, &fixture->tenant, &one, 1000000000,
				 &pressure_ops, fixture),
		0);
	fixture->tenant->reclaim = reclaim;
}

static void reclaim_close(struct fixture *fixture, struct reclaim *reclaim)
{
	fixture->tenant->reclaim = NULL;
	reclaim_deinit(reclaim);
}

/* Waits while the worker unmaps what it is asked to. */
static void finish(struct fixture *fixture, const struct call *call)
{
	while (!call->done) {
		fixture_acknowledge(fixture);
		fixture_turn(fixture);
	}
	if (call->request.cqe.status)
		fail_msg("%s", call->request.text);
}

/* Of two that nobody uses the older goes; one in use never does. */
static void test_what_nobody_uses_makes_room(void **state)
{
	struct fixture *fixture =
		fixture_new(&(struct fixture_options){.extent_size = EXTENT, .device_max = 20 * EXTENT});
	struct reclaim reclaim;
	struct model *models[3];
	struct kvg_sqe sqe = {.op = KVG_OP_CREATE, .create = {.context_tokens = 5 * 128}};
	const struct call *create;

	(void)state;
	reclaim_open(fixture, &reclaim);
	for (unsigned i = 0; i < 3; i++)
		models[i] = published(fixture, 512, i);
	assert_int_equal(fixture->tenant->offer_count, 0);
	model_release(models[1]);
	model_release(models[0]);
	assert_int_equal(fixture->tenant->offer_count, 2);
	assert_int_equal(fixture->tenant->offered, 8 * EXTENT);
	fixture->tenant->quota.account->max = fixture_account(fixture)->charged + 2 * EXTENT;
	create = fixture_start(fixture, &sqe);
	assert_false(create->done);
	finish(fixture, create);
	assert_true(fixture_find(fixture, 0) != 0);
	assert_int_equal(fixture_find(fixture, 1), 0);
	assert_true(fixture_find(fixture, 2) != 0);
	assert_int_equal(fixture->tenant->offer_count, 1);
	assert_int_equal(fixture->tenant->reclaiming, 0);
	model_check(models[2]);
	assert_int_equal(fixture_release(fixture, create->request.cqe.seq), 0);
	model_release(models[2]);
	reclaim_close(fixture, &reclaim);
	fixture_free(fixture);
}

/* A context is not given away to make room for its own attacher; it is no longer on offer when it is used again. */
static void test_an_attacher_waits(void **state)
{
	struct fixture *fixture =
		fixture_new(&(struct fixture_options){.extent_size = EXTENT, .device_max = 40 * EXTENT});
	struct reclaim reclaim;
	struct model *a, *b, *c;
	struct kvg_sqe sqe = {.op = KVG_OP_ATTACH, .attach = {.context_tokens = 256}};
	struct kvg_policy policy = sqe.attach;
	const struct call *attach;

	(void)state;
	reclaim_open(fixture, &reclaim);
	a = published(fixture, 500, 1);
	sqe.seq = fixture->cqe.value[0];
	b = published(fixture, 512, 2);
	model_release(b);
	assert_int_equal(fixture_release(fixture, a->handle), 0);
	assert_int_equal(fixture->tenant->offer_count, 2);
	fixture_acknowledge(fixture);
	fixture->tenant->quota.account->max = fixture_account(fixture)->charged;
	attach = fixture_start(fixture, &sqe);
	assert_false(attach->done);
	finish(fixture, attach);
	assert_int_equal(fixture->tenant->offer_count, 0);
	assert_int_equal(fixture_find(fixture, 2), 0);
	policy.prefix_tokens = 500;
	c = model_attached(fixture, a, &policy, attach->request.cqe.seq);
	model_check(c);
	assert_int_equal(model_append(c, 256), 0);
	model_check(c);
	model_release(c);
	assert_int_equal(fixture->tenant->offer_count, 1);
	model_free(a);
	reclaim_close(fixture, &reclaim);
	fixture_free(fixture);
}

/* ---- an attached sequence goes to the host and comes back: its own blocks do ---- */

static void test_offload_of_an_attached_one(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = EXTENT, .host_size = 4 << 20});
	struct model *publisher = published(fixture, 500, 1), *model;
	uint64_t context = fixture->cqe.value[0], own;

	(void)state;
	model = attached(fixture, context, publisher);
	assert_int_equal(model_append(model, 70), 0);
	own = fixture->space->sequences[(uint32_t)model->handle]->meta->blocks;
	model_release(publisher);
	assert_int_equal(call(model, KVG_OP_OFFLOAD), 0);
	assert_int_equal(fixture->cqe.value[1], own * 2 * fixture->space->arena->stride);
	assert_int_equal(fixture->tenant->offer_count, 0); /* the context is referred to still */
	assert_int_equal(call(model, KVG_OP_PUBLISH), -EBUSY);
	assert_int_equal(call(model, KVG_OP_FORK), -EBUSY);
	assert_int_equal(call(model, KVG_OP_RESTORE), 0);
	model_check(model);
	assert_int_equal(model_append(model, 30), 0);
	model_check(model);
	assert_int_equal(call(model, KVG_OP_OFFLOAD), 0);
	model_release(model);
	assert_int_equal(fixture_find(fixture, 1), context);
	assert_int_equal(fixture->cqe.value[3], 0);
	fixture_free(fixture);
}

/* ---- many ---- */

static void test_many_keys(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = EXTENT});
	uint64_t ids[100], charged;

	(void)state;
	fixture->no_audit = true;
	for (uint32_t i = 0; i < 100; i++) {
		struct model *model = published(fixture, 16 + i, 1000 + i);

		ids[i] = fixture->cqe.value[0];
		model_release(model);
	}
	fixture_audit(fixture);
	assert_int_equal(fixture->tenant->contexts, 100);
	assert_int_equal(fixture->tenant->offer_count, 100);
	for (uint32_t i = 0; i < 100; i++) {
		assert_int_equal(fixture_find(fixture, 1000 + i), ids[i]);
		assert_int_equal(fixture->cqe.value[2], 16 + i);
	}
	assert_int_equal(fixture_find(fixture, 1100), 0);
	charged = fixture_account(fixture)->charged;
	for (uint32_t i = 0; i < 100; i += 2)
		context_forget(context_find_id(fixture->tenant, ids[i]));
	fixture_acknowledge(fixture);
	while (executor_pending(fixture->executor))
		fixture_turn(fixture);
	fixture_audit(fixture);
	assert_true(fixture_account(fixture)->charged < charged);
	for (uint32_t i = 0; i < 100; i++)
		assert_int_equal(fixture_find(fixture, 1000 + i), i % 2 ? ids[i] : 0);
	fixture_free(fixture);
}

/* The policy of what is behind a context. */
static void test_freeze_policy(void **state)
{
	struct kvg_policy policy = {.prefix_tokens = 10, .context_tokens = 100, .max_new_tokens = 50};

	(void)state;
	context_freeze_policy(&policy, 5); /* less than the prefix */
	assert_int_equal(policy.prefix_tokens, 10);
	assert_int_equal(policy.context_tokens, 100);
	context_freeze_policy(&policy, 60);
	assert_int_equal(policy.prefix_tokens, 60);
	assert_int_equal(policy.context_tokens, 50);
	assert_int_equal(policy.max_new_tokens, 50);
	context_freeze_policy(&policy, 130);
	assert_int_equal(policy.prefix_tokens, 130);
	assert_int_equal(policy.context_tokens, 0);
	assert_int_equal(policy.max_new_tokens, 30);
	context_freeze_policy(&policy, 500);
	assert_int_equal(policy.prefix_tokens, 500);
	assert_int_equal(policy.max_new_tokens, 0);
}

/* Forks and publishes until there is no entry for one more; nothing of it costs much. */
static uint32_t take_entries(struct fixture *fixture, struct model *model)
{
	uint32_t count = 0;
	uint64_t child;

	for (;;) {
		int r = count % 2 ? fixture_publish(fixture, model->handle, count) : 0;

		if (r >= 0 && count % 2 == 0) {
			assert_int_equal(model_append(model, 16), 0);
			r = fixture_fork(fixture, model->handle, &child);
			if (r >= 0)
				assert_int_equal(fixture_release(fixture, child), 0);
		}
		if (r < 0) {
			assert_int_equal(r, -EUSERS);
			return count;
		}
		model_seal(model);
		count++;
	}
}

/* A tenant cannot take all entries of the table that tenants share, however small its contexts are. */
static void test_entries_for_others(void **state)
{
	struct fixture *first = fixture_new(&(struct fixture_options){.layers = 1, .heads = 1}), *other;
	uint32_t *free_count = &first->pool->meta->free_context_count;
	const uint32_t most = *free_count;
	struct model *model = model_new(first, &plain, SCORES_RANDOM), *second;
	struct tenant *tenant;

	(void)state;
	assert_int_equal(tenant_new(first->pool, "other", 8 << 20, &tenant), 0);
	other = fixture_join(first, tenant, &(struct fixture_options){.layers = 1, .heads = 1});
	second = model_new(other, &plain, SCORES_RANDOM);
	*free_count = 8;
	assert_true(take_entries(first, model) >= 4);
	assert_int_equal(*free_count, 4);
	assert_true(take_entries(other, second) >= 2);
	assert_int_equal(*free_count, 2);
	model_release(second);
	model_release(model);
	fixture_forget_contexts(first, first->tenant);
	fixture_kill(other);
	fixture_forget_contexts(first, tenant);
	while (*free_count < 8) { /* one ends after the other */
		fixture_acknowledge(first);
		fixture_turn(first);
	}
	assert_int_equal(first->tenant->context_entries, 0);
	assert_int_equal(tenant->context_entries, 0);
	*free_count = most;
	fixture_free(other);
	(void)tenant_free(tenant);
	fixture_free(first);
}

/* Where entries run short, contexts that nobody uses make way for new ones, the oldest first. */
static void test_unused_ones_make_way(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.extent_size = EXTENT, .host_size = 4 << 20});
	uint32_t *free_count = &fixture->pool->meta->free_context_count;
	const uint32_t most = *free_count;
	struct model *used = published(fixture, 64, 0), *model;

	(void)state;
	*free_count = 31;
	for (uint32_t i = 1; i <= 60; i++) {
		model = published(fixture, 64, i);
		model_release(model);
		if (i == 4) /* these are on the host */
			(void)reclaim_begin(fixture->tenant, UINT64_MAX, NULL);
		while (executor_pending(fixture->executor) || fixture->tenant->reclaiming) {
			fixture_acknowledge(fixture);
			fixture_turn(fixture);
		}
	}
	assert_in_range(fixture->tenant->context_entries, 8, 16);
	assert_int_equal(fixture_find(fixture, 1), 0);
	assert_int_equal(fixture_find(fixture, 40), 0);
	assert_true(fixture_find(fixture, 60) != 0);
	assert_true(fixture_find(fixture, 59) != 0);
	assert_true(fixture_find(fixture, 0) != 0);
	model_check(used);
	model_release(used);
	fixture_forget_contexts(fixture, fixture->tenant);
	while (fixture->tenant->context_entries) {
		fixture_acknowledge(fixture);
		fixture_turn(fixture);
	}
	*free_count = most;
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_what_nobody_uses_makes_room),
		cmocka_unit_test(test_an_attacher_waits),
		cmocka_unit_test(test_offload_of_an_attached_one),
		cmocka_unit_test(test_many_keys),
		cmocka_unit_test(test_freeze_policy),
		cmocka_unit_test(test_entries_for_others),
		cmocka_unit_test(test_unused_ones_make_way),
	};

	return runner_run("context", tests, sizeof(tests) / sizeof(tests[0]));
}
