#include "daemon/sequence/compute.h"

#include <errno.h>
#include <stdio.h>

#include "daemon/sequence/image.h"

#ifdef KVG_HAS_CUDA
#include "daemon/sequence/cuda.h"
#endif

#define WAITS_MAX 256u     /* of one worker, that the executor looks at in each of its rounds */
#define ASK_NS    1000000u /* between two questions to the driver about one event */

/* ---- start ---- */

int compute_start(struct kind *kind, char *text, size_t text_size)
{
#ifdef KVG_HAS_CUDA
	struct kvg_cuda *device = kind->ops->device(kind);
	CUresult result = device ? kvg_cuda_enter(device) : CUDA_SUCCESS;

	if (result != CUDA_SUCCESS)
		kind_cuda_check(kind, result, "entering the context");
	if (result != CUDA_SUCCESS || (device && !cuda_kernels(kind))) {
		(void)snprintf(text, text_size, "kind cuda: %s: the kernels cannot be loaded; the line before says why",
			kind->ops->about(kind)->name);
		return -EIO;
	}
#endif
	(void)kind;
	(void)text;
	(void)text_size;
	return 0;
}

const struct compute_ops *compute_of(struct kind *kind)
{
#ifdef KVG_HAS_CUDA
	if (kind->ops->device(kind))
		return &compute_cuda;
#endif
	(void)kind;
	return &compute_host;
}

/* ---- jobs ---- */

static void run_now(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	request->job_status = request->launch(request);
}

static void run_later(struct job *job)
{
	(void)job; /* poll() starts it when the worker's stream is free */
}

void compute_submit(struct request *request, int (*launch)(struct request *), void (*done)(struct job *))
{
	const struct compute_ops *ops = request->space->compute;

	request->launch = launch;
	request->finish = NULL;
	request->launched = false;
	request->job_status = 0;
	space_submit_job(request, ops->poll ? run_later : run_now, ops->poll, done);
}

/* ---- copies of blocks ---- */

static void slice_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	bool dying = atomic_load_explicit(&request->space->dying, memory_order_relaxed);

	if (request->job_status < 0 || dying || request->copy.done >= request->copy.count) {
		request->after(request);
		return;
	}
	(void)space_job_ended(request->space);
	compute_submit(request, request->space->compute->copy, slice_done);
}

void compute_copy_blocks(struct request *request, void (*ended)(struct request *))
{
	request->after = ended;
	compute_submit(request, request->space->compute->copy, slice_done);
}

/* ---- publish ---- */

static void publish_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (!space_job_ended(request->space) && !space_job_lost(request))
		request->after(request);
}

void compute_publish(struct request *request, void (*after)(struct request *))
{
	request->after = after;
	if (request->space->compute->publish)
		compute_submit(request, request->space->compute->publish, publish_done);
	else
		after(request);
}

/* ---- copies to and from the host tier ---- */

static int open_image(struct request *request)
{
	return image_open(request->image);
}

/* A launch that is repeated while it says -EAGAIN. */
static bool copy_poll(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	struct turns *turns = host_tier_turns(request->image->tier);
	struct turn *turn = &request->image->turn;
	int r = -ECANCELED;

	if (!atomic_load_explicit(&request->space->dying, memory_order_relaxed)) {
		if (!turns_begin(turns, turn, loop_now(), executor_slice(request->space->pool->executor)))
			return false;
		r = request->launch(request);
		turns_end(turns, turn, loop_now());
	}
	if (r == -EAGAIN)
		return false;
	turns_leave(turns, turn);
	request->job_status = r;
	return true;
}

static void copy_submit(struct request *request, int (*launch)(struct request *), void (*done)(struct job *))
{
	request->launch = launch;
	request->job_status = 0;
	space_submit_job(request, run_later, copy_poll, done);
}

static void image_part_done(struct job *job);

static void copy_part(struct request *request)
{
	const struct compute_ops *ops = request->space->compute;
	int (*launch)(struct request *) = request->image->load ? ops->load : ops->unload;

	if (ops->poll)
		compute_submit(request, launch, image_part_done);
	else
		copy_submit(request, launch, image_part_done);
}

static void image_part_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (space_job_ended(request->space))
		return;
	if (request->job_status < 0 || image_is_complete(request->image))
		request->after(request);
	else
		copy_part(request);
}

static void opened(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (space_job_ended(request->space))
		return;
	if (request->job_status < 0)
		request->after(request);
	else
		copy_part(request);
}

void compute_copy(struct request *request, void (*after)(struct request *))
{
	request->after = after;
	copy_submit(request, open_image, opened);
}

/* ---- wait ---- */

bool compute_must_wait(const struct request *request)
{
	const struct kvg_sync *sync = request->space->sync;

	return sync && (request->event || __atomic_load_n(&sync->worker, __ATOMIC_ACQUIRE) < request->sqe.wait_value);
}

static void wait_run(struct job *job)
{
	(void)job; /* wait_poll() asks */
}

/* 0: it has happened, once and for all; or -EAGAIN, or another negative errno. */
static int ask_event(struct request *request, uint64_t now)
{
	const struct space *space = request->space;
	int r;

	if (!request->event || request->happened)
		return 0;
	if (now - request->asked_ns < ASK_NS)
		return -EAGAIN;
	request->asked_ns = now;
	r = space->compute->event(space, request->event->event);
	request->happened = r == 0;
	return r;
}

static bool wait_poll(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	struct space *space = request->space;
	uint64_t now = loop_now();
	int event;

	if (atomic_load_explicit(&space->dying, memory_order_relaxed))
		return true;
	event = ask_event(request, now);
	if (event < 0 && event != -EAGAIN) {
		request->job_status = event;
		return true;
	}
	if (event == 0 && __atomic_load_n(&space->sync->worker, __ATOMIC_ACQUIRE) >= request->sqe.wait_value)
		return true;
	if (now < request->deadline_ns)
		return false;
	request->job_status = -ETIME;
	return true;
}

static void wait_done(struct job *job);

static void wait_start(struct request *request)
{
	request->space->waits++;
	space_submit_job(request, wait_run, wait_poll, wait_done);
}

static void wait_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	struct space *space = request->space;

	space->waits--;
	if (space_job_ended(space))
		return;
	if (!list_empty(&space->wait_queue))
		wait_start(list_entry(list_pop(&space->wait_queue), struct request, node));
	request->after(request);
}

void compute_wait(struct request *request, void (*after)(struct request *))
{
	struct space *space = request->space;

	request->after = after;
	request->job_status = 0;
	request->happened = false;
	request->asked_ns = 0;
	request->deadline_ns = loop_now() + space->wait_ns;
	if (space->waits < WAITS_MAX)
		wait_start(request);
	else
		list_add_tail(&space->wait_queue, &request->node);
}
