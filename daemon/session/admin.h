/*
 * admin.h - the operator's connections: status, lists, audit, budgets. Only the
 * admin socket speaks this; a worker's socket does not know these messages.
 */
#ifndef KVG_ADMIN_H
#define KVG_ADMIN_H

#include <sys/socket.h>

#include "daemon/session/server.h"

struct admin {
	struct server *server;
	struct list peers;
};

void admin_init(struct admin *admin, struct server *server);
void admin_deinit(struct admin *admin); /* closes all connections */

/* A listener_accept: user is a struct admin. */
void admin_accept(void *user, int fd, const struct ucred *peer);

#endif
