#include "tests/support/recall_model.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/tier/host.h"

const struct kvg_policy recall_policy = {.ratio = 0.1,
	.mode = KVG_MODE_CHUNKED,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE | KVG_POLICY_RETAIN_HOST,
	.prefix_tokens = 5,
	.context_tokens = 500,
	.chunk_tokens = 200,
	.window = 37,
	.max_new_tokens = 400};

int recall_submit(const struct model *model, struct kvg_sqe *sqe)
{
	sqe->op = KVG_OP_RECALL;
	sqe->seq = model->handle;
	sqe->generation = fixture_generation(model->fixture, model->handle);
	return fixture_call(model->fixture, sqe);
}

int recall_ratio(const struct model *model, double ratio)
{
	return recall_submit(model, &(struct kvg_sqe){.recall.ratio = ratio});
}

int recall_budget(const struct model *model, uint32_t budget)
{
	return recall_submit(model, &(struct kvg_sqe){.recall = {.budget = budget, .flags = KVG_RECALL_BUDGET}});
}

const struct retain *recall_store(const struct model *model)
{
	return model->fixture->space->sequences[(uint32_t)model->handle]->retain;
}

uint64_t recall_retained(const struct model *model)
{
	return recall_store(model) ? recall_store(model)->count : 0;
}

void recall_check_store(const struct model *model)
{
	const struct retain *retain = recall_store(model);
	const struct meta_seq *meta = &model->fixture->space->part.seqs[(uint32_t)model->handle];
	const struct quota_account *host = model->fixture->tenant->host.account;

	if (!retain) /* nothing was ever dropped */
		return;
	assert_true(retain->frame_count == retain_frames_for(&retain->form, retain->count));
	assert_int_equal(meta->retained_bytes, retain->count * retain_pair_bytes(&retain->form));
	assert_int_equal(meta->retained != 0, retain->count != 0);
	assert_true(host->charged >= (uint64_t)retain->frame_count * HOST_FRAME);
	for (uint64_t i = 0; i < retain->count; i++) {
		const struct retain_entry *entry = retain_entry(retain, i);
		uint32_t pos;

		assert_true(entry->row < model->rows && entry->pos < model->committed);
		assert_false(model->held[(size_t)entry->row * model->max_tokens + entry->pos]);
		assert_memory_equal(&entry->score, &model->scores[(size_t)entry->row * model->max_tokens + entry->pos],
			sizeof(float));
		memcpy(&pos, retain_k(retain, i), sizeof(pos)); /* as space_model.c writes it */
		assert_int_equal(pos, entry->pos);
	}
}

uint64_t recall_take_over(struct model *model, const struct model *other)
{
	uint64_t came = 0;

	for (size_t i = 0; i < (size_t)model->rows * model->max_tokens; i++) {
		came += other->held[i] && !model->held[i];
		model->held[i] |= other->held[i];
	}
	if (came)
		model->fold = model->committed;
	return came;
}

void recall_check(struct model *model, uint64_t came)
{
	const struct fixture *fixture = model->fixture;

	assert_int_equal(fixture->cqe.value[1], came);
	assert_int_equal(fixture->cqe.value[0], model_pairs(model));
	assert_int_equal(fixture->cqe.value[2],
		fixture->space->part.seqs[(uint32_t)model->handle].blocks * 2 * fixture->space->arena->stride);
	model_check(model);
	recall_check_store(model);
}

struct model *recall_read_prompt(struct fixture *fixture, const struct kvg_policy *policy, double ratio,
	enum score_pattern pattern, bool protect)
{
	struct kvg_policy own = *policy;
	struct model *model;

	own.ratio = ratio;
	model = model_new(fixture, &own, pattern);
	if (protect)
		model_protect(model, 130, 190);
	model_prefill(model);
	return model;
}

uint64_t recall_predict(struct model *model, double ratio)
{
	uint32_t total = model->policy.prefix_tokens + model->policy.context_tokens;
	uint32_t read = model->committed < total ? model->committed : total;
	uint32_t chunk = model->policy.chunk_tokens ? model->policy.chunk_tokens : total;
	size_t size = (size_t)model->rows * model->max_tokens;
	struct model other = *model;
	uint64_t came;

	other.policy.ratio = ratio;
	other.prune_start = 0;
	other.held = calloc(size, sizeof(bool));
	assert_non_null(other.held);
	for (other.committed = 0; other.committed < read;) {
		uint32_t end = chunk < read - other.committed ? other.committed + chunk : read;

		for (uint32_t row = 0; row < other.rows; row++)
			memset(other.held + (size_t)row * other.max_tokens + other.committed, 1, end - other.committed);
		other.committed = end;
		(void)model_predict(&other, KVG_EVICT_PREFILL);
	}
	came = recall_take_over(model, &other);
	free(other.held);
	return came;
}
