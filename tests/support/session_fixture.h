/*
 * session_fixture.h - the daemon's sessions without its process: a server with
 * two tenants and an admin, and peers that are the other ends of socket pairs,
 * driven from the test's own thread between rounds of the server's loop.
 */
#ifndef KVG_TEST_SESSION_FIXTURE_H
#define KVG_TEST_SESSION_FIXTURE_H

#include "control.pb-c.h"
#include "daemon/session/admin.h"
#include "daemon/session/worker.h"
#include "proto/frame.h"

#include "tests/support/runner.h"

#define SESSION_EXTENT  (64u << 10)
#define SESSION_BUDGET  (4u * SESSION_EXTENT) /* of each tenant, "a" and "b" */
#define SESSION_HOST    (1u << 20)            /* of the host tier, and of each tenant in it */
#define SESSION_ENTRIES 16u

struct session {
	struct server server;
	struct kind *kind;
	struct admin admin;
	char dir[40]; /* where budgets are kept */
	bool (*until)(struct session *session);
	void *user;
};

struct session_peer {
	struct session *session;
	int fd;
	struct kvg_frame frame; /* the last one received */
	Kvg__WorkerReply *reply;
	struct kvg_ring *ring;
	int ring_fd, doorbell, table_fd, staging_fd;
	uint32_t sq_tail, cq_head;
	uint64_t next_id;
};

struct session *session_new(void);

/* Takes everything down and checks that every byte came back. */
void session_free(struct session *session);

/* Runs the loop until that is so. */
void session_run(struct session *session, bool (*until)(struct session *session), void *user);

/* Until no worker is left. */
void session_wait_empty(struct session *session);

/* A connection to tenant 0 or 1, with this process's credentials. */
struct session_peer *session_connect(struct session *session, size_t tenant);
struct session_peer *session_connect_admin(struct session *session);

/* Closes the peer's end. */
void session_peer_free(struct session_peer *peer);

/* The worker at the other end; there is one for each peer, in order of connection. */
struct worker *session_worker(const struct session *session, unsigned index);

/* Waits for a packet; false at the end of the stream. Events are packets too. */
bool session_receive(struct session_peer *peer);

/* The same, unpacked into peer->reply. */
Kvg__WorkerReply *session_reply(struct session_peer *peer);

/* Sends a request and waits for the reply, which must have its id. */
Kvg__WorkerReply *session_call(
	struct session_peer *peer, Kvg__WorkerRequest *request, const int *fds, unsigned fd_count);
void session_send(struct session_peer *peer, Kvg__WorkerRequest *request, const int *fds, unsigned fd_count);

/* hello; then it has the ring. */
void session_hello(struct session_peer *peer);

/* Registers a layout of 2 layers, 2 heads of 8, 4 sequences of 1024 tokens, and 64 KiB of staging rows. */
void session_register(struct session_peer *peer);
void session_layout(Kvg__Layout *layout, Kvg__Group *group, Kvg__Group **groups);

/* Publishes an entry and rings; session_reap() waits for its completion. */
void session_submit(struct session_peer *peer, const struct kvg_sqe *sqe);
struct kvg_cqe session_reap(struct session_peer *peer);
const char *session_text(const struct session_peer *peer); /* of the completion last reaped */

#endif
