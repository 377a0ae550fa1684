/*
 * contents.h - what every pair of the sequences and contexts of a tenant's spaces must say, whatever their workers ask
 * for. It writes and reads as workers do: through the mapping that each has of its extents (struct fixture_options,
 * view), the table's ids and lengths.
 *
 * Each token that is written has a number of its own. The number names the bytes of its pairs, K and V, in each row, so
 * that a pair found anywhere tells which one it is, and bytes of any other are foreign. Rows have their pairs in an
 * order that only evictions and recalls change; these may drop pairs that are not protected, or bring dropped ones
 * back.
 *
 * Sequences are looked at when a request of theirs completes, and all that are at rest when contents_check() is called;
 * what is wrong fails the test. Everything that is reserved and not committed is written anew before the next request
 * begins, as a worker may do at any time.
 */
#ifndef KVG_TEST_CONTENTS_H
#define KVG_TEST_CONTENTS_H

#include "tests/support/space_fixture.h"

struct contents_counts {
	uint64_t pairs; /* that were read */
	uint64_t dropped, recalled, joined,
		contexts; /* pairs, pairs; publishes of a key that was there, contexts read */
};

struct contents;

/* Of `count` spaces of one tenant, of which the first stays. They tell it of completions from then on. */
struct contents *contents_new(struct fixture *const *spaces, unsigned count);
void contents_free(struct contents *contents);

/* Another space has come in the place of one that left. */
void contents_join(struct contents *contents, struct fixture *fixture);

/* A space is about to be killed, whatever is under way. */
void contents_leave(struct contents *contents, const struct fixture *fixture);

/* A request of the daemon's own is completed. */
void contents_completed(struct contents *contents, struct fixture *fixture, const struct request *request);

/* Reads everything that may be read: sequences on which nothing works, and contexts that are on the device. */
void contents_check(struct contents *contents);

/* What has been done so far. */
struct contents_counts contents_counts(const struct contents *contents);

#endif
