/* Memory of a min is there before anybody asks for it, is used up first, and never more than the account allows. */
#include "daemon/memory/reserve.h"

#include <dirent.h>
#include <errno.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/support/test_kind.h"

#define EXTENT   (64u << 10)
#define ODD      73728u /* extents of an arena whose stride does not divide the pool's */
#define EXTENTS  16u
#define TENANT   3u
#define NO_LIMIT UINT64_MAX

static atomic_int creations_left, creations, reservations_left;
static _Atomic uint64_t allowed; /* bytes of extents that may exist after a creation */
static atomic_bool exceeded, gated;
static _Atomic uint64_t slow_ns; /* what each creation takes at least */
static sem_t entered, gate;

/* Bytes of all extents that this process has descriptors of. */
static uint64_t physical(void)
{
	DIR *dir = opendir("/proc/self/fd");
	const struct dirent *entry;
	uint64_t sum = 0;

	assert_non_null(dir);
	while ((entry = readdir(dir))) {
		char target[128];
		struct stat st;
		ssize_t n = readlinkat(dirfd(dir), entry->d_name, target, sizeof(target) - 1);

		target[n > 0 ? n : 0] = '\0';
		if (strncmp(target, "/memfd:kvgate-extent", 20) == 0 && fstatat(dirfd(dir), entry->d_name, &st, 0) == 0)
			sum += (uint64_t)st.st_blocks * 512;
	}
	(void)closedir(dir);
	return sum;
}

static int watched_create(struct kind *kind, size_t size)
{
	const uint64_t begun = loop_now();
	int fd;

	while (loop_now() - begun < atomic_load(&slow_ns))
		;
	if (atomic_load(&gated)) {
		(void)sem_post(&entered);
		(void)sem_wait(&gate);
	}
	if (atomic_fetch_sub(&creations_left, 1) <= 0)
		return -ENOMEM;
	fd = test_kind_host(kind)->create(kind, size);
	atomic_fetch_add(&creations, 1);
	if (atomic_load(&allowed) != NO_LIMIT && physical() > atomic_load(&allowed))
		atomic_store(&exceeded, true);
	return fd;
}

static void *faulty_reserve(struct kind *kind, size_t size)
{
	return atomic_fetch_sub(&reservations_left, 1) > 0 ? test_kind_host(kind)->reserve(kind, size) : NULL;
}

struct fixture {
	struct test_kind kind;
	struct loop *loop;
	struct executor *executor;
	struct pool *pool;
	struct arena *arena, *odd;
	struct quota_account account;
	struct quota quota;
	struct reserve reserve;
	struct list extents; /* that were created */
	char text[QUOTA_TEXT];
	unsigned batches; /* that have ended */
	int status;
	bool (*until)(struct fixture *f);
};

static bool ask(void *user)
{
	struct fixture *f = user;

	if (f->until && f->until(f)) {
		f->until = NULL;
		loop_stop(f->loop);
	}
	return false;
}

static bool keep_awake(void *user, bool going)
{
	(void)going;
	return ((struct fixture *)user)->until != NULL;
}

static const struct loop_poller_ops asker = {.poll = ask, .sleep = keep_awake};

static void run_until(struct fixture *f, bool (*until)(struct fixture *f))
{
	f->until = until;
	assert_int_equal(loop_run(f->loop), 0);
}

static bool settled(struct fixture *f)
{
	return reserve_is_settled(&f->reserve) && executor_pending(f->executor) == 0;
}

static bool idle(struct fixture *f)
{
	return executor_pending(f->executor) == 0;
}

static struct arena *new_arena(struct fixture *f, uint32_t k_dim)
{
	struct kvg_layout layout = {.model = "m", .group_count = 1};
	struct arena *arena;

	layout.groups[0] = (struct kvg_group){.k_dim = k_dim, .v_dim = 8, .k_dtype = KVG_BF16, .v_dtype = KVG_BF16};
	assert_int_equal(arena_new(f->pool, &layout, &arena), 0);
	return arena;
}

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	if (!f)
		return -1;
	test_kind_init(&f->kind);
	f->kind.ops.create = watched_create;
	f->kind.ops.reserve = faulty_reserve;
	creations_left = reservations_left = 1000;
	creations = 0;
	allowed = NO_LIMIT;
	exceeded = gated = false;
	(void)sem_init(&entered, 0, 0);
	(void)sem_init(&gate, 0, 0);
	list_init(&f->extents);
	assert_int_equal(loop_new(&f->loop), 0);
	assert_int_equal(executor_new(f->loop, &f->executor), 0);
	assert_int_equal(
		pool_new(f->loop, f->executor, &f->kind.kind, (uint64_t)EXTENTS * EXTENT, EXTENT, &f->pool), 0);
	f->arena = new_arena(f, 8);
	f->odd = new_arena(f, 24);
	assert_int_equal(f->arena->extent_size, EXTENT);
	assert_int_equal(f->odd->extent_size, ODD);
	f->account.max = (uint64_t)EXTENTS * EXTENT;
	f->quota =
		(struct quota){.name = "tenant t", .tier = "device", .parent = &f->pool->quota, .account = &f->account};
	reserve_init(&f->reserve, f->pool, &f->quota, TENANT);
	assert_int_equal(loop_poller_add(f->loop, &asker, f), 0);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	loop_poller_remove(f->loop, &asker, f);
	reserve_stop_all(f->pool);
	(void)arena_unref(f->arena);
	(void)arena_unref(f->odd);
	(void)executor_free(f->executor);
	reserve_deinit(&f->reserve);
	reserve_deinit(&f->reserve);
	(void)pool_free(f->pool);
	(void)loop_free(f->loop);
	test_kind_deinit(&f->kind);
	(void)sem_destroy(&entered);
	(void)sem_destroy(&gate);
	free(f);
	return exceeded || physical() != 0;
}

static void set_min(struct fixture *f, uint64_t min)
{
	if (quota_set(&f->quota, min, 0, f->account.max, f->text) < 0)
		fail_msg("%s", f->text);
	reserve_update(&f->reserve);
}

static void set_min_and_wait(struct fixture *f, uint64_t min)
{
	set_min(f, min);
	run_until(f, settled);
}

static void on_done(struct extent_batch *batch)
{
	struct fixture *f = batch->user;
	struct list *node;

	while ((node = list_pop(&batch->extents)))
		list_add_tail(&f->extents, node);
	f->status = batch->status;
	f->batches++;
	(void)extent_batch_free(batch);
}

/* Charges and begins to create. */
static void begin(struct fixture *f, struct arena *arena, uint32_t count)
{
	struct extent_batch *batch = extent_batch_new(f->pool, on_done, f);

	assert_non_null(batch);
	if (quota_charge(&f->quota, count * (uint64_t)arena->extent_size, 0, "x", f->text) < 0)
		fail_msg("%s", f->text);
	assert_int_equal(extent_batch_add_new(batch, arena, &f->quota, TENANT, 4, count), 0);
	extent_batch_create(batch);
}

static void create(struct fixture *f, struct arena *arena, uint32_t count)
{
	begin(f, arena, count);
	run_until(f, settled);
	assert_int_equal(f->status, 0);
}

static void release_all(struct fixture *f)
{
	while (!list_empty(&f->extents))
		extent_release(f->pool, list_entry(f->extents.next, struct extent, node), 0);
}

static void destroy_batch(struct fixture *f)
{
	struct extent_batch *batch = extent_batch_new(f->pool, on_done, f);
	struct list *node;

	while ((node = list_pop(&f->extents)))
		list_add_tail(&batch->extents, node);
	extent_batch_destroy(batch);
}

static void destroy(struct fixture *f)
{
	destroy_batch(f);
	run_until(f, idle);
	release_all(f);
	run_until(f, settled);
}

static void check(const struct fixture *f, uint32_t raw, uint64_t charged)
{
	uint32_t found = 0;

	assert_int_equal(f->reserve.count, raw);
	assert_int_equal(reserve_bytes(&f->reserve), (uint64_t)raw * EXTENT);
	assert_int_equal(f->account.charged, charged);
	assert_int_equal(physical(), (uint64_t)raw * EXTENT + charged);
	for (uint32_t i = 0; i < f->pool->extent_count; i++) {
		const struct meta_extent *meta = &f->pool->meta->extents[i];

		if (meta->state != META_RAW)
			continue;
		found++;
		assert_int_equal(meta->tenant, TENANT);
		assert_int_equal(meta->bytes, EXTENT);
		assert_ptr_equal(f->pool->extents[i]->meta, meta);
	}
	assert_int_equal(found, raw);
	assert_int_equal(f->pool->free_count + f->pool->live + raw, f->pool->extent_count);
}

static void test_min_exists(void **state)
{
	struct fixture *f = *state;

	check(f, 0, 0);
	assert_true(reserve_is_settled(&f->reserve));
	set_min(f, 4 * EXTENT + EXTENT / 2); /* in whole extents */
	assert_false(reserve_is_settled(&f->reserve));
	run_until(f, settled);
	check(f, 4, 0);
	assert_int_equal(creations, 4);
	set_min_and_wait(f, EXTENTS * EXTENT);
	check(f, EXTENTS, 0);
	set_min_and_wait(f, EXTENT);
	check(f, 1, 0);
	set_min_and_wait(f, 0);
	check(f, 0, 0);
}

static void test_extents_are_made_of_it(void **state)
{
	struct fixture *f = *state;
	const struct extent *extent;

	allowed = 4 * EXTENT;
	set_min_and_wait(f, 4 * EXTENT);
	create(f, f->arena, 3);
	assert_int_equal(creations, 4);
	check(f, 1, 3 * EXTENT);
	extent = list_entry(f->extents.next, struct extent, node);
	assert_int_equal(extent->meta->state, META_BORN);
	assert_int_equal(extent->meta->worker, 4);
	f->arena->base[extent->meta->slot * (size_t)EXTENT] = 1; /* mapped */
	destroy(f);
	check(f, 4, 0);
	assert_int_equal(creations, 7);
}

/* Above min, memory is created as it always was. */
static void test_more_than_min(void **state)
{
	struct fixture *f = *state;

	allowed = 6 * EXTENT;
	set_min_and_wait(f, 4 * EXTENT);
	create(f, f->arena, 6);
	assert_int_equal(creations, 6);
	check(f, 0, 6 * EXTENT);
	set_min_and_wait(f, 5 * EXTENT); /* it has them */
	check(f, 0, 6 * EXTENT);
	destroy(f);
	check(f, 5, 0);
}

static bool has_places(const struct fixture *f, uint32_t extent)
{
	unsigned char there;

	assert_int_equal(mincore(meta_places(f->pool->meta, extent), 1, &there), 0);
	return there & 1;
}

/* Places of what becomes raw again stay, those of other extents go. */
static void test_places(void **state)
{
	struct fixture *f = *state;

	set_min_and_wait(f, 4 * EXTENT);
	for (unsigned round = 0; round < 3; round++) {
		create(f, f->arena, 7);
		for (uint32_t i = 0; i < EXTENTS; i++)
			assert_int_equal(has_places(f, i), f->pool->extents[i] != NULL);
		destroy(f);
		check(f, 4, 0);
		for (uint32_t i = 0; i < EXTENTS; i++)
			assert_int_equal(has_places(f, i), f->pool->extents[i] != NULL);
	}
}

/* Extents of another size: what they leave no room for goes before they come. */
static void test_odd_extents(void **state)
{
	struct fixture *f = *state;

	allowed = 4 * EXTENT;
	set_min_and_wait(f, 4 * EXTENT);
	create(f, f->odd, 1);
	check(f, 2, ODD);
	create(f, f->odd, 2);
	check(f, 0, 3 * ODD);
	assert_int_equal(creations, 7);
	allowed = 4 * ODD;
	create(f, f->odd, 1);
	check(f, 0, 4 * ODD);
	destroy(f);
	check(f, 4, 0);
}

/* A pool that is all min has an index for each extent of either size. */
static void test_the_whole_pool(void **state)
{
	struct fixture *f = *state;

	allowed = (uint64_t)EXTENTS * EXTENT;
	set_min_and_wait(f, EXTENTS * EXTENT);
	create(f, f->odd, EXTENTS * EXTENT / ODD);
	check(f, 0, (uint64_t)(EXTENTS * EXTENT / ODD) * ODD);
	destroy(f);
	create(f, f->arena, EXTENTS);
	check(f, 0, EXTENTS * EXTENT);
	destroy(f);
	check(f, EXTENTS, 0);
}

static bool two_batches(struct fixture *f)
{
	return f->batches == 2 && settled(f);
}

/* Batches that come while memory is being created wait for it, get what was made, and no more is made than they leave.
 */
static void test_batches_wait_for_the_job(void **state)
{
	struct fixture *f = *state;

	allowed = 4 * EXTENT;
	gated = true;
	set_min(f, 4 * EXTENT);
	(void)sem_wait(&entered); /* the first is being made */
	begin(f, f->arena, 1);
	begin(f, f->odd, 1);
	assert_int_equal(f->pool->batches, 2);
	gated = false;
	(void)sem_post(&gate);
	run_until(f, two_batches);
	assert_int_equal(f->status, 0);
	check(f, 1, EXTENT + ODD);
	destroy(f);
	check(f, 4, 0);
}

/* The same when nothing of what was made is wanted any more. */
static void test_min_goes_while_it_is_made(void **state)
{
	struct fixture *f = *state;

	gated = true;
	set_min(f, 4 * EXTENT);
	(void)sem_wait(&entered);
	set_min(f, 0);
	gated = false;
	(void)sem_post(&gate);
	run_until(f, settled);
	check(f, 0, 0);
}

/* What is there already goes at once: others may have been given its bytes. */
static void test_min_goes_while_more_is_made(void **state)
{
	struct fixture *f = *state;

	set_min_and_wait(f, 4 * EXTENT);
	gated = true;
	set_min(f, 8 * EXTENT);
	(void)sem_wait(&entered);
	set_min(f, EXTENT);
	assert_int_equal(reserve_bytes(&f->reserve), EXTENT);
	gated = false;
	(void)sem_post(&gate);
	run_until(f, settled);
	check(f, 1, 0);
}

static unsigned ended;

static void count_ended(void *user)
{
	(void)user;
	ended++;
}

/* What cannot be created is reported, and tried again later by itself. */
static void test_failure(void **state)
{
	struct fixture *f = *state;

	ended = 0;
	f->pool->reserve_ended = count_ended;
	creations_left = 2;
	set_min(f, 4 * EXTENT);
	run_until(f, idle);
	assert_int_equal(ended, 1);
	assert_true(f->reserve.reported);
	assert_int_equal(f->reserve.status, -ENOMEM);
	assert_false(reserve_is_settled(&f->reserve));
	check(f, 2, 0);
	creations_left = 1000;
	reserve_settle(&f->reserve); /* leaves it to the timer */
	assert_false(f->reserve.busy);
	run_until(f, settled);
	assert_int_equal(f->reserve.status, 0);
	assert_false(f->reserve.reported);
	check(f, 4, 0);
	assert_int_equal(ended, 2);
}

/* No addresses: memory that the batch had taken is given back, and comes to the reserve anew. */
static void test_failed_batch(void **state)
{
	struct fixture *f = *state;

	allowed = 4 * EXTENT;
	set_min_and_wait(f, 4 * EXTENT);
	reservations_left = 0;
	begin(f, f->arena, 3);
	run_until(f, idle);
	assert_int_equal(f->status, -ENOMEM);
	release_all(f);
	run_until(f, settled);
	check(f, 4, 0);
	reservations_left = 1000;
}

/* A batch that was filled and never created. */
static void test_dropped_batch(void **state)
{
	struct fixture *f = *state;
	struct extent_batch *batch = extent_batch_new(f->pool, on_done, f);

	set_min_and_wait(f, 4 * EXTENT);
	assert_int_equal(quota_charge(&f->quota, 2 * EXTENT, 0, "x", f->text), 0);
	assert_int_equal(extent_batch_add_new(batch, f->arena, &f->quota, TENANT, 4, 2), 0);
	while (!list_empty(&batch->extents))
		extent_release(f->pool, list_entry(batch->extents.next, struct extent, node), 0);
	(void)extent_batch_free(batch);
	run_until(f, settled);
	check(f, 4, 0);
}

/* Nothing is created for a daemon that ends. */
static void test_end(void **state)
{
	struct fixture *f = *state;

	set_min_and_wait(f, 4 * EXTENT);
	create(f, f->arena, 2);
	reserve_stop_all(f->pool);
	destroy_batch(f);
	run_until(f, idle);
	release_all(f);
	check(f, 2, 0);
}

/* A job of somebody else's, until three extents have been made beside it. */
struct other {
	struct job job;
	int seen;            /* creations */
	unsigned polls;      /* since then */
	unsigned between[3]; /* polls before the creation after 1, 2, 3 */
	bool over;
};

static void other_run(struct job *job)
{
	((struct other *)job)->seen = atomic_load(&creations);
}

static bool other_poll(struct job *job)
{
	struct other *other = (struct other *)job;
	int now = atomic_load(&creations);

	other->polls++;
	if (now == other->seen)
		return false;
	if (other->seen > 0 && other->seen <= 3)
		other->between[other->seen - 1] = other->polls;
	other->seen = now;
	other->polls = 0;
	return now > 3;
}

static void other_done(struct job *job)
{
	((struct other *)job)->over = true;
}

/* While others are at work, memory of the min comes in pieces with long rests, and yet it comes. */
static void test_makes_way(void **state)
{
	struct fixture *f = *state;
	struct other other = {.job = {.run = other_run, .poll = other_poll, .done = other_done}};

	slow_ns = 1000000; /* more than a slice: each piece is one extent */
	executor_submit(f->executor, &other.job);
	set_min_and_wait(f, 8 * EXTENT);
	slow_ns = 0;
	assert_true(other.over);
	for (unsigned i = 0; i < 3; i++)
		assert_in_range(other.between[i], 10, UINT32_MAX); /* without rests: one */
	check(f, 8, 0);
}

#define RESERVE_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		RESERVE_TEST(test_min_exists),
		RESERVE_TEST(test_extents_are_made_of_it),
		RESERVE_TEST(test_more_than_min),
		RESERVE_TEST(test_places),
		RESERVE_TEST(test_odd_extents),
		RESERVE_TEST(test_the_whole_pool),
		RESERVE_TEST(test_batches_wait_for_the_job),
		RESERVE_TEST(test_min_goes_while_it_is_made),
		RESERVE_TEST(test_min_goes_while_more_is_made),
		RESERVE_TEST(test_failure),
		RESERVE_TEST(test_failed_batch),
		RESERVE_TEST(test_dropped_batch),
		RESERVE_TEST(test_end),
		RESERVE_TEST(test_makes_way),
	};

	return runner_run("reserve", tests, sizeof(tests) / sizeof(tests[0]));
}
