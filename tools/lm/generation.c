#include "tools/lm/generation.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tools/lm/cleanup.h"
#include "tools/lm/context.h"
#include "tools/lm/prompt.h"

static int copy_events(const struct lm_worker *worker, struct lm_generation *generation, char *text)
{
	const struct lm_event *events = lm_worker_events(worker, &generation->event_count);
	size_t size = generation->event_count * sizeof(*events);

	if (generation->event_count == 0)
		return 0;
	generation->events = malloc(size);
	if (!generation->events)
		return lm_fail(text, -ENOMEM, "no memory for %u events", generation->event_count);
	memcpy(generation->events, events, size);
	return 0;
}

static int run(struct lm_worker *worker, const struct lm_options *options, const int32_t *prompt,
	struct lm_generation *generation, char *text)
{
	int e = lm_context_begin(worker, options, prompt, generation->prompt, options->generate, text);

	if (e == 0)
		e = lm_worker_reserve(worker, options->generate, text);
	if (e == 0)
		e = lm_worker_generate(worker, generation->tokens, options->generate, &generation->count, text);
	if (e == 0)
		e = lm_worker_usage(worker, &generation->usage, text);
	if (e == 0)
		e = copy_events(worker, generation, text);
	return e < 0 ? e : lm_worker_end(worker, text);
}

int lm_generate(struct lm_worker *worker, const struct lm_options *options, const struct lm_bytes *context,
	struct lm_generation *ret, char *text)
{
	_cleanup_free_ int32_t *prompt = lm_prompt_context(context->data, context->size);
	struct lm_generation generation = {.prompt = context->size + 1};
	int e;

	generation.tokens = calloc(options->generate, sizeof(*generation.tokens));
	if (prompt && generation.tokens)
		e = run(worker, options, prompt, &generation, text);
	else
		e = lm_fail(text, -ENOMEM, "no memory for %u tokens", generation.prompt + options->generate);
	if (e < 0)
		lm_generation_deinit(&generation);
	else
		*ret = generation;
	return e;
}

void lm_generation_deinit(struct lm_generation *generation)
{
	free(generation->tokens);
	free(generation->events);
	*generation = (struct lm_generation){0};
}

int lm_generations_size(const struct lm_needles *needles, const char *path, const struct lm_config *config,
	uint32_t generate, uint32_t *ret_tokens, char *text)
{
	uint32_t most = 0;

	for (size_t i = 0; i < needles->count; i++) {
		const struct lm_needle *needle = &needles->list[i];
		uint64_t tokens = 1 + (uint64_t)needle->context.size + generate;

		if (tokens > config->max_positions)
			return lm_fail(text, -EINVAL,
				"%s:%u: context of %u tokens with %u generated needs %llu positions, the model has "
				"max_position_embeddings %u",
				path, needle->line, needle->context.size, generate, (unsigned long long)tokens,
				config->max_positions);
		if (tokens > most)
			most = (uint32_t)tokens;
	}
	*ret_tokens = most;
	return 0;
}

int lm_generations_run(struct lm_worker *worker, const struct lm_options *options, const struct lm_bytes *contexts,
	size_t count, struct lm_generations *ret, char *text)
{
	struct lm_generations all = {.list = calloc(count, sizeof(*all.list))};
	int e = 0;

	if (!all.list)
		return lm_fail(text, -ENOMEM, "no memory for %zu contexts", count);
	while (e == 0 && all.count < count) {
		e = lm_generate(worker, options, &contexts[all.count], &all.list[all.count], text);
		all.count += e == 0;
	}
	all.times = *lm_worker_times(worker);
	all.moves = *lm_worker_moves(worker);
	all.logits_hash = lm_worker_logits_hash(worker);
	if (e < 0)
		lm_generations_deinit(&all);
	else
		*ret = all;
	return e;
}

void lm_generations_deinit(struct lm_generations *generations)
{
	for (size_t i = 0; i < generations->count; i++)
		lm_generation_deinit(&generations->list[i]);
	free(generations->list);
	*generations = (struct lm_generations){0};
}
