/*
 * kind.h - where the bytes of extents live, behind one table of operations.
 * Everything above a kind is the same code for each.
 */
#ifndef KVG_KIND_H
#define KVG_KIND_H

#include <stddef.h>
#include <stdint.h>

struct kind_ops {
	const char *name;
	/* Creates an extent of that many bytes, all zero and allocated in full. A descriptor or a negative errno. */
	int (*create)(size_t size);
	/* Reserves an address range without memory. NULL when there is none. */
	void *(*reserve)(size_t size);
	void (*unreserve)(void *base, size_t size);
	/* Maps an extent at a place of a reserved range, kept out of core dumps and of forked children. */
	int (*map)(int fd, void *at, size_t size);
	/* Makes the place unmapped again; the range stays reserved. */
	int (*unmap)(void *at, size_t size);
	/* Gives the bytes back whoever still maps them, and closes. 0, or -EBUSY when bytes are still there (then fd is
	 * open). */
	int (*destroy)(int fd, size_t size);
	/* Bytes of memory that the extent occupies now. */
	uint64_t (*physical)(int fd);
};

/* Sealed memfds. */
extern const struct kind_ops kind_host;

#endif
