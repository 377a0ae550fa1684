/*
 * select_args.h - what select.c hands to the kernels of select.cu.
 *
 * Pointers are device pointers. Scores come in quads: four whose first has an index that is a multiple of
 * four, so that a quad is one aligned load whatever the rows' offsets are.
 */
#ifndef KVG_CUDA_SELECT_ARGS_H
#define KVG_CUDA_SELECT_ARGS_H

#include <stdint.h>

#define KVG_SELECT_GRID_THREADS 1024
#define KVG_SELECT_GRID_BINS    4096 /* of one round of select_grid: four for each thread */
#define KVG_SELECT_GRID_STAGES  16   /* of KVG_SELECT_GRID_THREADS quads each: a block stages no more */
#define KVG_SELECT_ROW_THREADS  512
#define KVG_SELECT_DIGITS       2048 /* bins of the steps and of select_rows: 11, 11 and 10 bits from the top */
#define KVG_SELECT_FLAT_THREADS 512  /* of the kernels that look at each score once */
#define KVG_SELECT_ROUNDS       4    /* of one search, at most */

/* Counters of one round: how the scores of a segment spread over a range of keys. */
struct kvg_select_round {
	uint64_t tally[2]; /* sums of the scores above the range and in it, each with the blocks in units of ARRIVED */
	uint64_t pad[14];
	uint32_t count[KVG_SELECT_GRID_BINS];
};

#define KVG_SELECT_ARRIVED ((uint64_t)1 << 40)

/*
 * What the blocks that share a segment meet at. A search uses one set of rounds and zeroes the other one, so that each
 * finds zeros, nobody has to clear memory between launches, and no block waits for the zeros of another.
 */
struct kvg_select_group {
	uint32_t turn; /* the set that is zero: 0 or 1 */
	uint32_t pad[31];
	struct kvg_select_round round[2][KVG_SELECT_ROUNDS];
};

struct kvg_select_grid_args {
	const float *scores;
	const uint32_t *offset; /* or NULL, here and below */
	uint8_t *keep;          /* or NULL */
	float *threshold;       /* [segments] or NULL */
	struct kvg_select_group *groups;
	uint64_t budget;
	double ratio;
	uint32_t length;         /* of each row when offset is NULL, here and below */
	uint32_t segments, rows; /* rows of one segment */
	uint32_t members;        /* blocks of one group */
	uint32_t staged;         /* quads that fit into shared memory */
	uint32_t by_budget;      /* 1: budget, 0: ratio */
	uint32_t safe;           /* 1: scores with keep == 1 count as larger than any and stay */
};

enum kvg_select_row_rule {
	KVG_SELECT_ROW_SHARE, /* the top int(N r) */
	KVG_SELECT_ROW_SAFE,  /* the top int(0.2 int(N r)) */
	KVG_SELECT_ROW_FLOOR  /* as many of those with keep == 0 as are missing to the floor */
};

struct kvg_select_row_args {
	const float *scores;
	const uint32_t *offset;
	uint8_t *keep;
	double ratio;
	uint32_t length;
	uint32_t rule, floor;
	uint32_t staged; /* quads that fit into shared memory */
};

struct kvg_select_mask_args {
	const float *scores;
	const uint32_t *offset;
	uint8_t *keep;
	const float *threshold; /* or NULL: value */
	float value;
	uint32_t length, rows;
	uint32_t equal; /* 1: keep score >= threshold, 0: score > threshold */
	uint32_t all;   /* 1: keep all */
};

/* Where a search by steps stands, in device memory. */
struct kvg_cuda_select_state {
	uint32_t prefix;  /* the digits found so far */
	uint32_t left;    /* rank among the keys with that prefix */
	uint32_t greater; /* scores above them; after the last step above the threshold */
	float threshold;  /* after the last step */
};

struct kvg_select_step_args {
	const float *scores;
	const uint32_t *offset;
	uint32_t *counts; /* [KVG_SELECT_DIGITS], zeroed */
	const struct kvg_cuda_select_state *state;
	uint32_t length, rows, pass;
};

struct kvg_select_cut_args {
	const uint32_t *counts;
	struct kvg_cuda_select_state *state;
	uint32_t pass, rank;
};

#endif
