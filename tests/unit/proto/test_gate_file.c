#include "tests/support/runner.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/frame.h"
#include "proto/gate_file.h"

#define BYTES_MAX 65536

/* A gate file in the making: H 2, G 2, d 4, S 3, D 8, all of one dtype, element i of a tensor being i / 4. */
struct maker {
	char header[8192];
	size_t header_size;
	uint8_t data[BYTES_MAX];
	size_t data_size;
};

struct spec {
	const char *name, *dtype, *shape;
	unsigned count;
};

static const struct spec good[] = {
	{"k_base", "F32", "[2,1,3,4]", 24},
	{"b", "F32", "[2,1,2]", 4},
	{"q_proj.weight", "F32", "[16,8]", 128},
	{"q_proj.bias", "F32", "[16]", 16},
	{"k_proj.weight", "F32", "[8,8]", 64},
	{"q_norm.weight", "F32", "[4]", 4},
	{"k_norm.weight", "F32", "[4]", 4},
};
enum { GOOD = sizeof(good) / sizeof(*good) };

static size_t put(uint8_t *to, const char *dtype, unsigned i)
{
	float value = (float)i / 4;
	double wide = value;
	uint32_t bits;

	memcpy(&bits, &value, sizeof(bits));
	if (strcmp(dtype, "F64") == 0) {
		memcpy(to, &wide, sizeof(wide));
		return sizeof(wide);
	}
	if (strcmp(dtype, "BF16") == 0) {
		memcpy(to, (uint8_t *)&bits + 2, 2);
		return 2;
	}
	if (strcmp(dtype, "F32") == 0) {
		memcpy(to, &bits, sizeof(bits));
		return sizeof(bits);
	}
	*to = (uint8_t)i;
	return 1;
}

static void add(struct maker *maker, const char *prefix, const struct spec *spec)
{
	size_t begin = maker->data_size;
	int n;

	for (unsigned i = 0; i < spec->count; i++)
		maker->data_size += put(maker->data + maker->data_size, spec->dtype, i);
	n = snprintf(maker->header + maker->header_size, sizeof(maker->header) - maker->header_size,
		"%c\"%s%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", maker->header_size ? ',' : '{',
		prefix, spec->name, spec->dtype, spec->shape, begin, maker->data_size);
	assert_true(n > 0 && maker->data_size < BYTES_MAX);
	maker->header_size += (size_t)n;
}

static struct kvg_safetensors *finish(struct maker *maker)
{
	struct kvg_safetensors *file;
	uint64_t length = maker->header_size + 1;
	uint8_t *bytes = malloc(8 + length + maker->data_size);
	char text[256];
	int fd;

	assert_non_null(bytes);
	maker->header[maker->header_size] = '}';
	memcpy(bytes, &length, 8);
	memcpy(bytes + 8, maker->header, length);
	memcpy(bytes + 8 + length, maker->data, maker->data_size);
	fd = kvg_memfd_from("gate", bytes, 8 + length + maker->data_size);
	assert_true(fd >= 0);
	assert_int_equal(kvg_safetensors_open_fd(fd, "gate", &file, text, sizeof(text)), 0);
	assert_int_equal(close(fd), 0);
	free(bytes);
	return file;
}

/* The good gate with tensor `index` replaced; NULL leaves it out. */
static struct kvg_safetensors *make(const char *prefix, size_t index, const struct spec *replacement)
{
	struct maker *maker = calloc(1, sizeof(*maker));
	struct kvg_safetensors *file;

	assert_non_null(maker);
	for (size_t i = 0; i < GOOD; i++)
		if (i != index)
			add(maker, prefix, &good[i]);
		else if (replacement)
			add(maker, prefix, replacement);
	file = finish(maker);
	free(maker);
	return file;
}

static void reads_every_dtype(void **state)
{
	static const struct spec kinds[] = {
		{"q_proj.weight", "F32", "[16,8]", 128},
		{"q_proj.weight", "F64", "[16,8]", 128},
		{"q_proj.weight", "BF16", "[16,8]", 128},
	};

	(void)state;
	for (size_t k = 0; k < sizeof(kinds) / sizeof(*kinds); k++) {
		struct kvg_safetensors *file = make("", 2, &kinds[k]);
		struct kvg_gate_tensors gate;
		char text[256];

		assert_int_equal(kvg_gate_tensors_read(file, "", &gate, text, sizeof(text)), 0);
		assert_int_equal(gate.shape.heads, 2);
		assert_int_equal(gate.shape.group, 2);
		assert_int_equal(gate.shape.hidden, 8);
		assert_int_equal(gate.shape.width, 4);
		assert_int_equal(gate.shape.sinks, 3);
		for (unsigned i = 0; i < 128; i++)
			assert_true(gate.wq[i] == (float)i / 4);
		assert_true(gate.k_base[23] == 23.0f / 4);
		kvg_gate_tensors_deinit(&gate);
		assert_null(gate.wq);
		assert_int_equal(kvg_gate_file_layers(file), 0);
		assert_null(kvg_safetensors_free(file));
	}
}

static void reads_half_precision(void **state)
{
	static const struct {
		uint16_t bits;
		float value;
	} halves[] = {{0x0000, 0.0f}, {0x3c00, 1.0f}, {0xc000, -2.0f}, {0x7bff, 65504.0f}, {0x0400, 0x1p-14f},
		{0x0001, 0x1p-24f}, {0x83ff, -0x1.ff8p-15f}, {0x3555, 0x1.554p-2f}};
	struct maker *maker = calloc(1, sizeof(*maker));
	struct kvg_safetensors *file;
	struct kvg_gate_tensors gate;
	char text[256];

	(void)state;
	assert_non_null(maker);
	for (size_t i = 0; i < GOOD; i++)
		if (i != 3)
			add(maker, "", &good[i]);
	maker->header_size += (size_t)sprintf(maker->header + maker->header_size,
		",\"q_proj.bias\":{\"dtype\":\"F16\",\"shape\":[16],\"data_offsets\":[%zu,%zu]}", maker->data_size,
		maker->data_size + 32);
	for (size_t i = 0; i < 16; i++)
		memcpy(maker->data + maker->data_size + 2 * i, &halves[i % 8].bits, 2);
	maker->data_size += 32;
	file = finish(maker);
	free(maker);
	assert_int_equal(kvg_gate_tensors_read(file, "", &gate, text, sizeof(text)), 0);
	for (size_t i = 0; i < 16; i++)
		assert_true(gate.bq[i] == halves[i % 8].value);
	kvg_gate_tensors_deinit(&gate);
	assert_null(kvg_safetensors_free(file));
}

static void refuses_what_does_not_fit(void **state)
{
	static const struct {
		size_t index;
		struct spec spec;
		const char *says;
	} bad[] = {
		{0, {"k_base", "F32", "[2,3,4]", 24}, "gate tensor layers.7.k_base has 3 dimensions, not 4"},
		{0, {"k_base", "F32", "[2,2,3,2]", 24}, "k_base has dimension 1 of 2, where the other tensors want 1"},
		{0, {"k_base", "F32", "[2,1,0,4]", 0}, "k_base has dimension 2 of 0, outside 1 to 1048576"},
		{1, {"b", "F32", "[3,1,2]", 6}, "b has dimension 0 of 3, where the other tensors want 2"},
		{1, {"b", "F32", "[2,1,3]", 6}, "q_proj.weight has dimension 0 of 16, where the other tensors want 24"},
		{2, {"q_proj.weight", "F32", "[16,7]", 112}, "q_proj.weight has dimension 1 of 7"},
		{3, {"q_proj.bias", "U8", "[16]", 16}, "q_proj.bias is neither BF16"},
		{4, {"k_proj.weight", "F32", "[4,8]", 32}, "k_proj.weight has dimension 0 of 4"},
		{5, {"q_norm.weight", "F32", "[5]", 5}, "q_norm.weight has dimension 0 of 5"},
	};
	char text[256];

	(void)state;
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		struct kvg_safetensors *file = make("layers.7.", bad[i].index, &bad[i].spec);
		struct kvg_gate_tensors gate = {.wq = (float *)text};

		assert_int_equal(kvg_gate_tensors_read(file, "layers.7.", &gate, text, sizeof(text)), -EINVAL);
		if (!strstr(text, bad[i].says))
			fail_msg("'%s' does not say '%s'", text, bad[i].says);
		assert_ptr_equal(gate.wq, text);
		assert_null(kvg_safetensors_free(file));
	}
	for (size_t i = 0; i < GOOD; i++) {
		struct kvg_safetensors *file = make("", i, NULL);
		struct kvg_gate_tensors gate;

		assert_int_equal(kvg_gate_tensors_read(file, "", &gate, text, sizeof(text)), -EINVAL);
		assert_non_null(strstr(text, good[i].name));
		assert_non_null(strstr(text, "is missing"));
		assert_null(kvg_safetensors_free(file));
	}
}

static void reads_a_real_gate(void **state)
{
	struct kvg_safetensors *file;
	char text[256];

	(void)state;
	assert_int_equal(kvg_safetensors_open("pilot-lm/gate.safetensors", &file, text, sizeof(text)), 0);
	assert_int_equal(kvg_gate_file_layers(file), 6);
	for (unsigned i = 0; i < 6; i++) {
		struct kvg_gate_tensors gate;
		char prefix[32];

		(void)snprintf(prefix, sizeof(prefix), "layers.%u.", i);
		assert_int_equal(kvg_gate_tensors_read(file, prefix, &gate, text, sizeof(text)), 0);
		assert_int_equal(gate.shape.heads, 4);
		assert_int_equal(gate.shape.group, 2);
		assert_int_equal(gate.shape.hidden, 256);
		assert_int_equal(gate.shape.width, 16);
		assert_int_equal(gate.shape.sinks, 16);
		kvg_gate_tensors_deinit(&gate);
	}
	assert_int_equal(
		kvg_gate_tensors_read(file, "layers.6.", &(struct kvg_gate_tensors){0}, text, sizeof(text)), -EINVAL);
	assert_null(kvg_safetensors_free(file));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(reads_every_dtype),
		cmocka_unit_test(reads_half_precision),
		cmocka_unit_test(refuses_what_does_not_fit),
		cmocka_unit_test(reads_a_real_gate),
	};

	return runner_run("gate_file", tests, sizeof(tests) / sizeof(*tests));
}
