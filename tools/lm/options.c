#include "tools/lm/options.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tools/lm/pool.h"

#define MAX_TOKENS     (1u << 24)
#define DEFAULT_CHUNK  16000u
#define DEFAULT_WINDOW 4096u
#define DEFAULT_TOKENS 200u
#define LEAST_BUDGET   132u /* the first 4 tokens and the newest 128 outscore all others */

enum {
	OPT_SOCKET = 256,
	OPT_MODEL,
	OPT_GATE,
	OPT_NEEDLES,
	OPT_TEXT,
	OPT_GOLDEN,
	OPT_RATIO,
	OPT_LEVEL,
	OPT_CHUNK,
	OPT_WINDOW,
	OPT_FLOOR,
	OPT_KV_DTYPE,
	OPT_LIMIT,
	OPT_GENERATE,
	OPT_DECODE_BUDGET,
	OPT_RECALL,
	OPT_OFFLOAD_BETWEEN,
	OPT_PUBLISH,
	OPT_ATTACH,
	OPT_THREADS,
	OPT_JSON,
	OPT_HELP,
	OPT_VERSION,
};

static const struct {
	const char *name, *value, *help;
	int option;
} table[] = {
	{"socket", "PATH", "the tenant's socket of a running kvgated", OPT_SOCKET},
	{"model", "DIR", "Hugging Face folder of a Qwen3 model (config.json, safetensors)", OPT_MODEL},
	{"gate", "FILE",
		"trained gate of the model (safetensors); may be left out when nothing evicts: at ratio 1\n"
		"                      without a decode budget",
		OPT_GATE},
	{"needles", "FILE", "answer every query of a needle file (JSON lines)", OPT_NEEDLES},
	{"text", "FILE", "print a continuation of a text file, byte by byte", OPT_TEXT},
	{"golden", "FILE", "compare logits with a golden file, at ratio 1", OPT_GOLDEN},
	{"ratio", "R", "share of the context's KV to keep, above 0 to 1 (default 1: no eviction)", OPT_RATIO},
	{"level", "LEVEL", "pair, pair-head, pair-layer or adakv-layer (default pair)", OPT_LEVEL},
	{"chunk", "N", "tokens of a prefill chunk, BOS counted (default 16000)", OPT_CHUNK},
	{"window", "N",
		"newest tokens that an eviction leaves alone (default 4096, or 2% of a context\n"
		"                      shorter than a chunk)",
		OPT_WINDOW},
	{"floor", "N", "least pairs of a head that stay (default 0)", OPT_FLOOR},
	{"kv-dtype", "TYPE", "bf16, f16 or f32 (default bf16)", OPT_KV_DTYPE},
	{"limit", "N", "only the first N contexts of the needle file", OPT_LIMIT},
	{"generate", "N",
		"tokens of the continuation at most (default 200); with --needles: continue each context\n"
		"                      instead of answering its queries",
		OPT_GENERATE},
	{"decode-budget", "B",
		"tokens that a head holds on average while decoding, 132 (the first 4 and the newest 128)\n"
		"                      or more: evicts after the context and after each position that is a multiple\n"
		"                      of 128; when that falls into a query, its context is read anew for the next",
		OPT_DECODE_BUDGET},
	{"recall", "R",
		"keep in the host's memory what evictions drop, and bring it back after the context until as much is\n"
		"                      held as at ratio R, from --ratio to 1",
		OPT_RECALL},
	{"offload-between", NULL, "send each context to the host's memory and back before what follows it",
		OPT_OFFLOAD_BETWEEN},
	{"publish", NULL, "publish each context under its key, for the tenant's other workers", OPT_PUBLISH},
	{"attach", NULL, "begin with published contexts instead of reading them; fails when there is none", OPT_ATTACH},
	{"threads", "N", "threads (default: number of CPUs)", OPT_THREADS},
	{"json", NULL, "one JSON object instead of text (with --needles or --text)", OPT_JSON},
	{"help", NULL, "print this", OPT_HELP},
	{"version", NULL, "print the version", OPT_VERSION},
};

#define OPTION_COUNT (sizeof(table) / sizeof(table[0]))

static const char *const levels[] = {
	[KVG_LEVEL_PAIR] = "pair",
	[KVG_LEVEL_PAIR_HEAD] = "pair-head",
	[KVG_LEVEL_PAIR_LAYER] = "pair-layer",
	[KVG_LEVEL_ADAKV_LAYER] = "adakv-layer",
};

static const char *const dtypes[] = {[KVG_BF16] = "bf16", [KVG_F16] = "f16", [KVG_F32] = "f32"};

const char *lm_level_name(uint8_t level)
{
	return level < sizeof(levels) / sizeof(levels[0]) ? levels[level] : "unknown";
}

void lm_options_help(FILE *out)
{
	(void)fprintf(out,
		"kvgate-lm runs a Qwen3 language model whose KV lives in kvgated's memory.\n\n"
		"Usage: kvgate-lm --socket PATH --model DIR --gate FILE --needles FILE --ratio R [OPTION...]\n"
		"       kvgate-lm --socket PATH --model DIR --gate FILE --needles FILE --generate N [OPTION...]\n"
		"       kvgate-lm --socket PATH --model DIR --gate FILE --text FILE --ratio R [OPTION...]\n"
		"       kvgate-lm --socket PATH --model DIR --golden FILE [OPTION...]\n\n");
	for (size_t i = 0; i < OPTION_COUNT; i++) {
		char left[64];

		(void)snprintf(left, sizeof(left), "--%s %s", table[i].name, table[i].value ? table[i].value : "");
		(void)fprintf(out, "  %-18s  %s\n", left, table[i].help);
	}
	(void)fprintf(out, "\nExit status: 0 done, 1 failed (one line on standard error), 2 wrong usage.\n");
}

static int parse_u32(const char *name, const char *value, uint32_t min, uint32_t max, uint32_t *ret, char *text)
{
	char *end;
	unsigned long long number;

	errno = 0;
	number = strtoull(value, &end, 10);
	if (value[0] < '0' || value[0] > '9' || *end != '\0' || errno || number < min || number > max)
		return lm_fail(
			text, -EINVAL, "--%s is '%.64s', not a whole number from %u to %u", name, value, min, max);
	*ret = (uint32_t)number;
	return 0;
}

static int parse_ratio(const char *name, const char *value, double *ret, char *text)
{
	char *end;
	double ratio = strtod(value, &end);

	if (end == value || *end != '\0' || !(ratio > 0.0 && ratio <= 1.0))
		return lm_fail(text, -EINVAL, "--%s is '%.64s', not a number above 0 and at most 1", name, value);
	*ret = ratio;
	return 0;
}

/* Index of value among names; entries may be NULL. */
static int parse_name(const char *name, const char *value, const char *const *names, size_t count, uint32_t *ret,
	const char *choices, char *text)
{
	for (size_t i = 0; i < count; i++)
		if (names[i] && strcmp(names[i], value) == 0) {
			*ret = (uint32_t)i;
			return 0;
		}
	return lm_fail(text, -EINVAL, "--%s is '%.64s', not %s", name, value, choices);
}

static int parse_level(const char *value, uint8_t *ret, char *text)
{
	uint32_t level = 0;
	int e = parse_name("level", value, levels, sizeof(levels) / sizeof(levels[0]), &level,
		"pair, pair-head, pair-layer or adakv-layer", text);

	if (e == 0)
		*ret = (uint8_t)level;
	return e;
}

static int take(struct lm_options *o, int option, const char *value, char *text)
{
	switch (option) {
	case OPT_SOCKET:
		o->socket = value;
		return 0;
	case OPT_MODEL:
		o->model = value;
		return 0;
	case OPT_GATE:
		o->gate = value;
		return 0;
	case OPT_NEEDLES:
		o->needles = value;
		return 0;
	case OPT_TEXT:
		o->text = value;
		return 0;
	case OPT_GOLDEN:
		o->golden = value;
		return 0;
	case OPT_RATIO:
		return parse_ratio("ratio", value, &o->ratio, text);
	case OPT_LEVEL:
		return parse_level(value, &o->level, text);
	case OPT_CHUNK:
		return parse_u32("chunk", value, 1, MAX_TOKENS, &o->chunk, text);
	case OPT_WINDOW:
		o->window_absolute = true;
		return parse_u32("window", value, 0, MAX_TOKENS, &o->window, text);
	case OPT_FLOOR:
		return parse_u32("floor", value, 0, MAX_TOKENS, &o->floor, text);
	case OPT_KV_DTYPE:
		return parse_name("kv-dtype", value, dtypes, sizeof(dtypes) / sizeof(dtypes[0]), &o->kv_dtype,
			"bf16, f16 or f32", text);
	case OPT_LIMIT:
		return parse_u32("limit", value, 1, UINT32_MAX, &o->limit, text);
	case OPT_GENERATE:
		o->generate_given = true;
		return parse_u32("generate", value, 1, MAX_TOKENS, &o->generate, text);
	case OPT_DECODE_BUDGET:
		return parse_u32("decode-budget", value, LEAST_BUDGET, MAX_TOKENS, &o->decode_budget, text);
	case OPT_RECALL:
		return parse_ratio("recall", value, &o->recall, text);
	case OPT_OFFLOAD_BETWEEN:
		o->offload_between = true;
		return 0;
	case OPT_PUBLISH:
		o->publish = true;
		return 0;
	case OPT_ATTACH:
		o->attach = true;
		return 0;
	case OPT_THREADS:
		return parse_u32("threads", value, 1, LM_POOL_MAX_THREADS, &o->threads, text);
	case OPT_JSON:
		o->json = true;
		return 0;
	case OPT_HELP:
		o->help = true;
		return 0;
	default:
		o->version = true;
		return 0;
	}
}

/* What is done to contexts besides reading them. */
static int check_moves(const struct lm_options *o, char *text)
{
	const char *first = o->recall > 0.0      ? "recall"
			    : o->publish         ? "publish"
			    : o->attach          ? "attach"
			    : o->offload_between ? "offload-between"
						 : NULL;

	if (first && o->golden)
		return lm_fail(text, -EINVAL, "--%s goes with --needles or --text, not with --golden", first);
	if (o->recall > 0.0 && (o->ratio >= 1.0 || o->recall < o->ratio))
		return lm_fail(
			text, -EINVAL, "--recall is %g: ratio %g leaves nothing to bring back", o->recall, o->ratio);
	if (o->publish && o->attach)
		return lm_fail(text, -EINVAL, "--publish and --attach: a context is published once, or found");
	if (o->recall > 0.0 && (o->publish || o->attach))
		return lm_fail(text, -EINVAL, "--recall goes not with --%s: a context's key names what --ratio keeps",
			o->publish ? "publish" : "attach");
	if (o->decode_budget && (o->recall > 0.0 || o->publish || o->attach))
		return lm_fail(
			text, -EINVAL, "--%s goes not with --decode-budget, which evicts after the context", first);
	return 0;
}

static int check(const struct lm_options *o, char *text)
{
	int jobs = !!o->needles + !!o->text + !!o->golden;

	if (!o->socket || !o->model)
		return lm_fail(text, -EINVAL, "--%s is missing", o->socket ? "model" : "socket");
	if (jobs != 1)
		return lm_fail(text, -EINVAL, "one of --needles, --text and --golden is needed, not %d", jobs);
	if (o->golden && o->ratio < 1.0)
		return lm_fail(text, -EINVAL, "--golden compares at ratio 1, not %g", o->ratio);
	if (o->golden && (o->decode_budget || o->generate_given || o->json))
		return lm_fail(text, -EINVAL, "--%s goes with --needles or --text, not with --golden",
			o->decode_budget    ? "decode-budget"
			: o->generate_given ? "generate"
					    : "json");
	if (!o->gate && o->ratio < 1.0)
		return lm_fail(text, -EINVAL, "--gate is missing: ratio %g evicts by its scores", o->ratio);
	if (!o->gate && o->decode_budget)
		return lm_fail(
			text, -EINVAL, "--gate is missing: decode budget %u evicts by its scores", o->decode_budget);
	return check_moves(o, text);
}

static unsigned cpu_count(void)
{
	long count = sysconf(_SC_NPROCESSORS_ONLN);

	if (count < 1)
		return 1;
	return count > (long)LM_POOL_MAX_THREADS ? LM_POOL_MAX_THREADS : (unsigned)count;
}

static void fill_long_options(struct option list[OPTION_COUNT + 1])
{
	for (size_t i = 0; i < OPTION_COUNT; i++)
		list[i] = (struct option){.name = table[i].name,
			.has_arg = table[i].value ? required_argument : no_argument,
			.val = table[i].option};
	list[OPTION_COUNT] = (struct option){0};
}

int lm_options_parse(int argc, char **argv, struct lm_options *ret, char *text)
{
	struct lm_options o = {.ratio = 1.0,
		.chunk = DEFAULT_CHUNK,
		.window = DEFAULT_WINDOW,
		.kv_dtype = KVG_BF16,
		.generate = DEFAULT_TOKENS,
		.threads = cpu_count()};
	struct option list[OPTION_COUNT + 1];
	int option, e;

	fill_long_options(list);
	optind = 0;
	opterr = 0;
	while ((option = getopt_long(argc, argv, ":", list, NULL)) != -1) {
		if (option == ':')
			return lm_fail(text, -EINVAL, "option %.64s needs a value", argv[optind - 1]);
		if (option == '?')
			return lm_fail(text, -EINVAL, "option %.64s is unknown or takes no value", argv[optind - 1]);
		e = take(&o, option, optarg, text);
		if (e < 0)
			return e;
	}
	if (!o.help && !o.version) {
		if (optind < argc)
			return lm_fail(text, -EINVAL, "'%.64s' is not an option", argv[optind]);
		e = check(&o, text);
		if (e < 0)
			return e;
	}
	*ret = o;
	return 0;
}

struct kvg_policy lm_options_policy(const struct lm_options *options, uint32_t context, uint32_t max_new)
{
	return (struct kvg_policy){
		.ratio = options->ratio,
		.mode = options->ratio < 1.0 ? KVG_MODE_CHUNKED : KVG_MODE_OFF,
		.level = options->level,
		.flags = (uint16_t)((options->window_absolute ? KVG_POLICY_WINDOW_ABSOLUTE : 0) |
				    (options->recall > 0.0 ? KVG_POLICY_RETAIN_HOST : 0)),
		.prefix_tokens = 1,
		.context_tokens = context,
		.chunk_tokens = options->chunk,
		.max_new_tokens = max_new,
		.window = options->window,
		.floor = options->floor,
		.budget = options->decode_budget,
	};
}
