#include "daemon/tier/turns.h"

#define GAP_NS 100000u /* after which a pass of the executor is another one */

/* Whether the turn comes before the one that waits. */
static bool is_before(const struct turns *turns, const struct turn *turn, const struct turn *other)
{
	uint64_t mine = turns->tenants[turn->tenant], others = turns->tenants[other->tenant];

	return turn->tenant == other->tenant ? turn->begun_ns < other->begun_ns : mine < others;
}

/* A pass is new when the job that had the last turn is asked again, or after a while. */
bool turns_begin(struct turns *turns, struct turn *turn, uint64_t now, uint64_t slice_ns)
{
	if (turns->last == turn || now - turns->end_ns >= GAP_NS)
		turns->used_ns = 0;
	if (turns->used_ns >= slice_ns || (turns->waiting && turns->waiting != turn)) {
		if (!turns->waiting || is_before(turns, turn, turns->waiting))
			turns->waiting = turn;
		return false;
	}
	turns->waiting = NULL;
	turn->begun_ns = now;
	turns->tenants[turn->tenant] = now;
	return true;
}

bool turns_over(const struct turn *turn, uint64_t now, uint64_t slice_ns)
{
	return now - turn->begun_ns >= slice_ns;
}

void turns_end(struct turns *turns, struct turn *turn, uint64_t now)
{
	turns->last = turn;
	turns->end_ns = now;
	turns->used_ns += now - turn->begun_ns;
}

void turns_leave(struct turns *turns, const struct turn *turn)
{
	if (turns->last == turn)
		turns->last = NULL;
	if (turns->waiting == turn)
		turns->waiting = NULL;
}
