#include "kernels/host/select.h"
#include "tools/bench/bench.h"
#include "tools/bench/check.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

/* Decoding of one sequence: what each head holds. Row = layer * heads + head. */
struct decode {
	uint64_t layers, heads, tokens;
	uint64_t first_tokens, window, buffer, prompt;
	uint64_t budget; /* pairs in all rows */
	uint64_t seen;   /* tokens up to the last event */
	float *scores;   /* [rows][tokens] */
	uint32_t *held;  /* [rows][tokens]: positions, ascending */
	size_t *count;   /* [rows] held */
	float *decision; /* scores of the held pairs for one event, rows packed */
	size_t *offset;  /* [rows + 1] into decision and keep */
	uint8_t *keep;   /* of the held pairs */
	void *scratch;   /* of the selection */
};

static void decode_deinit(struct decode *d)
{
	free(d->scores);
	free(d->held);
	free(d->count);
	free(d->decision);
	free(d->offset);
	free(d->keep);
	free(d->scratch);
}

static bool decode_init(const struct check_file *file, struct decode *d)
{
	uint64_t budget, shape[3];

	if (!check_number(file, "first_tokens", &d->first_tokens) || !check_number(file, "budget", &budget) ||
		!check_number(file, "window", &d->window) || !check_number(file, "buffer", &d->buffer) ||
		!check_number(file, "prompt", &d->prompt))
		return false;
	d->scores = check_scores(file, "scores", shape);
	if (!d->scores)
		return false;
	d->layers = shape[0];
	d->heads = shape[1];
	d->tokens = shape[2];
	size_t rows = d->layers * d->heads, pairs = rows * d->tokens;

	if (d->tokens > UINT32_MAX || __builtin_mul_overflow(budget, rows, &d->budget))
		return check_fail(file, "%llu tokens or a budget of %llu tokens for each of %zu heads is too large",
			(unsigned long long)d->tokens, (unsigned long long)budget, rows);
	d->held = check_alloc(file, pairs * sizeof(*d->held));
	d->count = check_alloc(file, rows * sizeof(*d->count));
	d->decision = check_alloc(file, pairs * sizeof(*d->decision));
	d->offset = check_alloc(file, (rows + 1) * sizeof(*d->offset));
	d->keep = check_alloc(file, pairs);
	d->scratch = check_alloc(file, kvg_select_scratch(pairs, rows));
	if (!d->held || !d->count || !d->decision || !d->offset || !d->keep || !d->scratch)
		return false;
	memset(d->count, 0, rows * sizeof(*d->count));
	return true;
}

/* Appends the tokens since the last event and writes down what each held pair counts for this decision. */
static void gather_scores(struct decode *d, uint64_t seen)
{
	size_t rows = d->layers * d->heads, n = 0;
	uint64_t recent = seen > d->window ? seen - d->window : 0;

	for (size_t row = 0; row < rows; row++) {
		uint32_t *held = d->held + row * d->tokens;

		for (uint64_t token = d->seen; token < seen; token++)
			held[d->count[row]++] = (uint32_t)token;
		d->offset[row] = n;
		for (size_t i = 0; i < d->count[row]; i++)
			d->decision[n++] = held[i] < d->first_tokens || held[i] >= recent
						   ? 1.0f
						   : d->scores[row * d->tokens + held[i]];
	}
	d->offset[rows] = n;
	d->seen = seen;
}

static void run_event(struct decode *d, uint64_t seen)
{
	size_t rows = d->layers * d->heads;

	gather_scores(d, seen);
	kvg_select_budget(&(struct kvg_select_input){d->decision, d->offset, (uint32_t)d->layers, (uint32_t)d->heads},
		d->budget, d->keep, d->scratch);
	for (size_t row = 0; row < rows; row++) {
		uint32_t *held = d->held + row * d->tokens;
		size_t kept = 0;

		for (size_t i = 0; i < d->count[row]; i++) {
			held[kept] = held[i];
			kept += d->keep[d->offset[row] + i];
		}
		d->count[row] = kept;
	}
}

/* Both lists ascend, so the first difference is a token that only one of them has. */
static bool compare_row(const struct decode *d, size_t event, size_t row, const int32_t *expected, size_t n)
{
	const uint32_t *held = d->held + row * d->tokens;
	size_t i = 0;

	while (i < n && i < d->count[row] && expected[i] >= 0 && (uint32_t)expected[i] == held[i])
		i++;
	if (i == n && i == d->count[row])
		return true;
	bool missing = i < n && (i == d->count[row] || expected[i] < (int64_t)held[i]);

	(void)fprintf(stderr, "FAILED: event %zu: layer %zu head %zu token %lld: expected %s, got %s\n", event,
		row / d->heads, row % d->heads, missing ? (long long)expected[i] : (long long)held[i],
		missing ? "held" : "evicted", missing ? "evicted" : "held");
	return false;
}

static bool compare_event(const struct check_file *file, const struct decode *d, size_t event)
{
	for (size_t row = 0; row < d->layers * d->heads; row++) {
		char name[96];

		(void)snprintf(name, sizeof(name), "event%zu.layer%zu.head%zu", event, row / d->heads, row % d->heads);
		const struct kvg_tensor *tensor = check_tensor(file, name, KVG_TENSOR_I32, 1);

		if (!tensor)
			return false;
		_cleanup_free_ int32_t *expected = check_copy(file, tensor);

		if (!expected || !compare_row(d, event, row, expected, tensor->count))
			return false;
	}
	return true;
}

/* Tokens seen at an event, checked against the previous event, the prompt, the buffer and the scores. */
static bool event_tokens(
	const struct check_file *file, const struct decode *d, const json_t *list, size_t event, uint64_t *ret)
{
	const json_t *entry = json_array_get(list, event);
	json_int_t seen = json_integer_value(entry);

	if (!json_is_integer(entry) || seen < 0 || (uint64_t)seen < d->seen || (uint64_t)seen > d->tokens)
		return check_fail(file, "metadata: tokens_seen_after_event[%zu] is not a number from %llu to %llu",
			event, (unsigned long long)d->seen, (unsigned long long)d->tokens);
	if (event == 0 ? (uint64_t)seen != d->prompt : (uint64_t)seen - d->seen > d->buffer)
		return check_fail(file, "event %zu after %lld tokens: the prompt has %llu, the buffer holds %llu",
			event, (long long)seen, (unsigned long long)d->prompt, (unsigned long long)d->buffer);
	*ret = (uint64_t)seen;
	return true;
}

static bool run_events(const struct check_file *file, struct decode *d, const json_t *list)
{
	for (size_t event = 0; event < json_array_size(list); event++) {
		uint64_t seen;

		if (!event_tokens(file, d, list, event, &seen))
			return false;
		run_event(d, seen);
		if (!compare_event(file, d, event))
			return false;
	}
	(void)printf("ok: %zu events of %llu layers x %llu heads agree\n", json_array_size(list),
		(unsigned long long)d->layers, (unsigned long long)d->heads);
	return true;
}

int bench_check_decode(int argc, char **argv)
{
	static const char key[] = "tokens_seen_after_event";
	_cleanup_file_ struct check_file file = {0};
	__attribute__((cleanup(decode_deinit))) struct decode decode = {0};
	int status = check_open(argc, argv, &file);
	bool holds = false;

	if (status != BENCH_OK)
		return status;
	if (!decode_init(&file, &decode))
		return BENCH_FAIL;
	const char *text = kvg_safetensors_metadata(file.tensors, key);
	json_t *list = text ? json_loads(text, 0, NULL) : NULL;

	if (json_array_size(list))
		holds = run_events(&file, &decode, list);
	else
		check_print(&file, "metadata: %s is missing or not a list of numbers", key);
	json_decref(list);
	return holds ? BENCH_OK : BENCH_FAIL;
}
