/*
 * size.h - sizes as operators write them: "512", "64K", "256MiB", "1.5G" (powers of
 * 1024; K, KB and KiB are one, in either case), and the way back: "8.0 GiB". The
 * grammar is the one of the daemon's configuration file.
 */
#ifndef KVG_CTL_SIZE_H
#define KVG_CTL_SIZE_H

#include <stdint.h>

#define CTL_SIZE_TEXT 32

/*
 * Reads a size in bytes; a fraction of a byte is dropped. 0, -EINVAL for anything that
 * is not a size, -ERANGE above 2^62.
 */
int ctl_size_parse(const char *text, uint64_t *ret);

/* Writes "8.0 GiB" (exact bytes below 1 KiB: "512 B") into text and returns it. */
char *ctl_size_format(uint64_t bytes, char text[CTL_SIZE_TEXT]);

#endif
