/* Published contexts that nobody uses, on the host: on the way there, there, and on the way back. */
#include "daemon/sequence/context.h"

#include <errno.h>
#include <string.h>

#include "daemon/tier/host.h"
#include "daemon/metrics/audit.h"
#include "tests/support/space_model.h"
#include "tests/support/test_kind.h"

#define EXTENT (16u << 10) /* 32 blocks */

static const struct kvg_policy evicted = {
	.mode = KVG_MODE_CHUNKED, .ratio = 0.4, .context_tokens = 700, .max_new_tokens = 300};
static const struct kvg_policy question = {.context_tokens = 40, .max_new_tokens = 100};

static struct fixture *open_fixture(uint64_t host_size)
{
	return fixture_new(&(struct fixture_options){.extent_size = EXTENT, .host_size = host_size});
}

/* A published prompt whose rows differ in length; its sequence is freed. What it holds is the result. */
static struct model *publish(struct fixture *fixture, uint32_t key, uint64_t *ret_context)
{
	struct model *model = model_new(fixture, &evicted, SCORES_RANDOM);

	model_prefill(model);
	if (fixture_publish(fixture, model->handle, key) < 0)
		fail_msg("%s", fixture->text);
	*ret_context = fixture->cqe.value[0];
	model_seal(model);
	assert_int_equal(fixture_release(fixture, model->handle), 0);
	return model;
}

static struct model *attached(struct fixture *fixture, uint64_t handle, const struct model *from)
{
	struct kvg_policy policy = question;

	policy.prefix_tokens += from->committed;
	return model_attached(fixture, from, &policy, handle);
}

static struct model *attach(struct fixture *fixture, uint64_t context, const struct model *from)
{
	uint64_t handle = 0;

	if (fixture_attach(fixture, context, &question, &handle) < 0)
		fail_msg("%s", fixture->text);
	return attached(fixture, handle, from);
}

static struct call *start_attach(struct fixture *fixture, uint64_t context)
{
	const struct kvg_sqe sqe = {.op = KVG_OP_ATTACH, .seq = context, .attach = question};

	return fixture_start(fixture, &sqe);
}

/* Everything on offer begins to go. Returns how many contexts. */
static uint32_t begin(struct fixture *fixture)
{
	uint32_t counts[RECLAIM_KINDS] = {0};

	(void)reclaim_begin(fixture->tenant, UINT64_MAX, counts);
	return counts[RECLAIM_CONTEXT];
}

static void settle(struct fixture *fixture)
{
	while (fixture->tenant->reclaiming || fixture_account(fixture)->unreturned ||
		executor_pending(fixture->executor)) {
		fixture_acknowledge(fixture);
		fixture_turn(fixture);
	}
	fixture_audit(fixture);
}

static uint32_t residency(const struct fixture *fixture, uint64_t context)
{
	return context_find_id(fixture->tenant, context)->part.context->residency;
}

static uint64_t on_host(const struct fixture *fixture)
{
	return fixture->tenant->host.account->charged;
}

/* Published, and nothing of it is on the device any more. */
static struct model *publish_to_host(struct fixture *fixture, uint32_t key, uint64_t *ret_context)
{
	struct model *model = publish(fixture, key, ret_context);

	assert_int_equal(begin(fixture), 1);
	assert_int_equal(residency(fixture, *ret_context), META_OFFLOADING);
	fixture_audit(fixture);
	settle(fixture);
	assert_int_equal(residency(fixture, *ret_context), META_OFFLOADED);
	assert_int_equal(context_bytes(context_find_id(fixture->tenant, *ret_context)), 0);
	assert_true(context_find_id(fixture->tenant, *ret_context)->part.context->image_bytes > 0);
	assert_int_equal(fixture->tenant->offer_count, 0);
	return model;
}

static void give_spare(struct fixture *fixture)
{
	fixture->tenant->pressed = true;
	space_return_spare(fixture->space);
	fixture->tenant->pressed = false;
	fixture_acknowledge(fixture);
}

static void test_there_and_back(void **state)
{
	struct fixture *first = open_fixture(4 << 20);
	struct fixture *second = fixture_join(first, NULL, &(struct fixture_options){.extent_size = EXTENT});
	uint64_t context, values[3];
	struct model *model = publish(first, 7, &context), *a, *b;

	(void)state;
	assert_int_equal(fixture_find(second, 7), context);
	memcpy(values, second->cqe.value, sizeof(values));
	for (unsigned round = 0; round < 3; round++) {
		assert_int_equal(begin(first), 1);
		settle(first);
		give_spare(first);
		give_spare(second);
		assert_int_equal(residency(first, context), META_OFFLOADED);
		assert_int_equal(fixture_account(first)->charged, 0);
		assert_int_equal(context_find_id(first->tenant, context)->mapped, 0);
		assert_int_equal(on_host(first), context_find_id(first->tenant, context)->part.context->image_bytes);
		assert_int_equal(fixture_find(second, 7), context);
		assert_memory_equal(second->cqe.value, values, sizeof(values));
		a = attach(second, context, model);
		assert_int_equal(residency(first, context), META_RESIDENT);
		assert_int_equal(on_host(first), 0);
		b = attach(first, context, model);
		model_check(a);
		model_check(b);
		assert_int_equal(model_append(a, 60), 0);
		model_check(a);
		model_check(b);
		assert_int_equal(begin(first), 0); /* it is in use */
		model_release(a);
		model_release(b);
		fixture_acknowledge(second);
		/* The second worker unmaps when it is asked to. */
		assert_int_equal(begin(first), 1);
		while (first->tenant->reclaiming || fixture_account(first)->unreturned) {
			fixture_acknowledge(first);
			fixture_acknowledge(second);
			fixture_turn(first);
		}
		a = attach(second, context, model);
		model_check(a);
		model_release(a);
		while (!list_empty(&second->space->unmapping))
			fixture_acknowledge(second);
		context_forget_all(second->tenant);
		fixture_acknowledge(second);
		settle(first);
		assert_int_equal(fixture_find(second, 7), 0);
		model_free(model);
		model = publish(first, 7, &context);
		assert_int_equal(fixture_find(second, 7), context);
		memcpy(values, second->cqe.value, sizeof(values));
	}
	model_free(model);
	fixture_free(second);
	fixture_free(first);
}

/* Who publishes what is on the host joins it there. */
static void test_the_same_key_again(void **state)
{
	struct fixture *fixture = open_fixture(4 << 20);
	uint64_t context;
	struct model *model = publish_to_host(fixture, 7, &context), *again, *other;

	(void)state;
	other = model_new(fixture, &evicted, SCORES_ASCENDING);
	model_prefill(other);
	assert_int_equal(fixture_publish(fixture, other->handle, 7), -EEXIST);
	assert_int_equal(residency(fixture, context), META_OFFLOADED);
	again = model_new(fixture, &evicted, SCORES_RANDOM);
	model_prefill(again);
	assert_int_equal(fixture_publish(fixture, again->handle, 7), 0);
	assert_int_equal(fixture->cqe.value[0], context);
	assert_int_equal(fixture->cqe.value[3], 1);
	model_seal(again);
	assert_int_equal(residency(fixture, context), META_RESIDENT);
	model_check(again);
	model_check(other);
	model_release(again);
	model_release(other);
	model_free(model);
	fixture_free(fixture);
}

/* A worker that takes its time to unmap does not keep others from attaching. */
static void test_mapped_still(void **state)
{
	struct fixture *first = open_fixture(4 << 20);
	struct fixture *second = fixture_join(first, NULL, &(struct fixture_options){.extent_size = EXTENT});
	uint64_t context, bytes, unreturned;
	struct model *model = publish(first, 7, &context), *reader;

	(void)state;
	bytes = context_bytes(context_find_id(first->tenant, context));
	assert_int_equal(begin(first), 1);
	while (residency(first, context) != META_OFFLOADED)
		fixture_turn(first);
	fixture_audit(first);
	unreturned = fixture_account(first)->unreturned; /* the extent that was kept for the next tails with them */
	assert_in_range(unreturned, bytes, bytes + EXTENT);
	assert_int_equal(space_unmapping(first->space, NULL), unreturned);
	assert_int_equal(first->tenant->reclaiming_bytes, 0); /* it comes once */
	reader = attach(second, context, model);
	model_check(reader);
	assert_int_equal(fixture_account(first)->unreturned, unreturned);
	fixture_acknowledge(first);
	assert_int_equal(fixture_account(first)->unreturned, 0);
	assert_int_equal(first->tenant->reclaiming, 0);
	model_check(reader);
	model_release(reader);
	model_free(model);
	fixture_free(second);
	fixture_free(first);
}

/* Wanted before it has left: it stays. */
static void test_wanted_on_the_way(void **state)
{
	struct fixture *fixture = open_fixture(4 << 20);
	uint64_t context;
	struct model *model = publish(fixture, 7, &context), *a, *b;
	const struct call *first, *second;

	(void)state;
	assert_int_equal(begin(fixture), 1);
	first = start_attach(fixture, context);
	second = start_attach(fixture, context);
	assert_false(first->done);
	fixture_wait(fixture, first);
	fixture_wait(fixture, second);
	assert_int_equal(first->request.cqe.status, 0);
	assert_int_equal(second->request.cqe.status, 0);
	assert_int_equal(residency(fixture, context), META_RESIDENT);
	assert_int_equal(on_host(fixture), 0);
	assert_int_equal(fixture->tenant->reclaiming, 0);
	a = attached(fixture, first->request.cqe.seq, model);
	b = attached(fixture, second->request.cqe.seq, model);
	model_check(a);
	model_check(b);
	model_release(a);
	model_release(b);
	model_free(model);
	fixture_free(fixture);
}

/* Several that attach at the same time: one restore. */
static void test_attachers_wait_together(void **state)
{
	struct fixture *fixture = open_fixture(4 << 20);
	uint64_t context;
	struct model *model = publish_to_host(fixture, 7, &context), *a, *b;
	const struct call *first = start_attach(fixture, context), *second = start_attach(fixture, context);

	(void)state;
	assert_int_equal(residency(fixture, context), META_RESTORING);
	fixture_audit(fixture);
	fixture_wait(fixture, first);
	fixture_wait(fixture, second);
	assert_int_equal(first->request.cqe.status, 0);
	assert_int_equal(second->request.cqe.status, 0);
	a = attached(fixture, first->request.cqe.seq, model);
	b = attached(fixture, second->request.cqe.seq, model);
	model_check(a);
	model_check(b);
	model_release(a);
	model_release(b);
	model_free(model);
	fixture_free(fixture);
}

/* No room on the host, or a parent: forgotten. */
static void test_forgotten(void **state)
{
	struct fixture *fixture = open_fixture(4 << 20);
	struct model *parent, *model;
	uint64_t context;

	(void)state;
	fixture->tenant->host.account->max = HOST_FRAME - 1;
	model_free(publish(fixture, 7, &context));
	assert_int_equal(begin(fixture), 1);
	settle(fixture);
	assert_int_equal(fixture_find(fixture, 7), 0);
	assert_int_equal(on_host(fixture), 0);
	fixture_free(fixture);

	fixture = open_fixture(4 << 20);
	parent = publish(fixture, 7, &context);
	model = attach(fixture, context, parent);
	assert_int_equal(model_append(model, 60), 0);
	assert_int_equal(fixture_publish(fixture, model->handle, 8), 0);
	assert_int_equal(fixture_release(fixture, model->handle), 0);
	/* The child is forgotten; its parent goes then. */
	while (begin(fixture))
		settle(fixture);
	assert_int_equal(fixture_find(fixture, 8), 0);
	assert_int_equal(fixture_find(fixture, 7), context);
	assert_int_equal(residency(fixture, context), META_OFFLOADED);
	model_free(model);
	model_free(parent);
	fixture_free(fixture);
}

/* What is there and nobody uses goes for what comes, oldest first; one in use does not. */
static void test_room_on_the_host(void **state)
{
	struct fixture *fixture = open_fixture(4 << 20);
	uint64_t a, b, c, each;
	struct model *models[3], *idle;
	struct kvg_sqe sqe = {.op = KVG_OP_OFFLOAD};

	(void)state;
	models[0] = publish_to_host(fixture, 1, &a);
	each = on_host(fixture);
	models[1] = publish_to_host(fixture, 2, &b);
	fixture->tenant->host.account->max = 2 * each;
	models[2] = publish_to_host(fixture, 3, &c);
	assert_int_equal(fixture_find(fixture, 1), 0);
	assert_int_equal(fixture_find(fixture, 2), b);
	assert_int_equal(fixture_find(fixture, 3), c);
	idle = model_new(fixture, &evicted, SCORES_RANDOM);
	model_prefill(idle);
	sqe.seq = idle->handle;
	fixture->tenant->host.account->max = on_host(fixture);
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	assert_int_equal(fixture_find(fixture, 2), 0);
	fixture_audit(fixture);
	/* Not even all of it would be enough: it stays. */
	sqe.op = KVG_OP_RESTORE;
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	each = fixture_find(fixture, 3) ? on_host(fixture) : 0;
	fixture->tenant->host.account->max = HOST_FRAME - 1;
	sqe.op = KVG_OP_OFFLOAD;
	assert_int_equal(fixture_call(fixture, &sqe), -ENOSPC);
	assert_int_equal(on_host(fixture), each);
	model_check(idle);
	model_release(idle);
	for (unsigned i = 0; i < 3; i++)
		model_free(models[i]);
	fixture_free(fixture);
}

/* No room on the device: it stays where it is, and is found. */
static void test_no_room_on_the_device(void **state)
{
	struct fixture *fixture = open_fixture(4 << 20);
	uint64_t context, handle = 0, image;
	struct model *model = publish_to_host(fixture, 7, &context), *reader;
	struct quota_account *account = fixture->tenant->quota.account;
	uint64_t max = account->max;

	(void)state;
	image = on_host(fixture);
	account->max = account->charged + EXTENT;
	assert_int_equal(fixture_attach(fixture, context, &question, &handle), -ENOSPC);
	assert_non_null(strstr(fixture->text, "the context"));
	assert_int_equal(residency(fixture, context), META_OFFLOADED);
	assert_int_equal(on_host(fixture), image);
	assert_int_equal(fixture_find(fixture, 7), context);
	assert_false(list_empty(&context_find_id(fixture->tenant, context)->host_node));
	account->max = max;
	reader = attach(fixture, context, model);
	model_check(reader);
	model_release(reader);
	model_free(model);
	fixture_free(fixture);
}

/* A prompt of which an eviction has kept nothing, published: there is nothing to send, and it is forgotten. */
static void test_of_no_pairs(void **state)
{
	static const struct kvg_policy nothing = {.mode = KVG_MODE_CHUNKED,
		.ratio = 0.001,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.context_tokens = 128,
		.max_new_tokens = 16};
	struct fixture *fixture = open_fixture(4 << 20);
	struct model *model = model_new(fixture, &nothing, SCORES_DESCENDING);

	(void)state;
	model_prefill(model);
	assert_int_equal(model_pairs(model), 0);
	assert_int_equal(fixture_publish(fixture, model->handle, 7), 0);
	model_seal(model);
	model_release(model);
	assert_int_equal(begin(fixture), 1);
	settle(fixture);
	assert_int_equal(fixture->tenant->reclaiming_bytes, 0);
	assert_int_equal(fixture_find(fixture, 7), 0);
	assert_int_equal(on_host(fixture), 0);
	fixture_free(fixture);
}

static _Atomic(bool) no_memory;

static int create(struct kind *kind, size_t size)
{
	return no_memory ? -ENOMEM : test_kind_host(kind)->create(kind, size);
}

/* Memory that is in the budget and cannot be had after all: those that wait fail, and it stays where it is. */
static void test_creation_fails(void **state)
{
	struct test_kind kind;
	struct fixture *fixture;
	struct model *model, *reader;
	const struct call *first, *second;
	uint64_t context, charged;

	(void)state;
	test_kind_init(&kind);
	kind.ops.create = create;
	fixture =
		fixture_new(&(struct fixture_options){.kind = &kind.kind, .extent_size = EXTENT, .host_size = 4 << 20});
	model = publish_to_host(fixture, 7, &context);
	charged = fixture_account(fixture)->charged;
	no_memory = true;
	first = start_attach(fixture, context);
	second = start_attach(fixture, context);
	fixture_wait(fixture, first);
	fixture_wait(fixture, second);
	assert_int_equal(first->request.cqe.status, -ENOMEM);
	assert_int_equal(second->request.cqe.status, -ENOMEM);
	assert_non_null(strstr(second->request.text, "memory of a context"));
	no_memory = false;
	assert_int_equal(residency(fixture, context), META_OFFLOADED);
	assert_int_equal(fixture_account(fixture)->charged, charged);
	reader = attach(fixture, context, model);
	model_check(reader);
	model_release(reader);
	model_free(model);
	fixture_free(fixture);
	test_kind_deinit(&kind);
}

/* Pairs that an eviction drops come before contexts that nobody uses. */
static void test_room_for_pairs(void **state)
{
	struct fixture *fixture = open_fixture(4 << 20);
	struct kvg_policy policy = evicted;
	struct model *gone, *model;
	uint64_t context;

	(void)state;
	gone = publish_to_host(fixture, 7, &context);
	fixture->tenant->host.account->max = on_host(fixture);
	policy.flags |= KVG_POLICY_RETAIN_HOST;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	model_prefill(model);
	assert_int_equal(fixture_find(fixture, 7), 0);
	assert_true(space_sequence(fixture->space, model->handle)->meta->retained_bytes > 0);
	model_check(model);
	model_release(model);
	model_free(gone);
	fixture_free(fixture);
}

/* An image that the account of frames does not bear out. */
static void test_audit(void **state)
{
	struct fixture *fixture = open_fixture(4 << 20);
	struct meta_context *meta;
	struct audit audit;
	uint64_t context;

	(void)state;
	model_free(publish_to_host(fixture, 7, &context));
	meta = context_find_id(fixture->tenant, context)->part.context;
	meta->image_bytes += 1;
	assert_int_equal(audit_run(fixture->pool->meta->fd, fixture_physical, fixture->pool, &audit), 0);
	assert_int_equal(audit.difference_count, 1);
	assert_non_null(strstr(audit.differences[0], "context 1: bytes of its image"));
	audit_deinit(&audit);
	meta->image_bytes -= 1;
	meta->residency = META_RESIDENT;
	assert_int_equal(audit_run(fixture->pool->meta->fd, fixture_physical, fixture->pool, &audit), 0);
	assert_true(audit.difference_count > 0);
	audit_deinit(&audit);
	meta->residency = META_OFFLOADED;
	fixture_free(fixture);
}

/* Its worker is gone half-way: the context comes back all the same. */
static void test_death_of_who_attaches(void **state)
{
	struct fixture *first = open_fixture(4 << 20);
	struct fixture *second = fixture_join(first, NULL, &(struct fixture_options){.extent_size = EXTENT});
	uint64_t context;
	struct model *model = publish_to_host(first, 7, &context), *reader;

	(void)state;
	(void)start_attach(second, context);
	assert_int_equal(residency(first, context), META_RESTORING);
	fixture_kill(second);
	settle(first);
	assert_int_equal(residency(first, context), META_RESIDENT);
	assert_int_equal(first->tenant->offer_count, 1);
	reader = attach(first, context, model);
	model_check(reader);
	model_release(reader);
	model_free(model);
	fixture_free(second);
	fixture_free(first);
}

/* The daemon stops in each of the states: fixture_free() looks for what is left. */
static void test_the_end(void **state)
{
	struct fixture *fixture;
	uint64_t context;

	(void)state;
	for (unsigned i = 0; i < 4; i++) {
		fixture = open_fixture(4 << 20);
		if (i < 2) {
			model_free(publish(fixture, 7, &context));
			assert_int_equal(begin(fixture), 1);
		} else {
			model_free(publish_to_host(fixture, 7, &context));
		}
		if (i == 3)
			(void)start_attach(fixture, context);
		if (i & 1)
			fixture_kill(fixture);
		context_forget_all(fixture->tenant);
		fixture_audit(fixture);
		fixture_free(fixture);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_there_and_back),
		cmocka_unit_test(test_the_same_key_again),
		cmocka_unit_test(test_mapped_still),
		cmocka_unit_test(test_wanted_on_the_way),
		cmocka_unit_test(test_attachers_wait_together),
		cmocka_unit_test(test_forgotten),
		cmocka_unit_test(test_room_on_the_host),
		cmocka_unit_test(test_no_room_on_the_device),
		cmocka_unit_test(test_creation_fails),
		cmocka_unit_test(test_room_for_pairs),
		cmocka_unit_test(test_audit),
		cmocka_unit_test(test_death_of_who_attaches),
		cmocka_unit_test(test_the_end),
		cmocka_unit_test(test_of_no_pairs),
	};

	return runner_run("context_host", tests, sizeof(tests) / sizeof(tests[0]));
}
