#include "tools/ctl/size.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#define SIZE_LIMIT (UINT64_C(1) << 62)

static const char units[] = "KMGTPE";

/* The power of two of "", "B", "K", "KB", "KiB" and so on; -EINVAL for anything else. */
static int unit_shift(const char *text)
{
	const char *at;

	if (!*text || !strcasecmp(text, "B"))
		return 0;
	at = strchr(units, toupper((unsigned char)*text));
	if (!at || (text[1] && strcasecmp(text + 1, "B") != 0 && strcasecmp(text + 1, "iB") != 0))
		return -EINVAL;
	return 10 * (int)(at - units + 1);
}

int ctl_size_parse(const char *text, uint64_t *ret)
{
	uint64_t whole = 0, part = 0, scale = 1, bytes;
	const char *p = text;
	int shift;

	if (!isdigit((unsigned char)*p))
		return -EINVAL;
	for (; isdigit((unsigned char)*p); p++) {
		if (whole > SIZE_LIMIT / 10)
			return -ERANGE;
		whole = whole * 10 + (uint64_t)(*p - '0');
	}
	if (*p == '.') {
		if (!isdigit((unsigned char)*++p))
			return -EINVAL;
		for (; isdigit((unsigned char)*p); p++) {
			if (scale < UINT64_C(1000000000)) {
				part = part * 10 + (uint64_t)(*p - '0');
				scale *= 10;
			}
		}
	}
	shift = unit_shift(p);
	if (shift < 0)
		return shift;
	if (whole > SIZE_LIMIT >> shift)
		return -ERANGE;
	bytes = (whole << shift) + (uint64_t)((unsigned __int128)part * (UINT64_C(1) << shift) / scale);
	if (bytes > SIZE_LIMIT)
		return -ERANGE;
	*ret = bytes;
	return 0;
}

char *ctl_size_format(uint64_t bytes, char text[CTL_SIZE_TEXT])
{
	double value = (double)bytes / 1024;
	size_t unit = 0;

	if (bytes < 1024) {
		(void)snprintf(text, CTL_SIZE_TEXT, "%" PRIu64 " B", bytes);
		return text;
	}
	/* 1023.95 would be printed as 1024.0 */
	for (; value >= 1023.95 && unit + 2 < sizeof(units); unit++)
		value /= 1024;
	(void)snprintf(text, CTL_SIZE_TEXT, "%.1f %ciB", value, units[unit]);
	return text;
}
