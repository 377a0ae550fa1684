/* The table of what a worker has handed over; opening and closing need a GPU. */
#include "tests/support/runner.h"

#include <errno.h>
#include <string.h>

#include "daemon/sequence/imports.h"

static const struct import buffer = {.kind = IMPORT_BUFFER, .base = 4096, .address = 8192, .size = 64};
static const struct import event = {.kind = IMPORT_EVENT};

static void test_finds_by_id_and_kind(void **state)
{
	struct imports imports = {0};
	uint32_t first = imports_add(&imports, &buffer), second = imports_add(&imports, &event);

	(void)state;
	assert_int_equal(first, IMPORT_FIRST);
	assert_int_equal(second, IMPORT_FIRST + 1);
	assert_int_equal(imports_find(&imports, first, IMPORT_BUFFER)->address, 8192);
	assert_null(imports_find(&imports, first, IMPORT_EVENT));
	assert_non_null(imports_find(&imports, second, IMPORT_EVENT));
	for (uint32_t id = 0; id < IMPORT_FIRST; id++) {
		assert_null(imports_find(&imports, id, IMPORT_BUFFER));
		assert_null(imports_find(&imports, id, IMPORT_EVENT));
		assert_null(imports_find(&imports, id, IMPORT_NONE));
	}
	assert_null(imports_find(&imports, second + 1, IMPORT_BUFFER));
}

static void test_keeps_what_is_used(void **state)
{
	struct imports imports = {0};
	uint32_t id = imports_add(&imports, &buffer);
	struct import *import = imports_find(&imports, id, IMPORT_BUFFER), taken = {0};

	(void)state;
	import_use(import);
	import_use(import);
	import_unuse(import);
	assert_int_equal(imports_take(&imports, id, &taken), -EBUSY);
	import_unuse(import);
	assert_int_equal(imports_take(&imports, id + 1, &taken), -ENOENT);
	assert_int_equal(taken.kind, IMPORT_NONE);
	assert_int_equal(imports_take(&imports, id, &taken), 0);
	assert_int_equal(taken.base, 4096);
	assert_int_equal(imports_take(&imports, id, &taken), -ENOENT);
	assert_int_equal(imports.count, 0);
	/* An id is never given twice. */
	assert_int_equal(imports_add(&imports, &buffer), id + 1);
}

static void test_has_an_end(void **state)
{
	struct imports imports = {0};
	struct import taken;

	(void)state;
	for (uint32_t i = 0; i < IMPORTS_MAX; i++)
		assert_int_equal(imports_add(&imports, &event), IMPORT_FIRST + i);
	assert_int_equal(imports_add(&imports, &event), 0);
	assert_int_equal(imports_take(&imports, IMPORT_FIRST + 5, &taken), 0);
	assert_int_equal(imports_add(&imports, &event), IMPORT_FIRST + IMPORTS_MAX);
	assert_int_equal(imports_take(&imports, IMPORT_FIRST, &taken), 0);
	imports.last_id = UINT32_MAX;
	assert_int_equal(imports_add(&imports, &event), 0);
}

static void test_closes_nothing_without_imports(void **state)
{
	struct imports imports = {0};

	(void)state;
	imports_close(&imports, NULL);
	assert_int_equal(imports.count, 0);
}

static void test_parts(void **state)
{
	char text[128] = "";

	(void)state;
	assert_int_equal(import_check_part(0, 1, 1, text, sizeof(text)), 0);
	assert_int_equal(import_check_part(4080, 16, 4096, text, sizeof(text)), 0);
	assert_string_equal(text, "");
	assert_int_equal(import_check_part(0, 0, 4096, text, sizeof(text)), -EINVAL);
	assert_string_equal(text, "import: 0 bytes at 0 of an allocation of 4096");
	assert_int_equal(import_check_part(16, UINT64_MAX - 15, 4096, text, sizeof(text)), -EINVAL);
	assert_int_equal(import_check_part(4112, 16, 4096, text, sizeof(text)), -EINVAL);
	/* A kernel that reads rows there would fault. */
	assert_int_equal(import_check_part(8, 16, 4096, text, sizeof(text)), -EINVAL);
	assert_string_equal(text, "import: offset 8 is not a multiple of 16");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_finds_by_id_and_kind),
		cmocka_unit_test(test_keeps_what_is_used),
		cmocka_unit_test(test_has_an_end),
		cmocka_unit_test(test_closes_nothing_without_imports),
		cmocka_unit_test(test_parts),
	};

	return runner_run("imports", tests, sizeof(tests) / sizeof(tests[0]));
}
