#include "tools/lm/model.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/safetensors.h"
#include "tests/support/runner.h"
#include "tests/unit/tools/lm/memory_kv.h"
#include "tools/lm/numerics.h"

#define TAIL 64u /* tokens that the golden file has logits and hidden states of */

struct fixture {
	char text[LM_TEXT];
	struct lm_pool *pool;
	struct lm_model *model;
	struct kvg_safetensors *golden;
	const int32_t *tokens;
	uint32_t count;
};

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	const struct kvg_tensor *tokens;

	assert_non_null(f);
	assert_int_equal(lm_pool_new(2, &f->pool), 0);
	if (lm_model_load("pilot-lm", f->pool, &f->model, f->text) < 0)
		fail_msg("%s", f->text);
	if (kvg_safetensors_open("golden/model_golden.safetensors", &f->golden, f->text, sizeof(f->text)) < 0)
		fail_msg("%s", f->text);
	tokens = kvg_safetensors_find(f->golden, "tokens");
	assert_non_null(tokens);
	f->tokens = tokens->data;
	f->count = (uint32_t)tokens->count;
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	(void)kvg_safetensors_free(f->golden);
	(void)lm_model_free(f->model);
	(void)lm_pool_free(f->pool);
	free(f);
	return 0;
}

/* Feeds all tokens in the given chunks; returns the largest difference from the golden logits of the last TAIL. */
static float golden_difference(struct fixture *f, struct memory_kv *kv, const uint32_t *chunks)
{
	const struct lm_config *c = lm_model_config(f->model);
	const float *golden = kvg_safetensors_find(f->golden, "logits_last64")->data;
	struct lm_kv calls = memory_kv_calls(kv);
	float max = 0.0f;
	uint32_t pos = 0;

	for (size_t i = 0; pos < f->count; i++) {
		if (lm_model_forward(f->model, &calls, f->tokens + pos, pos, chunks[i], f->text) < 0)
			fail_msg("%s", f->text);
		for (uint32_t t = 0; t < chunks[i]; t++)
			if (pos + t >= f->count - TAIL)
				max = fmaxf(max,
					lm_max_difference(lm_model_logits(f->model, t),
						golden + (size_t)(pos + t - (f->count - TAIL)) * c->vocab, c->vocab));
		pos += chunks[i];
	}
	assert_int_equal(pos, f->count);
	return max;
}

static float bf16(uint16_t bits)
{
	uint32_t wide = (uint32_t)bits << 16;
	float value;

	memcpy(&value, &wide, sizeof(value));
	return value;
}

/* Relative error (Frobenius) of the hidden states that were staged, for the last TAIL tokens of all layers. */
static double hidden_error(struct fixture *f, const struct memory_kv *kv)
{
	const struct lm_config *c = lm_model_config(f->model);
	const uint16_t *golden = kvg_safetensors_find(f->golden, "attn_input_bf16")->data;
	size_t size = (size_t)TAIL * c->hidden;
	double error = 0.0, norm = 0.0;

	for (uint32_t layer = 0; layer < c->layers; layer++) {
		const uint16_t *staged = kv->hidden + ((size_t)layer * f->count + f->count - TAIL) * c->hidden;

		for (size_t i = 0; i < size; i++) {
			double want = (double)bf16(golden[layer * size + i]), got = (double)bf16(staged[i]);

			error += (got - want) * (got - want);
			norm += want * want;
		}
	}
	assert_true(norm > 0.0);
	return sqrt(error / norm);
}

static void test_golden_logits_and_hidden_states(void **state)
{
	struct fixture *f = *state;
	const uint32_t chunks[] = {f->count};
	struct memory_kv kv;

	memory_kv_init(&kv, lm_model_config(f->model), f->count);
	assert_true(golden_difference(f, &kv, chunks) <= 0.05f);
	assert_true(hidden_error(f, &kv) <= 0.01);
	memory_kv_deinit(&kv);
}

/* Chunks of one row, a few rows and many take the three ways through the pool. */
static void test_golden_logits_in_chunks(void **state)
{
	struct fixture *f = *state;
	const uint32_t chunks[] = {1, 700, f->count - 1 - 700 - 12 - 2, 12, 1, 1};
	struct memory_kv kv;

	memory_kv_init(&kv, lm_model_config(f->model), f->count);
	assert_true(golden_difference(f, &kv, chunks) <= 0.05f);
	memory_kv_deinit(&kv);
}

static void test_errors_of_the_kv_are_passed_up(void **state)
{
	struct fixture *f = *state;
	struct memory_kv kv;
	struct lm_kv calls;

	memory_kv_init(&kv, lm_model_config(f->model), 32);
	kv.fail = -EPIPE;
	calls = memory_kv_calls(&kv);
	assert_int_equal(lm_model_forward(f->model, &calls, f->tokens, 0, 32, f->text), -EPIPE);
	assert_non_null(strstr(f->text, "layer 0: hidden states of positions 0 to 31"));
	calls.stage = NULL;
	assert_int_equal(lm_model_forward(f->model, &calls, f->tokens, 0, 32, f->text), -EPIPE);
	assert_non_null(strstr(f->text, "layer 0: KV of positions 0 to 31"));
	memory_kv_deinit(&kv);
}

static void test_bad_tokens_and_positions(void **state)
{
	struct fixture *f = *state;
	const int32_t tokens[] = {1, 272}, negative[] = {-1};
	struct lm_kv calls = {0};

	assert_int_equal(lm_model_forward(f->model, &calls, tokens, 0, 2, f->text), -EINVAL);
	assert_string_equal(f->text, "token 1 is 272, the vocabulary has 272");
	assert_int_equal(lm_model_forward(f->model, &calls, negative, 0, 1, f->text), -EINVAL);
	assert_int_equal(lm_model_forward(f->model, &calls, tokens, 4095, 2, f->text), -EINVAL);
	assert_string_equal(f->text, "positions 4095 to 4097: the model has max_position_embeddings 4096");
	assert_int_equal(lm_model_forward(f->model, &calls, tokens, UINT32_MAX, 2, f->text), -EINVAL);
	assert_int_equal(lm_model_forward(f->model, &calls, tokens, 0, 0, f->text), -EINVAL);
}

static void test_missing_folder(void **state)
{
	struct fixture *f = *state;
	struct lm_model *model = NULL;

	assert_int_equal(lm_model_load("no-such-folder", f->pool, &model, f->text), -ENOENT);
	assert_null(model);
	assert_string_equal(f->text, "no-such-folder/config.json: No such file or directory");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_golden_logits_and_hidden_states, setup, teardown),
		cmocka_unit_test_setup_teardown(test_golden_logits_in_chunks, setup, teardown),
		cmocka_unit_test_setup_teardown(test_errors_of_the_kv_are_passed_up, setup, teardown),
		cmocka_unit_test_setup_teardown(test_bad_tokens_and_positions, setup, teardown),
		cmocka_unit_test_setup_teardown(test_missing_folder, setup, teardown),
	};

	return runner_run("tools/lm/model", tests, sizeof(tests) / sizeof(tests[0]));
}
