/* kvgate-lm: the reference worker. A Qwen3 model whose KV is all in kvgated's memory. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tools/lm/continuation.h"
#include "tools/lm/evaluate.h"
#include "tools/lm/golden.h"

#define EXIT_USAGE 2

struct app {
	struct lm_options options;
	struct lm_pool *pool;
	struct lm_model *model;
	struct lm_worker *worker;
	char text[LM_TEXT];
};

/* The model folder's own name, for the daemon's reports. */
static void model_name(const char *dir, char name[128])
{
	char *path = realpath(dir, NULL);
	const char *slash = path ? strrchr(path, '/') : NULL;

	(void)snprintf(name, 128, "%s", slash && slash[1] ? slash + 1 : dir);
	free(path);
}

static int connect_worker(struct app *app, uint32_t max_tokens)
{
	const struct lm_options *o = &app->options;
	char name[128];
	struct lm_worker_setup setup = {.socket = o->socket,
		.gate = o->gate,
		.model_name = name,
		.model = app->model,
		.kv_dtype = o->kv_dtype,
		.max_tokens = max_tokens,
		.chunk_tokens = o->chunk};

	model_name(o->model, name);
	return lm_worker_open(&setup, &app->worker, app->text);
}

static int print_generations(struct app *app, struct lm_generations *all)
{
	int e = 0;

	if (!app->options.json)
		lm_report_generations_text(all, &app->options, stdout);
	else if (lm_report_generations_json(all, &app->options, stdout) < 0)
		e = lm_fail(app->text, -EIO, "standard output: the report could not be written");
	lm_generations_deinit(all);
	return e;
}

/* Continues the contexts of the needle file, instead of answering their queries. */
static int run_contexts(struct app *app, const struct lm_needles *needles)
{
	const struct lm_options *o = &app->options;
	struct lm_bytes *contexts = calloc(needles->count, sizeof(*contexts));
	struct lm_generations all;
	uint32_t tokens;
	int e;

	if (!contexts)
		return lm_fail(app->text, -ENOMEM, "no memory for %zu contexts", needles->count);
	for (size_t i = 0; i < needles->count; i++)
		contexts[i] = needles->list[i].context;
	e = lm_generations_size(needles, o->needles, lm_model_config(app->model), o->generate, &tokens, app->text);
	if (e == 0)
		e = connect_worker(app, tokens);
	if (e == 0)
		e = lm_generations_run(app->worker, o, contexts, needles->count, &all, app->text);
	free(contexts);
	return e < 0 ? e : print_generations(app, &all);
}

static int run_queries(struct app *app, const struct lm_needles *needles)
{
	const struct lm_options *o = &app->options;
	struct lm_report report;
	uint32_t tokens;
	int e = lm_evaluate_size(needles, o->needles, lm_model_config(app->model), &tokens, app->text);

	if (e == 0)
		e = connect_worker(app, tokens);
	if (e == 0)
		e = lm_evaluate(app->worker, o, needles, &report, app->text);
	if (e < 0)
		return e;
	if (!o->json)
		lm_report_text(&report, o, stdout);
	else if (lm_report_json(&report, o, stdout) < 0)
		e = lm_fail(app->text, -EIO, "standard output: the report could not be written");
	lm_report_deinit(&report);
	return e;
}

static int run_needles(struct app *app)
{
	const struct lm_options *o = &app->options;
	struct lm_needles needles;
	int e = lm_needles_read(o->needles, o->limit, &needles, app->text);

	if (e < 0)
		return e;
	e = o->generate_given ? run_contexts(app, &needles) : run_queries(app, &needles);
	lm_needles_deinit(&needles);
	return e;
}

/* The continuation's figures instead of its bytes. */
static int report_text(struct app *app, const struct lm_text_file *file)
{
	struct lm_bytes context = {.data = file->data, .size = file->size};
	struct lm_generations all;
	int e = lm_generations_run(app->worker, &app->options, &context, 1, &all, app->text);

	return e < 0 ? e : print_generations(app, &all);
}

static int print_text(struct app *app, const struct lm_text_file *file)
{
	int e = lm_continue(app->worker, &app->options, file, stdout, app->text);

	if (e == 0)
		(void)putchar('\n');
	return e;
}

static int run_text(struct app *app)
{
	const struct lm_options *o = &app->options;
	struct lm_text_file file;
	int e = lm_text_read(o->text, lm_model_config(app->model), o->generate, &file, app->text);

	if (e < 0)
		return e;
	e = connect_worker(app, 1 + file.size + o->generate);
	if (e == 0)
		e = o->json ? report_text(app, &file) : print_text(app, &file);
	lm_text_deinit(&file);
	return e;
}

static int run_golden(struct app *app)
{
	const struct lm_options *o = &app->options;
	float difference = 0.0f, tolerance = lm_golden_tolerance(o->kv_dtype);
	struct lm_golden golden;
	int e = lm_golden_read(o->golden, lm_model_config(app->model), &golden, app->text);

	if (e < 0)
		return e;
	e = connect_worker(app, golden.count);
	if (e == 0)
		e = lm_golden_run(app->worker, app->model, o, &golden, &difference, app->text);
	lm_golden_deinit(&golden);
	if (e < 0)
		return e;
	(void)printf("largest difference of logits %.5f, limit %.2f\n", (double)difference, (double)tolerance);
	if (difference > tolerance)
		return lm_fail(app->text, -ERANGE, "%s: logits differ by %.5f, limit %.2f", o->golden,
			(double)difference, (double)tolerance);
	return 0;
}

static int run(struct app *app)
{
	const struct lm_options *o = &app->options;
	int e = lm_pool_new(o->threads, &app->pool);

	if (e < 0)
		return lm_fail(app->text, e, "%u threads: %s", o->threads, strerror(-e));
	e = lm_model_load(o->model, app->pool, &app->model, app->text);
	if (e < 0)
		return e;
	if (lm_model_config(app->model)->vocab < LM_TOKENS)
		return lm_fail(app->text, -EINVAL, "%s/config.json: vocab_size is %u, bytes and special tokens need %d",
			o->model, lm_model_config(app->model)->vocab, LM_TOKENS);
	if (o->needles)
		e = run_needles(app);
	else if (o->text)
		e = run_text(app);
	else
		e = run_golden(app);
	if (e == 0 && fflush(stdout) != 0)
		e = lm_fail(app->text, -errno, "standard output: %s", strerror(errno));
	return e;
}

int main(int argc, char **argv)
{
	struct app app = {0};
	int e = lm_options_parse(argc, argv, &app.options, app.text);

	if (e < 0) {
		(void)fprintf(stderr, "kvgate-lm: %s; see kvgate-lm --help\n", app.text);
		return EXIT_USAGE;
	}
	if (app.options.help || app.options.version) {
		if (app.options.help)
			lm_options_help(stdout);
		else
			(void)puts("kvgate-lm " KVG_VERSION);
		return fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
	}
	e = run(&app);
	if (e < 0)
		(void)fprintf(stderr, "kvgate-lm: %s\n", app.text);
	(void)lm_worker_close(app.worker);
	(void)lm_model_free(app.model);
	(void)lm_pool_free(app.pool);
	return e < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
