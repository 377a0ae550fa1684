#include "tools/ctl/json.h"

#include <errno.h>
#include <stdlib.h>

#include "control.pb-c.h"
#include "tests/support/runner.h"

/* Compares the compact text of a message, which pins names, order and types. */
static void assert_json(const ProtobufCMessage *message, const char *expected)
{
	json_t *object = NULL;
	char *text;

	assert_int_equal(json_from_message(message, &object), 0);
	text = json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(15));
	assert_non_null(text);
	assert_string_equal(text, expected);
	free(text);
	json_decref(object);
}

static void test_budget(void **state)
{
	char tenant[] = "search";
	Kvg__Budget budget = KVG__BUDGET__INIT;

	(void)state;
	budget.tenant = tenant;
	budget.device_max = UINT64_C(9223372036854775807);
	budget.charged = 262144;
	assert_json(&budget.base,
		"{\"tenant\":\"search\",\"device_max\":9223372036854775807,\"charged\":262144,\"promised\":0}");
}

static void test_nested(void **state)
{
	char tenant[] = "a", difference[] = "tenant a: charged 1, counted 2";
	char *differences[] = {difference};
	Kvg__AuditRow row = KVG__AUDIT_ROW__INIT;
	Kvg__AuditRow *rows[] = {&row};
	Kvg__Audit audit = KVG__AUDIT__INIT;

	(void)state;
	assert_json(&audit.base, "{\"clean\":false,\"rows\":[],\"differences\":[]}");
	row.tenant = tenant;
	row.extents = 3;
	audit.rows = rows;
	audit.n_rows = 1;
	audit.differences = differences;
	audit.n_differences = 1;
	assert_json(&audit.base,
		"{\"clean\":false,\"rows\":[{\"tenant\":\"a\",\"extents\":3,\"blocks\":0,\"extent_bytes\":0,"
		"\"physical\":0,\"charged\":0}],\"differences\":[\"tenant a: charged 1, counted 2\"]}");
}

static void test_bytes(void **state)
{
	char text[] = "a";
	uint8_t key[] = {0, 0xff, 0x1c};
	Kvg__Context context = KVG__CONTEXT__INIT;
	json_t *object = NULL;

	(void)state;
	context.tenant = context.model = context.state = text;
	context.key = (ProtobufCBinaryData){.data = key, .len = sizeof(key)};
	assert_int_equal(json_from_message(&context.base, &object), 0);
	assert_string_equal(json_string_value(json_object_get(object, "key")), "00ff1c");
	json_decref(object);
}

static void test_real_number(void **state)
{
	char tenant[] = "a";
	Kvg__Sequence sequence = KVG__SEQUENCE__INIT;
	json_t *object = NULL;

	(void)state;
	sequence.tenant = tenant;
	sequence.ratio = 0.3;
	assert_int_equal(json_from_message(&sequence.base, &object), 0);
	assert_true(json_real_value(json_object_get(object, "ratio")) == 0.3);
	json_decref(object);
}

static void test_optional_left_out(void **state)
{
	char name[] = "w";
	Kvg__Hello hello = KVG__HELLO__INIT;

	(void)state;
	hello.name = name;
	assert_json(&hello.base, "{\"abi_min\":0,\"abi_max\":0,\"name\":\"w\"}");
	hello.has_sq_entries = 1;
	assert_json(&hello.base, "{\"abi_min\":0,\"abi_max\":0,\"name\":\"w\",\"sq_entries\":256}");
}

static void test_text_that_is_not_utf8(void **state)
{
	char name[] = "a\xff\x1b[2J";
	Kvg__BudgetKey key = KVG__BUDGET_KEY__INIT;

	(void)state;
	key.tenant = name;
	assert_json(&key.base, "{\"tenant\":\"a?\\u001B[2J\"}");
}

static void test_integer_out_of_range(void **state)
{
	char tenant[] = "a";
	Kvg__Budget budget = KVG__BUDGET__INIT;
	Kvg__AuditRow row = KVG__AUDIT_ROW__INIT;
	Kvg__AuditRow *rows[] = {&row};
	Kvg__Audit audit = KVG__AUDIT__INIT;
	json_t *object = NULL;

	(void)state;
	budget.tenant = tenant;
	budget.promised = UINT64_C(1) << 63;
	assert_int_equal(json_from_message(&budget.base, &object), -ERANGE);
	row.tenant = tenant;
	row.physical = UINT64_MAX;
	audit.rows = rows;
	audit.n_rows = 1;
	assert_int_equal(json_from_message(&audit.base, &object), -ERANGE);
	assert_null(object);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_budget),
		cmocka_unit_test(test_nested),
		cmocka_unit_test(test_bytes),
		cmocka_unit_test(test_real_number),
		cmocka_unit_test(test_optional_left_out),
		cmocka_unit_test(test_text_that_is_not_utf8),
		cmocka_unit_test(test_integer_out_of_range),
	};

	return runner_run("tools/ctl/json", tests, sizeof(tests) / sizeof(*tests));
}
