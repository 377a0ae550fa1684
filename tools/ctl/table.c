#include "tools/ctl/table.h"

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>

#include <libsmartcols.h>

#include "proto/kvgate_abi.h"
#include "tools/ctl/fields.h"
#include "proto/size.h"

static void cleanup_table(struct libscols_table **table)
{
	scols_unref_table(*table);
}

#define _cleanup_table_ __attribute__((cleanup(cleanup_table)))

static void format_duration(uint64_t ms, char text[TABLE_CELL])
{
	uint64_t s = ms / 1000;

	(void)snprintf(text, TABLE_CELL, "%" PRIu64 "d %02u:%02u:%02u", s / 86400, (unsigned)(s / 3600 % 24),
		(unsigned)(s / 60 % 60), (unsigned)(s % 60));
}

static void format_level(uint64_t level, char text[TABLE_CELL])
{
	static const char *const names[] = {
		[KVG_LEVEL_PAIR] = "pair",
		[KVG_LEVEL_PAIR_HEAD] = "pair-head",
		[KVG_LEVEL_PAIR_LAYER] = "pair-layer",
		[KVG_LEVEL_ADAKV_LAYER] = "adakv-layer",
	};

	if (level < sizeof(names) / sizeof(*names))
		(void)snprintf(text, TABLE_CELL, "%s", names[level]);
	else
		(void)snprintf(text, TABLE_CELL, "%" PRIu64, level);
}

static void format_key(const ProtobufCBinaryData *key, char text[TABLE_CELL])
{
	text[0] = '\0';
	for (size_t i = 0; i < key->len && i < 8; i++)
		(void)snprintf(text + 2 * i, 3, "%02x", key->data[i]);
}

static bool format_fits(enum column_format format, ProtobufCType type)
{
	if (format == COLUMN_TEXT)
		return type == PROTOBUF_C_TYPE_STRING;
	if (format == COLUMN_RATIO)
		return type == PROTOBUF_C_TYPE_DOUBLE;
	if (format == COLUMN_FLAG)
		return type == PROTOBUF_C_TYPE_BOOL;
	if (format == COLUMN_KEY)
		return type == PROTOBUF_C_TYPE_BYTES;
	return type == PROTOBUF_C_TYPE_UINT32 || type == PROTOBUF_C_TYPE_UINT64;
}

int table_cell(const ProtobufCMessage *message, const struct column *column, char text[TABLE_CELL])
{
	struct field field;
	int r = field_named(message, column->field, &field);
	char size[KVG_SIZE_TEXT];

	if (r < 0)
		return r;
	if (!format_fits(column->format, field.about->type))
		return -EINVAL;
	if (field.count == 0)
		return -ENOENT;
	switch (column->format) {
	case COLUMN_TEXT:
		(void)snprintf(text, TABLE_CELL, "%s", field_text(&field, 0));
		break;
	case COLUMN_COUNT:
		(void)snprintf(text, TABLE_CELL, "%" PRIu64, field_uint(&field, 0));
		break;
	case COLUMN_SIZE:
		(void)snprintf(text, TABLE_CELL, "%s", kvg_size_format(field_uint(&field, 0), size));
		break;
	case COLUMN_DURATION:
		format_duration(field_uint(&field, 0), text);
		break;
	case COLUMN_RATIO:
		(void)snprintf(text, TABLE_CELL, "%.3f", field_double(&field, 0));
		break;
	case COLUMN_HANDLE:
		(void)snprintf(text, TABLE_CELL, "%" PRIu64 ":%" PRIu64, field_uint(&field, 0) >> 32,
			field_uint(&field, 0) & UINT32_MAX);
		break;
	case COLUMN_LEVEL:
		format_level(field_uint(&field, 0), text);
		break;
	case COLUMN_FLAG:
		(void)snprintf(text, TABLE_CELL, "%s", field_uint(&field, 0) ? "yes" : "no");
		break;
	case COLUMN_KEY:
		format_key(field_bytes(&field, 0), text);
		break;
	}
	return 0;
}

/* A table that prints to out. NULL when out of memory. */
static struct libscols_table *table_new(FILE *out)
{
	struct libscols_table *table = scols_new_table();

	if (table && scols_table_set_stream(table, out) < 0) {
		scols_unref_table(table);
		return NULL;
	}
	return table;
}

static int table_flush(struct libscols_table *table, FILE *out)
{
	if (scols_print_table(table) < 0)
		return -ENOMEM;
	return ferror(out) ? -EIO : 0;
}

static bool is_unset(const ProtobufCMessage *message, const struct column *column)
{
	struct field field;

	return field_named(message, column->field, &field) == 0 && field.about->label == PROTOBUF_C_LABEL_OPTIONAL &&
	       field.count == 0;
}

static bool is_text(enum column_format format)
{
	return format == COLUMN_TEXT || format == COLUMN_LEVEL || format == COLUMN_KEY;
}

int table_print_rows(FILE *out, const ProtobufCMessage *const *rows, size_t row_count, const struct column *columns,
	size_t column_count)
{
	_cleanup_table_ struct libscols_table *table = table_new(out);
	char text[TABLE_CELL];

	if (!table)
		return -ENOMEM;
	for (size_t c = 0; c < column_count; c++) {
		int flags = is_text(columns[c].format) ? 0 : SCOLS_FL_RIGHT;

		if (!scols_table_new_column(table, columns[c].heading, 0, flags))
			return -ENOMEM;
	}
	for (size_t i = 0; i < row_count; i++) {
		struct libscols_line *line = scols_table_new_line(table, NULL);

		if (!line)
			return -ENOMEM;
		for (size_t c = 0; c < column_count; c++) {
			int r = is_unset(rows[i], &columns[c]) ? snprintf(text, sizeof(text), "-")
							       : table_cell(rows[i], &columns[c], text);

			if (r < 0)
				return r;
			if (scols_line_set_data(line, c, text) < 0)
				return -ENOMEM;
		}
	}
	return table_flush(table, out);
}

static int add_record_line(struct libscols_table *table, const ProtobufCMessage *message, const struct column *column)
{
	struct libscols_line *line = scols_table_new_line(table, NULL);
	char text[TABLE_CELL];
	int r = line ? table_cell(message, column, text) : -ENOMEM;

	if (r < 0)
		return r;
	if (scols_line_set_data(line, 0, column->heading) < 0 || scols_line_set_data(line, 1, text) < 0)
		return -ENOMEM;
	return 0;
}

int table_print_record(FILE *out, const ProtobufCMessage *message, const struct column *columns, size_t column_count)
{
	_cleanup_table_ struct libscols_table *table = table_new(out);

	if (!table || scols_table_enable_noheadings(table, 1) < 0)
		return -ENOMEM;
	if (!scols_table_new_column(table, "name", 0, 0) || !scols_table_new_column(table, "value", 0, 0))
		return -ENOMEM;
	for (size_t c = 0; c < column_count; c++) {
		int r = is_unset(message, &columns[c]) ? 0 : add_record_line(table, message, &columns[c]);

		if (r < 0)
			return r;
	}
	return table_flush(table, out);
}
