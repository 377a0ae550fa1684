#include "tools/ctl/fields.h"

#include <errno.h>

#include "control.pb-c.h"
#include "tests/support/runner.h"

static void test_required(void **state)
{
	char name[] = "search";
	Kvg__Tenant tenant = KVG__TENANT__INIT;
	struct field field;

	(void)state;
	tenant.name = name;
	tenant.charged = UINT64_MAX;
	tenant.workers = 7;
	assert_int_equal(field_named(&tenant.base, "name", &field), 0);
	assert_int_equal(field.count, 1);
	assert_string_equal(field_text(&field, 0), "search");
	assert_int_equal(field_named(&tenant.base, "charged", &field), 0);
	assert_true(field_uint(&field, 0) == UINT64_MAX);
	assert_int_equal(field_named(&tenant.base, "workers", &field), 0);
	assert_int_equal(field_uint(&field, 0), 7);
}

static void test_bool_and_double(void **state)
{
	Kvg__Audit audit = KVG__AUDIT__INIT;
	Kvg__Sequence sequence = KVG__SEQUENCE__INIT;
	struct field field;

	(void)state;
	audit.clean = 1;
	sequence.ratio = 0.25;
	assert_int_equal(field_named(&audit.base, "clean", &field), 0);
	assert_int_equal(field_uint(&field, 0), 1);
	assert_int_equal(field_named(&sequence.base, "ratio", &field), 0);
	assert_true(field_double(&field, 0) == 0.25);
}

static void test_repeated(void **state)
{
	char first[] = "one", second[] = "two";
	char *differences[] = {first, second};
	Kvg__AuditRow row = KVG__AUDIT_ROW__INIT;
	Kvg__AuditRow *rows[] = {&row};
	Kvg__Audit audit = KVG__AUDIT__INIT;
	struct field field;

	(void)state;
	assert_int_equal(field_named(&audit.base, "differences", &field), 0);
	assert_int_equal(field.count, 0);
	audit.differences = differences;
	audit.n_differences = 2;
	audit.rows = rows;
	audit.n_rows = 1;
	assert_int_equal(field_named(&audit.base, "differences", &field), 0);
	assert_int_equal(field.count, 2);
	assert_string_equal(field_text(&field, 1), "two");
	assert_int_equal(field_named(&audit.base, "rows", &field), 0);
	assert_int_equal(field.count, 1);
	assert_ptr_equal(field_message(&field, 0), &row.base);
}

static void test_optional(void **state)
{
	Kvg__Hello hello = KVG__HELLO__INIT;
	struct field field;

	(void)state;
	assert_int_equal(field_named(&hello.base, "sq_entries", &field), 0);
	assert_int_equal(field.count, 0);
	hello.has_sq_entries = 1;
	hello.sq_entries = 64;
	assert_int_equal(field_named(&hello.base, "sq_entries", &field), 0);
	assert_int_equal(field.count, 1);
	assert_int_equal(field_uint(&field, 0), 64);
}

static void test_refusals(void **state)
{
	Kvg__AdminReply reply = KVG__ADMIN_REPLY__INIT;
	struct field field = {.count = 99};

	(void)state;
	assert_int_equal(field_named(&reply.base, "nothing", &field), -ENOENT);
	assert_int_equal(field_named(&reply.base, "status", &field), -ENOTSUP);
	assert_int_equal(field.count, 99);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_required),
		cmocka_unit_test(test_bool_and_double),
		cmocka_unit_test(test_repeated),
		cmocka_unit_test(test_optional),
		cmocka_unit_test(test_refusals),
	};

	return runner_run("tools/ctl/fields", tests, sizeof(tests) / sizeof(*tests));
}
