#include "tools/lm/context.h"

static int read_context(struct lm_worker *worker, const struct lm_options *options, const struct kvg_policy *policy,
	const int32_t *prompt, uint32_t count, char *text)
{
	int e = lm_worker_begin(worker, policy, text);

	if (e == 0)
		e = lm_worker_prefill(worker, prompt, count, NULL, NULL, text);
	if (e == 0 && options->recall > 0.0)
		e = lm_worker_recall(worker, options->recall, text);
	if (e == 0 && options->publish)
		e = lm_worker_publish(worker, policy, prompt, count, text);
	return e;
}

int lm_context_begin(struct lm_worker *worker, const struct lm_options *options, const int32_t *prompt, uint32_t count,
	uint32_t max_new, char *text)
{
	struct kvg_policy policy = lm_options_policy(options, count - 1, max_new);
	int e = options->attach ? lm_worker_attach(worker, &policy, prompt, count, text)
				: read_context(worker, options, &policy, prompt, count, text);

	if (e == 0 && options->offload_between)
		e = lm_worker_offload(worker, text);
	return e;
}
