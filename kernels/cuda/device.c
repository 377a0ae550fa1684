#include "kernels/cuda/device.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static CUresult attribute(const struct kvg_cuda *cuda, CUdevice_attribute what, int *ret)
{
	return cuda->driver->cuDeviceGetAttribute(ret, what, cuda->device);
}

static CUresult read_granularity(struct kvg_cuda *cuda)
{
	const CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
		.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
		.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = cuda->device}};

	return cuda->driver->cuMemGetAllocationGranularity(&cuda->granularity, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
}

static CUresult read_properties(struct kvg_cuda *cuda)
{
	const struct kvg_cuda_driver *driver = cuda->driver;
	int major = 0, minor = 0;
	size_t total = 0;
	CUuuid uuid;
	CUresult result = attribute(cuda, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &major);

	if (result == CUDA_SUCCESS)
		result = attribute(cuda, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &minor);
	if (result == CUDA_SUCCESS)
		result = attribute(cuda, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &cuda->sm_count);
	if (result == CUDA_SUCCESS)
		result = attribute(cuda, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &cuda->shared_optin);
	if (result == CUDA_SUCCESS)
		result = driver->cuDeviceTotalMem(&total, cuda->device);
	if (result == CUDA_SUCCESS)
		result = driver->cuDeviceGetUuid(&uuid, cuda->device);
	if (result == CUDA_SUCCESS)
		result = driver->cuDeviceGetName(cuda->name, sizeof(cuda->name), cuda->device);
	if (result == CUDA_SUCCESS)
		result = driver->cuDeviceGetPCIBusId(cuda->bus_id, sizeof(cuda->bus_id), cuda->device);
	if (result != CUDA_SUCCESS)
		return result;
	cuda->capability = major * 10 + minor;
	cuda->total_memory = total;
	memcpy(cuda->uuid, uuid.bytes, sizeof(cuda->uuid));
	return read_granularity(cuda);
}

static int check_features(const struct kvg_cuda *cuda, char *text, size_t text_size)
{
	int descriptors = 0;

	if (attribute(cuda, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, &descriptors) ==
			CUDA_SUCCESS &&
		descriptors && cuda->capability >= 80)
		return 0;
	(void)snprintf(text, text_size,
		"%s: compute capability %d.%d, memory as descriptors: %s; needed are 8.0 and yes", cuda->name,
		cuda->capability / 10, cuda->capability % 10, descriptors ? "yes" : "no");
	return -EOPNOTSUPP;
}

static int open_device(struct kvg_cuda *cuda, int ordinal, char *text, size_t text_size)
{
	const struct kvg_cuda_driver *driver = cuda->driver;
	CUresult result = driver->cuDeviceGet(&cuda->device, ordinal);

	if (result == CUDA_SUCCESS)
		result = driver->cuDevicePrimaryCtxRetain(&cuda->context, cuda->device);
	if (result == CUDA_SUCCESS)
		result = driver->cuCtxSetCurrent(cuda->context);
	if (result == CUDA_SUCCESS)
		result = read_properties(cuda);
	if (result == CUDA_SUCCESS)
		return check_features(cuda, text, text_size);
	(void)snprintf(text, text_size, "GPU %d: %s", ordinal, kvg_cuda_error(driver, result));
	return -ENODEV;
}

static struct kvg_cuda *cuda_new(char *text, size_t text_size, int *ret_status)
{
	struct kvg_cuda *cuda = calloc(1, sizeof(*cuda));

	*ret_status = -ENOMEM;
	if (cuda)
		*ret_status = kvg_cuda_driver_load(&cuda->driver, text, text_size);
	if (*ret_status == 0)
		return cuda;
	free(cuda);
	return NULL;
}

int kvg_cuda_open(int ordinal, struct kvg_cuda **ret, char *text, size_t text_size)
{
	int r;
	struct kvg_cuda *cuda = cuda_new(text, text_size, &r);

	if (!cuda)
		return r;
	r = open_device(cuda, ordinal, text, text_size);
	if (r < 0)
		(void)kvg_cuda_close(cuda);
	else
		*ret = cuda;
	return r;
}

/* The ordinal of the device with that UUID, or -1. */
static int find_uuid(const struct kvg_cuda_driver *driver, const uint8_t uuid[16])
{
	int count = 0;

	if (driver->cuDeviceGetCount(&count) != CUDA_SUCCESS)
		return -1;
	for (int i = 0; i < count; i++) {
		CUdevice device;
		CUuuid found;

		if (driver->cuDeviceGet(&device, i) == CUDA_SUCCESS &&
			driver->cuDeviceGetUuid(&found, device) == CUDA_SUCCESS && memcmp(found.bytes, uuid, 16) == 0)
			return i;
	}
	return -1;
}

int kvg_cuda_open_uuid(const uint8_t uuid[16], struct kvg_cuda **ret, char *text, size_t text_size)
{
	int r, ordinal;
	struct kvg_cuda *cuda = cuda_new(text, text_size, &r);

	if (!cuda)
		return r;
	ordinal = find_uuid(cuda->driver, uuid);
	if (ordinal < 0) {
		(void)snprintf(text, text_size,
			"the daemon's GPU (UUID %02x%02x%02x%02x-...) is not among this process's; see "
			"CUDA_VISIBLE_DEVICES",
			uuid[0], uuid[1], uuid[2], uuid[3]);
		r = -ENODEV;
	} else {
		r = open_device(cuda, ordinal, text, text_size);
	}
	if (r < 0)
		(void)kvg_cuda_close(cuda);
	else
		*ret = cuda;
	return r;
}

struct kvg_cuda *kvg_cuda_close(struct kvg_cuda *cuda)
{
	if (!cuda)
		return NULL;
	if (cuda->context)
		(void)cuda->driver->cuDevicePrimaryCtxRelease(cuda->device);
	free(cuda->driver);
	free(cuda);
	return NULL;
}

CUresult kvg_cuda_enter(const struct kvg_cuda *cuda)
{
	return cuda->driver->cuCtxSetCurrent(cuda->context);
}

CUresult kvg_cuda_module_load(const struct kvg_cuda *cuda, const void *image, const char *const *names, size_t count,
	CUmodule *ret_module, CUfunction *ret_functions)
{
	const struct kvg_cuda_driver *driver = cuda->driver;
	CUmodule module;
	CUresult result = driver->cuModuleLoadData(&module, image);

	if (result != CUDA_SUCCESS)
		return result;
	for (size_t i = 0; i < count && result == CUDA_SUCCESS; i++)
		result = driver->cuModuleGetFunction(&ret_functions[i], module, names[i]);
	if (result != CUDA_SUCCESS)
		(void)driver->cuModuleUnload(module);
	else
		*ret_module = module;
	return result;
}

CUresult kvg_cuda_launch(const struct kvg_cuda *cuda, CUfunction function, unsigned grid, unsigned block,
	unsigned shared, CUstream stream, void **arguments)
{
	return cuda->driver->cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared, stream, arguments, NULL);
}
