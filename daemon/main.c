/* kvgated: owns the KV-cache memory of inference workers. */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/base/log.h"
#include "daemon/daemon.h"

static const char usage[] = "Usage: kvgated --config FILE [--socket PATH] [--state-dir DIR]\n"
			    "\n"
			    "Owns the KV-cache memory of inference workers, scores and evicts KV pairs, and holds\n"
			    "each tenant to its budget. Runs in the foreground until SIGTERM.\n"
			    "\n"
			    "  --config FILE    the configuration (see kvgated.conf)\n"
			    "  --socket PATH    the first tenant's socket, instead of the configured one\n"
			    "  --state-dir DIR  lock, relative socket paths, admin.sock, and budgets that were set\n"
			    "                   (default /run/kvgate, and /var/lib/kvgate for the budgets)\n"
			    "  --version        print the version\n"
			    "  --help           print this\n"
			    "\n"
			    "Exit status: 0 after SIGTERM or SIGINT, 1 for an error at the start, 2 for wrong\n"
			    "arguments, 3 when the GPU was lost (the KV with it; start kvgated again).\n";

/*
 * The BLAS library starts threads before main() as the environment says, and their signal masks are not ours:
 * a SIGTERM that one of them takes ends the process on the spot. The executor is one thread by design, so
 * we start again with an environment that asks for no others.
 */
static void start_without_blas_threads(char **argv)
{
	const char *threads = getenv("OPENBLAS_NUM_THREADS");

	if (threads && strcmp(threads, "1") == 0)
		return;
	if (setenv("OPENBLAS_NUM_THREADS", "1", 1) == 0)
		(void)execv("/proc/self/exe", argv);
	log_warning("cannot start without BLAS threads: %s", strerror(errno));
}

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
	struct daemon_options daemon = {.state_dir = "/run/kvgate", .budgets_dir = "/var/lib/kvgate"};
	const char *path = NULL;
	struct config config;
	char text[CONFIG_TEXT];
	int option, status;

	start_without_blas_threads(argv);
	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'c') {
			path = optarg;
		} else if (option == 's') {
			daemon.socket = optarg;
		} else if (option == 'd') {
			daemon.state_dir = optarg;
			daemon.budgets_dir = NULL;
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
	status = daemon_run(&config, &daemon);
	config_deinit(&config);
	return status;
}
