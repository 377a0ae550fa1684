/*
 * tenant.h - a trust domain with a budget: its account, and the arenas of the
 * layouts that its workers use.
 */
#ifndef KVG_TENANT_H
#define KVG_TENANT_H

#include <stdbool.h>

#include "daemon/memory/pool.h"

struct reclaim;

/* What may be asked to make room, in this order; see reclaim.h. */
enum reclaim_kind { RECLAIM_CONTEXT, RECLAIM_SEQUENCE, RECLAIM_KINDS };

struct tenant {
	uint32_t index; /* in the metadata's table */
	char *name;
	char *account_name; /* "tenant NAME" */
	const char *socket; /* path, for reports; borrowed */
	struct quota quota; /* device memory */
	struct quota host;  /* memory of the host tier; its max is 0 until it is set */
	struct pool *pool;
	struct list arenas;
	unsigned workers, sequences;
	uint64_t claimed;        /* bytes of device memory that its workers asked for outside of the budget */
	struct reclaim *reclaim; /* borrowed; NULL: nothing is reclaimed and nobody waits */
	struct list offers[RECLAIM_KINDS];
	uint64_t offered;          /* bytes that are on offer, */
	uint64_t reclaiming_bytes; /* and of those on their way to the host */
	unsigned offer_count, reclaiming;
	unsigned ending;          /* workers that have gone and whose memory is not back yet */
	struct list pressed_node; /* in reclaim's list while more is wanted of it */
	bool pressed;             /* its workers have been told */
	bool ipc;                 /* its workers may hand over memory and events of their own (cuIpc handles) */
};

/* 0, -ENOMEM, or -EUSERS when the table is full. */
int tenant_new(struct pool *pool, const char *name, uint64_t device_max, struct tenant **ret);
struct tenant *tenant_free(struct tenant *tenant); /* without workers */

/*
 * Device memory whose size a worker chooses and that is not charged (tables, staging): all of a tenant's together may
 * be as large as its device.max. 0, or -ENOSPC with text. What was claimed is given back with tenant_unclaim().
 */
int tenant_claim(struct tenant *tenant, uint64_t bytes, char *text, size_t text_size);
void tenant_unclaim(struct tenant *tenant, uint64_t bytes);

/* A reference to the arena of a layout's geometry and model, made when it is the first. */
int tenant_arena(struct tenant *tenant, const struct kvg_layout *layout, struct arena **ret);

#endif
