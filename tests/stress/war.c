#include "tests/stress/war.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/runner.h"

#define EXTENT      (256u * 1024u)
#define AUDIT_NS    1000000000ull
#define KILL_MS_MIN 50
#define KILL_MS_MAX 600
#define END_NS      30000000000ull
#define PRESSURE_MS 4000u /* for a worker that holds memory back */
#define SEATS_EACH  (STRESS_SEATS / STRESS_TENANTS)

static const char *const sockets[STRESS_TENANTS] = {"state/a.sock", "state/b.sock", "state/c.sock"};

/* ---- the daemon ---- */

static uint64_t share_of(const struct stress_options *options, uint64_t percent)
{
	return options->pool / 100 * percent / EXTENT * EXTENT;
}

static void configure(const struct stress_options *options, char *ret, size_t size)
{
	size_t used;

	(void)snprintf(ret, size,
		"[pool]\ndevice.size = %" PRIu64 "\nextent_size = 256K\nhost.size = %" PRIu64
		"\n[daemon]\npressure_ms = %u\n%s",
		options->pool, options->pool, PRESSURE_MS, options->rounds ? "spin_us = 0\n" : "");
	for (unsigned i = 0; i < STRESS_TENANTS; i++) {
		used = strlen(ret);
		(void)snprintf(ret + used, size - used,
			"[tenant %c]\nsocket = %c.sock\ndevice.max = %" PRIu64 "\ndevice.min = %" PRIu64
			"\nhost.max = %" PRIu64 "\nhost.min = %" PRIu64 "\n",
			'a' + i, 'a' + i, share_of(options, 40), share_of(options, 30), share_of(options, 40),
			share_of(options, 10));
	}
	assert_true(strlen(ret) + 1 < size);
}

void war_open(struct war *war, const struct stress_options *options)
{
	char config[1024];

	*war = (struct war){.options = options, .random = options->seed};
	print_message("seed %" PRIu64 "\n", options->seed);
	war->shared = mmap(NULL, sizeof(*war->shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	assert_true(war->shared != MAP_FAILED);
	configure(options, config, sizeof(config));
	fixture_start(&war->fixture, config);
	observer_open(&war->observer, &war->fixture);
}

void war_close(struct war *war)
{
	observer_close(&war->observer);
	fixture_stop(&war->fixture);
	(void)munmap(war->shared, sizeof(*war->shared));
}

/* ---- seats ---- */

static uint64_t next_seed(struct war *war)
{
	uint64_t state = war->options->seed ^ ++war->spawned_number << 32;

	return stress_random(&state);
}

static _Noreturn void become(struct war *war, struct stress_seat *seat)
{
	struct stress_task task = {.options = war->options,
		.shared = war->shared,
		.seat = seat,
		.min = war->observer.min[seat->tenant],
		.mortal = war->kills};
	int status;

	(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
	(void)snprintf(task.socket, sizeof(task.socket), "%s/%s", war->fixture.dir, sockets[seat->tenant]);
	if (seat->kind == KIND_GOOD)
		status = stress_worker(&task);
	else if (seat->kind == KIND_STEADY)
		status = stress_steady(&task);
	else
		status = stress_bad(&task);
	_exit(status);
}

void war_seat(struct war *war, unsigned number, unsigned tenant, enum stress_kind kind)
{
	struct stress_seat *seat = &war->shared->seats[number];
	pid_t pid;

	assert_int_equal(seat->pid, 0);
	seat->tenant = tenant;
	seat->kind = kind;
	seat->seed = next_seed(war);
	seat->op = seat->armed = 0;
	war->spawned[kind]++;
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0)
		become(war, seat);
	seat->pid = pid;
}

static enum stress_kind some_bad_kind(struct war *war)
{
	uint32_t dice = stress_between(&war->random, 0, 9);

	return dice < 5 ? KIND_HASTY : dice < 8 ? KIND_MUTE : KIND_DEAF;
}

void war_enlist(struct war *war, unsigned tenant)
{
	for (unsigned i = 0; i <= war->options->workers; i++)
		war_seat(war, tenant * SEATS_EACH + i, tenant,
			i < war->options->workers ? KIND_GOOD : some_bad_kind(war));
}

/* Ends the test when a worker ended otherwise than it may. */
static void count_end(struct war *war, struct stress_seat *seat, int status)
{
	bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;

	if (!killed && (!WIFEXITED(status) || WEXITSTATUS(status)))
		fail_msg("seed %" PRIu64 ": worker %d of tenant %u (seed %" PRIu64 ", kind %u) ended with status 0x%x, "
			 "amid %s",
			war->options->seed, (int)seat->pid, seat->tenant, seat->seed, seat->kind, (unsigned)status,
			seat->op ? stress_op_name(seat->op - 1) : "nothing");
	war->killed_themselves += killed && seat->armed;
	war->killed += killed && !seat->armed;
	if (killed)
		war->died_in[seat->op]++;
	seat->pid = 0;
}

static void reap(struct war *war, bool replace)
{
	int status;

	for (unsigned i = 0; i < STRESS_SEATS; i++) {
		struct stress_seat *seat = &war->shared->seats[i];

		if (!seat->pid || waitpid(seat->pid, &status, WNOHANG) != seat->pid)
			continue;
		count_end(war, seat, status);
		if (replace)
			war_seat(war, i, seat->tenant, seat->kind == KIND_GOOD ? KIND_GOOD : some_bad_kind(war));
	}
}

/* ---- the war ---- */

/* One that is in the middle of something longer, when there is one. */
static struct stress_seat *choose_victim(struct war *war)
{
	uint32_t first = stress_between(&war->random, 0, STRESS_SEATS - 1);
	struct stress_seat *any = NULL;

	for (uint32_t i = 0; i < STRESS_SEATS; i++) {
		struct stress_seat *seat = &war->shared->seats[(first + i) % STRESS_SEATS];
		uint32_t op = __atomic_load_n(&seat->op, __ATOMIC_ACQUIRE);

		if (!seat->pid || seat->kind != KIND_GOOD)
			continue;
		if (op == OP_EVICT + 1 || op == OP_DECODE_EVICT + 1 || op > OP_FREE + 1)
			return seat;
		any = any ? any : seat;
	}
	return any;
}

static void perhaps_kill(struct war *war, uint64_t now)
{
	struct stress_seat *seat;

	if (!war->kills || now < war->next_kill_ns)
		return;
	war->next_kill_ns = now + stress_between(&war->random, KILL_MS_MIN, KILL_MS_MAX) * 1000000ull;
	seat = choose_victim(war);
	if (seat)
		(void)kill(seat->pid, SIGKILL);
}

static void look(struct war *war, bool replace)
{
	uint64_t now = stress_now_ns();

	war->next_sample_ns += WAR_SAMPLE_NS;
	if (war->next_sample_ns < now)
		war->next_sample_ns = now;
	stress_sleep_until(war->next_sample_ns);
	observer_sample(&war->observer, WAR_SAMPLE_NS);
	now = stress_now_ns();
	if (now >= war->next_audit_ns) {
		(void)observer_audit(&war->observer);
		war->next_audit_ns = now + AUDIT_NS;
	}
	perhaps_kill(war, now);
	reap(war, replace);
}

void war_wage(struct war *war, uint64_t end_ns)
{
	war->observer.last_ns = 0;
	while (stress_now_ns() < end_ns)
		look(war, true);
}

static bool anybody(const struct war *war)
{
	for (unsigned i = 0; i < STRESS_SEATS; i++)
		if (war->shared->seats[i].pid)
			return true;
	return false;
}

void war_end(struct war *war)
{
	uint64_t limit = stress_now_ns() + END_NS;
	bool kills = war->kills;

	__atomic_store_n(&war->shared->ending, 1, __ATOMIC_RELEASE);
	war->kills = false;
	while (anybody(war)) {
		look(war, false);
		if (stress_now_ns() > limit)
			fail_msg("seed %" PRIu64 ": workers do not end", war->options->seed);
	}
	war->kills = kills;
	observer_end(&war->observer);
	__atomic_store_n(&war->shared->ending, 0, __ATOMIC_RELEASE);
}
