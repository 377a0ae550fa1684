/* A recall: what the entry may ask for, and the steps that an eviction does not have. */
#include "daemon/sequence/recall.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/promise.h"
#include "daemon/sequence/retain.h"

/* ---- promise ---- */

/* Blocks in use when everything is folded and back. */
static uint64_t blocks_after(const struct request *request)
{
	const struct meta_seq *meta = request->sequence->meta;
	uint64_t nursery = (uint64_t)(meta->stripes - meta->stripe_first) * request->space->rows * KVG_RUN_BLOCKS;

	return meta->blocks - nursery + request->evict->new_blocks;
}

int recall_promise(struct request *request)
{
	struct recall *recall = request->evict->recall;
	struct meta_seq *meta = request->sequence->meta;
	uint64_t need = evict_future_need(
		request->sequence, request->evict->total + recall->chosen_count, blocks_after(request));
	int r;

	if (need <= meta->admitted)
		return 0;
	request->lack = promise_bytes(request->space, need - meta->admitted);
	r = promise_admit(request->space, need - meta->admitted, "the recall", request->text);
	if (r < 0)
		return r;
	recall->more = need - meta->admitted;
	meta->admitted = need;
	promise_update(request->sequence);
	return 0;
}

void recall_unpromise(struct request *request)
{
	struct recall *recall = request->evict->recall;

	if (!recall || !recall->more)
		return;
	request->sequence->meta->admitted -= recall->more;
	recall->more = 0;
	promise_update(request->sequence);
}

/* ---- APPEND ---- */

void recall_append(struct sequence *sequence, struct evict *evict, const uint32_t *ids)
{
	const struct space *space = sequence->space;
	struct recall *recall = evict->recall;

	for (uint32_t row = 0; row < space->rows; row++) {
		struct meta_row *meta = &meta_rows(&space->part, sequence->slot)[row];
		uint32_t length = meta->held_len + recall->count[row];
		uint32_t taken = (length + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS - meta->held_blocks;

		memcpy(meta_held(&space->part, sequence->slot, row) + meta->held_blocks, ids, taken * sizeof(uint32_t));
		ids += taken;
		meta->pending = taken;
		evict->record->rows[row] =
			(struct meta_redo_row){.held_len = length, .held_blocks = meta->held_blocks + taken};
	}
	recall->appended = true;
	sequence->meta->blocks += recall->extra;
	evict->new_blocks -= recall->extra;
	*evict->record->redo = (struct meta_redo){.seq = sequence->slot,
		.stripe_first = sequence->meta->stripe_first,
		.row_end = space->rows,
		.kind = META_REDO_RECALL};
	__atomic_store_n(&evict->record->redo->state, META_REDO_PLANNED, __ATOMIC_RELEASE);
}

/* ---- the operation ---- */

static bool check_amount(struct request *request)
{
	const struct kvg_sqe *sqe = &request->sqe;

	if (sqe->recall.flags & ~KVG_RECALL_BUDGET)
		request_fail(request, -EINVAL, "sequence %#" PRIx64 ": recall: flags %#x, known is %#x", sqe->seq,
			sqe->recall.flags, KVG_RECALL_BUDGET);
	else if (sqe->recall.flags && !sqe->recall.budget)
		request_fail(request, -EINVAL, "sequence %#" PRIx64 ": recall: a budget of 0 tokens", sqe->seq);
	else if (!sqe->recall.flags && !(sqe->recall.ratio > 0 && sqe->recall.ratio <= 1))
		request_fail(request, -EINVAL, "sequence %#" PRIx64 ": recall: ratio %g, must be above 0 and at most 1",
			sqe->seq, sqe->recall.ratio);
	else
		return true;
	return false;
}

static bool check_sequence(struct request *request)
{
	const struct meta_seq *meta = request->sequence->meta;

	if (!(meta->policy.flags & KVG_POLICY_RETAIN_HOST))
		request_fail(request, -EINVAL,
			"sequence %#" PRIx64 ": recall: its policy has flags %#x, without RETAIN_HOST (%#x)",
			request->sqe.seq, meta->policy.flags, KVG_POLICY_RETAIN_HOST);
	else if (!request->space->compute->recall)
		request_fail(request, -EOPNOTSUPP, "sequence %#" PRIx64 ": recall: not with this kind of memory",
			request->sqe.seq);
	else if (meta->residency != META_RESIDENT)
		request_fail(request, -EBUSY, "sequence %#" PRIx64 ": recall: it is offloaded", request->sqe.seq);
	else
		return evict_is_scored(request, "recall");
	return false;
}

static struct evict *make_evict(const struct request *request)
{
	const struct sequence *sequence = request->sequence;
	const struct kvg_sqe *sqe = &request->sqe;
	struct evict *evict = calloc(1, sizeof(*evict));
	struct recall *recall = calloc(1, sizeof(*recall));

	if (!evict || !recall) {
		free(evict);
		free(recall);
		return NULL;
	}
	evict->recall = recall;
	evict->context_end = sequence->meta->prune_start;
	recall->by_budget = sqe->recall.flags & KVG_RECALL_BUDGET;
	recall->budget = (uint64_t)sqe->recall.budget * request->space->rows;
	if (recall->by_budget || recall_set_ratio(sequence, recall, sqe->recall.ratio) >= 0)
		return evict;
	return evict_free(evict);
}

void op_recall(struct request *request)
{
	const struct sequence *sequence = request->sequence;

	request->cqe.status = 0; /* it may have waited for memory */
	if (!check_amount(request) || !check_sequence(request))
		return;
	if (!sequence->retain || !sequence->retain->count) {
		evict_report(request, 0);
		request_finish(request);
		return;
	}
	request->evict = make_evict(request);
	if (!request->evict) {
		request_fail(request, -ENOMEM, "sequence %#" PRIx64 ": recall: out of memory", request->sqe.seq);
		return;
	}
	evict_submit(request);
}
