#include "tools/ctl/fields.h"

#include <errno.h>

int field_at(const ProtobufCMessage *message, unsigned index, struct field *ret)
{
	const ProtobufCFieldDescriptor *about = &message->descriptor->fields[index];
	const char *base = (const char *)message;
	const void *values = base + about->offset;
	const void *quantifier = base + about->quantifier_offset;
	size_t count = 1;

	if (about->flags & PROTOBUF_C_FIELD_FLAG_ONEOF)
		return -ENOTSUP;
	if (about->label == PROTOBUF_C_LABEL_REPEATED) {
		count = *(const size_t *)quantifier;
		values = *(const void *const *)values;
	} else if (about->label == PROTOBUF_C_LABEL_OPTIONAL) {
		if (about->type == PROTOBUF_C_TYPE_STRING || about->type == PROTOBUF_C_TYPE_MESSAGE)
			count = *(const void *const *)values != NULL;
		else
			count = *(const protobuf_c_boolean *)quantifier != 0;
	}
	*ret = (struct field){.about = about, .values = values, .count = count};
	return 0;
}

int field_named(const ProtobufCMessage *message, const char *name, struct field *ret)
{
	const ProtobufCFieldDescriptor *about =
		protobuf_c_message_descriptor_get_field_by_name(message->descriptor, name);

	if (!about)
		return -ENOENT;
	return field_at(message, (unsigned)(about - message->descriptor->fields), ret);
}

uint64_t field_uint(const struct field *field, size_t i)
{
	switch (field->about->type) {
	case PROTOBUF_C_TYPE_UINT32:
		return ((const uint32_t *)field->values)[i];
	case PROTOBUF_C_TYPE_BOOL:
		return ((const protobuf_c_boolean *)field->values)[i] != 0;
	default:
		return ((const uint64_t *)field->values)[i];
	}
}

double field_double(const struct field *field, size_t i)
{
	return ((const double *)field->values)[i];
}

const char *field_text(const struct field *field, size_t i)
{
	return ((const char *const *)field->values)[i];
}

const ProtobufCBinaryData *field_bytes(const struct field *field, size_t i)
{
	return &((const ProtobufCBinaryData *)field->values)[i];
}

const ProtobufCMessage *field_message(const struct field *field, size_t i)
{
	return ((const ProtobufCMessage *const *)field->values)[i];
}
