/*
 * insitu_neighbour.h - a second worker, in a process of its own, whose sequence goes to the host and back without end
 * while the first one decodes.
 */
#ifndef KVG_BENCH_INSITU_NEIGHBOUR_H
#define KVG_BENCH_INSITU_NEIGHBOUR_H

#include <stdint.h>
#include <sys/types.h>

#include "tools/bench/service.h"

struct neighbour {
	pid_t pid; /* 0: there is none */
	int fd;
	double bytes, seconds; /* of all that it has moved, there and back */
};

/* Bytes of its sequence. */
uint64_t neighbour_bytes(uint32_t layers);

/* Forks it: before this process touches the device. Here and below: 0, or a negative errno with a line on standard
 * error. */
int neighbour_fork(struct neighbour *neighbour, int device, uint32_t layers);

/* It connects and fills its sequence. */
int neighbour_open(struct neighbour *neighbour, const struct service *service);

int neighbour_go(struct neighbour *neighbour);
int neighbour_stop(struct neighbour *neighbour);

/* Ends it. Nothing when there is none. */
void neighbour_close(struct neighbour *neighbour);

#endif
