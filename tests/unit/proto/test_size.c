#include "proto/size.h"

#include <errno.h>

#include "tests/support/runner.h"

static void test_parse(void **state)
{
	static const struct {
		const char *text;
		uint64_t bytes;
	} cases[] = {
		{"0", 0},
		{"512", 512},
		{"512B", 512},
		{"64K", 65536},
		{"64k", 65536},
		{"64KB", 65536},
		{"64KiB", 65536},
		{"256MiB", UINT64_C(256) << 20},
		{"256mib", UINT64_C(256) << 20},
		{"8.0 GiB", UINT64_C(8) << 30},
		{"1.5G", UINT64_C(3) << 29},
		{"0.25K", 256},
		{"1.999999999T", UINT64_C(2199023254452)},
		{"2P", UINT64_C(2) << 50},
		{"4E", UINT64_C(1) << 62},
		{"4611686018427387904", UINT64_C(1) << 62},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		uint64_t bytes = 1;

		if (kvg_size_parse(cases[i].text, &bytes) != 0 || bytes != cases[i].bytes)
			fail_msg("%s: %llu", cases[i].text, (unsigned long long)bytes);
	}
}

static void test_refused(void **state)
{
	static const struct {
		const char *text;
		int error;
	} cases[] = {
		{"", -EINVAL},
		{" 1", -EINVAL},
		{"K", -EINVAL},
		{"-1", -EINVAL},
		{"+1", -EINVAL},
		{"0x10", -EINVAL},
		{"1e3", -EINVAL},
		{"1.5", -EINVAL},
		{"1.5B", -EINVAL},
		{"1.G", -EINVAL},
		{".5G", -EINVAL},
		{"1.0123456789G", -EINVAL},
		{"1Q", -EINVAL},
		{"1iB", -EINVAL},
		{"1KiBs", -EINVAL},
		{"1K 2", -EINVAL},
		{"nan", -EINVAL},
		{"4611686018427387905", -ERANGE},
		{"99999999999999999999999999", -ERANGE},
		{"5E", -ERANGE},
		{"4.1E", -ERANGE},
		{"4097P", -ERANGE},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		uint64_t bytes = 77;
		int r = kvg_size_parse(cases[i].text, &bytes);

		if (r != cases[i].error || (r < 0 && bytes != 77))
			fail_msg("'%s': %d, not %d", cases[i].text, r, cases[i].error);
	}
}

static void test_format(void **state)
{
	static const struct {
		uint64_t bytes;
		const char *text;
	} cases[] = {
		{0, "0 B"},
		{1023, "1023 B"},
		{1024, "1.0 KiB"},
		{1536, "1.5 KiB"},
		{1048575, "1023.9 KiB"},
		{UINT64_C(8) << 30, "8.0 GiB"},
		{(UINT64_C(8) << 30) - 1, "7.9 GiB"},
		{UINT64_C(1) << 62, "4.0 EiB"},
		{UINT64_MAX, "15.9 EiB"},
	};
	char text[KVG_SIZE_TEXT];

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		assert_string_equal(kvg_size_format(cases[i].bytes, text), cases[i].text);
}

static void test_there_and_back(void **state)
{
	char text[KVG_SIZE_TEXT];

	(void)state;
	for (unsigned shift = 0; shift <= 62; shift++) {
		uint64_t bytes;

		assert_int_equal(kvg_size_parse(kvg_size_format(UINT64_C(1) << shift, text), &bytes), 0);
		assert_int_equal(bytes, UINT64_C(1) << shift);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_parse),
		cmocka_unit_test(test_refused),
		cmocka_unit_test(test_format),
		cmocka_unit_test(test_there_and_back),
	};

	return runner_run("size", tests, sizeof(tests) / sizeof(tests[0]));
}
