#include "tools/bench/content.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/kvgate.h"
#ifdef KVG_HAS_CUDA
#include "tools/bench/synthetic.h"
#endif

struct content {
	struct kvg_client *client; /* borrowed */
	struct synthetic *synthetic;
	struct content_kv kv;
	const struct kvg_slot *slots;
	uint32_t *appended; /* of the kind: [max_sequences] */
	uint32_t words, k_bytes, v_bytes;
#ifdef KVG_HAS_CUDA
	CUdeviceptr bits, counts; /* of a check */
#endif
};

static int fail(int r, const char *what)
{
	(void)fprintf(stderr, "kvgate-bench: content: %s\n", what);
	return r;
}

uint32_t content_rows(const struct content *content)
{
	return content->kv.layers * content->kv.heads;
}

uint32_t content_words(const struct content *content)
{
	return content->words;
}

uint32_t content_pair_bytes(const struct content *content)
{
	return content->k_bytes + content->v_bytes;
}

static size_t bits_size(const struct content *content)
{
	return (size_t)content_rows(content) * content->words * sizeof(uint32_t);
}

/* ---- on the CPU ---- */

static uint64_t row_at(const struct content_kv *kv, uint32_t slot, uint32_t row)
{
	return ((uint64_t)(row / kv->heads) * kv->max_sequences + slot) * kv->heads + row % kv->heads;
}

static uint32_t *pair_at(const struct content_kv *kv, uint64_t at, uint32_t index, uint32_t half)
{
	uint64_t offset = kv->ids[at * kv->row_cap + index / KVG_BLOCK_TOKENS] * kv->stride;
	uint32_t words = half ? kv->v_words : kv->k_words;

	return (uint32_t *)(void *)((half ? kv->v_base : kv->k_base) + offset) + index % KVG_BLOCK_TOKENS * words;
}

static void fill_row(const struct content_kv *kv, uint64_t tag, uint32_t slot, uint32_t row, uint32_t fold_pos,
	uint32_t first, uint32_t count)
{
	uint64_t at = row_at(kv, slot, row);
	uint32_t base = kv->base_len[at];

	for (uint32_t i = first; i < first + count; i++) {
		uint32_t *k = pair_at(kv, at, base + i, 0), *v = pair_at(kv, at, base + i, 1);

		for (uint32_t word = 0; word < kv->k_words; word++)
			k[word] = content_word(tag, row, fold_pos + i, 0, word);
		for (uint32_t word = 0; word < kv->v_words; word++)
			v[word] = content_word(tag, row, fold_pos + i, 1, word);
	}
}

static uint32_t wrong_words(
	const uint32_t *at, uint32_t words, uint64_t tag, uint32_t row, uint32_t position, uint32_t half)
{
	uint32_t wrong = 0;

	for (uint32_t word = 0; word < words; word++)
		wrong += at[word] != content_word(tag, row, position, half, word);
	return wrong;
}

static void check_row(const struct content *content, uint64_t tag, uint32_t slot, uint32_t row, uint32_t end,
	uint32_t *bits, struct content_counts *counts)
{
	const struct content_kv *kv = &content->kv;
	uint64_t at = row_at(kv, slot, row);
	uint32_t length = kv->base_len[at] + content->appended[slot];

	for (uint32_t index = 0; index < length; index++) {
		const uint32_t *k = index / KVG_BLOCK_TOKENS < kv->row_cap ? pair_at(kv, at, index, 0) : NULL;
		uint32_t position = k ? k[0] : UINT32_MAX, bit = 1u << (position % 32);

		counts->pairs++;
		if (position >= end || position / 32 >= content->words) {
			counts->strange++;
			continue;
		}
		counts->wrong += wrong_words(k, kv->k_words, tag, row, position, 0);
		counts->wrong += wrong_words(pair_at(kv, at, index, 1), kv->v_words, tag, row, position, 1);
		counts->repeated += (bits[position / 32] & bit) != 0;
		bits[position / 32] |= bit;
	}
}

/* ---- on the device ---- */

#ifdef KVG_HAS_CUDA
static int device_new(struct content *content)
{
	const struct kvg_cuda_driver *driver = content->synthetic->cuda->driver;
	CUresult result = driver->cuMemAlloc(&content->bits, bits_size(content));

	if (result == CUDA_SUCCESS)
		result = driver->cuMemAlloc(&content->counts, sizeof(struct content_counts));
	return synthetic_result(content->synthetic, result, "memory for checks");
}

static void device_free(struct content *content)
{
	const struct kvg_cuda_driver *driver = content->synthetic->cuda->driver;

	if (content->bits)
		(void)driver->cuMemFree(content->bits);
	if (content->counts)
		(void)driver->cuMemFree(content->counts);
}

static int device_fill(
	const struct content *content, uint64_t tag, uint32_t slot, uint32_t fold_pos, uint32_t first, uint32_t count)
{
	CUresult result = synthetic_fill(content->synthetic, &content->kv, tag, slot, fold_pos, first, count);

	return synthetic_result(content->synthetic, result, "filling");
}

/* The worker's counter on the device, which its kernels use, must be what the daemon's slot says. */
static CUresult read_appended(const struct content *content, uint32_t slot, uint32_t *ret)
{
	const struct synthetic *synthetic = content->synthetic;
	CUdeviceptr at = (CUdeviceptr)(uintptr_t)&content->appended[slot];
	CUresult result = synthetic->cuda->driver->cuMemcpyDtoHAsync(ret, at, sizeof(*ret), synthetic->stream);

	return result == CUDA_SUCCESS ? synthetic->cuda->driver->cuStreamSynchronize(synthetic->stream) : result;
}

static int device_check(const struct content *content, uint64_t tag, uint32_t slot, uint32_t end, uint32_t *bits,
	struct content_counts *counts)
{
	const struct synthetic *synthetic = content->synthetic;
	const struct kvg_cuda_driver *driver = synthetic->cuda->driver;
	CUstream stream = synthetic->stream;
	uint32_t appended = 0;
	CUresult result = read_appended(content, slot, &appended);

	if (result == CUDA_SUCCESS)
		result = driver->cuMemsetD8Async(content->bits, 0, bits_size(content), stream);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemsetD8Async(content->counts, 0, sizeof(*counts), stream);
	if (result == CUDA_SUCCESS)
		result = synthetic_check(synthetic, &content->kv, tag, slot, appended, end, content->bits,
			content->words, content->counts);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemcpyDtoHAsync(bits, content->bits, bits_size(content), stream);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemcpyDtoHAsync(counts, content->counts, sizeof(*counts), stream);
	if (result == CUDA_SUCCESS)
		result = driver->cuStreamSynchronize(stream);
	return synthetic_result(synthetic, result, "checking");
}
#endif

/* ---- both ---- */

int content_new(
	struct kvg_client *client, const struct kvg_layout *layout, struct synthetic *synthetic, struct content **ret)
{
	const struct kvg_group *group = &layout->groups[0];
	struct content *content = calloc(1, sizeof(*content));
	struct kvg_view view;
	int r = content ? kvg_view(client, &view) : -ENOMEM;

	if (r < 0) {
		free(content);
		return fail(r, "no view of the rows");
	}
	*content = (struct content){.client = client,
		.synthetic = synthetic,
		.slots = view.slots,
		.appended = view.appended,
		.words = (layout->max_tokens + 31) / 32,
		.k_bytes = group->k_dim * (group->k_dtype == KVG_F32 ? 4 : 2),
		.v_bytes = group->v_dim * (group->v_dtype == KVG_F32 ? 4 : 2)};
	content->kv = (struct content_kv){.k_base = view.k_base,
		.v_base = view.v_base,
		.stride = view.stride,
		.ids = view.ids,
		.base_len = view.base_len,
		.layers = view.layers,
		.heads = view.heads,
		.max_sequences = view.max_sequences,
		.row_cap = view.row_cap,
		.k_words = content->k_bytes / 4,
		.v_words = content->v_bytes / 4};
#ifdef KVG_HAS_CUDA
	r = synthetic ? device_new(content) : 0;
#endif
	if (r < 0)
		(void)content_free(content);
	else
		*ret = content;
	return r;
}

struct content *content_free(struct content *content)
{
	if (!content)
		return NULL;
#ifdef KVG_HAS_CUDA
	if (content->synthetic)
		device_free(content);
#endif
	free(content);
	return NULL;
}

int content_fill(struct content *content, uint64_t seq, uint64_t tag, uint32_t pos, uint32_t count)
{
	uint32_t slot = (uint32_t)seq, fold_pos = content->slots[slot].fold_pos;

	if (pos < fold_pos || pos + count > content->slots[slot].reserved_pos)
		return fail(-ERANGE, "positions that are folded or not reserved");
#ifdef KVG_HAS_CUDA
	if (content->synthetic)
		return device_fill(content, tag, slot, fold_pos, pos - fold_pos, count);
#endif
	for (uint32_t row = 0; row < content_rows(content); row++)
		fill_row(&content->kv, tag, slot, row, fold_pos, pos - fold_pos, count);
	return 0;
}

int content_check(
	struct content *content, uint64_t seq, uint64_t tag, uint32_t end, uint32_t *bits, struct content_counts *ret)
{
	uint32_t slot = (uint32_t)seq;

	*ret = (struct content_counts){0};
#ifdef KVG_HAS_CUDA
	if (content->synthetic)
		return device_check(content, tag, slot, end, bits, ret);
#endif
	memset(bits, 0, bits_size(content));
	for (uint32_t row = 0; row < content_rows(content); row++)
		check_row(content, tag, slot, row, end, bits + (size_t)row * content->words, ret);
	return 0;
}
