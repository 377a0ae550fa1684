/*
 * The check commands of kvgate-bench on files that they must refuse, and on small
 * files of another geometry whose results are worked out by hand here.
 */
#include "tests/support/runner.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define PREFILL KVG_GOLDEN "/evict_prefill.safetensors"
#define DECODE  KVG_GOLDEN "/evict_decode.safetensors"
#define GATE    KVG_GOLDEN "/gate_g5.safetensors"

/* A safetensors file in memory: read from disk or put together, changed, and written into the test's folder. */
struct image {
	json_t *header;
	uint8_t *data;
	size_t size;
};

struct place {
	char dir[64], file[96];
	char output[4096]; /* of the last command */
};

/* ---- images ---- */

static void image_read(struct image *image, const char *path)
{
	FILE *file = fopen(path, "rb");
	uint64_t header_size = 0;
	long size;

	assert_non_null(file);
	assert_int_equal(fseek(file, 0, SEEK_END), 0);
	size = ftell(file);
	rewind(file);
	assert_int_equal(fread(&header_size, sizeof(header_size), 1, file), 1);
	char *text = malloc(header_size);

	assert_int_equal(fread(text, 1, header_size, file), header_size);
	image->header = json_loadb(text, header_size, 0, NULL);
	assert_non_null(image->header);
	free(text);
	image->size = (size_t)size - 8 - header_size;
	image->data = malloc(image->size);
	assert_int_equal(fread(image->data, 1, image->size, file), image->size);
	(void)fclose(file);
}

static void image_deinit(struct image *image)
{
	json_decref(image->header);
	free(image->data);
}

static void image_write(const struct image *image, const char *path)
{
	char *text = json_dumps(image->header, JSON_COMPACT);
	uint64_t header_size = strlen(text);
	FILE *file = fopen(path, "wb");

	assert_non_null(file);
	assert_int_equal(fwrite(&header_size, sizeof(header_size), 1, file), 1);
	assert_int_equal(fwrite(text, 1, header_size, file), header_size);
	assert_int_equal(fwrite(image->data, 1, image->size, file), image->size);
	assert_int_equal(fclose(file), 0);
	free(text);
}

/* Where a tensor's data starts. */
static uint8_t *image_tensor(const struct image *image, const char *name)
{
	json_t *offsets = json_object_get(json_object_get(image->header, name), "data_offsets");

	assert_non_null(offsets);
	return image->data + json_integer_value(json_array_get(offsets, 0));
}

static void image_set_metadata(const struct image *image, const char *key, const char *value)
{
	json_t *metadata = json_object_get(image->header, "__metadata__");

	assert_non_null(metadata);
	if (value)
		assert_int_equal(json_object_set_new(metadata, key, json_string(value)), 0);
	else
		assert_int_equal(json_object_del(metadata, key), 0);
}

/* The tensor is there, under a name that nobody asks for. */
static void image_rename(const struct image *image, const char *name)
{
	assert_int_equal(json_object_set(image->header, "other", json_object_get(image->header, name)), 0);
	assert_int_equal(json_object_del(image->header, name), 0);
}

static void image_add(
	struct image *image, const char *name, const char *dtype, json_t *shape, const void *data, size_t size)
{
	size_t end = image->size + size;
	json_t *tensor = json_pack("{s:s, s:o, s:[I,I]}", "dtype", dtype, "shape", shape, "data_offsets",
		(json_int_t)image->size, (json_int_t)end);

	if (!image->header)
		image->header = json_pack("{s:{}}", "__metadata__");
	image->data = realloc(image->data, end);
	memcpy(image->data + image->size, data, size);
	image->size = end;
	assert_int_equal(json_object_set_new(image->header, name, tensor), 0);
}

/* ---- running ---- */

static int setup(void **state)
{
	struct place *place = calloc(1, sizeof(*place));

	assert_non_null(place);
	(void)strcpy(place->dir, "/tmp/kvgate-checks-XXXXXX");
	assert_non_null(mkdtemp(place->dir));
	(void)snprintf(place->file, sizeof(place->file), "%s/f", place->dir);
	*state = place;
	return 0;
}

static int teardown(void **state)
{
	struct place *place = *state;

	(void)unlink(place->file);
	assert_int_equal(rmdir(place->dir), 0);
	free(place);
	return 0;
}

/* Exit status of kvgate-bench with these arguments; what it printed is in place->output. */
static int bench(struct place *place, const char *command, const char *arguments)
{
	char line[512];
	size_t n;
	FILE *pipe;
	int status;

	(void)snprintf(line, sizeof(line), "'%s' %s %s 2>&1", KVG_BENCH, command, arguments);
	pipe = popen(line, "r");
	assert_non_null(pipe);
	n = fread(place->output, 1, sizeof(place->output) - 1, pipe);
	place->output[n] = '\0';
	status = pclose(pipe);
	assert_true(WIFEXITED(status));
	return WEXITSTATUS(status);
}

static int bench_image(struct place *place, const char *command, const struct image *image)
{
	image_write(image, place->file);
	return bench(place, command, place->file);
}

/* The image is refused with exit status 1 and one line that says this. */
static void assert_refused(struct place *place, const char *command, const struct image *image, const char *says)
{
	int status = bench_image(place, command, image);

	if (status != 1 || !strstr(place->output, says))
		fail_msg("%s: exit %d, expected 1 and '%s', printed: %s", command, status, says, place->output);
	assert_ptr_equal(strchr(place->output, '\n'), place->output + strlen(place->output) - 1);
}

/* ---- damaged values ---- */

static void test_copies_pass(void **state)
{
	static const char *const files[][2] = {
		{"check-prefill", PREFILL}, {"check-decode", DECODE}, {"check-gate", GATE}};
	struct place *place = *state;

	for (size_t i = 0; i < 3; i++) {
		struct image image;

		image_read(&image, files[i][1]);
		assert_int_equal(bench_image(place, files[i][0], &image), 0);
		assert_memory_equal(place->output, "ok: ", 4);
		image_deinit(&image);
	}
}

static void test_wrong_mask(void **state)
{
	static const size_t positions[][4] = {{37, 1, 2, 500}, {0, 0, 0, 0}, {11, 2, 3, 2599}};
	struct image image;

	image_read(&image, PREFILL);
	for (size_t i = 0; i < 3; i++) {
		const size_t *p = positions[i];
		char name[32], says[96];
		uint8_t *value;

		(void)snprintf(name, sizeof(name), "keep_%zu", p[0]);
		value = image_tensor(&image, name) + (p[1] * 4 + p[2]) * 2600 + p[3];
		*value ^= 1;
		(void)snprintf(says, sizeof(says), "%s: layer %zu head %zu token %zu: expected %d, got %d", name, p[1],
			p[2], p[3], *value, !*value);
		assert_refused(*state, "check-prefill", &image, says);
		*value ^= 1;
	}
	image_deinit(&image);
}

/* A kept pair whose score falls to the bottom is not kept any more. */
static void test_wrong_prefill_score(void **state)
{
	const uint8_t *keep;
	struct image image;
	float lowest = -1.0f;
	size_t i = 0;

	image_read(&image, PREFILL);
	keep = image_tensor(&image, "keep_0");
	while (!keep[i])
		i++;
	memcpy(image_tensor(&image, "scores") + i * sizeof(float), &lowest, sizeof(lowest));
	assert_refused(*state, "check-prefill", &image, "keep_0: layer 0 head 0 token ");
	image_deinit(&image);
}

static void test_wrong_gate_score(void **state)
{
	struct image image;
	double wrong = 7.0, nan = NAN;
	uint8_t *value;

	image_read(&image, GATE);
	value = image_tensor(&image, "score_f64") + (5 * 64 + 33) * sizeof(double);
	memcpy(value, &wrong, sizeof(wrong));
	assert_refused(*state, "check-gate", &image, "head 5 token 33: expected 7, got 0.");
	memcpy(value, &nan, sizeof(nan));
	assert_refused(*state, "check-gate", &image, "head 5 token 33: expected nan, got 0.");
	image_deinit(&image);
}

static void test_wrong_gate_weight(void **state)
{
	struct image image;
	float weight;

	image_read(&image, GATE);
	memcpy(&weight, image_tensor(&image, "q_norm.weight"), sizeof(weight));
	weight += 1.0f;
	memcpy(image_tensor(&image, "q_norm.weight"), &weight, sizeof(weight));
	assert_refused(*state, "check-gate", &image, "FAILED: relative Frobenius error");
	image_deinit(&image);
}

static void test_wrong_decode_position(void **state)
{
	struct image image;
	int32_t *held, wrong = 1000, first;
	char says[96];

	image_read(&image, DECODE);
	held = (int32_t *)(void *)image_tensor(&image, "event3.layer1.head0");
	memcpy(&first, held + 200, sizeof(first));
	memcpy(held + 200, &wrong, sizeof(wrong));
	(void)snprintf(says, sizeof(says), "event 3: layer 1 head 0 token %d: expected evicted, got held", first);
	assert_refused(*state, "check-decode", &image, says);
	image_deinit(&image);
}

/* A token that was held to the end goes when its score is the lowest; the first difference is named. */
static void test_wrong_decode_score(void **state)
{
	struct image image;
	float lowest = -1.0f;
	int32_t token;
	const struct place *place = *state;
	unsigned event, layer, head, where;

	image_read(&image, DECODE);
	memcpy(&token, image_tensor(&image, "event6.layer2.head1") + 20 * sizeof(token), sizeof(token));
	memcpy(image_tensor(&image, "scores") + ((2 * 2 + 1) * 1100 + (size_t)token) * sizeof(float), &lowest,
		sizeof(lowest));
	assert_refused(*state, "check-decode", &image, "FAILED: event ");
	assert_int_equal(
		sscanf(place->output, "FAILED: event %u: layer %u head %u token %u:", &event, &layer, &head, &where),
		4);
	assert_true(event < 7 && layer < 3 && head < 2 && where < 1100);
	image_deinit(&image);
}

/* ---- malformed files ---- */

static void test_malformed_prefill(void **state)
{
	static const char good[] = "{\"scores\": \"scores\", \"level\": \"pair\", \"ratio\": 0.1, \"chunk\": 1000, "
				   "\"window\": 256, \"system_prompt\": 40}";
	static const char *const bad[][2] = {
		{NULL, "metadata: keep_0 is missing"},
		{"{", "metadata: keep_0 is not JSON"},
		{"{\"scores\": \"scores\"}", "metadata: keep_0: "},
		{"{\"scores\": \"none\", \"level\": \"pair\", \"ratio\": 0.1, \"chunk\": 1, \"window\": 2, "
		 "\"system_prompt\": 4}",
			"tensor none is missing"},
		{"{\"scores\": \"scores\", \"level\": \"pear\", \"ratio\": 0.1, \"chunk\": 1, \"window\": 2, "
		 "\"system_prompt\": 4}",
			"unknown level"},
		{"{\"scores\": \"scores\", \"level\": \"pair\", \"ratio\": 1.5, \"chunk\": 1, \"window\": 2, "
		 "\"system_prompt\": 4}",
			"out of range"},
		{"{\"scores\": \"scores\", \"level\": \"pair\", \"ratio\": 0.1, \"chunk\": -1, \"window\": 2, "
		 "\"system_prompt\": 4}",
			"out of range"},
		{"{\"scores\": \"scores_ties\", \"level\": \"pair\", \"ratio\": 0.1, \"chunk\": 1, \"window\": 2, "
		 "\"system_prompt\": 4}",
			"tensor keep_0 has 3 in dimension 0, expected 2"},
	};
	struct image image;
	float nan = NAN;

	image_read(&image, PREFILL);
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		image_set_metadata(&image, "keep_0", bad[i][0]);
		assert_refused(*state, "check-prefill", &image, bad[i][1]);
		image_set_metadata(&image, "keep_0", good);
	}
	memcpy(image_tensor(&image, "scores") + 4 * 77, &nan, sizeof(nan));
	assert_refused(*state, "check-prefill", &image, "tensor scores: element 77 is not a number");
	image_deinit(&image);
	image_read(&image, GATE);
	assert_refused(*state, "check-prefill", &image, "nothing to check");
	image_deinit(&image);
}

static void test_malformed_decode(void **state)
{
	static const char *const bad[][4] = {
		{"budget", "-5", "256", "metadata: budget is '-5', not a whole number"},
		{"budget", "99999999999999999999", "256", "not a whole number"},
		{"budget", NULL, "256", "metadata: budget is missing"},
		{"prompt", "299", "300", "event 0 after 300 tokens: the prompt has 299"},
		{"buffer", "127", "128", "event 2 after 513 tokens"},
		{"tokens_seen_after_event", "[]", NULL, "missing or not a list"},
		{"tokens_seen_after_event", "[300, 200]", NULL, "tokens_seen_after_event[1]"},
		{"tokens_seen_after_event", "[300, 385, 513, 641, 769, 897, 1025, 1101]", NULL,
			"tokens_seen_after_event[7]"},
		{"tokens_seen_after_event", "[300, 385, 513, 641, 769, 897, 1025, 1100]", NULL,
			"tensor event7.layer0.head0 is missing"},
	};
	struct image image;

	image_read(&image, DECODE);
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		image_set_metadata(&image, bad[i][0], bad[i][1]);
		assert_refused(*state, "check-decode", &image, bad[i][3]);
		if (bad[i][2])
			image_set_metadata(&image, bad[i][0], bad[i][2]);
	}
	image_deinit(&image);
}

static void test_malformed_gate(void **state)
{
	static const char *const missing[] = {"hidden", "score_f64", "k_base", "q_proj.weight"};
	struct image image;

	for (size_t i = 0; i < 4; i++) {
		image_read(&image, GATE);
		image_rename(&image, missing[i]);
		assert_refused(*state, "check-gate", &image, missing[i]);
		image_deinit(&image);
	}
	image_read(&image, GATE);
	json_t *shape = json_pack("[i,i]", 160, 64);

	assert_int_equal(json_object_set_new(json_object_get(image.header, "hidden"), "shape", shape), 0);
	assert_refused(*state, "check-gate", &image, "tensor hidden has 160 rows of 64, the gate takes rows of 160");
	image_deinit(&image);
}

static void test_truncated(void **state)
{
	static const char *const files[][2] = {
		{"check-prefill", PREFILL}, {"check-decode", DECODE}, {"check-gate", GATE}};

	for (size_t i = 0; i < 3; i++) {
		struct image image;

		image_read(&image, files[i][1]);
		image.size /= 2;
		assert_refused(*state, files[i][0], &image, ((struct place *)*state)->file);
		image_deinit(&image);
	}
}

static void test_usage(void **state)
{
	static const char *const wrong[][2] = {
		{"", ""}, {"check-nothing", GATE}, {"check-gate", ""}, {"check-prefill", "a b"}, {"check-decode", ""}};

	for (size_t i = 0; i < 5; i++) {
		assert_int_equal(bench(*state, wrong[i][0], wrong[i][1]), 2);
		assert_non_null(strstr(((struct place *)*state)->output, "usage: "));
	}
	assert_int_equal(bench(*state, "--help", ""), 0);
	assert_int_equal(bench(*state, "check-gate", "/nonexistent/file"), 1);
	assert_non_null(strstr(((struct place *)*state)->output, "/nonexistent/file"));
}

/* ---- other geometries, worked out by hand ---- */

/*
 * 1 layer, 2 heads, 10 context tokens behind 3 of system prompt, chunks of 4, window 2, ratio 0.5:
 * r' = (5 - 2) / (10 - 2) = 0.375, ranges [0,3) at 5 seen, [3,7) at 9, [7,8) at the end.
 * pair keeps what exceeds the 2nd of 6, the 3rd of 8, the 1st of 2; pair-head the best 1 of 3, 1 of 4, 0 of 1.
 */
static void test_small_prefill(void **state)
{
	static const float scores[2][10] = {
		{0.1f, 0.9f, 0.3f, 0.2f, 0.8f, 0.7f, 0.2f, 0.9f, 0.0f, 0.0f},
		{0.5f, 0.5f, 0.5f, 0.9f, 0.1f, 0.2f, 0.3f, 0.4f, 0.1f, 0.0f},
	};
	static const uint8_t pair[2][10] = {{0, 1, 0, 0, 1, 0, 0, 0, 1, 1}, {0, 0, 0, 1, 0, 0, 0, 0, 1, 1}};
	static const uint8_t pair_head[2][10] = {{0, 1, 0, 0, 1, 0, 0, 0, 1, 1}, {1, 0, 0, 1, 0, 0, 0, 0, 1, 1}};
	static const char params[] =
		"{\"scores\": \"s\", \"level\": \"%s\", \"ratio\": 0.5, \"chunk\": 4, \"window\": 2, "
		"\"system_prompt\": 3}";
	struct image image = {0};
	char text[200];

	image_add(&image, "s", "F32", json_pack("[i,i,i]", 1, 2, 10), scores, sizeof(scores));
	image_add(&image, "keep_a", "U8", json_pack("[i,i,i]", 1, 2, 10), pair, sizeof(pair));
	image_add(&image, "keep_b", "U8", json_pack("[i,i,i]", 1, 2, 10), pair_head, sizeof(pair_head));
	(void)snprintf(text, sizeof(text), params, "pair");
	image_set_metadata(&image, "keep_a", text);
	(void)snprintf(text, sizeof(text), params, "pair-head");
	image_set_metadata(&image, "keep_b", text);
	assert_int_equal(bench_image(*state, "check-prefill", &image), 0);
	assert_non_null(strstr(((struct place *)*state)->output, "2 masks"));
	image_tensor(&image, "keep_b")[10] = 0;
	assert_refused(*state, "check-prefill", &image, "keep_b: layer 0 head 1 token 0: expected 0, got 1");
	image_deinit(&image);
}

/*
 * 2 layers, 1 head, budget 2 each (4 in all), first token and newest one at 1.0.
 * After 3 tokens: 1 .3 1 and 1 .6 1 -> the 4th largest is 1, so four stay. After 5: {0,2,3,4} at 1 .9 .1 1 and
 * {0,2,3,4} at 1 .2 .8 1 -> the 4th largest is again 1. After 6: {0,4,5} at 1 .5 1 and 1 .5 1: same, 4 goes.
 */
static void test_small_decode(void **state)
{
	static const float scores[2][6] = {{0.0f, 0.3f, 0.9f, 0.1f, 0.5f, 0.2f}, {0.0f, 0.6f, 0.2f, 0.8f, 0.5f, 0.2f}};
	static const int32_t held[3][2] = {{0, 2}, {0, 4}, {0, 5}};
	static const char *const metadata[][2] = {{"first_tokens", "1"}, {"budget", "2"}, {"window", "1"},
		{"buffer", "2"}, {"prompt", "3"}, {"tokens_seen_after_event", "[3, 5, 6]"}};
	struct image image = {0};
	char name[40];

	image_add(&image, "scores", "F32", json_pack("[i,i,i]", 2, 1, 6), scores, sizeof(scores));
	for (int event = 0; event < 3; event++)
		for (int layer = 0; layer < 2; layer++) {
			(void)snprintf(name, sizeof(name), "event%d.layer%d.head0", event, layer);
			image_add(&image, name, "I32", json_pack("[i]", 2), held[event], sizeof(held[event]));
		}
	for (size_t i = 0; i < 6; i++)
		image_set_metadata(&image, metadata[i][0], metadata[i][1]);
	assert_int_equal(bench_image(*state, "check-decode", &image), 0);
	image_set_metadata(&image, "budget", "3");
	assert_refused(*state, "check-decode", &image, "event 0: layer 0 head 0 token 1: expected evicted, got held");
	image_deinit(&image);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	static const struct CMUnitTest tests[] = {
		TEST(test_copies_pass),
		TEST(test_wrong_mask),
		TEST(test_wrong_prefill_score),
		TEST(test_wrong_gate_score),
		TEST(test_wrong_gate_weight),
		TEST(test_wrong_decode_position),
		TEST(test_wrong_decode_score),
		TEST(test_malformed_prefill),
		TEST(test_malformed_decode),
		TEST(test_malformed_gate),
		TEST(test_truncated),
		TEST(test_usage),
		TEST(test_small_prefill),
		TEST(test_small_decode),
	};

	return runner_run("golden/checks", tests, sizeof(tests) / sizeof(*tests));
}
