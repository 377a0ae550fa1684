/* attention_object.h - what kvg_cuda_attention_new() makes, and what its launchers share. */
#ifndef KVG_CUDA_ATTENTION_OBJECT_H
#define KVG_CUDA_ATTENTION_OBJECT_H

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_args.h"

#define KVG_ATTENTION_ONE(type, dtype, dim, units, warps) +1 /* NOLINT(bugprone-macro-parentheses): a summand */
#define KVG_ATTENTION_COUNT                               (0 KVG_ATTENTION_KERNELS(KVG_ATTENTION_ONE))

/* Decode attention for one dtype and dimension. */
struct kvg_attention_decode {
	CUfunction function;
	uint32_t dtype, dim;
	uint32_t units;         /* blocks that a warp loads together */
	uint32_t warps, blocks; /* of a thread block; thread blocks: one on each multiprocessor */
};

struct kvg_cuda_attention {
	const struct kvg_cuda *cuda;
	CUmodule common_module, decode_module;
	CUfunction append, advance, plan, table, indptr, indices;
	struct kvg_attention_decode decode[KVG_ATTENTION_COUNT];
};

/* Loads the decode kernels of an attention whose cuda is set. */
CUresult kvg_attention_decode_load(struct kvg_cuda_attention *attention);

/* Whether the addressing of the kv can be served at all. */
bool kvg_attention_valid(const struct kvg_cuda_kv *kv);

/* The tables from `layer` on, for slots on the device. */
struct kvg_attention_rows kvg_attention_rows_of(
	const struct kvg_cuda_kv *kv, uint32_t layer, CUdeviceptr slots, uint32_t sequences, uint32_t extra);

static inline void *kvg_attention_at(CUdeviceptr address)
{
	return (void *)(uintptr_t)address;
}

#endif
