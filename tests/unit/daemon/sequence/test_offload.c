/* Sequences that leave the device and come back, bit for bit, whatever the state. */
#include "daemon/sequence/offload.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/tier/host.h"
#include "tests/support/space_model.h"

#define EXTENT (16u << 10) /* a stripe of the fixture's geometry */
#define CHUNK  512u
#define HOST   (8u << 20)

static const struct kvg_policy chunked = {.ratio = 0.3,
	.mode = KVG_MODE_CHUNKED,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE,
	.context_tokens = 4 * CHUNK,
	.chunk_tokens = CHUNK,
	.max_new_tokens = 512,
	.budget = 300,
	.window = 16};

static const struct kvg_policy plain = {.ratio = 1.0, .context_tokens = 1024, .max_new_tokens = 512};

static struct fixture *fixture_of(uint64_t device, uint64_t host)
{
	return fixture_new(&(struct fixture_options){.extent_size = EXTENT, .device_max = device, .host_size = host});
}

static int call(struct fixture *fixture, uint8_t op, uint64_t handle)
{
	struct kvg_sqe sqe = {.op = op, .seq = handle, .generation = fixture_generation(fixture, handle)};

	return fixture_call(fixture, &sqe);
}

static struct call *start(struct fixture *fixture, uint8_t op, uint64_t handle)
{
	struct kvg_sqe sqe = {.op = op, .seq = handle, .generation = fixture_generation(fixture, handle)};

	return fixture_start(fixture, &sqe);
}

static const struct kvg_slot *slot_of(const struct model *model)
{
	return &model->fixture->space->table.slots[(uint32_t)model->handle];
}

static const struct meta_seq *meta_of(const struct model *model)
{
	return &model->fixture->space->part.seqs[(uint32_t)model->handle];
}

static const struct quota_account *host_of(const struct fixture *fixture)
{
	return fixture->tenant->host.account;
}

static void offload(struct model *model)
{
	if (call(model->fixture, KVG_OP_OFFLOAD, model->handle) < 0)
		fail_msg("%s", model->fixture->text);
	assert_int_equal(slot_of(model)->flags & KVG_SLOT_OFFLOADED, KVG_SLOT_OFFLOADED);
	assert_int_equal(model->fixture->cqe.value[0], meta_of(model)->image_bytes);
	assert_int_equal(meta_of(model)->blocks, 0);
}

static void restore(struct model *model)
{
	if (call(model->fixture, KVG_OP_RESTORE, model->handle) < 0)
		fail_msg("%s", model->fixture->text);
	assert_int_equal(slot_of(model)->flags, 0);
	assert_int_equal(meta_of(model)->image, 0);
	model_check(model);
}

/* One that has everything: held blocks, fresh tokens, room that is not used. */
static struct model *read_some(struct fixture *fixture, enum score_pattern pattern)
{
	struct model *model = model_new(fixture, &chunked, pattern);

	assert_int_equal(model_append(model, CHUNK), 0);
	model_evict(model, KVG_EVICT_PREFILL);
	assert_int_equal(model_append(model, 200), 0);
	return model;
}

/* ---- there and back ---- */

static void test_there_and_back(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	const struct quota_account *account = fixture_account(fixture);
	struct model *model = read_some(fixture, SCORES_RANDOM);
	struct kvg_slot before = *slot_of(model);
	uint64_t blocks = meta_of(model)->blocks, promised = account->promised, charged = account->charged, moved;

	(void)state;
	offload(model);
	moved = fixture->cqe.value[1];
	assert_int_equal(moved, blocks * 2 * fixture->space->arena->stride);
	assert_int_equal(account->charged, 0); /* the bytes are back in the pool */
	assert_int_equal(account->promised, 0);
	assert_int_equal(host_of(fixture)->charged, meta_of(model)->image_bytes);
	assert_int_equal(slot_of(model)->reserved_pos, before.reserved_pos);
	assert_int_equal(fixture_query(fixture, model->handle), 0);
	assert_int_equal(fixture->cqe.value[0], model_pairs(model));
	assert_int_equal(fixture->cqe.value[1], 0);
	restore(model);
	assert_int_equal(fixture->cqe.value[0], moved);
	assert_int_equal(host_of(fixture)->charged, 0);
	assert_int_equal(account->charged + account->promised, charged + promised);
	assert_memory_equal(slot_of(model), &before, sizeof(before));
	assert_int_equal(call(fixture, KVG_OP_RESTORE, model->handle), 0); /* once more is fine */
	assert_int_equal(fixture->cqe.value[0], 0);
	assert_int_equal(model_append(model, CHUNK - 200), 0);
	model_evict(model, KVG_EVICT_PREFILL);
	model_release(model);
	fixture_free(fixture);
}

static void test_reserve_restores(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	struct model *model = read_some(fixture, SCORES_TIES);

	(void)state;
	offload(model);
	assert_int_equal(call(fixture, KVG_OP_OFFLOAD, model->handle), 0); /* once more is fine */
	assert_int_equal(fixture->cqe.value[0], meta_of(model)->image_bytes);
	assert_int_equal(fixture->cqe.value[1], 0);
	assert_int_equal(fixture_reserve(fixture, model->handle, 300), 0);
	assert_true(fixture->cqe.value[0] >= model->committed + 300);
	assert_int_equal(slot_of(model)->flags, 0);
	model_check(model);
	assert_int_equal(model_append(model, CHUNK - 200), 0);
	model_evict(model, KVG_EVICT_PREFILL);
	model_release(model);
	fixture_free(fixture);
}

/* Whole stripes without a committed token are not worth their bytes. */
static void test_uncommitted_stripes_go(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	struct model *model = model_new(fixture, &plain, SCORES_RANDOM);

	(void)state;
	assert_int_equal(model_append(model, 130), 0);
	assert_int_equal(fixture_reserve(fixture, model->handle, 700), 0);
	offload(model);
	assert_int_equal(slot_of(model)->reserved_pos, 256);
	assert_int_equal(host_of(fixture)->charged, HOST_FRAME);
	restore(model);
	assert_int_equal(meta_of(model)->stripes, 2);
	assert_int_equal(model_append(model, 500), 0);
	model_check(model);
	model_release(model);
	fixture_free(fixture);
}

static void test_nothing_to_move(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	struct model *model = model_new(fixture, &plain, SCORES_RANDOM);

	(void)state;
	offload(model);
	assert_int_equal(host_of(fixture)->charged, 0);
	assert_int_equal(fixture_account(fixture)->promised, 0);
	restore(model);
	assert_int_equal(model_append(model, 100), 0);
	model_release(model);
	fixture_free(fixture);
}

/* Evictions of both kinds go on as if nothing had been. */
static void test_life_goes_on(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	struct model *models[3];

	(void)state;
	for (unsigned i = 0; i < 3; i++)
		models[i] = model_new(fixture, &chunked, (enum score_pattern)i);
	for (unsigned i = 0; i < 12; i++) {
		struct model *model = models[i % 3];

		assert_int_equal(model_append(model, CHUNK), 0);
		if (i & 1)
			offload(model);
		if (i & 1)
			restore(model);
		model_evict(model, KVG_EVICT_PREFILL);
		offload(model);
		model_check(models[(i + 1) % 3]->committed && !slot_of(models[(i + 1) % 3])->flags
				    ? models[(i + 1) % 3]
				    : (restore(model), model));
		if (slot_of(model)->flags)
			restore(model);
	}
	for (unsigned i = 0; i < 6; i++) {
		struct model *model = models[i % 3];

		assert_int_equal(model_append(model, 128), 0);
		model_evict(model, KVG_EVICT_DECODE);
		offload(model);
		restore(model);
	}
	for (unsigned i = 0; i < 3; i++)
		model_release(models[i]);
	fixture_free(fixture);
}

/* K and V of any size, blocks larger than a frame too. */
static void test_shapes(void **state)
{
	static const struct {
		uint32_t k_dim, v_dim, k_dtype, v_dtype;
	} shapes[] = {{128, 128, KVG_BF16, KVG_BF16}, {96, 32, KVG_F32, KVG_F16}, {1024, 1024, KVG_F32, KVG_F32},
		{20, 576, KVG_BF16, KVG_F32}};

	(void)state;
	for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) {
		struct fixture *fixture = fixture_new(&(struct fixture_options){.k_dim = shapes[i].k_dim,
			.v_dim = shapes[i].v_dim,
			.k_dtype = shapes[i].k_dtype,
			.v_dtype = shapes[i].v_dtype,
			.max_tokens = 2048,
			.extent_size = 1 << 20,
			.pool_size = 256 << 20,
			.host_size = 128 << 20});
		struct model *model = model_new(fixture, &plain, SCORES_RANDOM);

		assert_int_equal(model_append(model, 300), 0);
		offload(model);
		restore(model);
		model_release(model);
		fixture_free(fixture);
	}
}

/* ---- what is refused ---- */

static void test_no_tier(void **state)
{
	struct fixture *fixture = fixture_of(0, 0);
	struct model *model = read_some(fixture, SCORES_RANDOM);

	(void)state;
	assert_int_equal(call(fixture, KVG_OP_OFFLOAD, model->handle), -ENOSPC);
	assert_non_null(strstr(fixture->text, "host.size"));
	assert_int_equal(slot_of(model)->flags, 0);
	model_check(model);
	assert_int_equal(model_append(model, 100), 0);
	model_release(model);
	fixture_free(fixture);
}

static void test_no_room_on_the_host(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	struct model *model = model_new(fixture, &plain, SCORES_RANDOM);

	(void)state;
	fixture->tenant->host.account->max = 2 * HOST_FRAME;
	assert_int_equal(model_append(model, 1000), 0); /* 128 KiB, and their places */
	assert_int_equal(fixture_reserve(fixture, model->handle, 500), 0);
	assert_int_equal(call(fixture, KVG_OP_OFFLOAD, model->handle), -ENOSPC);
	assert_non_null(strstr(fixture->text, "the image of a sequence needs 192.0 KiB"));
	assert_non_null(strstr(fixture->text, "65536 bytes short"));
	assert_true(slot_of(model)->reserved_pos >= 1500); /* nothing has changed */
	assert_int_equal(host_of(fixture)->charged, 0);
	model_check(model);
	fixture->tenant->host.account->max = 3 * HOST_FRAME;
	offload(model);
	restore(model);
	model_release(model);
	fixture_free(fixture);
}

static void test_no_room_on_the_device(void **state)
{
	struct fixture *fixture = fixture_of(20 * EXTENT, HOST);
	struct model *model = model_new(fixture, &plain, SCORES_RANDOM), *other;

	(void)state;
	assert_int_equal(model_append(model, 1000), 0);
	offload(model);
	other = model_new(fixture, &plain, SCORES_TIES); /* takes what it was admitted with */
	assert_int_equal(model_append(other, 700), 0);
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(
			i ? fixture_reserve(fixture, model->handle, 10) : call(fixture, KVG_OP_RESTORE, model->handle),
			-ENOSPC);
		assert_non_null(strstr(fixture->text, "bytes short"));
		assert_int_equal(slot_of(model)->flags, KVG_SLOT_OFFLOADED);
		assert_int_equal(meta_of(model)->admitted, 0);
	}
	model_release(other);
	restore(model);
	assert_int_equal(model_append(model, 500), 0);
	model_release(model);
	fixture_free(fixture);
}

/* Both generations share the last extents when there are no others: the promise counts blocks of either. */
static void test_exactly_as_much_as_promised(void **state)
{
	struct kvg_policy policy = chunked;
	uint64_t most;

	(void)state;
	policy.max_new_tokens = 0;
	for (uint32_t i = 0; i < 6; i++) {
		struct fixture *fixture = fixture_of(0, HOST);
		struct model *model = model_new(fixture, &policy, SCORES_RANDOM);

		most = fixture_account(fixture)->promised;
		model_free(model);
		fixture_free(fixture);
		fixture = fixture_of(most, HOST);
		model = model_new(fixture, &policy, SCORES_RANDOM);
		for (uint32_t k = 0; k < 4; k++) {
			assert_int_equal(model_append(model, i * 80), 0);
			offload(model);
			restore(model);
			assert_int_equal(model_append(model, CHUNK - i * 80), 0);
			offload(model);
			restore(model);
			model_evict(model, KVG_EVICT_PREFILL);
			offload(model);
			restore(model);
		}
		model_release(model);
		fixture_free(fixture);
	}
}

/* Where each generation cannot have extents of its own, they share what there is. */
static void test_generations_share(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = HOST});
	struct kvg_policy policy = chunked;
	struct model *model;
	uint64_t extents, each = fixture->space->arena->blocks_per_extent;

	(void)state;
	policy.max_new_tokens = policy.budget = 0;
	model = model_new(fixture, &policy, SCORES_RANDOM);
	model_prefill(model);
	assert_int_equal(model_append(model, 128), 0);
	extents = (meta_of(model)->blocks + each - 1) / each;
	assert_true(fixture_account(fixture)->charged > extents * fixture->space->arena->extent_size);
	offload(model);
	fixture->tenant->quota.account->max = (extents - 1) * fixture->space->arena->extent_size;
	assert_int_equal(call(fixture, KVG_OP_RESTORE, model->handle), -ENOSPC);
	assert_int_equal(fixture_account(fixture)->charged, 0);
	fixture->tenant->quota.account->max = extents * fixture->space->arena->extent_size;
	restore(model);
	assert_int_equal(fixture_account(fixture)->charged, extents * fixture->space->arena->extent_size);
	model_release(model);
	fixture_free(fixture);
}

/* What it was admitted with is there, and the rest of its blocks is not: the promise goes back. */
static void test_more_than_it_was_admitted_with(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	struct kvg_policy policy = {.ratio = 1, .context_tokens = 128};
	struct model *model = model_new(fixture, &policy, SCORES_RANDOM);

	(void)state;
	assert_int_equal(model_append(model, 1000), 0);
	offload(model);
	fixture->tenant->quota.account->max = 4 * EXTENT;
	assert_int_equal(call(fixture, KVG_OP_RESTORE, model->handle), -ENOSPC);
	assert_int_equal(meta_of(model)->admitted, 0);
	assert_int_equal(fixture_account(fixture)->charged + fixture_account(fixture)->promised, 0);
	fixture->tenant->quota.account->max = 8 * EXTENT;
	restore(model);
	model_release(model);
	fixture_free(fixture);
}

/* Scores of tokens whose stripes went are staged anew. */
static void test_scores_of_uncommitted_tokens_go(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	struct model *model = model_new(fixture, &plain, SCORES_RANDOM);
	const uint32_t *scored = fixture->space->part.scored;

	(void)state;
	assert_int_equal(fixture_reserve(fixture, model->handle, 512), 0);
	assert_int_equal(model_stage(model, 0, 400), 0);
	assert_int_equal(fixture_commit(fixture, model->handle, 100), 0);
	assert_int_equal(scored[(uint32_t)model->handle * fixture->layout.groups[0].layers], 400);
	assert_int_equal(call(fixture, KVG_OP_OFFLOAD, model->handle), 0);
	assert_int_equal(scored[(uint32_t)model->handle * fixture->layout.groups[0].layers], 128);
	model_release(model);
	fixture_free(fixture);
}

static void test_states(void **state)
{
	static const uint8_t refused[] = {KVG_OP_COMMIT, KVG_OP_STAGE, KVG_OP_EVICT, KVG_OP_TRUNCATE, KVG_OP_PROTECT};
	struct fixture *fixture = fixture_of(0, HOST);
	struct model *model = read_some(fixture, SCORES_RANDOM);

	(void)state;
	for (unsigned round = 0; round < 2; round++) {
		assert_int_equal(call(fixture, round ? KVG_OP_OFFLOAD : KVG_OP_IDLE, model->handle), 0);
		assert_int_equal(slot_of(model)->flags, round ? KVG_SLOT_OFFLOADED : KVG_SLOT_IDLE);
		for (size_t i = 0; i < sizeof(refused); i++) {
			assert_int_equal(call(fixture, refused[i], model->handle), -EBUSY);
			assert_non_null(strstr(fixture->text, round ? "offloaded" : "idle"));
		}
		assert_int_equal(fixture_query(fixture, model->handle), 0);
		restore(model);
	}
	assert_int_equal(call(fixture, KVG_OP_IDLE, model->handle), 0);
	assert_int_equal(fixture_reserve(fixture, model->handle, 1), 0);
	assert_int_equal(slot_of(model)->flags, 0);
	assert_int_equal(call(fixture, KVG_OP_IDLE, model->handle), 0);
	offload(model);
	assert_int_equal(slot_of(model)->flags, KVG_SLOT_OFFLOADED | KVG_SLOT_IDLE);
	restore(model);
	model_release(model);
	fixture_free(fixture);
}

/* ---- the end ---- */

static void test_freed(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	struct model *model = read_some(fixture, SCORES_RANDOM);
	struct call *first, *second;

	(void)state;
	offload(model);
	model_release(model);
	assert_int_equal(host_of(fixture)->charged, 0);
	for (unsigned i = 0; i < 2; i++) {
		model = read_some(fixture, SCORES_RANDOM);
		if (i)
			offload(model);
		first = start(fixture, i ? KVG_OP_RESTORE : KVG_OP_OFFLOAD, model->handle);
		second = start(fixture, KVG_OP_FREE, model->handle);
		fixture_wait(fixture, second);
		assert_true(first->done);
		assert_int_equal(second->request.cqe.status, 0);
		assert_int_equal(host_of(fixture)->charged, 0);
		fixture_acknowledge(fixture);
		model_free(model);
	}
	fixture_free(fixture);
}

static void test_worker_dies(void **state)
{
	(void)state;
	for (unsigned turns = 0; turns < 8; turns++) {
		for (unsigned i = 0; i < 3; i++) {
			struct fixture *fixture = fixture_of(0, HOST);
			struct model *model = read_some(fixture, SCORES_RANDOM);

			if (i)
				offload(model);
			if (i < 2) {
				(void)start(fixture, i ? KVG_OP_RESTORE : KVG_OP_OFFLOAD, model->handle);
				for (unsigned k = 0; k < turns; k++)
					fixture_turn(fixture);
			}
			model_free(model);
			fixture_kill(fixture);
			assert_int_equal(host_of(fixture)->charged, 0);
			fixture_free(fixture);
		}
	}
}

/* ---- the daemon's own requests ---- */

struct own {
	struct request request;
	struct fixture *fixture;
	unsigned completed;
	bool stop;
};

static void own_completed(struct request *request)
{
	struct own *own = list_entry(request, struct own, request);

	own->completed++;
	if (!atomic_load(&own->fixture->space->dying))
		fixture_audit(own->fixture);
	if (own->stop)
		loop_stop(own->fixture->loop);
}

static void own_start(struct fixture *fixture, struct own *own, uint8_t op, uint64_t handle)
{
	*own = (struct own){.fixture = fixture};
	own->request.sqe = (struct kvg_sqe){.op = op, .seq = handle};
	own->request.completed = own_completed;
	offload_submit(fixture->space, &own->request);
}

static int own_call(struct fixture *fixture, struct own *own, uint8_t op, uint64_t handle)
{
	own_start(fixture, own, op, handle);
	own->stop = true;
	if (!own->completed)
		assert_int_equal(loop_run(fixture->loop), 0);
	assert_int_equal(own->completed, 1);
	fixture_acknowledge(fixture);
	request_deinit(&own->request);
	return own->request.cqe.status;
}

static void test_own_requests(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	struct model *model = read_some(fixture, SCORES_RANDOM);
	struct own own;

	(void)state;
	assert_int_equal(own_call(fixture, &own, KVG_OP_OFFLOAD, model->handle), -EBUSY);
	assert_non_null(strstr(own.request.text, "not released"));
	assert_int_equal(call(fixture, KVG_OP_IDLE, model->handle), 0);
	assert_int_equal(own_call(fixture, &own, KVG_OP_OFFLOAD, model->handle), 0);
	assert_int_equal(slot_of(model)->flags, KVG_SLOT_OFFLOADED | KVG_SLOT_IDLE);
	assert_int_equal(own_call(fixture, &own, KVG_OP_EVICT, model->handle), -EBUSY);
	assert_int_equal(own_call(fixture, &own, KVG_OP_RESTORE, model->handle), 0);
	assert_int_equal(slot_of(model)->flags, KVG_SLOT_IDLE); /* its worker has not taken it up */
	model_check(model);
	assert_int_equal(own_call(fixture, &own, KVG_OP_EVICT, model->handle), 0);
	assert_int_equal(own_call(fixture, &own, KVG_OP_QUERY, model->handle + 1), -ENOENT);
	assert_int_equal(call(fixture, KVG_OP_RESTORE, model->handle), 0);
	model_release(model);
	fixture_free(fixture);
}

/* Waiting behind others, under way, or after the end: each is completed once. */
static void test_own_requests_end_with_the_worker(void **state)
{
	struct own own[3];

	(void)state;
	for (unsigned turns = 0; turns < 6; turns++) {
		struct fixture *fixture = fixture_of(0, HOST);
		struct model *model = read_some(fixture, SCORES_RANDOM);

		assert_int_equal(call(fixture, KVG_OP_IDLE, model->handle), 0);
		own_start(fixture, &own[0], KVG_OP_OFFLOAD, model->handle);
		own_start(fixture, &own[1], KVG_OP_RESTORE, model->handle);
		for (unsigned k = 0; k < turns; k++)
			fixture_turn(fixture);
		fixture_kill(fixture);
		own_start(fixture, &own[2], KVG_OP_OFFLOAD, model->handle);
		model_free(model);
		for (unsigned i = 0; i < 3; i++) {
			assert_int_equal(own[i].completed, 1);
			request_deinit(&own[i].request);
		}
		assert_int_equal(own[2].request.cqe.status, -ECANCELED);
		assert_non_null(strstr(own[2].request.text, "worker has gone"));
		fixture_free(fixture);
	}
}

/* ---- memory that somebody needs ---- */

static void on_pressure(void *user, struct tenant *tenant, bool on)
{
	(void)user;
	(void)tenant;
	(void)on;
}

static const struct reclaim_ops pressure_ops = {.pressure = on_pressure};
static const size_t one = 1;

static void reclaim_open(struct fixture *fixture, struct reclaim *reclaim)
{
	assert_int_equal(reclaim_init(reclaim, fixture->loop, fixture->pool, &fixture->tenant, &one, 1000000000,
				 &pressure_ops, NULL),
		0);
	fixture->tenant->reclaim = reclaim;
}

static void reclaim_close(struct fixture *fixture, struct reclaim *reclaim)
{
	fixture->tenant->reclaim = NULL;
	reclaim_deinit(reclaim);
}

/* Waits while the worker unmaps what it is asked to. */
static int call_and_unmap(struct fixture *fixture, uint8_t op, uint64_t handle)
{
	struct call *waiting = start(fixture, op, handle);

	while (!waiting->done) {
		fixture_acknowledge(fixture);
		fixture_turn(fixture);
	}
	if (waiting->request.cqe.status < 0)
		print_message("%s\n", waiting->request.text);
	return waiting->request.cqe.status;
}

/* Of two idle ones the older goes when the third comes back, and comes back itself. */
static void test_idle_ones_make_room(void **state)
{
	struct fixture *fixture = fixture_of(25 * EXTENT, HOST);
	struct reclaim reclaim;
	struct model *models[3];

	(void)state;
	reclaim_open(fixture, &reclaim);
	for (unsigned i = 0; i < 3; i++) {
		models[i] = model_new(fixture, &plain, (enum score_pattern)i);
		assert_int_equal(model_append(models[i], 1000 + i), 0);
		if (i == 0)
			offload(models[i]);
		if (i)
			assert_int_equal(call(fixture, KVG_OP_IDLE, models[i]->handle), 0);
	}
	assert_int_equal(fixture->tenant->offer_count, 2);
	assert_int_equal(call_and_unmap(fixture, KVG_OP_RESTORE, models[0]->handle), 0);
	model_check(models[0]);
	assert_int_equal(slot_of(models[1])->flags, KVG_SLOT_OFFLOADED | KVG_SLOT_IDLE);
	assert_int_equal(slot_of(models[2])->flags, KVG_SLOT_IDLE);
	assert_int_equal(fixture->tenant->offer_count, 1);
	assert_int_equal(fixture->tenant->reclaiming, 0);
	assert_int_equal(fixture->tenant->reclaiming_bytes, 0);
	assert_int_equal(call_and_unmap(fixture, KVG_OP_RESTORE, models[1]->handle), 0);
	model_check(models[1]);
	assert_int_equal(slot_of(models[2])->flags, KVG_SLOT_OFFLOADED | KVG_SLOT_IDLE);
	assert_int_equal(fixture->tenant->offered, 0);
	for (unsigned i = 0; i < 3; i++)
		model_release(models[i]);
	reclaim_close(fixture, &reclaim);
	fixture_free(fixture);
}

/* Without room on the host an idle sequence stays where it is, on offer. */
static void test_idle_without_a_host(void **state)
{
	struct fixture *fixture = fixture_of(13 * EXTENT, 0);
	struct reclaim reclaim;
	struct model *model = model_new(fixture, &plain, SCORES_RANDOM);
	struct kvg_sqe sqe = {.op = KVG_OP_CREATE, .create = plain};

	(void)state;
	reclaim_open(fixture, &reclaim);
	assert_int_equal(model_append(model, 1000), 0);
	assert_int_equal(call(fixture, KVG_OP_IDLE, model->handle), 0);
	assert_int_equal(fixture->tenant->offer_count, 1);
	assert_int_equal(fixture_call(fixture, &sqe), -ENOSPC);
	assert_non_null(strstr(fixture->text, "idle"));
	assert_int_equal(fixture->tenant->offer_count, 1);
	assert_int_equal(fixture->tenant->reclaiming, 0);
	assert_int_equal(slot_of(model)->flags, KVG_SLOT_IDLE);
	model_check(model);
	assert_int_equal(fixture_reserve(fixture, model->handle, 1), 0);
	assert_int_equal(fixture->tenant->offer_count, 0);
	model_release(model);
	reclaim_close(fixture, &reclaim);
	fixture_free(fixture);
}

static unsigned pins; /* that were asked for, and refused */

static int pin_nothing(struct kind *kind, void *at, size_t size)
{
	(void)kind;
	(void)at;
	(void)size;
	pins++;
	return -ENOMEM;
}

/* Above high, and the memory of the host fails: it is tried once, and again when the worker says idle again. */
static void test_the_host_fails_an_idle_one(void **state)
{
	struct fixture *fixture = fixture_of(0, HOST);
	const struct kind_ops *ops = fixture->kind->ops;
	struct kind_ops broken = *ops;
	struct reclaim reclaim;
	struct model *model = model_new(fixture, &plain, SCORES_RANDOM);

	(void)state;
	broken.pin = pin_nothing;
	pins = 0;
	fixture->kind->ops = &broken;
	reclaim_open(fixture, &reclaim);
	assert_int_equal(model_append(model, 1000), 0);
	fixture->tenant->quota.account->high = EXTENT;
	assert_int_equal(call(fixture, KVG_OP_IDLE, model->handle), 0);
	for (unsigned i = 0; i < 50 || (fixture->tenant->reclaiming && pins < 3); i++)
		fixture_turn(fixture);
	assert_int_equal(pins, 1);
	assert_int_equal(fixture->tenant->offer_count, 0);
	assert_int_equal(slot_of(model)->flags, KVG_SLOT_IDLE);
	model_check(model);
	fixture->kind->ops = ops;
	assert_int_equal(call(fixture, KVG_OP_IDLE, model->handle), 0);
	while (slot_of(model)->flags != (KVG_SLOT_OFFLOADED | KVG_SLOT_IDLE))
		fixture_turn(fixture);
	fixture_acknowledge(fixture);
	assert_int_equal(call_and_unmap(fixture, KVG_OP_RESTORE, model->handle), 0);
	model_check(model);
	model_release(model);
	reclaim_close(fixture, &reclaim);
	fixture_free(fixture);
}

/* The worker dies while its idle sequence is on its way. */
static void test_reclaimed_worker_dies(void **state)
{
	(void)state;
	for (unsigned turns = 0; turns < 4; turns++) {
		struct fixture *fixture = fixture_of(0, HOST);
		struct reclaim reclaim;
		struct model *model = read_some(fixture, SCORES_RANDOM);

		reclaim_open(fixture, &reclaim);
		assert_int_equal(call(fixture, KVG_OP_IDLE, model->handle), 0);
		if (turns) { /* otherwise it dies on offer */
			assert_true(reclaim_begin(fixture->tenant, 1, NULL) > 0);
			assert_int_equal(fixture->tenant->reclaiming, 1);
		}
		for (unsigned k = 0; k < turns; k++)
			fixture_turn(fixture);
		fixture_kill(fixture);
		assert_int_equal(fixture->tenant->reclaiming, 0);
		assert_int_equal(fixture->tenant->offered, 0);
		model_free(model);
		reclaim_close(fixture, &reclaim);
		fixture_free(fixture);
	}
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_there_and_back),
		cmocka_unit_test(test_reserve_restores),
		cmocka_unit_test(test_uncommitted_stripes_go),
		cmocka_unit_test(test_nothing_to_move),
		cmocka_unit_test(test_life_goes_on),
		cmocka_unit_test(test_shapes),
		cmocka_unit_test(test_no_tier),
		cmocka_unit_test(test_no_room_on_the_host),
		cmocka_unit_test(test_no_room_on_the_device),
		cmocka_unit_test(test_exactly_as_much_as_promised),
		cmocka_unit_test(test_generations_share),
		cmocka_unit_test(test_more_than_it_was_admitted_with),
		cmocka_unit_test(test_scores_of_uncommitted_tokens_go),
		cmocka_unit_test(test_states),
		cmocka_unit_test(test_freed),
		cmocka_unit_test(test_worker_dies),
		cmocka_unit_test(test_own_requests),
		cmocka_unit_test(test_own_requests_end_with_the_worker),
		cmocka_unit_test(test_idle_ones_make_room),
		cmocka_unit_test(test_idle_without_a_host),
		cmocka_unit_test(test_the_host_fails_an_idle_one),
		cmocka_unit_test(test_reclaimed_worker_dies),
	};

	return runner_run("daemon/sequence/offload", tests, sizeof(tests) / sizeof(*tests));
}
