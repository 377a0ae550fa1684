#include "tests/stress/report.h"

#include <stdio.h>
#include <string.h>

#include "tests/support/runner.h"

static void set(json_t *object, const char *name, uint64_t value)
{
	assert_int_equal(json_object_set_new(object, name, json_integer((json_int_t)value)), 0);
}

static struct stress_counts total(const struct war *war)
{
	struct stress_counts sum = {0};

	for (unsigned i = 0; i < STRESS_SEATS; i++) {
		const struct stress_counts *counts = &war->shared->seats[i].counts;

		for (unsigned op = 0; op < OP_COUNT; op++) {
			sum.op[op].done += counts->op[op].done;
			sum.op[op].refused += counts->op[op].refused;
			sum.op[op].declined += counts->op[op].declined;
		}
		sum.tokens += counts->tokens;
		sum.checks += counts->checks;
		sum.bytes_checked += counts->bytes_checked;
		sum.pairs_dropped += counts->pairs_dropped;
		sum.pairs_recalled += counts->pairs_recalled;
		sum.disconnected += counts->disconnected;
		sum.refused_ns += counts->refused_ns;
		if (counts->refused_longest_ns > sum.refused_longest_ns)
			sum.refused_longest_ns = counts->refused_longest_ns;
	}
	return sum;
}

static json_t *operations(const struct war *war, const struct stress_counts *sum)
{
	json_t *all = json_object();

	for (unsigned op = 0; op < OP_COUNT; op++) {
		json_t *one = json_object();

		set(one, "done", sum->op[op].done);
		set(one, "refused", sum->op[op].refused);
		set(one, "declined", sum->op[op].declined);
		set(one, "died_in", war->died_in[op + 1]);
		(void)json_object_set_new(all, stress_op_name(op), one);
	}
	return all;
}

static json_t *processes(const struct war *war, const struct stress_counts *sum)
{
	json_t *all = json_object();

	set(all, "good", war->spawned[KIND_GOOD]);
	set(all, "mute", war->spawned[KIND_MUTE]);
	set(all, "deaf", war->spawned[KIND_DEAF]);
	set(all, "hasty", war->spawned[KIND_HASTY]);
	set(all, "killed", war->killed);
	set(all, "killed_amid_a_chosen_call", war->killed_themselves);
	set(all, "killed_between_calls", war->died_in[0]);
	set(all, "disconnected", sum->disconnected);
	return all;
}

static json_t *tenants(const struct war *war)
{
	json_t *all = json_array();

	for (unsigned i = 0; i < STRESS_TENANTS; i++) {
		const struct observed_tenant *seen = &war->observer.tenants[i];
		json_t *one = json_object();

		set(one, "max", war->observer.max[i]);
		set(one, "min", war->observer.min[i]);
		set(one, "most_charged", seen->most_charged);
		set(one, "most_used", seen->most_used);
		set(one, "high_water", seen->high_water);
		set(one, "refusals", seen->refusals);
		set(one, "samples_with_unreturned", seen->unreturned_samples);
		set(one, "samples_with_pressure", seen->pressure_samples);
		(void)json_array_append_new(all, one);
	}
	return all;
}

json_t *report_war(const struct war *war)
{
	struct stress_counts sum = total(war);
	const struct observer *observer = &war->observer;
	json_t *json = json_object();

	set(json, "seed", war->options->seed);
	(void)json_object_set_new(json, "seconds", json_real(war->seconds));
	set(json, "pool", observer->pool);
	set(json, "samples", observer->samples);
	set(json, "samples_late", observer->late);
	set(json, "longest_gap_us", observer->longest_gap_ns / 1000);
	set(json, "audits", observer->audits);
	set(json, "pool_most_used", observer->most_used);
	set(json, "pool_most_physical", observer->most_physical);
	set(json, "tokens", sum.tokens);
	set(json, "checks", sum.checks);
	set(json, "bytes_checked", sum.bytes_checked);
	set(json, "pairs_dropped", sum.pairs_dropped);
	set(json, "pairs_recalled", sum.pairs_recalled);
	set(json, "refused_ms_in_all", sum.refused_ns / 1000000);
	set(json, "refused_longest_ms", sum.refused_longest_ns / 1000000);
	(void)json_object_set_new(json, "processes", processes(war, &sum));
	(void)json_object_set_new(json, "tenants", tenants(war));
	(void)json_object_set_new(json, "operations", operations(war, &sum));
	return json;
}

void report_write(json_t *json, const char *path)
{
	FILE *file = path ? fopen(path, "we") : stdout;

	assert_non_null(file);
	assert_int_equal(json_dumpf(json, file, JSON_INDENT(2) | JSON_REAL_PRECISION(6)), 0);
	assert_true(fputc('\n', file) >= 0);
	if (path)
		assert_int_equal(fclose(file), 0);
	json_decref(json);
}
