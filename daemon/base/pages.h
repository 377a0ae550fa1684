/*
 * pages.h - memory of memfds in pages as large as the kernel gives. What a large page saves: to create, map and give
 * back 2 MiB costs about as much as two pages of 4 KiB, and zeroing them.
 *
 * Whether shared memory gets any is the machine's setting (/sys/kernel/mm/transparent_hugepage/shmem_enabled and
 * hugepages-*kB/shmem_enabled beside it, from Linux 6.14 on; "advise" is enough).
 */
#ifndef KVG_PAGES_H
#define KVG_PAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGES_HUGE ((size_t)2 << 20) /* bytes; addresses are multiples of it, or no huge page fits them */

/* Reserves addresses without memory, from a multiple of PAGES_HUGE on. NULL when there are none; munmap() ends it. */
void *pages_reserve(size_t size);

/* Whether a memfd gets pages larger than the smallest now. It tries. */
bool pages_are_large(void);

/*
 * Allocates and zeroes `size` bytes of a memfd from `offset` on. at: where they are mapped for writing, or NULL, then
 * they are mapped for this time only. large: as pages_are_large() said. 0 or a negative errno (-ENOMEM, -ENOSPC: there
 * is no memory); what was allocated by then stays.
 */
int pages_populate(int fd, uint64_t offset, void *at, size_t size, bool large);

#endif
