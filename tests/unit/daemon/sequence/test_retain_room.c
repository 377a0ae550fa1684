/* Host memory of stores: as much as the tenant's budget has, and back with what it held. */
#include "daemon/sequence/retain.h"

#include <stdlib.h>

#include "daemon/tier/host.h"
#include "tests/support/recall_model.h"

struct ranked {
	float score;
	size_t at;
};

static int best_first(const void *a, const void *b)
{
	const struct ranked *x = a, *y = b;

	return x->score < y->score ? 1 : x->score > y->score ? -1 : (x->at > y->at) - (x->at < y->at);
}

/* Of what the model does not hold, the best `count`: that is what a store of that size must have. */
static void check_best(const struct model *model, uint64_t count)
{
	struct ranked *list = calloc((size_t)model->rows * model->committed + 1, sizeof(*list));
	const struct retain *retain = recall_store(model);
	uint64_t n = 0;

	assert_non_null(list);
	for (uint32_t row = 0; row < model->rows; row++) {
		for (uint32_t pos = 0; pos < model->committed; pos++) {
			size_t at = (size_t)row * model->max_tokens + pos;

			if (!model->held[at])
				list[n++] = (struct ranked){model->scores[at], at};
		}
	}
	qsort(list, n, sizeof(*list), best_first);
	assert_int_equal(retain->count, count < n ? count : n);
	for (uint64_t i = 0; i < retain->count; i++)
		assert_true(retain_entry(retain, i)->score >= list[retain->count - 1].score);
	free(list);
}

/* As much as the tenant's host budget has: the best of all that was dropped, from every eviction. */
static void test_little_host_memory(void **state)
{
	(void)state;
	for (unsigned frames = 0; frames <= 2; frames++) {
		struct fixture *fixture = fixture_new(&(struct fixture_options){
			.host_size = RECALL_HOST, .k_dim = 64, .v_dim = 64, .k_dtype = KVG_F32});
		struct kvg_policy policy = recall_policy;
		struct model *whole, *model;
		uint64_t came = 0, each;

		policy.budget = 60;
		whole = recall_read_prompt(fixture, &policy, 0.6, SCORES_RANDOM, false);
		fixture->tenant->host.account->max = fixture->tenant->host.account->charged + frames * HOST_FRAME;
		model = recall_read_prompt(fixture, &policy, 0.1, SCORES_RANDOM, false);
		for (unsigned i = 0; frames && i < 3; i++) {
			assert_int_equal(model_append(model, 64), 0);
			model_evict(model, KVG_EVICT_DECODE);
		}
		if (frames) {
			each = recall_store(model)->form.per_frame;
			assert_true(each > 100 && each < 300);
			check_best(model, frames * each);
			for (uint64_t i = 0; i < recall_store(model)->count; i++) {
				const struct retain_entry *entry = retain_entry(recall_store(model), i);
				size_t at = (size_t)entry->row * model->max_tokens + entry->pos;

				came += whole->held[at] && entry->pos < 505;
				model->held[at] |= whole->held[at] && entry->pos < 505;
			}
			model->fold = model->committed;
		}
		assert_int_equal(recall_ratio(model, 0.6), 0);
		assert_int_equal(fixture->cqe.value[1], came);
		assert_true(!frames || came > 0);
		model_check(model);
		model_release(whole);
		model_release(model);
		fixture_free(fixture);
	}
}

static void test_frames_go_with_their_sequence(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
	struct model *first = recall_read_prompt(fixture, &recall_policy, 0.1, SCORES_RANDOM, false);
	struct model *second = recall_read_prompt(fixture, &recall_policy, 0.1, SCORES_TIES, false);
	uint64_t charged = fixture->tenant->host.account->charged;

	(void)state;
	assert_int_equal(
		charged, ((uint64_t)recall_store(first)->frame_count + recall_store(second)->frame_count) * HOST_FRAME);
	model_release(first);
	assert_int_equal(
		fixture->tenant->host.account->charged, charged - recall_store(second)->frame_count * HOST_FRAME);
	recall_check_store(second);
	model_free(second);
	fixture_kill(fixture); /* the worker dies with what it retains */
	assert_int_equal(fixture->tenant->host.account->charged, 0);
	fixture_free(fixture);
}

static void trim(const struct model *model, uint64_t frames)
{
	struct fixture *fixture = model->fixture;

	retain_trim(fixture->space->sequences[(uint32_t)model->handle], frames);
	while (fixture->tenant->trims)
		fixture_turn(fixture);
	recall_check_store(model);
	fixture_audit(fixture);
}

/* So many frames less, and the best scores stay, whatever the sequence's state; what is left comes back. */
static void test_a_trim_leaves_the_best(void **state)
{
	struct fixture *fixture = fixture_new(
		&(struct fixture_options){.host_size = RECALL_HOST, .k_dim = 64, .v_dim = 64, .k_dtype = KVG_F32});
	struct model *model = recall_read_prompt(fixture, &recall_policy, 0.1, SCORES_RANDOM, false);
	const struct kvg_sqe offload = {.op = KVG_OP_OFFLOAD, .seq = model->handle};
	const struct kvg_sqe restore = {.op = KVG_OP_RESTORE, .seq = model->handle};
	uint64_t frames = recall_store(model)->frame_count, each = recall_store(model)->form.per_frame;

	(void)state;
	assert_true(frames >= 5);
	trim(model, 2);
	assert_int_equal(recall_store(model)->frame_count, frames - 2);
	check_best(model, (frames - 2) * each);
	assert_int_equal(fixture_call(fixture, &offload), 0);
	trim(model, 1);
	check_best(model, (frames - 3) * each);
	assert_int_equal(fixture_call(fixture, &restore), 0);
	model_check(model);
	trim(model, frames);
	assert_int_equal(recall_store(model)->frame_count, 0);
	trim(model, 1); /* there is nothing */
	assert_int_equal(fixture->tenant->host.account->charged, 0);
	assert_int_equal(recall_ratio(model, 0.9), 0);
	assert_int_equal(fixture->cqe.value[1], 0);
	model_check(model);
	model_release(model);
	fixture_free(fixture);
}

/* It waits for the entry under way, and the one behind it for the trim; the worker dies amid one. */
static void test_trims_take_turns_with_entries(void **state)
{
	struct fixture *fixture = fixture_new(
		&(struct fixture_options){.host_size = RECALL_HOST, .k_dim = 64, .v_dim = 64, .k_dtype = KVG_F32});
	struct model *model = recall_read_prompt(fixture, &recall_policy, 0.1, SCORES_RANDOM, false);
	struct kvg_sqe sqe = {.op = KVG_OP_RECALL, .seq = model->handle, .recall.ratio = 0.2};
	struct sequence *sequence = fixture->space->sequences[(uint32_t)model->handle];
	uint64_t before = recall_retained(model), came;
	const struct call *first, *second;

	(void)state;
	sqe.generation = fixture_generation(fixture, model->handle);
	first = fixture_start(fixture, &sqe);
	retain_trim(sequence, 1);
	sqe = (struct kvg_sqe){.op = KVG_OP_QUERY, .seq = model->handle};
	second = fixture_start(fixture, &sqe);
	assert_int_equal(fixture->tenant->trims, 1);
	fixture_wait(fixture, first);
	came = first->request.cqe.value[1];
	assert_true(came > 0);
	fixture_wait(fixture, second);
	assert_int_equal(fixture->tenant->trims, 0);
	assert_true(recall_retained(model) < before - came);
	fixture_audit(fixture);
	retain_trim(sequence, 1);
	retain_trim(sequence, 1);
	model_free(model);
	fixture_kill(fixture);
	assert_int_equal(fixture->tenant->trims, 0);
	assert_int_equal(fixture->tenant->host.account->charged, 0);
	fixture_free(fixture);
}

/* A fork seals what is held, and so does a publication: nothing of before can come back, and the host has it no more.
 */
static void test_sealed_sequences_retain_nothing(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.host_size = RECALL_HOST});
	struct model *model = recall_read_prompt(fixture, &recall_policy, 0.1, SCORES_RANDOM, false);
	struct kvg_sqe sqe = {.op = KVG_OP_FORK, .seq = model->handle};
	uint64_t child;

	(void)state;
	assert_true(fixture->tenant->host.account->charged > 0);
	sqe.generation = fixture_generation(fixture, model->handle);
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	child = fixture->cqe.value[1];
	assert_int_equal(fixture->tenant->host.account->charged, 0);
	assert_int_equal(recall_ratio(model, 0.9), 0);
	assert_int_equal(fixture->cqe.value[1], 0);
	sqe = (struct kvg_sqe){.op = KVG_OP_RECALL, .seq = child, .recall.ratio = 0.9};
	sqe.generation = fixture_generation(fixture, child);
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	assert_int_equal(fixture->cqe.value[1], 0);
	assert_int_equal(fixture_release(fixture, child), 0);
	model_release(model);
	fixture_free(fixture);
}

/* Without a host tier the flag means nothing, and nothing comes back. */
static void test_without_a_tier(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	struct model *model = recall_read_prompt(fixture, &recall_policy, 0.1, SCORES_RANDOM, false);

	(void)state;
	assert_null(recall_store(model));
	assert_int_equal(recall_ratio(model, 0.9), 0);
	assert_int_equal(fixture->cqe.value[1], 0);
	model_check(model);
	model_release(model);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_little_host_memory),
		cmocka_unit_test(test_frames_go_with_their_sequence),
		cmocka_unit_test(test_a_trim_leaves_the_best),
		cmocka_unit_test(test_trims_take_turns_with_entries),
		cmocka_unit_test(test_sealed_sequences_retain_nothing),
		cmocka_unit_test(test_without_a_tier),
	};

	return runner_run("retain_room", tests, sizeof(tests) / sizeof(tests[0]));
}
