/*
 * What evictions drop and the host keeps, and its way back. The kernels write and read the pinned frames themselves: a
 * pair's place there is any, and the link is as fast for them as for the copy engines.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sequence/cuda_transfer.h"
#include "daemon/sequence/evict.h"
#include "daemon/sequence/recall.h"
#include "daemon/sequence/retain.h"

#define PAIRS_MAX 32768u /* of one window */

static uint32_t window_pairs(const struct retain_form *form)
{
	size_t most = TRANSFER_BYTES / (form->k_bytes + form->v_bytes);

	return most < PAIRS_MAX ? (uint32_t)most : PAIRS_MAX;
}

/* The store as the kernels see it. */
static struct kvg_cuda_packed packed_store(const struct retain *retain)
{
	const struct retain_form *form = &retain->form;

	return (struct kvg_cuda_packed){.at = retain->base,
		.frame_bytes = form->frame_size,
		.pairs = form->per_frame,
		.v = form->v_offset,
		.entry_bytes = sizeof(struct retain_entry),
		.row = form->index_offset + offsetof(struct retain_entry, row),
		.pos = form->index_offset + offsetof(struct retain_entry, pos),
		.score = form->index_offset + offsetof(struct retain_entry, score)};
}

static struct kvg_cuda_spot spot_of(const struct retain *retain, uint64_t i)
{
	uint32_t each = retain->form.per_frame;

	return (struct kvg_cuda_spot){retain->frames[i / each], (uint32_t)(i % each)};
}

/* ---- PACK ---- */

struct packing {
	uint32_t *first; /* [rows + 1]: numbers of dropped pairs */
	float *scores;   /* pinned; NULL: there is room for all, whatever they are */
	bool planned;
	struct retain_plan plan;
	uint32_t row; /* of the next pair */
};

static void packing_free(void *data)
{
	struct packing *packing = data;

	retain_plan_deinit(&packing->plan);
	free(packing->first);
	free(packing);
}

static const struct cuda_eviction *eviction_of(const struct request *request)
{
	return &request->space->device.compute->evictions[request->evict->slot].eviction;
}

/* Enqueues packing of pairs begin .. end - 1 of the rows that have them. `sent`: where their spots are, or 0. */
static CUresult collect(struct cuda_transfer *transfer, const struct cuda_window *window,
	const struct kvg_cuda_packed *to, struct kvg_cuda_collection *what, size_t spots)
{
	const struct request *request = transfer->request;
	const struct cuda_eviction *eviction = eviction_of(request);
	const struct packing *packing = transfer->data;
	const struct cuda_link *link = transfer->link;
	const struct kvg_cuda_area area = cuda_area(request->space);
	size_t at = (spots + 15) / 16 * 16, rows = request->space->rows * sizeof(uint32_t);
	CUresult result;

	memcpy(window->upload + at, packing->first, rows);
	what->first = (const uint32_t *)(uintptr_t)(window->there + at);
	what->spots = spots ? (const struct kvg_cuda_spot *)(uintptr_t)window->there : NULL;
	result = cuda_window_send(link, window, at + rows, link->kernels);
	if (result != CUDA_SUCCESS)
		return result;
	return kvg_cuda_tier_collect(link->tier, &area, &eviction->rows, &eviction->scope, &eviction->kept,
		&eviction->counts, what, to, TRANSFER_GRID, link->kernels);
}

/* All scores at once. */
static CUresult collect_scores(struct cuda_transfer *transfer, const struct cuda_window *window)
{
	const struct packing *packing = transfer->data;
	const struct kvg_cuda_packed scores = {.at = (uint8_t *)packing->scores,
		.pairs = (uint32_t)transfer->total,
		.k = KVG_CUDA_NO_FIELD,
		.row = KVG_CUDA_NO_FIELD,
		.pos = KVG_CUDA_NO_FIELD,
		.entry_bytes = sizeof(float)};
	struct kvg_cuda_collection what = {.row_end = transfer->request->space->rows, .end = (uint32_t)transfer->total};

	return collect(transfer, window, &scores, &what, 0);
}

/* The next pairs, and the rows that they are in. */
static CUresult collect_pairs(struct cuda_transfer *transfer, const struct cuda_window *window)
{
	const struct retain *retain = transfer->request->sequence->retain;
	const struct kvg_cuda_packed store = packed_store(retain);
	struct kvg_cuda_spot *spots = (struct kvg_cuda_spot *)(void *)window->upload;
	struct packing *packing = transfer->data;
	uint64_t left = transfer->total - transfer->done;
	uint32_t n = left < window_pairs(&retain->form) ? (uint32_t)left : window_pairs(&retain->form);
	struct kvg_cuda_collection what = {.begin = (uint32_t)transfer->done, .end = (uint32_t)transfer->done + n};

	for (uint32_t i = 0; i < n; i++) {
		uint64_t place = packing->plan.place ? packing->plan.place[transfer->done + i]
						     : retain->count + transfer->done + i;

		spots[i] = place == RETAIN_NOWHERE ? (struct kvg_cuda_spot){UINT32_MAX, 0} : spot_of(retain, place);
	}
	while (packing->first[packing->row + 1] <= what.begin)
		packing->row++;
	what.row_begin = packing->row;
	for (what.row_end = packing->row; packing->first[what.row_end] < what.end;)
		what.row_end++;
	transfer->done += n;
	return collect(transfer, window, &store, &what, n * sizeof(*spots));
}

static int next_packed(struct cuda_transfer *transfer, struct cuda_window *window)
{
	struct packing *packing = transfer->data;
	int r = 0;

	if (packing->scores && !packing->planned && transfer->turn) { /* the scores are under way, or here */
		if (transfer->in_flight)
			return -EAGAIN;
		r = retain_plan(transfer->request->sequence->retain, packing->scores, transfer->total, &packing->plan);
		packing->planned = r >= 0;
		if (r < 0)
			return r;
	}
	if (transfer->done == transfer->total)
		return 0;
	if (packing->scores && !packing->planned)
		r = cuda_link_status(transfer->link, collect_scores(transfer, window), "dropped pairs' scores");
	else
		r = cuda_link_status(transfer->link, collect_pairs(transfer, window), "dropped pairs");
	if (r >= 0)
		r = cuda_link_status(transfer->link, cuda_window_end(transfer->link, window, transfer->link->kernels),
			"dropped pairs");
	return r < 0 ? r : 1;
}

static int finish_packed(struct cuda_transfer *transfer)
{
	const struct packing *packing = transfer->data;
	struct retain *retain = transfer->request->sequence->retain;

	retain->count = packing->plan.place ? packing->plan.count : retain->count + transfer->total;
	return 0;
}

/* Numbers of dropped pairs; where there is no room for all of them, memory for their scores. */
static struct packing *packing_new(struct request *request)
{
	const struct evict *evict = request->evict;
	const struct retain *retain = request->sequence->retain;
	struct compute_device *device = request->space->device.compute;
	uint32_t rows = request->space->rows;
	struct packing *packing = calloc(1, sizeof(*packing));

	if (!packing)
		return NULL;
	packing->first = calloc(rows + 1, sizeof(uint32_t));
	for (uint32_t row = 0; packing->first && row < rows; row++)
		packing->first[row + 1] = packing->first[row] + evict->length[row] - evict->kept[row];
	if (retain->count + evict->dropped > retain_capacity(retain)) {
		packing->scores = (float *)(void *)cuda_buffer(device, CUDA_READBACK, evict->dropped * sizeof(float));
		if (!packing->scores) {
			packing_free(packing);
			return NULL;
		}
	}
	if (packing->first)
		return packing;
	packing_free(packing);
	return NULL;
}

int cuda_pack(struct request *request)
{
	size_t rows = request->space->rows * sizeof(uint32_t), spots = PAIRS_MAX * sizeof(struct kvg_cuda_spot);
	struct cuda_transfer *transfer;
	struct packing *packing;
	int r = retain_open(request->sequence);

	if (r < 0)
		return r;
	if (rows + spots > TRANSFER_UPLOAD || request->evict->dropped > UINT32_MAX)
		return -EFBIG;
	packing = packing_new(request);
	if (!packing)
		return -ENOMEM;
	r = cuda_transfer_start(request, next_packed, &transfer);
	if (r < 0) {
		packing_free(packing);
		return r;
	}
	transfer->finish = finish_packed;
	transfer->release = packing_free;
	transfer->data = packing;
	transfer->total = request->evict->dropped;
	return 0;
}

/* ---- SELECT of a recall ---- */

/* Blocks that have pairs, row by row. */
static uint64_t count_blocks(const struct request *request)
{
	uint64_t n = 0;

	for (uint32_t row = 0; row < request->space->rows; row++)
		n += (request->evict->length[row] + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS;
	return n;
}

static void list_blocks(const struct request *request, uint32_t *ids)
{
	for (uint32_t row = 0; row < request->space->rows; row++) {
		uint32_t n = (request->evict->length[row] + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS;

		cuda_row_blocks(request->sequence, row, 0, n, ids);
		ids += n;
	}
}

static void put_row(const struct request *request, uint32_t row, const struct meta_place *places)
{
	const struct sequence *sequence = request->sequence;
	const struct meta_row *meta = &meta_rows(&request->space->part, sequence->slot)[row];

	for (uint32_t i = 0; i < request->evict->length[row]; i++) {
		bool folded = i < meta->base_len;

		recall_put(sequence, request->evict->recall, row, i,
			folded ? (uint32_t)places[i].pos : sequence->meta->fold_pos + (i - meta->base_len),
			places[i].score);
	}
}

static int finish_recall(struct request *request)
{
	const struct compute_device *device = request->space->device.compute;
	const struct sequence *sequence = request->sequence;
	struct evict *evict = request->evict;
	const struct meta_place *places = (const struct meta_place *)(void *)(device->lane->buffers[CUDA_READBACK].at +
									      device->lane->eviction.counted);
	int r;

	cuda_take_counts(request);
	r = recall_open(sequence, evict->length, evict->recall);
	for (uint32_t row = 0; r >= 0 && row < request->space->rows; row++) {
		put_row(request, row, places);
		places += (evict->length[row] + KVG_BLOCK_TOKENS - 1) / KVG_BLOCK_TOKENS * KVG_BLOCK_TOKENS;
	}
	if (r >= 0)
		r = recall_decide(sequence, evict->recall);
	if (r < 0)
		return r;
	evict_count(sequence, evict);
	recall_count(sequence, evict);
	return 0;
}

/* What is known of all pairs goes to the host, behind the counts; the blocks' ids come from there before. */
static CUresult fetch_pairs(const struct request *request, uint64_t blocks)
{
	struct compute_device *device = request->space->device.compute;
	const struct kvg_cuda_driver *driver = device->cuda->driver;
	const struct kvg_cuda_area area = cuda_area(request->space);
	uint8_t *host = device->lane->buffers[CUDA_READBACK].at + device->lane->eviction.counted;
	uint8_t *ids = cuda_buffer_at(device, CUDA_INPUT)->at, *pairs = cuda_buffer_at(device, CUDA_SCORES)->at;
	size_t size = blocks * KVG_BLOCK_TOKENS * sizeof(struct meta_place);
	CUresult result;

	list_blocks(request, (uint32_t *)(void *)host);
	result =
		driver->cuMemcpyHtoDAsync((CUdeviceptr)(uintptr_t)ids, host, blocks * sizeof(uint32_t), device->stream);
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_tier_pairs_gather(device->kernels->tier, &area, (const uint32_t *)(void *)ids,
			(uint32_t)blocks, (struct kvg_cuda_pair *)(void *)pairs, 0, device->stream);
	return result == CUDA_SUCCESS
		       ? driver->cuMemcpyDtoHAsync(host, (CUdeviceptr)(uintptr_t)pairs, size, device->stream)
		       : result;
}

int cuda_recall(struct request *request)
{
	struct compute_device *device = request->space->device.compute;
	size_t counts;
	uint64_t blocks;
	int r = cuda_survey(request, &counts);

	if (r < 0)
		return r;
	blocks = count_blocks(request);
	if (!cuda_buffer(device, CUDA_READBACK, counts + blocks * KVG_BLOCK_TOKENS * sizeof(struct meta_place)) ||
		!cuda_buffer(device, CUDA_INPUT, blocks * sizeof(uint32_t)) ||
		!cuda_buffer(device, CUDA_SCORES, blocks * KVG_BLOCK_TOKENS * sizeof(struct meta_place)))
		return -ENOMEM;
	request->finish = finish_recall;
	r = cuda_status(device, cuda_count(request), "a recall's counts");
	if (r >= 0 && blocks)
		r = cuda_status(device, fetch_pairs(request, blocks), "a recall's pairs");
	return r;
}

/* ---- UNPACK ---- */

/* The pair goes behind those that its row holds already. */
static struct kvg_cuda_return place_pair(const struct sequence *sequence, struct recall *recall, uint64_t from)
{
	const struct meta_part *part = &sequence->space->part;
	uint32_t row = retain_entry(sequence->retain, from)->row;
	uint32_t index = meta_rows(part, sequence->slot)[row].held_len + recall->seen[row]++;

	return (struct kvg_cuda_return){.from = spot_of(sequence->retain, from),
		.id = meta_held(part, sequence->slot, row)[index / KVG_BLOCK_TOKENS],
		.place = index % KVG_BLOCK_TOKENS};
}

static CUresult enqueue_return(const struct cuda_transfer *transfer, struct cuda_window *window, uint32_t n)
{
	const struct cuda_link *link = transfer->link;
	const struct kvg_cuda_area area = cuda_area(transfer->request->space);
	const struct kvg_cuda_packed store = packed_store(transfer->request->sequence->retain);
	CUresult result = cuda_window_send(link, window, n * sizeof(struct kvg_cuda_return), link->kernels);

	if (result == CUDA_SUCCESS)
		result = kvg_cuda_tier_return(link->tier, &area, &store,
			(const struct kvg_cuda_return *)(uintptr_t)window->there, n, TRANSFER_GRID, link->kernels);
	return result == CUDA_SUCCESS ? cuda_window_end(link, window, link->kernels) : result;
}

static int next_returned(struct cuda_transfer *transfer, struct cuda_window *window)
{
	const struct sequence *sequence = transfer->request->sequence;
	struct recall *recall = transfer->request->evict->recall;
	struct kvg_cuda_return *pairs = (struct kvg_cuda_return *)(void *)window->upload;
	uint32_t most = window_pairs(&sequence->retain->form), n = 0;
	int r;

	while (n < most && transfer->done < transfer->total)
		pairs[n++] = place_pair(sequence, recall, recall->chosen[transfer->done++]);
	if (!n)
		return 0;
	r = cuda_link_status(transfer->link, enqueue_return(transfer, window, n), "pairs that come back");
	return r < 0 ? r : 1;
}

static int finish_returned(struct cuda_transfer *transfer)
{
	const struct recall *recall = transfer->request->evict->recall;

	retain_remove(transfer->request->sequence->retain, recall->chosen, recall->chosen_count);
	return 0;
}

int cuda_unpack(struct request *request)
{
	struct cuda_transfer *transfer;
	int r = cuda_transfer_start(request, next_returned, &transfer);

	if (r < 0)
		return r;
	transfer->finish = finish_returned;
	transfer->total = request->evict->recall->chosen_count;
	return 0;
}
