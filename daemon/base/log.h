/*
 * log.h - lines for the operator on standard error, with the priority prefix
 * ("<6>") that the service manager reads when it is the listener, and plain
 * "kvgated: " otherwise. One call, one line, one write. Thread-safe.
 */
#ifndef KVG_LOG_H
#define KVG_LOG_H

void log_info(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_warning(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
