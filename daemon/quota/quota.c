#include "daemon/quota/quota.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>

#include "proto/size.h"

/* The account of the chain in which `bytes` more than the `drawn` ones do not fit, or NULL. */
static struct quota *first_full(struct quota *quota, uint64_t bytes, uint64_t drawn)
{
	for (; quota; quota = quota->parent) {
		uint64_t rest = bytes - drawn;

		if (bytes > quota->account->max)
			return quota; /* and no sum below can wrap */
		if (rest ? quota->account->charged + quota->account->promised + rest > quota->account->max
			 : quota->account->charged + bytes > quota->account->max)
			return quota;
	}
	return NULL;
}

static int refuse(struct quota *quota, struct quota *full, uint64_t bytes, uint64_t drawn, const char *what,
	char text[QUOTA_TEXT])
{
	char max[KVG_SIZE_TEXT], use[KVG_SIZE_TEXT], promised[KVG_SIZE_TEXT], need[KVG_SIZE_TEXT];
	uint64_t use_after = full->account->charged + bytes + (bytes > drawn ? full->account->promised - drawn : 0);

	quota->account->refusals++;
	(void)snprintf(text, QUOTA_TEXT,
		"%s: device %s %s, in use %s, promised %s, %s needs %s: %" PRIu64 " bytes short%s", quota->name,
		full == quota ? "budget" : "pool", kvg_size_format(full->account->max, max),
		kvg_size_format(full->account->charged, use), kvg_size_format(full->account->promised, promised), what,
		kvg_size_format(bytes, need), use_after - full->account->max,
		full->account->unreturned ? " (some not yet unmapped)" : "");
	return -ENOSPC;
}

int quota_promise(struct quota *quota, uint64_t bytes, const char *what, char text[QUOTA_TEXT])
{
	struct quota *full = first_full(quota, bytes, 0);

	if (full)
		return refuse(quota, full, bytes, 0, what, text);
	for (; quota; quota = quota->parent)
		quota->account->promised += bytes;
	return 0;
}

void quota_unpromise(struct quota *quota, uint64_t bytes)
{
	for (; quota; quota = quota->parent) {
		assert(quota->account->promised >= bytes);
		quota->account->promised -= bytes;
		quota->frees++;
	}
}

int quota_charge(struct quota *quota, uint64_t bytes, uint64_t drawn, const char *what, char text[QUOTA_TEXT])
{
	struct quota *full = first_full(quota, bytes, drawn);

	assert(drawn <= bytes);
	if (full)
		return refuse(quota, full, bytes, drawn, what, text);
	for (; quota; quota = quota->parent) {
		assert(quota->account->promised >= drawn);
		quota->account->promised -= drawn;
		quota->account->charged += bytes;
		if (quota->account->charged > quota->account->high_water)
			quota->account->high_water = quota->account->charged;
	}
	return 0;
}

void quota_refund(struct quota *quota, uint64_t bytes)
{
	quota_refund_to_promise(quota, bytes, 0);
}

void quota_refund_to_promise(struct quota *quota, uint64_t bytes, uint64_t promised)
{
	assert(promised <= bytes);
	for (; quota; quota = quota->parent) {
		assert(quota->account->charged >= bytes);
		quota->account->charged -= bytes;
		quota->account->promised += promised;
		quota->frees++;
	}
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
