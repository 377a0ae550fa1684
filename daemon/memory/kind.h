/*
 * kind.h - where the bytes of extents live, behind one table of operations.
 * Everything above a kind is the same code for each.
 *
 * Operations run on the executor, but for those of the host kind, which any thread may call. Addresses of
 * the cuda kind are device addresses: nobody but the device may follow them.
 */
#ifndef KVG_KIND_H
#define KVG_KIND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct kind;
struct kvg_cuda;

/* What reports say of a device. */
struct kind_device {
	char name[128];  /* "NVIDIA H200 (00000000:1B:00.0)" */
	char driver[64]; /* "580.95.05, CUDA 13.0" */
	bool mps;        /* this process is a client of an MPS server */
	uint64_t total;  /* bytes of memory */
};

#define KIND_TEXT 256 /* bytes of a text */

struct kind_ops {
	const char *name;
	/* Creates memory of that many bytes, allocated in full. A descriptor or a negative errno. */
	int (*create)(struct kind *kind, size_t size);
	/* Reserves an address range without memory. NULL when there is none. */
	void *(*reserve)(struct kind *kind, size_t size);
	void (*unreserve)(struct kind *kind, void *base, size_t size);
	/* Maps what create() made at a place of a reserved range; on the host out of core dumps and forked children. */
	int (*map)(struct kind *kind, int fd, void *at, size_t size);
	/* Makes the place unmapped again; the range stays reserved. */
	int (*unmap)(struct kind *kind, void *at, size_t size);
	/* Zeroes mapped memory that is new; returns when it is done. Nothing where create() gives zeros. */
	int (*scrub)(struct kind *kind, void *at, size_t size);
	/* The same, only begun: a number to ask with, from 1 on and growing, or a negative errno. NULL: there is
	 * scrub(). */
	int64_t (*scrub_begin)(struct kind *kind, void *at, size_t size);
	/* 0: everything begun up to this number is zeroed; -EAGAIN: not yet; or another negative errno. */
	int (*scrub_poll)(struct kind *kind, int64_t number);
	/* Gives the bytes back whoever still maps them, and closes. 0, or -EBUSY when bytes are still there (then fd is
	 * open). The cuda kind cannot see that: there the bytes go with the last mapping. */
	int (*destroy)(struct kind *kind, int fd, size_t size);
	/* Bytes of memory that the descriptor holds now. */
	uint64_t (*physical)(struct kind *kind, int fd, size_t size);
	/* Makes memory of this process that is allocated already reachable for the device at full speed, or no longer
	 * so. NULL: nothing to do. 0 or a negative errno. */
	int (*pin)(struct kind *kind, void *at, size_t size);
	void (*unpin)(struct kind *kind, void *at, size_t size);
	/* The device of the cuda kind, NULL for others. */
	struct kvg_cuda *(*device)(struct kind *kind);
	/* What is known of it, as long as the kind lives; any thread. NULL for kinds without a device. */
	const struct kind_device *(*about)(struct kind *kind);
	/* Bytes of the device's memory that anybody uses; a lost device is noticed. 0 or a negative errno; -ENODEV for
	 * kinds without a device. */
	int (*usage)(struct kind *kind, uint64_t *ret_bytes);
	/* A descriptor that can be read once the device is lost for this process, -1 when that cannot happen; and what
	 * happened, or NULL. Any thread; text has KIND_TEXT bytes. */
	int (*failure_fd)(struct kind *kind);
	const char *(*failure)(struct kind *kind, char *text);
	struct kind *(*free)(struct kind *kind);
};

struct kind {
	const struct kind_ops *ops;
	size_t granularity; /* sizes are multiples of it */
	bool large_pages;   /* memory of the host comes in large pages, see base/pages.h */
	/* What the layers above keep with the device (its kernels): set before there are workers, detached before
	 * free(). */
	void *attached;
	void (*detach)(void *attached);
};

/* Sealed memfds. 0 or -ENOMEM. */
int kind_host_new(struct kind **ret);

/*
 * Device memory that is exported as descriptors. 0; or a negative errno with one line of text: no driver,
 * too old a driver, no such GPU, or a daemon that was built without the kind.
 */
int kind_cuda_new(int ordinal, struct kind **ret, char *text, size_t text_size);

/* NULL is fine; returns NULL. */
struct kind *kind_free(struct kind *kind);

#endif
