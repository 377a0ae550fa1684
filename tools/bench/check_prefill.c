#include "kernels/host/select.h"
#include "tools/bench/bench.h"
#include "tools/bench/check.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

#define MASK_PREFIX "keep_"

/* How one mask came about: the JSON in the metadata under the mask's name. */
struct mask_params {
	char scores[64]; /* name of the tensor */
	uint32_t level;
	double ratio;
	uint64_t chunk, window, system_prompt;
};

/* Prefill of one context: which pairs are left. */
struct prefill {
	const struct check_file *file;
	const struct mask_params *params;
	uint64_t layers, heads, tokens;
	float *scores; /* [layers][heads][tokens] */
	uint8_t *keep; /* same shape */
};

static bool parse_level(const char *name, uint32_t *ret)
{
	static const char *const names[] = {
		[KVG_SELECT_PAIR] = "pair",
		[KVG_SELECT_PAIR_HEAD] = "pair-head",
		[KVG_SELECT_PAIR_LAYER] = "pair-layer",
		[KVG_SELECT_ADAKV_LAYER] = "adakv-layer",
	};

	for (uint32_t i = 0; i < sizeof(names) / sizeof(*names); i++)
		if (strcmp(name, names[i]) == 0) {
			*ret = i;
			return true;
		}
	return false;
}

static bool parse_params(const struct check_file *file, const char *mask, struct mask_params *ret)
{
	const char *text = kvg_safetensors_metadata(file->tensors, mask), *scores, *level;
	json_int_t chunk, window, system_prompt;
	json_error_t error;

	if (!text)
		return check_fail(file, "metadata: %s is missing", mask);
	json_t *json = json_loads(text, 0, &error);

	if (!json)
		return check_fail(file, "metadata: %s is not JSON: %s", mask, error.text);
	int r = json_unpack_ex(json, &error, 0, "{s:s, s:s, s:F, s:I, s:I, s:I}", "scores", &scores, "level", &level,
		"ratio", &ret->ratio, "chunk", &chunk, "window", &window, "system_prompt", &system_prompt);
	bool fits = r == 0 && strlen(scores) < sizeof(ret->scores) && parse_level(level, &ret->level) &&
		    ret->ratio > 0.0 && ret->ratio <= 1.0 && chunk >= 0 && window >= 0 && system_prompt >= 0;

	if (r == 0 && strlen(scores) < sizeof(ret->scores))
		(void)stpcpy(ret->scores, scores);
	json_decref(json);
	if (r < 0)
		return check_fail(file, "metadata: %s: %s", mask, error.text);
	if (!fits)
		return check_fail(
			file, "metadata: %s has a value out of range or an unknown level: %.200s", mask, text);
	ret->chunk = (uint64_t)chunk;
	ret->window = (uint64_t)window;
	ret->system_prompt = (uint64_t)system_prompt;
	return true;
}

/* Prunes tokens [begin, end) of every head, as the daemon does after a chunk. */
static bool evict_range(struct prefill *p, uint64_t begin, uint64_t end, double ratio)
{
	size_t rows = p->layers * p->heads, n = end - begin;
	_cleanup_free_ float *scores = check_alloc(p->file, rows * n * sizeof(*scores));
	_cleanup_free_ uint8_t *keep = check_alloc(p->file, rows * n);
	_cleanup_free_ size_t *offset = check_alloc(p->file, (rows + 1) * sizeof(*offset));
	_cleanup_free_ void *scratch = check_alloc(p->file, kvg_select_scratch(rows * n, rows));

	if (!scores || !keep || !offset || !scratch)
		return false;
	for (size_t row = 0; row < rows; row++) {
		offset[row] = row * n;
		memcpy(scores + row * n, p->scores + row * p->tokens + begin, n * sizeof(*scores));
	}
	offset[rows] = rows * n;
	kvg_select_ratio(&(struct kvg_select_input){scores, offset, (uint32_t)p->layers, (uint32_t)p->heads},
		p->params->level, ratio, keep, scratch);
	for (size_t row = 0; row < rows; row++)
		memcpy(p->keep + row * p->tokens + begin, keep + row * n, n);
	return true;
}

/* Chunk boundaries count the system prompt; the context starts behind it. */
static bool run_prefill(struct prefill *p)
{
	uint64_t prompt = p->params->system_prompt, total = prompt + p->tokens;
	uint64_t chunk = p->params->chunk ? p->params->chunk : total, start = 0, window;
	double ratio;

	memset(p->keep, 1, p->layers * p->heads * p->tokens);
	if (p->params->ratio >= 1.0)
		return true;
	kvg_select_prefill_params(p->tokens, p->params->chunk, p->params->ratio, p->params->window, 0, &ratio, &window);
	for (uint64_t fed = 0; fed < total;) {
		fed = chunk < total - fed ? fed + chunk : total;
		uint64_t seen = fed > prompt ? fed - prompt : 0;

		if (seen < window || seen - window <= start)
			continue;
		if (!evict_range(p, start, seen - window, ratio))
			return false;
		start = seen - window;
	}
	return true;
}

static bool compare_mask(const struct prefill *p, const char *name, const uint8_t *expected)
{
	size_t rows = p->layers * p->heads;

	for (size_t i = 0; i < rows * p->tokens; i++)
		if (expected[i] != p->keep[i]) {
			(void)fprintf(stderr, "FAILED: %s: layer %zu head %zu token %zu: expected %u, got %u\n", name,
				i / p->tokens / p->heads, i / p->tokens % p->heads, i % p->tokens, expected[i],
				p->keep[i]);
			return false;
		}
	return true;
}

static bool check_mask(const struct check_file *file, const char *name)
{
	struct mask_params params;
	uint64_t shape[3];

	if (!parse_params(file, name, &params))
		return false;
	_cleanup_free_ float *scores = check_scores(file, params.scores, shape);
	if (!scores)
		return false;
	const struct kvg_tensor *mask = check_tensor_shaped(file, name, KVG_TENSOR_U8, 3, shape);
	if (!mask)
		return false;
	if (params.system_prompt > UINT32_MAX || params.window > UINT32_MAX)
		return check_fail(file, "metadata: %s: a window or system prompt of more than 2^32 tokens", name);
	_cleanup_free_ uint8_t *keep = check_alloc(file, mask->count);
	if (!keep)
		return false;
	struct prefill prefill = {file, &params, shape[0], shape[1], shape[2], scores, keep};

	return run_prefill(&prefill) && compare_mask(&prefill, name, mask->data);
}

int bench_check_prefill(int argc, char **argv)
{
	_cleanup_file_ struct check_file file = {0};
	size_t masks = 0;
	int status = check_open(argc, argv, &file);

	if (status != BENCH_OK)
		return status;
	for (size_t i = 0; i < kvg_safetensors_count(file.tensors); i++) {
		const char *name = kvg_safetensors_at(file.tensors, i)->name;

		if (strncmp(name, MASK_PREFIX, strlen(MASK_PREFIX)) != 0)
			continue;
		masks++;
		if (!check_mask(&file, name))
			return BENCH_FAIL;
	}
	if (!masks) {
		check_print(&file, "no tensor is named " MASK_PREFIX "*, nothing to check");
		return BENCH_FAIL;
	}
	(void)printf("ok: %zu masks agree bit for bit\n", masks);
	return BENCH_OK;
}
