/*
 * cuda.h - the cuda kind's work for one worker: a stream, the kernels, buffers, and where the worker's kernels read.
 *
 * Work of several requests is on the stream at a time, in the order in which it was launched. Each has a lane, whose
 * memory is its own from launch() to finish(); an eviction has the same one from its first job to its last. What is
 * used within one launch only is shared: the stream runs launches one after the other. All of it is the executor's.
 */
#ifndef KVG_SEQUENCE_CUDA_H
#define KVG_SEQUENCE_CUDA_H

#include "daemon/memory/cuda.h"
#include "daemon/sequence/compute.h"
#include "kernels/cuda/copy.h"
#include "kernels/cuda/evict.h"
#include "kernels/cuda/gate.h"
#include "kernels/cuda/maxima.h"
#include "kernels/cuda/select.h"
#include "kernels/cuda/tier.h"

#define CUDA_LANES 8u /* requests on the stream besides evictions */

/* Memory that grows: contents are lost when it does. */
struct cuda_buffer {
	uint8_t *at; /* host address of pinned memory, device address of device memory */
	size_t size;
	bool pinned;
};

enum cuda_buffers {
	/* Of a lane: */
	CUDA_UPLOAD,   /* pinned: what goes to the device */
	CUDA_READBACK, /* pinned: what comes from it */
	CUDA_EVICT,    /* device: rows and blocks of the eviction */
	CUDA_KEEP,     /* device: decisions */
	CUDA_COUNTS,   /* device: what is read back */
	CUDA_LISTS,    /* device: survivors and holes */
	CUDA_LANE_BUFFERS,
	/* Of the worker, within one launch: */
	CUDA_INPUT = CUDA_LANE_BUFFERS, /* device: what was uploaded for the request at hand */
	CUDA_HELD,                      /* device: blocks that moves go to */
	CUDA_SCORES,                    /* device: candidates' scores, or scores of staged rows */
	CUDA_ROWS,                      /* device: staged rows that lay on the host */
	CUDA_GATE,                      /* device: scratch of the gate */
	CUDA_BUFFERS,
};

/* What one eviction keeps on the device between its jobs. */
struct cuda_eviction {
	struct kvg_cuda_rows rows;
	struct kvg_cuda_scope scope;
	struct kvg_cuda_kept kept;
	struct kvg_cuda_counts counts;
	struct kvg_cuda_lists lists;
	uint32_t *found; /* device */
	size_t counted;  /* bytes that are read back of what was counted, found with it */
};

struct cuda_lane {
	struct request *owner; /* whose work is on the stream, or NULL */
	uint64_t value;        /* the flag's when it is done */
	struct cuda_buffer buffers[CUDA_LANE_BUFFERS];
	struct cuda_eviction eviction;
};

struct compute_device {
	struct space_device *space;
	struct kind *kind;
	const struct kvg_cuda *cuda;
	const struct cuda_kernels *kernels; /* shared with the device's other workers */
	CUstream stream;
	uint64_t *flag; /* pinned: raised by the stream behind each launch */
	uint64_t flag_value, asked_ns;
	bool registered; /* the staging memfd's mapping */
	uint8_t *staging_base;
	CUdeviceptr staging_rows; /* of the memfd's rows */
	CUdeviceptr sync;         /* of struct kvg_sync */
	uint8_t *table, *staging; /* device memory that the worker maps too */
	void *select_scratch;     /* device */
	struct cuda_lane lanes[CUDA_LANES], evictions[META_RECORDS];
	struct cuda_lane *lane;                   /* of the request at hand */
	struct cuda_buffer buffers[CUDA_BUFFERS]; /* from CUDA_LANE_BUFFERS on */
};

/* Kernels of one device, loaded at the daemon's start. */
struct cuda_kernels {
	const struct kvg_cuda *cuda;
	struct kvg_cuda_evict *evict;
	struct kvg_cuda_select *select;
	struct kvg_cuda_maxima *maxima;
	struct kvg_cuda_gate_kernels *gate;
	struct kvg_cuda_copy *copy;
	struct kvg_cuda_tier *tier;
	struct cuda_link *link; /* made when it is needed, see cuda_transfer.h */
};

/* Loads them with the first call. NULL when that fails (reported to the kind). */
const struct cuda_kernels *cuda_kernels(struct kind *kind);

/* The buffer with room for `size` bytes. NULL when there is no memory. Nothing of the lane's is in flight. */
uint8_t *cuda_buffer(struct compute_device *device, enum cuda_buffers which, size_t size);

/* The same buffer as it is. */
struct cuda_buffer *cuda_buffer_at(struct compute_device *device, enum cuda_buffers which);

/* Enqueues the copy of `size` bytes of the upload buffer to a device buffer. */
CUresult cuda_upload(const struct compute_device *device, void *to, size_t size);

/* 0, or a negative errno after reporting a failure to the kind. */
int cuda_status(const struct compute_device *device, CUresult result, const char *what);

/* Blocks first .. first + count - 1 of a row: held ones, then those of nursery runs. */
void cuda_row_blocks(const struct sequence *sequence, uint32_t row, uint32_t first, uint32_t count, uint32_t *ids);

/* Blocks of the context that a row begins with. Returns how many. */
uint32_t cuda_context_blocks(const struct sequence *sequence, uint32_t row, uint32_t *ids);

/* Where the worker's blocks and their pairs lie. */
struct kvg_cuda_area cuda_area(const struct space *space);

/*
 * For SELECT of a recall: the eviction's rows go to the device, with a scope in which all pairs stay, and there is
 * memory for all that follows; what is read back takes *ret_counts bytes. 0 or a negative errno.
 */
int cuda_survey(struct request *request, size_t *ret_counts);

/* Enqueues counting all pairs as kept, and reading the counts back; then, when that is done, notes them. */
CUresult cuda_count(const struct request *request);
void cuda_take_counts(const struct request *request);

/* cuda_evict.c, cuda_score.c, cuda_tier.c, cuda_retain.c, cuda_context.c: see compute.h. */
int cuda_select(struct request *request);
int cuda_mark(struct request *request);
int cuda_move(struct request *request);
int cuda_score(struct request *request);
int cuda_publish(struct request *request);
int cuda_copy(struct request *request);
int cuda_copy_image(struct request *request);
int cuda_pack(struct request *request);
int cuda_recall(struct request *request);
int cuda_unpack(struct request *request);

/* Enqueues raising the sequence's semaphore, when the entry asks for it. */
CUresult cuda_signal(const struct request *request);

#endif
