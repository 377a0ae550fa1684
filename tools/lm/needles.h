/*
 * needles.h - needle files: JSON lines {"context": TEXT, "queries": [{"name": TEXT, "code": TEXT}, ...]}.
 * Texts are bytes, and bytes are tokens. Empty lines are skipped; a line of another form is an error
 * that names file and line.
 */
#ifndef KVG_LM_NEEDLES_H
#define KVG_LM_NEEDLES_H

#include <stddef.h>
#include <stdint.h>

#include "tools/lm/text.h"

#define LM_NAME_MAX 256u
#define LM_CODE_MAX 16u /* an answer has at most so many tokens */

struct lm_bytes {
	uint8_t *data;
	uint32_t size;
};

struct lm_query {
	struct lm_bytes name; /* 1 .. LM_NAME_MAX */
	struct lm_bytes code; /* 1 .. LM_CODE_MAX */
};

struct lm_needle {
	unsigned line; /* of the file, from 1 */
	struct lm_bytes context;
	struct lm_query *queries; /* at least one */
	size_t query_count;
};

struct lm_needles {
	struct lm_needle *list; /* at least one */
	size_t count;
};

/* Reads the first `limit` contexts (0: all). 0 or a negative errno with text (LM_TEXT bytes). */
int lm_needles_read(const char *path, uint32_t limit, struct lm_needles *ret, char *text);
void lm_needles_deinit(struct lm_needles *needles);

#endif
