/*
 * budgets.h - budgets that the operator has set while the daemon runs: they come before those of the configuration
 * until they are reset, also after a restart.
 *
 * They are kept in DIR/budgets.conf, in the configuration's form, with exact bytes and nothing but what was set.
 * The file is replaced as a whole (a temporary file, rename), and what cannot be written does not come to hold. A disk
 * takes its time: files are written by an executor of their own, so that neither the reactor nor anybody's copies wait.
 */
#ifndef KVG_BUDGETS_H
#define KVG_BUDGETS_H

#include "daemon/base/list.h"
#include "daemon/tenant/tenant.h"

#define BUDGET_KEYS 6u
#define BUDGET_TEXT 512

/* min, high, max of the device, then of the host: the order of struct budget [TENANT_TIERS]. */
struct budget_values {
	uint64_t bytes[BUDGET_KEYS];
	bool set[BUDGET_KEYS];
};

/* Some values of a tenant (by its index) that are set, or all of them taken back to the configuration's. */
struct budget_change {
	size_t tenant;
	bool reset;
	struct budget_values values; /* unless it is a reset */
	void (*done)(struct budget_change *change);
	/* The result: 0, or a negative errno with text, and then nothing has changed. */
	int status;
	char text[BUDGET_TEXT];
	struct list node; /* the budgets' own, until done() */
};

struct budgets;

/* For tenants that have their configured budgets, and outlive it. 0 or a negative errno. */
int budgets_new(
	struct loop *loop, struct tenant *const *tenants, size_t tenant_count, const char *dir, struct budgets **ret);

/* Changes that are under way come to their end first. NULL is fine; returns NULL. */
struct budgets *budgets_free(struct budgets *budgets);

/*
 * Reads the file and sets what it says; once, at the start. The directory is created where it is missing; one that
 * cannot be written is logged, for then every change is refused. What does not fit the configuration any more is
 * logged, left as configured, and forgotten with the next change. 0, also without a file; or a negative errno with text
 * (BUDGET_TEXT bytes) when there is one that cannot be read.
 */
int budgets_load(struct budgets *budgets, char *text);

/*
 * Changes a tenant's budget, one change after the other, then calls done(), on the reactor, perhaps before this
 * returns: when the file is safe and the values hold, or with the status of quota_set() or of what writing the file
 * gave. While the file is written the old values hold, but that nobody else gets what the larger of the two min claims.
 */
void budgets_change(struct budgets *budgets, struct budget_change *change);

/* Whether some value of the tenant was set. */
bool budgets_are_live(const struct budgets *budgets, size_t tenant);

/* "device.min" and so on. */
const char *budget_key_name(unsigned key);

#endif
