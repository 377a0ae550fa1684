/* The order between the worker's stream and the daemon's: timelines and gates. */
#include "client/cuda.h"

#include <errno.h>
#include <stddef.h>
#include <sys/eventfd.h>

static uint64_t slot_address(const struct gpu *gpu, uint32_t slot)
{
	return gpu->sync_address + offsetof(struct kvg_sync, slots) + slot * sizeof(uint64_t);
}

static uint64_t gate_address(const struct gpu *gpu, uint32_t slot)
{
	return gpu->gates_address + slot * sizeof(struct gpu_gate);
}

static uint64_t counter_address(const struct gpu *gpu, uint32_t slot)
{
	return gpu->appended + slot * sizeof(uint32_t);
}

int cuda_check_stream(struct kvg_client *client, const char *call)
{
	CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
	int r = cuda_status(client, client->gpu->cuda->driver->cuStreamIsCapturing(cuda_stream(client), &status),
		"the client's stream");

	if (r < 0 || status == CU_STREAM_CAPTURE_STATUS_NONE)
		return r;
	return client_fail(client, -EBUSY, "%s: the client's stream is being captured into a graph", call);
}

static CUresult wait_value(const struct gpu *gpu, CUstream stream, uint64_t address, uint64_t value)
{
	return gpu->cuda->driver->cuStreamWaitValue64(stream, address, value, CU_STREAM_WAIT_VALUE_GEQ);
}

/* The stream says how far it is. */
static CUresult write_timeline(struct gpu *gpu)
{
	return gpu->cuda->driver->cuStreamWriteValue64(gpu->stream,
		gpu->sync_address + offsetof(struct kvg_sync, worker), ++gpu->worker_value,
		CU_STREAM_WRITE_VALUE_DEFAULT);
}

/* ---- entries ---- */

static bool waits_for_stream(uint8_t op)
{
	return op == KVG_OP_STAGE || op == KVG_OP_EVICT || op == KVG_OP_TRUNCATE || op == KVG_OP_FREE ||
	       op == KVG_OP_OFFLOAD || op == KVG_OP_IDLE || op == KVG_OP_RECALL || op == KVG_OP_PUBLISH ||
	       op == KVG_OP_FORK;
}

static bool signals(uint8_t op)
{
	return op == KVG_OP_STAGE || op == KVG_OP_EVICT || op == KVG_OP_RESERVE || op == KVG_OP_OFFLOAD ||
	       op == KVG_OP_RESTORE || op == KVG_OP_RECALL || op == KVG_OP_PUBLISH || op == KVG_OP_FORK;
}

static bool moves_counter(const struct gpu *gpu, uint8_t op)
{
	return (op == KVG_OP_COMMIT && !gpu->advances) || op == KVG_OP_CREATE || op == KVG_OP_ATTACH ||
	       op == KVG_OP_RESTORE;
}

int gpu_order(struct kvg_client *client, struct kvg_sqe *sqe)
{
	struct gpu *gpu = client->gpu;
	uint32_t slot = (uint32_t)sqe->seq;
	int r = 0;

	sqe->wait_value = sqe->signal_value = 0;
	if (!gpu->sync)
		return 0;
	if (waits_for_stream(sqe->op) || moves_counter(gpu, sqe->op)) {
		CUDA_SCOPE(gpu->cuda);
		r = cuda_status(client, scope.result, "the GPU's context");
		if (r == 0)
			r = cuda_check_stream(client, "entry");
		if (r == 0 && waits_for_stream(sqe->op)) {
			r = cuda_status(client, write_timeline(gpu), "the stream's timeline");
			sqe->wait_value = gpu->worker_value;
		}
	}
	/* What names no sequence of ours is refused before the daemon signals anything. */
	if (r == 0 && signals(sqe->op) && !sqe->flags && !sqe->layout && slot < gpu->slot_count &&
		client->sequences[slot].epoch && client->sequences[slot].epoch == sqe->seq >> 32)
		sqe->signal_value = ++gpu->slots[slot].signal;
	return r;
}

int gpu_set_appended(struct kvg_client *client, uint32_t slot, uint32_t appended)
{
	struct gpu *gpu = client->gpu;

	CUDA_SCOPE(gpu->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result = gpu->cuda->driver->cuMemsetD32Async(
			counter_address(gpu, slot), appended, 1, cuda_stream(client));
	return cuda_status(client, scope.result, "the counter of appended tokens");
}

/* ---- gates ---- */

int gpu_gate_prepare(struct kvg_client *client, uint32_t slot)
{
	struct gpu *gpu = client->gpu;
	int r;

	CUDA_SCOPE(gpu->cuda);
	r = cuda_status(client, scope.result, "the GPU's context");
	if (r == 0)
		r = cuda_check_stream(client, "evict");
	if (r == 0)
		r = cuda_status(client,
			gpu->cuda->driver->cuMemcpyAsync(gate_address(gpu, slot) + offsetof(struct gpu_gate, appended),
				counter_address(gpu, slot), sizeof(uint32_t), cuda_stream(client)),
			"the counter of appended tokens");
	return r;
}

int gpu_gate_close(struct kvg_client *client, uint32_t slot, uint64_t *ret_gate)
{
	struct gpu *gpu = client->gpu;
	uint64_t gate = gpu->slots[slot].gate + 1;
	int r;

	CUDA_SCOPE(gpu->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result = wait_value(gpu, cuda_stream(client), gate_address(gpu, slot), gate);
	if (scope.result == CUDA_SUCCESS)
		scope.result = gpu->cuda->driver->cuMemcpyAsync(counter_address(gpu, slot),
			gate_address(gpu, slot) + offsetof(struct gpu_gate, appended), sizeof(uint32_t),
			cuda_stream(client));
	r = cuda_status(client, scope.result, "the gate of an eviction");
	if (r < 0) {
		/* Half a gate would block the stream for ever. */
		__atomic_store_n(&gpu->gates[slot].opened, gate, __ATOMIC_RELEASE);
		gpu->slots[slot].gate = gate;
		return r;
	}
	*ret_gate = gpu->slots[slot].gate = gate;
	atomic_fetch_add(&gpu->gates_closed, 1);
	(void)eventfd_write(gpu->kick, 1);
	return 0;
}

void gpu_gate_open(struct gpu *gpu, uint32_t slot, uint64_t gate, const uint32_t *appended)
{
	if (appended)
		__atomic_store_n(&gpu->gates[slot].appended, *appended, __ATOMIC_RELAXED);
	__atomic_store_n(&gpu->gates[slot].opened, gate, __ATOMIC_RELEASE);
	if (atomic_load(&gpu->gates_closed))
		atomic_fetch_sub(&gpu->gates_closed, 1);
}

/* ---- calls ---- */

int kvg_set_stream(struct kvg_client *client, void *stream)
{
	struct gpu *gpu = client->gpu;
	int r = client_check_cuda(client, "kvg_set_stream");

	if (r < 0)
		return r;
	CLIENT_TURN(client);
	CUDA_SCOPE(gpu->cuda);
	if (stream == gpu->stream)
		return 0;
	r = client_check(client);
	if (r == 0 && gpu->sync) {
		/* The timeline only grows: the new stream begins where the old one is. */
		r = cuda_check_stream(client, "kvg_set_stream");
		if (r == 0)
			r = cuda_status(client, write_timeline(gpu), "the stream's timeline");
		if (r == 0)
			r = cuda_status(client,
				wait_value(gpu, stream, gpu->sync_address + offsetof(struct kvg_sync, worker),
					gpu->worker_value),
				"the new stream");
	}
	if (r == 0)
		gpu->stream = stream;
	return r;
}

int kvg_stream_wait(struct kvg_client *client, uint64_t seq)
{
	struct gpu *gpu = client->gpu;
	uint32_t slot = (uint32_t)seq;
	int r = client_check_cuda(client, "kvg_stream_wait");

	if (r < 0)
		return r;
	CLIENT_TURN(client);
	r = client_check_registered(client);
	if (r == 0 && slot >= gpu->slot_count)
		r = client_fail(client, -ENOENT, "sequence %llx: this connection has %u slots", (unsigned long long)seq,
			gpu->slot_count);
	if (r < 0)
		return r;
	CUDA_SCOPE(gpu->cuda);
	r = cuda_check_stream(client, "kvg_stream_wait");
	if (r == 0 && gpu->slots[slot].signal)
		r = cuda_status(client,
			wait_value(gpu, cuda_stream(client), slot_address(gpu, slot), gpu->slots[slot].signal),
			"the wait for the daemon");
	if (r == 0 && gpu->slots[slot].gate)
		r = cuda_status(client,
			wait_value(gpu, cuda_stream(client), gate_address(gpu, slot), gpu->slots[slot].gate),
			"the wait for an eviction");
	return r;
}
