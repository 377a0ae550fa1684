/*
 * The reference worker on the pilot model, its KV in the daemon: accuracy, logits, two at once,
 * bad files. In a sanitizer build only the first contexts, with room for their coarser steps.
 */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/integration/process.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define LIMIT_MS 600000
#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 64M\nextent_size = 256K\n"                                                              \
	"[tenant a]\nsocket = a.sock\n[tenant b]\nsocket = b.sock\n[tenant small]\nsocket = small.sock\ndevice.max = " \
	"4M\n"

#define FEW "6" /* contexts in a sanitizer build */

static const char model[] = KVG_DATA "/pilot-lm";
static const char gate[] = KVG_DATA "/pilot-lm/gate.safetensors";
static const char needles[] = KVG_DATA "/pilot-lm/needles.jsonl";
static const char golden[] = KVG_DATA "/golden/model_golden.safetensors";
static const char other_gate[] = KVG_DATA "/golden/gate_g4.safetensors";

/* What one evaluation printed. */
struct figures {
	double accuracy, physical, held, full;
	json_int_t queries;
};

static void parse_figures(const struct process_output *output, struct figures *ret)
{
	json_error_t error;
	json_t *object = json_loads(output->out, 0, &error);

	if (!object)
		fail_msg("status %d, no JSON (%s): %s%s", output->status, error.text, output->out, output->err);
	assert_int_equal(output->status, 0);
	ret->queries = json_integer_value(json_object_get(object, "queries"));
	ret->accuracy = json_number_value(json_object_get(object, "accuracy"));
	ret->physical = json_number_value(json_object_get(object, "physical_bytes"));
	ret->held = json_number_value(json_object_get(object, "kv_bytes_held"));
	ret->full = json_number_value(json_object_get(object, "kv_bytes_full"));
	assert_int_equal(json_integer_value(json_object_get(object, "correct")),
		(json_int_t)(ret->accuracy * (double)ret->queries + 0.5));
	assert_true(ret->queries > 0);
	json_decref(object);
}

/* Runs kvgate-lm with the pilot's files and these further options (NULL at the end, at most 12). */
static void start_lm(
	const struct fixture *f, const char *socket, const char *const options[], struct process_program *ret)
{
	char path[FIXTURE_PATH];
	const char *argv[24] = {
		KVG_BIN_LM, "--socket", fixture_path(f, socket, path), "--model", model, "--gate", gate};
	size_t n = 7;

	for (size_t i = 0; options[i]; i++) {
		assert_true(n < 22);
		argv[n++] = options[i];
	}
	process_start(ret, argv);
}

static void run_lm(const struct fixture *f, const char *const options[], struct process_output *ret)
{
	struct process_program program;

	start_lm(f, "state/a.sock", options, &program);
	process_collect(&program, LIMIT_MS, ret);
}

static void evaluate(
	const struct fixture *f, const char *ratio, const char *more, const char *value, struct figures *ret)
{
	const char *options[12] = {"--needles", needles, "--json", "--ratio", ratio};
	struct process_output output;
	size_t n = 5;

	if (KVG_SANITIZED) {
		options[n++] = "--limit";
		options[n++] = FEW;
	}
	if (more) {
		options[n++] = more;
		options[n++] = value;
	}
	if (more && strcmp(more, "--chunk") == 0) {
		options[n++] = "--window";
		options[n++] = "59";
	}
	run_lm(f, options, &output);
	parse_figures(&output, ret);
	print_message("ratio %s %s %s: %.4f of %d queries, held %.0f of %.0f bytes, physical %.0f\n", ratio,
		more ? more : "", more ? value : "", ret->accuracy, (int)ret->queries, ret->held, ret->full,
		ret->physical);
}

static void start(struct fixture *f)
{
	fixture_start(f, CONFIG);
}

static void stop(struct fixture *f)
{
	assert_true(fixture_wait_charged(f, 0, FIXTURE_WAIT_MS));
	fixture_audit(f);
	fixture_stop(f);
}

static void test_the_whole_context_answers(void **state)
{
	struct figures figures;
	struct fixture f;

	(void)state;
	start(&f);
	evaluate(&f, "1.0", NULL, NULL, &figures);
	assert_true(figures.accuracy >= (KVG_SANITIZED ? 0.95 : 0.98));
	if (!KVG_SANITIZED)
		assert_int_equal(figures.queries, 191);
	stop(&f);
}

static void assert_evicted(const struct figures *figures, double ratio)
{
	assert_true(figures->held <= 1.02 * ratio * figures->full + 64 * 1024);
	assert_true(figures->physical <= 1.25 * ratio * figures->full + 5 * 256 * 1024);
}

static void test_three_tenths_answer_nearly_as_well_and_pair_head_less(void **state)
{
	struct figures pair, head;
	struct fixture f;

	(void)state;
	start(&f);
	evaluate(&f, "0.3", NULL, NULL, &pair);
	assert_true(pair.accuracy >= (KVG_SANITIZED ? 0.93 : 0.97));
	assert_evicted(&pair, 0.3);
	if (!KVG_SANITIZED) {
		evaluate(&f, "0.3", "--level", "pair-head", &head);
		assert_true(head.accuracy < pair.accuracy);
		assert_true(head.accuracy > 0.8);
	}
	stop(&f);
}

static void test_one_tenth_still_answers(void **state)
{
	struct figures figures;
	struct fixture f;

	(void)state;
	start(&f);
	evaluate(&f, "0.1", NULL, NULL, &figures);
	assert_true(figures.accuracy >= (KVG_SANITIZED ? 0.9 : 0.93));
	assert_evicted(&figures, 0.1);
	stop(&f);
}

static void test_eviction_between_chunks_answers(void **state)
{
	struct figures figures;
	struct fixture f;

	(void)state;
	start(&f);
	evaluate(&f, "0.3", "--chunk", "1000", &figures);
	assert_true(figures.accuracy >= (KVG_SANITIZED ? 0.9 : 0.95));
	stop(&f);
}

static void test_logits_agree_with_the_golden_ones(void **state)
{
	static const char *const dtypes[] = {"bf16", "f16", "f32"};
	struct process_output output;
	struct fixture f;

	(void)state;
	start(&f);
	for (size_t i = 0; i < 3; i++) {
		const char *options[] = {"--golden", golden, "--kv-dtype", dtypes[i], NULL};
		float difference = -1;

		run_lm(&f, options, &output);
		print_message("%s: %s%s", dtypes[i], output.out, output.err);
		assert_int_equal(output.status, 0);
		assert_int_equal(sscanf(output.out, "largest difference of logits %f", &difference), 1);
		assert_true(difference >= 0 && difference <= (i == 0 ? 0.25f : 0.05f));
	}
	stop(&f);
}

static void test_two_workers_of_two_tenants_answer_at_once(void **state)
{
	static const char *const options[] = {"--needles", needles, "--json", "--ratio", "0.3", "--limit", "2", NULL};
	struct process_program a, b;
	struct process_output output_a, output_b;
	struct figures figures_a, figures_b;
	struct fixture_usage usage;
	struct fixture f;

	(void)state;
	start(&f);
	start_lm(&f, "state/a.sock", options, &a);
	start_lm(&f, "state/b.sock", options, &b);
	process_collect(&a, LIMIT_MS, &output_a);
	process_collect(&b, LIMIT_MS, &output_b);
	parse_figures(&output_a, &figures_a);
	parse_figures(&output_b, &figures_b);
	assert_true(figures_a.accuracy >= 0.9);
	assert_true(figures_a.accuracy == figures_b.accuracy);
	assert_true(figures_a.held == figures_b.held);
	fixture_tenant(&f, "a", &usage);
	assert_true(usage.high_water > 0);
	fixture_tenant(&f, "b", &usage);
	assert_true(usage.high_water > 0);
	stop(&f);
}

static void assert_one_line(const struct process_output *output, const char *names)
{
	const char *end = strchr(output->err, '\n');

	if (output->status < 1 || output->status > 2 || !end || end[1] != '\0' || !strstr(output->err, names))
		fail_msg("status %d, and not one line with \"%s\": \"%s\"", output->status, names, output->err);
}

static void test_a_context_beyond_the_budget_is_refused_in_bytes(void **state)
{
	static const char *const options[] = {"--needles", needles, "--ratio", "1.0", "--limit", "1", NULL};
	struct process_program program;
	struct process_output output;
	struct fixture f;

	(void)state;
	start(&f);
	start_lm(&f, "state/small.sock", options, &program);
	process_collect(&program, LIMIT_MS, &output);
	assert_one_line(&output, "small");
	assert_non_null(strstr(output.err, "short"));
	stop(&f);
}

/* ---- bad files ---- */

static void write_file(const char *path, const void *data, size_t size)
{
	FILE *file = fopen(path, "we");

	assert_non_null(file);
	assert_int_equal(fwrite(data, 1, size, file), size);
	assert_int_equal(fclose(file), 0);
}

static size_t read_file(const char *path, uint8_t *data, size_t size)
{
	FILE *file = fopen(path, "re");
	size_t n;

	assert_non_null(file);
	n = fread(data, 1, size, file);
	assert_in_range(n, 1, size - 1);
	(void)fclose(file);
	return n;
}

/* Runs with a model folder of these bytes; it must be refused with a line that has `names`. */
static void refuse_model(const struct fixture *f, const char *config, size_t config_size, const uint8_t *weights,
	size_t weights_size, const char *names)
{
	char dir[FIXTURE_PATH], path[FIXTURE_PATH], socket[FIXTURE_PATH];
	struct process_output output;

	if (mkdir(fixture_path(f, "model", dir), 0700) < 0)
		assert_int_equal(errno, EEXIST);
	write_file(fixture_path(f, "model/config.json", path), config, config_size);
	write_file(fixture_path(f, "model/model.safetensors", path), weights, weights_size);
	const char *argv[] = {KVG_BIN_LM, "--socket", fixture_path(f, "state/a.sock", socket), "--model", dir, "--gate",
		gate, "--needles", needles, "--limit", "1", "--ratio", "0.3", NULL};
	process_run(argv, LIMIT_MS, &output);
	assert_one_line(&output, names);
}

static void test_bad_models_are_refused_in_one_line(void **state)
{
	static uint8_t weights[24u << 20], bad[24u << 20];
	static char config[4096], other[4096];
	size_t size = read_file(KVG_DATA "/pilot-lm/model.safetensors", weights, sizeof(weights));
	size_t length = read_file(KVG_DATA "/pilot-lm/config.json", (uint8_t *)config, sizeof(config) - 1);
	struct fixture f;
	uint64_t lie = 1ull << 60;
	char *at;

	(void)state;
	start(&f);
	refuse_model(&f, config, length, weights, size / 2, "model.safetensors");
	refuse_model(&f, config, length, weights, 4, "model.safetensors");
	memcpy(bad, weights, size);
	memcpy(bad, &lie, sizeof(lie));
	refuse_model(&f, config, length, bad, size, "model.safetensors");
	memcpy(bad, weights, size);
	at = memmem(bad, 4096, "data_offsets\":[", 15);
	assert_non_null(at);
	at[15] = '9';
	refuse_model(&f, config, length, bad, size, "model.safetensors");
	memcpy(bad, weights, size);
	at = memmem(bad, 4096, "\"BF16\"", 6);
	assert_non_null(at);
	memcpy(at, "\"F320\"", 6);
	refuse_model(&f, config, length, bad, size, "model.safetensors");
	memcpy(other, config, length);
	at = memmem(other, length, "Qwen3ForCausalLM", 16);
	assert_non_null(at);
	memcpy(at, "LlamaForCausalLM", 16);
	refuse_model(&f, other, length, weights, size, "LlamaForCausalLM");
	memcpy(other, config, length);
	at = memmem(other, length, "\"num_hidden_layers\": 6", 22);
	assert_non_null(at);
	at[21] = '7';
	refuse_model(&f, other, length, weights, size, "layers.6");
	refuse_model(&f, "{", 1, weights, size, "config.json");
	stop(&f);
}

static void test_a_gate_of_another_geometry_is_refused(void **state)
{
	char socket[FIXTURE_PATH];
	struct process_output output;
	struct fixture f;

	(void)state;
	start(&f);
	const char *argv[] = {KVG_BIN_LM, "--socket", fixture_path(&f, "state/a.sock", socket), "--model", model,
		"--gate", other_gate, "--needles", needles, "--limit", "1", "--ratio", "0.3", NULL};
	process_run(argv, LIMIT_MS, &output);
	assert_one_line(&output, "gate");
	stop(&f);
}

static void test_no_daemon_is_one_line(void **state)
{
	const char *argv[] = {KVG_BIN_LM, "--socket", "/nonexistent/a.sock", "--model", model, "--gate", gate,
		"--needles", needles, "--ratio", "0.3", NULL};
	struct process_output output;

	(void)state;
	process_run(argv, LIMIT_MS, &output);
	assert_one_line(&output, "/nonexistent/a.sock");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_logits_agree_with_the_golden_ones),
		cmocka_unit_test(test_the_whole_context_answers),
		cmocka_unit_test(test_three_tenths_answer_nearly_as_well_and_pair_head_less),
		cmocka_unit_test(test_one_tenth_still_answers),
		cmocka_unit_test(test_eviction_between_chunks_answers),
		cmocka_unit_test(test_two_workers_of_two_tenants_answer_at_once),
		cmocka_unit_test(test_a_context_beyond_the_budget_is_refused_in_bytes),
		cmocka_unit_test(test_bad_models_are_refused_in_one_line),
		cmocka_unit_test(test_a_gate_of_another_geometry_is_refused),
		cmocka_unit_test(test_no_daemon_is_one_line),
	};

	return runner_run("lm", tests, sizeof(tests) / sizeof(*tests));
}
