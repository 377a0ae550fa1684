#include "daemon/sequence/gates.h"
#include "daemon/memory/kind.h"

#include <errno.h>
#include <inttypes.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/frame.h"
#include "tests/support/runner.h"

#define PILOT "pilot-lm/gate.safetensors"

static struct kvg_layout pilot_layout(void)
{
	struct kvg_layout layout = {.model = "pilot", .hidden_dim = 256, .group_count = 1};

	layout.groups[0] = (struct kvg_group){.layers = 6, .head_count = 4, .query_heads = 2};
	return layout;
}

static uint8_t *read_pilot(size_t *ret_size)
{
	int fd = open(PILOT, O_RDONLY | O_CLOEXEC);
	struct stat st;
	uint8_t *data;

	assert_true(fd >= 0);
	assert_int_equal(fstat(fd, &st), 0);
	data = malloc((size_t)st.st_size);
	assert_non_null(data);
	assert_int_equal(read(fd, data, (size_t)st.st_size), st.st_size);
	assert_int_equal(close(fd), 0);
	*ret_size = (size_t)st.st_size;
	return data;
}

/* Only the host kind's lack of a device is looked at. */
static struct kvg_cuda *no_device(struct kind *kind)
{
	(void)kind;
	return NULL;
}

static const struct kind_ops host_ops = {.name = "host", .device = no_device};
static struct kind host = {.ops = &host_ops};

/* Loads the pilot's gate, cut to `size` bytes when that is less. */
static int load(const struct kvg_layout *layout, size_t size, struct gate_set **ret, char text[KVG_TEXT_SIZE])
{
	size_t whole;
	uint8_t *data = read_pilot(&whole);
	int fd = kvg_memfd_from("gate", data, size < whole ? size : whole), r;

	assert_true(fd >= 0);
	text[0] = '\0';
	r = gate_set_load(fd, layout, &host, ret, text, KVG_TEXT_SIZE);
	assert_int_equal(close(fd), 0);
	free(data);
	return r;
}

static void test_pilot_gate(void **state)
{
	struct kvg_layout layout = pilot_layout();
	struct gate_set *set = NULL;
	char text[KVG_TEXT_SIZE];

	(void)state;
	assert_int_equal(load(&layout, SIZE_MAX, &set, text), 0);
	assert_int_equal(set->layers, 6);
	assert_int_equal(set->folded, 6); /* its sinks are equal */
	for (uint32_t i = 0; i < 6; i++)
		assert_true(kvg_gate_scratch(set->gates[i], 1) > 0);
	assert_null(gate_set_free(set));
	assert_null(gate_set_free(NULL));
}

static void expect_refusal(const struct kvg_layout *layout, const char *expected)
{
	struct gate_set *set = NULL;
	char text[KVG_TEXT_SIZE];

	assert_int_equal(load(layout, SIZE_MAX, &set, text), -EINVAL);
	assert_string_equal(text, expected);
	assert_null(set);
}

static void test_another_geometry(void **state)
{
	struct kvg_layout layout = pilot_layout();

	(void)state;
	layout.groups[0].layers = 7;
	expect_refusal(&layout, "gate: 6 layers, the layout has 7");
	layout.groups[0].layers = 5;
	expect_refusal(&layout, "gate: 6 layers, the layout has 5");
	layout = pilot_layout();
	layout.groups[0].head_count = 8;
	expect_refusal(&layout, "gate: layer 0 has 4 KV heads, group 2, hidden 256; the layout has 8, 2, 256");
	layout = pilot_layout();
	layout.groups[0].query_heads = 1;
	expect_refusal(&layout, "gate: layer 0 has 4 KV heads, group 2, hidden 256; the layout has 4, 1, 256");
	layout = pilot_layout();
	layout.hidden_dim = 128;
	expect_refusal(&layout, "gate: layer 0 has 4 KV heads, group 2, hidden 256; the layout has 4, 2, 128");
}

/* A file that may still change is not looked at. */
static void test_unsealed(void **state)
{
	struct kvg_layout layout = pilot_layout();
	struct gate_set *set = NULL;
	char text[KVG_TEXT_SIZE];
	int fds[3] = {open(PILOT, O_RDONLY | O_CLOEXEC), kvg_memfd_new("gate", 4096), open("/dev/null", O_RDONLY)};

	(void)state;
	for (unsigned i = 0; i < 3; i++) {
		assert_true(fds[i] >= 0);
		assert_int_equal(gate_set_load(fds[i], &layout, &host, &set, text, sizeof(text)), -EINVAL);
		assert_string_equal(
			text, "gate: the descriptor is not a memfd sealed against writing, growing and shrinking");
		assert_int_equal(close(fds[i]), 0);
	}
	assert_null(set);
}

static void test_truncated(void **state)
{
	static const size_t sizes[] = {1, 7, 8, 9, 100, 4000, 20000, 100000};
	struct kvg_layout layout = pilot_layout();
	struct gate_set *set = NULL;
	char text[KVG_TEXT_SIZE];

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		assert_true(load(&layout, sizes[i], &set, text) < 0);
		assert_true(text[0]);
		assert_null(set);
	}
}

static int tensor(char *text, size_t size, const char *name, const char *shape, uint64_t *at, uint64_t bytes)
{
	int n = snprintf(text, size,
		"%s\"layers.0.%s\":{\"dtype\":\"BF16\",\"shape\":[%s],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}",
		*at ? "," : "", name, shape, *at, *at + bytes);

	*at += bytes;
	return n;
}

/* A file that is nothing but a header and a hole, sealed: 64 KV heads of width 256 and group 8, hidden 16384. */
static int huge_gate(void)
{
	char text[2048] = "{";
	uint64_t at = 0, length;
	size_t n = 1;
	int fd = memfd_create("gate", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	n += (size_t)tensor(text + n, sizeof(text) - n, "k_base", "64,1,1,256", &at, 64 * 256 * 2);
	n += (size_t)tensor(text + n, sizeof(text) - n, "b", "64,1,8", &at, 64 * 8 * 2);
	n += (size_t)tensor(text + n, sizeof(text) - n, "k_proj.weight", "16384,16384", &at, UINT64_C(2) << 28);
	n += (size_t)tensor(text + n, sizeof(text) - n, "q_proj.weight", "131072,16384", &at, UINT64_C(2) << 31);
	n += (size_t)snprintf(text + n, sizeof(text) - n, "}");
	length = n;
	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)(8 + length + at)), 0);
	assert_int_equal(pwrite(fd, &length, 8, 0), 8);
	assert_int_equal(pwrite(fd, text, length, 8), (ssize_t)length);
	assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE), 0);
	return fd;
}

/* Nothing of it is read: the shapes already say too much. */
static void test_too_large(void **state)
{
	struct kvg_layout layout = {.model = "m", .hidden_dim = 16384, .group_count = 1};
	struct gate_set *set = NULL;
	char text[KVG_TEXT_SIZE] = "";
	int fd = huge_gate();
	struct stat st;

	(void)state;
	layout.groups[0] = (struct kvg_group){.layers = 1, .head_count = 64, .query_heads = 8};
	assert_int_equal(gate_set_load(fd, &layout, &host, &set, text, sizeof(text)), -EFBIG);
	assert_string_equal(text,
		"gate: layer 0 has width 256 and 1 sinks: 1 such layers have 4831870976 bytes of weights, at most "
		"4294967296");
	assert_null(set);
	assert_int_equal(fstat(fd, &st), 0);
	assert_true(st.st_blocks * 512 < 1 << 20);
	assert_int_equal(close(fd), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_pilot_gate),
		cmocka_unit_test(test_another_geometry),
		cmocka_unit_test(test_unsealed),
		cmocka_unit_test(test_truncated),
		cmocka_unit_test(test_too_large),
	};

	return runner_run("gates", tests, sizeof(tests) / sizeof(tests[0]));
}
