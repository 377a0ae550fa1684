/*
 * kvgate-bench insitu: what scoring and eviction cost a worker that decodes. The worker runs the products of an 8B
 * model and attention over kvgate's tables, a CUDA graph for each step; in every second round its rows are
 * also gathered and staged, and each sequence is evicted to its budget every 128 tokens. Events of different sequences
 * are spread over the steps, and a sequence sits out the steps that its own takes, as in an engine with continuous
 * batching; with --together all have theirs at once, and the step waits. With --transfers those rounds have neither,
 * but a second worker beside it whose sequence goes to the host tier and back without end. Both kinds of round read
 * rows of the same lengths: in those without, the counters of appended tokens are set back every 128 tokens.
 */
#include "tools/bench/insitu.h"

#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/size.h"
#include "tools/bench/bench.h"
#include "tools/bench/insitu_run.h"

#define ROUNDS 5u
#define EVENTS 2u /* of a round */

static const uint32_t *slots(const struct insitu *s)
{
	return (const uint32_t *)(uintptr_t)s->slots;
}

/* ---- a step ---- */

static struct synthetic_gather_args gather_args(const struct insitu *s)
{
	const struct model *model = s->rig.model;
	struct synthetic_gather_args args = {.appended = s->rig.view.appended,
		.slots = slots(s),
		.source = (const uint8_t *)(uintptr_t)model_hidden(model, 0),
		.source_layer = model_hidden(model, 1) - model_hidden(model, 0),
		.source_row = MODEL_HIDDEN * 2,
		.source_rows = model_hidden_rows(model),
		.capacity = INSITU_EVENT,
		.row_bytes = s->row_bytes,
		.to = (uint8_t *)(uintptr_t)s->rows};

	if (s->options.wide) {
		args.source = (const uint8_t *)(uintptr_t)model_qkv(model, 0) + MODEL_QKV * 2;
		args.source_layer = model_qkv(model, 1) - model_qkv(model, 0);
		args.source_row = model_columns(model) * 2;
		args.source_rows = 0;
	}
	return args;
}

static int enqueue_layer(struct insitu *s, uint32_t layer)
{
	struct rig *rig = &s->rig;
	uint32_t columns = model_columns(rig->model);
	const uint16_t *q = (const uint16_t *)(uintptr_t)model_qkv(rig->model, layer), *k = q + MODEL_Q;
	void *out = (void *)(uintptr_t)model_attention(rig->model);
	int r = rig_driver(rig, model_before(rig->model, layer), "product");

	if (r == 0)
		r = kvg_cuda_append(
			rig->client, layer, s->options.sequences, slots(s), NULL, k, columns, k + MODEL_KV, columns);
	if (r == 0)
		r = kvg_cuda_attend(rig->client, layer, 1 / sqrtf((float)MODEL_DIM), q, columns, out, MODEL_Q);
	if (r < 0)
		return rig_client(rig, r, "attention");
	return rig_driver(rig, model_after(rig->model, layer), "product");
}

static int enqueue_step(struct insitu *s, bool with)
{
	const struct synthetic_gather_args args = gather_args(s);
	struct rig *rig = &s->rig;
	int r = rig_client(
		rig, kvg_cuda_plan(rig->client, 0, s->options.layers, s->options.sequences, slots(s), 1), "plan");

	for (uint32_t layer = 0; r == 0 && layer < s->options.layers; layer++)
		r = enqueue_layer(s, layer);
	if (r == 0 && with)
		r = rig_driver(rig, synthetic_gather(rig->synthetic, &args, s->options.sequences, s->options.layers),
			"gather");
	if (r == 0)
		r = rig_client(rig, kvg_cuda_advance(rig->client, slots(s), s->options.sequences, 1), "advance");
	return r;
}

static int capture(struct insitu *s, bool with)
{
	CUstream stream = s->rig.synthetic->stream;
	CUgraph graph = NULL;
	CUresult result = insitu_driver(s)->cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_RELAXED);
	int r = rig_driver(&s->rig, result, "capture");

	if (r < 0)
		return r;
	r = enqueue_step(s, with && !s->transfers);
	result = insitu_driver(s)->cuStreamEndCapture(stream, &graph);
	if (r == 0 && result == CUDA_SUCCESS)
		result = insitu_driver(s)->cuGraphInstantiate(&s->graphs[with], graph, 0);
	if (graph)
		(void)insitu_driver(s)->cuGraphDestroy(graph);
	return r < 0 ? r : rig_driver(&s->rig, result, "graph");
}

/* ---- the sequences ---- */

struct prompt {
	CUdeviceptr k, v, slots, index;
};

static int upload(struct insitu *s, const uint32_t *words, uint32_t count, CUdeviceptr *ret)
{
	CUresult result = insitu_driver(s)->cuMemAlloc(ret, count * sizeof(*words));

	if (result == CUDA_SUCCESS)
		result = insitu_driver(s)->cuMemcpyHtoD(*ret, words, count * sizeof(*words));
	return rig_driver(&s->rig, result, "upload");
}

static int append_prompt(struct insitu *s, uint32_t sequence, struct prompt *prompt)
{
	struct rig *rig = &s->rig;
	int r = rig_driver(rig,
		insitu_driver(s)->cuMemsetD32Async(
			prompt->slots, (uint32_t)s->sequences[sequence].seq, s->budget, rig->synthetic->stream),
		"slots");

	for (uint32_t layer = 0; r == 0 && layer < s->options.layers; layer++)
		r = rig_client(rig,
			kvg_cuda_append(rig->client, layer, s->budget, (const uint32_t *)(uintptr_t)prompt->slots,
				(const uint32_t *)(uintptr_t)prompt->index, (const void *)(uintptr_t)prompt->k,
				MODEL_KV, (const void *)(uintptr_t)prompt->v, MODEL_KV),
			"append");
	return r;
}

/* A prompt that fills the budget, folded. */
static int begin_sequence(struct insitu *s, uint32_t sequence, struct prompt *prompt, uint64_t *random)
{
	const struct kvg_policy policy = {.ratio = 1,
		.mode = KVG_MODE_OFF,
		.context_tokens = s->budget,
		.max_new_tokens = s->options.max_tokens - s->budget,
		.budget = s->budget};
	struct rig *rig = &s->rig;
	int r = rig_client(rig, kvg_create(rig->client, &policy, &s->sequences[sequence].seq), "create");

	if (r == 0)
		r = rig_client(rig, kvg_reserve(rig->client, s->sequences[sequence].seq, s->budget), "reserve");
	if (r == 0)
		r = append_prompt(s, sequence, prompt);
	if (r == 0)
		r = rig_stage_scores(rig, s->sequences[sequence].seq, s->options.layers, 0, s->budget, random);
	if (r == 0)
		r = rig_client(rig, kvg_commit(rig->client, s->sequences[sequence].seq, s->budget), "commit");
	if (r == 0)
		r = rig_client(
			rig, kvg_evict(rig->client, s->sequences[sequence].seq, KVG_EVICT_DECODE, NULL), "evict");
	if (r == 0)
		r = rig_client(rig, kvg_reserve(rig->client, s->sequences[sequence].seq, INSITU_EVENT), "reserve");
	return r;
}

static int begin_sequences(struct insitu *s)
{
	uint32_t budget = s->budget, *numbers = calloc(budget + INSITU_SEQUENCES, sizeof(*numbers));
	struct prompt prompt = {.k = model_random_kv(s->rig.model, budget), .v = model_random_kv(s->rig.model, budget)};
	uint64_t random = 1;
	int r = numbers && prompt.k && prompt.v ? 0 : -ENOMEM;

	for (uint32_t i = 0; numbers && i < budget; i++)
		numbers[i] = i;
	if (r == 0)
		r = upload(s, numbers, s->budget, &prompt.index);
	if (r == 0)
		r = upload(s, numbers, s->budget, &prompt.slots);
	for (uint32_t i = 0; r == 0 && i < s->options.sequences; i++) {
		r = begin_sequence(s, i, &prompt, &random);
		s->sequences[i].pos = s->budget;
		numbers[i] = (uint32_t)s->sequences[i].seq;
	}
	if (r == 0)
		r = upload(s, numbers, s->options.sequences, &s->slots);
	(void)insitu_driver(s)->cuMemFree(prompt.k);
	(void)insitu_driver(s)->cuMemFree(prompt.v);
	(void)insitu_driver(s)->cuMemFree(prompt.index);
	(void)insitu_driver(s)->cuMemFree(prompt.slots);
	free(numbers);
	return r;
}

/* Rows lie in a buffer of the worker's own, which the daemon reads in place. */
static int make_rows(struct insitu *s)
{
	uint64_t size;
	uint32_t id;
	int r;

	s->row_bytes = (s->options.wide ? MODEL_GATE : MODEL_HIDDEN) * 2;
	size = (uint64_t)s->options.sequences * s->options.layers * INSITU_EVENT * s->row_bytes;
	r = rig_driver(&s->rig, insitu_driver(s)->cuMemAlloc(&s->rows, size), "rows");
	if (r == 0)
		r = rig_client(&s->rig, kvg_import_buffer(s->rig.client, (const void *)(uintptr_t)s->rows, size, &id),
			"import");
	return r;
}

static int run(struct insitu *s)
{
	int r = s->transfers ? neighbour_fork(&s->neighbour, s->options.device, s->options.layers) : 0;

	if (r == 0)
		r = rig_open(&s->rig, &s->options);
	if (r == 0)
		r = begin_sequences(s);
	if (r == 0)
		r = make_rows(s);
	if (r == 0)
		r = enqueue_step(s, true); /* loads what is loaded late */
	for (uint32_t i = 0; r == 0 && i < s->options.sequences; i++)
		r = insitu_set_counter(s, i, 0);
	for (int i = 0; r == 0 && i < 2; i++)
		r = capture(s, i != 0);
	if (r == 0)
		r = rig_driver(&s->rig, insitu_driver(s)->cuEventCreate(&s->step, CU_EVENT_DISABLE_TIMING), "event");
	if (r == 0 && s->transfers)
		r = neighbour_open(&s->neighbour, &s->rig.service);
	return r == 0 ? insitu_rounds(s) : r;
}

/* ---- the report ---- */

static int compare(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return a < b ? -1 : a > b;
}

static double median(const double *values, uint32_t count)
{
	double sorted[INSITU_ROUNDS_MAX];

	memcpy(sorted, values, count * sizeof(*values));
	qsort(sorted, count, sizeof(*sorted), compare);
	return count % 2 ? sorted[count / 2] : (sorted[count / 2 - 1] + sorted[count / 2]) / 2;
}

static json_t *array(const double *values, uint32_t count)
{
	json_t *json = json_array();

	for (uint32_t i = 0; i < count; i++)
		(void)json_array_append_new(json, json_real(values[i]));
	return json;
}

static void report(const struct insitu *s)
{
	double without = median(s->tokens[0], s->rounds), with = median(s->tokens[1], s->rounds);
	double events = (double)(s->evictions ? s->evictions : 1);
	json_t *json = json_pack("{s:s, s:s, s:b, s:i, s:b, s:s, s:i, s:i, s:i, s:i}", "device", s->rig.status.device,
		"driver", s->rig.status.driver, "mps", s->rig.status.mps, "sequences", (int)s->options.sequences,
		"together", s->together, "stage", s->options.wide ? "preact" : "hidden", "budget", (int)s->budget,
		"event_tokens", (int)INSITU_EVENT, "events", (int)s->events, "layers", (int)s->options.layers);
	json_t *results = json_pack("{s:f, s:f, s:f, s:I, s:f, s:f, s:f, s:o, s:o}", "tokens_per_second_without",
		without, "tokens_per_second_with", with, "loss_percent", 100 * (1 - with / without), "evictions",
		(json_int_t)s->evictions, "event_ms",
		1e3 * s->away_seconds / (s->together ? events / s->options.sequences : events),
		"steps_sat_out_an_event", (double)s->sat_out / events, "pairs_dropped_an_event",
		(double)s->pairs_dropped / events, "rounds_without", array(s->tokens[0], s->rounds), "rounds_with",
		array(s->tokens[1], s->rounds));

	(void)json_object_update(json, results);
	json_decref(results);
	if (s->transfers)
		(void)json_object_set_new(json, "transfer_bytes_per_second",
			json_real(s->neighbour.seconds > 0 ? s->neighbour.bytes / s->neighbour.seconds : 0));
	(void)json_dumpf(json, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
	(void)fputc('\n', stdout);
	json_decref(json);
}

/* ---- the command ---- */

static int parse(int argc, char **argv, struct insitu *s)
{
	static const struct option options[] = {{"sequences", required_argument, NULL, 'n'},
		{"mps", no_argument, NULL, 'm'}, {"together", no_argument, NULL, 't'},
		{"transfers", no_argument, NULL, 'f'}, {"preact", no_argument, NULL, 'p'},
		{"rounds", required_argument, NULL, 'r'}, {"events", required_argument, NULL, 'e'},
		{"layers", required_argument, NULL, 'l'}, {"budget", required_argument, NULL, 'b'},
		{"extent", required_argument, NULL, 'x'}, {"device", required_argument, NULL, 'd'},
		{"kvgated", required_argument, NULL, 'g'}, {NULL, 0, NULL, 0}};
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (option == 'n')
			s->options.sequences = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'm')
			s->mps = true;
		else if (option == 't')
			s->together = true;
		else if (option == 'f')
			s->transfers = true;
		else if (option == 'p')
			s->options.wide = true;
		else if (option == 'r')
			s->rounds = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'e')
			s->events = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'l')
			s->options.layers = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'b')
			s->budget = (uint32_t)strtoul(optarg, NULL, 10);
		else if (option == 'x' && kvg_size_parse(optarg, &s->options.extent) == 0)
			continue;
		else if (option == 'd')
			s->options.device = (int)strtol(optarg, NULL, 10);
		else if (option == 'g')
			s->options.kvgated = optarg;
		else
			return BENCH_USAGE;
	}
	if (optind == argc && !(s->transfers && s->together) && s->options.sequences >= 1 &&
		s->options.sequences <= INSITU_SEQUENCES && s->rounds >= 1 && s->rounds <= INSITU_ROUNDS_MAX &&
		s->events >= 1 && s->options.layers >= 2 && s->options.layers <= MODEL_LAYERS &&
		s->budget >= INSITU_EVENT && s->budget <= INSITU_BUDGET_MAX)
		return BENCH_OK;
	return BENCH_USAGE;
}

static void derive(struct insitu *s)
{
	uint64_t pair = (uint64_t)s->options.layers * MODEL_HEADS * MODEL_DIM * 2 * 2;

	s->options.rows = s->options.sequences;
	s->options.max_tokens = s->budget + (s->rounds * s->events + 4) * INSITU_EVENT;
	/* The budget, a stripe of new tokens, spare ones for moves, and what is left over in extents. */
	s->options.pool = ((uint64_t)1 << 30) + s->options.sequences * (s->budget + 8 * INSITU_EVENT) * pair;
	if (s->transfers) {
		s->options.host = neighbour_bytes(s->options.layers) + ((uint64_t)64 << 20);
		s->options.pool += 2 * s->options.host;
	}
}

static int run_and_report(void *user)
{
	struct insitu *s = user;
	int r = run(s);

	if (r == 0)
		report(s);
	neighbour_close(&s->neighbour);
	return rig_close(&s->rig) < 0 ? -EIO : r;
}

int bench_insitu(int argc, char **argv)
{
	struct insitu *s = calloc(1, sizeof(*s));
	int r;

	if (!s)
		return BENCH_FAIL;
	*s = (struct insitu){.options = {.layers = MODEL_LAYERS, .sequences = 1},
		.rounds = ROUNDS,
		.events = EVENTS,
		.budget = INSITU_BUDGET};
	if (parse(argc, argv, s) != BENCH_OK) {
		(void)fprintf(stderr,
			"usage: kvgate-bench insitu [--sequences 1..%u] [--mps] [--together | --transfers] [--preact] "
			"[--rounds N] [--events N]\n"
			"                           [--budget %u..%u] [--layers 2..%u] [--extent SIZE] "
			"[--device N] [--kvgated PROGRAM]\n",
			INSITU_SEQUENCES, INSITU_EVENT, INSITU_BUDGET_MAX, MODEL_LAYERS);
		free(s);
		return BENCH_USAGE;
	}
	derive(s);
	r = rig_run(s->mps, run_and_report, s);
	free(s);
	return r < 0 ? BENCH_FAIL : BENCH_OK;
}
