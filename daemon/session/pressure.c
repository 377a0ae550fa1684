#include "daemon/session/pressure.h"

#include <stdio.h>

#include "daemon/base/log.h"
#include "daemon/session/host_room.h"
#include "proto/size.h"

static void set_number(const struct worker *worker, uint32_t number)
{
	__atomic_store_n(&worker->ring.shared->pressure, number, __ATOMIC_RELEASE);
}

static bool holds_back(const struct worker *worker)
{
	return worker->registered && space_unmapping(worker->space, NULL);
}

/* From now on the worker has pressure_ns for what events up to this one ask for. */
static void start_timer(struct worker *worker, uint32_t event)
{
	worker->asked_event = event;
	worker->relief_pending = true;
	loop_timer_set(worker->relief_timer, worker->server->pressure_ns);
}

/* What it was asked for before the time began is still there, or only what came later. */
static bool is_late(const struct worker *worker)
{
	uint32_t event;

	return space_unmapping(worker->space, &event) && (int32_t)(event - worker->asked_event) <= 0;
}

static void time_over(void *user)
{
	struct worker *worker = user;
	char reason[KVG_TEXT_SIZE], size[KVG_SIZE_TEXT];

	worker->relief_pending = false;
	if (worker->dead || !worker->tenant->pressed || !holds_back(worker))
		return;
	if (!is_late(worker)) {
		start_timer(worker, worker->space->dropped_event);
		return;
	}
	(void)snprintf(reason, sizeof(reason),
		"memory is short: it was asked to unmap %s and has not within %llu ms (pressure_ms)",
		kvg_size_format(space_unmapping(worker->space, NULL), size),
		(unsigned long long)(worker->server->pressure_ns / 1000000));
	worker_kill(worker, reason);
}

void pressure_dropped(struct worker *worker, uint32_t event)
{
	if (worker->dead || worker->relief_pending || !worker->tenant->pressed)
		return;
	if (!worker->relief_timer && loop_timer_new(worker->server->loop, time_over, worker, &worker->relief_timer) < 0)
		return;
	start_timer(worker, event);
}

bool pressure_relieved(struct worker *worker, uint32_t number)
{
	if (number == 0 || number > worker->pressure)
		return false;
	worker->relieved = number;
	return true;
}

void pressure_forget(struct worker *worker)
{
	worker->relief_timer = loop_timer_free(worker->relief_timer);
}

static void ask(struct worker *worker)
{
	if (worker->dead || !worker->registered)
		return;
	set_number(worker, ++worker->pressure);
	space_return_spare(worker->space);
	if (holds_back(worker))
		pressure_dropped(worker, worker->space->dropped_event);
}

static void leave_alone(struct worker *worker)
{
	if (worker->dead || !worker->registered)
		return;
	set_number(worker, 0);
	worker->relief_pending = false;
	if (worker->relief_timer)
		loop_timer_set(worker->relief_timer, 0);
}

static void set_pressure(void *user, struct tenant *tenant, bool on)
{
	const struct server *server = user;
	char charged[KVG_SIZE_TEXT];

	if (on)
		log_info("%s: memory is short, charged %s: its workers are asked for what they hold back",
			tenant->quota.name, kvg_size_format(tenant->quota.account->charged, charged));
	for (struct list *node = server->workers.next, *next; node != &server->workers; node = next) {
		struct worker *worker = list_entry(node, struct worker, node);

		next = node->next;
		if (worker->tenant != tenant)
			continue;
		if (on)
			ask(worker);
		else
			leave_alone(worker);
	}
}

static void host_excess(void *user, struct tenant *tenant)
{
	host_room_reclaim(user, tenant);
}

const struct reclaim_ops pressure_ops = {.pressure = set_pressure, .host_excess = host_excess};
