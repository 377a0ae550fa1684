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

		if (place == 0 && end - first >= KVG_RUN_BLOCKS) { /* nearly always, and a few instructions */
			for (uint32_t i = 0; i < KVG_RUN_BLOCKS; i++)
				ids[i] = id + i;
			ids += KVG_RUN_BLOCKS;
			first += KVG_RUN_BLOCKS;
			continue;
		}
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
	size_t rows = request->space->rows, step = rows * (cap + 20),
	       blocks = 2 * (size_t)request->space->part.worker->move_cap;

	return (step > blocks ? step : blocks) + 256;
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
		result = kvg_cuda_select_budget(select, in, evict->budget, keep, NULL, device->select_scratch, stream);
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

void cuda_take_counts(const struct request *request)
{
	const struct compute_device *device = request->space->device.compute;
	struct evict *evict = request->evict;
	uint32_t rows = request->space->rows, cap = device->lane->eviction.counts.chunk_cap;
	const uint32_t *found = (const uint32_t *)(void *)device->lane->buffers[CUDA_READBACK].at;
	const uint8_t *stripe_kept = (const uint8_t *)(found + 3 * (size_t)rows);

	for (uint32_t row = 0; row < rows; row++)
		for (uint32_t s = 0; s < evict->stripes; s++)
			evict->stripe_kept[row * evict->stripes + s] = stripe_kept[(size_t)row * cap + s];
	memcpy(evict->kept, found + rows, rows * sizeof(uint32_t));
	memcpy(evict->holes, found + 2 * (size_t)rows, rows * sizeof(uint32_t));
}

static int select_finish(struct request *request)
{
	const struct compute_device *device = request->space->device.compute;
	struct evict *evict = request->evict;
	const uint32_t *found = (const uint32_t *)(void *)device->lane->buffers[CUDA_READBACK].at;

	for (uint32_t row = 0; row < request->space->rows; row++)
		if (found[row] != (evict->decode ? evict->length[row] : evict->candidates))
			return -EUCLEAN;
	cuda_take_counts(request);
	evict_count(request->sequence, evict);
	return 0;
}

/* MARK, with lists that have room for so many survivors and holes of a row. */
static CUresult enqueue_mark(const struct request *request, uint32_t survivors, uint32_t holes)
{
	struct compute_device *device = request->space->device.compute;
	struct cuda_eviction *eviction = &device->lane->eviction;
	const struct kvg_cuda_area area = cuda_area(request->space);
	uint32_t *lists = (uint32_t *)(void *)device->lane->buffers[CUDA_LISTS].at;

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

/* The most survivors and holes that a row can have: survivors are listed from the nursery, holes in held blocks. */
static void longest_lists(const struct request *request, uint32_t *survivors, uint32_t *holes)
{
	const struct evict *evict = request->evict;

	*survivors = *holes = 1;
	for (uint32_t row = 0; row < request->space->rows; row++) {
		uint32_t fresh = evict->length[row] - evict->held[row];

		*survivors = *survivors < fresh ? fresh : *survivors;
		*holes = *holes < evict->held[row] ? evict->held[row] : *holes;
	}
}

static CUresult read_counts(const struct compute_device *device)
{
	const struct cuda_eviction *eviction = &device->lane->eviction;

	return device->cuda->driver->cuMemcpyDtoHAsync(device->lane->buffers[CUDA_READBACK].at,
		(CUdeviceptr)(uintptr_t)eviction->found, eviction->counted, device->stream);
}

static CUresult enqueue_select(
	const struct request *request, struct cuda_eviction *eviction, const struct kvg_cuda_select_input *in)
{
	const struct compute_device *device = request->space->device.compute;
	const struct kvg_cuda_evict *kernels = device->kernels->evict;
	const struct kvg_cuda_area area = cuda_area(request->space);
	uint32_t survivors, holes;
	CUresult result;

	result = kvg_cuda_evict_gather(kernels, &area, &eviction->rows, &eviction->scope, in->offset,
		(float *)(uintptr_t)in->scores, eviction->found, device->stream);
	if (result == CUDA_SUCCESS)
		result = decide(request, in, (uint8_t *)(uintptr_t)eviction->kept.keep);
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_evict_count(kernels, &area, &eviction->rows, &eviction->scope, &eviction->kept,
			&eviction->counts, device->stream);
	longest_lists(request, &survivors, &holes);
	if (result == CUDA_SUCCESS && request->evict->marked)
		result = enqueue_mark(request, survivors, holes);
	return result == CUDA_SUCCESS ? read_counts(device) : result;
}

static bool has_room(const struct request *request, uint32_t cap)
{
	struct compute_device *device = request->space->device.compute;
	size_t rows = request->space->rows;
	uint32_t survivors, holes;

	longest_lists(request, &survivors, &holes);
	return cuda_buffer(device, CUDA_INPUT, later_words(request, cap) * sizeof(uint32_t)) &&
	       cuda_buffer(device, CUDA_HELD, rows * cap * sizeof(uint32_t)) &&
	       cuda_buffer(device, CUDA_LISTS, rows * ((size_t)survivors + holes) * sizeof(uint32_t));
}

/* Rows, scope, and memory for decisions and all that follows them. Returns the number of candidates. */
static int64_t open_eviction(struct request *request, uint32_t *longest)
{
	struct compute_device *device = request->space->device.compute;
	struct cuda_eviction *eviction = &device->lane->eviction;
	uint32_t rows = request->space->rows;
	uint8_t *keep, *counted;
	int64_t n = evict_survey(request->sequence, request->evict);

	if (n >= 0)
		n = send_rows(request, eviction, longest);
	if (n < 0)
		return n;
	make_scope(request, &eviction->scope);
	keep = cuda_buffer(device, CUDA_KEEP, (size_t)n + 16);
	eviction->counted = place_counts(eviction, rows, *longest, NULL);
	counted = cuda_buffer(device, CUDA_COUNTS, eviction->counted);
	if (!keep || !counted || !cuda_buffer(device, CUDA_READBACK, eviction->counted) ||
		!has_room(request, eviction->rows.ids_cap))
		return -ENOMEM;
	(void)place_counts(eviction, rows, *longest, counted);
	eviction->kept.keep = keep;
	return n;
}

int cuda_select(struct request *request)
{
	struct compute_device *device = request->space->device.compute;
	struct cuda_eviction *eviction = &device->lane->eviction;
	uint32_t longest;
	uint8_t *scores;
	int64_t n = open_eviction(request, &longest);

	if (n < 0)
		return (int)n;
	scores = cuda_buffer(device, CUDA_SCORES, (size_t)n * sizeof(float) + 16);
	if (!scores)
		return -ENOMEM;
	const struct kvg_cuda_select_input in = {.scores = (const float *)(void *)scores,
		.offset = eviction->kept.offset,
		.layers = eviction->rows.layers,
		.heads = eviction->rows.heads,
		.count = (uint32_t)n,
		.longest = request->evict->decode ? longest : request->evict->candidates};

	request->finish = select_finish;
	return cuda_status(device, enqueue_select(request, eviction, &in), "an eviction's selection");
}

int cuda_survey(struct request *request, size_t *ret_counts)
{
	uint32_t longest;
	int64_t n = open_eviction(request, &longest);

	*ret_counts = request->space->device.compute->lane->eviction.counted;
	return n < 0 ? (int)n : 0;
}

CUresult cuda_count(const struct request *request)
{
	const struct compute_device *device = request->space->device.compute;
	const struct cuda_eviction *eviction = &device->lane->eviction;
	const struct kvg_cuda_area area = cuda_area(request->space);
	CUresult result = kvg_cuda_evict_count(device->kernels->evict, &area, &eviction->rows, &eviction->scope,
		&eviction->kept, &eviction->counts, device->stream);

	return result == CUDA_SUCCESS ? read_counts(device) : result;
}

/* ---- MOVE ---- */

/* What the worker's kernels read. */
static struct kvg_cuda_table table_of(const struct space *space)
{
	const struct compute_device *device = space->device.compute;
	const struct meta_worker *worker = space->part.worker;

	return (struct kvg_cuda_table){.base_len = (uint32_t *)(void *)device->table,
		.ids = (uint32_t *)(void *)(device->table + space->device.ids_offset),
		.layers = worker->layers,
		.heads = worker->heads,
		.max_sequences = worker->max_sequences,
		.row_cap = worker->row_cap};
}

/* Of a row's held blocks, those that came since the eviction began. */
static uint32_t new_blocks(const struct evict *evict, const struct meta_row *meta, uint32_t row)
{
	uint32_t before = evict_first_changed(evict, row), now = meta->held_blocks + meta->pending;

	return now > before ? now - before : 0;
}

static uint32_t count_new(const struct sequence *sequence, const struct evict *evict)
{
	const struct meta_row *meta = meta_rows(&sequence->space->part, sequence->slot);
	uint32_t count = 0;

	for (uint32_t row = 0; row < sequence->space->rows; row++)
		count += new_blocks(evict, &meta[row], row);
	return count;
}

static void fill_new(
	const struct sequence *sequence, const struct evict *evict, struct kvg_cuda_table_row *at, uint32_t *packed)
{
	const struct meta_part *part = &sequence->space->part;
	const struct meta_row *meta = meta_rows(part, sequence->slot);
	uint32_t offset = 0;

	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		at[row] = (struct kvg_cuda_table_row){.first = evict_first_changed(evict, row),
			.count = new_blocks(evict, &meta[row], row),
			.offset = offset};
		memcpy(packed + offset, meta_held(part, sequence->slot, row) + at[row].first,
			at[row].count * sizeof(uint32_t));
		offset += at[row].count;
	}
}

/*
 * From the row's own blocks and pairs to the table's, where those of the sequence's context come first. with: so many
 * of the context's blocks come before the packed ids, and are written, too.
 */
static void shift_row(const struct sequence *sequence, uint32_t row, uint32_t with, struct kvg_cuda_table_row *at)
{
	uint32_t shared = sequence_shared(sequence, row);

	at->first += shared - with;
	at->count += with;
	at->base_len += shared * KVG_BLOCK_TOKENS;
}

/* The table's entries as they will be when the step is published; the packed ids are the same. */
static void fill_published(const struct sequence *sequence, const struct evict *evict,
	const struct kvg_cuda_table_row *new, struct kvg_cuda_table_row *at)
{
	for (uint32_t row = 0; row < sequence->space->rows; row++) {
		const struct meta_redo_row *redo = &evict->record->rows[row];

		at[row] = (struct kvg_cuda_table_row){.first = new[row].first,
			.count = redo->held_blocks > new[row].first ? redo->held_blocks - new[row].first : 0,
			.offset = new[row].offset,
			.base_len = redo->held_len};
		shift_row(sequence, row, 0, &at[row]);
	}
}

/*
 * The rows' held blocks, the new ones with them, in the form of the ids that the eviction began with: those that it
 * had are copied on the device, for there are many, and the new ones written over them.
 */
static CUresult make_held(
	const struct request *request, const struct kvg_cuda_table_row *rows, const uint32_t *packed, uint32_t *ids)
{
	const struct compute_device *device = request->space->device.compute;
	const struct kvg_cuda_rows *before = &device->lane->eviction.rows;
	const struct kvg_cuda_table table = {.ids = ids,
		.layers = before->layers,
		.heads = before->heads,
		.max_sequences = 1,
		.row_cap = before->ids_cap};
	CUresult result = device->cuda->driver->cuMemcpyDtoDAsync((CUdeviceptr)(uintptr_t)ids,
		(CUdeviceptr)(uintptr_t)before->ids, (size_t)request->space->rows * before->ids_cap * sizeof(uint32_t),
		device->stream);

	return result != CUDA_SUCCESS
		       ? result
		       : kvg_cuda_evict_publish(device->kernels->evict, &table, 0, rows, packed, false, device->stream);
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

/* What one step of moves is launched with, on the device. */
struct step {
	const struct kvg_cuda_table_row *new_rows, *published; /* published: NULL unless the step publishes */
	const uint32_t *packed;
	struct kvg_cuda_moves moves;
	struct kvg_cuda_compaction compaction;
};

/* Everything of a step goes to the device. `ids`: where make_held() makes its destinations. */
static int send_step(const struct request *request, uint32_t *ids, struct step *step)
{
	const struct evict *evict = request->evict;
	struct compute_device *device = request->space->device.compute;
	const struct cuda_eviction *eviction = &device->lane->eviction;
	uint32_t rows = request->space->rows, cap = eviction->rows.ids_cap, count = count_new(request->sequence, evict);
	uint32_t *words, *new_rows;
	struct parcel parcel;
	int r = parcel_open(device, CUDA_INPUT, (size_t)rows * 20 + count, 5, &parcel);

	if (r < 0)
		return r;
	*step = (struct step){.moves = {.rows = rows,
				      .src_ids = eviction->rows.ids,
				      .dst_ids = ids,
				      .src_cap = cap,
				      .dst_cap = cap,
				      .lists = eviction->lists},
		.compaction = {.rows = rows, .ids = ids, .ids_cap = cap, .lists = eviction->lists}};
	step->new_rows = (const void *)parcel_words(&parcel, (size_t)rows * 4, &new_rows);
	step->packed = parcel_words(&parcel, count, &words);
	fill_new(request->sequence, evict, (void *)new_rows, words);
	step->moves.move_rows = (const void *)parcel_words(&parcel, (size_t)rows * 8, &words);
	step->moves.tiles = fill_moves(evict, rows, (void *)words);
	step->compaction.compact_rows = (const void *)parcel_words(&parcel, (size_t)rows * 4, &words);
	step->compaction.tiles = fill_compaction(evict, evict->record->redo, rows, (void *)words);
	if (evict->publishes) {
		step->published = (const void *)parcel_words(&parcel, (size_t)rows * 4, &words);
		fill_published(request->sequence, evict, (const void *)new_rows, (void *)words);
	}
	return parcel_send(device, &parcel);
}

static int move_pairs(const struct request *request)
{
	const struct space *space = request->space;
	struct compute_device *device = space->device.compute;
	const struct kvg_cuda_evict *kernels = device->kernels->evict;
	const struct kvg_cuda_area area = cuda_area(space);
	const struct kvg_cuda_table table = table_of(space);
	uint32_t *ids = (uint32_t *)(void *)cuda_buffer(
		device, CUDA_HELD, (size_t)space->rows * device->lane->eviction.rows.ids_cap * sizeof(uint32_t));
	struct step step;
	CUresult result;
	int r = ids ? send_step(request, ids, &step) : -ENOMEM;

	if (r < 0)
		return r;
	result = make_held(request, step.new_rows, step.packed, ids);
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_evict_move(kernels, &area, &step.moves, device->stream);
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_evict_compact(kernels, &area, &step.compaction, device->stream);
	if (result == CUDA_SUCCESS && step.published)
		result = kvg_cuda_evict_publish(
			kernels, &table, request->sequence->slot, step.published, step.packed, true, device->stream);
	return cuda_status(device, result, "an eviction's moves");
}

static int move_blocks(struct request *request)
{
	struct compute_device *device = request->space->device.compute;
	const struct meta_record *record = request->evict->record;
	const struct kvg_cuda_area area = cuda_area(request->space);
	uint32_t count = record->redo->move_count, *words;
	const struct kvg_cuda_relocation *blocks;
	struct parcel parcel;
	int r = parcel_open(device, CUDA_INPUT, (size_t)count * 2, 1, &parcel);

	if (r < 0)
		return r;
	blocks = (const void *)parcel_words(&parcel, (size_t)count * 2, &words);
	for (uint32_t i = 0; i < count; i++) {
		words[2 * i] = record->moves[i].src;
		words[2 * i + 1] = record->moves[i].dst;
	}
	r = parcel_send(device, &parcel);
	return r < 0 ? r
		     : cuda_status(device,
			       kvg_cuda_evict_relocate(device->kernels->evict, &area, blocks, count, device->stream),
			       "an eviction's relocations");
}

int cuda_move(struct request *request)
{
	struct meta_redo *redo = request->evict->record->redo;

	if (redo->kind == META_REDO_RELOCATE)
		return move_blocks(request);
	__atomic_store_n(&redo->state, META_REDO_PLANNED, __ATOMIC_RELEASE);
	return move_pairs(request);
}

/* ---- tables ---- */

/* Entries of one row's ids that are published: of held blocks, those that an eviction has changed; all of a row that
 * was restored. */
static struct kvg_cuda_table_row published(const struct request *request, uint32_t index)
{
	const struct publish *publish = &request->publish;
	const struct meta_row *row = &meta_rows(&request->space->part, request->sequence->slot)[index];
	struct kvg_cuda_table_row at = {.base_len = row->base_len};

	if (publish->held && !request->evict) {
		at.count = row->held_blocks + publish->stripe_end * KVG_RUN_BLOCKS;
	} else if (publish->held) {
		at.first = evict_first_changed(request->evict, index);
		at.count = row->held_blocks > at.first ? row->held_blocks - at.first : 0;
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
	uint32_t rows = request->space->rows, count = 0, *words, *packed;
	struct kvg_cuda_table_row *at;
	struct parcel parcel;
	int r;

	for (uint32_t row = 0; row < rows; row++)
		count += published(request, row).count + (request->publish.shared ? sequence_shared(sequence, row) : 0);
	r = parcel_open(device, CUDA_INPUT, (size_t)rows * 4 + count, 2, &parcel);
	if (r < 0)
		return r;
	*ret_rows = (const void *)parcel_words(&parcel, (size_t)rows * 4, &words);
	*ret_packed = parcel_words(&parcel, count, &packed);
	at = (void *)words;
	for (uint32_t row = 0, offset = 0; row < rows; offset += at[row++].count) {
		uint32_t shared = request->publish.shared ? cuda_context_blocks(sequence, row, packed + offset) : 0;

		at[row] = published(request, row);
		at[row].offset = offset;
		cuda_row_blocks(sequence, row, at[row].first, at[row].count, packed + offset + shared);
		shift_row(sequence, row, shared, &at[row]);
	}
	return parcel_send(device, &parcel);
}

int cuda_publish(struct request *request)
{
	const struct compute_device *device = request->space->device.compute;
	const struct kvg_cuda_table table = table_of(request->space);
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
