/* What an operator asks for that takes until memory has come back: a lower budget, and a reclaim. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "daemon/base/log.h"
#include "daemon/session/admin_peer.h"
#include "proto/size.h"

struct settle {
	struct list node;        /* in the admin's list */
	struct admin_peer *peer; /* NULL: it has gone */
	uint64_t id;
	struct tenant *tenant;
	struct memory_wait wait;
	bool (*is_over)(struct settle *settle); /* whether there is nothing to wait for any more */
	void (*answer)(struct settle *settle);
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
		settle_end(settle);
	}
}

/* ---- a budget ---- */

static bool is_within(const struct quota_account *account)
{
	return quota_use(account) <= account->max && account->charged <= quota_high(account);
}

static bool budget_is_over(struct settle *settle)
{
	struct tenant *tenant = settle->tenant;
	const struct quota_account *account = tenant->quota.account;

	if (is_within(account))
		return true;
	reclaim_check(tenant);
	reclaim_excess(tenant);
	return quota_use(account) > account->max ? !reclaim_want(tenant, 0)
						 : !tenant->reclaiming && !account->unreturned;
}

/* What is above the new budget, by how much, and why. Empty when nothing is. */
static void explain(const struct tenant *tenant, char *text, size_t size)
{
	const struct quota_account *account = tenant->quota.account, *host = tenant->host.account;
	bool over = quota_use(account) > account->max;
	uint64_t above = over ? quota_use(account) - account->max : account->charged - quota_high(account);
	char more[KVG_SIZE_TEXT];
	int n = 0;

	text[0] = '\0';
	if (!is_within(account)) {
		n = snprintf(text, size, "%s above device.%s", kvg_size_format(above, more), over ? "max" : "high");
		reclaim_explain(tenant, account->max, text + n, size - (size_t)n);
	} else if (host->charged > host->max) {
		(void)snprintf(text, size, "%s above host.max; what is there stays until it is recalled or freed",
			kvg_size_format(host->charged - host->max, more));
	}
}

static void answer_budget(struct settle *settle)
{
	char standing[KVG_TEXT_SIZE];

	explain(settle->tenant, standing, sizeof(standing));
	if (standing[0])
		log_warning("%s: %s", settle->tenant->quota.name, standing);
	admin_send_budget(settle->peer, settle->id, settle->tenant, standing[0] ? standing : NULL);
}

void admin_settle_budget(struct admin_peer *peer, uint64_t id, struct tenant *tenant)
{
	struct settle *settle = settle_new(peer, id, tenant);

	if (!settle)
		return;
	settle->is_over = budget_is_over;
	settle->answer = answer_budget;
	reclaim_wake(tenant); /* a higher budget lets in who waits */
	go_on(settle);
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
