/*
 * copy.h - copies of memory that nobody reads soon.
 *
 * A copy between the blocks of a sequence and its image would drive everything else out of the caches and read each
 * destination line before it is overwritten. kvg_stream_copy() writes around the caches, with the widest
 * registers of this CPU. Such stores may become visible late and in any order: kvg_stream_fence() comes before
 * another thread is told.
 */
#ifndef KVG_KERNELS_COPY_H
#define KVG_KERNELS_COPY_H

#include <stddef.h>
#include <stdint.h>

/* No overlap; any alignment, fastest where dst is at a multiple of 64. */
void kvg_stream_copy(void *dst, const void *src, size_t size);

/*
 * `count` copies of `size` bytes each, side by side: a few at a time keep the memory busier than one by one, as long as
 * their sources, or else their destinations, are few pages. No overlap; fastest where each dst and size are multiples
 * of 64.
 */
void kvg_stream_copies(uint8_t *const *dst, const uint8_t *const *src, unsigned count, size_t size);

/* Copies made so far by this thread are visible before anything that it stores from now on. */
void kvg_stream_fence(void);

#endif
