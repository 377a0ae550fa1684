/* A sequence between the device and the host: sent there, released, brought back, and what its evictions dropped. */
#include "client/client.h"

/* An entry of one sequence that may give extents back, which are in the pool when this returns. */
static int call_and_return(struct kvg_client *client, const struct kvg_sqe *sqe, struct kvg_cqe *ret)
{
	int r = client_call(client, sqe);

	if (r < 0)
		return r;
	*ret = client->call.cqe;
	return client_return_memory(client);
}

int kvg_offload(struct kvg_client *client, uint64_t seq, uint64_t *ret_bytes)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct kvg_sqe sqe;
	struct kvg_cqe cqe;

	if (!sequence)
		return r;
	sqe = client_entry(KVG_OP_OFFLOAD, seq, sequence);
	r = call_and_return(client, &sqe, &cqe);
	if (r == 0 && ret_bytes)
		*ret_bytes = cqe.value[0];
	return r;
}

int kvg_restore(struct kvg_client *client, uint64_t seq)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	sqe = client_entry(KVG_OP_RESTORE, seq, sequence);
	return client_call_for_room(client, &sqe);
}

int kvg_idle(struct kvg_client *client, uint64_t seq)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	sqe = client_entry(KVG_OP_IDLE, seq, sequence);
	return client_call(client, &sqe);
}

/* Everything staged is scored first, as before an eviction. */
static int recall(struct kvg_client *client, uint64_t seq, double ratio, uint32_t budget, uint32_t flags,
	struct kvg_recall_result *ret)
{
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	const struct kvg_cqe *cqe = &client->call.cqe;
	struct kvg_recall_result result;
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	r = kvg_stage_wait(client);
	if (r < 0)
		return r;
	sqe = client_entry(KVG_OP_RECALL, seq, sequence);
	sqe.recall.ratio = ratio;
	sqe.recall.budget = budget;
	sqe.recall.flags = flags;
	r = client_call_for_room(client, &sqe);
	if (r < 0)
		return r;
	result = (struct kvg_recall_result){.pairs_held = cqe->value[0],
		.pairs_recalled = cqe->value[1],
		.bytes = cqe->value[2],
		.generation = cqe->generation};
	r = client_return_memory(client);
	if (r == 0 && ret)
		*ret = result;
	return r;
}

int kvg_recall(struct kvg_client *client, uint64_t seq, double ratio, struct kvg_recall_result *ret)
{
	CLIENT_TURN(client);
	return recall(client, seq, ratio, 0, 0, ret);
}

int kvg_recall_budget(struct kvg_client *client, uint64_t seq, uint32_t budget, struct kvg_recall_result *ret)
{
	CLIENT_TURN(client);
	return recall(client, seq, 0.0, budget, KVG_RECALL_BUDGET, ret);
}
