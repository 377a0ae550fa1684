/* bench.h - the pilot model on the fake library: what the tests of the worker and of its jobs start from. */
#ifndef KVG_TEST_LM_BENCH_H
#define KVG_TEST_LM_BENCH_H

#include "tests/unit/tools/lm/fake_kvgate.h"
#include "tools/lm/worker.h"

struct bench {
	struct fake_kvgate *fake;
	struct lm_pool *pool;
	struct lm_model *model;
	struct lm_worker *worker;
	char text[LM_TEXT];
};

/* CMocka fixtures; *state is a struct bench. */
int bench_setup(void **state);
int bench_teardown(void **state);

/* Connects a worker for sequences of at most max_tokens. */
void bench_open(struct bench *bench, uint32_t max_tokens, const char *gate);

#endif
