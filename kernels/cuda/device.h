/*
 * device.h - one GPU in one process: the driver, the primary context, and what kernels ask of the hardware.
 *
 * Every function that calls the driver needs the context to be current in its thread
 * (kvg_cuda_enter()). Launchers of kernels/cuda return CUresult: what they enqueue runs in the
 * order of the stream, and pointers named "device" must be readable there.
 */
#ifndef KVG_CUDA_DEVICE_H
#define KVG_CUDA_DEVICE_H

#include <stdint.h>

#include "kernels/cuda/driver.h"

struct kvg_cuda {
	struct kvg_cuda_driver *driver; /* owned */
	CUdevice device;
	CUcontext context; /* the device's primary one, retained */
	int capability;    /* 90 for compute capability 9.0 */
	int sm_count;
	int shared_optin;   /* bytes of shared memory that a block may ask for */
	size_t granularity; /* of cuMemCreate */
	uint64_t total_memory;
	uint8_t uuid[16];
	char name[64];
	char bus_id[32];
};

/*
 * Opens the device with that ordinal and makes its primary context current in this thread. 0 or a negative errno
 * with one line of text (a device that lacks what kvgate needs, memory that cannot be exported as a
 * descriptor, is -EOPNOTSUPP).
 */
int kvg_cuda_open(int ordinal, struct kvg_cuda **ret, char *text, size_t text_size);

/* The same for the device with that UUID, in the calling process's numbering. */
int kvg_cuda_open_uuid(const uint8_t uuid[16], struct kvg_cuda **ret, char *text, size_t text_size);

/* Releases the context. NULL is fine; returns NULL. */
struct kvg_cuda *kvg_cuda_close(struct kvg_cuda *cuda);

/* Makes the context current in the calling thread. */
CUresult kvg_cuda_enter(const struct kvg_cuda *cuda);

/*
 * Loads an image of device code and finds `count` kernels of it by name. On failure *ret_module is untouched
 * and functions are undefined. An image without code for this device is CUDA_ERROR_NO_BINARY_FOR_GPU.
 */
CUresult kvg_cuda_module_load(const struct kvg_cuda *cuda, const void *image, const char *const *names, size_t count,
	CUmodule *ret_module, CUfunction *ret_functions);

/* A launch of a one-dimensional grid; arguments as for cuLaunchKernel. */
CUresult kvg_cuda_launch(const struct kvg_cuda *cuda, CUfunction function, unsigned grid, unsigned block,
	unsigned shared, CUstream stream, void **arguments);

#endif
