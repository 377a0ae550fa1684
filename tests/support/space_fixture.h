/*
 * space_fixture.h - a space as its worker sees it, without a worker: the real
 * loop, executor, pool and memfds, one tenant, one space, and calls that submit
 * a request and run the loop until it is completed.
 *
 * After each completion the metadata is audited, so that a test fails at the first operation that loses count.
 * Extents that come and go are noted, and a call acknowledges those that go unless the test holds that back.
 */
#ifndef KVG_TEST_SPACE_FIXTURE_H
#define KVG_TEST_SPACE_FIXTURE_H

#include "daemon/sequence/space.h"

#include "tests/support/runner.h"

/* 0 stands for the value in brackets. */
struct fixture_options {
	uint32_t layers, heads;    /* [2], [2] */
	uint32_t k_dim, v_dim;     /* [8] */
	uint32_t k_dtype, v_dtype; /* [bf16] */
	uint32_t max_sequences;    /* [8] */
	uint32_t max_tokens;       /* [4096] */
	size_t extent_size;        /* [64 KiB] */
	uint64_t pool_size;        /* [64 MiB] */
	uint64_t device_max;       /* [pool_size] */
	uint64_t host_size;        /* of the host tier [0] */
	struct kind *kind;         /* [a new host kind]; borrowed */
	bool view;                 /* the worker has a mapping of its own */
};

struct fixture;

/* Told of each completion, before anything else goes on; calls are done by then. */
typedef void (*fixture_completed)(void *user, struct fixture *fixture, const struct request *request);

struct call {
	struct list node;
	struct request request;
	bool done;
	unsigned order; /* of completion, from 1 */
};

struct fixture {
	struct fixture *first; /* whose loop, executor, pool and tenant these are; NULL: its own */
	struct loop *loop;
	struct executor *executor;
	struct kind *kind, *own_kind;
	struct pool *pool;
	struct host_tier *tier;
	struct tenant *tenant;
	struct space *space;
	struct kvg_layout layout;
	uint8_t *staging;
	size_t staging_size;
	struct list calls;
	const struct call *waiting;
	unsigned completed;
	bool *mapped;  /* by arena slot */
	uint8_t *view; /* the extents that the worker has mapped, each at its slot; NULL: see fixture_options */
	fixture_completed told;
	void *told_user;
	unsigned mapped_count;
	uint32_t events, dropped_event, acknowledged;
	int added_status; /* what extents_added() answers */
	bool hold_unmapped, no_audit, closed;
	struct kvg_cqe cqe; /* of the last call, and why it failed */
	char text[KVG_TEXT_SIZE];
};

struct fixture *fixture_new(const struct fixture_options *options);

/* Another worker's space, of the same tenant (tenant NULL) or of another one, which the caller frees. Freed before
 * `first`. */
struct fixture *fixture_join(struct fixture *first, struct tenant *tenant, const struct fixture_options *options);

/* Ends the space, with the last one of all the contexts as well, and checks that every byte came back. */
void fixture_free(struct fixture *fixture);

/* Forgets the tenant's contexts, and runs the loop until nothing is left to do. */
void fixture_forget_contexts(struct fixture *fixture, struct tenant *tenant);

/* Ends the space and runs the loop until it is closed. */
void fixture_kill(struct fixture *fixture);

/* A layout as the fixture makes it. */
struct kvg_layout fixture_layout(const struct fixture_options *options);

/* Submits; the call is freed with the fixture. */
struct call *fixture_start(struct fixture *fixture, const struct kvg_sqe *sqe);
void fixture_wait(struct fixture *fixture, const struct call *call);

/* Submits, waits, acknowledges what was dropped; returns the status. */
int fixture_call(struct fixture *fixture, const struct kvg_sqe *sqe);
void fixture_acknowledge(struct fixture *fixture);

/* One round of the loop at least. */
void fixture_turn(struct fixture *fixture);

/* The operations. handle: cqe.seq. */
int fixture_create(struct fixture *fixture, const struct kvg_policy *policy, uint64_t *ret_handle);
int fixture_reserve(struct fixture *fixture, uint64_t handle, uint32_t tokens);
int fixture_commit(struct fixture *fixture, uint64_t handle, uint32_t pos);
int fixture_truncate(struct fixture *fixture, uint64_t handle, uint32_t pos);
int fixture_evict(struct fixture *fixture, uint64_t handle, uint32_t mode);
int fixture_release(struct fixture *fixture, uint64_t handle);
int fixture_query(struct fixture *fixture, uint64_t handle);

/* Contexts. key: one number stands for it. FIND returns the context, 0 for none. */
int fixture_publish(struct fixture *fixture, uint64_t handle, uint32_t key);
uint64_t fixture_find(struct fixture *fixture, uint32_t key);
int fixture_attach(struct fixture *fixture, uint64_t context, const struct kvg_policy *policy, uint64_t *ret_handle);
int fixture_fork(struct fixture *fixture, uint64_t handle, uint64_t *ret_handle);

/* A PUBLISH that is not waited for. */
struct call *fixture_start_publish(struct fixture *fixture, uint64_t handle, uint32_t key);

/* Stages rows of scores [layers][rows][heads] for all layers; a copy goes to the staging area. */
int fixture_stage(struct fixture *fixture, uint64_t handle, uint32_t pos, uint32_t rows, const float *scores);

/* The generation that entries of a sequence carry now; 0 when there is no such sequence. */
uint32_t fixture_generation(const struct fixture *fixture, uint64_t handle);

/* Fails the test with the differences, when there are any. */
void fixture_audit(struct fixture *fixture);
uint64_t fixture_physical(void *user, uint32_t extent);

/* Of the tenant. */
const struct quota_account *fixture_account(const struct fixture *fixture);

#endif
