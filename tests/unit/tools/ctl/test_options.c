#include "tools/ctl/options.h"

#include <errno.h>
#include <string.h>

#include "tests/support/runner.h"

#define MAX_WORDS 8

/* Parses the words of a line, separated by single spaces. The words live in line. */
static int parse(char *line, struct options *ret, char text[OPTIONS_TEXT])
{
	static char program[] = "kvgatectl";
	char *argv[MAX_WORDS + 1] = {program};
	int argc = 1;

	for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) {
		assert_true(argc < MAX_WORDS);
		argv[argc++] = word;
	}
	return options_parse(argc, argv, ret, text);
}

static void test_defaults(void **state)
{
	char line[] = "status", text[OPTIONS_TEXT];
	struct options options;

	(void)state;
	assert_int_equal(parse(line, &options, text), 0);
	assert_string_equal(options.socket, "/run/kvgate/admin.sock");
	assert_string_equal(options.command->name, "status");
	assert_false(options.json);
	assert_false(options.help);
}

static void test_options_stand_anywhere(void **state)
{
	char line[] = "budget --json set search --socket /tmp/a device.max=1.5G", text[OPTIONS_TEXT];
	struct options options;

	(void)state;
	assert_int_equal(parse(line, &options, text), 0);
	assert_true(options.json);
	assert_string_equal(options.socket, "/tmp/a");
	assert_string_equal(options.command->name, "budget set");
	assert_string_equal(options.arguments.tenant, "search");
	assert_int_equal(options.arguments.device_max, 1610612736);
}

static void test_every_command(void **state)
{
	static const char *const lines[] = {
		"status", "tenants", "workers", "sequences", "audit", "budget get a", "budget set a device.max=1"};
	size_t count;

	(void)state;
	(void)command_table(&count);
	assert_int_equal(count, sizeof(lines) / sizeof(*lines));
	for (size_t i = 0; i < count; i++) {
		char line[64], text[OPTIONS_TEXT];
		struct options options;

		(void)snprintf(line, sizeof(line), "%s", lines[i]);
		assert_int_equal(parse(line, &options, text), 0);
		assert_int_equal(strncmp(lines[i], options.command->name, strlen(options.command->name)), 0);
	}
}

static void test_help_needs_no_command(void **state)
{
	char help[] = "--help", bare[] = "-h status", version[] = "--version", text[OPTIONS_TEXT];
	struct options options;

	(void)state;
	assert_int_equal(parse(help, &options, text), 0);
	assert_true(options.help);
	assert_int_equal(parse(bare, &options, text), 0);
	assert_true(options.help);
	assert_int_equal(parse(version, &options, text), 0);
	assert_true(options.version);
}

static void test_refusals(void **state)
{
	static const struct {
		const char *line, *reason;
	} cases[] = {
		{"", "no command"},
		{"stats", "unknown command 'stats'"},
		{"status now", "status: takes 0 arguments, got 1"},
		{"budget", "budget: expected 'get TENANT' or 'set TENANT device.max=SIZE'"},
		{"budget give a", "budget: expected 'get TENANT' or 'set TENANT device.max=SIZE'"},
		{"budget get", "budget get: takes 1 arguments, got 0"},
		{"budget set a", "budget set: takes 2 arguments, got 1"},
		{"budget set a 5G", "budget '5G': expected device.max=SIZE"},
		{"budget set a device.min=5G", "budget 'device.min=5G': expected device.max=SIZE"},
		{"budget set a device.max=", "device.max='': not a size such as 512M, 1.5G or 1073741824"},
		{"budget set a device.max=-1", "device.max='-1': not a size such as 512M, 1.5G or 1073741824"},
		{"budget set a device.max=8E", "device.max=8E: larger than 4 EiB"},
		{"status --sock", "option '--sock' needs a value"},
		{"status --socket", "option '--socket' needs a value"},
		{"status --jason", "unknown option '--jason'"},
		{"status --json=1", "unknown option '--json=1'"},
		{"status -x", "unknown option '-x'"},
		{"status -hx", "unknown option '-x'"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		char line[64], text[OPTIONS_TEXT] = "";
		struct options options = {.socket = "untouched"};

		(void)snprintf(line, sizeof(line), "%s", cases[i].line);
		assert_int_equal(parse(line, &options, text), -EINVAL);
		assert_string_equal(text, cases[i].reason);
		assert_string_equal(options.socket, "untouched");
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_defaults),
		cmocka_unit_test(test_options_stand_anywhere),
		cmocka_unit_test(test_every_command),
		cmocka_unit_test(test_help_needs_no_command),
		cmocka_unit_test(test_refusals),
	};

	return runner_run("tools/ctl/options", tests, sizeof(tests) / sizeof(*tests));
}
