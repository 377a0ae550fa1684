#include "kernels/cuda/gate_model.h"

#define COUNTER_BYTES    (4 * sizeof(uint32_t)) /* of a tile: one for each warpgroup of both blocks */
#define PARTS_OF_CLUSTER 8                      /* of its first and its last tile, by two blocks of two warpgroups */
#define PREACT_WARPS     16                     /* of a multiprocessor */

/* Measured on an H200, in chunks: what it costs to share a tile at all, and more for each part that it is cut into. */
#define LEAST_CHUNKS 8 /* of a part */
#define SHARE_CHUNKS 8
#define PART_CHUNKS  2
#define DEEP_COST    1.12 /* of a deep tile's line against a wide one's */

static uint32_t tiles_of(uint32_t count, uint32_t size)
{
	return (count + size - 1) / size;
}

uint64_t kvg_cuda_gate_scratch(const struct kvg_cuda_gate *gate)
{
	const struct kvg_gate_tiled *deep = &gate->code->deep;

	return KVG_CUDA_GATE_COUNTERS + (uint64_t)deep->clusters * PARTS_OF_CLUSTER * deep->sums;
}

static uint64_t layer_stride(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows)
{
	uint64_t values = rows->kind == KVG_CUDA_GATE_HIDDEN ? gate->hidden : kvg_gate_lines(gate);

	return rows->layer_stride_bytes != 0 ? rows->layer_stride_bytes : rows->rows * values * 2;
}

static bool rows_valid(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows)
{
	uint64_t blocks = (uint64_t)tiles_of(rows->rows, 16) * gate->heads;

	return rows->layer_begin <= gate->layers && rows->layer_count <= gate->layers - rows->layer_begin &&
	       rows->data % 16 == 0 && rows->layer_stride_bytes % 16 == 0 && rows->scratch % 256 == 0 &&
	       rows->score_stride >= rows->rows && rows->rows <= 1u << 30 && blocks * rows->layer_count <= INT32_MAX &&
	       (rows->kind == KVG_CUDA_GATE_HIDDEN || rows->kind == KVG_CUDA_GATE_PREACT);
}

static struct kvg_gate_args args_of(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows)
{
	return (struct kvg_gate_args){
		.input = rows->data,
		.weights = gate->weights + rows->layer_begin * gate->layer_bytes,
		.constants = gate->constants + rows->layer_begin * gate->layer_floats * sizeof(float),
		.scores = rows->scores,
		.partials = rows->scratch + KVG_CUDA_GATE_COUNTERS,
		.counters = rows->scratch,
		.layer_stride = layer_stride(gate, rows),
		.score_stride = rows->score_stride,
		.constants_stride = gate->layer_floats,
		.at_b = gate->at_b,
		.at_bases = gate->at_bases,
		.bases_stride = gate->sinks * KVG_GATE_WIDTH,
		.rows = rows->rows,
		.heads = gate->heads,
		.hidden = gate->hidden,
		.first_layer = rows->layer_begin,
		.chunks = gate->chunks,
	};
}

static CUresult score_preact(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows, CUstream stream)
{
	const struct kvg_cuda *cuda = gate->kernels->cuda;
	struct kvg_gate_args args = args_of(gate, rows);
	void *arguments[] = {&args};

	args.row_tiles = tiles_of(rows->rows, 16);
	args.warp_tiles =
		tiles_of(args.row_tiles * rows->layer_count * gate->heads, (uint32_t)cuda->sm_count * PREACT_WARPS);
	args.tiles = tiles_of(args.row_tiles, args.warp_tiles) * rows->layer_count; /* runs of tiles */
	return kvg_cuda_launch(
		cuda, gate->code->preact, tiles_of(args.tiles * gate->heads, 4), 128, 0, stream, arguments);
}

static CUresult score_portable(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows, CUstream stream)
{
	struct kvg_gate_args args = args_of(gate, rows);
	void *arguments[] = {&args};

	args.row_tiles = tiles_of(rows->rows, 64);
	return kvg_cuda_launch(gate->kernels->cuda, gate->code->hidden,
		args.row_tiles * rows->layer_count * gate->heads, 128, gate->code->hidden_shared, stream, arguments);
}

/* One way to deal a call's tiles to clusters. */
struct plan {
	const struct kvg_gate_tiled *tiled;
	uint32_t row_tiles, head_tiles, tiles, clusters;
	bool split;
	double cost; /* time, in chunks times lines of a wide tile */
};

static void plan_whole(struct plan *plan, uint32_t chunks)
{
	uint32_t most = plan->tiled->clusters;

	plan->clusters = plan->tiles < most ? plan->tiles : most;
	plan->cost = (double)tiles_of(plan->tiles, most) * chunks;
}

/* Few tiles are cut into equal parts; many are dealt evenly, however that cuts them. */
static void plan_split(struct plan *plan, uint32_t chunks)
{
	uint32_t most = plan->tiled->clusters, parts = 2;

	if (plan->tiles < most) {
		parts = most / plan->tiles;
		if (parts > chunks / LEAST_CHUNKS)
			parts = chunks / LEAST_CHUNKS > 0 ? chunks / LEAST_CHUNKS : 1;
		most = plan->tiles * parts;
	}
	plan->clusters = most;
	plan->split = true;
	plan->cost = (double)plan->tiles * chunks / most + SHARE_CHUNKS + parts * PART_CHUNKS;
}

static struct plan plan_of(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows,
	const struct kvg_gate_tiled *tiled, bool split)
{
	uint32_t row_tiles = tiles_of(rows->rows, tiled->rows), head_tiles = tiles_of(gate->heads, tiled->heads);
	struct plan plan = {.tiled = tiled,
		.row_tiles = row_tiles,
		.head_tiles = head_tiles,
		.tiles = row_tiles * head_tiles * rows->layer_count};

	if (split && rows->scratch && plan.tiles * COUNTER_BYTES <= KVG_CUDA_GATE_COUNTERS &&
		(uint64_t)plan.tiles * gate->chunks * (tiled->clusters + 1) <= UINT32_MAX)
		plan_split(&plan, gate->chunks);
	else
		plan_whole(&plan, gate->chunks);
	plan.cost *= tiled->sums * (tiled == &gate->code->deep ? DEEP_COST : 1);
	return plan;
}

/* Dealing the chunks of many tiles would bring the same rows at different times, so rows are fetched more than once. */
static bool is_sensible(const struct plan *plan)
{
	return !plan->split || plan->row_tiles == 1 || plan->tiles < plan->tiled->clusters;
}

static struct plan best_plan(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows)
{
	struct plan best = plan_of(gate, rows, &gate->code->wide, false);

	for (int split = 0; split < 2; split++) {
		struct plan plan = plan_of(gate, rows, &gate->code->deep, split != 0);

		if (plan.cost < best.cost && is_sensible(&plan))
			best = plan;
	}
	return best;
}

static struct plan choose(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows)
{
	switch (rows->path) {
	case KVG_CUDA_GATE_WIDE:
		return plan_of(gate, rows, &gate->code->wide, false);
	case KVG_CUDA_GATE_DEEP:
	case KVG_CUDA_GATE_DEEP_SPLIT:
		return plan_of(gate, rows, &gate->code->deep, rows->path == KVG_CUDA_GATE_DEEP_SPLIT);
	default:
		return best_plan(gate, rows);
	}
}

static CUresult score_tiled(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows, CUstream stream)
{
	const struct plan plan = choose(gate, rows);
	struct kvg_gate_args args = args_of(gate, rows);
	CUtensorMap rows_map, weights_map = plan.tiled == &gate->code->wide ? gate->wide_map : gate->deep_map;
	void *arguments[] = {&args, &rows_map, &weights_map};
	const uint64_t sizes[] = {gate->hidden, rows->rows, rows->layer_count};
	const uint64_t strides[] = {(uint64_t)gate->hidden * 2, args.layer_stride};
	CUresult result =
		kvg_gate_map(gate->kernels->cuda, &rows_map, rows->data, sizes, strides, plan.tiled->box_rows);

	if (result != CUDA_SUCCESS)
		return result;
	args.row_tiles = plan.row_tiles;
	args.head_tiles = plan.head_tiles;
	args.tiles = plan.tiles;
	args.split = plan.split;
	return kvg_cuda_launch(gate->kernels->cuda, plan.tiled->function, plan.clusters * 2, 384, plan.tiled->shared,
		stream, arguments);
}

CUresult kvg_cuda_gate_score(const struct kvg_cuda_gate *gate, const struct kvg_cuda_gate_rows *rows, CUstream stream)
{
	bool has_tiled = gate->code->wide.function;

	if (!rows_valid(gate, rows))
		return CUDA_ERROR_INVALID_VALUE;
	if (rows->rows == 0 || rows->layer_count == 0)
		return CUDA_SUCCESS;
	if (rows->kind == KVG_CUDA_GATE_PREACT)
		return score_preact(gate, rows, stream);
	if (rows->path == KVG_CUDA_GATE_PORTABLE || (rows->path == KVG_CUDA_GATE_AUTO && !has_tiled))
		return score_portable(gate, rows, stream);
	return has_tiled ? score_tiled(gate, rows, stream) : CUDA_ERROR_NOT_SUPPORTED;
}
