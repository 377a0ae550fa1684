/* Staged rows become scores in the right places, and only there. */
#include "daemon/sequence/gates.h"

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/frame.h"
#include "tests/support/space_model.h"

static const struct kvg_policy policy_base = {.ratio = 0.4,
	.mode = KVG_MODE_CHUNKED,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE,
	.context_tokens = 600,
	.chunk_tokens = 300,
	.window = 40,
	.max_new_tokens = 100};

static struct meta_place *place_of(const struct fixture *fixture, uint64_t handle, uint32_t row, uint32_t index)
{
	const struct space *space = fixture->space;
	uint32_t block = sequence_block(space->sequences[(uint32_t)handle], row, index);

	return blocks_places(space->arena, space->pool->meta, block) + index % KVG_BLOCK_TOKENS;
}

static uint64_t sequence_of(struct fixture *fixture, uint32_t tokens)
{
	uint64_t handle = 0;

	assert_int_equal(fixture_create(fixture, &policy_base, &handle), 0);
	assert_int_equal(fixture_reserve(fixture, handle, tokens), 0);
	return handle;
}

static struct kvg_sqe stage_entry(const struct fixture *fixture, uint64_t handle, uint32_t pos, uint32_t rows)
{
	struct kvg_sqe sqe = {.op = KVG_OP_STAGE, .seq = handle, .generation = fixture_generation(fixture, handle)};

	sqe.stage.kind = KVG_STAGE_SCORE;
	sqe.stage.layer_count = fixture->layout.groups[0].layers;
	sqe.stage.pos = pos;
	sqe.stage.rows = rows;
	return sqe;
}

static void test_scores_reach_their_places(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.layers = 3, .heads = 2});
	struct model *model = model_new(fixture, &policy_base, SCORES_WILD);

	(void)state;
	model_prefill(model); /* rows have different base lengths from here on */
	assert_int_equal(model_append(model, 37), 0);
	for (uint32_t row = 0; row < model->rows; row++) {
		for (uint32_t pos = model->fold; pos < model->committed; pos++) {
			uint32_t base = *table_base_len(&fixture->space->table, (uint32_t)model->handle, row);
			float score = place_of(fixture, model->handle, row, base + pos - model->fold)->score;

			assert_memory_equal(
				&score, &model->scores[(size_t)row * model->max_tokens + pos], sizeof(score));
			assert_true(isfinite(score));
		}
	}
	model_release(model);
	fixture_free(fixture);
}

static void test_values_are_cleaned(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.layers = 1, .heads = 1});
	static const float staged[] = {NAN, INFINITY, -INFINITY, -NAN, 0.5f};
	static const float expected[] = {0.0f, FLT_MAX, -FLT_MAX, 0.0f, 0.5f};
	uint64_t handle = sequence_of(fixture, 5);

	(void)state;
	assert_int_equal(fixture_stage(fixture, handle, 0, 5, staged), 0);
	for (uint32_t i = 0; i < 5; i++)
		assert_true(place_of(fixture, handle, 0, i)->score == expected[i]);
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

static void expect_refused(struct fixture *fixture, const struct kvg_sqe *sqe, int status, const char *expected)
{
	assert_int_equal(fixture_call(fixture, sqe), status);
	if (!strstr(fixture->text, expected))
		fail_msg("'%s', not '%s'", fixture->text, expected);
}

static void test_rows_out_of_range(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = sequence_of(fixture, 100); /* room for 128 */
	struct kvg_sqe sqe = stage_entry(fixture, handle, 0, 128);

	(void)state;
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	sqe = stage_entry(fixture, handle, 0, 129);
	expect_refused(fixture, &sqe, -EINVAL, "stage 129 rows from 0, possible are 0 to 128");
	sqe = stage_entry(fixture, handle, 128, 1);
	expect_refused(fixture, &sqe, -EINVAL, "stage 1 rows from 128, possible are 0 to 128");
	sqe = stage_entry(fixture, handle, UINT32_MAX, 2);
	expect_refused(fixture, &sqe, -EINVAL, "possible are 0 to 128");
	sqe = stage_entry(fixture, handle, 1, UINT32_MAX);
	expect_refused(fixture, &sqe, -EINVAL, "stage: ");
	sqe = stage_entry(fixture, handle, 0, 0);
	expect_refused(fixture, &sqe, -EINVAL, "stage 0 rows from 0");
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

static void test_layers_out_of_range(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = sequence_of(fixture, 100);
	struct kvg_sqe sqe = stage_entry(fixture, handle, 0, 1);

	(void)state;
	sqe.stage.layer_begin = 1;
	expect_refused(fixture, &sqe, -EINVAL, "stage: layers 1 + 2, the layout has 2");
	sqe.stage.layer_begin = UINT32_MAX;
	sqe.stage.layer_count = 2;
	expect_refused(fixture, &sqe, -EINVAL, "the layout has 2");
	sqe.stage.layer_begin = 0;
	sqe.stage.layer_count = 0;
	expect_refused(fixture, &sqe, -EINVAL, "stage: layers 0 + 0, the layout has 2");
	sqe.stage.layer_count = UINT32_MAX;
	expect_refused(fixture, &sqe, -EINVAL, "stage: ");
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

/* Wild offsets and sizes: the last byte of the area is the last that is taken. */
static void test_area(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = sequence_of(fixture, 100), size = fixture->staging_size;
	struct kvg_sqe sqe = stage_entry(fixture, handle, 0, 10);
	uint64_t bytes = (uint64_t)10 * 4 * sizeof(float);

	(void)state;
	sqe.stage.offset = size - bytes;
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	sqe.stage.offset += 4;
	expect_refused(fixture, &sqe, -EINVAL, "the staging area has");
	sqe.stage.offset = size + 4;
	expect_refused(fixture, &sqe, -EINVAL, "the staging area has");
	sqe.stage.offset = UINT64_MAX - 3;
	expect_refused(fixture, &sqe, -EINVAL, "the staging area has");
	sqe.stage.offset = 2;
	expect_refused(fixture, &sqe, -EINVAL, "the staging area has");
	sqe.stage.offset = 0;
	sqe.stage.rows = sqe.stage.layer_count = UINT32_MAX;
	expect_refused(fixture, &sqe, -EINVAL, "the staging area has");
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

static void test_kinds(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = sequence_of(fixture, 100);
	struct kvg_sqe sqe = stage_entry(fixture, handle, 0, 1);

	(void)state;
	sqe.stage.kind = KVG_STAGE_PREACT;
	expect_refused(fixture, &sqe, -EOPNOTSUPP,
		"stage: kind 2; this daemon takes HIDDEN (1), SCORE (3); PREACT (2) with the kind cuda only");
	sqe.stage.kind = KVG_STAGE_HIDDEN;
	expect_refused(fixture, &sqe, -ENOKEY, "no gate is loaded");
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

/* No gap is left unscored: rows begin where the layer's scores end, or before. */
static void test_no_gaps(void **state)
{
	struct fixture *fixture = fixture_new(NULL);
	uint64_t handle = sequence_of(fixture, 100);
	struct kvg_sqe sqe = stage_entry(fixture, handle, 0, 10);

	(void)state;
	sqe.stage.layer_count = 1;
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	sqe.stage.pos = 10;
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	sqe.stage.pos = 21;
	expect_refused(fixture, &sqe, -EINVAL, "stage from 21, but layer 0 is scored to 20 only");
	sqe.stage.pos = 10;
	sqe.stage.layer_count = 2;
	expect_refused(fixture, &sqe, -EINVAL, "stage from 10, but layer 1 is scored to 0 only");
	sqe.stage.pos = 0; /* again is fine */
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	assert_int_equal(fixture_truncate(fixture, handle, 0), 0); /* takes the scores with it */
	sqe.stage.pos = 1;
	expect_refused(fixture, &sqe, -EINVAL, "stage from 1, but layer 0 is scored to 0 only");
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

/* ---- hidden states through the pilot's gate, tile borders included ---- */

static struct gate_set *load_pilot(const struct kvg_layout *layout, struct kind *kind)
{
	int file = open("pilot-lm/gate.safetensors", O_RDONLY | O_CLOEXEC), fd;
	size_t size = (size_t)lseek(file, 0, SEEK_END);
	uint8_t *data = malloc(size);
	char text[KVG_TEXT_SIZE];
	struct gate_set *set;

	assert_non_null(data);
	assert_int_equal(pread(file, data, size, 0), size);
	fd = kvg_memfd_from("gate", data, size);
	if (gate_set_load(fd, layout, kind, &set, text, sizeof(text)) < 0)
		fail_msg("%s", text);
	assert_int_equal(close(fd) | close(file), 0);
	free(data);
	return set;
}

static void check_hidden(
	struct fixture *fixture, uint64_t handle, uint32_t layer, uint32_t rows, const uint16_t *hidden)
{
	const struct kvg_gate *gate = fixture->space->gates->gates[layer];
	void *scratch = aligned_alloc(64, (kvg_gate_scratch(gate, 1) + 127) / 64 * 64);
	float scores[4];

	assert_non_null(scratch);
	for (uint32_t i = 0; i < rows; i++) {
		kvg_gate_score(gate, hidden + (size_t)i * 256, 1, scores, scratch);
		for (uint32_t head = 0; head < 4; head++)
			assert_float_equal(place_of(fixture, handle, layer * 4 + head, i)->score, scores[head], 1e-5);
	}
	free(scratch);
}

static void test_hidden_states(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.layers = 6, .heads = 4, .max_tokens = 1024});
	struct random random = {.state = 5};
	uint32_t rows = 256 + 3; /* a tile and a bit */
	size_t count = (size_t)2 * rows * 256;
	uint16_t *hidden;
	uint64_t handle;
	struct kvg_sqe sqe;

	(void)state;
	fixture->space->part.worker->layout.hidden_dim = 256;
	fixture->layout.hidden_dim = 256;
	space_set_gates(fixture->space, load_pilot(&fixture->layout, fixture->kind));
	fixture->staging = realloc(fixture->staging, 2 * count);
	assert_non_null(fixture->staging);
	fixture->space->staging = fixture->staging;
	fixture->space->staging_size = count * sizeof(uint16_t);
	hidden = (uint16_t *)(void *)fixture->staging;
	for (size_t i = 0; i < count; i++)
		hidden[i] = (uint16_t)(0x3f00 | (random_bits(&random) & 0x80ff)); /* 0.5 to 2, either sign */
	handle = sequence_of(fixture, rows);
	sqe = stage_entry(fixture, handle, 0, rows);
	sqe.stage.kind = KVG_STAGE_HIDDEN;
	sqe.stage.layer_begin = 3;
	sqe.stage.layer_count = 2;
	assert_int_equal(fixture_call(fixture, &sqe), 0);
	check_hidden(fixture, handle, 3, rows, hidden);
	check_hidden(fixture, handle, 4, rows, hidden + (size_t)rows * 256);
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

/* A decode step's scores are there when the entry has been taken; more of them are the executor's. */
static void test_short_ones_at_once(void **state)
{
	struct fixture *fixture = fixture_new(&(struct fixture_options){.layers = 4, .heads = 8});
	uint64_t handle = sequence_of(fixture, 64);
	struct kvg_sqe sqe = stage_entry(fixture, handle, 0, 32); /* 1024 scores */
	struct call *call;

	(void)state;
	for (unsigned i = 0; i < 4 * 32 * 8; i++)
		((float *)(void *)fixture->staging)[i] = (float)i;
	call = fixture_start(fixture, &sqe);
	assert_true(call->done);
	assert_int_equal(call->request.cqe.status, 0);
	assert_int_equal(executor_pending(fixture->executor), 0);
	for (uint32_t row = 0; row < 32; row++) {
		uint32_t layer = row / 8, head = row % 8;

		assert_float_equal(place_of(fixture, handle, row, 31)->score, (float)((layer * 32 + 31) * 8 + head), 0);
	}
	sqe.stage.pos = 31;
	sqe.stage.rows = 33;
	call = fixture_start(fixture, &sqe);
	assert_false(call->done);
	fixture_wait(fixture, call);
	assert_int_equal(call->request.cqe.status, 0);
	assert_int_equal(fixture_release(fixture, handle), 0);
	fixture_free(fixture);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_scores_reach_their_places),
		cmocka_unit_test(test_values_are_cleaned),
		cmocka_unit_test(test_rows_out_of_range),
		cmocka_unit_test(test_layers_out_of_range),
		cmocka_unit_test(test_area),
		cmocka_unit_test(test_kinds),
		cmocka_unit_test(test_no_gaps),
		cmocka_unit_test(test_hidden_states),
		cmocka_unit_test(test_short_ones_at_once),
	};

	return runner_run("score", tests, sizeof(tests) / sizeof(tests[0]));
}
