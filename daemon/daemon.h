/*
 * daemon.h - the whole daemon from configuration to clean stop: lock, memory,
 * tenants, sockets, signals, and word to the service manager.
 */
#ifndef KVG_DAEMON_H
#define KVG_DAEMON_H

#include "daemon/config.h"
#include "daemon/memory/kind.h"

/*
 * Exit status when the GPU was lost for this process (an illegal address, an ECC error, the end of the MPS server): the
 * KV is gone, the workers have been told, and a new process can begin anew.
 */
#define DAEMON_DEVICE_LOST 3

struct daemon_options {
	const char *socket;    /* the first tenant's, instead of the configured one; or NULL */
	const char *state_dir; /* exists or is created */

	/* Where budgets that were set are kept unless the configuration says so; NULL: the state directory. */
	const char *budgets_dir;
	struct kind *kind; /* memory instead of the configured kind, borrowed; or NULL */
};

/* Runs until SIGTERM or SIGINT, or until the device is lost. Returns an exit status; errors have been logged. */
int daemon_run(const struct config *config, const struct daemon_options *options);

#endif
