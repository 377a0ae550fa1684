#include "tools/ctl/json.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tools/ctl/fields.h"

/* Owned text with every byte outside ASCII replaced, for text that is not UTF-8. */
static json_t *json_ascii(const char *text)
{
	char *copy = strdup(text);
	json_t *string;

	if (!copy)
		return NULL;
	for (char *p = copy; *p; p++)
		if ((unsigned char)*p >= 0x80)
			*p = '?';
	string = json_string(copy);
	free(copy);
	return string;
}

static json_t *json_text(const char *text)
{
	json_t *string = json_string(text);

	return string ? string : json_ascii(text);
}

/* Bytes as hexadecimal digits. */
static json_t *json_hex(const ProtobufCBinaryData *bytes)
{
	static const char digits[] = "0123456789abcdef";
	char *text = malloc(2 * bytes->len + 1);
	json_t *string;

	if (!text)
		return NULL;
	for (size_t i = 0; i < bytes->len; i++) {
		text[2 * i] = digits[bytes->data[i] >> 4];
		text[2 * i + 1] = digits[bytes->data[i] & 15];
	}
	text[2 * bytes->len] = '\0';
	string = json_string(text);
	free(text);
	return string;
}

static int json_from_value(const struct field *field, size_t i, json_t **ret)
{
	json_t *value = NULL;

	switch (field->about->type) {
	case PROTOBUF_C_TYPE_UINT32:
	case PROTOBUF_C_TYPE_UINT64:
		if (field_uint(field, i) > INT64_MAX)
			return -ERANGE;
		value = json_integer((json_int_t)field_uint(field, i));
		break;
	case PROTOBUF_C_TYPE_BOOL:
		value = json_boolean(field_uint(field, i) != 0);
		break;
	case PROTOBUF_C_TYPE_DOUBLE:
		value = json_real(field_double(field, i));
		break;
	case PROTOBUF_C_TYPE_STRING:
		value = json_text(field_text(field, i));
		break;
	case PROTOBUF_C_TYPE_BYTES:
		value = json_hex(field_bytes(field, i));
		break;
	case PROTOBUF_C_TYPE_MESSAGE:
		return json_from_message(field_message(field, i), ret);
	default:
		return -ENOTSUP;
	}
	if (!value)
		return -ENOMEM;
	*ret = value;
	return 0;
}

static int json_from_run(const struct field *field, json_t **ret)
{
	json_t *array = json_array();
	int r = array ? 0 : -ENOMEM;

	for (size_t i = 0; r == 0 && i < field->count; i++) {
		json_t *value = NULL;

		r = json_from_value(field, i, &value);
		if (r == 0 && json_array_append_new(array, value) < 0)
			r = -ENOMEM;
	}
	if (r < 0) {
		json_decref(array);
		return r;
	}
	*ret = array;
	return 0;
}

/* Adds one field to an object; an unset optional one is left out. */
static int json_add(json_t *object, const struct field *field)
{
	json_t *value = NULL;
	int r;

	if (field->about->label == PROTOBUF_C_LABEL_REPEATED)
		r = json_from_run(field, &value);
	else if (field->count == 0)
		return 0;
	else
		r = json_from_value(field, 0, &value);
	if (r == 0 && json_object_set_new(object, field->about->name, value) < 0)
		r = -ENOMEM;
	return r;
}

int json_from_message(const ProtobufCMessage *message, json_t **ret)
{
	json_t *object = json_object();
	int r = object ? 0 : -ENOMEM;

	for (unsigned i = 0; r == 0 && i < message->descriptor->n_fields; i++) {
		struct field field;

		r = field_at(message, i, &field);
		if (r == 0)
			r = json_add(object, &field);
	}
	if (r < 0) {
		json_decref(object);
		return r;
	}
	*ret = object;
	return 0;
}
