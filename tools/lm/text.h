/* text.h - the one line that says why a call of kvgate-lm failed. */
#ifndef KVG_LM_TEXT_H
#define KVG_LM_TEXT_H

#include <stdarg.h>
#include <stdio.h>

#define LM_TEXT 512

/* Formats into text (LM_TEXT bytes, cut to fit) and returns error, so that a caller fails in one statement. */
__attribute__((format(printf, 3, 4))) static inline int lm_fail(char *text, int error, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	(void)vsnprintf(text, LM_TEXT, format, args);
	va_end(args);
	return error;
}

#endif
