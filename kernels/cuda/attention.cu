/* Append, advance, the plan of decode attention, and the tables for other kernels. See attention.h. */
#include "kernels/cuda/attention_rows.cuh"

/* One thread copies 16 bytes. */
extern "C" __global__ void __launch_bounds__(KVG_ATTENTION_THREADS)
	kvg_attention_append(const __grid_constant__ struct kvg_attention_append args)
{
	const struct kvg_attention_rows &rows = args.rows;
	const uint32_t pieces = args.k_pieces + args.v_pieces, at = blockIdx.x * KVG_ATTENTION_THREADS + threadIdx.x,
		       line = at / pieces, token = line / rows.heads, head = line - token * rows.heads;

	if (token >= rows.sequences)
		return;
	const uint32_t slot = rows.slots[token];

	if (slot >= rows.max_sequences)
		return;
	const uint32_t row = slot * rows.heads + head,
		       index = rows.base_len[row] + (args.index ? args.index[token] : rows.appended[slot]);

	if (index >> KVG_TOKENS_LOG >= rows.row_cap)
		return;
	const uint32_t id = rows.ids[(size_t)row * rows.row_cap + (index >> KVG_TOKENS_LOG)], place = index & 15;
	uint32_t piece = at - line * pieces;
	const bool is_k = piece < args.k_pieces;
	const uint32_t width = is_k ? args.k_pieces : args.v_pieces;

	piece -= is_k ? 0 : args.k_pieces;
	const uint8_t *from = is_k ? args.k + token * args.k_stride : args.v + token * args.v_stride;
	uint8_t *to = (is_k ? args.k_base : args.v_base) + id * args.stride;

	((uint4 *)to)[place * width + piece] = ((const uint4 *)from)[head * width + piece];
}

extern "C" __global__ void __launch_bounds__(KVG_ATTENTION_THREADS)
	kvg_attention_advance(const __grid_constant__ struct kvg_attention_advance args)
{
	const uint32_t i = blockIdx.x * KVG_ATTENTION_THREADS + threadIdx.x;

	if (i < args.count && args.slots[i] < args.max_sequences)
		args.appended[args.slots[i]] += args.by;
}

/* ---- plan ---- */

#define NEAR_ROWS 4096u /* rows that are searched in shared memory */

/* Blocks of a row in the plan: an empty row has one, so that somebody writes its zeros. */
static __device__ __forceinline__ uint32_t planned_blocks(uint32_t length)
{
	return max(kvg_row_blocks(length), 1u);
}

/* The number by whose upper half of a product a division by n is exact, where product * n < 2^64; for n > 1. */
static __device__ __forceinline__ uint64_t inverse_of(uint32_t n)
{
	return ~0ull / n + 1;
}

/* The last row that begins at this block or before it. firsts: of rows, `step` numbers apart. */
static __device__ __forceinline__ uint32_t find_row(
	const uint32_t *firsts, uint32_t step, uint32_t count, uint32_t block)
{
	uint32_t low = 0;

	for (uint32_t size = count; size > 1;) {
		const uint32_t half = size / 2;

		low += firsts[(low + half) * step] <= block ? half : 0;
		size -= half;
	}
	return low;
}

/* Tells each worker where it begins; rows are complete. */
static __device__ void write_starts(const struct kvg_attention_plan_make &args, uint8_t *memory,
	const struct kvg_attention_head &head, const uint32_t *firsts, uint32_t step, uint32_t count)
{
	const struct kvg_attention_row *rows = (const struct kvg_attention_row *)(memory + args.plan.rows_at);
	struct kvg_attention_start *starts = (struct kvg_attention_start *)(memory + sizeof(head));
	const uint64_t inverse = inverse_of(head.workers);
	const uint32_t *ids =
		args.rows.ids + (size_t)blockIdx.x * args.rows.max_sequences * args.rows.heads * args.rows.row_cap;

	for (uint32_t worker = threadIdx.x; worker < head.workers; worker += KVG_ATTENTION_SCAN) {
		const uint32_t begin = (uint32_t)__umul64hi((uint64_t)worker * head.total, inverse),
			       next = (uint32_t)__umul64hi((uint64_t)(worker + 1) * head.total, inverse),
			       end = worker + 1 == head.workers ? head.total : next;
		const uint32_t row = find_row(firsts, step, count, begin);
		struct kvg_attention_start start = {rows[row], row, 0, end - begin, 0};

		start.block = begin - start.at.first;
		if (start.at.length)
			start.at.id = ids[(size_t)start.at.table * args.rows.row_cap + start.block];
		starts[worker] = start;
	}
}

/* One thread block plans one layer; a thread takes consecutive rows. */
extern "C" __global__ void __launch_bounds__(KVG_ATTENTION_SCAN)
	kvg_attention_plan(const __grid_constant__ struct kvg_attention_plan_make args)
{
	__shared__ uint32_t near[NEAR_ROWS];
	const struct kvg_attention_plan &plan = args.plan;
	const uint32_t count = args.rows.sequences * args.rows.heads,
		       each = (count + KVG_ATTENTION_SCAN - 1) / KVG_ATTENTION_SCAN;
	const uint32_t begin = min(threadIdx.x * each, count), end = min(begin + each, count);
	uint8_t *memory = plan.memory + blockIdx.x * plan.layer_bytes;
	struct kvg_attention_row *rows = (struct kvg_attention_row *)(memory + plan.rows_at);
	uint32_t *counters = (uint32_t *)(memory + plan.counters_at);
	uint32_t own = 0;

	for (uint32_t row = begin; row < end; row++) {
		const struct kvg_row_place place = kvg_row_find(args.rows, blockIdx.x, row);
		const struct kvg_attention_row record = {
			own, place.length, place.table, place.length ? place.ids[0] : 0};

		rows[row] = record;
		counters[row] = 0;
		own += planned_blocks(place.length);
	}
	struct kvg_attention_head head = {0, 0, 0};
	const uint32_t before = kvg_block_scan(own, &head.total) - own;

	head.workers = max(min(plan.workers, head.total / plan.least), 1u);
	head.inverse = inverse_of(head.total);
	for (uint32_t row = begin; row < end; row++) {
		rows[row].first += before;
		if (row < NEAR_ROWS)
			near[row] = rows[row].first;
	}
	if (threadIdx.x == 0)
		*(struct kvg_attention_head *)memory = head;
	__syncthreads();
	if (count <= NEAR_ROWS)
		write_starts(args, memory, head, near, 1, count);
	else
		write_starts(args, memory, head, &rows->first, sizeof(*rows) / sizeof(rows->first), count);
}

/* ---- export ---- */

/* One thread block for each row. */
extern "C" __global__ void __launch_bounds__(KVG_ATTENTION_THREADS)
	kvg_attention_table(const __grid_constant__ struct kvg_attention_export args)
{
	const struct kvg_row_place place = kvg_row_find(args.rows, 0, blockIdx.x);
	const uint32_t length = min(place.length, args.cap << KVG_TOKENS_LOG), blocks = kvg_row_blocks(length);
	int32_t *to = args.indices + (size_t)blockIdx.x * args.cap;

	for (uint32_t i = threadIdx.x; i < args.cap; i += KVG_ATTENTION_THREADS)
		to[i] = i < blocks ? (int32_t)place.ids[i] : 0;
	if (threadIdx.x == 0)
		args.lengths[blockIdx.x] = (int32_t)length;
}

/* One thread block in all. */
extern "C" __global__ void __launch_bounds__(KVG_ATTENTION_SCAN)
	kvg_attention_indptr(const __grid_constant__ struct kvg_attention_export args)
{
	const uint32_t count = args.rows.sequences * args.rows.heads,
		       each = (count + KVG_ATTENTION_SCAN - 1) / KVG_ATTENTION_SCAN;
	const uint32_t begin = min(threadIdx.x * each, count), end = min(begin + each, count);
	uint32_t own = 0, total;

	for (uint32_t row = begin; row < end; row++) {
		const uint32_t length = kvg_row_find(args.rows, 0, row).length;

		args.lengths[row] = length ? (int32_t)((length - 1) % 16 + 1) : 0;
		args.indptr[row] = (int32_t)own;
		own += kvg_row_blocks(length);
	}
	const uint32_t before = kvg_block_scan(own, &total) - own;

	for (uint32_t row = begin; row < end; row++)
		args.indptr[row] += (int32_t)before;
	if (threadIdx.x == 0)
		args.indptr[count] = (int32_t)total;
}

/* One thread block for each row, after kvg_attention_indptr. */
extern "C" __global__ void __launch_bounds__(KVG_ATTENTION_THREADS)
	kvg_attention_indices(const __grid_constant__ struct kvg_attention_export args)
{
	const struct kvg_row_place place = kvg_row_find(args.rows, 0, blockIdx.x);
	const uint32_t blocks = kvg_row_blocks(place.length);
	int32_t *to = args.indices + args.indptr[blockIdx.x];

	for (uint32_t i = threadIdx.x; i < blocks; i += KVG_ATTENTION_THREADS)
		to[i] = (int32_t)place.ids[i];
}
