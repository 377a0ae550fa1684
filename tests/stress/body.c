#include "tests/stress/body.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "kernels/host/dtype.h"

static uint32_t word_of(uint32_t tag, uint32_t row, uint32_t position, uint32_t word)
{
	uint32_t x = tag + row * 0x9e3779b1u + position * 0x85ebca77u;

	if (!word)
		return position;
	x ^= word * 0xc2b2ae3du;
	x = (x ^ (x >> 16)) * 0x7feb352du;
	x = (x ^ (x >> 15)) * 0x846ca68bu;
	return x ^ (x >> 16);
}

int body_open(struct body_kv *kv, struct kvg_client *client, const struct kvg_layout *layout)
{
	const struct kvg_group *group = &layout->groups[0];

	kv->client = client;
	kv->rows = group->layers * group->head_count;
	kv->k_words = group->k_dim * (uint32_t)kvg_dtype_size(group->k_dtype) / 4;
	kv->v_words = group->v_dim * (uint32_t)kvg_dtype_size(group->v_dtype) / 4;
	kv->checks = kv->bytes = 0;
	return kvg_view(client, &kv->view);
}

static size_t row_at(const struct body_kv *kv, const struct body *body, uint32_t row)
{
	uint32_t heads = kv->view.heads, slot = (uint32_t)body->seq;

	return ((size_t)(row / heads) * kv->view.max_sequences + slot) * heads + row % heads;
}

/* Pair `index` of a row; half 0: K, 1: V. */
static uint32_t *pair_at(const struct body_kv *kv, size_t at, uint32_t index, uint32_t half)
{
	uint64_t id = kv->view.ids[at * kv->view.row_cap + index / KVG_BLOCK_TOKENS];
	uint8_t *base = half ? kv->view.v_base : kv->view.k_base;

	return (uint32_t *)(void *)(base + id * kv->view.stride) +
	       index % KVG_BLOCK_TOKENS * (half ? kv->v_words : kv->k_words);
}

static void set_bits(const struct body_kv *kv, body_bits bits, uint32_t begin, uint32_t end, bool value)
{
	for (uint32_t row = 0; row < kv->rows; row++)
		for (uint32_t pos = begin; pos < end; pos++) {
			uint32_t bit = 1u << pos % 32;

			bits[row][pos / 32] = value ? bits[row][pos / 32] | bit : bits[row][pos / 32] & ~bit;
		}
}

static void write_row(const struct body_kv *kv, const struct body *body, uint32_t row, uint32_t count)
{
	size_t at = row_at(kv, body, row);
	uint32_t first = kv->view.base_len[at] + body->pos - kv->view.slots[(uint32_t)body->seq].fold_pos;

	for (uint32_t i = 0; i < count; i++) {
		uint32_t pos = body->pos + i, *k = pair_at(kv, at, first + i, 0), *v = pair_at(kv, at, first + i, 1);

		for (uint32_t word = 0; word < kv->k_words; word++)
			k[word] = word_of(body->tag[pos], row, pos, word);
		for (uint32_t word = 0; word < kv->v_words; word++)
			v[word] = word_of(body->tag[pos], row, pos, word + kv->k_words);
	}
}

int body_write(struct body_kv *kv, struct body *body, uint32_t count, uint32_t tag)
{
	const struct kvg_slot *slot = &kv->view.slots[(uint32_t)body->seq];

	if (body->pos < slot->fold_pos || body->pos + count > slot->reserved_pos) {
		(void)fprintf(stderr, "body: positions %u to %u, folded %u, reserved %u\n", body->pos,
			body->pos + count, slot->fold_pos, slot->reserved_pos);
		return -ERANGE;
	}
	for (uint32_t i = 0; i < count; i++)
		body->tag[body->pos + i] = tag + i;
	for (uint32_t row = 0; row < kv->rows; row++)
		write_row(kv, body, row, count);
	set_bits(kv, body->held, body->pos, body->pos + count, true);
	set_bits(kv, body->gone, body->pos, body->pos + count, false);
	body->pos += count;
	return 0;
}

void body_cut(struct body_kv *kv, struct body *body, uint32_t pos)
{
	set_bits(kv, body->held, pos, body->pos, false);
	body->pos = pos;
}

/* ---- reading ---- */

void body_note(struct body *body, enum stress_op op)
{
	body->past[body->past_count++ % BODY_PAST] = (uint8_t)(op + 1);
}

static int complain(const struct body *body, uint32_t row, uint32_t at, const char *what)
{
	for (uint32_t i = 0; i < BODY_PAST; i++) {
		uint8_t op = body->past[(body->past_count + i) % BODY_PAST];

		if (op)
			(void)fprintf(stderr, "%s ", stress_op_name(op - 1));
	}
	(void)fprintf(stderr, "worker %d: sequence %" PRIx64 " of %u tokens (%u folded, %u shared), row %u, %u: %s\n",
		(int)getpid(), body->seq, body->pos, body->fold_pos, body->shared, row, at, what);
	return -EBADMSG;
}

/* How much of the sequence is wrong, and how: of memory that was never written, of others, or once its own. */
static void survey(struct body_kv *kv, const struct body *body)
{
	uint32_t pairs = 0, foreign = 0, zero = 0;

	for (uint32_t row = 0; row < kv->rows; row++) {
		size_t at = row_at(kv, body, row);
		uint32_t length = kv->view.base_len[at] + kv->view.appended[(uint32_t)body->seq], wrong = 0;

		for (uint32_t index = 0; index < length; index++) {
			const uint32_t *k = pair_at(kv, at, index, 0);

			wrong += k[0] >= body->pos || k[1] != word_of(body->tag[k[0]], row, k[0], 1);
			zero += !k[0] && !k[1] && !k[kv->k_words - 1];
		}
		if (wrong)
			(void)fprintf(stderr, "row %u: %u of %u pairs are foreign, first block %u\n", row, wrong,
				length, kv->view.ids[at * kv->view.row_cap]);
		pairs += length;
		foreign += wrong;
	}
	(void)fprintf(stderr, "%u of %u pairs are foreign, %u zero\n", foreign, pairs, zero);
}

static int foreign(struct body_kv *kv, const struct body *body, uint32_t row, uint32_t index, const char *what)
{
	size_t at = row_at(kv, body, row);
	const uint32_t *k = pair_at(kv, at, index, 0), *v = pair_at(kv, at, index, 1);
	const struct kvg_slot *slot = &kv->view.slots[(uint32_t)body->seq];

	(void)fprintf(stderr,
		"block %u: K %08x %08x %08x, V %08x %08x; base length %u, appended %u, generation %u, committed %u, "
		"reserved %u, shared %u\n",
		kv->view.ids[at * kv->view.row_cap + index / KVG_BLOCK_TOKENS], k[0], k[1], k[kv->k_words - 1], v[0],
		v[1], kv->view.base_len[at], kv->view.appended[(uint32_t)body->seq], slot->generation,
		slot->committed_pos, slot->reserved_pos, slot->shared_pos);
	survey(kv, body);
	return complain(body, row, index, what);
}

static int read_pair(struct body_kv *kv, const struct body *body, uint32_t row, size_t at, uint32_t index)
{
	const uint32_t *k = pair_at(kv, at, index, 0), *v = pair_at(kv, at, index, 1);
	uint32_t pos = k[0], bit = 1u << pos % 32;

	if (pos >= body->pos)
		return foreign(kv, body, row, index, "a pair of no position of the sequence's");
	for (uint32_t word = 1; word < kv->k_words; word++)
		if (k[word] != word_of(body->tag[pos], row, pos, word))
			return foreign(kv, body, row, index, "foreign bytes in K");
	for (uint32_t word = 0; word < kv->v_words; word++)
		if (v[word] != word_of(body->tag[pos], row, pos, word + kv->k_words))
			return foreign(kv, body, row, index, "foreign bytes in V");
	if (kv->found[row][pos / 32] & bit)
		return complain(body, row, pos, "a pair for the second time");
	kv->found[row][pos / 32] |= bit;
	return 0;
}

static int read_row(struct body_kv *kv, const struct body *body, uint32_t row, uint64_t *pairs)
{
	size_t at = row_at(kv, body, row);
	uint32_t length = kv->view.base_len[at] + kv->view.appended[(uint32_t)body->seq];
	int r = 0;

	if (length > kv->view.row_cap * KVG_BLOCK_TOKENS || length > body->pos)
		return complain(body, row, length, "pairs, which is more than there are tokens");
	memset(kv->found[row], 0, sizeof(kv->found[row]));
	for (uint32_t index = 0; r == 0 && index < length; index++)
		r = read_pair(kv, body, row, at, index);
	*pairs += length;
	kv->bytes += (uint64_t)length * (kv->k_words + kv->v_words) * 4;
	return r;
}

/* Whether an eviction has to leave a position alone. */
static bool stays(const struct body *body, uint32_t pos)
{
	return pos < body->fixed || (pos >= body->protect_begin && pos < body->protect_end);
}

static int compare_word(
	const struct body_kv *kv, const struct body *body, enum body_change change, uint32_t row, uint32_t word)
{
	uint32_t held = body->held[row][word], found = kv->found[row][word], more = found & ~held, less = held & ~found;

	if (change == BODY_MORE)
		more &= ~body->gone[row][word];
	if (more)
		return complain(body, row, word * 32 + (uint32_t)__builtin_ctz(more), "a pair is back that was gone");
	for (uint32_t i = 0; less && i < 32; i++)
		if (less >> i & 1 && (change != BODY_LESS || stays(body, word * 32 + i)))
			return complain(body, row, word * 32 + i, "a pair is lost");
	return 0;
}

static void take_found(struct body_kv *kv, struct body *body)
{
	for (uint32_t row = 0; row < kv->rows; row++)
		for (uint32_t word = 0; word < BODY_WORDS; word++) {
			uint32_t held = body->held[row][word], found = kv->found[row][word];

			body->gone[row][word] = (body->gone[row][word] | (held & ~found)) & ~found;
			body->held[row][word] = found;
		}
}

int body_check(struct body_kv *kv, struct body *body, enum body_change change, const uint64_t *pairs)
{
	uint64_t sum = 0;
	int r = 0;

	for (uint32_t row = 0; r == 0 && row < kv->rows; row++)
		r = read_row(kv, body, row, &sum);
	if (r == 0 && pairs && *pairs != sum)
		r = complain(body, 0, (uint32_t)sum, "pairs in all, which is not what the daemon says");
	for (uint32_t row = 0; r == 0 && row < kv->rows; row++)
		for (uint32_t word = 0; r == 0 && word < BODY_WORDS; word++)
			r = compare_word(kv, body, change, row, word);
	if (r < 0)
		return r;
	take_found(kv, body);
	kv->checks++;
	return 0;
}
