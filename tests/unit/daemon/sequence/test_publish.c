/* PUBLISH, FIND and ATTACH between the workers of a tenant. */
#include "daemon/sequence/context.h"

#include <errno.h>
#include <string.h>

#include "daemon/sequence/offload.h"
#include "tests/support/space_model.h"
#include "tests/support/test_kind.h"

#define EXTENT (64u << 10) /* 128 blocks */

static const struct kvg_policy evicted = {
	.mode = KVG_MODE_CHUNKED, .ratio = 0.4, .context_tokens = 700, .max_new_tokens = 300};
static const struct kvg_policy question = {.context_tokens = 40, .max_new_tokens = 100};

/* A sequence with an evicted prompt. */
static struct model *prompt(struct fixture *fixture, enum score_pattern pattern)
{
	struct model *model = model_new(fixture, &evicted, pattern);

	model_prefill(model);
	return model;
}

static uint64_t publish(struct model *model, uint32_t key)
{
	if (fixture_publish(model->fixture, model->handle, key) < 0)
		fail_msg("%s", model->fixture->text);
	assert_int_equal(model->fixture->cqe.value[2], model->committed);
	model_seal(model);
	return model->fixture->cqe.value[0];
}

static struct model *attach(struct fixture *fixture, uint64_t context, const struct model *from)
{
	struct kvg_policy policy = question;
	uint64_t handle = 0;

	if (fixture_attach(fixture, context, &question, &handle) < 0)
		fail_msg("%s", fixture->text);
	assert_int_equal(fixture->cqe.value[0], (uint32_t)handle);
	assert_int_equal(fixture->cqe.value[2], from->committed);
	policy.prefix_tokens += from->committed;
	return model_attached(fixture, from, &policy, handle);
}

/* Blocks that rows with those pairs take. */
static uint64_t packed(const struct model *model, uint64_t *ret_tails)
{
	uint64_t blocks = 0;

	*ret_tails = 0;
	for (uint32_t row = 0; row < model->rows; row++) {
		uint32_t pairs = 0;

		for (uint32_t pos = 0; pos < model->committed; pos++)
			pairs += model->held[(size_t)row * model->max_tokens + pos];
		blocks += (pairs + 15) / 16;
		*ret_tails += pairs % 16 > 0;
	}
	return blocks;
}

static void test_attach_in_another_worker(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct model *publisher = prompt(first, SCORES_RANDOM), *reader, *other;
	const struct quota_account *account = fixture_account(first);
	uint64_t tails, blocks = packed(publisher, &tails), context;

	(void)state;
	assert_int_equal(fixture_find(second, 5), 0);
	context = publish(publisher, 5);
	assert_int_equal(first->cqe.value[1], blocks * 2 * first->space->arena->stride);
	assert_int_equal(first->cqe.value[3], 0);
	model_check(publisher);
	assert_int_equal(first->space->blocks.used_blocks, tails);
	/* The context's extents, and one with the publisher's tails. */
	assert_int_equal(account->charged, ((blocks + 127) / 128 + 1) * EXTENT);
	assert_int_equal(fixture_find(second, 5), context);
	assert_int_equal(second->cqe.value[1], blocks * 2 * first->space->arena->stride);
	assert_int_equal(second->cqe.value[2], 700);
	assert_int_equal(second->cqe.value[3], 1);
	reader = attach(second, context, publisher);
	assert_int_equal(second->cqe.value[3], tails * 2 * first->space->arena->stride);
	assert_int_equal(account->charged, ((blocks + 127) / 128 + 2) * EXTENT);
	model_check(reader);
	other = attach(second, context, publisher);
	assert_int_equal(account->charged, ((blocks + 127) / 128 + 2) * EXTENT);
	assert_int_equal(model_append(reader, 40), 0);
	assert_int_equal(model_append(publisher, 100), 0);
	assert_int_equal(fixture_find(first, 5), context);
	assert_int_equal(first->cqe.value[3], 3);
	model_check(reader);
	model_check(other);
	model_check(publisher);
	model_release(publisher);
	model_release(other);
	assert_int_equal(model_append(reader, 60), 0);
	model_check(reader);
	model_release(reader);
	/* Each of the two keeps an extent for the next tails until memory is asked for. */
	assert_int_equal(account->charged, ((blocks + 127) / 128 + 2) * EXTENT);
	first->tenant->pressed = true;
	space_return_spare(first->space);
	space_return_spare(second->space);
	first->tenant->pressed = false;
	assert_int_equal(space_unmapping(first->space, NULL), EXTENT);
	fixture_acknowledge(first);
	fixture_acknowledge(second);
	assert_int_equal(account->charged, (blocks + 127) / 128 * EXTENT);
	assert_int_equal(fixture_find(first, 5), context);
	assert_int_equal(first->cqe.value[3], 0);
	fixture_free(second);
	fixture_free(first);
}

/* Whether the row's tail is as selections expect what stays: of no position, with the highest score. */
static bool is_sealed(const struct fixture *fixture, uint64_t handle, uint32_t row)
{
	const struct space *space = fixture->space;
	const struct meta_place *places =
		blocks_places(space->arena, space->pool->meta, *meta_held(&space->part, (uint32_t)handle, row));

	return places[0].pos == 0 && places[0].score == 1 && places[3].pos == 0 && places[3].score == 1;
}

/* So many rows that their tails are copied in several slices. */
static void test_many_rows(void **state)
{
	const struct fixture_options wide = {
		.layers = 32, .heads = 16, .k_dim = 32, .v_dim = 32, .extent_size = 256 << 10, .pool_size = 128 << 20};
	struct kvg_policy policy = {.context_tokens = 20};
	struct fixture *first = fixture_new(&wide), *second = fixture_join(first, NULL, &wide);
	struct model *publisher = model_new(first, &policy, SCORES_RANDOM), *again, *reader;

	(void)state;
	first->no_audit = second->no_audit = true;
	assert_int_equal(model_append(publisher, 20), 0);
	assert_int_equal(fixture_publish(first, publisher->handle, 5), 0);
	reader = attach(second, fixture_find(second, 5), publisher);
	model_check(reader);
	again = model_new(second, &policy, SCORES_RANDOM);
	assert_int_equal(model_append(again, 20), 0);
	assert_int_equal(fixture_publish(second, again->handle, 5), 0);
	for (uint32_t row = 0; row < again->rows; row++)
		assert_true(is_sealed(second, again->handle, row));
	first->no_audit = second->no_audit = false;
	fixture_audit(second);
	model_release(reader);
	model_release(publisher);
	assert_int_equal(fixture_release(second, again->handle), 0);
	model_free(again);
	fixture_free(second);
	fixture_free(first);
}

/* Fresh tokens as well, at each length around a block. */
static void test_fresh_tokens(void **state)
{
	static const uint32_t lengths[] = {1, 15, 16, 17, 127, 128, 129, 300};
	struct kvg_policy policy = {.context_tokens = 400};
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);

	(void)state;
	for (uint32_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		struct model *publisher = model_new(first, &policy, SCORES_RANDOM), *reader;
		uint64_t context;

		assert_int_equal(model_append(publisher, lengths[i]), 0);
		assert_int_equal(fixture_reserve(first, publisher->handle, 400 - lengths[i]), 0);
		context = publish(publisher, i);
		reader = attach(second, context, publisher);
		model_check(reader);
		model_check(publisher);
		model_prefill(publisher);
		assert_int_equal(model_append(reader, 40), 0);
		model_check(reader);
		model_check(publisher);
		model_release(reader);
		model_release(publisher);
	}
	fixture_free(second);
	fixture_free(first);
}

static void test_own_evictions(void **state)
{
	struct kvg_policy decode = {.context_tokens = 10, .max_new_tokens = 1500, .budget = 150, .decode_window = 8};
	struct kvg_policy chunked = {.mode = KVG_MODE_CHUNKED,
		.level = KVG_LEVEL_PAIR_LAYER,
		.ratio = 0.5,
		.chunk_tokens = 400,
		.context_tokens = 900};
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct model *publisher = prompt(first, SCORES_RANDOM), *a, *b;
	uint64_t context = publish(publisher, 1), handle = 0;

	(void)state;
	assert_int_equal(fixture_attach(second, context, &decode, &handle), 0);
	decode.prefix_tokens = 700;
	a = model_attached(second, publisher, &decode, handle);
	assert_int_equal(fixture_attach(second, context, &chunked, &handle), 0);
	chunked.prefix_tokens = 700;
	b = model_attached(second, publisher, &chunked, handle);
	model_prefill(b);
	model_check(b);
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(model_append(a, 300), 0);
		model_evict(a, KVG_EVICT_DECODE);
	}
	model_check(b);
	model_check(publisher);
	assert_int_equal(fixture_truncate(second, a->handle, 699), -EINVAL);
	model_release(a);
	model_release(b);
	model_release(publisher);
	fixture_free(second);
	fixture_free(first);
}

static void stop(struct request *request)
{
	const struct fixture *fixture = request->space->user;

	loop_stop(fixture->loop);
}

/* A share that an operator asks for is one of the sequence's own tokens, not of the context's. */
static void test_a_share_of_its_own(void **state)
{
	static const struct kvg_policy longer = {.context_tokens = 300, .max_new_tokens = 100, .decode_window = 8};
	struct fixture *fixture = fixture_new(NULL);
	struct model *publisher = prompt(fixture, SCORES_RANDOM), *reader;
	struct kvg_policy policy = longer;
	uint64_t context = publish(publisher, 1), handle = 0;
	struct request request = {.completed = stop, .share = 0.25};

	(void)state;
	assert_int_equal(fixture_attach(fixture, context, &longer, &handle), 0);
	policy.prefix_tokens = publisher->committed;
	reader = model_attached(fixture, publisher, &policy, handle);
	assert_int_equal(model_append(reader, 300), 0);
	assert_int_equal(fixture_call(fixture, &(struct kvg_sqe){.op = KVG_OP_IDLE, .seq = handle}), 0);
	request.sqe = (struct kvg_sqe){.op = KVG_OP_EVICT, .seq = handle, .evict.mode = KVG_EVICT_DECODE};
	offload_submit(fixture->space, &request);
	assert_int_equal(loop_run(fixture->loop), 0);
	assert_int_equal(request.cqe.status, 0);
	assert_in_range(request.cqe.value[1], 4 * 225 - 4, 4 * 225 + 4 * 16);
	request_deinit(&request);
	assert_int_equal(fixture_release(fixture, handle), 0);
	model_free(reader);
	model_check(publisher);
	model_release(publisher);
	fixture_free(fixture);
}

static void test_the_same_key_again(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct model *a = prompt(first, SCORES_RANDOM), *b = prompt(second, SCORES_RANDOM);
	struct model *c = prompt(second, SCORES_ASCENDING), *d;
	const struct quota_account *account = fixture_account(first);
	uint64_t context = publish(a, 9), tails, blocks = packed(a, &tails);

	(void)state;
	assert_int_equal(publish(b, 9), context);
	assert_int_equal(second->cqe.value[3], 1);
	assert_int_equal(fixture_publish(second, c->handle, 9), -EEXIST);
	assert_non_null(strstr(second->text, "the key names context 1 of 700 tokens"));
	model_check(a);
	model_check(b);
	model_check(c);
	assert_int_equal(publish(a, 9), context); /* itself: nothing changes but the generation */
	model_check(a);
	model_release(c);
	assert_int_equal(account->charged, ((blocks + 127) / 128 + 2) * EXTENT);
	d = attach(first, context, a);
	assert_int_equal(publish(d, 9), context);
	model_check(d);
	assert_int_equal(first->tenant->contexts, 1);
	model_release(d);
	model_release(b);
	model_release(a);
	fixture_free(second);
	fixture_free(first);
}

static void finish(struct fixture *fixture, struct call *call)
{
	fixture_wait(fixture, call);
	if (call->request.cqe.status)
		fail_msg("%s", call->request.text);
	fixture_acknowledge(fixture);
}

static void test_two_at_a_time(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct model *a = prompt(first, SCORES_RANDOM), *b = prompt(second, SCORES_RANDOM);
	struct call *one = fixture_start_publish(first, a->handle, 3),
		    *two = fixture_start_publish(second, b->handle, 3);

	(void)state;
	assert_int_equal(fixture_find(first, 3), 0); /* not yet */
	finish(second, two);
	finish(first, one);
	assert_int_equal(one->request.cqe.value[3], 0);
	assert_int_equal(two->request.cqe.value[3], 1);
	assert_int_equal(one->request.cqe.value[0], two->request.cqe.value[0]);
	model_seal(a);
	model_seal(b);
	model_check(a);
	model_check(b);
	model_release(a);
	model_release(b);
	fixture_free(second);
	fixture_free(first);
}

/* What a publisher that dies leaves: nothing, and whoever waited makes it. */
static void test_publisher_dies_half_way(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct fixture *third = fixture_join(first, NULL, NULL);
	struct model *a = prompt(first, SCORES_RANDOM), *b = prompt(second, SCORES_RANDOM), *c = prompt(third, 0);
	struct call *two;

	(void)state;
	(void)fixture_start_publish(second, b->handle, 3);
	two = fixture_start_publish(first, a->handle, 3);
	(void)fixture_start_publish(third, c->handle, 3);
	space_kill(third->space); /* it only waits */
	space_kill(second->space);
	fixture_kill(third);
	fixture_kill(second);
	finish(first, two);
	assert_int_equal(two->request.cqe.value[3], 0);
	model_seal(a);
	model_check(a);
	assert_int_equal(first->tenant->contexts, 1);
	fixture_audit(first);
	model_release(a);
	fixture_forget_contexts(first, first->tenant);
	fixture_acknowledge(first);
	while (executor_pending(first->executor))
		fixture_turn(first);
	assert_int_equal(fixture_account(first)->charged, 0);
	model_free(b);
	model_free(c);
	fixture_free(third);
	fixture_free(second);
	fixture_free(first);
}

/* One that waits while its worker dies, with work under way still, is not begun anew. */
static void test_waiter_dies_slowly(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct model *a = prompt(first, SCORES_RANDOM), *b = prompt(second, SCORES_ASCENDING);
	struct kvg_sqe create = {.op = KVG_OP_CREATE, .create = {.context_tokens = 4000}}, sqe;
	struct call *one, *two, *grow;
	uint64_t handle;

	(void)state;
	assert_int_equal(fixture_create(second, &create.create, &handle), 0);
	one = fixture_start_publish(first, a->handle, 3);
	two = fixture_start_publish(second, b->handle, 3);
	sqe = (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = handle, .reserve.tokens = 4000};
	grow = fixture_start(second, &sqe);
	assert_false(one->done || two->done || grow->done);
	space_kill(second->space);
	assert_false(second->closed);
	fixture_wait(first, one); /* and the other's rows would not agree with it */
	fixture_kill(second);
	assert_false(two->done || grow->done);
	model_seal(a);
	model_check(a);
	model_release(a);
	model_free(b);
	fixture_free(second);
	fixture_free(first);
}

static void test_publisher_dies_afterwards(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct model *a = prompt(second, SCORES_RANDOM), *b;
	uint64_t context = publish(a, 4);

	(void)state;
	fixture_kill(second);
	fixture_audit(first);
	b = attach(first, context, a);
	model_check(b);
	assert_int_equal(model_append(b, 40), 0);
	model_check(b);
	model_free(a);
	model_release(b);
	fixture_free(second);
	fixture_free(first);
}

static void test_attacher_dies(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct model *a = prompt(first, SCORES_RANDOM), *b, *c;
	uint64_t context = publish(a, 4), forked = 0;
	struct kvg_sqe again = {.op = KVG_OP_ATTACH, .seq = context, .attach = question};

	(void)state;
	b = attach(second, context, a);
	assert_int_equal(model_append(b, 40), 0);
	assert_int_equal(fixture_fork(second, b->handle, &forked), 0);
	c = attach(second, context, a);
	assert_int_equal(fixture_find(first, 4), context);
	assert_int_equal(first->cqe.value[3], 4);
	(void)fixture_start(second, &again);
	fixture_kill(second);
	fixture_audit(first);
	assert_int_equal(fixture_find(first, 4), context);
	assert_int_equal(first->cqe.value[3], 1);
	model_check(a);
	model_free(b);
	model_free(c);
	model_release(a);
	fixture_free(second);
	fixture_free(first);
}

/* Contexts that go on from contexts; what a fork holds is copied. */
static void test_chains(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct model *a = prompt(first, SCORES_RANDOM), *b, *c, *d;
	uint64_t base = publish(a, 1), longer, handle = 0;
	struct kvg_policy policy;

	(void)state;
	b = attach(second, base, a);
	assert_int_equal(model_append(b, 40), 0);
	policy = model_frozen(&b->policy, b->committed);
	assert_int_equal(fixture_fork(second, b->handle, &handle), 0);
	c = model_attached(second, b, &policy, handle);
	model_seal(b);
	assert_int_equal(model_append(c, 50), 0);
	longer = publish(c, 2);
	assert_true(longer != base);
	model_check(a);
	model_check(b);
	model_check(c);
	model_release(a);
	model_release(b);
	d = attach(first, longer, c);
	model_check(d);
	model_release(c);
	assert_int_equal(model_append(d, 40), 0);
	model_check(d);
	assert_int_equal(first->tenant->contexts, 2);
	fixture_kill(second);
	model_check(d);
	model_release(d);
	fixture_free(second);
	fixture_free(first);
}

/* Nobody learns of another tenant's keys: no such context, in the same words. */
static void test_another_tenant(void **state)
{
	struct fixture *first = fixture_new(NULL), *other, *layout;
	struct model *a = prompt(first, SCORES_RANDOM), *b;
	struct tenant *tenant;
	uint64_t context = publish(a, 4), handle = 77;
	char text[KVG_TEXT_SIZE];

	(void)state;
	assert_int_equal(tenant_new(first->pool, "spy", 64 << 20, &tenant), 0);
	other = fixture_join(first, tenant, NULL);
	assert_int_equal(fixture_find(other, 4), 0);
	assert_int_equal(fixture_find(other, 5), 0);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(other->cqe.value[i], 0);
	assert_int_equal(fixture_attach(other, context, &question, &handle), -ENOENT);
	memcpy(text, other->text, sizeof(text));
	assert_string_equal(text, "attach: there is no context 1");
	assert_int_equal(fixture_attach(other, 2, &question, &handle), -ENOENT);
	assert_string_equal(other->text, "attach: there is no context 2");
	b = prompt(other, SCORES_RANDOM);
	assert_int_equal(publish(b, 4), 1); /* numbers are the tenant's own */
	assert_int_equal(other->cqe.value[3], 0);
	model_check(a);
	model_release(b);
	fixture_kill(other);
	fixture_forget_contexts(first, tenant);
	assert_int_equal(tenant->quota.account->charged, 0);
	/* Another layout of the same tenant's does not find it either. */
	layout = fixture_join(first, NULL, &(struct fixture_options){.heads = 1});
	assert_int_equal(fixture_find(layout, 4), 0);
	assert_int_equal(fixture_attach(layout, context, &question, &handle), -ENOENT);
	fixture_free(layout);
	model_release(a);
	fixture_free(other);
	(void)tenant_free(tenant);
	fixture_free(first);
}

/* It ends when the last worker has unmapped it; until then its bytes are charged, and unreturned. */
static void test_forgotten(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct fixture *third = fixture_join(first, NULL, NULL);
	struct model *a = prompt(first, SCORES_RANDOM), *b, *c;
	const struct quota_account *account = fixture_account(first);
	uint64_t context = publish(a, 4), tails, bytes = (packed(a, &tails) + 127) / 128 * EXTENT;
	uint64_t own = 2 * EXTENT; /* of the second worker: tails, and fresh tokens */

	(void)state;
	b = attach(second, context, a);
	c = attach(third, context, a);
	model_release(c);
	second->hold_unmapped = true;
	context_forget_all(first->tenant);
	assert_int_equal(fixture_find(first, 4), 0);
	assert_int_equal(first->tenant->contexts, 0);
	assert_int_equal(account->unreturned, 0); /* still in use */
	assert_int_equal(model_append(b, 40), 0);
	model_check(b);
	model_check(a);
	model_release(a);
	fixture_audit(first);
	model_release(b);
	/* Two had an extent for the next tails. */
	assert_int_equal(account->charged, bytes + own + 2 * EXTENT);
	assert_int_equal(account->unreturned, bytes + own + 2 * EXTENT);
	fixture_acknowledge(first);
	assert_int_equal(account->unreturned, bytes + own + EXTENT);
	fixture_kill(third);
	assert_int_equal(account->unreturned, bytes + own);
	fixture_acknowledge(second); /* completes when they are gone */
	assert_int_equal(account->charged, 0);
	assert_int_equal(account->unreturned, 0);
	fixture_audit(first);
	fixture_free(third);
	fixture_free(second);
	fixture_free(first);
}

/* The last worker goes with the last sequence of a forgotten context, and with extents that it has just been given. */
static void test_forgotten_and_the_worker_dies(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct model *a = prompt(first, SCORES_RANDOM), *b;
	struct kvg_policy plain = {.context_tokens = 4000};
	struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .reserve.tokens = 4000};
	uint64_t context = publish(a, 4);

	(void)state;
	b = attach(second, context, a);
	model_release(a);
	assert_int_equal(fixture_create(second, &plain, &sqe.seq), 0);
	context_forget_all(first->tenant);
	assert_false(fixture_start(second, &sqe)->done);
	fixture_kill(second);
	fixture_audit(first);
	while (!list_empty(&first->space->unmapping) || executor_pending(first->executor)) {
		fixture_acknowledge(first);
		fixture_turn(first);
	}
	assert_int_equal(fixture_account(first)->unreturned, 0);
	model_free(b);
	fixture_free(second);
	fixture_free(first);
}

/* A context that adds nothing to another one has no extents: it ends at once, mapped or not, and so does the other. */
static void test_without_extents(void **state)
{
	static const struct kvg_policy plain = {.context_tokens = 64, .max_new_tokens = 64};
	struct fixture *first = fixture_new(NULL);
	struct model *model = model_new(first, &plain, SCORES_RANDOM);
	const struct quota_account *account = fixture_account(first);
	uint32_t counts[RECLAIM_KINDS] = {0};

	(void)state;
	assert_int_equal(model_append(model, 64), 0);
	assert_true(publish(model, 1) != publish(model, 2));
	assert_int_equal(first->tenant->contexts, 2);
	model_release(model);
	assert_int_equal(reclaim_begin(first->tenant, 1, counts), EXTENT);
	assert_int_equal(counts[RECLAIM_CONTEXT], 2);
	assert_int_equal(first->tenant->contexts, 0);
	fixture_acknowledge(first);
	assert_int_equal(first->tenant->reclaiming, 0);
	assert_int_equal(first->tenant->reclaiming_bytes, 0);
	assert_int_equal(account->charged, 0);
	fixture_free(first);
}

/* A chain has no links without blocks, however often a sequence is published. */
static void test_published_again_and_again(void **state)
{
	static const struct kvg_policy plain = {.context_tokens = 100, .max_new_tokens = 64};
	struct fixture *first = fixture_new(NULL);
	struct model *model = model_new(first, &plain, SCORES_RANDOM), *reader;
	const struct context *root, *last;
	uint64_t context = 0;

	(void)state;
	assert_int_equal(model_append(model, 100), 0);
	root = context_find_id(first->tenant, publish(model, 1));
	for (uint32_t key = 2; key < 10; key++) {
		context = publish(model, key);
		last = context_find_id(first->tenant, context);
		assert_ptr_equal(last->parent, root);
		assert_int_equal(last->part.context->ids, 0);
	}
	assert_int_equal(root->part.context->refs, 8);
	reader = attach(first, context, model);
	model_check(reader);
	assert_int_equal(model_append(model, 64), 0);
	context = publish(model, 10);
	last = context_find_id(first->tenant, context);
	assert_ptr_equal(last->parent, root);
	assert_ptr_equal(context_find_id(first->tenant, publish(model, 11))->parent, last);
	model_check(model);
	model_check(reader);
	model_release(reader);
	reader = attach(first, context, model);
	model_check(reader);
	model_release(reader);
	model_release(model);
	fixture_free(first);
}

static void test_refusals(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.device_max = 12 * EXTENT, .max_tokens = 1000});
	struct kvg_policy policy = {.context_tokens = 600, .max_new_tokens = 0}, long_one = {.context_tokens = 401};
	struct model *model = model_new(fixture, &policy, SCORES_RANDOM), *other;
	struct kvg_policy rest = {.context_tokens = 800};
	uint64_t handle = 77, context;

	(void)state;
	assert_int_equal(fixture_publish(fixture, model->handle, 1), -EINVAL);
	assert_non_null(strstr(fixture->text, "no committed tokens"));
	model_prefill(model);
	other = model_new(fixture, &rest, SCORES_RANDOM); /* promised 2 extents: a copy of 2 does not fit */
	model_prefill(other);
	fixture->tenant->quota.account->max = fixture_account(fixture)->charged + EXTENT;
	assert_int_equal(fixture_publish(fixture, model->handle, 1), -ENOSPC);
	assert_non_null(strstr(fixture->text, "the context needs 128.0 KiB"));
	model_check(model);
	assert_int_equal(fixture->pool->meta->free_context_count, META_MAX_CONTEXTS);
	fixture->tenant->quota.account->max = 12 * EXTENT;
	context = publish(model, 1);
	assert_int_equal(fixture_attach(fixture, context, &long_one, &handle), -EINVAL);
	assert_non_null(strstr(fixture->text, "prefix 600 + context 401"));
	long_one.prefix_tokens = UINT32_MAX;
	assert_int_equal(fixture_attach(fixture, context, &long_one, &handle), -EINVAL);
	assert_int_equal(handle, 77);
	assert_int_equal(fixture->space->sequence_count, 2);
	long_one = (struct kvg_policy){.context_tokens = 400};
	fixture->tenant->quota.account->max = fixture_account(fixture)->charged;
	assert_int_equal(fixture_attach(fixture, context, &long_one, &handle), -ENOSPC);
	fixture->tenant->quota.account->max = 12 * EXTENT;
	assert_int_equal(fixture_attach(fixture, context, &long_one, &handle), 0);
	assert_int_equal(fixture_reserve(fixture, handle, 401), -E2BIG);
	assert_int_equal(fixture_reserve(fixture, handle, 400), 0);
	assert_int_equal(fixture_release(fixture, handle), 0);
	model_release(other);
	model_release(model);
	fixture_free(fixture);
}

/* A stale generation is refused; the generation goes up with a publish. */
static void test_generation(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = prompt(fixture, SCORES_RANDOM);
	uint32_t generation = fixture_generation(fixture, model->handle);
	struct kvg_sqe stale = {.op = KVG_OP_PUBLISH, .seq = model->handle, .generation = generation};

	(void)state;
	(void)publish(model, 1);
	assert_int_equal(fixture->cqe.generation, generation + 1);
	assert_int_equal(fixture_generation(fixture, model->handle), generation + 1);
	assert_int_equal(fixture_call(fixture, &stale), -ESTALE);
	model_release(model);
	fixture_free(fixture);
}

/* The handle that the next new sequence of a space gets: a worker can tell. */
static uint64_t next_handle(const struct fixture *fixture)
{
	const struct space *space = fixture->space;

	return (uint64_t)(space->epoch + 1) << 32 | space->free_slots[space->free_count - 1];
}

/* Entries that name a sequence before its ATTACH has ended come after it. */
static void test_entries_before_its_end(void **state)
{
	struct fixture *first = fixture_new(NULL), *second = fixture_join(first, NULL, NULL);
	struct model *publisher = prompt(first, SCORES_RANDOM);
	struct kvg_sqe sqe = {.op = KVG_OP_ATTACH, .seq = publish(publisher, 1), .attach = question};
	struct call *attaching, *reserve, *gone, *late;

	(void)state;
	for (unsigned round = 0; round < 2; round++) { /* with an extent to be created, and without */
		uint64_t handle = next_handle(second);

		sqe.op = KVG_OP_ATTACH;
		attaching = fixture_start(second, &sqe);
		reserve = fixture_start(
			second, &(struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = handle, .reserve.tokens = 40});
		gone = fixture_start(second, &(struct kvg_sqe){.op = KVG_OP_FREE, .seq = handle});
		late = fixture_start(second, &(struct kvg_sqe){.op = KVG_OP_QUERY, .seq = handle});
		fixture_wait(second, late);
		assert_true(attaching->done && reserve->done && gone->done);
		assert_int_equal(attaching->request.cqe.status, 0);
		assert_int_equal(attaching->request.cqe.seq, handle);
		assert_int_equal(reserve->request.cqe.status, 0);
		assert_true(attaching->order < reserve->order && reserve->order < gone->order);
		assert_int_equal(gone->request.cqe.status, 0);
		assert_int_equal(late->request.cqe.status, -ENOENT);
		fixture_acknowledge(second);
	}
	assert_int_equal(second->space->sequence_count, 0);
	model_check(publisher);
	model_release(publisher);
	fixture_free(second);
	fixture_free(first);
}

static int create_nothing(struct kind *kind, size_t size)
{
	(void)kind;
	(void)size;
	return -ENOMEM;
}

/* Those that wait for a sequence that comes to nothing fail. */
static void test_entries_before_its_failure(void **state)
{
	struct test_kind kind;
	struct fixture *first, *second;
	struct model *publisher;
	struct kvg_sqe sqe = {.op = KVG_OP_ATTACH, .attach = question};
	struct call *attaching, *late;
	uint64_t handle;

	(void)state;
	test_kind_init(&kind);
	first = fixture_new(&(struct fixture_options){.kind = &kind.kind});
	second = fixture_join(first, NULL, NULL);
	publisher = prompt(first, SCORES_RANDOM);
	sqe.seq = publish(publisher, 1);
	kind.ops.create = create_nothing;
	handle = next_handle(second);
	attaching = fixture_start(second, &sqe);
	late = fixture_start(second, &(struct kvg_sqe){.op = KVG_OP_QUERY, .seq = handle});
	fixture_wait(second, late);
	assert_true(attaching->order < late->order);
	assert_int_equal(attaching->request.cqe.status, -ENOMEM);
	assert_int_equal(late->request.cqe.status, -ENOENT);
	assert_int_equal(second->space->sequence_count, 0);
	model_release(publisher);
	fixture_free(second);
	fixture_free(first);
	test_kind_deinit(&kind);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_attach_in_another_worker),
		cmocka_unit_test(test_many_rows),
		cmocka_unit_test(test_fresh_tokens),
		cmocka_unit_test(test_own_evictions),
		cmocka_unit_test(test_a_share_of_its_own),
		cmocka_unit_test(test_the_same_key_again),
		cmocka_unit_test(test_two_at_a_time),
		cmocka_unit_test(test_publisher_dies_half_way),
		cmocka_unit_test(test_waiter_dies_slowly),
		cmocka_unit_test(test_publisher_dies_afterwards),
		cmocka_unit_test(test_attacher_dies),
		cmocka_unit_test(test_chains),
		cmocka_unit_test(test_another_tenant),
		cmocka_unit_test(test_forgotten),
		cmocka_unit_test(test_forgotten_and_the_worker_dies),
		cmocka_unit_test(test_without_extents),
		cmocka_unit_test(test_published_again_and_again),
		cmocka_unit_test(test_refusals),
		cmocka_unit_test(test_generation),
		cmocka_unit_test(test_entries_before_its_end),
		cmocka_unit_test(test_entries_before_its_failure),
	};

	return runner_run("publish", tests, sizeof(tests) / sizeof(tests[0]));
}
