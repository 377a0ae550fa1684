/*
 * table.h - what a worker reads: state of its sequences, base lengths and block
 * ids, in a memfd of which it gets a read-only descriptor. The daemon only
 * writes here and never reads back; its own truth is the metadata.
 */
#ifndef KVG_SEQUENCE_TABLE_H
#define KVG_SEQUENCE_TABLE_H

#include <stddef.h>
#include <stdint.h>

#include "proto/kvgate_abi.h"

struct table {
	int fd;        /* read and write */
	int reader_fd; /* read-only, for the worker */
	size_t size;
	struct kvg_table *header;
	struct kvg_slot *slots;
	uint32_t *base_len, *ids;
};

int table_init(struct table *table, const struct kvg_layout *layout, uint32_t row_cap);
void table_deinit(struct table *table);

/* Row `row` (layer * heads + head) of a slot. */
uint32_t *table_base_len(const struct table *table, uint32_t slot, uint32_t row);
uint32_t *table_row(const struct table *table, uint32_t slot, uint32_t row);

/* Clears a slot; forget() gives the memory of its rows back as well. */
void table_clear(const struct table *table, uint32_t slot);
void table_forget(const struct table *table, uint32_t slot);

/* Bytes of memory that the table occupies. */
uint64_t table_physical(const struct table *table);

#endif
