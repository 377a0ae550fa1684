/*
 * The host tier and shared contexts on a GPU: what leaves the device comes back bit for bit, what evictions drop comes
 * back as the rules say, and the worker next door reads what was published. The same is run on the host kind, and
 * both must hold the same pairs.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "tests/gpu/live.h"
#include "tests/integration/process.h"
#include "tests/support/runner.h"

#define TOKENS 4096u
#define ROWS   24u
#define WORDS  (TOKENS / 32)
#define BITS   (ROWS * WORDS)
#define EVENTS 24u

/* Pairs and positions of a sequence at some moment. */
struct event {
	uint64_t pairs, moved;
	uint32_t bits[BITS];
};

struct record {
	uint32_t count;
	struct event events[EVENTS];
};

struct job {
	char socket[FIXTURE_PATH];
	bool cuda;
	uint32_t number; /* what of it is done; the work's */
	struct record *record;
};

/* Checks every byte of a sequence and writes down what it holds. */
static struct event *note(
	struct live *live, const struct live_sequence *sequence, uint64_t moved, struct record *record)
{
	struct event *event = &record->events[record->count++];

	must(record->count <= EVENTS, "room for the record");
	must(content_rows(live->content) == ROWS && content_words(live->content) == WORDS, "the layout");
	event->moved = moved;
	event->pairs = live_check(live, sequence, event->bits);
	return event;
}

static void must_hold(const uint32_t *got, const uint32_t *want, const char *what)
{
	char text[160];

	for (uint32_t i = 0; i < BITS; i++) {
		if (got[i] == want[i])
			continue;
		(void)snprintf(text, sizeof(text), "%s: row %u, positions %u to %u: %#x, not %#x", what, i / WORDS,
			i % WORDS * 32, i % WORDS * 32 + 31, got[i], want[i]);
		process_must(0, what, text);
	}
}

static struct kvg_policy policy_of(double ratio, uint8_t level, uint32_t n, uint32_t chunk, uint16_t flags)
{
	return (struct kvg_policy){.ratio = ratio,
		.mode = KVG_MODE_CHUNKED,
		.level = level,
		.flags = (uint16_t)(flags | KVG_POLICY_WINDOW_ABSOLUTE),
		.prefix_tokens = 3,
		.context_tokens = n,
		.chunk_tokens = chunk,
		.window = 40,
		.max_new_tokens = 900,
		.budget = 300};
}

/* Reads a prompt in chunks, with an eviction after each. */
static void read_prompt(struct live *live, struct live_sequence *sequence, const struct kvg_policy *policy)
{
	uint32_t end = policy->prefix_tokens + policy->context_tokens;

	while (sequence->pos < end) {
		uint32_t left = end - sequence->pos, to = policy->chunk_tokens - sequence->pos % policy->chunk_tokens;

		live_feed(live, sequence, to < left ? to : left);
		live_evict(live, sequence, KVG_EVICT_PREFILL, NULL);
	}
}

/* ---- offload ---- */

static void away_and_back(struct live *live, const struct live_sequence *sequence, bool reserve)
{
	struct kvg_sequence_info before, after;
	uint64_t bytes = 0;

	must(kvg_query(live->client, sequence->seq, &before) == 0, kvg_error(live->client));
	must(kvg_offload(live->client, sequence->seq, &bytes) == 0, kvg_error(live->client));
	must(bytes > 0, "bytes on the host");
	must(kvg_commit(live->client, sequence->seq, 0) == -EBUSY, "an offloaded sequence is not worked on");
	if (reserve)
		must(kvg_reserve(live->client, sequence->seq, 1) == 0, kvg_error(live->client));
	else
		must(kvg_restore(live->client, sequence->seq) == 0, kvg_error(live->client));
	must(kvg_query(live->client, sequence->seq, &after) == 0, kvg_error(live->client));
	must(before.pairs == after.pairs && before.committed_pos == after.committed_pos, "its lengths");
}

/*
 * Two sequences of the same content and scores, of which one goes to the host and back whenever it can: they stay the
 * same, later evictions by scores that went along with it.
 */
static int work_offload(int fd, void *argument)
{
	const struct job *job = argument;
	const struct kvg_policy policy = policy_of(0.3, KVG_LEVEL_PAIR, 1797, 600, 0);
	struct live_sequence moved, stays;
	const struct event *got, *want;
	struct kvg_layout layout;
	struct live live;

	(void)fd;
	live_layout(&layout, 4, TOKENS);
	live_open(&live, job->socket, job->cuda, &layout);
	live_create(&live, &policy, 0x0ff10ad0u + job->number, &moved);
	live_create(&live, &policy, 0x0ff10ad0u + job->number, &stays);
	for (uint32_t step = 0; step < 8; step++) {
		bool prompt = step < 3;
		uint32_t mode = prompt ? KVG_EVICT_PREFILL : KVG_EVICT_DECODE;

		live_feed(&live, &moved, prompt ? 600 : 100);
		live_feed(&live, &stays, prompt ? 600 : 100);
		away_and_back(&live, &moved, step % 2); /* with fresh pairs, which have scores */
		(void)note(&live, &moved, 0, job->record);
		live_evict(&live, &moved, mode, NULL);
		live_evict(&live, &stays, mode, NULL);
		away_and_back(&live, &moved, false);
		want = note(&live, &stays, 0, job->record);
		got = note(&live, &moved, 0, job->record);
		must_hold(got->bits, want->bits, "the pairs of a sequence that was away");
	}
	live_free(&live, &moved);
	live_free(&live, &stays);
	live_close(&live);
	return 0;
}

/* ---- recall ---- */

static const double ratios[] = {0.1, 0.3, 0.6, 1.0};

/* What was evicted at 10% and recalled at a ratio is what an eviction at that ratio leaves. */
static int work_recall(int fd, void *argument)
{
	const struct job *job = argument;
	uint8_t level = job->number % 4;
	uint32_t levels = job->number < 4 ? 0 : 16; /* with ties */
	struct live_sequence back, want;
	const struct event *here, *there;
	struct kvg_layout layout;
	struct live live;

	(void)fd;
	live_layout(&layout, 2, TOKENS);
	live_open(&live, job->socket, job->cuda, &layout);
	for (size_t i = 1; i < sizeof(ratios) / sizeof(*ratios); i++) {
		struct kvg_policy little = policy_of(ratios[0], level, 1997, 0, KVG_POLICY_RETAIN_HOST),
				  more = policy_of(ratios[i], level, 1997, 0, 0);
		struct kvg_recall_result result;

		little.chunk_tokens = more.chunk_tokens = 2000;
		live_create(&live, &little, 0x4eca1100u + i, &back);
		live_create(&live, &more, 0x4eca1100u + i, &want);
		back.levels = want.levels = levels;
		read_prompt(&live, &back, &little);
		read_prompt(&live, &want, &more);
		must(kvg_recall(live.client, back.seq, ratios[i], &result) == 0, kvg_error(live.client));
		there = note(&live, &want, 0, job->record);
		here = note(&live, &back, result.pairs_recalled, job->record);
		must_hold(here->bits, there->bits, "what a recall leaves");
		must(result.pairs_held == here->pairs, "the pairs that it said");
		live_free(&live, &back);
		live_free(&live, &want);
	}
	live_close(&live);
	return 0;
}

/*
 * Several evictions, fewer frames than what they drop needs, recalls between them, and offload of the rest: the two
 * kinds keep and bring back the same.
 */
static int work_recall_little_room(int fd, void *argument)
{
	const struct job *job = argument;
	const struct kvg_policy policy = policy_of(0.15, KVG_LEVEL_PAIR_LAYER, 2397, 600, KVG_POLICY_RETAIN_HOST);
	struct live_sequence sequence;
	struct kvg_recall_result result;
	struct kvg_layout layout;
	struct live live;

	(void)fd;
	live_layout(&layout, 2, TOKENS);
	live_open(&live, job->socket, job->cuda, &layout);
	live_create(&live, &policy, 0x11773200u, &sequence);
	sequence.levels = job->number ? 50 : 0;
	for (uint32_t i = 0; i < 4; i++) {
		live_feed(&live, &sequence, 600);
		live_evict(&live, &sequence, KVG_EVICT_PREFILL, NULL);
		(void)note(&live, &sequence, 0, job->record);
		if (i % 2 == 0)
			continue;
		must(kvg_recall(live.client, sequence.seq, 0.25, &result) == 0, kvg_error(live.client));
		(void)note(&live, &sequence, result.pairs_recalled, job->record);
	}
	for (uint32_t i = 0; i < 3; i++) {
		live_feed(&live, &sequence, 128);
		live_evict(&live, &sequence, KVG_EVICT_DECODE, NULL);
		(void)note(&live, &sequence, 0, job->record);
		must(kvg_recall_budget(live.client, sequence.seq, 320 + 40 * i, &result) == 0, kvg_error(live.client));
		(void)note(&live, &sequence, result.pairs_recalled, job->record);
	}
	live_free(&live, &sequence);
	live_close(&live);
	return 0;
}

/* ---- contexts ---- */

static const uint8_t key[KVG_KEY_SIZE] = {7, 1, 3};

static const struct kvg_policy behind = {.ratio = 0.5,
	.mode = KVG_MODE_CHUNKED,
	.level = KVG_LEVEL_PAIR,
	.flags = KVG_POLICY_WINDOW_ABSOLUTE,
	.context_tokens = 500,
	.chunk_tokens = 500,
	.window = 20,
	.max_new_tokens = 300};

/* The sequence goes on behind the context. */
static void go_on(struct live *live, struct live_sequence *sequence, struct record *record)
{
	(void)note(live, sequence, 0, record);
	live_feed(live, sequence, 500 - sequence->pos % 500);
	live_evict(live, sequence, KVG_EVICT_PREFILL, NULL);
	(void)note(live, sequence, 0, record);
	live_feed(live, sequence, 77);
	(void)note(live, sequence, 0, record);
}

static int work_publish(int fd, void *argument)
{
	const struct job *job = argument;
	const struct kvg_policy policy = policy_of(0.3, KVG_LEVEL_PAIR, 1197, 600, 0);
	struct live_sequence sequence;
	struct kvg_context_info info;
	struct kvg_layout layout;
	struct live live;

	live_layout(&layout, 4, TOKENS);
	live_open(&live, job->socket, job->cuda, &layout);
	live_create(&live, &policy, 0xc0117e87u, &sequence);
	read_prompt(&live, &sequence, &policy);
	live_feed(&live, &sequence, 50); /* not evicted: it is part of the context all the same */
	(void)note(&live, &sequence, 0, job->record);
	must(kvg_publish(live.client, sequence.seq, key, &info) == 0, kvg_error(live.client));
	must(info.tokens == 1250 && !info.existed && info.bytes > 0, "the context");
	must_hold(note(&live, &sequence, 0, job->record)->bits, job->record->events[0].bits, "what was published");
	process_say(fd, 'p');
	must(process_listen(fd) == 'g', "the other worker has attached");
	live_feed(&live, &sequence, 100);
	live_evict(&live, &sequence, KVG_EVICT_DECODE, NULL);
	(void)note(&live, &sequence, 0, job->record);
	live_free(&live, &sequence);
	live_close(&live);
	return 0;
}

static int work_attach(int fd, void *argument)
{
	const struct job *job = argument;
	struct live_sequence sequences[2];
	struct kvg_context_info info;
	struct kvg_layout layout;
	struct live live;

	live_layout(&layout, 4, TOKENS);
	live_open(&live, job->socket, job->cuda, &layout);
	for (uint32_t i = 0; i < 2; i++) {
		sequences[i] = (struct live_sequence){.tag = 0xc0117e87u};
		must(kvg_attach(live.client, key, &behind, &sequences[i].seq, &info) == 0, kvg_error(live.client));
		sequences[i].pos = info.tokens;
		(void)note(&live, &sequences[i], 0, job->record);
	}
	process_say(fd, 'a');
	must(process_listen(fd) == 'g', "the publisher has gone");
	for (uint32_t i = 0; i < 2; i++)
		go_on(&live, &sequences[i], job->record);
	away_and_back(&live, &sequences[0], false);
	(void)note(&live, &sequences[0], 0, job->record);
	for (uint32_t i = 0; i < 2; i++)
		live_free(&live, &sequences[i]);
	live_close(&live);
	return 0;
}

static int work_fork(int fd, void *argument)
{
	const struct job *job = argument;
	const struct kvg_policy policy = policy_of(0.3, KVG_LEVEL_PAIR, 1197, 600, 0);
	struct live_sequence sequences[3];
	struct kvg_layout layout;
	struct live live;
	uint64_t seqs[2];

	(void)fd;
	live_layout(&layout, 4, TOKENS);
	live_open(&live, job->socket, job->cuda, &layout);
	live_create(&live, &policy, 0xf0427a9eu, &sequences[0]);
	read_prompt(&live, &sequences[0], &policy);
	live_feed(&live, &sequences[0], 33);
	(void)note(&live, &sequences[0], 0, job->record);
	must(kvg_fork(live.client, sequences[0].seq, 2, seqs) == 0, kvg_error(live.client));
	for (uint32_t i = 0; i < 3; i++) {
		if (i)
			sequences[i] = (struct live_sequence){
				.seq = seqs[i - 1], .tag = sequences[0].tag, .pos = sequences[0].pos};
		must_hold(note(&live, &sequences[i], 0, job->record)->bits, job->record->events[0].bits,
			i ? "what a copy holds" : "what its parent holds");
	}
	for (uint32_t i = 0; i < 3; i++) { /* each goes its own way */
		live_feed(&live, &sequences[i], 40 + 30 * i);
		live_evict(&live, &sequences[i], KVG_EVICT_DECODE, NULL);
		(void)note(&live, &sequences[i], 0, job->record);
	}
	live_free(&live, &sequences[0]);
	for (uint32_t i = 1; i < 3; i++) {
		(void)note(&live, &sequences[i], 0, job->record);
		live_free(&live, &sequences[i]);
	}
	live_close(&live);
	return 0;
}

/* ---- the test's side ---- */

static void compare(const char *what, const struct record *host, const struct record *cuda)
{
	assert_true(host->count > 0);
	if (host->count != cuda->count)
		fail_msg("%s: host has %u events, cuda %u", what, host->count, cuda->count);
	for (uint32_t i = 0; i < host->count; i++) {
		const struct event *a = &host->events[i], *b = &cuda->events[i];

		for (uint32_t k = 0; k < BITS; k++)
			if (a->bits[k] != b->bits[k])
				fail_msg("%s, event %u: row %u, positions from %u: host has %#x, cuda %#x", what, i,
					k / WORDS, k % WORDS * 32, a->bits[k], b->bits[k]);
		if (a->pairs != b->pairs || a->moved != b->moved)
			fail_msg("%s, event %u: host has %llu pairs, %llu came back; cuda %llu, %llu", what, i,
				(unsigned long long)a->pairs, (unsigned long long)a->moved,
				(unsigned long long)b->pairs, (unsigned long long)b->moved);
	}
}

static struct record *records_new(size_t count)
{
	struct record *records =
		mmap(NULL, count * sizeof(*records), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	assert_ptr_not_equal(records, MAP_FAILED);
	return records;
}

static void start(struct fixture *fixture, bool cuda, const char *host_size)
{
	char config[512], more[200];

	(void)snprintf(more, sizeof(more), "host.size = %s\n[tenant a]\nsocket = a.sock\n[tenant b]\nsocket = b.sock\n",
		host_size);
	live_config(config, sizeof(config), cuda, "256M", more);
	fixture_start(fixture, config);
}

/* Nothing is left of it; and nobody is charged for anything. */
static void settle(const struct fixture *fixture)
{
	assert_true(fixture_wait_gone(fixture, 0, 0, 5000));
	live_audit(fixture);
}

static void run_on(
	const struct fixture *fixture, bool cuda, int (*work)(int, void *), uint32_t number, struct record *record)
{
	struct job job = {.cuda = cuda, .number = number, .record = record};
	struct process process;

	(void)fixture_path(fixture, "state/a.sock", job.socket);
	memset(record, 0, sizeof(*record));
	process_fork(&process, work, &job);
	process_finish(&process);
	settle(fixture);
}

/* The same on a daemon of each kind; for each number below `count`. */
static void run_on_both(const char *what, const char *host_size, int (*work)(int, void *), uint32_t count)
{
	struct record *records = records_new(2);
	struct fixture host, cuda;

	start(&host, false, host_size);
	start(&cuda, true, host_size);
	for (uint32_t i = 0; i < count; i++) {
		run_on(&host, false, work, i, &records[0]);
		run_on(&cuda, true, work, i, &records[1]);
		compare(what, &records[0], &records[1]);
		print_message("%s %u: %u events alike\n", what, i, records[0].count);
	}
	fixture_stop(&cuda);
	fixture_stop(&host);
	(void)munmap(records, 2 * sizeof(*records));
}

static void test_offload_and_restore(void **state)
{
	(void)state;
	run_on_both("offload", "64M", work_offload, 1);
}

/* Workers of two tenants, whose transfers take turns on the link. */
static void test_offload_of_two_tenants(void **state)
{
	struct record *records = records_new(4);
	struct process processes[4];
	struct job jobs[4];
	struct fixture cuda;

	(void)state;
	start(&cuda, true, "128M");
	for (uint32_t i = 0; i < 4; i++) {
		jobs[i] = (struct job){.cuda = true, .number = i, .record = &records[i]};
		(void)fixture_path(&cuda, i % 2 ? "state/a.sock" : "state/b.sock", jobs[i].socket);
		process_fork(&processes[i], work_offload, &jobs[i]);
	}
	for (uint32_t i = 0; i < 4; i++)
		process_finish(&processes[i]);
	settle(&cuda);
	fixture_stop(&cuda);
	(void)munmap(records, 4 * sizeof(*records));
}

static void test_recall(void **state)
{
	(void)state;
	run_on_both("recall", "64M", work_recall, 8);
}

static void test_recall_with_little_room(void **state)
{
	(void)state;
	run_on_both("recall with little room", "4M", work_recall_little_room, 2);
}

static void test_fork(void **state)
{
	(void)state;
	run_on_both("fork", "64M", work_fork, 1);
}

static void check_attached(const struct record *published, const struct record *attached)
{
	for (uint32_t i = 0; i < 2; i++)
		if (memcmp(attached->events[i].bits, published->events[1].bits, sizeof(published->events[1].bits)) != 0)
			fail_msg("attached sequence %u holds other pairs than what was published", i);
}

/* The context goes to the host with nobody attached, and comes back for the next one. */
static void share_from_host(const struct fixture *fixture, bool cuda, struct record *records)
{
	struct job job = {.cuda = cuda, .record = &records[2]};
	struct process attached;

	(void)fixture_path(fixture, "state/a.sock", job.socket);
	assert_int_equal(fixture_reclaim(fixture, "a"), 1);
	live_audit(fixture);
	process_fork(&attached, work_attach, &job);
	assert_int_equal(process_hear(&attached), 'a');
	check_attached(&records[0], &records[2]);
	process_tell(&attached, 'g');
	process_finish(&attached);
	live_audit(fixture);
}

/* records: of the publisher, of who attaches while it is there, and of who does when the context was on the host. */
static void share(const struct fixture *fixture, bool cuda, struct record *records)
{
	struct job jobs[2] = {{.cuda = cuda, .record = &records[0]}, {.cuda = cuda, .record = &records[1]}};
	struct process publisher, attached;

	(void)fixture_path(fixture, "state/a.sock", jobs[0].socket);
	(void)fixture_path(fixture, "state/a.sock", jobs[1].socket);
	process_fork(&publisher, work_publish, &jobs[0]);
	assert_int_equal(process_hear(&publisher), 'p');
	process_fork(&attached, work_attach, &jobs[1]);
	assert_int_equal(process_hear(&attached), 'a');
	check_attached(&records[0], &records[1]);
	process_tell(&publisher, 'g');
	process_finish(&publisher);
	process_tell(&attached, 'g');
	process_finish(&attached);
	live_audit(fixture);
	share_from_host(fixture, cuda, records);
}

static void test_publish_and_attach(void **state)
{
	struct record *records = records_new(6);
	struct fixture host, cuda;

	(void)state;
	start(&host, false, "64M");
	start(&cuda, true, "64M");
	share(&host, false, &records[0]);
	share(&cuda, true, &records[3]);
	compare("publish", &records[0], &records[3]);
	compare("attach", &records[1], &records[4]);
	compare("attach from the host", &records[2], &records[5]);
	fixture_stop(&cuda);
	fixture_stop(&host);
	(void)munmap(records, 6 * sizeof(*records));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_offload_and_restore),
		cmocka_unit_test(test_offload_of_two_tenants),
		cmocka_unit_test(test_recall),
		cmocka_unit_test(test_recall_with_little_room),
		cmocka_unit_test(test_publish_and_attach),
		cmocka_unit_test(test_fork),
	};

	if (!live_gpu())
		return 77;
	return runner_run("tiers", tests, sizeof(tests) / sizeof(*tests));
}
