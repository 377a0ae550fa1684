/*
 * tenant.h - a trust domain with a budget: its accounts, the memory of its min that it does not use,
 * the arenas of the layouts that its workers use, and its limits.
 */
#ifndef KVG_TENANT_H
#define KVG_TENANT_H

#include <stdbool.h>

#include "daemon/memory/reserve.h"

#define TENANT_TIERS 2u

enum tenant_tier { TENANT_DEVICE = 0, TENANT_HOST = 1 };

struct budget {
	uint64_t min, high, max; /* bytes; high 0: none */
};

/* Of all of a tenant's workers together. */
struct tenant_limits {
	uint32_t connections, sequences;
	uint32_t layouts;     /* arenas */
	uint32_t entries;     /* taken from rings and not completed */
	uint64_t staged_rows; /* layers x positions of STAGE entries that are not completed */
};

struct reclaim;

/* What may be asked to make room, in this order; see reclaim.h. */
enum reclaim_kind { RECLAIM_CONTEXT, RECLAIM_SEQUENCE, RECLAIM_KINDS };

struct context;

struct tenant {
	uint32_t index; /* in the metadata's table */
	char *name;
	char *account_name; /* "tenant NAME" */
	const char *socket; /* path, for reports; borrowed */
	struct quota quota; /* device memory */
	struct quota host;  /* memory of the host tier; its max is 0 until it is set */
	struct reserve reserve;
	struct pool *pool;
	struct list arenas;
	struct context *contexts_by_key, *contexts_by_id; /* published ones, see daemon/sequence/context.h */
	uint32_t contexts;                                /* of them, those that can be found */
	uint32_t context_entries;                         /* of all kinds, in the metadata's table */
	uint64_t next_context;
	struct list
		host_contexts; /* published, in nobody's use and on the host alone: those left alone longest first */
	unsigned workers, sequences;
	uint64_t claimed;        /* bytes of device memory that its workers asked for outside of the budget */
	struct reclaim *reclaim; /* borrowed; NULL: nothing is reclaimed and nobody waits */
	struct list offers[RECLAIM_KINDS];
	uint64_t offered;          /* bytes that are on offer, */
	uint64_t reclaiming_bytes; /* and of those on their way to the host */
	unsigned offer_count, reclaiming;
	unsigned waiting;            /* requests, for memory */
	bool held_up;                /* one of them goes on waiting, of those that are being asked */
	unsigned trims;              /* of what sequences retain on the host, that are under way */
	bool host_grown;             /* above high on the host, which nobody has looked at yet */
	bool no_room;                /* on the host, for the last that was to go there */
	unsigned ending;             /* workers that have gone and whose memory is not back yet */
	struct list pressed_node;    /* in reclaim's list while more is wanted of it */
	bool pressed;                /* its workers have been told */
	unsigned entries;            /* under way */
	uint64_t staged_rows;        /* in them */
	struct tenant_limits limits; /* tenant_new() sets TENANT_LIMITS */
	bool ipc;                    /* its workers may hand over memory and events of their own (cuIpc handles) */
};

#define TENANT_LIMITS                                                                                                  \
	((struct tenant_limits){                                                                                       \
		.connections = 256, .sequences = 65536, .layouts = 64, .entries = 65536, .staged_rows = 16777216})

/* 0, -ENOMEM, or -EUSERS when the table is full. It has no min yet. */
int tenant_new(struct pool *pool, const char *name, uint64_t device_max, struct tenant **ret);
struct tenant *tenant_free(struct tenant *tenant); /* without workers */

/*
 * Sets what a tenant may have of a tier, as quota_set(); memory of a min of the device is created, or destroyed, in the
 * background. 0, or a negative errno with text, and then nothing has changed.
 */
int tenant_set_budget(struct tenant *tenant, enum tenant_tier tier, const struct budget *budget, char text[QUOTA_TEXT]);
struct budget tenant_budget(const struct tenant *tenant, enum tenant_tier tier);

/* Whether it may have that many sequences more: 0, or -EUSERS with text. */
int tenant_check_sequences(const struct tenant *tenant, unsigned more, char *text, size_t text_size);

/* Whether it may use a layout: 0, or -EUSERS with text when that needs an arena and it has all that it may have. */
int tenant_check_layout(const struct tenant *tenant, const struct kvg_layout *layout, char *text, size_t text_size);

/*
 * Device memory whose size a worker chooses and that is not charged (tables, staging): all of a tenant's together may
 * be as large as its device.max. 0, or -ENOSPC with text. What was claimed is given back with tenant_unclaim().
 */
int tenant_claim(struct tenant *tenant, uint64_t bytes, char *text, size_t text_size);
void tenant_unclaim(struct tenant *tenant, uint64_t bytes);

/* A reference to the arena of a layout's geometry and model, made when it is the first. */
int tenant_arena(struct tenant *tenant, const struct kvg_layout *layout, struct arena **ret);

#endif
