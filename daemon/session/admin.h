/*
 * admin.h - the operator's connections: status, lists, audit, budgets, idle sequences. Only the
 * admin socket speaks this; a worker's socket does not know these messages.
 */
#ifndef KVG_ADMIN_H
#define KVG_ADMIN_H

#include <sys/socket.h>

#include "daemon/session/server.h"

struct admin {
	struct server *server;
	struct list peers;
	struct list works;    /* on sequences, under way; see admin_work.c */
	struct list settles;  /* budgets and reclaims that wait for memory; see admin_settle.c */
	struct list waits;    /* requests for the status, which wait for usage_job */
	struct job usage_job; /* asks the device for the bytes in use; on the executor when usage_pending */
	bool usage_pending;
	int usage_status;
	uint64_t usage;
};

void admin_init(struct admin *admin, struct server *server);

/* Closes all connections. It must outlive the executor, which may have its job. */
void admin_deinit(struct admin *admin);

/* A listener_accept: user is a struct admin. */
void admin_accept(void *user, int fd, const struct ucred *peer);

#endif
