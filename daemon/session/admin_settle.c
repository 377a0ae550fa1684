/* What an operator asks for that takes until memory has come back: a budget, and a reclaim. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/log.h"
#include "daemon/session/admin_peer.h"
#include "daemon/session/host_room.h"
#include "proto/size.h"

struct settle {
	struct list node;        /* in the admin's list */
	struct admin_peer *peer; /* NULL: it has gone */
	uint64_t id;
	const struct server *server;
	struct tenant *tenant;
	struct memory_wait wait;
	bool (*is_over)(struct settle *settle); /* whether there is nothing to wait for any more */
	void (*answer)(struct settle *settle);
	struct budget_change change;
	bool changing; /* change is under way */
	uint64_t begun, host_before;
	uint32_t counts[RECLAIM_KINDS];
};

static void settle_end(struct settle *settle)
{
	if (settle->peer)
		settle->answer(settle);
	list_remove(&settle->node);
	reclaim_wait_cancel(&settle->wait);
	free(settle);
}

static void go_on(struct settle *settle)
{
	if (!settle->peer || settle->wait.expired || settle->is_over(settle) || !settle->tenant->reclaim)
		settle_end(settle);
	else
		reclaim_wait(settle->tenant, &settle->wait);
}

static void asked_again(struct memory_wait *wait)
{
	go_on(list_entry(wait, struct settle, wait));
}

static struct settle *settle_new(struct admin_peer *peer, uint64_t id, struct tenant *tenant)
{
	struct settle *settle = calloc(1, sizeof(*settle));

	if (!settle) {
		admin_refuse(peer, id, -ENOMEM, "out of memory");
		return NULL;
	}
	settle->peer = peer;
	settle->id = id;
	settle->server = peer->admin->server;
	settle->tenant = tenant;
	settle->wait.again = asked_again;
	list_init(&settle->wait.node);
	list_add_tail(&peer->admin->settles, &settle->node);
	return settle;
}

void admin_settle_forget(const struct admin_peer *peer)
{
	const struct list *settles = &peer->admin->settles;

	for (struct list *node = settles->next; node != settles; node = node->next) {
		struct settle *settle = list_entry(node, struct settle, node);

		if (settle->peer == peer)
			settle->peer = NULL;
	}
}

void admin_settle_deinit(struct admin *admin)
{
	while (!list_empty(&admin->settles)) {
		struct settle *settle = list_entry(admin->settles.next, struct settle, node);

		settle->peer = NULL;
		if (settle->changing)
			list_remove(&settle->node); /* it ends with the change */
		else
			settle_end(settle);
	}
}

/* ---- a budget ---- */

static bool is_within(const struct quota_account *account)
{
	return quota_use(account) <= account->max && account->charged <= quota_high(account);
}

static bool device_is_over(struct tenant *tenant)
{
	const struct quota_account *account = tenant->quota.account;

	if (is_within(account))
		return true;
	reclaim_check(tenant);
	reclaim_excess(tenant);
	return quota_use(account) > account->max ? !reclaim_want(tenant, 0)
						 : !tenant->reclaiming && !account->unreturned;
}

/* Both are begun at once. */
static bool budget_is_over(struct settle *settle)
{
	host_room_reclaim(settle->server, settle->tenant);
	return device_is_over(settle->tenant) && !settle->tenant->trims;
}

/* Which mark the account is above, by how much. Returns the length. */
static size_t explain_above(const struct quota *quota, char *text, size_t size)
{
	const struct quota_account *account = quota->account;
	bool over = quota_use(account) > account->max;
	uint64_t above = over ? quota_use(account) - account->max : account->charged - quota_high(account);
	char more[KVG_SIZE_TEXT];

	return (size_t)snprintf(
		text, size, "%s above %s.%s", kvg_size_format(above, more), quota->tier, over ? "max" : "high");
}

/* What is above the new budget, by how much, and why. Empty when nothing is. */
static void explain(const struct settle *settle, char *text, size_t size)
{
	const struct tenant *tenant = settle->tenant;
	char promised[KVG_SIZE_TEXT];
	size_t n = 0;

	text[0] = '\0';
	if (!is_within(tenant->quota.account)) {
		n = explain_above(&tenant->quota, text, size);
		if (tenant->quota.account->promised)
			n += (size_t)snprintf(text + n, size - n, "; promised %s",
				kvg_size_format(tenant->quota.account->promised, promised));
		reclaim_explain(tenant, tenant->quota.account->max, text + n, size - n);
		n = strlen(text);
	}
	if (is_within(tenant->host.account))
		return;
	n += (size_t)snprintf(text + n, size - n, "%s", n ? "; " : "");
	n += explain_above(&tenant->host, text + n, size - n);
	n += (size_t)snprintf(text + n, size - n, "; ");
	host_room_explain(settle->server, tenant, text + n, size - n);
}

static void answer_budget(struct settle *settle)
{
	char standing[KVG_TEXT_SIZE];

	explain(settle, standing, sizeof(standing));
	if (standing[0])
		log_warning("%s: %s", settle->tenant->quota.name, standing);
	admin_send_budget(settle->peer, settle->id, settle->tenant, standing[0] ? standing : NULL);
}

static void refuse_budget(struct settle *settle)
{
	admin_refuse(settle->peer, settle->id, settle->change.status, settle->change.text);
}

static void budget_changed(struct budget_change *change)
{
	struct settle *settle = list_entry(change, struct settle, change);

	settle->changing = false;
	if (change->status < 0) {
		settle->answer = refuse_budget;
		settle_end(settle);
		return;
	}
	reclaim_wake(settle->tenant); /* a higher budget lets in who waits */
	go_on(settle);
}

void admin_settle_budget(
	struct admin_peer *peer, uint64_t id, struct tenant *tenant, const struct budget_values *values)
{
	struct settle *settle = settle_new(peer, id, tenant);

	if (!settle)
		return;
	settle->is_over = budget_is_over;
	settle->answer = answer_budget;
	settle->change = (struct budget_change){.tenant = tenant->index, .reset = !values, .done = budget_changed};
	if (values)
		settle->change.values = *values;
	settle->changing = true;
	budgets_change(settle->server->budgets, &settle->change);
}

/* ---- reclaim ---- */

static bool reclaim_is_over(struct settle *settle)
{
	return !settle->tenant->reclaiming && !settle->tenant->quota.account->unreturned;
}

static void answer_reclaim(struct settle *settle)
{
	uint64_t host = settle->tenant->host.account->charged;
	Kvg__Reclaimed reclaimed = KVG__RECLAIMED__INIT;
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;

	reclaimed.device_bytes = settle->begun;
	reclaimed.host_bytes = host > settle->host_before ? host - settle->host_before : 0;
	reclaimed.contexts = settle->counts[RECLAIM_CONTEXT];
	reclaimed.sequences = settle->counts[RECLAIM_SEQUENCE];
	reply.body_case = KVG__ADMIN_REPLY__BODY_RECLAIMED;
	reply.reclaimed = &reclaimed;
	admin_answer(settle->peer, &reply, settle->id);
}

void admin_settle_reclaim(struct admin_peer *peer, uint64_t id, struct tenant *tenant, uint64_t bytes)
{
	struct settle *settle = settle_new(peer, id, tenant);

	if (!settle)
		return;
	settle->is_over = reclaim_is_over;
	settle->answer = answer_reclaim;
	settle->host_before = tenant->host.account->charged;
	settle->begun = reclaim_begin(tenant, bytes, settle->counts);
	go_on(settle);
}
