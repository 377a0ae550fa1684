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
	list_init(&tenant->host_contexts);
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
	tenant->limits = TENANT_LIMITS;
	reserve_init(&tenant->reserve, pool, &tenant->quota, index);
	pool->meta->header->tenant_count++;
	*ret = tenant;
	return 0;
}

struct tenant *tenant_free(struct tenant *tenant)
{
	if (!tenant)
		return NULL;
	assert(list_empty(&tenant->arenas) && tenant->workers == 0);
	reserve_deinit(&tenant->reserve);
	free(tenant->name);
	free(tenant->account_name);
	free(tenant);
	return NULL;
}

static struct quota *quota_of(struct tenant *tenant, enum tenant_tier tier)
{
	return tier == TENANT_HOST ? &tenant->host : &tenant->quota;
}

int tenant_set_budget(struct tenant *tenant, enum tenant_tier tier, const struct budget *budget, char text[QUOTA_TEXT])
{
	int r = quota_set(quota_of(tenant, tier), budget->min, budget->high, budget->max, text);

	if (r >= 0 && tier == TENANT_DEVICE)
		reserve_update(&tenant->reserve);
	return r;
}

struct budget tenant_budget(const struct tenant *tenant, enum tenant_tier tier)
{
	const struct quota_account *account = tier == TENANT_HOST ? tenant->host.account : tenant->quota.account;

	return (struct budget){.min = account->min, .high = account->high, .max = account->max};
}

int tenant_check_sequences(const struct tenant *tenant, unsigned more, char *text, size_t text_size)
{
	if (more <= tenant->limits.sequences && tenant->sequences <= tenant->limits.sequences - more)
		return 0;
	(void)snprintf(text, text_size, "%s: %u sequences, %u more asked for, at most %u (max_sequences)",
		tenant->quota.name, tenant->sequences, more, tenant->limits.sequences);
	return -EUSERS;
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

static struct arena *find_arena(const struct tenant *tenant, const struct kvg_layout *layout)
{
	for (struct list *node = tenant->arenas.next; node != &tenant->arenas; node = node->next) {
		struct arena *arena = list_entry(node, struct arena, node);

		if (same_geometry(&arena->layout, layout))
			return arena;
	}
	return NULL;
}

int tenant_check_layout(const struct tenant *tenant, const struct kvg_layout *layout, char *text, size_t text_size)
{
	unsigned count = 0;

	for (const struct list *node = tenant->arenas.next; node != &tenant->arenas; node = node->next)
		count++;
	if (count < tenant->limits.layouts || find_arena(tenant, layout))
		return 0;
	(void)snprintf(text, text_size, "%s: layout %s: %u layouts are in use, at most %u (max_layouts)",
		tenant->quota.name, layout->model, count, tenant->limits.layouts);
	return -EUSERS;
}

int tenant_arena(struct tenant *tenant, const struct kvg_layout *layout, struct arena **ret)
{
	struct arena *arena = find_arena(tenant, layout);
	int r;

	if (arena) {
		*ret = arena_ref(arena);
		return 0;
	}
	r = arena_new(tenant->pool, layout, ret);
	if (r < 0)
		return r;
	list_add_tail(&tenant->arenas, &(*ret)->node);
	return 0;
}
