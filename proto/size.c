#include "proto/size.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#define SIZE_MAX_BYTES  (UINT64_C(1) << 62)
#define FRACTION_DIGITS 9
#define SIZE_UNITS      "KMGTPE"

/* Digits to a number. Returns how many; -ERANGE above the largest size. */
static int parse_digits(const char *text, uint64_t *ret)
{
	uint64_t value = 0;
	int count = 0;

	for (; isdigit((unsigned char)text[count]); count++) {
		value = value * 10 + (uint64_t)(text[count] - '0');
		if (value > SIZE_MAX_BYTES)
			return -ERANGE;
	}
	*ret = value;
	return count;
}

/* "", "B", "K", "KB", "KiB" and so on, in either case. Returns the power of two or -EINVAL. */
static int parse_unit(const char *text)
{
	const char *unit;

	if (strcasecmp(text, "") == 0 || strcasecmp(text, "B") == 0)
		return 0;
	unit = strchr(SIZE_UNITS, toupper((unsigned char)text[0]));
	if (!unit)
		return -EINVAL;
	if (strcasecmp(text + 1, "") != 0 && strcasecmp(text + 1, "B") != 0 && strcasecmp(text + 1, "iB") != 0)
		return -EINVAL;
	return 10 * (int)(unit - SIZE_UNITS + 1);
}

int kvg_size_parse(const char *text, uint64_t *ret)
{
	uint64_t whole, fraction = 0, scale = 1;
	int count, digits = 0, shift;
	unsigned __int128 bytes;

	count = parse_digits(text, &whole);
	if (count <= 0)
		return count ? count : -EINVAL;
	text += count;
	if (*text == '.') {
		digits = parse_digits(++text, &fraction);
		if (digits <= 0 || digits > FRACTION_DIGITS)
			return -EINVAL;
		text += digits;
	}
	for (int i = 0; i < digits; i++)
		scale *= 10;
	while (*text == ' ')
		text++;
	shift = parse_unit(text);
	if (shift < 0 || (shift == 0 && digits > 0))
		return -EINVAL;
	bytes = ((unsigned __int128)whole << shift) + ((unsigned __int128)fraction << shift) / scale;
	if (bytes > SIZE_MAX_BYTES)
		return -ERANGE;
	*ret = (uint64_t)bytes;
	return 0;
}

char *kvg_size_format(uint64_t bytes, char text[KVG_SIZE_TEXT])
{
	unsigned unit = 0, shift;

	while (unit < strlen(SIZE_UNITS) && bytes >> (10 * (unit + 1)))
		unit++;
	shift = 10 * unit;
	if (unit == 0)
		(void)snprintf(text, KVG_SIZE_TEXT, "%u B", (unsigned)bytes);
	else
		(void)snprintf(text, KVG_SIZE_TEXT, "%u.%u %ciB", (unsigned)(bytes >> shift),
			(unsigned)(((bytes & ((UINT64_C(1) << shift) - 1)) * 10) >> shift), SIZE_UNITS[unit - 1]);
	return text;
}
