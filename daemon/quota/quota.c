#include "daemon/quota/quota.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>

#include "proto/size.h"

static uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* What the account counts for in its parent's committed, with so many bytes more in use. */
static uint64_t commitment(const struct quota_account *account, uint64_t more)
{
	return max_u64(account->min, quota_use(account) + more);
}

/* Bytes by which the parent's committed rises when the account's use does. */
static uint64_t rise(const struct quota_account *account, uint64_t more)
{
	return commitment(account, more) - commitment(account, 0);
}

/* Adds to the figures of an account and of its parent; a negative change is one that wraps. */
static void change(struct quota *quota, uint64_t charged, uint64_t promised)
{
	struct quota *parent = quota->parent;
	uint64_t before = commitment(quota->account, 0);
	bool frees = (int64_t)charged < 0 || (!charged && (int64_t)promised < 0);

	for (struct quota *q = quota; q; q = q->parent) {
		q->account->charged += charged;
		q->account->promised += promised;
		q->frees += frees;
		if (q->account->charged > q->account->high_water)
			q->account->high_water = q->account->charged;
	}
	if (parent)
		parent->account->committed += commitment(quota->account, 0) - before;
}

/* The account, or its parent, in which `bytes` more than the `drawn` ones do not fit, or NULL. */
static struct quota *first_full(struct quota *quota, uint64_t bytes, uint64_t drawn)
{
	const struct quota_account *account = quota->account, *pool = quota->parent ? quota->parent->account : NULL;
	uint64_t rest = bytes - drawn;

	if (bytes > account->max)
		return quota; /* and no sum below can wrap */
	if ((rest ? quota_use(account) + rest : account->charged + bytes) > account->max)
		return quota;
	return pool && rise(account, rest) > pool->max - pool->committed ? quota->parent : NULL;
}

/* Bytes of the others' min that they do not use. */
static uint64_t unused_min(const struct quota *quota)
{
	const struct quota_account *account = quota->account, *pool = quota->parent->account;

	return (pool->committed - commitment(account, 0)) - (quota_use(pool) - quota_use(account));
}

static void refuse_own(
	const struct quota *quota, uint64_t bytes, uint64_t drawn, const char *what, char text[QUOTA_TEXT])
{
	const struct quota_account *account = quota->account;
	char max[KVG_SIZE_TEXT], use[KVG_SIZE_TEXT], promised[KVG_SIZE_TEXT], need[KVG_SIZE_TEXT];
	uint64_t after = account->charged + bytes + (bytes > drawn ? account->promised - drawn : 0);

	(void)snprintf(text, QUOTA_TEXT,
		"%s: %s budget %s, in use %s, promised %s, %s needs %s: %" PRIu64 " bytes short%s", quota->name,
		quota->tier, kvg_size_format(account->max, max), kvg_size_format(account->charged, use),
		kvg_size_format(account->promised, promised), what, kvg_size_format(bytes, need), after - account->max,
		account->unreturned ? " (some not yet unmapped)" : "");
}

/* What the tenant itself has is told, too: whoever reads it sees on which side of its min that is. */
static void refuse_pool(const struct quota *quota, uint64_t rest, const char *what, char text[QUOTA_TEXT])
{
	const struct quota_account *account = quota->account, *pool = quota->parent->account;
	char size[KVG_SIZE_TEXT], charged[KVG_SIZE_TEXT], promised[KVG_SIZE_TEXT], need[KVG_SIZE_TEXT];
	char use[KVG_SIZE_TEXT], min[KVG_SIZE_TEXT], max[KVG_SIZE_TEXT], unused[KVG_SIZE_TEXT];
	char others[KVG_SIZE_TEXT + 32] = "";

	if (unused_min(quota))
		(void)snprintf(
			others, sizeof(others), "others' unused min %s, ", kvg_size_format(unused_min(quota), unused));
	(void)snprintf(text, QUOTA_TEXT,
		"%s: %s pool %s, in use %s, promised %s, %s%s needs %s: %" PRIu64
		" bytes short; own use %s, min %s, max %s",
		quota->name, quota->tier, kvg_size_format(pool->max, size), kvg_size_format(pool->charged, charged),
		kvg_size_format(pool->promised, promised), others, what, kvg_size_format(rest, need),
		quota_lack_pool(quota, rest), kvg_size_format(quota_use(account), use),
		kvg_size_format(account->min, min), kvg_size_format(account->max, max));
}

static int refuse(struct quota *quota, const struct quota *full, uint64_t bytes, uint64_t drawn, const char *what,
	char text[QUOTA_TEXT])
{
	quota->account->refusals++;
	quota->refused = true;
	if (full == quota)
		refuse_own(quota, bytes, drawn, what, text);
	else
		refuse_pool(quota, bytes - drawn, what, text);
	return -ENOSPC;
}

static int reject(const struct quota *quota, const char *key, uint64_t value, const char *how, uint64_t limit,
	char text[QUOTA_TEXT])
{
	char a[KVG_SIZE_TEXT], b[KVG_SIZE_TEXT];

	(void)snprintf(text, QUOTA_TEXT, "%s: %s.%s %s is %s %s", quota->name, quota->tier, key,
		kvg_size_format(value, a), how, kvg_size_format(limit, b));
	return -EINVAL;
}

/* Whether the three values go together, and with the pool. */
static int check_values(const struct quota *quota, uint64_t min, uint64_t high, uint64_t max, char text[QUOTA_TEXT])
{
	if (quota->parent && max > quota->parent->account->max)
		return reject(quota, "max", max, "more than the pool's", quota->parent->account->max, text);
	if (min > max)
		return reject(quota, "min", min, "more than max,", max, text);
	if (high > max)
		return reject(quota, "high", high, "more than max,", max, text);
	if (high && high < min)
		return reject(quota, "high", high, "less than min,", min, text);
	return 0;
}

/* Whether the pool has the new min beside what the others have of it. */
static int check_overbooking(const struct quota *quota, uint64_t min, char text[QUOTA_TEXT])
{
	const struct quota_account *account = quota->account, *pool = quota->parent->account;
	uint64_t others = pool->committed - commitment(account, 0), after = max_u64(min, quota_use(account));
	char value[KVG_SIZE_TEXT], size[KVG_SIZE_TEXT], taken[KVG_SIZE_TEXT];

	if (after <= commitment(account, 0) || after <= pool->max - others)
		return 0;
	(void)snprintf(text, QUOTA_TEXT,
		"%s: %s.min %s: of the pool, %s, other tenants' min and use take %s: %" PRIu64 " bytes short",
		quota->name, quota->tier, kvg_size_format(min, value), kvg_size_format(pool->max, size),
		kvg_size_format(others, taken), after - (pool->max - others));
	return -ENOSPC;
}

int quota_set(struct quota *quota, uint64_t min, uint64_t high, uint64_t max, char text[QUOTA_TEXT])
{
	struct quota_account *account = quota->account;
	uint64_t before = commitment(account, 0);
	int r = check_values(quota, min, high, max, text);

	if (r >= 0 && quota->parent)
		r = check_overbooking(quota, min, text);
	if (r < 0)
		return r;
	account->min = min;
	account->high = high;
	account->max = max;
	if (quota->parent)
		quota->parent->account->committed += commitment(account, 0) - before;
	return 0;
}

uint64_t quota_lack(const struct quota *quota, uint64_t bytes)
{
	uint64_t after = quota_use(quota->account) + bytes;

	return after > quota->account->max ? after - quota->account->max : 0;
}

uint64_t quota_lack_pool(const struct quota *quota, uint64_t bytes)
{
	const struct quota_account *pool = quota->parent->account;
	uint64_t more = rise(quota->account, bytes), room = pool->max - pool->committed;

	return more > room ? more - room : 0;
}

int quota_promise(struct quota *quota, uint64_t bytes, const char *what, char text[QUOTA_TEXT])
{
	struct quota *full = first_full(quota, bytes, 0);

	if (full)
		return refuse(quota, full, bytes, 0, what, text);
	quota->refused = false;
	change(quota, 0, bytes);
	return 0;
}

void quota_unpromise(struct quota *quota, uint64_t bytes)
{
	assert(quota->account->promised >= bytes);
	change(quota, 0, -bytes);
}

int quota_charge(struct quota *quota, uint64_t bytes, uint64_t drawn, const char *what, char text[QUOTA_TEXT])
{
	struct quota *full = first_full(quota, bytes, drawn);

	assert(drawn <= bytes);
	if (full)
		return refuse(quota, full, bytes, drawn, what, text);
	assert(quota->account->promised >= drawn);
	quota->refused = false;
	change(quota, bytes, -drawn);
	return 0;
}

void quota_forgive(struct quota *quota)
{
	quota->account->refusals -= quota->refused;
	quota->refused = false;
}

void quota_refund(struct quota *quota, uint64_t bytes)
{
	quota_refund_to_promise(quota, bytes, 0);
}

void quota_refund_to_promise(struct quota *quota, uint64_t bytes, uint64_t promised)
{
	assert(promised <= bytes && quota->account->charged >= bytes);
	change(quota, -bytes, promised);
}

void quota_unreturned_add(struct quota *quota, uint64_t bytes)
{
	for (; quota; quota = quota->parent)
		quota->account->unreturned += bytes;
}

void quota_unreturned_sub(struct quota *quota, uint64_t bytes)
{
	for (; quota; quota = quota->parent) {
		assert(quota->account->unreturned >= bytes);
		quota->account->unreturned -= bytes;
	}
}
