/* Extents are born and destroyed on the executor; bytes are charged from before to after. */
#include "daemon/memory/pool.h"

#include <errno.h>
#include <semaphore.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "tests/support/test_kind.h"

#define EXTENT (64u << 10)

static int creations_left, busy_left, scrubs_left, reservations_left; /* of the faulty kind */
static int ranges;                                                    /* reserved */
static int unmap_failures;
static uint8_t *marks[16];      /* addresses of extents, in the order of their creation */
static unsigned mark_ticks[16]; /* when */
static unsigned mark_count;
static unsigned ticks; /* polls of a job that does nothing else */

static int faulty_create(struct kind *kind, size_t size)
{
	return creations_left-- > 0 ? test_kind_host(kind)->create(kind, size) : -ENOMEM;
}

static int faulty_destroy(struct kind *kind, int fd, size_t size)
{
	return busy_left-- > 0 ? -EBUSY : test_kind_host(kind)->destroy(kind, fd, size);
}

static int faulty_scrub(struct kind *kind, void *at, size_t size)
{
	(void)kind;
	(void)at;
	(void)size;
	return scrubs_left-- > 0 ? 0 : -EIO;
}

static void *faulty_reserve(struct kind *kind, size_t size)
{
	void *base = reservations_left-- > 0 ? test_kind_host(kind)->reserve(kind, size) : NULL;

	ranges += base != NULL;
	return base;
}

static void counting_unreserve(struct kind *kind, void *base, size_t size)
{
	ranges -= base != NULL;
	test_kind_host(kind)->unreserve(kind, base, size);
}

static int faulty_unmap(struct kind *kind, void *at, size_t size)
{
	return unmap_failures-- > 0 ? -EIO : test_kind_host(kind)->unmap(kind, at, size);
}

/* Each takes a slice of time, and leaves its mark. */
static int slow_map(struct kind *kind, int fd, void *at, size_t size)
{
	const struct timespec pause = {.tv_nsec = 600000};

	mark_ticks[mark_count] = ticks;
	marks[mark_count++] = at;
	(void)nanosleep(&pause, NULL);
	return test_kind_host(kind)->map(kind, fd, at, size);
}

static struct kvg_cuda *some_device(struct kind *kind)
{
	return (struct kvg_cuda *)(void *)kind; /* nobody looks into it */
}

struct fixture {
	struct test_kind kind;
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
	test_kind_init(&f->kind);
	f->kind.ops.create = faulty_create;
	f->kind.ops.destroy = faulty_destroy;
	f->kind.ops.scrub = faulty_scrub;
	f->kind.ops.reserve = faulty_reserve;
	f->kind.ops.unreserve = counting_unreserve;
	creations_left = scrubs_left = reservations_left = 1000;
	busy_left = ranges = 0;
	list_init(&f->extents);
	assert_int_equal(loop_new(&f->loop), 0);
	assert_int_equal(executor_new(f->loop, &f->executor), 0);
	assert_int_equal(pool_new(f->loop, f->executor, &f->kind.kind, 8 * EXTENT + EXTENT / 2, EXTENT, &f->pool), 0);
	assert_int_equal(arena_new(f->pool, &layout, &f->arena), 0);
	f->account.max = 8 * EXTENT;
	f->quota = (struct quota){.name = "t", .tier = "device", .parent = &f->pool->quota, .account = &f->account};
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
	test_kind_deinit(&f->kind);
	free(f);
	return ranges;
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
	assert_int_equal(f->pool->kind->ops->physical(f->pool->kind, extent->fd, EXTENT), EXTENT);
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
	f->arena = arena_unref(f->arena); /* the busy extents refer to it */
	f->pool = pool_free(f->pool);     /* the runner counts the descriptors */
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

/* New memory that cannot be zeroed is given back. */
static int64_t begun_scrubs, polled_scrub, scrub_end;
static unsigned scrub_polls;

static int64_t begin_scrub(struct kind *kind, void *at, size_t size)
{
	(void)kind, (void)at, (void)size;
	return scrubs_left-- > 0 ? ++begun_scrubs : -EIO;
}

/* Takes three questions. */
static int poll_scrub(struct kind *kind, int64_t number)
{
	(void)kind;
	polled_scrub = number;
	return ++scrub_polls % 4 ? -EAGAIN : (int)scrub_end;
}

/* Where zeroing is only begun, nobody gets the extents before all of it has ended. */
static void test_scrubs_in_the_background(void **state)
{
	struct fixture *f = *state;

	begun_scrubs = scrub_end = 0;
	scrub_polls = 0;
	f->kind.ops.scrub_begin = begin_scrub;
	f->kind.ops.scrub_poll = poll_scrub;
	create(f, 3);
	assert_int_equal(f->status, 0);
	assert_int_equal(begun_scrubs, 3);
	assert_int_equal(polled_scrub, 3);
	assert_int_equal(scrub_polls, 4);
	destroy(f);
	scrub_end = -EIO;
	create(f, 2);
	assert_int_equal(f->status, -EIO);
	assert_int_equal(scrub_polls, 8);
	release_all(f);
	scrubs_left = 1;
	scrub_end = 0;
	create(f, 2); /* the one that was begun is waited for before it is unmapped */
	assert_int_equal(f->status, -EIO);
	assert_int_equal(scrub_polls, 12);
	release_all(f);
	scrubs_left = 1000;
}

static void test_failed_scrub(void **state)
{
	struct fixture *f = *state;

	scrubs_left = 1;
	create(f, 3);
	assert_int_equal(f->status, -EIO);
	for (const struct list *node = f->extents.next; node != &f->extents; node = node->next)
		assert_true(list_entry(node, struct extent, node)->fd < 0);
	release_all(f);
	assert_int_equal(f->account.charged, 0);
}

/* The first extent reserves the arena's addresses; without any, nothing is created. */
static void test_no_addresses(void **state)
{
	struct fixture *f = *state;

	assert_null(f->arena->base);
	reservations_left = 0;
	create(f, 1);
	assert_int_equal(f->status, -ENOMEM);
	release_all(f);
	assert_null(f->arena->base);
	reservations_left = 1000;
	create(f, 2);
	assert_int_equal(f->status, 0);
	assert_non_null(f->arena->base);
	assert_null(f->arena->pairs); /* the host has no device */
	assert_int_equal(ranges, 1);
	assert_int_equal(arena_open(f->arena), 0);
	assert_int_equal(ranges, 1);
	destroy(f);
	release_all(f);
}

/* As on a device: slots' pairs are backed chunk by chunk, and stay. */
static struct arena *device_arena(struct fixture *f)
{
	struct kvg_layout layout = f->arena->layout;
	struct arena *arena;

	f->kind.ops.device = some_device;
	assert_int_equal(arena_new(f->pool, &layout, &arena), 0);
	assert_int_equal(arena->pairs_size, 8 * 16384); /* 128 blocks of 128 bytes a slot */
	(void)arena_unref(f->arena);
	f->arena = arena;
	return arena;
}

static void test_pairs(void **state)
{
	struct fixture *f = *state;
	struct arena *arena = device_arena(f);
	const struct extent *extent;

	create(f, 2);
	assert_int_equal(f->status, 0);
	assert_int_equal(ranges, 2);
	assert_int_equal(arena->pairs_bytes, 2 * 16384);
	extent = list_entry(f->extents.prev, struct extent, node);
	assert_int_equal(extent->meta->slot, 1);
	arena->pairs[(2 * arena->blocks_per_extent) * KVG_BLOCK_TOKENS - 1].pos = 5; /* mapped to the end of slot 1 */
	destroy(f);
	release_all(f);
	assert_int_equal(arena->pairs_bytes, 2 * 16384);
	create(f, 1);
	assert_int_equal(arena->pairs_bytes, 2 * 16384);
	destroy(f);
	release_all(f);
}

/* Slots whose pairs are smaller than a chunk share one. */
static void test_pairs_share_chunks(void **state)
{
	struct fixture *f = *state;
	struct arena *arena;

	f->kind.kind.granularity = 32768; /* of the chunks; a slot's pairs have half of that */
	arena = device_arena(f);
	create(f, 3);
	assert_int_equal(arena->pairs_bytes, 2 * 32768);
	destroy(f);
	release_all(f);
}

static void test_failed_pairs(void **state)
{
	struct fixture *f = *state;
	struct arena *arena = device_arena(f);

	creations_left = 3; /* of 4 chunks and then the first extent */
	create(f, 1);
	assert_int_equal(f->status, -ENOMEM);
	assert_int_equal(arena->pairs_bytes, 3 * 4096);
	release_all(f);
	creations_left = 1000;
	scrubs_left = 0;
	create(f, 1);
	assert_int_equal(f->status, -EIO);
	release_all(f);
	assert_int_equal(arena->pairs_bytes, 3 * 4096);
	scrubs_left = 1000;
	create(f, 1);
	assert_int_equal(f->status, 0);
	assert_int_equal(arena->pairs_bytes, 4 * 4096);
	destroy(f);
	release_all(f);
}

/* The second range of an arena cannot be had: the first waits for the next attempt. */
static void test_no_addresses_for_pairs(void **state)
{
	struct fixture *f = *state;
	struct arena *arena = device_arena(f);

	reservations_left = 1;
	assert_int_equal(arena_open(arena), -ENOMEM);
	assert_int_equal(ranges, 1);
	reservations_left = 1;
	assert_int_equal(arena_open(arena), 0);
	assert_int_equal(ranges, 2);
}

/* An extent that stays mapped keeps its slot, its bytes and its charge, and is tried again. */
static void test_failed_unmap(void **state)
{
	static const struct loop_poller_ops ops = {.poll = poll_live, .sleep = no_sleep};
	struct fixture *f = *state;

	create(f, 1);
	unmap_failures = 2; /* the first attempt, and the retry */
	f->kind.ops.unmap = faulty_unmap;
	destroy(f);
	release_all(f);
	assert_int_equal(f->pool->live, 1);
	assert_int_equal(f->account.unreturned, EXTENT);
	assert_int_equal(f->arena->free_count, f->arena->slots - 1);
	assert_int_equal(loop_poller_add(f->loop, &ops, f), 0);
	assert_int_equal(loop_run(f->loop), 0);
	loop_poller_remove(f->loop, &ops, f);
	assert_int_equal(f->account.charged, 0);
	assert_int_equal(f->arena->free_count, f->arena->slots);
	assert_true(unmap_failures < 0);
}

struct keeper {
	struct job job;
	sem_t go;
};

static void keep(struct job *job)
{
	(void)sem_wait(&list_entry(job, struct keeper, job)->go);
}

static void kept(struct job *job)
{
	(void)job;
}

static unsigned batches_left;

static void one_done(struct extent_batch *batch)
{
	struct fixture *f = batch->user;
	struct list *node;

	while ((node = list_pop(&batch->extents)))
		list_add_tail(&f->extents, node);
	f->status = batch->status < 0 ? batch->status : f->status;
	(void)extent_batch_free(batch);
	if (!--batches_left) {
		f->done = true;
		loop_stop(f->loop);
	}
}

static unsigned mark_of(const struct fixture *f, unsigned slot)
{
	unsigned i = 0;

	while (i < mark_count && marks[i] != f->arena->base + slot * f->arena->extent_size)
		i++;
	return i;
}

static void tick_run(struct job *job)
{
	(void)job;
}

static bool tick(struct job *job)
{
	(void)job;
	ticks++;
	return mark_count == 8;
}

/* Slices of two batches between which nobody else had a turn. */
static unsigned crowded(const struct fixture *f)
{
	unsigned count = 0;

	for (unsigned i = 1; i < mark_count; i++) {
		size_t a = (size_t)(marks[i - 1] - f->arena->base) / f->arena->extent_size;
		size_t b = (size_t)(marks[i] - f->arena->base) / f->arena->extent_size;

		count += (a < 4 ? 0 : a / 2) != (b < 4 ? 0 : b / 2) && mark_ticks[i] == mark_ticks[i - 1];
	}
	return count;
}

/*
 * Slices of time go round: the last batch does not wait for the end of the first, and other jobs wait for one slice at
 * a time.
 */
static void test_batches_take_turns(void **state)
{
	static const uint32_t counts[] = {4, 2, 2};
	struct fixture *f = *state;
	struct keeper keeper = {.job = {.run = keep, .done = kept}};
	struct job ticker = {.run = tick_run, .poll = tick, .done = kept};

	f->kind.ops.map = slow_map;
	f->status = 0;
	mark_count = ticks = 0;
	batches_left = 3;
	assert_int_equal(sem_init(&keeper.go, 0, 0), 0);
	executor_submit(f->executor, &keeper.job);
	executor_submit(f->executor, &ticker);
	for (unsigned i = 0; i < 3; i++) {
		struct extent_batch *batch = extent_batch_new(f->pool, one_done, f);

		assert_int_equal(quota_charge(&f->quota, counts[i] * (uint64_t)EXTENT, 0, "x", f->text), 0);
		assert_int_equal(extent_batch_add_new(batch, f->arena, &f->quota, 3, 4, counts[i]), 0);
		extent_batch_create(batch);
	}
	assert_int_equal(sem_post(&keeper.go), 0);
	wait_done(f);
	assert_int_equal(f->status, 0);
	assert_int_equal(mark_count, 8);
	assert_true(crowded(f) <= 1); /* the thread itself may be kept from running for a while */
	assert_true(mark_of(f, 6) < mark_of(f, 3));
	assert_true(mark_of(f, 4) < mark_of(f, 3));
	assert_true(mark_of(f, 6) < mark_of(f, 5));
	destroy(f);
	release_all(f);
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
		POOL_TEST(test_failed_scrub),
		POOL_TEST(test_scrubs_in_the_background),
		POOL_TEST(test_no_addresses),
		POOL_TEST(test_pairs),
		POOL_TEST(test_pairs_share_chunks),
		POOL_TEST(test_failed_pairs),
		POOL_TEST(test_no_addresses_for_pairs),
		POOL_TEST(test_failed_unmap),
		POOL_TEST(test_batches_take_turns),
	};

	return runner_run("pool", tests, sizeof(tests) / sizeof(tests[0]));
}
