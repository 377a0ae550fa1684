/* Images of sequences and contexts: from blocks to the host tier and back. */
#include <errno.h>

#include "daemon/sequence/cuda_transfer.h"
#include "daemon/sequence/image.h"

#define IDS_MAX 32768u /* of one window */

/* Memory of a frame, or of neighbours that are pinned together, that lies together in a window's staging. */
struct segment {
	uint8_t *host;
	size_t offset, size;
};

#define SEGMENTS 16u

/* What one window takes over: blocks in packed form, or what is known of their pairs. */
struct cargo {
	bool pairs;
	uint32_t count;
	struct segment segments[SEGMENTS];
	uint32_t segment_count;
};

/* Places in the image for so many units; false when they are more than segments. */
static bool place_units(struct image *image, uint32_t unit, uint32_t count, struct cargo *cargo)
{
	struct segment *last = NULL;

	for (uint32_t i = 0, n; i < count; i += n) {
		uint32_t before = image->cursor.frame;
		uint8_t *at = host_cursor_take_some(&image->cursor, unit, count - i, &n);

		if (!at)
			return false;
		if (last && last->host + last->size == at &&
			host_tier_is_together(image->tier, before, image->cursor.frame)) {
			last->size += (size_t)n * unit;
			continue;
		}
		if (cargo->segment_count == SEGMENTS)
			return false;
		last = &cargo->segments[cargo->segment_count++];
		*last = (struct segment){.host = at, .offset = (size_t)i * unit, .size = (size_t)n * unit};
	}
	return true;
}

/* Blocks come first, then their pairs, from the first block on again. 1, 0 when all are through, or -EIO. */
static int load_cargo(struct image *image, uint32_t *ids, struct cargo *cargo)
{
	const struct image_shape shape =
		image_shape(&image->arena->layout.groups[0], host_tier_frame_size(image->tier));
	uint32_t unit, most = IDS_MAX;

	*cargo = (struct cargo){.pairs = image->copied == image->blocks};
	if (image_is_complete(image))
		return 0;
	if (!image->begun_ns)
		image->begun_ns = loop_now();
	unit = cargo->pairs ? IMAGE_PLACES : shape.unit;
	if (shape.units != 1) /* no frame is that small here */
		return -EIO;
	if (most > TRANSFER_BYTES / unit)
		most = (uint32_t)(TRANSFER_BYTES / unit);
	cargo->count = image_walk_next(image, ids, most);
	if (!cargo->count)
		return -EIO;
	if (!place_units(image, unit, cargo->count, cargo))
		return -EIO;
	if (cargo->pairs) {
		image->placed += cargo->count;
		return 1;
	}
	image->copied += cargo->count;
	if (image->copied == image->blocks) {
		image_walk_init(&image->walk);
		image_seek_places(&image->cursor);
	}
	return 1;
}

static CUresult run_kernel(
	const struct cuda_transfer *transfer, const struct cuda_window *window, const struct cargo *cargo, bool load)
{
	const struct cuda_link *link = transfer->link;
	const struct kvg_cuda_area area = cuda_area(transfer->request->space);
	const uint32_t *ids = (const uint32_t *)(uintptr_t)window->there;
	uint8_t *staging = (uint8_t *)(uintptr_t)window->staging;
	struct kvg_cuda_pair *pairs = (struct kvg_cuda_pair *)(void *)staging;

	if (cargo->pairs && load)
		return kvg_cuda_tier_pairs_scatter(
			link->tier, &area, ids, cargo->count, pairs, TRANSFER_GRID, link->kernels);
	if (cargo->pairs)
		return kvg_cuda_tier_pairs_gather(
			link->tier, &area, ids, cargo->count, pairs, TRANSFER_GRID, link->kernels);
	if (load)
		return kvg_cuda_copy_scatter(
			link->copy, &area, ids, cargo->count, staging, TRANSFER_GRID, link->kernels);
	return kvg_cuda_copy_gather(link->copy, &area, ids, cargo->count, staging, TRANSFER_GRID, link->kernels);
}

static CUresult cross(
	const struct cuda_link *link, const struct cuda_window *window, const struct cargo *cargo, bool load)
{
	const struct kvg_cuda_driver *driver = link->cuda->driver;
	CUstream lane = cuda_window_lane(link, window, load);
	CUresult result = CUDA_SUCCESS;

	for (uint32_t i = 0; result == CUDA_SUCCESS && i < cargo->segment_count; i++) {
		const struct segment *segment = &cargo->segments[i];
		CUdeviceptr staging = window->staging + segment->offset;

		result = load ? driver->cuMemcpyHtoDAsync(staging, segment->host, segment->size, lane)
			      : driver->cuMemcpyDtoHAsync(segment->host, staging, segment->size, lane);
	}
	return result;
}

/* What is on `before` comes before what comes on `after` from now on. */
static CUresult order(const struct cuda_link *link, const struct cuda_window *window, CUstream before, CUstream after)
{
	const struct kvg_cuda_driver *driver = link->cuda->driver;
	CUresult result = driver->cuEventRecord(window->ready, before);

	return result == CUDA_SUCCESS ? driver->cuStreamWaitEvent(after, window->ready, 0) : result;
}

static CUresult enqueue(struct cuda_transfer *transfer, struct cuda_window *window, const struct cargo *cargo)
{
	const struct cuda_link *link = transfer->link;
	bool load = transfer->request->image->load;
	CUstream lane = cuda_window_lane(link, window, load);
	CUresult result;

	/* Ids that come in go ahead of the bytes that they belong to, or they queue up behind those of later windows.
	 */
	result = cuda_window_send(link, window, cargo->count * sizeof(uint32_t), load ? lane : link->kernels);
	if (result != CUDA_SUCCESS)
		return result;
	if (load) {
		result = cross(link, window, cargo, load);
		if (result == CUDA_SUCCESS)
			result = order(link, window, lane, link->kernels);
		if (result == CUDA_SUCCESS)
			result = run_kernel(transfer, window, cargo, load);
		return result == CUDA_SUCCESS ? cuda_window_end(link, window, link->kernels) : result;
	}
	result = run_kernel(transfer, window, cargo, load);
	if (result == CUDA_SUCCESS)
		result = order(link, window, link->kernels, lane);
	if (result == CUDA_SUCCESS)
		result = cross(link, window, cargo, load);
	return result == CUDA_SUCCESS ? cuda_window_end(link, window, lane) : result;
}

static int next_window(struct cuda_transfer *transfer, struct cuda_window *window)
{
	struct request *request = transfer->request;
	struct cargo cargo;
	int r = load_cargo(request->image, (uint32_t *)(void *)window->upload, &cargo);

	if (r <= 0)
		return r;
	r = cuda_link_status(transfer->link, enqueue(transfer, window, &cargo), "a transfer of blocks");
	return r < 0 ? r : 1;
}

int cuda_copy_image(struct request *request)
{
	struct cuda_transfer *transfer;

	return cuda_transfer_start(request, next_window, &transfer);
}
