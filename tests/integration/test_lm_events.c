/*
 * The events of kvgate-lm's decode budget against the rule of the method. The worker's code runs in the test, on a
 * real daemon; its calls of libkvgate pass through here (the linker's --wrap), which writes down each key and each
 * score, and around each decode eviction reads the rows back: a pair is known by its key. What stays must be
 * what a full sort says.
 *
 * Once with the golden file's scores in place of a gate's, where the positions held are the reference implementation's,
 * and once with the pilot model and its gate.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "kernels/host/gate.h"
#include "proto/gate_file.h"
#include "tests/integration/kv.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"
#include "tools/lm/generation.h"

#define CONFIG     "[pool]\ndevice.size = 64M\nextent_size = 256K\n[tenant a]\nsocket = a.sock\n"
#define FIRST      4u
#define NEWEST     128u
#define MAX_LAYERS 8u

static const char pilot[] = KVG_DATA "/pilot-lm";
static const char pilot_gate[] = KVG_DATA "/pilot-lm/gate.safetensors";
static const char needles_file[] = KVG_DATA "/pilot-lm/needles.jsonl";
static const char golden_file[] = KVG_DATA "/golden/evict_decode.safetensors";

/* What passed by. Row = layer * heads + head. */
static struct tape {
	uint32_t layers, heads, dim, capacity, budget;
	float *k;                             /* [rows][capacity][dim] */
	float *score;                         /* [rows][capacity] */
	uint8_t *held, *expected;             /* [rows][capacity] */
	float tolerance;                      /* of scores: pairs so near the threshold may go either way */
	uint32_t staged[MAX_LAYERS];          /* tokens of each layer */
	struct kvg_gate *gates[MAX_LAYERS];   /* none: the scores are recorded ones */
	unsigned events, near;                /* decode evictions; pairs near a threshold */
	const struct kvg_safetensors *golden; /* positions held after each event, or NULL */
} tape;

static void tape_init(const struct lm_config *config, uint32_t capacity, uint32_t budget)
{
	size_t pairs = (size_t)config->layers * config->kv_heads * capacity;

	assert_true(config->layers <= MAX_LAYERS);
	tape = (struct tape){.layers = config->layers,
		.heads = config->kv_heads,
		.dim = config->head_dim,
		.capacity = capacity,
		.budget = budget};
	tape.k = calloc(pairs * config->head_dim, sizeof(*tape.k));
	tape.score = calloc(pairs, sizeof(*tape.score));
	tape.held = calloc(pairs, 1);
	tape.expected = calloc(pairs, 1);
	assert_true(tape.k && tape.score && tape.held && tape.expected);
}

static void tape_deinit(void)
{
	for (uint32_t i = 0; i < MAX_LAYERS; i++)
		(void)kvg_gate_free(tape.gates[i]);
	free(tape.k);
	free(tape.score);
	free(tape.held);
	free(tape.expected);
}

static size_t at(uint32_t row, uint32_t pos)
{
	return (size_t)row * tape.capacity + pos;
}

/* ---- what passes by ---- */

int __real_kvg_append(const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos,
	uint32_t count, const float *k, size_t k_stride, const float *v, size_t v_stride);
int __wrap_kvg_append(const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos,
	uint32_t count, const float *k, size_t k_stride, const float *v, size_t v_stride);
int __real_kvg_stage_hidden(
	struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t pos, uint32_t rows, const uint16_t *hidden);
int __wrap_kvg_stage_hidden(
	struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t pos, uint32_t rows, const uint16_t *hidden);
int __real_kvg_evict(struct kvg_client *client, uint64_t seq, uint32_t mode, struct kvg_evict_result *ret);
int __wrap_kvg_evict(struct kvg_client *client, uint64_t seq, uint32_t mode, struct kvg_evict_result *ret);

int __wrap_kvg_append(const struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t head, uint32_t pos,
	uint32_t count, const float *k, size_t k_stride, const float *v, size_t v_stride)
{
	assert_in_range(pos + count, 1, tape.capacity);
	for (uint32_t t = 0; t < count; t++)
		memcpy(tape.k + at(layer * tape.heads + head, pos + t) * tape.dim, k + t * k_stride,
			tape.dim * sizeof(float));
	return __real_kvg_append(client, seq, layer, head, pos, count, k, k_stride, v, v_stride);
}

/* Scores [rows][heads] of the gate, written down. */
static void score_rows(uint32_t layer, uint32_t pos, uint32_t rows, const uint16_t *hidden)
{
	const struct kvg_gate *gate = tape.gates[layer];
	void *scratch = aligned_alloc(64, (kvg_gate_scratch(gate, rows) + 63) / 64 * 64);
	float *scores = malloc((size_t)rows * tape.heads * sizeof(*scores));

	assert_true(scratch && scores);
	kvg_gate_score(gate, hidden, rows, scores, scratch);
	for (uint32_t t = 0; t < rows; t++)
		for (uint32_t head = 0; head < tape.heads; head++)
			tape.score[at(layer * tape.heads + head, pos + t)] = scores[(size_t)t * tape.heads + head];
	free(scratch);
	free(scores);
}

static int stage_recorded(struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t pos, uint32_t rows)
{
	float *scores = malloc((size_t)rows * tape.heads * sizeof(*scores));
	int r;

	assert_non_null(scores);
	for (uint32_t t = 0; t < rows; t++)
		for (uint32_t head = 0; head < tape.heads; head++)
			scores[(size_t)t * tape.heads + head] = tape.score[at(layer * tape.heads + head, pos + t)];
	r = kvg_stage_scores(client, seq, layer, pos, rows, scores);
	free(scores);
	return r;
}

/* Each layer's rows must come in order, none left out and none twice. */
int __wrap_kvg_stage_hidden(
	struct kvg_client *client, uint64_t seq, uint32_t layer, uint32_t pos, uint32_t rows, const uint16_t *hidden)
{
	assert_int_equal(pos, tape.staged[layer]);
	tape.staged[layer] += rows;
	if (!tape.gates[layer])
		return stage_recorded(client, seq, layer, pos, rows);
	score_rows(layer, pos, rows, hidden);
	return __real_kvg_stage_hidden(client, seq, layer, pos, rows, hidden);
}

/* ---- the rows ---- */

/* Position of a key of a row, looked for from the one after `hint`; keys are rotated, so no two are alike. */
static uint32_t position_of(uint32_t row, const void *key, uint32_t hint, uint32_t seen)
{
	for (uint32_t i = 1; i <= seen; i++) {
		uint32_t pos = (hint + i) % seen;

		if (memcmp(tape.k + at(row, pos) * tape.dim, key, tape.dim * sizeof(float)) == 0)
			return pos;
	}
	fail_msg("row %u has a key that was never written", row);
	return 0;
}

/* Fills tape.held from the daemon's memory; returns the number of tokens so far. */
static uint32_t read_rows(const struct kvg_client *client, uint64_t seq)
{
	struct kvg_view view;
	uint32_t slot = (uint32_t)seq, seen;

	assert_int_equal(kvg_view(client, &view), 0);
	seen = view.slots[slot].committed_pos;
	memset(tape.held, 0, at(tape.layers * tape.heads, 0));
	for (uint32_t row = 0; row < tape.layers * tape.heads; row++) {
		size_t table = ((size_t)(row / tape.heads) * view.max_sequences + slot) * tape.heads + row % tape.heads;
		const uint32_t *ids = view.ids + table * view.row_cap;
		uint32_t count = view.base_len[table] + seen - view.slots[slot].fold_pos, pos = seen - 1;

		for (uint32_t i = 0; i < count; i++) {
			const uint8_t *block = view.k_base + ids[i / KVG_BLOCK_TOKENS] * view.stride;

			pos = position_of(row, block + i % KVG_BLOCK_TOKENS * tape.dim * sizeof(float), pos, seen);
			assert_int_equal(tape.held[at(row, pos)], 0);
			tape.held[at(row, pos)] = 1;
		}
	}
	return seen;
}

static uint64_t count_pairs(const uint8_t *mask)
{
	uint64_t pairs = 0;

	for (size_t i = 0; i < at(tape.layers * tape.heads, 0); i++)
		pairs += mask[i];
	return pairs;
}

/* ---- the rule ---- */

static int ascending(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x > y) - (x < y);
}

static float decision_score(uint32_t row, uint32_t pos, uint32_t seen)
{
	return pos < FIRST || pos + NEWEST >= seen ? 1.0f : tape.score[at(row, pos)];
}

/* The lowest score that stays of the pairs held, among `seen` tokens. */
static float threshold_of(uint32_t seen)
{
	uint64_t pairs = count_pairs(tape.held), budget = (uint64_t)tape.budget * tape.layers * tape.heads, n = 0;
	float *sorted = malloc((pairs + 1) * sizeof(*sorted)), threshold = -INFINITY;

	assert_non_null(sorted);
	for (uint32_t row = 0; row < tape.layers * tape.heads; row++)
		for (uint32_t pos = 0; pos < seen; pos++)
			if (tape.held[at(row, pos)])
				sorted[n++] = decision_score(row, pos, seen);
	qsort(sorted, n, sizeof(*sorted), ascending);
	if (n > budget)
		threshold = sorted[n - budget];
	free(sorted);
	return threshold;
}

/* From what is held to what must be held after the event; returns the threshold. */
static float apply_rule(uint32_t seen)
{
	float threshold = threshold_of(seen);

	for (uint32_t row = 0; row < tape.layers * tape.heads; row++)
		for (uint32_t pos = 0; pos < seen; pos++)
			tape.expected[at(row, pos)] =
				tape.held[at(row, pos)] && decision_score(row, pos, seen) >= threshold;
	return threshold;
}

static void compare(uint32_t seen, float threshold)
{
	for (uint32_t row = 0; row < tape.layers * tape.heads; row++)
		for (uint32_t pos = 0; pos < seen; pos++) {
			float score = decision_score(row, pos, seen);

			if (tape.held[at(row, pos)] == tape.expected[at(row, pos)])
				continue;
			if (!(fabsf(score - threshold) <= tape.tolerance))
				fail_msg("event %u at %u tokens: layer %u head %u position %u of score %.9g, threshold "
					 "%.9g: %s",
					tape.events, seen, row / tape.heads, row % tape.heads, pos, (double)score,
					(double)threshold, tape.held[at(row, pos)] ? "held" : "gone");
			tape.near++;
		}
}

static void compare_golden(uint32_t seen)
{
	for (uint32_t row = 0; row < tape.layers * tape.heads; row++) {
		const struct kvg_tensor *tensor;
		char name[64];
		uint32_t n = 0;

		(void)snprintf(
			name, sizeof(name), "event%u.layer%u.head%u", tape.events, row / tape.heads, row % tape.heads);
		tensor = kvg_safetensors_find(tape.golden, name);
		assert_non_null(tensor);
		for (uint32_t pos = 0; pos < seen; pos++) {
			int32_t want = -1;

			if (!tape.held[at(row, pos)])
				continue;
			assert_true(n < tensor->count);
			memcpy(&want, (const uint8_t *)tensor->data + n++ * sizeof(want), sizeof(want));
			if ((uint32_t)want != pos)
				fail_msg("%s: position %d is held by the reference, %u here", name, want, pos);
		}
		assert_int_equal(n, tensor->count);
	}
}

int __wrap_kvg_evict(struct kvg_client *client, uint64_t seq, uint32_t mode, struct kvg_evict_result *ret)
{
	uint64_t before;
	uint32_t seen;
	float threshold;
	int r;

	if (mode != KVG_EVICT_DECODE)
		return __real_kvg_evict(client, seq, mode, ret);
	seen = read_rows(client, seq);
	before = count_pairs(tape.held);
	threshold = apply_rule(seen);
	r = __real_kvg_evict(client, seq, mode, ret);
	assert_int_equal(r, 0);
	assert_int_equal(read_rows(client, seq), seen);
	compare(seen, threshold);
	assert_int_equal(ret->pairs_held, count_pairs(tape.held));
	assert_int_equal(ret->pairs_dropped, before - ret->pairs_held);
	if (tape.golden)
		compare_golden(seen);
	tape.events++;
	return r;
}

/* ---- a worker on a daemon ---- */

struct stage {
	struct fixture f;
	struct lm_pool *pool;
	struct lm_model *model;
	struct lm_worker *worker;
	char text[LM_TEXT];
};

static void must(const struct stage *s, int e)
{
	if (e < 0)
		fail_msg("%s", s->text);
}

/* A pool of one has no threads: everything passes by in the test's own. */
static void stage_open(struct stage *s, const char *dir, const char *gate, uint32_t max_tokens)
{
	char path[FIXTURE_PATH];
	struct lm_worker_setup setup = {.socket = fixture_path(&s->f, "state/a.sock", path),
		.gate = gate,
		.model_name = "model",
		.kv_dtype = KVG_F32,
		.max_tokens = max_tokens,
		.chunk_tokens = max_tokens};

	assert_int_equal(lm_pool_new(1, &s->pool), 0);
	must(s, lm_model_load(dir, s->pool, &s->model, s->text));
	setup.model = s->model;
	must(s, lm_worker_open(&setup, &s->worker, s->text));
}

static void stage_close(struct stage *s)
{
	(void)lm_worker_close(s->worker);
	(void)lm_model_free(s->model);
	(void)lm_pool_free(s->pool);
	assert_true(fixture_wait_charged(&s->f, 0, FIXTURE_WAIT_MS));
	fixture_audit(&s->f);
	fixture_stop(&s->f);
}

/* ---- the golden file ---- */

#define GOLDEN_LAYERS 3u
#define GOLDEN_HEADS  2u
#define GOLDEN_TOKENS 1100u
#define GOLDEN_PROMPT 300u
#define GOLDEN_BUDGET 256u

struct model_file {
	FILE *header, *data;
	size_t size;
	uint64_t random;
};

/* A tensor of random values, or of ones when it is a norm. */
static void add_tensor(struct model_file *file, const char *name, unsigned rows, unsigned columns)
{
	size_t count = (size_t)rows * (columns ? columns : 1);

	(void)fprintf(file->header, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[%u", file->size ? "," : "", name, rows);
	if (columns)
		(void)fprintf(file->header, ",%u", columns);
	(void)fprintf(file->header, "],\"data_offsets\":[%zu,%zu]}", file->size, file->size + count * sizeof(float));
	for (size_t i = 0; i < count; i++) {
		float value = columns ? (float)(kv_random(&file->random) >> 40) / 0x1p24f - 0.5f : 1.0f;

		assert_int_equal(fwrite(&value, sizeof(value), 1, file->data), 1);
	}
	file->size += count * sizeof(float);
}

static void add_layer(struct model_file *file, unsigned layer)
{
	static const struct {
		const char *name;
		unsigned rows, columns;
	} parts[] = {{"input_layernorm", 32, 0}, {"self_attn.q_proj", 64, 32}, {"self_attn.k_proj", 32, 32},
		{"self_attn.v_proj", 32, 32}, {"self_attn.q_norm", 16, 0}, {"self_attn.k_norm", 16, 0},
		{"self_attn.o_proj", 32, 64}, {"post_attention_layernorm", 32, 0}, {"mlp.gate_proj", 48, 32},
		{"mlp.up_proj", 48, 32}, {"mlp.down_proj", 32, 48}};

	for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++) {
		char name[128];

		(void)snprintf(name, sizeof(name), "model.layers.%u.%s.weight", layer, parts[i].name);
		add_tensor(file, name, parts[i].rows, parts[i].columns);
	}
}

static void write_text(const char *path, const char *text)
{
	FILE *file = fopen(path, "we");

	assert_non_null(file);
	assert_true(fputs(text, file) >= 0);
	assert_int_equal(fclose(file), 0);
}

static void write_tensors(const char *path)
{
	char *header = NULL, *data = NULL;
	size_t header_size = 0, data_size = 0;
	struct model_file file = {.header = open_memstream(&header, &header_size),
		.data = open_memstream(&data, &data_size),
		.random = 7};
	FILE *out = fopen(path, "we");
	uint64_t length;

	assert_true(file.header && file.data && out);
	(void)fputc('{', file.header);
	add_tensor(&file, "model.embed_tokens.weight", LM_TOKENS, 32);
	add_tensor(&file, "model.norm.weight", 32, 0);
	for (unsigned layer = 0; layer < GOLDEN_LAYERS; layer++)
		add_layer(&file, layer);
	(void)fputc('}', file.header);
	assert_int_equal(fclose(file.header), 0);
	assert_int_equal(fclose(file.data), 0);
	length = header_size;
	assert_int_equal(fwrite(&length, sizeof(length), 1, out), 1);
	assert_int_equal(fwrite(header, 1, header_size, out), header_size);
	assert_int_equal(fwrite(data, 1, data_size, out), data_size);
	assert_int_equal(fclose(out), 0);
	free(header);
	free(data);
}

/* A model of random weights of the golden file's geometry, in the fixture's folder. */
static void write_model(const struct fixture *f, char dir[FIXTURE_PATH])
{
	char path[FIXTURE_PATH];

	assert_int_equal(mkdir(fixture_path(f, "model", dir), 0700), 0);
	write_text(fixture_path(f, "model/config.json", path),
		"{\"architectures\":[\"Qwen3ForCausalLM\"],\"model_type\":\"qwen3\",\"hidden_size\":32,"
		"\"intermediate_size\":48,\"num_hidden_layers\":3,\"num_attention_heads\":4,"
		"\"num_key_value_heads\":2,\"head_dim\":16,\"rope_theta\":10000.0,\"rms_norm_eps\":1e-06,"
		"\"vocab_size\":261,\"tie_word_embeddings\":true,\"hidden_act\":\"silu\","
		"\"max_position_embeddings\":2048,\"attention_bias\":false}");
	write_tensors(fixture_path(f, "model/model.safetensors", path));
}

static struct kvg_safetensors *open_golden(void)
{
	struct kvg_safetensors *file = NULL;
	const struct kvg_tensor *scores;
	char text[LM_TEXT];

	if (kvg_safetensors_open(golden_file, &file, text, sizeof(text)) < 0)
		fail_msg("%s", text);
	scores = kvg_safetensors_find(file, "scores");
	assert_non_null(scores);
	assert_int_equal(scores->count, GOLDEN_LAYERS * GOLDEN_HEADS * GOLDEN_TOKENS);
	memcpy(tape.score, scores->data, scores->size);
	assert_string_equal(kvg_safetensors_metadata(file, "budget"), "256");
	assert_string_equal(kvg_safetensors_metadata(file, "prompt"), "300");
	return file;
}

/* Tokens come as a prompt and in pieces of every size; the events fall where they must all the same. */
static void feed_golden(struct stage *s)
{
	static const uint32_t pieces[] = {1, 84, 1, 128, 300, 2, 127, 157};
	struct kvg_policy policy = {.mode = KVG_MODE_OFF,
		.ratio = 1.0,
		.context_tokens = GOLDEN_PROMPT,
		.chunk_tokens = 200,
		.max_new_tokens = GOLDEN_TOKENS - GOLDEN_PROMPT,
		.budget = GOLDEN_BUDGET};
	int32_t tokens[GOLDEN_TOKENS];
	uint32_t pos = GOLDEN_PROMPT;

	for (uint32_t i = 0; i < GOLDEN_TOKENS; i++)
		tokens[i] = (int32_t)(i * 37 % 251);
	must(s, lm_worker_begin(s->worker, &policy, s->text));
	must(s, lm_worker_prefill(s->worker, tokens, GOLDEN_PROMPT, NULL, NULL, s->text));
	must(s, lm_worker_reserve(s->worker, GOLDEN_TOKENS - GOLDEN_PROMPT, s->text));
	for (size_t i = 0; i < sizeof(pieces) / sizeof(*pieces); i++) {
		must(s, lm_worker_feed(s->worker, tokens + pos, pieces[i], s->text));
		pos += pieces[i];
	}
	assert_int_equal(pos, GOLDEN_TOKENS);
}

static void test_recorded_scores_leave_the_reference_s_positions(void **state)
{
	static const uint32_t seen[] = {300, 385, 513, 641, 769, 897, 1025};
	const struct lm_event *events;
	struct kvg_safetensors *golden;
	char dir[FIXTURE_PATH];
	struct stage s = {0};
	uint32_t count = 0;

	(void)state;
	fixture_start(&s.f, CONFIG);
	write_model(&s.f, dir);
	stage_open(&s, dir, NULL, GOLDEN_TOKENS);
	tape_init(lm_model_config(s.model), GOLDEN_TOKENS, GOLDEN_BUDGET);
	golden = open_golden();
	tape.golden = golden;
	feed_golden(&s);
	events = lm_worker_events(s.worker, &count);
	assert_int_equal(count, 7);
	assert_int_equal(tape.events, 7);
	for (uint32_t i = 0; i < count; i++)
		assert_int_equal(events[i].tokens, seen[i]);
	must(&s, lm_worker_end(s.worker, s.text));
	(void)kvg_safetensors_free(golden);
	tape_deinit();
	stage_close(&s);
}

/* ---- the pilot model and its gate ---- */

static void load_gates(void)
{
	struct kvg_safetensors *file = NULL;
	char text[LM_TEXT];

	if (kvg_safetensors_open(pilot_gate, &file, text, sizeof(text)) < 0)
		fail_msg("%s", text);
	for (uint32_t layer = 0; layer < tape.layers; layer++) {
		struct kvg_gate_tensors t;
		char prefix[32];

		(void)snprintf(prefix, sizeof(prefix), "layers.%u.", layer);
		if (kvg_gate_tensors_read(file, prefix, &t, text, sizeof(text)) < 0)
			fail_msg("%s", text);
		assert_int_equal(kvg_gate_new(&(struct kvg_gate_weights){t.shape.heads, t.shape.group, t.shape.hidden,
						      t.shape.width, t.shape.sinks, t.wq, t.bq, t.wk, t.b, t.q_norm,
						      t.k_norm, t.k_base},
					 &tape.gates[layer]),
			0);
		kvg_gate_tensors_deinit(&t);
	}
	(void)kvg_safetensors_free(file);
}

/* One context of `size` bytes, continued by `generate` tokens. */
static void run_pilot(double ratio, uint32_t budget, uint32_t size, uint32_t generate)
{
	struct lm_options options = {
		.ratio = ratio, .chunk = size / 2, .window = 40, .window_absolute = true, .generate = generate};
	struct lm_needles needles;
	struct lm_generation generation;
	struct stage s = {0};

	options.decode_budget = budget;
	fixture_start(&s.f, CONFIG);
	stage_open(&s, pilot, pilot_gate, 1 + size + generate);
	tape_init(lm_model_config(s.model), 1 + size + generate, budget);
	tape.tolerance = 1e-6f;
	load_gates();
	must(&s, lm_needles_read(needles_file, 1, &needles, s.text));
	assert_true(needles.list[0].context.size >= size);
	must(&s, lm_generate(s.worker, &options, &(struct lm_bytes){.data = needles.list[0].context.data, .size = size},
			 &generation, s.text));
	assert_int_equal(generation.count, generate);
	assert_int_equal(generation.event_count, tape.events);
	assert_int_equal(tape.events, 1 + (size + generate - 1) / 128 - size / 128);
	print_message("ratio %g, budget %u: %u events, %u pairs within rounding of a threshold\n", ratio, budget,
		tape.events, tape.near);
	assert_true(tape.near <= tape.events);
	lm_generation_deinit(&generation);
	lm_needles_deinit(&needles);
	tape_deinit();
	stage_close(&s);
}

static void test_the_pilot_s_gate_with_a_budget_alone(void **state)
{
	(void)state;
	run_pilot(1.0, 200, 700, KVG_SANITIZED ? 300 : 700);
}

static void test_the_pilot_s_gate_after_prefill_eviction(void **state)
{
	(void)state;
	run_pilot(0.5, 200, 700, KVG_SANITIZED ? 300 : 700);
}

static void test_the_least_budget_holds_the_first_and_the_newest(void **state)
{
	(void)state;
	run_pilot(1.0, 132, 512, 300);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_recorded_scores_leave_the_reference_s_positions),
		cmocka_unit_test(test_the_pilot_s_gate_with_a_budget_alone),
		cmocka_unit_test(test_the_pilot_s_gate_after_prefill_eviction),
		cmocka_unit_test(test_the_least_budget_holds_the_first_and_the_newest),
	};

	return runner_run("lm_events", tests, sizeof(tests) / sizeof(*tests));
}
