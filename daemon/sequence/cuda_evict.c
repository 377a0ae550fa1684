/* SELECT, MARK and MOVE of the cuda kind, and the tables for the worker's kernels. */
#include "daemon/sequence/cuda.h"

#include <errno.h>
#include <string.h>

#include "daemon/sequence/evict.h"

#define CHUNK KVG_CUDA_CHUNK

static uint32_t divide_up(uint32_t n, uint32_t by)
{
	return (n + by - 1) / by;
}

/* ---- arrays that travel together: at the same offset of the upload buffer and of a device buffer ---- */

struct parcel {
	uint8_t *host, *device;
	size_t used;
};

/* The next `count` words: to be filled at *ret_host, found on the device at what is returned. */
static uint32_t *parcel_words(struct parcel *parcel, size_t count, uint32_t **ret_host)
{
	uint32_t *at = (uint32_t *)(void *)(parcel->device + parcel->used);

	*ret_host = (uint32_t *)(void *)(parcel->host + parcel->used);
	parcel->used += (count * sizeof(uint32_t) + 127) / 128 * 128;
	return at;
}

static int parcel_open(
	struct compute_device *device, enum cuda_buffers which, size_t words, unsigned arrays, struct parcel *ret)
{
	size_t size = words * sizeof(uint32_t) + arrays * 128u;

	*ret = (struct parcel){
		.host = cuda_buffer(device, CUDA_UPLOAD, size), .device = cuda_buffer(device, which, size)};
	return ret->host && ret->device ? 0 : -ENOMEM;
}

static int parcel_send(const struct compute_device *device, const struct parcel *parcel)
{
	return cuda_status(device, cuda_upload(device, parcel->device, parcel->used), "an upload");
}

void cuda_row_blocks(const struct sequence *sequence, uint32_t row, uint32_t first, uint32_t count, uint32_t *ids)
{
	const struct meta_part *part = &sequence->space->part;
	uint32_t held = meta_rows(part, sequence->slot)[row].held_blocks, end = first + count;

	if (first < held) {
		uint32_t n = end < held ? count : held - first;

		memcpy(ids, meta_held(part, sequence->slot, row) + first, n * sizeof(uint32_t));
		ids += n;
		first += n;
	}
	while (first < end) {
		uint32_t at = first - held, place = at % KVG_RUN_BLOCKS;
		uint32_t id = meta_run(part, sequence->slot, at / KVG_RUN_BLOCKS)[row];

		for (; place < KVG_RUN_BLOCKS && first < end; place++, first++)
			*ids++ = id + place;
	}
}

/* ---- SELECT ---- */

static void fill_ids(const struct sequence *sequence, const struct evict *evict, uint32_t row, uint32_t *ids)
{
	uint32_t held = meta_rows(&sequence->space->part, sequence->slot)[row].held_blocks;
	uint32_t fresh = divide_up(evict->length[row] - evict->held[row], KVG_BLOCK_TOKENS);

	cuda_row_blocks(sequence, row, 0, held + fresh, ids);
}

static uint32_t longest_row(const struct evict *evict, uint32_t rows)
{
	uint32_t longest = 0;

	for (uint32_t row = 0; row < rows; row++)
		if (longest < evict->length[row])
			longest = evict->length[row];
	return longest;
}

/* Candidates of all rows; their offsets. -EFBIG: more than the kernels count. */
static int64_t fill_offsets(const struct evict *evict, uint32_t rows, uint32_t *offset)
{
	uint64_t n = 0;

	for (uint32_t row = 0; row < rows; row++) {
		offset[row] = (uint32_t)n;
		n += evict->decode ? evict->length[row] : evict->candidates;
	}
	offset[rows] = (uint32_t)n;
	return n < UINT32_MAX - 64 ? (int64_t)n : -EFBIG;
}

/*
 * Room for what comes after the point of no return: lists, steps, relocations, and the table. Growing a buffer loses
 * what is in it, so the upload buffer, which is in use, grows before it is filled (send_rows()).
 */
static size_t later_words(const struct request *request, uint32_t cap)
{
	size_t rows = request->space->rows, step = rows * (cap + 16),
	       blocks = 2 * (size_t)request->space->part.worker->move_cap;

	return (step > blocks ? step : blocks) + 128;
}

/* The rows go to the device. Returns the number of candidates. */
static int64_t send_rows(const struct request *request, struct cuda_eviction *eviction, uint32_t *longest)
{
	const struct sequence *sequence = request->sequence;
	const struct evict *evict = request->evict;
	struct compute_device *device = request->space->device.compute;
	const struct meta_row *meta = meta_rows(&request->space->part, sequence->slot);
	uint32_t rows = request->space->rows, cap, *ids, *base_len, *length, *held, *offset;
	struct parcel parcel;
	int64_t n;

	*longest = longest_row(evict, rows);
	cap = divide_up(*longest, KVG_BLOCK_TOKENS) + 1;
	for (uint32_t row = 0; row < rows; row++)
		if (cap < meta[row].held_blocks + 1)
			cap = meta[row].held_blocks + 1;
	if (!cuda_buffer(device, CUDA_UPLOAD, later_words(request, cap) * sizeof(uint32_t)) ||
		parcel_open(device, CUDA_EVICT, (size_t)rows * (cap + 4) + 1, 5, &parcel) < 0)
		return -ENOMEM;
	eviction->rows = (struct kvg_cuda_rows){.layers = request->space->part.worker->layers,
		.heads = request->space->part.worker->heads,
		.ids_cap = cap,
		.fold_pos = sequence->meta->fold_pos,
		.max_length = *longest};
	eviction->rows.ids = parcel_words(&parcel, (size_t)rows * cap, &ids);
	eviction->rows.base_len = parcel_words(&parcel, rows, &base_len);
	eviction->rows.length = parcel_words(&parcel, rows, &length);
	eviction->rows.held = parcel_words(&parcel, rows, &held);
	eviction->kept.offset = parcel_words(&parcel, rows + 1, &offset);
	for (uint32_t row = 0; row < rows; row++) {
		fill_ids(sequence, evict, row, ids + (size_t)row * cap);
		base_len[row] = meta[row].base_len;
	}
	memcpy(length, evict->length, rows * sizeof(uint32_t));
	memcpy(held, evict->held, rows * sizeof(uint32_t));
	n = fill_offsets(evict, rows, offset);
	if (n >= 0 && parcel_send(device, &parcel) < 0)
		return -EIO;
	return n;
}

static void make_scope(const struct request *request, struct kvg_cuda_scope *scope)
{
	const struct meta_seq *meta = request->sequence->meta;
	const struct kvg_policy *policy = &meta->policy;
	const struct evict *evict = request->evict;
	struct kvg_cuda_range protect[KVG_MAX_PROTECTED];

	for (uint32_t i = 0; i < meta->protected_count; i++)
		protect[i] = (struct kvg_cuda_range){.begin = meta->protect_begin[i], .end = meta->protect_end[i]};
	if (evict->decode)
		kvg_cuda_scope_decode(scope, policy->decode_first ? policy->decode_first : EVICT_DECODE_FIRST,
			policy->decode_window ? policy->decode_window : EVICT_DECODE_WINDOW, meta->committed_pos,
			policy->prefix_tokens, protect, meta->protected_count);
	else
		kvg_cuda_scope_prefill(scope, evict->begin, evict->end, evict->window, policy->prefix_tokens, protect,
			meta->protected_count);
}

/* What is counted, in one piece that is read back: found, kept, holes, and the counts of chunks. */
static size_t place_counts(struct cuda_eviction *eviction, uint32_t rows, uint32_t longest, uint8_t *at)
{
	uint32_t cap = divide_up(divide_up(longest, CHUNK) + 1, 4) * 4;
	size_t words = (size_t)rows * sizeof(uint32_t);

	eviction->found = (uint32_t *)(void *)at;
	eviction->counts = (struct kvg_cuda_counts){.kept = (uint32_t *)(void *)(at + words),
		.holes = (uint32_t *)(void *)(at + 2 * words),
		.stripe_kept = at + 3 * words,
		.chunk_holes = at + 3 * words + (size_t)rows * cap,
		.chunk_cap = cap};
	return 3 * words + 2 * (size_t)rows * cap;
}

static CUresult decide(const struct request *request, const struct kvg_cuda_select_input *in, uint8_t *keep)
{
	const struct compute_device *device = request->space->device.compute;
	const struct kvg_cuda_select *select = device->kernels->select;
	const struct kvg_policy *policy = &request->sequence->meta->policy;
	const struct evict *evict = request->evict;
	CUstream stream = device->stream;
	CUresult result;

	if (evict->decode)
		result = kvg_cuda_select_budget(select, in, (uint64_t)policy->budget * request->space->rows, keep, NULL,
			device->select_scratch, stream);
	else if (policy->mode == KVG_MODE_THRESHOLD)
		result = kvg_cuda_select_threshold(select, in, policy->threshold, keep, stream);
	else
		result = kvg_cuda_select_ratio(
			select, in, policy->level, evict->ratio, keep, NULL, device->select_scratch, stream);
	if (result == CUDA_SUCCESS && policy->floor)
		result = kvg_cuda_select_floor(select, in, policy->floor, keep, stream);
	if (result == CUDA_SUCCESS && (evict->window || evict->decode))
		result = kvg_cuda_maxima_keep(device->kernels->maxima, in->scores, keep, in->count, stream);
	return result;
}

static int select_finish(struct request *request)
{
	const struct compute_device *device = request->space->device.compute;
	struct evict *evict = request->evict;
	uint32_t rows = request->space->rows, cap = device->eviction.counts.chunk_cap;
	const uint32_t *found = (const uint32_t *)(void *)device->buffers[CUDA_READBACK].at;
	const uint8_t *stripe_kept = (const uint8_t *)(found + 3 * (size_t)rows);

	for (uint32_t row = 0; row < rows; row++) {
		if (found[row] != (evict->decode ? evict->length[row] : evict->candidates))
			return -EUCLEAN;
		for (uint32_t s = 0; s < evict->stripes; s++)
			evict->stripe_kept[row * evict->stripes + s] = stripe_kept[(size_t)row * cap + s];
	}
	memcpy(evict->kept, found + rows, rows * sizeof(uint32_t));
	memcpy(evict->holes, found + 2 * (size_t)rows, rows * sizeof(uint32_t));
	evict_count(request->sequence, evict);
	return 0;
}

/* MARK, with lists that have room for so many survivors and holes of a row. */
static CUresult enqueue_mark(const struct request *request, uint32_t survivors, uint32_t holes)
{
	struct compute_device *device = request->space->device.compute;
	struct cuda_eviction *eviction = &device->eviction;
	const struct kvg_cuda_area area = cuda_area(request->space);
	uint32_t *lists = (uint32_t *)(void *)device->buffers[CUDA_LISTS].at;

	eviction->lists = (struct kvg_cuda_lists){.survivors = lists,
		.holes = lists + (size_t)request->space->rows * survivors,
		.survivor_cap = survivors,
		.hole_cap = holes};
	return kvg_cuda_evict_mark(device->kernels->evict, &area, &eviction->rows, &eviction->scope, &eviction->kept,
		&eviction->counts, &eviction->lists, device->stream);
}

int cuda_mark(struct request *request)
{
	const struct evict *evict = request->evict;
	uint32_t survivors = 1, holes = 1;

	for (uint32_t row = 0; row < request->space->rows; row++) {
		uint32_t fresh = evict->kept[row] + evict->holes[row] - evict->held[row];

		survivors = survivors < fresh ? fresh : survivors;
		holes = holes < evict->holes[row] ? evict->holes[row] : holes;
	}
	return cuda_status(
		request->space->device.compute, enqueue_mark(request, survivors, holes), "an eviction's marks");
}

static CUresult enqueue_select(const struct request *request, struct cuda_eviction *eviction,
	const struct kvg_cuda_select_input *in, uint8_t *keep, size_t counts)
{
	const struct compute_device *device = request->space->device.compute;
	const struct kvg_cuda_evict *kernels = device->kernels->evict;
	const struct kvg_cuda_area area = cuda_area(request->space);
	CUresult result;

	eviction->kept.keep = keep;
	result = kvg_cuda_evict_gather(kernels, &area, &eviction->rows, &eviction->scope, in->offset,
		(float *)(uintptr_t)in->scores, eviction->found, device->stream);
	if (result == CUDA_SUCCESS)
		result = decide(request, in, keep);
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_evict_count(kernels, &area, &eviction->rows, &eviction->scope, &eviction->kept,
			&eviction->counts, device->stream);
	if (result == CUDA_SUCCESS && request->evict->marked)
		result = enqueue_mark(request, eviction->rows.max_length + 1, eviction->rows.max_length + 1);
	if (result == CUDA_SUCCESS)
		result = device->cuda->driver->cuMemcpyDtoHAsync(device->buffers[CUDA_READBACK].at,
			(CUdeviceptr)(uintptr_t)eviction->found, counts, device->stream);
	return result;
}

static bool has_room(const struct request *request, uint32_t cap, uint32_t longest)
{
	struct compute_device *device = request->space->device.compute;
	size_t rows = request->space->rows;

	return cuda_buffer(device, CUDA_INPUT, later_words(request, cap) * sizeof(uint32_t)) &&
	       cuda_buffer(device, CUDA_LISTS, rows * 2 * (longest + (size_t)1) * sizeof(uint32_t));
}

int cuda_select(struct request *request)
{
	struct compute_device *device = request->space->device.compute;
	struct cuda_eviction *eviction = &device->eviction;
	uint32_t rows = request->space->rows, longest;
	uint8_t *scores, *keep, *counted;
	size_t counts;
	int64_t n = evict_survey(request->sequence, request->evict);

	if (n >= 0)
		n = send_rows(request, eviction, &longest);
	if (n < 0)
		return (int)n;
	make_scope(request, &eviction->scope);
	scores = cuda_buffer(device, CUDA_SCORES, (size_t)n * sizeof(float) + 16);
	keep = cuda_buffer(device, CUDA_KEEP, (size_t)n + 16);
	counts = place_counts(eviction, rows, longest, NULL);
	counted = cuda_buffer(device, CUDA_COUNTS, counts);
	if (!scores || !keep || !counted || !cuda_buffer(device, CUDA_READBACK, counts) ||
		!has_room(request, eviction->rows.ids_cap, longest))
		return -ENOMEM;
	(void)place_counts(eviction, rows, longest, counted);
	const struct kvg_cuda_select_input in = {.scores = (const float *)(void *)scores,
		.offset = eviction->kept.offset,
		.layers = eviction->rows.layers,
		.heads = eviction->rows.heads,
		.count = (uint32_t)n,
		.longest = request->evict->decode ? longest : request->evict->candidates};

	request->finish = select_finish;
	return cuda_status(device, enqueue_select(request, eviction, &in, keep, counts), "an eviction's selection");
}

/* ---- MOVE ---- */

/* The rows' held blocks, the new ones with them. */
static uint32_t held_cap(const struct sequence *sequence)
{
	const struct meta_row *rows = meta_rows(&sequence->space->part, sequence->slot);
	uint32_t cap = 1;

	for (uint32_t row = 0; row < sequence->space->rows; row++)
		if (cap < rows[row].held_blocks + rows[row].pending)
			cap = rows[row].held_blocks + rows[row].pending;
	return cap;
}

static void fill_held(const struct sequence *sequence, uint32_t cap, uint32_t *ids)
{
	const struct meta_part *part = &sequence->space->part;
	const struct meta_row *rows = meta_rows(part, sequence->slot);

	for (uint32_t row = 0; row < sequence->space->rows; row++)
		memcpy(ids + (size_t)row * cap, meta_held(part, sequence->slot, row),
			(rows[row].held_blocks + rows[row].pending) * sizeof(uint32_t));
}

static uint32_t fill_moves(const struct evict *evict, uint32_t rows, struct kvg_cuda_move_row *moves)
{
	uint32_t tiles = 0;

	for (uint32_t row = 0; row < rows; row++) {
		const struct evict_step *step = &evict->steps[row];

		moves[row] = (struct kvg_cuda_move_row){.tile_first = tiles,
			.count = step->count,
			.src_first = step->source,
			.hole_first = step->hole,
			.hole_count = step->hole_count,
			.tail_first = step->tail};
		tiles += divide_up(step->count, KVG_CUDA_MOVE_TILE);
	}
	return tiles;
}

/* Rows outside of [compact_row, compact_end) have no holes in this step. */
static uint32_t fill_compaction(
	const struct evict *evict, const struct meta_redo *redo, uint32_t rows, struct kvg_cuda_compact_row *compact)
{
	uint32_t tiles = 0;

	for (uint32_t row = 0; row < rows; row++) {
		const struct evict_step *step = &evict->steps[row];
		bool in = row >= redo->row_begin && row < redo->row_end;

		compact[row] = (struct kvg_cuda_compact_row){.tile_first = tiles,
			.held_len = in ? step->tail : 0,
			.hole_first = step->hole + step->hole_count,
			.hole_count = in ? step->closed : 0};
		tiles += divide_up(compact[row].hole_count, KVG_CUDA_MOVE_TILE);
	}
	return tiles;
}

static int move_pairs(struct request *request)
{
	const struct sequence *sequence = request->sequence;
	struct compute_device *device = request->space->device.compute;
	const struct evict *evict = request->evict;
	const struct cuda_eviction *eviction = &device->eviction;
	const struct kvg_cuda_area area = cuda_area(request->space);
	uint32_t rows = request->space->rows, cap = held_cap(sequence), *ids, *words;
	struct kvg_cuda_moves moves = {.rows = rows,
		.src_ids = eviction->rows.ids,
		.src_cap = eviction->rows.ids_cap,
		.dst_cap = cap,
		.lists = eviction->lists};
	struct kvg_cuda_compaction compaction = {.rows = rows, .ids_cap = cap, .lists = eviction->lists};
	struct parcel parcel;
	CUresult result;
	int r = parcel_open(device, CUDA_INPUT, (size_t)rows * (cap + 12), 3, &parcel);

	if (r < 0)
		return r;
	moves.dst_ids = compaction.ids = parcel_words(&parcel, (size_t)rows * cap, &ids);
	fill_held(sequence, cap, ids);
	moves.move_rows = (const void *)parcel_words(&parcel, (size_t)rows * 8, &words);
	moves.tiles = fill_moves(evict, rows, (void *)words);
	compaction.compact_rows = (const void *)parcel_words(&parcel, (size_t)rows * 4, &words);
	compaction.tiles = fill_compaction(evict, request->space->part.redo, rows, (void *)words);
	r = parcel_send(device, &parcel);
	if (r < 0)
		return r;
	result = kvg_cuda_evict_move(device->kernels->evict, &area, &moves, device->stream);
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_evict_compact(device->kernels->evict, &area, &compaction, device->stream);
	return cuda_status(device, result, "an eviction's moves");
}

static int move_blocks(struct request *request)
{
	struct compute_device *device = request->space->device.compute;
	const struct meta_part *part = &request->space->part;
	const struct kvg_cuda_area area = cuda_area(request->space);
	uint32_t count = part->redo->move_count, *words;
	const struct kvg_cuda_relocation *blocks;
	struct parcel parcel;
	int r = parcel_open(device, CUDA_INPUT, (size_t)count * 2, 1, &parcel);

	if (r < 0)
		return r;
	blocks = (const void *)parcel_words(&parcel, (size_t)count * 2, &words);
	for (uint32_t i = 0; i < count; i++) {
		words[2 * i] = part->moves[i].src;
		words[2 * i + 1] = part->moves[i].dst;
	}
	r = parcel_send(device, &parcel);
	return r < 0 ? r
		     : cuda_status(device,
			       kvg_cuda_evict_relocate(device->kernels->evict, &area, blocks, count, device->stream),
			       "an eviction's relocations");
}

int cuda_move(struct request *request)
{
	struct meta_redo *redo = request->space->part.redo;

	if (redo->kind == META_REDO_RELOCATE)
		return move_blocks(request);
	__atomic_store_n(&redo->state, META_REDO_PLANNED, __ATOMIC_RELEASE);
	return move_pairs(request);
}

/* ---- tables ---- */

/* Entries of one row's ids that are published. */
static struct kvg_cuda_table_row published(const struct publish *publish, const struct meta_row *row)
{
	struct kvg_cuda_table_row at = {.base_len = row->base_len};

	if (publish->held) {
		at.count = row->held_blocks;
	} else {
		at.first = row->held_blocks + publish->stripe_begin * KVG_RUN_BLOCKS;
		at.count = (publish->stripe_end - publish->stripe_begin) * KVG_RUN_BLOCKS;
	}
	return at;
}

static int send_table(
	const struct request *request, const struct kvg_cuda_table_row **ret_rows, const uint32_t **ret_packed)
{
	const struct sequence *sequence = request->sequence;
	struct compute_device *device = request->space->device.compute;
	const struct meta_row *meta = meta_rows(&request->space->part, sequence->slot);
	uint32_t rows = request->space->rows, count = 0, *words, *packed;
	struct kvg_cuda_table_row *at;
	struct parcel parcel;
	int r;

	for (uint32_t row = 0; row < rows; row++)
		count += published(&request->publish, &meta[row]).count;
	r = parcel_open(device, CUDA_INPUT, (size_t)rows * 4 + count, 2, &parcel);
	if (r < 0)
		return r;
	*ret_rows = (const void *)parcel_words(&parcel, (size_t)rows * 4, &words);
	*ret_packed = parcel_words(&parcel, count, &packed);
	at = (void *)words;
	for (uint32_t row = 0, offset = 0; row < rows; offset += at[row++].count) {
		at[row] = published(&request->publish, &meta[row]);
		at[row].offset = offset;
		cuda_row_blocks(sequence, row, at[row].first, at[row].count, packed + offset);
	}
	return parcel_send(device, &parcel);
}

int cuda_publish(struct request *request)
{
	struct space *space = request->space;
	const struct compute_device *device = space->device.compute;
	const struct kvg_cuda_table table = {.base_len = (uint32_t *)(void *)device->table,
		.ids = (uint32_t *)(void *)(device->table + space->device.ids_offset),
		.layers = space->part.worker->layers,
		.heads = space->part.worker->heads,
		.max_sequences = space->part.worker->max_sequences,
		.row_cap = space->part.worker->row_cap};
	const struct kvg_cuda_table_row *rows;
	const uint32_t *packed;
	CUresult result;
	int r = send_table(request, &rows, &packed);

	if (r < 0)
		return r;
	result = kvg_cuda_evict_publish(device->kernels->evict, &table, request->sequence->slot, rows, packed,
		request->publish.lengths, device->stream);
	if (result == CUDA_SUCCESS)
		result = cuda_signal(request);
	return cuda_status(device, result, "a worker's table");
}
