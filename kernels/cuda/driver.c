#include "kernels/cuda/driver.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define TEXT_OF(name)   #name
#define SYMBOL_OF(name) TEXT_OF(name) /* after cuda.h's macros */

struct symbol {
	const char *name;
	size_t offset;
};

#define KVG_CUDA_SYMBOL(name) {SYMBOL_OF(name), offsetof(struct kvg_cuda_driver, name)},
static const struct symbol symbols[] = {KVG_CUDA_FUNCTIONS(KVG_CUDA_SYMBOL)};
#undef KVG_CUDA_SYMBOL

static int find_symbols(void *library, struct kvg_cuda_driver *driver, char *text, size_t text_size)
{
	for (size_t i = 0; i < sizeof(symbols) / sizeof(*symbols); i++) {
		void *symbol = dlsym(library, symbols[i].name);

		if (!symbol) {
			(void)snprintf(text, text_size, "libcuda.so.1 is too old: it has no %s", symbols[i].name);
			return -ENOSYS;
		}
		*(void **)(void *)((char *)driver + symbols[i].offset) = symbol;
	}
	return 0;
}

static int start(struct kvg_cuda_driver *driver, char *text, size_t text_size)
{
	CUresult result = driver->cuInit(0);
	int count = 0;

	if (result == CUDA_SUCCESS)
		result = driver->cuDeviceGetCount(&count);
	if (result == CUDA_SUCCESS)
		result = driver->cuDriverGetVersion(&driver->version);
	if (result == CUDA_SUCCESS && count > 0)
		return 0;
	(void)snprintf(text, text_size, "libcuda.so.1: %s",
		result == CUDA_SUCCESS ? "there is no GPU" : kvg_cuda_error(driver, result));
	return -ENODEV;
}

int kvg_cuda_driver_load(struct kvg_cuda_driver **ret, char *text, size_t text_size)
{
	void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
	struct kvg_cuda_driver *driver;
	int r;

	if (!library) {
		(void)snprintf(text, text_size, "libcuda.so.1 cannot be loaded: %s", dlerror());
		return -ENODEV;
	}
	driver = calloc(1, sizeof(*driver));
	if (!driver) {
		(void)snprintf(text, text_size, "libcuda.so.1: out of memory");
		return -ENOMEM;
	}
	r = find_symbols(library, driver, text, text_size);
	if (r == 0)
		r = start(driver, text, text_size);
	if (r < 0)
		free(driver);
	else
		*ret = driver;
	return r;
}

const char *kvg_cuda_error(const struct kvg_cuda_driver *driver, CUresult result)
{
	const char *name = NULL;

	if (driver->cuGetErrorName(result, &name) != CUDA_SUCCESS || !name)
		return "an unknown CUDA error";
	return name;
}

bool kvg_cuda_is_sticky(CUresult result)
{
	switch (result) {
	case CUDA_ERROR_ILLEGAL_ADDRESS:
	case CUDA_ERROR_LAUNCH_TIMEOUT:
	case CUDA_ERROR_ASSERT:
	case CUDA_ERROR_HARDWARE_STACK_ERROR:
	case CUDA_ERROR_ILLEGAL_INSTRUCTION:
	case CUDA_ERROR_MISALIGNED_ADDRESS:
	case CUDA_ERROR_INVALID_ADDRESS_SPACE:
	case CUDA_ERROR_INVALID_PC:
	case CUDA_ERROR_LAUNCH_FAILED:
	case CUDA_ERROR_ECC_UNCORRECTABLE:
	case CUDA_ERROR_NVLINK_UNCORRECTABLE:
	case CUDA_ERROR_EXTERNAL_DEVICE:
	case CUDA_ERROR_MPS_CLIENT_TERMINATED:
	case CUDA_ERROR_MPS_RPC_FAILURE:
	case CUDA_ERROR_MPS_SERVER_NOT_READY:
	case CUDA_ERROR_CONTEXT_IS_DESTROYED:
	case CUDA_ERROR_CONTAINED:
	case CUDA_ERROR_DEVICE_UNAVAILABLE:
	case CUDA_ERROR_TENSOR_MEMORY_LEAK:
	case CUDA_ERROR_UNKNOWN:
		return true;
	default:
		return false;
	}
}

int kvg_cuda_errno(CUresult result)
{
	switch (result) {
	case CUDA_SUCCESS:
		return 0;
	case CUDA_ERROR_OUT_OF_MEMORY:
		return -ENOMEM;
	case CUDA_ERROR_INVALID_VALUE:
	case CUDA_ERROR_INVALID_CONTEXT:
		return -EINVAL;
	case CUDA_ERROR_MAP_FAILED:
	case CUDA_ERROR_INVALID_HANDLE:
		return -ESTALE;
	case CUDA_ERROR_NOT_READY:
		return -EBUSY;
	default:
		return -EIO;
	}
}
