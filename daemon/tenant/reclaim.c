#include "daemon/tenant/reclaim.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>

#include "proto/size.h"

#define TRIES 8u /* of what the host has no room for, at a time */

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t more_than(uint64_t a, uint64_t b)
{
	return a > b ? a - b : 0;
}

/* ---- what is on offer ---- */

void reclaim_offer(struct tenant *tenant, enum reclaim_kind kind, struct reclaimable *reclaimable)
{
	assert(list_empty(&reclaimable->node));
	reclaimable->tenant = tenant;
	reclaimable->kind = kind;
	list_add_tail(&tenant->offers[kind], &reclaimable->node);
	tenant->offered += reclaimable->bytes;
	tenant->offer_count++;
	reclaim_check(tenant);
	if (tenant->reclaim)
		tenant->reclaim->woken = true;
}

void reclaim_withdraw(struct reclaimable *reclaimable)
{
	if (list_empty(&reclaimable->node))
		return;
	list_remove(&reclaimable->node);
	reclaimable->tenant->offered -= reclaimable->bytes;
	reclaimable->tenant->offer_count--;
}

void reclaim_progress(struct tenant *tenant, uint64_t bytes)
{
	assert(tenant->reclaiming > 0 && tenant->reclaiming_bytes >= bytes);
	tenant->reclaiming--;
	tenant->reclaiming_bytes -= bytes;
	if (tenant->reclaim)
		tenant->reclaim->woken = true;
}

/* What has been begun by one call. */
struct begun {
	uint64_t bytes, limit; /* limit: of bytes */
	uint32_t *counts;      /* by kind, or NULL */
};

/* The oldest of a kind that the limit leaves room for, or NULL. */
static struct reclaimable *oldest_within(const struct tenant *tenant, enum reclaim_kind kind, const struct begun *begun)
{
	const struct list *offers = &tenant->offers[kind];

	for (struct list *node = offers->next; node != offers; node = node->next) {
		struct reclaimable *reclaimable = list_entry(node, struct reclaimable, node);

		if (reclaimable->bytes <= begun->limit - begun->bytes)
			return reclaimable;
	}
	return NULL;
}

/* One that the host has no room for lets others go first. */
static bool begin_one(struct reclaimable *oldest, struct begun *begun)
{
	struct tenant *tenant = oldest->tenant;
	enum reclaim_kind kind = oldest->kind;
	uint64_t bytes = oldest->bytes;
	int r;

	tenant->reclaiming++;
	tenant->reclaiming_bytes += bytes;
	r = oldest->begin(oldest);
	tenant->no_room = r == -ENOSPC;
	if (r >= 0) {
		begun->bytes += bytes;
		if (begun->counts)
			begun->counts[kind]++;
		return true;
	}
	tenant->reclaiming--;
	tenant->reclaiming_bytes -= bytes;
	list_remove(&oldest->node);
	list_add_tail(&tenant->offers[kind], &oldest->node);
	return false;
}

/* What begins may have no bytes of its own, and bring others on offer that it kept. */
static void begin_kind(const struct tenant *tenant, enum reclaim_kind kind, uint64_t bytes, struct begun *begun)
{
	const struct reclaimable *refused = NULL;
	struct reclaimable *oldest;
	unsigned tries = TRIES;

	while (begun->bytes < bytes && tries) {
		oldest = oldest_within(tenant, kind, begun);
		if (!oldest || oldest == refused)
			break;
		if (begin_one(oldest, begun))
			continue;
		tries--;
		if (!refused)
			refused = oldest;
	}
}

static uint64_t begin_within(const struct tenant *tenant, uint64_t bytes, uint64_t limit, uint32_t *counts)
{
	struct begun begun = {.limit = limit, .counts = counts};

	for (enum reclaim_kind kind = 0; kind < RECLAIM_KINDS; kind++)
		begin_kind(tenant, kind, bytes, &begun);
	return begun.bytes;
}

uint64_t reclaim_begin(const struct tenant *tenant, uint64_t bytes, uint32_t counts[RECLAIM_KINDS])
{
	return begin_within(tenant, bytes, UINT64_MAX, counts);
}

/* ---- pressure ---- */

static bool above_high(const struct tenant *tenant)
{
	return tenant->quota.account->charged > quota_high(tenant->quota.account);
}

static bool waits_for(const struct reclaim *reclaim, const struct tenant *tenant)
{
	for (const struct list *node = reclaim->waits.next; node != &reclaim->waits; node = node->next) {
		const struct tenant *who = list_entry(node, struct memory_wait, node)->tenant;

		if (who == tenant || !quota_lack(&who->quota, 1))
			return true;
	}
	return false;
}

/* The poller asks its workers, outside of whatever is going on now. */
static void press(struct tenant *tenant)
{
	if (!list_empty(&tenant->pressed_node))
		return;
	list_add_tail(&tenant->reclaim->pressed, &tenant->pressed_node);
	tenant->reclaim->woken = true;
}

/* Bytes of the tenant that are on their way back already. */
static uint64_t coming_bytes(const struct tenant *tenant)
{
	return tenant->reclaiming_bytes + tenant->quota.account->unreturned;
}

void reclaim_excess(const struct tenant *tenant)
{
	uint64_t coming = coming_bytes(tenant);
	uint64_t excess = more_than(tenant->quota.account->charged, quota_high(tenant->quota.account));

	if (excess > coming)
		(void)reclaim_begin(tenant, excess - coming, NULL);
}

static void set_pressed(const struct reclaim *reclaim, struct tenant *tenant, bool on)
{
	if (tenant->pressed == on)
		return;
	tenant->pressed = on;
	reclaim->ops->pressure(reclaim->user, tenant, on);
}

/* Those that are neither above high nor waited for any more are left alone. */
static void settle_pressure(struct reclaim *reclaim)
{
	struct list *node = reclaim->pressed.next;

	while (node != &reclaim->pressed) {
		struct tenant *tenant = list_entry(node, struct tenant, pressed_node);
		bool high = above_high(tenant);

		node = node->next;
		if (high)
			reclaim_excess(tenant);
		else if (!tenant->quota.account->unreturned || !waits_for(reclaim, tenant))
			list_remove(&tenant->pressed_node);
		set_pressed(reclaim, tenant, !list_empty(&tenant->pressed_node));
	}
}

void reclaim_check(struct tenant *tenant)
{
	if (tenant->reclaim && above_high(tenant))
		press(tenant);
}

void reclaim_host_check(struct tenant *tenant)
{
	if (!tenant->reclaim || tenant->host.account->charged <= quota_high(tenant->host.account))
		return;
	tenant->host_grown = true;
	tenant->reclaim->woken = true;
}

static void settle_host(const struct reclaim *reclaim)
{
	for (size_t i = 0; i < *reclaim->tenant_count; i++) {
		struct tenant *tenant = reclaim->tenants[i];

		if (!tenant->host_grown)
			continue;
		tenant->host_grown = false;
		if (reclaim->ops->host_excess)
			reclaim->ops->host_excess(reclaim->user, tenant);
	}
}

/* ---- who wants memory ---- */

static bool is_coming(const struct tenant *tenant)
{
	return tenant->reclaiming || tenant->ending || tenant->quota.account->unreturned || tenant->pool->destroying;
}

/* From one tenant, as much as lacks beyond what is coming. Returns whether memory of it is on its way. */
static bool take_from(struct tenant *tenant, uint64_t limit, uint64_t *lack)
{
	uint64_t coming = coming_bytes(tenant);

	if (*lack > coming)
		coming += begin_within(tenant, *lack - coming, more_than(limit, coming), NULL);
	*lack = more_than(*lack, coming);
	if (tenant->quota.account->unreturned)
		press(tenant);
	return is_coming(tenant);
}

/* What others reclaim of a tenant leaves it its min. */
static uint64_t above_min(const struct tenant *tenant)
{
	return more_than(quota_use(tenant->quota.account), tenant->quota.account->min);
}

/* Whether there would be room in the pool if nobody else had more than its min. */
static bool can_ever_fit(const struct tenant *tenant, uint64_t bytes)
{
	const struct reclaim *reclaim = tenant->reclaim;
	uint64_t room = reclaim->pool->quota.account->max;

	for (size_t i = 0; i < *reclaim->tenant_count; i++)
		if (reclaim->tenants[i] != tenant)
			room -= reclaim->tenants[i]->quota.account->min;
	return bytes <= room;
}

/* Of those that were not asked, the one that has most above its min, or NULL. */
static struct tenant *furthest_above_min(const struct reclaim *reclaim, const bool asked[META_MAX_TENANTS])
{
	struct tenant *furthest = NULL;
	uint64_t most = 0;

	for (size_t i = 0; i < *reclaim->tenant_count; i++) {
		struct tenant *tenant = reclaim->tenants[i];

		if (asked[tenant->index] || above_min(tenant) <= most)
			continue;
		furthest = tenant;
		most = above_min(tenant);
	}
	return furthest;
}

bool reclaim_want(struct tenant *tenant, uint64_t bytes)
{
	const struct reclaim *reclaim = tenant->reclaim;
	bool asked[META_MAX_TENANTS] = {false}, coming;
	struct tenant *victim;
	uint64_t lack;

	if (!reclaim)
		return false;
	lack = quota_lack(&tenant->quota, bytes);
	if (bytes > tenant->quota.account->max || !can_ever_fit(tenant, bytes))
		return false; /* whatever comes back */
	if (lack)
		return take_from(tenant, UINT64_MAX, &lack);
	lack = quota_lack_pool(&tenant->quota, bytes);
	if (!lack)
		return true;
	asked[tenant->index] = true;
	coming = take_from(tenant, UINT64_MAX, &lack);
	while (lack && (victim = furthest_above_min(reclaim, asked))) {
		asked[victim->index] = true;
		coming |= take_from(victim, above_min(victim), &lack);
	}
	return coming;
}

static uint64_t first_deadline(const struct reclaim *reclaim)
{
	uint64_t first = UINT64_MAX;

	for (const struct list *node = reclaim->waits.next; node != &reclaim->waits; node = node->next) {
		const struct memory_wait *wait = list_entry(node, struct memory_wait, node);

		if (wait->since_ns + reclaim->wait_ns < first)
			first = wait->since_ns + reclaim->wait_ns;
	}
	return first;
}

static void set_timer(const struct reclaim *reclaim)
{
	uint64_t first = first_deadline(reclaim), now = loop_now();

	loop_timer_set(reclaim->timer, first == UINT64_MAX ? 0 : first > now ? first - now : 1);
}

void reclaim_wait(struct tenant *tenant, struct memory_wait *wait)
{
	struct reclaim *reclaim = tenant->reclaim;

	wait->tenant = tenant;
	if (wait->since_ns)
		tenant->held_up |= wait->request;
	else
		reclaim->woken |= reclaim->asking; /* it may be behind one that goes on by now */
	if (!wait->since_ns)
		wait->since_ns = loop_now();
	tenant->waiting += wait->request;
	list_add_tail(&reclaim->waits, &wait->node);
	set_timer(reclaim);
}

static void leave_queue(struct memory_wait *wait)
{
	list_remove(&wait->node);
	wait->tenant->waiting -= wait->request;
}

void reclaim_wait_cancel(struct memory_wait *wait)
{
	if (!list_empty(&wait->node))
		leave_queue(wait);
}

void reclaim_wake(struct tenant *tenant)
{
	if (tenant->reclaim)
		tenant->reclaim->woken = true;
}

/* Each once, in order; those that go on waiting queue up again in the same order, and hold up those in turn. */
static void ask_again(struct reclaim *reclaim)
{
	uint64_t now = loop_now();
	struct list waiting, *node;

	list_init(&waiting);
	for (size_t i = 0; i < *reclaim->tenant_count; i++)
		reclaim->tenants[i]->held_up = false;
	reclaim->asking = true;
	while ((node = list_pop(&reclaim->waits)))
		list_add_tail(&waiting, node);
	while (!list_empty(&waiting)) {
		struct memory_wait *wait = list_entry(waiting.next, struct memory_wait, node);

		leave_queue(wait);
		wait->expired = now >= wait->since_ns + reclaim->wait_ns;
		wait->behind = wait->in_turn && wait->tenant->held_up && !wait->expired;
		wait->again(wait);
	}
	reclaim->asking = false;
	set_timer(reclaim);
}

static bool has_news(const struct reclaim *reclaim)
{
	return reclaim->woken || reclaim->pool->quota.frees != reclaim->seen_frees;
}

static bool reclaim_poll(void *user)
{
	struct reclaim *reclaim = user;
	bool waited = !list_empty(&reclaim->waits);

	if (!has_news(reclaim))
		return false;
	reclaim->woken = false;
	reclaim->seen_frees = reclaim->pool->quota.frees;
	if (waited)
		ask_again(reclaim);
	settle_host(reclaim);
	settle_pressure(reclaim);
	return waited;
}

static bool reclaim_sleep(void *user, bool going)
{
	const struct reclaim *reclaim = user;

	return going && has_news(reclaim) && (!list_empty(&reclaim->waits) || !list_empty(&reclaim->pressed));
}

static const struct loop_poller_ops reclaim_poller = {.poll = reclaim_poll, .sleep = reclaim_sleep};

static void time_over(void *user)
{
	struct reclaim *reclaim = user;

	reclaim->woken = true;
}

int reclaim_init(struct reclaim *reclaim, struct loop *loop, struct pool *pool, struct tenant *const *tenants,
	const size_t *tenant_count, uint64_t wait_ns, const struct reclaim_ops *ops, void *user)
{
	int r;

	*reclaim = (struct reclaim){.loop = loop,
		.pool = pool,
		.tenants = tenants,
		.tenant_count = tenant_count,
		.wait_ns = wait_ns,
		.ops = ops,
		.user = user};
	list_init(&reclaim->waits);
	list_init(&reclaim->pressed);
	r = loop_timer_new(loop, time_over, reclaim, &reclaim->timer);
	if (r >= 0)
		r = loop_poller_add(loop, &reclaim_poller, reclaim);
	if (r < 0)
		reclaim->timer = loop_timer_free(reclaim->timer);
	return r;
}

void reclaim_deinit(struct reclaim *reclaim)
{
	if (!reclaim->timer)
		return;
	loop_poller_remove(reclaim->loop, &reclaim_poller, reclaim);
	reclaim->timer = loop_timer_free(reclaim->timer);
}

static void add_size(char *text, size_t size, size_t *used, const char *format, uint64_t bytes)
{
	char value[KVG_SIZE_TEXT];

	if (bytes && *used < size)
		*used += (size_t)snprintf(text + *used, size - *used, format, kvg_size_format(bytes, value));
}

/* What would come back of all tenants for one of them: its own, and what the others have above their min. */
static void explain_pool(const struct tenant *tenant, char *text, size_t size)
{
	const struct reclaim *reclaim = tenant->reclaim;
	uint64_t idle = 0, unreturned = 0;
	bool no_room = false;
	size_t used = 0;

	for (size_t i = 0; i < *reclaim->tenant_count; i++) {
		const struct tenant *other = reclaim->tenants[i];
		uint64_t limit = other == tenant ? UINT64_MAX : above_min(other);

		idle += min_u64(other->offered, limit);
		unreturned += min_u64(other->quota.account->unreturned, limit);
		no_room |= other->offered && other->no_room;
	}
	add_size(text, size, &used, "; idle %s", idle);
	if (no_room && used < size)
		used += (size_t)snprintf(text + used, size - used, " (no room for it on the host)");
	add_size(text, size, &used, idle ? ", not yet unmapped %s" : "; not yet unmapped %s", unreturned);
}

void reclaim_explain(const struct tenant *tenant, uint64_t bytes, char *text, size_t size)
{
	const struct quota_account *account = tenant->quota.account;
	char in_use[KVG_SIZE_TEXT];
	size_t used = 0;

	text[0] = '\0';
	if (!quota_lack(&tenant->quota, bytes) && tenant->reclaim) {
		explain_pool(tenant, text, size);
		return;
	}
	if (!account->charged)
		return;
	used = (size_t)snprintf(text, size, "; in use %s",
		kvg_size_format(more_than(account->charged, tenant->offered + account->unreturned), in_use));
	add_size(text, size, &used, ", idle %s", tenant->offered);
	if (tenant->offered && tenant->no_room && used < size)
		used += (size_t)snprintf(text + used, size - used, " (no room for it on the host)");
	add_size(text, size, &used, ", not yet unmapped %s", account->unreturned);
}
