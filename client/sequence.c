#include "client/client.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint32_t load(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static uint32_t *appended_counter(struct kvg_client *client, uint32_t slot)
{
	return (uint32_t *)(void *)client->staging_map.base + slot;
}

int client_check_registered(struct kvg_client *client)
{
	if (client->broken)
		return client_check(client);
	return client->registered ? 0 : client_fail(client, -EINVAL, "no layout is registered on this connection");
}

struct sequence *client_sequence(struct kvg_client *client, uint64_t seq, int *ret_status)
{
	uint32_t slot = (uint32_t)seq, epoch = (uint32_t)(seq >> 32);
	int r = client_check_registered(client);

	if (r == 0 && (slot >= client->model.max_sequences || !epoch || client->sequences[slot].epoch != epoch))
		r = client_fail(client, -ENOENT,
			"sequence %llx: no such sequence on this connection, which has %u slots",
			(unsigned long long)seq, client->model.max_sequences);
	if (r == 0 && client_pending(client, seq, KVG_OP_EVICT))
		r = client_fail(
			client, -EBUSY, "sequence %u: an eviction is under way: kvg_evict_finish() first", slot);
	if (r < 0) {
		*ret_status = r;
		return NULL;
	}
	return &client->sequences[slot];
}

/* Operations after which a sequence of another generation is in use: what was appended is folded. */
static bool may_fold(uint8_t op)
{
	return op == KVG_OP_EVICT || op == KVG_OP_RECALL || op == KVG_OP_PUBLISH || op == KVG_OP_RESERVE ||
	       op == KVG_OP_RESTORE;
}

static bool moves_end(uint8_t op)
{
	return op == KVG_OP_COMMIT || op == KVG_OP_TRUNCATE || op == KVG_OP_CREATE || op == KVG_OP_ATTACH ||
	       op == KVG_OP_FORK || op == KVG_OP_FREE;
}

/* The counter that kernels add to base_len: tokens since the last eviction. Only what moves the end sets it. */
static bool set_appended(struct kvg_client *client, uint32_t slot, uint8_t op)
{
	struct sequence *now = &client->sequences[slot];

	if (!moves_end(op) && !(may_fold(op) && now->counted != now->generation))
		return false;
	now->counted = now->generation;
	__atomic_store_n(appended_counter(client, slot), now->committed_pos - now->fold_pos, __ATOMIC_RELAXED);
	/* Steps may be enqueued ahead of their commits, and move the device's counter themselves. */
	return !(op == KVG_OP_COMMIT && client->gpu && client->gpu->advances);
}

/* The sequence that an operation's counter belongs to: a fork's is the new one. */
static uint64_t counter_owner(uint8_t op, const struct kvg_cqe *cqe)
{
	return op == KVG_OP_FORK && cqe->status == 0 ? cqe->value[1] : cqe->seq;
}

static int move_counter(struct kvg_client *client, uint32_t slot)
{
	const struct sequence *now = &client->sequences[slot];

	return gpu_set_appended(client, slot, now->committed_pos - now->fold_pos);
}

int client_move_counter(struct kvg_client *client, const struct completion *completion)
{
	uint64_t seq = completion->cqe.seq, owner = counter_owner(completion->op, &completion->cqe);
	int r;

	if (!client->gpu || !completion->moved)
		return 0;
	r = move_counter(client, (uint32_t)owner);
	return r == 0 && owner != seq ? move_counter(client, (uint32_t)seq) : r;
}

/* Takes over what the table says about a slot. */
static void refresh_slot(struct kvg_client *client, uint32_t slot)
{
	const struct kvg_slot *shared = &client->table.slots[slot];
	const struct sequence now = {
		.epoch = load(&shared->epoch),
		.generation = load(&shared->generation),
		.fold_pos = load(&shared->fold_pos),
		.committed_pos = load(&shared->committed_pos),
		.reserved_pos = load(&shared->reserved_pos),
		.shared_pos = load(&shared->shared_pos),
		.flags = load(&shared->flags),
		.counted = client->sequences[slot].counted,
	};

	/* Not so for an empty slot, nor for what makes no sense: nothing may then be read or written. */
	if (!now.epoch || now.fold_pos > now.committed_pos || now.committed_pos > now.reserved_pos)
		client->sequences[slot] = (struct sequence){0};
	else
		client->sequences[slot] = now;
}

bool client_refresh(struct kvg_client *client, uint8_t op, const struct kvg_cqe *cqe)
{
	uint64_t owner = counter_owner(op, cqe);

	if (!client->registered || !cqe->seq || (uint32_t)cqe->seq >= client->model.max_sequences)
		return false;
	refresh_slot(client, (uint32_t)cqe->seq);
	if (!owner || (uint32_t)owner >= client->model.max_sequences)
		return false;
	if (owner != cqe->seq) {
		refresh_slot(client, (uint32_t)owner);
		(void)set_appended(client, (uint32_t)cqe->seq, op); /* the original's tokens are folded, too */
	}
	return cqe->status == 0 && set_appended(client, (uint32_t)owner, op);
}

struct kvg_sqe client_entry(uint8_t op, uint64_t seq, const struct sequence *sequence)
{
	return (struct kvg_sqe){.op = op, .seq = seq, .generation = sequence->generation};
}

int client_check_new(struct kvg_client *client, uint64_t seq, const char *how)
{
	int r = 0;

	if (client_sequence(client, seq, &r))
		return 0;
	return client_break(client, -EPROTO, "daemon: %s sequence %llx, which its table does not hold", how,
		(unsigned long long)seq);
}

int kvg_create(struct kvg_client *client, const struct kvg_policy *policy, uint64_t *ret_seq)
{
	CLIENT_TURN(client);
	struct kvg_sqe sqe = {.op = KVG_OP_CREATE, .create = *policy};
	uint64_t seq;
	int r = client_check_registered(client);

	if (r == 0)
		r = client_call(client, &sqe);
	if (r < 0)
		return r;
	seq = client->call.cqe.seq;
	r = client_check_new(client, seq, "created");
	if (r == 0)
		*ret_seq = seq;
	return r;
}

int kvg_reserve(struct kvg_client *client, uint64_t seq, uint32_t tokens)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	if (!sequence->flags && sequence->reserved_pos - sequence->committed_pos >= tokens)
		return 0;
	sqe = client_entry(KVG_OP_RESERVE, seq, sequence);
	sqe.reserve.tokens = tokens;
	return client_call_for_room(client, &sqe);
}

int kvg_commit(struct kvg_client *client, uint64_t seq, uint32_t tokens)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	if (tokens > sequence->reserved_pos - sequence->committed_pos)
		return client_fail(client, -EINVAL,
			"sequence %u: commit of %u tokens at position %u passes the reserved %u", (uint32_t)seq, tokens,
			sequence->committed_pos, sequence->reserved_pos);
	sqe = client_entry(KVG_OP_COMMIT, seq, sequence);
	sqe.commit.pos = sequence->committed_pos + tokens;
	return client_call(client, &sqe);
}

/* What client->call says about an eviction. */
static struct kvg_evict_result evicted(const struct kvg_client *client)
{
	const struct kvg_cqe *cqe = &client->call.cqe;

	return (struct kvg_evict_result){.pairs_held = cqe->value[0],
		.pairs_dropped = cqe->value[1],
		.bytes = cqe->value[2],
		.generation = cqe->generation};
}

int kvg_evict(struct kvg_client *client, uint64_t seq, uint32_t mode, struct kvg_evict_result *ret)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct kvg_evict_result result;
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	r = kvg_stage_wait(client);
	if (r < 0)
		return r;
	sqe = client_entry(KVG_OP_EVICT, seq, sequence);
	sqe.evict.mode = mode;
	r = client_call(client, &sqe);
	if (r < 0)
		return r;
	result = evicted(client);
	r = client_return_memory(client);
	if (r == 0 && ret)
		*ret = result;
	return r;
}

/* The stream stops until the eviction is done and its extents are mapped. */
static int evict_gated(struct kvg_client *client, const struct kvg_sqe *sqe, struct pending *pending)
{
	uint32_t slot = (uint32_t)sqe->seq;
	int r = client->gpu ? gpu_gate_prepare(client, slot) : 0;

	if (r == 0)
		r = client_submit_async(client, sqe, pending);
	if (r < 0) {
		free(pending);
		return r;
	}
	return client->gpu ? gpu_gate_close(client, slot, &pending->gate) : 0;
}

int kvg_evict_async(struct kvg_client *client, uint64_t seq, uint32_t mode)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct pending *pending;
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	pending = calloc(1, sizeof(*pending));
	if (!pending)
		return client_fail(client, -ENOMEM, "no memory for a call");
	sqe = client_entry(KVG_OP_EVICT, seq, sequence);
	sqe.evict.mode = mode;
	return evict_gated(client, &sqe, pending);
}

int kvg_evict_finish(struct kvg_client *client, uint64_t seq, struct kvg_evict_result *ret)
{
	CLIENT_TURN(client);
	int r = client_finish(client, seq, KVG_OP_EVICT, "kvg_evict_finish");

	if (r == 0 && ret)
		*ret = evicted(client);
	return r;
}

int kvg_reserve_async(struct kvg_client *client, uint64_t seq, uint32_t tokens)
{
	CLIENT_TURN(client);
	int r = client_check_registered(client);
	struct kvg_sqe sqe = {.op = KVG_OP_RESERVE, .seq = seq, .reserve.tokens = tokens};
	struct pending *pending;

	if (r == 0 && client_pending(client, seq, KVG_OP_RESERVE))
		r = client_fail(client, -EBUSY, "sequence %u: a reserve is under way: kvg_reserve_finish() first",
			(uint32_t)seq);
	/* It may follow an eviction that is under way. */
	if (r == 0 && !client_pending(client, seq, KVG_OP_EVICT))
		(void)client_sequence(client, seq, &r);
	if (r < 0)
		return r;
	pending = calloc(1, sizeof(*pending));
	if (!pending)
		return client_fail(client, -ENOMEM, "no memory for a call");
	r = client_submit_async(client, &sqe, pending);
	if (r < 0)
		free(pending);
	return r;
}

int kvg_reserve_finish(struct kvg_client *client, uint64_t seq)
{
	CLIENT_TURN(client);
	return client_finish(client, seq, KVG_OP_RESERVE, "kvg_reserve_finish");
}

int kvg_truncate(struct kvg_client *client, uint64_t seq, uint32_t pos)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	sqe = client_entry(KVG_OP_TRUNCATE, seq, sequence);
	sqe.truncate.pos = pos;
	return client_call(client, &sqe);
}

int kvg_protect(struct kvg_client *client, uint64_t seq, uint32_t begin, uint32_t end)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	sqe = client_entry(KVG_OP_PROTECT, seq, sequence);
	sqe.protect.begin = begin;
	sqe.protect.end = end;
	return client_call(client, &sqe);
}

int kvg_free(struct kvg_client *client, uint64_t seq)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	sqe = client_entry(KVG_OP_FREE, seq, sequence);
	r = client_call(client, &sqe);
	return r < 0 ? r : client_return_memory(client);
}

int kvg_query(struct kvg_client *client, uint64_t seq, struct kvg_sequence_info *ret)
{
	CLIENT_TURN(client);
	int r = 0;
	const struct sequence *sequence = client_sequence(client, seq, &r);
	const struct kvg_cqe *cqe = &client->call.cqe;
	struct kvg_sqe sqe;

	if (!sequence)
		return r;
	sqe = client_entry(KVG_OP_QUERY, seq, sequence);
	r = client_call(client, &sqe);
	if (r < 0)
		return r;
	*ret = (struct kvg_sequence_info){
		.generation = sequence->generation,
		.fold_pos = sequence->fold_pos,
		.committed_pos = sequence->committed_pos,
		.reserved_pos = sequence->reserved_pos,
		.pairs = cqe->value[0],
		.blocks = cqe->value[1],
		.bytes = cqe->value[1] * 2 * client->model.stride,
	};
	return 0;
}

int kvg_nop(struct kvg_client *client)
{
	CLIENT_TURN(client);
	const struct kvg_sqe sqe = {.op = KVG_OP_NOP};

	return client_call(client, &sqe);
}
