#include "daemon/base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <syslog.h>
#include <unistd.h>

#define LINE_MAX_BYTES 4096

/* Standard error is the journal's when JOURNAL_STREAM holds its device and inode. */
static bool journal_listens(void)
{
	const char *stream = getenv("JOURNAL_STREAM");
	unsigned long long device, inode;
	struct stat st;
	char rest;

	return stream && sscanf(stream, "%llu:%llu%c", &device, &inode, &rest) == 2 && fstat(STDERR_FILENO, &st) == 0 &&
	       st.st_dev == device && st.st_ino == inode;
}

static void write_all(const char *line, size_t size)
{
	while (size > 0) {
		ssize_t n = write(STDERR_FILENO, line, size);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return;
		line += n;
		size -= (size_t)n;
	}
}

/* Text may hold what a worker sent: control characters must not make another line of it. */
static void __attribute__((format(printf, 2, 0))) log_line(int priority, const char *format, va_list args)
{
	const int saved = errno;
	char line[LINE_MAX_BYTES];
	size_t start, size;
	int n;

	n = journal_listens() ? snprintf(line, sizeof(line), "<%d>", priority)
			      : snprintf(line, sizeof(line), "kvgated: ");
	start = (size_t)n;
	errno = saved;
	n = vsnprintf(line + start, sizeof(line) - start, format, args);
	size = start + (n > 0 ? (size_t)n : 0);
	if (size > sizeof(line) - 1) {
		size = sizeof(line) - 1;
		memset(line + size - 3, '.', 3);
	}
	for (size_t i = start; i < size; i++)
		if ((unsigned char)line[i] < ' ' || line[i] == 0x7f)
			line[i] = '?';
	line[size++] = '\n';
	write_all(line, size);
	errno = saved;
}

void log_info(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	log_line(LOG_INFO, format, args);
	va_end(args);
}

void log_warning(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	log_line(LOG_WARNING, format, args);
	va_end(args);
}

void log_error(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	log_line(LOG_ERR, format, args);
	va_end(args);
}
