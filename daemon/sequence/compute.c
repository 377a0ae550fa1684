#include "daemon/sequence/compute.h"

#include <errno.h>

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

/* ---- publish ---- */

static void publish_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (!space_job_ended(request->space))
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

/* ---- wait ---- */

bool compute_must_wait(const struct request *request)
{
	const struct kvg_sync *sync = request->space->sync;

	return sync && (request->event || __atomic_load_n(&sync->worker, __ATOMIC_ACQUIRE) < request->sqe.wait_value);
}

static void wait_run(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	request->job_status = 0;
	request->deadline_ns = loop_now() + request->space->wait_ns;
}

static bool wait_poll(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);
	struct space *space = request->space;
	int event = request->event ? space->compute->event(space, request->event->event) : 0;

	if (atomic_load_explicit(&space->dying, memory_order_relaxed))
		return true;
	if (event < 0 && event != -EAGAIN) {
		request->job_status = event;
		return true;
	}
	if (event == 0 && __atomic_load_n(&space->sync->worker, __ATOMIC_ACQUIRE) >= request->sqe.wait_value)
		return true;
	if (loop_now() < request->deadline_ns)
		return false;
	request->job_status = -ETIME;
	return true;
}

static void wait_done(struct job *job)
{
	struct request *request = list_entry(job, struct request, job);

	if (!space_job_ended(request->space))
		request->after(request);
}

void compute_wait(struct request *request, void (*after)(struct request *))
{
	request->after = after;
	space_submit_job(request, wait_run, wait_poll, wait_done);
}
