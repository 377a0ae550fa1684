#include <stdint.h>

#include "tools/bench/content.h"

#define WARP 32u

/* The first byte of K (half 0) or V of a row's pair. */
static __device__ __forceinline__ uint32_t *pair_at(const content_kv &kv, uint32_t id, uint32_t index, uint32_t half)
{
	uint8_t *base = (half ? kv.v_base : kv.k_base) + id * kv.stride;
	uint32_t words = half ? kv.v_words : kv.k_words;

	return reinterpret_cast<uint32_t *>(base) + (index % 16) * words;
}

static __device__ __forceinline__ uint64_t row_at(const content_kv &kv, uint32_t slot, uint32_t row)
{
	return ((uint64_t)(row / kv.heads) * kv.max_sequences + slot) * kv.heads + row % kv.heads;
}

/* Grid (pieces, rows), a warp for each pair. */
extern "C" __global__ void synthetic_fill(
	content_kv kv, uint64_t tag, uint32_t slot, uint32_t fold_pos, uint32_t first, uint32_t count)
{
	uint32_t row = blockIdx.y, lane = threadIdx.x % WARP;
	uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, warps = gridDim.x * blockDim.x / WARP;
	uint64_t at = row_at(kv, slot, row);
	uint32_t base = kv.base_len[at];

	for (uint32_t i = warp; i < count; i += warps) {
		uint32_t index = base + first + i, position = fold_pos + first + i;

		if (index / 16 >= kv.row_cap)
			return;
		uint32_t id = kv.ids[at * kv.row_cap + index / 16];
		uint32_t *k = pair_at(kv, id, index, 0), *v = pair_at(kv, id, index, 1);

		for (uint32_t word = lane; word < kv.k_words; word += WARP)
			k[word] = content_word(tag, row, position, 0, word);
		for (uint32_t word = lane; word < kv.v_words; word += WARP)
			v[word] = content_word(tag, row, position, 1, word);
	}
}

static __device__ __forceinline__ void count_up(uint64_t *counter, uint32_t by)
{
	if (by)
		atomicAdd(reinterpret_cast<unsigned long long *>(counter), (unsigned long long)by);
}

/* Words of one half of a pair that are wrong, over the warp. */
static __device__ __forceinline__ uint32_t wrong_words(
	const uint32_t *at, uint32_t words, uint64_t tag, uint32_t row, uint32_t position, uint32_t half)
{
	uint32_t wrong = 0;

	for (uint32_t word = threadIdx.x % WARP; word < words; word += WARP)
		wrong += at[word] != content_word(tag, row, position, half, word);
	return __reduce_add_sync(~0u, wrong);
}

extern "C" __global__ void synthetic_check(content_kv kv, uint64_t tag, uint32_t slot, uint32_t appended, uint32_t end,
	uint32_t *bits, uint32_t words, content_counts *counts)
{
	uint32_t row = blockIdx.y, lane = threadIdx.x % WARP;
	uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, warps = gridDim.x * blockDim.x / WARP;
	uint64_t at = row_at(kv, slot, row);
	uint32_t length = kv.base_len[at] + appended;
	uint32_t pairs = 0, wrong = 0, repeated = 0, strange = 0;

	for (uint32_t index = warp; index < length; index += warps) {
		pairs++;
		if (index / 16 >= kv.row_cap) {
			strange++;
			continue;
		}
		uint32_t id = kv.ids[at * kv.row_cap + index / 16];
		const uint32_t *k = pair_at(kv, id, index, 0);
		uint32_t position = k[0];

		if (position >= end || position / 32 >= words) {
			strange++;
			continue;
		}
		wrong += wrong_words(k, kv.k_words, tag, row, position, 0);
		wrong += wrong_words(pair_at(kv, id, index, 1), kv.v_words, tag, row, position, 1);
		if (lane == 0) {
			uint32_t bit = 1u << (position % 32);

			repeated += (atomicOr(&bits[(uint64_t)row * words + position / 32], bit) & bit) != 0;
		}
	}
	if (lane == 0) {
		count_up(&counts->pairs, pairs);
		count_up(&counts->wrong, wrong);
		count_up(&counts->repeated, repeated);
		count_up(&counts->strange, strange);
	}
}

/* Grid (sequences, layers): one row of each to the place that the sequence's counter says. */
extern "C" __global__ void synthetic_gather(synthetic_gather_args a)
{
	uint32_t sequence = blockIdx.x, layer = blockIdx.y, slot = a.slots[sequence];
	uint32_t step = slot == UINT32_MAX ? a.capacity : a.appended[slot];
	uint32_t from = a.source_rows ? (sequence * 131 + step * 17) % a.source_rows : sequence;
	const uint8_t *source = a.source + layer * a.source_layer + from * a.source_row;
	uint8_t *to = a.to + (((uint64_t)sequence * gridDim.y + layer) * a.capacity + step) * a.row_bytes;

	if (step >= a.capacity)
		return;
	for (uint32_t i = threadIdx.x * 16; i < a.row_bytes; i += blockDim.x * 16)
		*reinterpret_cast<uint4 *>(to + i) = *reinterpret_cast<const uint4 *>(source + i);
}

static __device__ __forceinline__ uint64_t now_ns()
{
	uint64_t now;

	asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
	return now;
}

extern "C" __global__ void synthetic_clock(uint64_t *at)
{
	*at = now_ns();
}

extern "C" __global__ void synthetic_spin(uint64_t ns)
{
	uint64_t start = now_ns();

	/* Bounded also where the clock should stand still. */
	for (uint64_t i = 0; i < (uint64_t)1 << 27 && now_ns() - start < ns; i++)
		__nanosleep(100);
}

extern "C" __global__ void synthetic_poke(uint32_t *at)
{
	*at = 1;
}
