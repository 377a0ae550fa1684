#include "daemon/tenant/tenant.h"

#include <errno.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "tests/support/runner.h"

struct fixture {
	struct loop *loop;
	struct executor *executor;
	struct kind *kind;
	struct pool *pool;
};

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	if (!f)
		return -1;
	assert_int_equal(loop_new(&f->loop), 0);
	assert_int_equal(executor_new(f->loop, &f->executor), 0);
	assert_int_equal(kind_host_new(&f->kind), 0);
	assert_int_equal(pool_new(f->loop, f->executor, f->kind, 1 << 20, 64 << 10, &f->pool), 0);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	(void)executor_free(f->executor);
	(void)pool_free(f->pool);
	(void)kind_free(f->kind);
	(void)loop_free(f->loop);
	free(f);
	return 0;
}

static struct kvg_layout layout_of(const char *model, uint32_t k_dim)
{
	struct kvg_layout layout = {.group_count = 1, .max_sequences = 4, .max_tokens = 100};

	(void)snprintf(layout.model, sizeof(layout.model), "%s", model);
	layout.groups[0] = (struct kvg_group){.k_dim = k_dim, .v_dim = 8, .k_dtype = KVG_BF16, .v_dtype = KVG_BF16};
	return layout;
}

static void test_account(void **state)
{
	struct fixture *f = *state;
	struct tenant *a = NULL, *b = NULL;
	char text[QUOTA_TEXT];

	assert_int_equal(tenant_new(f->pool, "search", 128 << 10, &a), 0);
	assert_int_equal(tenant_new(f->pool, "chat", 1 << 20, &b), 0);
	assert_int_equal(a->index, 0);
	assert_int_equal(b->index, 1);
	assert_int_equal(f->pool->meta->header->tenant_count, 2);
	assert_string_equal(f->pool->meta->tenants[1].name, "chat");
	assert_int_equal(quota_charge(&a->quota, 128 << 10, 0, "x", text), 0);
	assert_int_equal(quota_charge(&a->quota, 1, 0, "reserve", text), -ENOSPC);
	assert_int_equal(strncmp(text, "tenant search: device budget 128.0 KiB", 38), 0);
	assert_int_equal(f->pool->meta->tenants[0].account.charged, 128 << 10);
	assert_int_equal(f->pool->quota.account->charged, 128 << 10);
	quota_refund(&a->quota, 128 << 10);
	assert_null(tenant_free(a));
	assert_null(tenant_free(b));
	assert_null(tenant_free(NULL));
}

/* Limits of a worker's tables do not matter to an arena; model and geometry do. */
static void test_arenas_are_shared_by_geometry(void **state)
{
	struct fixture *f = *state;
	struct kvg_layout one = layout_of("m", 8), more = one, other = layout_of("n", 8), wide = layout_of("m", 16);
	struct arena *arenas[5];
	struct tenant *tenant;

	more.max_sequences = 1000;
	more.max_tokens = 5000;
	assert_int_equal(tenant_new(f->pool, "t", 1 << 20, &tenant), 0);
	assert_int_equal(tenant_arena(tenant, &one, &arenas[0]), 0);
	assert_int_equal(tenant_arena(tenant, &more, &arenas[1]), 0);
	assert_int_equal(tenant_arena(tenant, &other, &arenas[2]), 0);
	assert_int_equal(tenant_arena(tenant, &wide, &arenas[3]), 0);
	assert_ptr_equal(arenas[0], arenas[1]);
	assert_ptr_not_equal(arenas[0], arenas[2]);
	assert_ptr_not_equal(arenas[0], arenas[3]);
	assert_int_equal(arenas[0]->slots, f->pool->extent_count);
	(void)arena_unref(arenas[0]);
	assert_int_equal(tenant_arena(tenant, &one, &arenas[4]), 0);
	assert_ptr_equal(arenas[4], arenas[1]);
	for (unsigned i = 1; i < 5; i++)
		(void)arena_unref(arenas[i]);
	assert_true(list_empty(&tenant->arenas));
	(void)tenant_free(tenant);
}

static void test_two_tenants_share_nothing(void **state)
{
	struct fixture *f = *state;
	struct kvg_layout layout = layout_of("m", 8);
	struct tenant *a, *b;
	struct arena *x, *y;

	assert_int_equal(tenant_new(f->pool, "a", 1 << 20, &a), 0);
	assert_int_equal(tenant_new(f->pool, "b", 1 << 20, &b), 0);
	assert_int_equal(tenant_arena(a, &layout, &x), 0);
	assert_int_equal(tenant_arena(b, &layout, &y), 0);
	assert_ptr_not_equal(x, y);
	(void)arena_unref(x);
	(void)arena_unref(y);
	(void)tenant_free(a);
	(void)tenant_free(b);
}

static void test_table_is_full(void **state)
{
	struct fixture *f = *state;
	struct tenant *tenants[META_MAX_TENANTS], *none = NULL;

	for (unsigned i = 0; i < META_MAX_TENANTS; i++)
		assert_int_equal(tenant_new(f->pool, "t", 1, &tenants[i]), 0);
	assert_int_equal(tenant_new(f->pool, "t", 1, &none), -EUSERS);
	assert_null(none);
	for (unsigned i = 0; i < META_MAX_TENANTS; i++)
		(void)tenant_free(tenants[i]);
}

/* What its workers have on the device outside of the budget is limited too, for all of them together. */
static void test_claims(void **state)
{
	struct fixture *f = *state;
	struct tenant *tenant = NULL;
	char text[256] = "";

	assert_int_equal(tenant_new(f->pool, "chat", 128 << 10, &tenant), 0);
	assert_int_equal(tenant_claim(tenant, 96 << 10, text, sizeof(text)), 0);
	assert_int_equal(tenant_claim(tenant, 64 << 10, text, sizeof(text)), -ENOSPC);
	assert_string_equal(text,
		"tenant chat: tables and staging areas on the device: in use 96.0 KiB, the worker needs 64.0 KiB, "
		"together at most 128.0 KiB (device.max)");
	assert_int_equal(tenant_claim(tenant, UINT64_MAX, text, sizeof(text)), -ENOSPC);
	assert_int_equal(tenant_claim(tenant, 32 << 10, text, sizeof(text)), 0);
	assert_int_equal(tenant_claim(tenant, 1, text, sizeof(text)), -ENOSPC);
	tenant_unclaim(tenant, 96 << 10);
	/* A budget that is set later holds for what comes then. */
	tenant->quota.account->max = 16 << 10;
	assert_int_equal(tenant_claim(tenant, 0, text, sizeof(text)), -ENOSPC);
	tenant_unclaim(tenant, 32 << 10);
	assert_int_equal(tenant_claim(tenant, 16 << 10, text, sizeof(text)), 0);
	assert_int_equal(f->pool->quota.account->charged, 0);
	tenant_unclaim(tenant, 16 << 10);
	assert_null(tenant_free(tenant));
}

static void test_budgets(void **state)
{
	struct fixture *f = *state;
	struct budget budget = {.min = 128 << 10, .high = 192 << 10, .max = 256 << 10};
	struct tenant *tenant;
	char text[QUOTA_TEXT];

	assert_int_equal(tenant_new(f->pool, "chat", 1 << 20, &tenant), 0);
	assert_int_equal(tenant_set_budget(tenant, TENANT_HOST, &budget, text), -EINVAL);
	assert_string_equal(text, "tenant chat: host.max 256.0 KiB is more than the pool's 0 B");
	assert_int_equal(tenant_set_budget(tenant, TENANT_DEVICE, &budget, text), 0);
	budget = tenant_budget(tenant, TENANT_DEVICE);
	assert_int_equal(budget.min, 128 << 10);
	assert_int_equal(budget.high, 192 << 10);
	assert_int_equal(budget.max, 256 << 10);
	assert_int_equal(tenant_budget(tenant, TENANT_HOST).max, 0);
	assert_true(tenant->reserve.busy); /* its min is being created */
	assert_int_equal(f->pool->quota.account->committed, 128 << 10);
	assert_int_equal(f->pool->host.account->committed, 0);
	reserve_stop_all(f->pool);
	f->executor = executor_free(f->executor);
	(void)tenant_free(tenant);
}

static void test_limits(void **state)
{
	struct fixture *f = *state;
	struct kvg_layout one = layout_of("m", 8), other = layout_of("n", 8);
	struct tenant *tenant;
	struct arena *arena;
	char text[256];

	assert_int_equal(tenant_new(f->pool, "t", 1 << 20, &tenant), 0);
	assert_int_equal(tenant->limits.connections, 256);
	tenant->limits.layouts = 1;
	assert_int_equal(tenant_check_layout(tenant, &one, text, sizeof(text)), 0);
	assert_int_equal(tenant_arena(tenant, &one, &arena), 0);
	assert_int_equal(tenant_check_layout(tenant, &one, text, sizeof(text)), 0);
	assert_int_equal(tenant_check_layout(tenant, &other, text, sizeof(text)), -EUSERS);
	assert_string_equal(text, "tenant t: layout n: 1 layouts are in use, at most 1 (max_layouts)");
	(void)arena_unref(arena);
	assert_int_equal(tenant_check_layout(tenant, &other, text, sizeof(text)), 0);
	tenant->limits.sequences = 3;
	tenant->sequences = 2;
	assert_int_equal(tenant_check_sequences(tenant, 1, text, sizeof(text)), 0);
	assert_int_equal(tenant_check_sequences(tenant, 2, text, sizeof(text)), -EUSERS);
	assert_string_equal(text, "tenant t: 2 sequences, 2 more asked for, at most 3 (max_sequences)");
	assert_int_equal(tenant_check_sequences(tenant, UINT32_MAX, text, sizeof(text)), -EUSERS);
	tenant->sequences = 0;
	(void)tenant_free(tenant);
}

#define TENANT_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TENANT_TEST(test_account),
		TENANT_TEST(test_arenas_are_shared_by_geometry),
		TENANT_TEST(test_two_tenants_share_nothing),
		TENANT_TEST(test_table_is_full),
		TENANT_TEST(test_claims),
		TENANT_TEST(test_budgets),
		TENANT_TEST(test_limits),
	};

	return runner_run("tenant", tests, sizeof(tests) / sizeof(tests[0]));
}
