/* Rows for selection: thresholds and masks of one chunk of 16000 tokens in 36 layers of 8 heads. */
#include "tools/bench/gpu.h"

#include "kernels/cuda/select.h"

#include <math.h>
#include <stdlib.h>

#define LAYERS 36u
#define HEADS  8u
#define TOKENS 16000u
#define ROWS   (LAYERS * HEADS)
#define COUNT  (ROWS * TOKENS)
#define SETS   6u /* of scores: together larger than the L2 cache */
#define RATIO  0.3

enum how { THRESHOLD, PAIR, HEAD };

struct work {
	struct kvg_cuda_select *select;
	enum how how;
	unsigned calls; /* in one repetition, each on other scores */
	CUdeviceptr scores[SETS], keep[SETS], offset, threshold, scratch;
};

/* Scores as gates give them: most near 0, few near 1. */
static void fill_scores(float *scores)
{
	uint64_t state = 88172645463325252u;

	for (size_t i = 0; i < COUNT; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		scores[i] = powf((float)(state >> 40) * 0x1p-24f, 8.0f);
	}
}

static bool work_upload(struct gpu_bench *bench, struct work *w)
{
	const struct kvg_cuda_driver *driver = bench->cuda->driver;
	float *scores = malloc(COUNT * sizeof(*scores));
	uint32_t offset[ROWS + 1];
	CUresult result = scores ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;

	for (uint32_t row = 0; row <= ROWS; row++)
		offset[row] = row * TOKENS;
	if (scores)
		fill_scores(scores);
	for (size_t i = 0; i < SETS && result == CUDA_SUCCESS; i++)
		result = driver->cuMemcpyHtoD(w->scores[i], scores, COUNT * sizeof(*scores));
	if (result == CUDA_SUCCESS)
		result = driver->cuMemcpyHtoD(w->offset, offset, sizeof(offset));
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_select_scratch_clear(w->select, (void *)w->scratch, LAYERS, bench->stream);
	free(scores);
	return !gpu_check(bench, result, "select: upload");
}

static void work_deinit(struct gpu_bench *bench, struct work *w)
{
	for (size_t i = 0; i < SETS; i++) {
		gpu_free(bench, w->scores[i]);
		gpu_free(bench, w->keep[i]);
	}
	gpu_free(bench, w->offset);
	gpu_free(bench, w->threshold);
	gpu_free(bench, w->scratch);
	(void)kvg_cuda_select_free(w->select);
}

static bool work_init(struct gpu_bench *bench, struct work *w)
{
	if (gpu_check(bench, kvg_cuda_select_new(bench->cuda, &w->select), "select: load"))
		return false;
	for (size_t i = 0; i < SETS; i++) {
		w->scores[i] = gpu_alloc(bench, COUNT * sizeof(float));
		w->keep[i] = gpu_alloc(bench, COUNT);
	}
	w->offset = gpu_alloc(bench, (ROWS + 1) * sizeof(uint32_t));
	w->threshold = gpu_alloc(bench, sizeof(float));
	w->scratch = gpu_alloc(bench, kvg_cuda_select_scratch(w->select, LAYERS));
	return !bench->failed && work_upload(bench, w);
}

static CUresult run_one(const struct work *w, CUstream stream, unsigned turn)
{
	const struct kvg_cuda_select_input in = {.scores = (const float *)w->scores[turn % SETS],
		.offset = (const uint32_t *)w->offset,
		.layers = LAYERS,
		.heads = HEADS,
		.count = COUNT,
		.longest = TOKENS};
	uint8_t *keep = w->how == THRESHOLD ? NULL : (uint8_t *)w->keep[turn % SETS];

	return kvg_cuda_select_ratio(w->select, &in, w->how == HEAD ? KVG_SELECT_PAIR_HEAD : KVG_SELECT_PAIR, RATIO,
		keep, w->how == HEAD ? NULL : (float *)w->threshold, (void *)w->scratch, stream);
}

static CUresult run(void *user, CUstream stream, unsigned turn)
{
	const struct work *w = user;
	CUresult result = CUDA_SUCCESS;

	for (unsigned call = 0; call < w->calls && result == CUDA_SUCCESS; call++)
		result = run_one(w, stream, turn * w->calls + call);
	return result;
}

/* In a graph each replay runs all sets of scores, or they would come from the cache. */
static double measure(struct gpu_bench *bench, struct work *w, enum how how, bool graph)
{
	w->how = how;
	w->calls = graph ? SETS : 1;
	return gpu_time(bench, run, w, graph) / w->calls;
}

static void measure_rows(struct gpu_bench *bench, struct work *w)
{
	const double read = COUNT * sizeof(float) * 1e6 / bench->copy_rate, written = COUNT * 1e6 / bench->copy_rate;

	gpu_row(bench, &(struct gpu_row){.id = "select-threshold-4.6M",
			       .work = "threshold over 36 x 8 x 16000 scores, graph",
			       .us = measure(bench, w, THRESHOLD, true),
			       .floor_us = read,
			       .floor = "scores read once",
			       .first_us = 25,
			       .then_us = 12});
	gpu_row(bench, &(struct gpu_row){.id = "select-threshold-4.6M-launch",
			       .work = "the same, one launch between two events",
			       .us = measure(bench, w, THRESHOLD, false),
			       .floor_us = read,
			       .floor = "scores read once",
			       .first_us = 25});
	gpu_row(bench, &(struct gpu_row){.id = "select-mask-4.6M",
			       .work = "threshold and mask over 36 x 8 x 16000 scores, graph",
			       .us = measure(bench, w, PAIR, true),
			       .floor_us = read + written,
			       .floor = "scores read and mask written once",
			       .first_us = 30});
	gpu_row(bench, &(struct gpu_row){.id = "select-head-288x16000",
			       .work = "best 30% of each of 288 rows of 16000, graph",
			       .us = measure(bench, w, HEAD, true),
			       .floor_us = read + written,
			       .floor = "scores read and mask written once",
			       .first_us = 60});
}

void gpu_bench_select(struct gpu_bench *bench)
{
	struct work w = {0};

	if (work_init(bench, &w))
		measure_rows(bench, &w);
	work_deinit(bench, &w);
}
