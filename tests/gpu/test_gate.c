/*
 * The gate's kernels against the golden files and against float64 on random weights: every path, odd counts of rows,
 * sinks that differ, layers with strides, projections instead of hidden states, and input that is no number.
 */
#include "kernels/cuda/gate.h"
#include "proto/gate_file.h"
#include "tests/support/runner.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define D_WIDTH 16
#define LIMIT   4e-3       /* relative Frobenius error */
#define CLOSE   2e-5       /* where the products are exact in bf16 and only fp32 sums differ */
#define POISON  0xfff0dead /* a NaN that no kernel writes */
#define GUARD   5          /* poisoned entries behind a head's scores */

static struct kvg_cuda *cuda;
static struct kvg_cuda_gate_kernels *kernels;
static uint64_t seed = 0x9e3779b97f4a7c15u;

/* ---- random models ---- */

static double uniform(double deviation)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return ((double)(seed >> 11) / 4503599627370496.0 - 1.0) * 1.7320508075688772 * deviation;
}

static uint16_t to_bf16(double value)
{
	float single = (float)value;
	uint32_t bits;

	memcpy(&bits, &single, sizeof(bits));
	return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t value)
{
	uint32_t bits = (uint32_t)value << 16;
	float single;

	memcpy(&single, &bits, sizeof(single));
	return single;
}

static float *random_floats(size_t count, double mean, double deviation)
{
	float *at = malloc(count * sizeof(*at));

	assert_non_null(at);
	for (size_t i = 0; i < count; i++)
		at[i] = from_bf16(to_bf16(mean + uniform(deviation)));
	return at;
}

static struct kvg_gate_weights random_weights(
	uint32_t heads, uint32_t group, uint32_t hidden, uint32_t sinks, bool equal)
{
	size_t queries = (size_t)heads * group * D_WIDTH, keys = (size_t)heads * D_WIDTH;
	float *base = random_floats(keys * sinks, 0, 0.7);

	for (size_t i = 0; equal && i < keys * sinks; i++)
		base[i] = base[i / (sinks * D_WIDTH) * sinks * D_WIDTH + i % D_WIDTH];
	return (struct kvg_gate_weights){.heads = heads,
		.group = group,
		.hidden = hidden,
		.width = D_WIDTH,
		.sinks = sinks,
		.wq = random_floats(queries * hidden, 0, 1.0 / sqrt(hidden)),
		.bq = random_floats(queries, 0, 0.5),
		.wk = random_floats(keys * hidden, 0, 1.0 / sqrt(hidden)),
		.b = random_floats((size_t)heads * group, 0, 1.5),
		.q_norm = random_floats(D_WIDTH, 1, 0.3),
		.k_norm = random_floats(D_WIDTH, 1, 0.3),
		.k_base = base};
}

static void free_weights(struct kvg_gate_weights *w)
{
	free((void *)w->wq);
	free((void *)w->bq);
	free((void *)w->wk);
	free((void *)w->b);
	free((void *)w->q_norm);
	free((void *)w->k_norm);
	free((void *)w->k_base);
}

/* ---- float64 ---- */

static void project(const float *weights, const uint16_t *row, uint32_t lines, uint32_t hidden, double *out)
{
	for (uint32_t line = 0; line < lines; line++, weights += hidden) {
		double sums[4] = {0};

		for (uint32_t i = 0; i < hidden; i += 4)
			for (uint32_t j = 0; j < 4; j++)
				sums[j] += (double)weights[i + j] * (double)from_bf16(row[i + j]);
		out[line] = sums[0] + sums[1] + sums[2] + sums[3];
	}
}

static void normalise(const double *from, const float *bias, const float *weight, double *to)
{
	double squares = 0;

	for (int i = 0; i < D_WIDTH; i++) {
		to[i] = from[i] + (bias ? (double)bias[i] : 0);
		squares += to[i] * to[i];
	}
	for (int i = 0; i < D_WIDTH; i++)
		to[i] *= (double)weight[i] / sqrt(squares / D_WIDTH + 1e-6);
}

static double dot(const double *a, const double *b)
{
	double sum = 0;

	for (int i = 0; i < D_WIDTH; i++)
		sum += a[i] * b[i];
	return sum / 4; /* sqrt(d) */
}

/* The score of one head from its G queries and its key, before the bias and the norms. */
static double score_head(const struct kvg_gate_weights *w, uint32_t head, const double *queries, const double *key)
{
	double k[D_WIDTH], q[D_WIDTH], base[D_WIDTH], mean = 0;

	normalise(key, NULL, w->k_norm, k);
	for (uint32_t g = 0; g < w->group; g++) {
		size_t at = (size_t)head * w->group + g;
		double total = 1;

		normalise(queries + g * D_WIDTH, w->bq + at * D_WIDTH, w->q_norm, q);
		double z = dot(q, k) + (double)w->b[at];

		for (uint32_t s = 0; s < w->sinks; s++) {
			for (int i = 0; i < D_WIDTH; i++)
				base[i] = (double)w->k_base[((size_t)head * w->sinks + s) * D_WIDTH + (size_t)i];
			total += exp(dot(q, base) - z);
		}
		mean += 1 / total;
	}
	return mean / w->group;
}

/* The projections of one row: queries, then keys. */
static void project_row(const struct kvg_gate_weights *w, const uint16_t *row, double *out)
{
	uint32_t queries = w->heads * w->group * D_WIDTH;

	project(w->wq, row, queries, w->hidden, out);
	project(w->wk, row, w->heads * D_WIDTH, w->hidden, out + queries);
}

static void score_row(const struct kvg_gate_weights *w, const double *projections, double *scores)
{
	for (uint32_t head = 0; head < w->heads; head++)
		scores[head] = score_head(w, head, projections + (size_t)head * w->group * D_WIDTH,
			projections + ((size_t)w->heads * w->group + head) * D_WIDTH);
}

/* ---- the device ---- */

static void must(CUresult result)
{
	if (result != CUDA_SUCCESS)
		fail_msg("%s", kvg_cuda_error(cuda->driver, result));
}

static CUdeviceptr device_alloc(size_t bytes)
{
	CUdeviceptr at;

	must(cuda->driver->cuMemAlloc(&at, bytes ? bytes : 1));
	return at;
}

static CUdeviceptr upload(const void *from, size_t bytes)
{
	CUdeviceptr at = device_alloc(bytes);

	must(cuda->driver->cuMemcpyHtoD(at, from, bytes));
	return at;
}

/* Layers of one model with rows for each and the scores that are expected. */
struct problem {
	struct kvg_gate_weights *weights;
	uint32_t layers, rows, heads;
	uint64_t stride;         /* bytes between layers */
	uint8_t *hidden;         /* [layers][stride] */
	uint16_t *preact;        /* [layers][rows][H*(G+1)*d] */
	double *expected;        /* [layers][heads][rows] */
	double *expected_preact; /* from the rounded projections */
	CUdeviceptr hidden_at, preact_at, scores_at, scratch_at;
	size_t score_count;
	float *scores; /* [layers][heads][rows + GUARD] */
	struct kvg_cuda_gate *gate;
};

static uint64_t scratch_new(const struct kvg_cuda_gate *gate)
{
	CUdeviceptr at = device_alloc(kvg_cuda_gate_scratch(gate));

	must(cuda->driver->cuMemsetD8Async(at, 0, KVG_CUDA_GATE_COUNTERS, NULL));
	return at;
}

static void expect_row(struct problem *p, uint32_t layer, uint32_t row, double *projections, double *scores)
{
	const struct kvg_gate_weights *w = &p->weights[layer];
	size_t lines = (size_t)w->heads * (w->group + 1) * D_WIDTH;
	uint16_t *preact = p->preact + ((size_t)layer * p->rows + row) * lines;

	project_row(w, (const uint16_t *)(const void *)(p->hidden + layer * p->stride) + (size_t)row * w->hidden,
		projections);
	score_row(w, projections, scores);
	for (uint32_t head = 0; head < p->heads; head++)
		p->expected[((size_t)layer * p->heads + head) * p->rows + row] = scores[head];
	for (size_t i = 0; i < lines; i++) {
		preact[i] = to_bf16(projections[i]);
		projections[i] = (double)from_bf16(preact[i]);
	}
	score_row(w, projections, scores);
	for (uint32_t head = 0; head < p->heads; head++)
		p->expected_preact[((size_t)layer * p->heads + head) * p->rows + row] = scores[head];
}

static void problem_expect(struct problem *p)
{
	size_t lines = (size_t)p->heads * (p->weights->group + 1) * D_WIDTH;
	double *projections = calloc(lines + 1, sizeof(double)), *scores = calloc(p->heads + 1, sizeof(double));

	assert_true(projections && scores);
	for (uint32_t layer = 0; layer < p->layers; layer++)
		for (uint32_t row = 0; row < p->rows; row++)
			expect_row(p, layer, row, projections, scores);
	free(projections);
	free(scores);
}

static void problem_upload(struct problem *p)
{
	CUresult result = CUDA_SUCCESS;
	size_t lines = (size_t)p->heads * (p->weights->group + 1) * D_WIDTH;

	p->gate = kvg_cuda_gate_new(kernels, p->weights, p->layers, &result);
	must(result);
	p->hidden_at = upload(p->hidden, p->layers * p->stride);
	p->preact_at = upload(p->preact, p->layers * p->rows * lines * 2);
	p->score_count = (size_t)p->layers * p->heads * (p->rows + GUARD);
	p->scores = malloc((p->score_count + 1) * sizeof(float));
	p->scores_at = device_alloc(p->score_count * sizeof(float));
	p->scratch_at = scratch_new(p->gate);
}

static void problem_init(
	struct problem *p, struct kvg_gate_weights *weights, uint32_t layers, uint32_t rows, uint64_t stride)
{
	size_t lines = (size_t)weights->heads * (weights->group + 1) * D_WIDTH;
	size_t scores = (size_t)layers * weights->heads * rows;

	*p = (struct problem){
		.weights = weights, .layers = layers, .rows = rows, .heads = weights->heads, .stride = stride};
	p->hidden = malloc(layers * stride);
	p->preact = malloc(layers * rows * lines * 2);
	p->expected = malloc(scores * sizeof(double));
	p->expected_preact = malloc(scores * sizeof(double));
	assert_true(p->hidden && p->preact && p->expected && p->expected_preact);
	for (uint64_t i = 0; i < layers * stride / 2; i++)
		((uint16_t *)(void *)p->hidden)[i] = to_bf16(uniform(1));
}

static void problem_deinit(struct problem *p)
{
	const CUdeviceptr places[] = {p->hidden_at, p->preact_at, p->scores_at, p->scratch_at};

	for (size_t i = 0; i < sizeof(places) / sizeof(*places); i++)
		must(cuda->driver->cuMemFree(places[i]));
	(void)kvg_cuda_gate_free(p->gate);
	free(p->hidden);
	free(p->preact);
	free(p->expected);
	free(p->expected_preact);
	free(p->scores);
}

static struct kvg_cuda_gate_rows rows_of(const struct problem *p, enum kvg_cuda_gate_kind kind)
{
	return (struct kvg_cuda_gate_rows){.kind = kind,
		.data = kind == KVG_CUDA_GATE_HIDDEN ? p->hidden_at : p->preact_at,
		.layer_stride_bytes = kind == KVG_CUDA_GATE_HIDDEN ? p->stride : 0,
		.layer_count = p->layers,
		.rows = p->rows,
		.scores = p->scores_at,
		.score_stride = p->rows + GUARD,
		.scratch = p->scratch_at};
}

static CUresult run(struct problem *p, const struct kvg_cuda_gate_rows *rows)
{
	must(cuda->driver->cuMemsetD32Async(p->scores_at, POISON, p->score_count, NULL));
	CUresult result = kvg_cuda_gate_score(p->gate, rows, NULL);

	if (result == CUDA_SUCCESS)
		must(cuda->driver->cuMemcpyDtoH(p->scores, p->scores_at, p->score_count * sizeof(float)));
	return result;
}

static bool poisoned(float value)
{
	uint32_t bits;

	memcpy(&bits, &value, sizeof(bits));
	return bits == POISON;
}

/* Relative Frobenius error of what run() brought; NaN where anything is no number, and entries behind must be
 * untouched. */
static double error_of(const struct problem *p, const double *expected)
{
	double squares = 0, errors = 0;

	for (size_t line = 0; line < (size_t)p->layers * p->heads; line++) {
		const float *scores = p->scores + line * (p->rows + GUARD);

		for (uint32_t row = 0; row < p->rows; row++) {
			double error = (double)scores[row] - expected[line * p->rows + row];

			squares += expected[line * p->rows + row] * expected[line * p->rows + row];
			errors += error * error;
		}
		for (uint32_t row = p->rows; row < p->rows + GUARD; row++)
			assert_true(poisoned(scores[row]));
	}
	return sqrt(errors / squares);
}

static const struct {
	enum kvg_cuda_gate_path path;
	const char *name;
} paths[] = {{KVG_CUDA_GATE_AUTO, "auto"}, {KVG_CUDA_GATE_PORTABLE, "portable"}, {KVG_CUDA_GATE_WIDE, "wide"},
	{KVG_CUDA_GATE_DEEP, "deep"}, {KVG_CUDA_GATE_DEEP_SPLIT, "deep split"}};

#define PATHS (sizeof(paths) / sizeof(*paths))

/* Whether the device and the group have that path. */
static bool has_path(const struct problem *p, enum kvg_cuda_gate_path path)
{
	uint32_t group = p->weights->group;

	return path <= KVG_CUDA_GATE_PORTABLE ||
	       (cuda->capability == 90 && (group == 1 || group == 2 || group == 4 || group == 5 || group == 7));
}

/* Every path on one problem, twice with the same bits: the error of each, of which the worst is returned. */
static double run_paths(struct problem *p, const char *what)
{
	double worst = 0;
	float *before = malloc((p->score_count + 1) * sizeof(float));

	assert_non_null(before);
	for (size_t i = 0; i < PATHS; i++) {
		struct kvg_cuda_gate_rows rows = rows_of(p, KVG_CUDA_GATE_HIDDEN);

		rows.path = paths[i].path;
		if (!has_path(p, rows.path)) {
			assert_int_equal(run(p, &rows), CUDA_ERROR_NOT_SUPPORTED);
			continue;
		}
		must(run(p, &rows));
		double error = error_of(p, p->expected);

		print_message("  %s, %s: error %.2e\n", what, paths[i].name, error);
		worst = !(error <= worst) ? error : worst;
		memcpy(before, p->scores, p->score_count * sizeof(float));
		must(run(p, &rows));
		assert_memory_equal(before, p->scores, p->score_count * sizeof(float));
	}
	free(before);
	return worst;
}

static double run_preact(struct problem *p, const char *what)
{
	struct kvg_cuda_gate_rows rows = rows_of(p, KVG_CUDA_GATE_PREACT);

	must(run(p, &rows));
	double error = error_of(p, p->expected_preact);

	print_message("  %s, preact: error %.2e, against hidden %.2e\n", what, error, error_of(p, p->expected));
	return error;
}

/* ---- tests ---- */

static void *tensor_copy(const struct kvg_safetensors *file, const char *name, size_t bytes)
{
	const struct kvg_tensor *tensor = kvg_safetensors_find(file, name);

	assert_non_null(tensor);
	void *copy = malloc(bytes);

	assert_non_null(copy);
	memcpy(copy, tensor->data, bytes);
	return copy;
}

static void golden_file(const char *name)
{
	struct kvg_safetensors *file = NULL;
	struct kvg_gate_tensors t;
	struct problem p;
	char path[64], text[256];

	(void)snprintf(path, sizeof(path), "golden/%s.safetensors", name);
	assert_int_equal(kvg_safetensors_open(path, &file, text, sizeof(text)), 0);
	assert_int_equal(kvg_gate_tensors_read(file, "", &t, text, sizeof(text)), 0);
	struct kvg_gate_weights weights = {t.shape.heads, t.shape.group, t.shape.hidden, t.shape.width, t.shape.sinks,
		t.wq, t.bq, t.wk, t.b, t.q_norm, t.k_norm, t.k_base};
	uint32_t rows = (uint32_t)kvg_safetensors_find(file, "hidden")->shape[0];
	uint64_t stride = (uint64_t)rows * weights.hidden * 2;

	problem_init(&p, &weights, 1, rows, stride);
	free(p.hidden);
	p.hidden = tensor_copy(file, "hidden", stride);
	problem_expect(&p);
	double own_error = 0;
	double *given = tensor_copy(file, "score_f64", (size_t)rows * weights.heads * sizeof(double));

	for (size_t i = 0; i < (size_t)rows * weights.heads; i++)
		own_error = fmax(own_error, fabs(given[i] - p.expected[i]));
	assert_true(own_error < 1e-6);
	problem_upload(&p);
	assert_true(run_paths(&p, name) < LIMIT);
	assert_true(run_preact(&p, name) < LIMIT);
	problem_deinit(&p);
	free(given);
	kvg_gate_tensors_deinit(&t);
	(void)kvg_safetensors_free(file);
}

static void test_golden(void **state)
{
	(void)state;
	golden_file("gate_g1");
	golden_file("gate_g2");
	golden_file("gate_g4");
	golden_file("gate_g5");
	golden_file("gate_g7");
}

struct shape {
	uint32_t heads, group, hidden, sinks, rows, layers;
	bool equal;
};

static void random_problem(const struct shape *s)
{
	struct kvg_gate_weights *weights = malloc(s->layers * sizeof(*weights));
	struct problem p;
	char what[96];

	assert_non_null(weights);
	for (uint32_t i = 0; i < s->layers; i++)
		weights[i] = random_weights(s->heads, s->group, s->hidden, s->sinks, s->equal);
	(void)snprintf(what, sizeof(what), "H=%u G=%u D=%u S=%u%s, %u rows x %u", s->heads, s->group, s->hidden,
		s->sinks, s->equal ? "" : " unequal", s->rows, s->layers);
	problem_init(&p, weights, s->layers, s->rows, (uint64_t)s->rows * s->hidden * 2 + 48);
	problem_expect(&p);
	problem_upload(&p);
	assert_int_equal(kvg_cuda_gate_folded(p.gate, 0), s->equal || s->sinks == 1);
	assert_true(run_paths(&p, what) < CLOSE);
	assert_true(run_preact(&p, what) < CLOSE);
	problem_deinit(&p);
	for (uint32_t i = 0; i < s->layers; i++)
		free_weights(&weights[i]);
	free(weights);
}

static void test_shapes(void **state)
{
	static const struct shape shapes[] = {
		{8, 4, 256, 16, 1, 1, true},
		{8, 4, 264, 16, 7, 3, true},
		{3, 4, 520, 16, 127, 2, false},
		{8, 4, 512, 16, 129, 2, true},
		{8, 4, 200, 16, 1000, 1, true},
		{1, 1, 72, 1, 65, 2, true},
		{16, 1, 192, 16, 300, 2, false},
		{8, 2, 448, 16, 257, 2, true},
		{5, 2, 64, 3, 384, 1, false},
		{8, 5, 320, 16, 130, 3, true},
		{2, 5, 1024, 16, 40, 1, false},
		{4, 7, 448, 16, 200, 2, true},
		{9, 7, 128, 2, 33, 1, false},
		{2, 3, 136, 16, 70, 2, true},
		{4, 6, 8, 16, 50, 1, false},
		{4, 8, 256, 16, 100, 1, true},
		{2, 16, 256, 4, 100, 1, false},
		{8, 4, 256, 16, 20, 36, true},
		{8, 5, 192, 16, 130, 33, true},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++)
		random_problem(&shapes[i]);
}

static void test_models(void **state)
{
	static const struct shape shapes[] = {
		{4, 7, 3584, 16, 129, 1, true},
		{8, 4, 4096, 16, 128, 2, true},
		{8, 5, 5120, 16, 96, 1, true},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++)
		random_problem(&shapes[i]);
}

/* A range of layers, and what invalid requests are answered with. */
static void test_layers(void **state)
{
	struct kvg_gate_weights weights[5];
	struct problem p;

	(void)state;
	for (int i = 0; i < 5; i++)
		weights[i] = random_weights(4, 4, 128, 16, i % 2 == 0);
	problem_init(&p, weights, 5, 150, 150 * 256);
	problem_expect(&p);
	problem_upload(&p);
	assert_true(kvg_cuda_gate_folded(p.gate, 0) && !kvg_cuda_gate_folded(p.gate, 1));
	for (size_t i = 0; i < PATHS; i++) {
		struct kvg_cuda_gate_rows rows = rows_of(&p, KVG_CUDA_GATE_HIDDEN);
		struct problem part = p;

		rows.path = paths[i].path;
		if (!has_path(&p, rows.path))
			continue;
		rows.layer_begin = 2;
		rows.layer_count = part.layers = 2;
		rows.data += 2 * p.stride;
		must(run(&p, &rows));
		assert_true(error_of(&part, p.expected + (size_t)2 * p.heads * p.rows) < CLOSE);
		rows.layer_begin = 4;
		assert_int_equal(run(&p, &rows), CUDA_ERROR_INVALID_VALUE);
		rows.layer_begin = 2;
		rows.data += 2;
		assert_int_equal(run(&p, &rows), CUDA_ERROR_INVALID_VALUE);
		rows.data -= 2;
		rows.score_stride = p.rows - 1;
		assert_int_equal(run(&p, &rows), CUDA_ERROR_INVALID_VALUE);
		rows.score_stride = p.rows;
		rows.rows = 0;
		must(run(&p, &rows));
		assert_true(poisoned(p.scores[0]));
	}
	problem_deinit(&p);
	for (int i = 0; i < 5; i++)
		free_weights(&weights[i]);
}

/* A captured call does the same each time that its graph runs. */
static void test_graph(void **state)
{
	const struct kvg_cuda_driver *driver = cuda->driver;
	struct kvg_gate_weights weights = random_weights(8, 4, 1024, 16, true);
	struct problem p;
	CUstream stream;
	CUgraph graph;
	CUgraphExec exec;

	(void)state;
	problem_init(&p, &weights, 1, 100, 100 * 2048);
	problem_expect(&p);
	problem_upload(&p);
	struct kvg_cuda_gate_rows rows = rows_of(&p, KVG_CUDA_GATE_HIDDEN);

	must(driver->cuStreamSynchronize(NULL)); /* the counters are cleared */
	must(driver->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
	must(driver->cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
	must(kvg_cuda_gate_score(p.gate, &rows, stream));
	must(driver->cuStreamEndCapture(stream, &graph));
	must(driver->cuGraphInstantiate(&exec, graph, 0));
	for (int turn = 0; turn < 3; turn++) {
		must(driver->cuMemsetD32Async(p.scores_at, POISON, p.score_count, stream));
		must(driver->cuGraphLaunch(exec, stream));
		must(driver->cuStreamSynchronize(stream));
		must(driver->cuMemcpyDtoH(p.scores, p.scores_at, p.score_count * sizeof(float)));
		assert_true(error_of(&p, p.expected) < CLOSE);
	}
	must(driver->cuGraphExecDestroy(exec));
	must(driver->cuGraphDestroy(graph));
	must(driver->cuStreamDestroy(stream));
	problem_deinit(&p);
	free_weights(&weights);
}

/* A NaN or an infinity in a row scores 0 there and nowhere else; huge values give numbers. */
static void test_bad_input(void **state)
{
	struct kvg_gate_weights weights = random_weights(4, 4, 128, 16, true);
	struct problem p;

	(void)state;
	problem_init(&p, &weights, 1, 40, 40 * 256);
	uint16_t *hidden = (uint16_t *)(void *)p.hidden;

	for (int i = 0; i < 128; i++)
		hidden[7 * 128 + i] = to_bf16(uniform(1e15));
	((float *)weights.b)[0] = 1e30f;
	((float *)weights.b)[1] = -1e30f;
	problem_expect(&p);
	hidden[3 * 128 + 5] = 0x7fc0;
	hidden[5 * 128 + 127] = 0x7f80;
	for (uint32_t head = 0; head < 4; head++)
		p.expected[head * 40 + 3] = p.expected[head * 40 + 5] = 0;
	problem_upload(&p);
	assert_true(run_paths(&p, "bad input") < CLOSE);
	problem_deinit(&p);
	free_weights(&weights);
}

static void test_refused(void **state)
{
	struct kvg_gate_weights weights = random_weights(2, 4, 64, 16, true), wrong = weights;
	struct kvg_gate_weights two[2] = {weights, weights};
	CUresult result = CUDA_SUCCESS;

	(void)state;
	wrong.width = 32;
	assert_null(kvg_cuda_gate_new(kernels, &wrong, 1, &result));
	assert_int_equal(result, CUDA_ERROR_NOT_SUPPORTED);
	wrong = weights;
	wrong.group = 9;
	assert_null(kvg_cuda_gate_new(kernels, &wrong, 1, &result));
	assert_int_equal(result, CUDA_ERROR_NOT_SUPPORTED);
	wrong = weights;
	wrong.hidden = 60;
	assert_null(kvg_cuda_gate_new(kernels, &wrong, 1, &result));
	assert_int_equal(result, CUDA_ERROR_NOT_SUPPORTED);
	wrong = weights;
	wrong.bq = NULL;
	assert_null(kvg_cuda_gate_new(kernels, &wrong, 1, &result));
	assert_int_equal(result, CUDA_ERROR_INVALID_VALUE);
	two[1].hidden = 128;
	assert_null(kvg_cuda_gate_new(kernels, two, 2, &result));
	assert_int_equal(result, CUDA_ERROR_INVALID_VALUE);
	assert_null(kvg_cuda_gate_new(kernels, two, 0, &result));
	assert_int_equal(result, CUDA_ERROR_INVALID_VALUE);
	assert_null(kvg_cuda_gate_free(NULL));
	free_weights(&weights);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_golden),
		cmocka_unit_test(test_shapes),
		cmocka_unit_test(test_models),
		cmocka_unit_test(test_layers),
		cmocka_unit_test(test_graph),
		cmocka_unit_test(test_bad_input),
		cmocka_unit_test(test_refused),
	};
	char text[256];
	CUresult result = CUDA_SUCCESS;

	if (kvg_cuda_open(0, &cuda, text, sizeof(text)) < 0) {
		(void)fprintf(stderr, "skipped: %s\n", text);
		return 77;
	}
	kernels = kvg_cuda_gate_kernels_new(cuda, &result);
	if (!kernels) {
		(void)fprintf(stderr, "the gate's kernels: %s\n", kvg_cuda_error(cuda->driver, result));
		return 1;
	}
	int failed = runner_run("gate", tests, sizeof(tests) / sizeof(*tests));

	(void)kvg_cuda_gate_kernels_free(kernels);
	(void)kvg_cuda_close(cuda);
	return failed;
}
