/*
 * client.h - what the library's parts share: the connection, the entries in
 * flight and the copies of the sequences' states.
 *
 * A completion is taken from the ring only when the control events that it
 * counts on have been handled, so whoever sees one may use its result. When the
 * connection breaks, `broken` says how and every further call returns it.
 *
 * On the cuda kind a thread of the library works on the client too (gpu.h), so every public call that uses
 * more than constants takes its turn first: CLIENT_TURN(client).
 */
#ifndef KVG_CLIENT_H
#define KVG_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(default)
#include "client/kvgate.h"
#pragma GCC visibility pop

#include "client/arena.h"
#include "client/gpu.h"
#include "client/ring.h"
#include "client/staging.h"
#include "client/table.h"
#include "control.pb-c.h"
#include "proto/frame.h"

#define CLIENT_TEXT 512

enum entry_kind {
	ENTRY_FREE = 0,
	ENTRY_USER,   /* of kvg_submit() */
	ENTRY_CALL,   /* a call waits for it */
	ENTRY_STAGE,  /* reads a piece of the staging area */
	ENTRY_ACK,    /* acknowledges dropped extents */
	ENTRY_ASYNC,  /* of a call whose _finish() takes the completion */
	ENTRY_RELIEF, /* answers pressure */
};

/* What a STAGE entry's rows occupy until it is read. */
enum stage_area { AREA_NONE = 0, AREA_HOST, AREA_DEVICE };

/* One entry between its submission and its completion. On the wire its user_data is serial << 32 | index. */
struct entry {
	enum entry_kind kind;
	uint8_t op;
	uint32_t serial;
	uint32_t argument;  /* STAGE: piece; ACK: event; ASYNC: number of the pending call */
	uint8_t area;       /* STAGE: enum stage_area */
	uint64_t user_data; /* USER: the caller's */
	uint32_t next_free;
};

struct completion {
	struct kvg_cqe cqe;
	char text[KVG_TEXT_SIZE];
	uint8_t op; /* of its entry */
	bool moved; /* the sequence's counter of appended tokens has changed */
};

/* An asynchronous call between its submission and its _finish(). */
struct pending {
	struct pending *next;
	uint32_t number;
	uint8_t op;
	uint64_t seq;
	uint64_t gate; /* 0: none */
	bool done;
	struct completion completion;
};

/* A sequence as of its last completion. */
struct sequence {
	uint32_t epoch, generation, fold_pos, committed_pos, reserved_pos, shared_pos;
	uint32_t flags;   /* KVG_SLOT_* */
	uint32_t counted; /* the generation that the counter of appended tokens belongs to */
};

/* The layout in use, in the terms of one row. */
struct model {
	uint32_t layers, heads, query_heads, hidden_dim;
	uint32_t k_dim, v_dim, k_dtype, v_dtype;
	uint32_t max_sequences, max_tokens;
	uint64_t stride;
	uint32_t extent_ids, extent_blocks; /* ids and blocks of one extent: ids have a gap */
};

struct kvg_client {
	int socket;
	int broken; /* 0 or the negative errno that ended the connection */
	char reason[CLIENT_TEXT];
	char error[CLIENT_TEXT];
	char *tenant;
	uint32_t spin_us;

	/* Control: the reply waited for, and the events handled. */
	uint64_t request_id, awaited_id;
	Kvg__WorkerReply *reply;
	struct kvg_frame reply_frame;
	uint32_t events;     /* control events handled */
	uint32_t drop_event; /* the last one that dropped extents */
	uint32_t ack_sent;   /* acknowledged up to this event */
	uint32_t ack_done;   /* the bytes up to this event are back in the pool */
	bool ack_in_flight;
	uint32_t relieved; /* the last number of `pressure` that was answered */

	/* Entries in flight and completions for kvg_reap(). */
	struct ring ring;
	struct entry *entries; /* [ring.capacity] */
	uint32_t free_entry, serial;
	uint32_t user_count; /* submitted by the caller and not reaped */
	struct completion *ready;
	uint32_t ready_first, ready_count;
	struct completion call; /* of the call that waits */
	struct pending *pending;
	uint32_t last_pending;
	bool call_done;

	bool background; /* the library's thread has its turn: kvg_error() is the caller's */

	/* The layout, when one is registered. */
	bool registered;
	struct gpu *gpu; /* NULL on the host kind */
	struct kvg_layout layout;
	uint8_t gate_digest[KVG_KEY_SIZE]; /* SHA-256 of the gate's file; zeros without one */
	struct model model;
	struct arena arena;
	struct table table;
	struct staging_map staging_map;
	struct staging staging;
	struct sequence *sequences; /* [max_sequences] */
	uint32_t stage_count;       /* STAGE entries in flight */
	int stage_status;           /* first error of one since it was last reported */
	char stage_text[KVG_TEXT_SIZE];
};

/* ---- error.c ---- */

/* The caller's turn until the end of the block, which begins with an answer to pressure; for the quiet one it does
 * not: its calls may be made while a stream is captured. */
struct kvg_client *client_turn_take(struct kvg_client *client);
struct kvg_client *client_turn_quiet(struct kvg_client *client);
void client_turn_end(struct kvg_client **client);
#define CLIENT_TURN(client)                                                                                            \
	struct kvg_client *turn __attribute__((cleanup(client_turn_end), unused)) = client_turn_take(client)
#define CLIENT_QUIET_TURN(client)                                                                                      \
	struct kvg_client *turn __attribute__((cleanup(client_turn_end), unused)) = client_turn_quiet(client)

/* 0; -EOPNOTSUPP with the call's name when the memory is of the kind host. */
int client_check_cuda(struct kvg_client *client, const char *call);

/* Sets kvg_error() and returns status. */
int client_fail(struct kvg_client *client, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Ends the connection: this call and all later ones return status with this reason. */
int client_break(struct kvg_client *client, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* 0, or the status of the ended connection with kvg_error() set. */
int client_check(struct kvg_client *client);

/* ---- event.c ---- */

/* Handles all messages that have arrived, without waiting. 0 or the status of the ended connection. */
int client_receive(struct kvg_client *client);

/* Sends a request and waits for its reply, which is owned by client->reply and reply_frame until
 * client_reply_free(). An Error reply is the status of that error. */
int client_request(struct kvg_client *client, Kvg__WorkerRequest *request, const int *fds, unsigned fd_count);
void client_reply_free(struct kvg_client *client);

/* ---- call.c ---- */

int client_entries_new(struct kvg_client *client);

/* Takes completions and acknowledges dropped extents, without waiting. 0 or the status of the ended connection. */
int client_advance(struct kvg_client *client);

/* Waits until a completion or a message has come and handles it: callers loop on their condition. */
int client_wait(struct kvg_client *client);

/* Submits an entry when there is room; -EAGAIN when not. user_data and argument: see struct entry. */
int client_submit(struct kvg_client *client, enum entry_kind kind, const struct kvg_sqe *sqe, uint64_t user_data,
	uint32_t argument);

/* The same for STAGE: frees the piece of that area when it completes. */
int client_submit_stage(struct kvg_client *client, const struct kvg_sqe *sqe, enum stage_area area, uint32_t piece);

/* The asynchronous call of that operation on a sequence, or NULL. */
struct pending *client_pending(const struct kvg_client *client, uint64_t seq, uint8_t op);

/* Submits an entry whose completion stays in the pending call. Waits for room in the rings only. */
int client_submit_async(struct kvg_client *client, const struct kvg_sqe *sqe, struct pending *pending);

/* Waits for a pending call and takes it: its status, with kvg_error(). The completion is client->call. */
int client_finish(struct kvg_client *client, uint64_t seq, uint8_t op, const char *call);

/* Submits an entry and waits for its completion, which is client->call. An error's text is in kvg_error(). */
int client_call(struct kvg_client *client, const struct kvg_sqe *sqe);

/* The same for an entry that takes memory: what evictions freed may have been on its way back, for
 * kvg_evict_finish() does not wait for it; then once again. */
int client_call_for_room(struct kvg_client *client, const struct kvg_sqe *sqe);

/* Waits until the extents asked back so far are unmapped and their bytes in the pool. */
int client_return_memory(struct kvg_client *client);

/* ---- pressure.c ---- */

/* Answers a request for memory that is new, when what was dropped is acknowledged and the rings have room: 0, or the
 * status of the ended connection. Never waits. */
int client_relieve(struct kvg_client *client);

/* Whether there is one that can be answered now. */
bool client_is_pressed(const struct kvg_client *client);

/* Whether an acknowledgement can go: whoever wants to sleep looks at both first. */
bool client_owes(const struct kvg_client *client);

/* ---- keys.c ---- */

/* Keeps the digest of a gate's file (a sealed memfd) for the keys of contexts. 0 or a negative errno. */
int client_keep_gate(struct kvg_client *client, int fd);

/* ---- stage.c ---- */

/* Waits until a staging area has room for that many bytes. */
int client_stage_place(struct kvg_client *client, const struct staging *staging, uint64_t bytes, uint64_t *ret_offset);

/* Submits a STAGE entry, waiting for room in the rings only. The piece is freed with its completion, or now on
 * failure. */
int client_stage(struct kvg_client *client, const struct kvg_sqe *sqe, enum stage_area area, uint32_t piece);

/* ---- sequence.c ---- */

/* The state of a handle, which no asynchronous eviction is working on (-EBUSY); NULL with *ret_status and kvg_error()
 * when it names no sequence of this connection. */
struct sequence *client_sequence(struct kvg_client *client, uint64_t seq, int *ret_status);

/* An entry for a sequence with its current generation. */
struct kvg_sqe client_entry(uint8_t op, uint64_t seq, const struct sequence *sequence);

/* 0; -EPROTO, and the connection is broken, when the daemon's new sequence is not in its table. */
int client_check_new(struct kvg_client *client, uint64_t seq, const char *how);

/* Takes over what the tables say about the sequences of a completed operation. Whether its counter of appended tokens
 * has changed. */
bool client_refresh(struct kvg_client *client, uint8_t op, const struct kvg_cqe *cqe);

/* Brings the device's counter of a completed operation to what the host's is. */
int client_move_counter(struct kvg_client *client, const struct completion *completion);

/* 0; -EINVAL when there is no layout yet. */
int client_check_registered(struct kvg_client *client);

#endif
