/* continuation.h - reads a text file, evicts as asked, and writes on from it. */
#ifndef KVG_LM_CONTINUATION_H
#define KVG_LM_CONTINUATION_H

#include "tools/lm/options.h"
#include "tools/lm/worker.h"

struct lm_text_file {
	uint8_t *data; /* owned */
	uint32_t size; /* at least 1 */
};

/*
 * Reads the file at path. -EINVAL with text (LM_TEXT bytes) when it is empty or, with BOS and `generate` tokens to
 * come, longer than the model's positions.
 */
int lm_text_read(
	const char *path, const struct lm_config *config, uint32_t generate, struct lm_text_file *ret, char *text);
void lm_text_deinit(struct lm_text_file *file);

/*
 * Writes the continuation's bytes to out; tokens that are not bytes are left out. 0 or a negative errno with text.
 */
int lm_continue(struct lm_worker *worker, const struct lm_options *options, const struct lm_text_file *file, FILE *out,
	char *text);

#endif
