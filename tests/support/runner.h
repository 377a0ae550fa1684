/*
 * runner.h - runs a group of CMocka tests and fails each one that leaves a
 * descriptor open or a child process behind.
 */
#ifndef KVG_TEST_RUNNER_H
#define KVG_TEST_RUNNER_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

/* Like cmocka_run_group_tests(). Returns the number of failed tests. */
int runner_run(const char *group, const struct CMUnitTest *tests, size_t count);

#endif
