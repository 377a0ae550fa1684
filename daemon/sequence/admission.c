#include "daemon/sequence/admission.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>

#include "kernels/host/select.h"

#define DECODE_EVENT_TOKENS 256u /* fresh tokens between decode evictions: 128, and as many reserved ahead */

static uint64_t stripe_blocks(uint64_t tokens, uint32_t rows)
{
	return (tokens + KVG_STRIPE_TOKENS - 1) / KVG_STRIPE_TOKENS * KVG_RUN_BLOCKS * rows;
}

static uint64_t packed_blocks(uint64_t pairs, uint32_t rows)
{
	return pairs ? pairs / KVG_BLOCK_TOKENS + rows : 0;
}

static uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* Pairs over all rows once `seen` tokens have had their prefill eviction. */
static uint64_t pairs_after(const struct kvg_policy *policy, uint32_t rows, uint64_t seen)
{
	uint64_t context = seen > policy->prefix_tokens ? seen - policy->prefix_tokens : 0, window, range;
	uint64_t floor = policy->floor;
	double ratio;

	if (policy->mode == KVG_MODE_THRESHOLD)
		return seen * rows;
	kvg_select_prefill_params(policy->context_tokens, policy->chunk_tokens, policy->ratio, policy->window,
		(policy->flags & KVG_POLICY_WINDOW_ABSOLUTE) != 0, &ratio, &window);
	if (context <= window)
		return seen * rows;
	range = context - window;
	if (policy->mode == KVG_MODE_CHUNKED && policy->chunk_tokens)
		floor *= seen / policy->chunk_tokens + 1; /* each evicted range has its own */
	return (uint64_t)((double)((seen - range) * rows) +
			  (double)(range * rows) * (policy->mode == KVG_MODE_ONCE ? policy->ratio : ratio)) +
	       (floor < range ? floor : range) * rows;
}

uint64_t admission_kept(const struct kvg_policy *policy, uint32_t rows, uint64_t seen)
{
	return packed_blocks(pairs_after(policy, rows, seen), rows);
}

/* Peak while the prompt is read from `seen` tokens on in chunks that are evicted one by one. */
static uint64_t chunked_peak(const struct kvg_policy *policy, uint32_t rows, uint64_t seen, uint64_t held)
{
	uint64_t total = (uint64_t)policy->prefix_tokens + policy->context_tokens;
	uint64_t chunk = policy->chunk_tokens ? policy->chunk_tokens : total, peak;
	uint64_t last;

	if (seen >= total)
		return packed_blocks(held, rows);
	peak = packed_blocks(held, rows) + stripe_blocks(chunk < total - seen ? chunk : total - seen, rows);
	last = (total - 1) / chunk * chunk;
	if (last > seen)
		peak = max_u64(
			peak, packed_blocks(pairs_after(policy, rows, last), rows) + stripe_blocks(total - last, rows));
	if (last > seen + chunk)
		peak = max_u64(peak,
			packed_blocks(pairs_after(policy, rows, last - chunk), rows) + stripe_blocks(chunk, rows));
	return peak;
}

uint64_t admission_blocks(const struct kvg_policy *policy, uint32_t rows, uint64_t seen, uint64_t held)
{
	uint64_t total = (uint64_t)policy->prefix_tokens + policy->context_tokens, end = total + policy->max_new_tokens;
	uint64_t unread = total > seen ? total - seen : 0,
		 fresh = end > max_u64(seen, total) ? end - max_u64(seen, total) : 0;
	bool gated = policy->mode == KVG_MODE_THRESHOLD || (policy->mode != KVG_MODE_OFF && policy->ratio < 1.0);
	uint64_t budget = policy->budget < end ? policy->budget : end, after = held + unread * rows, peak;

	if ((!gated || !unread) && !policy->budget)
		return packed_blocks(held, rows) + stripe_blocks(unread + fresh, rows);
	if (policy->budget && fresh > DECODE_EVENT_TOKENS)
		fresh = DECODE_EVENT_TOKENS;
	if (policy->mode == KVG_MODE_CHUNKED || policy->mode == KVG_MODE_THRESHOLD)
		peak = chunked_peak(policy, rows, seen, held);
	else
		peak = packed_blocks(held, rows) + stripe_blocks(unread, rows);
	if (gated && unread)
		after = pairs_after(policy, rows, total);
	after = packed_blocks(max_u64(after, budget * rows), rows) + stripe_blocks(fresh, rows);
	return max_u64(peak, after) + stripe_blocks((uint64_t)2 * KVG_STRIPE_TOKENS, rows);
}

struct kvg_policy admission_behind(const struct kvg_policy *policy, uint32_t tokens)
{
	struct kvg_policy behind = *policy;

	behind.prefix_tokens -= tokens < policy->prefix_tokens ? tokens : policy->prefix_tokens;
	return behind;
}

uint64_t protected_blocks(const struct meta_seq *meta, uint32_t rows, uint32_t from)
{
	uint64_t end = (uint64_t)meta->policy.prefix_tokens + meta->policy.context_tokens + meta->policy.max_new_tokens;
	uint64_t tokens = 0;

	if (meta->policy.mode == KVG_MODE_OFF && !meta->policy.budget)
		return 0;
	for (uint32_t i = 0; i < meta->protected_count; i++) {
		uint64_t first = max_u64(meta->protect_begin[i], from),
			 last = meta->protect_end[i] < end ? meta->protect_end[i] : end;

		tokens += last > first ? last - first : 0;
	}
	return tokens ? (tokens * rows + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS : 0;
}

int admission_check(const struct kvg_policy *policy, uint32_t max_tokens, char *text, uint32_t size)
{
	uint64_t tokens = (uint64_t)policy->prefix_tokens + policy->context_tokens + policy->max_new_tokens;

	if (policy->mode > KVG_MODE_THRESHOLD)
		(void)snprintf(text, size, "policy: mode %u, known are 0 to %d", policy->mode, KVG_MODE_THRESHOLD);
	else if (policy->level > KVG_LEVEL_ADAKV_LAYER)
		(void)snprintf(text, size, "policy: level %u, known are 0 to %d", policy->level, KVG_LEVEL_ADAKV_LAYER);
	else if (!isfinite(policy->ratio) || (policy->mode != KVG_MODE_OFF && policy->mode != KVG_MODE_THRESHOLD &&
						     !(policy->ratio > 0 && policy->ratio <= 1)))
		(void)snprintf(text, size, "policy: ratio %g, must be above 0 and at most 1", policy->ratio);
	else if (!isfinite(policy->threshold))
		(void)snprintf(text, size, "policy: threshold %g is not a number", (double)policy->threshold);
	else if (tokens > max_tokens)
		(void)snprintf(text, size,
			"policy: prefix %u + context %u + new %u tokens, the layout's max_tokens is %u",
			policy->prefix_tokens, policy->context_tokens, policy->max_new_tokens, max_tokens);
	else
		return 0;
	return -EINVAL;
}
