/*
 * compute.h - the work on a worker's pairs that each kind does its own way: scores, the steps of an eviction, and
 * what a worker's kernels read. On the host the kernels of kernels/host do it over mapped memory; on cuda
 * launches on the worker's stream do.
 *
 * All functions run on the executor. One that takes a request starts its work and returns 0 or a negative errno;
 * the work is done when it returns (host), or when poll() has said so and finish() was called (cuda).
 */
#ifndef KVG_COMPUTE_H
#define KVG_COMPUTE_H

#include "daemon/sequence/space.h"

struct compute_ops {
	/* What a space needs besides its extents; undone by close(). 0 or a negative errno with text. */
	int (*open)(struct space *space, const struct space_memory *memory, char *text);
	void (*close)(struct space *space);
	int (*select)(struct request *request); /* SELECT of the request's eviction: fills kept[], and evict_count() */
	int (*mark)(struct request *request);   /* MARK: fills holes[] and stripe_kept[] */
	int (*move)(struct request *request);   /* MOVE of the step that was planned */
	/* What evictions drop and the host keeps (retain.h); all three or none. */
	int (*pack)(struct request
			*request); /* PACK: dropped pairs go to the sequence's store, as many as it has room for */
	int (*recall)(struct request
			*request); /* SELECT of a recall: fills kept[], evict_count(), and what comes back (recall.h) */
	int (*unpack)(struct request *request); /* UNPACK: what comes back is copied behind the rows' held pairs, and
						   leaves the store */
	bool closes_holes;                      /* move() can close holes behind the step's own moves */
	bool select_marks;                      /* select() can do MARK as well: evict->marked asks for it */
	bool move_publishes; /* move() of the last stripes publishes the rows as they will be: evict->publishes asks for
				it */
	unsigned evictions;  /* of one worker at a time, META_RECORDS at most */
	bool creates_ahead;  /* creating extents takes so long that it is done before they are needed */
	int (*score)(struct request *request); /* STAGE: a slice of the rows, from request->layer and row on */
	/*
	 * A slice of request->copy, of one block at least (compute_copy_blocks() starts the next): whole blocks, K and
	 * V (nothing where src is dst), and copy.done grows by them. Places of the first copy.places destinations
	 * become {pos 0, score 1}, for a context's pairs count as prefix; of the others nobody will ask. NULL: this
	 * kind has no contexts.
	 */
	int (*copy)(struct request *request);
	int (*publish)(struct request *request); /* rows and lengths that request->publish names; NULL: nothing to do */
	int (*event)(const struct space *space, void *event); /* 0: it has happened; -EAGAIN: not yet */
	/* The next part of the request's image (image.h), until image_is_complete(). On the host -EAGAIN: more is left
	 * after this turn; elsewhere called again when what was started is done. */
	int (*unload)(struct request *request);
	int (*load)(struct request *request);
	/* What load() and unload() need of a space without a worker (context_host.c), in device.compute; NULL: nothing.
	 * free() undoes it. On the reactor. 0 or a negative errno. */
	int (*carry)(struct space *space);
	/* How a job ends that only starts its work: executor.h. NULL: each is done when it returns. */
	bool (*poll)(struct job *job);
};

/* The kind's. */
const struct compute_ops *compute_of(struct kind *kind);

extern const struct compute_ops compute_host;
#ifdef KVG_HAS_CUDA
extern const struct compute_ops compute_cuda;
#endif

/*
 * Loads what the kind's work needs, once, before there is any: on cuda the kernels, which takes long. The executor does
 * not run yet, or nothing is on it. 0, or -EIO with one line of text.
 */
int compute_start(struct kind *kind, char *text, size_t text_size);

/* Runs launch(request) on the executor, then done() on the reactor; its status is in request->job_status. */
void compute_submit(struct request *request, int (*launch)(struct request *), void (*done)(struct job *));

/*
 * Copies all of request->copy, slice by slice (copy() above), then calls ended(request) once: with job_status negative
 * and blocks missing when a slice failed; with blocks missing as well when the space is dying. To the caller it is one
 * job, whose end ended() is: it begins with space_job_ended(), or with what must go before that.
 */
void compute_copy_blocks(struct request *request, void (*ended)(struct request *));

/* Publishes what request->publish names, then calls after(request); at once where there is nothing to do. */
void compute_publish(struct request *request, void (*after)(struct request *));

/*
 * Copies the request's image, to it or from it, in turns with the other copies (tier/turns.h), after making its frames
 * ready; then calls after(request) with job_status.
 */
void compute_copy(struct request *request, void (*after)(struct request *));

/*
 * Waits on the executor for what the entry names (wait_value, wait_event), then calls after(request): with
 * job_status 0, or -ETIME when the deadline passed. The executor looks at the counter
 * itself: a stream of the daemon never waits for a tenant's, behind which others could queue up. It looks at 256 waits
 * of a worker at most; more queue up, with their deadlines running.
 */
void compute_wait(struct request *request, void (*after)(struct request *));
bool compute_must_wait(const struct request *request);

#endif
