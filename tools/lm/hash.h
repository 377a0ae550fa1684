/* hash.h - FNV-1a of 64 bits: equal bytes, equal hash, and no more than that. */
#ifndef KVG_LM_HASH_H
#define KVG_LM_HASH_H

#include <stddef.h>
#include <stdint.h>

#define LM_HASH_BASIS 0xcbf29ce484222325u

/* The hash so far and these bytes. */
static inline uint64_t lm_hash(uint64_t hash, const void *data, size_t size)
{
	const uint8_t *bytes = data;

	for (size_t i = 0; i < size; i++)
		hash = (hash ^ bytes[i]) * 0x100000001b3u;
	return hash;
}

/* Of tokens, as 32-bit little-endian numbers. */
static inline uint64_t lm_hash_tokens(const int32_t *tokens, uint32_t count)
{
	uint64_t hash = LM_HASH_BASIS;

	for (uint32_t i = 0; i < count; i++) {
		uint32_t token = (uint32_t)tokens[i];
		const uint8_t bytes[] = {
			(uint8_t)token, (uint8_t)(token >> 8), (uint8_t)(token >> 16), (uint8_t)(token >> 24)};

		hash = lm_hash(hash, bytes, sizeof(bytes));
	}
	return hash;
}

#endif
