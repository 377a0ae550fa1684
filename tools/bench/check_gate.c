#include "kernels/host/gate.h"
#include "proto/gate_file.h"
#include "tools/bench/bench.h"
#include "tools/bench/check.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define LIMIT 4e-3 /* relative Frobenius error; the reference in bf16 is within 3.8e-3 */

/* One gate file: what it expects and what our kernel says. */
struct gate_check {
	uint32_t heads;
	uint64_t tokens;
	double *expected; /* [heads][tokens] */
	float *scores;    /* [tokens][heads] */
	int folded;
};

static void gate_check_deinit(struct gate_check *check)
{
	free(check->expected);
	free(check->scores);
}

static struct kvg_gate_weights weights_of(const struct kvg_gate_tensors *t)
{
	return (struct kvg_gate_weights){t->shape.heads, t->shape.group, t->shape.hidden, t->shape.width,
		t->shape.sinks, t->wq, t->bq, t->wk, t->b, t->q_norm, t->k_norm, t->k_base};
}

static bool run_gate(const struct check_file *file, const struct kvg_gate *gate, const struct kvg_tensor *hidden,
	struct gate_check *check)
{
	_cleanup_free_ uint16_t *rows = check_copy(file, hidden);
	_cleanup_free_ void *scratch = check_alloc(file, kvg_gate_scratch(gate, check->tokens));

	check->scores = check_alloc(file, check->tokens * check->heads * sizeof(float));
	if (!rows || !scratch || !check->scores)
		return false;
	kvg_gate_score(gate, rows, check->tokens, check->scores, scratch);
	check->folded = kvg_gate_folded(gate);
	return true;
}

static bool score_file(const struct check_file *file, const struct kvg_gate_tensors *tensors, struct gate_check *check)
{
	struct kvg_gate_weights weights = weights_of(tensors);
	const struct kvg_tensor *hidden = check_tensor(file, "hidden", KVG_TENSOR_BF16, 2), *expected;
	struct kvg_gate *gate = NULL;
	int r;

	if (!hidden)
		return false;
	if (hidden->shape[0] == 0 || hidden->shape[1] != weights.hidden)
		return check_fail(file, "tensor hidden has %llu rows of %llu, the gate takes rows of %u",
			(unsigned long long)hidden->shape[0], (unsigned long long)hidden->shape[1], weights.hidden);
	check->heads = weights.heads;
	check->tokens = hidden->shape[0];
	expected = check_tensor_shaped(
		file, "score_f64", KVG_TENSOR_F64, 2, (const uint64_t[]){weights.heads, hidden->shape[0]});
	if (!expected)
		return false;
	check->expected = check_copy(file, expected);
	if (!check->expected)
		return false;
	r = kvg_gate_new(&weights, &gate);
	if (r < 0)
		return check_fail(file, "gate of %u heads x %u, hidden %u, width %u, %u sinks: %s", weights.heads,
			weights.group, weights.hidden, weights.width, weights.sinks, strerror(-r));
	bool done = run_gate(file, gate, hidden, check);

	kvg_gate_free(gate);
	return done;
}

/* Prints the error and where it is largest; true when it is within the limit. */
static bool report(const struct gate_check *check)
{
	double squares = 0, errors = 0, worst = -1;
	uint64_t worst_head = 0, worst_token = 0;

	for (uint64_t head = 0; head < check->heads; head++)
		for (uint64_t token = 0; token < check->tokens; token++) {
			double expected = check->expected[head * check->tokens + token];
			double error = (double)check->scores[token * check->heads + head] - expected;

			squares += expected * expected;
			errors += error * error;
			if (fabs(error) > worst || (isnan(error) && !isnan(worst))) {
				worst = fabs(error);
				worst_head = head;
				worst_token = token;
			}
		}
	double relative = sqrt(errors) / (squares > 0 ? sqrt(squares) : 1.0);
	bool holds = relative <= LIMIT;

	(void)fprintf(holds ? stdout : stderr,
		"%s: relative Frobenius error %.3g (limit %g), %u heads x %llu tokens, sinks %s; "
		"largest at layer 0 head %llu token %llu: expected %.9g, got %.9g\n",
		holds ? "ok" : "FAILED", relative, LIMIT, check->heads, (unsigned long long)check->tokens,
		check->folded ? "folded" : "general", (unsigned long long)worst_head, (unsigned long long)worst_token,
		check->expected[worst_head * check->tokens + worst_token],
		(double)check->scores[worst_token * check->heads + worst_head]);
	return holds;
}

int bench_check_gate(int argc, char **argv)
{
	_cleanup_file_ struct check_file file = {0};
	__attribute__((cleanup(gate_check_deinit))) struct gate_check check = {0};
	struct kvg_gate_tensors tensors;
	char text[512] = "";
	int status = check_open(argc, argv, &file);

	if (status != BENCH_OK)
		return status;
	if (kvg_gate_tensors_read(file.tensors, "", &tensors, text, sizeof(text)) < 0) {
		check_print(&file, "%s", text);
		return BENCH_FAIL;
	}
	bool scored = score_file(&file, &tensors, &check);

	kvg_gate_tensors_deinit(&tensors);
	return scored && report(&check) ? BENCH_OK : BENCH_FAIL;
}
