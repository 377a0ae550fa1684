#include "kernels/host/copy.h"

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "kernels/host/simd.h"

#define LINE         64u
#define STREAM_LEAST 512u /* bytes from which on stores around the caches pay */

void kvg_stream_copy(void *dst, const void *src, size_t size)
{
	size_t head = (LINE - (uintptr_t)dst % LINE) % LINE, body;

	if (size < STREAM_LEAST) {
		memcpy(dst, src, size);
		return;
	}
	body = (size - head) / LINE * LINE;
	memcpy(dst, src, head);
	kvg_simd()->streams(
		&(uint8_t *){(uint8_t *)dst + head}, &(const uint8_t *){(const uint8_t *)src + head}, 1, body);
	memcpy((uint8_t *)dst + head + body, (const uint8_t *)src + head + body, size - head - body);
}

static bool is_whole_lines(uint8_t *const *dst, unsigned count, size_t size)
{
	bool whole = size % LINE == 0 && size >= STREAM_LEAST;

	for (unsigned i = 0; i < count; i++)
		whole &= (uintptr_t)dst[i] % LINE == 0;
	return whole;
}

void kvg_stream_copies(uint8_t *const *dst, const uint8_t *const *src, unsigned count, size_t size)
{
	if (is_whole_lines(dst, count, size)) {
		kvg_simd()->streams(dst, src, count, size);
		return;
	}
	for (unsigned i = 0; i < count; i++)
		kvg_stream_copy(dst[i], src[i], size);
}

void kvg_stream_fence(void)
{
	_mm_sfence();
}
