#include "tools/bench/churn.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "proto/size.h"
#include "tools/bench/bench.h"

#define SECONDS      60.0
#define HOST_POOL    ((uint64_t)256 << 20)
#define CUDA_POOL    ((uint64_t)8 << 30)
#define LOOK_MS      10u  /* between looks at the pool */
#define AUDIT_EVERY  50u  /* looks */
#define SAMPLE_EVERY 100u /* looks */
#define PHASE_LIMIT  60.0 /* seconds for what is not the load */

struct churn {
	struct churn_options options;
	struct service service;
	struct churn_shared *shared; /* mapped, of all processes */
	pid_t workers[CHURN_WORKERS];
	bool failed;
	struct service_status first, last;
	uint64_t audits, looks, max_charged;
	double start, share_sum; /* of the pool, over the looks at the full target */
	uint64_t full_looks;
	json_t *samples;
};

static int say(struct churn *c, const char *what)
{
	(void)fprintf(stderr, "kvgate-bench: churn: %s\n", what);
	c->failed = true;
	return -EIO;
}

/* ---- the workers ---- */

static int start_workers(struct churn *c)
{
	for (unsigned i = 0; i < CHURN_WORKERS; i++) {
		c->workers[i] = fork();
		if (c->workers[i] < 0)
			return say(c, "fork failed");
		if (c->workers[i])
			continue;
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		_exit(churn_worker(&c->service, &c->options, c->shared, i));
	}
	return 0;
}

/* A worker that ends before its time has found something. */
static bool any_ended(struct churn *c)
{
	int status;

	for (unsigned i = 0; i < CHURN_WORKERS; i++)
		if (c->workers[i] > 0 && waitpid(c->workers[i], &status, WNOHANG) == c->workers[i]) {
			c->workers[i] = 0;
			(void)fprintf(stderr, "kvgate-bench: churn: worker %u ended with wait status 0x%x\n", i,
				(unsigned)status);
			c->failed = true;
		}
	return c->failed;
}

static bool all_done(const struct churn *c, enum churn_phase phase)
{
	for (unsigned i = 0; i < CHURN_WORKERS; i++)
		if (__atomic_load_n(&c->shared->done[i], __ATOMIC_ACQUIRE) <= (uint32_t)phase)
			return false;
	return true;
}

static void nap(void)
{
	const struct timespec time = {.tv_nsec = LOOK_MS * 1000000};

	(void)nanosleep(&time, NULL);
}

static int wait_done(struct churn *c, enum churn_phase phase)
{
	double end = service_seconds() + PHASE_LIMIT;

	while (!all_done(c, phase)) {
		if (any_ended(c))
			return -EIO;
		if (service_seconds() > end)
			return say(c, "the workers do not come to an end of this phase");
		nap();
	}
	return 0;
}

static void begin(struct churn *c, enum churn_phase phase)
{
	__atomic_store_n(&c->shared->phase, (uint32_t)phase, __ATOMIC_RELEASE);
}

static void end_workers(struct churn *c)
{
	int status;

	begin(c, CHURN_END);
	for (unsigned i = 0; i < CHURN_WORKERS; i++) {
		if (c->workers[i] <= 0)
			continue;
		if (c->failed)
			(void)kill(c->workers[i], SIGKILL);
		(void)waitpid(c->workers[i], &status, 0);
		if (!c->failed && (!WIFEXITED(status) || WEXITSTATUS(status)))
			(void)say(c, "a worker did not end as it should");
	}
}

/* ---- the load ---- */

static int audit(struct churn *c)
{
	struct service_audit found;
	int r = service_audit(&c->service, &found);

	if (r < 0)
		return r;
	c->audits++;
	if (!found.clean)
		return say(c, found.difference);
	return found.physical == found.charged ? 0 : say(c, "audit: physical and charged bytes differ");
}

static void sample(struct churn *c, const struct service_status *status)
{
	(void)json_array_append_new(
		c->samples, json_pack("{s:f, s:I, s:I, s:I}", "seconds", service_seconds() - c->start, "target",
				    (json_int_t)c->shared->target, "charged", (json_int_t)status->charged,
				    "device_used", (json_int_t)status->device_used));
}

/* 95% of the pool for most of the time, then 40%. */
static uint64_t target_at(const struct churn *c, double share)
{
	return c->first.pool_size / 100 * (share < 0.8 ? 95 : 40);
}

static int look(struct churn *c)
{
	double share = (service_seconds() - c->start) / c->options.seconds;
	struct service_status status;
	int r = service_status(&c->service, &status);

	if (r < 0)
		return r;
	__atomic_store_n(&c->shared->charged, status.charged, __ATOMIC_RELAXED);
	__atomic_store_n(&c->shared->target, target_at(c, share), __ATOMIC_RELAXED);
	if (status.charged > c->max_charged)
		c->max_charged = status.charged;
	if (status.charged > status.pool_size)
		return say(c, "more is charged than the pool has");
	if (share > 0.2 && share < 0.8) {
		c->full_looks++;
		c->share_sum += (double)status.charged / (double)status.pool_size;
	}
	if (c->looks % SAMPLE_EVERY == 0)
		sample(c, &status);
	return c->looks++ % AUDIT_EVERY == 0 ? audit(c) : 0;
}

static int load(struct churn *c)
{
	int r = 0;

	c->start = service_seconds();
	while (r == 0 && service_seconds() - c->start < c->options.seconds) {
		r = any_ended(c) ? -EIO : look(c);
		nap();
	}
	return r;
}

static int run(struct churn *c)
{
	int r = start_workers(c);

	if (r == 0)
		r = wait_done(c, CHURN_CONNECT);
	if (r == 0)
		r = service_status(&c->service, &c->first);
	begin(c, CHURN_BEFORE);
	if (r == 0)
		r = wait_done(c, CHURN_BEFORE);
	c->shared->target = target_at(c, 0);
	begin(c, CHURN_LOAD);
	if (r == 0)
		r = load(c);
	begin(c, CHURN_DRAIN);
	if (r == 0)
		r = wait_done(c, CHURN_DRAIN);
	if (r == 0)
		r = service_wait_empty(&c->service, 1000);
	if (r == 0)
		r = audit(c);
	begin(c, CHURN_AFTER);
	if (r == 0)
		r = wait_done(c, CHURN_AFTER);
	if (r == 0)
		r = service_status(&c->service, &c->last);
	return r;
}

/* ---- the report ---- */

static struct churn_counts total(const struct churn *c)
{
	struct churn_counts sum = {0};

	for (unsigned i = 0; i < CHURN_WORKERS; i++) {
		const struct churn_counts *counts = &c->shared->counts[i];

		sum.operations += counts->operations;
		sum.sequences += counts->sequences;
		sum.tokens += counts->tokens;
		sum.evictions += counts->evictions;
		sum.decode_evictions += counts->decode_evictions;
		sum.truncates += counts->truncates;
		sum.checks += counts->checks;
		sum.bytes_checked += counts->bytes_checked;
		sum.refusals += counts->refusals;
		sum.pairs_dropped += counts->pairs_dropped;
		sum.wrong += counts->wrong;
	}
	return sum;
}

/* Bytes that the device has less than before the first sequence, what the daemon counts as overhead aside. */
static int64_t not_returned(const struct churn *c)
{
	const struct churn_counts *counts = &c->shared->counts[0];

	if (!counts->free_before)
		return 0;
	return (int64_t)counts->free_before - (int64_t)counts->free_after -
	       ((int64_t)c->last.overhead - (int64_t)c->first.overhead);
}

static json_t *report(const struct churn *c)
{
	struct churn_counts sum = total(c);
	json_t *json = json_pack("{s:s, s:s, s:I, s:f, s:i, s:i, s:I, s:I}", "kind", c->first.cuda ? "cuda" : "host",
		"device", c->first.device, "seed", (json_int_t)c->options.seed, "seconds", c->options.seconds,
		"workers", (int)CHURN_WORKERS, "tenants", (int)CHURN_TENANTS, "pool", (json_int_t)c->first.pool_size,
		"extent_size", (json_int_t)c->first.extent_size);
	json_t *work = json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "operations",
		(json_int_t)sum.operations, "sequences", (json_int_t)sum.sequences, "tokens", (json_int_t)sum.tokens,
		"evictions", (json_int_t)sum.evictions, "decode_evictions", (json_int_t)sum.decode_evictions,
		"truncates", (json_int_t)sum.truncates, "pairs_dropped", (json_int_t)sum.pairs_dropped, "refusals",
		(json_int_t)sum.refusals, "checks", (json_int_t)sum.checks, "bytes_checked",
		(json_int_t)sum.bytes_checked);
	json_t *memory = json_pack("{s:I, s:f, s:I, s:I, s:I, s:I}", "max_charged", (json_int_t)c->max_charged,
		"mean_share_of_pool", c->full_looks ? c->share_sum / (double)c->full_looks : 0.0, "audits",
		(json_int_t)c->audits, "charged_at_end", (json_int_t)c->last.charged, "device_not_returned",
		(json_int_t)not_returned(c), "overhead_at_end", (json_int_t)c->last.overhead);

	(void)json_object_update(json, work);
	(void)json_object_update(json, memory);
	json_decref(work);
	json_decref(memory);
	(void)json_object_set(json, "samples", c->samples);
	(void)json_object_set_new(json, "wrong", json_integer((json_int_t)sum.wrong));
	(void)json_object_set_new(json, "ok", json_boolean(!c->failed));
	return json;
}

/* What must hold at the end, besides what ends the run at once. */
static void judge(struct churn *c)
{
	struct churn_counts sum = total(c);

	if (sum.wrong)
		(void)say(c, "wrong bytes");
	if (!sum.evictions || !sum.checks)
		(void)say(c, "nothing was evicted");
	if (c->first.cuda && not_returned(c) > (int64_t)(2 * c->first.extent_size))
		(void)say(c, "the device has not got its memory back");
}

/* ---- the command ---- */

static int start_service(struct churn *c, const char *program)
{
	char config[1024];

	(void)snprintf(config, sizeof(config),
		"[pool]\n%sdevice.size = %" PRIu64 "\n"
		"[tenant a]\nsocket = a.sock\n[tenant b]\nsocket = b.sock\n[tenant c]\nsocket = c.sock\n",
		c->options.cuda ? "kind = cuda\n" : "", c->options.pool);
	return service_start(&c->service, program, config);
}

static int parse(int argc, char **argv, struct churn *c, const char **ret_program, const char **ret_dir)
{
	static const struct option options[] = {{"kind", required_argument, NULL, 'k'},
		{"seconds", required_argument, NULL, 's'}, {"pool", required_argument, NULL, 'p'},
		{"seed", required_argument, NULL, 'r'}, {"device", required_argument, NULL, 'd'},
		{"kvgated", required_argument, NULL, 'g'}, {"socket-dir", required_argument, NULL, 'D'},
		{NULL, 0, NULL, 0}};
	int option, r = 0;

	while (r == 0 && (option = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		if (option == 'k')
			c->options.cuda = strcmp(optarg, "cuda") == 0;
		else if (option == 's')
			c->options.seconds = strtod(optarg, NULL);
		else if (option == 'p')
			r = kvg_size_parse(optarg, &c->options.pool);
		else if (option == 'r')
			c->options.seed = strtoull(optarg, NULL, 10);
		else if (option == 'd')
			c->options.device = (int)strtol(optarg, NULL, 10);
		else if (option == 'g')
			*ret_program = optarg;
		else if (option == 'D')
			*ret_dir = optarg;
		else
			r = -EINVAL;
	}
	if (r == 0 && optind == argc && c->options.seconds > 0)
		return BENCH_OK;
	(void)fprintf(stderr,
		"usage: kvgate-bench churn [--kind host|cuda] [--seconds N] [--pool SIZE] [--seed N] [--device N]\n"
		"                          [--kvgated PROGRAM | --socket-dir DIR]\n");
	return BENCH_USAGE;
}

static int prepare(struct churn *c, const char *program, const char *dir)
{
	int r;

	if (!c->options.pool)
		c->options.pool = c->options.cuda ? CUDA_POOL : HOST_POOL;
	c->samples = json_array();
	c->shared = mmap(NULL, sizeof(*c->shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (!c->samples || c->shared == MAP_FAILED)
		return say(c, "no memory");
	(void)fprintf(stderr, "kvgate-bench: churn: seed %" PRIu64 "\n", c->options.seed);
	r = dir ? service_attach(&c->service, dir) : start_service(c, program);
	if (r < 0)
		return r;
	r = service_status(&c->service, &c->first);
	c->options.cuda = c->first.cuda;
	return r;
}

int bench_churn(int argc, char **argv)
{
	struct churn c = {.options = {.seconds = SECONDS, .seed = (uint64_t)time(NULL)}};
	const char *program = NULL, *dir = NULL;
	int r = parse(argc, argv, &c, &program, &dir);
	json_t *json;

	if (r != BENCH_OK)
		return r;
	if (prepare(&c, program, dir) < 0)
		return BENCH_FAIL;
	if (run(&c) < 0)
		c.failed = true;
	else
		judge(&c);
	end_workers(&c);
	if (service_stop(&c.service) < 0)
		c.failed = true;
	json = report(&c);
	(void)json_dumpf(json, stdout, JSON_INDENT(1));
	(void)fputc('\n', stdout);
	json_decref(json);
	json_decref(c.samples);
	(void)munmap(c.shared, sizeof(*c.shared));
	return c.failed ? BENCH_FAIL : BENCH_OK;
}
