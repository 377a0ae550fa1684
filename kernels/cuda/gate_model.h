/*
 * gate_model.h - the code of the gate and one model's packed weights, as gate_model.c makes and gate.c launches them.
 * Private to kernels/cuda/gate*.
 */
#ifndef KVG_CUDA_GATE_MODEL_H
#define KVG_CUDA_GATE_MODEL_H

#include "kernels/cuda/gate.h"
#include "kernels/cuda/gate_args.h"

/* One of the two kernels that compute capability 9.0 has for a group (gate_sm90.cu). */
struct kvg_gate_tiled {
	CUfunction function; /* NULL: this group has none */
	uint32_t rows;       /* of a cluster's tile: 256 when its blocks share weights, 128 when they share rows */
	uint32_t heads;      /* of a cluster's tile */
	uint32_t box_rows, box_weights; /* lines that one copy brings */
	uint32_t shared;                /* bytes of shared memory */
	uint32_t sums;                  /* bytes of a warpgroup's sums: what it hands in of a tile that is split */
	uint32_t clusters;              /* that the device runs at once */
};

struct kvg_gate_code {
	CUfunction hidden, preact; /* portable */
	uint32_t hidden_shared;
	struct kvg_gate_tiled wide, deep;
};

#define KVG_GATE_GROUP_MAX 16

struct kvg_cuda_gate_kernels {
	const struct kvg_cuda *cuda;
	CUmodule portable, tiled;                            /* tiled: NULL on other devices than 9.0 */
	struct kvg_gate_code groups[KVG_GATE_GROUP_MAX + 1]; /* by G; functions are NULL where G is not supported */
};

struct kvg_cuda_gate {
	const struct kvg_cuda_gate_kernels *kernels;
	const struct kvg_gate_code *code;
	uint32_t layers, heads, group, hidden, sinks, chunks;
	CUdeviceptr weights, constants;
	uint64_t layer_bytes;           /* of the weights */
	uint32_t layer_floats;          /* of the constants */
	uint32_t at_b, at_bases;        /* in floats */
	bool *folded;                   /* by layer */
	CUtensorMap wide_map, deep_map; /* of the weights [layers * chunks][H*(G+1)*d][64] */
};

/* Lines of packed weights in a layer. */
static inline uint32_t kvg_gate_lines(const struct kvg_cuda_gate *gate)
{
	return gate->heads * (gate->group + 1) * KVG_GATE_WIDTH;
}

/*
 * A tensor map of bf16 [sizes[2]][sizes[1]][sizes[0]] with those byte strides of the two outer dimensions, which brings
 * boxes of box_lines times 64 values, swizzled by 128 bytes.
 */
CUresult kvg_gate_map(const struct kvg_cuda *cuda, CUtensorMap *map, CUdeviceptr at, const uint64_t sizes[3],
	const uint64_t strides[2], uint32_t box_lines);

#endif
