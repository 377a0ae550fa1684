/*
 * device.h - opens the kind of memory that the configuration asks for, and holds the configuration against what
 * the kind has: what cannot be is refused by name, what may surprise is logged.
 */
#ifndef KVG_DEVICE_H
#define KVG_DEVICE_H

#include "daemon/config.h"
#include "daemon/memory/kind.h"

#define DEVICE_TEXT 512

/* 0 or a negative errno with one line of text (DEVICE_TEXT bytes). */
int device_open(const struct config *config, struct kind **ret, char *text);

/*
 * The size of the pool's extents on that kind: the configured one, or the kind's granularity when that is larger. 0,
 * or -EINVAL with one line of text: a pool that is larger than the device's memory or less than one extent; strict
 * isolation where clients of an MPS server share their faults.
 */
int device_check(const struct config *config, struct kind *kind, uint64_t *ret_extent_size, char *text);

#endif
