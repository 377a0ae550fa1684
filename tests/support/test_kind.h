/*
 * test_kind.h - a memory kind whose operations a test may replace one by one; the others are the host's, which do not
 * look at the kind that they are given.
 */
#ifndef KVG_TEST_KIND_H
#define KVG_TEST_KIND_H

#include "daemon/memory/kind.h"

#include "tests/support/runner.h"

struct test_kind {
	struct kind kind; /* first */
	struct kind_ops ops;
	struct kind *host;
};

/* The kind must not be moved afterwards. */
static inline void test_kind_init(struct test_kind *kind)
{
	assert_int_equal(kind_host_new(&kind->host), 0);
	kind->ops = *kind->host->ops;
	kind->kind = (struct kind){.ops = &kind->ops, .granularity = kind->host->granularity};
}

static inline void test_kind_deinit(struct test_kind *kind)
{
	kind->host = kind_free(kind->host);
}

/* The host's operations, for replacements that fall back on them. */
static inline const struct kind_ops *test_kind_host(struct kind *kind)
{
	return ((struct test_kind *)kind)->host->ops;
}

#endif
