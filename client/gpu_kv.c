/* KV in place on the cuda kind: what an engine enqueues on the client's stream. */
#include "client/cuda.h"

#include <errno.h>
#include <stdlib.h>

#include "kernels/cuda/attention.h"

/* ---- what every call needs ---- */

static int check(struct kvg_client *client, const char *call)
{
	const struct gpu *gpu = client->gpu;
	int r = client_check_registered(client);

	if (r < 0)
		return r;
	if (client->model.k_dtype != client->model.v_dtype)
		return client_fail(client, -EOPNOTSUPP, "%s: K of dtype %u and V of dtype %u", call,
			client->model.k_dtype, client->model.v_dtype);
	if (gpu->attention)
		return 0;
	return client_fail(client, -EOPNOTSUPP, "%s: its kernels do not run on this GPU: %s", call,
		kvg_cuda_error(gpu->cuda->driver, (CUresult)gpu->attention_status));
}

static struct kvg_cuda_kv kv_of(const struct kvg_client *client)
{
	const struct gpu *gpu = client->gpu;
	const struct model *model = &client->model;

	return (struct kvg_cuda_kv){
		.k_base = (uintptr_t)client->arena.base,
		.v_base = (uintptr_t)client->arena.base + client->arena.extent_size / 2,
		.stride = model->stride,
		.ids = gpu->table.address + gpu->ids_offset,
		.base_len = gpu->table.address,
		.appended = gpu->appended,
		.layers = model->layers,
		.heads = model->heads,
		.max_sequences = model->max_sequences,
		.row_cap = client->table.shape.row_cap,
		.group = model->query_heads,
		.k_dim = model->k_dim,
		.v_dim = model->v_dim,
		.dtype = model->k_dtype,
	};
}

/* INVALID_VALUE and NOT_SUPPORTED are the caller's arguments and the layout. */
static int launched(struct kvg_client *client, CUresult result, const char *call)
{
	if (result == CUDA_ERROR_INVALID_VALUE)
		return client_fail(client, -EINVAL, "%s: an argument is out of range or not aligned to 16 bytes", call);
	if (result == CUDA_ERROR_NOT_SUPPORTED)
		return client_fail(client, -EOPNOTSUPP, "%s: not for heads of %u and %u in dtypes %u and %u", call,
			client->model.k_dim, client->model.v_dim, client->model.k_dtype, client->model.v_dtype);
	return cuda_status(client, result, call);
}

static CUdeviceptr device(const void *pointer)
{
	return (uintptr_t)pointer;
}

/* ---- append, advance ---- */

int kvg_cuda_append(struct kvg_client *client, uint32_t layer, uint32_t count, const uint32_t *slots,
	const uint32_t *index, const void *k, uint64_t k_stride, const void *v, uint64_t v_stride)
{
	const struct kvg_cuda_append append = {.layer = layer,
		.tokens = count,
		.slots = device(slots),
		.index = device(index),
		.k = device(k),
		.v = device(v),
		.k_stride = k_stride,
		.v_stride = v_stride};
	int r = client_check_cuda(client, "kvg_cuda_append");
	struct kvg_cuda_kv kv;

	if (r < 0)
		return r;
	CLIENT_QUIET_TURN(client);
	r = check(client, "kvg_cuda_append");
	if (r < 0)
		return r;
	kv = kv_of(client);
	CUDA_SCOPE(client->gpu->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result = kvg_cuda_attention_append(client->gpu->attention, &kv, &append, cuda_stream(client));
	return launched(client, scope.result, "kvg_cuda_append");
}

int kvg_cuda_advance(struct kvg_client *client, const uint32_t *slots, uint32_t count, uint32_t by)
{
	int r = client_check_cuda(client, "kvg_cuda_advance");
	struct kvg_cuda_kv kv;

	if (r < 0)
		return r;
	CLIENT_QUIET_TURN(client);
	r = check(client, "kvg_cuda_advance");
	if (r < 0)
		return r;
	kv = kv_of(client);
	CUDA_SCOPE(client->gpu->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result = kvg_cuda_attention_advance(
			client->gpu->attention, &kv, device(slots), count, by, cuda_stream(client));
	if (scope.result == CUDA_SUCCESS)
		client->gpu->advances = true;
	return launched(client, scope.result, "kvg_cuda_advance");
}

/* ---- attention ---- */

/* Memory that is too small is replaced, but not freed: graphs may name it. Not while one is being captured. */
static int scratch_ensure(struct kvg_client *client, struct gpu_scratch *scratch, uint64_t size)
{
	CUdeviceptr address = 0;
	struct gpu_old *old = NULL;
	int r;

	if (size <= scratch->size)
		return 0;
	r = cuda_check_stream(client, "kvg_cuda_plan: call it once with these sizes before");
	if (r < 0)
		return r;
	if (scratch->address) {
		old = malloc(sizeof(*old));
		if (!old)
			return client_fail(client, -ENOMEM, "no memory");
	}
	r = cuda_status(client, client->gpu->cuda->driver->cuMemAlloc(&address, size), "kvg_cuda_plan: its memory");
	if (r < 0) {
		free(old);
		return r;
	}
	if (old) {
		*old = (struct gpu_old){.next = scratch->old, .address = scratch->address};
		scratch->old = old;
	}
	scratch->address = address;
	scratch->size = size;
	return 0;
}

static struct kvg_cuda_plan plan_of(const struct gpu *gpu)
{
	return (struct kvg_cuda_plan){.layer_begin = gpu->plan_layer,
		.layer_count = gpu->plan_layers,
		.sequences = gpu->plan_sequences,
		.extra = gpu->plan_extra,
		.slots = gpu->plan_slots,
		.memory = gpu->plan.address};
}

static int enqueue_plan(struct kvg_client *client, struct kvg_cuda_plan *plan)
{
	struct gpu *gpu = client->gpu;
	const struct kvg_cuda_kv kv = kv_of(client);
	CUresult result;
	int r = scratch_ensure(client, &gpu->plan, kvg_cuda_attention_plan_size(gpu->attention, &kv, plan));

	if (r == 0)
		r = scratch_ensure(client, &gpu->scratch, kvg_cuda_attention_scratch_size(gpu->attention, &kv, plan));
	if (r < 0)
		return r;
	plan->memory = gpu->plan.address;
	result = kvg_cuda_attention_plan(gpu->attention, &kv, plan, cuda_stream(client));
	if (result == CUDA_SUCCESS) {
		gpu->plan_layer = plan->layer_begin;
		gpu->plan_layers = plan->layer_count;
		gpu->plan_sequences = plan->sequences;
		gpu->plan_extra = plan->extra;
		gpu->plan_slots = plan->slots;
	}
	return launched(client, result, "kvg_cuda_plan");
}

int kvg_cuda_plan(struct kvg_client *client, uint32_t layer_begin, uint32_t layer_count, uint32_t sequences,
	const uint32_t *slots, uint32_t extra)
{
	struct kvg_cuda_plan plan = {.layer_begin = layer_begin,
		.layer_count = layer_count,
		.sequences = sequences,
		.extra = extra,
		.slots = device(slots)};
	int r = client_check_cuda(client, "kvg_cuda_plan");

	if (r < 0)
		return r;
	CLIENT_QUIET_TURN(client);
	r = check(client, "kvg_cuda_plan");
	if (r == 0 && (!layer_count || layer_begin >= client->model.layers ||
			      layer_count > client->model.layers - layer_begin || !sequences))
		r = client_fail(client, -EINVAL, "kvg_cuda_plan: layers %u + %u of %u, %u sequences", layer_begin,
			layer_count, client->model.layers, sequences);
	if (r < 0)
		return r;
	CUDA_SCOPE(client->gpu->cuda);
	r = cuda_status(client, scope.result, "the GPU's context");
	return r < 0 ? r : enqueue_plan(client, &plan);
}

int kvg_cuda_attend(struct kvg_client *client, uint32_t layer, float scale, const void *q, uint64_t q_stride, void *out,
	uint64_t out_stride)
{
	struct kvg_cuda_attend attend = {.layer = layer,
		.scale = scale,
		.q = device(q),
		.out = device(out),
		.q_stride = q_stride,
		.out_stride = out_stride};
	int r = client_check_cuda(client, "kvg_cuda_attend");
	struct kvg_cuda_plan plan;
	struct kvg_cuda_kv kv;

	if (r < 0)
		return r;
	CLIENT_QUIET_TURN(client);
	r = check(client, "kvg_cuda_attend");
	plan = plan_of(client->gpu);
	if (r == 0 && (layer < plan.layer_begin || layer - plan.layer_begin >= plan.layer_count))
		r = client_fail(client, -EINVAL, "kvg_cuda_attend: layer %u, the plan has %u from %u", layer,
			plan.layer_count, plan.layer_begin);
	if (r < 0)
		return r;
	kv = kv_of(client);
	attend.scratch = client->gpu->scratch.address;
	CUDA_SCOPE(client->gpu->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result =
			kvg_cuda_attention_attend(client->gpu->attention, &kv, &plan, &attend, cuda_stream(client));
	return launched(client, scope.result, "kvg_cuda_attend");
}

/* ---- tables for other kernels ---- */

int kvg_cuda_export_table(struct kvg_client *client, uint32_t layer, uint32_t sequences, const uint32_t *slots,
	uint32_t extra, int32_t *table, uint32_t cap, int32_t *lengths)
{
	const struct kvg_cuda_export rows = {
		.layer = layer, .sequences = sequences, .extra = extra, .slots = device(slots)};
	int r = client_check_cuda(client, "kvg_cuda_export_table");
	struct kvg_cuda_kv kv;

	if (r < 0)
		return r;
	CLIENT_QUIET_TURN(client);
	r = check(client, "kvg_cuda_export_table");
	if (r < 0)
		return r;
	kv = kv_of(client);
	CUDA_SCOPE(client->gpu->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result = kvg_cuda_attention_export_table(
			client->gpu->attention, &kv, &rows, device(table), cap, device(lengths), cuda_stream(client));
	return launched(client, scope.result, "kvg_cuda_export_table");
}

int kvg_cuda_export_csr(struct kvg_client *client, uint32_t layer, uint32_t sequences, const uint32_t *slots,
	uint32_t extra, int32_t *indptr, int32_t *indices, int32_t *last_page_len)
{
	const struct kvg_cuda_export rows = {
		.layer = layer, .sequences = sequences, .extra = extra, .slots = device(slots)};
	int r = client_check_cuda(client, "kvg_cuda_export_csr");
	struct kvg_cuda_kv kv;

	if (r < 0)
		return r;
	CLIENT_QUIET_TURN(client);
	r = check(client, "kvg_cuda_export_csr");
	if (r < 0)
		return r;
	kv = kv_of(client);
	CUDA_SCOPE(client->gpu->cuda);
	if (scope.result == CUDA_SUCCESS)
		scope.result = kvg_cuda_attention_export_csr(client->gpu->attention, &kv, &rows, device(indptr),
			device(indices), device(last_page_len), cuda_stream(client));
	return launched(client, scope.result, "kvg_cuda_export_csr");
}
