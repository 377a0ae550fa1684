/*
 * kernels/cuda/select.h against kernels/host/select.h and the golden masks: every mask bit for bit.
 */
#include "tests/support/runner.h"

#include "kernels/cuda/select.h"
#include "proto/safetensors.h"
#include "tests/unit/kernels/random.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define POISON 0xee
#define LAYERS 256 /* of the shared scratch */
#define MOST   9u  /* rows of a random fixture in each dimension */
#define GUARD  64  /* bytes before and behind keep that must stay poisoned */

static struct {
	struct kvg_cuda *cuda;
	const struct kvg_cuda_driver *driver;
	struct kvg_cuda_select *select;
	CUstream stream;
	CUdeviceptr scratch;
} gpu;

/* Rows of scores here and on the device, the result, and what it should be. */
struct fixture {
	struct kvg_select_input host;
	struct kvg_cuda_select_input device;
	size_t rows, count; /* count: from index 0 to the end of the last row */
	size_t *offset;
	float *scores;
	uint8_t *keep, *expected;
	void *scratch;
	CUdeviceptr scores_at, offset_at, keep_at, threshold_at;
};

static void check(CUresult result)
{
	if (result != CUDA_SUCCESS)
		fail_msg("%s", kvg_cuda_error(gpu.driver, result));
}

static CUdeviceptr device_new(size_t size)
{
	CUdeviceptr at = 0;

	check(gpu.driver->cuMemAlloc(&at, size ? size : 1));
	return at;
}

static uint8_t *keep_of(const struct fixture *f)
{
	return (uint8_t *)(f->keep_at + GUARD);
}

static float *threshold_of(const struct fixture *f)
{
	return (float *)f->threshold_at;
}

/* Row lengths; the first row starts at index `first`. */
static void fixture_init(struct fixture *f, uint32_t layers, uint32_t heads, const uint32_t *lengths, uint32_t first)
{
	f->rows = (size_t)layers * heads;
	f->offset = malloc((f->rows + 1) * sizeof(*f->offset));
	uint32_t *offset = malloc((f->rows + 1) * sizeof(*offset)), longest = 0;

	f->offset[0] = offset[0] = first;
	for (size_t row = 0; row < f->rows; row++) {
		f->offset[row + 1] = f->offset[row] + lengths[row];
		offset[row + 1] = offset[row] + lengths[row];
		longest = lengths[row] > longest ? lengths[row] : longest;
	}
	f->count = f->offset[f->rows];
	f->scores = calloc(f->count + 1, sizeof(float));
	f->keep = malloc(f->count + 1);
	f->expected = malloc(f->count + 1);
	f->scratch = aligned_new(kvg_select_scratch(f->count, f->rows));
	f->host = (struct kvg_select_input){f->scores, f->offset, layers, heads};
	f->scores_at = device_new(f->count * sizeof(float));
	f->offset_at = device_new((f->rows + 1) * sizeof(*offset));
	f->keep_at = device_new(f->count + 2 * (size_t)GUARD);
	f->threshold_at = device_new((layers + 1) * sizeof(float));
	f->device = (struct kvg_cuda_select_input){(const float *)f->scores_at, (const uint32_t *)f->offset_at, layers,
		heads, (uint32_t)f->count - first, longest};
	check(gpu.driver->cuMemcpyHtoD(f->offset_at, offset, (f->rows + 1) * sizeof(*offset)));
	free(offset);
}

static void fixture_deinit(struct fixture *f)
{
	const CUdeviceptr memory[] = {f->scores_at, f->offset_at, f->keep_at, f->threshold_at};

	for (size_t i = 0; i < 4; i++)
		check(gpu.driver->cuMemFree(memory[i]));
	free(f->offset);
	free(f->scores);
	free(f->keep);
	free(f->expected);
	free(f->scratch);
}

static void upload_scores(const struct fixture *f)
{
	if (f->count)
		check(gpu.driver->cuMemcpyHtoD(f->scores_at, f->scores, f->count * sizeof(float)));
}

/* Both masks start poisoned, so that what nobody writes is compared as well. */
static void poison(struct fixture *f)
{
	memset(f->expected, POISON, f->count + 1);
	check(gpu.driver->cuMemsetD8Async(f->keep_at, POISON, f->count + 2 * (size_t)GUARD, gpu.stream));
	check(gpu.driver->cuMemsetD8Async(f->threshold_at, POISON, (f->host.layers + 1) * sizeof(float), gpu.stream));
}

static void assert_expected(struct fixture *f, const char *what, double parameter)
{
	uint8_t guard[2 * GUARD];

	check(gpu.driver->cuStreamSynchronize(gpu.stream));
	if (f->count)
		check(gpu.driver->cuMemcpyDtoH(f->keep, f->keep_at + GUARD, f->count));
	check(gpu.driver->cuMemcpyDtoH(guard, f->keep_at, GUARD));
	check(gpu.driver->cuMemcpyDtoH(guard + GUARD, f->keep_at + GUARD + f->count, GUARD));
	for (size_t i = 0; i < sizeof(guard); i++)
		assert_int_equal(guard[i], POISON);
	for (size_t i = 0; i < f->count; i++)
		if (f->keep[i] != f->expected[i])
			fail_msg("%s %g, %u x %u rows from %zu to %zu: score %zu (%a): expected %u, got %u", what,
				parameter, f->host.layers, f->host.heads, f->offset[0], f->count, i,
				(double)f->scores[i], f->expected[i], f->keep[i]);
}

/* ---- calls on both sides ---- */

static void compare_ratio(struct fixture *f, uint32_t level, double ratio)
{
	static const char *const names[] = {"pair", "pair-head", "pair-layer", "adakv-layer"};

	poison(f);
	kvg_select_ratio(&f->host, level, ratio, f->expected, f->scratch);
	check(kvg_cuda_select_ratio(
		gpu.select, &f->device, level, ratio, keep_of(f), threshold_of(f), (void *)gpu.scratch, gpu.stream));
	assert_expected(f, names[level], ratio);
}

static void compare_budget(struct fixture *f, uint64_t budget)
{
	poison(f);
	kvg_select_budget(&f->host, budget, f->expected, f->scratch);
	check(kvg_cuda_select_budget(
		gpu.select, &f->device, budget, keep_of(f), NULL, (void *)gpu.scratch, gpu.stream));
	assert_expected(f, "budget", (double)budget);
}

static void compare_threshold(struct fixture *f, float threshold)
{
	poison(f);
	kvg_select_threshold(&f->host, threshold, f->expected);
	check(kvg_cuda_select_threshold(gpu.select, &f->device, threshold, keep_of(f), gpu.stream));
	assert_expected(f, "threshold", (double)threshold);
}

/* Starts from a random mask. */
static void compare_floor(struct fixture *f, uint32_t floor, uint32_t one_of, struct random *random)
{
	poison(f);
	for (size_t i = f->offset[0]; i < f->count; i++)
		f->expected[i] = random_below(random, one_of) == 0;
	if (f->count)
		check(gpu.driver->cuMemcpyHtoD(f->keep_at + GUARD, f->expected, f->count));
	kvg_select_floor(&f->host, floor, f->expected, f->scratch);
	check(kvg_cuda_select_floor(gpu.select, &f->device, floor, keep_of(f), gpu.stream));
	assert_expected(f, "floor", floor);
}

/* ---- inputs ---- */

enum kind { UNIFORM, PEAKED, TIES, EQUAL, WILD, LOGARITHM, PROTECTED, KINDS };

static float score_of_kind(struct random *random, enum kind kind)
{
	static const float wild[] = {0.0f, -0.0f, FLT_TRUE_MIN, -FLT_TRUE_MIN, FLT_MIN, FLT_MAX, -FLT_MAX, INFINITY,
		-INFINITY, 1.0f, 0.99999994f, 1e-40f};
	float uniform = random_float(random) * 0.5f + 0.5f;

	switch (kind) {
	case UNIFORM:
		return uniform;
	case PEAKED:
		return powf(uniform, 12.0f);
	case TIES:
		return (float)random_below(random, 16) / 16.0f;
	case EQUAL:
		return 0.25f;
	case LOGARITHM:
		return logf(uniform + 1e-6f);
	case PROTECTED:
		return random_below(random, 5) ? uniform : INFINITY;
	default:
		return random_below(random, 2) ? wild[random_below(random, 12)] : random_float(random) * 1e-38f;
	}
}

static void fill(struct fixture *f, struct random *random, enum kind kind)
{
	for (size_t i = 0; i < f->count; i++)
		f->scores[i] = score_of_kind(random, kind);
	upload_scores(f);
}

static void fixture_random(struct fixture *f, struct random *random)
{
	uint32_t layers = 1 + random_below(random, MOST), heads = 1 + random_below(random, MOST);
	uint32_t most = random_below(random, 3) ? 90 : 5000, length = random_below(random, most);
	uint32_t lengths[MOST * MOST], ragged = random_below(random, 2);

	for (size_t row = 0; row < MOST * MOST; row++)
		lengths[row] = ragged ? random_below(random, most) * random_below(random, 2) : length;
	fixture_init(f, layers, heads, lengths, random_below(random, 3) ? 0 : random_below(random, 30));
	fill(f, random, (enum kind)random_below(random, KINDS));
}

static void fixture_uniform(struct fixture *f, uint32_t layers, uint32_t heads, uint32_t length)
{
	uint32_t *lengths = malloc((size_t)layers * heads * sizeof(*lengths));

	for (size_t row = 0; row < (size_t)layers * heads; row++)
		lengths[row] = length;
	fixture_init(f, layers, heads, lengths, 0);
	free(lengths);
}

/* ---- tests ---- */

static void test_random_rows(void **state)
{
	static const double ratios[] = {0.0, 0.001, 0.1, 0.3, 1.0 / 3, 0.5, 0.9, 0.999999, 1.0};
	struct random random = {53};

	(void)state;
	for (size_t round = 0; round < 120; round++) {
		struct fixture f;
		double ratio = ratios[random_below(&random, 9)];

		fixture_random(&f, &random);
		for (uint32_t level = KVG_SELECT_PAIR; level <= KVG_SELECT_ADAKV_LAYER; level++)
			compare_ratio(&f, level, ratio);
		compare_budget(&f, random_below(&random, 4) ? random_below(&random, (uint32_t)f.count + 2) : 0);
		compare_threshold(&f, f.count ? f.scores[random_below(&random, (uint32_t)f.count)] : 0.5f);
		compare_floor(&f, random_below(&random, 9), 1 + random_below(&random, 16), &random);
		fixture_deinit(&f);
	}
}

/* Large enough for sampling and for all blocks; ratios at both ends. */
static void test_large(void **state)
{
	static const double ratios[] = {0.0, 1e-6, 0.1, 0.3, 0.7, 0.999999};
	struct random random = {59};
	struct fixture f;

	(void)state;
	fixture_uniform(&f, 5, 3, 20011);
	for (uint32_t kind = 0; kind < KINDS; kind++) {
		fill(&f, &random, (enum kind)kind);
		for (size_t i = 0; i < sizeof(ratios) / sizeof(*ratios); i++)
			for (uint32_t level = KVG_SELECT_PAIR; level <= KVG_SELECT_ADAKV_LAYER; level++)
				compare_ratio(&f, level, ratios[i]);
		compare_budget(&f, 100000);
		compare_floor(&f, 8, 4096, &random);
		compare_floor(&f, 9000, 3, &random);
	}
	fixture_deinit(&f);
}

/* The whole model's scores of one chunk. */
static void test_whole(void **state)
{
	struct random random = {61};
	struct fixture f;

	(void)state;
	fixture_uniform(&f, 36, 8, 16000);
	for (uint32_t kind = 0; kind < KINDS; kind += kind == TIES ? 2 : 1) {
		fill(&f, &random, (enum kind)kind);
		compare_ratio(&f, KVG_SELECT_PAIR, 0.3);
		compare_ratio(&f, kind % 3 + 1, 0.2);
	}
	fixture_deinit(&f);
}

/* A row that does not fit into shared memory, beside short ones, and more scores than all blocks can hold. */
static void test_long_rows(void **state)
{
	static const uint32_t lengths[] = {2500000, 1, 0, 70001, 6000000, 3};
	struct random random = {67};
	struct fixture f;

	(void)state;
	fixture_init(&f, 3, 2, lengths, 5);
	for (uint32_t kind = PEAKED; kind <= TIES; kind++) {
		fill(&f, &random, (enum kind)kind);
		for (uint32_t level = KVG_SELECT_PAIR; level <= KVG_SELECT_ADAKV_LAYER; level++)
			compare_ratio(&f, level, 0.3);
		compare_budget(&f, 1234567);
		compare_floor(&f, 3, 1000000, &random);
	}
	fixture_deinit(&f);
}

/* Rows of one length need no offsets. */
static void test_no_offsets(void **state)
{
	static const uint32_t lengths[] = {1, 37, 4000, 16384};
	struct random random = {89};

	(void)state;
	for (size_t i = 0; i < sizeof(lengths) / sizeof(*lengths); i++) {
		struct fixture f;

		fixture_uniform(&f, 3, 5, lengths[i]);
		f.device.offset = NULL;
		fill(&f, &random, TIES);
		for (uint32_t level = KVG_SELECT_PAIR; level <= KVG_SELECT_ADAKV_LAYER; level++)
			compare_ratio(&f, level, 0.4);
		compare_ratio(&f, KVG_SELECT_PAIR, 1.0);
		compare_budget(&f, f.count / 3);
		compare_floor(&f, lengths[i] / 2, 5, &random);
		compare_threshold(&f, 0.5f);
		fixture_deinit(&f);
	}
}

/* More layers than blocks run at once, and sizes for the launch that are wrong. */
static void test_many_layers_and_wrong_sizes(void **state)
{
	struct random random = {71};
	struct fixture f;

	(void)state;
	fixture_uniform(&f, 200, 2, 301);
	fill(&f, &random, UNIFORM);
	compare_ratio(&f, KVG_SELECT_PAIR_LAYER, 0.37);
	compare_ratio(&f, KVG_SELECT_ADAKV_LAYER, 0.37);
	f.device.count = 10;
	f.device.longest = 1;
	for (uint32_t level = KVG_SELECT_PAIR; level <= KVG_SELECT_ADAKV_LAYER; level++)
		compare_ratio(&f, level, 0.37);
	compare_floor(&f, 200, 4, &random);
	compare_threshold(&f, 0.5f);
	fixture_deinit(&f);
}

/* A sample that misleads: large scores sit together where rank and even sampling disagree with the rest. */
static void test_misleading_sample(void **state)
{
	struct random random = {73};
	struct fixture f;

	(void)state;
	fixture_uniform(&f, 4, 4, 30000);
	for (size_t i = 0; i < f.count; i++)
		f.scores[i] = i < 40 ? 1e20f + (float)i * 1e15f : random_float(&random) * 1e-3f;
	upload_scores(&f);
	for (uint64_t budget = 1; budget < 60; budget += 3)
		compare_budget(&f, budget);
	for (size_t i = 0; i < f.count; i++)
		f.scores[i] = i < 40 ? -1e20f - (float)i * 1e15f : random_float(&random) * 1e-3f;
	upload_scores(&f);
	for (uint64_t left = 1; left < 60; left += 3)
		compare_budget(&f, f.count - left);
	fixture_deinit(&f);
}

/* What a threshold search returns, alone and by steps over two halves as two GPUs would hold them. */
static void test_steps(void **state)
{
	struct random random = {79};

	(void)state;
	for (uint32_t kind = 0; kind < KINDS; kind++) {
		struct fixture f;
		struct kvg_cuda_select_state found;
		static uint32_t counts[2][2048];
		float threshold;

		fixture_uniform(&f, 2, 5, 3001);
		fill(&f, &random, (enum kind)kind);
		const uint32_t rank = (uint32_t)((double)f.count * 0.4) - 1;
		CUdeviceptr at = device_new(sizeof(found)), counts_at = device_new(sizeof(counts[0]));
		struct kvg_cuda_select_state *found_at = (struct kvg_cuda_select_state *)at;
		struct kvg_cuda_select_input half = f.device;

		check(kvg_cuda_select_ratio(gpu.select, &f.device, KVG_SELECT_PAIR, 0.4, NULL, threshold_of(&f),
			(void *)gpu.scratch, gpu.stream));
		half.layers = 1;
		for (uint32_t pass = 0; pass < 3; pass++) {
			for (uint32_t part = 0; part < 2; part++) {
				half.offset = f.device.offset + (size_t)part * 5;
				check(kvg_cuda_select_histogram(
					gpu.select, &half, pass, found_at, (uint32_t *)counts_at, gpu.stream));
				check(gpu.driver->cuStreamSynchronize(gpu.stream));
				check(gpu.driver->cuMemcpyDtoH(counts[part], counts_at, sizeof(counts[0])));
			}
			for (size_t i = 0; i < 2048; i++)
				counts[0][i] += counts[1][i];
			check(gpu.driver->cuMemcpyHtoD(counts_at, counts[0], sizeof(counts[0])));
			check(kvg_cuda_select_cut(
				gpu.select, pass, rank, (const uint32_t *)counts_at, found_at, gpu.stream));
			check(gpu.driver->cuStreamSynchronize(gpu.stream));
		}
		check(gpu.driver->cuMemcpyDtoH(&found, at, sizeof(found)));
		check(gpu.driver->cuMemcpyDtoH(&threshold, f.threshold_at, sizeof(threshold)));
		assert_true(found.threshold == threshold);
		size_t greater = 0, equal = 0;

		for (size_t i = 0; i < f.count; i++) {
			greater += f.scores[i] > threshold;
			equal += f.scores[i] == threshold;
		}
		assert_int_equal(found.greater, greater);
		assert_true(rank >= greater && rank < greater + equal);
		poison(&f);
		check(kvg_cuda_select_mask(gpu.select, &f.device, &found_at->threshold, 0, keep_of(&f), gpu.stream));
		kvg_select_threshold(&f.host, threshold, f.expected);
		assert_expected(&f, "steps", 0.4);
		check(gpu.driver->cuMemFree(at));
		check(gpu.driver->cuMemFree(counts_at));
		fixture_deinit(&f);
	}
}

/* Scores that are not numbers break the caller's promise; they must not break memory or hang. */
static void test_nan_is_harmless(void **state)
{
	struct fixture f;

	(void)state;
	fixture_uniform(&f, 3, 3, 40001);
	for (size_t i = 0; i < f.count; i++)
		f.scores[i] = i % 3 ? NAN : -NAN;
	upload_scores(&f);
	for (uint32_t level = KVG_SELECT_PAIR; level <= KVG_SELECT_ADAKV_LAYER; level++) {
		poison(&f);
		check(kvg_cuda_select_ratio(
			gpu.select, &f.device, level, 0.5, keep_of(&f), NULL, (void *)gpu.scratch, gpu.stream));
		check(gpu.driver->cuStreamSynchronize(gpu.stream));
		check(gpu.driver->cuMemcpyDtoH(f.keep, f.keep_at + GUARD, f.count));
		for (size_t i = 0; i < f.count; i++)
			assert_true(f.keep[i] <= 1);
	}
	for (size_t i = 0; i < f.count; i++)
		f.scores[i] = (float)i;
	upload_scores(&f);
	compare_threshold(&f, NAN);
	compare_threshold(&f, -NAN);
	fixture_deinit(&f);
}

static void test_bad_arguments(void **state)
{
	struct fixture f;

	(void)state;
	fixture_uniform(&f, 2, 2, 8);
	struct kvg_cuda_select_input odd = f.device;

	odd.scores++;
	assert_int_equal(kvg_cuda_select_ratio(gpu.select, &odd, KVG_SELECT_PAIR, 0.5, keep_of(&f), NULL,
				 (void *)gpu.scratch, gpu.stream),
		CUDA_ERROR_INVALID_VALUE);
	assert_int_equal(kvg_cuda_select_ratio(gpu.select, &f.device, KVG_SELECT_PAIR_HEAD, 0.5, NULL, NULL,
				 (void *)gpu.scratch, gpu.stream),
		CUDA_ERROR_INVALID_VALUE);
	assert_int_equal(kvg_cuda_select_ratio(
				 gpu.select, &f.device, 4, 0.5, keep_of(&f), NULL, (void *)gpu.scratch, gpu.stream),
		CUDA_ERROR_INVALID_VALUE);
	assert_int_equal(
		kvg_cuda_select_floor(gpu.select, &f.device, 1, keep_of(&f) + 1, gpu.stream), CUDA_ERROR_INVALID_VALUE);
	assert_int_equal(
		kvg_cuda_select_histogram(gpu.select, &f.device, 3, NULL, NULL, gpu.stream), CUDA_ERROR_INVALID_VALUE);
	fixture_deinit(&f);
}

/* A captured call gives the same result each time it is replayed. */
static void test_graph(void **state)
{
	struct random random = {83};
	struct fixture f;
	CUgraph graph;
	CUgraphExec exec;

	(void)state;
	fixture_uniform(&f, 3, 4, 20000);
	check(gpu.driver->cuStreamBeginCapture(gpu.stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
	check(kvg_cuda_select_ratio(gpu.select, &f.device, KVG_SELECT_ADAKV_LAYER, 0.3, keep_of(&f), NULL,
		(void *)gpu.scratch, gpu.stream));
	check(gpu.driver->cuStreamEndCapture(gpu.stream, &graph));
	check(gpu.driver->cuGraphInstantiate(&exec, graph, 0));
	for (uint32_t kind = 0; kind < KINDS; kind++) {
		fill(&f, &random, (enum kind)kind);
		poison(&f);
		kvg_select_ratio(&f.host, KVG_SELECT_ADAKV_LAYER, 0.3, f.expected, f.scratch);
		check(gpu.driver->cuGraphLaunch(exec, gpu.stream));
		assert_expected(&f, "graph", 0.3);
	}
	check(gpu.driver->cuGraphExecDestroy(exec));
	check(gpu.driver->cuGraphDestroy(graph));
	fixture_deinit(&f);
}

/* ---- golden files ---- */

struct mask {
	char scores[32], level[32];
	double ratio;
	unsigned long long chunk, window, system_prompt;
};

static uint32_t level_of(const char *name)
{
	static const char *const names[] = {"pair", "pair-head", "pair-layer", "adakv-layer"};

	for (uint32_t i = 0; i < 4; i++)
		if (strcmp(name, names[i]) == 0)
			return i;
	fail_msg("level %s", name);
	return 0;
}

/* Prunes tokens [begin, end) of all rows of a [rows][tokens] mask. */
static void golden_range(
	const struct kvg_tensor *scores, size_t begin, size_t end, uint32_t level, double ratio, uint8_t *keep)
{
	size_t tokens = scores->shape[2], n = end - begin;
	struct fixture f;

	fixture_uniform(&f, (uint32_t)scores->shape[0], (uint32_t)scores->shape[1], (uint32_t)n);
	for (size_t row = 0; row < f.rows; row++)
		memcpy(f.scores + row * n, (const float *)scores->data + row * tokens + begin, n * sizeof(float));
	upload_scores(&f);
	compare_ratio(&f, level, ratio);
	for (size_t row = 0; row < f.rows; row++)
		memcpy(keep + row * tokens + begin, f.keep + row * n, n);
	fixture_deinit(&f);
}

static void golden_mask(const struct kvg_safetensors *file, const struct kvg_tensor *expected)
{
	struct mask m;
	const char *text = kvg_safetensors_metadata(file, expected->name);

	assert_non_null(text);
	assert_int_equal(sscanf(text,
				 "{\"scores\": \"%31[^\"]\", \"level\": \"%31[^\"]\", \"ratio\": %lf, "
				 "\"chunk\": %llu, \"window\": %llu, \"system_prompt\": %llu}",
				 m.scores, m.level, &m.ratio, &m.chunk, &m.window, &m.system_prompt),
		6);
	const struct kvg_tensor *scores = kvg_safetensors_find(file, m.scores);
	size_t tokens = scores->shape[2], total = m.system_prompt + tokens, chunk = m.chunk ? m.chunk : total;
	uint8_t *keep = malloc(scores->count);
	uint64_t window, start = 0;
	double ratio;

	memset(keep, 1, scores->count);
	kvg_select_prefill_params(tokens, m.chunk, m.ratio, m.window, 0, &ratio, &window);
	for (size_t fed = 0; m.ratio < 1.0 && fed < total;) {
		fed = chunk < total - fed ? fed + chunk : total;
		uint64_t seen = fed > m.system_prompt ? fed - m.system_prompt : 0;

		if (seen < window || seen - window <= start)
			continue;
		golden_range(scores, start, seen - window, level_of(m.level), ratio, keep);
		start = seen - window;
	}
	assert_memory_equal(keep, expected->data, expected->size);
	free(keep);
}

static void test_golden_prefill(void **state)
{
	struct kvg_safetensors *file;
	char text[256];
	size_t masks = 0;

	(void)state;
	assert_int_equal(kvg_safetensors_open("golden/evict_prefill.safetensors", &file, text, sizeof(text)), 0);
	for (size_t i = 0; i < kvg_safetensors_count(file); i++) {
		const struct kvg_tensor *tensor = kvg_safetensors_at(file, i);

		if (strncmp(tensor->name, "keep_", 5) == 0) {
			golden_mask(file, tensor);
			masks++;
		}
	}
	assert_true(masks > 0);
	(void)kvg_safetensors_free(file);
}

/* What each row holds while decoding. */
struct decode {
	const struct kvg_safetensors *file;
	const float *scores; /* [rows][tokens] */
	size_t rows, tokens, count[64];
	uint32_t *held; /* [rows][tokens] */
};

static void golden_event(struct decode *d, size_t event, size_t before, size_t seen)
{
	struct fixture f;
	uint32_t lengths[64];
	size_t at = 0;

	for (size_t row = 0; row < d->rows; row++) {
		for (size_t token = before; token < seen; token++)
			d->held[row * d->tokens + d->count[row]++] = (uint32_t)token;
		lengths[row] = (uint32_t)d->count[row];
	}
	fixture_init(&f, 3, 2, lengths, 0);
	for (size_t row = 0; row < d->rows; row++)
		for (size_t i = 0; i < d->count[row]; i++) {
			uint32_t token = d->held[row * d->tokens + i];
			int counts_full = token < 4 || token + 128 >= seen;

			f.scores[at++] = counts_full ? 1.0f : d->scores[row * d->tokens + token];
		}
	upload_scores(&f);
	compare_budget(&f, 256 * d->rows);
	for (size_t row = 0; row < d->rows; row++) {
		uint32_t *held = d->held + row * d->tokens;
		char name[64];
		size_t kept = 0;

		for (size_t i = 0; i < d->count[row]; i++)
			if (f.keep[f.offset[row] + i])
				held[kept++] = held[i];
		d->count[row] = kept;
		(void)snprintf(name, sizeof(name), "event%zu.layer%zu.head%zu", event, row / 2, row % 2);
		const struct kvg_tensor *expected = kvg_safetensors_find(d->file, name);

		assert_non_null(expected);
		assert_int_equal(expected->count, kept);
		assert_memory_equal(expected->data, held, kept * sizeof(*held));
	}
	fixture_deinit(&f);
}

static void test_golden_decode(void **state)
{
	static const size_t seen[] = {0, 300, 385, 513, 641, 769, 897, 1025};
	struct kvg_safetensors *file;
	struct decode d = {.rows = 6, .tokens = 1100};
	char text[256];

	(void)state;
	assert_int_equal(kvg_safetensors_open("golden/evict_decode.safetensors", &file, text, sizeof(text)), 0);
	d.file = file;
	d.scores = kvg_safetensors_find(file, "scores")->data;
	d.held = calloc(d.rows * d.tokens, sizeof(*d.held));
	for (size_t event = 0; event + 1 < sizeof(seen) / sizeof(*seen); event++)
		golden_event(&d, event, seen[event], seen[event + 1]);
	free(d.held);
	(void)kvg_safetensors_free(file);
}

static int open_gpu(void)
{
	char text[256];

	if (kvg_cuda_open(0, &gpu.cuda, text, sizeof(text)) < 0) {
		(void)fprintf(stderr, "%s\n", text);
		return 77;
	}
	gpu.driver = gpu.cuda->driver;
	CUresult result = kvg_cuda_select_new(gpu.cuda, &gpu.select);

	if (result == CUDA_SUCCESS)
		result = gpu.driver->cuStreamCreate(&gpu.stream, CU_STREAM_DEFAULT);
	if (result == CUDA_SUCCESS)
		result = gpu.driver->cuMemAlloc(&gpu.scratch, kvg_cuda_select_scratch(gpu.select, LAYERS));
	if (result == CUDA_SUCCESS)
		result = kvg_cuda_select_scratch_clear(gpu.select, (void *)gpu.scratch, LAYERS, gpu.stream);
	if (result != CUDA_SUCCESS)
		(void)fprintf(stderr, "%s\n", kvg_cuda_error(gpu.driver, result));
	return result != CUDA_SUCCESS;
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_random_rows),
		cmocka_unit_test(test_large),
		cmocka_unit_test(test_whole),
		cmocka_unit_test(test_long_rows),
		cmocka_unit_test(test_no_offsets),
		cmocka_unit_test(test_many_layers_and_wrong_sizes),
		cmocka_unit_test(test_misleading_sample),
		cmocka_unit_test(test_steps),
		cmocka_unit_test(test_nan_is_harmless),
		cmocka_unit_test(test_bad_arguments),
		cmocka_unit_test(test_graph),
		cmocka_unit_test(test_golden_prefill),
		cmocka_unit_test(test_golden_decode),
	};
	int status = open_gpu();

	if (status == 0)
		status = runner_run("gpu/select", tests, sizeof(tests) / sizeof(*tests));
	(void)kvg_cuda_select_free(gpu.select);
	(void)kvg_cuda_close(gpu.cuda);
	return status;
}
