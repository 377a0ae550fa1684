/*
 * observe.h - looks at the daemon from outside: what it says of its tenants and itself on one admin connection, and
 * what the kernel says of it. What must hold at every instant is asserted by CMocka.
 */
#ifndef KVG_STRESS_OBSERVE_H
#define KVG_STRESS_OBSERVE_H

#include <stdbool.h>
#include <stdint.h>

#include "tests/stress/stress.h"
#include "tests/support/daemon.h"

struct observed_tenant {
	uint64_t most_charged, most_used /* and promised */, high_water, refusals;
	uint64_t unreturned_samples; /* with bytes asked back and not unmapped */
	uint64_t pressure_samples;
};

struct observer {
	const struct fixture *fixture;
	int fd; /* of the admin connection */
	uint64_t pool, max[STRESS_TENANTS], min[STRESS_TENANTS];
	bool has_min;           /* the daemon knows min */
	uint64_t samples, late; /* later than two periods after the one before */
	uint64_t last_ns, longest_gap_ns;
	uint64_t audits;
	uint64_t most_physical, most_used; /* of the pool */
	struct observed_tenant tenants[STRESS_TENANTS];
	unsigned descriptors; /* of the daemon, but for extents, at the beginning */
};

/* Connects; the daemon has no worker yet. */
void observer_open(struct observer *observer, const struct fixture *fixture);
void observer_close(struct observer *observer);

/* One look at the tenants: no max passed, now or ever, and the pool holds all of it. */
void observer_sample(struct observer *observer, uint64_t period_ns);

/*
 * Recounts: clean, physical bytes as charged and kept for a min; and the kernel's sum over the daemon's memory within
 * the pool. Returns the physical bytes of the books.
 */
uint64_t observer_audit(struct observer *observer);

/* All workers are gone: waits until what is charged is only kept for tenants or published, then looks at everything. */
void observer_end(struct observer *observer);

#endif
