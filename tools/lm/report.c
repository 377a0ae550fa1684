#include "tools/lm/report.h"

#include <errno.h>
#include <jansson.h>

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

int lm_report_json(const struct lm_report *r, const struct lm_options *options, FILE *out)
{
	json_t *object = json_pack("{s:I, s:I, s:f, s:f, s:s, s:I, s:I, s:I, s:f, s:f, s:f}", "queries",
		(json_int_t)r->queries, "correct", (json_int_t)r->correct, "accuracy", ratio_of(r->correct, r->queries),
		"ratio", options->ratio, "level", lm_level_name(options->level), "kv_bytes_full",
		(json_int_t)mean(r->usage.bytes_full, r->contexts), "kv_bytes_held",
		(json_int_t)mean(r->usage.bytes_held, r->contexts), "physical_bytes",
		(json_int_t)mean(r->usage.bytes_physical, r->contexts), "prefill_tokens_per_s",
		per_second(r->times.prefill_tokens, r->times.prefill_ns), "decode_tokens_per_s",
		per_second(r->times.decode_tokens, r->times.decode_ns), "evict_ms_total",
		(double)evict_ns(&r->times) / 1e6);
	int e;

	if (!object)
		return -ENOMEM;
	e = json_dumpf(object, out, JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(9));
	json_decref(object);
	return e < 0 || fputc('\n', out) == EOF ? -EIO : 0;
}

void lm_report_text(const struct lm_report *r, const struct lm_options *options, FILE *out)
{
	const struct lm_times *t = &r->times;
	uint64_t full = mean(r->usage.bytes_full, r->contexts), held = mean(r->usage.bytes_held, r->contexts);
	uint64_t physical = mean(r->usage.bytes_physical, r->contexts);
	double prefill = (double)t->prefill_ns;

	(void)fprintf(out, "ratio %g, level %s: %llu of %llu queries correct (%.3f) in %llu contexts\n", options->ratio,
		lm_level_name(options->level), (unsigned long long)r->correct, (unsigned long long)r->queries,
		ratio_of(r->correct, r->queries), (unsigned long long)r->contexts);
	(void)fprintf(out, "KV, mean of contexts: %llu bytes full, %llu held (%.1f%%), %llu physical (%.1f%%)\n",
		(unsigned long long)full, (unsigned long long)held, 100.0 * ratio_of(held, full),
		(unsigned long long)physical, 100.0 * ratio_of(physical, full));
	if (t->prefill_ns > 0)
		(void)fprintf(out,
			"prefill: %.2f s, %.0f tokens/s; compute %.1f%%, staging %.1f%%, waiting for scores %.1f%%, "
			"evict "
			"%.1f%%\n",
			prefill / 1e9, per_second(t->prefill_tokens, t->prefill_ns),
			100.0 * (prefill - (double)evict_ns(t)) / prefill, 100.0 * (double)t->stage_ns / prefill,
			100.0 * (double)t->wait_ns / prefill, 100.0 * (double)t->evict_ns / prefill);
	(void)fprintf(out, "decode: %.2f s, %.0f tokens/s\n", (double)t->decode_ns / 1e9,
		per_second(t->decode_tokens, t->decode_ns));
}
