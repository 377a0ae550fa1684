#include "tests/support/runner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client/ring.h"
#include "proto/frame.h"

enum { ENTRIES = 4, SQ = 512, CQ = SQ + ENTRIES * 128, TEXT = CQ + ENTRIES * 64, SIZE = TEXT + ENTRIES * 256 };

/* A ring memfd, the daemon's mapping of it and, after setup, the worker's. */
struct fixture {
	int memfd;
	struct kvg_ring *shared;
	struct ring ring;
};

static int setup(void **state)
{
	struct fixture *fixture = calloc(1, sizeof(*fixture));

	assert_non_null(fixture);
	fixture->memfd = kvg_memfd_new("ring", SIZE);
	assert_true(fixture->memfd >= 0);
	fixture->shared = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fixture->memfd, 0);
	assert_ptr_not_equal(fixture->shared, MAP_FAILED);
	*fixture->shared = (struct kvg_ring){.magic = KVG_RING_MAGIC,
		.version = KVG_ABI_VERSION,
		.sq_entries = ENTRIES,
		.cq_entries = ENTRIES,
		.sq_offset = SQ,
		.cq_offset = CQ,
		.text_offset = TEXT,
		.size = SIZE};
	fixture->ring.doorbell = -1;
	*state = fixture;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *fixture = *state;

	ring_deinit(&fixture->ring);
	assert_int_equal(munmap(fixture->shared, SIZE), 0);
	assert_int_equal(close(fixture->memfd), 0);
	free(fixture);
	return 0;
}

static void map(struct fixture *fixture)
{
	const char *what;
	int doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	assert_true(doorbell >= 0);
	assert_int_equal(ring_map(fixture->memfd, doorbell, &fixture->ring, &what), 0);
}

static void refuses_nonsense_headers(void **state)
{
	struct fixture *fixture = *state;
	struct kvg_ring good = *fixture->shared;
	const struct {
		size_t offset;
		uint32_t value;
		const char *what;
	} lies[] = {
		{offsetof(struct kvg_ring, magic), 1, "magic"},
		{offsetof(struct kvg_ring, version), KVG_ABI_VERSION + 1, "version"},
		{offsetof(struct kvg_ring, sq_entries), 3, "entries"},
		{offsetof(struct kvg_ring, sq_entries), 0, "entries"},
		{offsetof(struct kvg_ring, sq_entries), 1, "entries"},
		{offsetof(struct kvg_ring, cq_entries), 1u << 31, "entries"},
		{offsetof(struct kvg_ring, sq_entries), 8192, "offsets"},
		{offsetof(struct kvg_ring, size), SIZE + 1, "size"},
		{offsetof(struct kvg_ring, size), SIZE - 1, "offsets"},
		{offsetof(struct kvg_ring, sq_offset), 0, "offsets"},
		{offsetof(struct kvg_ring, cq_offset), SIZE - 8, "offsets"},
		{offsetof(struct kvg_ring, cq_offset), CQ + 4, "offsets"},
		{offsetof(struct kvg_ring, text_offset), UINT32_MAX - 7, "offsets"},
	};
	struct ring ring = {.doorbell = -1};
	const char *what;
	int small = kvg_memfd_from("small", fixture->shared, sizeof(good) - 1);

	for (size_t i = 0; i < sizeof(lies) / sizeof(*lies); i++) {
		*fixture->shared = good;
		memcpy((uint8_t *)fixture->shared + lies[i].offset, &lies[i].value, sizeof(uint32_t));
		assert_int_equal(ring_map(fixture->memfd, -1, &ring, &what), -EPROTO);
		assert_string_equal(what, lies[i].what);
		assert_null(ring.shared);
	}
	assert_int_equal(ring_map(small, -1, &ring, &what), -EPROTO);
	assert_string_equal(what, "size");
	assert_int_equal(close(small), 0);
	*fixture->shared = good;
	map(fixture);
	assert_int_equal(fixture->ring.capacity, ENTRIES);
}

static void publishes_entries_and_rings(void **state)
{
	struct fixture *fixture = *state;
	const struct kvg_sqe *sq = (const struct kvg_sqe *)(const void *)((uint8_t *)fixture->shared + SQ);
	uint64_t count;

	fixture->shared->sq_tail = fixture->shared->cq_head = fixture->shared->cq_tail = UINT32_MAX - 1;
	map(fixture);
	for (uint32_t i = 0; i < ENTRIES; i++) {
		const struct kvg_sqe sqe = {.op = KVG_OP_NOP, .user_data = 100 + i};

		fixture->shared->need_wakeup = i >= 2;
		ring_submit(&fixture->ring, &sqe);
		assert_int_equal(fixture->shared->sq_tail, (uint32_t)(UINT32_MAX + i));
		assert_int_equal(sq[(UINT32_MAX - 1 + i) % ENTRIES].user_data, 100 + i);
		assert_int_equal(fixture->ring.outstanding, i + 1);
	}
	assert_int_equal(read(fixture->ring.doorbell, &count, sizeof(count)), sizeof(count));
	assert_int_equal(count, 2);
}

static void takes_completions_in_order(void **state)
{
	struct fixture *fixture = *state;
	struct kvg_cqe *cq = (struct kvg_cqe *)(void *)((uint8_t *)fixture->shared + CQ);
	char *texts = (char *)fixture->shared + TEXT, text[KVG_TEXT_SIZE];
	const struct kvg_sqe sqe = {.op = KVG_OP_NOP};
	const struct kvg_cqe *cqe = NULL;

	map(fixture);
	assert_int_equal(ring_peek(&fixture->ring, &cqe), 0);
	for (uint32_t i = 0; i < 3; i++)
		ring_submit(&fixture->ring, &sqe);
	cq[0] = (struct kvg_cqe){.user_data = 5};
	cq[1] = (struct kvg_cqe){.user_data = 6, .text = 1};
	/* A text that lacks its end is cut. */
	memset(texts + KVG_TEXT_SIZE, 'x', KVG_TEXT_SIZE);
	memset(texts, 'y', KVG_TEXT_SIZE);
	fixture->shared->cq_tail = 2;
	assert_int_equal(ring_peek(&fixture->ring, &cqe), 1);
	assert_int_equal(cqe->user_data, 5);
	ring_text(&fixture->ring, cqe, text);
	assert_string_equal(text, "");
	ring_advance(&fixture->ring);
	assert_int_equal(fixture->shared->cq_head, 1);
	assert_int_equal(ring_peek(&fixture->ring, &cqe), 1);
	assert_int_equal(cqe->user_data, 6);
	ring_text(&fixture->ring, cqe, text);
	assert_int_equal(strlen(text), KVG_TEXT_SIZE - 1);
	assert_int_equal(text[0], 'x');
	ring_advance(&fixture->ring);
	assert_int_equal(ring_peek(&fixture->ring, &cqe), 0);
	assert_int_equal(fixture->ring.outstanding, 1);
	/* More completions than entries in flight, and a tail that runs back. */
	fixture->shared->cq_tail = 4;
	assert_int_equal(ring_peek(&fixture->ring, &cqe), -EPROTO);
	fixture->shared->cq_tail = 1;
	assert_int_equal(ring_peek(&fixture->ring, &cqe), -EPROTO);
}

static void shares_events_and_sleep(void **state)
{
	struct fixture *fixture = *state;

	map(fixture);
	fixture->shared->events = 9;
	assert_int_equal(ring_events(&fixture->ring), 9);
	ring_set_sleeping(&fixture->ring, true);
	assert_int_equal(fixture->shared->sleeping, 1);
	ring_set_sleeping(&fixture->ring, false);
	assert_int_equal(fixture->shared->sleeping, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(refuses_nonsense_headers, setup, teardown),
		cmocka_unit_test_setup_teardown(publishes_entries_and_rings, setup, teardown),
		cmocka_unit_test_setup_teardown(takes_completions_in_order, setup, teardown),
		cmocka_unit_test_setup_teardown(shares_events_and_sleep, setup, teardown),
	};

	return runner_run("ring", tests, sizeof(tests) / sizeof(*tests));
}
