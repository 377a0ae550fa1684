/*
 * fake_kvgate.h - stands in for libkvgate in tests of kvgate-lm: one client, one sequence, KV in
 * plain memory (memory_kv.h). It holds the worker to the rules of client/kvgate.h (a broken rule
 * fails the test), counts calls, and fails on demand. An eviction drops nothing.
 */
#ifndef KVG_TEST_FAKE_KVGATE_H
#define KVG_TEST_FAKE_KVGATE_H

#include <stdbool.h>
#include <stdint.h>

#include "client/kvgate.h"
#include "tests/unit/tools/lm/memory_kv.h"

struct fake_kvgate {
	struct memory_kv kv;
	struct kvg_layout layout;
	struct kvg_policy policy; /* of the last create */
	int connected, sequences;
	uint32_t reserved_pos, committed_pos, evicted_pos;
	unsigned creates, evictions, decode_evictions, truncates, stages, gates;
	uint64_t drops;          /* what a decode eviction says that it dropped; the pairs stay */
	uint32_t evicted_at[16]; /* committed position at each eviction */
	uint64_t staged_rows;    /* of the sequence, all layers */
	double recalled;         /* ratio of the last recall */
	bool offloaded;          /* nothing may be read or written */
	unsigned recalls, offloads, restores;
	/* The context published, whose KV is what `kv` holds: it stays when the sequence goes. */
	uint8_t key[KVG_KEY_SIZE];
	uint32_t published, publishes, attaches;
	int fail_gate, fail_create, fail_stage, fail_evict; /* what that call returns, when not 0 */
};

/* The one there is; reset to nothing (nothing may be connected). */
struct fake_kvgate *fake_kvgate_reset(void);

#endif
