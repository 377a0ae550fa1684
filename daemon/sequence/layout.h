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

/* Blocks that a row may have, a multiple of 8. */
uint32_t layout_row_cap(const struct kvg_layout *layout);

#endif
