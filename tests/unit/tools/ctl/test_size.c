#include "tools/ctl/size.h"

#include <errno.h>

#include "tests/support/runner.h"

static void test_parse_accepts(void **state)
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
		{"256MiB", 268435456},
		{"1.5G", 1610612736},
		{"0.5K", 512},
		{"1.0000000001K", 1024},
		{"2T", UINT64_C(2199023255552)},
		{"4E", UINT64_C(1) << 62},
		{"4611686018427387904", UINT64_C(1) << 62},
		{"3.999999999E", UINT64_C(4611686017274466399)},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		uint64_t bytes = 1;

		assert_int_equal(ctl_size_parse(cases[i].text, &bytes), 0);
		assert_int_equal(bytes, cases[i].bytes);
	}
}

static void test_parse_refuses(void **state)
{
	static const struct {
		const char *text;
		int status;
	} cases[] = {
		{"", -EINVAL},
		{"K", -EINVAL},
		{"-1", -EINVAL},
		{"+1", -EINVAL},
		{" 1", -EINVAL},
		{"1 ", -EINVAL},
		{"1.", -EINVAL},
		{".5G", -EINVAL},
		{"1..5G", -EINVAL},
		{"1Q", -EINVAL},
		{"1Ki", -EINVAL},
		{"1KiBs", -EINVAL},
		{"1BB", -EINVAL},
		{"0x10", -EINVAL},
		{"1e3", -EINVAL},
		{"inf", -EINVAL},
		{"4.1E", -ERANGE},
		{"5E", -ERANGE},
		{"4611686018427387905", -ERANGE},
		{"18446744073709551616", -ERANGE},
		{"99999999999999999999999", -ERANGE},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		uint64_t bytes = 77;

		assert_int_equal(ctl_size_parse(cases[i].text, &bytes), cases[i].status);
		assert_int_equal(bytes, 77);
	}
}

static void test_format(void **state)
{
	char text[CTL_SIZE_TEXT];

	(void)state;
	assert_string_equal(ctl_size_format(0, text), "0 B");
	assert_string_equal(ctl_size_format(1023, text), "1023 B");
	assert_string_equal(ctl_size_format(1024, text), "1.0 KiB");
	assert_string_equal(ctl_size_format(1048575, text), "1.0 MiB");
	assert_string_equal(ctl_size_format(UINT64_C(8) << 30, text), "8.0 GiB");
	assert_string_equal(ctl_size_format(UINT64_C(1610612736), text), "1.5 GiB");
	assert_string_equal(ctl_size_format(UINT64_MAX, text), "16.0 EiB");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_parse_accepts),
		cmocka_unit_test(test_parse_refuses),
		cmocka_unit_test(test_format),
	};

	return runner_run("tools/ctl/size", tests, sizeof(tests) / sizeof(*tests));
}
