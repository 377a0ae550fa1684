/*
 * json.h - protobuf messages as JSON: an object whose members have the names and the
 * order of the message's fields. Sizes are exact bytes. A repeated field is an array,
 * an optional one that is not set is left out.
 */
#ifndef KVG_CTL_JSON_H
#define KVG_CTL_JSON_H

#include <jansson.h>
#include <protobuf-c/protobuf-c.h>

/*
 * A new reference to the object of a message. Bytes of a string that are not UTF-8
 * become '?'. 0, -ENOMEM, -ERANGE for an integer above 2^63 - 1 (JSON integers end
 * there), -ENOTSUP for a type of field that control.proto does not use.
 */
int json_from_message(const ProtobufCMessage *message, json_t **ret);

#endif
