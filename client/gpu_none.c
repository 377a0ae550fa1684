/*
 * The library without the CUDA toolkit: a daemon with memory of the kind cuda is refused at hello, so no client ever
 * has a struct gpu, and the calls of that kind answer what they answer to any client of the kind host.
 */
#include "client/client.h"

#include <errno.h>

int gpu_open(struct kvg_client *client, const uint8_t *uuid, size_t uuid_size)
{
	(void)uuid;
	(void)uuid_size;
	return client_fail(
		client, -EOPNOTSUPP, "the daemon's memory is on a GPU: this libkvgate was built without the kind cuda");
}

int gpu_register(struct kvg_client *client, const struct model *model, const Kvg__Registered *reply, const int *fds)
{
	(void)model;
	(void)reply;
	(void)fds;
	return client_check_cuda(client, "register");
}

int gpu_reserve_arena(struct kvg_client *client, uint32_t slots, uint64_t extent_size)
{
	(void)slots;
	(void)extent_size;
	return client_check_cuda(client, "register");
}

unsigned gpu_fd_count(const Kvg__Registered *reply)
{
	return reply->device_staging_size ? 4 : 3;
}

void gpu_stop(struct kvg_client *client)
{
	(void)client;
}

void gpu_close(struct kvg_client *client)
{
	(void)client;
}

void gpu_abandon(struct kvg_client *client)
{
	(void)client;
}

int gpu_order(struct kvg_client *client, struct kvg_sqe *sqe)
{
	(void)sqe;
	return client_check_cuda(client, "entry");
}

int gpu_set_appended(struct kvg_client *client, uint32_t slot, uint32_t appended)
{
	(void)slot;
	(void)appended;
	return client_check_cuda(client, "appended");
}

int gpu_gate_prepare(struct kvg_client *client, uint32_t slot)
{
	(void)slot;
	return client_check_cuda(client, "evict");
}

int gpu_gate_close(struct kvg_client *client, uint32_t slot, uint64_t *ret_gate)
{
	(void)slot;
	(void)ret_gate;
	return client_check_cuda(client, "evict");
}

void gpu_gate_open(struct gpu *gpu, uint32_t slot, uint64_t gate, const uint32_t *appended)
{
	(void)gpu;
	(void)slot;
	(void)gate;
	(void)appended;
}

void gpu_release_waits(struct gpu *gpu)
{
	(void)gpu;
}

int kvg_set_stream(struct kvg_client *client, void *stream)
{
	(void)stream;
	return client_check_cuda(client, "kvg_set_stream");
}

int kvg_stream_wait(struct kvg_client *client, uint64_t seq)
{
	(void)seq;
	return client_check_cuda(client, "kvg_stream_wait");
}

int kvg_stage_device(struct kvg_client *client, uint64_t seq, uint32_t kind, uint32_t layer_begin, uint32_t layer_count,
	uint32_t pos, uint32_t rows, const void *device_rows, uint64_t layer_stride)
{
	(void)seq;
	(void)kind;
	(void)layer_begin;
	(void)layer_count;
	(void)pos;
	(void)rows;
	(void)device_rows;
	(void)layer_stride;
	return client_check_cuda(client, "kvg_stage_device");
}

void *kvg_stage_device_buffer(struct kvg_client *client, uint64_t bytes)
{
	(void)bytes;
	(void)client_check_cuda(client, "kvg_stage_device_buffer");
	return NULL;
}

int kvg_import_buffer(struct kvg_client *client, const void *device, uint64_t size, uint32_t *ret_id)
{
	(void)device;
	(void)size;
	(void)ret_id;
	return client_check_cuda(client, "kvg_import_buffer");
}

int kvg_import_event(struct kvg_client *client, void *event, uint32_t *ret_id)
{
	(void)event;
	(void)ret_id;
	return client_check_cuda(client, "kvg_import_event");
}

int kvg_release(struct kvg_client *client, uint32_t id)
{
	(void)id;
	return client_check_cuda(client, "kvg_release");
}

int kvg_cuda_append(struct kvg_client *client, uint32_t layer, uint32_t count, const uint32_t *slots,
	const uint32_t *index, const void *k, uint64_t k_stride, const void *v, uint64_t v_stride)
{
	(void)layer;
	(void)count;
	(void)slots;
	(void)index;
	(void)k;
	(void)k_stride;
	(void)v;
	(void)v_stride;
	return client_check_cuda(client, "kvg_cuda_append");
}

int kvg_cuda_advance(struct kvg_client *client, const uint32_t *slots, uint32_t count, uint32_t by)
{
	(void)slots;
	(void)count;
	(void)by;
	return client_check_cuda(client, "kvg_cuda_advance");
}

int kvg_cuda_plan(struct kvg_client *client, uint32_t layer_begin, uint32_t layer_count, uint32_t sequences,
	const uint32_t *slots, uint32_t extra)
{
	(void)layer_begin;
	(void)layer_count;
	(void)sequences;
	(void)slots;
	(void)extra;
	return client_check_cuda(client, "kvg_cuda_plan");
}

int kvg_cuda_attend(struct kvg_client *client, uint32_t layer, float scale, const void *q, uint64_t q_stride, void *out,
	uint64_t out_stride)
{
	(void)layer;
	(void)scale;
	(void)q;
	(void)q_stride;
	(void)out;
	(void)out_stride;
	return client_check_cuda(client, "kvg_cuda_attend");
}

int kvg_cuda_export_table(struct kvg_client *client, uint32_t layer, uint32_t sequences, const uint32_t *slots,
	uint32_t extra, int32_t *table, uint32_t cap, int32_t *lengths)
{
	(void)layer;
	(void)sequences;
	(void)slots;
	(void)extra;
	(void)table;
	(void)cap;
	(void)lengths;
	return client_check_cuda(client, "kvg_cuda_export_table");
}

int kvg_cuda_export_csr(struct kvg_client *client, uint32_t layer, uint32_t sequences, const uint32_t *slots,
	uint32_t extra, int32_t *indptr, int32_t *indices, int32_t *last_page_len)
{
	(void)layer;
	(void)sequences;
	(void)slots;
	(void)extra;
	(void)indptr;
	(void)indices;
	(void)last_page_len;
	return client_check_cuda(client, "kvg_cuda_export_csr");
}
