/*
 * driver.h - libcuda, loaded when the program runs, so that one binary works with and without a GPU.
 *
 * The table holds every driver function that kvgate uses, under its own name:
 * driver->cuMemCreate(...). It is loaded once and stays.
 */
#ifndef KVG_CUDA_DRIVER_H
#define KVG_CUDA_DRIVER_H

#include <cuda.h>
#include <stdbool.h>
#include <stddef.h>

/* One line for each function; cuda.h's macros give each name its version. */
#define KVG_CUDA_FUNCTIONS(X)                                                                                          \
	X(cuInit)                                                                                                      \
	X(cuDriverGetVersion)                                                                                          \
	X(cuGetErrorName)                                                                                              \
	X(cuGetErrorString)                                                                                            \
	X(cuDeviceGet)                                                                                                 \
	X(cuDeviceGetCount)                                                                                            \
	X(cuDeviceGetName)                                                                                             \
	X(cuDeviceGetUuid)                                                                                             \
	X(cuDeviceGetPCIBusId)                                                                                         \
	X(cuDeviceGetAttribute)                                                                                        \
	X(cuDeviceTotalMem)                                                                                            \
	X(cuDevicePrimaryCtxRetain)                                                                                    \
	X(cuDevicePrimaryCtxRelease)                                                                                   \
	X(cuCtxGetCurrent)                                                                                             \
	X(cuCtxSetCurrent)                                                                                             \
	X(cuCtxPushCurrent)                                                                                            \
	X(cuCtxPopCurrent)                                                                                             \
	X(cuCtxGetDevice)                                                                                              \
	X(cuCtxGetStreamPriorityRange)                                                                                 \
	X(cuCtxSynchronize)                                                                                            \
	X(cuModuleLoadData)                                                                                            \
	X(cuModuleUnload)                                                                                              \
	X(cuModuleGetFunction)                                                                                         \
	X(cuFuncSetAttribute)                                                                                          \
	X(cuFuncGetAttribute)                                                                                          \
	X(cuOccupancyMaxActiveBlocksPerMultiprocessor)                                                                 \
	X(cuOccupancyMaxActiveClusters)                                                                                \
	X(cuLaunchKernel)                                                                                              \
	X(cuLaunchKernelEx)                                                                                            \
	X(cuLaunchCooperativeKernel)                                                                                   \
	X(cuMemGetInfo)                                                                                                \
	X(cuMemAlloc)                                                                                                  \
	X(cuMemFree)                                                                                                   \
	X(cuMemHostAlloc)                                                                                              \
	X(cuMemFreeHost)                                                                                               \
	X(cuMemHostRegister)                                                                                           \
	X(cuMemHostUnregister)                                                                                         \
	X(cuMemHostGetDevicePointer)                                                                                   \
	X(cuMemcpyAsync)                                                                                               \
	X(cuMemcpyHtoD)                                                                                                \
	X(cuMemcpyDtoH)                                                                                                \
	X(cuMemcpyHtoDAsync)                                                                                           \
	X(cuMemcpyDtoHAsync)                                                                                           \
	X(cuMemcpyDtoDAsync)                                                                                           \
	X(cuMemsetD8Async)                                                                                             \
	X(cuMemsetD32Async)                                                                                            \
	X(cuMemAddressReserve)                                                                                         \
	X(cuMemAddressFree)                                                                                            \
	X(cuMemCreate)                                                                                                 \
	X(cuMemRelease)                                                                                                \
	X(cuMemMap)                                                                                                    \
	X(cuMemUnmap)                                                                                                  \
	X(cuMemSetAccess)                                                                                              \
	X(cuMemExportToShareableHandle)                                                                                \
	X(cuMemImportFromShareableHandle)                                                                              \
	X(cuMemGetAllocationGranularity)                                                                               \
	X(cuMemGetAddressRange)                                                                                        \
	X(cuPointerGetAttribute)                                                                                       \
	X(cuIpcGetMemHandle)                                                                                           \
	X(cuIpcOpenMemHandle)                                                                                          \
	X(cuIpcCloseMemHandle)                                                                                         \
	X(cuIpcGetEventHandle)                                                                                         \
	X(cuIpcOpenEventHandle)                                                                                        \
	X(cuStreamCreate)                                                                                              \
	X(cuStreamCreateWithPriority)                                                                                  \
	X(cuStreamDestroy)                                                                                             \
	X(cuStreamSynchronize)                                                                                         \
	X(cuStreamQuery)                                                                                               \
	X(cuStreamWaitEvent)                                                                                           \
	X(cuStreamWaitValue64)                                                                                         \
	X(cuStreamWriteValue64)                                                                                        \
	X(cuStreamBeginCapture)                                                                                        \
	X(cuStreamIsCapturing)                                                                                         \
	X(cuStreamEndCapture)                                                                                          \
	X(cuGraphInstantiate)                                                                                          \
	X(cuGraphLaunch)                                                                                               \
	X(cuGraphExecDestroy)                                                                                          \
	X(cuGraphDestroy)                                                                                              \
	X(cuEventCreate)                                                                                               \
	X(cuEventDestroy)                                                                                              \
	X(cuEventRecord)                                                                                               \
	X(cuEventQuery)                                                                                                \
	X(cuEventSynchronize)                                                                                          \
	X(cuEventElapsedTime)                                                                                          \
	X(cuTensorMapEncodeTiled)

struct kvg_cuda_driver {
#define KVG_CUDA_MEMBER(name) __typeof__(&name) name; /* NOLINT(bugprone-macro-parentheses): a declaration */
	KVG_CUDA_FUNCTIONS(KVG_CUDA_MEMBER)
#undef KVG_CUDA_MEMBER
	int version; /* 13000 for 13.0 */
};

/*
 * Loads libcuda.so.1 and initialises it. 0; or -ENODEV (no library, no device) or -ENOSYS (too old: the
 * function that lacks is named) with one line of text. Loads anew with each call; the table is the caller's to
 * free(), the library stays loaded.
 */
int kvg_cuda_driver_load(struct kvg_cuda_driver **ret, char *text, size_t text_size);

/* "CUDA_ERROR_INVALID_VALUE: invalid argument". Never NULL; a static string of the driver or of ours. */
const char *kvg_cuda_error(const struct kvg_cuda_driver *driver, CUresult result);

/* Whether the context is lost with this error: every later call fails, and only a new process helps. */
bool kvg_cuda_is_sticky(CUresult result);

/* 0 or the errno that fits best: -ENOMEM, -EINVAL, -EBUSY, -ESTALE (a handle of memory that is gone), -EIO. */
int kvg_cuda_errno(CUresult result);

#endif
