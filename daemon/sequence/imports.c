#include "daemon/sequence/imports.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

int import_check_part(uint64_t offset, uint64_t size, uint64_t length, char *text, size_t text_size)
{
	if (!size || offset > length || size > length - offset)
		(void)snprintf(text, text_size, "import: %" PRIu64 " bytes at %" PRIu64 " of an allocation of %" PRIu64,
			size, offset, length);
	else if (offset % IMPORT_ALIGN)
		(void)snprintf(
			text, text_size, "import: offset %" PRIu64 " is not a multiple of %u", offset, IMPORT_ALIGN);
	else
		return 0;
	return -EINVAL;
}

#ifdef KVG_HAS_CUDA
#include "kernels/cuda/device.h"

_Static_assert(sizeof(CUipcMemHandle) == IMPORT_HANDLE && sizeof(CUipcEventHandle) == IMPORT_HANDLE, "handles");

/* A wrong handle is the worker's mistake, whatever the driver calls it. */
static int open_failed(const struct kvg_cuda *cuda, const char *what, CUresult result, char *text, size_t text_size)
{
	const char *name = kvg_cuda_error(cuda->driver, result);

	switch (result) {
	case CUDA_ERROR_INVALID_VALUE:
	case CUDA_ERROR_INVALID_HANDLE:
	case CUDA_ERROR_INVALID_CONTEXT:
	case CUDA_ERROR_MAP_FAILED:
	case CUDA_ERROR_ALREADY_MAPPED:
	case CUDA_ERROR_INVALID_DEVICE:
		(void)snprintf(text, text_size, "import: the %s handle is stale, foreign, or of this very process (%s)",
			what, name);
		return -EINVAL;
	default:
		(void)snprintf(text, text_size, "import: the %s handle cannot be opened: %s", what, name);
		return kvg_cuda_errno(result);
	}
}

/* The part that the worker named must lie inside the allocation. */
static int check_part(
	const struct kvg_cuda *cuda, CUdeviceptr base, uint64_t offset, uint64_t size, char *text, size_t text_size)
{
	CUdeviceptr start = 0;
	size_t length = 0;
	CUresult result = cuda->driver->cuMemGetAddressRange(&start, &length, base);

	if (result != CUDA_SUCCESS)
		return open_failed(cuda, "memory", result, text, text_size);
	return import_check_part(offset, size, length - (base - start), text, text_size);
}

int import_open_buffer(const struct kvg_cuda *cuda, const uint8_t handle[IMPORT_HANDLE], uint64_t offset, uint64_t size,
	struct import *ret, char *text, size_t text_size)
{
	CUipcMemHandle ipc;
	CUdeviceptr base = 0;
	CUresult result;
	int r;

	memcpy(&ipc, handle, sizeof(ipc));
	result = kvg_cuda_enter(cuda);
	if (result == CUDA_SUCCESS)
		result = cuda->driver->cuIpcOpenMemHandle(&base, ipc, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
	if (result != CUDA_SUCCESS)
		return open_failed(cuda, "memory", result, text, text_size);
	r = check_part(cuda, base, offset, size, text, text_size);
	if (r < 0) {
		(void)cuda->driver->cuIpcCloseMemHandle(base);
		return r;
	}
	*ret = (struct import){.kind = IMPORT_BUFFER, .base = base, .address = base + offset, .size = size};
	return 0;
}

int import_open_event(const struct kvg_cuda *cuda, const uint8_t handle[IMPORT_HANDLE], struct import *ret, char *text,
	size_t text_size)
{
	CUipcEventHandle ipc;
	CUevent event = NULL;
	CUresult result;

	memcpy(&ipc, handle, sizeof(ipc));
	result = kvg_cuda_enter(cuda);
	if (result == CUDA_SUCCESS)
		result = cuda->driver->cuIpcOpenEventHandle(&event, ipc);
	if (result != CUDA_SUCCESS)
		return open_failed(cuda, "event", result, text, text_size);
	*ret = (struct import){.kind = IMPORT_EVENT, .event = event};
	return 0;
}

void import_close(const struct kvg_cuda *cuda, struct import *import)
{
	if (import->kind != IMPORT_NONE)
		(void)kvg_cuda_enter(cuda);
	if (import->kind == IMPORT_BUFFER)
		(void)cuda->driver->cuIpcCloseMemHandle(import->base);
	else if (import->kind == IMPORT_EVENT)
		(void)cuda->driver->cuEventDestroy(import->event);
	*import = (struct import){0};
}
#else
static int without_cuda(char *text, size_t text_size)
{
	(void)snprintf(text, text_size, "import: this daemon was built without the kind cuda");
	return -EOPNOTSUPP;
}

int import_open_buffer(const struct kvg_cuda *cuda, const uint8_t handle[IMPORT_HANDLE], uint64_t offset, uint64_t size,
	struct import *ret, char *text, size_t text_size)
{
	(void)cuda;
	(void)handle;
	(void)offset;
	(void)size;
	(void)ret;
	return without_cuda(text, text_size);
}

int import_open_event(const struct kvg_cuda *cuda, const uint8_t handle[IMPORT_HANDLE], struct import *ret, char *text,
	size_t text_size)
{
	(void)cuda;
	(void)handle;
	(void)ret;
	return without_cuda(text, text_size);
}

void import_close(const struct kvg_cuda *cuda, struct import *import)
{
	(void)cuda;
	*import = (struct import){0};
}
#endif

void imports_close(struct imports *imports, const struct kvg_cuda *cuda)
{
	for (uint32_t i = 0; i < IMPORTS_MAX; i++)
		import_close(cuda, &imports->places[i]);
	imports->count = 0;
}

uint32_t imports_add(struct imports *imports, const struct import *import)
{
	struct import *place = imports->places;

	if (imports->count == IMPORTS_MAX || imports->last_id == UINT32_MAX)
		return 0;
	while (place->kind != IMPORT_NONE)
		place++;
	if (imports->last_id < IMPORT_FIRST - 1)
		imports->last_id = IMPORT_FIRST - 1;
	*place = *import;
	place->uses = 0;
	place->id = ++imports->last_id;
	imports->count++;
	return place->id;
}

/* Of whatever kind. */
static struct import *find(struct imports *imports, uint32_t id)
{
	for (uint32_t i = 0; i < IMPORTS_MAX; i++)
		if (imports->places[i].kind != IMPORT_NONE && imports->places[i].id == id)
			return &imports->places[i];
	return NULL;
}

struct import *imports_find(struct imports *imports, uint32_t id, enum import_kind kind)
{
	struct import *import = find(imports, id);

	return import && import->kind == kind ? import : NULL;
}

void import_use(struct import *import)
{
	import->uses++;
}

void import_unuse(struct import *import)
{
	assert(import->uses > 0);
	import->uses--;
}

int imports_take(struct imports *imports, uint32_t id, struct import *ret)
{
	struct import *import = find(imports, id);

	if (!import)
		return -ENOENT;
	if (import->uses)
		return -EBUSY;
	*ret = *import;
	*import = (struct import){0};
	imports->count--;
	return 0;
}
