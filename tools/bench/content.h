/*
 * content.h - KV that says what it is: every 4-byte word of a pair is a function of the sequence's tag, its row
 * (layer and head), its position and the word's place, so that each byte of a row can be checked and each pair
 * found in it names its position.
 *
 * Word 0 of K is the position itself. On the host kind the CPU writes and reads through kvg_view(), on cuda
 * kernels do, which follow the tables in device memory as any other kernel of a worker would. Part of
 * this header is for device code.
 */
#ifndef KVG_BENCH_CONTENT_H
#define KVG_BENCH_CONTENT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define CONTENT_FUNCTION static __device__ __forceinline__
#else
#define CONTENT_FUNCTION static inline
#endif

/* half: 0 for K, 1 for V. */
CONTENT_FUNCTION uint32_t content_word(uint64_t tag, uint32_t row, uint32_t position, uint32_t half, uint32_t word)
{
	uint32_t x = (uint32_t)tag + row * 0x9e3779b1u + position * 0x85ebca77u;

	if (!half && !word)
		return position;
	x ^= (uint32_t)(tag >> 32) + (2 * word + half) * 0xc2b2ae3du;
	x = (x ^ (x >> 16)) * 0x7feb352du;
	x = (x ^ (x >> 15)) * 0x846ca68bu;
	return x ^ (x >> 16);
}

/* A worker's tables as kernels and the CPU see them: addresses of the kind's own memory. */
struct content_kv {
	uint8_t *k_base, *v_base;
	uint64_t stride;
	const uint32_t *ids, *base_len;
	uint32_t layers, heads, max_sequences, row_cap;
	uint32_t k_words, v_words; /* of one pair */
};

/* What a check counts, over all rows. */
struct content_counts {
	uint64_t pairs;
	uint64_t wrong;    /* words that are not what they must be */
	uint64_t repeated; /* pairs whose position the row has had already */
	uint64_t strange;  /* pairs whose position no token has, or ids out of range */
};

/* See synthetic_gather(). */
struct synthetic_gather_args {
	const uint32_t *appended, *slots;
	const uint8_t *source;
	uint64_t source_layer, source_row;
	uint32_t source_rows, capacity, row_bytes;
	uint8_t *to;
};

#ifndef __CUDACC__
struct content;
struct synthetic;
struct kvg_client;
struct kvg_layout;

/*
 * For a client that has registered that layout. synthetic: the device of the cuda kind (borrowed), NULL for the host
 * kind. Here and below: 0, or a negative errno with a line on standard error.
 */
int content_new(
	struct kvg_client *client, const struct kvg_layout *layout, struct synthetic *synthetic, struct content **ret);
struct content *content_free(struct content *content);

/* Writes all rows of positions pos .. pos + count - 1, which are reserved and not folded. On cuda it only enqueues. */
int content_fill(struct content *content, uint64_t seq, uint64_t tag, uint32_t pos, uint32_t count);

/*
 * Reads every byte of all rows of a sequence, of which the positions below `end` are written, and marks in `bits`
 * (uint32 [content_rows()][content_words()], position p at bit p % 32 of word p / 32) which positions each
 * row has. Pairs that are not as they must be are counted, and are no failure of the call.
 */
int content_check(
	struct content *content, uint64_t seq, uint64_t tag, uint32_t end, uint32_t *bits, struct content_counts *ret);

uint32_t content_rows(const struct content *content);
uint32_t content_words(const struct content *content);      /* of one row's bits: for max_tokens */
uint32_t content_pair_bytes(const struct content *content); /* K and V */
#endif

#endif
