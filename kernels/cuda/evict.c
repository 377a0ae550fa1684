#include "kernels/cuda/evict.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/evict_args.h"
#include "kernels/cuda/evict_area.h"

enum {
	STORE,
	GATHER,
	COUNT,
	MARK,
	MOVE,
	COMPACT,
	RELOCATE,
	PUBLISH,
	KERNELS,
};

static const char *const names[KERNELS] = {
	[STORE] = "kvg_evict_store",
	[GATHER] = "kvg_evict_gather",
	[COUNT] = "kvg_evict_count",
	[MARK] = "kvg_evict_mark",
	[MOVE] = "kvg_evict_move",
	[COMPACT] = "kvg_evict_compact",
	[RELOCATE] = "kvg_evict_relocate",
	[PUBLISH] = "kvg_evict_publish",
};

extern const unsigned char kvg_image_evict[];

struct kvg_cuda_evict {
	const struct kvg_cuda *cuda;
	CUmodule module;
	CUfunction kernels[KERNELS];
};

struct kvg_cuda_evict *kvg_cuda_evict_new(const struct kvg_cuda *cuda, CUresult *ret_result)
{
	struct kvg_cuda_evict *evict = calloc(1, sizeof(*evict));

	*ret_result = CUDA_ERROR_OUT_OF_MEMORY;
	if (!evict)
		return NULL;
	evict->cuda = cuda;
	*ret_result = kvg_cuda_module_load(cuda, kvg_image_evict, names, KERNELS, &evict->module, evict->kernels);
	if (*ret_result == CUDA_SUCCESS)
		return evict;
	free(evict);
	return NULL;
}

struct kvg_cuda_evict *kvg_cuda_evict_free(struct kvg_cuda_evict *evict)
{
	if (!evict)
		return NULL;
	(void)evict->cuda->driver->cuModuleUnload(evict->module);
	free(evict);
	return NULL;
}

/* ---- scope ---- */

static int by_begin(const void *a, const void *b)
{
	const struct kvg_cuda_range *x = a, *y = b;

	return (x->begin > y->begin) - (x->begin < y->begin);
}

/* Protected ranges and the prefix, clipped to [begin, end), sorted, and joined where they touch. */
static void scope_protect(struct kvg_cuda_scope *scope, uint32_t begin, uint32_t end, uint32_t prefix_tokens,
	const struct kvg_cuda_range *protect, uint32_t count)
{
	struct kvg_cuda_range ranges[KVG_CUDA_MAX_RANGES] = {{.end = prefix_tokens}};
	uint32_t n = 1;

	for (; n < KVG_CUDA_MAX_RANGES && n <= count; n++)
		ranges[n] = protect[n - 1];
	qsort(ranges, n, sizeof(ranges[0]), by_begin);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t from = ranges[i].begin > begin ? ranges[i].begin : begin;
		uint32_t to = ranges[i].end < end ? ranges[i].end : end;

		if (from >= to)
			continue;
		if (scope->range_count && from <= scope->range_end[scope->range_count - 1]) {
			if (to > scope->range_end[scope->range_count - 1])
				scope->range_end[scope->range_count - 1] = to;
			continue;
		}
		scope->range_begin[scope->range_count] = from;
		scope->range_end[scope->range_count++] = to;
	}
}

void kvg_cuda_scope_prefill(struct kvg_cuda_scope *scope, uint32_t begin, uint32_t end, uint32_t window,
	uint32_t prefix_tokens, const struct kvg_cuda_range *protect, uint32_t protect_count)
{
	*scope = (struct kvg_cuda_scope){.begin = begin, .end = end, .window = window};
	scope_protect(scope, begin, end, prefix_tokens, protect, protect_count);
	scope->candidates = end > begin ? end - begin : 0;
	for (uint32_t i = 0; i < scope->range_count; i++)
		scope->candidates -= scope->range_end[i] - scope->range_begin[i];
}

void kvg_cuda_scope_decode(struct kvg_cuda_scope *scope, uint32_t first, uint32_t window, uint32_t committed_pos,
	uint32_t prefix_tokens, const struct kvg_cuda_range *protect, uint32_t protect_count)
{
	*scope = (struct kvg_cuda_scope){
		.decode = 1, .first = first, .fresh_from = committed_pos > window ? committed_pos - window : 0};
	scope_protect(scope, 0, UINT32_MAX, prefix_tokens, protect, protect_count);
}

/* ---- launches ---- */

static CUresult launch(const struct kvg_cuda_evict *evict, int kernel, uint32_t x, uint32_t y, uint32_t threads,
	CUstream stream, void *args)
{
	void *arguments[] = {args};

	if (x == 0 || y == 0)
		return CUDA_SUCCESS;
	return evict->cuda->driver->cuLaunchKernel(
		evict->kernels[kernel], x, y, 1, threads, 1, 1, 0, stream, arguments, NULL);
}

static uint32_t ceil_div(uint32_t n, uint32_t by)
{
	return n / by + (n % by != 0);
}

CUresult kvg_cuda_evict_store(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_rows *rows, const struct kvg_cuda_scores *scores, CUstream stream)
{
	struct kvg_evict_store_args args = {.at = kvg_evict_area_of(area),
		.rows = *rows,
		.scores = scores->scores,
		.layer_stride = scores->layer_stride,
		.head_stride = scores->head_stride,
		.token_stride = scores->token_stride,
		.layer_begin = scores->layer_begin,
		.pos = scores->pos,
		.tokens = scores->tokens};

	return launch(evict, STORE, ceil_div(scores->tokens, KVG_EVICT_STORE_TOKENS),
		scores->layer_count * ceil_div(rows->heads, KVG_EVICT_STORE_HEADS), KVG_EVICT_STORE_TOKENS, stream,
		&args);
}

static CUresult zero(const struct kvg_cuda_evict *evict, uint32_t *words, uint32_t count, CUstream stream)
{
	return evict->cuda->driver->cuMemsetD32Async((CUdeviceptr)words, 0, count, stream);
}

CUresult kvg_cuda_evict_gather(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_rows *rows, const struct kvg_cuda_scope *scope, const uint32_t *offset, float *scores,
	uint32_t *found, CUstream stream)
{
	struct kvg_evict_gather_args args = {.at = kvg_evict_area_of(area),
		.rows = *rows,
		.scope = *scope,
		.offset = offset,
		.scores = scores,
		.found = found};
	CUresult result = zero(evict, found, rows->layers * rows->heads, stream);

	if (result != CUDA_SUCCESS)
		return result;
	return launch(evict, GATHER,
		ceil_div(rows->max_length, KVG_EVICT_WARPS * KVG_EVICT_GATHER_CHUNKS * KVG_CUDA_CHUNK),
		rows->layers * rows->heads, KVG_EVICT_THREADS, stream, &args);
}

CUresult kvg_cuda_evict_count(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_rows *rows, const struct kvg_cuda_scope *scope, const struct kvg_cuda_kept *kept,
	const struct kvg_cuda_counts *counts, CUstream stream)
{
	struct kvg_evict_mark_args args = {
		.at = kvg_evict_area_of(area), .rows = *rows, .scope = *scope, .kept = *kept, .counts = *counts};

	return launch(evict, COUNT, rows->layers * rows->heads, 1, KVG_EVICT_COUNT_THREADS, stream, &args);
}

CUresult kvg_cuda_evict_mark(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_rows *rows, const struct kvg_cuda_scope *scope, const struct kvg_cuda_kept *kept,
	const struct kvg_cuda_counts *counts, const struct kvg_cuda_lists *lists, CUstream stream)
{
	struct kvg_evict_mark_args args = {.at = kvg_evict_area_of(area),
		.rows = *rows,
		.scope = *scope,
		.kept = *kept,
		.counts = *counts,
		.lists = *lists};

	return launch(evict, MARK, ceil_div(rows->max_length, KVG_EVICT_WARPS * KVG_CUDA_CHUNK),
		rows->layers * rows->heads, KVG_EVICT_THREADS, stream, &args);
}

CUresult kvg_cuda_evict_move(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_moves *moves, CUstream stream)
{
	struct kvg_evict_move_args args = {.at = kvg_evict_area_of(area),
		.rows = moves->rows,
		.tiles = moves->tiles,
		.move_rows = moves->move_rows,
		.src_ids = moves->src_ids,
		.dst_ids = moves->dst_ids,
		.src_cap = moves->src_cap,
		.dst_cap = moves->dst_cap,
		.lists = moves->lists};

	return launch(
		evict, MOVE, ceil_div(moves->tiles, KVG_EVICT_MOVE_WARPS), 1, 32 * KVG_EVICT_MOVE_WARPS, stream, &args);
}

CUresult kvg_cuda_evict_compact(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_compaction *compaction, CUstream stream)
{
	struct kvg_evict_compact_args args = {.at = kvg_evict_area_of(area),
		.rows = compaction->rows,
		.tiles = compaction->tiles,
		.compact_rows = compaction->compact_rows,
		.ids = compaction->ids,
		.ids_cap = compaction->ids_cap,
		.lists = compaction->lists};

	return launch(evict, COMPACT, ceil_div(compaction->tiles, KVG_EVICT_MOVE_WARPS), 1, 32 * KVG_EVICT_MOVE_WARPS,
		stream, &args);
}

CUresult kvg_cuda_evict_relocate(const struct kvg_cuda_evict *evict, const struct kvg_cuda_area *area,
	const struct kvg_cuda_relocation *relocations, uint32_t count, CUstream stream)
{
	struct kvg_evict_relocate_args args = {
		.at = kvg_evict_area_of(area), .relocations = relocations, .count = count};

	return launch(evict, RELOCATE, ceil_div(count, KVG_EVICT_WARPS), 1, KVG_EVICT_THREADS, stream, &args);
}

CUresult kvg_cuda_evict_publish(const struct kvg_cuda_evict *evict, const struct kvg_cuda_table *table, uint32_t slot,
	const struct kvg_cuda_table_row *rows, const uint32_t *packed, bool set_base_len, CUstream stream)
{
	struct kvg_evict_publish_args args = {
		.table = *table, .rows = rows, .packed = packed, .slot = slot, .set_base_len = set_base_len};

	return launch(evict, PUBLISH, table->layers * table->heads, 1, KVG_EVICT_THREADS, stream, &args);
}
