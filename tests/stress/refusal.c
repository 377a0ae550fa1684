#include "tests/stress/refusal.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "proto/size.h"

/* What use, needs and min are multiples of: extents. */
#define UNIT (UINT64_C(256) << 10)

/* The number before a word, or 0. */
static uint64_t number_before(const char *text, const char *word)
{
	const char *at = strstr(text, word);

	while (at && at > text && strchr("0123456789", at[-1]))
		at--;
	return at ? strtoull(at, NULL, 10) : 0;
}

/* The size behind a word: "19.2 MiB" has lost less than a tenth of a MiB, which is less than a unit. */
static bool size_after(const char *text, const char *word, uint64_t *ret)
{
	const char *at = strstr(text, word);
	char size[KVG_SIZE_TEXT] = "";
	size_t length = at ? strcspn(at + strlen(word), ",;:") : 0;

	if (!at || length >= sizeof(size))
		return false;
	memcpy(size, at + strlen(word), length);
	if (kvg_size_parse(size, ret) < 0)
		return false;
	*ret = (*ret + UNIT - 1) / UNIT * UNIT;
	return true;
}

const char *refusal_wrong(const char *text, uint64_t min)
{
	uint64_t use, own, need;

	if (!number_before(text, " bytes short"))
		return "does not say how many bytes are missing";
	if (!strstr(text, ": device pool "))
		return NULL;
	if (!size_after(text, "; own use ", &use) || !size_after(text, ", min ", &own) ||
		!size_after(text, " needs ", &need))
		return "is the pool's, and does not say what the tenant has, needs, and may have in any case";
	if (own != min)
		return "names another min than the tenant's";
	return use + need <= min ? "is the pool's, and what was asked for is within the tenant's min" : NULL;
}
