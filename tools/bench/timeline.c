/*
 * kvgate-bench timeline: a recorded prefill, chunk by chunk, of a worker whose chunks are evicted by the daemon.
 *
 * The worker's stream writes the device's clock before and after a chunk's kernels, when the daemon's semaphore
 * says that the chunk is scored, and when the eviction is done; the CPU notes when it has enqueued what. Both clocks
 * are put on one scale. What must hold: at the moment a chunk's last kernel ends, the CPU has long handed over
 * the chunk's eviction and the next chunk's first kernels, so that nothing between a chunk and its eviction waits for
 * the CPU of the worker. Hidden states are scored in place, in the worker's own memory.
 */
#include "tools/bench/insitu.h"

#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/size.h"
#include "tools/bench/bench.h"
#include "tools/bench/insitu_worker.h"

#define CHUNK  4096u
#define CHUNKS 5u
#define RATIO  0.3
#define PROBES 100u

/* Seconds on the CPU's clock. */
struct moments {
	double enqueue, enqueued;   /* the CPU begins with the chunk's kernels, and is done */
	double handed_over;         /* scoring and eviction are enqueued */
	double next_enqueued, back; /* the next chunk's first kernels are; the CPU knows of the next chunk's room */
	double begin, end;          /* the stream: the chunk's kernels */
	double scored, evicted;     /* the stream meets the daemon's semaphores */
	uint64_t pairs_held, pairs_dropped;
};

enum stamp { BEGIN, END, SCORED, EVICTED, STAMPS };

struct timeline {
	struct rig rig;
	struct rig_options options;
	bool mps;
	uint32_t chunk;
	const char *json, *svg; /* where to write; NULL: standard output, nowhere */
	uint64_t seq;
	CUdeviceptr stamps;         /* uint64 [CHUNKS][STAMPS] */
	CUdeviceptr slots, index;   /* of a chunk's tokens */
	double offset, uncertainty; /* seconds to add to the device's clock, and how well that is known */
	struct moments moments[CHUNKS];
};

static const struct kvg_cuda_driver *driver(const struct timeline *t)
{
	return t->rig.synthetic->cuda->driver;
}

/* ---- clocks ---- */

static CUresult stamp(const struct timeline *t, uint32_t chunk, enum stamp what)
{
	return synthetic_clock(t->rig.synthetic, t->stamps + (chunk * STAMPS + (uint32_t)what) * sizeof(uint64_t),
		t->rig.synthetic->stream);
}

/* One reading of the device's clock between two of the CPU's. */
static CUresult probe(
	struct timeline *t, volatile uint64_t *word, CUdeviceptr address, double *ret_offset, double *ret_width)
{
	double before, after;
	CUresult result;

	*word = 0;
	before = service_seconds();
	result = synthetic_clock(t->rig.synthetic, address, t->rig.synthetic->stream);
	if (result == CUDA_SUCCESS)
		result = driver(t)->cuStreamSynchronize(t->rig.synthetic->stream);
	after = service_seconds();
	*ret_width = after - before;
	*ret_offset = (before + after) / 2 - (double)*word / 1e9;
	return result;
}

static int align_clocks(struct timeline *t)
{
	void *word = NULL;
	CUdeviceptr address = 0;
	CUresult result = driver(t)->cuMemHostAlloc(&word, sizeof(uint64_t), CU_MEMHOSTALLOC_DEVICEMAP);

	if (result == CUDA_SUCCESS)
		result = driver(t)->cuMemHostGetDevicePointer(&address, word, 0);
	t->uncertainty = 1;
	for (unsigned i = 0; result == CUDA_SUCCESS && i < PROBES; i++) {
		double offset, width;

		result = probe(t, word, address, &offset, &width);
		if (width / 2 < t->uncertainty) {
			t->uncertainty = width / 2;
			t->offset = offset;
		}
	}
	if (word)
		(void)driver(t)->cuMemFreeHost(word);
	return rig_driver(&t->rig, result, "clock");
}

static int read_stamps(struct timeline *t)
{
	uint64_t ns[CHUNKS][STAMPS];
	int r = rig_driver(&t->rig, driver(t)->cuMemcpyDtoH(ns, t->stamps, sizeof(ns)), "stamps");

	for (uint32_t i = 0; r == 0 && i < CHUNKS; i++) {
		t->moments[i].begin = (double)ns[i][BEGIN] / 1e9 + t->offset;
		t->moments[i].end = (double)ns[i][END] / 1e9 + t->offset;
		t->moments[i].scored = (double)ns[i][SCORED] / 1e9 + t->offset;
		t->moments[i].evicted = (double)ns[i][EVICTED] / 1e9 + t->offset;
	}
	return r;
}

/* ---- a chunk ---- */

/* The first kernels of a chunk need no room for KV. */
static int enqueue_first(struct timeline *t, uint32_t chunk)
{
	CUresult result = stamp(t, chunk, BEGIN);

	t->moments[chunk].enqueue = service_seconds();
	if (result == CUDA_SUCCESS)
		result = model_before(t->rig.model, 0);
	return rig_driver(&t->rig, result, "first kernels");
}

static int enqueue_append(struct timeline *t, uint32_t layer)
{
	const uint16_t *k = (const uint16_t *)(uintptr_t)model_qkv(t->rig.model, layer) + MODEL_Q;
	uint32_t columns = model_columns(t->rig.model);

	return rig_client(&t->rig,
		kvg_cuda_append(t->rig.client, layer, t->chunk, (const uint32_t *)(uintptr_t)t->slots,
			(const uint32_t *)(uintptr_t)t->index, k, columns, k + MODEL_KV, columns),
		"append");
}

static int enqueue_rest(struct timeline *t, uint32_t chunk)
{
	int r = 0;

	for (uint32_t layer = 0; r == 0 && layer < t->options.layers; layer++) {
		if (layer)
			r = rig_driver(&t->rig, model_before(t->rig.model, layer), "product");
		if (r == 0)
			r = enqueue_append(t, layer);
		if (r == 0)
			r = rig_driver(&t->rig, model_after(t->rig.model, layer), "product");
	}
	if (r == 0)
		r = rig_driver(&t->rig, stamp(t, chunk, END), "stamp");
	t->moments[chunk].enqueued = service_seconds();
	return r;
}

static int hand_over(struct timeline *t, uint32_t chunk)
{
	struct kvg_client *client = t->rig.client;
	uint64_t layer_stride = model_hidden(t->rig.model, 1) - model_hidden(t->rig.model, 0);
	int r = kvg_commit(client, t->seq, t->chunk);

	if (r == 0)
		r = kvg_stage_device(client, t->seq, KVG_STAGE_HIDDEN, 0, t->options.layers, chunk * t->chunk, t->chunk,
			(const void *)(uintptr_t)model_hidden(t->rig.model, 0), layer_stride);
	if (r == 0)
		r = kvg_stream_wait(client, t->seq);
	if (r == 0)
		r = rig_driver(&t->rig, stamp(t, chunk, SCORED), "stamp");
	if (r == 0)
		r = kvg_evict_async(client, t->seq, KVG_EVICT_PREFILL);
	if (r == 0)
		r = rig_driver(&t->rig, stamp(t, chunk, EVICTED), "stamp");
	if (r == 0 && chunk + 1 < CHUNKS)
		r = kvg_reserve_async(client, t->seq, t->chunk);
	t->moments[chunk].handed_over = service_seconds();
	return rig_client(&t->rig, r, "hand over");
}

static int take_back(struct timeline *t, uint32_t chunk)
{
	struct kvg_evict_result result;
	int r = kvg_evict_finish(t->rig.client, t->seq, &result);

	if (r == 0 && chunk + 1 < CHUNKS)
		r = kvg_reserve_finish(t->rig.client, t->seq);
	t->moments[chunk].back = service_seconds();
	if (r == 0) {
		t->moments[chunk].pairs_held = result.pairs_held;
		t->moments[chunk].pairs_dropped = result.pairs_dropped;
	}
	return rig_client(&t->rig, r, "end of an eviction");
}

static int run_chunk(struct timeline *t, uint32_t chunk)
{
	int r = chunk ? 0 : enqueue_first(t, chunk);

	if (r == 0)
		r = enqueue_rest(t, chunk);
	if (r == 0)
		r = hand_over(t, chunk);
	if (r == 0 && chunk + 1 < CHUNKS)
		r = enqueue_first(t, chunk + 1);
	t->moments[chunk].next_enqueued = service_seconds();
	return r == 0 ? take_back(t, chunk) : r;
}

/* ---- the recording ---- */

static int upload_index(struct timeline *t)
{
	uint32_t *numbers = malloc(t->chunk * sizeof(*numbers));
	size_t size = t->chunk * sizeof(*numbers);
	CUresult result = numbers ? driver(t)->cuMemAlloc(&t->index, size) : CUDA_ERROR_OUT_OF_MEMORY;

	for (uint32_t i = 0; numbers && i < t->chunk; i++)
		numbers[i] = i;
	if (result == CUDA_SUCCESS)
		result = driver(t)->cuMemcpyHtoD(t->index, numbers, size);
	if (result == CUDA_SUCCESS)
		result = driver(t)->cuMemAlloc(&t->slots, size);
	if (result == CUDA_SUCCESS)
		result = driver(t)->cuMemsetD32Async(t->slots, (uint32_t)t->seq, t->chunk, t->rig.synthetic->stream);
	if (result == CUDA_SUCCESS)
		result = driver(t)->cuMemAlloc(&t->stamps, sizeof(uint64_t) * CHUNKS * STAMPS);
	free(numbers);
	return rig_driver(&t->rig, result, "upload");
}

static int begin_sequence(struct timeline *t)
{
	const struct kvg_policy policy = {.ratio = RATIO,
		.mode = KVG_MODE_CHUNKED,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.context_tokens = CHUNKS * t->chunk,
		.chunk_tokens = t->chunk,
		.window = 128};
	uint64_t layer = model_hidden(t->rig.model, 1) - model_hidden(t->rig.model, 0);
	uint32_t id;
	int r = rig_client(&t->rig, kvg_create(t->rig.client, &policy, &t->seq), "create");

	if (r == 0)
		r = rig_client(&t->rig, kvg_reserve(t->rig.client, t->seq, t->chunk), "reserve");
	if (r == 0)
		r = rig_client(&t->rig,
			kvg_import_buffer(t->rig.client, (const void *)(uintptr_t)model_hidden(t->rig.model, 0),
				layer * t->options.layers, &id),
			"import");
	return r == 0 ? upload_index(t) : r;
}

/* Kernels that are loaded when they are first used would hold up the recording. */
static int warm_up(struct timeline *t)
{
	int r = rig_driver(&t->rig, model_before(t->rig.model, 0), "product");

	if (r == 0)
		r = enqueue_append(t, 0);
	if (r == 0)
		r = rig_driver(&t->rig, model_after(t->rig.model, 0), "product");
	if (r == 0)
		r = rig_driver(&t->rig, driver(t)->cuStreamSynchronize(t->rig.synthetic->stream), "warm-up");
	return r;
}

static int record(struct timeline *t)
{
	int r = rig_open(&t->rig, &t->options);

	if (r == 0)
		r = begin_sequence(t);
	if (r == 0)
		r = warm_up(t);
	if (r == 0)
		r = align_clocks(t);
	for (uint32_t chunk = 0; r == 0 && chunk < CHUNKS; chunk++)
		r = run_chunk(t, chunk);
	if (r == 0)
		r = rig_driver(&t->rig, driver(t)->cuStreamSynchronize(t->rig.synthetic->stream), "end");
	return r == 0 ? read_stamps(t) : r;
}

/* ---- the report ---- */

/* How long before the end of the chunk's last kernel the CPU had enqueued the eviction and what follows. */
static double lead(const struct moments *m)
{
	return m->end - m->next_enqueued;
}

static bool holds(const struct timeline *t)
{
	for (uint32_t i = 0; i < CHUNKS; i++)
		if (lead(&t->moments[i]) <= t->uncertainty)
			return false;
	return true;
}

static json_t *moments_json(const struct moments *m, double zero)
{
	return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I}", "cpu_enqueue_ms",
		1e3 * (m->enqueue - zero), "cpu_enqueued_ms", 1e3 * (m->enqueued - zero), "cpu_handed_over_ms",
		1e3 * (m->handed_over - zero), "cpu_next_enqueued_ms", 1e3 * (m->next_enqueued - zero), "cpu_back_ms",
		1e3 * (m->back - zero), "stream_begin_ms", 1e3 * (m->begin - zero), "stream_end_ms",
		1e3 * (m->end - zero), "stream_scored_ms", 1e3 * (m->scored - zero), "stream_evicted_ms",
		1e3 * (m->evicted - zero), "lead_ms", 1e3 * lead(m), "pairs_held", (json_int_t)m->pairs_held,
		"pairs_dropped", (json_int_t)m->pairs_dropped);
}

static int write_json(const struct timeline *t, const char *path)
{
	double zero = t->moments[0].enqueue;
	json_t *chunks = json_array(), *json;
	int r = 0;

	for (uint32_t i = 0; i < CHUNKS; i++)
		(void)json_array_append_new(chunks, moments_json(&t->moments[i], zero));
	json = json_pack("{s:s, s:s, s:b, s:i, s:i, s:f, s:b, s:o}", "device", t->rig.status.device, "driver",
		t->rig.status.driver, "mps", t->rig.status.mps, "layers", (int)t->options.layers, "chunk_tokens",
		(int)t->chunk, "clock_uncertainty_us", 1e6 * t->uncertainty, "worker_never_waits", holds(t), "chunks",
		chunks);
	if (!path) {
		r = json_dumpf(json, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
		(void)fputc('\n', stdout);
	} else {
		r = json_dump_file(json, path, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
	}
	json_decref(json);
	return r < 0 ? -EIO : 0;
}

#define LANE_LEFT   150.0
#define LANE_WIDTH  1000.0
#define LANE_HEIGHT 26.0
#define LANE_STEP   44.0
#define LANE_TOP    46.0

struct drawing {
	FILE *file;
	double zero, span;
};

static void bar(const struct drawing *d, unsigned lane, double from, double to, const char *colour, const char *text)
{
	double x = LANE_LEFT + (from - d->zero) / d->span * LANE_WIDTH, width = (to - from) / d->span * LANE_WIDTH;
	double y = LANE_TOP + lane * LANE_STEP;

	(void)fprintf(d->file,
		"<rect x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"%.1f\" fill=\"%s\"><title>%s: %.3f to %.3f "
		"ms</title></rect>\n",
		x, y, width > 0.8 ? width : 0.8, LANE_HEIGHT, colour, text, 1e3 * (from - d->zero),
		1e3 * (to - d->zero));
	if (width > 8 * (double)strlen(text))
		(void)fprintf(d->file, "<text x=\"%.1f\" y=\"%.1f\" fill=\"#fff\">%s</text>\n", x + 4, y + 18, text);
}

static void draw_chunk(const struct drawing *d, const struct moments *m, uint32_t chunk)
{
	char text[32];

	(void)snprintf(text, sizeof(text), "chunk %u", chunk);
	bar(d, 0, m->enqueue, m->enqueued, "#4878a8", text);
	bar(d, 0, m->enqueued, m->handed_over, "#d07830", "stage, evict");
	bar(d, 0, m->handed_over, m->next_enqueued, "#4878a8", "next");
	bar(d, 1, m->begin, m->end, "#4878a8", text);
	bar(d, 2, m->end, m->scored, "#58904c", "scores");
	bar(d, 2, m->scored, m->evicted, "#d07830", "evicts");
}

static void draw_scale(const struct drawing *d)
{
	static const char *const lanes[] = {"worker's CPU enqueues", "worker's stream", "daemon's stream"};

	for (unsigned i = 0; i < 3; i++)
		(void)fprintf(d->file, "<text x=\"4\" y=\"%.1f\" fill=\"#888\">%s</text>\n",
			LANE_TOP + i * LANE_STEP + 18, lanes[i]);
	for (unsigned i = 0; i <= 10; i++)
		(void)fprintf(d->file,
			"<line x1=\"%.1f\" x2=\"%.1f\" y1=\"34\" y2=\"170\" stroke=\"#888\" stroke-opacity=\"0.3\"/>"
			"<text x=\"%.1f\" y=\"28\" fill=\"#888\" text-anchor=\"middle\">%.1f ms</text>\n",
			LANE_LEFT + i * LANE_WIDTH / 10, LANE_LEFT + i * LANE_WIDTH / 10,
			LANE_LEFT + i * LANE_WIDTH / 10, 1e3 * d->span * i / 10);
}

static int write_svg(const struct timeline *t, const char *path)
{
	struct drawing d = {.file = fopen(path, "we"),
		.zero = t->moments[0].enqueue,
		.span = (t->moments[CHUNKS - 1].evicted - t->moments[0].enqueue) * 1.01};

	if (!d.file) {
		(void)fprintf(stderr, "kvgate-bench: %s: %s\n", path, strerror(errno));
		return -errno;
	}
	(void)fprintf(d.file, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 1180 180\" "
			      "font-family=\"sans-serif\" font-size=\"12\">\n");
	draw_scale(&d);
	for (uint32_t i = 0; i < CHUNKS; i++)
		draw_chunk(&d, &t->moments[i], i);
	(void)fprintf(d.file, "</svg>\n");
	return fclose(d.file) == 0 ? 0 : -EIO;
}

/* ---- the command ---- */

static int parse(int argc, char **argv, struct timeline *t)
{
	static const struct option options[] = {{"json", required_argument, NULL, 'j'},
		{"svg", required_argument, NULL, 's'}, {"mps", no_argument, NULL, 'm'},
		{"layers", required_argument, NULL, 'l'}, {"chunk", required_argument, NULL, 'c'},
		{"extent", required_argument, NULL, 'x'}, {"device", required_argument, NULL, 'd'},
		{"kvgated", required_argument, NULL, 'g'}, {NULL, 0, NULL, 0}};
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (option == 'j')
			t->json = strcmp(optarg, "-") == 0 ? NULL : optarg;
		else if (option == 's')
			t->svg = optarg;
		else if (option == 'm')
			t->mps = true;
		else if (option == 'l')
			t->options.layers = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'c')
			t->chunk = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'x' && kvg_size_parse(optarg, &t->options.extent) == 0)
			continue;
		else if (option == 'd')
			t->options.device = (int)strtol(optarg, NULL, 10);
		else if (option == 'g')
			t->options.kvgated = optarg;
		else
			return BENCH_USAGE;
	}
	if (optind == argc && t->options.layers >= 2 && t->options.layers <= MODEL_LAYERS && t->chunk >= 256 &&
		t->chunk <= 65536)
		return BENCH_OK;
	return BENCH_USAGE;
}

static int judge(const struct timeline *t)
{
	if (holds(t))
		return 0;
	(void)fprintf(stderr, "kvgate-bench: timeline: a chunk ended before its eviction was handed over\n");
	return -EIO;
}

static int record_and_report(void *user)
{
	struct timeline *t = user;
	int r = record(t);

	if (r == 0)
		r = write_json(t, t->json);
	if (r == 0 && t->svg)
		r = write_svg(t, t->svg);
	if (r == 0)
		r = judge(t);
	return rig_close(&t->rig) < 0 ? -EIO : r;
}

int bench_timeline(int argc, char **argv)
{
	struct timeline t = {.options = {.layers = MODEL_LAYERS, .sequences = 1}, .chunk = CHUNK};

	if (parse(argc, argv, &t) != BENCH_OK) {
		(void)fprintf(stderr,
			"usage: kvgate-bench timeline [--json FILE|-] [--svg FILE] [--mps] [--layers 2..%u]\n"
			"                             [--chunk 256..65536] [--extent SIZE] [--device N] "
			"[--kvgated PROGRAM]\n",
			MODEL_LAYERS);
		return BENCH_USAGE;
	}
	t.options.rows = t.chunk;
	t.options.max_tokens = CHUNKS * t.chunk + KVG_STRIPE_TOKENS;
	t.options.pool =
		((uint64_t)1 << 30) + (uint64_t)t.options.layers * MODEL_HEADS * MODEL_DIM * 4 * (CHUNKS + 1) * t.chunk;
	return rig_run(t.mps, record_and_report, &t) < 0 ? BENCH_FAIL : BENCH_OK;
}
