/* Against the golden masks: evicted at 0.1, then recalled to what the file has masks of, in all of its chunks. */
#include "daemon/sequence/recall.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/safetensors.h"
#include "tests/support/space_fixture.h"

/* One mask, as its metadata says. */
struct golden {
	char scores[32], level[32];
	double ratio;
	unsigned chunk, window, prompt;
};

struct context {
	struct fixture *fixture;
	const struct kvg_tensor *scores; /* [layers][heads][tokens] */
	struct kvg_policy policy;
	uint64_t handle;
	uint32_t layers, heads, tokens;
};

static struct golden read_golden(const struct kvg_safetensors *file, unsigned index)
{
	struct golden golden;
	char name[32];

	(void)snprintf(name, sizeof(name), "keep_%u", index);
	assert_int_equal(
		sscanf(kvg_safetensors_metadata(file, name),
			"{\"scores\": \"%31[^\"]\", \"level\": \"%31[^\"]\", \"ratio\": %lf, \"chunk\": %u, "
			"\"window\": %u, "
			"\"system_prompt\": %u}",
			golden.scores, golden.level, &golden.ratio, &golden.chunk, &golden.window, &golden.prompt),
		6);
	return golden;
}

static uint8_t level_of(const char *name)
{
	static const char *const names[] = {"pair", "pair-head", "pair-layer", "adakv-layer"};

	for (uint8_t i = 0; i < 4; i++)
		if (strcmp(name, names[i]) == 0)
			return i;
	fail_msg("level %s", name);
	return 0;
}

static void append(struct context *context, uint32_t begin, uint32_t end)
{
	uint32_t prefix = context->policy.prefix_tokens, first = begin < prefix ? prefix : begin, n = end - first;
	float *staged = calloc((size_t)context->layers * context->heads * n, sizeof(float));
	const float *scores = context->scores->data;

	assert_non_null(staged);
	for (size_t layer = 0; layer < context->layers; layer++)
		for (size_t i = 0; i < n; i++)
			for (size_t head = 0; head < context->heads; head++)
				staged[(layer * n + i) * context->heads + head] =
					scores[(layer * context->heads + head) * context->tokens + first - prefix + i];
	assert_int_equal(fixture_reserve(context->fixture, context->handle, end - begin), 0);
	assert_int_equal(fixture_stage(context->fixture, context->handle, first, n, staged), 0);
	assert_int_equal(fixture_commit(context->fixture, context->handle, end), 0);
	assert_int_equal(fixture_evict(context->fixture, context->handle, KVG_EVICT_PREFILL), 0);
	free(staged);
}

static struct context read_prompt(const struct kvg_safetensors *file, const struct golden *golden)
{
	struct context context = {.scores = kvg_safetensors_find(file, golden->scores)};
	uint32_t total;

	assert_non_null(context.scores);
	context.layers = (uint32_t)context.scores->shape[0];
	context.heads = (uint32_t)context.scores->shape[1];
	context.tokens = (uint32_t)context.scores->shape[2];
	total = context.tokens + golden->prompt;
	context.policy = (struct kvg_policy){.ratio = 0.1,
		.mode = KVG_MODE_CHUNKED,
		.level = level_of(golden->level),
		.flags = KVG_POLICY_RETAIN_HOST,
		.prefix_tokens = golden->prompt,
		.context_tokens = context.tokens,
		.chunk_tokens = golden->chunk,
		.window = golden->window};
	context.fixture = fixture_new(
		&(struct fixture_options){.layers = context.layers, .heads = context.heads, .host_size = 16u << 20});
	assert_int_equal(fixture_create(context.fixture, &context.policy, &context.handle), 0);
	for (uint32_t at = 0; at < total;) {
		uint32_t end = golden->chunk < total - at ? at + golden->chunk : total;

		append(&context, at, end);
		at = end;
	}
	return context;
}

/* The positions that a row holds. */
static void list_row(const struct context *context, uint32_t row, uint8_t *ret_held)
{
	const struct space *space = context->fixture->space;
	uint32_t slot = (uint32_t)context->handle, length = *table_base_len(&space->table, slot, row);

	for (uint32_t i = 0; i < length; i++) {
		uint32_t id = table_row(&space->table, slot, row)[i / KVG_BLOCK_TOKENS];
		int32_t pos = blocks_places(space->arena, space->pool->meta, id)[i % KVG_BLOCK_TOKENS].pos;

		assert_in_range(pos, 0, context->tokens + context->policy.prefix_tokens - 1);
		assert_int_equal(ret_held[pos]++, 0);
	}
}

static void check_mask(const struct context *context, const struct kvg_tensor *mask)
{
	const uint8_t *keep = mask->data;
	uint32_t prefix = context->policy.prefix_tokens;
	uint8_t *held = malloc(context->tokens + prefix);

	assert_non_null(held);
	for (uint32_t row = 0; row < context->layers * context->heads; row++) {
		memset(held, 0, context->tokens + prefix);
		list_row(context, row, held);
		for (uint32_t i = 0; i < prefix; i++)
			assert_int_equal(held[i], 1);
		if (memcmp(held + prefix, keep + (size_t)row * context->tokens, context->tokens) != 0)
			fail_msg("%s: row %u is not what it says", mask->name, row);
	}
	free(held);
}

static const struct kvg_tensor *find_mask(
	const struct kvg_safetensors *file, const struct golden *like, unsigned count, double ratio)
{
	char name[32];

	for (unsigned i = 0; i < count; i++) {
		struct golden golden = read_golden(file, i);

		(void)snprintf(name, sizeof(name), "keep_%u", i);
		if (strcmp(golden.scores, like->scores) == 0 && strcmp(golden.level, like->level) == 0 &&
			golden.chunk == like->chunk && golden.ratio == ratio)
			return kvg_safetensors_find(file, name);
	}
	fail_msg("%s, %s, chunk %u: no mask at %g", like->scores, like->level, like->chunk, ratio);
	return NULL;
}

static void test_golden_masks(void **state)
{
	static const double ratios[] = {0.3, 0.5, 0.9};
	struct kvg_safetensors *file;
	unsigned count, runs = 0;
	char text[256];

	(void)state;
	if (kvg_safetensors_open("golden/evict_prefill.safetensors", &file, text, sizeof(text)) < 0)
		fail_msg("%s", text);
	count = (unsigned)kvg_safetensors_count(file) - 2;
	for (unsigned i = 0; i < count; i++) {
		struct golden golden = read_golden(file, i);
		struct context context;

		if (golden.ratio != 0.1)
			continue;
		context = read_prompt(file, &golden);
		check_mask(&context, find_mask(file, &golden, count, 0.1));
		for (unsigned k = 0; k < 3; k++) {
			struct kvg_sqe sqe = {.op = KVG_OP_RECALL, .seq = context.handle, .recall.ratio = ratios[k]};

			sqe.generation = fixture_generation(context.fixture, context.handle);
			assert_int_equal(fixture_call(context.fixture, &sqe), 0);
			assert_true(context.fixture->cqe.value[1] > 0);
			check_mask(&context, find_mask(file, &golden, count, ratios[k]));
		}
		assert_int_equal(fixture_release(context.fixture, context.handle), 0);
		fixture_free(context.fixture);
		runs++;
	}
	assert_int_equal(runs, 24);
	(void)kvg_safetensors_free(file);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_golden_masks),
	};

	return runner_run("recall_select", tests, sizeof(tests) / sizeof(tests[0]));
}
