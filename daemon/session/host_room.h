/*
 * host_room.h - what a tenant has on the host goes down to its budget there: contexts that nobody uses first, those
 * left alone longest before others, then pairs that sequences retain. Each store gives the same share, its lowest
 * scores. Images of offloaded sequences stay, for nothing else has what is in them.
 */
#ifndef KVG_HOST_ROOM_H
#define KVG_HOST_ROOM_H

#include "daemon/session/server.h"

/* Bytes on the host above high, or above max where there is none. */
uint64_t host_room_excess(const struct tenant *tenant);

/* Begins to drop the excess; contexts are gone at once, tenant->trims are under way. Nothing while there are some. */
void host_room_reclaim(const struct server *server, struct tenant *tenant);

/* What is on the host still: "images of sequences 2.0 MiB, contexts 64.0 KiB, retained 1.0 MiB". */
void host_room_explain(const struct server *server, const struct tenant *tenant, char *text, size_t size);

#endif
