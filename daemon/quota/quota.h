/*
 * quota.h - accounts of physical bytes: one for the pool, and one for each
 * tenant with the pool's as parent.
 *
 * charged is memory that exists (extents at their full size), promised is what
 * admitted sequences may still draw. charged + promised <= max holds whenever
 * something is added, in the account and in its parent; only lowering max can
 * break it, and then nothing more is granted. unreturned is the part of charged
 * that a worker has been asked to unmap and has not.
 */
#ifndef KVG_QUOTA_H
#define KVG_QUOTA_H

#include <stddef.h>
#include <stdint.h>

#define QUOTA_TEXT 256

/* The figures of an account; they lie in the metadata memfd. */
struct quota_account {
	uint64_t max;
	uint64_t charged, promised, unreturned;
	uint64_t high_water; /* most ever charged */
	uint64_t refusals;
	uint64_t reserved[2];
};

struct quota {
	const char *name; /* "tenant search" or "pool"; borrowed */
	struct quota *parent;
	struct quota_account *account; /* borrowed */
	uint64_t frees;                /* times that bytes became free again */
};

/* Promises bytes. 0, or -ENOSPC with text: who, budget, use, need (`what` needs it), and how many bytes are missing. */
int quota_promise(struct quota *quota, uint64_t bytes, const char *what, char text[QUOTA_TEXT]);
void quota_unpromise(struct quota *quota, uint64_t bytes);

/*
 * Charges bytes, of which `drawn` (<= bytes) come out of an earlier promise. 0, or -ENOSPC with text;
 * then nothing has changed.
 */
int quota_charge(struct quota *quota, uint64_t bytes, uint64_t drawn, const char *what, char text[QUOTA_TEXT]);

void quota_refund(struct quota *quota, uint64_t bytes);

/* Turns a refund into a promise in one step: nobody else can be granted the bytes between. */
void quota_refund_to_promise(struct quota *quota, uint64_t bytes, uint64_t promised);

/* Marks charged bytes as asked back, or as no longer so. */
void quota_unreturned_add(struct quota *quota, uint64_t bytes);
void quota_unreturned_sub(struct quota *quota, uint64_t bytes);

#endif
