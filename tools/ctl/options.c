#include "tools/ctl/options.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/size.h"

__attribute__((format(printf, 2, 3))) static int usage(char text[OPTIONS_TEXT], const char *format, ...)
{
	va_list args;

	va_start(args, format);
	(void)vsnprintf(text, OPTIONS_TEXT, format, args);
	va_end(args);
	return -EINVAL;
}

/* How many of the words spell name ("budget set" is two), 0 if they do not. */
static int match_name(const char *name, int count, char **words)
{
	int i = 0;

	while (i < count) {
		size_t length = strcspn(name, " ");

		if (strlen(words[i]) != length || memcmp(words[i], name, length) != 0)
			return 0;
		i++;
		if (!name[length])
			return i;
		name += length + 1;
	}
	return 0;
}

static int parse_size(const char *what, const char *value, uint64_t *ret, char text[OPTIONS_TEXT])
{
	int r = kvg_size_parse(value, ret);

	if (r == -ERANGE)
		return usage(text, "%s%.64s: larger than 4 EiB", what, value);
	if (r < 0)
		return usage(text, "%s'%.64s': not a size such as 512M, 1.5G or 1073741824", what, value);
	return 0;
}

/* "device.max=8G" */
static int parse_budget(const char *word, struct command_arguments *ret, char text[OPTIONS_TEXT])
{
	const char *value = strchr(word, '=');
	char key[32];

	for (size_t i = 0; value && i < COMMAND_BUDGETS; i++) {
		const char *name = command_budget_key(i);

		if (strlen(name) != (size_t)(value - word) || strncmp(word, name, strlen(name)) != 0)
			continue;
		if (ret->budget_set[i])
			return usage(text, "%s: given twice", name);
		ret->budget_set[i] = true;
		(void)snprintf(key, sizeof(key), "%s=", name);
		return parse_size(key, value + 1, &ret->budget[i], text);
	}
	return usage(text,
		"budget '%.64s': expected device.min=SIZE, device.high=, device.max=, host.min=, host.high= or "
		"host.max=",
		word);
}

/* All of the text, in decimal, up to end. */
static bool parse_number(const char *text, const char *end, uint64_t max, uint64_t *ret)
{
	uint64_t value = 0;

	if (text == end)
		return false;
	for (; text < end; text++) {
		uint64_t digit = (uint64_t)(*text - '0');

		if (digit > 9 || value > (max - digit) / 10)
			return false;
		value = value * 10 + digit;
	}
	*ret = value;
	return true;
}

/* EPOCH:SLOT as in the table of sequences, or the handle as one number, as in JSON. */
static bool parse_handle(const char *text, uint64_t *ret)
{
	const char *colon = strchr(text, ':'), *end = text + strlen(text);
	uint64_t epoch, slot;

	if (!colon)
		return parse_number(text, end, UINT64_MAX, ret);
	if (!parse_number(text, colon, UINT32_MAX, &epoch) || !parse_number(colon + 1, end, UINT32_MAX, &slot))
		return false;
	*ret = epoch << 32 | slot;
	return true;
}

static int parse_sequence(char **words, struct command_arguments *ret, char text[OPTIONS_TEXT])
{
	if (!parse_number(words[0], words[0] + strlen(words[0]), UINT64_MAX, &ret->worker))
		return usage(text, "worker '%.64s': not a number", words[0]);
	if (!parse_handle(words[1], &ret->seq))
		return usage(text, "sequence '%.64s': not EPOCH:SLOT", words[1]);
	return 0;
}

/* The options --ratio and --budget, where the command takes them. */
static int check_options(const struct options *options, char text[OPTIONS_TEXT])
{
	const struct command *command = options->command;
	const struct command_arguments *arguments = &options->arguments;
	bool recall = command->form == FORM_RECALL;

	if (arguments->has_ratio && !recall && command->form != FORM_EVICT)
		return usage(text, "%s: takes no --ratio", command->name);
	if (arguments->has_tokens && !recall)
		return usage(text, "%s: takes no --budget", command->name);
	if (recall && arguments->has_ratio == arguments->has_tokens)
		return usage(text, "recall: expected either --ratio R or --budget N");
	return 0;
}

static int parse_arguments(int count, char **words, struct options *options, char text[OPTIONS_TEXT])
{
	static const struct {
		int least, most;
		const char *text;
	} counts[] = {
		[FORM_NONE] = {0, 0, "0 arguments"},
		[FORM_TENANT] = {1, 1, "1 arguments"},
		[FORM_BUDGET] = {2, 1 + COMMAND_BUDGETS, "2 to 7 arguments"},
		[FORM_RECLAIM] = {1, 2, "1 or 2 arguments"},
		[FORM_CONTEXT] = {2, 2, "2 arguments"},
		[FORM_SEQUENCE] = {2, 2, "2 arguments"},
		[FORM_EVICT] = {2, 2, "2 arguments"},
		[FORM_RECALL] = {2, 2, "2 arguments"},
	};
	struct command_arguments *arguments = &options->arguments;
	enum command_form form = options->command->form;
	int r = 0;

	if (count < counts[form].least || count > counts[form].most)
		return usage(text, "%s: takes %s, got %d", options->command->name, counts[form].text, count);
	if (form >= FORM_SEQUENCE)
		return parse_sequence(words, arguments, text);
	if (form != FORM_NONE)
		arguments->tenant = words[0];
	for (int i = 1; form == FORM_BUDGET && r >= 0 && i < count; i++)
		r = parse_budget(words[i], arguments, text);
	if (form == FORM_CONTEXT &&
		!parse_number(words[1], words[1] + strlen(words[1]), UINT64_MAX, &arguments->context))
		return usage(text, "context '%.64s': not a number", words[1]);
	arguments->has_bytes = form == FORM_RECLAIM && count == 2;
	if (arguments->has_bytes)
		r = parse_size("", words[1], &arguments->bytes, text);
	return r;
}

static int parse_command(int count, char **words, struct options *options, char text[OPTIONS_TEXT])
{
	size_t table_count;
	const struct command *table = command_table(&table_count), *found = NULL;
	int used = 0;

	for (size_t i = 0; i < table_count; i++) {
		int n = match_name(table[i].name, count, words);

		if (n <= used)
			continue;
		used = n; /* "contexts drop" is more than "contexts" */
		found = &table[i];
	}
	if (count == 0)
		return usage(text, "no command");
	if (!found && strcmp(words[0], "budget") == 0)
		return usage(text, "budget: expected 'get TENANT', 'set TENANT KEY=SIZE...' or 'reset TENANT'");
	if (!found)
		return usage(text, "unknown command '%.64s'", words[0]);
	options->command = found;
	if (parse_arguments(count - used, words + used, options, text) < 0)
		return -EINVAL;
	return check_options(options, text);
}

static int parse_ratio(const char *value, struct command_arguments *ret, char text[OPTIONS_TEXT])
{
	char *end;

	ret->ratio = strtod(value, &end);
	if (end == value || *end || !(ret->ratio > 0 && ret->ratio <= 1))
		return usage(text, "--ratio '%.64s': not a number above 0, at most 1", value);
	ret->has_ratio = true;
	return 0;
}

static int parse_tokens(const char *value, struct command_arguments *ret, char text[OPTIONS_TEXT])
{
	uint64_t tokens;

	if (!parse_number(value, value + strlen(value), UINT32_MAX, &tokens) || tokens == 0)
		return usage(text, "--budget '%.64s': not a number of tokens from 1 to %" PRIu32, value, UINT32_MAX);
	ret->tokens = (uint32_t)tokens;
	ret->has_tokens = true;
	return 0;
}

/* What getopt_long() did not take: argv[optind - 1], or the letter in optopt of a bundle. */
static int bad_option(int c, char **argv, char text[OPTIONS_TEXT])
{
	if (c == ':')
		return usage(text, "option '%.64s' needs a value", argv[optind - 1]);
	if (optopt && strncmp(argv[optind - 1], "--", 2) != 0)
		return usage(text, "unknown option '-%c'", optopt);
	return usage(text, "unknown option '%.64s'", argv[optind - 1]);
}

int options_parse(int argc, char **argv, struct options *ret, char text[OPTIONS_TEXT])
{
	static const struct option table[] = {
		{"socket", required_argument, NULL, 's'},
		{"json", no_argument, NULL, 'j'},
		{"ratio", required_argument, NULL, 'r'},
		{"budget", required_argument, NULL, 'b'},
		{"help", no_argument, NULL, 'h'},
		{"version", no_argument, NULL, 'v'},
		{0},
	};
	struct options options = {.socket = OPTIONS_SOCKET};
	int c, r = 0;

	optind = 0; /* getopt starts anew, also on a second call */
	opterr = 0;
	while ((c = getopt_long(argc, argv, ":h", table, NULL)) != -1) {
		if (c == 's')
			options.socket = optarg;
		else if (c == 'j')
			options.json = true;
		else if (c == 'r')
			r = parse_ratio(optarg, &options.arguments, text);
		else if (c == 'b')
			r = parse_tokens(optarg, &options.arguments, text);
		else if (c == 'h')
			options.help = true;
		else if (c == 'v')
			options.version = true;
		else
			return bad_option(c, argv, text);
		if (r < 0)
			return r;
	}
	if (!options.help && !options.version) {
		r = parse_command(argc - optind, argv + optind, &options, text);
		if (r < 0)
			return r;
	}
	*ret = options;
	return 0;
}
