#include "kernels/host/select.h"

#include <string.h>

/*
 * Thresholds are found by radix select. A score's key is its bits mapped to a
 * uint32 of the same order. Three passes look at 11, 11 and 10 bits from the top:
 * each counts the keys by their digit, finds the digit that holds the wanted
 * rank and goes on with the keys that have it. A few keys are sorted.
 */
#define DIGIT_BITS 11
#define DIGITS     (1u << DIGIT_BITS)
#define FEW        64u /* keys that are sorted instead: the passes cost as much for one as for a thousand */
#define LANES      2   /* counters of one digit, so that equal neighbours do not wait for each other */

/* Scratch: the counters, then one key for each score. */
struct scratch {
	size_t counts[LANES][DIGITS];
	uint32_t keys[];
};

/* The wanted score, and how many are greater. */
struct rank {
	uint32_t key;
	size_t greater;
};

static uint32_t key_of(float score)
{
	uint32_t bits;

	score += 0.0f; /* -0 equals 0 */
	memcpy(&bits, &score, sizeof(bits));
	return bits ^ ((uint32_t) - (int32_t)(bits >> 31) | 0x80000000u);
}

static float score_of(uint32_t key)
{
	uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
	float score;

	memcpy(&score, &bits, sizeof(score));
	return score;
}

static void make_keys(const float *scores, size_t n, uint32_t *keys)
{
	for (size_t i = 0; i < n; i++)
		keys[i] = key_of(scores[i]);
}

static void count_digits(struct scratch *s, const uint32_t *keys, size_t n, unsigned shift)
{
	size_t i = 0;

	memset(s->counts, 0, sizeof(s->counts));
	for (; i + LANES <= n; i += LANES)
		for (size_t lane = 0; lane < LANES; lane++)
			s->counts[lane][keys[i + lane] >> shift & (DIGITS - 1)]++;
	for (; i < n; i++)
		s->counts[0][keys[i] >> shift & (DIGITS - 1)]++;
}

/* The digit that holds the key with `*rank` greater ones; *rank becomes its rank among the keys with this digit. */
static uint32_t find_digit(const struct scratch *s, size_t *rank)
{
	uint32_t digit = DIGITS;
	size_t count;

	for (;;) {
		digit--;
		count = 0;
		for (size_t lane = 0; lane < LANES; lane++)
			count += s->counts[lane][digit];
		if (*rank < count)
			return digit;
		*rank -= count;
	}
}

/* Moves the keys with this digit to the front and returns their number. */
static size_t keep_digit(uint32_t *keys, size_t n, unsigned shift, uint32_t digit)
{
	size_t kept = 0;

	for (size_t i = 0; i < n; i++) {
		uint32_t key = keys[i];

		keys[kept] = key;
		kept += (key >> shift & (DIGITS - 1)) == digit;
	}
	return kept;
}

static struct rank find_rank_of_few(uint32_t *keys, size_t n, size_t rank)
{
	size_t greater = rank;

	for (size_t i = 1; i < n; i++) {
		uint32_t key = keys[i];
		size_t at = i;

		for (; at > 0 && keys[at - 1] < key; at--)
			keys[at] = keys[at - 1];
		keys[at] = key;
	}
	while (greater > 0 && keys[greater - 1] == keys[rank])
		greater--;
	return (struct rank){keys[rank], greater};
}

/* The key at position `rank` (< n) of s->keys in descending order. Destroys the keys. */
static struct rank find_rank(struct scratch *s, size_t n, size_t rank)
{
	static const unsigned shifts[] = {21, 10, 0};
	size_t left = rank;

	if (n <= FEW)
		return find_rank_of_few(s->keys, n, rank);
	for (size_t pass = 0; pass < sizeof(shifts) / sizeof(*shifts); pass++) {
		count_digits(s, s->keys, n, shifts[pass]);
		n = keep_digit(s->keys, n, shifts[pass], find_digit(s, &left));
	}
	return (struct rank){s->keys[0], rank - left};
}

/* Sets keep for the `count` best scores that have keep == 0; of equal ones the first. */
static void keep_best(const float *scores, size_t n, size_t count, uint8_t *keep, struct scratch *s)
{
	size_t candidates = 0;

	if (!count)
		return;
	for (size_t i = 0; i < n; i++) {
		s->keys[candidates] = key_of(scores[i]);
		candidates += !keep[i];
	}
	if (count >= candidates) {
		memset(keep, 1, n);
		return;
	}
	struct rank rank = find_rank(s, candidates, count - 1);
	float threshold = score_of(rank.key);
	size_t ties = count - rank.greater;

	for (size_t i = 0; i < n; i++)
		keep[i] |= scores[i] > threshold;
	for (size_t i = 0; i < n && ties; i++) {
		uint8_t tie = !keep[i] && scores[i] == threshold;

		keep[i] |= tie;
		ties -= tie;
	}
}

/* The `pair` rule over n scores. Those with keep == 1 count as larger than any and stay. */
static void keep_above_share(const float *scores, size_t n, double ratio, uint8_t *keep, struct scratch *s)
{
	size_t share = (size_t)((double)n * ratio);

	if (!n)
		return;
	make_keys(scores, n, s->keys);
	for (size_t i = 0; i < n; i++)
		s->keys[i] |= (uint32_t) - (int32_t)keep[i];
	float threshold = score_of(find_rank(s, n, share ? share - 1 : 0).key);

	for (size_t i = 0; i < n; i++)
		keep[i] |= scores[i] > threshold;
}

static void keep_layer(
	const struct kvg_select_input *in, uint32_t layer, int safe, double ratio, uint8_t *keep, struct scratch *s)
{
	const size_t *offset = in->offset + (size_t)layer * in->heads;

	for (uint32_t head = 0; safe && head < in->heads; head++) {
		size_t n = offset[head + 1] - offset[head];
		size_t share = (size_t)((double)n * ratio);

		keep_best(in->scores + offset[head], n, (size_t)(0.2 * (double)share), keep + offset[head], s);
	}
	keep_above_share(in->scores + offset[0], offset[in->heads] - offset[0], ratio, keep + offset[0], s);
}

void kvg_select_prefill_params(uint64_t n, uint64_t chunk, double ratio, uint64_t window, int window_absolute,
	double *ret_ratio, uint64_t *ret_window)
{
	double context = (double)n;
	uint64_t w = window;

	if (!window_absolute && (!chunk || n < chunk))
		w = (uint64_t)(0.02 * context);
	if (ratio >= 1.0) {
		*ret_ratio = 1.0;
		*ret_window = w < n ? w : n;
	} else if (!n || ratio * context < (double)w) {
		*ret_ratio = 0.0;
		*ret_window = (uint64_t)(ratio * context);
	} else {
		*ret_ratio = (ratio * context - (double)w) / (context - (double)w);
		*ret_window = w;
	}
}

size_t kvg_select_scratch(size_t scores, size_t rows)
{
	(void)rows;
	return sizeof(struct scratch) + scores * sizeof(uint32_t);
}

void kvg_select_ratio(const struct kvg_select_input *in, uint32_t level, double ratio, uint8_t *keep, void *scratch)
{
	size_t rows = (size_t)in->layers * in->heads, first = in->offset[0], n = in->offset[rows] - first;

	memset(keep + first, ratio >= 1.0, n);
	if (ratio >= 1.0)
		return;
	if (level == KVG_SELECT_PAIR) {
		keep_above_share(in->scores + first, n, ratio, keep + first, scratch);
	} else if (level == KVG_SELECT_PAIR_HEAD) {
		for (size_t row = 0; row < rows; row++) {
			size_t begin = in->offset[row], length = in->offset[row + 1] - begin;

			keep_best(in->scores + begin, length, (size_t)((double)length * ratio), keep + begin, scratch);
		}
	} else {
		for (uint32_t layer = 0; layer < in->layers; layer++)
			keep_layer(in, layer, level == KVG_SELECT_ADAKV_LAYER, ratio, keep, scratch);
	}
}

void kvg_select_threshold(const struct kvg_select_input *in, float threshold, uint8_t *keep)
{
	size_t end = in->offset[(size_t)in->layers * in->heads];

	for (size_t i = in->offset[0]; i < end; i++)
		keep[i] = in->scores[i] > threshold;
}

void kvg_select_budget(const struct kvg_select_input *in, uint64_t budget, uint8_t *keep, void *scratch)
{
	size_t first = in->offset[0], n = in->offset[(size_t)in->layers * in->heads] - first;
	const float *scores = in->scores + first;
	struct scratch *s = scratch;

	memset(keep + first, n <= budget, n);
	if (n <= budget || !budget)
		return;
	make_keys(scores, n, s->keys);
	float threshold = score_of(find_rank(s, n, budget - 1).key);

	for (size_t i = 0; i < n; i++)
		keep[first + i] = scores[i] >= threshold;
}

void kvg_select_floor(const struct kvg_select_input *in, uint32_t floor, uint8_t *keep, void *scratch)
{
	for (size_t row = 0; row < (size_t)in->layers * in->heads; row++) {
		size_t begin = in->offset[row], n = in->offset[row + 1] - begin, kept = 0;

		for (size_t i = 0; i < n; i++)
			kept += keep[begin + i];
		if (kept < floor)
			keep_best(in->scores + begin, n, floor - kept, keep + begin, scratch);
	}
}
