/*
 * daemon.h - starts the real kvgated in a private folder for one test, and asks
 * it questions on its admin socket.
 *
 * A fixture is started and stopped by the same test. Everything here fails the
 * test by a CMocka assertion when something is not as it must be, so nothing is
 * returned that a caller could forget to look at. The daemon dies with the test
 * process. All waiting is on events, bounded by FIXTURE_WAIT_MS.
 */
#ifndef KVG_TEST_DAEMON_H
#define KVG_TEST_DAEMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define FIXTURE_PATH    200
#define FIXTURE_TEXT    1024
#define FIXTURE_WAIT_MS 20000

struct fixture {
	char dir[FIXTURE_PATH]; /* private folder, mode 0700; a failed test leaves it behind, with the log */
	pid_t pid;              /* of the daemon; 0: not running */
	int notify;             /* the datagram socket that the daemon reports its readiness to */
	uid_t uid;              /* of the daemon; 0: the test's own */
	bool obedient;          /* modes of files hold for the daemon also where the test is root */
};

/* What the daemon says of itself, or of one tenant (then workers .. promised are the tenant's). Sizes in bytes. */
struct fixture_usage {
	uint64_t extent_size, pool_size, device_max;
	uint64_t charged, promised, unreturned, overhead, high_water, refusals;
	uint64_t device_min, device_high, reserved, host_min, host_high, host_max, host_charged;
	uint32_t extents, workers, sequences;
	bool pressure; /* a tenant's workers are asked for memory */
};

/* Makes the private folder and writes the configuration into it, and starts nothing. */
void fixture_prepare(struct fixture *fixture, const char *config);

/* Starts the daemon in a prepared folder and waits until it is ready. May follow fixture_end(). */
void fixture_begin(struct fixture *fixture);

/* What goes before the program's name where modes of files must hold for it: NULL-terminated, nothing unless root. */
const char *const *fixture_obedience(void);

/* Sends SIGTERM and waits: the daemon must say STOPPING=1 and exit with status 0. The folder stays. */
void fixture_end(struct fixture *fixture);

/* fixture_prepare() and fixture_begin(). Relative sockets of tenants lie in the state folder. */
void fixture_start(struct fixture *fixture, const char *config);

/* fixture_end() when the daemon runs; removes the folder. */
void fixture_stop(struct fixture *fixture);

/* Removes the folder of a fixture whose daemon does not run. */
void fixture_remove(struct fixture *fixture);

/* Path of a file in the folder: "kvgated.conf", "log", "state", "state/admin.sock", "state/NAME.sock". */
const char *fixture_path(const struct fixture *fixture, const char *name, char ret[FIXTURE_PATH]);

/* The daemon's program: of the build, or of the environment variable KVG_KVGATED. */
const char *fixture_program(void);

/* Last STATUS= text that the daemon sent; "" when none. */
void fixture_status_text(const struct fixture *fixture, char *ret, size_t size);

/* ---- the admin socket ---- */

void fixture_usage(const struct fixture *fixture, struct fixture_usage *ret);
void fixture_tenant(const struct fixture *fixture, const char *tenant, struct fixture_usage *ret);

/* The audit must be clean, and its physical bytes must be those of fixture_physical() where that can be read. */
void fixture_audit(const struct fixture *fixture);

/* Sets a tenant's device.max: 0, or the negative errno of the refusal with its text (FIXTURE_TEXT bytes). */
int fixture_budget_set(const struct fixture *fixture, const char *tenant, uint64_t device_max, char *text);

/* The same for any of the six: "device.min" and so on; and back to the configuration's. */
int fixture_budget_change(
	const struct fixture *fixture, const char *tenant, const char *key, uint64_t bytes, char *text);
int fixture_budget_reset(const struct fixture *fixture, const char *tenant, char *text);

/* Whether any of a tenant's values was set live. */
bool fixture_budget_is_live(const struct fixture *fixture, const char *tenant);

/* Reclaims all that a tenant's workers do not use, and waits until it is over. Returns how many contexts went. */
uint32_t fixture_reclaim(const struct fixture *fixture, const char *tenant);

/* What the daemon says of a published context. */
struct fixture_context {
	char state[16];
	uint64_t bytes, image;
	uint32_t attached, workers;
};

/* Whether there is such a context. */
bool fixture_find_context(const struct fixture *fixture, const char *tenant, uint64_t id, struct fixture_context *ret);

/* Waits until a tenant has exactly that many bytes of its min in nobody's use. */
void fixture_wait_reserved(const struct fixture *fixture, const char *tenant, uint64_t bytes);

/* Waits until at most `charged` bytes are charged and nothing is unreturned; true when that came within the limit. */
bool fixture_wait_charged(const struct fixture *fixture, uint64_t charged, unsigned limit_ms);

/* The same, and at most that many workers are connected. */
bool fixture_wait_gone(const struct fixture *fixture, uint32_t workers, uint64_t charged, unsigned limit_ms);

/* ---- from outside ---- */

/* Sum of st_blocks of the extents that the daemon holds, in bytes, from its /proc/PID/fd. */
uint64_t fixture_physical(const struct fixture *fixture);

/* Until it is that much: memory of a min that went is destroyed a little after it was counted. */
void fixture_wait_physical(const struct fixture *fixture, uint64_t bytes);

/* CLOCK_MONOTONIC in ms. */
uint64_t fixture_now_ms(void);

#endif
