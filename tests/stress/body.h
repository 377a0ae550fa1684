/*
 * body.h - a sequence whose KV says what it is, and what each of its rows must hold.
 *
 * Every 4-byte word of a pair comes from the tag of its position, its row, its position and the word's place; word 0 of
 * K is the position itself, so that a pair found in a row names itself. Each token that is written gets a tag of its
 * own, so that bytes of an earlier token at the same position, or of another sequence, are foreign.
 *
 * 0, or a negative errno after a line on standard error.
 */
#ifndef KVG_STRESS_BODY_H
#define KVG_STRESS_BODY_H

#include <stdbool.h>
#include <stdint.h>

#include "client/kvgate.h"
#include "tests/stress/stress.h"

#define BODY_WORDS (STRESS_TOKENS / 32)
#define BODY_PAST  32u

/* Positions that rows hold: bit p % 32 of word p / 32. */
typedef uint32_t body_bits[STRESS_ROWS][BODY_WORDS];

struct body {
	bool live;
	bool evicted; /* at least once */
	bool away;    /* idle or offloaded */
	uint64_t seq;
	struct kvg_policy policy;
	uint32_t shared;   /* positions below it belong to a context */
	uint32_t fixed;    /* positions below it are never evicted */
	uint32_t end;      /* of the prompt */
	uint32_t pos;      /* committed tokens */
	uint32_t fold_pos; /* of the last eviction */
	uint32_t boundary; /* where the next eviction is due */
	uint32_t protect_begin, protect_end;
	uint32_t tag[STRESS_TOKENS];
	body_bits held;
	uint8_t past[BODY_PAST]; /* what was done last: enum stress_op + 1, newest at past_count - 1 (modulo) */
	uint32_t past_count;
	body_bits gone; /* dropped by evictions, so that a recall may bring them back */
};

/* A client's KV, as bodies are written and read. */
struct body_kv {
	struct kvg_client *client; /* borrowed */
	struct kvg_view view;
	uint32_t rows, k_words, v_words;
	uint64_t checks, bytes;
	body_bits found;
};

/* What may have happened to the rows since they were looked at. */
enum body_change {
	BODY_SAME,
	BODY_LESS, /* an eviction */
	BODY_MORE, /* a recall: of what was dropped */
};

int body_open(struct body_kv *kv, struct kvg_client *client, const struct kvg_layout *layout);

/* Writes the `count` tokens after the committed ones, which are reserved, in all rows, and makes them the body's. */
int body_write(struct body_kv *kv, struct body *body, uint32_t count, uint32_t tag);

/* Remembers what was done, for complaints. */
void body_note(struct body *body, enum stress_op op);

/* Forgets tokens from pos on. */
void body_cut(struct body_kv *kv, struct body *body, uint32_t pos);

/* Reads every byte; the rows' pairs must be `pairs` together (NULL: whatever the body says). */
int body_check(struct body_kv *kv, struct body *body, enum body_change change, const uint64_t *pairs);

#endif
