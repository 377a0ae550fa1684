/*
 * options.h - kvgatectl's command line. Everything in the result points into argv.
 */
#ifndef KVG_CTL_OPTIONS_H
#define KVG_CTL_OPTIONS_H

#include <stdbool.h>

#include "tools/ctl/command.h"

#define OPTIONS_SOCKET "/run/kvgate/admin.sock"
#define OPTIONS_TEXT   512 /* bytes of an error's text */

struct options {
	const char *socket; /* default OPTIONS_SOCKET */
	bool json, help, version;
	const struct command *command; /* not NULL unless help or version is asked */
	struct command_arguments arguments;
};

/*
 * Reads a command line; options may stand anywhere before "--". 0, or -EINVAL with one
 * line in text that names the word that is wrong.
 */
int options_parse(int argc, char **argv, struct options *ret, char text[OPTIONS_TEXT]);

#endif
