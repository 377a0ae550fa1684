/*
 * retain.h - what evictions of a sequence dropped and the host keeps (KVG_POLICY_RETAIN_HOST): its store.
 *
 * A store is a dense array of `count` pairs in the frames of one chain (daemon/tier), which the metadata names
 * (meta_seq.retained: first frame + 1; retained_bytes: count pairs of retain_pair_bytes()). Pair i lies in the chain's
 * frame i / per_frame, at place i % per_frame. A frame is
 *     K [per_frame][k_bytes]    at 0
 *     V [per_frame][v_bytes]    at v_offset
 *     struct retain_entry [per_frame] at index_offset
 * Order means nothing. New pairs are appended; whatever goes (pairs that came back, pairs that others of a higher
 * score take the place of) leaves a hole that another pair fills, so that frames at the end of the chain are free as
 * soon as there are few enough pairs. What is not in the first `count` places is not looked at.
 *
 * Where host memory lacks, the best scores stay: of old and new pairs together; of equal ones those that have been
 * there longest, and of new ones those of the lowest row and, in it, of the lowest index. Scores are true ones: what
 * counted as the maximum or as 1.0 in a decision is not written down.
 *
 * A store is a cache of what nobody reads. The jobs of an eviction and of a recall change it in place: a successor of
 * the daemon forgets the store of a sequence whose phase is not META_PHASE_NONE. While one is trimmed, retained_bytes
 * is 0.
 */
#ifndef KVG_RETAIN_H
#define KVG_RETAIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/kvgate_abi.h"

struct sequence;

/* What is known of a retained pair. */
struct retain_entry {
	uint32_t row; /* layer * heads + head */
	uint32_t pos;
	float score;
};

/* How pairs of a layout lie in frames of one size. */
struct retain_form {
	uint32_t k_bytes, v_bytes;       /* of one pair */
	uint32_t per_frame;              /* pairs; 0: a frame is too small for one */
	uint32_t v_offset, index_offset; /* multiples of 16 */
	size_t frame_size;
};

/*
 * A store as an eviction or a recall works with it. frames[i] is the number of the chain's i-th frame, from 0, which
 * lies at base + frames[i] * frame_size. The reactor owns it but while a job of its sequence runs.
 */
struct retain {
	struct retain_form form;
	uint8_t *base;
	uint32_t *frames;
	uint32_t frame_count, frame_capacity;
	uint64_t count; /* pairs */
};

void retain_form_init(struct retain_form *form, const struct kvg_group *group, size_t frame_size);

/* Bytes that a pair is counted with in meta_seq.retained_bytes. */
static inline uint32_t retain_pair_bytes(const struct retain_form *form)
{
	return form->k_bytes + form->v_bytes + (uint32_t)sizeof(struct retain_entry);
}

static inline uint64_t retain_capacity(const struct retain *retain)
{
	return (uint64_t)retain->frame_count * retain->form.per_frame;
}

/* Frames for that many pairs. */
static inline uint64_t retain_frames_for(const struct retain_form *form, uint64_t pairs)
{
	return (pairs + form->per_frame - 1) / form->per_frame;
}

static inline uint8_t *retain_frame(const struct retain *retain, uint64_t i)
{
	return retain->base + (size_t)retain->frames[i / retain->form.per_frame] * retain->form.frame_size;
}

static inline uint8_t *retain_k(const struct retain *retain, uint64_t i)
{
	return retain_frame(retain, i) + i % retain->form.per_frame * retain->form.k_bytes;
}

static inline uint8_t *retain_v(const struct retain *retain, uint64_t i)
{
	return retain_frame(retain, i) + retain->form.v_offset + i % retain->form.per_frame * retain->form.v_bytes;
}

static inline struct retain_entry *retain_entry(const struct retain *retain, uint64_t i)
{
	return (struct retain_entry *)(void *)(retain_frame(retain, i) + retain->form.index_offset) +
	       i % retain->form.per_frame;
}

/* Where new pairs go: new pair i at place[i] of the store, or nowhere (RETAIN_NOWHERE). */
#define RETAIN_NOWHERE UINT64_MAX
struct retain_plan {
	uint64_t *place; /* [new_count] */
	uint64_t count;  /* of the store, when all are there */
};

/*
 * Decides what stays of the store's pairs and of new ones with these scores, in the store's capacity. Entries are not
 * touched: places of pairs that go are among place[]. 0 or -ENOMEM.
 */
int retain_plan(const struct retain *retain, const float *scores, uint64_t new_count, struct retain_plan *ret);
void retain_plan_deinit(struct retain_plan *plan);

/* ---- retain_room.c, on the reactor ---- */

/* Whether the sequence's evictions have a PACK step: by its policy, its kind, and a host budget that is not 0. */
bool retain_wants(const struct sequence *sequence);

/*
 * Frames for that many pairs more, or as many as its tenant's budget has; they join the sequence's chain. False when
 * the store has no room for any pair. Never an error.
 */
bool retain_take(struct sequence *sequence, uint64_t pairs);

/* After a job that changed the store: the metadata says what it holds, and frames that it does not need go back. */
void retain_settle(struct sequence *sequence);

/* Gives the store up, with all frames. */
void retain_forget(struct sequence *sequence);

/*
 * Makes the store smaller by that many frames, or by all that it has when its turn comes: the lowest scores go. They
 * are the tenant's `trims` until then; reclaim_wake() follows.
 */
void retain_trim(struct sequence *sequence, uint64_t frames);

/* ---- on the executor ---- */

/* Makes the frames behind the store's pairs ready for use: 0, -EAGAIN: another call is needed, or a negative errno. */
int retain_open(const struct sequence *sequence);

/* Which pairs are not among the best `stay`, fewer than there are: *ret (to be freed) ascends. 0 or -ENOMEM. */
int retain_choose_worst(const struct retain *retain, uint64_t stay, uint64_t **ret, uint64_t *ret_count);

/* Takes pairs out: chosen[] ascends. Pairs from the end fill their places; count falls by n. */
void retain_remove(struct retain *retain, const uint64_t *chosen, uint64_t n);

#endif
