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

/* No overlap; any alignment, fastest where dst is at a multiple of 64. */
void kvg_stream_copy(void *dst, const void *src, size_t size);

/* Copies made so far by this thread are visible before anything that it stores from now on. */
void kvg_stream_fence(void);

#endif
