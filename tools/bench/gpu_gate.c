#include "tools/bench/gpu.h"
#include "tools/bench/gpu_cublas.h"

#include "kernels/cuda/gate.h"

#include <stdlib.h>

/* Qwen3-8B: 8 KV heads, groups of 4, hidden size 4096, 36 layers. */
#define HEADS  8u
#define GROUP  4u
#define HIDDEN 4096u
#define WIDTH  16u
#define SINKS  16u
#define LAYERS 36u
#define LINES  (HEADS * (GROUP + 1) * WIDTH)

#define PROMPT 16000u /* rows of a chunk in prefill */
#define EVENT  128u   /* rows of an event in decoding */
#define COPIES 8u     /* of inputs that would fit into the cache */

struct setup {
	struct gpu_bench *bench;
	struct kvg_cuda_gate_kernels *kernels;
	struct kvg_cuda_gate *gate;
	CUdeviceptr scores, scratch;
};

/* One kind of rows; `copies` inputs of `step` bytes take turns. */
struct work {
	const struct kvg_cuda_gate *gate;
	struct kvg_cuda_gate_rows rows;
	CUdeviceptr data;
	uint64_t step;
	unsigned copies;
	struct gpu_cublas *product; /* runs first, or NULL */
};

static CUresult enqueue(void *user, CUstream stream, unsigned turn)
{
	const struct work *work = user;
	struct kvg_cuda_gate_rows rows = work->rows;
	CUresult result = CUDA_SUCCESS;

	rows.data = work->data + turn % work->copies * work->step;
	if (work->product)
		result = gpu_cublas_enqueue(work->product, stream, turn);
	return result == CUDA_SUCCESS ? kvg_cuda_gate_score(work->gate, &rows, stream) : result;
}

/* ---- weights ---- */

static float *random_floats(size_t count, float mean, float deviation)
{
	float *at = malloc(count * sizeof(*at));
	uint64_t state = count;

	for (size_t i = 0; at && i < count; i++) {
		state = state * 6364136223846793005u + 1442695040888963407u;
		at[i] = mean + ((float)(state >> 40) / 8388608.0f - 1.0f) * 1.732f * deviation;
	}
	return at;
}

/* All layers get the same numbers, each at a place of its own on the device. */
static struct kvg_cuda_gate *make_gate(const struct kvg_cuda_gate_kernels *kernels, CUresult *ret)
{
	float *wq = random_floats((size_t)HEADS * GROUP * WIDTH * HIDDEN, 0, 1 / 64.0f);
	float *wk = random_floats((size_t)HEADS * WIDTH * HIDDEN, 0, 1 / 64.0f);
	float *bq = random_floats((size_t)HEADS * GROUP * WIDTH, 0, 0.3f),
	      *b = random_floats((size_t)HEADS * GROUP, 0, 1);
	float *norm = random_floats(WIDTH, 1, 0.3f), *base = calloc((size_t)HEADS * SINKS * WIDTH, sizeof(*base));
	struct kvg_gate_weights layers[LAYERS];
	struct kvg_cuda_gate *gate = NULL;

	for (unsigned i = 0; i < LAYERS; i++)
		layers[i] =
			(struct kvg_gate_weights){HEADS, GROUP, HIDDEN, WIDTH, SINKS, wq, bq, wk, b, norm, norm, base};
	*ret = CUDA_ERROR_OUT_OF_MEMORY;
	if (wq && wk && bq && b && norm && base)
		gate = kvg_cuda_gate_new(kernels, layers, LAYERS, ret);
	free(wq);
	free(wk);
	free(bq);
	free(b);
	free(norm);
	free(base);
	return gate;
}

static bool setup(struct setup *s, struct gpu_bench *bench)
{
	CUresult result = CUDA_SUCCESS;

	*s = (struct setup){.bench = bench};
	s->kernels = kvg_cuda_gate_kernels_new(bench->cuda, &result);
	if (gpu_check(bench, result, "the gate's kernels"))
		return false;
	s->gate = make_gate(s->kernels, &result);
	if (gpu_check(bench, result, "the gate's weights"))
		return false;
	s->scores = gpu_alloc(bench, (size_t)LAYERS * HEADS * PROMPT * sizeof(float));
	s->scratch = gpu_alloc(bench, kvg_cuda_gate_scratch(s->gate));
	if (!s->scores || !s->scratch)
		return false;
	return !gpu_check(bench,
		bench->cuda->driver->cuMemsetD8Async(s->scratch, 0, KVG_CUDA_GATE_COUNTERS, bench->stream),
		"clearing the counters");
}

static void teardown(struct setup *s)
{
	gpu_free(s->bench, s->scores);
	gpu_free(s->bench, s->scratch);
	(void)kvg_cuda_gate_free(s->gate);
	(void)kvg_cuda_gate_kernels_free(s->kernels);
}

static struct work work_of(const struct setup *s, enum kvg_cuda_gate_kind kind, uint32_t rows, uint32_t layers)
{
	return (struct work){.gate = s->gate,
		.rows = {.kind = kind,
			.layer_count = layers,
			.rows = rows,
			.scores = s->scores,
			.score_stride = rows,
			.scratch = s->scratch},
		.copies = 1};
}

/* ---- rows ---- */

static double product_floor(const struct gpu_bench *bench, uint64_t rows, uint64_t layers)
{
	double operations = 2.0 * (double)rows * LINES * HIDDEN * (double)layers;
	double bytes = 2.0 * (double)(rows + LINES) * HIDDEN * (double)layers;
	double by_operations = operations / bench->matrix_rate, by_bytes = bytes / bench->copy_rate;

	return (by_operations > by_bytes ? by_operations : by_bytes) * 1e6;
}

static void row_prompt(const struct setup *s)
{
	struct work work = work_of(s, KVG_CUDA_GATE_HIDDEN, PROMPT, 1);

	work.data = gpu_random(s->bench, (size_t)PROMPT * HIDDEN * 2, 1);
	if (!work.data)
		return;
	const struct gpu_row row = {.id = "gate-hidden-16000",
		.work = "gate scores of one layer from 16000 hidden states of 4096 values",
		.us = gpu_time(s->bench, enqueue, &work, false),
		.floor_us = product_floor(s->bench, PROMPT, 1),
		.floor = "operations of the matrix product",
		.rival_us = gpu_cublas_us(s->bench, PROMPT, LINES, HIDDEN),
		.rival = "cuBLASLt, the bare product",
		.first_ratio = 1.25,
		.then_ratio = 1.08};

	gpu_row(s->bench, &row);
	gpu_free(s->bench, work.data);
}

static void row_event(const struct setup *s)
{
	struct work work = work_of(s, KVG_CUDA_GATE_HIDDEN, EVENT, LAYERS);

	work.data = gpu_random(s->bench, (size_t)LAYERS * EVENT * HIDDEN * 2, 1);
	if (!work.data)
		return;
	const struct gpu_row row = {.id = "gate-hidden-128x36",
		.work = "gate scores of 36 layers from 128 hidden states each",
		.us = gpu_time(s->bench, enqueue, &work, false),
		.floor_us = product_floor(s->bench, EVENT, LAYERS),
		.floor = "weights and hidden states read once",
		.first_us = 90,
		.then_us = 68};

	gpu_row(s->bench, &row);
	gpu_free(s->bench, work.data);
}

static void row_preact(const struct setup *s)
{
	struct work work = work_of(s, KVG_CUDA_GATE_PREACT, PROMPT, 1);

	work.step = (uint64_t)PROMPT * LINES * 2;
	work.copies = COPIES;
	work.data = gpu_random(s->bench, COPIES * work.step, 1);
	if (!work.data)
		return;
	const struct gpu_row row = {.id = "gate-preact-16000",
		.work = "gate scores of one layer from 16000 rows of projections",
		.us = gpu_time(s->bench, enqueue, &work, false),
		.floor_us = (double)work.step / s->bench->copy_rate * 1e6,
		.floor = "projections read once",
		.first_us = 15,
		.then_us = 15};

	gpu_row(s->bench, &row);
	gpu_free(s->bench, work.data);
}

/* What an engine's library and our last step would do together. */
static void row_library(const struct setup *s)
{
	struct work work = work_of(s, KVG_CUDA_GATE_PREACT, PROMPT, 1);
	CUdeviceptr rows = gpu_random(s->bench, (size_t)PROMPT * HIDDEN * 2, 1);
	CUdeviceptr weights = gpu_random(s->bench, (size_t)LINES * HIDDEN * 2, 1 / 64.0f);

	work.data = gpu_alloc(s->bench, (size_t)PROMPT * LINES * 2);
	if (rows && weights && work.data)
		work.product = gpu_cublas_new(s->bench, PROMPT, LINES, HIDDEN, rows, weights, work.data);
	if (work.product) {
		const struct gpu_row row = {.id = "gate-cublas-preact-16000",
			.work = "the same as gate-hidden-16000 by cuBLASLt and our scores from projections",
			.us = gpu_time(s->bench, enqueue, &work, false),
			.floor_us = product_floor(s->bench, PROMPT, 1),
			.floor = "operations of the matrix product"};

		gpu_row(s->bench, &row);
	}
	(void)gpu_cublas_free(work.product);
	gpu_free(s->bench, rows);
	gpu_free(s->bench, weights);
	gpu_free(s->bench, work.data);
}

void gpu_bench_gate(struct gpu_bench *bench)
{
	struct setup s;

	if (!gpu_wants(bench, "gate-hidden-16000") && !gpu_wants(bench, "gate-hidden-128x36") &&
		!gpu_wants(bench, "gate-preact-16000") && !gpu_wants(bench, "gate-cublas-preact-16000"))
		return;
	if (setup(&s, bench)) {
		if (gpu_wants(bench, "gate-hidden-16000"))
			row_prompt(&s);
		if (gpu_wants(bench, "gate-hidden-128x36"))
			row_event(&s);
		if (gpu_wants(bench, "gate-preact-16000"))
			row_preact(&s);
		if (gpu_wants(bench, "gate-cublas-preact-16000"))
			row_library(&s);
	}
	teardown(&s);
}
