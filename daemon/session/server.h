/*
 * server.h - what all sessions share: the loop, the pool, the tenants, and the
 * list of workers. Also the poller that looks into the rings of those that are busy.
 */
#ifndef KVG_SERVER_H
#define KVG_SERVER_H

#include "daemon/session/budgets.h"
#include "daemon/tenant/reclaim.h"

struct server {
	struct loop *loop;
	struct executor *executor;
	struct pool *pool;
	struct host_tier *tier; /* pool->tier, owned here */
	struct tenant **tenants;
	size_t tenant_count;
	struct budgets *budgets; /* of the tenants, in the same order */
	struct list workers;
	struct list active; /* workers whose rings are polled; all others ring their doorbell */
	struct list unsent; /* workers with events to send at the end of this round */
	struct list dead;   /* workers to take down in this round */
	unsigned worker_count;
	uint64_t next_worker;
	uint64_t spin_ns;
	uint64_t wait_ns;     /* how long the daemon waits for what a worker's stream is to do first */
	uint64_t pressure_ns; /* how long a worker may hold memory back that is asked for, and a request wait for it */
	struct reclaim reclaim;
	uint64_t started_ns;
	const char *state_dir;
	const char *isolation; /* "shared" or "strict"; NULL for kinds without a device */
};

/* Adds the poller to the loop. */
int server_start(struct server *server);

/* Takes every worker down; the loop must run until worker_count is 0. */
void server_stop(struct server *server, const char *reason);

/* Takes the poller out of the loop; no worker is left. */
void server_end(struct server *server);

struct tenant *server_tenant(const struct server *server, const char *name);

#endif
