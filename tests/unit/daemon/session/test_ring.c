#include "daemon/session/ring.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/support/runner.h"

#define ENTRIES 16u

/* A ring and the worker's own mapping of it. */
struct ends {
	struct ring ring;
	struct kvg_ring *worker;
	uint32_t submitted;
};

static int ends_setup(void **state)
{
	static struct ends ends;

	ends = (struct ends){.submitted = 0};
	assert_int_equal(ring_init(&ends.ring, ENTRIES), 0);
	ends.worker = mmap(NULL, ends.ring.size, PROT_READ | PROT_WRITE, MAP_SHARED, ends.ring.fd, 0);
	assert_true(ends.worker != MAP_FAILED);
	*state = &ends;
	return 0;
}

static int ends_teardown(void **state)
{
	struct ends *ends = *state;

	assert_int_equal(munmap(ends->worker, ends->ring.size), 0);
	ring_deinit(&ends->ring);
	return 0;
}

static void put(struct ends *ends, uint64_t user_data)
{
	struct kvg_sqe *sq = (void *)((uint8_t *)ends->worker + ends->worker->sq_offset);

	sq[ends->submitted % ENTRIES] = (struct kvg_sqe){.op = KVG_OP_QUERY, .user_data = user_data};
	__atomic_store_n(&ends->worker->sq_tail, ++ends->submitted, __ATOMIC_RELEASE);
}

static const struct kvg_cqe *completion(const struct ends *ends, uint32_t index)
{
	const struct kvg_cqe *cq = (const void *)((const uint8_t *)ends->worker + ends->worker->cq_offset);

	return &cq[index % ENTRIES];
}

static const char *text(const struct ends *ends, uint32_t index)
{
	return (const char *)ends->worker + ends->worker->text_offset + (size_t)(index % ENTRIES) * KVG_TEXT_SIZE;
}

static void take(struct ends *ends, uint64_t expected)
{
	struct kvg_sqe sqe;

	assert_int_equal(ring_take(&ends->ring, &sqe), 1);
	assert_int_equal(sqe.op, KVG_OP_QUERY);
	assert_int_equal(sqe.user_data, expected);
}

static bool finish(struct ends *ends, uint64_t user_data)
{
	struct kvg_cqe cqe = {.user_data = user_data};

	return ring_complete(&ends->ring, &cqe, "not to be seen");
}

/* ---- geometry ---- */

static void check_geometry(uint32_t entries)
{
	struct ring ring;
	struct stat st;
	const struct kvg_ring *header;

	assert_int_equal(ring_init(&ring, entries), 0);
	header = ring.shared;
	assert_int_equal(header->magic, KVG_RING_MAGIC);
	assert_int_equal(header->version, KVG_ABI_VERSION);
	assert_int_equal(header->sq_entries, entries);
	assert_int_equal(header->cq_entries, entries);
	assert_int_equal(header->sq_offset, 4096);
	assert_int_equal(header->cq_offset, 4096 + entries * 128);
	assert_int_equal(header->text_offset, 4096 + entries * (128 + 64));
	assert_int_equal(header->size % 4096, 0);
	assert_in_range(header->size - header->text_offset, entries * KVG_TEXT_SIZE, entries * KVG_TEXT_SIZE + 4095);
	assert_int_equal(fstat(ring.fd, &st), 0);
	assert_int_equal(st.st_size, header->size);
	assert_int_equal(ring.size, header->size);
	assert_int_equal(header->sq_tail | header->sq_head | header->cq_tail | header->cq_head, 0);
	assert_int_equal(header->sleeping | header->events | header->pressure, 0);
	assert_int_equal(header->need_wakeup, 1);
	ring_deinit(&ring);
}

static void test_geometry(void **state)
{
	(void)state;
	check_geometry(RING_ENTRIES_MIN);
	check_geometry(256);
	check_geometry(RING_ENTRIES_MAX);
}

/* A worker that could shrink the memfd would kill the daemon by SIGBUS. */
static void test_size_is_sealed(void **state)
{
	const struct ends *ends = *state;

	assert_int_equal(ftruncate(ends->ring.fd, 4096), -1);
	assert_int_equal(errno, EPERM);
	assert_int_equal(ftruncate(ends->ring.fd, (off_t)ends->ring.size + 4096), -1);
	assert_int_equal(errno, EPERM);
	assert_int_equal(fcntl(ends->ring.fd, F_GET_SEALS), F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW);
}

static void test_deinit_twice(void **state)
{
	struct ring ring;

	(void)state;
	assert_int_equal(ring_init(&ring, ENTRIES), 0);
	ring_deinit(&ring);
	assert_int_equal(ring.fd, -1);
	assert_int_equal(ring.doorbell, -1);
	assert_null(ring.shared);
	ring_deinit(&ring);
}

/* ---- entries ---- */

static void test_order(void **state)
{
	struct ends *ends = *state;
	struct kvg_sqe sqe;

	assert_int_equal(ring_take(&ends->ring, &sqe), 0);
	for (uint32_t i = 0; i < 5 * ENTRIES + 3; i += 3) {
		for (uint32_t j = 0; j < 3; j++)
			put(ends, 1000 + i + j);
		for (uint32_t j = 0; j < 3; j++)
			take(ends, 1000 + i + j);
		assert_int_equal(ends->worker->sq_head, i + 3);
		assert_int_equal(ring_take(&ends->ring, &sqe), 0);
		assert_int_equal(ends->ring.outstanding, 3);
		for (uint32_t j = 3; j-- > 0;)
			assert_false(finish(ends, 1000 + i + j));
		assert_int_equal(ends->worker->cq_tail, i + 3);
		for (uint32_t j = 0; j < 3; j++)
			assert_int_equal(completion(ends, i + j)->user_data, 1000 + i + 2 - j);
		assert_int_equal(ends->ring.outstanding, 0);
		__atomic_store_n(&ends->worker->cq_head, i + 3, __ATOMIC_RELEASE);
	}
}

/* What the worker does to an entry after it was taken changes nothing. */
static void test_entry_is_copied(void **state)
{
	struct ends *ends = *state;
	struct kvg_sqe sqe;

	put(ends, 7);
	assert_int_equal(ring_take(&ends->ring, &sqe), 1);
	memset((uint8_t *)ends->worker + ends->worker->sq_offset, 0xff, sizeof(sqe));
	assert_int_equal(sqe.op, KVG_OP_QUERY);
	assert_int_equal(sqe.user_data, 7);
}

static void test_text_slot(void **state)
{
	struct ends *ends = *state;
	struct kvg_cqe cqe = {.user_data = 2, .status = -ENOSPC, .seq = 11, .generation = 12, .value = {1, 2, 3, 4}};
	char longest[2 * KVG_TEXT_SIZE];

	put(ends, 1);
	put(ends, 2);
	put(ends, 3);
	take(ends, 1);
	take(ends, 2);
	take(ends, 3);
	(void)finish(ends, 1);
	(void)ring_complete(&ends->ring, &cqe, "tenant a: full");
	memset(longest, 'x', sizeof(longest));
	longest[sizeof(longest) - 1] = '\0';
	(void)ring_complete(&ends->ring, &cqe, longest);
	assert_int_equal(completion(ends, 0)->text, 0);
	assert_string_equal(text(ends, 0), "");
	assert_int_equal(completion(ends, 1)->text, 1);
	assert_int_equal(completion(ends, 1)->status, -ENOSPC);
	assert_int_equal(completion(ends, 1)->seq, 11);
	assert_int_equal(completion(ends, 1)->generation, 12);
	assert_int_equal(completion(ends, 1)->value[3], 4);
	assert_string_equal(text(ends, 1), "tenant a: full");
	assert_int_equal(strlen(text(ends, 2)), KVG_TEXT_SIZE - 1);
	assert_string_equal(text(ends, 3), "");
}

static void test_no_entry_without_room(void **state)
{
	struct ends *ends = *state;
	struct kvg_sqe sqe;

	for (uint32_t i = 0; i < ENTRIES; i++)
		put(ends, i);
	for (uint32_t i = 0; i < ENTRIES; i++)
		take(ends, i);
	put(ends, ENTRIES);
	assert_int_equal(ring_take(&ends->ring, &sqe), 0); /* all outstanding */
	for (uint32_t i = 0; i < ENTRIES; i++)
		(void)finish(ends, i);
	assert_int_equal(ring_take(&ends->ring, &sqe), 0); /* all completed, none read */
	assert_int_equal(ends->worker->sq_head, ENTRIES);
	__atomic_store_n(&ends->worker->cq_head, 1, __ATOMIC_RELEASE);
	take(ends, ENTRIES);
	put(ends, ENTRIES + 1);
	assert_int_equal(ring_take(&ends->ring, &sqe), 0);
}

/* ---- lies ---- */

static void test_submission_cursor_lies(void **state)
{
	struct ends *ends = *state;
	struct kvg_sqe sqe = {.user_data = 4711};

	put(ends, 1);
	take(ends, 1);
	ends->worker->sq_tail = 1 + ENTRIES + 1; /* more than the ring holds */
	assert_int_equal(ring_take(&ends->ring, &sqe), -EPROTO);
	ends->worker->sq_tail = 0; /* backwards */
	assert_int_equal(ring_take(&ends->ring, &sqe), -EPROTO);
	assert_int_equal(sqe.user_data, 4711);
	ends->worker->sq_tail = 1 + ENTRIES; /* just full */
	assert_int_equal(ring_take(&ends->ring, &sqe), 1);
}

static void fill_completions(struct ends *ends)
{
	for (uint32_t i = 0; i < ENTRIES; i++)
		put(ends, i);
	for (uint32_t i = 0; i < ENTRIES; i++) {
		take(ends, i);
		(void)finish(ends, i);
	}
	put(ends, ENTRIES);
}

static void test_completion_cursor_lies(void **state)
{
	struct ends *ends = *state;
	struct kvg_sqe sqe;

	fill_completions(ends);
	ends->worker->cq_head = ENTRIES + 1; /* read more than there was */
	assert_int_equal(ring_take(&ends->ring, &sqe), -EPROTO);
	ends->worker->cq_head = UINT32_MAX; /* backwards */
	assert_int_equal(ring_take(&ends->ring, &sqe), -EPROTO);
	assert_int_equal(ends->ring.outstanding, 0);
	assert_int_equal(ends->worker->sq_head, ENTRIES);
	ends->worker->cq_head = ENTRIES;
	take(ends, ENTRIES);
}

/* The daemon's own cursors are private: what the worker writes over their published copies is not read back. */
static void test_daemons_cursors_are_private(void **state)
{
	struct ends *ends = *state;

	put(ends, 1);
	ends->worker->sq_head = 77;
	ends->worker->cq_tail = 99;
	ends->worker->sq_entries = ends->worker->cq_entries = 1u << 30;
	ends->worker->events = 55;
	take(ends, 1);
	assert_int_equal(ends->worker->sq_head, 1);
	(void)finish(ends, 1);
	assert_int_equal(ends->worker->cq_tail, 1);
	assert_int_equal(completion(ends, 0)->user_data, 1);
	assert_int_equal(completion(ends, 0)->events, 0);
	assert_int_equal(ring_count_event(&ends->ring), 1);
	assert_int_equal(ends->worker->events, 1);
}

/* ---- handshakes ---- */

static void test_need_wakeup(void **state)
{
	struct ends *ends = *state;

	assert_false(ring_set_wakeup(&ends->ring, false));
	assert_int_equal(ends->worker->need_wakeup, 0);
	assert_false(ring_set_wakeup(&ends->ring, true));
	assert_int_equal(ends->worker->need_wakeup, 1);
	put(ends, 1);
	assert_true(ring_set_wakeup(&ends->ring, true));
	take(ends, 1);
	assert_false(ring_set_wakeup(&ends->ring, true));
}

/* Entries that cannot be taken are no work, or the daemon would never sleep; a lie is, so that it is found. */
static void test_need_wakeup_without_room(void **state)
{
	struct ends *ends = *state;

	fill_completions(ends);
	assert_false(ring_set_wakeup(&ends->ring, true));
	ends->worker->cq_head = ENTRIES + 1;
	assert_true(ring_set_wakeup(&ends->ring, true));
	ends->worker->cq_head = 1;
	assert_true(ring_set_wakeup(&ends->ring, true));
}

static void test_sleeping(void **state)
{
	struct ends *ends = *state;

	for (uint32_t i = 0; i < 4; i++)
		put(ends, i);
	for (uint32_t i = 0; i < 4; i++)
		take(ends, i);
	assert_false(finish(ends, 0));
	ends->worker->sleeping = 1;
	assert_true(finish(ends, 1));
	assert_int_equal(ends->worker->sleeping, 0);
	assert_false(finish(ends, 2));
	ends->worker->sleeping = 1;
	assert_true(finish(ends, 3));
}

static void test_events(void **state)
{
	struct ends *ends = *state;

	for (uint32_t i = 0; i < 3; i++)
		put(ends, i);
	for (uint32_t i = 0; i < 3; i++)
		take(ends, i);
	(void)finish(ends, 0);
	assert_int_equal(ring_count_event(&ends->ring), 1);
	(void)finish(ends, 1);
	assert_int_equal(ring_count_event(&ends->ring), 2);
	assert_int_equal(ring_count_event(&ends->ring), 3);
	(void)finish(ends, 2);
	assert_int_equal(ends->worker->events, 3);
	assert_int_equal(completion(ends, 0)->events, 0);
	assert_int_equal(completion(ends, 1)->events, 1);
	assert_int_equal(completion(ends, 2)->events, 3);
}

#define WITH_RING(test) cmocka_unit_test_setup_teardown(test, ends_setup, ends_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_geometry),
		WITH_RING(test_size_is_sealed),
		cmocka_unit_test(test_deinit_twice),
		WITH_RING(test_order),
		WITH_RING(test_entry_is_copied),
		WITH_RING(test_text_slot),
		WITH_RING(test_no_entry_without_room),
		WITH_RING(test_submission_cursor_lies),
		WITH_RING(test_completion_cursor_lies),
		WITH_RING(test_daemons_cursors_are_private),
		WITH_RING(test_need_wakeup),
		WITH_RING(test_need_wakeup_without_room),
		WITH_RING(test_sleeping),
		WITH_RING(test_events),
	};

	return runner_run("daemon/session/ring", tests, sizeof(tests) / sizeof(tests[0]));
}
