#include "daemon/session/server.h"

#include <string.h>

#include "daemon/session/worker.h"

static struct worker *of_active(struct list *node)
{
	return list_entry(node, struct worker, active_node);
}

/* A worker that has been quiet for a while rings again. */
static void let_rest(struct worker *worker)
{
	if (ring_set_wakeup(&worker->ring, true))
		(void)ring_set_wakeup(&worker->ring, false);
	else
		list_remove(&worker->active_node);
}

static bool poll_rings(void *user)
{
	struct server *server = user;
	struct list *node = server->active.next;
	bool worked = false;

	while (node != &server->active) {
		struct worker *worker = of_active(node);

		node = node->next;
		if (worker_poll(worker))
			worked = true;
		else if (!worker->dead && loop_now() - worker->last_work_ns > server->spin_ns)
			let_rest(worker);
	}
	while ((node = list_pop(&server->unsent)))
		worker_flush(list_entry(node, struct worker, unsent_node));
	while ((node = list_pop(&server->dead))) {
		worker_take_down(of_active(node));
		worked = true;
	}
	return worked;
}

static bool going_to_sleep(void *user, bool going)
{
	struct server *server = user;
	bool work = !list_empty(&server->dead) || !list_empty(&server->unsent);

	for (struct list *node = server->active.next; node != &server->active; node = node->next)
		work |= ring_set_wakeup(&of_active(node)->ring, going) && going;
	return work;
}

static const struct loop_poller_ops poller_ops = {.poll = poll_rings, .sleep = going_to_sleep};

int server_start(struct server *server)
{
	list_init(&server->workers);
	list_init(&server->active);
	list_init(&server->unsent);
	list_init(&server->dead);
	server->started_ns = loop_now();
	loop_set_spin(server->loop, server->spin_ns);
	executor_set_spin(server->executor, server->spin_ns);
	return loop_poller_add(server->loop, &poller_ops, server);
}

void server_stop(struct server *server, const char *reason)
{
	for (struct list *node = server->workers.next; node != &server->workers; node = node->next)
		worker_kill(list_entry(node, struct worker, node), reason);
}

void server_end(struct server *server)
{
	if (server->loop)
		loop_poller_remove(server->loop, &poller_ops, server);
}

struct tenant *server_tenant(const struct server *server, const char *name)
{
	for (size_t i = 0; i < server->tenant_count; i++)
		if (strcmp(server->tenants[i]->name, name) == 0)
			return server->tenants[i];
	return NULL;
}
