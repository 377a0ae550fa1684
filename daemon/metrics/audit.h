/*
 * audit.h - recounts every byte from the extents up, from the metadata memfd
 * alone: nothing of the daemon's own bookkeeping is looked at, so that a clean
 * audit also shows that the metadata is complete.
 */
#ifndef KVG_AUDIT_H
#define KVG_AUDIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AUDIT_TEXT        256
#define AUDIT_DIFFERENCES 64u /* that are written down; all are counted */

struct audit_row {
	char tenant[128];
	uint64_t extents, blocks, extent_bytes, physical, charged;
	uint64_t reserved;                   /* bytes of its min that are raw; physical counts them too */
	uint64_t host_counted, host_charged; /* frames of the host tier x size; what the account says */
};

struct audit {
	struct audit_row *rows; /* one for each tenant; owned */
	size_t row_count;
	char (*differences)[AUDIT_TEXT]; /* owned */
	size_t difference_count;
};

/* Bytes that an extent occupies (by its index in the metadata), asked of the memory itself. */
typedef uint64_t (*audit_physical)(void *user, uint32_t extent);

/* Maps the memfd anew, read-only. 0 or a negative errno; clean when there are no differences. */
int audit_run(int meta_fd, audit_physical physical, void *user, struct audit *ret);
void audit_deinit(struct audit *audit);

#endif
