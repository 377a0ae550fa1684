/*
 * kvgatectl - the operator's tool: asks a running kvgated through its admin socket.
 * Exit status: 0 done (and, for audit, clean), 1 failed, 2 wrong command line.
 */
#include <ctype.h>
#include <errno.h>
#include <locale.h>
#include <stdio.h>
#include <string.h>

#include "tools/ctl/admin.h"
#include "tools/ctl/options.h"

#define ANSWER_TIMEOUT_MS 30000  /* an audit of a full pool takes less than a second */
#define WORK_TIMEOUT_MS   660000 /* workers have pressure_ms to give memory back, which is at most 600000 */

enum { EXIT_DONE = 0, EXIT_FAILED = 1, EXIT_USAGE = 2 };

/* One line on standard error, whatever bytes the daemon's text holds. */
static int complain(int status, const char *text)
{
	char line[ADMIN_TEXT];
	size_t n = 0;

	for (; text[n] && n + 1 < sizeof(line); n++)
		line[n] = iscntrl((unsigned char)text[n]) ? ' ' : text[n];
	line[n] = '\0';
	(void)fprintf(stderr, "kvgatectl: %s\n", line);
	return status;
}

static void print_help(FILE *out)
{
	size_t count;
	const struct command *table = command_table(&count);

	(void)fprintf(out, "Usage: kvgatectl [--socket ADMIN_SOCKET] [--json] COMMAND\n\n"
			   "Asks a running kvgated. Commands:\n");
	for (size_t i = 0; i < count; i++)
		(void)fprintf(out, "  %s %-*s %s\n", table[i].name, (int)(41 - strlen(table[i].name)),
			table[i].arguments, table[i].help);
	(void)fprintf(out,
		"\nOptions:\n"
		"  --socket ADMIN_SOCKET   default " OPTIONS_SOCKET "\n"
		"  --json                  one JSON object; sizes are exact bytes\n"
		"  --version               print the version\n"
		"  -h, --help              print this\n\n"
		"KEY is device.min, device.high, device.max, host.min, host.high or host.max; a high of 0 is\n"
		"none. WORKER and SEQ (EPOCH:SLOT) are as `workers` and `sequences` show them; the sequence\n"
		"must be one that its worker has released as idle. R is the share of pairs to keep, N the tokens\n"
		"to keep for each head. CONTEXT is the number that `contexts` shows.\n"
		"SIZE is a number of bytes, or one with K, M, G, T (powers of 1024): 512M, 1.5G.\n"
		"Exit status: 0 done, 1 failed (for audit also: a difference was found), 2 wrong usage.\n");
}

/* Standard output may be a full disk or a closed pipe: what was not written was not done. */
static int finish_output(int r)
{
	if (r == 0 && (fflush(stdout) == EOF || ferror(stdout)))
		r = -EIO;
	if (r == -EIO)
		return complain(EXIT_FAILED, "standard output: write failed");
	if (r < 0)
		return complain(EXIT_FAILED, strerror(-r));
	return EXIT_DONE;
}

static int run(const struct options *options)
{
	struct command_request request;
	const ProtobufCMessage *answer;
	Kvg__AdminReply *reply;
	char text[ADMIN_TEXT];
	int status;

	command_request(options->command, &options->arguments, &request);
	if (admin_call(options->socket, &request.message, options->command->waits ? WORK_TIMEOUT_MS : ANSWER_TIMEOUT_MS,
		    &reply, text) < 0)
		return complain(EXIT_FAILED, text);
	answer = command_answer(options->command, reply);
	if (!answer)
		status = complain(
			EXIT_FAILED, "the daemon answered something else than was asked; is it another version?");
	else if (options->json)
		status = finish_output(command_print_json(stdout, answer));
	else
		status = finish_output(command_print(stdout, options->command, answer));
	if (status == EXIT_DONE && reply->body_case == KVG__ADMIN_REPLY__BODY_AUDIT && !reply->audit->clean)
		status = EXIT_FAILED;
	kvg__admin_reply__free_unpacked(reply, NULL);
	return status;
}

int main(int argc, char **argv)
{
	struct options options;
	char text[OPTIONS_TEXT];

	(void)setlocale(LC_ALL, "");
	if (options_parse(argc, argv, &options, text) < 0)
		return complain(EXIT_USAGE, text);
	if (options.help) {
		print_help(stdout);
		return finish_output(0);
	}
	if (options.version)
		return finish_output(printf("kvgatectl %s\n", KVG_VERSION) < 0 ? -EIO : 0);
	return run(&options);
}
