/*
 * table.h - the tables of one (worker, layout), read-only here, and the staging
 * memfd with the worker's counters. Their headers and sizes are checked once,
 * when they are mapped; what lies within them is the daemon's word.
 */
#ifndef KVG_CLIENT_TABLE_H
#define KVG_CLIENT_TABLE_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/kvgate_abi.h"

/* What the tables must agree with. */
struct table_shape {
	uint32_t layers, heads, max_sequences, row_cap;
};

struct table {
	const struct kvg_table *header;
	uint64_t size;
	struct table_shape shape;
	const struct kvg_slot *slots;
	const uint32_t *base_len, *ids;
};

struct staging_map {
	uint8_t *base;
	uint64_t size, rows_offset;
};

/* Maps a table memfd (not closed). 0; -EPROTO with *ret_what when it is nonsense; another negative errno. */
int table_map(int fd, const struct table_shape *shape, struct table *ret, const char **ret_what);
void table_deinit(struct table *table);

/* Row of one head: index of base_len, and times row_cap of ids. */
uint64_t table_row(const struct table *table, uint32_t layer, uint32_t slot, uint32_t head);

/* Maps a staging memfd (not closed) of that size whose rows begin at rows_offset. Errors as table_map(). */
int staging_map(int fd, uint64_t size, uint64_t rows_offset, uint32_t max_sequences, struct staging_map *ret,
	const char **ret_what);
void staging_unmap(struct staging_map *staging);

#endif
