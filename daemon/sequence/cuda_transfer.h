/*
 * cuda_transfer.h - transfers between blocks and pinned host memory: what a device's link does, in turns.
 *
 * A transfer is a request's job that goes on in windows of a few MiB, each of which a kernel packs or unpacks on a
 * stream of its own and of low priority, beside the workers' streams, on a few multiprocessors. Large copies by the
 * copy engines take a window over the link; several windows are under way at a time, so that kernel and engine work
 * side by side. All transfers of a device share its windows: the next free one goes to the tenant whose last one
 * is longest ago, and of its transfers to the one whose last one is.
 *
 * All of it is the executor's. Nobody works on a transfer's blocks meanwhile: the request has its sequence, and what it
 * did before is done.
 */
#ifndef KVG_SEQUENCE_CUDA_TRANSFER_H
#define KVG_SEQUENCE_CUDA_TRANSFER_H

#include "daemon/sequence/cuda.h"
#include "kernels/cuda/copy.h"
#include "kernels/cuda/tier.h"

#define TRANSFER_BYTES  ((size_t)16 << 20) /* of a window */
#define TRANSFER_UPLOAD ((size_t)1 << 20)  /* what may be sent to its kernel with it */
#define TRANSFER_LANES  2u  /* streams of each direction: one has its next copy ready when the other ends */
#define TRANSFER_GRID   16u /* blocks of threads of each kernel */

struct cuda_window {
	struct cuda_transfer *owner; /* NULL: free */
	CUdeviceptr staging;         /* TRANSFER_BYTES */
	uint8_t *upload;             /* pinned: TRANSFER_UPLOAD, and */
	CUdeviceptr there;           /* the same on the device */
	CUevent ready;
	uint64_t *flag, value; /* pinned: `value` when the window is over */
};

struct cuda_link {
	struct kind *kind;
	const struct kvg_cuda *cuda;
	const struct kvg_cuda_copy *copy;
	const struct kvg_cuda_tier *tier;
	CUstream kernels, out[TRANSFER_LANES], in[TRANSFER_LANES]; /* out and in: of the copy engines */
	struct cuda_window windows[4];
	struct list transfers;
	uint64_t turn; /* number of the last one */
	uint64_t tenants[META_MAX_TENANTS];
	uint64_t asked_ns;
};

struct cuda_transfer {
	struct list node;
	struct request *request;
	struct cuda_link *link;
	uint32_t tenant;
	uint64_t turn;      /* its last one */
	unsigned in_flight; /* windows */
	bool ended;         /* no more windows are to come */
	int status;
	/*
	 * Enqueues the next window. 1: it is under way, with its flag; 0: there was no more to do; -EAGAIN: not before
	 * those under way are over; or another negative errno.
	 */
	int (*next)(struct cuda_transfer *transfer, struct cuda_window *window);
	int (*finish)(struct cuda_transfer *transfer); /* when all are over; or NULL */
	/* The operation's. */
	void *data;
	void (*release)(void *data); /* at the end; or NULL */
	uint64_t done, total;
};

/* The device's link; made with the first call. NULL when that fails (reported to the kind). */
struct cuda_link *cuda_link(const struct compute_device *device);
struct cuda_link *cuda_link_free(struct cuda_link *link);

/* A driver's verdict about a transfer: 0 or a negative errno, reported. */
int cuda_link_status(const struct cuda_link *link, CUresult result, const char *what);

/*
 * A transfer for a request, whose launch() calls this and returns 0: cuda_poll() goes on with it from then on. 0 or a
 * negative errno.
 */
int cuda_transfer_start(struct request *request,
	int (*next)(struct cuda_transfer *transfer, struct cuda_window *window), struct cuda_transfer **ret);

/* Whether it is over: then request->job_status is set, and nothing of it is left. */
bool cuda_transfer_poll(struct request *request);

/* The stream on which the window crosses the link. */
CUstream cuda_window_lane(const struct cuda_link *link, const struct cuda_window *window, bool in);

/* Enqueues sending the first `size` bytes of the window's upload, on a stream that its kernel comes after. */
CUresult cuda_window_send(const struct cuda_link *link, const struct cuda_window *window, size_t size, CUstream stream);

/* Enqueues the window's end behind what is on that stream. */
CUresult cuda_window_end(const struct cuda_link *link, struct cuda_window *window, CUstream stream);

#endif
