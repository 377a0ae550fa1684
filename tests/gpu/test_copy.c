/* kernels/cuda/copy: blocks to packed memory and back, by kernels and through the pipe. */
#include <stdio.h>

#include "kernels/cuda/copy.h"
#include "tests/gpu/arena.h"

static struct kvg_cuda_copy *copy;

static size_t block_bytes(const struct arena *arena)
{
	return (size_t)16 * (arena->host.k_bytes + arena->host.v_bytes);
}

/* The packed form of the mirror's blocks. */
static uint8_t *pack(const struct arena *arena, const uint32_t *ids, uint32_t count)
{
	uint8_t *packed = new_array(count, block_bytes(arena)), *to = packed;
	const struct kvg_cuda_area *area = &arena->host;

	for (uint32_t i = 0; i < count; i++, to += block_bytes(arena)) {
		memcpy(to, area->k_base + ids[i] * area->stride, (size_t)16 * area->k_bytes);
		memcpy(to + (size_t)16 * area->k_bytes, area->v_base + ids[i] * area->stride,
			(size_t)16 * area->v_bytes);
	}
	return packed;
}

static void unpack(const struct arena *arena, const uint32_t *ids, uint32_t count, const uint8_t *packed)
{
	const struct kvg_cuda_area *area = &arena->host;

	for (uint32_t i = 0; i < count; i++, packed += block_bytes(arena)) {
		memcpy(area->k_base + ids[i] * area->stride, packed, (size_t)16 * area->k_bytes);
		memcpy(area->v_base + ids[i] * area->stride, packed + (size_t)16 * area->k_bytes,
			(size_t)16 * area->v_bytes);
	}
}

static uint8_t *random_blocks(const struct arena *arena, uint32_t count)
{
	uint8_t *packed = new_array(count, block_bytes(arena));

	for (size_t i = 0; i < count * block_bytes(arena); i++)
		packed[i] = (uint8_t)random_bits(&rng);
	return packed;
}

static void check_kernels(struct arena *arena, const uint32_t *dev_ids, uint32_t count, uint32_t grid)
{
	uint8_t *want = pack(arena, arena->free_ids, count), *fresh = random_blocks(arena, count);
	uint8_t *packed = dev_new(NULL, count * block_bytes(arena)),
		*dev_fresh = dev_new(fresh, count * block_bytes(arena));

	check(kvg_cuda_copy_gather(copy, &arena->device, dev_ids, count, packed, grid, NULL));
	assert_device(packed, want, count * block_bytes(arena));
	arena_assert(arena);
	check(kvg_cuda_copy_scatter(copy, &arena->device, dev_ids, count, dev_fresh, grid, NULL));
	unpack(arena, arena->free_ids, count, fresh);
	arena_assert(arena);
	dev_free(packed);
	dev_free(dev_fresh);
	free(want);
	free(fresh);
}

static uint8_t *pinned(size_t size)
{
	void *at;

	check(cuda->driver->cuMemHostAlloc(&at, size + 1, 0));
	memset(at, POISON, size + 1);
	return at;
}

static void check_pipe(struct arena *arena, const uint32_t *dev_ids, uint32_t count, struct kvg_cuda_copy_pipe *pipe)
{
	size_t size = count * block_bytes(arena);
	uint8_t *want = pack(arena, arena->free_ids, count), *fresh = random_blocks(arena, count);
	uint8_t *out = pinned(size), *in = pinned(size);
	CUstream stream;

	check(cuda->driver->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
	memcpy(in, fresh, size);
	check(kvg_cuda_copy_to_host(pipe, &arena->device, dev_ids, count, out, stream));
	check(kvg_cuda_copy_from_host(pipe, &arena->device, dev_ids, count, in, stream));
	check(cuda->driver->cuStreamSynchronize(stream));
	assert_bytes(out, want, size);
	assert_int_equal(out[size], POISON);
	unpack(arena, arena->free_ids, count, fresh);
	arena_assert(arena);
	check(cuda->driver->cuStreamDestroy(stream));
	check(cuda->driver->cuMemFreeHost(out));
	check(cuda->driver->cuMemFreeHost(in));
	free(want);
	free(fresh);
}

static void run(uint32_t k_bytes, uint32_t v_bytes, uint32_t blocks_per_extent, uint32_t extents)
{
	struct kvg_cuda_copy_pipe *pipe;
	struct arena arena;
	uint32_t *dev_ids, counts[4] = {0, 1, 9, 0};
	CUresult result;

	arena_init(&arena, k_bytes, v_bytes, blocks_per_extent, extents);
	counts[3] = arena.free_count * 2 / 3;
	dev_ids = dev_new(arena.free_ids, arena.free_count * sizeof(uint32_t));
	pipe = kvg_cuda_copy_pipe_new(copy, 7 * block_bytes(&arena) + 100, &result);
	check(result);
	for (int i = 0; i < 4; i++) {
		check_kernels(&arena, dev_ids, counts[i], 0);
		check_kernels(&arena, dev_ids, counts[i], 2);
		check_pipe(&arena, dev_ids, counts[i], pipe);
	}
	(void)kvg_cuda_copy_pipe_free(pipe);
	dev_free(dev_ids);
	arena_deinit(&arena);
}

static void test_blocks(void **state)
{
	(void)state;
	run(256, 256, 37, 5);
	run(128, 128, 64, 3);
	run(64, 64, 1, 90);
	run(192, 192, 23, 4);
	run(512, 256, 10, 9);
	run(16, 1040, 3, 20);
	run(576, 0, 8, 4);
}

static void test_pipe_too_small(void **state)
{
	struct kvg_cuda_area area = {.k_bytes = 256, .v_bytes = 256, .ids_per_extent = 2, .blocks_per_extent = 1};
	CUresult result;
	struct kvg_cuda_copy_pipe *pipe = kvg_cuda_copy_pipe_new(copy, 8191, &result);

	(void)state;
	check(result);
	assert_int_equal(kvg_cuda_copy_to_host(pipe, &area, NULL, 1, NULL, NULL), CUDA_ERROR_INVALID_VALUE);
	(void)kvg_cuda_copy_pipe_free(pipe);
}

static void test_scrub(void **state)
{
	uint8_t *at = dev_new(NULL, 100001), *want = new_array(100001, 1);

	(void)state;
	memset(want, POISON, 13);
	memset(want + 90000, POISON, 10001);
	check(kvg_cuda_copy_scrub(copy, (CUdeviceptr)at + 13, 90000 - 13, NULL));
	check(kvg_cuda_copy_scrub(copy, (CUdeviceptr)at, 0, NULL));
	assert_device(at, want, 100001);
	dev_free(at);
	free(want);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_blocks),
		cmocka_unit_test(test_pipe_too_small),
		cmocka_unit_test(test_scrub),
	};
	char text[256];
	CUresult result;
	int failed;

	if (kvg_cuda_open(0, &cuda, text, sizeof(text)) < 0) {
		(void)fprintf(stderr, "skipped: %s\n", text);
		return 77;
	}
	copy = kvg_cuda_copy_new(cuda, &result);
	if (!copy) {
		(void)fprintf(stderr, "%s\n", kvg_cuda_error(cuda->driver, result));
		return 1;
	}
	failed = runner_run("gpu/copy", tests, sizeof(tests) / sizeof(tests[0]));
	(void)kvg_cuda_copy_free(copy);
	(void)kvg_cuda_close(cuda);
	return failed;
}
