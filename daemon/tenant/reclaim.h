/*
 * reclaim.h - device memory that can be had without touching what is in use, requests that wait for it, and
 * the pressure that a tenant's workers feel.
 *
 * What nobody uses is on offer: published contexts without sequences, and sequences that their workers have released
 * as idle. When a request would pass max, its tenant's contexts go to the host first, then its idle sequences, oldest
 * first; when the pool is full, also those of other tenants, of the one furthest above its min first, as long as they
 * leave these their min. The request waits as long as memory is on its way (going to the host, asked back from a
 * worker, being destroyed), and is refused when none is. Above high the same happens in the background.
 *
 * Requests of a tenant that take memory anew are served in the order in which they came: one that could be granted
 * parks behind those that wait. Sequences at work (their reserves, evictions, recalls) queue behind nobody, for what
 * waits may wait for what they give back.
 *
 * A tenant is under pressure while it is above high, or while memory that a waiting request needs is still mapped by
 * its workers. How workers hear of it is the session's.
 *
 * All calls are the reactor's. again() and pressure() run from the loop only, never from inside a call here; begin()
 * runs from reclaim_want() and reclaim_begin() too.
 */
#ifndef KVG_RECLAIM_H
#define KVG_RECLAIM_H

#include <stdbool.h>

#include "daemon/tenant/tenant.h"

struct reclaimable {
	struct list node; /* alone: not on offer */
	struct tenant *tenant;
	enum reclaim_kind kind;
	uint64_t bytes; /* of device memory that it would give back */
	/*
	 * Starts to go to the host. 0: it has withdrawn itself, and reclaim_progress() is called with its bytes when it
	 * has ended, whichever way. A negative errno, and it stays on offer, when there is no room for it.
	 */
	int (*begin)(struct reclaimable *reclaimable);
};

/* A request that was refused for lack of device memory, parked until there may be more. */
struct memory_wait {
	struct list node; /* alone: not waiting */
	struct tenant *tenant;
	uint64_t since_ns;
	bool expired; /* waited for as long as anything may */
	bool request; /* it counts: who comes later is behind it. An operator's does not */
	bool in_turn; /* it is behind those of its tenant that came before */
	bool behind;  /* again(): one of them goes on waiting, and so it has to */
	void (*again)(struct memory_wait *wait);
};

/* How the workers of a tenant are asked for memory; given at the start. */
struct reclaim_ops {
	/* on: they are to unmap what they were asked to, and to say so; off: no longer. */
	void (*pressure)(void *user, struct tenant *tenant, bool on);
	/* It has more on the host than its high: begins to drop what nobody reads. NULL: nothing does. */
	void (*host_excess)(void *user, struct tenant *tenant);
};

/* What all tenants of a pool share. */
struct reclaim {
	struct loop *loop;
	struct loop_timer *timer; /* for the wait that ends next */
	struct pool *pool;
	struct tenant *const *tenants; /* borrowed, as is the count */
	const size_t *tenant_count;
	struct list waits, pressed;
	uint64_t seen_frees, wait_ns;
	bool woken;
	bool asking; /* again() is being called for those that waited */
	const struct reclaim_ops *ops;
	void *user;
};

/* Adds it to the loop. tenants is read at each use: those that are added later count. wait_ns: a request's longest. */
int reclaim_init(struct reclaim *reclaim, struct loop *loop, struct pool *pool, struct tenant *const *tenants,
	const size_t *tenant_count, uint64_t wait_ns, const struct reclaim_ops *ops, void *user);
void reclaim_deinit(struct reclaim *reclaim); /* nobody waits; also for one that is all zeros */

/* ---- what is on offer ---- */

/* On offer from now on, as the newest of its kind. kind, bytes and begin are set. */
void reclaim_offer(struct tenant *tenant, enum reclaim_kind kind, struct reclaimable *reclaimable);

/* In use again, or gone. Fine for what is not on offer. */
void reclaim_withdraw(struct reclaimable *reclaimable);

/* What a begin() started has ended; bytes as they were then. */
void reclaim_progress(struct tenant *tenant, uint64_t bytes);

/*
 * Begins with what is on offer, oldest first, until `bytes` are on their way, or nothing is left that the host has room
 * for. Returns the bytes that were begun, and counts them by kind (counts: NULL or an array).
 */
uint64_t reclaim_begin(const struct tenant *tenant, uint64_t bytes, uint32_t counts[RECLAIM_KINDS]);

/* The same for what is above high and not on its way yet. */
void reclaim_excess(const struct tenant *tenant);

/* ---- who wants memory ---- */

/*
 * A tenant was refused `bytes` more. Begins to reclaim what lacks; whether memory is on its way, or there is enough by
 * now, so that it is worth waiting.
 */
bool reclaim_want(struct tenant *tenant, uint64_t bytes);

/* Parks: again() is called when there may be more memory, or none is on its way any more, or the time is over. */
void reclaim_wait(struct tenant *tenant, struct memory_wait *wait);
void reclaim_wait_cancel(struct memory_wait *wait);

/* Whether requests of the tenant wait: one that takes memory anew parks behind them, whatever there is for it now. */
static inline bool reclaim_is_awaited(const struct tenant *tenant)
{
	return tenant->waiting > 0;
}

/* Everybody who waits is asked again: a worker has gone. */
void reclaim_wake(struct tenant *tenant);

/* The tenant's charge has grown, or its budget has changed: above high what is on offer goes, soon. */
void reclaim_check(struct tenant *tenant);

/* The same for the host. */
void reclaim_host_check(struct tenant *tenant);

/*
 * What would free memory, for the refusal of `bytes` more: "; in use 90.0 MiB, idle 24.0 MiB (no room for it on the
 * host), not yet unmapped 1.0 MiB" of the tenant. Idle is what is on offer, published contexts too. Nothing where
 * nothing is charged. When it is the pool that lacks them: what is idle and not yet unmapped of all tenants, of others
 * at most what they have above their min. size: of text.
 */
void reclaim_explain(const struct tenant *tenant, uint64_t bytes, char *text, size_t size);

#endif
