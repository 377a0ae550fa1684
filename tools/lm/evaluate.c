#include "tools/lm/evaluate.h"

#include <errno.h>
#include <stdlib.h>

#include "tools/lm/cleanup.h"
#include "tools/lm/context.h"
#include "tools/lm/hash.h"
#include "tools/lm/prompt.h"

#define QUERY_TOKENS 2u /* LM_TOKEN_QUERY and LM_TOKEN_REPLY around the name */

/* Tokens that the longest query takes with its answer. */
static uint32_t query_room(const struct lm_needle *needle)
{
	uint32_t longest = 0;

	for (size_t i = 0; i < needle->query_count; i++)
		if (needle->queries[i].name.size > longest)
			longest = needle->queries[i].name.size;
	return longest + QUERY_TOKENS + LM_CODE_MAX;
}

int lm_evaluate_size(const struct lm_needles *needles, const char *path, const struct lm_config *config,
	uint32_t *ret_tokens, char *text)
{
	uint32_t most = 0;

	for (size_t i = 0; i < needles->count; i++) {
		const struct lm_needle *needle = &needles->list[i];
		uint32_t tokens = 1 + needle->context.size + query_room(needle);

		if (tokens > config->max_positions)
			return lm_fail(text, -EINVAL,
				"%s:%u: context of %u tokens with query and answer needs %u positions, the model has "
				"max_position_embeddings %u",
				path, needle->line, needle->context.size, tokens, config->max_positions);
		if (tokens > most)
			most = tokens;
	}
	*ret_tokens = most;
	return 0;
}

/* What it takes to read a context, once or again. */
struct context {
	const struct lm_needle *needle;
	const struct lm_options *options;
	const int32_t *prompt; /* BOS and the context */
};

static int read_context(struct lm_worker *worker, const struct context *context, char *text)
{
	return lm_context_begin(worker, context->options, context->prompt, context->needle->context.size + 1,
		query_room(context->needle), text);
}

/* Leaves the sequence as it was after the context and its evictions. */
static int go_back(struct lm_worker *worker, const struct context *context, char *text)
{
	int e;

	if (lm_worker_can_rewind(worker))
		return lm_worker_rewind(worker, text);
	e = lm_worker_end(worker, text);
	return e < 0 ? e : read_context(worker, context, text);
}

static int answer(
	struct lm_worker *worker, const struct lm_query *query, bool *ret_correct, uint64_t *ret_hash, char *text)
{
	_cleanup_free_ int32_t *prompt = lm_prompt_query(query->name.data, query->name.size);
	int32_t tokens[LM_CODE_MAX];
	uint32_t size = query->name.size + QUERY_TOKENS, count = 0;
	int e;

	if (!prompt)
		return lm_fail(text, -ENOMEM, "out of memory");
	e = lm_worker_reserve(worker, size + LM_CODE_MAX, text);
	if (e == 0)
		e = lm_worker_feed(worker, prompt, size, text);
	if (e == 0)
		e = lm_worker_generate(worker, tokens, LM_CODE_MAX, &count, text);
	if (e < 0)
		return e;
	*ret_correct = lm_prompt_matches(tokens, count, query->code.data, query->code.size);
	*ret_hash = lm_hash_tokens(tokens, count);
	return 0;
}

/* Makes room for that many more answers. */
static int expect_answers(struct lm_report *report, size_t count, char *text)
{
	uint64_t *answers = realloc(report->answers, (report->queries + count + 1) * sizeof(*answers));

	if (!answers)
		return lm_fail(text, -ENOMEM, "no memory for %zu answers", count);
	report->answers = answers;
	return 0;
}

static int answer_all(struct lm_worker *worker, const struct context *context, struct lm_report *report, char *text)
{
	const struct lm_needle *needle = context->needle;
	int e = expect_answers(report, needle->query_count, text);

	for (size_t i = 0; e == 0 && report->answers && i < needle->query_count; i++) {
		uint64_t hash = 0;
		bool correct = false;

		e = i ? go_back(worker, context, text) : 0;
		if (e == 0)
			e = answer(worker, &needle->queries[i], &correct, &hash, text);
		if (e < 0)
			return e;
		report->answers[report->queries++] = hash;
		report->correct += correct;
	}
	return e;
}

static int run_context(struct lm_worker *worker, const struct lm_options *options, const struct lm_needle *needle,
	struct lm_report *report, char *text)
{
	_cleanup_free_ int32_t *prompt = lm_prompt_context(needle->context.data, needle->context.size);
	struct context context = {.needle = needle, .options = options, .prompt = prompt};
	struct lm_usage usage = {0};
	int e;

	if (!prompt)
		return lm_fail(text, -ENOMEM, "out of memory");
	e = read_context(worker, &context, text);
	if (e == 0)
		e = lm_worker_usage(worker, &usage, text);
	if (e < 0)
		return e;
	report->contexts++;
	report->usage.bytes_full += usage.bytes_full;
	report->usage.bytes_held += usage.bytes_held;
	report->usage.bytes_physical += usage.bytes_physical;
	e = answer_all(worker, &context, report, text);
	return e < 0 ? e : lm_worker_end(worker, text);
}

int lm_evaluate(struct lm_worker *worker, const struct lm_options *options, const struct lm_needles *needles,
	struct lm_report *ret, char *text)
{
	struct lm_report report = {0};

	for (size_t i = 0; i < needles->count; i++) {
		int e = run_context(worker, options, &needles->list[i], &report, text);

		if (e < 0) {
			lm_report_deinit(&report);
			return e;
		}
	}
	report.times = *lm_worker_times(worker);
	report.moves = *lm_worker_moves(worker);
	report.logits_hash = lm_worker_logits_hash(worker);
	*ret = report;
	return 0;
}
