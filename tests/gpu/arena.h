/*
 * arena.h - for the tests of evict and copy: device memory, and an arena of blocks with its mirror in host memory.
 *
 * One `cuda` for the program, set by its main().
 */
#ifndef KVG_TEST_ARENA_H
#define KVG_TEST_ARENA_H

#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/device.h"
#include "kernels/cuda/evict_types.h"
#include "tests/support/runner.h"
#include "tests/unit/kernels/random.h"

#define POISON 0xa5

static struct kvg_cuda *cuda;
static struct random rng = {0x9e3779b97f4a7c15ull};

static inline void check(CUresult result)
{
	if (result != CUDA_SUCCESS)
		fail_msg("%s", kvg_cuda_error(cuda->driver, result));
}

/* Room for size bytes, poisoned, or a copy of data. */
static inline void *dev_new(const void *data, size_t size)
{
	CUdeviceptr at;

	check(cuda->driver->cuMemAlloc(&at, size + 16));
	check(cuda->driver->cuMemsetD8Async(at, POISON, size + 16, NULL));
	check(cuda->driver->cuStreamSynchronize(NULL));
	if (data && size)
		check(cuda->driver->cuMemcpyHtoD(at, data, size));
	return (void *)at;
}

static inline void dev_free(const void *at)
{
	check(cuda->driver->cuMemFree((CUdeviceptr)at));
}

static inline void dev_read(const void *at, void *data, size_t size)
{
	check(cuda->driver->cuStreamSynchronize(NULL));
	if (size)
		check(cuda->driver->cuMemcpyDtoH(data, (CUdeviceptr)at, size));
}

static inline void assert_bytes(const uint8_t *got, const uint8_t *want, size_t size)
{
	for (size_t i = 0; memcmp(got, want, size) != 0 && i < size; i++)
		if (got[i] != want[i])
			fail_msg("byte %zu of %zu: %u, not %u", i, size, got[i], want[i]);
}

static inline void assert_device(const void *at, const void *want, size_t size)
{
	uint8_t *got = malloc(size + 1);

	assert_non_null(got);
	dev_read(at, got, size);
	assert_bytes(got, want, size);
	free(got);
}

static inline void *new_array(size_t count, size_t size)
{
	void *array = calloc(count + 1, size);

	assert_non_null(array);
	return array;
}

struct arena {
	struct kvg_cuda_area host, device;
	size_t bytes, pair_count;
	uint32_t *free_ids, free_count; /* in random order */
};

static inline void arena_free_blocks(struct arena *arena, uint32_t extents)
{
	uint32_t each = arena->host.blocks_per_extent;

	arena->free_ids = new_array((size_t)extents * each, sizeof(uint32_t));
	arena->free_count = 0;
	for (; arena->free_count < extents * each; arena->free_count++) {
		uint32_t i = arena->free_count, at = random_below(&rng, i + 1);

		arena->free_ids[i] = arena->free_ids[at];
		arena->free_ids[at] = i / each * arena->host.ids_per_extent + i % each;
	}
}

/* Random contents in every block and pair, all blocks free. */
static inline void arena_init(
	struct arena *arena, uint32_t k_bytes, uint32_t v_bytes, uint32_t blocks_per_extent, uint32_t extents)
{
	struct kvg_cuda_area area = {.stride = 16ull * (k_bytes > v_bytes ? k_bytes : v_bytes),
		.k_bytes = k_bytes,
		.v_bytes = v_bytes,
		.ids_per_extent = 2 * blocks_per_extent,
		.blocks_per_extent = blocks_per_extent};
	size_t extent = area.ids_per_extent * area.stride;

	arena->bytes = extent * extents;
	arena->pair_count = (size_t)extents * blocks_per_extent * 16;
	arena->host = arena->device = area;
	arena->host.k_base = new_array(arena->bytes, 1);
	arena->host.v_base = arena->host.k_base + extent / 2;
	arena->host.pairs = new_array(arena->pair_count, sizeof(struct kvg_cuda_pair));
	for (size_t i = 0; i < arena->bytes; i++)
		arena->host.k_base[i] = (uint8_t)random_bits(&rng);
	for (size_t i = 0; i < arena->pair_count; i++)
		arena->host.pairs[i] = (struct kvg_cuda_pair){(int32_t)random_bits(&rng), random_float(&rng)};
	arena_free_blocks(arena, extents);
	arena->device.k_base = dev_new(arena->host.k_base, arena->bytes);
	arena->device.v_base = arena->device.k_base + extent / 2;
	arena->device.pairs = dev_new(arena->host.pairs, arena->pair_count * sizeof(struct kvg_cuda_pair));
}

static inline void arena_deinit(struct arena *arena)
{
	dev_free(arena->device.k_base);
	dev_free(arena->device.pairs);
	free(arena->host.k_base);
	free(arena->host.pairs);
	free(arena->free_ids);
}

/* Every byte on the device is the mirror's. */
static inline void arena_assert(const struct arena *arena)
{
	assert_device(arena->device.pairs, arena->host.pairs, arena->pair_count * sizeof(struct kvg_cuda_pair));
	assert_device(arena->device.k_base, arena->host.k_base, arena->bytes);
}

static inline uint32_t take_block(struct arena *arena)
{
	assert_true(arena->free_count > 0);
	return arena->free_ids[--arena->free_count];
}

/* The pair at an index, where ids are the row's blocks. */
static inline struct kvg_cuda_pair *pair_at(const struct kvg_cuda_area *area, const uint32_t *ids, uint32_t index)
{
	uint32_t id = ids[index / 16], extent = id / area->ids_per_extent;

	return area->pairs + ((size_t)extent * area->blocks_per_extent + id % area->ids_per_extent) * 16 + index % 16;
}

static inline void mirror_move(
	const struct kvg_cuda_area *area, uint32_t src, uint32_t src_place, uint32_t dst, uint32_t dst_place)
{
	memcpy(area->k_base + dst * area->stride + (size_t)dst_place * area->k_bytes,
		area->k_base + src * area->stride + (size_t)src_place * area->k_bytes, area->k_bytes);
	memcpy(area->v_base + dst * area->stride + (size_t)dst_place * area->v_bytes,
		area->v_base + src * area->stride + (size_t)src_place * area->v_bytes, area->v_bytes);
	*pair_at(area, &dst, dst_place) = *pair_at(area, &src, src_place);
}

#endif
