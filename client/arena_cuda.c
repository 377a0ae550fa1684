/* Extents of the cuda kind: memory imported from descriptors, mapped at device addresses. */
#include "client/cuda.h"

#include <unistd.h>

/* Some drivers know no memory that can only be read. */
static CUresult set_access(const struct kvg_cuda *cuda, uint64_t address, uint64_t size, bool writable)
{
	CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = cuda->device},
		.flags = writable ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ};
	CUresult result = cuda->driver->cuMemSetAccess(address, size, &access, 1);

	if (result != CUDA_ERROR_NOT_SUPPORTED && result != CUDA_ERROR_INVALID_VALUE)
		return result;
	access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
	return cuda->driver->cuMemSetAccess(address, size, &access, 1);
}

CUresult cuda_map(const struct kvg_cuda *cuda, uint64_t address, uint64_t size, int fd, bool writable)
{
	const struct kvg_cuda_driver *driver = cuda->driver;
	CUmemGenericAllocationHandle handle;
	CUresult result = driver->cuMemImportFromShareableHandle(
		&handle, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);

	if (result != CUDA_SUCCESS)
		return result;
	result = driver->cuMemMap(address, size, 0, handle, 0);
	if (result == CUDA_SUCCESS) {
		result = set_access(cuda, address, size, writable);
		if (result != CUDA_SUCCESS)
			(void)driver->cuMemUnmap(address, size);
	}
	/* The mapping keeps the memory. */
	(void)driver->cuMemRelease(handle);
	return result;
}

static int status(struct arena *arena, CUresult result)
{
	if (result != CUDA_SUCCESS)
		arena->why = kvg_cuda_error(arena->cuda->driver, result);
	return kvg_cuda_errno(result);
}

static int reserve(struct arena *arena, size_t size)
{
	CUdeviceptr base = 0;

	CUDA_SCOPE(arena->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result = arena->cuda->driver->cuMemAddressReserve(&base, size, 0, 0, 0);
	if (scope.result == CUDA_SUCCESS)
		arena->base = (uint8_t *)(uintptr_t)base;
	return status(arena, scope.result);
}

static int map(struct arena *arena, uint32_t slot, int fd)
{
	CUDA_SCOPE(arena->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result = cuda_map(arena->cuda, (uintptr_t)arena_slot(arena, slot), arena->extent_size, fd, true);
	return status(arena, scope.result);
}

/* What is mapped as one must be unmapped as one. */
static int unmap(struct arena *arena, uint32_t slot, uint32_t count)
{
	CUDA_SCOPE(arena->cuda);
	for (uint32_t i = slot; i < slot + count && scope.result == CUDA_SUCCESS; i++)
		scope.result = arena->cuda->driver->cuMemUnmap((uintptr_t)arena_slot(arena, i), arena->extent_size);
	return status(arena, scope.result);
}

static void release(struct arena *arena, size_t size)
{
	CUDA_SCOPE(arena->cuda);
	for (uint32_t i = 0; i < arena->slots; i++)
		if (arena->mapped[i])
			(void)arena->cuda->driver->cuMemUnmap((uintptr_t)arena_slot(arena, i), arena->extent_size);
	(void)arena->cuda->driver->cuMemAddressFree((uintptr_t)arena->base, size);
}

const struct arena_ops arena_cuda = {.reserve = reserve, .release = release, .map = map, .unmap = unmap};
