/*
 * budgets.h - budgets that the operator has set while the daemon runs: they come before those of the configuration
 * until they are reset, also after a restart.
 *
 * They are kept in STATE_DIR/budgets.conf, in the configuration's form, with exact bytes and nothing but what was set.
 * The file is replaced as a whole (a temporary file, rename), and what cannot be written does not come to hold.
 */
#ifndef KVG_BUDGETS_H
#define KVG_BUDGETS_H

#include "daemon/tenant/tenant.h"

#define BUDGET_KEYS 6u
#define BUDGET_TEXT 512

/* min, high, max of the device, then of the host: the order of struct budget [TENANT_TIERS]. */
struct budget_values {
	uint64_t bytes[BUDGET_KEYS];
	bool set[BUDGET_KEYS];
};

struct budgets;

/*
 * For tenants that have their configured budgets. state_dir and the tenants are borrowed and outlive it. 0 or -ENOMEM.
 */
int budgets_new(struct tenant *const *tenants, size_t tenant_count, const char *state_dir, struct budgets **ret);

/* NULL is fine; returns NULL. */
struct budgets *budgets_free(struct budgets *budgets);

/*
 * Reads the file and sets what it says; once, at the start. What does not fit the configuration any more is logged,
 * left as configured, and forgotten with the next change. 0, also without a file; or a negative errno with text
 * (BUDGET_TEXT bytes) when there is one that cannot be read.
 */
int budgets_load(struct budgets *budgets, char *text);

/*
 * Sets some values of a tenant (by its index), or takes them all back to the configuration's. 0, or a negative errno
 * with text (BUDGET_TEXT bytes), and then nothing has changed: as quota_set(), or what writing the file gave.
 */
int budgets_set(struct budgets *budgets, size_t tenant, const struct budget_values *values, char *text);
int budgets_reset(struct budgets *budgets, size_t tenant, char *text);

/* Whether some value of the tenant was set. */
bool budgets_are_live(const struct budgets *budgets, size_t tenant);

/* "device.min" and so on. */
const char *budget_key_name(unsigned key);

#endif
