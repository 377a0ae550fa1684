#include "tools/bench/gpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/attention.h"
#include "kernels/host/dtype.h"

/* Qwen3-8B's geometry. */
#define HEADS 8u
#define GROUP 4u
#define DIM   128u
#define LINE  (HEADS * GROUP * DIM)

/*
 * What a real gate leaves of each KV head at 30%: the share of pairs over the threshold of level `pair` in the gate
 * scores of tests/data/golden/model_golden, [layer][head].
 */
#define SHARE_LAYERS 6u
#define SHARE_HEADS  4u
static const double shares[SHARE_LAYERS][SHARE_HEADS] = {
	{0.1200, 0.0058, 0.3442, 0.5033},
	{0.0675, 0.3942, 0.0475, 0.3133},
	{0.1100, 0.1958, 0.3750, 1.0000},
	{0.0100, 0.0950, 0.0783, 0.1483},
	{0.3208, 1.0000, 0.5008, 0.0258},
	{0.7950, 0.2983, 0.1517, 0.2983},
};

struct attention_case {
	const char *id, *work;
	uint32_t sequences, layers;
	uint32_t least, most; /* tokens of a sequence's context */
	bool ragged;          /* cut to the gate's shares */
	bool barred;          /* its bytes are many enough for the bars */
};

/* A cache and everything that a step over it needs. */
struct attention_bench {
	struct gpu_bench *bench;
	struct kvg_cuda_attention *attention;
	struct kvg_cuda_kv kv;
	struct kvg_cuda_plan plan;
	struct kvg_cuda_attend attend;
	struct kvg_cuda_append append;
	struct kvg_cuda_export export;
	CUdeviceptr k, v, indptr, indices, last_page_len;
	uint32_t *lengths, *ids; /* [rows], [rows][row_cap] */
	size_t rows, blocks;
	double bytes; /* of all pairs' K and V */
};

static uint64_t random_next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state >> 16;
}

/* Contexts spread evenly by the golden ratio, and what is left of them. */
static uint32_t length_of(const struct attention_case *what, size_t layer, size_t sequence, size_t head)
{
	const double spread = fmod((double)(sequence + 1) * 0.6180339887, 1.0);
	const double context = what->least + (what->most - what->least) * spread;
	const double share = what->ragged ? shares[layer % SHARE_LAYERS][head % SHARE_HEADS] : 1;

	return (uint32_t)fmax(context * share, 1);
}

static void set_lengths(struct attention_bench *self, const struct attention_case *what)
{
	uint32_t most = 0;

	for (size_t row = 0; row < self->rows; row++) {
		const size_t head = row % HEADS, sequence = row / HEADS % what->sequences,
			     layer = row / HEADS / what->sequences;
		const uint32_t length = length_of(what, layer, sequence, head);

		self->lengths[row] = length;
		self->blocks += length / KVG_CUDA_BLOCK_TOKENS + 1; /* room to append */
		self->bytes += (double)length * 2 * DIM * 2;
		most = length > most ? length : most;
	}
	self->kv.row_cap = most / KVG_CUDA_BLOCK_TOKENS + 1;
}

/* Blocks in random order, as they lie after a day of serving. */
static bool set_ids(struct attention_bench *self)
{
	uint32_t *order = malloc(self->blocks * sizeof(*order)), *next = order;
	uint64_t state = 88172645463325252u;

	self->ids = calloc(self->rows * self->kv.row_cap, sizeof(*self->ids));
	if (!order || !self->ids) {
		free(order);
		return false;
	}
	for (size_t i = 0; i < self->blocks; i++)
		order[i] = (uint32_t)i;
	for (size_t i = self->blocks - 1; i > 0; i--) {
		const size_t other = random_next(&state) % (i + 1);
		const uint32_t id = order[i];

		order[i] = order[other];
		order[other] = id;
	}
	for (size_t row = 0; row < self->rows; row++) {
		const size_t count = self->lengths[row] / KVG_CUDA_BLOCK_TOKENS + 1;

		memcpy(self->ids + row * self->kv.row_cap, next, count * sizeof(*next));
		next += count;
	}
	free(order);
	return true;
}

static CUdeviceptr upload(struct gpu_bench *bench, const void *data, size_t size)
{
	const CUdeviceptr at = gpu_alloc(bench, size);

	if (at)
		(void)gpu_check(bench, bench->cuda->driver->cuMemcpyHtoD(at, data, size), "upload of tables");
	return at;
}

static bool set_cache(struct attention_bench *self)
{
	struct gpu_bench *bench = self->bench;
	const size_t half = self->blocks * self->kv.stride;
	uint32_t *appended = calloc(self->kv.max_sequences, sizeof(*appended));

	if (appended && set_ids(self)) {
		self->kv.k_base = gpu_random(bench, 2 * half, 1);
		self->kv.v_base = self->kv.k_base + half;
		self->kv.ids = upload(bench, self->ids, self->rows * self->kv.row_cap * sizeof(*self->ids));
		self->kv.base_len = upload(bench, self->lengths, self->rows * sizeof(*self->lengths));
		self->kv.appended = upload(bench, appended, self->kv.max_sequences * sizeof(*appended));
	} else {
		(void)gpu_check(bench, CUDA_ERROR_OUT_OF_MEMORY, "tables");
	}
	free(appended);
	return !bench->failed;
}

/* Slot i for sequence i, and a step's inputs and outputs. */
static bool set_step(struct attention_bench *self, uint32_t sequences)
{
	struct gpu_bench *bench = self->bench;
	uint32_t *slots = malloc(sequences * sizeof(*slots));
	CUdeviceptr device_slots;

	if (!slots)
		return !gpu_check(bench, CUDA_ERROR_OUT_OF_MEMORY, "slots");
	for (uint32_t i = 0; i < sequences; i++)
		slots[i] = i;
	device_slots = upload(bench, slots, sequences * sizeof(*slots));
	free(slots);
	self->plan =
		(struct kvg_cuda_plan){.layer_count = self->kv.layers, .sequences = sequences, .slots = device_slots};
	self->plan.memory = gpu_alloc(bench, kvg_cuda_attention_plan_size(self->attention, &self->kv, &self->plan));
	self->attend = (struct kvg_cuda_attend){.scale = 1.0f / sqrtf((float)DIM),
		.q = gpu_random(bench, sequences * (size_t)LINE * 2, 1),
		.out = gpu_alloc(bench, sequences * (size_t)LINE * 2),
		.q_stride = LINE,
		.out_stride = LINE,
		.scratch = gpu_alloc(bench, kvg_cuda_attention_scratch_size(self->attention, &self->kv, &self->plan))};
	self->k = gpu_random(bench, sequences * (size_t)HEADS * DIM * 2, 1);
	self->v = gpu_random(bench, sequences * (size_t)HEADS * DIM * 2, 1);
	self->append = (struct kvg_cuda_append){.tokens = sequences,
		.slots = device_slots,
		.k = self->k,
		.v = self->v,
		.k_stride = (uint64_t)HEADS * DIM,
		.v_stride = (uint64_t)HEADS * DIM};
	self->export = (struct kvg_cuda_export){.sequences = sequences, .slots = device_slots};
	return !bench->failed;
}

static void clear(struct attention_bench *self)
{
	struct gpu_bench *bench = self->bench;

	gpu_free(bench, self->kv.k_base);
	gpu_free(bench, self->kv.ids);
	gpu_free(bench, self->kv.base_len);
	gpu_free(bench, self->kv.appended);
	gpu_free(bench, self->plan.slots);
	gpu_free(bench, self->plan.memory);
	gpu_free(bench, self->attend.q);
	gpu_free(bench, self->attend.out);
	gpu_free(bench, self->attend.scratch);
	gpu_free(bench, self->k);
	gpu_free(bench, self->v);
	gpu_free(bench, self->indptr);
	gpu_free(bench, self->indices);
	gpu_free(bench, self->last_page_len);
	free(self->lengths);
	free(self->ids);
	(void)kvg_cuda_attention_free(self->attention);
}

static bool prepare(struct attention_bench *self, struct gpu_bench *bench, const struct attention_case *what)
{
	*self = (struct attention_bench){.bench = bench,
		.rows = (size_t)what->layers * what->sequences * HEADS,
		.kv = {.stride = KVG_CUDA_BLOCK_TOKENS * DIM * 2,
			.layers = what->layers,
			.heads = HEADS,
			.max_sequences = what->sequences,
			.group = GROUP,
			.k_dim = DIM,
			.v_dim = DIM,
			.dtype = KVG_KERNEL_BF16}};
	self->lengths = malloc(self->rows * sizeof(*self->lengths));
	if (!self->lengths)
		return !gpu_check(bench, CUDA_ERROR_OUT_OF_MEMORY, "lengths");
	if (gpu_check(bench, kvg_cuda_attention_new(bench->cuda, &self->attention), "attention kernels"))
		return false;
	set_lengths(self, what);
	return set_cache(self) && set_step(self, what->sequences);
}

/* ---- the works ---- */

/* One step's plan and the attention of every layer. */
static CUresult work_attend(void *user, CUstream stream, unsigned turn)
{
	struct attention_bench *self = user;
	CUresult result = kvg_cuda_attention_plan(self->attention, &self->kv, &self->plan, stream);

	(void)turn;
	for (uint32_t layer = 0; layer < self->kv.layers && result == CUDA_SUCCESS; layer++) {
		self->attend.layer = layer;
		result = kvg_cuda_attention_attend(self->attention, &self->kv, &self->plan, &self->attend, stream);
	}
	return result;
}

static CUresult work_append(void *user, CUstream stream, unsigned turn)
{
	struct attention_bench *self = user;
	CUresult result = CUDA_SUCCESS;

	(void)turn;
	for (uint32_t layer = 0; layer < self->kv.layers && result == CUDA_SUCCESS; layer++) {
		self->append.layer = layer;
		result = kvg_cuda_attention_append(self->attention, &self->kv, &self->append, stream);
	}
	return result;
}

static CUresult work_table(void *user, CUstream stream, unsigned turn)
{
	struct attention_bench *self = user;

	self->export.layer = turn % self->kv.layers;
	return kvg_cuda_attention_export_table(self->attention, &self->kv, &self->export, self->indices,
		self->kv.row_cap, self->last_page_len, stream);
}

static CUresult work_csr(void *user, CUstream stream, unsigned turn)
{
	struct attention_bench *self = user;

	self->export.layer = turn % self->kv.layers;
	return kvg_cuda_attention_export_csr(
		self->attention, &self->kv, &self->export, self->indptr, self->indices, self->last_page_len, stream);
}

/* ---- the rows ---- */

static void row_attend(struct attention_bench *self, const struct attention_case *what)
{
	const double layers = what->layers, us = gpu_time(self->bench, work_attend, self, true);
	const struct gpu_row row = {.id = what->id,
		.work = what->work,
		.us = us / layers,
		.floor_us = self->bytes / layers / self->bench->copy_rate * 1e6,
		.floor = "K and V of all pairs at the rate of a copy",
		.rival = "torch SDPA, dense over the same bytes",
		.first_ratio = what->barred ? 0.75 : 0,
		.then_ratio = what->barred ? 0.85 : 0,
		.ratio_of_floor = true,
		.rate = self->bytes / us * 1e6};

	gpu_row(self->bench, &row);
}

static void row_append(struct attention_bench *self)
{
	const double layers = self->kv.layers, us = gpu_time(self->bench, work_append, self, true);
	const double tokens = 2.0 * 2 * DIM * 2 * HEADS * self->append.tokens; /* read and written */
	const struct gpu_row row = {.id = "append-b128",
		.work = "a token of each of 128 sequences into its rows, one layer of 6 in one graph",
		.us = us / layers,
		.floor_us = tokens / self->bench->copy_rate * 1e6,
		.floor = "the tokens read and written once: nothing held is copied"};

	gpu_row(self->bench, &row);
}

static void row_exports(struct attention_bench *self)
{
	const size_t rows = self->export.sequences * (size_t)HEADS;
	struct gpu_row row = {.id = "export-table-b128",
		.work = "padded block table and lengths of one layer, 128 sequences x 8 heads",
		.floor_us = 2.0 * (double)(rows * self->kv.row_cap) * 4 / self->bench->copy_rate * 1e6,
		.floor = "the table read and written once"};

	self->indices = gpu_alloc(self->bench, rows * self->kv.row_cap * 4);
	self->indptr = gpu_alloc(self->bench, (rows + 1) * 4);
	self->last_page_len = gpu_alloc(self->bench, rows * 4);
	if (self->bench->failed)
		return;
	row.us = gpu_time(self->bench, work_table, self, true);
	gpu_row(self->bench, &row);
	row.id = "export-csr-b128";
	row.work = "the same as CSR";
	row.floor_us = 2.0 * (double)self->blocks / self->kv.layers * 4 / self->bench->copy_rate * 1e6;
	row.floor = "the ids read and written once";
	row.us = gpu_time(self->bench, work_csr, self, true);
	gpu_row(self->bench, &row);
}

/* Whether the rows of append and export are measured with this one. */
static bool has_tables(const struct attention_case *what)
{
	return what->sequences == 128 && what->barred;
}

static bool wanted(const struct gpu_bench *bench, const struct attention_case *what)
{
	return gpu_wants(bench, what->id) ||
	       (has_tables(what) && (gpu_wants(bench, "append-b128") || gpu_wants(bench, "export-table-b128") ||
					    gpu_wants(bench, "export-csr-b128")));
}

static void run_case(struct gpu_bench *bench, const struct attention_case *what)
{
	struct attention_bench self;

	if (!wanted(bench, what))
		return;
	if (prepare(&self, bench, what)) {
		if (gpu_wants(bench, what->id))
			row_attend(&self, what);
		if (has_tables(what)) {
			row_append(&self);
			row_exports(&self);
		}
	}
	clear(&self);
}

void gpu_bench_attention(struct gpu_bench *bench)
{
	static const struct attention_case cases[] = {
		{"attend-b1-38400", "decode attention, one layer of a step of 36: 1 sequence x 8 heads x 38400 pairs",
			1, 36, 38400, 38400, false, true},
		{"attend-ragged-b1", "a gate's 30% of 128000 tokens (38400 on average), ragged; a step of 12 layers", 1,
			12, 128000, 128000, true, true},
		{"attend-ragged-b16", "16 sequences, a gate's 30% of 16k to 32k tokens; a step of 12 layers", 16, 12,
			16384, 32768, true, true},
		{"attend-ragged-b128", "128 sequences, a gate's 30% of 16k to 32k tokens; a step of 6 layers", 128, 6,
			16384, 32768, true, true},
		{"attend-ragged-b1-24k", "1 sequence, a gate's 30% of 24k tokens: little to read; a step of 36 layers",
			1, 36, 24000, 24000, true, false},
		{"attend-short-b128", "128 sequences, a gate's 30% of 500 to 2500 tokens; a step of 12 layers", 128, 12,
			500, 2500, true, false},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases) && !bench->failed; i++)
		run_case(bench, &cases[i]);
}
