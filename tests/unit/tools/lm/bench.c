#include "tests/unit/tools/lm/bench.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h>

int bench_setup(void **state)
{
	struct bench *bench = calloc(1, sizeof(*bench));

	assert_non_null(bench);
	bench->fake = fake_kvgate_reset();
	assert_int_equal(lm_pool_new(2, &bench->pool), 0);
	if (lm_model_load("pilot-lm", bench->pool, &bench->model, bench->text) < 0)
		fail_msg("%s", bench->text);
	*state = bench;
	return 0;
}

int bench_teardown(void **state)
{
	struct bench *bench = *state;

	(void)lm_worker_close(bench->worker);
	assert_int_equal(bench->fake->connected, 0);
	(void)lm_model_free(bench->model);
	(void)lm_pool_free(bench->pool);
	free(bench);
	return 0;
}

void bench_open(struct bench *bench, uint32_t max_tokens, const char *gate)
{
	struct lm_worker_setup setup = {.socket = "fake",
		.gate = gate,
		.model_name = "pilot-lm",
		.model = bench->model,
		.kv_dtype = KVG_F32,
		.max_tokens = max_tokens,
		.chunk_tokens = 16000};

	if (lm_worker_open(&setup, &bench->worker, bench->text) < 0)
		fail_msg("%s", bench->text);
}
