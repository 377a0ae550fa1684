/* options.h - the command line of kvgate-lm, and the eviction policy that it asks for. */
#ifndef KVG_LM_OPTIONS_H
#define KVG_LM_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "client/kvgate.h"
#include "tools/lm/text.h"

struct lm_options {
	const char *socket, *model;
	const char *gate;                    /* NULL only at ratio 1 */
	const char *needles, *text, *golden; /* exactly one is set */
	double ratio;
	uint8_t level; /* enum kvg_level */
	uint32_t chunk, window, floor;
	bool window_absolute;   /* --window was given */
	uint32_t kv_dtype;      /* enum kvg_dtype */
	uint32_t limit;         /* contexts; 0: all */
	uint32_t generate;      /* tokens of a continuation */
	bool generate_given;    /* --generate was: with needles, contexts are continued and no query is answered */
	uint32_t decode_budget; /* tokens of a head on average; 0: none */
	double recall;          /* ratio up to which dropped pairs come back; 0: none do */
	bool offload_between;   /* to the host and back between prefill and what follows it */
	bool publish, attach;   /* contexts by their keys */
	unsigned threads;
	bool json, help, version;
};

/*
 * Strings are borrowed from argv. 0, or -EINVAL with text (LM_TEXT bytes). With help or version set the rest need not
 * be complete. Uses getopt_long() and so is for one thread at a time.
 */
int lm_options_parse(int argc, char **argv, struct lm_options *ret, char *text);

void lm_options_help(FILE *out);

/* "pair" and so on. */
const char *lm_level_name(uint8_t level);

/* Policy of a context of `context` tokens after one BOS token, with room for max_new more tokens. */
struct kvg_policy lm_options_policy(const struct lm_options *options, uint32_t context, uint32_t max_new);

#endif
