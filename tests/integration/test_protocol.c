/*
 * Bad packets and bad ring entries, by a worker without the library: each gets an error or a
 * goodbye with a reason, the daemon lives, and another worker goes on as if nothing were.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "proto/frame.h"
#include "tests/integration/kv.h"
#include "tests/integration/raw.h"
#include "tests/support/daemon.h"
#include "tests/support/runner.h"

#define CONFIG                                                                                                         \
	"[pool]\ndevice.size = 32M\nextent_size = 256K\n"                                                              \
	"[tenant bad]\nsocket = bad.sock\n[tenant good]\nsocket = good.sock\n"

/* A daemon, a well-behaved worker with an evicted sequence, and a bad one. */
struct stage {
	struct fixture fixture;
	struct kvg_layout layout;
	struct kvg_client *good;
	struct kv kv;
	struct raw raw;
	char path[FIXTURE_PATH];
	uint64_t seq; /* the bad worker's, after stage_sequence() */
	uint32_t generation;
};

static void stage_open(struct stage *s)
{
	struct kvg_policy policy = kv_policy(300, 0.3, 20);
	char path[FIXTURE_PATH];

	fixture_start(&s->fixture, CONFIG);
	kv_small_layout(&s->layout, 4, 2048);
	s->good = kv_connect(fixture_path(&s->fixture, "state/good.sock", path), "good", &s->layout);
	assert_non_null(s->good);
	assert_int_equal(kv_create(&s->kv, s->good, &s->layout, &policy, 4), 0);
	assert_int_equal(kv_feed(&s->kv, 301, 1), 0);
	assert_int_equal(kv_evict(&s->kv, KVG_EVICT_PREFILL), 0);
	(void)fixture_path(&s->fixture, "state/bad.sock", s->path);
	raw_connect(&s->raw, s->path);
}

static void stage_register(struct stage *s)
{
	stage_open(s);
	raw_close(&s->raw);
	raw_open(&s->raw, s->path, &s->layout);
}

/* The good worker works, the bad one's things are gone, the books agree. */
static void stage_close(struct stage *s)
{
	raw_close(&s->raw);
	assert_true(fixture_wait_gone(&s->fixture, 1, UINT64_MAX, FIXTURE_WAIT_MS));
	assert_int_equal(kv_check(&s->kv), 0);
	assert_int_equal(kv_free(&s->kv), 0);
	assert_true(fixture_wait_charged(&s->fixture, 0, FIXTURE_WAIT_MS));
	fixture_audit(&s->fixture);
	s->good = kvg_close(s->good);
	fixture_stop(&s->fixture);
}

/* After a refusal the connection either works on or is gone; a new one works in any case. */
static void reconnect(struct stage *s)
{
	raw_close(&s->raw);
	raw_connect(&s->raw, s->path);
}

/* ---- packets ---- */

static void test_an_oversized_packet(void **state)
{
	static uint8_t junk[KVG_FRAME_MAX + 4096];
	struct stage s;

	(void)state;
	stage_open(&s);
	memset(junk, 0x12, sizeof(junk));
	raw_send(&s.raw, junk, sizeof(junk), NULL, 0);
	assert_true(raw_refused(&s.raw) < 0);
	stage_close(&s);
}

static void test_a_message_in_a_memfd_that_lies(void **state)
{
	Kvg__Oversize oversize = KVG__OVERSIZE__INIT;
	uint8_t packet[64];
	struct stage s;
	int fd;

	(void)state;
	stage_open(&s);
	oversize.size = 1u << 30;
	fd = kvg_memfd_new("lie", 4096);
	assert_true(fd >= 0);
	raw_send(&s.raw, packet, kvg__oversize__pack(&oversize, packet), &fd, 1);
	(void)close(fd);
	assert_true(raw_refused(&s.raw) < 0);
	stage_close(&s);
}

static void test_truncated_messages(void **state)
{
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	struct raw_layout storage;
	uint8_t packet[1024];
	struct stage s;
	size_t size;

	(void)state;
	stage_open(&s);
	raw_make_register(&storage, &s.layout, 1u << 20);
	request.id = 1;
	request.body_case = KVG__WORKER_REQUEST__BODY_REGISTER_LAYOUT;
	request.register_layout = &storage.body;
	size = kvg__worker_request__pack(&request, packet);
	for (size_t cut = 1; cut < size; cut += 7) {
		raw_send(&s.raw, packet, cut, NULL, 0);
		assert_true(raw_refused(&s.raw) < 0);
		reconnect(&s);
	}
	stage_close(&s);
}

static void test_an_unknown_message(void **state)
{
	static const uint8_t unknown[] = {0x08, 0x01, 0xa2, 0x06, 0x01, 'x'}; /* id 1, field 100 */
	static const uint8_t nothing[] = {0x08, 0x01};
	struct stage s;

	(void)state;
	stage_open(&s);
	raw_send(&s.raw, unknown, sizeof(unknown), NULL, 0);
	assert_true(raw_refused(&s.raw) < 0);
	reconnect(&s);
	raw_hello(&s.raw);
	raw_send(&s.raw, nothing, sizeof(nothing), NULL, 0);
	assert_true(raw_refused(&s.raw) < 0);
	stage_close(&s);
}

static void send_hello_with(struct stage *s, unsigned fd_count)
{
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	Kvg__Hello hello = KVG__HELLO__INIT;
	int fds[200];

	hello.abi_min = hello.abi_max = KVG_ABI_VERSION;
	hello.name = (char *)(uintptr_t) "fds";
	request.body_case = KVG__WORKER_REQUEST__BODY_HELLO;
	request.hello = &hello;
	for (unsigned i = 0; i < fd_count; i++)
		fds[i] = s->raw.socket;
	raw_request(&s->raw, &request, fds, fd_count);
}

static void test_too_many_descriptors(void **state)
{
	struct stage s;

	(void)state;
	stage_open(&s);
	send_hello_with(&s, 200);
	assert_true(raw_refused(&s.raw) < 0);
	reconnect(&s);
	send_hello_with(&s, KVG_FRAME_FDS + 1);
	assert_true(raw_refused(&s.raw) < 0);
	stage_close(&s);
}

static void test_a_descriptor_where_none_belongs(void **state)
{
	struct stage s;

	(void)state;
	stage_open(&s);
	send_hello_with(&s, 1);
	assert_true(raw_refused(&s.raw) < 0);
	stage_close(&s);
}

static void test_hello_twice(void **state)
{
	struct stage s;

	(void)state;
	stage_open(&s);
	raw_hello(&s.raw);
	send_hello_with(&s, 0);
	assert_true(raw_refused(&s.raw) < 0);
	stage_close(&s);
}

static void test_hello_of_another_version(void **state)
{
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	Kvg__Hello hello = KVG__HELLO__INIT;
	struct stage s;

	(void)state;
	stage_open(&s);
	hello.abi_min = KVG_ABI_VERSION + 1;
	hello.abi_max = KVG_ABI_VERSION + 9;
	hello.name = (char *)(uintptr_t) "future";
	request.body_case = KVG__WORKER_REQUEST__BODY_HELLO;
	request.hello = &hello;
	raw_request(&s.raw, &request, NULL, 0);
	assert_true(raw_refused(&s.raw) < 0);
	reconnect(&s);
	hello.abi_min = 0;
	hello.abi_max = 0;
	raw_request(&s.raw, &request, NULL, 0);
	assert_true(raw_refused(&s.raw) < 0);
	stage_close(&s);
}

static void test_a_ring_of_senseless_size(void **state)
{
	static const uint32_t sizes[] = {0, 3, 1u << 31, UINT32_MAX};
	struct stage s;

	(void)state;
	stage_open(&s);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
		Kvg__Hello hello = KVG__HELLO__INIT;

		hello.abi_min = hello.abi_max = KVG_ABI_VERSION;
		hello.name = (char *)(uintptr_t) "ring";
		hello.has_sq_entries = 1;
		hello.sq_entries = sizes[i];
		request.body_case = KVG__WORKER_REQUEST__BODY_HELLO;
		request.hello = &hello;
		raw_request(&s.raw, &request, NULL, 0);
		assert_true(raw_refused(&s.raw) < 0);
		reconnect(&s);
	}
	stage_close(&s);
}

/* ---- registration ---- */

static void test_register_before_hello(void **state)
{
	struct raw_layout storage;
	struct stage s;

	(void)state;
	stage_open(&s);
	raw_make_register(&storage, &s.layout, 1u << 20);
	raw_register(&s.raw, &storage);
	assert_true(raw_refused(&s.raw) < 0);
	stage_close(&s);
}

static void test_register_twice(void **state)
{
	struct raw_layout storage;
	struct stage s;

	(void)state;
	stage_register(&s);
	raw_make_register(&storage, &s.layout, 1u << 20);
	raw_register(&s.raw, &storage);
	assert_true(raw_refused(&s.raw) < 0);
	stage_close(&s);
}

/* A layout that is good but for what `spoil` does to it must be refused. */
static int refuse_layout(
	struct stage *s, void (*spoil)(struct kvg_layout *layout, struct kvg_group *group), uint64_t staging_bytes)
{
	struct kvg_layout layout = s->layout;
	struct raw_layout storage;
	int r;

	spoil(&layout, &layout.groups[0]);
	reconnect(s);
	raw_hello(&s->raw);
	raw_make_register(&storage, &layout, staging_bytes);
	raw_register(&s->raw, &storage);
	r = raw_refused(&s->raw);
	assert_true(r < 0);
	return r;
}

static void no_layers(struct kvg_layout *l, struct kvg_group *g)
{
	(void)l;
	g->layers = 0;
}

static void huge_heads(struct kvg_layout *l, struct kvg_group *g)
{
	(void)l;
	g->head_count = g->head_total = 1u << 31;
}

static void heads_beyond_the_total(struct kvg_layout *l, struct kvg_group *g)
{
	(void)l;
	g->head_begin = UINT32_MAX - 1;
}

static void huge_dim(struct kvg_layout *l, struct kvg_group *g)
{
	(void)l;
	g->k_dim = UINT32_MAX;
}

static void no_dim(struct kvg_layout *l, struct kvg_group *g)
{
	(void)l;
	g->k_dim = 0;
}

static void odd_dtype(struct kvg_layout *l, struct kvg_group *g)
{
	(void)l;
	g->v_dtype = 77;
}

static void odd_block(struct kvg_layout *l, struct kvg_group *g)
{
	(void)l;
	g->block_tokens = 15;
}

/* Every factor is small and their product is beyond 64 bits. */
static void overflowing(struct kvg_layout *l, struct kvg_group *g)
{
	g->layers = 1u << 16;
	g->head_count = g->head_total = 1u << 16;
	l->max_sequences = 1u << 16;
	l->max_tokens = 1u << 30;
}

static void huge_sequences(struct kvg_layout *l, struct kvg_group *g)
{
	(void)g;
	l->max_sequences = UINT32_MAX;
}

static void no_sequences(struct kvg_layout *l, struct kvg_group *g)
{
	(void)g;
	l->max_sequences = 0;
}

static void huge_tokens(struct kvg_layout *l, struct kvg_group *g)
{
	(void)g;
	l->max_tokens = UINT32_MAX;
}

static void no_groups(struct kvg_layout *l, struct kvg_group *g)
{
	(void)g;
	l->group_count = 0;
}

static void good_layout(struct kvg_layout *l, struct kvg_group *g)
{
	(void)l, (void)g;
}

static void test_absurd_geometry_is_refused(void **state)
{
	static void (*const spoils[])(struct kvg_layout *, struct kvg_group *) = {no_layers, huge_heads,
		heads_beyond_the_total, huge_dim, no_dim, odd_dtype, odd_block, overflowing, huge_sequences,
		no_sequences, huge_tokens, no_groups};
	struct stage s;

	(void)state;
	stage_open(&s);
	for (size_t i = 0; i < sizeof(spoils) / sizeof(*spoils); i++)
		(void)refuse_layout(&s, spoils[i], 1u << 20);
	(void)refuse_layout(&s, good_layout, UINT64_MAX);
	(void)refuse_layout(&s, good_layout, UINT64_MAX / 2);
	stage_close(&s);
}

static void window_kind(struct kvg_layout *l, struct kvg_group *g)
{
	(void)l;
	g->kind = KVG_GROUP_WINDOW;
	g->window = 1024;
}

static void latent_kind(struct kvg_layout *l, struct kvg_group *g)
{
	(void)l;
	g->kind = KVG_GROUP_MLA;
	g->v_dim = 0;
}

static void test_kinds_that_are_not_built_are_refused_by_name(void **state)
{
	struct stage s;

	(void)state;
	stage_open(&s);
	assert_int_equal(refuse_layout(&s, window_kind, 1u << 20), -EOPNOTSUPP);
	assert_non_null(strcasestr(s.raw.text, "window"));
	assert_int_equal(refuse_layout(&s, latent_kind, 1u << 20), -EOPNOTSUPP);
	assert_non_null(strcasestr(s.raw.text, "mla"));
	stage_close(&s);
}

/* ---- gates ---- */

static void refuse_gate(struct stage *s, int fd)
{
	Kvg__WorkerRequest request = KVG__WORKER_REQUEST__INIT;
	Kvg__LoadGate load = KVG__LOAD_GATE__INIT;

	reconnect(s);
	raw_close(&s->raw);
	raw_open(&s->raw, s->path, &s->layout);
	request.body_case = KVG__WORKER_REQUEST__BODY_LOAD_GATE;
	request.load_gate = &load;
	raw_request(&s->raw, &request, &fd, fd >= 0 ? 1 : 0);
	assert_true(raw_refused(&s->raw) < 0);
	if (fd >= 0)
		(void)close(fd);
}

static size_t read_gate(uint8_t *data, size_t size)
{
	FILE *file = fopen(KVG_DATA "/pilot-lm/gate.safetensors", "re");
	size_t n;

	assert_non_null(file);
	n = fread(data, 1, size, file);
	assert_in_range(n, 1, size - 1);
	(void)fclose(file);
	return n;
}

static void test_bad_gates_are_refused(void **state)
{
	static uint8_t gate[2u << 20];
	size_t size = read_gate(gate, sizeof(gate));
	struct stage s;
	int unsealed;

	(void)state;
	stage_open(&s);
	refuse_gate(&s, -1);
	refuse_gate(&s, kvg_memfd_from("garbage", "this is no gate file at all", 27));
	refuse_gate(&s, kvg_memfd_from("truncated", gate, size / 2));
	refuse_gate(&s, kvg_memfd_from("geometry", gate, size)); /* of six layers, and the layout has four */
	refuse_gate(&s, open("/dev/zero", O_RDONLY | O_CLOEXEC));
	unsealed = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	assert_int_equal(write(unsealed, gate, size), size);
	refuse_gate(&s, unsealed);
	stage_close(&s);
}

static void test_the_pilot_gate_is_taken(void **state)
{
	struct stage s;

	(void)state;
	stage_open(&s);
	raw_close(&s.raw);
	struct kvg_layout pilot;
	kv_pilot_layout(&pilot, KVG_BF16, 2, 2048);
	struct kvg_client *client = kv_connect(s.path, "gate", &pilot);
	assert_non_null(client);
	assert_int_equal(kvg_load_gate(client, KVG_DATA "/pilot-lm/gate.safetensors"), 0);
	(void)kvg_close(client);
	stage_close(&s);
}

/* ---- ring entries ---- */

/* Gives the bad worker a sequence with 200 tokens reserved and 100 committed. */
static void stage_sequence(struct stage *s)
{
	struct kvg_sqe create = {.op = KVG_OP_CREATE, .user_data = 1, .create = kv_policy(300, 0.3, 20)};
	struct kvg_cqe cqe;

	stage_register(s);
	raw_submit_done(&s->raw, &create, &cqe);
	s->seq = cqe.seq;
	s->generation = cqe.generation;
	struct kvg_sqe reserve = {.op = KVG_OP_RESERVE, .user_data = 2, .seq = s->seq, .reserve.tokens = 200};
	raw_submit_done(&s->raw, &reserve, &cqe);
	assert_true(cqe.value[0] >= 200);
	struct kvg_sqe commit = {
		.op = KVG_OP_COMMIT, .user_data = 3, .seq = s->seq, .generation = s->generation, .commit.pos = 100};
	raw_submit_done(&s->raw, &commit, &cqe);
	s->generation = cqe.generation;
}

/* Refused with a completion or a goodbye; after a goodbye there is a new worker with a new sequence. */
static void refuse_entry(struct stage *s, struct kvg_sqe sqe)
{
	sqe.user_data = 99;
	assert_int_not_equal(raw_submit_refused(&s->raw, &sqe), -EPIPE);
}

static void test_entries_with_wild_operations_and_sequences(void **state)
{
	static const uint64_t wild[] = {0, UINT64_MAX, 1ull << 32, (1ull << 32) + 4, 0xffffffff};
	struct stage s;

	(void)state;
	stage_sequence(&s);
	refuse_entry(&s, (struct kvg_sqe){.op = 77, .seq = s.seq});
	refuse_entry(&s, (struct kvg_sqe){.op = 255});
	refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = s.seq, .layout = 9, .reserve.tokens = 10});
	for (size_t i = 0; i < sizeof(wild) / sizeof(*wild); i++) {
		if (wild[i] == s.seq)
			continue;
		refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = wild[i], .reserve.tokens = 10});
		refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_COMMIT, .seq = wild[i], .commit.pos = 1});
		refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_EVICT, .seq = wild[i]});
		refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_FREE, .seq = wild[i]});
		refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_QUERY, .seq = wild[i]});
	}
	stage_close(&s);
}

static void test_entries_with_wild_lengths(void **state)
{
	struct stage s;
	uint64_t seq;
	uint32_t g;

	(void)state;
	stage_sequence(&s);
	seq = s.seq;
	g = s.generation;
	refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = seq, .reserve.tokens = UINT32_MAX});
	refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = seq, .reserve.tokens = 2049});
	refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_COMMIT, .seq = seq, .generation = g, .commit.pos = UINT32_MAX});
	refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_COMMIT, .seq = seq, .generation = g, .commit.pos = 1000});
	refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_COMMIT, .seq = seq, .generation = g + 1, .commit.pos = 150});
	refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_TRUNCATE, .seq = seq, .generation = g, .truncate.pos = 2000});
	refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_PROTECT, .seq = seq, .protect = {9, 5}});
	refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_EVICT, .seq = seq, .generation = g, .evict.mode = 9});
	stage_close(&s);
}

static struct kvg_sqe stage_entry(const struct stage *s, uint32_t kind, uint32_t layer, uint32_t count, uint32_t pos,
	uint32_t rows, uint64_t offset)
{
	struct kvg_sqe sqe = {.op = KVG_OP_STAGE, .seq = s->seq, .generation = s->generation};

	sqe.stage.kind = kind;
	sqe.stage.layer_begin = layer;
	sqe.stage.layer_count = count;
	sqe.stage.pos = pos;
	sqe.stage.rows = rows;
	sqe.stage.offset = offset;
	return sqe;
}

static void test_staging_out_of_bounds(void **state)
{
	struct stage s;
	struct kvg_cqe cqe;
	uint64_t rows_size;

	(void)state;
	stage_sequence(&s);
	rows_size = s.raw.staging_size - s.raw.staging_rows;
	struct kvg_sqe good = stage_entry(&s, KVG_STAGE_SCORE, 0, 4, 0, 100, 0);
	raw_submit_done(&s.raw, &good, &cqe);
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_SCORE, 0, 4, 0, 100, rows_size - 16));
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_SCORE, 0, 4, 0, 100, rows_size));
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_SCORE, 0, 4, 0, 100, UINT64_MAX - 64));
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_SCORE, 0, 4, 0, UINT32_MAX, 0));
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_SCORE, 0, 4, UINT32_MAX - 10, 100, 0));
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_SCORE, 0, 4, 2000, 100, 0));
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_SCORE, 4, 1, 0, 100, 0));
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_SCORE, UINT32_MAX, 2, 0, 100, 0));
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_SCORE, 0, UINT32_MAX, 0, 100, 0));
	refuse_entry(&s, stage_entry(&s, 9, 0, 4, 0, 100, 0));
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_PREACT, 0, 4, 0, 100, 0));
	refuse_entry(&s, stage_entry(&s, KVG_STAGE_HIDDEN, 0, 1, 0, 100, 0)); /* no gate */
	stage_close(&s);
}

static void test_scores_that_are_no_numbers(void **state)
{
	struct stage s;
	struct kvg_cqe cqe;
	struct kvg_sqe sqe;
	float *rows;
	void *map;

	(void)state;
	stage_sequence(&s);
	map = mmap(NULL, s.raw.staging_size, PROT_READ | PROT_WRITE, MAP_SHARED, s.raw.staging, 0);
	assert_ptr_not_equal(map, MAP_FAILED);
	rows = (float *)(void *)((uint8_t *)map + s.raw.staging_rows);
	for (int i = 0; i < 4 * 300 * 4; i++) {
		const uint32_t nan = 0x7fc00000u | (uint32_t)i;
		float value = (float)(i % 97) / 97;

		memcpy(&rows[i], i % 3 ? (const void *)&value : (const void *)&nan, sizeof(float));
	}
	sqe = (struct kvg_sqe){.op = KVG_OP_RESERVE, .seq = s.seq, .reserve.tokens = 201};
	raw_submit_done(&s.raw, &sqe, &cqe);
	sqe = (struct kvg_sqe){.op = KVG_OP_COMMIT, .seq = s.seq, .generation = s.generation, .commit.pos = 301};
	raw_submit_done(&s.raw, &sqe, &cqe);
	sqe = stage_entry(&s, KVG_STAGE_SCORE, 0, 4, 0, 300, 0);
	raw_submit(&s.raw, &sqe);
	assert_true(raw_complete(&s.raw, &cqe));
	sqe = stage_entry(&s, KVG_STAGE_SCORE, 0, 4, 300, 1, 0);
	raw_submit(&s.raw, &sqe);
	assert_true(raw_complete(&s.raw, &cqe));
	sqe = (struct kvg_sqe){.op = KVG_OP_EVICT, .seq = s.seq, .generation = s.generation};
	raw_submit(&s.raw, &sqe);
	assert_true(raw_complete(&s.raw, &cqe));
	if (cqe.status == 0)
		assert_in_range(cqe.value[0], 16, 301 * 16 / 2);
	(void)munmap(map, s.raw.staging_size);
	stage_close(&s);
}

static void test_unmapping_what_was_never_dropped(void **state)
{
	struct stage s;

	(void)state;
	stage_sequence(&s);
	refuse_entry(&s, (struct kvg_sqe){.op = KVG_OP_UNMAPPED, .unmapped.event = 1000000});
	stage_close(&s);
}

static void test_a_tail_that_jumps_ahead(void **state)
{
	static const uint32_t jumps[] = {1u << 20, 1u << 31, UINT32_MAX};
	struct stage s;

	(void)state;
	stage_sequence(&s);
	for (size_t i = 0; i < sizeof(jumps) / sizeof(*jumps); i++) {
		raw_publish(&s.raw, s.raw.sq_tail + jumps[i]);
		assert_int_equal(raw_refused(&s.raw), -EPIPE);
		raw_close(&s.raw);
		raw_open(&s.raw, s.path, &s.layout);
	}
	stage_close(&s);
}

/* The daemon looks at this cursor when it needs room for completions: at the latest when the ring is full. */
static void test_a_head_of_completions_that_never_were(void **state)
{
	const struct kvg_sqe nop = {.op = KVG_OP_NOP, .user_data = 7};
	uint32_t entries, done = 0;
	struct kvg_cqe cqe;
	struct stage s;

	(void)state;
	stage_sequence(&s);
	entries = s.raw.ring->cq_entries;
	do {
		__atomic_store_n(&s.raw.ring->cq_head, s.raw.cq_head + 100000, __ATOMIC_SEQ_CST);
		raw_submit(&s.raw, &nop);
	} while (raw_complete(&s.raw, &cqe) && ++done <= entries);
	assert_true(done <= entries);
	assert_true(s.raw.text[0] != '\0');
	stage_close(&s);
}

/* Random bytes in every field of the entry but the operation: nothing may break, whatever each is answered. */
static void test_random_entries(void **state)
{
	uint64_t random = 20240607, submitted = 0;
	struct stage s;

	(void)state;
	stage_sequence(&s);
	for (; submitted < 3000; submitted++) {
		uint64_t words[sizeof(struct kvg_sqe) / 8];
		struct kvg_sqe sqe;
		struct kvg_cqe cqe;

		for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++)
			words[i] = kv_random(&random) >> (kv_random(&random) % 64);
		memcpy(&sqe, words, sizeof(sqe));
		sqe.op = (uint8_t)(submitted % 11);
		sqe.layout = submitted % 5 ? 0 : sqe.layout;
		if (submitted % 3)
			sqe.seq = s.seq;
		if (submitted % 4)
			sqe.generation = s.generation;
		raw_submit(&s.raw, &sqe);
		if (raw_complete(&s.raw, &cqe)) {
			assert_int_equal(cqe.user_data, sqe.user_data);
			s.generation = cqe.seq == s.seq && cqe.generation ? cqe.generation : s.generation;
			continue;
		}
		raw_close(&s.raw);
		raw_open(&s.raw, s.path, &s.layout);
	}
	stage_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_an_oversized_packet),
		cmocka_unit_test(test_a_message_in_a_memfd_that_lies),
		cmocka_unit_test(test_truncated_messages),
		cmocka_unit_test(test_an_unknown_message),
		cmocka_unit_test(test_too_many_descriptors),
		cmocka_unit_test(test_a_descriptor_where_none_belongs),
		cmocka_unit_test(test_hello_twice),
		cmocka_unit_test(test_hello_of_another_version),
		cmocka_unit_test(test_a_ring_of_senseless_size),
		cmocka_unit_test(test_register_before_hello),
		cmocka_unit_test(test_register_twice),
		cmocka_unit_test(test_absurd_geometry_is_refused),
		cmocka_unit_test(test_kinds_that_are_not_built_are_refused_by_name),
		cmocka_unit_test(test_bad_gates_are_refused),
		cmocka_unit_test(test_the_pilot_gate_is_taken),
		cmocka_unit_test(test_entries_with_wild_operations_and_sequences),
		cmocka_unit_test(test_entries_with_wild_lengths),
		cmocka_unit_test(test_staging_out_of_bounds),
		cmocka_unit_test(test_scores_that_are_no_numbers),
		cmocka_unit_test(test_unmapping_what_was_never_dropped),
		cmocka_unit_test(test_a_tail_that_jumps_ahead),
		cmocka_unit_test(test_a_head_of_completions_that_never_were),
		cmocka_unit_test(test_random_entries),
	};

	return runner_run("protocol", tests, sizeof(tests) / sizeof(*tests));
}
