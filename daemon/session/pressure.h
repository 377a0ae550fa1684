/*
 * pressure.h - how workers are asked for memory when it is short.
 *
 * The ring's `pressure` gets a new number, which libkvgate answers at its next call: it unmaps what it was asked to,
 * acknowledges, and says so (RELIEF). A worker that holds memory back that was asked for, and has not let go of it
 * within pressure_ns, is disconnected. One that holds nothing back is in nobody's way, however long it is silent.
 */
#ifndef KVG_PRESSURE_H
#define KVG_PRESSURE_H

#include "daemon/session/worker.h"

/* For reclaim_init(); user is the server. */
extern const struct reclaim_ops pressure_ops;

/* The worker was asked to unmap more, by that event. */
void pressure_dropped(struct worker *worker, uint32_t event);

/* It answers. False when it was never asked with that number. */
bool pressure_relieved(struct worker *worker, uint32_t number);

/* The worker goes. */
void pressure_forget(struct worker *worker);

#endif
