/*
 * size.h - sizes as people write them: "512", "64K", "256MiB", "1.5G" (powers of
 * 1024; K, KB and KiB are one), and the way back for messages: "8.0 GiB".
 */
#ifndef KVG_SIZE_H
#define KVG_SIZE_H

#include <stddef.h>
#include <stdint.h>

#define KVG_SIZE_TEXT 32

/* 0, or -EINVAL for anything that is not a size, -ERANGE above 2^62. */
int kvg_size_parse(const char *text, uint64_t *ret);

/* Writes "8.0 GiB" (exact bytes below 1 KiB: "512 B") into text and returns it. */
char *kvg_size_format(uint64_t bytes, char text[KVG_SIZE_TEXT]);

#endif
