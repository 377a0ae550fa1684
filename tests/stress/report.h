/*
 * report.h - what a run found, as JSON.
 */
#ifndef KVG_STRESS_REPORT_H
#define KVG_STRESS_REPORT_H

#include <jansson.h>

#include "tests/stress/war.h"

/* What the daemon and the workers did. */
json_t *report_war(const struct war *war);

/* Writes and frees it: to a file, or to standard output when path is NULL. */
void report_write(json_t *json, const char *path);

#endif
