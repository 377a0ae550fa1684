/* layout.h - which layouts of a model's KV this daemon takes. Pure checks. */
#ifndef KVG_LAYOUT_H
#define KVG_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "proto/kvgate_abi.h"

/*
 * 0; -EOPNOTSUPP for something that the ABI knows and this daemon does not build (a kind, a dtype, scales,
 * several groups); -EINVAL for a size out of range. text names the field, its value and the limit.
 */
int layout_check(const struct kvg_layout *layout, char *text, size_t text_size);

/*
 * What a kind with a device asks besides: its kernels move a pair's K and V in pieces of 16 bytes and have a grid of at
 * most 65535 rows, and its tables lie in device memory. 0, or -EOPNOTSUPP with text. layout_check() has passed.
 */
int layout_check_device(const struct kvg_layout *layout, char *text, size_t text_size);

/* Bytes of the table in device memory: base_len, then ids at a multiple of 256 (layout_check() bounds them). */
uint64_t layout_device_table(const struct kvg_layout *layout);

/* Blocks that a row may have, a multiple of 8. */
uint32_t layout_row_cap(const struct kvg_layout *layout);

#endif
