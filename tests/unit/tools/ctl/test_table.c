#include "tools/ctl/table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "control.pb-c.h"
#include "tests/support/runner.h"

#define COUNT(array) (sizeof(array) / sizeof(*(array)))

static void assert_cell(const ProtobufCMessage *message, const char *field, enum column_format format, const char *text)
{
	struct column column = {field, "HEADING", format};
	char cell[TABLE_CELL];

	assert_int_equal(table_cell(message, &column, cell), 0);
	assert_string_equal(cell, text);
}

static void test_cell_formats(void **state)
{
	char tenant[] = "search";
	Kvg__Sequence sequence = KVG__SEQUENCE__INIT;
	Kvg__Status status = KVG__STATUS__INIT;

	(void)state;
	sequence.tenant = tenant;
	sequence.seq = (UINT64_C(5) << 32) | 7;
	sequence.bytes = 3 * 1024 * 1024;
	sequence.ratio = 0.3;
	sequence.level = 2;
	status.uptime_ms = UINT64_C(1000) * (86400 + 2 * 3600 + 3 * 60 + 4) + 999;
	assert_cell(&sequence.base, "tenant", COLUMN_TEXT, "search");
	assert_cell(&sequence.base, "seq", COLUMN_HANDLE, "5:7");
	assert_cell(&sequence.base, "bytes", COLUMN_SIZE, "3.0 MiB");
	assert_cell(&sequence.base, "bytes", COLUMN_COUNT, "3145728");
	assert_cell(&sequence.base, "ratio", COLUMN_RATIO, "0.300");
	assert_cell(&sequence.base, "level", COLUMN_LEVEL, "pair-layer");
	sequence.level = 44;
	assert_cell(&sequence.base, "level", COLUMN_LEVEL, "44");
	assert_cell(&status.base, "uptime_ms", COLUMN_DURATION, "1d 02:03:04");
	status.has_mps = 1;
	assert_cell(&status.base, "mps", COLUMN_FLAG, "no");
	status.mps = 1;
	assert_cell(&status.base, "mps", COLUMN_FLAG, "yes");
}

static void test_cell_refusals(void **state)
{
	Kvg__Hello hello = KVG__HELLO__INIT;
	struct column missing = {"nothing", "", COLUMN_TEXT}, wrong = {"name", "", COLUMN_SIZE},
		      unset = {"sq_entries", "", COLUMN_COUNT};
	char cell[TABLE_CELL];

	(void)state;
	assert_int_equal(table_cell(&hello.base, &missing, cell), -ENOENT);
	assert_int_equal(table_cell(&hello.base, &wrong, cell), -EINVAL);
	assert_int_equal(table_cell(&hello.base, &unset, cell), -ENOENT);
}

static void test_cell_cuts_long_text(void **state)
{
	char name[2 * TABLE_CELL], cell[TABLE_CELL];
	Kvg__BudgetKey key = KVG__BUDGET_KEY__INIT;
	struct column column = {"tenant", "", COLUMN_TEXT};

	(void)state;
	memset(name, 'x', sizeof(name));
	name[sizeof(name) - 1] = '\0';
	key.tenant = name;
	assert_int_equal(table_cell(&key.base, &column, cell), 0);
	assert_int_equal(strlen(cell), TABLE_CELL - 1);
}

static const struct column budget_columns[] = {
	{"tenant", "TENANT", COLUMN_TEXT},
	{"device_max", "MAX", COLUMN_SIZE},
};

static void test_rows(void **state)
{
	char first[] = "a", second[] = "evil\x1b[2J";
	Kvg__Budget budgets[2] = {KVG__BUDGET__INIT, KVG__BUDGET__INIT};
	const ProtobufCMessage *rows[] = {&budgets[0].base, &budgets[1].base};
	char *text = NULL;
	size_t size;
	FILE *out = open_memstream(&text, &size);

	(void)state;
	budgets[0].tenant = first;
	budgets[0].device_max = 1024;
	budgets[1].tenant = second;
	budgets[1].device_max = UINT64_C(10) << 30;
	assert_int_equal(table_print_rows(out, rows, 2, budget_columns, COUNT(budget_columns)), 0);
	assert_int_equal(fclose(out), 0);
	assert_non_null(strstr(text, "TENANT"));
	assert_non_null(strstr(text, " MAX\n"));
	assert_non_null(strstr(text, " 1.0 KiB\n"));
	assert_non_null(strstr(text, "10.0 GiB\n"));
	assert_null(strchr(text, '\x1b'));
	free(text);
}

static void test_rows_without_a_value(void **state)
{
	static const struct column columns[] = {
		{"tenant", "T", COLUMN_TEXT}, {"device_min", "MIN", COLUMN_SIZE}, {"standing", "WHAT", COLUMN_TEXT}};
	char tenant[] = "a";
	Kvg__Budget budget = KVG__BUDGET__INIT;
	const ProtobufCMessage *rows[] = {&budget.base};
	char *text = NULL;
	size_t size;
	FILE *out = open_memstream(&text, &size);

	(void)state;
	budget.tenant = tenant;
	assert_int_equal(table_print_rows(out, rows, 1, columns, COUNT(columns)), 0);
	assert_int_equal(fclose(out), 0);
	assert_string_equal(text, "T MIN WHAT\na   - -\n");
	free(text);
}

static void test_rows_refuse_a_wrong_column(void **state)
{
	const struct column column = {"nothing", "NOTHING", COLUMN_TEXT};
	Kvg__Budget budget = KVG__BUDGET__INIT;
	const ProtobufCMessage *rows[] = {&budget.base};

	(void)state;
	assert_int_equal(table_print_rows(stdout, rows, 1, &column, 1), -ENOENT);
	assert_int_equal(table_print_record(stdout, &budget.base, &column, 1), -ENOENT);
}

static void test_record(void **state)
{
	char tenant[] = "a";
	Kvg__Budget budget = KVG__BUDGET__INIT;
	char *text = NULL;
	size_t size;
	FILE *out = open_memstream(&text, &size);

	(void)state;
	budget.tenant = tenant;
	budget.device_max = 1536;
	assert_int_equal(table_print_record(out, &budget.base, budget_columns, COUNT(budget_columns)), 0);
	assert_int_equal(fclose(out), 0);
	assert_string_equal(text, "TENANT a\nMAX    1.5 KiB\n");
	free(text);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_cell_formats),
		cmocka_unit_test(test_cell_refusals),
		cmocka_unit_test(test_cell_cuts_long_text),
		cmocka_unit_test(test_rows),
		cmocka_unit_test(test_rows_without_a_value),
		cmocka_unit_test(test_rows_refuse_a_wrong_column),
		cmocka_unit_test(test_record),
	};

	return runner_run("tools/ctl/table", tests, sizeof(tests) / sizeof(*tests));
}
