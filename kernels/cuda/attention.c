#include "kernels/cuda/attention.h"

#include <stdlib.h>

#include "kernels/cuda/attention_object.h"
#include "kernels/host/dtype.h"

extern const unsigned char kvg_image_attention[];

/* ---- the object ---- */

static CUresult load_common(struct kvg_cuda_attention *attention)
{
	static const char *const names[] = {"kvg_attention_append", "kvg_attention_advance", "kvg_attention_plan",
		"kvg_attention_table", "kvg_attention_indptr", "kvg_attention_indices"};
	CUfunction functions[6];
	CUresult result = kvg_cuda_module_load(
		attention->cuda, kvg_image_attention, names, 6, &attention->common_module, functions);

	if (result != CUDA_SUCCESS)
		return result;
	attention->append = functions[0];
	attention->advance = functions[1];
	attention->plan = functions[2];
	attention->table = functions[3];
	attention->indptr = functions[4];
	attention->indices = functions[5];
	return CUDA_SUCCESS;
}

CUresult kvg_cuda_attention_new(const struct kvg_cuda *cuda, struct kvg_cuda_attention **ret)
{
	struct kvg_cuda_attention *attention = calloc(1, sizeof(*attention));
	CUresult result;

	if (!attention)
		return CUDA_ERROR_OUT_OF_MEMORY;
	attention->cuda = cuda;
	result = load_common(attention);
	if (result == CUDA_SUCCESS)
		result = kvg_attention_decode_load(attention);
	if (result != CUDA_SUCCESS)
		(void)kvg_cuda_attention_free(attention);
	else
		*ret = attention;
	return result;
}

struct kvg_cuda_attention *kvg_cuda_attention_free(struct kvg_cuda_attention *attention)
{
	if (!attention)
		return NULL;
	if (attention->common_module)
		(void)attention->cuda->driver->cuModuleUnload(attention->common_module);
	if (attention->decode_module)
		(void)attention->cuda->driver->cuModuleUnload(attention->decode_module);
	free(attention);
	return NULL;
}

/* ---- what launchers share ---- */

bool kvg_attention_valid(const struct kvg_cuda_kv *kv)
{
	const size_t size = kvg_dtype_size(kv->dtype), k = kv->k_dim * size, v = kv->v_dim * size;

	return k && v && (k | v | kv->stride | kv->k_base | kv->v_base) % 16 == 0 && kv->heads && kv->max_sequences &&
	       kv->row_cap && kv->row_cap <= INT32_MAX / KVG_CUDA_BLOCK_TOKENS;
}

struct kvg_attention_rows kvg_attention_rows_of(
	const struct kvg_cuda_kv *kv, uint32_t layer, CUdeviceptr slots, uint32_t sequences, uint32_t extra)
{
	const uint64_t rows = (uint64_t)layer * kv->max_sequences * kv->heads;

	return (struct kvg_attention_rows){.ids = kvg_attention_at(kv->ids + rows * kv->row_cap * sizeof(uint32_t)),
		.base_len = kvg_attention_at(kv->base_len + rows * sizeof(uint32_t)),
		.appended = kvg_attention_at(kv->appended),
		.slots = kvg_attention_at(slots),
		.sequences = sequences,
		.heads = kv->heads,
		.max_sequences = kv->max_sequences,
		.row_cap = kv->row_cap,
		.extra = extra};
}

static unsigned grid_of(uint64_t threads)
{
	return (unsigned)((threads + KVG_ATTENTION_THREADS - 1) / KVG_ATTENTION_THREADS);
}

/* ---- append and advance ---- */

CUresult kvg_cuda_attention_append(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	const struct kvg_cuda_append *append, CUstream stream)
{
	const uint64_t size = kvg_dtype_size(kv->dtype), pieces = (kv->k_dim + kv->v_dim) * size / 16,
		       threads = append->tokens * (uint64_t)kv->heads * pieces;
	struct kvg_attention_append args = {
		.rows = kvg_attention_rows_of(kv, append->layer, append->slots, append->tokens, 0),
		.k_base = kvg_attention_at(kv->k_base),
		.v_base = kvg_attention_at(kv->v_base),
		.stride = kv->stride,
		.index = kvg_attention_at(append->index),
		.k = kvg_attention_at(append->k),
		.v = kvg_attention_at(append->v),
		.k_stride = append->k_stride * size,
		.v_stride = append->v_stride * size,
		.k_pieces = (uint32_t)(kv->k_dim * size / 16),
		.v_pieces = (uint32_t)(kv->v_dim * size / 16)};
	void *arguments[] = {&args};

	if (!kvg_attention_valid(kv) || append->layer >= kv->layers || threads > UINT32_MAX - KVG_ATTENTION_THREADS ||
		(append->k | append->v | args.k_stride | args.v_stride) % 16)
		return CUDA_ERROR_INVALID_VALUE;
	if (threads == 0)
		return CUDA_SUCCESS;
	return kvg_cuda_launch(
		attention->cuda, attention->append, grid_of(threads), KVG_ATTENTION_THREADS, 0, stream, arguments);
}

CUresult kvg_cuda_attention_advance(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	CUdeviceptr slots, uint32_t count, uint32_t by, CUstream stream)
{
	struct kvg_attention_advance args = {.appended = kvg_attention_at(kv->appended),
		.slots = kvg_attention_at(slots),
		.count = count,
		.max_sequences = kv->max_sequences,
		.by = by};
	void *arguments[] = {&args};

	if (count == 0)
		return CUDA_SUCCESS;
	return kvg_cuda_launch(
		attention->cuda, attention->advance, grid_of(count), KVG_ATTENTION_THREADS, 0, stream, arguments);
}

/* ---- export ---- */

static bool export_valid(const struct kvg_cuda_kv *kv, const struct kvg_cuda_export *rows)
{
	return kvg_attention_valid(kv) && rows->layer < kv->layers &&
	       (uint64_t)rows->sequences * kv->heads <= INT32_MAX / 2;
}

CUresult kvg_cuda_attention_export_table(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	const struct kvg_cuda_export *rows, CUdeviceptr table, uint32_t cap, CUdeviceptr lengths, CUstream stream)
{
	struct kvg_attention_export args = {
		.rows = kvg_attention_rows_of(kv, rows->layer, rows->slots, rows->sequences, rows->extra),
		.indices = kvg_attention_at(table),
		.lengths = kvg_attention_at(lengths),
		.cap = cap};
	void *arguments[] = {&args};

	if (!export_valid(kv, rows) || cap > INT32_MAX / 16)
		return CUDA_ERROR_INVALID_VALUE;
	if (rows->sequences == 0)
		return CUDA_SUCCESS;
	return kvg_cuda_launch(attention->cuda, attention->table, rows->sequences * kv->heads, KVG_ATTENTION_THREADS, 0,
		stream, arguments);
}

CUresult kvg_cuda_attention_export_csr(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	const struct kvg_cuda_export *rows, CUdeviceptr indptr, CUdeviceptr indices, CUdeviceptr last_page_len,
	CUstream stream)
{
	struct kvg_attention_export args = {
		.rows = kvg_attention_rows_of(kv, rows->layer, rows->slots, rows->sequences, rows->extra),
		.indptr = kvg_attention_at(indptr),
		.indices = kvg_attention_at(indices),
		.lengths = kvg_attention_at(last_page_len)};
	void *arguments[] = {&args};
	CUresult result;

	if (!export_valid(kv, rows))
		return CUDA_ERROR_INVALID_VALUE;
	result = kvg_cuda_launch(attention->cuda, attention->indptr, 1, KVG_ATTENTION_SCAN, 0, stream, arguments);
	if (result != CUDA_SUCCESS || rows->sequences == 0)
		return result;
	return kvg_cuda_launch(attention->cuda, attention->indices, rows->sequences * kv->heads, KVG_ATTENTION_THREADS,
		0, stream, arguments);
}
