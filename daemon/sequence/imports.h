/*
 * imports.h - memory and events of a worker that the daemon has opened through CUDA's interprocess handles, so that
 * rows are staged in place and entries wait for the worker's events.
 *
 * import_open_buffer(), import_open_event(), import_close() and imports_close() call the driver: they run on the
 * executor and touch nothing but their arguments. The table is the reactor's.
 */
#ifndef KVG_IMPORTS_H
#define KVG_IMPORTS_H

#include <stddef.h>
#include <stdint.h>

#define IMPORTS_MAX   16u /* of one worker */
#define IMPORT_HANDLE 64u /* bytes of a handle */
#define IMPORT_ALIGN  16u /* of a buffer's address: kernels read that many bytes at once */
#define IMPORT_FIRST  2u  /* the least id: smaller ones are enum kvg_buffer's */

struct kvg_cuda;

enum import_kind { IMPORT_NONE = 0, IMPORT_BUFFER, IMPORT_EVENT };

struct import {
	enum import_kind kind; /* NONE: a free place */
	uint32_t id;
	unsigned uses;          /* entries under way that name it */
	uint64_t base;          /* BUFFER: device address of the whole allocation here */
	uint64_t address, size; /* BUFFER: the part that the worker named, a device address and bytes */
	void *event;            /* EVENT: a CUevent */
};

struct imports {
	struct import places[IMPORTS_MAX];
	uint32_t count, last_id;
};

/*
 * Whether a part of an allocation of `length` bytes can be imported: 0, or -EINVAL with text when it is empty, passes
 * the end, or does not start at a multiple of IMPORT_ALIGN.
 */
int import_check_part(uint64_t offset, uint64_t size, uint64_t length, char *text, size_t text_size);

/*
 * Opens bytes offset .. offset + size of the allocation that cuIpcGetMemHandle() gave the handle of. 0; or a negative
 * errno with text: -EINVAL (no handle of another process's live memory, or what import_check_part() says),
 * -ENOMEM, -EIO, -EOPNOTSUPP (built without the kind cuda).
 */
int import_open_buffer(const struct kvg_cuda *cuda, const uint8_t handle[IMPORT_HANDLE], uint64_t offset, uint64_t size,
	struct import *ret, char *text, size_t text_size);

/* The same for an event that cuIpcGetEventHandle() gave the handle of. */
int import_open_event(const struct kvg_cuda *cuda, const uint8_t handle[IMPORT_HANDLE], struct import *ret, char *text,
	size_t text_size);

/* Closes what was opened; nothing on the device may use it any more. Then it is free; a free one is fine. */
void import_close(const struct kvg_cuda *cuda, struct import *import);

/* Closes all. */
void imports_close(struct imports *imports, const struct kvg_cuda *cuda);

/* Takes an opened import over. Its id, which no other one of this worker ever had; 0 when all places are taken. */
uint32_t imports_add(struct imports *imports, const struct import *import);

/* The import with that id and kind, or NULL. */
struct import *imports_find(struct imports *imports, uint32_t id, enum import_kind kind);

/* An entry that names the import is under way, and is over. */
void import_use(struct import *import);
void import_unuse(struct import *import);

/* Takes an import out of the table, to be closed on the executor. 0, -ENOENT, or -EBUSY when it is used. */
int imports_take(struct imports *imports, uint32_t id, struct import *ret);

#endif
