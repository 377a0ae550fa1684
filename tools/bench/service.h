/*
 * service.h - the kvgated that a benchmark works with: one of its own in a private folder, or one that runs.
 *
 * Everything that fails prints one line on standard error and returns a negative errno.
 */
#ifndef KVG_BENCH_SERVICE_H
#define KVG_BENCH_SERVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define SERVICE_PATH 104 /* fits a socket's address */
#define SERVICE_TEXT 512

struct service {
	char dir[SERVICE_PATH]; /* of the sockets: admin.sock and NAME.sock of each tenant */
	pid_t pid;              /* 0: not ours */
};

/* What the daemon says of itself; sizes in bytes. */
struct service_status {
	uint64_t extent_size, pool_size, charged, unreturned, overhead, reserved;
	uint64_t device_used; /* 0: no device */
	uint32_t workers, sequences;
	bool cuda, mps;
	char device[128], driver[32];
};

struct service_audit {
	bool clean;
	uint64_t physical, charged;
	char difference[SERVICE_TEXT]; /* the first one */
};

/* Starts `program` (NULL: the kvgated beside this program) with that configuration and waits until it answers. */
int service_start(struct service *service, const char *program, const char *config);

/* Uses the daemon whose admin socket and tenants' sockets lie in `dir`. */
int service_attach(struct service *service, const char *dir);

/* Ends a daemon of ours, which must exit with status 0, and removes its folder; its log is shown when it fails. */
int service_stop(struct service *service);

/* "DIR/NAME". */
const char *service_path(const struct service *service, const char *name, char ret[SERVICE_PATH]);

int service_status(const struct service *service, struct service_status *ret);
int service_audit(const struct service *service, struct service_audit *ret);

/* Waits until nothing is charged or unreturned; -ETIMEDOUT. */
int service_wait_empty(const struct service *service, unsigned limit_ms);

/* CLOCK_MONOTONIC. */
double service_seconds(void);

#endif
