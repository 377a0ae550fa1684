#include "tools/lm/options.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/runner.h"

#define MAX_ARGS 40

/* Splits a command line at spaces and parses it. */
static int parse(const char *line, struct lm_options *ret, char *text)
{
	static char copy[1024];
	char *argv[MAX_ARGS + 1], *save = NULL;
	int argc = 0;

	assert_true(strlen(line) < sizeof(copy));
	(void)snprintf(copy, sizeof(copy), "%s", line);
	for (char *word = strtok_r(copy, " ", &save); word && argc < MAX_ARGS; word = strtok_r(NULL, " ", &save))
		argv[argc++] = word;
	argv[argc] = NULL;
	return lm_options_parse(argc, argv, ret, text);
}

static void test_full_line(void **state)
{
	struct lm_options o;
	char text[LM_TEXT];

	(void)state;
	assert_int_equal(parse("kvgate-lm --socket S --model M --gate G --needles N --ratio 0.3 --level pair-head "
			       "--chunk 1000 --window=59 --floor 2 --kv-dtype f16 --limit 3 --threads 4 --json",
				 &o, text),
		0);
	assert_string_equal(o.socket, "S");
	assert_string_equal(o.model, "M");
	assert_string_equal(o.gate, "G");
	assert_string_equal(o.needles, "N");
	assert_true(o.ratio == 0.3);
	assert_int_equal(o.level, KVG_LEVEL_PAIR_HEAD);
	assert_int_equal(o.chunk, 1000);
	assert_int_equal(o.window, 59);
	assert_true(o.window_absolute);
	assert_int_equal(o.floor, 2);
	assert_int_equal(o.kv_dtype, KVG_F16);
	assert_int_equal(o.limit, 3);
	assert_int_equal(o.threads, 4);
	assert_true(o.json);
}

static void test_defaults(void **state)
{
	struct lm_options o;
	char text[LM_TEXT];

	(void)state;
	assert_int_equal(parse("kvgate-lm --socket S --model M --text T", &o, text), 0);
	assert_true(o.ratio == 1.0);
	assert_int_equal(o.level, KVG_LEVEL_PAIR);
	assert_int_equal(o.chunk, 16000);
	assert_int_equal(o.window, 4096);
	assert_false(o.window_absolute);
	assert_int_equal(o.floor, 0);
	assert_int_equal(o.kv_dtype, KVG_BF16);
	assert_int_equal(o.generate, 200);
	assert_false(o.generate_given);
	assert_int_equal(o.decode_budget, 0);
	assert_true(o.recall == 0.0);
	assert_false(o.offload_between || o.publish || o.attach);
	assert_true(o.threads >= 1);
	assert_false(o.json || o.help || o.version);
	assert_int_equal(parse("kvgate-lm --help", &o, text), 0);
	assert_true(o.help);
	assert_int_equal(parse("kvgate-lm --version", &o, text), 0);
	assert_true(o.version);
}

static void test_wrong_usage_is_named(void **state)
{
	static const struct {
		const char *line, *says;
	} cases[] = {
		{"", "--socket is missing"},
		{"--socket S", "--model is missing"},
		{"--socket S --model M", "one of --needles, --text and --golden is needed, not 0"},
		{"--socket S --model M --needles N --text T", "is needed, not 2"},
		{"--socket S --model M --needles N --ratio 0.5", "--gate is missing: ratio 0.5"},
		{"--socket S --model M --gate G --golden N --ratio 0.5", "--golden compares at ratio 1, not 0.5"},
		{"--socket S --model M --golden N --json", "--json goes with --needles or --text, not with --golden"},
		{"--socket S --model M --golden N --generate 5", "--generate goes with --needles or --text"},
		{"--socket S --model M --gate G --golden N --decode-budget 200",
			"--decode-budget goes with --needles or"},
		{"--socket S --model M --text T --decode-budget 200", "--gate is missing: decode budget 200"},
		{"--decode-budget 131", "--decode-budget is '131', not a whole number from 132 to 16777216"},
		{"--decode-budget 0", "--decode-budget is '0', not a whole number from 132 to 16777216"},
		{"--decode-budget 16777217", "--decode-budget is '16777217'"},
		{"--decode-budget many", "--decode-budget is 'many'"},
		{"--decode-budget -200", "--decode-budget is '-200'"},
		{"--decode-budget 200.5", "--decode-budget is '200.5'"},
		{"--decode-budget", "option --decode-budget needs a value"},
		{"--recall 0", "--recall is '0', not a number above 0 and at most 1"},
		{"--recall", "option --recall needs a value"},
		{"--socket S --model M --gate G --needles N --recall 0.5", "--recall is 0.5: ratio 1 leaves nothing"},
		{"--socket S --model M --gate G --needles N --ratio 0.3 --recall 0.2",
			"--recall is 0.2: ratio 0.3 leaves nothing"},
		{"--socket S --model M --gate G --golden N --publish",
			"--publish goes with --needles or --text, not with --golden"},
		{"--socket S --model M --golden N --attach", "--attach goes with --needles or"},
		{"--socket S --model M --golden N --offload-between", "--offload-between goes with --needles or"},
		{"--socket S --model M --needles N --publish --attach", "--publish and --attach: a context is"},
		{"--socket S --model M --gate G --needles N --ratio 0.1 --recall 0.3 --publish",
			"--recall goes not with --publish"},
		{"--socket S --model M --gate G --needles N --ratio 0.1 --recall 0.3 --attach",
			"--recall goes not with --attach"},
		{"--socket S --model M --gate G --text N --ratio 0.1 --recall 0.3 --decode-budget 200",
			"--recall goes not with --decode-budget"},
		{"--socket S --model M --gate G --text N --publish --decode-budget 200",
			"--publish goes not with --decode-budget"},
		{"--socket S --model M --gate G --text N --attach --decode-budget 200",
			"--attach goes not with --decode-budget"},
		{"--generate 0", "--generate is '0'"},
		{"--ratio 0", "--ratio is '0', not a number above 0 and at most 1"},
		{"--ratio 1.01", "--ratio is '1.01'"},
		{"--ratio nan", "--ratio is 'nan'"},
		{"--ratio 0.5x", "--ratio is '0.5x'"},
		{"--level best", "--level is 'best', not pair, pair-head, pair-layer or adakv-layer"},
		{"--chunk 0", "--chunk is '0', not a whole number from 1 to 16777216"},
		{"--chunk -5", "--chunk is '-5'"},
		{"--window 1e3", "--window is '1e3'"},
		{"--floor 99999999999999999999", "--floor is '99999999999999999999'"},
		{"--threads 257", "--threads is '257', not a whole number from 1 to 256"},
		{"--kv-dtype f64", "--kv-dtype is 'f64', not bf16, f16 or f32"},
		{"--limit 0", "--limit is '0'"},
		{"--wrong", "option --wrong is unknown or takes no value"},
		{"--json=3", "option --json=3 is unknown or takes no value"},
		{"-x", "option -x is unknown or takes no value"},
		{"--gate", "option --gate needs a value"},
		{"--socket S --model M --needles N stray", "'stray' is not an option"},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct lm_options o = {.chunk = 77};
		char line[512], text[LM_TEXT] = "";

		(void)snprintf(line, sizeof(line), "kvgate-lm %s", cases[i].line);
		assert_int_equal(parse(line, &o, text), -EINVAL);
		if (!strstr(text, cases[i].says))
			fail_msg("%s: '%s' lacks '%s'", line, text, cases[i].says);
		assert_int_equal(o.chunk, 77);
	}
}

static void test_policy(void **state)
{
	struct lm_options o;
	struct kvg_policy p;
	char text[LM_TEXT];

	(void)state;
	assert_int_equal(parse("kvgate-lm --socket S --model M --gate G --needles N --ratio 0.1 --level adakv-layer "
			       "--chunk 1000 --floor 4",
				 &o, text),
		0);
	p = lm_options_policy(&o, 2999, 26);
	assert_true(p.ratio == 0.1);
	assert_int_equal(p.mode, KVG_MODE_CHUNKED);
	assert_int_equal(p.level, KVG_LEVEL_ADAKV_LAYER);
	assert_int_equal(p.flags, 0);
	assert_int_equal(p.prefix_tokens, 1);
	assert_int_equal(p.context_tokens, 2999);
	assert_int_equal(p.chunk_tokens, 1000);
	assert_int_equal(p.max_new_tokens, 26);
	assert_int_equal(p.window, 4096);
	assert_int_equal(p.floor, 4);
	assert_int_equal(p.budget, 0);
	assert_int_equal(parse("kvgate-lm --socket S --model M --needles N --window 4096", &o, text), 0);
	p = lm_options_policy(&o, 1, 1);
	assert_int_equal(p.mode, KVG_MODE_OFF);
	assert_int_equal(p.flags, KVG_POLICY_WINDOW_ABSOLUTE);
	assert_int_equal(parse("kvgate-lm --socket S --model M --gate G --needles N --decode-budget 132 --generate 9 "
			       "--json",
				 &o, text),
		0);
	assert_true(o.generate_given);
	p = lm_options_policy(&o, 1, o.generate);
	assert_int_equal(p.mode, KVG_MODE_OFF);
	assert_int_equal(p.budget, 132);
	assert_int_equal(p.max_new_tokens, 9);
	assert_int_equal(parse("kvgate-lm --socket S --model M --gate G --needles N --ratio 0.1 --recall 0.3 "
			       "--offload-between",
				 &o, text),
		0);
	assert_true(o.recall == 0.3);
	assert_true(o.offload_between);
	p = lm_options_policy(&o, 1, 1);
	assert_true(p.ratio == 0.1);
	assert_int_equal(p.flags, KVG_POLICY_RETAIN_HOST);
	assert_int_equal(parse("kvgate-lm --socket S --model M --gate G --needles N --publish", &o, text), 0);
	assert_true(o.publish);
	assert_int_equal(parse("kvgate-lm --socket S --model M --gate G --needles N --attach", &o, text), 0);
	assert_true(o.attach);
}

static void test_help_names_every_option(void **state)
{
	static const char *const names[] = {"--socket PATH", "--model DIR", "--gate FILE", "--needles FILE",
		"--text FILE", "--golden FILE", "--ratio R", "--level LEVEL", "--chunk N", "--window N", "--floor N",
		"--kv-dtype TYPE", "--limit N", "--generate N", "--decode-budget B", "--recall R", "--offload-between",
		"--publish", "--attach", "--threads N", "--json", "--help", "--version"};
	char *help = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&help, &size);

	(void)state;
	assert_non_null(out);
	lm_options_help(out);
	assert_int_equal(fclose(out), 0);
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		char line[64];

		(void)snprintf(line, sizeof(line), "\n  %s ", names[i]);
		if (!strstr(help, line))
			fail_msg("no line for %s", names[i]);
	}
	free(help);
}

static void test_level_names(void **state)
{
	(void)state;
	assert_string_equal(lm_level_name(KVG_LEVEL_PAIR), "pair");
	assert_string_equal(lm_level_name(KVG_LEVEL_ADAKV_LAYER), "adakv-layer");
	assert_string_equal(lm_level_name(9), "unknown");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_full_line),
		cmocka_unit_test(test_defaults),
		cmocka_unit_test(test_wrong_usage_is_named),
		cmocka_unit_test(test_policy),
		cmocka_unit_test(test_help_names_every_option),
		cmocka_unit_test(test_level_names),
	};

	return runner_run("tools/lm/options", tests, sizeof(tests) / sizeof(tests[0]));
}
