#include "tests/support/runner.h"

#include <errno.h>
#include <string.h>

#include "daemon/tier/host.h"

#define FRAMES 40u

struct fixture {
	struct loop *loop;
	struct executor *executor;
	struct kind *kind;
	struct pool *pool;
	struct tenant *tenants[2];
	struct host_tier *tier;
	char text[QUOTA_TEXT];
};

static void fixture_open(struct fixture *fixture, uint64_t size)
{
	*fixture = (struct fixture){0};
	assert_int_equal(loop_new(&fixture->loop), 0);
	assert_int_equal(executor_new(fixture->loop, &fixture->executor), 0);
	assert_int_equal(kind_host_new(&fixture->kind), 0);
	assert_int_equal(
		pool_new(fixture->loop, fixture->executor, fixture->kind, 1 << 20, 64 << 10, &fixture->pool), 0);
	assert_int_equal(host_tier_new(fixture->pool, size, &fixture->tier), 0);
	assert_ptr_equal(fixture->pool->tier, fixture->tier);
	assert_int_equal(tenant_new(fixture->pool, "a", 1 << 20, &fixture->tenants[0]), 0);
	assert_int_equal(tenant_new(fixture->pool, "b", 1 << 20, &fixture->tenants[1]), 0);
	for (unsigned i = 0; i < 2; i++)
		assert_int_equal(
			quota_set(&fixture->tenants[i]->host, 0, 0, fixture->pool->host.account->max, fixture->text),
			0);
}

static void fixture_close(struct fixture *fixture)
{
	(void)executor_free(fixture->executor);
	(void)host_tier_free(fixture->tier);
	assert_null(fixture->pool->tier);
	(void)pool_free(fixture->pool);
	(void)tenant_free(fixture->tenants[0]);
	(void)tenant_free(fixture->tenants[1]);
	(void)kind_free(fixture->kind);
	(void)loop_free(fixture->loop);
}

static uint32_t take(struct fixture *fixture, unsigned tenant, uint32_t count)
{
	uint32_t first = 0;

	if (host_tier_take(fixture->tier, fixture->tenants[tenant], count, "an image", &first, fixture->text) < 0)
		fail_msg("%s", fixture->text);
	return first;
}

static void give(struct fixture *fixture, unsigned tenant, uint32_t first)
{
	host_tier_give(fixture->tier, fixture->tenants[tenant], first);
}

static uint32_t length(const struct fixture *fixture, uint32_t first)
{
	uint32_t count = 0;

	for (; first; first = host_tier_next(fixture->tier, first))
		count++;
	return count;
}

static uint64_t charged(const struct fixture *fixture, unsigned tenant)
{
	return fixture->tenants[tenant]->host.account->charged;
}

/* Frames that the metadata gives a tenant. */
static uint32_t counted(const struct fixture *fixture, unsigned tenant)
{
	const struct meta *meta = fixture->pool->meta;
	uint32_t count = 0;

	for (uint32_t i = 0; i < meta->header->frame_count; i++)
		count += meta->frames[i].tenant == fixture->tenants[tenant]->index + 1;
	return count;
}

static void test_without_size(void **state)
{
	struct fixture f;
	uint32_t first = 0;

	(void)state;
	fixture_open(&f, HOST_FRAME - 1);
	assert_int_equal(host_tier_frame_count(f.tier), 0);
	assert_int_equal(host_tier_take(f.tier, f.tenants[0], 1, "an image", &first, f.text), -ENOSPC);
	assert_non_null(strstr(f.text, "tenant a"));
	assert_non_null(strstr(f.text, "an image"));
	assert_non_null(strstr(f.text, "host.size"));
	assert_int_equal(host_tier_take(NULL, f.tenants[0], 1, "an image", &first, f.text), -ENOSPC);
	assert_int_equal(first, 0);
	give(&f, 0, 0);
	fixture_close(&f);
}

static void test_chains_and_accounts(void **state)
{
	struct fixture f;
	uint32_t a, b, again;

	(void)state;
	fixture_open(&f, FRAMES * HOST_FRAME + 5);
	assert_int_equal(host_tier_frame_count(f.tier), FRAMES);
	a = take(&f, 0, 7);
	b = take(&f, 1, 3);
	assert_int_equal(length(&f, a), 7);
	assert_int_equal(length(&f, b), 3);
	assert_int_equal(counted(&f, 0), 7);
	assert_int_equal(counted(&f, 1), 3);
	assert_int_equal(charged(&f, 0), 7 * HOST_FRAME);
	assert_int_equal(f.pool->host.account->charged, 10 * HOST_FRAME);
	give(&f, 0, a);
	assert_int_equal(counted(&f, 0), 0);
	assert_int_equal(charged(&f, 0), 0);
	again = take(&f, 1, 7);
	assert_int_equal(again, a); /* in the same order */
	for (uint32_t i = 0; i < 7; i++, again = host_tier_next(f.tier, again))
		assert_int_equal(again, a + i);
	give(&f, 1, a);
	give(&f, 1, b);
	assert_int_equal(f.pool->host.account->charged, 0);
	fixture_close(&f);
}

static void test_refusals(void **state)
{
	struct fixture f;
	uint32_t first = 0, all;

	(void)state;
	fixture_open(&f, FRAMES * HOST_FRAME);
	f.tenants[0]->host.account->max = 8 * HOST_FRAME;
	assert_int_equal(host_tier_take(f.tier, f.tenants[0], 9, "an image", &first, f.text), -ENOSPC);
	assert_non_null(strstr(f.text, "65536 bytes short"));
	assert_int_equal(first, 0);
	assert_int_equal(charged(&f, 0), 0);
	all = take(&f, 1, FRAMES);
	assert_int_equal(host_tier_take(f.tier, f.tenants[0], 1, "an image", &first, f.text), -ENOSPC);
	assert_non_null(strstr(f.text, "pool"));
	give(&f, 1, all);
	first = take(&f, 0, 8);
	give(&f, 0, first);
	fixture_close(&f);
}

static void test_cut_and_join(void **state)
{
	struct fixture f;
	uint32_t a, b, last;

	(void)state;
	fixture_open(&f, FRAMES * HOST_FRAME);
	a = take(&f, 0, 5);
	b = take(&f, 0, 2);
	for (last = a; host_tier_next(f.tier, last);)
		last = host_tier_next(f.tier, last);
	host_tier_join(f.tier, last, b);
	assert_int_equal(length(&f, a), 7);
	host_tier_cut(f.tier, f.tenants[0], host_tier_next(f.tier, a));
	assert_int_equal(length(&f, a), 2);
	assert_int_equal(charged(&f, 0), 2 * HOST_FRAME);
	assert_int_equal(counted(&f, 0), 2);
	give(&f, 0, a);
	fixture_close(&f);
}

static void test_memory(void **state)
{
	struct fixture f;
	uint32_t a, frame, count = 0;

	(void)state;
	fixture_open(&f, FRAMES * HOST_FRAME); /* 2.5 MiB: two pieces */
	a = take(&f, 0, FRAMES);
	assert_int_equal(host_tier_populated(f.tier), 0);
	assert_int_equal(host_tier_open(f.tier, a), 0);
	assert_int_equal(host_tier_populated(f.tier), 2 << 20);
	for (frame = a; frame; frame = host_tier_next(f.tier, frame), count++) {
		assert_int_equal(host_tier_open(f.tier, frame), 0);
		memset(host_tier_at(f.tier, frame), (int)count, HOST_FRAME);
	}
	assert_int_equal(host_tier_populated(f.tier), FRAMES * HOST_FRAME);
	for (frame = a, count = 0; frame; frame = host_tier_next(f.tier, frame), count++) {
		assert_int_equal(host_tier_at(f.tier, frame)[0], count);
		assert_int_equal(host_tier_at(f.tier, frame)[HOST_FRAME - 1], count);
	}
	give(&f, 0, a);
	assert_int_equal(host_tier_populated(f.tier), FRAMES * HOST_FRAME);
	fixture_close(&f);
}

static void test_cursor(void **state)
{
	struct fixture f;
	struct host_cursor cursor;
	uint32_t count;
	uint32_t a;

	(void)state;
	fixture_open(&f, FRAMES * HOST_FRAME);
	assert_int_equal(host_tier_frames(f.tier, 0, 4096), 0);
	assert_int_equal(host_tier_frames(f.tier, 16, 4096), 1);
	assert_int_equal(host_tier_frames(f.tier, 17, 4096), 2);
	assert_int_equal(host_tier_frames(f.tier, 4, 24 << 10), 2); /* two of them in a frame */
	a = take(&f, 0, 2);
	cursor = host_cursor(f.tier, a);
	assert_ptr_equal(host_cursor_take(&cursor, 24 << 10), host_tier_at(f.tier, a));
	assert_ptr_equal(host_cursor_take(&cursor, 24 << 10), host_tier_at(f.tier, a) + (24 << 10));
	assert_ptr_equal(host_cursor_take(&cursor, 24 << 10), host_tier_at(f.tier, host_tier_next(f.tier, a)));
	assert_ptr_equal(
		host_cursor_take(&cursor, 40 << 10), host_tier_at(f.tier, host_tier_next(f.tier, a)) + (24 << 10));
	assert_null(host_cursor_take(&cursor, 1));
	assert_null(host_cursor_take(&cursor, 1));
	assert_null(host_cursor_take_some(&cursor, 1, 1, &count));
	cursor = host_cursor(f.tier, a);
	assert_ptr_equal(host_cursor_take_some(&cursor, 24 << 10, 1, &count), host_tier_at(f.tier, a));
	assert_int_equal(count, 1);
	assert_ptr_equal(host_cursor_take_some(&cursor, 8 << 10, 9, &count), host_tier_at(f.tier, a) + (24 << 10));
	assert_int_equal(count, 5);
	assert_ptr_equal(
		host_cursor_take_some(&cursor, 24 << 10, 9, &count), host_tier_at(f.tier, host_tier_next(f.tier, a)));
	assert_int_equal(count, 2);
	assert_null(host_cursor_take_some(&cursor, 24 << 10, 1, &count));
	give(&f, 0, a);
	fixture_close(&f);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_without_size),
		cmocka_unit_test(test_chains_and_accounts),
		cmocka_unit_test(test_refusals),
		cmocka_unit_test(test_cut_and_join),
		cmocka_unit_test(test_memory),
		cmocka_unit_test(test_cursor),
	};

	return runner_run("daemon/tier/host", tests, sizeof(tests) / sizeof(*tests));
}
