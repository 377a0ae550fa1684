/*
 * turns.h - three workers of two tenants, all in this process, that take turns: each unmaps what it is asked to and
 * answers pressure when it is its turn, so that a test decides how long memory is on its way.
 */
#ifndef KVG_TEST_TURNS_H
#define KVG_TEST_TURNS_H

#include "tests/integration/kv.h"
#include "tests/integration/process.h"
#include "tests/support/daemon.h"

#define EXTENT (256u * 1024u)
#define MIB    (1024u * 1024u)

/* Of the image of that many full stripes: their blocks with places, in whole frames. */
#define IMAGE(stripes) (((stripes) * (EXTENT + 16384u) + 65535u) / 65536u * 65536u)

struct stage {
	struct fixture fixture;
	struct kvg_layout layout;                /* a stripe is an extent */
	struct kvg_client *idler, *asker, *chat; /* two of search, one of chat */
	bool context_stays;                      /* on the host, at the end */
};

/* Another worker at a socket of the folder; kvg_close() ends it. */
struct kvg_client *connect_to(const struct stage *s, const char *socket, const char *name);

/* A daemon with the three workers; closing looks whether every byte has come back. */
void stage_open(struct stage *s);
void stage_close(struct stage *s);

/* Fails unless the text has that part. */
void assert_names(const char *text, const char *what);

/* A worker unmaps and acknowledges what it was asked to, and answers pressure. */
void turn(struct kvg_client *client);
void all_turn(const struct stage *s);

/* Entries one by one: a CREATE of a sequence of so many stripes, and text (KVG_TEXT_SIZE) of what was refused. */
struct kvg_sqe create(uint32_t stripes);
void submit(struct kvg_client *client, const struct kvg_sqe *sqe);
bool is_done(struct kvg_client *client, struct kvg_cqe *ret, char *text);

/* One entry while all workers take turns; the status. */
int ask(const struct stage *s, struct kvg_client *client, const struct kvg_sqe *sqe, struct kvg_cqe *ret, char *text);

/* The same where it must succeed. */
void granted(const struct stage *s, struct kvg_client *client, const struct kvg_sqe *sqe, struct kvg_cqe *ret);
uint64_t create_granted(const struct stage *s, struct kvg_client *client, uint32_t stripes);
void free_sequence(const struct stage *s, struct kvg_client *client, uint64_t seq);

/* Brings it back and looks at all of it. Whether it was on the host. */
bool restore(const struct stage *s, const struct kv *kv);

/* A full sequence of so many stripes. */
void fill(const struct stage *s, struct kvg_client *client, struct kv *kv, uint32_t stripes);

/* The same, released as idle. */
void fill_idle(const struct stage *s, struct kvg_client *client, struct kv *kv, uint32_t stripes);

/* Of workers that are about to go. */
void forget(struct kv *kvs, unsigned count);
struct fixture_usage usage_of(const struct stage *s, const char *tenant);

/* All turn until a tenant has at most `charged` bytes, none of them unreturned. */
void settle(const struct stage *s, const char *tenant, uint64_t charged);

/* Starts kvgatectl with those words. */
void control_start(const struct stage *s, struct process_program *program, const char *const words[]);

/* kvgatectl while all workers take turns. */
void control(const struct stage *s, struct process_output *ret, const char *const words[]);

/* Until a tenant's workers have been asked for so many bytes; nobody takes a turn. */
void wait_unreturned(const struct stage *s, uint64_t bytes); /* of search */

#endif
