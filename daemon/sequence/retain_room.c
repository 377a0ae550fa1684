/* Host memory of a store: frames come with evictions, and go with what they held, or when the budget is lowered. */
#include <stdlib.h>

#include "daemon/sequence/compute.h"
#include "daemon/sequence/context.h"
#include "daemon/sequence/offload.h"
#include "daemon/sequence/retain.h"
#include "daemon/tier/host.h"

#define SLICE_BYTES (1u << 20) /* moved before others have their turn */

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

bool retain_wants(const struct sequence *sequence)
{
	const struct space *space = sequence->space;
	const struct host_tier *tier = space->pool->tier;

	return (sequence->meta->policy.flags & KVG_POLICY_RETAIN_HOST) && space->compute->pack && tier &&
	       host_tier_frame_count(tier) && space->tenant->host.account->max;
}

static struct retain *retain_of(struct sequence *sequence)
{
	const struct space *space = sequence->space;
	struct retain *retain = sequence->retain;

	if (retain)
		return retain;
	retain = sequence->retain = calloc(1, sizeof(*retain));
	if (retain) {
		retain->base = host_tier_at(space->pool->tier, 1);
		retain_form_init(
			&retain->form, &space->part.worker->layout.groups[0], host_tier_frame_size(space->pool->tier));
	}
	return retain;
}

static bool grow_list(struct retain *retain, uint64_t frames)
{
	uint64_t capacity = 2 * (uint64_t)retain->frame_capacity;
	uint32_t *grown;

	if (frames <= retain->frame_capacity)
		return true;
	if (capacity < frames)
		capacity = frames;
	grown = capacity > UINT32_MAX ? NULL : realloc(retain->frames, capacity * sizeof(*grown));
	if (!grown)
		return false;
	retain->frames = grown;
	retain->frame_capacity = (uint32_t)capacity;
	return true;
}

/* Takes that many frames, all or none. */
static bool take_frames(struct sequence *sequence, uint32_t count)
{
	const struct space *space = sequence->space;
	struct host_tier *tier = space->pool->tier;
	struct retain *retain = sequence->retain;
	char text[QUOTA_TEXT];
	uint32_t first;

	if (!grow_list(retain, (uint64_t)retain->frame_count + count) ||
		host_tier_take(tier, space->tenant, count, "what an eviction drops", &first, text) < 0)
		return false;
	if (retain->frame_count)
		host_tier_join(tier, retain->frames[retain->frame_count - 1] + 1, first);
	else
		sequence->meta->retained = first;
	for (uint32_t frame = first; frame; frame = host_tier_next(tier, frame))
		retain->frames[retain->frame_count++] = frame - 1;
	return true;
}

/* Of so many frames, those that the tenant's budget and its pool have. */
static uint64_t within_budget(const struct sequence *sequence, uint64_t frames)
{
	const struct quota *quota = &sequence->space->tenant->host;
	uint64_t size = sequence->retain->form.frame_size, bytes = frames * size;
	uint64_t lack = quota_lack(quota, bytes), pool = quota_lack_pool(quota, bytes);

	lack = lack > pool ? lack : pool;
	return bytes > lack ? (bytes - lack) / size : 0;
}

bool retain_take(struct sequence *sequence, uint64_t pairs)
{
	struct retain *retain = retain_of(sequence);
	uint64_t need, want;

	if (!retain || !retain->form.per_frame)
		return false;
	need = retain_frames_for(&retain->form, retain->count + pairs);
	want = need > retain->frame_count ? min_u64(need - retain->frame_count, UINT32_MAX - retain->frame_count) : 0;
	context_make_host_room(sequence->space->tenant, want * retain->form.frame_size, true);
	want = within_budget(sequence, want);
	if (want)
		(void)take_frames(sequence, (uint32_t)want);
	return retain->frame_count > 0;
}

static void cut_frames(struct sequence *sequence, uint32_t count)
{
	const struct space *space = sequence->space;
	struct retain *retain = sequence->retain;

	if (count == retain->frame_count)
		return;
	if (count) {
		host_tier_cut(space->pool->tier, space->tenant, retain->frames[count - 1] + 1);
	} else {
		host_tier_give(space->pool->tier, space->tenant, sequence->meta->retained);
		sequence->meta->retained = 0;
	}
	retain->frame_count = count;
}

void retain_settle(struct sequence *sequence)
{
	struct retain *retain = sequence->retain;

	cut_frames(sequence, (uint32_t)retain_frames_for(&retain->form, retain->count));
	sequence->meta->retained_bytes = retain->count * retain_pair_bytes(&retain->form);
}

void retain_forget(struct sequence *sequence)
{
	if (!sequence->retain)
		return;
	sequence->retain->count = 0;
	retain_settle(sequence);
	free(sequence->retain->frames);
	free(sequence->retain);
	sequence->retain = NULL;
}

int retain_open(const struct sequence *sequence)
{
	const struct retain *retain = sequence->retain;
	int r = 0;

	for (uint64_t i = retain->count / retain->form.per_frame; r >= 0 && i < retain->frame_count; i++)
		r = host_tier_open(sequence->space->pool->tier, retain->frames[i] + 1);
	return r;
}

/* ---- a lower budget ---- */

/* A request of the daemon's own that makes a store smaller. */
struct trim {
	struct request request;
	struct tenant *tenant;
	uint64_t frames;
	uint64_t *chosen, count; /* pairs that are still to go */
};

static void trim_choose(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	struct trim *trim = list_entry(request, struct trim, request);
	const struct retain *retain = request->sequence->retain;
	uint64_t stay = (retain->frame_count - trim->frames) * retain->form.per_frame;

	request->job_status = 0;
	if (retain->count > stay)
		request->job_status = retain_choose_worst(retain, stay, &trim->chosen, &trim->count);
}

/* From the last to go on: those before them stay where they are. */
static bool trim_slice(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	struct trim *trim = list_entry(request, struct trim, request);
	struct retain *retain = request->sequence->retain;
	uint64_t n = min_u64(trim->count, SLICE_BYTES / retain_pair_bytes(&retain->form) + 1);

	if (n)
		retain_remove(retain, trim->chosen + trim->count - n, n);
	trim->count -= n;
	return !trim->count;
}

static void trimmed(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (space_job_ended(request->space))
		return;
	retain_settle(request->sequence);
	request->cqe.status = request->job_status;
	request_finish(request);
}

static void trim(struct request *request)
{
	struct trim *own = list_entry(request, struct trim, request);
	const struct retain *retain = request->sequence->retain;

	if (!retain || !retain->frame_count) {
		request_finish(request);
		return;
	}
	own->frames = min_u64(own->frames, retain->frame_count);
	request->sequence->meta->retained_bytes = 0;
	space_submit_job(request, trim_choose, trim_slice, trimmed);
}

static void trim_over(struct request *request)
{
	struct trim *own = list_entry(request, struct trim, request);
	struct tenant *tenant = own->tenant;

	tenant->trims--;
	request_deinit(request);
	free(own->chosen);
	free(own);
	reclaim_wake(tenant);
}

void retain_trim(struct sequence *sequence, uint64_t frames)
{
	struct trim *own = calloc(1, sizeof(*own));

	if (!own)
		return;
	own->tenant = sequence->space->tenant;
	own->frames = frames;
	own->request.sqe = (struct kvg_sqe){.op = KVG_OP_QUERY, .seq = sequence_handle(sequence)};
	own->request.act = trim;
	own->request.completed = trim_over;
	own->tenant->trims++;
	offload_submit(sequence->space, &own->request);
}
