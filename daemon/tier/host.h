/*
 * host.h - the host tier: host memory that takes what leaves the device, images of sequences and of contexts and pairs
 * that evictions dropped.
 *
 * One memfd of the daemon's own, mapped once and cut into frames of one size. A frame belongs to one tenant at a time
 * and is charged to its host account. Frames are chained in the metadata: an object is a chain, named by its
 * first frame, as frame + 1 so that 0 is none. What the tier needs to find an object again is in the metadata; the rest
 * is derived.
 *
 * Memory comes with the first use of a frame, on the executor, so that no copy ever faults, and stays when the frame
 * is free: it is the pool's then, in nobody's account. Pieces of neighbouring frames are populated, and pinned
 * for the device, together.
 *
 * A frame of one tenant may come to another: what it held is overwritten by what is written next, and nobody reads
 * further than was written. Workers never see the tier.
 */
#ifndef KVG_TIER_HOST_H
#define KVG_TIER_HOST_H

#include "daemon/tenant/tenant.h"
#include "daemon/tier/turns.h"

#define HOST_FRAME        (64u << 10) /* bytes of a frame, on the host kind and */
#define HOST_FRAME_DEVICE (2u << 20)  /* where there is a device */

struct host_tier;

/*
 * A tier of `size` bytes, rounded down to whole frames, for the pool: before it has workers. It sets pool->tier
 * and the host account's max. size 0: a tier that refuses everything and says why. 0 or a negative errno.
 */
int host_tier_new(struct pool *pool, uint64_t size, struct host_tier **ret);

/* Every frame is free and nothing of it is on the executor. NULL is fine; returns NULL. */
struct host_tier *host_tier_free(struct host_tier *tier);

/* Bytes of a frame; frames in all; bytes that are populated, whoever has them (any thread). */
uint32_t host_tier_frame_size(const struct host_tier *tier);
uint32_t host_tier_frame_count(const struct host_tier *tier);
uint64_t host_tier_populated(const struct host_tier *tier);

/* ---- on the reactor ---- */

/*
 * Charges `count` (> 0) frames to the tenant and chains them. 0 and the first frame + 1, or -ENOSPC with text; `what`
 * needs them. tier may be NULL: as one without a size.
 */
int host_tier_take(struct host_tier *tier, struct tenant *tenant, uint32_t count, const char *what, uint32_t *ret_first,
	char text[QUOTA_TEXT]);

/* Gives a whole chain back; 0 is fine. Nothing on the executor uses it any more. */
void host_tier_give(struct host_tier *tier, struct tenant *tenant, uint32_t first);

/* Gives back what follows `last`, which becomes the last frame of its chain. */
void host_tier_cut(struct host_tier *tier, struct tenant *tenant, uint32_t last);

/* Makes the chain that begins with `first` follow `last`, the last frame of another of the same tenant. */
void host_tier_join(struct host_tier *tier, uint32_t last, uint32_t first);

/* ---- on the executor, and on the reactor while nothing there touches the chain ---- */

/* The frame after this one in its chain, or 0. */
uint32_t host_tier_next(const struct host_tier *tier, uint32_t frame);

uint8_t *host_tier_at(const struct host_tier *tier, uint32_t frame);

/* Whether two frames are one, or neighbours whose memory is pinned together, so that one copy may cross both. */
bool host_tier_is_together(const struct host_tier *tier, uint32_t frame, uint32_t next);

/*
 * Makes a frame ready for use, a step of at most 2 MiB at a time. 0: it is; -EAGAIN: a step is done, another is needed
 * (it is the caller's to let others have their turn); or another negative errno. Executor only.
 */
int host_tier_open(struct host_tier *tier, uint32_t frame);

/* How copies to and from the tier share the executor. */
struct turns *host_tier_turns(struct host_tier *tier);

/* ---- writing and reading a chain from its beginning ---- */

/* Units follow each other in a frame as long as they fit whole; none lies in two frames. */
struct host_cursor {
	const struct host_tier *tier;
	uint32_t frame; /* + 1; 0: past the end */
	uint32_t offset;
};

static inline struct host_cursor host_cursor(const struct host_tier *tier, uint32_t first)
{
	return (struct host_cursor){.tier = tier, .frame = first};
}

/* The place of the next unit of `size` bytes (at most a frame's); NULL past the end of the chain. */
uint8_t *host_cursor_take(struct host_cursor *cursor, uint32_t size);

/* The place of the next units that lie together, `most` (> 0) at most, and how many; NULL past the end. */
uint8_t *host_cursor_take_some(struct host_cursor *cursor, uint32_t size, uint32_t most, uint32_t *ret_count);

/* Frames that `count` units of `size` bytes need from the beginning of a frame on. */
uint32_t host_tier_frames(const struct host_tier *tier, uint64_t count, uint32_t size);

#endif
