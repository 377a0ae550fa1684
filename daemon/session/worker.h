/*
 * worker.h - one connection of a worker: control messages, rings, and its space.
 *
 * A worker ends when it hangs up, when its process dies (pidfd), or when it breaks the
 * protocol (then it is told why). Whatever ends it, worker_kill() only notes it; the
 * server's poller takes it down in the same round of the loop, outside of any
 * callback of the space, and its memory goes back to the pool.
 */
#ifndef KVG_WORKER_H
#define KVG_WORKER_H

#include <sys/socket.h>
#include <sys/types.h>

#include "daemon/sequence/space.h"
#include "daemon/session/outbox.h"
#include "daemon/session/ring.h"
#include "daemon/session/server.h"

struct worker {
	struct list node;        /* in the server's list */
	struct list active_node; /* in `active` or `dead`, or alone */
	struct list unsent_node; /* in `unsent`, or alone */
	struct server *server;
	struct tenant *tenant;
	uint64_t id;
	struct ucred peer;
	char name[META_NAME];
	int fd, pidfd;
	struct loop_watch *watch, *pid_watch, *doorbell_watch;
	struct loop_timer *hello_timer; /* until it has said hello */
	struct outbox outbox;
	struct ring ring;
	struct request *requests; /* one for each ring entry */
	struct list free_requests;
	struct space *space; /* takes entries when `registered` */
	int staging_fd;
	uint8_t *staging;
	size_t staging_size, rows_offset;
	struct setup *setup; /* the request that the executor works on */
	uint64_t last_work_ns;
	uint64_t submitted, errors;
	unsigned entries;                /* under way, and counted by its tenant */
	uint64_t staged_rows;            /* in them */
	struct loop_timer *relief_timer; /* see pressure.h */
	uint32_t pressure, relieved;     /* the last number that it was asked with, and that it answered */
	uint32_t asked_event;            /* the last event that asked it to unmap when the timer was started */
	bool relief_pending;             /* the timer runs */
	bool ready;                      /* has said hello */
	bool registered;                 /* its space is open */
	bool dead;                       /* worker_kill() was called */
	bool closing;                    /* waits for its space or setup */
};

/* Takes an accepted connection. On failure the descriptor is closed. */
int worker_new(struct server *server, struct tenant *tenant, int fd, const struct ucred *peer);

/* Tells a peer why it may not connect to a tenant's socket. Does not take fd. */
void worker_refuse(int fd, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Ends a worker. reason NULL: it went by itself and is not told. */
void worker_kill(struct worker *worker, const char *reason);

/* The server's: takes a dead worker down. */
void worker_take_down(struct worker *worker);

/* The server's, at the end of a round: sends what was queued in it. */
void worker_flush(struct worker *worker);

/* Submits what the ring holds, up to a fair share. Returns whether there was anything. */
bool worker_poll(struct worker *worker);

/* Bytes outside of the budget: rings, tables, staging. */
uint64_t worker_overhead(const struct worker *worker);

/* Opens the rings at hello. */
int worker_open_rings(struct worker *worker, uint32_t entries);

/* Why a message could not be sent to it. */
const char *worker_send_failure(int status);

/* How a worker's space reports to it. */
extern const struct space_ops worker_space_ops;

/* Goes on with taking a dead worker down when its setup has ended. */
void worker_finish(struct worker *worker);

/* control.c: handles one message of the control socket. What it takes of fds it sets to -1. */
void worker_control(struct worker *worker, const uint8_t *data, size_t size, int *fds, unsigned fd_count);

#endif
