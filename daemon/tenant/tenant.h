/*
 * tenant.h - a trust domain with a budget: its account, and the arenas of the
 * layouts that its workers use.
 */
#ifndef KVG_TENANT_H
#define KVG_TENANT_H

#include <stdbool.h>

#include "daemon/memory/pool.h"

struct tenant {
	uint32_t index; /* in the metadata's table */
	char *name;
	char *account_name; /* "tenant NAME" */
	const char *socket; /* path, for reports; borrowed */
	struct quota quota;
	struct pool *pool;
	struct list arenas;
	unsigned workers, sequences;
	bool ipc; /* its workers may hand over memory and events of their own (cuIpc handles) */
};

/* 0, -ENOMEM, or -EUSERS when the table is full. */
int tenant_new(struct pool *pool, const char *name, uint64_t device_max, struct tenant **ret);
struct tenant *tenant_free(struct tenant *tenant); /* without workers */

/* A reference to the arena of a layout's geometry and model, made when it is the first. */
int tenant_arena(struct tenant *tenant, const struct kvg_layout *layout, struct arena **ret);

#endif
