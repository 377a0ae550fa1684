/*
 * later.h - calls of libkvgate that not every build of it has yet: an absent one's address is NULL.
 */
#ifndef KVG_STRESS_LATER_H
#define KVG_STRESS_LATER_H

#include "client/kvgate.h"

#define LATER __attribute__((weak))

struct kvg_recall_result {
	uint64_t pairs_held, pairs_recalled, bytes;
	uint32_t generation, reserved;
};

struct kvg_context_info {
	uint64_t id, bytes;
	uint32_t tokens, attached;
	uint32_t existed, reserved;
};

int LATER kvg_offload(struct kvg_client *client, uint64_t seq, uint64_t *ret_bytes);
int LATER kvg_restore(struct kvg_client *client, uint64_t seq);
int LATER kvg_idle(struct kvg_client *client, uint64_t seq);
int LATER kvg_recall(struct kvg_client *client, uint64_t seq, double ratio, struct kvg_recall_result *ret);
int LATER kvg_recall_budget(struct kvg_client *client, uint64_t seq, uint32_t budget, struct kvg_recall_result *ret);
int LATER kvg_publish(
	struct kvg_client *client, uint64_t seq, const uint8_t key[KVG_KEY_SIZE], struct kvg_context_info *ret);
int LATER kvg_find(struct kvg_client *client, const uint8_t key[KVG_KEY_SIZE], struct kvg_context_info *ret);
int LATER kvg_attach(struct kvg_client *client, const uint8_t key[KVG_KEY_SIZE], const struct kvg_policy *policy,
	uint64_t *ret_seq, struct kvg_context_info *ret);
int LATER kvg_fork(struct kvg_client *client, uint64_t seq, uint32_t count, uint64_t *ret_seqs);

#endif
