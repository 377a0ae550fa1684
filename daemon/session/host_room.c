#include "daemon/session/host_room.h"

#include <stdio.h>

#include "daemon/sequence/context.h"
#include "daemon/sequence/retain.h"
#include "daemon/session/worker.h"
#include "daemon/tier/host.h"
#include "proto/size.h"

struct visit {
	uint64_t frames, total, seen; /* trim(): to go in all, of all stores, and of those that have been visited */
	uint64_t images, retained;
};

uint64_t host_room_excess(const struct tenant *tenant)
{
	const struct quota_account *host = tenant->host.account;

	return host->charged > quota_high(host) ? host->charged - quota_high(host) : 0;
}

static void count(struct sequence *sequence, struct visit *visit)
{
	visit->images += sequence->meta->image_bytes;
	visit->retained += sequence->retain ? sequence->retain->frame_count : 0;
}

static void trim(struct sequence *sequence, struct visit *visit)
{
	uint64_t own = sequence->retain ? sequence->retain->frame_count : 0;
	uint64_t before = visit->seen * visit->frames / visit->total, share;

	visit->seen += own;
	share = visit->seen * visit->frames / visit->total - before; /* all of them together are `frames` */
	if (share)
		retain_trim(sequence, share);
}

static void visit_all(const struct server *server, const struct tenant *tenant, struct visit *visit,
	void (*what)(struct sequence *sequence, struct visit *visit))
{
	for (const struct list *node = server->workers.next; node != &server->workers; node = node->next) {
		const struct worker *worker = list_entry(node, struct worker, node);
		const struct space *space = worker->registered && !worker->dead ? worker->space : NULL;

		if (worker->tenant != tenant)
			continue;
		for (uint32_t slot = 0; space && slot < space->part.worker->max_sequences; slot++)
			if (space->sequences[slot])
				what(space->sequences[slot], visit);
	}
}

void host_room_reclaim(const struct server *server, struct tenant *tenant)
{
	struct visit visit = {0};
	uint64_t frame;

	if (!host_room_excess(tenant) || tenant->trims)
		return;
	context_forget_host(tenant, quota_high(tenant->host.account));
	visit_all(server, tenant, &visit, count);
	if (!host_room_excess(tenant) || !visit.retained)
		return;
	frame = host_tier_frame_size(server->pool->tier);
	visit.frames = (host_room_excess(tenant) + frame - 1) / frame;
	visit.total = visit.retained;
	visit_all(server, tenant, &visit, trim);
}

void host_room_explain(const struct server *server, const struct tenant *tenant, char *text, size_t size)
{
	char images[KVG_SIZE_TEXT], contexts[KVG_SIZE_TEXT], retained[KVG_SIZE_TEXT];
	struct visit visit = {0};
	uint64_t bytes;

	visit_all(server, tenant, &visit, count);
	bytes = visit.retained * host_tier_frame_size(server->pool->tier);
	(void)snprintf(text, size, "images of sequences %s, contexts %s, retained %s",
		kvg_size_format(visit.images, images),
		kvg_size_format(tenant->host.account->charged - visit.images - bytes, contexts),
		kvg_size_format(bytes, retained));
}
