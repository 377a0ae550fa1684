/*
 * The same work on both kinds from the same scores: after every eviction the same positions are left in every row, the
 * same bytes are in blocks and in extents.
 */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "tests/gpu/live.h"
#include "tests/integration/process.h"
#include "tests/support/runner.h"

#define TOKENS 4096u
#define ROWS   24u
#define WORDS  (TOKENS / 32)
#define EVENTS 12u
#define EXTENT (2u << 20) /* of live_config() */

struct scenario {
	const char *name;
	struct kvg_policy policy;
	uint32_t levels;     /* see struct live_sequence */
	uint32_t step;       /* tokens fed at once */
	uint32_t decode;     /* tokens after the prompt */
	uint32_t protect[2]; /* a range, or nothing */
};

#define PREFILL(level_, ratio_, n, chunk, w)                                                                           \
	{                                                                                                              \
		.ratio = (ratio_), .mode = KVG_MODE_CHUNKED, .level = (level_), .flags = KVG_POLICY_WINDOW_ABSOLUTE,   \
		.prefix_tokens = 3, .context_tokens = (n), .chunk_tokens = (chunk), .window = (w)                      \
	}

static const struct scenario scenarios[] = {
	{"pair 30%", PREFILL(KVG_LEVEL_PAIR, 0.3, 3000, 0, 60), 0, 1000, 0, {0}},
	{"pair 30% in chunks", PREFILL(KVG_LEVEL_PAIR, 0.3, 3000, 1000, 59), 0, 500, 0, {0}},
	{"pair 10% in odd chunks", PREFILL(KVG_LEVEL_PAIR, 0.1, 3001, 701, 33), 0, 701, 0, {0}},
	{"pair 70%", PREFILL(KVG_LEVEL_PAIR, 0.7, 1999, 512, 16), 0, 512, 0, {0}},
	{"pair with ties", PREFILL(KVG_LEVEL_PAIR, 0.4, 2500, 1000, 50), 16, 1000, 0, {0}},
	{"pair-head 30%", PREFILL(KVG_LEVEL_PAIR_HEAD, 0.3, 3000, 1000, 59), 0, 1000, 0, {0}},
	{"pair-head with ties", PREFILL(KVG_LEVEL_PAIR_HEAD, 0.3, 2000, 0, 40), 9, 700, 0, {0}},
	{"pair-layer 20%", PREFILL(KVG_LEVEL_PAIR_LAYER, 0.2, 3000, 1000, 59), 0, 1000, 0, {0}},
	{"adakv-layer 30%", PREFILL(KVG_LEVEL_ADAKV_LAYER, 0.3, 3000, 1000, 59), 0, 1000, 0, {0}},
	{"adakv-layer with ties", PREFILL(KVG_LEVEL_ADAKV_LAYER, 0.5, 1500, 0, 20), 7, 1500, 0, {0}},
	{"protected range", PREFILL(KVG_LEVEL_PAIR, 0.2, 2000, 1000, 40), 0, 1000, 0, {300, 420}},
	{"once",
		{.ratio = 0.25,
			.mode = KVG_MODE_ONCE,
			.level = KVG_LEVEL_PAIR,
			.flags = KVG_POLICY_WINDOW_ABSOLUTE,
			.context_tokens = 2600,
			.window = 64},
		0, 900, 0, {0}},
	{"threshold",
		{.ratio = 1,
			.mode = KVG_MODE_THRESHOLD,
			.level = KVG_LEVEL_PAIR,
			.threshold = 0.45f,
			.flags = KVG_POLICY_WINDOW_ABSOLUTE,
			.prefix_tokens = 2,
			.context_tokens = 2400,
			.chunk_tokens = 800,
			.window = 32},
		0, 800, 0, {0}},
	{"floor",
		{.ratio = 0.05,
			.mode = KVG_MODE_CHUNKED,
			.level = KVG_LEVEL_PAIR,
			.floor = 8,
			.flags = KVG_POLICY_WINDOW_ABSOLUTE,
			.context_tokens = 2000,
			.chunk_tokens = 1000,
			.window = 16},
		0, 1000, 0, {0}},
	{"decode budget",
		{.ratio = 1, .mode = KVG_MODE_OFF, .context_tokens = 300, .max_new_tokens = 900, .budget = 200}, 0, 300,
		900, {0}},
	{"prompt and decode budget",
		{.ratio = 0.3,
			.mode = KVG_MODE_CHUNKED,
			.level = KVG_LEVEL_PAIR_LAYER,
			.flags = KVG_POLICY_WINDOW_ABSOLUTE,
			.prefix_tokens = 5,
			.context_tokens = 1500,
			.chunk_tokens = 500,
			.window = 50,
			.max_new_tokens = 640,
			.budget = 400},
		0, 500, 640, {0}},
};

/* What is left after one eviction, or of all of it at the end. */
struct event {
	uint64_t held, dropped, bytes, mapped;
	uint32_t unread; /* tokens of the prompt */
	uint32_t bits[ROWS * WORDS];
};

struct record {
	uint32_t count;
	struct event events[EVENTS];
};

struct job {
	char socket[FIXTURE_PATH];
	bool cuda;
	const struct scenario *scenario;
	struct record *record; /* shared with the test */
};

static void note(struct live *live, const struct live_sequence *sequence, uint32_t unread,
	const struct kvg_evict_result *result, struct record *record)
{
	struct event *event = &record->events[record->count++];

	must(record->count <= EVENTS, "room for the record");
	must(content_rows(live->content) == ROWS && content_words(live->content) == WORDS, "the layout");
	event->held = result->pairs_held;
	event->dropped = result->pairs_dropped;
	event->bytes = result->bytes;
	event->mapped = kvg_mapped_bytes(live->client);
	event->unread = unread;
	must(live_check(live, sequence, event->bits) == result->pairs_held, "the pairs that the eviction said");
}

static void evict(
	struct live *live, struct live_sequence *sequence, uint32_t mode, uint32_t unread, struct record *record)
{
	struct kvg_evict_result result;

	live_evict(live, sequence, mode, &result);
	note(live, sequence, unread, &result, record);
}

static void read_prompt(struct live *live, struct live_sequence *sequence, const struct job *job)
{
	const struct kvg_policy *policy = &job->scenario->policy;
	uint32_t end = policy->prefix_tokens + policy->context_tokens, chunk = policy->chunk_tokens;

	while (sequence->pos < end) {
		uint32_t boundary = chunk ? (sequence->pos / chunk + 1) * chunk : end, left;

		left = (boundary < end ? boundary : end) - sequence->pos;
		live_feed(live, sequence, left < job->scenario->step ? left : job->scenario->step);
		if (sequence->pos == boundary || sequence->pos == end)
			evict(live, sequence, KVG_EVICT_PREFILL, end - sequence->pos, job->record);
	}
}

static void decode(struct live *live, struct live_sequence *sequence, const struct job *job)
{
	for (uint32_t done = 0; done < job->scenario->decode; done += 128) {
		uint32_t left = job->scenario->decode - done;

		live_feed(live, sequence, left < 128 ? left : 128);
		evict(live, sequence, KVG_EVICT_DECODE, 0, job->record);
	}
}

static int work(int fd, void *argument)
{
	const struct job *job = argument;
	struct live_sequence sequence;
	struct kvg_layout layout;
	struct live live;

	(void)fd;
	live_layout(&layout, 2, TOKENS);
	live_open(&live, job->socket, job->cuda, &layout);
	live_create(&live, &job->scenario->policy, 0x1234567890abcdefu, &sequence);
	sequence.levels = job->scenario->levels;
	if (job->scenario->protect[1])
		must(kvg_protect(live.client, sequence.seq, job->scenario->protect[0], job->scenario->protect[1]) == 0,
			kvg_error(live.client));
	read_prompt(&live, &sequence, job);
	decode(&live, &sequence, job);
	live_free(&live, &sequence);
	live_close(&live);
	return 0;
}

/* ---- several sequences, whose evictions are all under way at once ---- */

#define TOGETHER 6u

static const struct scenario together = {"together",
	{.ratio = 0.3,
		.mode = KVG_MODE_CHUNKED,
		.level = KVG_LEVEL_PAIR,
		.flags = KVG_POLICY_WINDOW_ABSOLUTE,
		.prefix_tokens = 5,
		.context_tokens = 1495,
		.chunk_tokens = 500,
		.window = 50,
		.max_new_tokens = 1000,
		.budget = 400},
	0, 500, 768, {0}};

static void evict_all(
	struct live *live, const struct live_sequence *sequences, uint32_t mode, uint32_t next, struct record *records)
{
	struct kvg_evict_result results[TOGETHER];

	must(kvg_stage_wait(live->client) == 0, kvg_error(live->client));
	for (uint32_t i = 0; i < TOGETHER; i++) {
		must(kvg_evict_async(live->client, sequences[i].seq, mode) == 0, kvg_error(live->client));
		must(kvg_reserve_async(live->client, sequences[i].seq, next) == 0, kvg_error(live->client));
	}
	for (uint32_t i = 0; i < TOGETHER; i++) {
		must(kvg_evict_finish(live->client, sequences[i].seq, &results[i]) == 0, kvg_error(live->client));
		must(kvg_reserve_finish(live->client, sequences[i].seq) == 0, kvg_error(live->client));
	}
	for (uint32_t i = 0; i < TOGETHER; i++)
		note(live, &sequences[i], 0, &results[i], &records[i]);
}

static int work_together(int fd, void *argument)
{
	const struct job *job = argument;
	struct live_sequence sequences[TOGETHER];
	struct kvg_layout layout;
	struct live live;

	(void)fd;
	live_layout(&layout, TOGETHER, TOKENS);
	live_open(&live, job->socket, job->cuda, &layout);
	for (uint32_t i = 0; i < TOGETHER; i++) {
		live_create(&live, &together.policy, 0x77000000u + i, &sequences[i]);
		sequences[i].levels = i % 2 ? 7 : 0;
	}
	for (uint32_t pos = 0; pos < 1500 + together.decode; pos += pos < 1500 ? 500 : 128) {
		for (uint32_t i = 0; i < TOGETHER; i++)
			live_feed(&live, &sequences[i], pos < 1500 ? 500 : 128);
		evict_all(&live, sequences, pos < 1500 ? KVG_EVICT_PREFILL : KVG_EVICT_DECODE, pos < 1000 ? 500 : 128,
			job->record);
	}
	for (uint32_t i = 0; i < TOGETHER; i++)
		live_free(&live, &sequences[i]);
	live_close(&live);
	return 0;
}

static void run_on(const struct fixture *fixture, bool cuda, const struct scenario *scenario, struct record *record)
{
	struct job job = {.cuda = cuda, .scenario = scenario, .record = record};
	struct process process;

	(void)fixture_path(fixture, "state/a.sock", job.socket);
	memset(record, 0, sizeof(*record));
	process_fork(&process, work, &job);
	process_finish(&process);
	assert_true(fixture_wait_gone(fixture, 0, 0, 5000));
	live_audit(fixture);
}

static void compare_bits(const struct scenario *scenario, uint32_t number, const struct event *a, const struct event *b)
{
	uint32_t differ = 0, row = 0, pos = 0;

	for (uint32_t i = 0; i < ROWS * WORDS; i++) {
		uint32_t bits = a->bits[i] ^ b->bits[i];

		if (bits && !differ) {
			row = i / WORDS;
			pos = i % WORDS * 32 + (uint32_t)__builtin_ctz(bits);
		}
		differ += (uint32_t)__builtin_popcount(bits);
	}
	if (differ)
		fail_msg("%s, eviction %u: %u positions differ, the first is %u of row %u", scenario->name, number,
			differ, pos, row);
}

/*
 * The same extents, but while the prompt goes on: a GPU's worker then has room for the next eviction as well, no more
 * than what is held already, in whole extents.
 */
static bool same_extents(const struct event *host, const struct event *cuda)
{
	uint64_t ahead = host->unread ? (host->bytes + EXTENT - 1) / EXTENT * EXTENT : 0;

	return cuda->mapped >= host->mapped && cuda->mapped <= host->mapped + ahead;
}

static void compare(const struct scenario *scenario, const struct record *host, const struct record *cuda)
{
	assert_true(host->count > 0);
	assert_int_equal(host->count, cuda->count);
	for (uint32_t i = 0; i < host->count; i++) {
		const struct event *a = &host->events[i], *b = &cuda->events[i];

		compare_bits(scenario, i, a, b);
		if (a->held != b->held || a->dropped != b->dropped || a->bytes != b->bytes || !same_extents(a, b))
			fail_msg("%s, eviction %u: host holds %llu, dropped %llu, %llu bytes of %llu; cuda %llu, %llu, "
				 "%llu of %llu",
				scenario->name, i, (unsigned long long)a->held, (unsigned long long)a->dropped,
				(unsigned long long)a->bytes, (unsigned long long)a->mapped,
				(unsigned long long)b->held, (unsigned long long)b->dropped,
				(unsigned long long)b->bytes, (unsigned long long)b->mapped);
	}
}

static void run_together(const struct fixture *fixture, bool cuda, struct record *records)
{
	struct job job = {.cuda = cuda, .scenario = &together, .record = records};
	struct process process;

	(void)fixture_path(fixture, "state/a.sock", job.socket);
	process_fork(&process, work_together, &job);
	process_finish(&process);
	assert_true(fixture_wait_gone(fixture, 0, 0, 5000));
	live_audit(fixture);
}

static void start(struct fixture *fixture, bool cuda)
{
	char config[512];

	live_config(config, sizeof(config), cuda, "128M", "[tenant a]\nsocket = a.sock\n");
	fixture_start(fixture, config);
}

static void test_both_kinds_keep_the_same_pairs_in_the_same_memory(void **state)
{
	struct record *records =
		mmap(NULL, 2 * sizeof(*records), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct fixture host, cuda;

	(void)state;
	assert_ptr_not_equal(records, MAP_FAILED);
	start(&host, false);
	start(&cuda, true);
	for (size_t i = 0; i < sizeof(scenarios) / sizeof(*scenarios); i++) {
		run_on(&host, false, &scenarios[i], &records[0]);
		run_on(&cuda, true, &scenarios[i], &records[1]);
		compare(&scenarios[i], &records[0], &records[1]);
		print_message("%s: %u evictions alike\n", scenarios[i].name, records[0].count);
	}
	fixture_stop(&cuda);
	fixture_stop(&host);
	(void)munmap(records, 2 * sizeof(*records));
}

/* Extents are shared among the sequences, and which has which differs; pairs and bytes of blocks do not. */
static void test_evictions_at_once(void **state)
{
	const size_t size = 2 * TOGETHER * sizeof(struct record);
	struct record *records = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct fixture host, cuda;

	(void)state;
	assert_ptr_not_equal(records, MAP_FAILED);
	start(&host, false);
	start(&cuda, true);
	run_together(&host, false, records);
	run_together(&cuda, true, records + TOGETHER);
	for (uint32_t i = 0; i < TOGETHER; i++) {
		const struct record *a = &records[i], *b = &records[TOGETHER + i];

		assert_int_equal(a->count, 9);
		assert_int_equal(b->count, 9);
		for (uint32_t k = 0; k < a->count; k++) {
			compare_bits(&together, k, &a->events[k], &b->events[k]);
			assert_int_equal(a->events[k].held, b->events[k].held);
			assert_int_equal(a->events[k].dropped, b->events[k].dropped);
			assert_int_equal(a->events[k].bytes, b->events[k].bytes);
		}
	}
	fixture_stop(&cuda);
	fixture_stop(&host);
	(void)munmap(records, size);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_both_kinds_keep_the_same_pairs_in_the_same_memory),
		cmocka_unit_test(test_evictions_at_once),
	};

	if (!live_gpu())
		return 77;
	return runner_run("parity", tests, sizeof(tests) / sizeof(*tests));
}
