#include "kernels/host/copy.h"

#include <immintrin.h>
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
	kvg_simd()->stream((uint8_t *)dst + head, (const uint8_t *)src + head, body);
	memcpy((uint8_t *)dst + head + body, (const uint8_t *)src + head + body, size - head - body);
}

void kvg_stream_fence(void)
{
	_mm_sfence();
}
