#include "kernels/cuda/select.h"

#include <stdlib.h>

#include "kernels/cuda/select_args.h"

#define ALIGN_SCORES   16
#define ALIGN_KEEP     4
#define QUADS_OF_BLOCK 1024u /* a group has no more blocks than its segment has work for */

extern const unsigned char kvg_image_select[];

enum kernel { KERNEL_GRID, KERNEL_ROWS, KERNEL_MASK, KERNEL_HISTOGRAM, KERNEL_CUT, KERNELS };

static const char *const kernel_names[KERNELS] = {
	"select_grid", "select_rows", "select_mask", "select_histogram", "select_cut"};

struct kvg_cuda_select {
	const struct kvg_cuda *cuda;
	CUmodule module;
	CUfunction kernel[KERNELS];
	uint32_t grid_staged, row_staged; /* quads that fit into a block's shared memory */
	uint32_t blocks;                  /* of select_grid that run at the same time */
};

static uint32_t least(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/* Lets the kernel use all shared memory that a block may have; *ret_quads fit beside what it declares. */
static CUresult unlock_shared(const struct kvg_cuda *cuda, CUfunction function, uint32_t *ret_quads)
{
	int declared = 0;
	CUresult result = cuda->driver->cuFuncGetAttribute(&declared, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function);

	if (result != CUDA_SUCCESS)
		return result;
	int quads = (cuda->shared_optin - declared) / 16;

	*ret_quads = (uint32_t)quads;
	return cuda->driver->cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, quads * 16);
}

static CUresult measure(struct kvg_cuda_select *select)
{
	const struct kvg_cuda *cuda = select->cuda;
	CUresult result = unlock_shared(cuda, select->kernel[KERNEL_GRID], &select->grid_staged);
	int blocks = 0;

	if (result == CUDA_SUCCESS)
		result = unlock_shared(cuda, select->kernel[KERNEL_ROWS], &select->row_staged);
	if (result == CUDA_SUCCESS)
		result = cuda->driver->cuOccupancyMaxActiveBlocksPerMultiprocessor(
			&blocks, select->kernel[KERNEL_GRID], KVG_SELECT_GRID_THREADS, select->grid_staged * 16);
	if (result == CUDA_SUCCESS && blocks < 1)
		return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
	select->grid_staged = least(select->grid_staged, KVG_SELECT_GRID_STAGES * KVG_SELECT_GRID_THREADS);
	select->blocks = (uint32_t)cuda->sm_count;
	return result;
}

CUresult kvg_cuda_select_new(const struct kvg_cuda *cuda, struct kvg_cuda_select **ret)
{
	struct kvg_cuda_select *select = calloc(1, sizeof(*select));

	if (!select)
		return CUDA_ERROR_OUT_OF_MEMORY;
	select->cuda = cuda;
	CUresult result =
		kvg_cuda_module_load(cuda, kvg_image_select, kernel_names, KERNELS, &select->module, select->kernel);

	if (result == CUDA_SUCCESS)
		result = measure(select);
	if (result == CUDA_SUCCESS)
		*ret = select;
	else
		(void)kvg_cuda_select_free(select);
	return result;
}

struct kvg_cuda_select *kvg_cuda_select_free(struct kvg_cuda_select *select)
{
	if (!select)
		return NULL;
	if (select->module)
		(void)select->cuda->driver->cuModuleUnload(select->module);
	free(select);
	return NULL;
}

size_t kvg_cuda_select_scratch(const struct kvg_cuda_select *select, uint32_t layers)
{
	uint32_t groups = layers < select->blocks ? layers : select->blocks;

	return (groups ? groups : 1) * sizeof(struct kvg_select_group);
}

CUresult kvg_cuda_select_scratch_clear(
	const struct kvg_cuda_select *select, void *scratch, uint32_t layers, CUstream stream)
{
	return select->cuda->driver->cuMemsetD8Async(
		(CUdeviceptr)scratch, 0, kvg_cuda_select_scratch(select, layers), stream);
}

static int is_aligned(const void *pointer, uintptr_t to)
{
	return (uintptr_t)pointer % to == 0;
}

static int is_valid(const struct kvg_cuda_select_input *in, const uint8_t *keep)
{
	return is_aligned(in->scores, ALIGN_SCORES) && is_aligned(keep, ALIGN_KEEP);
}

static uint32_t row_count(const struct kvg_cuda_select_input *in)
{
	return in->layers * in->heads;
}

static uint32_t quads_of(uint64_t scores)
{
	return (uint32_t)((scores + 3) / 4 + 1);
}

/* Blocks that share a segment of that many quads when there are `segments` of them. */
static uint32_t grid_members(const struct kvg_cuda_select *select, uint32_t segments, uint32_t quads)
{
	uint32_t members = least(select->blocks / segments, (quads + QUADS_OF_BLOCK - 1) / QUADS_OF_BLOCK);

	return members ? members : 1;
}

/* Launches select_grid on segments of all rows or of one layer. The caller filled in what to look for. */
static CUresult launch_grid(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in, int by_layer,
	struct kvg_select_grid_args *args, void *scratch, CUstream stream)
{
	uint64_t scores = by_layer ? (uint64_t)in->longest * in->heads : in->count;
	uint32_t quads = quads_of(scores < UINT32_MAX ? scores : UINT32_MAX), groups;
	void *arguments[] = {args};

	if (!scratch || !is_aligned(scratch, 16))
		return CUDA_ERROR_INVALID_VALUE;
	args->scores = in->scores;
	args->offset = in->offset;
	args->length = in->longest;
	args->groups = scratch;
	args->segments = by_layer ? in->layers : 1;
	args->rows = by_layer ? in->heads : row_count(in);
	args->members = grid_members(select, args->segments, quads);
	args->staged = least(select->grid_staged, (quads + args->members - 1) / args->members);
	groups = least(args->segments, select->blocks);
	return select->cuda->driver->cuLaunchCooperativeKernel(select->kernel[KERNEL_GRID], groups * args->members, 1,
		1, KVG_SELECT_GRID_THREADS, 1, 1, args->staged * 16, stream, arguments);
}

static CUresult launch_rows(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in, uint32_t rule,
	double ratio, uint32_t floor, uint8_t *keep, CUstream stream)
{
	struct kvg_select_row_args args = {.scores = in->scores,
		.offset = in->offset,
		.length = in->longest,
		.keep = keep,
		.ratio = ratio,
		.rule = rule,
		.floor = floor,
		.staged = least(select->row_staged, quads_of(in->longest))};
	void *arguments[] = {&args};

	return kvg_cuda_launch(select->cuda, select->kernel[KERNEL_ROWS], row_count(in), KVG_SELECT_ROW_THREADS,
		args.staged * 16, stream, arguments);
}

/* Blocks of a kernel that looks at each score once. */
static uint32_t flat_blocks(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in)
{
	uint32_t most = (uint32_t)select->cuda->sm_count * 4;

	return least(most, (quads_of(in->count) + KVG_SELECT_FLAT_THREADS - 1) / KVG_SELECT_FLAT_THREADS);
}

static CUresult launch_mask(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	struct kvg_select_mask_args args, uint8_t *keep, CUstream stream)
{
	void *arguments[] = {&args};

	if (!keep || !is_valid(in, keep))
		return CUDA_ERROR_INVALID_VALUE;
	args.scores = in->scores;
	args.offset = in->offset;
	args.length = in->longest;
	args.keep = keep;
	args.rows = row_count(in);
	return kvg_cuda_launch(select->cuda, select->kernel[KERNEL_MASK], flat_blocks(select, in),
		KVG_SELECT_FLAT_THREADS, 0, stream, arguments);
}

static CUresult ratio_of_layers(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in, int safe,
	double ratio, uint8_t *keep, float *threshold, void *scratch, CUstream stream)
{
	struct kvg_select_grid_args args = {.keep = keep, .threshold = threshold, .ratio = ratio, .safe = safe ? 1 : 0};
	CUresult result = CUDA_SUCCESS;

	if (safe)
		result = launch_rows(select, in, KVG_SELECT_ROW_SAFE, ratio, 0, keep, stream);
	if (result == CUDA_SUCCESS)
		result = launch_grid(select, in, 1, &args, scratch, stream);
	return result;
}

CUresult kvg_cuda_select_ratio(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	uint32_t level, double ratio, uint8_t *keep, float *threshold, void *scratch, CUstream stream)
{
	int searched = level == KVG_SELECT_PAIR || level == KVG_SELECT_PAIR_LAYER;

	if (level > KVG_SELECT_ADAKV_LAYER || !is_valid(in, keep) || (!keep && !searched))
		return CUDA_ERROR_INVALID_VALUE;
	if (!row_count(in))
		return CUDA_SUCCESS;
	if (ratio >= 1.0)
		return keep ? launch_mask(select, in, (struct kvg_select_mask_args){.all = 1}, keep, stream)
			    : CUDA_SUCCESS;
	if (level == KVG_SELECT_PAIR) {
		struct kvg_select_grid_args args = {.keep = keep, .threshold = threshold, .ratio = ratio};

		return launch_grid(select, in, 0, &args, scratch, stream);
	}
	if (level == KVG_SELECT_PAIR_HEAD)
		return launch_rows(select, in, KVG_SELECT_ROW_SHARE, ratio, 0, keep, stream);
	return ratio_of_layers(
		select, in, level == KVG_SELECT_ADAKV_LAYER, ratio, keep, searched ? threshold : NULL, scratch, stream);
}

CUresult kvg_cuda_select_budget(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	uint64_t budget, uint8_t *keep, float *threshold, void *scratch, CUstream stream)
{
	struct kvg_select_grid_args args = {.keep = keep, .threshold = threshold, .budget = budget, .by_budget = 1};

	if (!is_valid(in, keep))
		return CUDA_ERROR_INVALID_VALUE;
	return row_count(in) ? launch_grid(select, in, 0, &args, scratch, stream) : CUDA_SUCCESS;
}

CUresult kvg_cuda_select_floor(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	uint32_t floor, uint8_t *keep, CUstream stream)
{
	if (!keep || !is_valid(in, keep))
		return CUDA_ERROR_INVALID_VALUE;
	return floor && row_count(in) ? launch_rows(select, in, KVG_SELECT_ROW_FLOOR, 0.0, floor, keep, stream)
				      : CUDA_SUCCESS;
}

CUresult kvg_cuda_select_threshold(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	float value, uint8_t *keep, CUstream stream)
{
	return launch_mask(select, in, (struct kvg_select_mask_args){.value = value}, keep, stream);
}

CUresult kvg_cuda_select_mask(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	const float *threshold, int equal, uint8_t *keep, CUstream stream)
{
	struct kvg_select_mask_args args = {.threshold = threshold, .equal = equal ? 1 : 0};

	return threshold ? launch_mask(select, in, args, keep, stream) : CUDA_ERROR_INVALID_VALUE;
}

CUresult kvg_cuda_select_histogram(const struct kvg_cuda_select *select, const struct kvg_cuda_select_input *in,
	uint32_t pass, const struct kvg_cuda_select_state *state, uint32_t *counts, CUstream stream)
{
	struct kvg_select_step_args args = {.scores = in->scores,
		.offset = in->offset,
		.counts = counts,
		.length = in->longest,
		.rows = row_count(in),
		.pass = pass};
	void *arguments[] = {&args};
	CUresult result;

	if (!counts || pass > 2 || (pass && !state) || !is_valid(in, NULL))
		return CUDA_ERROR_INVALID_VALUE;
	args.state = state;
	result = select->cuda->driver->cuMemsetD32Async((CUdeviceptr)counts, 0, KVG_SELECT_DIGITS, stream);
	if (result != CUDA_SUCCESS)
		return result;
	return kvg_cuda_launch(select->cuda, select->kernel[KERNEL_HISTOGRAM], flat_blocks(select, in),
		KVG_SELECT_FLAT_THREADS, 0, stream, arguments);
}

CUresult kvg_cuda_select_cut(const struct kvg_cuda_select *select, uint32_t pass, uint32_t rank, const uint32_t *counts,
	struct kvg_cuda_select_state *state, CUstream stream)
{
	struct kvg_select_cut_args args = {.counts = counts, .state = state, .pass = pass, .rank = rank};
	void *arguments[] = {&args};

	if (!counts || !state || pass > 2)
		return CUDA_ERROR_INVALID_VALUE;
	return kvg_cuda_launch(
		select->cuda, select->kernel[KERNEL_CUT], 1, KVG_SELECT_FLAT_THREADS, 0, stream, arguments);
}
