/* Rows of small blocks that cross PCIe: packed by a kernel, against the driver's ways of copying them one by one. */
#include <dlfcn.h>
#include <stdlib.h>

#include "kernels/cuda/copy.h"
#include "tools/bench/gpu.h"

#define BYTES       ((size_t)256 << 20) /* of one transfer */
#define RIVAL_BYTES ((size_t)16 << 20)  /* of one by a rival, whose time is scaled up */
#define ARENA_BYTES ((size_t)1 << 30)
#define PARTS       2u /* of a block: K and V lie apart */

/* cuMemcpyBatchAsync_v2 of CUDA 13. */
typedef CUresult (*batch_copy)(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, void *attributes,
	size_t *attribute_indices, size_t attribute_count, CUstream stream);

struct transfer {
	struct gpu_bench *bench;
	struct kvg_cuda_copy *kernels;
	struct kvg_cuda_copy_pipe *pipe;
	struct kvg_cuda_area area;
	CUdeviceptr ids; /* of the blocks, in random order */
	uint32_t count;
	uint8_t *host; /* pinned */
	bool to_host;
	/* the rivals' pieces */
	CUdeviceptr *device_parts, *host_parts;
	size_t *sizes;
	uint32_t part_count;
	void *library;
	batch_copy batch;
};

static CUresult copy_blocks(void *user, CUstream stream, unsigned turn)
{
	struct transfer *transfer = user;

	(void)turn;
	if (transfer->to_host)
		return kvg_cuda_copy_to_host(transfer->pipe, &transfer->area, (const uint32_t *)transfer->ids,
			transfer->count, transfer->host, stream);
	return kvg_cuda_copy_from_host(transfer->pipe, &transfer->area, (const uint32_t *)transfer->ids,
		transfer->count, transfer->host, stream);
}

static CUresult copy_one_by_one(void *user, CUstream stream, unsigned turn)
{
	const struct transfer *transfer = user;
	const struct kvg_cuda_driver *driver = transfer->bench->cuda->driver;
	CUresult result = CUDA_SUCCESS;

	(void)turn;
	for (uint32_t i = 0; result == CUDA_SUCCESS && i < transfer->part_count; i++) {
		CUdeviceptr device = transfer->device_parts[i], host = transfer->host_parts[i];

		result = driver->cuMemcpyAsync(transfer->to_host ? host : device, transfer->to_host ? device : host,
			transfer->sizes[i], stream);
	}
	return result;
}

#if CUDA_VERSION >= 13000
static CUresult copy_batched(void *user, CUstream stream, unsigned turn)
{
	struct transfer *transfer = user;
	CUmemcpyAttributes attributes = {.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM};
	size_t first = 0;

	(void)turn;
	return transfer->batch(transfer->to_host ? transfer->host_parts : transfer->device_parts,
		transfer->to_host ? transfer->device_parts : transfer->host_parts, transfer->sizes,
		transfer->part_count, &attributes, &first, 1, stream);
}

static void find_batch(struct transfer *transfer)
{
	transfer->library = dlopen("libcuda.so.1", RTLD_NOW);
	if (transfer->library)
		*(void **)&transfer->batch = dlsym(transfer->library, "cuMemcpyBatchAsync_v2");
}
#else
static CUresult copy_batched(void *user, CUstream stream, unsigned turn)
{
	(void)user;
	(void)stream;
	(void)turn;
	return CUDA_ERROR_NOT_SUPPORTED;
}

static void find_batch(struct transfer *transfer)
{
	transfer->batch = NULL;
}
#endif

/* ---- memory ---- */

/* Block ids in random order; the rivals get the first ones' addresses. */
static void shuffle(struct transfer *transfer, uint32_t *ids, uint32_t total)
{
	size_t part = transfer->area.stride;
	uint64_t state = 0x9e3779b97f4a7c15u;

	for (uint32_t i = 0; i < total; i++)
		ids[i] = i;
	for (uint32_t i = 1; i < total; i++) {
		uint32_t at, id = ids[i];

		state = state * 6364136223846793005u + 1442695040888963407u;
		at = (uint32_t)((state >> 32) * (i + 1) >> 32);
		ids[i] = ids[at];
		ids[at] = id;
	}
	for (uint32_t i = 0; i < transfer->part_count; i++) {
		uint8_t *base = i % PARTS ? transfer->area.v_base : transfer->area.k_base;

		transfer->device_parts[i] = (CUdeviceptr)base + ids[i / PARTS] * part;
		transfer->host_parts[i] = (CUdeviceptr)transfer->host + i * part;
		transfer->sizes[i] = part;
	}
}

static void upload(struct transfer *transfer)
{
	uint32_t total = transfer->area.blocks_per_extent, *ids = malloc(total * sizeof(*ids));
	const struct kvg_cuda_driver *driver = transfer->bench->cuda->driver;

	if (!ids || !transfer->device_parts || !transfer->host_parts || !transfer->sizes) {
		(void)gpu_check(transfer->bench, CUDA_ERROR_OUT_OF_MEMORY, "host memory");
	} else {
		shuffle(transfer, ids, total);
		transfer->ids = gpu_alloc(transfer->bench, transfer->count * sizeof(*ids));
		if (transfer->ids)
			(void)gpu_check(transfer->bench,
				driver->cuMemcpyHtoD(transfer->ids, ids, transfer->count * sizeof(*ids)), "ids");
	}
	free(ids);
}

/* One large extent of blocks whose K half has half_bytes, and its V half too. */
static void transfer_init(struct transfer *transfer, struct gpu_bench *bench, size_t half_bytes)
{
	uint32_t blocks = (uint32_t)(ARENA_BYTES / (PARTS * half_bytes));
	CUdeviceptr arena = gpu_random(bench, ARENA_BYTES, 1);
	CUresult result;
	void *host = NULL;

	*transfer = (struct transfer){.bench = bench,
		.count = (uint32_t)(BYTES / (PARTS * half_bytes)),
		.part_count = (uint32_t)(RIVAL_BYTES / half_bytes)};
	transfer->area = (struct kvg_cuda_area){.k_base = (uint8_t *)arena,
		.v_base = (uint8_t *)arena + ARENA_BYTES / PARTS,
		.stride = half_bytes,
		.k_bytes = (uint32_t)half_bytes / KVG_CUDA_PLACES,
		.v_bytes = (uint32_t)half_bytes / KVG_CUDA_PLACES,
		.ids_per_extent = PARTS * blocks,
		.blocks_per_extent = blocks};
	(void)gpu_check(bench, bench->cuda->driver->cuMemHostAlloc(&host, BYTES, 0), "pinned host memory");
	transfer->host = host;
	transfer->device_parts = calloc(transfer->part_count, sizeof(CUdeviceptr));
	transfer->host_parts = calloc(transfer->part_count, sizeof(CUdeviceptr));
	transfer->sizes = calloc(transfer->part_count, sizeof(size_t));
	if (!bench->failed)
		upload(transfer);
	transfer->kernels = kvg_cuda_copy_new(bench->cuda, &result);
	if (gpu_check(bench, result, "kernels of copy"))
		return;
	transfer->pipe = kvg_cuda_copy_pipe_new(transfer->kernels, 0, &result);
	(void)gpu_check(bench, result, "pipe");
	find_batch(transfer);
}

static void transfer_deinit(struct transfer *transfer)
{
	(void)kvg_cuda_copy_pipe_free(transfer->pipe);
	(void)kvg_cuda_copy_free(transfer->kernels);
	gpu_free(transfer->bench, (CUdeviceptr)transfer->area.k_base);
	gpu_free(transfer->bench, transfer->ids);
	if (transfer->host)
		(void)transfer->bench->cuda->driver->cuMemFreeHost(transfer->host);
	if (transfer->library)
		(void)dlclose(transfer->library);
	free(transfer->device_parts);
	free(transfer->host_parts);
	free(transfer->sizes);
}

/* ---- rows ---- */

static void measure(struct transfer *transfer, const char *id, const char *work, double bar)
{
	struct gpu_bench *bench = transfer->bench;
	double link = transfer->to_host ? bench->to_host_rate : bench->from_host_rate;
	const double scale = (double)BYTES / (double)RIVAL_BYTES;
	struct gpu_row row = {.id = id,
		.work = work,
		.floor_us = (double)BYTES / link * 1e6,
		.floor = "one large copy",
		.first_us = (double)BYTES / bar * 1e6};

	if (!gpu_wants(bench, id))
		return;
	row.us = gpu_time(bench, copy_blocks, transfer, false);
	row.rate = (double)BYTES / row.us * 1e6;
	row.rival = transfer->batch ? "cuMemcpyBatchAsync" : "cuMemcpyAsync for each half";
	row.rival_us = scale * gpu_time(bench, transfer->batch ? copy_batched : copy_one_by_one, transfer, false);
	if (!bench->failed)
		gpu_row(bench, &row);
}

static void measure_one_by_one(struct transfer *transfer, const char *id, const char *work)
{
	struct gpu_row row = {.id = id, .work = work};

	if (!gpu_wants(transfer->bench, id))
		return;
	row.us = gpu_time(transfer->bench, copy_one_by_one, transfer, false);
	row.rate = (double)RIVAL_BYTES / row.us * 1e6;
	if (!transfer->bench->failed)
		gpu_row(transfer->bench, &row);
}

static CUresult scrub(void *user, CUstream stream, unsigned turn)
{
	const struct transfer *transfer = user;

	(void)turn;
	return kvg_cuda_copy_scrub(transfer->kernels, (CUdeviceptr)transfer->area.k_base, ARENA_BYTES, stream);
}

static void measure_scrub(struct transfer *transfer)
{
	struct gpu_row row = {.id = "copy-scrub",
		.work = "zeroes 1 GiB",
		.floor_us = (double)ARENA_BYTES / transfer->bench->copy_rate * 1e6,
		.floor = "each byte written once"};

	if (!gpu_wants(transfer->bench, row.id))
		return;
	row.us = gpu_time(transfer->bench, scrub, transfer, false);
	row.rate = (double)ARENA_BYTES / row.us * 1e6;
	if (!transfer->bench->failed)
		gpu_row(transfer->bench, &row);
}

void gpu_bench_copy(struct gpu_bench *bench)
{
	struct transfer transfer;

	transfer_init(&transfer, bench, 2048);
	if (!bench->failed) {
		transfer.to_host = true;
		measure(&transfer, "copy-blocks-to-host-4k", "256 MiB of blocks of 4 KiB to pinned memory", 52e9);
		measure_one_by_one(&transfer, "copy-loop-to-host-4k", "16 MiB, cuMemcpyAsync for each half");
		transfer.to_host = false;
		measure(&transfer, "copy-blocks-from-host-4k", "256 MiB of blocks of 4 KiB from pinned memory", 50e9);
	}
	transfer_deinit(&transfer);
	if (bench->failed)
		return;
	transfer_init(&transfer, bench, 4096);
	if (!bench->failed) {
		transfer.to_host = true;
		measure(&transfer, "copy-blocks-to-host-8k", "256 MiB of blocks of 8 KiB to pinned memory", 52e9);
		measure_one_by_one(&transfer, "copy-loop-to-host-8k", "16 MiB, cuMemcpyAsync for each half");
		transfer.to_host = false;
		measure(&transfer, "copy-blocks-from-host-8k", "256 MiB of blocks of 8 KiB from pinned memory", 50e9);
		measure_scrub(&transfer);
	}
	transfer_deinit(&transfer);
}
