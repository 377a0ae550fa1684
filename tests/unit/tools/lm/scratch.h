/* scratch.h - a temporary folder of a test and files in it. Every failure fails the test. */
#ifndef KVG_TEST_SCRATCH_H
#define KVG_TEST_SCRATCH_H

#include <stddef.h>

struct scratch {
	char dir[64];
	char path[128]; /* of the file written last */
};

void scratch_init(struct scratch *scratch);

/* Writes DIR/name; returns its path, valid until the next call. */
const char *scratch_write(struct scratch *scratch, const char *name, const void *data, size_t size);
const char *scratch_text(struct scratch *scratch, const char *name, const char *text);

/*
 * Writes a safetensors file of the tensors described by a JSON header's inside
 * ("\"a\":{...}"), with data_size bytes of data after it.
 */
const char *scratch_tensors(
	struct scratch *scratch, const char *name, const char *header, const void *data, size_t data_size);

/* Removes the folder and all files in it. */
void scratch_deinit(struct scratch *scratch);

#endif
