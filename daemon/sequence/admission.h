/*
 * admission.h - how much memory a sequence will need at its peak, from its
 * policy. Pure arithmetic.
 */
#ifndef KVG_ADMISSION_H
#define KVG_ADMISSION_H

#include <stdint.h>

#include "daemon/memory/meta.h"

/*
 * Blocks at the peak from now on, over `rows` rows (layers * heads): fresh tokens in whole stripes, kept
 * ones packed with one partial block for each row, and two spare stripes where evictions move pairs.
 * seen: tokens that the sequence has (prefix included), held: pairs that it holds over all rows, folded ones only.
 */
uint64_t admission_blocks(const struct kvg_policy *policy, uint32_t rows, uint64_t seen, uint64_t held);

/* The same policy for what a sequence has behind its first `tokens` ones, which are a context's: positions count from
 * there. */
struct kvg_policy admission_behind(const struct kvg_policy *policy, uint32_t tokens);

/* Blocks of what the sequence is expected to keep once `seen` tokens have had their prefill eviction. */
uint64_t admission_kept(const struct kvg_policy *policy, uint32_t rows, uint64_t seen);

/* Blocks that protected ranges from position `from` on may keep beyond the policy's share. */
uint64_t protected_blocks(const struct meta_seq *meta, uint32_t rows, uint32_t from);

/* 0, or -EINVAL with text (of `size` bytes) that names the field, its value and the limit. */
int admission_check(const struct kvg_policy *policy, uint32_t max_tokens, char *text, uint32_t size);

#endif
