#include "tools/lm/report.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>

#include "tools/lm/hash.h"

static double ratio_of(uint64_t part, uint64_t whole)
{
	return whole ? (double)part / (double)whole : 0.0;
}

static double per_second(uint64_t count, uint64_t ns)
{
	return ratio_of(count, ns) * 1e9;
}

static uint64_t mean(uint64_t sum, uint64_t count)
{
	return count ? (sum + count / 2) / count : 0;
}

static uint64_t evict_ns(const struct lm_times *times)
{
	return times->stage_ns + times->wait_ns + times->evict_ns;
}

/* Takes the object, which may be NULL for want of memory. */
static int write_object(json_t *object, FILE *out)
{
	int e;

	if (!object)
		return -ENOMEM;
	e = json_dumpf(object, out, JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(9));
	json_decref(object);
	return e < 0 || fputc('\n', out) == EOF ? -EIO : 0;
}

static double ms(uint64_t ns)
{
	return (double)ns / 1e6;
}

static json_t *hash_json(uint64_t hash)
{
	char text[17];

	(void)snprintf(text, sizeof(text), "%016llx", (unsigned long long)hash);
	return json_string(text);
}

/* Adds what was done to contexts, a member for each kind of it that was. Takes the object, which may be NULL. */
static json_t *add_moves(json_t *object, const struct lm_moves *m, const struct lm_options *options)
{
	int e = object ? 0 : -1;

	if (e == 0 && m->recalls)
		e = json_object_set_new(object, "recall",
			json_pack("{s:f, s:I, s:f}", "ratio", options->recall, "device_bytes",
				(json_int_t)mean(m->recalled_bytes, m->recalls), "ms_total", ms(m->recall_ns)));
	if (e == 0 && m->offloads)
		e = json_object_set_new(object, "offload",
			json_pack("{s:I, s:I, s:f, s:f}", "host_bytes", (json_int_t)mean(m->host_bytes, m->offloads),
				"device_bytes", (json_int_t)mean(m->device_bytes, m->offloads), "offload_ms_total",
				ms(m->offload_ns), "restore_ms_total", ms(m->restore_ns)));
	if (e == 0 && m->publishes)
		e = json_object_set_new(object, "publish",
			json_pack("{s:I, s:I, s:f}", "contexts", (json_int_t)m->publishes, "device_bytes",
				(json_int_t)mean(m->context_bytes, m->publishes), "ms_total", ms(m->publish_ns)));
	if (e == 0 && m->attaches)
		e = json_object_set_new(object, "attach",
			json_pack("{s:I, s:I, s:f}", "contexts", (json_int_t)m->attaches, "device_bytes",
				(json_int_t)mean(m->context_bytes, m->attaches), "ms_total", ms(m->attach_ns)));
	if (e == 0)
		return object;
	json_decref(object);
	return NULL;
}

void lm_report_deinit(struct lm_report *report)
{
	free(report->answers);
	*report = (struct lm_report){0};
}

static json_t *answers_json(const struct lm_report *r)
{
	json_t *list = json_array();

	for (uint64_t i = 0; list && r->answers && i < r->queries; i++)
		if (json_array_append_new(list, hash_json(r->answers[i])) < 0) {
			json_decref(list);
			list = NULL;
		}
	return list;
}

int lm_report_json(const struct lm_report *r, const struct lm_options *options, FILE *out)
{
	json_t *object = json_pack("{s:I, s:I, s:f, s:f, s:s, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:o, s:o}",
		"queries", (json_int_t)r->queries, "correct", (json_int_t)r->correct, "accuracy",
		ratio_of(r->correct, r->queries), "ratio", options->ratio, "level", lm_level_name(options->level),
		"decode_budget", (json_int_t)options->decode_budget, "kv_bytes_full",
		(json_int_t)mean(r->usage.bytes_full, r->contexts), "kv_bytes_held",
		(json_int_t)mean(r->usage.bytes_held, r->contexts), "physical_bytes",
		(json_int_t)mean(r->usage.bytes_physical, r->contexts), "prefill_ms_total", ms(r->times.prefill_ns),
		"prefill_tokens_per_s", per_second(r->times.prefill_tokens, r->times.prefill_ns), "decode_tokens_per_s",
		per_second(r->times.decode_tokens, r->times.decode_ns), "evict_ms_total",
		ms(evict_ns(&r->times) + r->times.decode_evict_ns), "logits_hash", hash_json(r->logits_hash), "answers",
		answers_json(r));

	return write_object(add_moves(object, &r->moves, options), out);
}

static void print_moves(const struct lm_moves *m, const struct lm_options *options, FILE *out)
{
	if (m->recalls)
		(void)fprintf(out,
			"recall to ratio %g: %llu bytes of pairs came back, mean of contexts; %.1f ms in all\n",
			options->recall, (unsigned long long)mean(m->recalled_bytes, m->recalls), ms(m->recall_ns));
	if (m->offloads)
		(void)fprintf(out,
			"offload, mean of contexts: %llu bytes on the host, %llu of the device given back; out %.1f "
			"ms, back %.1f ms in all\n",
			(unsigned long long)mean(m->host_bytes, m->offloads),
			(unsigned long long)mean(m->device_bytes, m->offloads), ms(m->offload_ns), ms(m->restore_ns));
	if (m->publishes)
		(void)fprintf(out, "published %llu contexts of %llu bytes, mean; %.1f ms in all\n",
			(unsigned long long)m->publishes, (unsigned long long)mean(m->context_bytes, m->publishes),
			ms(m->publish_ns));
	if (m->attaches)
		(void)fprintf(out, "attached to %llu contexts of %llu bytes, mean; %.1f ms in all\n",
			(unsigned long long)m->attaches, (unsigned long long)mean(m->context_bytes, m->attaches),
			ms(m->attach_ns));
}

static void print_prefill(const struct lm_times *t, FILE *out)
{
	double prefill = (double)t->prefill_ns;

	if (t->prefill_ns > 0)
		(void)fprintf(out,
			"prefill: %.2f s, %.0f tokens/s; compute %.1f%%, staging %.1f%%, waiting for scores %.1f%%, "
			"evict "
			"%.1f%%\n",
			prefill / 1e9, per_second(t->prefill_tokens, t->prefill_ns),
			100.0 * (prefill - (double)evict_ns(t)) / prefill, 100.0 * (double)t->stage_ns / prefill,
			100.0 * (double)t->wait_ns / prefill, 100.0 * (double)t->evict_ns / prefill);
}

static void print_decode(const struct lm_times *t, const struct lm_options *options, FILE *out)
{
	(void)fprintf(out, "decode: %.2f s, %.0f tokens/s", (double)t->decode_ns / 1e9,
		per_second(t->decode_tokens, t->decode_ns));
	if (options->decode_budget)
		(void)fprintf(out, "; events %.1f%%", 100.0 * ratio_of(t->decode_evict_ns, t->decode_ns));
	(void)fputc('\n', out);
}

/* "ratio 0.3, level pair", and the budget if there is one. */
static void print_policy(const struct lm_options *options, FILE *out)
{
	(void)fprintf(out, "ratio %g, level %s", options->ratio, lm_level_name(options->level));
	if (options->decode_budget)
		(void)fprintf(out, ", decode budget %u", options->decode_budget);
}

void lm_report_text(const struct lm_report *r, const struct lm_options *options, FILE *out)
{
	uint64_t full = mean(r->usage.bytes_full, r->contexts), held = mean(r->usage.bytes_held, r->contexts);
	uint64_t physical = mean(r->usage.bytes_physical, r->contexts);

	print_policy(options, out);
	(void)fprintf(out, ": %llu of %llu queries correct (%.3f) in %llu contexts\n", (unsigned long long)r->correct,
		(unsigned long long)r->queries, ratio_of(r->correct, r->queries), (unsigned long long)r->contexts);
	(void)fprintf(out, "KV, mean of contexts: %llu bytes full, %llu held (%.1f%%), %llu physical (%.1f%%)\n",
		(unsigned long long)full, (unsigned long long)held, 100.0 * ratio_of(held, full),
		(unsigned long long)physical, 100.0 * ratio_of(physical, full));
	print_moves(&r->moves, options, out);
	print_prefill(&r->times, out);
	print_decode(&r->times, options, out);
}

/* ---- continuations ---- */

static json_t *tokens_json(const struct lm_generation *g)
{
	json_t *list = json_array();

	for (uint32_t i = 0; list && i < g->count; i++)
		if (json_array_append_new(list, json_integer(g->tokens[i])) < 0) {
			json_decref(list);
			list = NULL;
		}
	return list;
}

static json_t *events_json(const struct lm_generation *g)
{
	json_t *list = json_array();

	for (uint32_t i = 0; list && i < g->event_count; i++) {
		const struct lm_event *e = &g->events[i];

		if (json_array_append_new(
			    list, json_pack("{s:I, s:I, s:I, s:I}", "tokens", (json_int_t)e->tokens, "pairs",
					  (json_int_t)e->pairs, "dropped", (json_int_t)e->dropped, "physical_bytes",
					  (json_int_t)e->bytes_physical)) < 0) {
			json_decref(list);
			list = NULL;
		}
	}
	return list;
}

static json_t *generation_json(const struct lm_generation *g)
{
	const struct lm_usage *u = &g->usage;

	return json_pack("{s:I, s:o, s:I, s:I, s:I, s:I, s:I, s:o, s:o}", "prompt_tokens", (json_int_t)g->prompt,
		"hash", hash_json(lm_hash_tokens(g->tokens, g->count)), "kv_bytes_full", (json_int_t)u->bytes_full,
		"kv_bytes_held", (json_int_t)u->bytes_held, "physical_bytes", (json_int_t)u->bytes_physical,
		"physical_bytes_prompt_max", (json_int_t)u->bytes_prompt_max, "physical_bytes_decode_max",
		(json_int_t)u->bytes_decode_max, "events", events_json(g), "tokens", tokens_json(g));
}

static json_t *generations_json(const struct lm_generations *all)
{
	json_t *list = json_array();

	for (size_t i = 0; list && i < all->count; i++)
		if (json_array_append_new(list, generation_json(&all->list[i])) < 0) {
			json_decref(list);
			list = NULL;
		}
	return list;
}

int lm_report_generations_json(const struct lm_generations *all, const struct lm_options *options, FILE *out)
{
	const struct lm_times *t = &all->times;

	json_t *object = json_pack("{s:I, s:f, s:s, s:I, s:I, s:f, s:f, s:f, s:f, s:o, s:o}", "contexts",
		(json_int_t)all->count, "ratio", options->ratio, "level", lm_level_name(options->level),
		"decode_budget", (json_int_t)options->decode_budget, "decode_tokens", (json_int_t)t->decode_tokens,
		"prefill_ms_total", ms(t->prefill_ns), "prefill_tokens_per_s",
		per_second(t->prefill_tokens, t->prefill_ns), "decode_tokens_per_s",
		per_second(t->decode_tokens, t->decode_ns), "decode_evict_share",
		ratio_of(t->decode_evict_ns, t->decode_ns), "logits_hash", hash_json(all->logits_hash), "generations",
		generations_json(all));

	return write_object(add_moves(object, &all->moves, options), out);
}

static void print_generation(const struct lm_generation *g, size_t number, FILE *out)
{
	const struct lm_usage *u = &g->usage;

	(void)fprintf(out, "context %zu: %u tokens, %u generated, hash %016llx\n", number, g->prompt, g->count,
		(unsigned long long)lm_hash_tokens(g->tokens, g->count));
	(void)fprintf(out,
		"  KV at the end: %llu bytes full, %llu held; physical %llu, at most %llu with the prompt and %llu "
		"after it\n",
		(unsigned long long)u->bytes_full, (unsigned long long)u->bytes_held,
		(unsigned long long)u->bytes_physical, (unsigned long long)u->bytes_prompt_max,
		(unsigned long long)u->bytes_decode_max);
	for (uint32_t i = 0; i < g->event_count; i++)
		(void)fprintf(out, "  after %u tokens: %llu pairs held, %llu dropped, %llu bytes physical\n",
			g->events[i].tokens, (unsigned long long)g->events[i].pairs,
			(unsigned long long)g->events[i].dropped, (unsigned long long)g->events[i].bytes_physical);
}

void lm_report_generations_text(const struct lm_generations *all, const struct lm_options *options, FILE *out)
{
	print_policy(options, out);
	(void)fprintf(out, ": continuations of %zu contexts\n", all->count);
	for (size_t i = 0; i < all->count; i++)
		print_generation(&all->list[i], i + 1, out);
	print_moves(&all->moves, options, out);
	print_prefill(&all->times, out);
	print_decode(&all->times, options, out);
}
