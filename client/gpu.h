/*
 * gpu.h - the worker's GPU, when the daemon's memory is of the kind cuda: what is mapped from the daemon, the order
 * between the worker's stream and the daemon's, and the counters on the device.
 *
 * The worker's stream tells the daemon how far it is by writing sync.worker (gpu_order()); the daemon raises
 * sync.slots[slot] when its work for an entry is done, which kvg_stream_wait() makes the stream wait
 * for. An eviction may also bring extents, which must be mapped here before a kernel reads them. So an asynchronous
 * one has a gate: a word of the library's own, opened when the completion and the events it counts on have been
 * handled. A thread of the library does that while the caller is elsewhere, and releases every wait when the daemon
 * hangs up.
 *
 * Without the CUDA toolkit gpu_none.c stands for all of it, and no client has a struct gpu.
 */
#ifndef KVG_CLIENT_GPU_H
#define KVG_CLIENT_GPU_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "client/staging.h"
#include "control.pb-c.h"
#include "proto/kvgate_abi.h"

#define GPU_IMPORTS  16u       /* of one worker, by the daemon's rule */
#define GPU_RELEASED INT64_MAX /* streams compare as signed numbers: past every value that is waited for */

struct kvg_client;
struct kvg_cuda;
struct kvg_cuda_attention;
struct model;

/* In pinned memory that the device reads. */
struct gpu_gate {
	uint64_t opened;   /* number of the last gate opened */
	uint32_t appended; /* what the device's counter becomes behind the gate */
	uint32_t reserved;
};

struct gpu_slot {
	uint64_t signal; /* asked of the daemon last */
	uint64_t gate;   /* number of the last gate */
};

struct gpu_import {
	uint32_t id; /* 0: a free place */
	uint64_t address, size;
};

/* Device memory of the daemon's, mapped. */
struct gpu_map {
	uint64_t address, size;
	bool mapped;
};

/* Device memory of the library's own. It grows by being replaced, and what CUDA graphs may still name stays. */
struct gpu_scratch {
	uint64_t address, size;
	struct gpu_old {
		struct gpu_old *next;
		uint64_t address;
	} * old;
};

struct gpu {
	struct kvg_cuda *cuda;
	void *stream;  /* CUstream */
	bool advances; /* kvg_cuda_advance() moves the device's counters, kvg_commit() no more */

	void *head; /* registered part of the staging memfd, or NULL */
	struct kvg_sync *sync;
	uint64_t sync_address; /* of the device */
	uint64_t worker_value; /* written last */
	uint32_t slot_count;
	struct gpu_slot *slots; /* [slot_count] */
	struct gpu_gate *gates; /* [slot_count] */
	uint64_t gates_address;
	uint64_t appended; /* uint32 [slot_count] */

	struct gpu_map table, rows;
	uint64_t ids_offset;
	struct staging staging;     /* of rows */
	uint64_t place, place_size; /* handed out by kvg_stage_device_buffer() and not staged yet; place_size 0: none */
	struct gpu_import imports[GPU_IMPORTS];

	struct kvg_cuda_attention *attention; /* NULL when its kernels do not run on this device */
	int attention_status;                 /* then why, as a CUresult */
	struct gpu_scratch plan, scratch;
	uint64_t plan_slots;
	uint32_t plan_layer, plan_layers, plan_sequences, plan_extra;

	pthread_mutex_t lock; /* of the client: a call of the caller's, or the thread's turn */
	pthread_t thread;
	bool started;
	int kick; /* eventfd: a gate is closed, or the end */
	atomic_bool stop;
	atomic_uint gates_closed;
};

/* Opens the device with that UUID in this process. 0, or a negative errno with kvg_error(). */
int gpu_open(struct kvg_client *client, const uint8_t *uuid, size_t uuid_size);

/* The same with a device that is open, which is the client's on success. */
int gpu_new(struct kvg_client *client, struct kvg_cuda *cuda);

/* Maps what came with Registered and starts the thread. client->staging_map is there. A failure breaks the connection.
 */
int gpu_register(struct kvg_client *client, const struct model *model, const Kvg__Registered *reply, const int *fds);

/* Reserves the range of device addresses for extents. */
int gpu_reserve_arena(struct kvg_client *client, uint32_t slots, uint64_t extent_size);

/* How many descriptors must come with Registered. */
unsigned gpu_fd_count(const Kvg__Registered *reply);

/* Ends the thread; then the caller is alone with the client. */
void gpu_stop(struct kvg_client *client);

/* Waits for the device, unmaps and frees everything; client->gpu is NULL then. */
void gpu_close(struct kvg_client *client);

/* In a forked child: closes and frees what is not the driver's. Calls no driver, takes no lock. */
void gpu_abandon(struct kvg_client *client);

/* Fills the entry's wait_value and signal_value and enqueues what they stand for. 0, or a negative errno with
 * kvg_error(). */
int gpu_order(struct kvg_client *client, struct kvg_sqe *sqe);

/* Sets the device's counter of a slot, in the stream's order. */
int gpu_set_appended(struct kvg_client *client, uint32_t slot, uint32_t appended);

/*
 * Before and after the submission of an asynchronous eviction: the first keeps the device's counter, the second
 * makes the stream wait for gate *ret_gate and then take the counter from there. Between them gpu_gate_open() is
 * not called.
 */
int gpu_gate_prepare(struct kvg_client *client, uint32_t slot);
int gpu_gate_close(struct kvg_client *client, uint32_t slot, uint64_t *ret_gate);

/* Lets the stream pass a gate. appended: the counter's value, or NULL: as before. Calls no driver. */
void gpu_gate_open(struct gpu *gpu, uint32_t slot, uint64_t gate, const uint32_t *appended);

/* Lets every wait of this worker's streams pass. Calls no driver. */
void gpu_release_waits(struct gpu *gpu);

#endif
