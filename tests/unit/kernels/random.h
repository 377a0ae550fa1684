/* random.h - reproducible inputs for the tests of the kernels, and aligned memory that is never NULL. */
#ifndef KVG_TEST_RANDOM_H
#define KVG_TEST_RANDOM_H

#include <stdint.h>
#include <stdlib.h>

struct random {
	uint64_t state; /* not 0 */
};

static inline uint32_t random_bits(struct random *random)
{
	random->state ^= random->state << 13;
	random->state ^= random->state >> 7;
	random->state ^= random->state << 17;
	return (uint32_t)(random->state >> 32);
}

/* 0 .. limit - 1 */
static inline uint32_t random_below(struct random *random, uint32_t limit)
{
	return (uint32_t)((uint64_t)random_bits(random) * limit >> 32);
}

/* [-1, 1) */
static inline float random_float(struct random *random)
{
	return (float)(random_bits(random) >> 8) * 0x1p-23f - 1.0f;
}

static inline float *random_floats(struct random *random, size_t count, float scale)
{
	float *floats = malloc((count + 1) * sizeof(*floats));

	if (!floats)
		abort();
	for (size_t i = 0; i < count; i++)
		floats[i] = random_float(random) * scale;
	return floats;
}

/* size bytes aligned to 64, with the end of the allocation right behind them (for the sanitizer). */
static inline void *aligned_new(size_t size)
{
	void *data;

	if (posix_memalign(&data, 64, size ? size : 1) != 0)
		abort();
	return data;
}

#endif
