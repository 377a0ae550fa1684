/*
 * stress - three tenants at war over one pool, each with at most 40% and at least 30% of it: workers that do
 * anything in any order, die at any moment or behave badly, while budgets, books and bytes must hold at every instant.
 *
 *     stress [--seconds N] [--seed N] [--pool SIZE] [--workers N] [--pace-us N] [--step-us N] [--json FILE]
 *     stress --share ROUNDS ...     how much of its speed a tenant keeps beside the war of the others, and no war at
 * all
 *
 * The daemon's program may be named by KVG_KVGATED in the environment.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/size.h"
#include "tests/stress/report.h"
#include "tests/stress/war.h"
#include "tests/support/runner.h"

#define SECONDS     300.0
#define POOL        ((uint64_t)60 << 20)
#define WORKERS     3u
#define WORKERS_MAX (STRESS_SEATS / STRESS_TENANTS - 1)
#define PACE_US     4000u
#define STEP_US     2000u /* an 8B model on one H200 decodes a token in about 7 ms */

void war_run(const struct stress_options *options)
{
	struct war war;
	uint64_t start;

	war_open(&war, options);
	war.kills = true;
	start = stress_now_ns();
	for (unsigned i = 0; i < STRESS_TENANTS; i++)
		war_enlist(&war, i);
	war_wage(&war, start + (uint64_t)(options->seconds * 1e9));
	war_end(&war);
	war.seconds = (double)(stress_now_ns() - start) / 1e9;
	report_write(report_war(&war), options->json);
	assert_true(war.killed + war.killed_themselves > 0);
	war_close(&war);
}

static void test_war(void **state)
{
	war_run(*state);
}

static void test_share(void **state)
{
	share_run(*state);
}

static int parse(int argc, char **argv, struct stress_options *options)
{
	static const struct option known[] = {{"seconds", required_argument, NULL, 's'},
		{"seed", required_argument, NULL, 'r'}, {"pool", required_argument, NULL, 'p'},
		{"workers", required_argument, NULL, 'w'}, {"pace-us", required_argument, NULL, 'u'},
		{"step-us", required_argument, NULL, 't'}, {"json", required_argument, NULL, 'j'},
		{"share", required_argument, NULL, 'S'}, {NULL, 0, NULL, 0}};
	int option, r = 0;

	while (r == 0 && (option = getopt_long(argc, argv, "", known, NULL)) >= 0) {
		if (option == 's')
			options->seconds = strtod(optarg, NULL);
		else if (option == 'r')
			options->seed = strtoull(optarg, NULL, 10);
		else if (option == 'p')
			r = kvg_size_parse(optarg, &options->pool);
		else if (option == 'w')
			options->workers = (unsigned)strtoul(optarg, NULL, 10);
		else if (option == 'u')
			options->pace_us = strtoull(optarg, NULL, 10);
		else if (option == 't')
			options->step_us = strtoull(optarg, NULL, 10);
		else if (option == 'j')
			options->json = optarg;
		else if (option == 'S')
			options->rounds = (unsigned)strtoul(optarg, NULL, 10);
		else
			r = -1;
	}
	if (r == 0 && optind == argc && options->seconds > 0 && options->workers > 0 &&
		options->workers <= WORKERS_MAX && options->pool >= (uint64_t)16 << 20 && options->pace_us < 1000000 &&
		options->step_us < 1000000)
		return 0;
	(void)fprintf(stderr,
		"usage: stress [--share ROUNDS] [--seconds N] [--seed N] [--pool SIZE] [--workers N (1 to %u)] "
		"[--pace-us N] [--step-us N] [--json FILE]\n",
		WORKERS_MAX);
	return -1;
}

int main(int argc, char **argv)
{
	struct stress_options options = {.seed = (uint64_t)time(NULL),
		.pool = POOL,
		.seconds = SECONDS,
		.workers = WORKERS,
		.pace_us = PACE_US,
		.step_us = STEP_US};
	const struct CMUnitTest war[] = {cmocka_unit_test_prestate(test_war, &options)};
	const struct CMUnitTest share[] = {cmocka_unit_test_prestate(test_share, &options)};

	if (parse(argc, argv, &options) < 0)
		return 2;
	return options.rounds ? runner_run("share", share, 1) : runner_run("war", war, 1);
}
