/*
 * fields.h - reads the fields of any protobuf message by name or number, so that
 * what kvgatectl prints follows proto/control.proto by itself.
 *
 * A field is a run of `count` values: one for a required field, none or one for an
 * optional one, any number for a repeated one. Members of a oneof are not read.
 * Everything points into the message and lives as long as it.
 */
#ifndef KVG_CTL_FIELDS_H
#define KVG_CTL_FIELDS_H

#include <stddef.h>
#include <stdint.h>

#include <protobuf-c/protobuf-c.h>

struct field {
	const ProtobufCFieldDescriptor *about;
	const void *values;
	size_t count;
};

/* The field at an index below message->descriptor->n_fields. 0, or -ENOTSUP for a member of a oneof. */
int field_at(const ProtobufCMessage *message, unsigned index, struct field *ret);

/* The field of that name. 0, -ENOENT when the message has none, -ENOTSUP for a member of a oneof. */
int field_named(const ProtobufCMessage *message, const char *name, struct field *ret);

/* Value i (below count) as the type that field.about->type says: */
uint64_t field_uint(const struct field *field, size_t i);                    /* UINT32, UINT64, FIXED64, BOOL */
double field_double(const struct field *field, size_t i);                    /* DOUBLE */
const char *field_text(const struct field *field, size_t i);                 /* STRING */
const ProtobufCMessage *field_message(const struct field *field, size_t i);  /* MESSAGE */
const ProtobufCBinaryData *field_bytes(const struct field *field, size_t i); /* BYTES */

#endif
