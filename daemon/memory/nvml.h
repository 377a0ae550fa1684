/*
 * nvml.h - how much of a GPU's memory is in use by everybody, as the management library says. It is loaded when the
 * program runs; its header is not needed: the few functions that are used are declared in nvml.c.
 */
#ifndef KVG_NVML_H
#define KVG_NVML_H

#include <stddef.h>
#include <stdint.h>

struct nvml;

/* Opens the device with that PCI bus id. NULL when there is no library, or it does not know the device. */
struct nvml *nvml_open(const char *bus_id);
struct nvml *nvml_close(struct nvml *nvml); /* NULL is fine; returns NULL */

/* 0 or -EIO. */
int nvml_used(const struct nvml *nvml, uint64_t *ret_bytes);

/* The driver's version, such as 580.95.05; "" when it is not known. */
void nvml_driver_version(const struct nvml *nvml, char *text, size_t size);

#endif
