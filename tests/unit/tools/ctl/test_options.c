#include "tools/ctl/options.h"

#include <errno.h>
#include <string.h>

#include "tests/support/runner.h"

#define MAX_WORDS 10
#define EXPECTED(word)                                                                                                 \
	"budget '" word "': expected device.min=SIZE, device.high=, device.max=, host.min=, host.high= or host.max="

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
	for (size_t i = 0; i < COMMAND_BUDGETS; i++)
		assert_int_equal(options.arguments.budget_set[i], strcmp(command_budget_key(i), "device.max") == 0);
	assert_int_equal(options.arguments.budget[2], 1610612736);
}

static void test_every_command(void **state)
{
	static const char *const lines[] = {"status", "tenants", "workers", "sequences", "contexts",
		"contexts drop a 7", "audit", "budget get a", "budget set a device.max=1", "budget reset a",
		"reclaim a", "evict 1 2:3", "recall 1 2:3 --ratio 1", "offload 1 2:3", "restore 1 2:3"};
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

static void test_several_budgets(void **state)
{
	char line[] = "budget set a host.max=6 device.min=1 device.max=3 host.high=0", text[OPTIONS_TEXT];
	const bool set[COMMAND_BUDGETS] = {true, false, true, false, true, true};
	const uint64_t bytes[COMMAND_BUDGETS] = {1, 0, 3, 0, 0, 6};
	struct options options;

	(void)state;
	assert_int_equal(parse(line, &options, text), 0);
	assert_memory_equal(options.arguments.budget_set, set, sizeof(set));
	assert_memory_equal(options.arguments.budget, bytes, sizeof(bytes));
}

static void test_reclaim(void **state)
{
	char all[] = "reclaim a", some[] = "reclaim a 1.5K", text[OPTIONS_TEXT];
	struct options options;

	(void)state;
	assert_int_equal(parse(all, &options, text), 0);
	assert_false(options.arguments.has_bytes);
	assert_string_equal(options.arguments.tenant, "a");
	assert_int_equal(parse(some, &options, text), 0);
	assert_true(options.arguments.has_bytes);
	assert_int_equal(options.arguments.bytes, 1536);
}

static void test_context(void **state)
{
	char drop[] = "contexts drop a 18446744073709551615", list[] = "contexts", text[OPTIONS_TEXT];
	struct options options;

	(void)state;
	assert_int_equal(parse(drop, &options, text), 0);
	assert_string_equal(options.command->name, "contexts drop");
	assert_string_equal(options.arguments.tenant, "a");
	assert_true(options.arguments.context == UINT64_MAX);
	assert_int_equal(parse(list, &options, text), 0);
	assert_string_equal(options.command->name, "contexts");
}

static void test_sequence_work(void **state)
{
	char evict[] = "evict 7 5:6 --ratio 0.25", handle[] = "offload 18446744073709551615 21474836486",
	     recall[] = "recall --budget 4294967295 7 4294967295:4294967295", text[OPTIONS_TEXT];
	struct options options;

	(void)state;
	assert_int_equal(parse(evict, &options, text), 0);
	assert_int_equal(options.arguments.worker, 7);
	assert_true(options.arguments.seq == (UINT64_C(5) << 32 | 6));
	assert_true(options.arguments.has_ratio && options.arguments.ratio == 0.25);
	assert_false(options.arguments.has_tokens);
	assert_int_equal(parse(handle, &options, text), 0);
	assert_true(options.arguments.worker == UINT64_MAX);
	assert_true(options.arguments.seq == (UINT64_C(5) << 32 | 6));
	assert_int_equal(parse(recall, &options, text), 0);
	assert_true(options.arguments.seq == UINT64_MAX);
	assert_true(options.arguments.has_tokens);
	assert_int_equal(options.arguments.tokens, UINT32_MAX);
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
		{"budget", "budget: expected 'get TENANT', 'set TENANT KEY=SIZE...' or 'reset TENANT'"},
		{"budget give a", "budget: expected 'get TENANT', 'set TENANT KEY=SIZE...' or 'reset TENANT'"},
		{"budget get", "budget get: takes 1 arguments, got 0"},
		{"budget set a", "budget set: takes 2 to 7 arguments, got 1"},
		{"budget set a 5G", EXPECTED("5G")},
		{"budget set a device.mid=5G", EXPECTED("device.mid=5G")},
		{"budget set a device.max=1 host.ma=5G", EXPECTED("host.ma=5G")},
		{"budget set a host.min=1 device.max=2 host.min=1", "host.min: given twice"},
		{"budget set a host.min=x", "host.min='x': not a size such as 512M, 1.5G or 1073741824"},
		{"budget reset", "budget reset: takes 1 arguments, got 0"},
		{"reclaim", "reclaim: takes 1 or 2 arguments, got 0"},
		{"reclaim a all", "'all': not a size such as 512M, 1.5G or 1073741824"},
		{"contexts drop a", "contexts drop: takes 2 arguments, got 1"},
		{"contexts drop a 0x7", "context '0x7': not a number"},
		{"contexts a", "contexts: takes 0 arguments, got 1"},
		{"evict 1", "evict: takes 2 arguments, got 1"},
		{"evict one 2:3", "worker 'one': not a number"},
		{"evict 18446744073709551616 2:3", "worker '18446744073709551616': not a number"},
		{"evict 1 2:", "sequence '2:': not EPOCH:SLOT"},
		{"evict 1 2:4294967296", "sequence '2:4294967296': not EPOCH:SLOT"},
		{"evict 1 2:3 --budget 4", "evict: takes no --budget"},
		{"evict 1 2:3 --ratio 0", "--ratio '0': not a number above 0, at most 1"},
		{"evict 1 2:3 --ratio nan", "--ratio 'nan': not a number above 0, at most 1"},
		{"evict 1 2:3 --ratio 0.5x", "--ratio '0.5x': not a number above 0, at most 1"},
		{"recall 1 2:3", "recall: expected either --ratio R or --budget N"},
		{"recall 1 2:3 --ratio 1 --budget 1", "recall: expected either --ratio R or --budget N"},
		{"recall 1 2:3 --budget 0", "--budget '0': not a number of tokens from 1 to 4294967295"},
		{"offload 1 2:3 --ratio 1", "offload: takes no --ratio"},
		{"status --ratio 1", "status: takes no --ratio"},
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
		char line[80], text[OPTIONS_TEXT] = "";
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
		cmocka_unit_test(test_several_budgets),
		cmocka_unit_test(test_reclaim),
		cmocka_unit_test(test_context),
		cmocka_unit_test(test_sequence_work),
		cmocka_unit_test(test_help_needs_no_command),
		cmocka_unit_test(test_refusals),
	};

	return runner_run("tools/ctl/options", tests, sizeof(tests) / sizeof(*tests));
}
