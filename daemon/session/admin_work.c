/*
 * What an operator has done to idle sequences: requests of the daemon's own (sequence/offload.h), which wait their turn
 * like the worker's. The operator's connection and the worker may end before they do.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "daemon/base/log.h"
#include "daemon/sequence/offload.h"
#include "daemon/session/admin_peer.h"
#include "daemon/session/worker.h"

struct work {
	struct list node;        /* in the admin's list */
	struct admin_peer *peer; /* NULL: it has gone */
	uint64_t id;
	uint64_t worker;
	Kvg__SequenceWork__What what;
	struct request request;
};

static struct worker *find_worker(const struct server *server, uint64_t id)
{
	for (const struct list *node = server->workers.next; node != &server->workers; node = node->next) {
		struct worker *worker = list_entry(node, struct worker, node);

		if (worker->id == id && worker->registered && !worker->dead)
			return worker;
	}
	return NULL;
}

static uint64_t bytes_moved(const struct work *work)
{
	const struct kvg_cqe *cqe = &work->request.cqe;

	return work->what == KVG__SEQUENCE_WORK__WHAT__RESTORE ? cqe->value[0] : cqe->value[1];
}

/* The sequence as it is now: it is there, since its operation has just succeeded. */
static void answer_done(const struct work *work)
{
	const struct space *space = work->request.space;
	const struct sequence *sequence = space_sequence(space, work->request.sqe.seq);
	Kvg__SequenceDone done = KVG__SEQUENCE_DONE__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	if (sequence) {
		const struct meta_seq *meta = sequence->meta;

		done.pairs = meta->pairs + (uint64_t)(meta->committed_pos - meta->fold_pos) * space->rows;
		done.bytes = meta->blocks * 2 * space->arena->stride;
	}
	done.moved = bytes_moved(work);
	reply.body_case = KVG__ADMIN_REPLY__BODY_SEQUENCE_DONE;
	reply.sequence_done = &done;
	admin_answer(work->peer, &reply, work->id);
}

static void completed(struct request *request)
{
	struct work *work = list_entry(request, struct work, request);
	char text[KVG_TEXT_SIZE + 32];

	list_remove(&work->node);
	if (work->peer && request->cqe.status >= 0) {
		answer_done(work);
	} else if (work->peer) {
		(void)snprintf(text, sizeof(text), "worker %" PRIu64 ", %s", work->worker, request->text);
		admin_refuse(work->peer, work->id, request->cqe.status, text);
	}
	request_deinit(request);
	free(work);
}

/* The entry that does it. An eviction counts pairs like one of decoding: the prompt's own is over, or its worker's. */
static bool fill_request(struct request *request, const Kvg__SequenceWork *work)
{
	struct kvg_sqe *sqe = &request->sqe;

	sqe->seq = work->seq;
	switch (work->what) {
	case KVG__SEQUENCE_WORK__WHAT__OFFLOAD:
		sqe->op = KVG_OP_OFFLOAD;
		return true;
	case KVG__SEQUENCE_WORK__WHAT__RESTORE:
		sqe->op = KVG_OP_RESTORE;
		return true;
	case KVG__SEQUENCE_WORK__WHAT__EVICT:
		sqe->op = KVG_OP_EVICT;
		sqe->evict.mode = KVG_EVICT_DECODE;
		request->share = work->has_ratio ? work->ratio : 0;
		return !work->has_ratio || (work->ratio > 0 && work->ratio <= 1);
	case KVG__SEQUENCE_WORK__WHAT__RECALL:
		sqe->op = KVG_OP_RECALL;
		sqe->recall.ratio = work->has_ratio ? work->ratio : 1;
		sqe->recall.budget = work->budget;
		sqe->recall.flags = work->has_budget ? KVG_RECALL_BUDGET : 0;
		return sqe->recall.ratio > 0 && sqe->recall.ratio <= 1;
	default:
		return false;
	}
}

/* 0, or a negative errno with text. */
static int check(const struct worker *worker, const Kvg__SequenceWork *work, char *text, size_t size)
{
	const struct sequence *sequence = worker ? space_sequence(worker->space, work->seq) : NULL;

	if (!worker)
		(void)snprintf(text, size, "worker %" PRIu64 ": there is no such worker with a layout", work->worker);
	else if (!sequence)
		(void)snprintf(text, size, "worker %" PRIu64 ", sequence %#" PRIx64 ": there is no such sequence",
			work->worker, work->seq);
	if (!sequence)
		return -ENOENT;
	if (sequence->meta->idle || sequence->meta->residency != META_RESIDENT)
		return 0;
	(void)snprintf(text, size, "worker %" PRIu64 ", sequence %#" PRIx64 ": its worker has not released it as idle",
		work->worker, work->seq);
	return -EBUSY;
}

void admin_work(struct admin_peer *peer, uint64_t id, const Kvg__SequenceWork *asked)
{
	const struct worker *worker = find_worker(peer->admin->server, asked->worker);
	char text[KVG_TEXT_SIZE];
	struct work *work;
	int r = check(worker, asked, text, sizeof(text));

	if (r < 0) {
		admin_refuse(peer, id, r, text);
		return;
	}
	work = calloc(1, sizeof(*work));
	if (!work || !fill_request(&work->request, asked)) {
		admin_refuse(peer, id, work ? -EINVAL : -ENOMEM,
			work ? "sequence: unknown work, or a ratio that is not above 0 and at most 1"
			     : "sequence: out of memory");
		free(work);
		return;
	}
	work->peer = peer;
	work->id = id;
	work->worker = asked->worker;
	work->what = asked->what;
	work->request.completed = completed;
	list_add_tail(&peer->admin->works, &work->node);
	offload_submit(worker->space, &work->request);
}

void admin_work_forget(const struct admin_peer *peer)
{
	const struct list *works = &peer->admin->works;

	for (struct list *node = works->next; node != works; node = node->next) {
		struct work *work = list_entry(node, struct work, node);

		if (work->peer == peer)
			work->peer = NULL;
	}
}
