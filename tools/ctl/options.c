#include "tools/ctl/options.h"

#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "proto/size.h"

static const char budget_key[] = "device.max=";

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

static int parse_budget(const char *word, struct command_arguments *ret, char text[OPTIONS_TEXT])
{
	const char *value = word + sizeof(budget_key) - 1;
	int r;

	if (strncmp(word, budget_key, sizeof(budget_key) - 1) != 0)
		return usage(text, "budget '%.64s': expected %sSIZE", word, budget_key);
	r = kvg_size_parse(value, &ret->device_max);
	if (r == -ERANGE)
		return usage(text, "%s%.64s: larger than 4 EiB", budget_key, value);
	if (r < 0)
		return usage(text, "%s'%.64s': not a size such as 512M, 1.5G or 1073741824", budget_key, value);
	return 0;
}

static int parse_command(int count, char **words, struct options *options, char text[OPTIONS_TEXT])
{
	size_t table_count;
	const struct command *table = command_table(&table_count), *found = NULL;
	int used = 0;

	for (size_t i = 0; i < table_count && !found; i++) {
		used = match_name(table[i].name, count, words);
		if (used > 0)
			found = &table[i];
	}
	if (count == 0)
		return usage(text, "no command");
	if (!found && strcmp(words[0], "budget") == 0)
		return usage(text, "budget: expected 'get TENANT' or 'set TENANT device.max=SIZE'");
	if (!found)
		return usage(text, "unknown command '%.64s'", words[0]);
	if ((size_t)(count - used) != found->argument_count)
		return usage(text, "%s: takes %zu arguments, got %d", found->name, found->argument_count, count - used);
	options->command = found;
	if (found->argument_count > 0)
		options->arguments.tenant = words[used];
	if (found->argument_count > 1)
		return parse_budget(words[used + 1], &options->arguments, text);
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
		{"help", no_argument, NULL, 'h'},
		{"version", no_argument, NULL, 'v'},
		{0},
	};
	struct options options = {.socket = OPTIONS_SOCKET};
	int c, r;

	optind = 0; /* getopt starts anew, also on a second call */
	opterr = 0;
	while ((c = getopt_long(argc, argv, ":h", table, NULL)) != -1) {
		if (c == 's')
			options.socket = optarg;
		else if (c == 'j')
			options.json = true;
		else if (c == 'h')
			options.help = true;
		else if (c == 'v')
			options.version = true;
		else
			return bad_option(c, argv, text);
	}
	if (!options.help && !options.version) {
		r = parse_command(argc - optind, argv + optind, &options, text);
		if (r < 0)
			return r;
	}
	*ret = options;
	return 0;
}
