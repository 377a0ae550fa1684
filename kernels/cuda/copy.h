/*
 * copy.h - blocks between their places and contiguous memory, on the device and between device and host.
 *
 * Blocks of a few KiB cross PCIe slowly one by one. So a kernel packs many of them into staging in device memory,
 * and one copy takes them over; two stagings take turns so that the kernel and the copy engine work side by side.
 * Packed form: for each block its K half (16 * k_bytes), then its V half (16 * v_bytes).
 */
#ifndef KVG_CUDA_COPY_H
#define KVG_CUDA_COPY_H

#include "kernels/cuda/device.h"
#include "kernels/cuda/evict_types.h"

struct kvg_cuda_copy;

/* The kernels on this device; cuda is borrowed. Immutable afterwards. NULL with *ret_result set on failure. */
struct kvg_cuda_copy *kvg_cuda_copy_new(const struct kvg_cuda *cuda, CUresult *ret_result);
struct kvg_cuda_copy *kvg_cuda_copy_free(struct kvg_cuda_copy *copy);

/*
 * Blocks ids[0 .. count) (device) to packed (device, or host memory mapped for the device, aligned to 16). grid: at
 * most so many blocks of threads, which leaves multiprocessors to others; 0: as many as there is work for.
 */
CUresult kvg_cuda_copy_gather(const struct kvg_cuda_copy *copy, const struct kvg_cuda_area *area, const uint32_t *ids,
	uint32_t count, uint8_t *packed, uint32_t grid, CUstream stream);

/* The way back. No id twice. */
CUresult kvg_cuda_copy_scatter(const struct kvg_cuda_copy *copy, const struct kvg_cuda_area *area, const uint32_t *ids,
	uint32_t count, const uint8_t *packed, uint32_t grid, CUstream stream);

/* Zeroes device memory. */
CUresult kvg_cuda_copy_scrub(const struct kvg_cuda_copy *copy, CUdeviceptr at, size_t size, CUstream stream);

/*
 * Transfers between blocks and pinned host memory. A pipe owns two stagings of staging_size bytes, a second stream and
 * events; it serves one caller at a time, whose calls are on one stream or ordered otherwise. staging_size 0: a size
 * that measured well.
 */
struct kvg_cuda_copy_pipe;
struct kvg_cuda_copy_pipe *kvg_cuda_copy_pipe_new(
	const struct kvg_cuda_copy *copy, size_t staging_size, CUresult *ret_result);

/* Nothing of it may be in flight. NULL is fine; returns NULL. */
struct kvg_cuda_copy_pipe *kvg_cuda_copy_pipe_free(struct kvg_cuda_copy_pipe *pipe);

/*
 * Enqueues the transfer of blocks ids[0 .. count) (device) to or from host (pinned, packed form). It starts after what
 * is on `stream` already, and later work on `stream` comes after it.
 */
CUresult kvg_cuda_copy_to_host(struct kvg_cuda_copy_pipe *pipe, const struct kvg_cuda_area *area, const uint32_t *ids,
	uint32_t count, void *host, CUstream stream);
CUresult kvg_cuda_copy_from_host(struct kvg_cuda_copy_pipe *pipe, const struct kvg_cuda_area *area, const uint32_t *ids,
	uint32_t count, const void *host, CUstream stream);

#endif
