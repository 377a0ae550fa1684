#include "tests/unit/client/peer.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* Not cmocka's assert: this runs in the peer's thread too. */
#define check(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			(void)fprintf(stderr, "peer.c:%d: %s (%s)\n", __LINE__, #condition, strerror(errno));          \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

enum {
	SQ_OFFSET = 512,
	CQ_OFFSET = SQ_OFFSET + PEER_ENTRIES * sizeof(struct kvg_sqe),
	TEXT_OFFSET = CQ_OFFSET + PEER_ENTRIES * sizeof(struct kvg_cqe),
	RING_SIZE = TEXT_OFFSET + PEER_ENTRIES * KVG_TEXT_SIZE,
	SLOT_OFFSET = sizeof(struct kvg_table),
	BASE_LEN_OFFSET = SLOT_OFFSET + PEER_SEQUENCES * sizeof(struct kvg_slot),
	IDS_OFFSET = BASE_LEN_OFFSET + PEER_ROWS * PEER_SEQUENCES * 4,
	TABLE_SIZE = IDS_OFFSET + PEER_ROWS * PEER_SEQUENCES * PEER_ROW_CAP * 4,
};

static size_t rows_offset(const struct peer *peer)
{
	return peer->cuda ? PEER_CUDA_OFFSET : PEER_STAGING_OFFSET;
}

static size_t staging_size(const struct peer *peer)
{
	return rows_offset(peer) + PEER_STAGING_ROWS;
}

static void *map(int fd, size_t size)
{
	void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	check(address != MAP_FAILED);
	return address;
}

static void make_ring(struct peer *peer)
{
	peer->ring_fd = kvg_memfd_new("ring", RING_SIZE);
	peer->doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	check(peer->ring_fd >= 0 && peer->doorbell >= 0);
	peer->ring = map(peer->ring_fd, RING_SIZE);
	peer->ring->magic = KVG_RING_MAGIC;
	peer->ring->version = KVG_ABI_VERSION;
	peer->ring->sq_entries = peer->ring->cq_entries = PEER_ENTRIES;
	peer->ring->sq_offset = SQ_OFFSET;
	peer->ring->cq_offset = CQ_OFFSET;
	peer->ring->text_offset = TEXT_OFFSET;
	peer->ring->size = RING_SIZE;
	peer->ring->need_wakeup = 1;
}

static struct kvg_slot *slot_of(struct peer *peer, uint32_t slot)
{
	return (struct kvg_slot *)(void *)((uint8_t *)peer->table + SLOT_OFFSET) + slot;
}

static void make_table(struct peer *peer)
{
	uint32_t *ids;

	peer->table_fd = kvg_memfd_new("table", TABLE_SIZE);
	peer->staging_fd = kvg_memfd_new("staging", staging_size(peer));
	check(peer->table_fd >= 0 && peer->staging_fd >= 0);
	peer->table = map(peer->table_fd, TABLE_SIZE);
	peer->staging = map(peer->staging_fd, staging_size(peer));
	*peer->table = (struct kvg_table){.magic = KVG_TABLE_MAGIC,
		.version = KVG_ABI_VERSION,
		.layers = PEER_LAYERS,
		.heads = PEER_HEADS,
		.max_sequences = PEER_SEQUENCES,
		.row_cap = PEER_ROW_CAP,
		.slot_offset = SLOT_OFFSET,
		.base_len_offset = BASE_LEN_OFFSET,
		.ids_offset = IDS_OFFSET,
		.size = TABLE_SIZE};
	ids = (uint32_t *)(void *)((uint8_t *)peer->table + IDS_OFFSET);
	for (uint32_t layer = 0; layer < PEER_LAYERS; layer++)
		for (uint32_t slot = 0; slot < PEER_SEQUENCES; slot++)
			for (uint32_t n = 0; n < PEER_HEADS * PEER_ROW_CAP; n++) {
				uint32_t row = layer * PEER_HEADS + n / PEER_ROW_CAP;

				*ids++ = (slot * PEER_ROWS + row) * (PEER_EXTENT / PEER_STRIDE) + n % PEER_ROW_CAP;
			}
}

/* Device memory is host memory here. */
static void make_device(struct peer *peer)
{
	peer->sync = (struct kvg_sync *)(void *)(peer->staging + PEER_CUDA_SYNC);
	peer->device_table_fd = kvg_memfd_new("device table", PEER_CUDA_TABLE);
	check(peer->device_table_fd >= 0);
	if (!peer->device_rows)
		return;
	peer->device_rows_fd = kvg_memfd_new("device staging", peer->device_rows);
	check(peer->device_rows_fd >= 0);
	peer->device_staging = map(peer->device_rows_fd, peer->device_rows);
}

void peer_send(struct peer *peer, const Kvg__WorkerReply *reply, const int *fds, unsigned fd_count)
{
	uint8_t bytes[1024];
	size_t size = kvg__worker_reply__get_packed_size(reply);

	check(size <= sizeof(bytes));
	(void)kvg__worker_reply__pack(reply, bytes);
	/* The client may have closed; then its test is over. */
	(void)kvg_frame_send(peer->connection, bytes, size, fds, fd_count);
}

static void send_wake(struct peer *peer)
{
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	Kvg__Wake wake = KVG__WAKE__INIT;

	reply.body_case = KVG__WORKER_REPLY__BODY_WAKE;
	reply.wake = &wake;
	peer_send(peer, &reply, NULL, 0);
}

void peer_press(struct peer *peer, uint32_t pressure)
{
	(void)__atomic_exchange_n(&peer->ring->pressure, pressure, __ATOMIC_SEQ_CST);
	if (__atomic_exchange_n(&peer->ring->sleeping, 0, __ATOMIC_SEQ_CST))
		send_wake(peer);
}

static void send_extents(struct peer *peer, bool added, uint32_t *slots, unsigned count)
{
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	Kvg__ExtentsAdded add = KVG__EXTENTS_ADDED__INIT;
	Kvg__ExtentsDropped drop = KVG__EXTENTS_DROPPED__INIT;
	int fds[PEER_SLOTS];

	for (unsigned i = 0; i < count; i++)
		fds[i] = peer->extent_fds[slots[i]];
	add.slots = drop.slots = slots;
	add.n_slots = drop.n_slots = count;
	reply.body_case = added ? KVG__WORKER_REPLY__BODY_EXTENTS_ADDED : KVG__WORKER_REPLY__BODY_EXTENTS_DROPPED;
	if (added)
		reply.extents_added = &add;
	else
		reply.extents_dropped = &drop;
	peer->events++;
	if (!added)
		peer->drop_event = peer->events;
	peer_send(peer, &reply, fds, added ? count : 0);
	__atomic_store_n(&peer->ring->events, peer->events, __ATOMIC_RELEASE);
}

/* Extents of a sequence that are (not) mapped and should (not) be; first and step choose among its five. */
static void change_extents(struct peer *peer, uint32_t slot, bool added, bool rows, bool extra)
{
	uint32_t slots[PEER_ROWS + 1];
	unsigned count = 0;

	for (uint32_t r = 0; rows && r < PEER_ROWS; r++)
		slots[count++] = slot * PEER_ROWS + r;
	if (extra)
		slots[count++] = PEER_SEQUENCES * PEER_ROWS + slot;
	for (unsigned i = 0; i < count;) {
		if (peer->mapped[slots[i]] == added) {
			slots[i] = slots[--count];
			continue;
		}
		peer->mapped[slots[i]] = added;
		if (added) {
			peer->extent_fds[slots[i]] = kvg_memfd_new("extent", PEER_EXTENT);
			check(peer->extent_fds[slots[i]] >= 0);
		} else {
			(void)close(peer->extent_fds[slots[i]]);
			peer->extent_fds[slots[i]] = -1;
		}
		i++;
	}
	if (count)
		send_extents(peer, added, slots, count);
}

static void post(struct peer *peer, const struct kvg_cqe *cqe)
{
	struct kvg_cqe *cq = (struct kvg_cqe *)(void *)((uint8_t *)peer->ring + CQ_OFFSET);
	char *text = (char *)peer->ring + TEXT_OFFSET + (size_t)(peer->cq_tail % PEER_ENTRIES) * KVG_TEXT_SIZE;

	if (cqe->text)
		(void)snprintf(text, KVG_TEXT_SIZE, "peer: status %d", cqe->status);
	cq[peer->cq_tail % PEER_ENTRIES] = *cqe;
	(void)__atomic_exchange_n(&peer->ring->cq_tail, ++peer->cq_tail, __ATOMIC_SEQ_CST);
	if (__atomic_exchange_n(&peer->ring->sleeping, 0, __ATOMIC_SEQ_CST))
		send_wake(peer);
}

static void stage(struct peer *peer, const struct kvg_sqe *sqe)
{
	uint64_t row = sqe->stage.kind == KVG_STAGE_HIDDEN ? PEER_HIDDEN * 2 : PEER_HEADS * 4;
	uint64_t bytes = row * sqe->stage.rows, offset = sqe->stage.offset;
	uint32_t n = peer->stage_count++;
	const uint8_t *from = peer->staging + rows_offset(peer);

	if (sqe->stage.buffer >= 2)
		return;
	if (sqe->stage.buffer == KVG_BUFFER_DEVICE)
		from = peer->device_staging;
	check(n < 64);
	check(from == peer->device_staging || (offset <= PEER_STAGING_ROWS && bytes <= PEER_STAGING_ROWS - offset));
	peer->stage_offset[n] = offset;
	peer->stage_rows[n] = sqe->stage.rows;
	for (uint64_t i = 0; i < bytes; i++)
		peer->stage_sum[n] = (uint8_t)(peer->stage_sum[n] + from[offset + i]);
}

/* A new sequence that is as `state` says, but for its epoch. */
static void create(struct peer *peer, const struct kvg_slot *state, struct kvg_cqe *cqe)
{
	uint32_t slot = 0;

	while (slot < PEER_SEQUENCES && slot_of(peer, slot)->epoch)
		slot++;
	if (slot == PEER_SEQUENCES) {
		cqe->status = -EUSERS;
		return;
	}
	*slot_of(peer, slot) = *state;
	slot_of(peer, slot)->epoch = slot + 7;
	cqe->seq = (uint64_t)(slot + 7) << 32 | slot;
	cqe->value[0] = slot;
}

static void evict(struct peer *peer, uint32_t slot, struct kvg_cqe *cqe)
{
	struct kvg_slot *state = slot_of(peer, slot);
	uint32_t *base_len = (uint32_t *)(void *)((uint8_t *)peer->table + BASE_LEN_OFFSET);
	uint32_t kept = state->committed_pos / 2;

	for (uint32_t row = 0; row < PEER_ROWS; row++)
		base_len[(row / PEER_HEADS * PEER_SEQUENCES + slot) * PEER_HEADS + row % PEER_HEADS] = kept;
	cqe->value[0] = (uint64_t)kept * PEER_ROWS;
	cqe->value[1] = (uint64_t)(state->committed_pos - kept) * PEER_ROWS;
	cqe->value[2] = 4711;
	state->generation++;
	state->fold_pos = state->reserved_pos = state->committed_pos;
	change_extents(peer, slot, false, false, true);
}

static void recall(struct peer *peer, uint32_t slot, struct kvg_cqe *cqe)
{
	struct kvg_slot *state = slot_of(peer, slot);

	state->generation++;
	state->fold_pos = state->reserved_pos = state->committed_pos;
	cqe->value[0] = 30;
	cqe->value[1] = 12;
	cqe->value[2] = 4712;
	change_extents(peer, slot, false, false, true);
}

static void publish(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	struct kvg_slot *state = slot_of(peer, (uint32_t)sqe->seq);

	cqe->value[3] = peer->context_attached != 0;
	if (peer->context_attached && memcmp(peer->key, sqe->publish.key, KVG_KEY_SIZE) != 0) {
		cqe->status = -EEXIST;
		return;
	}
	memcpy(peer->key, sqe->publish.key, KVG_KEY_SIZE);
	peer->context_attached++;
	peer->context_tokens = state->shared_pos = state->committed_pos;
	cqe->value[0] = 7;
	cqe->value[1] = 4096;
	cqe->value[2] = peer->context_tokens;
	change_extents(peer, (uint32_t)sqe->seq, false, false, true);
}

static void find(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	if (!peer->context_attached || memcmp(peer->key, sqe->find.key, KVG_KEY_SIZE) != 0)
		return;
	cqe->value[0] = 7;
	cqe->value[1] = 4096;
	cqe->value[2] = peer->context_tokens;
	cqe->value[3] = peer->context_attached;
}

static void attach(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	uint32_t tokens = peer->context_tokens;
	const struct kvg_slot state = {.generation = 1,
		.fold_pos = tokens,
		.committed_pos = tokens,
		.reserved_pos = tokens,
		.shared_pos = tokens};

	if (sqe->seq != 7 || !peer->context_attached) {
		cqe->status = -ENOENT;
		return;
	}
	create(peer, &state, cqe);
	peer->context_attached += cqe->status == 0;
	cqe->value[2] = tokens;
	if (cqe->status == 0)
		change_extents(peer, (uint32_t)cqe->seq, true, true, false);
}

/* The completion is the parent's. */
static void copy(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	struct kvg_slot *parent = slot_of(peer, (uint32_t)sqe->seq), *child;
	struct kvg_cqe made = {0};

	create(peer, parent, &made);
	cqe->status = made.status;
	if (made.status < 0)
		return;
	parent->shared_pos = parent->committed_pos / 16 * 16;
	if (peer->fork_folds) {
		parent->fold_pos = parent->committed_pos;
		parent->generation++;
	}
	child = slot_of(peer, (uint32_t)made.seq);
	child->shared_pos = parent->shared_pos;
	child->fold_pos = parent->fold_pos;
	child->generation = parent->generation;
	cqe->value[0] = (uint32_t)made.seq;
	cqe->value[1] = made.seq;
}

/* Operations that name no sequence. Whether it was one. */
static bool operate_alone(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	static const struct kvg_slot fresh = {.generation = 1};

	switch (sqe->op) {
	case KVG_OP_NOP:
		return true;
	case KVG_OP_CREATE:
		create(peer, &fresh, cqe);
		return true;
	case KVG_OP_UNMAPPED:
		peer->acknowledged = sqe->unmapped.event;
		return true;
	case KVG_OP_RELIEF:
		peer->reliefs++;
		peer->acknowledged_at_relief = peer->acknowledged;
		return true;
	case KVG_OP_FIND:
		find(peer, sqe, cqe);
		return true;
	case KVG_OP_ATTACH:
		attach(peer, sqe, cqe);
		return true;
	default:
		return false;
	}
}

static void operate(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe)
{
	uint32_t slot = (uint32_t)sqe->seq;
	struct kvg_slot *state;

	if (operate_alone(peer, sqe, cqe))
		return;
	if (slot >= PEER_SEQUENCES || slot_of(peer, slot)->epoch != sqe->seq >> 32) {
		cqe->status = -ENOENT;
		return;
	}
	state = slot_of(peer, slot);
	cqe->seq = sqe->seq;
	switch (sqe->op) {
	case KVG_OP_RESERVE:
		if (state->committed_pos + sqe->reserve.tokens > PEER_ROW_CAP * KVG_BLOCK_TOKENS) {
			cqe->status = -ENOSPC;
			break;
		}
		state->reserved_pos = state->committed_pos + sqe->reserve.tokens;
		state->flags = 0;
		cqe->value[0] = state->reserved_pos;
		if (!peer->complete_before_events)
			change_extents(peer, slot, true, true, true);
		break;
	case KVG_OP_COMMIT:
		state->committed_pos = sqe->commit.pos;
		break;
	case KVG_OP_STAGE:
		stage(peer, sqe);
		break;
	case KVG_OP_EVICT:
		if (sqe->generation != state->generation)
			cqe->status = -ESTALE;
		else
			evict(peer, slot, cqe);
		break;
	case KVG_OP_TRUNCATE:
		if (sqe->truncate.pos < state->fold_pos)
			cqe->status = -EINVAL;
		else
			state->committed_pos = sqe->truncate.pos;
		break;
	case KVG_OP_FREE:
		*state = (struct kvg_slot){0};
		change_extents(peer, slot, false, true, true);
		break;
	case KVG_OP_OFFLOAD:
		state->flags = KVG_SLOT_OFFLOADED;
		cqe->value[0] = 4713;
		change_extents(peer, slot, false, true, true);
		break;
	case KVG_OP_RESTORE:
		state->flags = 0;
		change_extents(peer, slot, true, true, false);
		break;
	case KVG_OP_IDLE:
		state->flags = KVG_SLOT_IDLE;
		break;
	case KVG_OP_RECALL:
		recall(peer, slot, cqe);
		break;
	case KVG_OP_PUBLISH:
		publish(peer, sqe, cqe);
		break;
	case KVG_OP_FORK:
		copy(peer, sqe, cqe);
		break;
	case KVG_OP_QUERY:
		cqe->value[0] = state->committed_pos;
		cqe->value[1] = 3;
		break;
	default:
		break;
	}
	cqe->generation = state->generation;
}

static void serve_entry(struct peer *peer, const struct kvg_sqe *sqe)
{
	struct kvg_cqe cqe = {.user_data = sqe->user_data};

	check(pthread_mutex_lock(&peer->lock) == 0);
	peer->last[sqe->op] = *sqe;
	check(pthread_mutex_unlock(&peer->lock) == 0);
	operate(peer, sqe, &cqe);
	if (sqe->signal_value)
		__atomic_store_n(&peer->sync->slots[(uint32_t)sqe->seq], sqe->signal_value, __ATOMIC_RELEASE);
	cqe.events = peer->events;
	cqe.text = cqe.status < 0;
	if (peer->complete_before_events && sqe->op == KVG_OP_RESERVE) {
		cqe.events++;
		post(peer, &cqe);
		change_extents(peer, (uint32_t)sqe->seq, true, true, true);
		return;
	}
	if (peer->tamper && !peer->tamper(peer, sqe, &cqe))
		peer->held[peer->held_count++] = cqe;
	else
		post(peer, &cqe);
}

/* false: hang up. */
static bool serve_ring(struct peer *peer)
{
	const struct kvg_sqe *sq = (const struct kvg_sqe *)(const void *)((uint8_t *)peer->ring + SQ_OFFSET);
	uint64_t count;

	(void)!read(peer->doorbell, &count, sizeof(count));
	while (__atomic_load_n(&peer->ring->sq_tail, __ATOMIC_ACQUIRE) != peer->sq_head) {
		struct kvg_sqe sqe = sq[peer->sq_head++ % PEER_ENTRIES];

		if (peer->hang_up_on_nop && sqe.op == KVG_OP_NOP)
			return false;
		serve_entry(peer, &sqe);
	}
	return true;
}

/* Sends the reply, whose body is the caller's and is forgotten here. */
static bool answer(struct peer *peer, Kvg__WorkerReply *reply, const int *fds, unsigned fd_count)
{
	bool going = !peer->tamper_reply || peer->tamper_reply(peer, reply, &fd_count);

	if (going)
		peer_send(peer, reply, fds, fd_count);
	reply->body_case = KVG__WORKER_REPLY__BODY__NOT_SET;
	reply->welcome = NULL;
	return going;
}

static bool welcome(struct peer *peer, Kvg__WorkerReply *reply)
{
	Kvg__Welcome body = KVG__WELCOME__INIT;

	make_ring(peer);
	if (peer->tamper_ring)
		peer->tamper_ring(peer);
	body.abi = KVG_ABI_VERSION;
	body.tenant = (char *)(uintptr_t) "search";
	body.extent_size = PEER_EXTENT;
	body.daemon_version = (char *)(uintptr_t) "test";
	reply->body_case = KVG__WORKER_REPLY__BODY_WELCOME;
	reply->welcome = &body;
	return answer(peer, reply, (int[]){peer->ring_fd, peer->doorbell}, 2);
}

static bool registered(struct peer *peer, Kvg__WorkerReply *reply)
{
	Kvg__Registered body = KVG__REGISTERED__INIT;

	make_table(peer);
	if (peer->tamper_table)
		peer->tamper_table(peer);
	body.extent_size = PEER_EXTENT;
	body.stride = PEER_STRIDE;
	body.arena_slots = PEER_SLOTS;
	body.row_cap = PEER_ROW_CAP;
	body.staging_rows_offset = rows_offset(peer);
	body.staging_size = staging_size(peer);
	if (peer->cuda) {
		make_device(peer);
		body.has_sync_offset = body.has_device_table_size = 1;
		body.has_device_ids_offset = body.has_device_staging_size = 1;
		body.sync_offset = PEER_CUDA_SYNC;
		body.device_table_size = PEER_CUDA_TABLE;
		body.device_ids_offset = PEER_CUDA_IDS;
		body.device_staging_size = peer->device_rows;
	}
	reply->body_case = KVG__WORKER_REPLY__BODY_REGISTERED;
	reply->registered = &body;
	return answer(peer, reply,
		(int[]){peer->table_fd, peer->staging_fd, peer->device_table_fd, peer->device_rows_fd},
		!peer->cuda         ? 2
		: peer->device_rows ? 4
				    : 3);
}

static bool imported(struct peer *peer, Kvg__WorkerReply *reply)
{
	Kvg__Imported body = KVG__IMPORTED__INIT;

	body.id = 2 + peer->imports++;
	reply->body_case = KVG__WORKER_REPLY__BODY_IMPORTED;
	reply->imported = &body;
	return answer(peer, reply, NULL, 0);
}

static bool released(struct peer *peer, Kvg__WorkerReply *reply, uint32_t id)
{
	Kvg__Released body = KVG__RELEASED__INIT;

	peer->released = id;
	reply->body_case = KVG__WORKER_REPLY__BODY_RELEASED;
	reply->released = &body;
	return answer(peer, reply, NULL, 0);
}

static bool gate_loaded(struct peer *peer, Kvg__WorkerReply *reply, const struct kvg_frame *frame)
{
	Kvg__GateLoaded body = KVG__GATE_LOADED__INIT;

	check(frame->fd_count == 1);
	check(fcntl(frame->fds[0], F_GET_SEALS) == (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE));
	check(pread(frame->fds[0], peer->gate, sizeof(peer->gate), 0) > 0);
	reply->body_case = KVG__WORKER_REPLY__BODY_GATE_LOADED;
	reply->gate_loaded = &body;
	return answer(peer, reply, NULL, 0);
}

static bool serve_control(struct peer *peer)
{
	Kvg__WorkerReply reply = KVG__WORKER_REPLY__INIT;
	Kvg__WorkerRequest *request;
	struct kvg_frame frame;
	bool going = true;
	int r = kvg_frame_receive(peer->connection, KVG_FRAME_MAX, 1, 1, &frame);

	if (r <= 0)
		return r == -EAGAIN;
	request = kvg__worker_request__unpack(NULL, frame.size, frame.data);
	check(request);
	reply.has_id = 1;
	reply.id = request->id;
	if (request->body_case == KVG__WORKER_REQUEST__BODY_HELLO)
		going = welcome(peer, &reply);
	else if (request->body_case == KVG__WORKER_REQUEST__BODY_REGISTER_LAYOUT) {
		peer->asked_staging = request->register_layout->staging_bytes;
		peer->asked_device_staging = request->register_layout->device_staging_bytes;
		going = registered(peer, &reply);
	} else if (request->body_case == KVG__WORKER_REQUEST__BODY_IMPORT_BUFFER) {
		peer->import_offset = request->import_buffer->offset;
		peer->import_size = request->import_buffer->size;
		going = imported(peer, &reply);
	} else if (request->body_case == KVG__WORKER_REQUEST__BODY_IMPORT_EVENT)
		going = imported(peer, &reply);
	else if (request->body_case == KVG__WORKER_REQUEST__BODY_RELEASE)
		going = released(peer, &reply, request->release->id);
	else if (request->body_case == KVG__WORKER_REQUEST__BODY_LOAD_GATE)
		going = gate_loaded(peer, &reply, &frame);
	kvg__worker_request__free_unpacked(request, NULL);
	kvg_frame_deinit(&frame);
	return going;
}

static void release(struct peer *peer)
{
	uint64_t count;

	(void)!read(peer->kick, &count, sizeof(count));
	(void)serve_ring(peer);
	for (uint32_t i = 0; i < peer->held_count; i++)
		post(peer, &peer->held[i]);
	peer->held_count = 0;
}

static void *run(void *user)
{
	struct peer *peer = user;
	bool going = true;

	while (going) {
		struct pollfd fds[] = {{.fd = peer->stop, .events = POLLIN}, {.fd = peer->kick, .events = POLLIN},
			{.fd = peer->connection < 0 ? peer->listener : peer->connection, .events = POLLIN},
			{.fd = peer->doorbell, .events = POLLIN}};

		if (poll(fds, 4, -1) < 0)
			continue;
		if (fds[0].revents)
			break;
		if (fds[1].revents)
			release(peer);
		if (fds[2].revents && peer->connection < 0)
			peer->connection = accept4(peer->listener, NULL, NULL, SOCK_CLOEXEC);
		else if (fds[2].revents)
			going = serve_control(peer);
		if (going && fds[3].revents)
			going = serve_ring(peer);
	}
	if (peer->connection >= 0)
		(void)shutdown(peer->connection, SHUT_RDWR);
	return NULL;
}

struct peer *peer_new(void)
{
	struct peer *peer = calloc(1, sizeof(*peer));
	struct sockaddr_un address = {.sun_family = AF_UNIX};

	check(peer);
	(void)snprintf(peer->dir, sizeof(peer->dir), "/tmp/kvgate-peer-XXXXXX");
	check(mkdtemp(peer->dir));
	(void)snprintf(peer->path, sizeof(peer->path), "%s/socket", peer->dir);
	(void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", peer->path);
	peer->connection = peer->doorbell = peer->ring_fd = peer->table_fd = peer->staging_fd = -1;
	peer->device_table_fd = peer->device_rows_fd = -1;
	for (unsigned i = 0; i < PEER_SLOTS; i++)
		peer->extent_fds[i] = -1;
	check(pthread_mutex_init(&peer->lock, NULL) == 0);
	peer->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	peer->stop = eventfd(0, EFD_CLOEXEC);
	peer->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	check(peer->listener >= 0 && peer->stop >= 0 && peer->kick >= 0);
	check(bind(peer->listener, (const struct sockaddr *)&address, sizeof(address)) == 0);
	check(listen(peer->listener, 4) == 0);
	return peer;
}

struct kvg_sqe peer_last(struct peer *peer, unsigned op)
{
	struct kvg_sqe sqe;

	check(pthread_mutex_lock(&peer->lock) == 0);
	sqe = peer->last[op];
	check(pthread_mutex_unlock(&peer->lock) == 0);
	return sqe;
}

void peer_start(struct peer *peer)
{
	check(pthread_create(&peer->thread, NULL, run, peer) == 0);
}

void peer_stop(struct peer *peer)
{
	const uint64_t one = 1;

	check(write(peer->stop, &one, sizeof(one)) == sizeof(one));
	check(pthread_join(peer->thread, NULL) == 0);
}

void peer_release(struct peer *peer)
{
	const uint64_t one = 1;

	check(write(peer->kick, &one, sizeof(one)) == sizeof(one));
}

static void close_fd(int fd)
{
	if (fd >= 0)
		check(close(fd) == 0);
}

void peer_free(struct peer *peer)
{
	check(pthread_mutex_destroy(&peer->lock) == 0);
	if (peer->ring)
		check(munmap(peer->ring, RING_SIZE) == 0);
	if (peer->table)
		check(munmap(peer->table, TABLE_SIZE) == 0);
	if (peer->staging)
		check(munmap(peer->staging, staging_size(peer)) == 0);
	for (unsigned i = 0; i < PEER_SLOTS; i++)
		close_fd(peer->extent_fds[i]);
	close_fd(peer->connection);
	close_fd(peer->doorbell);
	close_fd(peer->ring_fd);
	close_fd(peer->table_fd);
	close_fd(peer->staging_fd);
	if (peer->device_staging)
		check(munmap(peer->device_staging, peer->device_rows) == 0);
	close_fd(peer->device_table_fd);
	close_fd(peer->device_rows_fd);
	close_fd(peer->listener);
	close_fd(peer->stop);
	close_fd(peer->kick);
	check(unlink(peer->path) == 0);
	check(rmdir(peer->dir) == 0);
	free(peer);
}

struct kvg_layout peer_layout(void)
{
	struct kvg_layout layout = {.model = "tiny",
		.hidden_dim = PEER_HIDDEN,
		.group_count = 1,
		.max_sequences = PEER_SEQUENCES,
		.max_tokens = PEER_ROW_CAP * KVG_BLOCK_TOKENS};

	layout.groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = PEER_LAYERS,
		.head_count = PEER_HEADS,
		.head_total = PEER_HEADS,
		.world = 1,
		.k_dim = PEER_DIM,
		.v_dim = PEER_DIM,
		.k_dtype = KVG_F32,
		.v_dtype = KVG_F32,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = 2};
	return layout;
}

struct kvg_client *peer_hello(struct peer *peer, uint32_t spin)
{
	struct kvg_client *client;
	char text[256] = "";

	peer_start(peer);
	if (kvg_connect(peer->path, "unit test", &client, text, sizeof(text)) < 0) {
		(void)fprintf(stderr, "%s\n", text);
		abort();
	}
	kvg_set_spin(client, spin);
	return client;
}

struct kvg_client *peer_connect(struct peer *peer, uint32_t spin)
{
	struct kvg_client *client = peer_hello(peer, spin);
	struct kvg_layout layout = peer_layout();

	if (kvg_register(client, &layout, PEER_STAGING_ROWS) < 0) {
		(void)fprintf(stderr, "%s\n", kvg_error(client));
		abort();
	}
	return client;
}

static int count_descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int count = 0;

	while (dir && readdir(dir))
		count++;
	if (dir)
		(void)closedir(dir);
	return count;
}

_Noreturn void peer_child(struct kvg_client *client, int closed)
{
	int before = count_descriptors();
	bool done = kvg_abandon(client) == NULL;

	_exit(done && count_descriptors() == before - closed ? 0 : 1);
}

bool peer_child_ended(pid_t child)
{
	int status;

	return waitpid(child, &status, 0) == child && status == 0;
}
