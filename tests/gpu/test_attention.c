#include "tests/support/runner.h"

#include "kernels/cuda/attention.h"
#include "kernels/host/dtype.h"
#include "tests/unit/kernels/random.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define TOKENS KVG_CUDA_BLOCK_TOKENS

static struct kvg_cuda *cuda;
static struct kvg_cuda_attention *attention;

static void check(CUresult result)
{
	if (result != CUDA_SUCCESS)
		fail_msg("%s", kvg_cuda_error(cuda->driver, result));
}

static CUdeviceptr device_new(size_t size)
{
	CUdeviceptr at;

	check(cuda->driver->cuMemAlloc(&at, size ? size : 1));
	check(cuda->driver->cuMemsetD8Async(
		at, 0xff, size ? size : 1, NULL)); /* NaN in every dtype, no id and no length */
	return at;
}

static CUdeviceptr device_copy(const void *data, size_t size)
{
	CUdeviceptr at = device_new(size);

	check(cuda->driver->cuMemcpyHtoD(at, data, size));
	return at;
}

static void device_free(CUdeviceptr at)
{
	check(cuda->driver->cuMemFree(at));
}

/* ---- a cache, on the device and mirrored here ---- */

struct cache {
	struct kvg_cuda_kv kv;
	struct random random;
	size_t rows, blocks, arena; /* rows of all layers; blocks of the arena; bytes of its K or of its V */
	uint32_t *ids, *base_len, *appended;
	uint8_t *memory; /* K, then V */
};

static uint32_t cache_row(const struct cache *cache, uint32_t layer, uint32_t slot, uint32_t head)
{
	return (layer * cache->kv.max_sequences + slot) * cache->kv.heads + head;
}

static size_t token_bytes(const struct cache *cache)
{
	return cache->kv.k_dim * kvg_dtype_size(cache->kv.dtype);
}

/* Random numbers where the row has pairs; NaN stays everywhere else. */
static void fill_row(struct cache *cache, uint32_t row, uint32_t length)
{
	const uint32_t dim = cache->kv.k_dim;
	float *floats = malloc(dim * sizeof(*floats));

	for (uint32_t i = 0; i < length; i++) {
		const size_t id = cache->ids[(size_t)row * cache->kv.row_cap + i / TOKENS];

		for (size_t side = 0; side < 2; side++) {
			uint8_t *to = cache->memory + side * cache->arena + id * cache->kv.stride +
				      i % TOKENS * token_bytes(cache);

			for (uint32_t d = 0; d < dim; d++)
				floats[d] = random_float(&cache->random);
			kvg_dtype_store(cache->kv.dtype, to, floats, dim);
		}
	}
	free(floats);
}

/* Every row's row_cap blocks, scattered over an arena with holes. */
static void scatter_ids(struct cache *cache)
{
	const size_t used = cache->rows * cache->kv.row_cap;

	for (size_t i = 0; i < used; i++)
		cache->ids[i] = (uint32_t)(2 * i + random_below(&cache->random, 2));
	for (size_t i = used - 1; i > 0; i--) {
		const size_t other = random_below(&cache->random, (uint32_t)(i + 1));
		const uint32_t id = cache->ids[i];

		cache->ids[i] = cache->ids[other];
		cache->ids[other] = id;
	}
}

static void cache_upload(struct cache *cache)
{
	const struct kvg_cuda_driver *driver = cuda->driver;

	check(driver->cuMemcpyHtoD(cache->kv.ids, cache->ids, cache->rows * cache->kv.row_cap * 4));
	check(driver->cuMemcpyHtoD(cache->kv.base_len, cache->base_len, cache->rows * 4));
	check(driver->cuMemcpyHtoD(cache->kv.appended, cache->appended, cache->kv.max_sequences * 4));
	check(driver->cuMemcpyHtoD(cache->kv.k_base, cache->memory, 2 * cache->arena));
}

static void cache_download(struct cache *cache)
{
	check(cuda->driver->cuMemcpyDtoH(cache->appended, cache->kv.appended, cache->kv.max_sequences * 4));
	check(cuda->driver->cuMemcpyDtoH(cache->memory, cache->kv.k_base, 2 * cache->arena));
}

/* kv: its counts, group, dimension and dtype. Rows are empty; lengths and contents come with cache_fill(). */
static void cache_init(struct cache *cache, const struct kvg_cuda_kv *kv, uint64_t seed)
{
	*cache = (struct cache){.kv = *kv, .random = {seed}};
	cache->kv.v_dim = kv->k_dim;
	cache->kv.stride = TOKENS * token_bytes(cache);
	cache->rows = (size_t)kv->layers * kv->max_sequences * kv->heads;
	cache->blocks = 2 * cache->rows * kv->row_cap;
	cache->arena = cache->blocks * cache->kv.stride;
	cache->ids = malloc(cache->rows * kv->row_cap * 4);
	cache->base_len = calloc(cache->rows, 4);
	cache->appended = calloc(kv->max_sequences, 4);
	cache->memory = malloc(2 * cache->arena);
	memset(cache->memory, 0xff, 2 * cache->arena);
	scatter_ids(cache);
	cache->kv.ids = device_new(cache->rows * kv->row_cap * 4);
	cache->kv.base_len = device_new(cache->rows * 4);
	cache->kv.appended = device_new(kv->max_sequences * 4);
	cache->kv.k_base = device_new(2 * cache->arena);
	cache->kv.v_base = cache->kv.k_base + cache->arena;
}

/* Contents for rows of base_len + appended pairs, all of it to the device. */
static void cache_fill(struct cache *cache)
{
	for (uint32_t row = 0; row < cache->rows; row++)
		fill_row(cache, row,
			cache->base_len[row] + cache->appended[row / cache->kv.heads % cache->kv.max_sequences]);
	cache_upload(cache);
}

static void cache_deinit(struct cache *cache)
{
	free(cache->ids);
	free(cache->base_len);
	free(cache->appended);
	free(cache->memory);
	device_free(cache->kv.ids);
	device_free(cache->kv.base_len);
	device_free(cache->kv.appended);
	device_free(cache->kv.k_base);
}

static uint32_t cache_length(const struct cache *cache, uint32_t layer, uint32_t slot, uint32_t head)
{
	if (slot >= cache->kv.max_sequences)
		return 0;
	return cache->base_len[cache_row(cache, layer, slot, head)] + cache->appended[slot];
}

/* ---- the definition of attention, in doubles ---- */

static void load_token(const struct cache *cache, uint32_t row, uint32_t index, size_t side, float *to)
{
	const size_t id = cache->ids[(size_t)row * cache->kv.row_cap + index / TOKENS];

	kvg_dtype_load(cache->kv.dtype, to,
		cache->memory + side * cache->arena + id * cache->kv.stride + index % TOKENS * token_bytes(cache),
		cache->kv.k_dim);
}

/* All queries of a row's group: q, out [group][dim]. */
static void define(const struct cache *cache, uint32_t row, uint32_t length, double scale, const float *q, double *out)
{
	const uint32_t dim = cache->kv.k_dim, group = cache->kv.group;
	double *weight = malloc((length + 1) * group * sizeof(*weight)), most[8], sum[8] = {0};
	float *token = malloc(dim * sizeof(*token));

	memset(out, 0, group * dim * sizeof(*out));
	for (uint32_t g = 0; g < group; g++)
		most[g] = -INFINITY;
	for (uint32_t i = 0; i < length; i++) {
		load_token(cache, row, i, 0, token);
		for (uint32_t g = 0; g < group; g++) {
			double dot = 0;

			for (uint32_t d = 0; d < dim; d++)
				dot += (double)q[g * dim + d] * (double)token[d];
			weight[i * group + g] = dot * scale;
			most[g] = fmax(most[g], dot * scale);
		}
	}
	for (uint32_t i = 0; i < length; i++) {
		load_token(cache, row, i, 1, token);
		for (uint32_t g = 0; g < group; g++) {
			const double p = exp(weight[i * group + g] - most[g]);

			sum[g] += p;
			for (uint32_t d = 0; d < dim; d++)
				out[g * dim + d] += p * (double)token[d];
		}
	}
	for (uint32_t g = 0; length && g < group; g++)
		for (uint32_t d = 0; d < dim; d++)
			out[g * dim + d] /= sum[g];
	free(weight);
	free(token);
}

/* ---- a call, and its comparison ---- */

struct step {
	struct kvg_cuda_plan plan;
	struct kvg_cuda_attend attend;
	uint32_t *slots;
	size_t numbers, bytes; /* of q and of out */
	float *q;              /* as the storage rounds it */
};

static void step_init(struct step *step, struct cache *cache, const uint32_t *slots, uint32_t sequences, float q_scale)
{
	const uint32_t line = cache->kv.heads * cache->kv.group * cache->kv.k_dim;
	uint8_t *stored;

	*step = (struct step){.plan = {.layer_count = cache->kv.layers, .sequences = sequences}};
	step->attend.scale = 1.0f / sqrtf((float)cache->kv.k_dim);
	step->attend.q_stride = line + 24;
	step->attend.out_stride = line + 16;
	step->numbers = sequences * (line + 24);
	step->slots = malloc(sequences * 4 + 4);
	memcpy(step->slots, slots, sequences * 4);
	step->q = random_floats(&cache->random, step->numbers, q_scale);
	step->bytes = step->numbers * kvg_dtype_size(cache->kv.dtype);
	stored = malloc(step->bytes + 1);
	kvg_dtype_store(cache->kv.dtype, stored, step->q, step->numbers);
	kvg_dtype_load(cache->kv.dtype, step->q, stored, step->numbers);
	step->attend.q = device_copy(stored, step->bytes);
	step->attend.out = device_new(step->bytes);
	step->plan.slots = device_copy(slots, sequences * 4);
	step->plan.memory = device_new(kvg_cuda_attention_plan_size(attention, &cache->kv, &step->plan));
	step->attend.scratch = device_new(kvg_cuda_attention_scratch_size(attention, &cache->kv, &step->plan));
	free(stored);
}

static void step_deinit(struct step *step)
{
	free(step->slots);
	free(step->q);
	device_free(step->attend.q);
	device_free(step->attend.out);
	device_free(step->attend.scratch);
	device_free(step->plan.slots);
	device_free(step->plan.memory);
}

/* ||out - expected|| / ||expected|| of one row's group; out must be exactly 0 where expected is. */
static double error_of(const float *out, const double *expected, size_t count)
{
	double off = 0, norm = 0;

	for (size_t i = 0; i < count; i++) {
		off += ((double)out[i] - expected[i]) * ((double)out[i] - expected[i]);
		norm += expected[i] * expected[i];
	}
	return norm > 0 ? sqrt(off / norm) : off;
}

static double worst[4]; /* by dtype */

/* Compares the layer's output with the definition over the mirror as it is. */
static void step_compare(const struct step *step, const struct cache *cache, uint32_t layer)
{
	const uint32_t width = cache->kv.group * cache->kv.k_dim;
	static const double bounds[] = {[KVG_KERNEL_BF16] = 6e-3, [KVG_KERNEL_F16] = 1e-3, [KVG_KERNEL_F32] = 1e-5};
	const size_t size = kvg_dtype_size(cache->kv.dtype);
	uint8_t *stored = malloc(step->bytes);
	float *out = malloc(step->numbers * sizeof(*out));
	double *expected = malloc(width * sizeof(*expected));

	check(cuda->driver->cuMemcpyDtoH(stored, step->attend.out, step->bytes));
	kvg_dtype_load(cache->kv.dtype, out, stored, step->numbers);
	for (uint32_t i = 0; i < step->plan.sequences; i++)
		for (uint32_t head = 0; head < cache->kv.heads; head++) {
			const uint32_t slot = step->slots[i], length = cache_length(cache, layer, slot, head);
			double error;

			define(cache, slot < cache->kv.max_sequences ? cache_row(cache, layer, slot, head) : 0, length,
				(double)step->attend.scale, step->q + i * step->attend.q_stride + head * width,
				expected);
			error = error_of(out + i * step->attend.out_stride + head * width, expected, width);
			if (!(error <= bounds[cache->kv.dtype]))
				fail_msg("dim %u group %u dtype %u layer %u sequence %u head %u length %u: error %g",
					cache->kv.k_dim, cache->kv.group, cache->kv.dtype, layer, i, head, length,
					error);
			worst[cache->kv.dtype] = fmax(worst[cache->kv.dtype], error);
		}
	for (uint32_t i = 0; i + 1 < step->plan.sequences; i++) /* between sequences nothing is written */
		for (uint64_t at = cache->kv.heads * width * size; at < step->attend.out_stride * size; at++)
			assert_int_equal(stored[i * step->attend.out_stride * size + at], 0xff);
	free(stored);
	free(out);
	free(expected);
}

static void step_attend(struct step *step, const struct cache *cache, uint32_t layer, CUstream stream)
{
	step->attend.layer = layer;
	check(kvg_cuda_attention_attend(attention, &cache->kv, &step->plan, &step->attend, stream));
}

static void step_run(struct step *step, const struct cache *cache)
{
	check(kvg_cuda_attention_plan(attention, &cache->kv, &step->plan, NULL));
	for (uint32_t layer = 0; layer < cache->kv.layers; layer++) {
		check(cuda->driver->cuMemsetD8Async(step->attend.out, 0xff, step->bytes, NULL));
		step_attend(step, cache, layer, NULL);
		step_compare(step, cache, layer);
	}
}

/* ---- the tests ---- */

/* Every group; lengths around blocks and long ones, empty rows and slots that are none. */
static void attend_case(uint32_t dim, uint32_t dtype, size_t shift)
{
	static const uint32_t lengths[12] = {0, 1, 15, 16, 17, 31, 64, 65, 257, 1000, 2047, 4999};
	static const uint32_t slots[] = {2, KVG_CUDA_NO_SLOT, 0, 1, 2};
	const struct kvg_cuda_kv kv = {
		.layers = 2, .heads = 2, .max_sequences = 3, .row_cap = 320, .group = 1, .k_dim = dim, .dtype = dtype};
	struct cache cache;

	cache_init(&cache, &kv, 1000 * dim + dtype);
	for (size_t i = 0; i < 12; i++)
		cache.base_len[i] = lengths[(i * 5 + shift) % 12];
	cache.appended[1] = 7;
	cache_fill(&cache);
	for (uint32_t group = 1; group <= 8; group++) {
		struct step step;

		cache.kv.group = group;
		step_init(&step, &cache, slots, group % 2 ? 5 : 3, group % 3 ? 4.0f : 60.0f);
		step_run(&step, &cache);
		step_deinit(&step);
	}
	cache_deinit(&cache);
}

static void test_attend(void **state)
{
	static const uint32_t dims[] = {32, 64, 96, 128, 192, 256};

	(void)state;
	for (size_t i = 0; i < 6; i++) {
		attend_case(dims[i], KVG_KERNEL_BF16, i);
		attend_case(dims[i], KVG_KERNEL_F16, i + 1);
		if (dims[i] <= 128)
			attend_case(dims[i], KVG_KERNEL_F32, i + 2);
	}
}

struct many {
	uint32_t dtype, dim, sequences, row_cap, usual, rare; /* most pairs of four rows in five, and of the fifth */
};

static void many_rows(const struct many *many)
{
	const struct kvg_cuda_kv kv = {.layers = many->sequences < 100 ? 2 : 1,
		.heads = 3,
		.max_sequences = many->sequences + 4,
		.row_cap = many->row_cap,
		.group = 5,
		.k_dim = many->dim,
		.dtype = many->dtype};
	uint32_t *slots = malloc(many->sequences * sizeof(*slots));
	struct cache cache;
	struct step step;

	cache_init(&cache, &kv, 77);
	for (size_t i = 0; i < cache.rows; i++)
		cache.base_len[i] = random_below(&cache.random, i % 5 ? many->usual : many->rare);
	for (uint32_t i = 0; i < kv.max_sequences; i++)
		cache.appended[i] = random_below(&cache.random, 30);
	for (uint32_t i = 0; i < many->sequences; i++)
		slots[i] = i * 37 % kv.max_sequences;
	slots[13] = slots[many->sequences - 1] = KVG_CUDA_NO_SLOT;
	cache_fill(&cache);
	step_init(&step, &cache, slots, many->sequences, 5.0f);
	step_run(&step, &cache);
	step_deinit(&step);
	cache_deinit(&cache);
	free(slots);
}

/* Many short and some long rows: workers that end one row, take others whole and begin another. */
static void test_many_rows(void **state)
{
	static const struct many cases[] = {
		{KVG_KERNEL_BF16, 64, 60, 70, 90, 1000},
		{KVG_KERNEL_BF16, 96, 60, 70, 1, 1000},
		{KVG_KERNEL_F16, 32, 1200, 16, 200, 200},
		{KVG_KERNEL_BF16, 128, 700, 14, 20, 190},
		{KVG_KERNEL_F32, 32, 900, 14, 20, 190},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++)
		many_rows(&cases[i]);
}

/* Twice the same lengths, twice the same bits; and two plans may share the scratch memory in one stream. */
static void test_repeats_exactly(void **state)
{
	const struct kvg_cuda_kv kv = {.layers = 1,
		.heads = 2,
		.max_sequences = 2,
		.row_cap = 1000,
		.group = 4,
		.k_dim = 128,
		.dtype = KVG_KERNEL_BF16};
	static const uint32_t slots[] = {1, 0};
	struct cache cache;
	struct step step;
	uint8_t *first, *again;

	(void)state;
	cache_init(&cache, &kv, 78);
	for (size_t i = 0; i < cache.rows; i++)
		cache.base_len[i] = (uint32_t)(15990 - 1500 * i);
	cache_fill(&cache);
	step_init(&step, &cache, slots, 2, 3.0f);
	first = malloc(step.bytes);
	again = malloc(step.bytes);
	step_run(&step, &cache);
	check(cuda->driver->cuMemcpyDtoH(first, step.attend.out, step.bytes));
	for (int i = 0; i < 20; i++) {
		check(cuda->driver->cuMemsetD8Async(step.attend.out, 0xff, step.bytes, NULL));
		step_attend(&step, &cache, 0, NULL);
		check(cuda->driver->cuMemcpyDtoH(again, step.attend.out, step.bytes));
		assert_memory_equal(first, again, step.bytes);
	}
	free(first);
	free(again);
	step_deinit(&step);
	cache_deinit(&cache);
}

/* ---- append ---- */

struct tokens {
	uint32_t count;
	uint64_t k_stride, v_stride; /* elements */
	uint8_t *k, *v;
	size_t k_bytes, v_bytes;
	CUdeviceptr device_k, device_v;
};

static uint8_t *random_bytes(struct random *random, size_t size)
{
	uint8_t *bytes = malloc(size);

	for (size_t i = 0; i < size; i++)
		bytes[i] = (uint8_t)random_bits(random);
	return bytes;
}

static void tokens_init(struct tokens *tokens, struct cache *cache, uint32_t count)
{
	const size_t size = kvg_dtype_size(cache->kv.dtype);

	*tokens = (struct tokens){.count = count,
		.k_stride = cache->kv.heads * cache->kv.k_dim + 8,
		.v_stride = cache->kv.heads * cache->kv.v_dim + 16};
	tokens->k_bytes = count * tokens->k_stride * size;
	tokens->v_bytes = count * tokens->v_stride * size;
	tokens->k = random_bytes(&cache->random, tokens->k_bytes);
	tokens->v = random_bytes(&cache->random, tokens->v_bytes);
	tokens->device_k = device_copy(tokens->k, tokens->k_bytes);
	tokens->device_v = device_copy(tokens->v, tokens->v_bytes);
}

static void tokens_deinit(struct tokens *tokens)
{
	free(tokens->k);
	free(tokens->v);
	device_free(tokens->device_k);
	device_free(tokens->device_v);
}

/* What append() is to do, on the mirror. index NULL: appended. */
static void append_here(
	struct cache *cache, const struct tokens *tokens, uint32_t layer, const uint32_t *slots, const uint32_t *index)
{
	const size_t size = kvg_dtype_size(cache->kv.dtype), k = cache->kv.k_dim * size, v = cache->kv.v_dim * size;

	for (uint32_t t = 0; t < tokens->count; t++)
		for (uint32_t head = 0; head < cache->kv.heads && slots[t] < cache->kv.max_sequences; head++) {
			const uint32_t row = cache_row(cache, layer, slots[t], head),
				       at = cache->base_len[row] + (index ? index[t] : cache->appended[slots[t]]);

			if (at / TOKENS >= cache->kv.row_cap)
				continue;
			uint8_t *block = cache->memory +
					 cache->ids[(size_t)row * cache->kv.row_cap + at / TOKENS] * cache->kv.stride;

			memcpy(block + at % TOKENS * k, tokens->k + t * tokens->k_stride * size + head * k, k);
			memcpy(block + cache->arena + at % TOKENS * v,
				tokens->v + t * tokens->v_stride * size + head * v, v);
		}
}

static void assert_same_memory(const struct cache *cache)
{
	uint8_t *memory = malloc(2 * cache->arena);

	check(cuda->driver->cuMemcpyDtoH(memory, cache->kv.k_base, 2 * cache->arena));
	assert_memory_equal(memory, cache->memory, 2 * cache->arena);
	free(memory);
}

static void append_both(
	struct cache *cache, uint32_t layer, uint32_t count, const uint32_t *slots, const uint32_t *index)
{
	struct tokens tokens;
	struct kvg_cuda_append append = {.layer = layer, .tokens = count};

	tokens_init(&tokens, cache, count);
	append.slots = device_copy(slots, count * 4);
	append.index = index ? device_copy(index, count * 4) : 0;
	append.k = tokens.device_k;
	append.v = tokens.device_v;
	append.k_stride = tokens.k_stride;
	append.v_stride = tokens.v_stride;
	check(kvg_cuda_attention_append(attention, &cache->kv, &append, NULL));
	append_here(cache, &tokens, layer, slots, index);
	assert_same_memory(cache);
	device_free(append.slots);
	if (index)
		device_free(append.index);
	tokens_deinit(&tokens);
}

/* A prompt's tokens with indices, then decoding; rows at different phases, tokens of no sequence, rows that are full.
 */
static void append_case(uint32_t dim, uint32_t v_dim, uint32_t dtype)
{
	struct kvg_cuda_kv kv = {
		.layers = 2, .heads = 3, .max_sequences = 4, .row_cap = 7, .group = 1, .k_dim = dim, .dtype = dtype};
	static const uint32_t decoding[] = {2, 0, KVG_CUDA_NO_SLOT, 3};
	uint32_t slots[100], index[100], appended[4];
	struct cache cache;

	cache_init(&cache, &kv, dim * 31 + dtype);
	cache.kv.v_dim = v_dim;
	for (size_t i = 0; i < cache.rows; i++)
		cache.base_len[i] = random_below(&cache.random, 80);
	cache.appended[3] = 5;
	cache_upload(&cache);
	for (uint32_t t = 0; t < 100; t++) {
		slots[t] = t % 2 ? 1 : 3;
		index[t] = t / 2; /* runs past the end of some rows */
	}
	append_both(&cache, 1, 100, slots, index);
	append_both(&cache, 0, 100, slots, index);
	for (int i = 0; i < 3; i++) {
		const CUdeviceptr device = device_copy(decoding, sizeof(decoding));

		append_both(&cache, 1, 4, decoding, NULL);
		check(kvg_cuda_attention_advance(attention, &cache.kv, device, 4, 1, NULL));
		for (int s = 0; s < 4; s++)
			cache.appended[s] += s != 1;
		device_free(device);
	}
	check(cuda->driver->cuMemcpyDtoH(appended, cache.kv.appended, sizeof(appended)));
	assert_memory_equal(appended, cache.appended, sizeof(appended));
	cache_deinit(&cache);
}

static void test_append(void **state)
{
	(void)state;
	append_case(128, 128, KVG_KERNEL_BF16);
	append_case(32, 32, KVG_KERNEL_F16);
	append_case(96, 64, KVG_KERNEL_BF16);
	append_case(256, 8, KVG_KERNEL_F16);
	append_case(20, 12, KVG_KERNEL_F32);
}

/* ---- a captured step ---- */

#define STEP_SEQUENCES 5

struct graph {
	CUstream stream;
	CUgraph graph;
	CUgraphExec exec;
	struct kvg_cuda_append append;
	struct tokens tokens;
	CUdeviceptr out[2];
};

static void graph_capture(struct graph *graph, struct step *step, const struct cache *cache)
{
	const struct kvg_cuda_driver *driver = cuda->driver;

	check(driver->cuStreamCreate(&graph->stream, CU_STREAM_NON_BLOCKING));
	check(driver->cuStreamBeginCapture(graph->stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
	check(kvg_cuda_attention_plan(attention, &cache->kv, &step->plan, graph->stream));
	for (uint32_t layer = 0; layer < 2; layer++) {
		graph->append.layer = layer;
		check(kvg_cuda_attention_append(attention, &cache->kv, &graph->append, graph->stream));
		step->attend.out = graph->out[layer];
		step_attend(step, cache, layer, graph->stream);
	}
	check(kvg_cuda_attention_advance(
		attention, &cache->kv, step->plan.slots, step->plan.sequences, 1, graph->stream));
	check(driver->cuStreamEndCapture(graph->stream, &graph->graph));
	check(driver->cuGraphInstantiate(&graph->exec, graph->graph, 0));
}

static void graph_deinit(struct graph *graph)
{
	check(cuda->driver->cuGraphExecDestroy(graph->exec));
	check(cuda->driver->cuGraphDestroy(graph->graph));
	check(cuda->driver->cuStreamDestroy(graph->stream));
	tokens_deinit(&graph->tokens);
	device_free(graph->out[0]);
	device_free(graph->out[1]);
}

/* As an eviction does: other blocks, other lengths, nothing appended; and another set of sequences. */
static void shuffle_tables(struct cache *cache, struct step *step, int round)
{
	scatter_ids(cache);
	for (size_t i = 0; i < cache->rows; i++)
		cache->base_len[i] = random_below(&cache->random, 1 + 150u * (uint32_t)(round + 1));
	for (uint32_t i = 0; i < cache->kv.max_sequences; i++)
		cache->appended[i] = random_below(&cache->random, 3);
	for (uint32_t i = 0; i < STEP_SEQUENCES; i++)
		step->slots[i] = (i * 3 + (uint32_t)round) % 8;
	step->slots[round % STEP_SEQUENCES] = KVG_CUDA_NO_SLOT;
	memset(cache->memory, 0xff, 2 * cache->arena);
	cache_fill(cache);
	check(cuda->driver->cuMemcpyHtoD(step->plan.slots, step->slots, STEP_SEQUENCES * 4));
}

/* One graph serves steps, evictions and other sets of sequences. */
static void test_graph(void **state)
{
	const struct kvg_cuda_kv kv = {.layers = 2,
		.heads = 2,
		.max_sequences = 8,
		.row_cap = 60,
		.group = 7,
		.k_dim = 128,
		.dtype = KVG_KERNEL_F16};
	const uint32_t none[STEP_SEQUENCES] = {0};
	struct graph graph = {0};
	struct cache cache;
	struct step step;
	CUdeviceptr own_out;

	(void)state;
	cache_init(&cache, &kv, 79);
	step_init(&step, &cache, none, STEP_SEQUENCES, 3.0f);
	step.plan.extra = 1;
	own_out = step.attend.out;
	tokens_init(&graph.tokens, &cache, STEP_SEQUENCES);
	for (size_t i = 0; i < graph.tokens.k_bytes; i++)
		graph.tokens.k[i] &= 0x3b; /* finite numbers */
	for (size_t i = 0; i < graph.tokens.v_bytes; i++)
		graph.tokens.v[i] &= 0x3b;
	check(cuda->driver->cuMemcpyHtoD(graph.tokens.device_k, graph.tokens.k, graph.tokens.k_bytes));
	check(cuda->driver->cuMemcpyHtoD(graph.tokens.device_v, graph.tokens.v, graph.tokens.v_bytes));
	graph.append = (struct kvg_cuda_append){.tokens = STEP_SEQUENCES,
		.slots = step.plan.slots,
		.k = graph.tokens.device_k,
		.v = graph.tokens.device_v,
		.k_stride = graph.tokens.k_stride,
		.v_stride = graph.tokens.v_stride};
	graph.out[0] = device_new(step.bytes);
	graph.out[1] = device_new(step.bytes);
	graph_capture(&graph, &step, &cache);
	for (int round = 0; round < 4; round++) {
		shuffle_tables(&cache, &step, round);
		for (int i = 0; i < 3; i++) {
			for (int layer = 0; layer < 2; layer++)
				check(cuda->driver->cuMemsetD8Async(graph.out[layer], 0xff, step.bytes, NULL));
			check(cuda->driver->cuStreamSynchronize(NULL));
			check(cuda->driver->cuGraphLaunch(graph.exec, graph.stream));
			check(cuda->driver->cuStreamSynchronize(graph.stream));
			append_here(&cache, &graph.tokens, 0, step.slots, NULL);
			append_here(&cache, &graph.tokens, 1, step.slots, NULL);
			assert_same_memory(&cache);
			cache_download(&cache);
			for (uint32_t layer = 0; layer < 2; layer++) {
				step.attend.out = graph.out[layer];
				step_compare(&step, &cache, layer);
			}
		}
	}
	graph_deinit(&graph);
	step.attend.out = own_out;
	step_deinit(&step);
	cache_deinit(&cache);
}

/* ---- export ---- */

static void check_table(
	const struct cache *cache, const struct kvg_cuda_export *rows, const uint32_t *slots, uint32_t cap)
{
	const size_t count = (size_t)rows->sequences * cache->kv.heads;
	int32_t *table = malloc(count * cap * 4), *lengths = malloc(count * 4);
	const CUdeviceptr device_table = device_new(count * cap * 4), device_lengths = device_new(count * 4);

	check(kvg_cuda_attention_export_table(attention, &cache->kv, rows, device_table, cap, device_lengths, NULL));
	check(cuda->driver->cuMemcpyDtoH(table, device_table, count * cap * 4));
	check(cuda->driver->cuMemcpyDtoH(lengths, device_lengths, count * 4));
	for (uint32_t i = 0; i < count; i++) {
		const uint32_t slot = slots[i / cache->kv.heads], head = i % cache->kv.heads;
		uint32_t length = cache_length(cache, rows->layer, slot, head);

		length = length < cap * TOKENS ? length : cap * TOKENS;
		assert_int_equal(lengths[i], length);
		for (uint32_t b = 0; b < cap; b++)
			assert_int_equal(table[i * cap + b],
				b * TOKENS < length ? cache->ids[(size_t)cache_row(cache, rows->layer, slot, head) *
									 cache->kv.row_cap +
								 b]
						    : 0);
	}
	free(table);
	free(lengths);
	device_free(device_table);
	device_free(device_lengths);
}

static void check_csr(const struct cache *cache, const struct kvg_cuda_export *rows, const uint32_t *slots)
{
	const uint32_t count = rows->sequences * cache->kv.heads;
	const size_t room = (size_t)count * cache->kv.row_cap;
	int32_t *indptr = malloc((count + 1) * 4), *indices = malloc(room * 4), *last = malloc(count * 4), total = 0;
	const CUdeviceptr device_indptr = device_new((count + 1) * 4), device_indices = device_new(room * 4),
			  device_last = device_new(count * 4);

	check(kvg_cuda_attention_export_csr(
		attention, &cache->kv, rows, device_indptr, device_indices, device_last, NULL));
	check(cuda->driver->cuMemcpyDtoH(indptr, device_indptr, (count + 1) * 4));
	check(cuda->driver->cuMemcpyDtoH(indices, device_indices, room * 4));
	check(cuda->driver->cuMemcpyDtoH(last, device_last, count * 4));
	for (uint32_t i = 0; i < count; i++) {
		const uint32_t slot = slots[i / cache->kv.heads], head = i % cache->kv.heads,
			       length = cache_length(cache, rows->layer, slot, head),
			       blocks = (length + TOKENS - 1) / TOKENS;

		assert_int_equal(indptr[i], total);
		assert_int_equal(last[i], length ? length - (blocks - 1) * TOKENS : 0);
		for (uint32_t b = 0; b < blocks; b++, total++)
			assert_int_equal(indices[total],
				cache->ids[(size_t)cache_row(cache, rows->layer, slot, head) * cache->kv.row_cap + b]);
	}
	assert_int_equal(indptr[count], total);
	for (size_t i = (size_t)total; i < room; i++)
		assert_int_equal(indices[i], -1);
	free(indptr);
	free(indices);
	free(last);
	device_free(device_indptr);
	device_free(device_indices);
	device_free(device_last);
}

static void test_export(void **state)
{
	const struct kvg_cuda_kv kv = {.layers = 2,
		.heads = 3,
		.max_sequences = 500,
		.row_cap = 9,
		.group = 1,
		.k_dim = 8,
		.dtype = KVG_KERNEL_BF16};
	uint32_t slots[500];
	struct cache cache;

	(void)state;
	cache_init(&cache, &kv, 80);
	for (size_t i = 0; i < cache.rows; i++)
		cache.base_len[i] = random_below(&cache.random, 9 * TOKENS - 1);
	for (uint32_t i = 0; i < 500; i++) {
		cache.appended[i] = random_below(&cache.random, 2);
		slots[i] = i % 11 ? 499 - i : KVG_CUDA_NO_SLOT;
	}
	cache_upload(&cache);
	for (uint32_t sequences = 1; sequences <= 500; sequences += 499) {
		const struct kvg_cuda_export rows = {
			.layer = 1, .sequences = sequences, .slots = device_copy(slots, sizeof(slots))};

		check_table(&cache, &rows, slots, 9);
		check_table(&cache, &rows, slots, 4);
		check_csr(&cache, &rows, slots);
		device_free(rows.slots);
	}
	cache_deinit(&cache);
}

/* What is not served is refused, and nothing is enqueued. */
static void test_refusals(void **state)
{
	struct kvg_cuda_kv kv = {.k_base = 4096,
		.v_base = 8192,
		.stride = 4096,
		.layers = 2,
		.heads = 2,
		.max_sequences = 2,
		.row_cap = 9,
		.group = 4,
		.k_dim = 128,
		.v_dim = 128,
		.dtype = KVG_KERNEL_BF16};
	struct kvg_cuda_plan plan = {.layer_count = 2, .sequences = 2};
	struct kvg_cuda_attend attend = {.layer = 2};
	struct kvg_cuda_append append = {.layer = 1, .tokens = 1, .k = 8};

	(void)state;
	assert_int_equal(kvg_cuda_attention_attend(attention, &kv, &plan, &attend, NULL), CUDA_ERROR_INVALID_VALUE);
	attend = (struct kvg_cuda_attend){.q = 8};
	assert_int_equal(kvg_cuda_attention_attend(attention, &kv, &plan, &attend, NULL), CUDA_ERROR_INVALID_VALUE);
	assert_int_equal(kvg_cuda_attention_append(attention, &kv, &append, NULL), CUDA_ERROR_INVALID_VALUE);
	plan.layer_begin = 1;
	assert_int_equal(kvg_cuda_attention_plan(attention, &kv, &plan, NULL), CUDA_ERROR_INVALID_VALUE);
	plan.layer_begin = 0;
	kv.group = 9;
	assert_int_equal(kvg_cuda_attention_plan(attention, &kv, &plan, NULL), CUDA_ERROR_INVALID_VALUE);
	kv.group = 4;
	kv.v_dim = 64;
	assert_int_equal(kvg_cuda_attention_plan(attention, &kv, &plan, NULL), CUDA_ERROR_NOT_SUPPORTED);
	assert_int_equal(kvg_cuda_attention_plan_size(attention, &kv, &plan), 0);
	kv.k_dim = kv.v_dim = 80;
	assert_int_equal(kvg_cuda_attention_attend(attention, &kv, &plan, &attend, NULL), CUDA_ERROR_NOT_SUPPORTED);
}

int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_attend),
		cmocka_unit_test(test_many_rows),
		cmocka_unit_test(test_repeats_exactly),
		cmocka_unit_test(test_append),
		cmocka_unit_test(test_graph),
		cmocka_unit_test(test_export),
		cmocka_unit_test(test_refusals),
	};
	char text[256];
	int r = kvg_cuda_open(0, &cuda, text, sizeof(text));
	CUresult result;

	if (r < 0) {
		(void)fprintf(stderr, "%s\n", text);
		return 77;
	}
	result = kvg_cuda_attention_new(cuda, &attention);
	if (result != CUDA_SUCCESS) {
		(void)fprintf(stderr, "%s\n", kvg_cuda_error(cuda->driver, result));
		return 1;
	}
	if (argc > 1)
		cmocka_set_test_filter(argv[1]); /* a name, * and ? stand for anything */
	r = runner_run("gpu/attention", tests, sizeof(tests) / sizeof(*tests));
	(void)printf("largest relative error: bf16 %.2e, f16 %.2e, f32 %.2e\n", worst[KVG_KERNEL_BF16],
		worst[KVG_KERNEL_F16], worst[KVG_KERNEL_F32]);
	attention = kvg_cuda_attention_free(attention);
	cuda = kvg_cuda_close(cuda);
	return r;
}
