/*
 * quota.h - accounts of physical bytes: for each tier one for the pool, and one for each
 * tenant with the pool's as parent. There are no more than these two levels.
 *
 * charged is memory that exists (extents at their full size), promised is what
 * admitted sequences may still draw; both together are an account's use. use <= max holds
 * whenever something is added; only lowering max can break it, and then nothing more is granted.
 * unreturned is the part of charged that a worker has been asked to unmap and has not.
 *
 * min is a tenant's whether it uses it or not. So what the pool has given away is
 *     committed = sum over its tenants of max(min, use), and committed <= max of the pool
 * holds always: growth inside a tenant's min never fails at the pool, whatever the others do.
 * high only says where reclaim begins; nothing here looks at it.
 */
#ifndef KVG_QUOTA_H
#define KVG_QUOTA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QUOTA_TEXT 256

/* The figures of an account; they lie in the metadata memfd. */
struct quota_account {
	uint64_t min, high, max; /* min <= high <= max; high 0: none */
	uint64_t charged, promised, unreturned;
	uint64_t high_water; /* most ever charged */
	uint64_t refusals;
	uint64_t committed; /* the pool's only */
	uint64_t reserved[3];
};

struct quota {
	const char *name; /* "tenant search" or "pool"; borrowed */
	const char *tier; /* "device" or "host", for texts; borrowed */
	struct quota *parent;
	struct quota_account *account; /* borrowed */
	uint64_t frees;                /* times that bytes became free again */
	bool refused;                  /* the last that was asked of it */
};

/*
 * Sets a tenant's budget. 0; or with text, and then nothing has changed: -EINVAL when not min <= high <= max or max is
 * more than the pool, -ENOSPC when min is more than the pool has left beside the others' min and use. A max below the
 * use is taken: the use stays, and nothing is granted until it is below.
 */
int quota_set(struct quota *quota, uint64_t min, uint64_t high, uint64_t max, char text[QUOTA_TEXT]);

/* Bytes that are charged or promised; where reclaim begins. */
static inline uint64_t quota_use(const struct quota_account *account)
{
	return account->charged + account->promised;
}

static inline uint64_t quota_high(const struct quota_account *account)
{
	return account->high ? account->high : account->max;
}

/* Bytes that lack for `bytes` more in the account's own max, and in its pool beside the others' min. */
uint64_t quota_lack(const struct quota *quota, uint64_t bytes);
uint64_t quota_lack_pool(const struct quota *quota, uint64_t bytes);

/*
 * Promises bytes. 0, or -ENOSPC with text: who, budget, use, need (`what` needs it), and how many bytes are missing;
 * when it is the pool that lacks them, also the tenant's own use, min and max. The need is what is not promised yet.
 */
int quota_promise(struct quota *quota, uint64_t bytes, const char *what, char text[QUOTA_TEXT]);
void quota_unpromise(struct quota *quota, uint64_t bytes);

/*
 * Charges bytes, of which `drawn` (<= bytes) come out of an earlier promise. 0, or -ENOSPC with text;
 * then nothing has changed.
 */
int quota_charge(struct quota *quota, uint64_t bytes, uint64_t drawn, const char *what, char text[QUOTA_TEXT]);

/* Who was refused just now asks again later: that is when it counts, if at all. */
void quota_forgive(struct quota *quota);

void quota_refund(struct quota *quota, uint64_t bytes);

/* Turns a refund into a promise in one step: nobody else can be granted the bytes between. */
void quota_refund_to_promise(struct quota *quota, uint64_t bytes, uint64_t promised);

/* Marks charged bytes as asked back, or as no longer so. */
void quota_unreturned_add(struct quota *quota, uint64_t bytes);
void quota_unreturned_sub(struct quota *quota, uint64_t bytes);

#endif
