/*
 * refusal.h - whether a refusal for lack of memory was right, by its own words.
 */
#ifndef KVG_STRESS_REFUSAL_H
#define KVG_STRESS_REFUSAL_H

#include <stdint.h>

/*
 * NULL, or what is wrong with the text of an -ENOSPC to a worker of a tenant with that min of device memory: it must
 * say how many bytes are missing, and the pool, which others fill, is no reason for a need that fits in the min.
 */
const char *refusal_wrong(const char *text, uint64_t min);

#endif
