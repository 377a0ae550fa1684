/* kvgated: owns the KV-cache memory of inference workers. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cblas.h>

#include "daemon/base/log.h"
#include "daemon/daemon.h"

static const char usage[] = "Usage: kvgated --config FILE [--socket PATH] [--state-dir DIR]\n"
			    "\n"
			    "Owns the KV-cache memory of inference workers, scores and evicts KV pairs, and holds\n"
			    "each tenant to its budget. Runs in the foreground until SIGTERM.\n"
			    "\n"
			    "  --config FILE    the configuration (see kvgated.conf)\n"
			    "  --socket PATH    the first tenant's socket, instead of the configured one\n"
			    "  --state-dir DIR  lock, relative socket paths, admin.sock (default /run/kvgate)\n"
			    "  --version        print the version\n"
			    "  --help           print this\n";

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"config", required_argument, NULL, 'c'},
		{"socket", required_argument, NULL, 's'},
		{"state-dir", required_argument, NULL, 'd'},
		{"version", no_argument, NULL, 'v'},
		{"help", no_argument, NULL, 'h'},
		{0},
	};
	struct daemon_options daemon = {.state_dir = "/run/kvgate"};
	const char *path = NULL;
	struct config config;
	char text[CONFIG_TEXT];
	int option, status;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'c') {
			path = optarg;
		} else if (option == 's') {
			daemon.socket = optarg;
		} else if (option == 'd') {
			daemon.state_dir = optarg;
		} else if (option == 'v' || option == 'h') {
			(void)fputs(option == 'v' ? "kvgated " KVG_VERSION "\n" : usage, stdout);
			return EXIT_SUCCESS;
		} else {
			return 2;
		}
	}
	if (!path || optind != argc) {
		(void)fputs(usage, stderr);
		return 2;
	}
	if (config_read(path, &config, text) < 0) {
		log_error("%s", text);
		return EXIT_FAILURE;
	}
	openblas_set_num_threads(1); /* the executor is one thread by design */
	status = daemon_run(&config, &daemon);
	config_deinit(&config);
	return status;
}
