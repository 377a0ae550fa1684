/* A clean daemon audits clean; each planted difference is found, named, and gone when it is undone. */
#include "daemon/metrics/audit.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/frame.h"
#include "tests/support/space_model.h"

static const struct kvg_policy evicted = {.ratio = 0.4,
	.mode = KVG_MODE_CHUNKED,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE,
	.context_tokens = 700,
	.window = 40,
	.max_new_tokens = 300};

struct scene {
	struct fixture *fixture;
	struct model *models[2];
	uint64_t gone; /* handle of a sequence whose extents are dropped and not unmapped */
};

/* One sequence with held and fresh blocks, one with fresh ones, extents on their way back. */
static int setup(void **state)
{
	struct scene *scene = calloc(1, sizeof(*scene));
	struct kvg_policy policy = {.context_tokens = 2000};

	if (!scene)
		return -1;
	scene->fixture = fixture_new(&(struct fixture_options){.extent_size = 16 << 10, .host_size = 4 << 20});
	scene->models[0] = model_new(scene->fixture, &evicted, SCORES_RANDOM);
	model_prefill(scene->models[0]);
	assert_int_equal(model_append(scene->models[0], 100), 0);
	scene->models[1] = model_new(scene->fixture, &policy, SCORES_RANDOM);
	assert_int_equal(model_append(scene->models[1], 500), 0);
	assert_int_equal(fixture_create(scene->fixture, &policy, &scene->gone), 0);
	assert_int_equal(fixture_reserve(scene->fixture, scene->gone, 300), 0);
	scene->fixture->hold_unmapped = true;
	assert_int_equal(fixture_release(scene->fixture, scene->gone), 0);
	assert_true(fixture_account(scene->fixture)->unreturned > 0);
	*state = scene;
	return 0;
}

static int teardown(void **state)
{
	struct scene *scene = *state;

	scene->fixture->hold_unmapped = false;
	model_release(scene->models[0]);
	model_release(scene->models[1]);
	fixture_free(scene->fixture);
	free(scene);
	return 0;
}

/* ---- looking ---- */

static void run_audit(const struct scene *scene, audit_physical physical, struct audit *ret)
{
	struct pool *pool = scene->fixture->pool;

	assert_int_equal(audit_run(pool->meta->fd, physical, pool, ret), 0);
}

static void expect_difference(const struct scene *scene, audit_physical physical, const char *expected)
{
	bool found = false;
	struct audit audit;

	run_audit(scene, physical, &audit);
	for (size_t i = 0; i < audit.difference_count && i < AUDIT_DIFFERENCES; i++)
		found |= strstr(audit.differences[i], expected) != NULL;
	if (!found) {
		for (size_t i = 0; i < audit.difference_count && i < AUDIT_DIFFERENCES; i++)
			print_error("%s\n", audit.differences[i]);
		fail_msg("%zu differences, none with '%s'", audit.difference_count, expected);
	}
	audit_deinit(&audit);
}

static void plant_u32(const struct scene *scene, uint32_t *at, uint32_t value, const char *expected)
{
	uint32_t before = *at;

	assert_int_not_equal(before, value);
	*at = value;
	expect_difference(scene, fixture_physical, expected);
	*at = before;
	fixture_audit(scene->fixture);
}

static void plant_u64(const struct scene *scene, uint64_t *at, uint64_t value, const char *expected)
{
	uint64_t before = *at;

	assert_int_not_equal(before, value);
	*at = value;
	expect_difference(scene, fixture_physical, expected);
	*at = before;
	fixture_audit(scene->fixture);
}

/* The first extent in a state, or with used blocks. */
static struct extent *find_extent(const struct scene *scene, uint32_t meta_state)
{
	const struct pool *pool = scene->fixture->pool;

	for (uint32_t i = 0; i < pool->extent_count; i++)
		if (pool->extents[i] && pool->extents[i]->meta->state == meta_state)
			return pool->extents[i];
	fail_msg("no extent in state %u", meta_state);
	return NULL;
}

/* ---- tests ---- */

static void test_clean(void **state)
{
	struct scene *scene = *state;
	const struct quota_account *account = fixture_account(scene->fixture);
	struct audit audit;

	run_audit(scene, fixture_physical, &audit);
	assert_int_equal(audit.difference_count, 0);
	assert_int_equal(audit.row_count, 1);
	assert_string_equal(audit.rows[0].tenant, "test");
	assert_int_equal(audit.rows[0].extents, scene->fixture->pool->live);
	assert_int_equal(audit.rows[0].extent_bytes, account->charged);
	assert_int_equal(audit.rows[0].physical, account->charged);
	assert_int_equal(audit.rows[0].charged, account->charged);
	assert_int_equal(audit.rows[0].blocks, scene->fixture->space->blocks.used_blocks);
	audit_deinit(&audit);
	audit_deinit(&audit);
}

static void test_accounts(void **state)
{
	struct scene *scene = *state;
	struct quota_account *accounts[] = {scene->fixture->tenant->quota.account, scene->fixture->pool->quota.account};
	static const char *const names[][3] = {
		{"test: bytes charged", "test: bytes promised", "test: bytes unreturned"},
		{"pool: bytes charged", "pool: bytes promised", "pool: bytes unreturned"}};

	for (unsigned i = 0; i < 2; i++) {
		plant_u64(scene, &accounts[i]->charged, accounts[i]->charged + 1, names[i][0]);
		plant_u64(scene, &accounts[i]->charged, 0, names[i][0]);
		plant_u64(scene, &accounts[i]->promised, accounts[i]->promised - 1, names[i][1]);
		plant_u64(scene, &accounts[i]->unreturned, accounts[i]->unreturned - 1, names[i][2]);
	}
	plant_u64(scene, &scene->fixture->space->part.worker->promised, 0, "test: bytes promised");
	plant_u64(scene, &accounts[1]->committed, accounts[1]->committed + 1, "pool: bytes committed");
	plant_u64(scene, &accounts[0]->min, quota_use(accounts[0]) + 1, "pool: bytes committed");
	plant_u64(scene, &scene->fixture->tenant->host.account->min, 1, "pool: bytes of the host committed");
}

static uint64_t one_page_less(void *user, uint32_t extent)
{
	return fixture_physical(user, extent) - 4096;
}

static bool reserve_is_there(const struct scene *scene)
{
	return reserve_is_settled(&scene->fixture->tenant->reserve);
}

static void stop_loop(void *user)
{
	loop_stop(user);
}

static void wait_reserve(const struct scene *scene)
{
	struct fixture *fixture = scene->fixture;

	fixture->pool->reserve_ended = stop_loop;
	fixture->pool->reserve_user = fixture->loop;
	while (!reserve_is_there(scene))
		assert_int_equal(loop_run(fixture->loop), 0);
	fixture->pool->reserve_ended = NULL;
}

/* Memory of min that nobody uses is counted, and is no more than min leaves. */
static void test_reserve(void **state)
{
	struct scene *scene = *state;
	struct tenant *tenant = scene->fixture->tenant;
	struct quota_account *account = tenant->quota.account;
	const uint64_t extent = scene->fixture->pool->extent_size;
	struct budget budget = {.min = account->charged + 2 * extent, .max = account->max};
	struct meta_extent *raw;
	char text[QUOTA_TEXT];
	struct audit audit;

	assert_int_equal(tenant_set_budget(tenant, TENANT_DEVICE, &budget, text), 0);
	wait_reserve(scene);
	run_audit(scene, fixture_physical, &audit);
	assert_int_equal(audit.difference_count, 0);
	assert_int_equal(audit.rows[0].reserved, 2 * extent);
	assert_int_equal(audit.rows[0].physical, account->charged + 2 * extent);
	assert_int_equal(audit.rows[0].extent_bytes, account->charged);
	audit_deinit(&audit);
	raw = find_extent(scene, META_RAW)->meta;
	plant_u64(scene, &raw->bytes, extent - 4096, "raw extent ");
	plant_u32(scene, &raw->state, META_LIVE, "test: bytes charged");
	plant_u64(scene, &account->min, account->min - 1, " charged, of a min of ");
	expect_difference(scene, one_page_less, "raw extent ");
	budget.min = 0;
	assert_int_equal(tenant_set_budget(tenant, TENANT_DEVICE, &budget, text), 0);
	fixture_audit(scene->fixture);
}

static void test_bitmaps(void **state)
{
	struct scene *scene = *state;
	struct extent *extent = find_extent(scene, META_LIVE);

	for (uint32_t block = 0; block < extent->meta->blocks; block++) {
		uint8_t *byte = &extent->bitmap[block / 8], mask = (uint8_t)(1u << block % 8);

		*byte ^= mask; /* used becomes free, or the other way round */
		expect_difference(scene, fixture_physical, ": its bitmap and the rows that refer to it differ");
		expect_difference(scene, fixture_physical, ": blocks in its bitmap counted ");
		*byte ^= mask;
	}
	fixture_audit(scene->fixture);
	plant_u32(scene, &extent->meta->used, extent->meta->used + 1, ": blocks in its bitmap counted ");
}

/* Two faults that cancel out in the count of the bitmap. */
static void test_swapped_bits(void **state)
{
	struct scene *scene = *state;
	const struct pool *pool = scene->fixture->pool;
	uint32_t free_block = UINT32_MAX, used_block = UINT32_MAX;
	struct extent *extent = find_extent(scene, META_LIVE);

	for (uint32_t i = 0; i < pool->extent_count; i++)
		if (pool->extents[i] && pool->extents[i]->meta->state == META_LIVE &&
			pool->extents[i]->meta->used < pool->extents[i]->meta->blocks)
			extent = pool->extents[i];
	assert_true(extent->meta->used < extent->meta->blocks);
	for (uint32_t i = 0; i < extent->meta->blocks; i++)
		*(extent->bitmap[i / 8] >> i % 8 & 1 ? &used_block : &free_block) = i;
	extent->bitmap[free_block / 8] ^= (uint8_t)(1u << free_block % 8);
	extent->bitmap[used_block / 8] ^= (uint8_t)(1u << used_block % 8);
	expect_difference(scene, fixture_physical, ": its bitmap and the rows that refer to it differ");
	extent->bitmap[free_block / 8] ^= (uint8_t)(1u << free_block % 8);
	extent->bitmap[used_block / 8] ^= (uint8_t)(1u << used_block % 8);
	fixture_audit(scene->fixture);
}

static void test_block_ids(void **state)
{
	struct scene *scene = *state;
	const struct space *space = scene->fixture->space;
	uint32_t slot = (uint32_t)scene->models[0]->handle;
	uint32_t *held = meta_held(&space->part, slot, 1), *run = meta_run(&space->part, slot, 0);
	uint32_t dropped = find_extent(scene, META_DROPPED)->meta->slot * space->arena->ids_per_extent;

	plant_u32(scene, &held[0], held[1], ": two rows refer to block ");
	plant_u32(scene, &held[0], meta_held(&space->part, slot, 2)[0], ": two rows refer to block ");
	plant_u32(scene, &held[0], run[0], ": two rows refer to block ");
	plant_u32(scene, &held[0], dropped, ", of which there is no extent");
	plant_u32(scene, &held[0], UINT32_MAX, ", of which there is no extent");
	plant_u32(scene, &held[0],
		held[0] / space->arena->ids_per_extent * space->arena->ids_per_extent + space->arena->blocks_per_extent,
		", of which there is no extent"); /* the gap between K and V */
	plant_u32(scene, &run[1], run[0], ": two rows refer to block ");
	plant_u32(scene, &run[0], run[0] + 1, ": two rows refer to block ");
}

static void test_sequences(void **state)
{
	struct scene *scene = *state;
	const struct space *space = scene->fixture->space;
	uint32_t slot = (uint32_t)scene->models[0]->handle;
	struct meta_seq *seq = &space->part.seqs[slot];
	struct meta_row *row = &meta_rows(&space->part, slot)[2];

	plant_u64(scene, &seq->blocks, seq->blocks + 1, ": blocks counted ");
	plant_u64(scene, &seq->pairs, seq->pairs - 1, ": pairs counted ");
	plant_u32(scene, &row->base_len, row->base_len + 1, ": pairs counted ");
	plant_u32(scene, &row->held_len, row->held_blocks * 16 + 1, " pairs in ");
	plant_u32(scene, &row->held_blocks, row->held_blocks - 1, ": ");
	plant_u32(scene, &row->held_blocks, space->part.worker->row_cap + 1, ", room for ");
	plant_u32(scene, &row->held_blocks, UINT32_MAX, ", room for ");
	plant_u32(scene, &seq->stripes, 0, ": blocks counted ");
	plant_u32(scene, &seq->stripes, space->part.worker->stripe_cap + 1, ": stripes 0 to ");
	plant_u32(scene, &seq->stripe_first, seq->stripes + 1, ": stripes ");
	plant_u32(scene, &seq->epoch, 0, ": its bitmap and the rows that refer to it differ");
}

static void test_extents(void **state)
{
	struct scene *scene = *state;
	struct meta_extent *live = find_extent(scene, META_LIVE)->meta,
			   *dropped = find_extent(scene, META_DROPPED)->meta;

	plant_u64(scene, &live->bytes, live->bytes + 4096, ": bytes of memory counted ");
	plant_u32(scene, &live->state, META_EMPTY, "test: bytes charged");
	plant_u32(scene, &live->state, META_DROPPED, "test: bytes unreturned");
	plant_u32(scene, &live->worker, live->worker + 1, ", of which there is no extent");
	plant_u32(scene, &dropped->state, META_LIVE, "test: bytes unreturned");
	plant_u64(scene, &dropped->bytes, 0, "test: bytes charged");
}

static void test_physical_memory(void **state)
{
	struct scene *scene = *state;
	struct audit audit;

	expect_difference(scene, one_page_less, ": bytes of memory counted ");
	run_audit(scene, one_page_less, &audit);
	assert_true(audit.rows[0].physical < audit.rows[0].charged);
	audit_deinit(&audit);
}

/* More differences than are written down are counted all the same. */
static void test_many_differences(void **state)
{
	struct scene *scene = *state;
	const struct space *space = scene->fixture->space;
	uint32_t slot = (uint32_t)scene->models[1]->handle, before[4][4];
	struct audit audit;

	for (uint32_t stripe = 0; stripe < 4; stripe++) {
		uint32_t *run = meta_run(&space->part, slot, stripe);

		memcpy(before[stripe], run, sizeof(before[stripe]));
		memset(run, 0xff, sizeof(before[stripe]));
	}
	run_audit(scene, fixture_physical, &audit);
	assert_true(audit.difference_count > AUDIT_DIFFERENCES);
	assert_true(audit.differences[AUDIT_DIFFERENCES - 1][0]);
	audit_deinit(&audit);
	for (uint32_t stripe = 0; stripe < 4; stripe++)
		memcpy(meta_run(&space->part, slot, stripe), before[stripe], sizeof(before[stripe]));
	fixture_audit(scene->fixture);
}

/* Frames, their chains, and what sequences say of them. */
static void test_host_tier(void **state)
{
	struct scene *scene = *state;
	const struct pool *pool = scene->fixture->pool;
	struct meta_seq *seqs = scene->fixture->space->part.seqs;
	struct meta_seq *seq = &seqs[(uint32_t)scene->models[1]->handle];
	struct kvg_sqe sqe = {.op = KVG_OP_OFFLOAD, .seq = scene->models[1]->handle};
	struct meta_frame *frames = pool->meta->frames;
	struct audit audit;

	assert_int_equal(fixture_call(scene->fixture, &sqe), 0);
	run_audit(scene, fixture_physical, &audit);
	assert_int_equal(audit.rows[0].host_counted, seq->image_bytes);
	assert_int_equal(audit.rows[0].host_charged, seq->image_bytes);
	audit_deinit(&audit);
	assert_true(seq->image_bytes >= (uint64_t)2 * pool->meta->header->frame_size);
	plant_u32(scene, &seq->image, 0, "nothing refers to it");
	plant_u32(scene, &seq->image, pool->meta->header->frame_count, "is not its tenant's");
	plant_u32(scene, &seq->image, UINT32_MAX, "is not its tenant's");
	plant_u64(scene, &seq->image_bytes, seq->image_bytes + 1, "bytes of its image counted");
	plant_u64(scene, &seq->blocks, 8, "blocks counted 0");
	plant_u32(scene, &frames[seq->image - 1].tenant, 0, "is not its tenant's");
	plant_u32(scene, &frames[seq->image - 1].next, seq->image, "is another object's, too");
	plant_u32(scene, &frames[seq->image - 1].next, 0, "bytes of its image counted 65536");
	plant_u32(scene, &frames[pool->meta->header->frame_count - 1].tenant, 1, "nothing refers to it");
	plant_u32(scene, &seqs[(uint32_t)scene->models[0]->handle].image, seq->image, "is another object's, too");
	plant_u32(scene, &seqs[(uint32_t)scene->models[0]->handle].image, seq->image, "is resident and has an image");
	plant_u64(scene, &pool->meta->tenants[0].host.charged, 1, "test: bytes charged on the host counted");
	plant_u64(scene, &pool->meta->header->host.charged, 1, "host: bytes charged counted");
}

static void test_not_the_metadata(void **state)
{
	struct audit audit;
	int fd = kvg_memfd_new("other", 1 << 16);

	(void)state;
	assert_int_equal(audit_run(-1, fixture_physical, NULL, &audit), -EBADF);
	assert_int_equal(audit_run(fd, fixture_physical, NULL, &audit), -EBADMSG);
	assert_int_equal(close(fd), 0);
}

#define AUDIT_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		AUDIT_TEST(test_clean),
		AUDIT_TEST(test_accounts),
		AUDIT_TEST(test_reserve),
		AUDIT_TEST(test_bitmaps),
		AUDIT_TEST(test_swapped_bits),
		AUDIT_TEST(test_block_ids),
		AUDIT_TEST(test_sequences),
		AUDIT_TEST(test_extents),
		AUDIT_TEST(test_physical_memory),
		AUDIT_TEST(test_many_differences),
		AUDIT_TEST(test_host_tier),
		cmocka_unit_test(test_not_the_metadata),
	};

	return runner_run("audit", tests, sizeof(tests) / sizeof(tests[0]));
}
