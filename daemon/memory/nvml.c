#include "daemon/memory/nvml.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

/* As nvml.h of the CUDA toolkit has them: nvmlReturn_t, 0 for success, and nvmlMemory_t. */
struct memory {
	unsigned long long total, free, used;
};

struct nvml {
	void *library;
	void *device; /* nvmlDevice_t */
	int (*nvmlInit_v2)(void);
	int (*nvmlShutdown)(void);
	int (*nvmlSystemGetDriverVersion)(char *version, unsigned length);
	int (*nvmlDeviceGetHandleByPciBusId_v2)(const char *bus_id, void **device);
	int (*nvmlDeviceGetMemoryInfo)(void *device, struct memory *memory);
};

static bool find(const struct nvml *nvml, const char *name, void *ret_function)
{
	void *symbol = dlsym(nvml->library, name);

	*(void **)ret_function = symbol;
	return symbol;
}

static bool find_all(struct nvml *nvml)
{
	return find(nvml, "nvmlInit_v2", &nvml->nvmlInit_v2) && find(nvml, "nvmlShutdown", &nvml->nvmlShutdown) &&
	       find(nvml, "nvmlSystemGetDriverVersion", &nvml->nvmlSystemGetDriverVersion) &&
	       find(nvml, "nvmlDeviceGetHandleByPciBusId_v2", &nvml->nvmlDeviceGetHandleByPciBusId_v2) &&
	       find(nvml, "nvmlDeviceGetMemoryInfo", &nvml->nvmlDeviceGetMemoryInfo);
}

struct nvml *nvml_open(const char *bus_id)
{
	struct nvml *nvml = calloc(1, sizeof(*nvml));

	if (!nvml)
		return NULL;
	nvml->library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
	if (nvml->library && find_all(nvml) && nvml->nvmlInit_v2() == 0) {
		if (nvml->nvmlDeviceGetHandleByPciBusId_v2(bus_id, &nvml->device) == 0)
			return nvml;
		(void)nvml->nvmlShutdown();
	}
	if (nvml->library)
		(void)dlclose(nvml->library);
	free(nvml);
	return NULL;
}

struct nvml *nvml_close(struct nvml *nvml)
{
	if (!nvml)
		return NULL;
	(void)nvml->nvmlShutdown();
	(void)dlclose(nvml->library);
	free(nvml);
	return NULL;
}

int nvml_used(const struct nvml *nvml, uint64_t *ret_bytes)
{
	struct memory memory;

	if (nvml->nvmlDeviceGetMemoryInfo(nvml->device, &memory) != 0)
		return -EIO;
	*ret_bytes = memory.used;
	return 0;
}

void nvml_driver_version(const struct nvml *nvml, char *text, size_t size)
{
	if (nvml->nvmlSystemGetDriverVersion(text, (unsigned)size) != 0)
		text[0] = '\0';
}
