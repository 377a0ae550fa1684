/*
 * insitu_worker.h - a worker with a load of its own beside a kvgated of the kind cuda: service, MPS, device, client and
 * model in one place, for insitu and timeline.
 */
#ifndef KVG_BENCH_INSITU_WORKER_H
#define KVG_BENCH_INSITU_WORKER_H

#include <stdbool.h>
#include <stdint.h>

#include "client/kvgate.h"
#include "tools/bench/insitu_model.h"
#include "tools/bench/service.h"

struct rig_options {
	const char *kvgated; /* NULL: the one beside kvgate-bench */
	int device;
	bool wide; /* see model_new() */
	uint32_t layers, sequences, rows;
	uint32_t max_tokens;
	uint64_t pool, extent; /* bytes; extent 0: the daemon's default */
	uint64_t host;         /* bytes of the host tier; 0: none */
};

struct rig {
	struct service service;
	struct service_status status; /* at the start */
	struct synthetic *synthetic;
	struct kvg_client *client;
	struct model *model;
	struct kvg_view view;
};

/*
 * Starts the daemon, the device, the client with its gate, and the model. 0 or a negative errno with a line on standard
 * error; rig_close() in any case.
 */
int rig_open(struct rig *rig, const struct rig_options *options);

/*
 * Calls run(user), with mps in a child process whose descendants and itself are clients of an MPS server that is
 * started before and ended after: a server ends when its clients have. Returns what run() does, from a child only
 * whether it was negative.
 */
int rig_run(bool mps, int (*run)(void *user), void *user);

/* Ends it all. Negative when the daemon did not end as it should. */
int rig_close(struct rig *rig);

/* Says what a call of libkvgate failed with; returns r. */
int rig_client(const struct rig *rig, int r, const char *what);

/* The same for a call of the driver. */
int rig_driver(const struct rig *rig, CUresult result, const char *what);

/* Random scores of all layers for positions pos .. pos + count - 1 of a sequence. */
int rig_stage_scores(struct rig *rig, uint64_t seq, uint32_t layers, uint32_t pos, uint32_t count, uint64_t *random);

#endif
