/*
 * peer.h - the other end of libkvgate for its unit tests: a thread that listens
 * on a socket of its own, speaks the control protocol and serves the rings for
 * one connection and one tiny layout. It has memory of its own, and lies where a
 * test makes it.
 *
 * Layout: 2 layers, 2 heads of 8 (fp32), 4 sequences, rows of 8 blocks, so one
 * extent of 8 KiB for each row: row r (layer * 2 + head) of slot s is the extent
 * at arena slot 4 s + r. Besides them slot 16 + s is there for sequence s from
 * each reserve to the next eviction, which also folds all tokens and keeps half. Offloading drops the extents of a
 * sequence and restoring it brings them back. There is one context at most, of id 7: the first that was published.
 *
 * On request it answers like a daemon of the kind cuda, whose device is host memory too (test_gpu.c).
 */
#ifndef KVG_TEST_PEER_H
#define KVG_TEST_PEER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "client/kvgate.h"
#include "control.pb-c.h"
#include "proto/frame.h"

enum {
	PEER_LAYERS = 2,
	PEER_HEADS = 2,
	PEER_DIM = 8,
	PEER_HIDDEN = 32,
	PEER_SEQUENCES = 4,
	PEER_ROWS = PEER_LAYERS * PEER_HEADS,
	PEER_ROW_CAP = 8,
	PEER_STRIDE = 512,
	PEER_EXTENT = 8192,
	PEER_SLOTS = 20,
	PEER_ENTRIES = 8,
	PEER_STAGING_OFFSET = 64,
	PEER_STAGING_ROWS = 1024, /* bytes */
	/* The cuda kind: */
	PEER_CUDA_SYNC = 64,
	PEER_CUDA_OFFSET = 4096, /* of the staging memfd's rows */
	PEER_CUDA_IDS = 128,     /* of the ids in the device's table */
	PEER_CUDA_TABLE = 4096,
	PEER_CUDA_ROWS = 8192, /* bytes of device staging */
};

struct peer {
	char dir[32], path[64];
	int listener, stop, kick; /* stop and kick: eventfds */
	pthread_t thread;

	/* The peer's thread owns these; a test may use them before connecting and after peer_stop(). */
	int connection, doorbell, ring_fd, table_fd, staging_fd;
	struct kvg_ring *ring;
	struct kvg_table *table;
	uint8_t *staging;
	uint32_t sq_head, cq_tail, events, drop_event;
	bool mapped[PEER_SLOTS];
	int extent_fds[PEER_SLOTS];
	struct kvg_cqe held[PEER_ENTRIES];
	uint32_t held_count;

	/* What it has seen. */
	uint32_t acknowledged; /* last event of an UNMAPPED */
	uint32_t stage_count;
	uint64_t stage_offset[64];
	uint32_t stage_rows[64];
	uint8_t stage_sum[64];   /* of the rows' bytes */
	char gate[16];           /* first bytes of the gate file */
	pthread_mutex_t lock;    /* of: */
	struct kvg_sqe last[32]; /* by operation: its last entry, see peer_last() */
	uint32_t reliefs;
	uint32_t acknowledged_at_relief; /* `acknowledged` when the last RELIEF came */
	uint8_t key[KVG_KEY_SIZE];       /* of the context */
	uint32_t context_tokens, context_attached;

	/* Set before connecting; each may be NULL. */
	void (*tamper_ring)(struct peer *peer);
	void (*tamper_table)(struct peer *peer);
	/* Before a reply to a request goes out. false: hang up instead. */
	bool (*tamper_reply)(struct peer *peer, Kvg__WorkerReply *reply, unsigned *fd_count);
	/* Before a completion is posted. false: hold it until peer_release(). */
	bool fork_folds; /* what the original has committed is folded by a fork */
	bool (*tamper)(struct peer *peer, const struct kvg_sqe *sqe, struct kvg_cqe *cqe);
	bool complete_before_events; /* post the completion of a RESERVE, then send its extents */
	bool hang_up_on_nop;

	/* The kind cuda. */
	bool cuda;
	uint64_t device_rows; /* of device staging to have; 0: none */
	int device_table_fd, device_rows_fd;
	uint8_t *device_staging;
	struct kvg_sync *sync;
	uint64_t asked_staging, asked_device_staging;
	uint64_t import_offset, import_size;
	uint32_t imports, released;
};

/* Starts listening in a fresh folder. */
struct peer *peer_new(void);
void peer_start(struct peer *peer);

/* The last entry of an operation; zeros when there was none. */
struct kvg_sqe peer_last(struct peer *peer, unsigned op);

/* Ends the thread (which hangs up); what it has seen can be looked at until peer_free(). */
void peer_stop(struct peer *peer);
void peer_free(struct peer *peer);

/* Posts the completions held, of everything submitted before. */
void peer_release(struct peer *peer);

/* Asks for memory, with that number. */
void peer_press(struct peer *peer, uint32_t pressure);

/* Sends a message outside of the protocol's order. */
void peer_send(struct peer *peer, const Kvg__WorkerReply *reply, const int *fds, unsigned fd_count);

/* The layout above. */
struct kvg_layout peer_layout(void);

/* Starts the peer and connects, without a layout. */
struct kvg_client *peer_hello(struct peer *peer, uint32_t spin);

/* The same, and registers; spin in microseconds. */
struct kvg_client *peer_connect(struct peer *peer, uint32_t spin);

/* In a forked child: abandons the client and ends, with status 0 when that closed so many descriptors. */
_Noreturn void peer_child(struct kvg_client *client, int closed);

/* Whether that child ended with status 0. */
bool peer_child_ended(pid_t child);

#endif
