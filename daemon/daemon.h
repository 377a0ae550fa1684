/*
 * daemon.h - the whole daemon from configuration to clean stop: lock, memory,
 * tenants, sockets, signals, and word to the service manager.
 */
#ifndef KVG_DAEMON_H
#define KVG_DAEMON_H

#include "daemon/config.h"

struct daemon_options {
	const char *socket;    /* the first tenant's, instead of the configured one; or NULL */
	const char *state_dir; /* exists or is created */
};

/* Runs until SIGTERM or SIGINT. Returns an exit status; errors have been logged. */
int daemon_run(const struct config *config, const struct daemon_options *options);

#endif
