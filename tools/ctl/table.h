/*
 * table.h - protobuf messages as text for people: a line for each message, or a
 * message on its own as a list of names and values. Which fields are shown, and how,
 * is a table of columns. Control characters in values are shown escaped.
 */
#ifndef KVG_CTL_TABLE_H
#define KVG_CTL_TABLE_H

#include <stddef.h>
#include <stdio.h>

#include <protobuf-c/protobuf-c.h>

enum column_format {
	COLUMN_TEXT,     /* string */
	COLUMN_COUNT,    /* integer as it is */
	COLUMN_SIZE,     /* integer of bytes: "1.5 GiB" */
	COLUMN_DURATION, /* integer of milliseconds: "1d 02:03:04" */
	COLUMN_RATIO,    /* double: "0.300" */
	COLUMN_HANDLE,   /* sequence handle: "EPOCH:SLOT" */
	COLUMN_LEVEL,    /* enum kvg_level by name, or the number */
	COLUMN_FLAG,     /* bool: "yes" or "no" */
	COLUMN_KEY,      /* bytes: the first eight, in hexadecimal */
};

struct column {
	const char *field; /* of the message; its type fits the format */
	const char *heading;
	enum column_format format;
};

#define TABLE_CELL 512 /* bytes of one formatted value */

/*
 * Writes one value of a message as text, cut to TABLE_CELL. 0, -ENOENT when the message
 * has no such field or it is not set, -EINVAL when its type does not fit the format.
 */
int table_cell(const ProtobufCMessage *message, const struct column *column, char text[TABLE_CELL]);

/* Prints a heading and a line for each message, "-" for what is optional and not set. 0 or a negative errno, as
 * table_cell() or -ENOMEM, -EIO. */
int table_print_rows(FILE *out, const ProtobufCMessage *const *rows, size_t row_count, const struct column *columns,
	size_t column_count);

/*
 * Prints one message, a line for each column: heading, value; none for an optional field that is not set. Errors as
 * table_print_rows().
 */
int table_print_record(FILE *out, const ProtobufCMessage *message, const struct column *columns, size_t column_count);

#endif
