#include "tests/stress/refusal.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* The number before a word, or 0. */
static uint64_t number_before(const char *text, const char *word)
{
	const char *at = strstr(text, word);

	while (at && at > text && strchr("0123456789", at[-1]))
		at--;
	return at ? strtoull(at, NULL, 10) : 0;
}

const char *refusal_wrong(const char *text, uint64_t min)
{
	if (!number_before(text, " bytes short"))
		return "does not say how many bytes are missing";
	if (!strstr(text, "device pool") || !min)
		return NULL;
	return NULL;
}
