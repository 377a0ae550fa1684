/* admin_peer.h - one operator's connection, for the parts of the admin socket. */
#ifndef KVG_ADMIN_PEER_H
#define KVG_ADMIN_PEER_H

#include "control.pb-c.h"
#include "daemon/session/admin.h"
#include "daemon/session/outbox.h"

struct admin_peer {
	struct list node;
	struct admin *admin;
	int fd;
	struct loop_watch *watch;
	struct outbox outbox;
	bool failed; /* a reply could not be sent */
};

/* Answers a request, now or later. A connection that cannot take it ends, but not before this has returned. */
void admin_answer(struct admin_peer *peer, Kvg__AdminReply *reply, uint64_t id);
void admin_refuse(struct admin_peer *peer, uint64_t id, int status, const char *text);

/* admin_work.c: work on a sequence that its worker has released; answered when it is done. */
void admin_work(struct admin_peer *peer, uint64_t id, const Kvg__SequenceWork *work);

/* The connection ends: what it asked for goes on, and nobody is answered. */
void admin_work_forget(const struct admin_peer *peer);

/* What the tenant's budget is now; standing: why it is not met, or NULL. */
void admin_send_budget(struct admin_peer *peer, uint64_t id, const struct tenant *tenant, const char *standing);

/*
 * admin_settle.c: answered when the memory that has to come back has, or none is on its way: a budget, which is set
 * first (values NULL: reset), and a reclaim of so many bytes.
 */
void admin_settle_budget(
	struct admin_peer *peer, uint64_t id, struct tenant *tenant, const struct budget_values *values);
void admin_settle_reclaim(struct admin_peer *peer, uint64_t id, struct tenant *tenant, uint64_t bytes);

/* The connection ends: nobody is answered. The admin ends: nobody waits; a budget is still set. */
void admin_settle_forget(const struct admin_peer *peer);
void admin_settle_deinit(struct admin *admin);

#endif
