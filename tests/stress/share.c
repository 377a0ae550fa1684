/*
 * How much of its speed a tenant keeps: a steady worker of the first tenant, within its min, alone on the daemon and
 * beside the war of the other two, in turns. The neighbours think between their operations, so that the CPUs, which
 * are nobody's budget, do not decide, and neither the daemon nor the steady worker spins; who waited for a CPU is
 * reported beside the rates.
 */
#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "tests/stress/report.h"
#include "tests/support/runner.h"

#define ROUNDS_MAX 50u
#define SETTLE_NS  1000000000ull

enum rate {
	RATE_STEPS,  /* steps a second */
	RATE_CPU,    /* tokens for each second of the worker's CPU time */
	RATE_DAEMON, /* tokens for each second of the daemon's CPU time (beside: of all its work) */
	RATE_COUNT,
};

static const char *const rate_names[RATE_COUNT] = {
	"steps_per_second", "tokens_per_cpu_second", "tokens_per_daemon_cpu_second"};

struct spent {
	uint64_t neighbours_done; /* operations, and those that the daemon refused */
	double daemon_cpu, daemon_wait, children_cpu, own_cpu;
	double machine_cpu; /* all CPUs, whoever used them */
};

struct phase {
	double rate[RATE_COUNT], wall, worker_cpu, worker_wait;
	struct spent spent;
	uint32_t p50[OP_COUNT], p99[OP_COUNT];
};

/* ---- what the kernel counts ---- */

static void add_thread(const char *path, struct spent *ret)
{
	uint64_t ran, waited;
	FILE *file = fopen(path, "re");

	if (file && fscanf(file, "%" SCNu64 " %" SCNu64, &ran, &waited) == 2) {
		ret->daemon_cpu += (double)ran / 1e9;
		ret->daemon_wait += (double)waited / 1e9;
	}
	if (file)
		(void)fclose(file);
}

static double seconds_of(int who)
{
	struct rusage usage;

	assert_int_equal(getrusage(who, &usage), 0);
	return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
	       (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static double machine_seconds(void)
{
	uint64_t user = 0, nice = 0, system = 0;
	FILE *file = fopen("/proc/stat", "re");

	assert_non_null(file);
	assert_int_equal(fscanf(file, "cpu %" SCNu64 " %" SCNu64 " %" SCNu64, &user, &nice, &system), 3);
	(void)fclose(file);
	return (double)(user + nice + system) / (double)sysconf(_SC_CLK_TCK);
}

static uint64_t operations_of_neighbours(const struct war *war)
{
	uint64_t sum = 0;

	for (unsigned i = 1; i < STRESS_SEATS; i++)
		for (unsigned op = 0; op < OP_COUNT; op++)
			sum += war->shared->seats[i].counts.op[op].done + war->shared->seats[i].counts.op[op].refused;
	return sum;
}

static struct spent spent_so_far(const struct war *war)
{
	struct spent spent = {.neighbours_done = operations_of_neighbours(war),
		.children_cpu = seconds_of(RUSAGE_CHILDREN),
		.own_cpu = seconds_of(RUSAGE_SELF),
		.machine_cpu = machine_seconds()};
	struct dirent *entry;
	char path[400];
	DIR *dir;

	(void)snprintf(path, sizeof(path), "/proc/%d/task", (int)war->fixture.pid);
	dir = opendir(path);
	assert_non_null(dir);
	while ((entry = readdir(dir))) {
		if (entry->d_name[0] == '.')
			continue;
		(void)snprintf(path, sizeof(path), "/proc/%d/task/%s/schedstat", (int)war->fixture.pid, entry->d_name);
		add_thread(path, &spent);
	}
	(void)closedir(dir);
	return spent;
}

/* ---- one phase ---- */

static int compare_latency(const void *a, const void *b)
{
	uint32_t x = ((const struct stress_latency *)a)->ns, y = ((const struct stress_latency *)b)->ns;

	return (x > y) - (x < y);
}

static void summarize_latencies(const struct war *war, struct phase *phase)
{
	uint32_t all = war->shared->seats[0].latency_count, count = all < STRESS_LATENCIES ? all : STRESS_LATENCIES;
	struct stress_latency *of = calloc(STRESS_LATENCIES, sizeof(*of));

	assert_non_null(of);
	for (uint32_t op = 0; op < OP_COUNT; op++) {
		uint32_t n = 0;

		for (uint32_t i = 0; i < count; i++)
			if (war->shared->latencies[i].op == op)
				of[n++] = war->shared->latencies[i];
		qsort(of, n, sizeof(*of), compare_latency);
		phase->p50[op] = n ? of[n / 2].ns : 0;
		phase->p99[op] = n ? of[n - 1 - n / 100].ns : 0;
	}
	free(of);
}

static void run_phase(struct war *war, bool beside, struct phase *ret)
{
	const struct stress_seat *seat = &war->shared->seats[0];
	struct spent before, after;
	double tokens, own;

	*ret = (struct phase){0};
	for (unsigned i = 1; beside && i < STRESS_TENANTS; i++)
		war_enlist(war, i);
	war_wage(war, stress_now_ns() + SETTLE_NS);
	before = spent_so_far(war);
	war_seat(war, 0, 0, KIND_STEADY);
	war_wage(war, stress_now_ns() + (uint64_t)(war->options->seconds * 1e9));
	war_end(war);
	after = spent_so_far(war);
	assert_true(seat->steps > 0);
	tokens = (double)seat->tokens;
	ret->wall = (double)seat->wall_ns / 1e9;
	ret->worker_cpu = (double)seat->cpu_ns / 1e9;
	ret->worker_wait = (double)seat->wait_ns / 1e9;
	ret->spent = (struct spent){.neighbours_done = after.neighbours_done - before.neighbours_done,
		.daemon_cpu = after.daemon_cpu - before.daemon_cpu,
		.daemon_wait = after.daemon_wait - before.daemon_wait,
		.children_cpu = after.children_cpu - before.children_cpu - ret->worker_cpu};
	own = ret->spent.daemon_cpu + ret->spent.children_cpu + ret->worker_cpu + after.own_cpu - before.own_cpu;
	ret->spent.machine_cpu = after.machine_cpu - before.machine_cpu - own;
	ret->rate[RATE_STEPS] = (double)seat->steps / ret->wall;
	ret->rate[RATE_CPU] = tokens / ret->worker_cpu;
	ret->rate[RATE_DAEMON] = tokens / ret->spent.daemon_cpu;
	summarize_latencies(war, ret);
}

/* ---- the report ---- */

static json_t *describe(const struct phase *phase)
{
	json_t *json = json_object(), *latencies = json_object();

	for (unsigned i = 0; i < RATE_COUNT; i++)
		(void)json_object_set_new(json, rate_names[i], json_real(phase->rate[i]));
	(void)json_object_set_new(json, "seconds", json_real(phase->wall));
	(void)json_object_set_new(json, "worker_cpu_seconds", json_real(phase->worker_cpu));
	(void)json_object_set_new(json, "worker_waited_for_cpu_seconds", json_real(phase->worker_wait));
	(void)json_object_set_new(json, "daemon_cpu_seconds", json_real(phase->spent.daemon_cpu));
	(void)json_object_set_new(json, "daemon_waited_for_cpu_seconds", json_real(phase->spent.daemon_wait));
	(void)json_object_set_new(json, "neighbours_cpu_seconds", json_real(phase->spent.children_cpu));
	(void)json_object_set_new(
		json, "neighbours_operations", json_integer((json_int_t)phase->spent.neighbours_done));
	(void)json_object_set_new(json, "strangers_cpu_seconds", json_real(phase->spent.machine_cpu));
	for (unsigned op = 0; op < OP_COUNT; op++)
		if (phase->p50[op])
			(void)json_object_set_new(latencies, stress_op_name(op),
				json_pack(
					"{s:f, s:f}", "p50_us", phase->p50[op] / 1e3, "p99_us", phase->p99[op] / 1e3));
	(void)json_object_set_new(json, "latency", latencies);
	return json;
}

static int compare_double(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median_ratio(const struct phase *alone, const struct phase *beside, unsigned rounds, unsigned rate)
{
	double ratios[ROUNDS_MAX] = {0};

	for (unsigned i = 0; i < rounds; i++)
		ratios[i] = beside[i].rate[rate] / alone[i].rate[rate];
	qsort(ratios, rounds, sizeof(*ratios), compare_double);
	return rounds % 2 ? ratios[rounds / 2] : (ratios[rounds / 2 - 1] + ratios[rounds / 2]) / 2;
}

static json_t *make_report(const struct war *war, const struct phase *alone, const struct phase *beside)
{
	unsigned rounds = war->options->rounds;
	json_t *json = json_object(), *ratios = json_object(), *all = json_array();

	(void)json_object_set_new(json, "seed", json_integer((json_int_t)war->options->seed));
	(void)json_object_set_new(json, "pace_us", json_integer((json_int_t)war->options->pace_us));
	(void)json_object_set_new(json, "step_us", json_integer((json_int_t)war->options->step_us));
	(void)json_object_set_new(json, "neighbours", json_integer(2 * (json_int_t)(war->options->workers + 1)));
	for (unsigned i = 0; i < RATE_COUNT; i++)
		(void)json_object_set_new(ratios, rate_names[i], json_real(median_ratio(alone, beside, rounds, i)));
	(void)json_object_set_new(json, "median_ratio_beside_to_alone", ratios);
	for (unsigned i = 0; i < rounds; i++)
		(void)json_array_append_new(
			all, json_pack("{s:o, s:o}", "alone", describe(&alone[i]), "beside", describe(&beside[i])));
	(void)json_object_set_new(json, "rounds", all);
	return json;
}

void share_run(const struct stress_options *options)
{
	struct phase alone[ROUNDS_MAX] = {0}, beside[ROUNDS_MAX] = {0};
	struct war war;

	assert_in_range(options->rounds, 1, ROUNDS_MAX);
	war_open(&war, options);
	war.kills = true;
	for (unsigned i = 0; i < options->rounds; i++) {
		bool first = i % 2;

		run_phase(&war, first, first ? &beside[i] : &alone[i]);
		run_phase(&war, !first, first ? &alone[i] : &beside[i]);
	}
	report_write(make_report(&war, alone, beside), options->json);
	war_close(&war);
}
