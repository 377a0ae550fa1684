#include "daemon/device.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "daemon/base/log.h"
#include "proto/size.h"

int device_open(const struct config *config, struct kind **ret, char *text)
{
	int r;

	if (config->kind == CONFIG_CUDA)
		return kind_cuda_new((int)config->device_index, ret, text, DEVICE_TEXT);
	r = kind_host_new(ret);
	if (r < 0)
		(void)snprintf(text, DEVICE_TEXT, "kind host: %s", strerror(-r));
	return r;
}

static int check_extent(const struct config *config, const struct kind *kind, uint64_t *ret_extent_size, char *text)
{
	char asked[KVG_SIZE_TEXT], size[KVG_SIZE_TEXT];
	uint64_t unit = kind->granularity, extent = (config->extent_size + unit - 1) / unit * unit;

	(void)kvg_size_format(extent, size);
	if (extent != config->extent_size)
		log_warning(
			"extent_size: %s is not a multiple of the device's granularity, %llu bytes: extents have %s",
			kvg_size_format(config->extent_size, asked), (unsigned long long)unit, size);
	*ret_extent_size = extent;
	if (config->device_size >= extent)
		return 0;
	(void)snprintf(text, DEVICE_TEXT, "device.size: %s is less than one extent, %s",
		kvg_size_format(config->device_size, asked), size);
	return -EINVAL;
}

static int check_size(const struct config *config, struct kind *kind, const struct kind_device *about, char *text)
{
	char asked[KVG_SIZE_TEXT], total[KVG_SIZE_TEXT], available[KVG_SIZE_TEXT];
	uint64_t used = 0;

	(void)kvg_size_format(config->device_size, asked);
	if (config->device_size > about->total) {
		(void)snprintf(text, DEVICE_TEXT, "device.size: %s is more than the %s of %s", asked,
			kvg_size_format(about->total, total), about->name);
		return -EINVAL;
	}
	if (kind->ops->usage(kind, &used) == 0 && used + config->device_size > about->total)
		log_warning(
			"device.size: %s is more than the %s that %s has free now: tenants may be refused below their "
			"budgets",
			asked, kvg_size_format(used < about->total ? about->total - used : 0, available), about->name);
	return 0;
}

/* Who shares whose faults, and whose time. */
static int check_isolation(const struct config *config, const struct kind_device *about, char *text)
{
	if (about->mps && config->isolation == CONFIG_STRICT) {
		(void)snprintf(text, DEVICE_TEXT,
			"isolation: strict, but this daemon is a client of an MPS server, where a fatal fault of one "
			"client ends all of them; use isolation = shared, or let CUDA_MPS_PIPE_DIRECTORY name a folder "
			"without a server");
		return -EINVAL;
	}
	if (about->mps)
		log_warning("MPS, isolation = shared: a fatal fault of one client of the MPS server, a worker's kernel "
			    "for example, reaches all of its clients, this daemon among them");
	else
		log_warning("no MPS: kernels of this daemon and of its workers take turns on the GPU; beside a busy "
			    "process a small kernel starts after 2.3 ms in the mean (measured on an H200), under MPS "
			    "after 12 us");
	return 0;
}

int device_check(const struct config *config, struct kind *kind, uint64_t *ret_extent_size, char *text)
{
	const struct kind_device *about = kind->ops->about(kind);
	int r = check_extent(config, kind, ret_extent_size, text);

	if (r < 0 || !about)
		return r;
	log_info("%s, driver %s", about->name, about->driver);
	r = check_size(config, kind, about, text);
	return r < 0 ? r : check_isolation(config, about, text);
}
