/*
 * cuda.h - the cuda kind, for code that calls the driver itself: what came of its calls is told here, so
 * that the daemon learns of a lost device whoever meets it first.
 *
 * Some errors (an illegal address, an ECC error, the death of the MPS server) end a process's use of the GPU:
 * every later call fails, and what lay in its memory cannot be reached by this process any more. The first of them
 * is kept, and makes the kind's failure_fd() readable.
 */
#ifndef KVG_KIND_CUDA_H
#define KVG_KIND_CUDA_H

#include "daemon/memory/kind.h"
#include "kernels/cuda/device.h"

/*
 * Takes note of what a driver call, named by a static string, returned. Each failure is logged once a minute at
 * most; CUDA_ERROR_NOT_READY is none. The device is lost when the kind's own stream says so too. Any thread.
 */
void kind_cuda_check(struct kind *kind, CUresult result, const char *what);

/* The error that lost the device, or CUDA_SUCCESS. Any thread. */
CUresult kind_cuda_failed(struct kind *kind);

#endif
