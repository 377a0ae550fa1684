#include "daemon/session/admin_peer.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/base/log.h"
#include "proto/size.h"
#include "daemon/metrics/audit.h"
#include "daemon/sequence/context.h"
#include "daemon/session/worker.h"
#include "daemon/tier/host.h"
#include "proto/frame.h"

#define MESSAGE_MAX   4096u
#define MESSAGE_SHARE 16u

/* A request for the status that waits for the device's answer. */
struct status_wait {
	struct list node;
	struct admin_peer *peer;
	uint64_t id;
};

static void reply_send(struct admin_peer *peer, Kvg__AdminReply *reply, uint64_t id)
{
	reply->id = id;
	if (outbox_send(&peer->outbox, &reply->base, NULL, 0) < 0)
		peer->failed = true;
}

static void reply_error(struct admin_peer *peer, uint64_t id, int status, const char *text)
{
	Kvg__Error error = KVG__ERROR__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	error.status = status;
	error.text = (char *)(uintptr_t)text;
	reply.body_case = KVG__ADMIN_REPLY__BODY_ERROR;
	reply.error = &error;
	reply_send(peer, &reply, id);
}

void admin_answer(struct admin_peer *peer, Kvg__AdminReply *reply, uint64_t id)
{
	reply_send(peer, reply, id);
	if (peer->failed)
		loop_watch_again(peer->watch);
}

void admin_refuse(struct admin_peer *peer, uint64_t id, int status, const char *text)
{
	reply_error(peer, id, status, text);
	if (peer->failed)
		loop_watch_again(peer->watch);
}

/* NULL, and the request is answered, when there is none of that name. */
static struct tenant *named_tenant(struct admin_peer *peer, uint64_t id, const char *name)
{
	struct tenant *tenant = server_tenant(peer->admin->server, name);
	char text[BUDGET_TEXT];

	if (!tenant) {
		(void)snprintf(text, sizeof(text), "tenant %s: there is no such tenant", name);
		reply_error(peer, id, -ENOENT, text);
	}
	return tenant;
}

static uint32_t count_sequences(const struct server *server)
{
	uint32_t count = 0;

	for (size_t i = 0; i < server->tenant_count; i++)
		count += server->tenants[i]->sequences;
	return count;
}

static uint32_t count_contexts(const struct server *server)
{
	uint32_t count = 0;

	for (size_t i = 0; i < server->tenant_count; i++)
		count += server->tenants[i]->contexts;
	return count;
}

static uint64_t count_reserved(const struct server *server)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < server->tenant_count; i++)
		bytes += reserve_bytes(&server->tenants[i]->reserve);
	return bytes;
}

static uint64_t count_overhead(const struct server *server)
{
	const struct pool *pool = server->pool;
	uint64_t bytes = meta_physical(pool->meta), populated = pool->tier ? host_tier_populated(pool->tier) : 0;

	if (populated > pool->host.account->charged) /* free frames, for whoever comes next */
		bytes += populated - pool->host.account->charged;

	for (const struct list *node = server->workers.next; node != &server->workers; node = node->next)
		bytes += worker_overhead(list_entry(node, struct worker, node));
	for (size_t i = 0; i < server->tenant_count; i++) {
		const struct list *arenas = &server->tenants[i]->arenas;

		for (const struct list *node = arenas->next; node != arenas; node = node->next)
			bytes += list_entry(node, struct arena, node)->pairs_bytes;
	}
	return bytes;
}

static void fill_device(Kvg__Status *status, const struct admin *admin)
{
	struct kind *kind = admin->server->pool->kind;
	const struct kind_device *about = kind->ops->about(kind);

	if (!about)
		return;
	status->device = (char *)(uintptr_t)about->name;
	status->driver = (char *)(uintptr_t)about->driver;
	status->has_mps = true;
	status->mps = about->mps;
	status->isolation = (char *)(uintptr_t)admin->server->isolation;
	status->has_device_total = true;
	status->device_total = about->total;
	status->has_device_used = admin->usage_status == 0;
	status->device_used = admin->usage;
}

static void send_status(struct admin_peer *peer, uint64_t id)
{
	const struct server *server = peer->admin->server;
	const struct pool *pool = server->pool;
	Kvg__Status status = KVG__STATUS__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	status.version = (char *)(uintptr_t)KVG_VERSION;
	status.pid = (uint64_t)getpid();
	status.uptime_ms = (loop_now() - server->started_ns) / 1000000;
	status.kind = (char *)(uintptr_t)pool->kind->ops->name;
	status.extent_size = pool->extent_size;
	status.pool_size = pool->quota.account->max;
	status.charged = pool->quota.account->charged;
	status.promised = pool->quota.account->promised;
	status.unreturned = pool->quota.account->unreturned;
	status.overhead = count_overhead(server);
	status.extents = pool->live;
	status.workers = server->worker_count;
	status.sequences = count_sequences(server);
	status.has_contexts = true;
	status.contexts = count_contexts(server);
	status.has_host_size = status.has_host_charged = status.has_reserved = true;
	status.host_size = pool->host.account->max;
	status.host_charged = pool->host.account->charged;
	status.reserved = count_reserved(server);
	status.state_dir = (char *)(uintptr_t)server->state_dir;
	fill_device(&status, peer->admin);
	reply.body_case = KVG__ADMIN_REPLY__BODY_STATUS;
	reply.status = &status;
	reply_send(peer, &reply, id);
}

static void usage_run(struct job *job)
{
	struct admin *admin = list_entry(job, struct admin, usage_job);
	struct kind *kind = admin->server->pool->kind;

	admin->usage_status = kind->ops->usage(kind, &admin->usage);
}

static void usage_done(struct job *job)
{
	struct admin *admin = list_entry(job, struct admin, usage_job);
	struct list *node;

	admin->usage_pending = false;
	while ((node = list_pop(&admin->waits))) {
		struct status_wait *wait = list_entry(node, struct status_wait, node);

		send_status(wait->peer, wait->id);
		if (wait->peer->failed)
			loop_watch_again(wait->peer->watch);
		free(wait);
	}
}

/* The device is asked on the executor; without one the answer comes at once. */
static void on_status(struct admin_peer *peer, uint64_t id)
{
	struct admin *admin = peer->admin;
	struct kind *kind = admin->server->pool->kind;
	struct status_wait *wait;

	if (!kind->ops->about(kind)) {
		send_status(peer, id);
		return;
	}
	wait = malloc(sizeof(*wait));
	if (!wait) {
		reply_error(peer, id, -ENOMEM, "status: out of memory");
		return;
	}
	*wait = (struct status_wait){.peer = peer, .id = id};
	list_add_tail(&admin->waits, &wait->node);
	if (admin->usage_pending)
		return;
	admin->usage_pending = true;
	admin->usage_job = (struct job){.run = usage_run, .done = usage_done};
	executor_submit(admin->server->executor, &admin->usage_job);
}

static void forget_waits(struct admin_peer *peer)
{
	struct list *node = peer->admin->waits.next;

	while (node != &peer->admin->waits) {
		struct status_wait *wait = list_entry(node, struct status_wait, node);

		node = node->next;
		if (wait->peer != peer)
			continue;
		list_remove(&wait->node);
		free(wait);
	}
}

static void fill_tenant(Kvg__Tenant *row, const struct tenant *tenant)
{
	const struct quota_account *account = tenant->quota.account, *host = tenant->host.account;

	kvg__tenant__init(row);
	row->name = tenant->name;
	row->socket = (char *)(uintptr_t)tenant->socket;
	row->device_max = account->max;
	row->charged = account->charged;
	row->promised = account->promised;
	row->unreturned = account->unreturned;
	row->workers = tenant->workers;
	row->sequences = tenant->sequences;
	row->has_contexts = true;
	row->contexts = tenant->contexts;
	row->refusals = account->refusals;
	row->high_water = account->high_water;
	row->has_device_min = row->has_reserved = row->has_pressure = true;
	row->has_host_min = row->has_host_max = row->has_host_charged = row->has_host_high_water = true;
	row->has_device_high = account->high != 0;
	row->has_host_high = host->high != 0;
	row->device_min = account->min;
	row->device_high = account->high;
	row->reserved = reserve_bytes(&tenant->reserve);
	row->pressure = tenant->pressed;
	row->host_min = host->min;
	row->host_high = host->high;
	row->host_max = host->max;
	row->host_charged = host->charged;
	row->host_high_water = host->high_water;
}

static void on_tenants(struct admin_peer *peer, uint64_t id)
{
	const struct server *server = peer->admin->server;
	Kvg__Tenant *rows = calloc(server->tenant_count, sizeof(*rows)),
		    **pointers = calloc(server->tenant_count, sizeof(*pointers));
	Kvg__TenantList list = KVG__TENANT_LIST__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	for (size_t i = 0; rows && pointers && i < server->tenant_count; i++) {
		fill_tenant(&rows[i], server->tenants[i]);
		pointers[list.n_tenants++] = &rows[i];
	}
	list.tenants = pointers;
	reply.body_case = KVG__ADMIN_REPLY__BODY_TENANTS;
	reply.tenants = &list;
	reply_send(peer, &reply, id);
	free(rows);
	free(pointers);
}

/* The arena's pairs are its tenant's; a worker counts those of its extents. */
static uint64_t pairs_per_extent(const struct arena *arena)
{
	return (uint64_t)arena->blocks_per_extent * KVG_BLOCK_TOKENS * sizeof(struct meta_place);
}

static void fill_worker(Kvg__Worker *row, const struct worker *worker)
{
	const struct space *space = worker->space;

	kvg__worker__init(row);
	row->id = worker->id;
	row->tenant = worker->tenant->name;
	row->name = (char *)(uintptr_t)worker->name;
	row->uid = worker->peer.uid;
	row->pid = (uint32_t)worker->peer.pid;
	row->model = (char *)(uintptr_t) "";
	row->overhead = worker_overhead(worker);
	row->submitted = worker->submitted;
	row->errors = worker->errors;
	if (!space)
		return;
	row->model = space->part.worker->layout.model;
	row->extents = space->blocks.extent_count;
	row->sequences = space->sequence_count;
	row->blocks = space->blocks.used_blocks;
	for (const struct list *node = space->dropped.next; node != &space->dropped; node = node->next)
		row->charged += space->arena->extent_size;
	row->unreturned = space_unmapping(space, NULL);
	row->charged += row->extents * (uint64_t)space->arena->extent_size;
	if (space->arena->pairs_size)
		row->overhead += row->extents * pairs_per_extent(space->arena);
}

static void on_workers(struct admin_peer *peer, uint64_t id)
{
	const struct server *server = peer->admin->server;
	Kvg__Worker *rows = calloc(server->worker_count + 1, sizeof(*rows));
	Kvg__Worker **pointers = calloc(server->worker_count + 1, sizeof(*pointers));
	Kvg__WorkerList list = KVG__WORKER_LIST__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	for (const struct list *node = server->workers.next; rows && pointers && node != &server->workers;
		node = node->next) {
		fill_worker(&rows[list.n_workers], list_entry(node, struct worker, node));
		pointers[list.n_workers] = &rows[list.n_workers];
		list.n_workers++;
	}
	list.workers = pointers;
	reply.body_case = KVG__ADMIN_REPLY__BODY_WORKERS;
	reply.workers = &list;
	reply_send(peer, &reply, id);
	free(rows);
	free(pointers);
}

static const char *state_of(const struct meta_seq *meta)
{
	static const char *const states[] = {[META_RESIDENT] = "active",
		[META_OFFLOADING] = "offloading",
		[META_OFFLOADED] = "offloaded",
		[META_RESTORING] = "restoring"};

	return meta->residency == META_RESIDENT && meta->idle ? "idle" : states[meta->residency];
}

static void fill_sequence(Kvg__Sequence *row, const struct worker *worker, const struct sequence *sequence)
{
	const struct meta_seq *meta = sequence->meta;

	kvg__sequence__init(row);
	row->worker = worker->id;
	row->seq = sequence_handle(sequence);
	row->tenant = worker->tenant->name;
	row->generation = meta->generation;
	row->committed_pos = meta->committed_pos;
	row->reserved_pos = meta->reserved_pos;
	row->pairs = sequence_pairs(sequence);
	row->blocks = meta->blocks;
	row->bytes = meta->blocks * 2 * sequence->space->arena->stride;
	row->promised = sequence->right * sequence->space->arena->extent_size;
	row->ratio = meta->policy.ratio;
	row->level = meta->policy.level;
	row->evictions = meta->evictions;
	row->state = (char *)(uintptr_t)state_of(meta);
	row->has_image = row->has_retained = row->has_context = true;
	row->image = meta->image_bytes;
	row->retained = meta->retained_bytes;
	row->context = sequence->context ? sequence->context->part.context->id : 0;
}

/* ---- contexts ---- */

static void fill_context(Kvg__Context *row, const struct context *context)
{
	static const char *const states[] = {[META_RESIDENT] = "device",
		[META_OFFLOADING] = "offloading",
		[META_OFFLOADED] = "host",
		[META_RESTORING] = "restoring"};
	const struct meta_context *meta = context->part.context;

	kvg__context__init(row);
	row->id = meta->id;
	row->tenant = context->tenant->name;
	row->key = (ProtobufCBinaryData){.len = KVG_KEY_SIZE, .data = context->part.context->key};
	row->model = context->part.context->layout.model;
	row->tokens = meta->tokens;
	row->pairs = context_pairs(context);
	row->bytes = context_bytes(context);
	row->attached = context->attached;
	row->workers = context->mapped;
	row->image = meta->image_bytes;
	row->state = (char *)(uintptr_t)states[meta->residency];
}

static void on_contexts(struct admin_peer *peer, uint64_t id)
{
	const struct server *server = peer->admin->server;
	uint32_t count = count_contexts(server);
	Kvg__Context *rows = calloc(count + 1, sizeof(*rows)), **pointers = calloc(count + 1, sizeof(*pointers));
	Kvg__ContextList list = KVG__CONTEXT_LIST__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	for (size_t i = 0; rows && pointers && i < server->tenant_count; i++)
		for (const struct context *at = context_first(server->tenants[i]); at; at = context_next(at)) {
			fill_context(&rows[list.n_contexts], at);
			pointers[list.n_contexts] = &rows[list.n_contexts];
			list.n_contexts++;
		}
	list.contexts = pointers;
	reply.body_case = KVG__ADMIN_REPLY__BODY_CONTEXTS;
	reply.contexts = &list;
	reply_send(peer, &reply, id);
	free(rows);
	free(pointers);
}

/* 0, or a negative errno with text: it goes, and nobody misses it. */
static int may_drop(const struct tenant *tenant, uint64_t id, const struct context *context, char *text, size_t size)
{
	if (!context) {
		(void)snprintf(text, size, "%s: there is no context %" PRIu64, tenant->quota.name, id);
		return -ENOENT;
	}
	if (!context->part.context->refs && !context->holds)
		return 0;
	(void)snprintf(text, size, "%s, context %" PRIu64 ": in use: %u sequences are attached to it%s",
		tenant->quota.name, id, context->attached,
		context->move        ? ", and it is on its way"
		: !context->attached ? ", others go on from it or wait for it"
				     : "");
	return -EBUSY;
}

static void on_context_drop(struct admin_peer *peer, uint64_t id, const Kvg__ContextDrop *drop)
{
	const struct tenant *tenant = named_tenant(peer, id, drop->tenant);
	struct context *context = tenant ? context_find_id(tenant, drop->context) : NULL;
	Kvg__ContextDropped dropped = KVG__CONTEXT_DROPPED__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;
	char text[BUDGET_TEXT];
	int r;

	if (!tenant)
		return;
	r = may_drop(tenant, drop->context, context, text, sizeof(text));
	if (r < 0) {
		reply_error(peer, id, r, text);
		return;
	}
	dropped.device_bytes = context_bytes(context);
	dropped.host_bytes = context->part.context->image_bytes;
	context_forget(context);
	log_info("%s: context %" PRIu64 " was dropped", tenant->quota.name, drop->context);
	reply.body_case = KVG__ADMIN_REPLY__BODY_CONTEXT_DROPPED;
	reply.context_dropped = &dropped;
	reply_send(peer, &reply, id);
}

/* ---- sequences ---- */

static size_t fill_sequences(Kvg__Sequence *rows, const struct server *server)
{
	size_t n = 0;

	for (const struct list *node = server->workers.next; node != &server->workers; node = node->next) {
		const struct worker *worker = list_entry(node, struct worker, node);
		const struct space *space = worker->space;

		for (uint32_t slot = 0; space && slot < space->part.worker->max_sequences; slot++)
			if (space->sequences[slot])
				fill_sequence(&rows[n++], worker, space->sequences[slot]);
	}
	return n;
}

static void on_sequences(struct admin_peer *peer, uint64_t id)
{
	const struct server *server = peer->admin->server;
	uint32_t count = count_sequences(server);
	Kvg__Sequence *rows = calloc(count + 1, sizeof(*rows)), **pointers = calloc(count + 1, sizeof(*pointers));
	Kvg__SequenceList list = KVG__SEQUENCE_LIST__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	if (rows && pointers)
		list.n_sequences = fill_sequences(rows, server);
	for (size_t i = 0; i < list.n_sequences; i++)
		pointers[i] = &rows[i];
	list.sequences = pointers;
	reply.body_case = KVG__ADMIN_REPLY__BODY_SEQUENCES;
	reply.sequences = &list;
	reply_send(peer, &reply, id);
	free(rows);
	free(pointers);
}

/* ---- audit ---- */

static uint64_t physical(void *user, uint32_t index)
{
	const struct pool *pool = user;
	const struct extent *extent = pool->extents[index];
	struct kind *kind = pool->kind;

	return extent && extent->fd >= 0 ? kind->ops->physical(kind, extent->fd, extent->meta->bytes) : 0;
}

static void send_audit(struct admin_peer *peer, uint64_t id, const struct audit *audit)
{
	size_t shown = audit->difference_count < AUDIT_DIFFERENCES ? audit->difference_count : AUDIT_DIFFERENCES;
	Kvg__AuditRow rows[META_MAX_TENANTS], *pointers[META_MAX_TENANTS];
	char *differences[AUDIT_DIFFERENCES];
	Kvg__Audit message = KVG__AUDIT__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	for (size_t i = 0; i < audit->row_count; i++) {
		struct audit_row *row = &audit->rows[i];

		kvg__audit_row__init(&rows[i]);
		rows[i].tenant = row->tenant;
		rows[i].extents = row->extents;
		rows[i].blocks = row->blocks;
		rows[i].extent_bytes = row->extent_bytes;
		rows[i].physical = row->physical;
		rows[i].charged = row->charged;
		rows[i].has_reserved = rows[i].has_host_counted = rows[i].has_host_charged = true;
		rows[i].reserved = row->reserved;
		rows[i].host_counted = row->host_counted;
		rows[i].host_charged = row->host_charged;
		pointers[i] = &rows[i];
	}
	for (size_t i = 0; i < shown; i++)
		differences[i] = audit->differences[i];
	message.clean = audit->difference_count == 0;
	message.rows = pointers;
	message.n_rows = audit->row_count;
	message.differences = differences;
	message.n_differences = shown;
	reply.body_case = KVG__ADMIN_REPLY__BODY_AUDIT;
	reply.audit = &message;
	reply_send(peer, &reply, id);
}

static void on_audit(struct admin_peer *peer, uint64_t id)
{
	struct pool *pool = peer->admin->server->pool;
	struct audit audit;
	int r = audit_run(pool->meta->fd, physical, pool, &audit);

	if (r < 0) {
		reply_error(peer, id, r, "audit: out of memory");
		return;
	}
	send_audit(peer, id, &audit);
	audit_deinit(&audit);
}

/* ---- budgets ---- */

static void fill_budget(Kvg__Budget *budget, const struct tenant *tenant)
{
	const struct quota_account *device = tenant->quota.account, *host = tenant->host.account;

	budget->tenant = tenant->name;
	budget->device_max = device->max;
	budget->charged = device->charged;
	budget->promised = device->promised;
	budget->has_device_min = budget->has_unreturned = true;
	budget->has_host_min = budget->has_host_max = budget->has_host_charged = true;
	budget->has_device_high = device->high != 0;
	budget->has_host_high = host->high != 0;
	budget->device_min = device->min;
	budget->device_high = device->high;
	budget->unreturned = device->unreturned;
	budget->host_min = host->min;
	budget->host_high = host->high;
	budget->host_max = host->max;
	budget->host_charged = host->charged;
}

void admin_send_budget(struct admin_peer *peer, uint64_t id, const struct tenant *tenant, const char *standing)
{
	Kvg__Budget budget = KVG__BUDGET__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	fill_budget(&budget, tenant);
	budget.has_live = true;
	budget.live = budgets_are_live(peer->admin->server->budgets, tenant->index);
	budget.standing = (char *)(uintptr_t)standing;
	reply.body_case = KVG__ADMIN_REPLY__BODY_BUDGET;
	reply.budget = &budget;
	reply_send(peer, &reply, id);
}

static void on_budget_get(struct admin_peer *peer, uint64_t id, const char *name)
{
	const struct tenant *tenant = named_tenant(peer, id, name);

	if (tenant)
		admin_send_budget(peer, id, tenant, NULL);
}

static void on_budget_set(struct admin_peer *peer, uint64_t id, const Kvg__BudgetSet *set)
{
	const struct budget_values values = {.bytes = {set->device_min, set->device_high, set->device_max,
						     set->host_min, set->host_high, set->host_max},
		.set = {set->has_device_min, set->has_device_high, set->has_device_max, set->has_host_min,
			set->has_host_high, set->has_host_max}};
	struct tenant *tenant = named_tenant(peer, id, set->tenant);

	if (tenant)
		admin_settle_budget(peer, id, tenant, &values);
}

static void on_budget_reset(struct admin_peer *peer, uint64_t id, const char *name)
{
	struct tenant *tenant = named_tenant(peer, id, name);

	if (tenant)
		admin_settle_budget(peer, id, tenant, NULL);
}

static void on_reclaim(struct admin_peer *peer, uint64_t id, const Kvg__Reclaim *reclaim)
{
	struct tenant *tenant = named_tenant(peer, id, reclaim->tenant);

	if (tenant)
		admin_settle_reclaim(peer, id, tenant, reclaim->has_bytes ? reclaim->bytes : UINT64_MAX);
}

/* ---- connections ---- */

static void dispatch(struct admin_peer *peer, const Kvg__AdminRequest *request)
{
	switch (request->body_case) {
	case KVG__ADMIN_REQUEST__BODY_STATUS:
		on_status(peer, request->id);
		break;
	case KVG__ADMIN_REQUEST__BODY_TENANTS:
		on_tenants(peer, request->id);
		break;
	case KVG__ADMIN_REQUEST__BODY_WORKERS:
		on_workers(peer, request->id);
		break;
	case KVG__ADMIN_REQUEST__BODY_SEQUENCES:
		on_sequences(peer, request->id);
		break;
	case KVG__ADMIN_REQUEST__BODY_AUDIT:
		on_audit(peer, request->id);
		break;
	case KVG__ADMIN_REQUEST__BODY_CONTEXTS:
		on_contexts(peer, request->id);
		break;
	case KVG__ADMIN_REQUEST__BODY_BUDGET_GET:
		on_budget_get(peer, request->id, request->budget_get->tenant);
		break;
	case KVG__ADMIN_REQUEST__BODY_BUDGET_SET:
		on_budget_set(peer, request->id, request->budget_set);
		break;
	case KVG__ADMIN_REQUEST__BODY_BUDGET_RESET:
		on_budget_reset(peer, request->id, request->budget_reset->tenant);
		break;
	case KVG__ADMIN_REQUEST__BODY_RECLAIM:
		on_reclaim(peer, request->id, request->reclaim);
		break;
	case KVG__ADMIN_REQUEST__BODY_CONTEXT_DROP:
		on_context_drop(peer, request->id, request->context_drop);
		break;
	case KVG__ADMIN_REQUEST__BODY_SEQUENCE_WORK:
		admin_work(peer, request->id, request->sequence_work);
		break;
	default:
		reply_error(peer, request->id, -EOPNOTSUPP, "admin: a message of unknown type");
	}
}

static void peer_free(struct admin_peer *peer)
{
	list_remove(&peer->node);
	forget_waits(peer);
	admin_work_forget(peer);
	admin_settle_forget(peer);
	(void)loop_watch_free(peer->watch);
	outbox_deinit(&peer->outbox);
	(void)close(peer->fd);
	free(peer);
}

/* One message. False when the connection is over. */
static bool receive(struct admin_peer *peer, const struct kvg_frame *frame)
{
	Kvg__AdminRequest *request = kvg__admin_request__unpack(NULL, frame->size, frame->data);

	if (!request) {
		reply_error(peer, 0, -EBADMSG, "admin: a message is truncated or malformed");
		return false;
	}
	dispatch(peer, request);
	kvg__admin_request__free_unpacked(request, NULL);
	return !peer->failed;
}

static void ready(void *user, uint32_t revents)
{
	struct admin_peer *peer = user;

	(void)revents;
	if (peer->failed) {
		peer_free(peer);
		return;
	}
	for (unsigned i = 0; i < MESSAGE_SHARE; i++) {
		struct kvg_frame frame;
		int r = kvg_frame_receive(peer->fd, MESSAGE_MAX, 0, 0, &frame);
		bool alive;

		if (r == -EAGAIN)
			return;
		alive = r > 0 && receive(peer, &frame);
		if (r > 0)
			kvg_frame_deinit(&frame);
		if (!alive) {
			peer_free(peer);
			return;
		}
	}
	loop_watch_again(peer->watch);
}

static void writable(void *user, uint32_t revents)
{
	struct admin_peer *peer = user;

	(void)revents;
	if (peer->failed || outbox_flush(&peer->outbox) < 0)
		peer_free(peer);
}

void admin_accept(void *user, int fd, const struct ucred *credentials)
{
	struct admin *admin = user;
	struct admin_peer *peer = calloc(1, sizeof(*peer));

	(void)credentials;
	if (!peer) {
		(void)close(fd);
		return;
	}
	peer->admin = admin;
	peer->fd = fd;
	outbox_init(&peer->outbox, fd);
	outbox_watch(&peer->outbox, admin->server->loop, writable, peer);
	list_add_tail(&admin->peers, &peer->node);
	if (loop_watch_new(admin->server->loop, fd, POLLIN, ready, peer, &peer->watch) < 0)
		peer_free(peer);
}

void admin_init(struct admin *admin, struct server *server)
{
	*admin = (struct admin){.server = server};
	list_init(&admin->peers);
	list_init(&admin->waits);
	list_init(&admin->works);
	list_init(&admin->settles);
}

void admin_deinit(struct admin *admin)
{
	struct list *node;

	while ((node = list_pop(&admin->peers)))
		peer_free(list_entry(node, struct admin_peer, node));
	admin_settle_deinit(admin);
}
