#include <math.h>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_object.h"
#include "kernels/host/dtype.h"

extern const unsigned char kvg_image_attention_decode[];

static size_t align_up(size_t size, size_t unit)
{
	return (size + unit - 1) / unit * unit;
}

/* Bytes of struct kvg_shared in attention_decode.cuh. */
static uint32_t shared_size(const struct kvg_attention_decode *decode, uint32_t group)
{
	const uint32_t warps = decode->warps, slots = warps * 2 * 80 + 32,
		       queries = warps * decode->dim * (uint32_t)kvg_dtype_size(decode->dtype) * 8,
		       sums = warps * 2 * group * (decode->dim + 4) * 4, between = warps * 32 * 32;

	return slots + queries + (sums > between ? sums : between);
}

/* As many warps as the kernel is made for, or as fit into the device's shared memory. */
static CUresult decode_fit(const struct kvg_cuda *cuda, struct kvg_attention_decode *decode)
{
	while (decode->warps > 1 && shared_size(decode, KVG_CUDA_MAX_GROUP) > (uint32_t)cuda->shared_optin)
		decode->warps--;
	decode->blocks = (uint32_t)cuda->sm_count;
	return cuda->driver->cuFuncSetAttribute(decode->function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
		(int)shared_size(decode, KVG_CUDA_MAX_GROUP));
}

CUresult kvg_attention_decode_load(struct kvg_cuda_attention *attention)
{
#define NAME(type, dtype_, dim_, units_, warps_) "kvg_attend_" #type "_" #dim_,
#define KERNEL(type, dtype_, dim_, units_, warps_)                                                                     \
	{.dtype = KVG_KERNEL_##dtype_, .dim = (dim_), .units = (units_), .warps = (warps_)},
	static const char *const names[] = {KVG_ATTENTION_KERNELS(NAME)};
	static const struct kvg_attention_decode kernels[] = {KVG_ATTENTION_KERNELS(KERNEL)};
#undef NAME
#undef KERNEL
	CUfunction functions[KVG_ATTENTION_COUNT];
	CUresult result = kvg_cuda_module_load(attention->cuda, kvg_image_attention_decode, names, KVG_ATTENTION_COUNT,
		&attention->decode_module, functions);

	for (size_t i = 0; i < KVG_ATTENTION_COUNT && result == CUDA_SUCCESS; i++) {
		attention->decode[i] = kernels[i];
		attention->decode[i].function = functions[i];
		result = decode_fit(attention->cuda, &attention->decode[i]);
	}
	return result;
}

/* The kernel for this kv, or NULL where there is none. */
static const struct kvg_attention_decode *decode_find(
	const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv)
{
	for (size_t i = 0; i < KVG_ATTENTION_COUNT && kv->k_dim == kv->v_dim; i++)
		if (attention->decode[i].dim == kv->k_dim && attention->decode[i].dtype == kv->dtype)
			return &attention->decode[i];
	return NULL;
}

/* ---- plan ---- */

/* Where a plan's parts lie. memory is that of the range's first layer. */
static struct kvg_attention_plan plan_layout(
	const struct kvg_attention_decode *decode, const struct kvg_cuda_kv *kv, const struct kvg_cuda_plan *plan)
{
	const size_t rows = (size_t)plan->sequences * kv->heads;
	const uint32_t workers = decode->blocks * decode->warps;
	const size_t rows_at = sizeof(struct kvg_attention_head) + workers * sizeof(struct kvg_attention_start);
	const size_t counters_at = rows_at + rows * sizeof(struct kvg_attention_row);

	return (struct kvg_attention_plan){.memory = kvg_attention_at(plan->memory),
		.layer_bytes = align_up(counters_at + rows * sizeof(uint32_t), 256),
		.rows_at = rows_at,
		.counters_at = counters_at,
		.workers = workers,
		.least = decode->units};
}

static bool plan_valid(const struct kvg_cuda_kv *kv, const struct kvg_cuda_plan *plan)
{
	return kvg_attention_valid(kv) && kv->group >= 1 && kv->group <= KVG_CUDA_MAX_GROUP &&
	       (uint64_t)plan->layer_begin + plan->layer_count <= kv->layers &&
	       (uint64_t)plan->sequences * kv->heads <= INT32_MAX / 16 && plan->memory % 256 == 0;
}

size_t kvg_cuda_attention_plan_size(
	const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv, const struct kvg_cuda_plan *plan)
{
	const struct kvg_attention_decode *decode = decode_find(attention, kv);

	return decode ? plan_layout(decode, kv, plan).layer_bytes * plan->layer_count : 0;
}

CUresult kvg_cuda_attention_plan(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	const struct kvg_cuda_plan *plan, CUstream stream)
{
	const struct kvg_attention_decode *decode = decode_find(attention, kv);
	struct kvg_attention_plan_make args;
	void *arguments[] = {&args};

	if (!decode)
		return CUDA_ERROR_NOT_SUPPORTED;
	if (!plan_valid(kv, plan))
		return CUDA_ERROR_INVALID_VALUE;
	if (plan->layer_count == 0 || plan->sequences == 0)
		return CUDA_SUCCESS;
	args.rows = kvg_attention_rows_of(kv, plan->layer_begin, plan->slots, plan->sequences, plan->extra);
	args.plan = plan_layout(decode, kv, plan);
	return kvg_cuda_launch(
		attention->cuda, attention->plan, plan->layer_count, KVG_ATTENTION_SCAN, 0, stream, arguments);
}

/* ---- attend ---- */

size_t kvg_cuda_attention_scratch_size(
	const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv, const struct kvg_cuda_plan *plan)
{
	const struct kvg_attention_decode *decode = decode_find(attention, kv);

	(void)plan;
	if (!decode)
		return 0;
	return (size_t)decode->blocks * 2 * (kv->group * kv->v_dim + 32) * sizeof(float);
}

static bool attend_valid(const struct kvg_cuda_kv *kv, const struct kvg_cuda_plan *plan,
	const struct kvg_cuda_attend *attend, const struct kvg_attention_attend *args)
{
	return plan_valid(kv, plan) && attend->layer >= plan->layer_begin &&
	       attend->layer - plan->layer_begin < plan->layer_count && attend->scratch % 256 == 0 &&
	       (attend->q | attend->out | args->q_stride | args->out_stride) % 16 == 0;
}

/* Strides in bytes; the plan's layer comes after the checks. */
static struct kvg_attention_attend attend_args(const struct kvg_cuda_kv *kv, const struct kvg_cuda_plan *plan,
	const struct kvg_cuda_attend *attend, const struct kvg_attention_decode *decode)
{
	const size_t size = kvg_dtype_size(decode->dtype);

	return (struct kvg_attention_attend){.plan = plan_layout(decode, kv, plan),
		.k_base = kvg_attention_at(kv->k_base),
		.v_base = kvg_attention_at(kv->v_base),
		.stride = kv->stride,
		.ids = kvg_attention_rows_of(kv, attend->layer, plan->slots, plan->sequences, plan->extra).ids,
		.q = kvg_attention_at(attend->q),
		.out = kvg_attention_at(attend->out),
		.q_stride = attend->q_stride * size,
		.out_stride = attend->out_stride * size,
		.scratch = kvg_attention_at(attend->scratch),
		.scale = attend->scale * (float)M_LOG2E,
		.heads = kv->heads,
		.row_cap = kv->row_cap,
		.max_sequences = kv->max_sequences,
		.group = kv->group};
}

CUresult kvg_cuda_attention_attend(const struct kvg_cuda_attention *attention, const struct kvg_cuda_kv *kv,
	const struct kvg_cuda_plan *plan, const struct kvg_cuda_attend *attend, CUstream stream)
{
	const struct kvg_attention_decode *decode = decode_find(attention, kv);
	struct kvg_attention_attend args;
	void *arguments[] = {&args};

	if (!decode)
		return CUDA_ERROR_NOT_SUPPORTED;
	args = attend_args(kv, plan, attend, decode);
	if (!attend_valid(kv, plan, attend, &args))
		return CUDA_ERROR_INVALID_VALUE;
	if (plan->sequences == 0)
		return CUDA_SUCCESS;
	args.plan.memory += (attend->layer - plan->layer_begin) * args.plan.layer_bytes;
	return kvg_cuda_launch(attention->cuda, decode->function, decode->blocks, decode->warps * 32,
		shared_size(decode, kv->group), stream, arguments);
}
