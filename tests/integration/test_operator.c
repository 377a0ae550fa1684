/* What an operator waits for: a lower budget, a reclaim, work on a sequence; and what becomes of it when he is killed.
 */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "tests/integration/turns.h"
#include "tests/support/runner.h"

/* ---- the operator ---- */

static void test_a_lower_max_reclaims_down_to_it_and_answers_then(void **state)
{
	static const char *const words[] = {"budget", "set", "search", "device.max=2M", NULL};
	struct process_output output;
	struct fixture_usage usage;
	struct stage s;
	struct kv kvs[4];

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 4; i++)
		fill_idle(&s, s.idler, &kvs[i], 4);
	control(&s, &output, words);
	usage = usage_of(&s, "search"); /* as soon as it has answered */
	assert_int_equal(usage.charged, 8 * EXTENT);
	assert_int_equal(usage.unreturned, 0);
	assert_int_equal(usage.host_charged, 2 * IMAGE(4));
	if (strstr(output.out, "in the way"))
		fail_msg("%s", output.out);
	fixture_audit(&s.fixture);
	assert_false(restore(&s, &kvs[2]));
	assert_false(restore(&s, &kvs[3]));
	assert_int_equal(kv_free(&kvs[2]), 0);
	assert_int_equal(kv_free(&kvs[3]), 0);
	assert_true(restore(&s, &kvs[0]));
	assert_true(restore(&s, &kvs[1]));
	forget(kvs, 2);
	stage_close(&s);
}

static void test_what_is_in_use_stands_in_the_way_of_a_lower_max(void **state)
{
	static const char *const words[] = {"budget", "set", "search", "device.max=1M", NULL};
	const struct kvg_sqe one = create(1);
	struct process_output output;
	char text[FIXTURE_TEXT];
	struct kvg_cqe cqe;
	struct stage s;
	struct kv kv;

	(void)state;
	stage_open(&s);
	fill(&s, s.idler, &kv, 8);
	control(&s, &output, words);
	assert_names(output.out, "in the way");
	assert_names(output.out, "1.0 MiB above device.max; in use 2.0 MiB");
	assert_int_equal(usage_of(&s, "search").device_max, 4 * EXTENT);
	assert_int_equal(ask(&s, s.asker, &one, &cqe, text), -ENOSPC);
	assert_names(text, "budget 1.0 MiB");
	assert_names(text, "1310720 bytes short");
	assert_int_equal(kv_check(&kv), 0);
	fixture_audit(&s.fixture);
	assert_int_equal(kv_free(&kv), 0);
	(void)create_granted(&s, s.asker, 4);
	assert_int_equal(ask(&s, s.asker, &one, &cqe, text), -ENOSPC);
	control(&s, &output, (const char *const[]){"budget", "set", "search", "device.max=512K", NULL});
	assert_names(output.out, "512.0 KiB above device.max; promised 1.0 MiB"); /* nothing of it is there yet */
	stage_close(&s);
}

static void test_budgets_that_go_up_and_down_while_sequences_come_and_go(void **state)
{
	static const char *const bytes[] = {"device.max=1M", "device.max=4M", "device.high=512K", "device.high=0"};
	struct process_output output;
	struct stage s;
	struct kv kvs[4];

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 4; i++)
		fill_idle(&s, s.idler, &kvs[i], 3);
	for (unsigned i = 0; i < 16; i++) {
		const char *const words[] = {"budget", "set", "search", bytes[i % 4], NULL};

		control(&s, &output, words);
		fixture_audit(&s.fixture);
		if (i % 4 != 1 && i % 4 != 3)
			continue;
		(void)restore(&s, &kvs[i / 4 % 4]);
		assert_int_equal(kvg_idle(s.idler, kvs[i / 4 % 4].id), 0);
	}
	for (unsigned i = 0; i < 4; i++)
		(void)restore(&s, &kvs[i]);
	forget(kvs, 4);
	stage_close(&s);
}

static void test_reclaim_counts_what_it_begins(void **state)
{
	static const uint8_t key[KVG_KEY_SIZE] = {1, 2, 3};
	static const char *const some[] = {"--json", "reclaim", "search", "1280K", NULL};
	static const char *const all[] = {"--json", "reclaim", "search", NULL};
	struct process_output output;
	struct stage s;
	struct kv kvs[3], publisher;

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 3; i++)
		fill_idle(&s, s.idler, &kvs[i], 3);
	fill(&s, s.idler, &publisher, 2);
	assert_int_equal(kvg_publish(s.idler, publisher.id, key, NULL), 0);
	assert_int_equal(kv_free(&publisher), 0);
	all_turn(&s);
	control(&s, &output, some);
	assert_names(output.out, "\"device_bytes\": 1310720");
	assert_names(output.out, "\"host_bytes\": 1376256");
	assert_names(output.out, "\"contexts\": 1");
	assert_names(output.out, "\"sequences\": 1");
	assert_int_equal(usage_of(&s, "search").charged, 6 * EXTENT);
	assert_int_equal(usage_of(&s, "search").unreturned, 0);
	fixture_audit(&s.fixture);
	control(&s, &output, all);
	assert_names(output.out, "\"device_bytes\": 1572864");
	assert_names(output.out, "\"contexts\": 0");
	assert_names(output.out, "\"sequences\": 2");
	assert_int_equal(usage_of(&s, "search").charged, 0);
	fixture_audit(&s.fixture);
	for (unsigned i = 0; i < 3; i++)
		assert_true(restore(&s, &kvs[i]));
	forget(kvs, 3);
	s.context_stays = true;
	stage_close(&s);
}

/* ---- an operator who is killed while he waits ---- */

/* After a turn of each: connections that ended before are closed by then. */
static unsigned count_descriptors(const struct stage *s)
{
	char path[64];
	unsigned n = 0;
	DIR *dir;

	all_turn(s);
	(void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)s->fixture.pid);
	dir = opendir(path);
	assert_non_null(dir);
	while (readdir(dir))
		n++;
	assert_int_equal(closedir(dir), 0);
	return n;
}

/* Starts kvgatectl, waits until so many bytes are on their way, and kills it. */
static void control_killed(const struct stage *s, const char *const words[], uint64_t unreturned)
{
	struct process_program program;
	struct process_output output;

	control_start(s, &program, words);
	wait_unreturned(s, unreturned);
	assert_int_equal(kill(program.pid, SIGKILL), 0);
	process_collect(&program, FIXTURE_WAIT_MS, &output);
	assert_int_equal(output.status, 128 + SIGKILL);
	assert_string_equal(output.out, "");
	fixture_audit(&s->fixture);
}

/* Nothing of it is left, and as many descriptors as before. */
static void nothing_leaks(const struct stage *s, unsigned descriptors)
{
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;

	while (count_descriptors(s) > descriptors) {
		assert_true(fixture_now_ms() < deadline);
		all_turn(s);
	}
	assert_int_equal(count_descriptors(s), descriptors);
	fixture_audit(&s->fixture);
}

/* The budget holds, and what is above it goes all the same. */
static void test_a_lower_max_goes_on_without_its_operator(void **state)
{
	static const char *const less[] = {"budget", "set", "search", "device.max=2M", NULL};
	static const char *const more[] = {"budget", "set", "search", "device.max=4M", NULL};
	struct process_output output;
	struct stage s;
	struct kv kvs[4];
	unsigned descriptors;

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 4; i++)
		fill_idle(&s, s.idler, &kvs[i], 4);
	descriptors = count_descriptors(&s);
	control_killed(&s, less, 8 * EXTENT);
	settle(&s, "search", 8 * EXTENT);
	assert_int_equal(usage_of(&s, "search").device_max, 8 * EXTENT);
	assert_int_equal(usage_of(&s, "search").charged, 8 * EXTENT);
	nothing_leaks(&s, descriptors - 8);
	control(&s, &output, more);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(restore(&s, &kvs[i]), i < 2);
	nothing_leaks(&s, descriptors);
	forget(kvs, 4);
	stage_close(&s);
}

static void test_a_reclaim_goes_on_without_its_operator(void **state)
{
	static const char *const words[] = {"reclaim", "search", NULL};
	struct stage s;
	struct kv kvs[2];
	unsigned descriptors;

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 2; i++)
		fill_idle(&s, s.idler, &kvs[i], 4);
	descriptors = count_descriptors(&s);
	control_killed(&s, words, 8 * EXTENT);
	settle(&s, "search", 0);
	nothing_leaks(&s, descriptors - 8);
	for (unsigned i = 0; i < 2; i++)
		assert_true(restore(&s, &kvs[i]));
	nothing_leaks(&s, descriptors);
	forget(kvs, 2);
	stage_close(&s);
}

/* It waits for the memory of another sequence, which goes to the host for it. */
static void test_work_on_a_sequence_goes_on_without_its_operator(void **state)
{
	const char *words[] = {"restore", "1", NULL, NULL};
	struct stage s;
	struct kv away, kvs[4];
	uint64_t deadline = fixture_now_ms() + FIXTURE_WAIT_MS;
	unsigned descriptors;
	char seq[32];

	(void)state;
	stage_open(&s);
	fill_idle(&s, s.idler, &away, 4);
	assert_int_equal(kvg_offload(s.idler, away.id, NULL), 0);
	all_turn(&s);
	for (unsigned i = 0; i < 4; i++)
		fill_idle(&s, s.idler, &kvs[i], 4);
	settle(&s, "search", 16 * EXTENT);
	descriptors = count_descriptors(&s);
	(void)snprintf(seq, sizeof(seq), "%u:%u", (unsigned)(away.id >> 32), (unsigned)away.id);
	words[2] = seq;
	control_killed(&s, words, 4 * EXTENT);
	while (usage_of(&s, "search").host_charged != IMAGE(4)) { /* there are two until it is back */
		assert_true(fixture_now_ms() < deadline);
		all_turn(&s);
	}
	settle(&s, "search", 16 * EXTENT);
	nothing_leaks(&s, descriptors);
	assert_false(restore(&s, &away));
	assert_int_equal(kv_free(&away), 0);
	all_turn(&s);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(restore(&s, &kvs[i]), i == 0);
	forget(kvs, 4);
	stage_close(&s);
}

/* ---- the end ---- */

/* A request waits, a reclaim is under way, an operator waits for both: the daemon ends at once, and cleanly. */
static void test_the_daemon_ends_while_all_of_them_wait(void **state)
{
	static const char *const words[] = {"reclaim", "search", NULL};
	const struct kvg_sqe sqe = create(16);
	struct process_program program;
	struct process_output output;
	struct stage s;
	struct kv kvs[2];

	(void)state;
	stage_open(&s);
	for (unsigned i = 0; i < 2; i++)
		fill_idle(&s, s.idler, &kvs[i], 4);
	control_start(&s, &program, words);
	wait_unreturned(&s, 8 * EXTENT); /* nobody but the operator wants so much */
	submit(s.asker, &sqe);
	while (!usage_of(&s, "search").pressure) /* somebody waits */
		continue;
	fixture_stop(&s.fixture);
	process_collect(&program, FIXTURE_WAIT_MS, &output);
	assert_int_equal(output.status, 1);
	assert_names(output.err, "the daemon hung up without an answer");
	forget(kvs, 2);
	s.idler = kvg_close(s.idler);
	s.asker = kvg_close(s.asker);
	s.chat = kvg_close(s.chat);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_a_lower_max_reclaims_down_to_it_and_answers_then),
		cmocka_unit_test(test_what_is_in_use_stands_in_the_way_of_a_lower_max),
		cmocka_unit_test(test_budgets_that_go_up_and_down_while_sequences_come_and_go),
		cmocka_unit_test(test_reclaim_counts_what_it_begins),
		cmocka_unit_test(test_a_lower_max_goes_on_without_its_operator),
		cmocka_unit_test(test_a_reclaim_goes_on_without_its_operator),
		cmocka_unit_test(test_work_on_a_sequence_goes_on_without_its_operator),
		cmocka_unit_test(test_the_daemon_ends_while_all_of_them_wait),
	};

	return runner_run("integration/operator", tests, sizeof(tests) / sizeof(*tests));
}
