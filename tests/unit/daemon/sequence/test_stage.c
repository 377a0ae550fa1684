/* STAGE: areas that an entry may name. What becomes of rows is in test_score.c. */
#include <errno.h>
#include <string.h>

#include "tests/support/space_fixture.h"

static int stage(struct fixture *fixture, uint64_t handle, uint32_t buffer, uint64_t offset, uint64_t stride)
{
	struct kvg_sqe sqe = {.op = KVG_OP_STAGE, .seq = handle, .generation = fixture_generation(fixture, handle)};

	sqe.stage.kind = KVG_STAGE_SCORE;
	sqe.stage.buffer = buffer;
	sqe.stage.offset = offset;
	sqe.stage.layer_stride = stride;
	sqe.stage.layer_count = 2;
	sqe.stage.rows = 16;
	return fixture_call(fixture, &sqe);
}

/* Kernels read whole words: it is the address that counts, not how far into the import it is. */
static void test_address_of_an_import(void **state)
{
	const struct import odd = {.kind = IMPORT_BUFFER, .base = 4096, .address = 4098, .size = 8192};
	const struct kvg_policy policy = {.context_tokens = 64};
	struct fixture *fixture = fixture_new(NULL);
	uint32_t id = imports_add(&fixture->space->imports, &odd);
	struct import taken;
	uint64_t handle = 0;

	(void)state;
	assert_int_equal(fixture_create(fixture, &policy, &handle), 0);
	assert_int_equal(stage(fixture, handle, id, 0, 0), -EINVAL);
	assert_string_equal(
		fixture->text, "stage: 256 bytes at 0 (address a multiple of 4), the staging area has 8192");
	assert_int_equal(stage(fixture, handle, id, 4, 0), -EINVAL);
	/* This one is aligned; there is no room reserved. */
	assert_int_equal(stage(fixture, handle, id, 2, 0), -EINVAL);
	assert_non_null(strstr(fixture->text, "stage 16 rows from 0, possible are 0 to 0"));
	assert_int_equal(imports_take(&fixture->space->imports, id, &taken), 0);
	fixture_free(fixture);
}

static void test_areas(void **state)
{
	const struct kvg_policy policy = {.context_tokens = 64};
	struct fixture *fixture = fixture_new(NULL);
	uint64_t size = fixture->staging_size, handle = 0;

	(void)state;
	assert_int_equal(fixture_create(fixture, &policy, &handle), 0);
	assert_int_equal(fixture_reserve(fixture, handle, 16), 0);
	assert_int_equal(stage(fixture, handle, KVG_BUFFER_DEVICE, 0, 0), -ENOENT);
	assert_int_equal(stage(fixture, handle, 2, 0, 0), -ENOENT);
	assert_int_equal(stage(fixture, handle, KVG_BUFFER_STAGING, 2, 0), -EINVAL);
	assert_int_equal(stage(fixture, handle, KVG_BUFFER_STAGING, 0, 130), -EINVAL);
	assert_int_equal(stage(fixture, handle, KVG_BUFFER_STAGING, 0, 124), -EINVAL);
	assert_int_equal(stage(fixture, handle, KVG_BUFFER_STAGING, size - 252, 0), -EINVAL);
	assert_int_equal(stage(fixture, handle, KVG_BUFFER_STAGING, UINT64_MAX - 3, 0), -EINVAL);
	assert_int_equal(stage(fixture, handle, KVG_BUFFER_STAGING, 0, UINT64_MAX - 3), -EINVAL);
	assert_int_equal(stage(fixture, handle, KVG_BUFFER_STAGING, size - 256, 0), 0);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_address_of_an_import),
		cmocka_unit_test(test_areas),
	};

	return runner_run("stage", tests, sizeof(tests) / sizeof(tests[0]));
}
