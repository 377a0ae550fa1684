/* Extents are born and destroyed on the executor; bytes are charged from before to after. */
#include "daemon/memory/pool.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "tests/support/runner.h"

#define EXTENT (64u << 10)

static int creations_left, busy_left; /* of the faulty kind */

static int faulty_create(size_t size)
{
	return creations_left-- > 0 ? kind_host.create(size) : -ENOMEM;
}

static int faulty_destroy(int fd, size_t size)
{
	return busy_left-- > 0 ? -EBUSY : kind_host.destroy(fd, size);
}

struct fixture {
	struct kind_ops kind;
	struct loop *loop;
	struct executor *executor;
	struct pool *pool;
	struct arena *arena;
	struct quota_account account;
	struct quota quota;
	char text[QUOTA_TEXT];
	bool done;
	int status;
	struct list extents; /* of the last batch */
};

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	struct kvg_layout layout = {.model = "m", .group_count = 1};

	if (!f)
		return -1;
	layout.groups[0] = (struct kvg_group){.k_dim = 8, .v_dim = 8, .k_dtype = KVG_BF16, .v_dtype = KVG_BF16};
	f->kind = kind_host;
	f->kind.create = faulty_create;
	f->kind.destroy = faulty_destroy;
	creations_left = 1000;
	busy_left = 0;
	list_init(&f->extents);
	assert_int_equal(loop_new(&f->loop), 0);
	assert_int_equal(executor_new(f->loop, &f->executor), 0);
	assert_int_equal(pool_new(f->loop, f->executor, &f->kind, 8 * EXTENT + EXTENT / 2, EXTENT, &f->pool), 0);
	assert_int_equal(arena_new(&f->kind, &layout, EXTENT, f->pool->extent_count, &f->arena), 0);
	f->account.max = 8 * EXTENT;
	f->quota = (struct quota){.name = "t", .parent = &f->pool->quota, .account = &f->account};
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	(void)arena_unref(f->arena);
	(void)executor_free(f->executor);
	(void)pool_free(f->pool);
	(void)loop_free(f->loop);
	free(f);
	return 0;
}

static void on_done(struct extent_batch *batch)
{
	struct fixture *f = batch->user;
	struct list *node;

	while ((node = list_pop(&batch->extents)))
		list_add_tail(&f->extents, node);
	f->status = batch->status;
	f->done = true;
	(void)extent_batch_free(batch);
	loop_stop(f->loop);
}

static void wait_done(struct fixture *f)
{
	f->done = false;
	assert_int_equal(loop_run(f->loop), 0);
	assert_true(f->done);
}

static void create(struct fixture *f, uint32_t count)
{
	struct extent_batch *batch = extent_batch_new(f->pool, on_done, f);

	assert_int_equal(quota_charge(&f->quota, (uint64_t)count * EXTENT, 0, "x", f->text), 0);
	assert_int_equal(extent_batch_add_new(batch, f->arena, &f->quota, 3, 4, count), 0);
	extent_batch_create(batch);
	assert_int_equal(f->pool->batches, 1);
	wait_done(f);
	assert_int_equal(f->pool->batches, 0);
}

static void release_all(struct fixture *f)
{
	while (!list_empty(&f->extents))
		extent_release(f->pool, list_entry(f->extents.next, struct extent, node), 0);
}

static void destroy(struct fixture *f)
{
	struct extent_batch *batch = extent_batch_new(f->pool, on_done, f);
	struct list *node;

	while ((node = list_pop(&f->extents)))
		list_add_tail(&batch->extents, node);
	extent_batch_destroy(batch);
	wait_done(f);
}

static void test_create_and_destroy(void **state)
{
	struct fixture *f = *state;
	struct extent *extent;

	assert_int_equal(f->pool->extent_count, 8);
	assert_int_equal(f->pool->quota.account->max, 8 * EXTENT); /* what is no whole extent is nobody's */
	create(f, 3);
	assert_int_equal(f->status, 0);
	assert_int_equal(f->pool->live, 3);
	extent = list_entry(f->extents.next, struct extent, node);
	assert_int_equal(extent->meta->tenant, 3);
	assert_int_equal(extent->meta->worker, 4);
	assert_int_equal(extent->meta->state, META_BORN);
	assert_int_equal(extent->meta->bytes, EXTENT);
	assert_int_equal(kind_host.physical(extent->fd), EXTENT);
	assert_ptr_equal(f->pool->extents[extent->index], extent);
	assert_int_equal(f->arena->extent_of_slot[extent->meta->slot], extent->index);
	f->arena->base[(extent->meta->slot + 1) * (size_t)EXTENT - 1] = 1; /* mapped to its end */
	destroy(f);
	assert_int_equal(f->account.charged, 3 * EXTENT); /* until they are released */
	release_all(f);
	assert_int_equal(f->account.charged, 0);
	assert_int_equal(f->pool->live, 0);
	assert_int_equal(f->pool->free_count, 8);
	assert_int_equal(f->arena->free_count, 8);
}

static void test_all_and_not_one_more(void **state)
{
	struct fixture *f = *state;
	struct extent_batch *batch;

	create(f, 8);
	assert_int_equal(quota_charge(&f->quota, EXTENT, 0, "x", f->text), -ENOSPC);
	batch = extent_batch_new(f->pool, on_done, f);
	assert_int_equal(extent_batch_add_new(batch, f->arena, &f->quota, 0, 0, 1), -ENOSPC);
	assert_true(list_empty(&batch->extents));
	(void)extent_batch_free(batch);
	destroy(f);
	release_all(f);
}

/* One of five cannot be created: none is left, and the bytes of all go back when they are released. */
static void test_failed_creation(void **state)
{
	struct fixture *f = *state;

	creations_left = 2;
	create(f, 5);
	assert_int_equal(f->status, -ENOMEM);
	for (const struct list *node = f->extents.next; node != &f->extents; node = node->next)
		assert_true(list_entry(node, struct extent, node)->fd < 0);
	release_all(f);
	assert_int_equal(f->account.charged, 0);
	assert_int_equal(f->pool->live, 0);
}

static void stop(void *user)
{
	struct fixture *f = user;

	if (f->pool->live == 0)
		loop_stop(f->loop);
}

static bool poll_live(void *user)
{
	stop(user);
	return false;
}

static bool no_sleep(void *user, bool going)
{
	(void)user;
	(void)going;
	return false;
}

/* An extent whose bytes do not go stays charged, as unreturned, until they do. */
static void test_busy_extent_is_retried(void **state)
{
	static const struct loop_poller_ops ops = {.poll = poll_live, .sleep = no_sleep};
	struct fixture *f = *state;

	create(f, 2);
	busy_left = 2; /* the first attempt on the first extent, and the retry */
	destroy(f);
	release_all(f);
	assert_int_equal(f->account.charged, f->pool->live * (uint64_t)EXTENT);
	assert_int_equal(f->account.unreturned, f->account.charged);
	assert_true(f->account.charged > 0);
	assert_int_equal(loop_poller_add(f->loop, &ops, f), 0);
	assert_int_equal(loop_run(f->loop), 0);
	loop_poller_remove(f->loop, &ops, f);
	assert_int_equal(f->account.charged, 0);
	assert_int_equal(f->account.unreturned, 0);
	assert_int_equal(f->pool->batches, 0);
}

static void test_free_closes_busy_extents(void **state)
{
	struct fixture *f = *state;

	create(f, 2);
	busy_left = 1000;
	destroy(f);
	assert_true(list_empty(&f->extents));
	assert_int_equal(f->account.unreturned, 2 * EXTENT);
	f->pool = pool_free(f->pool); /* the runner counts the descriptors */
	assert_null(f->pool);
	assert_null(pool_free(NULL));
}

static void test_release_to_promise(void **state)
{
	struct fixture *f = *state;

	create(f, 1);
	destroy(f);
	extent_release(f->pool, list_entry(f->extents.next, struct extent, node), EXTENT / 4);
	assert_int_equal(f->account.charged, 0);
	assert_int_equal(f->account.promised, EXTENT / 4);
	quota_unpromise(&f->quota, EXTENT / 4);
}

#define POOL_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		POOL_TEST(test_create_and_destroy),
		POOL_TEST(test_all_and_not_one_more),
		POOL_TEST(test_failed_creation),
		POOL_TEST(test_busy_extent_is_retried),
		POOL_TEST(test_free_closes_busy_extents),
		POOL_TEST(test_release_to_promise),
	};

	return runner_run("pool", tests, sizeof(tests) / sizeof(tests[0]));
}
