#include "daemon/tenant/tenant.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/size.h"

int tenant_new(struct pool *pool, const char *name, uint64_t device_max, struct tenant **ret)
{
	uint32_t index = pool->meta->header->tenant_count;
	struct meta_tenant *meta = &pool->meta->tenants[index];
	struct tenant *tenant;

	if (index == META_MAX_TENANTS)
		return -EUSERS;
	tenant = calloc(1, sizeof(*tenant));
	if (!tenant)
		return -ENOMEM;
	list_init(&tenant->arenas);
	list_init(&tenant->pressed_node);
	for (unsigned i = 0; i < RECLAIM_KINDS; i++)
		list_init(&tenant->offers[i]);
	tenant->index = index;
	tenant->pool = pool;
	tenant->name = strdup(name);
	if (!tenant->name || asprintf(&tenant->account_name, "tenant %s", name) < 0) {
		tenant->account_name = NULL;
		(void)tenant_free(tenant);
		return -ENOMEM;
	}
	(void)snprintf(meta->name, sizeof(meta->name), "%s", name);
	meta->account.max = device_max;
	tenant->quota = (struct quota){
		.name = tenant->account_name, .tier = "device", .parent = &pool->quota, .account = &meta->account};
	tenant->host = (struct quota){
		.name = tenant->account_name, .tier = "host", .parent = &pool->host, .account = &meta->host};
	pool->meta->header->tenant_count++;
	*ret = tenant;
	return 0;
}

struct tenant *tenant_free(struct tenant *tenant)
{
	if (!tenant)
		return NULL;
	assert(list_empty(&tenant->arenas) && tenant->workers == 0);
	free(tenant->name);
	free(tenant->account_name);
	free(tenant);
	return NULL;
}

int tenant_claim(struct tenant *tenant, uint64_t bytes, char *text, size_t text_size)
{
	uint64_t limit = tenant->quota.account->max;
	char in_use[KVG_SIZE_TEXT], need[KVG_SIZE_TEXT], most[KVG_SIZE_TEXT];

	if (bytes <= limit && tenant->claimed <= limit - bytes) {
		tenant->claimed += bytes;
		return 0;
	}
	(void)snprintf(text, text_size,
		"%s: tables and staging areas on the device: in use %s, the worker needs %s, together at most %s "
		"(device.max)",
		tenant->quota.name, kvg_size_format(tenant->claimed, in_use), kvg_size_format(bytes, need),
		kvg_size_format(limit, most));
	return -ENOSPC;
}

void tenant_unclaim(struct tenant *tenant, uint64_t bytes)
{
	assert(bytes <= tenant->claimed);
	tenant->claimed -= bytes;
}

/* Whether blocks of the two layouts may share an arena: limits of a worker's tables do not matter. */
static int same_geometry(const struct kvg_layout *a, const struct kvg_layout *b)
{
	return strcmp(a->model, b->model) == 0 && a->group_count == b->group_count &&
	       memcmp(a->groups, b->groups, sizeof(a->groups)) == 0;
}

int tenant_arena(struct tenant *tenant, const struct kvg_layout *layout, struct arena **ret)
{
	struct pool *pool = tenant->pool;
	int r;

	for (struct list *node = tenant->arenas.next; node != &tenant->arenas; node = node->next) {
		struct arena *arena = list_entry(node, struct arena, node);

		if (same_geometry(&arena->layout, layout)) {
			*ret = arena_ref(arena);
			return 0;
		}
	}
	r = arena_new(pool, layout, ret);
	if (r < 0)
		return r;
	list_add_tail(&tenant->arenas, &(*ret)->node);
	return 0;
}
