/*
 * live.h - workers of a real kvgated of either kind: sequences whose content says what it is
 * (tools/bench/content.h), and which positions each row holds after each step.
 *
 * The test process itself never touches the device: a context does not survive fork(). Workers are forked
 * (tests/integration/process.h) and open it themselves, so everything here but live_gpu() and live_config() is for
 * them: no assertions, and "must" ends the worker.
 */
#ifndef KVG_TEST_GPU_LIVE_H
#define KVG_TEST_GPU_LIVE_H

#include <stdbool.h>
#include <stdint.h>

#include "client/kvgate.h"
#include "tests/support/daemon.h"
#include "tools/bench/content.h"
#include "tools/bench/service.h"
#include "tools/bench/synthetic.h"

/* Whether a GPU can be used here; found out by a child process. */
bool live_gpu(void);

/* Writes a configuration: a pool of that kind with extents of 2 MiB, then `more`. */
void live_config(char *ret, size_t size, bool cuda, const char *pool_size, const char *more);

/* The audit must be clean; for both kinds (fixture_audit() looks at memfds). */
void live_audit(const struct fixture *fixture);

struct live {
	struct kvg_client *client;
	struct kvg_layout layout;
	struct synthetic *synthetic; /* NULL on the host kind */
	struct content *content;
};

/* Connects, opens the device where there is one, and registers. */
void live_open(struct live *live, const char *socket, bool cuda, const struct kvg_layout *layout);
void live_close(struct live *live);

/* Six layers of four heads of 32 in bf16. */
void live_layout(struct kvg_layout *layout, uint32_t max_sequences, uint32_t max_tokens);

struct live_sequence {
	uint64_t seq, tag;
	uint32_t pos;
	uint32_t levels; /* scores take so many values; 0: all are different */
};

void live_create(struct live *live, const struct kvg_policy *policy, uint64_t tag, struct live_sequence *ret);

/* Reserves, writes, stages scores (a function of tag, layer, head and position) and commits. */
void live_feed(struct live *live, struct live_sequence *sequence, uint32_t tokens);

/* Every byte must be right; bits as content_check() finds them (NULL: not wanted). Returns the pairs. */
uint64_t live_check(struct live *live, const struct live_sequence *sequence, uint32_t *bits);

/* Evicts and checks that what is left is what the daemon says. */
void live_evict(struct live *live, const struct live_sequence *sequence, uint32_t mode, struct kvg_evict_result *ret);

void live_free(struct live *live, struct live_sequence *sequence);

#endif
